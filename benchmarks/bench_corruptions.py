"""Images a second for every corruption, beside imagecorruptions and corrupt-tta where they are installed.

All corrupt the same random images on one thread, trimtab in batches, the peers image by image; a peer that cannot run a
corruption with the installed numpy and scipy is shown as failing, with its error.

    pip install --no-deps imagecorruptions corrupt-tta && pip install opencv-python-headless scikit-image
    python benchmarks/bench_corruptions.py [--size 32] [--images 200] [--severity 3] [--seconds 0.5]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable

import torch

from trimtab.data.corruptions import CORRUPTIONS, corrupt

PEERS = ("imagecorruptions", "corrupt_tta")


def rate(run: Callable[[], object], images: int, seconds: float) -> float:
    """Images a second, the best of at least two runs that together take `seconds`."""
    best, spent, runs = 0.0, 0.0, 0
    while runs < 2 or spent < seconds:
        start = time.process_time()
        run()
        took = time.process_time() - start
        best, spent, runs = max(best, images / took), spent + took, runs + 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=200, help="images a batch; peers corrupt a few of them")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.images, 3, args.size, args.size, generator=generator)
    peers = {}
    for name in PEERS:
        try:
            peers[name] = importlib.import_module(name).corrupt
        except ImportError as error:
            print(f"{name}: not measured ({error})")
    few = [(image * 255).byte().permute(1, 2, 0).numpy() for image in images[:4]]

    print(f"{args.images} images of {args.size} x {args.size}, severity {args.severity}; images a second of one core")
    print(f"{'':20s}{'trimtab':>12s}" + "".join(f"{name:>24s}{'ratio':>8s}" for name in peers))
    for name in CORRUPTIONS:
        own = rate(lambda name=name: corrupt(images, name, args.severity, generator), args.images, args.seconds)
        line = f"{name:20s}{own:12,.0f}"
        for peer in peers.values():
            try:
                theirs = rate(
                    lambda peer=peer, name=name: [peer(image, args.severity, name) for image in few],
                    len(few),
                    args.seconds,
                )
                line += f"{theirs:24,.0f}{own / theirs:8.1f}"
            except Exception as error:
                line += f"{'fails: ' + type(error).__name__:>24s}{'':8s}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
