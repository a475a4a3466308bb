"""Class probabilities from a language model: how probable are the words that name the classes, after this text?

Works with any causal, encoder-decoder or masked language model that follows the interface of Hugging Face's
transformers (``pip install trimtab[text]``), through its own tokenizer. The model may be used as it is, with
demonstrations in the prompt (in-context learning), or fine-tuned: on single texts, or on texts with demonstrations as
they will come later (`LabelWords.training_batch`; the paper's SupICL). Reading the answer is the same for all of them,
and a merge of several readings, with other demonstrations or another template, is `trimtab.calibration.SelfEnsemble`.

Li et al. (2023), arXiv 2312.13772. As in the paper, only the label words compete: what the model gives other words is
left out, and the score of a word is the mean over its tokens. Departures from the authors' code
(cambridgeltl/ensembled-sicl): it averages raw logits, whose offset is arbitrary from one position to the next; here
log-probabilities are averaged, which is the same for words of one token. And it reads the later tokens of every word
with the *true* label as the decoder's input, which gives the answer away; here every word is read with its own tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from trimtab.core import checks, modules, progress
from trimtab.core.checks import InputError

Kind = Literal["causal", "encoder-decoder", "masked"]
Demonstrations = Sequence[tuple[str, int]]
Ids = tuple[list[int], list[int]]  # of a prompt, before and after the label's place
_PLACES = re.compile(r"(\{text\}|\{label\})")
_IGNORED = -100  # what transformers' losses leave out


class LabelWords:
    """Scores label words after a prompt, in batches.

    Every text becomes its demonstrations and itself, each in the template, put together with the separator; the
    query's label is what is asked for. A causal model reads the prompt up to that place, padded on the left, and the
    words' tokens follow; an encoder-decoder reads the same prompt in its encoder and the word in its decoder; a masked
    model reads the whole template with a mask in the label's place, as many masks as the word has tokens. A word of k
    tokens scores the mean of its k log-probabilities, each given the word's earlier tokens (masked models: given the
    other masks). The space before ``{label}`` belongs to the word, as most tokenizers have it.

    A row of the batch is a text and what is read of a word before its last token: words of one token share one row.

    Args:
        model: a causal, encoder-decoder or masked language model. It is put in evaluation mode while it is asked.
        tokenizer: its tokenizer.
        words: one for every class, at least two.
        template: holds ``{text}`` and ``{label}`` once each; the text comes first unless the model is masked.
        separator: between demonstrations.
        batch_size: how many texts in one forward pass.
        max_length: the most tokens that a prompt with a word may have. Default: what the model's configuration
            (``max_position_embeddings``) or the tokenizer (``model_max_length``) states, whichever is smaller.
        kind: ``"causal"``, ``"encoder-decoder"`` or ``"masked"``; where it is None, the model's configuration and
            class name tell.

    Raises:
        InputError: a setting is wrong, a word cannot be told from another, from an unknown one, or from the prompt.

    Example:
        >>> import torch
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> vocabulary = {word: i for i, word in enumerate("? : it was fun dull good bad".split())}
        >>> tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> tokens.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?")
        >>> with torch.random.fork_rng():  # transformers starts from torch's global random state
        ...     model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
        >>> scorer = LabelWords(model, tokenizer, ["bad", "good"], template="{text} : {label}")
        >>> probs = scorer(["it was fun", "dull"], [[("dull", 0)], [("it was fun", 1)]])
        >>> probs.shape, bool(torch.allclose(probs.sum(1), torch.ones(2)))
        (torch.Size([2, 2]), True)

    Reference:
        Li et al., Large Language Models are Miscalibrated In-Context Learners, Findings of ACL 2025.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        words: Sequence[str],
        *,
        template: str = "Text: {text}\nLabel: {label}",
        separator: str = "\n\n",
        batch_size: int = 16,
        max_length: int | None = None,
        kind: Kind | None = None,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.kind: Kind = _kind_of(model) if kind is None else checks.one_of(kind, "kind", Kind)
        self.words = list(words)
        if len(self.words) < 2 or not all(isinstance(word, str) and word.strip() for word in self.words):
            raise InputError(f"words must be at least two strings that are not empty, got {self.words}")
        self.template = template
        self._parts = _take_apart(template, self.kind)
        self.separator = separator
        self.batch_size = checks.integer(batch_size, "batch_size", low=1)
        self.max_length = _length_limit(model, tokenizer) if max_length is None else max_length
        checks.integer(self.max_length, "max_length", low=1)
        if self.kind == "masked" and tokenizer.mask_token is None:
            raise InputError("tokenizer must have a mask token for a masked model, it has none")
        self.tokens = [self._tokens(word) for word in self.words]
        for c, tokens in enumerate(self.tokens):
            if tokens in self.tokens[:c]:
                other = self.words[self.tokens.index(tokens)]
                raise InputError(f"words must differ in their tokens, {other!r} and {self.words[c]!r} do not")
        self._openings = list(dict.fromkeys(tuple(tokens[:-1]) for tokens in self.tokens))
        self._accepted = set(inspect.signature(_base(model).forward).parameters)

    def __call__(
        self, texts: Sequence[str], demonstrations: Sequence[Demonstrations] | None = None
    ) -> Float[Tensor, "n c"]:
        """Probabilities of the classes for each text, over the label words alone.

        Args:
            texts: n >= 1 texts.
            demonstrations: for each text a list of (text, class) pairs, the last one next to the query; none if None.

        Returns:
            (n, c) probabilities, on the model's device, in single precision at least.

        Raises:
            InputError: a prompt is longer than the model takes, or a demonstration is no (text, class) pair.
        """
        return self.log_scores(texts, demonstrations).softmax(1)

    def log_scores(
        self, texts: Sequence[str], demonstrations: Sequence[Demonstrations] | None = None
    ) -> Float[Tensor, "n c"]:
        """Mean log-probability of every label word, (n, c), in the whole vocabulary: for `batch_calibration`."""
        prompts = self._prompts(texts, demonstrations)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i][0]))  # alike lengths together: little padding
        scores: list[Tensor] = [torch.empty(0)] * len(prompts)
        read = {"causal": self._after, "encoder-decoder": self._decoded, "masked": self._at_masks}[self.kind]
        with modules.evaluating(self.model):
            for start in progress.track(range(0, len(order), self.batch_size), "label words"):
                chosen = order[start : start + self.batch_size]
                for i, row in zip(chosen, read([prompts[i] for i in chosen])):
                    scores[i] = row
        return torch.stack(scores)

    def training_batch(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | Integer[Tensor, " n"] | Integer[np.ndarray, " n"],
        demonstrations: Sequence[Demonstrations] | None = None,
    ) -> dict[str, Tensor]:
        """A batch to fine-tune on: ``model(**batch).loss`` is the loss of the label's tokens, and of no other.

        The prompt is the one that will be scored later. Without demonstrations this is ordinary fine-tuning, with
        those of a `DemonstrationSampler` over the training set it is supervised in-context learning.

        Args:
            texts: n >= 1 texts.
            labels: their classes, (n,).
            demonstrations: as in the call.

        Returns:
            What the model's ``forward`` takes, on its device, among it ``labels``.
        """
        prompts = self._prompts(texts, demonstrations)
        classes = checks.labels(labels, len(prompts), len(self.words)).tolist()
        if self.kind == "encoder-decoder":
            batch = self._padded([before for before, _ in prompts])
            targets = [self.tokens[c] for c in classes]
            batch["labels"] = _right(targets, _IGNORED).to(batch["input_ids"].device)
            return batch
        if self.kind == "masked":
            batch, places = self._masked(prompts, [len(self.tokens[c]) for c in classes])
            rows = batch["labels"] = torch.full_like(batch["input_ids"], _IGNORED)
            for row, place, c in zip(rows, places, classes):
                row[place : place + len(self.tokens[c])] = row.new_tensor(self.tokens[c])
            return batch
        batch = self._padded([before + self.tokens[c] for (before, _), c in zip(prompts, classes)])
        rows = batch["labels"] = batch["input_ids"].clone()
        for row, c in zip(rows, classes):
            row[: -len(self.tokens[c])] = _IGNORED
        return batch

    def _prompts(self, texts: Sequence[str], demonstrations: Any) -> list[Ids]:
        """Token ids before and after the label's place, special tokens included."""
        if isinstance(texts, str) or len(texts) == 0 or not all(isinstance(text, str) for text in texts):
            raise InputError("texts must be a list of at least one string")
        shown: Sequence[Any] = [()] * len(texts) if demonstrations is None else demonstrations
        if len(shown) != len(texts):
            raise InputError(f"demonstrations must have {len(texts)} entries, one list a text, got {len(shown)}")
        longest = max(map(len, self.tokens))
        out = []
        for i, (text, examples) in enumerate(zip(texts, shown)):
            ids = self._ids(text, [self._filled(example, i) for example in examples])
            length = sum(map(len, ids)) + (0 if self.kind == "encoder-decoder" else longest)
            if length > self.max_length:
                raise InputError(
                    f"texts[{i}] with its demonstrations has {length} tokens, the model takes {self.max_length}: "
                    "give fewer demonstrations or shorter texts"
                )
            out.append(ids)
        return out

    def _filled(self, example: Any, i: int) -> str:
        if not (isinstance(example, (tuple, list)) and len(example) == 2 and isinstance(example[0], str)):
            raise InputError(f"demonstrations[{i}] must hold (text, class) pairs, found {example!r}")
        c = checks.integer(example[1], f"a class in demonstrations[{i}]", low=0, high=len(self.words) - 1)
        return "".join({"{text}": example[0], "{label}": self.words[c]}.get(part, part) for part in self._parts)

    def _ids(self, text: str, examples: list[str]) -> Ids:
        place = self._parts.index("{label}")
        before, after = (
            "".join(text if part == "{text}" else part for part in parts)
            for parts in (self._parts[:place], self._parts[place + 1 :])
        )
        shown = self.separator.join([*examples, ""])
        if self.kind == "masked":
            mask = self.tokenizer.mask_token_id
            ids = self.tokenizer(shown + before + self.tokenizer.mask_token + after)["input_ids"]
            where = len(ids) - 1 - ids[::-1].index(mask)
            if ids.count(mask) != 1:
                raise InputError(f"texts must not hold the mask token {self.tokenizer.mask_token!r}, found {text!r}")
            return ids[:where], ids[where + 1 :]
        ids = self.tokenizer((shown + before).rstrip(" "))["input_ids"]
        if self.kind == "causal":
            while ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
                ids = ids[:-1]  # a tokenizer may close what it reads; here the word is yet to come
        if not ids:
            raise InputError("texts must not be empty where the template holds nothing else before {label}")
        return ids, []

    def _tokens(self, word: str) -> list[int]:
        """The word's token ids in the label's place, without special tokens."""

        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        place = self._parts.index("{label}")
        literal = self._parts[place - 1] if place and self._parts[place - 1] != "{text}" else ""
        before = "" if self.kind == "encoder-decoder" else ("x" if place else "") + literal
        anchor = before.rstrip(" ")
        head, whole = ids(anchor) if anchor else [], ids(before + word)
        tokens = whole[len(head) :]
        if whole[: len(head)] != head or not tokens:
            raise InputError(f"words: the tokenizer joins {word!r} to what stands before it in the template")
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in tokens:
            raise InputError(f"words: the tokenizer does not know {word!r}")
        return tokens

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Rows of one length with their mask: padded on the left, and counted from each row's start, if causal."""
        device = modules.device_of(self.model)
        left = self.kind == "causal"
        # what stands there is masked: any token will do where the tokenizer has none
        pad = self.tokenizer.pad_token_id or 0
        ids = _right([row[::-1] for row in rows] if left else rows, pad)
        mask = _right([[1] * len(row) for row in rows], 0)
        if left:
            ids, mask = ids.flip(1), mask.flip(1)
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if left and "position_ids" in self._accepted:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    def _after(self, prompts: list[Ids]) -> Tensor:
        """Causal: one row for every text and opening."""
        batch = self._padded([before + list(opening) for before, _ in prompts for opening in self._openings])
        kept = max(map(len, self._openings)) + 1
        only = {"logits_to_keep": kept} if "logits_to_keep" in self._accepted else {}
        logits = self.model(**batch, **only, use_cache=False).logits[:, -kept:]
        return self._means(logits.unflatten(0, (len(prompts), -1)), by_opening=True, from_end=True)

    def _decoded(self, prompts: list[Ids]) -> Tensor:
        """Encoder-decoder: the encoder once a text, the decoder once an opening."""
        batch = self._padded([before for before, _ in prompts])
        start = self.model.config.decoder_start_token_id
        if start is None:
            raise InputError("model.config.decoder_start_token_id must be set for an encoder-decoder, it is None")
        decoder = _right([[start, *opening] for opening in self._openings], start).to(batch["input_ids"].device)
        encoded = self.model.get_encoder()(**batch)
        encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(len(decoder), 0)
        logits = self.model(
            encoder_outputs=encoded,
            attention_mask=batch["attention_mask"].repeat_interleave(len(decoder), 0),
            decoder_input_ids=decoder.repeat(len(prompts), 1),
            use_cache=False,
        ).logits
        return self._means(logits.unflatten(0, (len(prompts), -1)), by_opening=True)

    def _at_masks(self, prompts: list[Ids]) -> Tensor:
        """Masked: one row for every text and number of tokens."""
        lengths = self._lengths
        batch, places = self._masked([prompt for prompt in prompts for _ in lengths], lengths * len(prompts))
        logits = self.model(**batch).logits
        at = torch.tensor(places)[:, None] + torch.arange(max(lengths))
        at = at.clamp(max=logits.shape[1] - 1).to(logits.device)  # rows of fewer masks may end earlier
        logits = logits[torch.arange(len(at), device=at.device)[:, None], at]
        return self._means(logits.unflatten(0, (len(prompts), -1)), by_opening=False)

    @property
    def _lengths(self) -> list[int]:
        return sorted({len(tokens) for tokens in self.tokens})

    def _masked(self, prompts: list[Ids], lengths: list[int]) -> tuple[dict[str, Tensor], list[int]]:
        """Prompts with so many masks in the label's place, and where the first mask stands."""
        mask = [self.tokenizer.mask_token_id]
        batch = self._padded([before + mask * k + after for (before, after), k in zip(prompts, lengths)])
        return batch, [len(before) for before, _ in prompts]

    def _means(
        self, logits: Float[Tensor, "n rows k vocabulary"], *, by_opening: bool, from_end: bool = False
    ) -> Float[Tensor, "n c"]:
        """Every word's mean log-probability, from its row and the positions of its tokens there."""
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        columns = []
        for tokens in self.tokens:
            row = self._openings.index(tuple(tokens[:-1])) if by_opening else self._lengths.index(len(tokens))
            first = logits.shape[2] - len(tokens) if from_end else 0
            at = torch.arange(first, first + len(tokens), device=logits.device)
            columns.append(log_probs[:, row, at, torch.tensor(tokens, device=logits.device)].mean(1))
        return torch.stack(columns, 1)


def _base(model: Any) -> nn.Module:
    """The model itself, from under the adapters that PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _kind_of(model: Any) -> Kind:
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    return "masked" if type(_base(model)).__name__.endswith("MaskedLM") else "causal"


def _take_apart(template: str, kind: Kind) -> list[str]:
    """The template as a list of its two places and the literal texts around them."""
    parts = [part for part in _PLACES.split(template) if part]
    if parts.count("{text}") != 1 or parts.count("{label}") != 1:
        raise InputError(f"template must hold {{text}} and {{label}} once each, got {template!r}")
    if kind != "masked" and parts.index("{label}") < parts.index("{text}"):
        raise InputError(f"template must have {{text}} before {{label}} unless the model is masked, got {template!r}")
    return parts


def _length_limit(model: Any, tokenizer: Any) -> int:
    limits = (getattr(model.config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    return int(min((limit for limit in limits if limit is not None), default=2**62))


def _right(rows: list[list[int]], filler: int) -> Tensor:
    """Rows of one length, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
