import pytest
import torch
from toynet import seeded_net, stream

from trimtab.adaptation import LAME, Source, Tent, run_stream
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions


def batches(labels=True, n=12):
    return [(x, torch.arange(len(x)) % 5) if labels else x for x in stream(n=n)]


def test_source_on_a_stream_is_collecting():
    ours = run_stream(Source(seeded_net()), batches())
    expected = Predictions.collect(seeded_net(), batches())
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.labels, expected.labels)


def test_predictions_come_before_the_updates():
    tent = Tent(seeded_net())
    ours = run_stream(tent, batches(labels=False))
    again = Tent(seeded_net())
    assert torch.equal(ours.logits, torch.cat([again(x) for x in stream()]))
    assert ours.labels is None
    assert int(tent.updates) == 4


def test_probabilities_become_log_probabilities():
    ours = run_stream(LAME(seeded_net()), batches())
    torch.testing.assert_close(ours.logits.exp().sum(1), torch.ones(48))
    torch.testing.assert_close(ours.probs, torch.cat([LAME(seeded_net())(x) for x in stream()]))


def test_a_short_last_batch_and_mappings():
    x = stream()[0]
    loader = [{"x": x, "label": torch.arange(12) % 5}, {"x": x[:5], "label": torch.arange(5)}]
    assert run_stream(Tent(seeded_net()), loader).n == 17


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "at least one batch"),
        ([stream()[0], torch.full((2, 3, 8, 8), float("nan"))], "batch 1: x must be finite"),
        ([batches()[0], stream()[0]], "labels with every batch or with none"),
        ([(stream()[0], torch.full((12,), 7))], "labels must lie in 0..4"),
    ],
)
def test_bad_streams_are_refused(loader, message):
    with pytest.raises(InputError, match=message):
        run_stream(Source(seeded_net()), loader)
