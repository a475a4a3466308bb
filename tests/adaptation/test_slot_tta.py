"""Slot-TTA: the authors' steps (slug 21-slot-tta), and what the contract of adapters asks of it."""

from functools import partial

import numpy as np
import pytest
import torch
from slot_golden import FILES, model_of, tensors
from torch import nn
from toynet import built, seeded_net

from trimtab.adaptation import SlotTTA, occupancy_loss, slot_autoencoder
from trimtab.adaptation.guard import Guard
from trimtab.adaptation.slots import SlotAttention, SlotDecoder, SlotModel, union
from trimtab.core.checks import InputError


def model():
    return built(lambda: slot_autoencoder(3, 8, layers=1, kernel=3, blocks=1))


def scenes(n=3, seed=0, size=(6, 6)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.golden
def test_the_authors_steps():
    checked = 0
    for path in FILES:
        arrays = tensors(path)
        if "seg_loss" not in arrays or arrays["seg_loss"].any():
            continue
        errors = []

        def noted(prediction, x, errors=errors):
            loss = (prediction - x).square().mean()
            errors.append(loss.detach())
            return loss

        steps = len(arrays["rgb_loss"])
        optimizer = partial(torch.optim.Adam, lr=float(arrays["lr"]))
        adapter = SlotTTA(model_of(arrays, "init."), steps=steps, optimizer=optimizer, reconstruction_loss=noted)
        for _ in range(2):  # the second time from the beginning again
            scene = adapter.scenes(arrays["image"])
            torch.testing.assert_close(torch.stack(errors[:steps]), arrays["rgb_loss"], rtol=0, atol=1e-8)
            torch.testing.assert_close(scene.masks, arrays["final_masks"], rtol=0, atol=1e-8)
            torch.testing.assert_close(scene.prediction, arrays["final_recon"], rtol=0, atol=1e-8)
            errors.clear()
        checked += 1
    assert checked


def test_scenes_are_adapted_to_by_themselves():
    x = scenes()
    adapter = SlotTTA(model(), steps=5)
    together = adapter(x)
    errors = adapter.after.clone()
    alone = [SlotTTA(model(), steps=5)(one[None]) for one in x]
    assert torch.equal(together, torch.cat(alone))
    assert bool((errors < adapter.before).all())
    assert [int(adapter.samples), int(adapter.updates), int(adapter.resets)] == [3, 15, 3]
    assert torch.equal(together.sum(1), together.sum(1).clamp(1 - 1e-5, 1 + 1e-5))


def test_it_may_go_on_from_scene_to_scene():
    x = scenes(1).expand(4, -1, -1, -1)
    adapter = SlotTTA(model(), steps=3, episodic=False)
    adapter(x)
    assert adapter.before.tolist() == sorted(adapter.before.tolist(), reverse=True)
    assert int(adapter.resets) == 0


def test_the_given_model_stays_and_frozen_predictions_are_the_model_s():
    net, x = model(), scenes()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapter = SlotTTA(net, steps=2)
    with adapter.frozen():
        scene = adapter.scenes(x)
    expected = net(x)
    for ours, theirs in zip(scene, expected):
        assert torch.equal(ours, theirs.detach())
    adapter(x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    adapter.reset()
    with adapter.frozen():
        assert torch.equal(adapter(x), expected.masks.detach())


def test_saved_mid_stream_it_goes_on_bit_by_bit():
    adapter, again = (SlotTTA(model(), steps=2, episodic=False) for _ in range(2))
    adapter(scenes())
    again.load_state_dict({name: value.clone() for name, value in adapter.state_dict().items()})
    assert torch.equal(adapter(scenes(seed=1)), again(scenes(seed=1)))


def test_it_begins_each_scene_with_the_training_s_optimizer():
    net, x = model(), scenes(2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x).prediction - x).square().mean().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    adapter = SlotTTA(net, steps=2, optimizer_state=saved)
    masks = adapter(x)
    assert torch.equal(adapter(x), masks)
    assert adapter.optimizer.param_groups[0]["lr"] == 1e-3
    assert float(adapter.optimizer.state[next(iter(adapter.moving.values()))]["step"]) == 5
    assert float(saved["state"][0]["step"]) == 3
    assert not torch.equal(SlotTTA(net, steps=2)(x), masks)


def test_errors_that_are_not_finite_are_skipped():
    adapter = SlotTTA(model(), steps=2, reconstruction_loss=lambda prediction, x: (prediction * torch.inf).sum())
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    adapter(scenes(2))
    assert [int(adapter.updates), int(adapter.skipped)] == [0, 4]
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())


