"""The log loss in blocks, and where searches begin."""

import torch
from score_sets import generator, log_loss, overconfident

from trimtab.calibration import multinomial


def test_the_log_loss_in_blocks_and_its_gradient(monkeypatch):
    monkeypatch.setattr(multinomial, "_BLOCK_ELEMENTS", 40)
    logits, labels = overconfident(101, 4)
    weights = torch.rand(101, generator=generator(1))
    x = logits.clone().requires_grad_()
    parts = [
        multinomial.log_loss(z, y, shares)[:2] for z, y, shares in multinomial.blocks(logits.float(), labels, weights)
    ]
    assert len(parts) == 11
    at_label = x.float().double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    expected = -at_label @ weights.double() / weights.double().sum()
    expected.backward()
    assert torch.allclose(sum(loss for loss, _ in parts), expected.detach())
    assert torch.allclose(torch.cat([gradient for _, gradient in parts]), x.grad, atol=1e-9)


def test_the_centre_is_the_best_temperature():
    logits, labels = overconfident(500, 3)
    factor = multinomial.temperature_factor(logits, labels, None)
    assert abs(1 / factor - 2) < 0.3
    near = [log_loss((s * logits).log_softmax(1), labels) for s in (0.99 * factor, factor, 1.01 * factor)]
    assert near[1] == min(near)


def test_a_search_begins_at_zero_where_the_logits_mislead():
    logits, labels = overconfident(500, 3)
    centre = torch.ones(3)
    for z, start in ((logits, centre), (-logits, 0 * centre)):
        assert torch.equal(multinomial.start(centre, multinomial.temperature_factor(z, labels, None)), start)
