"""SAF and MESA: parity with the authors' code (45-saf), what they promise, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from trimtab.core.checks import InputError
from trimtab.losses import MESA, SAF, Indexed, trajectory_kl
from trimtab.losses.output_memory import OutputMemory

GOLDEN = Path(__file__).parents[1] / "golden" / "45-saf"


def cases(array):
    found = [(path, key.rpartition("/")[0]) for path in sorted(GOLDEN.glob("*.npz")) for key in np.load(path).files]
    found = [(path, case) for path, case in dict.fromkeys(found) if f"{case}/{array}" in np.load(path).files]
    assert found
    return [pytest.param(path, case, id=f"{path.stem}-{case}") for path, case in found]


def read(path, case):
    with np.load(path) as arrays:
        named = {k.removeprefix(f"{case}/"): arrays[k] for k in arrays.files if k.startswith(f"{case}/")}
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in named.items()}


def rows(n, c=4, seed=0):
    return 2 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(epochs=3, n=6, **settings):
    """A SAF with start and lookback 1 that has seen random outputs for some epochs."""
    saf = SAF(samples=n, classes=4, start=1, lookback=1, **{"dtype": torch.float64, **settings})
    for epoch in range(epochs):
        saf(rows(n, seed=epoch), torch.zeros(n, dtype=torch.int64), torch.arange(n), epoch=epoch)
    return saf


@pytest.mark.golden
@pytest.mark.parametrize(("path", "case"), cases("student"))
def test_the_divergence_is_the_authors(path, case):
    g = read(path, case)
    student = g["student"].requires_grad_()
    kl = trajectory_kl(student, g["teacher"], temperature=g["temperature"])
    kl.backward()
    torch.testing.assert_close(kl.item(), g["kl"], rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, g["grad_student"], rtol=1e-9, atol=1e-15)


@pytest.mark.golden
@pytest.mark.parametrize(("path", "case"), cases("orders"))
def test_trainings_follow_the_authors(path, case):
    g = read(path, case)
    n, classes = len(g["X"]), len(g["b0"])
    model = skip_init(nn.Linear, g["X"].shape[1], classes, dtype=torch.float64)
    model.load_state_dict({"weight": g["W0"], "bias": g["b0"]})
    shared = {"weight": g["lam"], "temperature": g["temperature"], "start": g["start_epoch"]}
    mesa = MESA(model, decay=g["ema_decay"], **shared) if "ema_decay" in g else None
    saf = None if mesa else SAF(samples=n, classes=classes, lookback=g["minus_epoch"], dtype=torch.float64, **shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=g["lr"])
    losses, plain = [], []
    for epoch, order in enumerate(g["orders"]):
        for index in order.split(g["batch_size"]):
            x, y = g["X"][index], g["y"][index]
            logits = model(x)
            loss = mesa(logits, y, x, epoch=epoch) if mesa else saf(logits, y, index, epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            plain.append(F.cross_entropy(logits.detach(), y))
            if mesa:
                mesa.update(model)
    losses, plain = torch.stack(losses), torch.stack(plain)
    near = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(losses, g["loss"], **near)
    torch.testing.assert_close(plain, g["ce"], **near)
    torch.testing.assert_close((losses - plain) / g["lam"], g["kl"], **near)
    torch.testing.assert_close(model.weight.detach(), g["W"], **near)
    torch.testing.assert_close(model.bias.detach(), g["b"], **near)
    if mesa:
        torch.testing.assert_close(mesa.average.weight, g["W_ema"], **near)
        torch.testing.assert_close(mesa.average.bias, g["b_ema"], **near)


@given(st.integers(0, 10**6), st.floats(0.5, 20), st.floats(-50, 50))
def test_the_divergence_is_zero_only_between_equals(seed, temperature, shift):
    student, teacher = rows(5, seed=seed), rows(5, seed=seed + 1)
    assert trajectory_kl(student, student + shift, temperature=temperature).abs() < 1e-9
    assert trajectory_kl(student, teacher, temperature=temperature) > 0


def test_the_divergence_has_a_true_gradient_and_no_nan_at_certainty():
    student, teacher = rows(3).requires_grad_(), rows(3, seed=1)
    assert torch.autograd.gradcheck(trajectory_kl, (student, teacher))
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    kl = trajectory_kl(certain, certain.detach().flip(1))
    kl.backward()
    assert torch.isfinite(kl)
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("where", ["memory", "file"])
def test_the_teacher_is_the_same_sample_some_epochs_ago(tmp_path, where):
    saf = SAF(
        samples=6,
        classes=4,
        start=3,
        lookback=2,
        dtype=torch.float64,
        path=tmp_path / "outputs" if where == "file" else None,
    )
    labels, generator, kept = torch.arange(6) % 4, torch.Generator().manual_seed(0), []
    for epoch in range(7):
        logits = rows(6, seed=epoch)
        kept.append(logits)
        for index in torch.randperm(6, generator=generator).split(4):
            loss = saf(logits[index], labels[index], index, epoch=epoch)
            expected = F.cross_entropy(logits[index], labels[index])
            if epoch > 3:
                expected = expected + 0.3 * trajectory_kl(logits[index], kept[epoch - 2][index])
            torch.testing.assert_close(loss, expected)


def test_samples_that_were_not_seen_then_teach_nothing():
    saf = filled(3)
    logits, labels = rows(6, seed=9), torch.zeros(6, dtype=torch.int64)
    saf(rows(2, seed=7), labels[:2], torch.tensor([4, 5]), epoch=3)
    loss = saf(logits, labels, torch.arange(6), epoch=4)
    expected = trajectory_kl(logits[4:], rows(2, seed=7)) * 2 / 6
    torch.testing.assert_close(loss - F.cross_entropy(logits, labels), 0.3 * expected)
    assert saf(logits, labels, torch.arange(6), epoch=10) == F.cross_entropy(logits, labels)


def test_the_last_epoch_that_counts_is_before_the_end():
    labels = torch.zeros(6, dtype=torch.int64)
    for end, counts in ((3, False), (4, True), (None, True)):
        loss = filled(3, end=end)(rows(6, seed=9), labels, torch.arange(6), epoch=3)
        assert (loss > F.cross_entropy(rows(6, seed=9), labels)) == counts


def test_the_divergence_is_added_to_an_objective_of_ones_own():
    def smoothed(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    logits, labels, index = rows(6, seed=9), torch.arange(6) % 4, torch.arange(6)
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(4, 4).double()
    x = rows(6, seed=3)
    for loss, rest, teacher in (
        (filled(3, objective=smoothed), index, rows(6, seed=2)),
        (MESA(model, start=1, end=4, weight=0.3, objective=smoothed), x, model(x).detach()),
    ):
        expected = smoothed(logits, labels) + 0.3 * trajectory_kl(logits, teacher)
        torch.testing.assert_close(loss(logits, labels, rest, epoch=3), expected)
    for epoch in (1, 4):  # the last loss is MESA's, which counts between start and end
        torch.testing.assert_close(loss(logits, labels, x, epoch=epoch), smoothed(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_remembers_well_enough(dtype):
    labels = torch.zeros(6, dtype=torch.int64)
    exact, rounded = (
        filled(3, dtype=kind)(rows(6, seed=9), labels, torch.arange(6), epoch=3) for kind in (torch.float64, dtype)
    )
    torch.testing.assert_close(exact, rounded, rtol=1e-3, atol=0)


def test_half_precision_holds_outputs_beyond_its_range():
    memory = OutputMemory(2, 3, lookback=1, dtype=torch.float16)
    memory.write(torch.arange(2), torch.tensor([[1e6, 1e6 - 2, 0.0], [-1e6, 0.0, 1.0]]), epoch=0)
    seen, there = memory.read(torch.arange(2), epoch=1)
    assert there.all()
    expected = torch.tensor([[1.0, -1.0, -1e6], [-1e6, -1.0, 0.0]]).softmax(1)
    torch.testing.assert_close(seen.float().softmax(1), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_run_goes_on_where_it_stopped(tmp_path, where):
    path = tmp_path / "outputs" if where == "file" else None
    first = filled(3, path=path)
    resumed = SAF(samples=6, classes=4, start=1, lookback=1, dtype=torch.float64, path=path)
    resumed.load_state_dict(first.state_dict())
    assert (len(first.state_dict()) == 0) == (where == "file")
    call = rows(6, seed=9), torch.zeros(6, dtype=torch.int64), torch.arange(6)
    assert resumed(*call, epoch=3) == first(*call, epoch=3) > F.cross_entropy(*call[:2])


def test_a_memory_left_out_of_the_state_starts_anew():
    first = filled(3, persistent=False)
    assert not first.state_dict()


def test_the_average_follows_weights_and_statistics_and_leaves_the_network_alone():
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    mesa = MESA(model, decay=0.9, start=0)
    before = {name: value.clone() for name, value in mesa.average.state_dict().items()}
    model(rows(8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    mesa.train().update(model)
    for name, value in mesa.average.state_dict().items():
        now = model.state_dict()[name]
        expected = 0.9 * before[name] + 0.1 * now if value.is_floating_point() else now
        torch.testing.assert_close(value, expected)
    assert mesa.training
    assert not mesa.average.training
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in mesa.parameters())


@pytest.mark.compiled
def test_epochs_and_batches_do_not_break_the_graph():
    saf, twin = filled(3), filled(3)
    compiled = torch.compile(saf, backend="aot_eager", fullgraph=True)
    for epoch in (3, 4, 5):
        call = rows(6, seed=20 + epoch), torch.zeros(6, dtype=torch.int64), torch.arange(6)
        torch.testing.assert_close(compiled(*call, epoch=epoch), twin(*call, epoch=epoch))
        torch.testing.assert_close(saf.memory.outputs, twin.memory.outputs)


def test_numbers_of_samples_come_with_the_batches():
    data = Indexed(torch.utils.data.TensorDataset(torch.arange(5.0), torch.arange(5)))
    _, y, index = next(iter(torch.utils.data.DataLoader(data, batch_size=3, generator=torch.Generator())))
    assert torch.equal(y, index)
    assert data[-1][2] == 4
    assert Indexed([7])[0] == (7, 0)
    with pytest.raises(IndexError):
        data[5]


BAD = [
    ({"start": 2, "lookback": 3}, r"start must be at least 3, got 2"),
    ({"lookback": 0}, r"lookback must be at least 1"),
    ({"weight": -0.1}, r"weight must lie in \[0, inf\), got -0.1"),
    ({"temperature": 0.0}, r"temperature must lie in \(0, inf\), got 0"),
    ({"dtype": torch.int8}, r"dtype must be a floating-point type, got torch.int8"),
    ({"samples": 0}, r"samples must be at least 1"),
    ({"classes": 1}, r"classes must be at least 2"),
    ({"start": 5, "end": 6}, r"end must be at least start \+ 2, 7, or no epoch counts, got 6"),
    ({"objective": nn.CrossEntropyLoss}, "objective must be a function or a module, got the class CrossEntropyLoss"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SAF(**{"samples": 6, "classes": 4, **settings})


@pytest.mark.bad_input
def test_bad_batches_are_refused():
    saf, labels, index = filled(1), torch.zeros(6, dtype=torch.int64), torch.arange(6)
    with pytest.raises(InputError, match=r"index must lie in 0..5, found 6 at row 5"):
        saf(rows(6), labels, torch.tensor([0, 1, 2, 3, 4, 6]), epoch=0)
    with pytest.raises(InputError, match=r"index must have 6 entries"):
        saf(rows(6), labels, index[:5], epoch=0)
    with pytest.raises(InputError, match=r"logits must have 4 columns, got 5"):
        saf(rows(6, 5), labels, index, epoch=0)
    with pytest.raises(InputError, match=r"epoch must be at least 0, got -1"):
        saf(rows(6), labels, index, epoch=-1)
    with pytest.raises(InputError, match=r"labels must have shape \(n,\)"):
        saf(rows(6), rows(6).softmax(1), index, epoch=0)
    with pytest.raises(InputError, match=r"teacher_logits must have the shape \(6, 4\), got \(5, 4\)"):
        trajectory_kl(rows(6), rows(5))
    with pytest.raises(InputError, match=r"teacher_logits must be finite, found nan at row 0, column 1"):
        trajectory_kl(rows(1), torch.tensor([[0.0, torch.nan, 0.0, 0.0]]))


@pytest.mark.bad_input
def test_another_network_and_another_file_are_refused(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model, other = nn.Linear(3, 4), nn.Linear(4, 4)
    mesa = MESA(model, start=0)
    with pytest.raises(InputError, match="model must have the parameters and buffers"):
        mesa.update(other)
    with pytest.raises(InputError, match=r"teacher_logits must have the shape \(6, 4\), got \(5, 4\)"):
        mesa(rows(6).float(), torch.zeros(6, dtype=torch.int64), torch.zeros(5, 3), epoch=1)
    with pytest.raises(InputError, match=r"end must be at least start \+ 2, 7, or no epoch counts, got 2"):
        MESA(model, end=2)
    with pytest.raises(InputError, match="model must be on the device of average, cpu, got meta"):
        mesa.update(nn.Linear(3, 4, device="meta"))
    with pytest.raises(InputError, match=r"decay must lie in \[0, 1\), got 1"):
        MESA(model, decay=1.0)
    (tmp_path / "other").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"path must be a new file or a memory of 480 bytes, .* has 5"):
        filled(1, path=tmp_path / "other")
    with pytest.raises(InputError, match="path must lie in a folder that is there"):
        filled(1, path=tmp_path / "none" / "outputs")
    with pytest.raises(InputError, match="dataset must have a length"):
        Indexed(iter([]))


class Outputs(nn.Module):
    """A model whose outputs a function makes of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x[:, :3], r"teacher_logits must have the shape \(6, 4\), got \(6, 3\)"),
        (lambda x: (x, x), r"the average must give logits \(n, c\), floating point, got tuple"),
        (lambda x: x[:, 0], r"the average must give logits \(n, c\), floating point, got float64 \(6,\)"),
    ],
)
def test_other_outputs_of_the_average_are_refused(function, told):
    mesa = MESA(Outputs(function), start=0)
    with pytest.raises(InputError, match=told):
        mesa(rows(6), torch.zeros(6, dtype=torch.int64), rows(6), epoch=1)


