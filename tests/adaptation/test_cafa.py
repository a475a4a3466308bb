"""CAFA, slug 11-cafa: there is no public code, so the identities that its mathematics must obey, and brute force."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toynet import built, seeded_net, stream

from trimtab.adaptation import CAFA, BatchNormAdapt, Prepared
from trimtab.adaptation.cafa import alignment_loss, class_gaussians, distances, whitening
from trimtab.core.checks import InputError

SGD = partial(torch.optim.SGD, lr=0.05)
FORMS = ("log_ratio", "log_ratio_all", "intra", "difference")
KINDS = ("class", "tied", "diag")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(seed=7, batches=6, n=30, classes=5, **settings):
    """Batches in which every class has a mean of its own."""
    offsets = draw(seed, classes, 3, 1, 1).float()
    labels = torch.arange(n) % classes
    return [(x + offsets[labels], labels) for x in stream(seed, batches=batches, n=n, **settings)]


def cafa(net=None, *, covariance="tied", **settings):
    net = seeded_net() if net is None else net
    return CAFA(
        net, CAFA.prepare(seeded_net().to(next(net.parameters()).dtype), source(net), covariance=covariance), **settings
    )


def source(net):
    return [(x.to(next(net.parameters()).dtype), y) for x, y in labelled()]


def spd(seed, c, d):
    roots = draw(seed, c, d, d + 2)
    return roots @ roots.mT / d


def test_the_card_s_example():
    features = torch.tensor([[0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    for whiten in (torch.eye(2).double().expand(2, 2, 2), torch.eye(2).double()[None], torch.ones(2, 2).double()):
        away = distances(features, means, whiten)
        torch.testing.assert_close(away.detach(), torch.tensor([[0.25, 2.25]], dtype=torch.float64))
        loss = alignment_loss(away, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(loss, features)
        assert float(loss.detach()) == pytest.approx(-2.1972245773, abs=1e-9)
        torch.testing.assert_close(gradient, torch.tensor([[4 + 4 / 3, 0.0]], dtype=torch.float64))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 5), st.integers(1, 6), st.sampled_from(KINDS))
def test_distances_are_mahalanobis(seed, n, c, d, kind):
    features, means = draw(seed, n, d), draw(seed + 1, c, d)
    covariances = {"class": spd(seed, c, d), "tied": spd(seed, 1, d), "diag": draw(seed, c, d).square() + 0.1}[kind]
    full = torch.diag_embed(covariances) if kind == "diag" else covariances.expand(c, d, d)
    expected = [
        [float((g - means[k]) @ torch.linalg.inv(full[k]) @ (g - means[k])) for k in range(c)] for g in features
    ]
    found = distances(features, means, whitening(covariances, ridge=0.0))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert (found >= 0).all()


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0.0, 0.5))
def test_the_ridge_is_a_share_of_the_mean_variance(seed, kind, ridge):
    covariances = {"class": spd(seed, 3, 4), "tied": spd(seed, 1, 4), "diag": draw(seed, 3, 4).square() + 0.1}[kind]
    full = torch.diag_embed(covariances) if kind == "diag" else covariances
    white = whitening(covariances, ridge)
    white = torch.diag_embed(white) if kind == "diag" else white
    for matrix, factor in zip(full, white):
        regular = matrix + ridge * matrix.trace() / 4 * torch.eye(4).double()
        torch.testing.assert_close(factor.T @ factor @ regular, torch.eye(4).double(), rtol=0, atol=1e-8)


@given(st.integers(0, 10**6), st.sampled_from(FORMS), st.sampled_from(["class", "tied"]))
def test_an_affine_map_of_the_features_changes_nothing(seed, form, kind):
    n, c, d = 7, 4, 3
    features, means, covariances = draw(seed, n, d), draw(seed + 1, c, d), spd(seed, c if kind == "class" else 1, d)
    labels = torch.arange(n) % c
    a = draw(seed + 2, d, d) + 3 * torch.eye(d).double()
    b = 5 * draw(seed + 3, d)
    before = alignment_loss(distances(features, means, whitening(covariances, 0.0)), labels, form)
    moved = distances(features @ a.T + b, means @ a.T + b, whitening(a @ covariances @ a.T, 0.0))
    torch.testing.assert_close(alignment_loss(moved, labels, form), before, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.sampled_from(KINDS), st.sampled_from(FORMS[:2]))
def test_the_scale_of_the_covariances_does_not_matter(seed, scale, kind, form):
    features, means = draw(seed, 6, 3), draw(seed + 1, 4, 3)
    covariances = {"class": spd(seed, 4, 3), "tied": spd(seed, 1, 3), "diag": draw(seed, 4, 3).square() + 0.1}[kind]
    losses = [
        alignment_loss(distances(features, means, whitening(s * covariances)), torch.arange(6) % 4, form)
        for s in (1.0, scale)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-7)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_forms_by_hand(seed, c):
    away = draw(seed, 8, c).square() + 0.01
    labels = torch.arange(8) % c
    intra = [float(row[k]) for row, k in zip(away, labels)]
    inter = [sum(float(v) for j, v in enumerate(row) if j != k) / (c - 1) for row, k in zip(away, labels)]
    everything = [float(row.sum()) / c for row in away]
    expected = {
        "log_ratio": np.mean([math.log(a / b) for a, b in zip(intra, inter)]),
        "log_ratio_all": np.mean([math.log(a / b) for a, b in zip(intra, everything)]),
        "intra": np.mean(intra),
        "difference": np.mean(intra) - np.mean(inter),
    }
    for form, value in expected.items():
        assert float(alignment_loss(away, labels, form)) == pytest.approx(value, rel=1e-8, abs=1e-8)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_all_classes_below_the_line_rescale_every_gradient(seed, c):
    """With the sum over all classes each sample's gradient is multiplied by inter / (intra + inter), as sums."""
    labels = torch.arange(8) % c
    features, means, whiten = draw(seed, 8, 3).requires_grad_(), draw(seed + 1, c, 3), whitening(spd(seed, c, 3))
    gradients = []
    for form in ("log_ratio", "log_ratio_all"):
        away = distances(features, means, whiten)
        gradients += torch.autograd.grad(alignment_loss(away, labels, form), features)
    away = away.detach()
    share = 1 - away.gather(1, labels[:, None]) / away.sum(1, keepdim=True)
    torch.testing.assert_close(gradients[1], share * gradients[0])


