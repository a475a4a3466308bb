"""What a policy is rewarded for at test time: CLIP's score of an input and a candidate, one judge or several.

A reward is any callable ``reward(inputs, index) -> scores``: inputs (b, ...), indices of candidates (b, k), scores
(b, k). One that also has ``bind(inputs)``, which returns the scores as a function of the index alone, is asked through
that: it encodes the inputs once and is asked at every step. One that says how many candidates it knows (``classes``) is
checked against the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError

Reward = Callable[[Tensor, Tensor], Tensor]
Scorer = Callable[[Tensor], Tensor]

CONFIDENCES = {"ViT-L/14@336px": 10, "ViT-L/14": 5, "RN50x64": 3, "ViT-B/16": 1}
"""How much the authors trust OpenAI's CLIP models, for `confidence_weights`."""


class ClipScoreReward:
    """CLIPScore (Hessel et al. 2021): weight x max(cosine, 0) of an input and the candidates of a gallery.

    Args:
        encode: inputs (b, ...) to features (b, d), such as ``face.encode_image`` of a `VisionLanguage`, or
            ``face.encode_text`` where texts look for images. Called without gradients.
        gallery: features of all candidates (g, d), in the order of the policy's logits: the same model's features of
            the class texts, the captions, or the images.
        weight: what cosines are multiplied by, > 0; 2.5 as in CLIPScore.
        size: height and width of the images that `encode` wants, where it differs from the policy's (ViT-L/14@336
            judges for a ViT-B/16 at 224): bicubic, corners aligned, as in the authors' code. None hands them on.

    Raises:
        InputError: a setting is out of range, the gallery is not finite; at a call, features and gallery differ in
            width.

    Example:
        >>> reward = ClipScoreReward(lambda images: images.flatten(1), torch.eye(3))
        >>> reward(torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[0, 1, 2]]))
        tensor([[1.5000, 2.0000, 0.0000]])
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        gallery: Float[Tensor, "g d"],
        *,
        weight: float = 2.5,
        size: int | None = None,
    ):
        self.encode = encode
        gallery = checks.matrix(gallery, "gallery").detach()
        self.gallery = F.normalize(gallery.to(torch.promote_types(gallery.dtype, torch.float32)), dim=-1)
        self.weight = checks.number(weight, "weight", low=0.0, low_open=True)
        self.size = None if size is None else checks.integer(size, "size", low=1)
        self.classes = len(gallery)

    def __call__(self, inputs: Tensor, index: Int[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Scores of every input and its candidates."""
        return self.bind(inputs)(index)

    def bind(self, inputs: Tensor) -> Scorer:
        """The scores of these inputs, as a function of the index; the inputs are encoded here, once."""
        features = self.features(inputs)
        return lambda index: self.weight * torch.einsum("bd,bkd->bk", features, self.gallery[index]).clamp_min(0)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Float[Tensor, "b d"]:
        """Unit features of the inputs."""
        if self.size is not None and inputs.shape[-2:] != (self.size, self.size):
            inputs = F.interpolate(inputs, size=(self.size, self.size), mode="bicubic", align_corners=True)
        features = F.normalize(checks.tensor(self.encode(inputs), "what encode returns").to(self.gallery.dtype), dim=-1)
        if features.shape[-1] != self.gallery.shape[-1]:
            raise InputError(
                f"gallery must have the width of the reward's features, {features.shape[-1]}, "
                f"got {self.gallery.shape[-1]}"
            )
        return features


class RewardEnsemble:
    """Several rewards as one: the weighted sum of their scores.

    Args:
        rewards: at least one.
        weights: one a reward; the plain mean by default. The authors weight OpenAI's models by `confidence_weights`.

    Raises:
        InputError: no reward, not as many weights as rewards, or the rewards know different numbers of candidates.

    Example:
        >>> one, two = (lambda x, index, s=s: torch.full(index.shape, s) for s in (1.0, 3.0))
        >>> RewardEnsemble([one, two])(torch.zeros(1, 2), torch.tensor([[0, 1]]))
        tensor([[2., 2.]])
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None):
        if not rewards:
            raise InputError("rewards must hold at least one reward, got none")
        if weights is not None and len(weights) != len(rewards):
            raise InputError(f"weights must have one entry a reward, {len(rewards)}, got {len(weights)}")
        known = {classes for reward in rewards if (classes := getattr(reward, "classes", None)) is not None}
        if len(known) > 1:
            raise InputError(f"rewards must know the same candidates, they know {sorted(known)}")
        self.rewards = list(rewards)
        given = [1 / len(rewards)] * len(rewards) if weights is None else weights
        self.weights = [checks.number(weight, f"weights[{i}]") for i, weight in enumerate(given)]
        self.classes: int | None = known.pop() if known else None

    def __call__(self, inputs: Tensor, index: Int[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """The weighted sum of the scores."""
        return self.bind(inputs)(index)

    def bind(self, inputs: Tensor) -> Scorer:
        """The scores of these inputs, as a function of the index."""
        scorers = [bind(reward, inputs) for reward in self.rewards]
        return lambda index: torch.stack([w * score(index) for w, score in zip(self.weights, scorers)]).sum(0)


def confidence_weights(names: Sequence[str]) -> list[float]:
    """The authors' weights for judges by these names: shares of `CONFIDENCES`, each rounded to two places.

    Raises:
        InputError: a name is not among them.

    Example:
        >>> confidence_weights(["ViT-L/14@336px", "RN50x64", "ViT-L/14"])
        [0.56, 0.17, 0.28]
    """
    for name in names:
        if name not in CONFIDENCES:
            raise InputError(f"names must be among {', '.join(CONFIDENCES)}, got {name!r}")
    total = sum(CONFIDENCES[name] for name in names)
    return [round(CONFIDENCES[name] / total, 2) for name in names]


def bind(reward: Reward, inputs: Tensor) -> Scorer:
    """The scores of these inputs, as a function of the index."""
    own: Any = getattr(reward, "bind", None)
    return partial(reward, inputs) if own is None else own(inputs)


def advantages(
    scores: Float[Tensor, "b k"], *, baseline: bool = True, amplify: bool = False, across_views: bool = False
) -> Float[Tensor, "b k"]:
    """What a policy gradient is weighted by: scores less their mean over the candidates of the same input.

    Args:
        scores: k candidates for each of b views.
        baseline: False takes the scores as they are; so does a single candidate, as in the authors' code.
        amplify: divide by the (unbiased) standard deviation + 1e-5.
        across_views: one mean, and deviation, over all b x k scores.

    Example:
        >>> advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    rows = scores.reshape(1, -1) if across_views else scores
    if not baseline or rows.shape[1] == 1:
        return scores
    centred = rows - rows.mean(1, keepdim=True)
    if amplify:
        centred = centred / (rows.std(1, keepdim=True) + 1e-5)
    return centred.view_as(scores)
