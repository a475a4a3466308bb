"""The schedule of the radius in certified training: natural training first, then a smooth rise to the full radius."""

from __future__ import annotations

from trimtab.core import checks


class SmoothedEps:
    """The radius of each training step: 0, then a quartic that turns into a line, then the full radius.

    Args:
        eps: the full radius.
        start: the epoch, counted from 1, in which the radius begins to grow; 2 for CIFAR-10, after one of natural
            training, 1 for MNIST.
        length: epochs from there to the full radius; 80 of 160 for CIFAR-10, 20 of 70 in the fast setting.
        batches: steps an epoch.
        middle: the share of the growth at which the line begins, 0.25 as in auto_LiRPA.
        power: of the part before it, 4 as in auto_LiRPA.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> schedule = SmoothedEps(0.1, start=2, length=4, batches=2)
        >>> [round(schedule.step(), 4) for _ in range(12)]
        [0.0, 0.0, 0.0, 0.0005, 0.0077, 0.0231, 0.0385, 0.0538, 0.0692, 0.0846, 0.1, 0.1]

    Reference:
        Shi et al., NeurIPS 2021, https://arxiv.org/abs/2103.17268; the schedule is auto_LiRPA's.
    """

    def __init__(
        self, eps: float, *, start: int = 2, length: int = 80, batches: int, middle: float = 0.25, power: float = 4.0
    ) -> None:
        self.eps = checks.number(eps, "eps", low=0, low_open=True)
        self.power = checks.number(power, "power", low=1)
        batches = checks.integer(batches, "batches", low=1)
        self.first = (checks.integer(start, "start", low=1) - 1) * batches
        self.last = self.first + checks.integer(length, "length", low=1) * batches
        middle = checks.number(middle, "middle", low=0, high=1)
        self.turn = self.first + int((self.last - self.first) * middle)
        self.steps = 0

    def step(self) -> float:
        """The radius of the next step."""
        eps = self.at(self.steps)
        self.steps += 1
        return eps

    def at(self, step: int) -> float:
        """The radius of a step, counted from 0."""
        if step <= self.first:
            return 0.0
        if step >= self.last:
            return self.eps
        before, after = self.turn - self.first, self.last - self.turn
        reached = self.eps * before / (after * self.power + before)  # where the line begins, with the curve's slope
        if step < self.turn:
            return reached * ((step - self.first) / before) ** self.power
        return reached + (self.eps - reached) * (step - self.turn) / after

    def state_dict(self) -> dict[str, int]:
        """How many steps were taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many steps."""
        self.steps = state["steps"]
