"""RLCF for captions: a few steps of policy gradient on what CLIP thinks of the captions that a beam search found.

The captioner's side of RLCF (Zhao, Wang, Zhu, Yang, ICLR 2024, arXiv:2305.18010). Each step asks the captioner for its
k best captions by beam search, scores them with the reward, subtracts the mean of the k scores, and moves the weights
(the projector between image and language model in the paper) so that captions above the mean become more likely. Then
a beam search of five writes the caption, and the weights go back.

The loss of a caption is the sum of its tokens' losses divided by the length of the longest of the k captions: padding
has no loss but counts in the mean, as in the code, so that short captions move the weights less. In the code
(mzhaoshuai/RLCF, caption/capdec_tta.py) the captions are decoded and tokenised again before the loss, and token 0 is
ignored; with OPT, whose padding is token 1, padding is then learnt as text. Here the searched tokens are scored as they
are, and the captioner's own padding is ignored (`pad`). The code's gradient flows through the projector alone; here
through whatever requires gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trimtab.adaptation.base import Adapter, Choice, Inputs, OptimizerFactory
from trimtab.adaptation.episodes import SlowStart
from trimtab.adaptation.rewards import Scorer, advantages, bind
from trimtab.core import checks, progress
from trimtab.core.checks import InputError

CaptionReward = Callable[[Tensor, Tensor], Tensor]
PAPER: OptimizerFactory = partial(torch.optim.AdamW, lr=5e-6, eps=1e-6, weight_decay=0.0)


class ClipCaptionReward:
    """CLIPScore of an image and captions: 2.5 x max(cosine, 0).

    Args:
        encode_image: images (1, ...) to features (1, d), such as ``face.encode_image`` of a `VisionLanguage`.
        encode_text: tokens (k, l) to features (k, d).
        retokenise: the captioner's tokens (k, t) to the reward's (k, l): decode with one tokenizer, encode with the
            other.
        weight: what cosines are multiplied by; 2.5 as in CLIPScore.

    Example:
        >>> one_hot = lambda tokens: F.one_hot(tokens[:, -1], 3).float()
        >>> reward = ClipCaptionReward(lambda image: torch.tensor([[0.0, 1.0, 0.0]]), one_hot, lambda tokens: tokens)
        >>> reward(torch.zeros(1, 3, 2, 2), torch.tensor([[0, 1], [0, 2]]))
        tensor([2.5000, 0.0000])
    """

    def __init__(
        self,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        retokenise: Callable[[Tensor], Tensor],
        *,
        weight: float = 2.5,
    ):
        self.encode_image = encode_image
        self.encode_text = encode_text
        self.retokenise = retokenise
        self.weight = checks.number(weight, "weight", low=0.0, low_open=True)

    def __call__(self, image: Tensor, captions: Int[Tensor, "k t"]) -> Float[Tensor, " k"]:
        """Scores of the captions."""
        return self.bind(image)(captions)

    def bind(self, image: Tensor) -> Scorer:
        """The scores of captions of this image, which is encoded here, once."""
        with torch.no_grad():
            seen = self.encode_image(image)

        @torch.no_grad()
        def score(captions: Tensor) -> Tensor:
            said = self.encode_text(self.retokenise(captions))
            return self.weight * F.cosine_similarity(seen, said, dim=-1).clamp_min(0)

        return score


class RLCFCaptioner(Adapter):
    """Moves a captioner, for each image anew, towards those of its k best captions that the reward prefers.

    Four beam searches with six beams, each followed by a forward and a backward pass of the six captions, and a beam
    search with five beams, an image. In a distributed stream every process goes its own way.

    Args:
        model: an image-to-text model of transformers (a `VisionEncoderDecoderModel`, BLIP, GIT, ...) or `ClipCap`: it
            has ``generate`` and, called on images and captions, returns logits.
        reward: ``reward(image (1, ...), captions (k, t)) -> scores (k,)`` on the captioner's tokens, such as
            `ClipCaptionReward`; no part of the state.
        k: beams, and captions, a step; 6. At least 2: one caption alone has no baseline.
        steps: updates an image; 4.
        beams: of the final search; 5.
        max_new_tokens: a caption's length, at most; 30.
        amplify: divide the centred scores by their standard deviation.
        generation: more settings for ``generate``, such as ``length_penalty``.
        pad: the token that pads captions and has no loss; by default the model's own.
        momentum, update_every, update_weight: as in `RLCF`.
        optimizer: builds the optimizer from the parameters that move; AdamW 5e-6, eps 1e-6, no weight decay.
        parameters_of: chooses the parameters that move, by name; by default those that require gradients, which in
            `ClipCap` is the projector.
        inplace: as in `Adapter`.

    Raises:
        InputError: a setting is out of range; at a call, the reward's scores are not finite or not one a caption.

    Example:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> from trimtab.adaptation.clipcap import ClipCap
        >>> config = OPTConfig(vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = ClipCap(lambda images: images.flatten(1), OPTForCausalLM(config).eval(), width=12, prefix=2)
        >>> likes_sevens = lambda image, captions: (captions == 7).float().sum(1)
        >>> captioner = RLCFCaptioner(model, likes_sevens, k=3, steps=2, max_new_tokens=4)
        >>> captions = captioner(torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
        >>> len(captions), int(captioner.updates)
        (2, 4)

    Reference:
        Zhao et al., ICLR 2024, https://arxiv.org/abs/2305.18010
    """

    forwards = 4 * 6
    backwards = 4 * 6
    reward: CaptionReward

    def __init__(
        self,
        model: nn.Module,
        reward: CaptionReward,
        *,
        k: int = 6,
        steps: int = 4,
        beams: int = 5,
        max_new_tokens: int = 30,
        amplify: bool = False,
        generation: Mapping[str, Any] | None = None,
        pad: int | None = None,
        momentum: float | None = None,
        update_every: int = 64,
        update_weight: float = 1.0,
        optimizer: OptimizerFactory = PAPER,
        parameters_of: Choice | None = None,
        inplace: bool = False,
    ):
        super().__init__(model, inplace=inplace)
        self.k = checks.integer(k, "k", low=2)
        self.tuning_steps = checks.integer(steps, "steps", low=1)
        self.beams = checks.integer(beams, "beams", low=1)
        checks.integer(max_new_tokens, "max_new_tokens", low=1)
        self.amplify = amplify
        self.generation = {"max_new_tokens": max_new_tokens, "do_sample": False, **(generation or {})}
        self.pad = _padding(self.model) if pad is None else checks.integer(pad, "pad", low=0)
        self.__dict__["reward"] = reward  # not registered: its weights are no part of the adapter's state
        chosen = (parameters_of or _open_parameters)(self.model)
        self._begin(lambda _: chosen, optimizer)
        self._group = None
        self.starts = SlowStart(self.moving, momentum=momentum, every=update_every, weight=update_weight)

    def reset(self) -> None:
        """Return to the source model; the slow average starts anew."""
        super().reset()
        self.starts.forget()

    def _predict(self, x: Inputs) -> Tensor:
        return self._together([self._search(image[None], self.beams, 1)[0] for image in _images(x)])

    def _adapt(self, x: Inputs) -> Tensor:
        return self._together([self._one(image[None]) for image in _images(x)])

    def _one(self, image: Tensor) -> Tensor:
        """Tune on one image, write its caption, and go back."""
        progress.in_time()
        assert self.optimizer is not None
        try:
            with torch.no_grad():
                score = bind(self.reward, image)
            for _ in range(self.tuning_steps):
                self._descend(self._loss(image, score))
            caption = self._search(image, self.beams, 1)[0]
            self.starts.absorb(self.moving)
        finally:
            self.starts.rewind(self.moving)
            self.optimizer.state.clear()
        return caption

    def _loss(self, image: Tensor, score: Scorer) -> Tensor:
        captions = self._search(image, self.k, self.k)
        with torch.no_grad():
            scores = checks.finite(checks.tensor(score(captions), "the reward's scores"), "the reward's scores")
        if scores.shape != (self.k,):
            raise InputError(f"reward must return one score a caption, ({self.k},), got {tuple(scores.shape)}")
        weights = advantages(scores[None], amplify=self.amplify)[0]
        images = image.expand(self.k, *image.shape[1:])
        return caption_loss(caption_logits(self.model, images, captions), captions, weights, self.pad)

    @torch.no_grad()
    def _search(self, image: Tensor, beams: int, captions: int) -> Tensor:
        generate: Any = self.model.generate
        return generate(pixel_values=image, num_beams=beams, num_return_sequences=captions, **self.generation)

    def _together(self, captions: list[Tensor]) -> Tensor:
        return pad_sequence(captions, batch_first=True, padding_value=self.pad)


def caption_loss(
    logits: Float[Tensor, "k t v"], captions: Int[Tensor, "k t"], weights: Float[Tensor, " k"], pad: int
) -> Float[Tensor, ""]:
    """Mean over k captions of weight x mean over all positions of the next token's loss, which is 0 for padding.

    Example:
        >>> caption_loss(torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]]), torch.ones(1), pad=0)
        tensor(0.3466)
    """
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), captions[:, 1:], ignore_index=pad, reduction="none")
    return (weights.to(losses) * losses.mean(1)).mean()


def caption_logits(model: nn.Module, images: Tensor, captions: Int[Tensor, "k t"]) -> Float[Tensor, "k t v"]:
    """What an image-to-text model expects after every token of the captions.

    Encoder-decoders take captions as ``decoder_input_ids``, others as ``input_ids``; positions before the caption,
    which stand for the image, are left out.
    """
    config: Any = model.config
    name = "decoder_input_ids" if getattr(config, "is_encoder_decoder", False) else "input_ids"
    outputs = model(pixel_values=images, **{name: captions})
    return outputs.logits[:, -captions.shape[1] :]


def _padding(model: nn.Module) -> int:
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    raise InputError("pad must be given for a model whose configuration has no pad_token_id")


def _open_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _images(x: Inputs) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a tensor of images, got {type(x).__name__}")
    return x
