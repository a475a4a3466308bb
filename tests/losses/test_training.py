from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from trimtab.core.checks import InputError
from trimtab.core.progress import OutOfTime, limit
from trimtab.losses import (
    MESA,
    MNDCG,
    OBJECTIVES,
    SAF,
    ArcFace,
    CertifiedIBP,
    DirectCoverage,
    Indexed,
    Mixup,
    Objective,
    ZLoss,
    train,
)

BINARY = ("AnyLoss", "EnsLoss")


def task(classes, n=120):
    """Points whose first coordinates say the class, and a loader that tells their numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    labels = x[:, :classes].argmax(1)
    order = torch.Generator().manual_seed(1)
    loader = DataLoader(Indexed(TensorDataset(x, labels)), batch_size=30, shuffle=True, generator=order)
    return x, labels, loader


def network(classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = [
        nn.utils.skip_init(nn.Linear, 4, 16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.utils.skip_init(nn.Linear, 16, classes),
    ]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("classes", [2, 3])
def test_every_objective_teaches_a_network(name, classes):
    x, labels, loader = task(classes)
    model = network(classes)
    refused = {
        2: {"ZLoss": "classes must be at least 3"},
        3: {name: f"classes must be 2 for {name}, got 3" for name in BINARY},
    }
    if name in refused[classes]:
        with pytest.raises(InputError, match=refused[classes][name]):
            train(model, loader, name, epochs=1, classes=classes)
        return
    trained = train(model, loader, name, epochs=12, classes=classes, optimizer=partial(torch.optim.Adam, lr=3e-2))
    assert trained is model
    assert not model.training
    assert (model(x).argmax(1) == labels).float().mean() > 0.85  # a third or a half before


@pytest.mark.parametrize("name", ["Mixup", "MNDCG", "EnsLoss", "CrossEntropy"])
def test_the_same_seed_trains_the_same_network(name):
    def trained(seed):
        return train(network(2), task(2)[2], name, epochs=2, classes=2, seed=seed)[0].weight

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_a_loss_and_a_step_of_ones_own_are_objectives():
    _, _, loader = task(2)
    named, given, step = (network(2) for _ in range(3))
    train(named, loader, "DirectCoverage", epochs=1, classes=2)
    train(given, task(2)[2], DirectCoverage(samples=8), epochs=1, classes=2)
    counted = []
    own = Objective(lambda model, batch: DirectCoverage(samples=8)(model(batch.inputs), batch.labels), counted.append)
    train(step, task(2)[2], own, epochs=1, classes=2)
    assert torch.equal(named[0].weight, given[0].weight)
    assert torch.equal(named[0].weight, step[0].weight)
    assert counted == [step] * 4


def test_mappings_are_batches_too():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(2)

        def forward(self, points):
            return self.net(points)

    x, labels, _ = task(2)
    data = [{"points": point, "labels": label} for point, label in zip(x, labels)]
    model = Named()
    before = model.net[0].weight.clone()
    train(model, DataLoader(Indexed(data), batch_size=60), "SAF", epochs=3, classes=2)
    assert not torch.equal(before, model.net[0].weight)


class Stream(IterableDataset):
    """Items in a row, without numbers."""

    def __init__(self, *columns):
        self.items = list(zip(*columns))

    def __iter__(self):
        return iter(self.items)


class SizedStream(Stream):
    def __len__(self):
        return len(self.items)


def halved(items):
    """A collation of one's own, which knows pairs."""
    x, labels = zip(*items)
    return [torch.stack(x) / 2, torch.stack(labels)]


def named(items):
    return {"points": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}


