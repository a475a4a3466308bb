"""`Predictions`: made in one place, split in one place, written in one place."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab import Predictions
from trimtab.core.checks import InputError
from trimtab.core.predictions import take_apart


def predictions(n=30, c=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Predictions(
        torch.randn(n, c, generator=g),
        torch.randint(c, (n,), generator=g),
        torch.randn(n, 5, generator=g),
        torch.randn(n, 2, c, generator=g),
        torch.rand(n, generator=g),
    )


def same(a, b):
    names = ("logits", "labels", "features", "views", "weights")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must have shape \(n, c\)"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels must have 3 entries"),
        ({"labels": torch.tensor([0, 1, 9])}, "labels must lie in 0..2, found 9 at row 2"),
        ({"labels": torch.zeros(3)}, "labels must be integer class indices, got float32"),
        ({"features": torch.zeros(2, 4)}, "features must have 3 rows, got 2"),
        ({"features": torch.tensor([[0.0], [math.inf], [0.0]])}, "features must be finite, found inf at row 1"),
        ({"views": torch.zeros(3, 2, 4)}, r"views must have shape \(3, v, 3\)"),
        ({"weights": torch.zeros(3)}, "weights must not be all zero"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        Predictions(**{"logits": torch.zeros(3, 3), **fields})


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match="predictions must hold labels, found none"):
        _ = Predictions(torch.zeros(2, 2)).accuracy


def test_accuracy_is_weighted():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1])
    assert Predictions(logits, labels).accuracy == 0.5
    assert Predictions(logits, labels, weights=torch.tensor([3.0, 1.0])).accuracy == 0.75


def test_rows_take_every_field_along():
    whole = predictions()
    chosen = whole[torch.tensor([4, 2])]
    assert same(chosen, Predictions(*(getattr(whole, f)[[4, 2]] for f in whole.__dataclass_fields__)))
    assert len(whole[:7]) == 7
    assert same(whole[[4, 2]], chosen)


@given(st.integers(10, 200), st.integers(2, 5), st.integers(0, 2**32 - 1), st.floats(0.2, 0.8))
def test_parts_are_disjoint_stratified_and_reproducible(n, c, seed, share):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n,), generator=g)
    whole = Predictions(torch.arange(n * c, dtype=torch.float64).reshape(n, c), labels)
    parts = whole.split(share, 1 - share, seed=seed)
    rows = torch.cat([part.logits[:, 0] for part in parts])
    assert torch.equal(rows.sort().values, whole.logits[:, 0])
    assert abs(parts[0].n - share * n) <= 0.5 + 1e-9
    for k in range(c):
        assert abs(int((parts[0].labels == k).sum()) - share * int((labels == k).sum())) <= 2
    again = whole.split(share, 1 - share, seed=seed)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(parts, again))


def test_other_seeds_give_other_parts():
    whole = predictions()
    assert not torch.equal(whole.split(0.5, seed=0)[0].logits, whole.split(0.5, seed=1)[0].logits)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((), "fractions must be given and sum to at most 1"),
        ((0.6, 0.5), "fractions must be given and sum to at most 1"),
        ((0.5, 0.0), r"fractions\[1\] must lie in \(0, 1\], got 0"),
        ((0.5, -0.1), r"fractions\[1\] must lie in \(0, 1\]"),
        ((0.001, 0.9), "leave a part of the 30 samples empty"),
    ],
)
def test_bad_fractions(fractions, message):
    with pytest.raises(InputError, match=message):
        predictions().split(*fractions, seed=0)


@given(st.integers(4, 60), st.integers(2, 4), st.integers(0, 1000))
def test_every_row_is_held_out_once(n, k, seed):
    whole = Predictions(torch.arange(2.0 * n).reshape(n, 2), torch.arange(n) % 2)
    folds = whole.folds(k, seed)
    held_out = torch.cat([out.logits[:, 0] for _, out in folds])
    assert torch.equal(held_out.sort().values, whole.logits[:, 0])
    for fit, out in folds:
        assert fit.n + out.n == n
        assert abs(out.n - n / k) < 1
        assert abs(int(out.labels.sum()) - int(whole.labels.sum()) / k) < 1
        assert not set(fit.logits[:, 0].tolist()) & set(out.logits[:, 0].tolist())


@pytest.mark.bad_input
@pytest.mark.parametrize("k", [1, 31, 2.0])
def test_a_bad_number_of_folds(k):
    with pytest.raises(InputError, match="k must be"):
        predictions().folds(k, 0)


@pytest.mark.parametrize("ending", ["parquet", "feather", "npz"])
def test_reading_gives_back_what_was_written(tmp_path, ending):
    whole = predictions()
    whole.write(tmp_path / f"p.{ending}")
    assert same(whole, Predictions.read(tmp_path / f"p.{ending}"))


class Net(nn.Module):
    def __init__(self, c=3):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(6, c)

    def forward(self, x):
        return self.head(self.body(x))


def net(c=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(c)


X = torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(10) % 3


def test_one_pass_collects_logits_labels_and_features():
    model = net().train()
    model.body[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, generator=torch.Generator())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = Predictions.collect(model, loader, features=True)
    assert len(calls) == 3
    assert model.training
    assert not model.body[3].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        features = model.body(X)
        assert torch.equal(found.features, features)
        assert torch.allclose(found.logits, model.head(features))
    assert torch.equal(found.labels, Y)
    assert not found.logits.requires_grad


def test_features_of_a_named_module():
    found = Predictions.collect(net(), [X], features="body.1")
    assert torch.equal(found.features, X.flatten(1))
    assert found.labels is None
    with pytest.raises(InputError, match=r"model has no module named 'tail'; the last ones are: .*head"):
        Predictions.collect(net(), [X], features="tail")
    with pytest.raises(InputError, match=r"model must have an nn.Linear layer"):
        Predictions.collect(nn.Flatten(), [X], features=True)


def test_views_come_from_the_augmentation_and_its_seed():
    def noise(x, generator):
        return x + torch.randn(x.shape, generator=generator)

    model = net().eval()
    loader = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    found = Predictions.collect(model, loader, views=2, augment=noise, seed=3)
    assert found.views.shape == (10, 2, 3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        assert torch.allclose(found.views[:4, 0], model(noise(X[:4], generator)))
        assert torch.allclose(found.views[:4, 1], model(noise(X[:4], generator)))
    assert torch.equal(found.views, Predictions.collect(model, loader, views=2, augment=noise, seed=3).views)
    for settings in ({"views": 1}, {"augment": noise}):
        with pytest.raises(InputError, match="augment must be given exactly when views > 0"):
            Predictions.collect(model, loader, **settings)


def test_batches_may_be_mappings_and_outputs_objects():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, pixels, scale):
            return SimpleNamespace(logits=self.net(pixels) * scale)

    found = Predictions.collect(Wrapped(), [{"pixels": X, "scale": 2.0, "labels": Y}])
    assert torch.equal(found.labels, Y)
    assert torch.allclose(found.logits, 2 * Predictions.collect(net(), [X]).logits)


def test_inputs_and_labels_go_to_the_model_s_device():
    elsewhere = torch.device("meta")
    assert [part.device for part in take_apart((X, Y), elsewhere)] == [elsewhere, elsewhere]
    inputs, labels = take_apart({"pixels": X, "labels": Y}, elsewhere)
    assert inputs["pixels"].device == labels.device == elsewhere


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader must yield at least one batch, it yielded none"),
        ([(X, Y, Y)], r"loader must yield inputs, \(inputs, labels\) or a mapping of tensors"),
        ([(X, "labels")], r"loader must yield inputs, \(inputs, labels\) or a mapping of tensors"),
        ([(X, Y), (X,)], "loader must yield labels with every batch or with none"),
        ([(X, Y), (X * math.nan, Y)], "batch 1: the model's output must be finite, found nan at row 0, column 0"),
        ([(X, Y.float())], "labels must be integer class indices, got float32"),
        ([(X, Y[:4])], "labels must have 10 entries, one for each row, got 4"),
        ([(X, Y + 5)], "labels must lie in 0..2, found 5 at row 0"),
        (["text"], "loader must yield"),
    ],
)
def test_bad_loaders(loader, message):
    with pytest.raises(InputError, match=message):
        Predictions.collect(net(), loader)


@pytest.mark.bad_input
def test_a_model_that_gives_no_logits():
    with pytest.raises(InputError, match=r"batch 0: the model's output must have shape \(n, c\), got \(10, 2, 4\)"):
        Predictions.collect(nn.Identity(), [X])
    with pytest.raises(InputError, match="batch 0: the model's output must be a numeric tensor or array, got dict"):
        Predictions.collect(lambda_module(lambda x: {"a": 1}), [X])


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module
