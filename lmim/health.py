"""Alarms: is a run going wrong in a way that its loss alone does not tell?

Owns the rules. The invariant: they read the log's rows and nothing else, so every rank comes to the same alarms at the
same step, and a log of old tells what they would have said.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, NamedTuple

from lmim.objective import chance_level
from lmim.options import HealthConfig, ObjectiveConfig

SPIKE_OVER = 200  # steps that a leap is measured against
SPIKE_SPREADS = 10.0  # times their spread (median distance from the median)
UNEVEN = 0.1  # of a step, by which one rank's own work may exceed the others' median
UNEVEN_FLUSHES = 3  # in a row, in which the same rank does
ALIKE = 0.98  # mean cosine: hardly anything is left to tell tokens apart
NEAR_CHANCE = 0.01  # of the chance level


class Alarm(NamedTuple):
    """What is wrong, and which option says what happens then."""

    option: str
    words: str


class Health:
    """Judges rows in the order of their steps; each kind of alarm is given once, until it was well in between.

    The last `reach` rows of a log tell it what it would know had it been there from the start.
    """

    READS = ("step", "loss", "similarity_targets", "similarity_positions")

    def __init__(self, options: HealthConfig, objective: ObjectiveConfig, num_masked: int, warmup_steps: int,
                 patience_steps: int):  # fmt: skip
        self.options, self.warmup_steps, self.patience_steps = options, warmup_steps, max(patience_steps, 1)
        self.chance = chance_level(num_masked, objective.temperature) if objective.loss == "infonce" else None
        self.reach = max(SPIKE_OVER, self.patience_steps) + 1
        self.losses: deque[float] = deque(maxlen=SPIKE_OVER)
        self.spiking = False
        self.since: dict[str, int] = {}  # the step from which on a sign of collapse was there
        self.told: set[str] = set()

    def judge(self, row: dict[str, Any]) -> list[Alarm]:
        """Return the alarms of a step's row."""
        alarms = []
        if self.options.on_spike != "off":
            alarms += self._spike(row)
        if self.options.on_collapse != "off" and row["step"] >= self.warmup_steps:
            alarms += self._collapse(row)
        return alarms

    def _spike(self, row: dict[str, Any]) -> list[Alarm]:
        loss, before, alarms = row["loss"], list(self.losses), []
        if not math.isfinite(loss):
            return []
        if len(before) == SPIKE_OVER:
            middle = median(before)
            spread = median(abs(value - middle) for value in before)
            limit = middle + SPIKE_SPREADS * max(spread, 1e-3 * abs(middle))
            if loss > limit and not self.spiking:
                words = f"the loss leaps to {loss:.4f} at step {row['step']}, from {middle:.4f} ± {spread:.4f} before"
                alarms = [Alarm("health.on_spike", words)]
            self.spiking = loss > limit
        self.losses.append(loss)
        return alarms

    def _collapse(self, row: dict[str, Any]) -> list[Alarm]:
        signs = {
            f"targets of an image are alike (similarity_targets {row['similarity_targets']:.3f})":
                row["similarity_targets"] > ALIKE,
            f"targets tell their position and not their image (similarity_positions {row['similarity_positions']:.3f})":
                row["similarity_positions"] > ALIKE,
            f"the loss ({row['loss']:.4f}) stays at chance":
                self.chance is not None and abs(row["loss"] - self.chance) < NEAR_CHANCE * self.chance,
        }  # fmt: skip
        alarms = []
        for kind, (words, there) in enumerate(signs.items()):
            key = str(kind)
            if not there:
                self.since.pop(key, None)
                self.told.discard(key)
                continue
            began = self.since.setdefault(key, row["step"])
            if row["step"] - began + 1 >= self.patience_steps and key not in self.told:
                self.told.add(key)
                words = f"{words} since step {began}: collapse"
                alarms.append(Alarm("health.on_collapse", words))
        return alarms


class Stragglers:
    """Names a rank whose own work, data and forward, takes longer than the others' in several flushes in a row.

    It judges once a flush and is told once, until the rank was even with the others in between.
    """

    def __init__(self) -> None:
        self.rank, self.flushes = -1, 0

    def judge(self, row: dict[str, Any]) -> str | None:
        """Return what is wrong, by the newest row of a flush."""
        rank = row["slowest_rank"] if row["rank_spread"] > UNEVEN else -1
        self.flushes = self.flushes + 1 if rank == self.rank >= 0 else int(rank >= 0)
        self.rank = rank
        if self.flushes != UNEVEN_FLUSHES:
            return None
        return (f"rank {rank} holds the others up at step {row['step']}: its own work takes longer than theirs by "
                f"{row['rank_spread']:.0%} of a step")  # fmt: skip
