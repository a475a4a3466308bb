"""Proto-Triplet and ICNN: slug 63-susana."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import ICNN, ProtoTriplet, icnn_score, prototype_logits, prototypes, susana

GOLDEN = Path(__file__).parents[1] / "golden" / "63-susana"
some = st.integers(0, 10_000)


def by_sorting_all_pairs(origins, targets, count, leave_out=None):
    """The authors' search: the first of all that are nearest is left out, be it the point itself or its twin."""
    distance = ((origins[:, None] - targets).square().sum(2) + 1e-6).sqrt()
    own = leave_out is not None
    return distance.topk(count + own, largest=False).indices[:, int(own) :]


def twins(x, labels):
    """Whether points of different classes coincide: the authors' score then depends on the order among equals."""
    return bool(((torch.cdist(x, x) == 0) & (labels[:, None] != labels)).any())


def merged(x, gradient):
    """Gradients of points that coincide, added up: which of them is whose neighbour is a matter of order."""
    points, index = x.unique(dim=0, return_inverse=True)
    return torch.zeros_like(points).index_add(0, index, torch.as_tensor(gradient))


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path, monkeypatch):
    with np.load(path) as file:
        arrays = dict(file)
    checked = 0
    for case in sorted({name.split("/")[0] for name in arrays}):
        get = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(f"{case}/")}
        way, shot, asked = (int(get[name]) for name in ("way", "shot", "n_query"))
        support, queries = (torch.from_numpy(get[name]).requires_grad_() for name in ("support", "query"))
        rtol = 1e-9 if support.dtype == torch.float64 else 1e-4
        ys, yq = (torch.arange(way).repeat_interleave(each) for each in (shot, asked))
        everything, labels = torch.cat([support, queries]), torch.cat([ys, yq])
        means, _ = prototypes(support, ys)
        logits = prototype_logits(queries, means)
        triplet = ProtoTriplet()(support, ys, queries, yq)

        def near(actual, expected, name, case=case, rtol=rtol):
            expected = np.asarray(expected)
            atol = rtol * float(np.abs(expected).max())
            np.testing.assert_allclose(actual.detach(), expected, rtol=rtol, atol=atol, err_msg=f"{case} {name}")

        def close(actual, name, get=get, near=near):
            near(actual, get[name], name)

        close(logits, "logits")
        close(triplet, "proto_triplet")
        slopes = torch.autograd.grad(triplet, (queries, support), retain_graph=True)
        close(slopes[0], "proto_triplet_grad_query")
        close(slopes[1], "proto_triplet_grad_support")

        for search in (susana.nearest, by_sorting_all_pairs):
            if search is susana.nearest and twins(everything, labels):
                continue
            with monkeypatch.context() as patch:
                patch.setattr(susana, "nearest", search)
                score = icnn_score(everything, labels, ipc=shot + asked)
                close(score, "score_full")
                leaf = everything.detach().requires_grad_()
                (slope,) = torch.autograd.grad(icnn_score(leaf, labels, ipc=shot + asked), leaf)
                near(merged(leaf.detach(), slope), merged(leaf.detach(), get["grad_score_full"]), "grad_score_full")
                close(icnn_score(queries, yq, support, ys), "score_query_vs_support")
                if "score_support_default" in get:
                    close(icnn_score(support, ys), "score_support_default")
                targets = (means, torch.arange(way)) if get["query_protos"] else (support, ys)
                terms = {
                    "cross": lambda logits=logits, yq=yq: F.cross_entropy(logits, yq),
                    "prototriplet": lambda triplet=triplet: triplet,
                    "fullicnn": lambda score=score: -score.log(),
                    "suppicnn": lambda support=support, ys=ys: ICNN()(support, ys),
                    "queryicnn": lambda queries=queries, yq=yq, targets=targets: ICNN()(queries, yq, *targets),
                }
                names = str(get["losses"]).split(",")
                loss = sum(terms[name]() for name in names) / len(names)
                slopes = torch.autograd.grad(loss, (support, queries), retain_graph=True)
                close(loss, "loss")
                both = np.concatenate([get["grad_support"], get["grad_query"]])
                near(merged(leaf.detach(), torch.cat(slopes)), merged(leaf.detach(), both), "gradients")
            checked += 1
    assert checked


def embedded(seed, n=30, classes=4, d=3, apart=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = apart * torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64), labels


