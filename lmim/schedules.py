"""Schedules: what a step's learning rate, target momentum and similarity target are.

Owns pure functions of the optimizer step; t = steps done / total steps (paper, section 4.1). Nothing here has a state,
so a resumed run needs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hyper:
    """The scheduled values of one optimizer step."""

    lr: float
    momentum: float
    similarity_target: float


@dataclass(frozen=True)
class Schedules:
    """The three schedules of a run; `at(step)` gives a step's values."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    floor: float  # share of the peak
    momentum: float
    similarity_start: float
    similarity_end: float

    def at(self, step: int) -> Hyper:
        return Hyper(
            lr=learning_rate(step, self.total_steps, self.warmup_steps, self.peak_lr, self.floor * self.peak_lr),
            momentum=target_momentum(step, self.total_steps, self.momentum),
            similarity_target=similarity_target(step, self.total_steps, self.similarity_start, self.similarity_end),
        )


def _falling(t: float) -> float:
    """Return half a cosine from 1 at t = 0 to 0 at t = 1."""
    return 0.5 * (1 + math.cos(math.pi * t))


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    """Linear from the floor to the peak over the warm-up, then half a cosine back to the floor."""
    if step < warmup_steps:
        return floor + (peak - floor) * step / warmup_steps
    t = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * _falling(t)


def target_momentum(step: int, total_steps: int, start: float) -> float:
    """Rise from `start` to 1 along half a cosine."""
    return 1 - _falling(step / total_steps) * (1 - start)


def similarity_target(step: int, total_steps: int, start: float, end: float) -> float:
    """Go from `start` to `end` along half a cosine."""
    return _falling(step / total_steps) * (start - end) + end