class Points(nn.Module):
    """Tokens of the points of a cloud."""

    def __init__(self, dim):
        super().__init__()
        self.token = nn.Linear(3, dim)

    def forward(self, x):
        return self.token(x["points"])


class Occupancy(nn.Module):
    """Every slot's claims at the places asked for."""

    def __init__(self, dim):
        super().__init__()
        self.decoder = SlotDecoder(dim, blocks=1, channels=0, coordinates=3)

    def forward(self, slots, x):
        claims = self.decoder.at(slots, x["places"])
        return claims.mT, claims[..., 0]


def test_point_clouds_with_parts_of_one_s_own():
    generator = torch.Generator().manual_seed(0)
    x = {
        "points": torch.rand(2, 20, 3, generator=generator),
        "places": torch.rand(2, 30, 3, generator=generator),
        "occupied": torch.rand(2, 30, generator=generator).round(),
        "scale": 1.0,
    }
    net = built(lambda: SlotModel(Points(8), SlotAttention(3, 8), Occupancy(8), union))
    adapter = SlotTTA(
        net, steps=10, reconstruction_loss=lambda claims, scene: occupancy_loss(claims[:, 0], scene["occupied"])
    )
    scene = adapter.scenes(x)
    assert scene.prediction.shape == (2, 1, 30)
    assert scene.masks.shape == (2, 3, 30)
    assert bool((adapter.after < adapter.before).all())


class Views(nn.Module):
    """Tokens of all views of a scene together."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)


class Canvas(nn.Module):
    """The same picture for every view: a stand-in for rays."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, slots, x):
        values, claims = self.decoder(slots, x[:, 0])
        return values[:, :, :, None].expand(-1, -1, -1, x.shape[1], -1, -1), claims[:, :, None].expand(
            -1, -1, x.shape[1], -1, -1
        )


def test_several_views_of_a_scene():
    x = torch.stack((scenes(2), scenes(2)), 1)
    net = model()
    views = SlotModel(Views(net.encoder), net.attention, Canvas(net.decoder))
    adapter = SlotTTA(views, steps=3, reconstruction_loss=lambda drawn, x: (drawn - x.transpose(1, 2)).square().mean())
    assert adapter(x).shape == (2, 3, 2, 6, 6)
    assert bool((adapter.after < adapter.before).all())


def test_pictures_of_any_shape_and_black_ones():
    adapter = SlotTTA(model(), steps=1)
    assert adapter(scenes(size=(5, 9))).shape == (3, 3, 5, 9)
    assert adapter(torch.zeros(1, 3, 6, 6)).isfinite().all()


def test_pictures_out_of_range_are_warned_of():
    with pytest.warns(RuntimeWarning, match=r"images in 0\.\.1"):
        SlotTTA(model(), steps=1)(2 * scenes())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SlotTTA(seeded_net()), "must be a SlotModel, got ToyNet"),
        (lambda: SlotTTA(model(), window=2), "window and guard must be left out"),
        (lambda: SlotTTA(model(), guard=Guard()), "window and guard must be left out"),
        (lambda: SlotTTA(model(), steps=0), "steps must be at least 1"),
        (
            lambda: SlotTTA(model(), optimizer_state=torch.optim.Adam(seeded_net().parameters()).state_dict()),
            "optimizer_state must fit the parameters that move",
        ),
        (
            lambda: SlotTTA(model(), optimizer_state=torch.optim.SGD(model().parameters()).state_dict()),
            r"optimizer_state must come from Adam, it lacks \['betas', 'eps'\]",
        ),
        (lambda: SlotTTA(model().half()), "in float32"),
        (lambda: SlotTTA(model())(scenes() * np.nan), "x must be finite"),
        (lambda: SlotTTA(model())(scenes(), torch.zeros(3)), "labels must not be given"),
        (
            lambda: SlotTTA(model())({"points": scenes(2), "places": scenes(3)}),
            "same number of scenes in every tensor, it holds {'points': 2, 'places': 3}",
        ),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
