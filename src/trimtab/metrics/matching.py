"""Which detection found which object: the matching of the COCO protocol, for all images and classes at once.

In every image and class, detections choose in the order of their scores: each takes the free ground-truth box that it
overlaps most, if by at least `tau`. What took a box is a true positive with its overlap; what took none is a false
positive; what fell into a crowd counts neither way.

pycocotools goes through images, classes, detections and boxes one after another. Here the detections of equal rank, one
from each image and class, choose side by side, so that there are no more steps than the most detections in one image
and class. Choices, ties and rounding are those of pycocotools.

A trap at ``tau = 0``, which the measures of Kuzucu et al. use: an overlap of 0 is "at least 0", so a detection far away
from every object takes any box of its class that is left in the image, and counts as a true positive with overlap 0.
LaECE does not change by this (the target is 0 either way); LRP counts one true positive with the largest localisation
error where there are a miss and a false positive. The authors' code does so, and so does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth

_PAIRS = 1 << 22  # of a detection with a box, held at a time


@dataclass(frozen=True, eq=False)
class Matches:
    """What became of each detection that counts, ordered by class and by falling score.

    Attributes:
        row: (n,) the detection's row in `Detections`.
        image, label, scores: (n,) its image, class and score (float64).
        iou: (n,) overlap with the box that it took, as intersection over union; 0 where it took none.
        hit: (n,) whether it took a box that is no crowd: a true positive.
        ignored: (n,) whether it fell into a crowd.
        truth: (n,) the row of the box in `GroundTruth`; -1 where it took none.
        object_image, object_label: (m,) image and class of every box that is no crowd: what is there to be found.
        images, classes: how many there are.
        tau: the least overlap.
    """

    row: Int[Tensor, " n"]
    image: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]
    iou: Float[Tensor, " n"]
    hit: Bool[Tensor, " n"]
    ignored: Bool[Tensor, " n"]
    truth: Int[Tensor, " n"]
    object_image: Int[Tensor, " m"]
    object_label: Int[Tensor, " m"]
    images: int
    classes: int
    tau: float


def match_detections(
    truth: GroundTruth, detections: Detections, *, tau: float = 0.0, max_detections: int = 100
) -> Matches:
    """Match detections to ground truth as the COCO protocol does.

    Args:
        truth: what is there.
        detections: what was found; of the same images and classes.
        tau: least intersection over union, in [0, 1).
        max_detections: how many detections of an image and class count, the highest scores first; 100 for COCO, 300
            for LVIS.

    Returns:
        What became of each detection that counts.

    Raises:
        InputError: `tau` or `max_detections` is out of range, or images or classes do not agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]])
        >>> truth = GroundTruth(zero[:1], zero[:1], boxes[:1], torch.tensor([False]), (1,), (1,))
        >>> matches = match_detections(truth, Detections(zero, zero, boxes, torch.tensor([0.6, 0.9]), 1, 1), tau=0.5)
        >>> matches.row, matches.hit, matches.iou
        (tensor([1, 0]), tensor([False,  True]), tensor([0., 1.], dtype=torch.float64))

    Reference:
        Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014; pycocotools.
    """
    checks.number(tau, "tau", low=0, high=1, high_open=True)
    checks.integer(max_detections, "max_detections", low=1)
    for what in ("images", "classes"):
        ours, theirs = getattr(detections, what), getattr(truth, what)
        if ours != theirs:
            raise InputError(f"detections must be of the {theirs} {what} of the ground truth, they are of {ours}")
    scores = detections.scores.double()
    group = detections.image * truth.classes + detections.label
    falling = scores.argsort(descending=True, stable=True)
    order = falling[group[falling].argsort(stable=True)]
    rank = _place_in_run(group[order])
    order, rank = order[rank < max_detections], rank[rank < max_detections]

    group_of_box = truth.image * truth.classes + truth.label
    boxes = (2 * group_of_box + truth.crowd).argsort(stable=True)
    taken, iou = _choose(
        group[order],
        rank,
        detections.boxes[order].double(),
        group_of_box[boxes],
        truth.boxes[boxes].double(),
        truth.crowd[boxes],
        min(tau, 1 - 1e-10),
    )
    # each class by falling score; detections that tie stay in the order of the images
    by_score = scores[order].argsort(descending=True, stable=True)
    by_class = by_score[detections.label[order][by_score].argsort(stable=True)]
    row, taken, iou = order[by_class], taken[by_class], iou[by_class]
    found = taken >= 0
    box = torch.where(found, boxes[taken] if len(boxes) else taken, -1)
    ignored = found & truth.crowd[box] if len(boxes) else found
    regular = ~truth.crowd
    return Matches(
        row=row,
        image=detections.image[row],
        label=detections.label[row],
        scores=scores[row],
        iou=iou.masked_fill(ignored, 0),
        hit=found & ~ignored,
        ignored=ignored,
        truth=box,
        object_image=truth.image[regular],
        object_label=truth.label[regular],
        images=truth.images,
        classes=truth.classes,
        tau=tau,
    )


def image_sums(
    image: Tensor,
    cell: Tensor,
    values: Float[Tensor, "n k"],
    images: int,
    cells: int,
    counts: Num[Tensor, "r images"] | None,
) -> Float[Tensor, "k *r cells"]:
    """Each column of `values` added up cell by cell; with `counts`, each image so often as it counts.

    Measures are functions of such sums, so that a bootstrap over images is a product of two matrices.
    """
    if counts is None:
        return values.new_zeros(cells, values.shape[1]).index_add_(0, cell, values).mT
    columns = values.unbind(1)
    at = torch.stack([cell, image])
    weights = counts.to(values).mT
    tables = (torch.sparse_coo_tensor(at, column, (cells, images), check_invariants=False) for column in columns)
    return torch.stack([torch.sparse.mm(table, weights).mT for table in tables])


def _place_in_run(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many equal values precede each entry of a sorted vector."""
    return torch.arange(len(x), device=x.device) - torch.searchsorted(x, x)


