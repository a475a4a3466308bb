"""ClipCap: a language model that is prompted by an image's features, turned into a few embeddings by a small network.

The captioner of RLCF's experiments (Mokady, Hertz, Bermano 2021, arXiv:2111.09734; CapDec differs in its training
only). Encoder and language model stay frozen; the projector alone is trained, and tuned at test time. It speaks as
transformers' image-to-text models do: ``generate(pixel_values, ...)`` and ``forward(pixel_values, input_ids).logits``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks


class ClipCap(nn.Module):
    """Image features -> a prefix of embeddings -> a causal language model of transformers.

    Args:
        encode: images (n, c, h, w) to features (n, d), such as ``face.encode_image`` of a `VisionLanguage`; called
            without gradients, no part of the module.
        language_model: a causal language model of transformers (the paper: OPT-125m); its parameters are frozen.
        width: d, the features' width.
        prefix: how many embeddings an image becomes; 10.

    Example:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
        >>> captioner = ClipCap(lambda images: images.flatten(1), OPTForCausalLM(config).eval(), width=12, prefix=2)
        >>> captions = captioner.generate(torch.zeros(1, 3, 2, 2), max_new_tokens=4, min_new_tokens=4)
        >>> captions.shape, captioner(torch.zeros(1, 3, 2, 2), captions).logits.shape
        (torch.Size([1, 5]), torch.Size([1, 5, 20]))

    Reference:
        Mokady et al., 2021, https://arxiv.org/abs/2111.09734
    """

    language_model: Any
    config: Any

    def __init__(self, encode: Callable[[Tensor], Tensor], language_model: nn.Module, *, width: int, prefix: int = 10):
        super().__init__()
        self.prefix = checks.integer(prefix, "prefix", low=1)
        checks.integer(width, "width", low=1)
        self.__dict__["encode"] = encode
        self.language_model = language_model.requires_grad_(False)
        inner = self.language_model.get_input_embeddings().embedding_dim * prefix
        self.projector = nn.Sequential(nn.Linear(width, inner // 2), nn.Tanh(), nn.Linear(inner // 2, inner))
        self.config = self.language_model.config
        self.generation_config = self.language_model.generation_config

    def generate(self, pixel_values: Float[Tensor, "n c h w"], **settings: Any) -> Int[Tensor, "m t"]:
        """Captions, each after a start token; settings as for transformers' ``generate``."""
        embeddings = self._embedded(pixel_values)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        words: Tensor = self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
        start = words.new_full((len(words), 1), self.config.bos_token_id)
        return torch.cat((start, words), 1)

    def forward(self, pixel_values: Float[Tensor, "n c h w"], input_ids: Int[Tensor, "n t"]) -> SimpleNamespace:
        """``.logits`` (n, t, vocabulary): what follows each token of a caption; the prefix stands for the first."""
        prefix = self._embedded(pixel_values)
        words = self.language_model.get_input_embeddings()(input_ids[:, 1:])
        logits = self.language_model(inputs_embeds=torch.cat((prefix, words), 1)).logits
        return SimpleNamespace(logits=logits[:, self.prefix - 1 :])

    def _embedded(self, pixel_values: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.__dict__["encode"](pixel_values)
        first = self.projector[0].weight
        return self.projector(features.to(first)).view(len(features), self.prefix, -1)