@pytest.mark.parametrize("kept", ["shuffle", "batch_sampler", "workers", "collate", "mappings", "numbers"])
def test_the_numbers_that_saf_asks_for_are_added_to_an_ordinary_loader(kept):
    x = torch.arange(12.0)[:, None].repeat(1, 4)
    plain, order = TensorDataset(x, torch.arange(12) % 2), torch.Generator().manual_seed(0)
    sampler = BatchSampler(RandomSampler(plain, generator=order), batch_size=5, drop_last=True)
    dataset, options = {
        "shuffle": (plain, {"batch_size": 5, "shuffle": True, "drop_last": True}),
        "batch_sampler": (plain, {"batch_sampler": sampler}),
        "workers": (plain, {"batch_size": 5, "num_workers": 1, "drop_last": True, "persistent_workers": True}),
        "collate": (plain, {"batch_size": 5, "collate_fn": halved, "drop_last": True}),
        "mappings": (plain, {"batch_size": 5, "collate_fn": named, "drop_last": True}),
        "numbers": (Indexed(plain), {"batch_size": 5, "shuffle": True, "drop_last": True}),
    }[kept]
    loader = DataLoader(dataset, generator=order, **options)
    seen = []

    def step(model, batch):
        points = batch.inputs["points"] if kept == "mappings" else batch.inputs
        seen.append((points[:, 0] * (2 if kept == "collate" else 1), batch.numbers))
        return network_of_two(points).mean()

    network_of_two = network(2)
    train(network_of_two, loader, Objective(step, numbers=True), epochs=2, classes=2)
    assert [len(numbers) for _, numbers in seen] == [5] * 4
    assert all(torch.equal(points.long(), numbers) for points, numbers in seen)
    assert type(loader.dataset) is type(dataset)
    assert len(next(iter(loader))) == (3 if kept == "numbers" else 2)


def test_saf_trains_the_same_with_numbers_of_its_own_making():
    x, labels, loader = task(2)
    order = torch.Generator().manual_seed(1)
    plain = DataLoader(TensorDataset(x, labels), batch_size=30, shuffle=True, generator=order)
    first, second = (train(network(2), given, "SAF", epochs=4, classes=2) for given in (plain, loader))
    assert torch.equal(first[0].weight, second[0].weight)


def test_frozen_parameters_stay_and_a_schedule_is_followed():
    model = network(2)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    rates = []

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rates.append(epoch) or 0.5**epoch)

    train(model, task(2)[2], "CrossEntropy", epochs=3, classes=2, schedule=schedule)
    assert torch.equal(before, model[0].weight)
    assert rates == [0, 1, 2, 3]


@pytest.mark.bad_input
def test_what_cannot_be_trained_is_refused_in_words():
    x, labels, loader = task(2)
    model = network(2)
    for given, name, told in (
        (loader, "Zloss", "objective must be one of CrossEntropy, .* got 'Zloss'"),
        (DataLoader(Stream(x, labels), batch_size=30), "SAF", "loader must be a DataLoader over a dataset with"),
        (DataLoader(SizedStream(x, labels), batch_size=30), "SAF", "an iterable dataset or a list of batches does not"),
        ([(x, labels)], "SAF", "a list of batches does not tell"),
        ([(x,)], "ZLoss", "loader must yield labels"),
        ([(x, labels + 1)], "ZLoss", "labels must lie in 0..1"),
        ([(x, labels)], lambda logits, labels: logits.sum() / 0, "gave a loss of .* in epoch 0, step 0"),
    ):
        with pytest.raises(InputError, match=told):
            train(model, given, name, epochs=3, classes=2)
    with pytest.raises(InputError, match=r"model must give logits of 2 classes, got \(30, 3\)"):
        train(network(3), loader, "EnsLoss", epochs=1, classes=2)
    for name in ("CrossEntropy", "Mixup", "RankMixup", "SAF", "MESA", torch.nn.functional.cross_entropy):
        with pytest.raises(InputError, match=r"model must give logits of 7 classes, got"):
            train(network(3), loader, name, epochs=3, classes=7)
    with pytest.raises(InputError, match="loader must yield batches, as a DataLoader does, got TensorDataset"):
        train(model, torch.utils.data.TensorDataset(x, labels), "Focal", epochs=1, classes=2)
    for given, name, told in (
        ([], "Mixup", "loader must yield batches in every epoch, it yielded none in epoch 0"),
        (iter([(x, labels)]), "Mixup", "none in epoch 1"),
        ([(x, labels, x[:, 0])], "Focal", "whole sample numbers"),
        ([(x, labels)], ZLoss, "objective must be a function or a module, got the class ZLoss"),
        (
            [(x, labels)],
            DirectCoverage(samples=2, reduction="none"),
            r"objective DirectCoverage must return a scalar tensor, got float32 \(120,\)",
        ),
    ):
        with pytest.raises(InputError, match=told):
            train(model, given, name, epochs=2, classes=2)
    wild = partial(torch.optim.SGD, lr=float("inf"))
    with pytest.raises(InputError, match="not finite: the learning rate is too high"):
        train(network(2), [(x, labels)], "Focal", epochs=1, classes=2, optimizer=wild)
    with pytest.raises(InputError, match="all are frozen"):
        train(network(2).requires_grad_(False), loader, "Focal", epochs=1, classes=2)
    with pytest.raises(InputError, match="epochs must be at least 1"):
        train(model, loader, "ZLoss", epochs=0, classes=2)


