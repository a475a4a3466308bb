"""Which normalisation layers move where those of the network's top block are left alone."""

from __future__ import annotations

from torch import nn

from trimtab.core.checks import InputError
from trimtab.core.modules import norm_parameters

_TOP = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")


def in_top_block(layer: str) -> bool:
    """Whether the layer of that name counts as the network's top.

    The rule of the authors of SAR and DeYO: the name holds ``layer4`` (the last stage of a ResNet), ``blocks.9``,
    ``blocks.10`` or ``blocks.11`` (the last quarter of a ViT-B), or ``norm.``, or it is ``norm`` (a ViT's last).

    Example:
        >>> in_top_block("layer4.1.bn2"), in_top_block("layer3.1.bn2"), in_top_block("blocks.8.norm1")
        (True, False, False)
    """
    return layer == "norm" or any(part in layer for part in _TOP)


def lower_norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of the normalisation layers outside the top block, by their names in `model`.

    For `parameters_of`: moving the top of a network changes its decisions most, and less safely. The rule goes by the
    names of torchvision's and timm's ResNets and ViT-B. It finds no top in networks with other names (a CIFAR ResNet of
    three stages; ``transformers``' ViT with its ``layer.11``; a ViT inside a wrapper, whose last norm is not called
    ``norm`` any more), where all layers move, and takes blocks 9 to 11 of any stage for the top (timm's ConvNeXt). A
    rule of your own, such as ``lambda model: {n: p for n, p in norm_parameters(model).items() if "stage4" not in n}``,
    does better there.

    Raises:
        InputError: the model has no normalisation layer with affine parameters, or none outside the top block: what
            moves is then not chosen silently in another way.

    Example:
        >>> from collections import OrderedDict
        >>> blocks = {"bn1": nn.BatchNorm2d(4), "layer1": nn.BatchNorm2d(4), "layer4": nn.BatchNorm2d(4)}
        >>> list(lower_norm_parameters(nn.Sequential(OrderedDict(blocks))))
        ['bn1.weight', 'bn1.bias', 'layer1.weight', 'layer1.bias']
    """
    everywhere = norm_parameters(model)
    chosen = {name: value for name, value in everywhere.items() if not in_top_block(name.rpartition(".")[0])}
    if not chosen:
        raise InputError(
            "model must have a normalisation layer outside its top block (named layer4, blocks.9 to 11, norm), it has "
            f"only {', '.join(sorted({name.rpartition('.')[0] for name in everywhere}))}; "
            "pass parameters_of=norm_parameters to move them all the same"
        )
    return chosen