def test_the_average_takes_what_the_network_takes():
    mesa = MESA(Outputs(lambda x: {"out": x}), start=0)
    labels = torch.zeros(6, dtype=torch.int64)
    expected = F.cross_entropy(rows(6), labels) + 0.8 * trajectory_kl(rows(6), rows(6, seed=1))
    torch.testing.assert_close(mesa(rows(6), labels, {"x": rows(6, seed=1)}, epoch=1), expected)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


META = meta(6, 4), meta(6, dtype=torch.int64)


def test_on_the_meta_device_only_shapes_are_told():
    saf = SAF(samples=6, classes=4, start=1, lookback=1).to("meta")
    assert saf(*META, META[1], epoch=3).is_meta
    mesa = MESA(nn.Linear(4, 4, device="meta"), start=0)
    assert mesa(*META, META[0], epoch=1).is_meta
    mesa.update(nn.Linear(4, 4, device="meta"))


@pytest.mark.bad_input
def test_a_mix_of_meta_and_other_tensors_is_refused():
    saf = SAF(samples=6, classes=4, start=1, lookback=1)
    with pytest.raises(InputError, match="index must be on the meta device if logits is, and only then"):
        saf(*META, torch.arange(6), epoch=3)
    with pytest.raises(InputError, match="memory must be on the meta device if logits is, and only then"):
        saf(*META, META[1], epoch=3)
    with pytest.raises(InputError, match="average must be on the meta device if logits is, and only then"):
        MESA(nn.Linear(4, 4, device="meta"), start=0)(rows(6), torch.zeros(6).long(), rows(6), epoch=1)


def test_of_a_sample_that_is_drawn_twice_one_row_is_remembered():
    memory = OutputMemory(2, 3, lookback=1)
    outputs = torch.eye(3) - 1
    memory.write(torch.tensor([1, 1, 1]), outputs, epoch=0)
    seen, there = memory.read(torch.tensor([1]), epoch=1)
    assert there.all()
    assert any(torch.equal(seen[0], row) for row in outputs)


@pytest.mark.bad_input
def test_an_average_that_is_not_finite_is_refused():
    model = nn.utils.skip_init(nn.Linear, 2, 3)
    x = torch.full((4, 2), torch.nan)
    with pytest.raises(InputError, match="the average's logits must be finite"):
        MESA(model, start=0)(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), x, epoch=1)