def _adam():
    return torch.optim.Adam(network(2).parameters())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("argument", "given", "told"),
    [
        ("model", "m", "model must be an nn.Module, got str"),
        ("model", lambda points: points, "model must be an nn.Module, got function"),
        ("optimizer", _adam(), "optimizer must build an Optimizer from parameters, got Adam"),
        ("optimizer", "adam", "optimizer must build an Optimizer from parameters, got str"),
        ("optimizer", lambda parameters: None, "optimizer must build an Optimizer from parameters, got NoneType"),
        ("schedule", "cosine", "schedule must build an LRScheduler from an optimizer, got str"),
        ("schedule", torch.optim.lr_scheduler.StepLR(_adam(), 1), "LRScheduler from an optimizer, got StepLR"),
        ("schedule", lambda optimizer: None, "schedule must build an LRScheduler from an optimizer, got NoneType"),
        ("objective", lambda logits, labels: 0.5, "objective <lambda> must return a scalar tensor, got float"),
        (
            "objective",
            lambda logits, labels: logits.sum().detach(),
            "objective must give a loss with a gradient, that of <lambda> is detached",
        ),
        ("objective", MESA(network(2)), "MESA does not .*argument: 'x'.*; give its name, \"MESA\""),
        ("objective", SAF(samples=120, classes=2), "SAF does not .*'index'.*; give its name, \"SAF\""),
        ("objective", Mixup(), 'objective must need logits and labels alone, Mixup does not .*, "Mixup"'),
        ("objective", MNDCG(), 'MNDCG does not .*; give its name, "MNDCG"'),
        ("objective", lambda logits: logits.mean(), "<lambda> does not .*too many positional.*; write the loop"),
        (
            "objective",
            ArcFace(2, 2),
            "objective must have no parameters of its own, ArcFace has weight; write the loop",
        ),
        (
            "objective",
            CertifiedIBP(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))),
            "parameters of its own, CertifiedIBP has bounds.*; write the loop",
        ),
    ],
)
def test_what_an_argument_must_be_is_told(argument, given, told):
    arguments = {"model": network(2), "objective": "Focal", "epochs": 1, "classes": 2, argument: given}
    with pytest.raises(InputError, match=told):
        train(loader=task(2)[2], **arguments)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["SAF", "MESA"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_in_which_nothing_would_be_added_to_the_cross_entropy_are_refused(name, epochs):
    with pytest.raises(InputError, match=f"epochs must be at least 3 for {name}, .* got {epochs}"):
        train(network(2), task(2)[2], name, epochs=epochs, classes=2)


def test_a_loss_written_in_c_and_one_with_a_frozen_teacher_are_objectives():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Parameter(torch.eye(2), requires_grad=False)

        def forward(self, logits, labels):
            return nn.functional.mse_loss(logits, self.teacher[labels])

    for loss in (Distilled(), partial(torch._C._nn.cross_entropy_loss, reduction=1)):
        before = network(2)
        assert not torch.equal(train(network(2), task(2)[2], loss, epochs=1, classes=2)[0].weight, before[0].weight)


def test_it_stops_where_the_time_is_up():
    with limit(0), pytest.raises(OutOfTime):
        train(network(2), task(2)[2], "ZLoss", epochs=1, classes=2)
