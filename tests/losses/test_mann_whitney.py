"""The Mann-Whitney loss against a double loop over its definition: golden vectors of 10-mw-loss, and properties."""

import math
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.core.checks import InputError
from trimtab.losses import InfoNCE, MannWhitney, dual_encoder_scores
from trimtab.metrics import pooled_retrieval_auc, roc_auc

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "10-mw-loss").glob("*.npz"))
CASES = [(path, name.split("/")[0]) for path in GOLDEN for name in np.load(path) if name.endswith("/tau")]

ROOM = unwrap(MannWhitney._loss).__globals__  # a doctest run may have imported the module anew


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-9, atol=1e-14)


@pytest.mark.golden
@pytest.mark.parametrize(("path", "case"), CASES, ids=[f"{path.stem}/{case}" for path, case in CASES])
def test_the_double_loop_s_numbers(path, case):
    with np.load(path) as arrays:
        golden = {name.split("/")[1]: arrays[name] for name in arrays if name.startswith(f"{case}/")}
    q, p, hard = (torch.from_numpy(golden[name]) for name in ("q", "p", "hard"))
    q.requires_grad_(True)
    tau = float(golden["tau"])
    scores = dual_encoder_scores(q, p, hard, normalize=False)
    paper = MannWhitney(temperature=tau, reduction="paper")(scores)
    paper.backward()
    scores = scores.detach()
    found = {
        "mw_eq3": paper.detach(),
        "mw_mean": MannWhitney(temperature=tau)(scores),
        "contrastive": InfoNCE(temperature=tau)(scores),
        "grad_q_eq3": q.grad,
        "n_neg": paper.detach() / MannWhitney(temperature=tau)(scores),
        "auc": pooled_retrieval_auc(scores, torch.eye(*scores.shape, dtype=torch.bool), top_k=None),
    }
    checked = golden.keys() & found
    assert checked
    for name in checked:
        close(found[name], golden[name])
    close(dual_encoder_scores(q, p, hard).detach(), scores)  # the golden embeddings have length one