def _choose(
    group: Int[Tensor, " n"],
    rank: Int[Tensor, " n"],
    boxes: Float[Tensor, "n 4"],
    truth_group: Int[Tensor, " m"],
    truth_boxes: Float[Tensor, "m 4"],
    crowd: Bool[Tensor, " m"],
    least: float,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Which ground-truth box each detection takes (-1: none), and its overlap; both sides sorted by group."""
    device = group.device
    taken = torch.full((len(group),), -1, device=device)
    overlap = torch.zeros(len(group), dtype=torch.float64, device=device)
    free = torch.ones(len(crowd), dtype=torch.bool, device=device)
    first = torch.searchsorted(truth_group, group)
    count = torch.searchsorted(truth_group, group, right=True) - first
    before = count.cumsum(0) - count
    # whole groups go together: a group's block is that of its first detection
    block = (before // _PAIRS)[torch.searchsorted(group, group)]
    step = block * (int(rank.max()) + 1 if len(rank) else 1) + rank
    by_step = step.argsort(stable=True)
    by_step = by_step[count[by_step] > 0]
    for members in torch.split(by_step, torch.unique_consecutive(block[by_step], return_counts=True)[1].tolist()):
        own = torch.repeat_interleave(torch.arange(len(members), device=device), count[members])
        box = torch.arange(len(own), device=device) + torch.repeat_interleave(
            first[members] - (count[members].cumsum(0) - count[members]), count[members]
        )
        iou = _iou(boxes[members[own]], truth_boxes[box], crowd[box])
        near = iou >= least
        own, box, iou = own[near], box[near], iou[near]
        sizes = torch.unique_consecutive(rank[members], return_counts=True)[1].cumsum(0)
        ends = torch.searchsorted(own, sizes).tolist()
        start = pair = 0
        for stop, end in zip(sizes.tolist(), ends):
            if end > pair:
                place = slice(pair, end)
                pick, value = _best(own[place] - start, box[place], iou[place], free, crowd, stop - start)
                found = pick >= 0
                at = members[start:stop][found]
                taken[at], overlap[at] = pick[found], value[found]
                free[pick[found]] = False
            start, pair = stop, end
    return taken, overlap


def _best(
    own: Tensor, box: Tensor, iou: Tensor, free: Tensor, crowd: Tensor, n: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """For each of n detections the best box that it may take: objects before crowds, and the last of equals."""
    in_crowd = crowd[box]
    open_ = free[box] | in_crowd

    def largest(among: Tensor) -> Tensor:
        return iou.new_full((n,), -1).scatter_reduce_(0, own, iou.masked_fill(~among, -1), "amax")

    best = largest(open_ & ~in_crowd)
    lost = best < 0
    best = torch.where(lost, largest(open_ & in_crowd), best)
    winner = open_ & (in_crowd == lost[own]) & (iou == best[own])
    return box.new_full((n,), -1).scatter_reduce_(0, own, box.masked_fill(~winner, -1), "amax"), best


def _iou(a: Float[Tensor, "p 4"], b: Float[Tensor, "p 4"], crowd: Bool[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Intersection over union of pairs of boxes; of a crowd, intersection over the detection's own area."""
    sides = (torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    common, area = sides.prod(1), a[:, 2:].prod(1)
    union = torch.where(crowd, area, area + b[:, 2:].prod(1) - common)
    return torch.where(common > 0, common / union.clamp(min=torch.finfo(union.dtype).tiny), 0)
