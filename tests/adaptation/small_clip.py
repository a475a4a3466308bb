"""CLIP and SigLIP of both libraries in a few thousand random weights, the same in every run."""

import torch
from toynet import built

SIZE, LENGTH, WORDS, START, END = 32, 9, 40, 38, 39
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def transformers_clip():
    from transformers import CLIPConfig, CLIPModel

    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    text = {**SMALL, **special, "vocab_size": WORDS, "max_position_embeddings": LENGTH}
    vision = {**SMALL, "image_size": SIZE, "patch_size": 16}
    return built(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)))


def transformers_siglip():
    from transformers import SiglipConfig, SiglipModel

    text = {**SMALL, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "projection_size": 16}
    vision = {**SMALL, "image_size": SIZE, "patch_size": 16}
    return built(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))


def open_clip_clip(**options):
    import open_clip

    vision = {"image_size": SIZE, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2}
    sizes = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    return built(lambda: open_clip.create_model("ViT-B-32", **sizes, **options))


def open_clip_siglip():
    import open_clip

    vision = {"image_size": SIZE, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    sizes = {"embed_dim": 64, "force_image_size": SIZE, "vision_cfg": vision, "text_cfg": text}
    return built(lambda: open_clip.create_model("ViT-B-16-SigLIP", **sizes))


def images(n, seed=0):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def texts(n, seed=0):
    """A start token, the same four words, one to three words that differ, an end token, padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(n, LENGTH, dtype=torch.int64)
    tokens[:, 0] = START
    tokens[:, 1:5] = torch.tensor([7, 5, 9, 7])
    for row in tokens:
        words = int(torch.randint(1, 4, (), generator=generator))
        row[5 : 5 + words] = torch.randint(1, START, (words,), generator=generator)
        row[5 + words] = END
    return tokens
