"""Prototypes: the mean embedding of every class, and the scores of queries by their distance to each.

Snell, Swersky, Zemel (2017), arXiv 1703.05175. The cross-entropy of these scores is the prototypical network's loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses import base


def prototypes(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "w d"], Int[Tensor, " w"]]:
    """The mean embedding of every class, and the classes, ascending.

    Args:
        embeddings: (n, d) of the support set.
        labels: (n,), any integers >= 0.

    Raises:
        InputError: a shape, a type or a value is wrong.

    Example:
        >>> import torch
        >>> means, classes = prototypes(torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]), torch.tensor([7, 7, 3]))
        >>> means.tolist(), classes.tolist()
        ([[5.0, 5.0], [1.0, 0.0]], [3, 7])
    """
    return means_of_classes(*labelled(embeddings, labels, "embeddings", "labels"))


def means_of_classes(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`prototypes` of what has been checked."""
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = embeddings.new_zeros(len(classes), embeddings.shape[1]).index_add(0, index, embeddings)
    return sums / counts[:, None], classes


def prototype_logits(
    queries: Float[Tensor, "n d"], means: Float[Tensor, "w d"], temperature: float = 1.0
) -> Float[Tensor, "n w"]:
    """Minus the squared distance of every query to every prototype, over the temperature.

    Args:
        queries: embeddings (n, d).
        means: prototypes (w, d).
        temperature: > 0; 1 as in Snell et al.

    Raises:
        InputError: a shape, a type or a value is wrong.

    Example:
        >>> import torch
        >>> prototype_logits(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])).tolist()
        [[-1.0, -9.0]]
    """
    base.same_device(queries=queries, means=means)
    means = base.widened(checks.matrix(means, "means"))
    queries = base.widened(checks.matrix(queries, "queries", columns=means.shape[1]))
    temperature = checks.number(temperature, "temperature", low=0, low_open=True)
    return torch.stack([(queries - mean).square().sum(1) for mean in means], 1) / -temperature


def labelled(embeddings: Tensor, labels: Tensor, name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    """Checked embeddings, at least float32, and their labels, by the names of both."""
    base.same_device(**{name: embeddings, labels_name: labels})
    embeddings = checks.matrix(embeddings, name)
    return base.widened(embeddings), checks.labels(labels, len(embeddings), None, labels_name)


def places(labels: Tensor, classes: Tensor, name: str) -> Tensor:
    """For each label its index in `classes`, ascending; all labels must be there."""
    index = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    strange = classes[index] != labels
    if bool(strange.any()):
        row = int(strange.to(torch.uint8).argmax())
        raise InputError(f"{name} must be among the classes of the support set, found {int(labels[row])} at row {row}")
    return index
