"""48-rlcf: captions, on small models of every kind that transformers has."""

from copy import deepcopy
from functools import partial

import pytest
import small_clip
import torch
import torch.nn.functional as F
from toynet import built

from trimtab.adaptation import rlcf_captioning
from trimtab.adaptation.clipcap import ClipCap
from trimtab.adaptation.rewards import advantages
from trimtab.adaptation.rlcf_captioning import ClipCaptionReward, RLCFCaptioner, caption_logits, caption_loss
from trimtab.adaptation.vision_language import VisionLanguage
from trimtab.core.checks import InputError

WORDS, SIZE = 24, small_clip.SIZE
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
SGD = partial(torch.optim.SGD, lr=0.5)
SHORT = {"k": 3, "steps": 2, "beams": 2, "max_new_tokens": 5}


def clipcap():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(
        vocab_size=WORDS, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3, **sizes, **SPECIAL
    )
    face = VisionLanguage(small_clip.transformers_clip())
    return built(lambda: ClipCap(face.encode_image, OPTForCausalLM(config).eval(), width=12, prefix=3))


def encoder_decoder():
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    vision = ViTConfig(image_size=SIZE, patch_size=16, **small_clip.SMALL)
    words = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, initializer_range=0.3, **SPECIAL)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, words)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 3
    return built(lambda: VisionEncoderDecoderModel(config))


def git():
    from transformers import GitConfig, GitForCausalLM

    vision = {"image_size": SIZE, "patch_size": 16, **small_clip.SMALL}
    sizes = {
        "vocab_size": WORDS,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
        **small_clip.SMALL,
        **SPECIAL,
    }
    return built(lambda: GitForCausalLM(GitConfig(vision_config=vision, **sizes)))


def blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    vision = {"image_size": SIZE, "patch_size": 16, **small_clip.SMALL}
    text = {"vocab_size": WORDS, "encoder_hidden_size": 16, "max_position_embeddings": 40, **small_clip.SMALL}
    text |= {**SPECIAL, "sep_token_id": 3, "initializer_range": 0.3}
    return built(lambda: BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)))


every_model = pytest.mark.parametrize("make", [clipcap, encoder_decoder, git, blip])


def likes(word):
    """Counts a word in every caption."""
    return lambda image, captions: (captions == word).float().sum(1)


def log_likelihood(model, image, captions, pad):
    logits = caption_logits(model, image.expand(len(captions), -1, -1, -1), captions)
    picked = logits[:, :-1].log_softmax(-1).gather(2, captions[:, 1:, None])[..., 0]
    return (picked * (captions[:, 1:] != pad)).sum(1)


@every_model
def test_logits_are_those_that_the_captions_were_written_by(make):
    """Every word of a greedy caption is the likeliest after the words before it."""
    model = make()
    image = small_clip.images(1)
    caption = model.generate(pixel_values=image, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    logits = caption_logits(model, image, caption)
    assert logits.shape == (1, caption.shape[1], WORDS)
    inner = logits[0, :-1].clone()
    inner[:, 3] = -torch.inf  # the end is forbidden before six words
    assert torch.equal(inner.argmax(-1)[:6], caption[0, 1:7])


@every_model
def test_captions_that_the_reward_prefers_become_likelier(make):
    model = make()
    image = small_clip.images(1)
    searches = []

    def reward(image, captions):
        searches.append(captions)
        return captions[:, 1:].double().mean(1)

    adapter = RLCFCaptioner(
        model,
        reward,
        k=4,
        steps=1,
        beams=2,
        max_new_tokens=5,
        optimizer=partial(SGD, lr=1e-3),
        momentum=0.0,
        update_every=1,
    )
    pad = adapter.pad
    caption = adapter(image)
    (captions,) = searches
    assert captions.shape[0] == 4
    scores = captions[:, 1:].double().mean(1)
    weights = scores - scores.mean()
    assert weights.abs().max() > 0
    with torch.no_grad():
        before = (weights * log_likelihood(model, image, captions, pad)).mean()
        after = (weights * log_likelihood(adapter.model, image, captions, pad)).mean()
    assert after > before
    expected = adapter.model.generate(
        pixel_values=image, num_beams=2, num_return_sequences=1, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(caption, expected)
    assert int(adapter.updates) == 1


def test_a_reward_changes_the_caption_and_is_forgotten():
    model = clipcap()
    images = small_clip.images(2)
    source = RLCFCaptioner(model, likes(9), **SHORT)
    with source.frozen():
        before = source(images)
    adapter = RLCFCaptioner(
        model, likes(9), **{**SHORT, "steps": 25, "k": 6}, optimizer=partial(torch.optim.Adam, lr=3e-2)
    )
    after = adapter(images)
    assert (after == 9).sum() > (before == 9).sum()
    with adapter.frozen():
        assert torch.equal(adapter(images), before)
    assert set(adapter.moving) == {f"projector.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert all(torch.equal(p, q) for p, q in zip(adapter.model.parameters(), model.parameters()))
    assert (int(adapter.samples), int(adapter.updates), int(adapter.starts.episodes)) == (2, 50, 2)


def test_the_loss_by_hand():
    captions = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 1]])
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    first = -(log_probs[0, 0, 5] + log_probs[0, 1, 6] + log_probs[0, 2, 3]) / 3
    second = -(log_probs[1, 0, 7] + log_probs[1, 1, 3]) / 3  # padding has no loss and counts in the mean
    weights = torch.tensor([0.5, -0.25], dtype=torch.float64)
    torch.testing.assert_close(caption_loss(logits, captions, weights, 1), (0.5 * first - 0.25 * second) / 2)


