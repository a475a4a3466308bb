"""Small CLIP and SigLIP models of both libraries with enough patches to condense, the same in every run."""

import pytest
import torch
import torch.nn.functional as F
from toynet import built

from trimtab.adaptation.vision_language import ImageQueries, VisionLanguage

CLASSES, SIDE, PATCH, WIDTH, HIDDEN, DEPTH = 3, 96, 16, 16, 24, 6
SMALL = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 2}
VISION = {**SMALL, "num_hidden_layers": DEPTH, "image_size": SIDE, "patch_size": PATCH}
TEXT = {"num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 5, "bos_token_id": 0, "eos_token_id": 8}
OPEN_TEXT = {"context_length": 5, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}


def transformers_clip():
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, **TEXT}
    return spread(built(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))))


def transformers_siglip():
    from transformers import SiglipConfig, SiglipModel

    return spread(built(lambda: SiglipModel(SiglipConfig(text_config={**SMALL, **TEXT}, vision_config=VISION))))


def transformers_tower():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return spread(built(lambda: CLIPVisionModel(CLIPVisionConfig(**VISION))))


def open_clip_clip():
    import open_clip

    vision = {
        "image_size": SIDE,
        "patch_size": PATCH,
        "width": 16,
        "layers": DEPTH,
        "head_width": 8,
        "ls_init_value": 0.5,
    }
    return built(lambda: open_clip.create_model("ViT-B-32", embed_dim=12, vision_cfg=vision, text_cfg=OPEN_TEXT))


def open_clip_siglip():
    import open_clip
    import timm

    text = {**OPEN_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}

    def make():
        model = open_clip.create_model("ViT-B-16-SigLIP", embed_dim=64, vision_cfg=vision, text_cfg=text)
        # SigLIP's own towers have no class token; they are all large
        model.visual.trunk = timm.create_model(
            "test_vit", img_size=SIDE, num_classes=0, global_pool="map", class_token=False
        )
        return model

    return built(make)


every_model = pytest.mark.parametrize(
    "make",
    [
        transformers_clip,
        transformers_siglip,
        pytest.param(open_clip_clip, marks=pytest.mark.vision),
        pytest.param(open_clip_siglip, marks=pytest.mark.vision),
    ],
)


def spread(model):
    """The model with larger random weights, so that its images differ and its attention is not uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def zero_shot(model):
    """A classifier whose classes are the features of a few images."""
    face = VisionLanguage(model)
    with torch.no_grad():
        return ImageQueries(face, face.encode_image(images(CLASSES, seed=99)))


def class_features():
    return F.normalize(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(5)), dim=1)


def images(n, seed=0):
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