def test_a_feature_on_its_mean_gives_a_finite_loss_and_gradient():
    means = draw(0, 3, 4)
    features = means.clone().requires_grad_()
    for whiten in (whitening(spd(1, 3, 4)), whitening(spd(1, 1, 4)), draw(1, 3, 4)):
        loss = alignment_loss(distances(features, means, whiten), torch.arange(3))
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gaussians_are_numpy_s(kind):
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 1, 2, 0])
    features = (3 * draw(0, 12, 4) + 1).float()
    counts, means, covariances = class_gaussians(features, labels, 3, kind)
    groups = [features[labels == k].double().numpy() for k in range(3)]
    assert counts.tolist() == [4, 4, 4]
    np.testing.assert_allclose(means, [g.mean(0) for g in groups], rtol=1e-12)
    each = np.stack([np.cov(g.T, bias=True) for g in groups])
    expected = {"class": each, "tied": each.mean(0)[None], "diag": np.stack([np.diag(s) for s in each])}[kind]
    np.testing.assert_allclose(covariances, expected, rtol=1e-10, atol=1e-12)


def test_known_gaussians_are_found_again():
    n, d = 4000, 3
    truth_means, truth = 4 * draw(3, 2, d), spd(4, 2, d)
    labels = torch.arange(2 * n) % 2
    roots = torch.linalg.cholesky(truth)
    features = truth_means[labels] + (roots[labels] @ draw(5, 2 * n, d)[..., None])[..., 0]
    _, means, covariances = class_gaussians(features, labels, 2)
    variances = truth.diagonal(dim1=1, dim2=2)
    assert ((means - truth_means).abs() <= 3 * (variances / n).sqrt()).all()
    error = (truth.square() + variances[:, :, None] * variances[:, None]).div(n).sqrt()
    assert ((covariances - truth).abs() <= 3 * error).all()


def test_a_class_has_its_own_matrix_where_it_has_samples_enough():
    labels = torch.arange(12) % 2
    assert class_gaussians(draw(0, 12, 5), labels, 2).covariances.shape == (2, 5, 5)
    assert class_gaussians(draw(0, 12, 6), labels, 2).covariances.shape == (1, 6, 6)


