"""Method 20-icl-self-ensembling: the driver of language models, on tiny models made here."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from trimtab.calibration import DemonstrationSampler, LabelWords, SelfEnsemble, batch_calibration
from trimtab.core.checks import InputError
from trimtab.metrics import expected_calibration_error

TEXTS = ["a fine film", "dull", "i did not like it at all , it was dull", "so so"]
SHOWN = [[("fine", 1), ("a dull film", 0)], [], [("so so", 2)], [("it was fine", 1)] * 3]
WORDS = ["bad", "good", "so so"]  # the last one has two tokens
TEMPLATE = "text : {text} label : {label}"
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "max_position_embeddings": 64}


def tokenizer(ends=False):
    """Words are tokens; [CLS] and [SEP] around a text, if asked for."""
    words = "[UNK] [PAD] [MASK] [CLS] [SEP] text label : , a fine film dull i did not like it at all was so bad good x"
    vocabulary = {word: i for i, word in enumerate(words.split())}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 3), ("[SEP]", 4)])
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def byte_tokenizer(ends=False):
    """Bytes are tokens, so that a space is a word's first token; [END] behind a text, if asked for."""
    made = Tokenizer(
        models.BPE({c: i for i, c in enumerate(["[END]", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if ends:
        made.post_processor = processors.TemplateProcessing("$A [END]", None, [("[END]", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[END]")


def build(kind, seed=0, vocabulary=30, spread=0.3):
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        if kind is T5ForConditionalGeneration:
            config = T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            config.decoder_start_token_id = config.pad_token_id = 1
        elif kind is BartForConditionalGeneration:
            sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
                     (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
            config = BartConfig(vocab_size=vocabulary, d_model=16, max_position_embeddings=64, **sizes)
            config.decoder_start_token_id = config.pad_token_id = 1
        elif kind is BloomForCausalLM:
            config = BloomConfig(vocab_size=vocabulary, hidden_size=16, n_layer=2, n_head=2)
        else:
            configs = {GPT2LMHeadModel: GPT2Config, LlamaForCausalLM: LlamaConfig, BertForMaskedLM: BertConfig}
            config = configs[kind](vocab_size=vocabulary, intermediate_size=32, **SMALL)
        model = kind(config)
        if spread:  # answers far from uniform, positions included
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=spread)
        return model


KINDS = [
    GPT2LMHeadModel,
    LlamaForCausalLM,
    BloomForCausalLM,
    BertForMaskedLM,
    T5ForConditionalGeneration,
    BartForConditionalGeneration,
]
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def scorer(kind, words=WORDS, spread=0.3, **settings):
    causal = kind in KINDS[:3]
    return LabelWords(build(kind, spread=spread), tokenizer(ends=not causal), words, template=TEMPLATE, **settings)


@every
@pytest.mark.parametrize("words", [WORDS, ["bad", "good"]], ids=["words of two tokens", "words of one token"])
def test_batches_say_what_single_texts_say(kind, words):
    shown = [[(text, c % len(words)) for text, c in examples] for examples in SHOWN]
    together = scorer(kind, words).log_scores(TEXTS, shown)
    alone = torch.cat([scorer(kind, words).log_scores([t], [s]) for t, s in zip(TEXTS, shown)])
    in_pairs = scorer(kind, words, batch_size=2).log_scores(TEXTS, shown)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(in_pairs, alone, atol=1e-5, rtol=1e-5)
    assert together.std(0).min() > 1e-3  # texts differ


@every
def test_scores_are_those_of_the_model_asked_by_hand(kind):
    score, shown = scorer(kind), SHOWN[0]
    score.model.eval()
    tokens = score.tokenizer
    examples = [TEMPLATE.replace("{text}", t).replace("{label}", WORDS[c]) for t, c in shown]
    before = "\n\n".join([*examples, f"text : {TEXTS[0]} label :"])
    ids = tokens(before)["input_ids"]
    expected = []
    for word in WORDS:
        own = tokens(word, add_special_tokens=False)["input_ids"]
        if score.kind == "causal":
            log_probs = score.model(torch.tensor([ids + own])).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
        elif score.kind == "masked":
            masked = torch.tensor([ids[:-1] + [tokens.mask_token_id] * len(own) + ids[-1:]])
            log_probs = score.model(masked).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
        else:
            decoder = torch.tensor([[1, *own[:-1]]])
            logits = score.model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits
            log_probs = logits[0].log_softmax(-1)
        expected.append(log_probs[range(len(own)), own].mean())
    torch.testing.assert_close(score.log_scores(TEXTS[:1], SHOWN[:1])[0], torch.stack(expected), atol=1e-5, rtol=1e-5)
    probs = score(TEXTS[:1], SHOWN[:1])[0]
    torch.testing.assert_close(probs, torch.stack(expected).softmax(0), atol=1e-5, rtol=1e-5)


def test_one_forward_pass_a_batch():
    score = scorer(GPT2LMHeadModel, batch_size=2)
    calls = []
    score.model.register_forward_hook(lambda *_, **__: calls.append(1))
    score(TEXTS)
    assert len(calls) == 2


@every
def test_the_model_stays_as_it_was(kind):
    score = scorer(kind)
    score.model.train()
    before = {name: value.clone() for name, value in score.model.state_dict().items()}
    first = score(TEXTS)
    assert torch.equal(first, score(TEXTS))  # no dropout
    assert not first.requires_grad
    assert score.model.training
    assert all(torch.equal(before[name], value) for name, value in score.model.state_dict().items())


@pytest.mark.parametrize("ends", [False, True])
def test_a_space_goes_to_the_word_and_a_closing_token_is_taken_off(ends):
    tokens = byte_tokenizer(ends)
    score = LabelWords(build(GPT2LMHeadModel, vocabulary=300), tokens, ["no", "yes"], template="{text}? {label}")
    assert [tokens.decode(ids) for ids in score.tokens] == [" no", " yes"]
    before, after = score._prompts(["is it"], [[("was it", 1)]])[0]
    assert (tokens.decode(before), after) == ("was it? yes\n\nis it?", [])


def test_a_masked_model_may_ask_before_the_text():
    words = ["bad", "good"]
    score = LabelWords(build(BertForMaskedLM), tokenizer(ends=True), words, template="{label} : {text}")
    before, after = score._prompts(["a film"], [[("dull", 0)]])[0]
    assert score.tokenizer.decode(before) == "[CLS] bad : dull"
    assert score.tokenizer.decode(after) == ": a film [SEP]"
    assert score.tokens == [[score.tokenizer.convert_tokens_to_ids(word)] for word in words]


def test_braces_in_a_text_are_text():
    tokens = byte_tokenizer()
    score = LabelWords(build(GPT2LMHeadModel, vocabulary=300), tokens, ["no", "yes"], template="{text}: {label}")
    before, _ = score._prompts(["{label} {text}"], None)[0]
    assert tokens.decode(before) == "{label} {text}:"


@every
def test_fine_tuning_on_a_batch_teaches_what_is_scored(kind):
    score, labels = scorer(kind, spread=None), [1, 0, 0, 2]
    batch = score.training_batch(TEXTS, labels, SHOWN)
    before = score(TEXTS, SHOWN)[range(4), labels]
    optimizer = torch.optim.Adam(score.model.parameters(), 5e-3)
    score.model.eval()  # no dropout
    for _ in range(150):
        optimizer.zero_grad()
        score.model(**batch).loss.backward()
        optimizer.step()
    after = score(TEXTS, SHOWN)[range(4), labels]
    assert (after > before).all()
    assert (after > 0.9).all()


@every
def test_the_loss_is_of_the_label_alone(kind):
    score, labels = scorer(kind, ["bad", "good"]), [1, 0, 0, 1]
    score.model.eval()
    shown = [[(text, c % 2) for text, c in examples] for examples in SHOWN]
    loss = score.model(**score.training_batch(TEXTS, labels, shown)).loss
    torch.testing.assert_close(loss, -score.log_scores(TEXTS, shown)[range(4), labels].mean(), atol=1e-5, rtol=1e-5)


def test_it_goes_with_the_sampler_and_the_ensemble():
    score = scorer(GPT2LMHeadModel)
    samplers = [DemonstrationSampler(TEXTS, [1, 0, 0, 2], 2, seed=seed) for seed in range(4)]
    probs, predicted = SelfEnsemble(lambda texts, sampler: score(texts, sampler(texts)), samplers, "max")(TEXTS)
    assert probs.shape == (4, 3)
    assert predicted.shape == (4,)
    prompts = [scorer(GPT2LMHeadModel), LabelWords(score.model, score.tokenizer, WORDS, template="{text} : {label}")]
    by_prompt, _ = SelfEnsemble(lambda texts, ask: ask(texts), prompts)(TEXTS)
    torch.testing.assert_close(by_prompt, (prompts[0](TEXTS) + prompts[1](TEXTS)) / 2)
    assert batch_calibration(score.log_scores(TEXTS)).shape == (4, 3)


def test_a_model_that_learns_in_context_is_better_asked_eight_times():
    """Which key means which label is told by the demonstrations alone; a quarter of the pool's labels are wrong."""
    generator, fillers = torch.Generator().manual_seed(102), 30
    vocabulary = ["?", "bad", "good", "k0", "k1", *(f"w{i}" for i in range(fillers))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.15}
    silent = {"bos_token_id": None, "eos_token_id": None, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(102)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, **silent))
    score = LabelWords(model, tokens, ["bad", "good"], template="{text} {label}", separator=" ", batch_size=256)

    def texts(keys):
        others = torch.randint(fillers, keys.shape, generator=generator)
        return [f"w{other} k{key}" for other, key in zip(others.tolist(), keys.tolist())]

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(200):
        keys = torch.randint(2, (64, 4), generator=generator)
        labels = keys ^ torch.randint(2, (64, 1), generator=generator)
        episodes = [texts(row) for row in keys]
        shown = [list(zip(episode[:-1], row[:-1].tolist())) for episode, row in zip(episodes, labels)]
        optimizer.zero_grad()
        model(**score.training_batch([episode[-1] for episode in episodes], labels[:, -1], shown)).loss.backward()
        optimizer.step()

    keys = torch.randint(2, (200,), generator=generator)
    wrong = torch.rand(200, generator=generator) < 0.25
    pool, noisy = texts(keys), keys ^ wrong.long()
    truth = torch.randint(2, (400,), generator=generator)
    queries = texts(truth)
    samplers = [DemonstrationSampler(pool, noisy, 3, seed=seed) for seed in range(8)]
    single = [score(queries, sampler(queries)) for sampler in samplers]
    merged, predicted = SelfEnsemble(lambda texts, sampler: score(texts, sampler(texts)), samplers)(queries)
    alone = sum(float((probs.argmax(1) == truth).double().mean()) for probs in single) / 8
    assert alone > 0.7
    assert float((predicted == truth).double().mean()) > alone + 0.1
    error = sum(expected_calibration_error(probs, truth, 10) for probs in single) / 8
    assert expected_calibration_error(merged, truth, 10) < 0.9 * error


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ["good"]}, "words must be at least two strings"),
        ({"words": ["good", " "]}, "words must be at least two strings"),
        ({"words": ["good", "good"]}, "'good' and 'good' do not"),
        ({"words": ["good", "splendid"]}, "does not know 'splendid'"),
        ({"template": "{text}"}, r"template must hold \{text\} and \{label\} once each"),
        ({"template": "{label} : {text}"}, "unless the model is masked"),
        ({"kind": "seq"}, "kind must be one of causal, encoder-decoder, masked"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    settings = {"words": ["bad", "good"], "template": TEMPLATE, **settings}
    with pytest.raises(InputError, match=message):
        LabelWords(build(GPT2LMHeadModel), tokenizer(), **settings)


@pytest.mark.bad_input
def test_bad_texts_are_refused():
    score = scorer(GPT2LMHeadModel)
    with pytest.raises(InputError, match="at least one string"):
        score([])
    with pytest.raises(InputError, match="at least one string"):
        score("dull")
    with pytest.raises(InputError, match=r"demonstrations must have 2 entries, one list a text, got 1"):
        score(["a", "b"], [[]])
    with pytest.raises(InputError, match=r"demonstrations\[0\] must hold \(text, class\) pairs, found 'dull'"):
        score(["a"], [["dull"]])
    with pytest.raises(InputError, match=r"a class in demonstrations\[1\] must be at most 2, got 3"):
        score(["a", "b"], [[], [("dull", 3)]])
    with pytest.raises(InputError, match=r"texts\[1\] with its demonstrations has 76 tokens, the model takes 64"):
        score(["a", "a " * 70])
    with pytest.raises(InputError, match="texts must not hold the mask token"):
        scorer(BertForMaskedLM)(["a [MASK]"])
    with pytest.raises(InputError, match=r"labels must lie in 0..2, found 3 at row 0"):
        score.training_batch(["a"], [3])
    empty = LabelWords(build(GPT2LMHeadModel), tokenizer(), ["bad", "good"], template="{text} {label}")
    with pytest.raises(InputError, match="texts must not be empty"):
        empty([""])
