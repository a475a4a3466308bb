"""One face over CLIP-like models of open_clip and transformers, and the policies that test-time methods tune.

`VisionLanguage` says image and text features, scale and bias in one way for ``open_clip.create_model(...)`` (CLIP,
SigLIP) and for `transformers.CLIPModel` and `SiglipModel`; it imports neither library. Over it stand three
classifiers: `ImageQueries` (an image against a gallery of texts: zero-shot classes, or captions to be found),
`TextQueries` (a text against a gallery of images) and `PromptedClasses` (a learnable context in front of every class
name, which CoOp and TPT call a prompt).

A learnable context takes the place of token embeddings inside the model's own text encoder, by a hook on its
``token_embedding``, so that masks, pooling and projection are those of the library, whichever it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks, progress
from trimtab.core.checks import InputError
from trimtab.core.modules import evaluating

_IMAGE_PARTS = re.compile(r"(^|\.)(visual|vision_model|visual_projection)\.")
_SCALES = re.compile(r"(^|\.)logit_(scale|bias)$")


class VisionLanguage(nn.Module):
    """A CLIP-like model of either library: unit features of images and texts, and what makes logits of them.

    Args:
        model: ``open_clip.create_model(...)`` or ``transformers.CLIPModel`` / ``SiglipModel``; held, not copied.

    Raises:
        InputError: the model has neither library's interface.

    Example:
        >>> from transformers import SiglipConfig, SiglipModel
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> config = SiglipConfig(text_config=dict(vocab_size=9, **sizes),
        ...                       vision_config=dict(image_size=4, patch_size=2, **sizes))
        >>> face = VisionLanguage(SiglipModel(config).eval())
        >>> images, texts = torch.zeros(2, 3, 4, 4), torch.arange(15).view(3, 5) % 9
        >>> face.logits(face.encode_image(images), face.encode_text(texts)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        for image, text in (("encode_image", "encode_text"), ("get_image_features", "get_text_features")):
            if (
                hasattr(model, image)
                and hasattr(model, text)
                and hasattr(model, "logit_scale")
                and _token_embeddings(model)
            ):
                self._names = image, text
                break
        else:
            raise InputError(
                "model must be a CLIP or SigLIP model of open_clip or transformers, with a token_embedding, "
                f"got {type(model).__name__}"
            )
        self.model = model

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        scale: Tensor = self.model.logit_scale  # type: ignore[assignment]
        return scale.exp()

    @property
    def bias(self) -> Tensor | float:
        """What is added to scaled cosines: SigLIP's bias, 0 for CLIP."""
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias

    def encode_image(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Unit features of images that are sized and normalised as the model wants them."""
        return self._features(self._names[0], images)

    def encode_text(
        self, tokens: Int[Tensor, "n t"], context: Float[Tensor, "k w"] | None = None, start: int = 1
    ) -> Float[Tensor, "n d"]:
        """Unit features of texts.

        Args:
            tokens: ids from the model's own tokenizer, padded in its way: to the full length for SigLIP.
            context: embeddings that stand in for those of the tokens from `start` on, in every text.
            start: 1 leaves the start token alone, which SigLIP's tokenizers do not write.
        """
        if context is None:
            return self._features(self._names[1], tokens)
        with _standing_in(self.token_embedding, context, start):
            return self._features(self._names[1], tokens)

    def logits(self, queries: Float[Tensor, "n d"], gallery: Float[Tensor, "g d"]) -> Float[Tensor, "n g"]:
        """Scaled cosines of unit features, with the bias."""
        if queries.shape[1] != gallery.shape[1]:
            raise InputError(f"gallery must have the width of the features, {queries.shape[1]}, got {gallery.shape[1]}")
        return self.scale * queries @ gallery.to(queries.dtype).T + self.bias

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of the text encoder's token embeddings."""
        return _token_embeddings(self.model)[0]

    def _features(self, name: str, inputs: Tensor) -> Tensor:
        features: Any = getattr(self.model, name)(inputs)
        if not isinstance(features, Tensor):  # transformers 5 returns all that the tower computes
            features = features.pooler_output
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _token_embeddings(model: nn.Module) -> list[nn.Embedding]:
    named = model.named_modules()
    return [m for name, m in named if name.split(".")[-1] == "token_embedding" and isinstance(m, nn.Embedding)]


@contextmanager
def _standing_in(embedding: nn.Embedding, context: Tensor, start: int) -> Iterator[None]:
    end = start + len(context)

    def put(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        if end >= embedded.shape[1]:
            raise InputError(f"tokens must be longer than the context's end, {end}, got {embedded.shape[1]}")
        put_in = context.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat((embedded[:, :start], put_in, embedded[:, end:]), 1)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


class ImageQueries(nn.Module):
    """Images against a fixed gallery of texts: a zero-shot classifier, or image-to-text retrieval.

    Args:
        face: its image encoder is the part to tune: ``parameters_of=image_parameters``.
        gallery: unit text features (g, d), of one text a class ("a photo of a cat.") or of every caption; see `embed`.

    Raises:
        InputError: the gallery is no finite matrix of two rows or more.
    """

    gallery: Tensor

    def __init__(self, face: VisionLanguage, gallery: Float[Tensor, "g d"]):
        super().__init__()
        self.face = face
        self.register_buffer("gallery", _checked_gallery(gallery))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n g"]:
        """Logits over the gallery."""
        return self.face.logits(self.face.encode_image(images), self.gallery)


class TextQueries(nn.Module):
    """Texts against a fixed gallery of images: text-to-image retrieval.

    Args:
        face: its text encoder is the part to tune: ``parameters_of=text_parameters``.
        gallery: unit image features (g, d); see `embed`.

    Raises:
        InputError: the gallery is no finite matrix of two rows or more.
    """

    gallery: Tensor

    def __init__(self, face: VisionLanguage, gallery: Float[Tensor, "g d"]):
        super().__init__()
        self.face = face
        self.register_buffer("gallery", _checked_gallery(gallery))

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n g"]:
        """Logits over the gallery."""
        return self.face.logits(self.face.encode_text(tokens), self.gallery)


class PromptedClasses(nn.Module):
    """A zero-shot classifier whose prompt is learnt: the same k context vectors in front of every class name.

    Args:
        face: its encoders stay as they are; the prompt is the part to tune: ``parameters_of=prompt_parameters``.
        tokens: one tokenised text a class (c, t), such as "a photo of a cat."; their first words are the context.
        length: how many tokens the context has, k; 4, the words "a photo of a", as in the paper.
        start: where it starts; 1, after the start token, which SigLIP's tokenizers do not write.
        context: its first value (k, w), from CoOp for instance; by default the embeddings of the tokens it replaces.

    Raises:
        InputError: the tokens are no integers (c, t) of two classes or more, the texts differ within the context, or
            the context has another shape.
    """

    tokens: Tensor

    def __init__(
        self,
        face: VisionLanguage,
        tokens: Int[Tensor, "c t"],
        *,
        length: int = 4,
        start: int = 1,
        context: Float[Tensor, "k w"] | None = None,
    ):
        super().__init__()
        if tokens.ndim != 2 or tokens.is_floating_point() or len(tokens) < 2:
            raise InputError(f"tokens must be integers (c, t), c >= 2, got {tokens.dtype} {tuple(tokens.shape)}")
        checks.integer(start, "start", low=0)
        checks.integer(length, "length", low=1, high=tokens.shape[1] - start - 1)
        replaced = tokens[:, start : start + length]
        if context is None and bool((replaced != replaced[0]).any()):
            row = int((replaced != replaced[0]).any(1).nonzero()[0])
            raise InputError(
                f"tokens must be the same in all classes from {start} to {start + length}, not in row {row}"
            )
        with torch.no_grad():
            words = face.token_embedding(replaced[0])
        if context is not None and context.shape != words.shape:
            raise InputError(f"context must have shape {tuple(words.shape)}, got {tuple(context.shape)}")
        self.face = face
        self.start = start
        self.register_buffer("tokens", tokens)
        self.context = nn.Parameter((words if context is None else context.to(words)).clone())

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n g"]:
        """Logits over the classes."""
        return self.face.logits(
            self.face.encode_image(images), self.face.encode_text(self.tokens, self.context, self.start)
        )


def image_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the image encoder, by name: `parameters_of` to tune it."""
    return {name: p for name, p in model.named_parameters() if _IMAGE_PARTS.search(name)}


def text_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the text encoder, by name: `parameters_of` to tune it."""
    others = (_IMAGE_PARTS, _SCALES, re.compile(r"^context$"))
    return {name: p for name, p in model.named_parameters() if not any(part.search(name) for part in others)}


def prompt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable context of `PromptedClasses`, by name: `parameters_of` to tune it."""
    return {name: p for name, p in model.named_parameters() if name.split(".")[-1] == "context"}


def embed(face: VisionLanguage, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Float[Tensor, "g d"]:
    """A gallery: the features of all batches, without gradients.

    Args:
        face: put in eval mode meanwhile.
        encode: ``face.encode_text`` or ``face.encode_image``.
        batches: token ids, or images.

    Raises:
        InputError: there is no batch.
    """
    with evaluating(face):
        features = [encode(batch) for batch in progress.track(batches, "gallery")]
    if not features:
        raise InputError("batches must yield at least one batch, they yielded none")
    return torch.cat(features)


def _checked_gallery(gallery: Tensor) -> Tensor:
    checks.matrix(gallery, "gallery")
    if len(gallery) < 2:
        raise InputError(f"gallery must have at least two rows to choose from, got {len(gallery)}")
    return gallery.detach().clone()