def test_preparation_is_one_pass_in_eval_mode_and_leaves_the_model_alone():
    net = seeded_net()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepared = CAFA.prepare(net, labelled(), covariance="class")
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    net.eval()
    head, net.fc = net.fc, nn.Identity()
    with torch.no_grad():
        features = torch.cat([net(x) for x, _ in labelled()])
    labels = torch.cat([y for _, y in labelled()])
    expected = class_gaussians(features, labels, head.out_features, "class")
    for name, value in expected._asdict().items():
        assert torch.equal(prepared[name], value)
    assert set(prepared) == {"counts", "means", "covariances"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_gradient_of_the_paper_s_loss(form, kind):
    adapter = cafa(seeded_net().double(), covariance=kind, form=form, optimizer=partial(torch.optim.SGD, lr=1e-3))
    gaussians = CAFA.prepare(seeded_net().double(), source(seeded_net().double()), covariance=kind)
    sigma = gaussians["covariances"]
    sigma = torch.diag_embed(sigma) if kind == "diag" else sigma.expand(5, *sigma.shape[1:])
    d = sigma.shape[1]
    inverse = torch.linalg.inv(
        sigma + 1e-3 * sigma.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(d).double()
    )
    for x in stream(seed=7).double():
        before = {name: p.detach().clone().requires_grad_() for name, p in adapter.moving.items()}
        seen = []
        handle = adapter.model.fc.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        logits = torch.func.functional_call(adapter.model, before, (x,))
        handle.remove()
        losses = []
        for g, k in zip(seen[0], logits.argmax(1).tolist()):
            away = [(g - m) @ p @ (g - m) for m, p in zip(gaussians["means"], inverse)]
            inter = sum(v for j, v in enumerate(away) if j != k) / 4
            losses.append(
                {
                    "log_ratio": (away[k] / inter).log(),
                    "log_ratio_all": (away[k] / (sum(away) / 5)).log(),
                    "intra": away[k],
                    "difference": away[k] - inter,
                }[form]
            )
        gradients = torch.autograd.grad(sum(losses) / len(losses), list(before.values()))
        torch.testing.assert_close(adapter(x), logits.detach())
        for (name, old), gradient in zip(before.items(), gradients):
            torch.testing.assert_close(adapter.moving[name].detach(), old.detach() - 1e-3 * gradient)
    assert int(adapter.updates) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_distances_keep_their_precision_under_autocast(kind):
    """The model's own half precision is another matter: only what comes after it is compared."""
    adapters = [cafa(covariance=kind, optimizer=partial(torch.optim.SGD, lr=1.0)) for _ in range(2)]
    net = seeded_net()
    features = 30 + stream(shape=(10,))[0]
    logits = net.fc(features)
    for adapter, half in zip(adapters, (False, True)):
        adapter.means += 30
        adapter._with_features = lambda *_, a=adapter: (features * a.model.bn1.weight.mean(), logits)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            adapter(stream()[0])
    steps = [adapter.model.bn1.weight.detach() - net.bn1.weight.detach() for adapter in adapters]
    assert steps[0].abs().max() > 1e-4
    torch.testing.assert_close(*steps, rtol=1e-3, atol=0)


def test_it_pulls_to_the_predicted_class_and_away_from_the_others():
    adapter = cafa(optimizer=partial(torch.optim.Adam, lr=2e-2))
    x = torch.cat([x for x, _ in labelled(batches=2)]) * 0.5 + 0.3

    def ratio():
        with adapter.frozen():
            features, logits = adapter._with_features(adapter.model, adapter.model.fc, x)
        return float(alignment_loss(distances(features, adapter.means, adapter.whiten), logits.argmax(1)).detach())

    before = ratio()
    for _ in range(40):
        adapter(x)
    assert ratio() < before - 0.1


def test_dead_dimensions_are_survived():
    net = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)))
    with torch.no_grad():
        net[1].bias[0] = -100.0  # this unit never fires
    x = draw(0, 40, 3).float()
    for kind in KINDS:
        adapter = CAFA(net, CAFA.prepare(net, [(x, torch.arange(40) % 2)], covariance=kind))
        assert adapter(x + 1).isfinite().all()
        assert (int(adapter.updates), int(adapter.skipped)) == (1, 0)


