"""Every adapter on the models that people have: transformers', torchvision's and timm's, small and never trained."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from builders import BUILDERS, LEARNERS, Builder, source
from torch import nn
from toynet import built, stream

from trimtab.adaptation import ADAPTERS, PETAL, CoRe, RoTTA, Tent
from trimtab.adaptation.base import rows
from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS, NORMS
from trimtab.core.predictions import logits_of

# the source's labels are made up: small steps, for weights that went nowhere before
GENTLE = Builder(PETAL, prepare={"epochs": 3, "lr": 1e-5, "swa_lr": 1e-5}, augment=True, augmentations=3)
EVERY = {**BUILDERS, "petal": GENTLE}
CLASSES, SHAPE = 5, (3, 32, 32)
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
BATCH_NORM_ALONE = "batch", "mixed", "ema", "alpha", "unmix", "core"
ANY_NORM = "tent", "tent_sgd", "eata", "eta", "cafa", "ostta", "deyo", "sar", "rotta"


def transformers_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES, **sizes))


def transformers_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=CLASSES, **SMALL))


def transformers_convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    return ConvNextForImageClassification(ConvNextConfig(num_labels=CLASSES, **sizes))


def torchvision_resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def torchvision_resnet18_frozen():
    from torchvision.models import resnet18
    from torchvision.ops import FrozenBatchNorm2d

    return resnet18(num_classes=CLASSES, norm_layer=FrozenBatchNorm2d)


def torchvision_mobilenet():
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=CLASSES)


def torchvision_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=CLASSES, layer_scale=1.0)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=CLASSES)


def timm_model(name, **settings):
    import timm

    return timm.create_model(name, num_classes=CLASSES, **settings)


def timm_resnet():
    return timm_model("test_resnet")


def timm_efficientnet():
    return timm_model("test_efficientnet")


def timm_convnext():
    return timm_model("test_convnext")


def timm_vit():
    return timm_model("test_vit", img_size=32)


def transformers_segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    stages = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    }
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, **stages))


def torchvision_lraspp():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES)


def torchvision_deeplab():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES, aux_loss=True)


def marked(*vision):
    return [pytest.param(make, marks=pytest.mark.vision) for make in vision]


TRANSFORMERS = [transformers_resnet, transformers_vit, transformers_convnext]
CLASSIFIERS = TRANSFORMERS + marked(
    torchvision_resnet18,
    torchvision_resnet18_frozen,
    torchvision_mobilenet,
    torchvision_convnext,
    torchvision_vit,
    timm_resnet,
    timm_efficientnet,
    timm_convnext,
    timm_vit,
)
SEGMENTERS = [transformers_segformer, *marked(torchvision_lraspp, torchvision_deeplab)]
DENSE = [name for name, build in EVERY.items() if getattr(build.method, "dense", False)]


@cache
def network(make):
    """The model as after some training: with running statistics of its own inputs, and unsure predictions that differ.

    Without, batch statistics change an untrained network beyond measure, and fresh heads say the same to everything.
    """
    model, x = built(make), images()[0]
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    head = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    with torch.no_grad():
        for norm in norms:
            norm.train().momentum = 1.0
        model(x)
        for norm, momentum in zip(norms, momenta):
            norm.eval().momentum = momentum
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
        logits = rows(logits_of(model, x))
        head.weight /= logits.std(0).mean()
        head.bias -= rows(logits_of(model, x)).mean(0)
    return model


def images(**sizes):
    return stream(**{"batches": 3, "n": 12, "shape": SHAPE, **sizes})


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(name, model):
    """What is said where the model has no layer that the adapter works with."""
    if name in BATCH_NORM_ALONE and not any(isinstance(m, BATCH_NORMS) for m in model.modules()):
        return "model must have a batch normalisation layer, found none"
    if name in ANY_NORM and not any(isinstance(m, NORMS) for m in model.modules()):
        return "model must have a normalisation layer with affine parameters, found none"
    return None


def follow(name, model, shape):
    """An adapter lives through a short stream and a reset, and the model is none the wiser."""
    before, flags = everything(model), [p.requires_grad for p in model.parameters()]
    adapter = EVERY[name](model, SHAPE)
    start = {n: p.clone() for n, p in adapter.moving.items()}
    random = None if adapter.generator is None else adapter.generator.get_state()
    xs = images()
    with adapter.frozen():
        first = adapter(xs[0])
    for x in xs:
        outputs = adapter(x)
        assert outputs.shape == (12, CLASSES, *shape)
        assert outputs.isfinite().all()
    assert (int(adapter.samples), int(adapter.skipped), int(adapter.resets)) == (36, 0, 0)
    if name in LEARNERS:
        assert int(adapter.updates) > 0
        assert any(not torch.equal(p, start[n]) for n, p in adapter.moving.items())
    adapter.reset()
    if random is not None:
        adapter.generator.set_state(random)
    assert all(torch.equal(p, start[n]) for n, p in adapter.moving.items())
    with adapter.frozen():
        assert torch.equal(adapter(xs[0]), first)
    assert same(everything(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_every_adapter_is_here():
    assert set(ADAPTERS) <= {build.method for build in EVERY.values()}
    assert {EVERY[name].method for name in DENSE} >= {kind for kind in ADAPTERS if kind.dense}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("make", CLASSIFIERS)
def test_classifiers(make, name):
    model = network(make)
    if message := refused(name, model):
        with pytest.raises(InputError, match=message):
            EVERY[name](model, SHAPE)
    else:
        follow(name, model, ())


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("make", SEGMENTERS)
def test_segmenters(make, name):
    follow(name, network(make), (8, 8) if make is transformers_segformer else SHAPE[1:])


@pytest.mark.parametrize("name", ["lame", "eta", "sar", "cotta"])
def test_segmenters_are_refused_in_words(name):
    with pytest.raises(InputError, match=r"model must return logits \(n, c\) with c >= 2, it returned \(12, 5, 8, 8\)"):
        EVERY[name](network(transformers_segformer), SHAPE)(images()[0])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("make", TRANSFORMERS)
def test_images_in_a_mapping_are_images(make, name):
    build, model = EVERY[name], network(make)
    if refused(name, model):
        pytest.skip("refused")
    brighter = {"augment": lambda x, generator: x + 0.01} if build.augment else {}
    mapped = {"augment": lambda x, generator: {n: v + 0.01 for n, v in x.items()}} if build.augment else {}
    plain, named = build(model, SHAPE, **brighter), build(model, SHAPE, **mapped)
    if build.method is RoTTA:
        with pytest.raises(InputError, match="x must be a tensor, which the memory can hold, got dict"):
            named({"pixel_values": images()[0]})
        return
    for x in images():
        assert torch.equal(named({"pixel_values": x}), plain(x))


@pytest.mark.parametrize("name", [name for name, build in EVERY.items() if build.prepare is not None])
def test_preparation_from_batches_in_mappings(name):
    model, method, settings = network(transformers_resnet), EVERY[name].method, EVERY[name].prepare
    plain = source(model, SHAPE)
    expected = method.prepare(model, plain, **settings)
    prepared = method.prepare(model, [{"pixel_values": x, "labels": y} for x, y in plain], **settings)
    assert same(dict(prepared), dict(expected))


@pytest.mark.vision
@pytest.mark.parametrize("make", [torchvision_mobilenet, timm_efficientnet])
def test_layers_in_the_place_of_others_do_all_that_those_did(make):
    """timm's batch normalisation activates as well."""
    model, x = network(make), images()[0]
    still = {"mixed": {"alpha": 0.0}, "alpha": {"source_weight": 1.0}, "core": {"source_weight": 1.0}, "rotta": {}}
    for name, settings in still.items():
        with EVERY[name](model, SHAPE, **settings).frozen() as adapter, torch.no_grad():
            torch.testing.assert_close(adapter(x), model(x))
    moved = EVERY["alpha"](model, SHAPE, source_weight=0.0, unbiased=False)(x)
    torch.testing.assert_close(moved, EVERY["batch"](model, SHAPE)(x))


@pytest.mark.vision
@pytest.mark.bad_input
def test_one_image_alone_has_no_statistics_behind_a_pooling():
    """DeepLab normalises what it pools over the whole image: one value a channel."""
    model, x = network(torchvision_deeplab), images()[0][:1]
    for kind in (Tent, CoRe):
        with pytest.raises(InputError, match="more than one value"):
            kind(deepcopy(model))(x)