def test_the_whole_rule_by_hand():
    """Two steps of AdamW on the reward less its mean over the beams."""
    model, image = clipcap(), small_clip.images(1)
    expected = deepcopy(model)
    optimizer = torch.optim.AdamW(expected.projector.parameters(), lr=1e-2)
    for _ in range(2):
        with torch.no_grad():
            captions = expected.generate(
                pixel_values=image, num_beams=3, num_return_sequences=3, max_new_tokens=5, do_sample=False
            )
        scores = likes(captions[0, 1])(image, captions)
        losses = F.cross_entropy(
            expected(image.expand(3, -1, -1, -1), captions).logits[:, :-1].transpose(1, 2),
            captions[:, 1:],
            ignore_index=1,
            reduction="none",
        )
        loss = ((scores - scores.mean()) * losses.mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def reward(image, captions):
        return likes(captions[0, 1])(image, captions)

    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    adapter = RLCFCaptioner(model, reward, **SHORT, optimizer=optimizer, momentum=0.0, update_every=1)
    adapter(image)
    for p, q in zip(adapter.model.projector.parameters(), expected.projector.parameters()):
        torch.testing.assert_close(p, q)


def test_searches_and_what_is_left_of_an_image(monkeypatch):
    widths, amplified = [], []
    adapter = RLCFCaptioner(clipcap(), likes(9), **SHORT, amplify=True)
    generate = adapter.model.generate
    monkeypatch.setattr(adapter.model, "generate", lambda **s: widths.append(s["num_beams"]) or generate(**s))
    monkeypatch.setattr(
        rlcf_captioning, "advantages", lambda scores, amplify: amplified.append(amplify) or advantages(scores)
    )
    adapter(small_clip.images(1))
    assert widths == [3, 3, 2]
    assert amplified == [True, True]
    assert not adapter.optimizer.state


def test_clip_judges_captions_by_their_words():
    face = VisionLanguage(small_clip.transformers_clip())
    image, captions = small_clip.images(1), torch.tensor([[2, 5, 6, 3], [2, 7, 3, 1]])

    def retokenise(ids):
        tokens = torch.full((len(ids), small_clip.LENGTH), 0)
        tokens[:, 0] = small_clip.START
        tokens[:, 1 : 1 + ids.shape[1]] = ids
        tokens[:, 1 + ids.shape[1]] = small_clip.END
        return tokens

    reward = ClipCaptionReward(face.encode_image, face.encode_text, retokenise)
    scores = reward(image, captions)
    cosines = (face.encode_text(retokenise(captions)) @ face.encode_image(image).T)[:, 0]
    torch.testing.assert_close(scores, 2.5 * cosines.detach().clamp_min(0))
    seen = []
    reward.encode_image = lambda image: seen.append(image) or face.encode_image(image)
    adapter = RLCFCaptioner(clipcap(), reward, **SHORT)
    assert adapter(small_clip.images(2)).shape[0] == 2
    assert len(seen) == 2, "each image is encoded once, whatever the steps"


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5, "update_every": 2}])
def test_saved_in_mid_stream_it_goes_on_bit_by_bit(settings):
    xs = [small_clip.images(2, seed=s) for s in range(3)]
    model = clipcap()
    whole, first, second = (RLCFCaptioner(model, likes(9), **SHORT, **settings, optimizer=SGD) for _ in range(3))
    expected = [whole(x) for x in xs]
    first(xs[0])
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second(xs[2])
    second.load_state_dict(saved)
    assert all(torch.equal(second(x), y) for x, y in zip(xs[1:], expected[1:]))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    whole.reset()
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), model.parameters()))


@pytest.mark.bad_input
def test_bad_input_is_refused():
    model, images = clipcap(), small_clip.images(1)
    with pytest.raises(InputError, match="k must be at least 2"):
        RLCFCaptioner(model, likes(9), k=1)
    with pytest.raises(InputError, match="the reward's scores must be finite"):
        RLCFCaptioner(model, lambda image, captions: captions[:, 0] * float("nan"), **SHORT)(images)
    with pytest.raises(InputError, match=r"one score a caption, \(3,\), got \(3, 6\)"):
        RLCFCaptioner(model, lambda image, captions: captions.float(), **SHORT)(images)
    with pytest.raises(InputError, match="x must be a tensor of images, got dict"):
        RLCFCaptioner(model, likes(9), **SHORT)({"pixel_values": images})
    with pytest.raises(InputError, match="x must be finite"):
        RLCFCaptioner(model, likes(9), **SHORT)(images * float("nan"))
    with pytest.raises(InputError, match="parameters_of must choose at least one parameter"):
        RLCFCaptioner(deepcopy(model).requires_grad_(False), likes(9), **SHORT)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    with pytest.raises(InputError, match="pad must be given"):
        RLCFCaptioner(model, likes(9), **SHORT)
