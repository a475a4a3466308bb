"""The measures as their definitions say, slowly, in numpy: what the package's arithmetic is compared with."""

import itertools

import numpy as np
import torch
from hypothesis import strategies as st


def some_logits(n=500, c=5, scale=3.0, dtype=torch.float64, seed=0):
    """Logits of an over-confident classifier, and labels drawn from softmax(logits / 1.7)."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, c, generator=g, dtype=torch.float64)
    labels = (logits / 1.7).softmax(1).multinomial(1, generator=g)[:, 0]
    return logits.to(dtype), labels


def some_probs(*args, **settings):
    logits, labels = some_logits(*args, **settings)
    return logits.softmax(1), labels


@st.composite
def predictions(draw, max_n=40, min_c=2):
    """Small sets of logits with many ties, and labels that may leave classes out."""
    n, c = draw(st.integers(1, max_n)), draw(st.integers(min_c, 5))
    entries = st.integers(-6, 6) if draw(st.booleans()) else st.floats(-20, 20, width=32)
    rows = draw(st.lists(st.lists(entries, min_size=c, max_size=c), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)


def top(probs, labels):
    p, y = np.asarray(probs, dtype=float), np.asarray(labels)
    return p.max(1), p.argmax(1) == y


def gaps(values, hits, edges):
    """(share of the samples, |mean hit - mean value|) of every bin (lower, upper] that holds a sample."""
    out = []
    for lower, upper in itertools.pairwise(edges):
        held = (values > lower) & (values <= upper)
        if held.any():
            out.append((held.mean(), abs(hits[held].mean() - values[held].mean())))
    return out


def equal_width_edges(bins):
    edges = np.array([k / bins for k in range(bins + 1)])
    edges[0], edges[-1] = -1, 2
    return edges


def equal_mass_edges(values, bins):
    n = len(values)
    return np.interp(np.linspace(0, n, bins + 1), np.arange(n), np.sort(values))


def expected_error(values, hits, edges):
    return sum(share * gap for share, gap in gaps(values, hits, edges))


def ece(values, hits, bins):
    return expected_error(values, hits, equal_width_edges(bins))


def ece_equal_mass(values, hits, bins):
    return expected_error(values, hits, equal_mass_edges(values, bins))


def mce(values, hits, bins):
    return max(gap for _, gap in gaps(values, hits, equal_width_edges(bins)))


def classwise(probs, labels, bins, error):
    p, y = np.asarray(probs, dtype=float), np.asarray(labels)
    return np.mean([error(p[:, k], y == k, bins) for k in range(p.shape[1])])


def ksce(values, hits):
    return max(abs((hits - values)[values <= t].sum()) for t in values) / len(values)


def mmce(values, hits, width=0.4):
    gap = hits - values
    kernel = np.exp(-np.abs(values[:, None] - values) / width)
    return np.sqrt(max(gap @ kernel @ gap, 0)) / len(values)


def kdece(values, hits, points=2**14):
    """Zhang et al.'s measure by exact evaluation of the two densities."""
    x = np.linspace(0, 1, points)
    half_width = 3 * values[hits].std() * (2 * len(values)) ** -0.2

    def density(v):
        mirrored = np.concatenate([v, -v[v < 0.5], 2 - v[v >= 0.5]])
        total = np.zeros_like(x)
        for centre in mirrored[(mirrored > -half_width) & (mirrored < 1 + half_width)]:
            near = slice(*np.searchsorted(x, (centre - half_width, centre + half_width)))
            total[near] += (1 - ((x[near] - centre) / half_width) ** 2) ** 3
        return 35 / 32 * total / half_width / len(v)

    f, f_right = density(values), density(values[hits])
    with np.errstate(invalid="ignore"):
        accuracy = np.minimum(np.nan_to_num(hits.mean() * f_right / f), 1)
    return np.trapezoid(np.abs(x - accuracy) * f, x) / np.trapezoid(f, x)


def auc(positives, negatives):
    difference = np.asarray(positives)[:, None] - np.asarray(negatives)
    return ((difference > 0) + (difference == 0) / 2).mean()


def aurc(values, hits, random, orders=400):
    """Mean over random orders of tied samples."""
    areas = []
    for _ in range(orders):
        order = np.lexsort((random.random(len(values)), -values))
        areas.append((np.cumsum(~hits[order]) / np.arange(1, len(values) + 1)).mean())
    return np.mean(areas)
