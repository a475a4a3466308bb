"""Matching detections to ground truth beside pycocotools, and a calibrator's fit, on 100 000 detections.

Both match the same boxes at one overlap and over one range of areas; medians count, and the matches must agree.

    python -m benchmarks.bench_detection [--detections 100000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from trimtab.calibration import DetectionCalibrator
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics import laace, laece, lrp, match_detections

CLASSES = 80


def scene(n: int) -> tuple[GroundTruth, Detections]:
    """As many objects an image as COCO has (7), and 50 detections, most of them near one of the objects."""
    random = np.random.default_rng(0)
    images = n // 50
    m = 7 * images
    image, label = np.sort(random.integers(0, images, m)), random.geometric(0.05, m).clip(1, CLASSES) - 1
    boxes = np.concatenate([random.uniform(0, 500, (m, 2)), random.lognormal(4, 0.7, (m, 2))], 1)
    near = random.integers(0, m, n)
    found = boxes[near] + random.normal(0, 0.2, (n, 4)) * np.tile(boxes[near, 2:], 2)
    found[:, 2:] = found[:, 2:].clip(1)
    tensors = [torch.from_numpy(x) for x in (image, label, boxes, random.uniform(size=m) < 0.02)]
    truth = GroundTruth(*tensors, range(images), range(CLASSES))
    tensors = [torch.from_numpy(x) for x in (image[near], label[near], found, random.beta(1, 3, n))]
    return truth, Detections(*tensors, images, CLASSES)


def seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def pycocotools(truth: GroundTruth, detections: Detections, tau: float) -> Callable[[], list]:
    """The evaluation, ready to run: everything but `COCOeval.evaluate` is done here."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    columns = truth.image.tolist(), truth.label.tolist(), truth.boxes.tolist(), truth.crowd.tolist()
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(truth.images)],
        "categories": [{"id": k} for k in range(truth.classes)],
        "annotations": [
            {"id": j + 1, "image_id": i, "category_id": k, "bbox": b, "iscrowd": int(c), "area": b[2] * b[3]}
            for j, (i, k, b, c) in enumerate(zip(*columns))
        ],
    }
    columns = (
        detections.image.tolist(),
        detections.label.tolist(),
        detections.boxes.tolist(),
        detections.scores.tolist(),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        found = coco.loadRes([{"image_id": i, "category_id": k, "bbox": b, "score": s} for i, k, b, s in zip(*columns)])

    def run() -> list:
        judge = COCOeval(coco, found, "bbox")
        judge.params.iouThrs, judge.params.maxDets = np.array([tau]), [100]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        with contextlib.redirect_stdout(io.StringIO()):
            judge.evaluate()
        return judge.evalImgs

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detections", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    truth, detections = scene(options.detections)
    print(f"{len(detections)} detections, {len(truth)} objects, {truth.images} images, {CLASSES} classes; one thread")
    for tau in (0.0, 0.5):
        ours = seconds(lambda: match_detections(truth, detections, tau=tau), options.rounds)  # noqa: B023
        line = f"matching at tau = {tau}: {ours:6.2f} s"
        if find_spec("pycocotools"):
            run = pycocotools(truth, detections, tau)
            theirs = seconds(run, options.rounds)
            expected = {
                int(row) - 1: int(box) - 1
                for found in filter(None, run())
                for row, box in zip(found["dtIds"], found["dtMatches"][0])
            }
            matches = match_detections(truth, detections, tau=tau)
            same = dict(zip(matches.row.tolist(), matches.truth.tolist())) == expected
            line += f", pycocotools {theirs:6.2f} s, {theirs / ours:.0f} times; {'same' if same else 'OTHER'} matches"
        print(line)
    matches = match_detections(truth, detections)
    print(f"LRP, LaECE_0, LaACE_0 of them: {seconds(lambda: (lrp(matches), laece(matches), laace(matches)), 3):.3f} s")
    for kind in ("isotonic", "platt", "temperature", "linear"):
        calibrator = DetectionCalibrator(kind)
        fit = seconds(lambda: calibrator.fit(truth, detections), options.rounds)  # noqa: B023
        print(f"{kind}: fit {fit:.2f} s, transform {seconds(lambda: calibrator.transform(detections), 3):.3f} s")  # noqa: B023


if __name__ == "__main__":
    main()