@settings(max_examples=15)
@given(some, st.integers(3, 30), st.integers(1, 5), st.integers(1, 6), st.integers(0, 6))
def test_the_score_is_that_of_the_definition(seed, n, classes, k, extra):
    x, y = embedded(seed, n, classes)
    few, k_ = k + 2 >= n, min(k, n - 2)
    ipc = min(k_ + 1 + extra, n - 1)
    distance = ((x[:, None] - x).square().sum(2) + 1e-6).sqrt().numpy()
    same, ratios, others, shares = [], [], [], []
    for i in range(n):
        order = [j for j in np.argsort(distance[i]) if j != i][:ipc]
        other = [distance[i, j] for j in order if y[j] != y[i]]
        first = order[:k_]
        ratio = distance[i, first] / (min(other) + 1e-7) if other else np.zeros(len(first))
        ratio = ratio / max(1.0, ratio.max())
        same = np.array([bool(y[j] == y[i]) for j in first])
        shares.append(same.mean())
        if same.any():
            ratios.append(ratio[same].sum() / (same.sum() + 1e-7))
        others.append((distance[i, first], ~same))
    together = 1 - sum(ratios) / (len(ratios) + 1e-7)
    farthest = max([d[m].max() for d, m in others if m.any()], default=0.0)
    rows = [d[m].sum() / (farthest + 1e-7) / (m.sum() + 1e-7) for d, m in others if m.any()]
    separate = abs(sum(rows) / (len(rows) + 1e-7) - (0 if rows else 1))
    expected = ((together + separate) / 2 + (1.0 if few else np.mean(shares))) / 2
    score = icnn_score(x, y, k=k, ipc=ipc)
    assert float(score) == pytest.approx(expected, rel=1e-6)
    assert 0 < float(score) <= 1 + 1e-6


@given(some)
@settings(max_examples=10)
def test_the_score_rises_as_classes_move_apart(seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(5).repeat_interleave(10)
    noise, centres = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    scores = [float(icnn_score(noise + apart * centres[y], y, ipc=20)) for apart in (0, 2, 4, 16)]
    assert scores == sorted(scores)
    assert scores[-1] > 0.9


def test_one_class_is_separated_perfectly():
    x, _ = embedded(0)
    x.requires_grad_()
    loss = ICNN()(x, torch.zeros(30, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (x.grad == 0).all()


def test_a_true_neighbour_may_stay():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    targets, ty = torch.tensor([[0.1], [1.1], [-8.0], [9.0]]), torch.tensor([0, 1, 1, 0])
    kept = icnn_score(x, y, targets, ty, k=1, drop_nearest=False)
    dropped = icnn_score(x, y, targets, ty, k=1)
    assert float(kept) > 0.9
    assert float(dropped) < 0.6


@given(some, st.sampled_from([0.0, 0.5, 3.0]), st.floats(0, 3))
@settings(max_examples=30)
def test_the_triplet_loss_is_that_of_the_definition(seed, margin, apart):
    support, ys = embedded(seed, 8, apart=apart)
    queries, yq = embedded(seed + 1, 12, apart=apart)
    names = torch.tensor([70, 3, 11, 5])
    means = torch.stack([support[ys == c].mean(0) for c in range(4)])
    distance = ((queries[:, None] - means).square().sum(2) + 1e-6).sqrt()
    own = distance.gather(1, yq[:, None])[:, 0]
    other = distance.scatter(1, yq[:, None], torch.inf).amin(1)
    loss = ProtoTriplet(margin=margin)(support, names[ys], queries, names[yq])
    torch.testing.assert_close(loss, (own - other + margin).clamp_min(0).mean())
    assert (float(loss) == 0) == bool((own + margin <= other).all())


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.elements = max([self.elements, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("n", [4_000, 8_000])
def test_no_matrix_of_all_pairs_is_made(n):
    x, y = embedded(0, n, classes=n // 2, d=2)
    with Largest() as largest:
        ICNN(k=2)(x.requires_grad_(), y).backward()
        ProtoTriplet()(x, y, x, y).backward()
    assert largest.elements < max(2**20 + n, 20 * n)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    x, y = embedded(0, 8)
    for arguments, settings_, message in [
        ((x[:2], y[:2]), {}, "embeddings must have at least 3 rows, got 2"),
        ((x, y, x[:2], y[:2]), {}, "targets must have at least 3 rows, got 2"),
        ((x, y), {"ipc": 8}, "ipc must be at most 7, got 8"),
        ((x, y), {"k": 0}, "k must be at least 1"),
        ((x, y, x), {}, "targets and target_labels must be given together"),
        ((x, y, x[:, :2], y), {}, "targets must have the 3 columns of embeddings, got 2"),
        ((x, y.double()), {}, "labels must be integer class indices"),
        ((x, -y), {}, "labels must be >= 0, found -1 at row 1"),
        ((x * 1e200, y), {}, "the distances between embeddings must be finite"),
        ((x, y, x.to("meta"), y.to("meta")), {}, "targets must be on the device of embeddings, cpu, got meta"),
    ]:
        with pytest.raises(InputError, match=message):
            icnn_score(*arguments, **settings_)
    for arguments, message in [
        ((x, torch.zeros_like(y), x, torch.zeros_like(y)), "support_labels must have at least two classes, got one"),
        ((x, y, x, y + 1), "query_labels must be among the classes of the support set, found 4 at row 3"),
        ((x, y, x[:, :2], y), "queries must have the 3 columns of support, got 2"),
        ((x, y, x, y[:3]), "query_labels must have 8 entries"),
    ]:
        with pytest.raises(InputError, match=message):
            ProtoTriplet()(*arguments)
    with pytest.raises(InputError, match="margin must lie in"):
        ProtoTriplet(margin=-1.0)
    with pytest.raises(InputError, match="ipc must be at least 1"):
        ICNN(ipc=0)
