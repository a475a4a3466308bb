"""Exact nearest neighbours among a million points: scikit-learn, faiss (where installed), torch, and trimtab's count.

The others give the k nearest, from which a run of like neighbours is read; it is only known if it ends within k.
trimtab counts the run itself. The points lie in two classes; the runs' median length is printed.

    python -m benchmarks.bench_neighbours [--points 1000000] [--dimension 64] [--queries 300] [--threads 1]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from trimtab.calibration import neighbours

NEAREST = (100, 1000)


def clusters(n: int, d: int, gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 2, (n,), generator=generator)
    points = torch.randn(n, d, generator=generator)
    points[:, 0] += gap * kinds
    return points, kinds


def of_scikit_learn(support: np.ndarray, queries: np.ndarray, k: int) -> None:
    NearestNeighbors(n_neighbors=k, algorithm="brute").fit(support).kneighbors(queries)


def of_faiss(support: np.ndarray, queries: np.ndarray, k: int) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(support.shape[1])
    index.add(support)
    index.search(queries, k)


def of_torch(support: np.ndarray, queries: np.ndarray, k: int) -> None:
    s, x = torch.from_numpy(support), torch.from_numpy(queries)
    squares = s.square().sum(1)
    for rows in x.split(max(1, 2**23 // len(s))):
        torch.addmm(squares, rows, s.mT, alpha=-2).topk(k, largest=False)


def timed(run: Callable[[], object]) -> str:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return f"{seconds:7.2f} s   peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.points} x {options.dimension}, {options.queries} queries, {options.threads} thread(s)")
    for gap in (3.0, 9.0):
        points, kinds = clusters(options.points + options.queries, options.dimension, gap)
        x, s = points[: options.queries], points[options.queries :]
        of_x, of_s = kinds[: options.queries], kinds[options.queries :]
        for dtype in (torch.float32, torch.float64):
            done: list[torch.Tensor] = []
            line = timed(lambda: done.extend(neighbours.runs(x.to(dtype), of_x, s.to(dtype), of_s)))  # noqa: B023
            print(f"trimtab, {str(dtype)[6:]}, gap {gap:g}: {line}; median run {int(done[0].median())}", flush=True)
    peers = {"scikit-learn": of_scikit_learn, "torch": of_torch} | ({"faiss": of_faiss} if find_spec("faiss") else {})
    for k in NEAREST:
        for name, search in peers.items():
            print(f"{name}, float32, nearest {k}: {timed(lambda: search(s.numpy(), x.numpy(), k))}", flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
