"""Vision transformers taken apart: what goes into their blocks, the parts of each block, and what comes out.

Methods that change the tokens on their way need the blocks, not the model. `take_apart` recognises the vision towers
of ``transformers`` (CLIP, SigLIP), of OpenAI's ``clip`` and of ``open_clip``, and ``timm``'s vision transformers, alone
or inside ``open_clip``; what it gives computes what the model itself computes, up to rounding. Only pre-LN blocks are
taken: x + attention(ln_1(x)), then x + mlp(ln_2(x)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError

Map = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """One pre-LN block.

    Args:
        ln_1, ln_2: the normalisations before attention and before the perceptron.
        project: tokens (n, t, w) to queries, keys and values, side by side (n, t, 3 w).
        heads: attention heads.
        out: what follows attention, up to the residual.
        mlp: the perceptron, up to the residual.
    """

    ln_1: Map
    project: Map
    heads: int
    out: Map
    ln_2: Map
    mlp: Map

    def __call__(self, tokens: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        """The whole block."""
        tokens = tokens + self.gather(*self.split(self.ln_1(tokens)))
        return tokens + self.mlp(self.ln_2(tokens))

    def split(self, tokens: Float[Tensor, "n t w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of normalised tokens, each (n, heads, t, w / heads)."""
        queries, keys, values = self.project(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def gather(self, queries: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "n q w"]:
        """What attention gathers for each query."""
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


def attention(query: Float[Tensor, "n heads d"], keys: Float[Tensor, "n heads t d"]) -> Float[Tensor, "n heads t"]:
    """One row of the attention map: how one query weighs the keys."""
    return (keys @ query[..., None] / query.shape[2] ** 0.5)[..., 0].softmax(2)


class VisionTransformer(NamedTuple):
    """A vision tower in parts.

    Args:
        embed: images to tokens (n, t, w), the class token first where there is one.
        blocks: one after the other.
        width: of a token, w.
        finish: tokens to features (n, d), in the space of the text features where the tower has one.
        probe: None where there is a class token; otherwise tokens to the weights (n, heads, t) by which the tower's
            final attention pooling, asked at these tokens, would gather them.
    """

    embed: Map
    blocks: tuple[Block, ...]
    width: int
    finish: Map
    probe: Map | None = None

    def __call__(self, images: Tensor) -> Float[Tensor, "n d"]:
        """The features."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.finish(tokens)

    def summary(self, tokens: Float[Tensor, "n t w"]) -> Float[Tensor, "n w"]:
        """The class token; without one, the mean of the tokens that the pooling would gather."""
        if self.probe is None:
            return tokens[:, 0]
        return (self.probe(tokens).mean(1, keepdim=True) @ tokens)[:, 0]


class TowerClassifier(nn.Module):
    """A vision tower alone as a classifier: scaled cosines of its features with those of the classes.

    Args:
        tower: what `take_apart` takes.
        class_features: unit rows (c, d), one a class, in the space of the tower's features.
        logit_scale: what cosines are multiplied by, > 0; 100, as in CLIP.

    Raises:
        InputError: `class_features` is no finite matrix of two rows or more, or the scale is not positive.
    """

    class_features: Tensor

    def __init__(self, tower: nn.Module, class_features: Float[Tensor, "c d"], *, logit_scale: float = 100.0):
        super().__init__()
        if len(checks.matrix(class_features, "class_features")) < 2:
            raise InputError(f"class_features must have at least two rows, got {len(class_features)}")
        self.tower = tower
        self.logit_scale = checks.number(logit_scale, "logit_scale", low=0.0, low_open=True)
        self.register_buffer("class_features", class_features.detach().clone())

    def forward(self, images: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n c"]:
        """Logits."""
        return self.classify(take_apart(self.tower)(images))

    def classify(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Logits from features of the tower."""
        classes = self.class_features.to(torch.promote_types(self.class_features.dtype, torch.float32))
        return self.logit_scale * F.normalize(features.to(classes.dtype), dim=1) @ classes.T


def take_apart(model: nn.Module) -> VisionTransformer:
    """The vision transformer of `model`, in parts that share its weights: of no use to a copy of it.

    Args:
        model: a vision tower, or a model that holds one as ``vision_model`` (transformers) or ``visual`` (open_clip).

    Raises:
        InputError: the model is of no known kind, or its blocks are not pre-LN blocks with plain attention.

    Example:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
        >>> tower = CLIPVisionModel(CLIPVisionConfig(image_size=12, patch_size=4, **shape)).eval()
        >>> parts, images = take_apart(tower), torch.ones(2, 3, 12, 12)
        >>> len(parts.blocks), parts.embed(images).shape
        (3, torch.Size([2, 10, 8]))
        >>> torch.allclose(parts(images), tower(images).pooler_output, atol=1e-5)
        True
    """
    tower: Any = getattr(model, "vision_model", getattr(model, "visual", model))
    if hasattr(tower, "embeddings") and hasattr(tower, "encoder") and hasattr(tower, "post_layernorm"):
        return _transformers(tower, getattr(model, "visual_projection", None))
    if hasattr(tower, "class_embedding") and hasattr(tower, "transformer") and hasattr(tower, "ln_post"):
        return _openai(tower)
    trunk = getattr(tower, "trunk", tower)
    if hasattr(trunk, "patch_embed") and hasattr(trunk, "blocks") and hasattr(trunk, "forward_head"):
        return _timm(trunk, nn.Identity() if trunk is tower else tower.head)
    raise InputError(
        "model must hold a vision transformer of transformers (CLIP, SigLIP), open_clip or timm, "
        f"found {type(tower).__name__}"
    )


def _transformers(tower: Any, projection: nn.Module | None) -> VisionTransformer:
    if not isinstance(getattr(tower.embeddings, "patch_embedding", None), nn.Conv2d):
        raise InputError(f"model must cut images into patches itself, {type(tower).__name__} takes patches")

    def block(layer: Any) -> Block:
        attention = layer.self_attn
        if not hasattr(attention, "q_proj"):
            raise InputError(f"model must have blocks with plain self-attention, found {type(attention).__name__}")
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return Block(
            layer.layer_norm1,
            lambda x: torch.cat([part(x) for part in parts], 2),
            attention.num_heads,
            attention.out_proj,
            layer.layer_norm2,
            layer.mlp,
        )

    blocks = tuple(map(block, tower.encoder.layers))
    width = tower.embeddings.embed_dim
    if hasattr(tower, "pre_layrnorm"):
        last = nn.Identity() if projection is None else projection
        return VisionTransformer(
            lambda images: tower.pre_layrnorm(tower.embeddings(images)),
            blocks,
            width,
            lambda tokens: last(tower.post_layernorm(tokens[:, 0])),
        )
    head: Any = getattr(tower, "head", None)
    if not hasattr(head, "probe"):
        raise InputError("model must pool its tokens by a class token or by attention, this vision tower does neither")
    pool = head.attention
    weights, biases = pool.in_proj_weight.chunk(3), pool.in_proj_bias.chunk(3)
    query = F.linear(head.probe[0, 0], weights[0], biases[0])
    probe = _probe(query, weights[1], pool.num_heads, tower.post_layernorm)
    return VisionTransformer(tower.embeddings, blocks, width, lambda tokens: head(tower.post_layernorm(tokens)), probe)


def _openai(tower: Any) -> VisionTransformer:
    if getattr(tower, "attn_pool", None) is not None or getattr(tower, "pool_type", "tok") != "tok":
        raise InputError("model must take its features from the class token, this vision tower does not")

    def block(layer: Any) -> Block:
        attention = layer.attn
        if not isinstance(attention, nn.MultiheadAttention) or hasattr(layer, "ln_1_kv"):
            raise InputError(f"model must have blocks with plain self-attention, found {type(layer).__name__}")
        scale_1, scale_2 = getattr(layer, "ls_1", nn.Identity()), getattr(layer, "ls_2", nn.Identity())
        return Block(
            layer.ln_1,
            lambda x: F.linear(x, attention.in_proj_weight, attention.in_proj_bias),
            attention.num_heads,
            lambda x: scale_1(attention.out_proj(x)),
            layer.ln_2,
            lambda x: scale_2(layer.mlp(x)),
        )

    def embed(images: Tensor) -> Tensor:
        patches = tower.conv1(images.to(tower.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        first = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return tower.ln_pre(torch.cat([first, patches], 1) + tower.positional_embedding.to(patches.dtype))

    def finish(tokens: Tensor) -> Tensor:
        features = tower.ln_post(tokens[:, 0])
        return features if tower.proj is None else features @ tower.proj

    return VisionTransformer(embed, tuple(map(block, tower.transformer.resblocks)), len(tower.class_embedding), finish)


def _timm(trunk: Any, head: nn.Module) -> VisionTransformer:
    def block(layer: Any) -> Block:
        attention: Any = getattr(layer, "attn", None)
        plain = hasattr(layer, "ls1") and hasattr(attention, "qkv") and getattr(attention, "gate", None) is None
        if not plain or not all(isinstance(norm, nn.Identity) for norm in (attention.q_norm, attention.k_norm)):
            raise InputError(f"model must have pre-LN blocks with plain self-attention, found {type(layer).__name__}")
        norm = getattr(attention, "norm", nn.Identity())
        return Block(
            layer.norm1,
            attention.qkv,
            attention.num_heads,
            lambda x: layer.ls1(attention.proj(norm(x))),
            layer.norm2,
            lambda x: layer.ls2(layer.mlp(x)),
        )

    blocks = tuple(map(block, trunk.blocks))
    pool = trunk.attn_pool
    probed = pool is not None and pool.latent_len == 1 and pool.pos_embed is None
    if trunk.num_prefix_tokens != (0 if probed else 1) or not (probed or trunk.global_pool == "token"):
        raise InputError(
            "model must pool its tokens by one class token or by attention with one probe, this one has "
            f"{trunk.num_prefix_tokens} prefix tokens and pools by {trunk.global_pool!r}"
        )
    probe = None
    if probed:
        probe = _probe(pool.q(pool.latent)[0, 0], pool.kv.weight.chunk(2)[0], pool.num_heads, trunk.norm)
    return VisionTransformer(
        lambda images: trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images))),
        blocks,
        trunk.embed_dim,
        lambda tokens: head(trunk.forward_head(trunk.norm(tokens))),
        probe,
    )


def _probe(query: Tensor, keys: Tensor, heads: int, norm: Map) -> Map:
    """The weights of an attention pooling whose one query is fixed: a single product, the keys folded into the query.

    The bias of the keys adds the same to every token, and falls out of the softmax.
    """
    parts = query.view(heads, 1, -1) @ keys.view(heads, -1, keys.shape[1])
    folded = parts[:, 0] / (len(query) // heads) ** 0.5
    return lambda tokens: (norm(tokens) @ folded.T).softmax(1).transpose(1, 2)