def test_a_named_head():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head, self.unused = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(9, 9)

        def forward(self, x):
            return self.head(self.norm(x))

    net, x = built(Projected), draw(0, 30, 4).float()
    batches = [(x, torch.arange(30) % 3)]
    prepared = CAFA.prepare(net, batches, head="head")
    assert CAFA(net, prepared, head="head")(x).shape == (30, 3)
    with pytest.raises(InputError, match=r"means \(9, 9\) for this head, got \(3, 4\)"):
        CAFA(net, prepared)
    with pytest.raises(InputError, match="no module named 'neck'"):
        CAFA.prepare(net, batches, head="neck")
    with pytest.raises(InputError, match=r"must have an nn.Linear named 'norm'"):
        CAFA.prepare(net, batches, head="norm")


def test_from_a_file_it_is_the_same(tmp_path):
    net = seeded_net()
    prepared = CAFA.prepare(net, labelled())
    prepared.save(tmp_path / "cafa.safetensors")
    one, other = CAFA(net, prepared), CAFA(net, Prepared.load(tmp_path / "cafa.safetensors"))
    for x in stream():
        assert torch.equal(one(x), other(x))


def test_short_batches_black_images_and_frozen_norm_layers():
    net = seeded_net()
    for norm in (net.bn1, net.layer1[1]):
        norm.requires_grad_(False)
    adapter = cafa(net)
    assert "bn1.weight" in adapter.moving
    for x in (stream()[0], stream()[0][:2], torch.zeros(12, 3, 8, 8), stream()[0][:1]):
        assert adapter(x).isfinite().all()
    assert int(adapter.updates) + int(adapter.skipped) == 4
    assert all(value.isfinite().all() for value in adapter.state_dict().values())


def test_frozen_and_reset_are_batch_statistics():
    adapter, plain = cafa(), BatchNormAdapt(seeded_net())
    for x in stream():
        with adapter.frozen():
            adapter(x)
        adapter(x)
    adapter.reset()
    with adapter.frozen():
        torch.testing.assert_close(adapter(stream()[0]), plain(stream()[0]))


@pytest.mark.bad_input
def test_what_does_not_fit_is_refused():
    net = seeded_net()
    prepared = CAFA.prepare(net, labelled())
    with pytest.raises(InputError, match="made for another model"):
        CAFA(seeded_net(1), prepared)
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module"):
        CAFA(lambda x: x, prepared)
    with pytest.raises(InputError, match=r"must come from CAFA.prepare, it was made by EATA"):
        CAFA(net, Prepared("EATA", dict(prepared), net))
    with pytest.raises(InputError, match="form must be one of log_ratio, log_ratio_all, intra, difference"):
        CAFA(net, prepared, form="ratio")
    with pytest.raises(InputError, match=r"nn\.Linear"):
        CAFA.prepare(built(lambda: nn.Conv2d(3, 2, 1)), labelled())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "settings", "message"),
    [
        ([], {}, "at least one batch"),
        ([x for x, _ in labelled()], {}, r"must yield \(inputs, labels\), it yields no labels"),
        ([(x, y % 4) for x, y in labelled()], {}, "1 or more samples of every class for .*'tied', class 4 has 0"),
        (labelled(batches=1, n=6), {"covariance": "class"}, "2 or more samples .* 'class', class 1 has 1"),
        (labelled(batches=1, n=6), {"covariance": "diag"}, "2 or more samples .* 'diag', class 1 has 1"),
        ([(x, y + 1) for x, y in labelled()], {}, r"labels must lie in 0..4, found 5"),
        (labelled(), {"covariance": "full"}, "covariance must be one of class, tied, diag"),
        ([(x * float("nan"), y) for x, y in labelled()], {}, "batch 0"),
        ([(torch.zeros(10, 3, 8, 8), torch.arange(10) % 5)], {}, "the same within all classes"),
        (
            [(torch.cat([torch.zeros(4, 3, 8, 8), x]), torch.cat([torch.full((4,), 4), y % 4])) for x, y in labelled()],
            {"covariance": "diag"},
            "the same in class 4",
        ),
    ],
)
def test_bad_source_data_are_refused(loader, settings, message):
    with pytest.raises(InputError, match=message):
        CAFA.prepare(seeded_net(), loader, **settings)
