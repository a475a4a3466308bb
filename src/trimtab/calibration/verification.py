"""What `trimtab.calibration.SDM` knows about each of its points."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Estimate(NamedTuple):
    """One of three estimates of what a prediction is worth: at the quantiles themselves, or at an end of their band.

    Attributes:
        probs: (m, c); the predicted class's is lowered by the spread over rounds, so that a row need not sum to one.
        similarity: (m,) the rescaled similarity; zero where the estimate predicts another class.
        admitted: (m,) whether the estimate meets every condition.
    """

    probs: Float[Tensor, "m c"]
    similarity: Float[Tensor, " m"]
    admitted: Bool[Tensor, " m"]


class Verification(NamedTuple):
    """All that `SDM` knows about each of m points.

    Attributes:
        predicted: (m,) the class with the largest score.
        scores: (m, c) the adaptor's scores z.
        q: (m,) how many nearest training points, before the first other one, were predicted rightly and as this one.
        distance: (m,) squared distance to the nearest training point.
        d: (m,) nearness: the least share, over classes, of calibration points that are no nearer.
        sizes: (m, c) effective sample sizes: calibration points of each class with a smaller rescaled similarity.
        lower, centroid, upper: `Estimate` at the lower end of the predicted class's band and the upper of the others',
            without a band, and the other way round.
    """

    predicted: Int[Tensor, " m"]
    scores: Float[Tensor, "m c"]
    q: Int[Tensor, " m"]
    distance: Float[Tensor, " m"]
    d: Float[Tensor, " m"]
    sizes: Int[Tensor, "m c"]
    lower: Estimate
    centroid: Estimate
    upper: Estimate

    @property
    def admitted(self) -> Bool[Tensor, " m"]:
        """Whether the lower estimate is admitted: the prediction can be trusted at level alpha."""
        return self.lower.admitted

    @property
    def probability(self) -> Float[Tensor, " m"]:
        """The lower estimate of the predicted class's probability; to be relied on where `admitted`."""
        return self.lower.probs.gather(1, self.predicted[:, None])[:, 0]
