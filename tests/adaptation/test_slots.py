"""The parts of slot models and their training, against the authors' numbers for the slug 21-slot-tta."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from slot_golden import FILES, model_of, tensors
from toynet import built

from trimtab.adaptation.slot_training import HungarianMaskLoss, match_masks, occupancy_loss, train_slots
from trimtab.adaptation.slots import SlotAttention, blend, slot_autoencoder, union
from trimtab.core.checks import InputError


def noting(function):
    """The function, and a list of what it returns."""
    seen = []
    return lambda *args: seen.append(function(*args)) or seen[-1], seen


@pytest.mark.golden
def test_the_authors_slot_attention():
    checked = 0
    for path in FILES:
        arrays = tensors(path)
        if "attn_last" not in arrays:
            continue
        attention, x = model_of(arrays, "sa.", int(arrays["iters"])), arrays["x"].requires_grad_()
        attention.shares, seen = noting(attention.shares)
        slots = attention(x)
        (grad,) = torch.autograd.grad(slots.square().mean(), x)
        last = seen[-1]
        found = {
            "slots": slots,
            "attn_slot_last": last,
            "attn_last": last / last.sum(2, keepdim=True),
            "grad_x_of_mean_sq": grad,
        }
        for name, value in found.items():
            atol = 1e-8 if x.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(value.detach(), arrays[name], rtol=0, atol=atol)
        checked += 1
    assert checked


@pytest.mark.golden
def test_the_authors_training():
    checked = 0
    for path in FILES:
        arrays = tensors(path)
        if "seg_loss" not in arrays or not arrays["seg_loss"].any():
            continue
        model = model_of(arrays, "init.")
        optimizer = torch.optim.Adam(model.parameters(), float(arrays["lr"]))
        image, truth, present = arrays["image"], arrays["gt_mask"], arrays["gt_indices"] > 0
        for rgb, seg in zip(arrays["rgb_loss"], arrays["seg_loss"]):
            scene = model(image)
            drawn, masks = F.mse_loss(scene.prediction, image), 0.01 * HungarianMaskLoss()(scene.masks, truth, present)
            torch.testing.assert_close(torch.stack((drawn, masks)).detach(), torch.stack((rgb, seg)), rtol=0, atol=1e-8)
            optimizer.zero_grad()
            (drawn + masks).backward()
            optimizer.step()
        scene = model(image)
        torch.testing.assert_close(scene.masks.detach(), arrays["final_masks"], rtol=0, atol=1e-8)
        torch.testing.assert_close(scene.prediction.detach(), arrays["final_recon"], rtol=0, atol=1e-8)
        checked += 1
    assert checked


def some_masks(seed, n=2, slots=4, places=12):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, slots, places, generator=generator, dtype=torch.float64)).softmax(1), generator


def one_hot(labels, segments):
    return F.one_hot(labels, segments).movedim(-1, 1).double()


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_slots_have_no_order(seed, segments):
    masks, generator = some_masks(seed)
    truth = one_hot(torch.randint(segments, (2, 12), generator=generator), segments)
    loss = HungarianMaskLoss()
    expected = loss(masks, truth)
    order = torch.randperm(4, generator=generator)
    torch.testing.assert_close(loss(masks[:, order], truth), expected)
    torch.testing.assert_close(loss(masks, truth[:, torch.randperm(segments, generator=generator)]), expected)
    padded = torch.cat((truth, torch.zeros(2, 4 - segments, 12, dtype=torch.float64)), 1)
    torch.testing.assert_close(loss(masks, padded), expected)


@given(st.integers(0, 10**6))
def test_the_match_is_the_cheapest(seed):
    from itertools import permutations

    masks, generator = some_masks(seed, n=1)
    truth = one_hot(torch.randint(3, (1, 12), generator=generator), 3)
    match = match_masks(masks, truth)[0].tolist()
    costs = {
        p: sum(float((truth[0, i] - masks[0, j]).norm()) for i, j in enumerate(p)) for p in permutations(range(4), 3)
    }
    assert costs[tuple(match)] == pytest.approx(min(costs.values()))


def test_the_mask_loss_by_its_definition():
    masks, generator = some_masks(3, n=1, slots=2)
    truth = one_hot(torch.randint(2, (1, 12), generator=generator), 2)
    ours = masks[0][match_masks(masks, truth)[0]]
    weight = float((1 - truth).sum() / truth.sum())
    errors = -torch.where(truth[0] == 1, weight * ours.log(), (1 - ours).log())
    weights = torch.where(truth[0] == 1, weight, 1.0)
    assert float(HungarianMaskLoss()(masks, truth)) == pytest.approx(float(errors.sum() / weights.sum()), abs=1e-6)


def test_pictures_without_labels_cost_nothing():
    masks, generator = some_masks(1)
    truth = one_hot(torch.randint(3, (2, 12), generator=generator), 3)
    truth[1] = 0
    torch.testing.assert_close(HungarianMaskLoss()(masks, truth), HungarianMaskLoss()(masks[:1], truth[:1]))


@given(st.integers(0, 10**6))
def test_masks_sum_to_one_and_unions_take_the_largest_claim(seed):
    generator = torch.Generator().manual_seed(seed)
    claims, values = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 1, 5, generator=generator)
    mixed, masks = blend(values, claims)
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 5))
    assert bool((mixed[:, 0] <= values[:, :, 0].amax(1) + 1e-6).all())
    occupied, same = union(values[:, :, :0], claims)
    assert torch.equal(occupied[:, 0], claims.amax(1))
    assert torch.equal(same, masks)


@given(st.integers(0, 10**6))
def test_occupancy_is_weighted(seed):
    generator = torch.Generator().manual_seed(seed)
    claims, occupied = torch.randn(20, generator=generator), torch.rand(20, generator=generator).round()
    ones = float(occupied.sum())
    weight = (20 - ones + 1) / (ones + 1)
    p = claims.sigmoid()
    expected = -(weight * occupied * p.log() + (1 - occupied) * (1 - p).log()).mean()
    torch.testing.assert_close(occupancy_loss(claims, occupied), expected)


def test_the_order_of_tokens_does_not_matter():
    attention = built(lambda: SlotAttention(3, 8))
    tokens = torch.rand(2, 10, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(tokens[:, order]), attention(tokens))


def test_residual_blocks_begin_without_a_say_of_their_inputs():
    decoder = built(lambda: slot_autoencoder(2, 4, layers=1)).decoder
    slots = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0))
    before = decoder.at(slots, torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for inner in decoder.inner:
            inner.weight *= -3
    after = decoder.at(slots, torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(before, after)


def test_an_elongated_picture_is_scaled_by_each_side():
    model = built(lambda: slot_autoencoder(2, 4, layers=1))
    slots = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0))
    values, _ = model.decoder(slots, torch.zeros(1, 3, 4, 8))
    corner = torch.tensor([[[3 / 4 - 0.5, 7 / 8 - 0.5]]])
    torch.testing.assert_close(values[:, :, :, 3, 7], model.decoder.at(slots, corner)[:, :, 0, :3])


def test_training_lowers_the_loss():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator) * 0.1
    masks = torch.zeros(4, 2, 8, 8)
    masks[:, 0, :, :4], masks[:, 1, :, 4:] = 1, 1
    images[:, 0] += masks[:, 0] * 0.8
    model = built(lambda: slot_autoencoder(3, 8, layers=2, kernel=3, blocks=1))
    before = F.mse_loss(model(images).prediction, images)
    optimizer = train_slots(model, [(images, masks)], steps=60, lr=5e-3, warmup=10, max_norm=1.0)
    assert float(F.mse_loss(model(images).prediction, images).detach()) < 0.5 * float(before.detach())
    assert optimizer.param_groups[0]["lr"] == 5e-3


def halves(n):
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, (images[:, :1] > 0.5).float()


def test_the_warm_up_starts_at_nothing():
    images, masks = halves(2)
    model = built(lambda: slot_autoencoder(2, 4, layers=1, blocks=1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_slots(model, [(images, masks)], steps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train_slots(model, [(images, masks)], steps=1, warmup=0)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (torch.ones(2, 5, 12), "no more segments than there are slots, 4, got 5"),
        (torch.zeros(2, 3, 12), "at least one segment in the batch"),
        (torch.full((2, 3, 12), 0.5), "zeros and ones, found 0.5"),
        (torch.ones(2, 3, 11), "must be masks like the predicted"),
        (torch.ones(1, 3, 12), "must be masks like the predicted"),
    ],
)
def test_bad_masks_are_refused(truth, message):
    with pytest.raises(InputError, match=message):
        HungarianMaskLoss()(some_masks(0)[0], truth)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slot_autoencoder(0), "slots must be at least 1"),
        (lambda: slot_autoencoder(kernel=4), "kernel must be odd"),
        (lambda: slot_autoencoder(layers=0), "layers must be at least 1"),
        (lambda: slot_autoencoder(blocks=0), "blocks must be at least 1"),
        (lambda: slot_autoencoder(iterations=0), "iterations must be at least 1"),
        (lambda: train_slots(slot_autoencoder(2, 4), [], steps=1), "loader must yield something"),
        (lambda: train_slots(slot_autoencoder(2, 4), [torch.zeros(1, 3, 8, 8)], steps=1), r"\(images, masks\)"),
        (lambda: train_slots(slot_autoencoder(2, 4), [], steps=0), "steps must be at least 1"),
        (lambda: train_slots(slot_autoencoder(2, 4), [], steps=1, max_norm=0.0), "max_norm must lie in"),
        (
            lambda: train_slots(slot_autoencoder(2, 4), [{"x": torch.zeros(1), "labels": torch.zeros(1)}], steps=1),
            r"\(images, masks\), two tensors",
        ),
        (
            lambda: train_slots(slot_autoencoder(2, 4), [halves(2)], steps=9, lr=1e30, warmup=0),
            "lr must be smaller: what the model draws at step 1 is not finite",
        ),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        built_without_trace(call)


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [1.5, -0.1, torch.nan])
def test_masks_out_of_range_are_refused(value):
    masks, truth = some_masks(0)[0], torch.zeros(2, 3, 12)
    truth[:, 0, :5] = 1
    masks[1, 2, 3] = value
    with pytest.raises(InputError, match=rf"masks must lie in \[0, 1\], found {value:g} at axis 0 index 1"):
        HungarianMaskLoss()(masks, truth)


def built_without_trace(call):
    with torch.random.fork_rng(devices=[]):
        return call()


def test_the_files_are_there():
    assert FILES
    assert all(np.load(path).files for path in FILES)
