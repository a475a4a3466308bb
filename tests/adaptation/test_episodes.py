import torch

from trimtab.adaptation.episodes import SlowStart


def test_the_start_moves_every_few_episodes():
    moving = {"a.b": torch.tensor([1.0, 2.0])}
    starts = SlowStart(moving, momentum=0.9, every=2, weight=0.25)
    source, slow, start = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    for i in range(1, 6):
        ended = torch.tensor([float(i), -float(i)])
        starts.absorb({"a.b": ended})
        slow = 0.9 * slow + 0.1 * ended
        if i % 2 == 0:
            start = 0.75 * source + 0.25 * slow
        starts.rewind(moving)
        torch.testing.assert_close(moving["a.b"], start)
    starts.forget()
    starts.rewind(moving)
    assert torch.equal(moving["a.b"], source)
    assert int(starts.episodes) == 0


def test_without_momentum_only_the_source_is_kept():
    moving = {"w": torch.zeros(3)}
    starts = SlowStart(moving, momentum=None, every=1, weight=1.0)
    starts.absorb({"w": torch.ones(3)})
    moving["w"] += 1
    starts.rewind(moving)
    assert torch.equal(moving["w"], torch.zeros(3))
    assert sum(tensor.numel() for tensor in starts.buffers()) == 4