def drawn(seed, q, d, scale=2.0):
    return scale * torch.randn(q, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(positives, negatives, temperature):
    return -F.logsigmoid((positives[:, None] - negatives) / temperature)


SIZES = st.integers(1, 6)


@settings(max_examples=40)
@given(st.integers(0, 999), SIZES, SIZES, st.sampled_from([0.05, 1.0, 20.0]), st.booleans())
def test_any_relevance_is_all_pairs(seed, q, d, temperature, with_dropped):
    scores = drawn(seed, q, d).requires_grad_(True)
    random = torch.rand(3, q, d, generator=torch.Generator().manual_seed(seed))
    right, dropped = random[0] < 0.4, (random[1] < 0.3) if with_dropped else None
    wrong = ~right if dropped is None else ~(right | dropped)
    if not right.any() or not wrong.any():
        return
    pairs = naive(scores[right], scores[wrong], temperature)
    for reduction, expected in (("pairs", pairs.mean()), ("paper", pairs.sum(1).mean()), ("none", pairs.mean(1))):
        loss = MannWhitney(temperature=temperature, reduction=reduction)
        found = loss(scores, right, dropped=dropped)
        close(found.detach(), expected.detach())
        close(loss.from_scores(scores[right], scores[wrong]).detach(), expected.detach())
        slope = torch.rand(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        close(*(torch.autograd.grad(x, scores, slope, retain_graph=True)[0] for x in (found, expected)))


@settings(max_examples=40)
@given(st.integers(0, 999), SIZES, st.integers(2, 6), st.booleans())
def test_columns_say_the_same_as_a_mask(seed, q, d, with_dropped):
    scores = drawn(seed, q, d)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(d, (q,), generator=generator)
    mask = F.one_hot(columns, d).bool()
    dropped = mask | (torch.rand(q, d, generator=generator) < 0.2) if with_dropped else None
    if with_dropped and bool(dropped.all()):
        return
    for loss in (MannWhitney(temperature=0.5, reduction="none"), InfoNCE(temperature=0.5, reduction="none")):
        close(loss(scores, columns, dropped=dropped), loss(scores, mask, dropped=dropped))
    if d >= q:
        close(MannWhitney()(scores), MannWhitney()(scores, torch.arange(q)))


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_it_bounds_the_share_of_wrong_orders(seed, temperature):
    positives, negatives = drawn(seed, 2, 12) + torch.tensor([[0.5], [0.0]], dtype=torch.float64)
    kinds = torch.arange(24) < 12
    wrong = 1 - roc_auc(torch.cat([positives, negatives]), kinds)
    assert wrong <= float(MannWhitney(temperature=temperature).from_scores(positives, negatives)) / math.log(2) + 1e-12


def test_offsets_of_queries_pass_infonce_by_and_cost_here():
    scores = torch.eye(6, dtype=torch.float64)
    offset = 5 * drawn(0, 6, 1)
    close(InfoNCE(temperature=0.1)(scores + offset), InfoNCE(temperature=0.1)(scores))
    assert MannWhitney(temperature=0.1)(scores + offset) > 10 * MannWhitney(temperature=0.1)(scores)


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_blocks_make_no_difference(monkeypatch, block):
    monkeypatch.setitem(ROOM, "_CACHED", block)
    positives, negatives = drawn(0, 1, 5)[0].requires_grad_(True), drawn(1, 1, 11)[0].requires_grad_(True)
    expected = naive(positives, negatives, 0.3).mean()
    found = MannWhitney(temperature=0.3).from_scores(positives, negatives)
    close(found.detach(), expected.detach())
    for ours, theirs in zip(*(torch.autograd.grad(x, (positives, negatives)) for x in (found, expected))):
        close(ours, theirs)


def test_memory_is_linear_in_the_scores(monkeypatch):
    monkeypatch.setitem(ROOM, "_CACHED", 1000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    positives, negatives = torch.zeros(50, requires_grad=True), torch.zeros(900, requires_grad=True)
    with Watch():
        MannWhitney().from_scores(positives, negatives).backward()
    assert largest <= 1000


def test_saturated_pairs_are_exact():
    far = MannWhitney(temperature=1).from_scores(torch.tensor([0.0]), torch.tensor([50.0]))
    near = MannWhitney(temperature=1).from_scores(torch.tensor([50.0]), torch.tensor([0.0]))
    assert float(far) == 50
    assert float(near) == pytest.approx(math.exp(-50), rel=1e-5)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    scores, mask = torch.zeros(2, 3), torch.eye(2, 3).bool()
    for loss in (MannWhitney(), InfoNCE()):
        for arguments, message in (
            (((torch.zeros(1, 1)),), "similarity must hold a negative pair, each row has its positive one alone"),
            ((torch.zeros(3, 2),), "similarity must have a column for each of its 3 rows, or positive be given, got 2"),
            ((scores, torch.tensor([0, 3])), r"positive must lie in 0..2, found 3 at row 1"),
            ((scores, ~mask & mask), "positive must hold a positive pair, none is"),
            ((scores, mask | ~mask), "similarity must hold a negative pair, all are positive or dropped"),
            ((scores, mask.int()), r"positive must be boolean of shape \(2, 3\), got int32"),
            ((scores, mask[:, :2]), r"positive must be boolean of shape \(2, 3\), got bool \(2, 2\)"),
            ((torch.full((2, 3), torch.nan),), "similarity must be finite, found nan at row 0"),
            ((scores[0],), "similarity must have shape"),
            ((scores, mask.to("meta")), "positive must be on the device of similarity"),
        ):
            with pytest.raises(InputError, match=message):
                loss(*arguments)
        with pytest.raises(InputError, match="similarity must hold a negative pair, all are positive or dropped"):
            loss(scores, dropped=~mask)
        with pytest.raises(InputError, match="dropped must be boolean of shape"):
            loss(scores, dropped=mask.float())
    for positives, negatives, message in (
        (scores[0], scores, "negatives must be floating point of shape"),
        (scores[0, :0], scores[0], r"positives must be floating point of shape \(n,\), n >= 1"),
        (scores[0], scores[0].long(), "negatives must be floating point"),
        (torch.tensor([0.0, torch.inf]), scores[0], "positives must be finite, found inf at row 1"),
        (scores[0].to("meta"), scores[0], "negatives must be on the device of positives"),
    ):
        with pytest.raises(InputError, match=message):
            MannWhitney().from_scores(positives, negatives)
    for given_settings, message in (
        ({"temperature": 0.0}, r"temperature must lie in \(0, inf\)"),
        ({"reduction": "max"}, "reduction must be one of"),
    ):
        for kind in (MannWhitney, InfoNCE):
            with pytest.raises(InputError, match=message):
                kind(**given_settings)
