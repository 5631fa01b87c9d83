"""The schedules at their fixed points, against their formulas, and against the recorded run."""

import json
import math
from pathlib import Path

import pytest

from lmim.schedules import Schedules, learning_rate, similarity_target, target_momentum

TRAJECTORY = Path(__file__).parent / "data" / "golden" / "trajectory" / "case.json"
DEFAULT = Schedules(
    total_steps=1000,
    warmup_steps=100,
    peak_lr=6e-4,
    floor=0.25,
    momentum=0.99,
    similarity_start=0.75,
    similarity_end=0.25,
)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 1.5e-4), (50, 3.75e-4), (100, 6e-4), (550, 3.75e-4), (1000, 1.5e-4)],
)
def test_learning_rate_at_its_fixed_points(step, lr):
    assert DEFAULT.at(step).lr == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("step", "momentum", "similarity"), [(0, 0.99, 0.75), (500, 0.995, 0.5), (1000, 1.0, 0.25)])
def test_momentum_and_similarity_at_their_fixed_points(step, momentum, similarity):
    assert DEFAULT.at(step).momentum == pytest.approx(momentum, rel=1e-12)
    assert DEFAULT.at(step).similarity_target == pytest.approx(similarity, rel=1e-12)


def test_schedules_follow_the_specs_formulas_at_every_step():
    for step in range(1000):
        t, hyper = step / 1000, DEFAULT.at(step)
        assert hyper.momentum == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi * t)) * (1 - 0.99), rel=1e-12)
        assert hyper.similarity_target == pytest.approx(
            0.5 * (1 + math.cos(math.pi * t)) * (0.75 - 0.25) + 0.25, rel=1e-12
        )
        after = (step - 100) / 900
        expected = 1.5e-4 + 4.5e-4 * (step / 100 if step < 100 else 0.5 * (1 + math.cos(math.pi * after)))
        assert hyper.lr == pytest.approx(expected, rel=1e-12)


def test_without_warmup_the_peak_comes_first():
    assert learning_rate(0, 10, 0, peak=1.0, floor=0.25) == 1.0
    assert learning_rate(10, 10, 0, peak=1.0, floor=0.25) == pytest.approx(0.25)


def test_all_warmup_never_divides_by_zero():
    assert [learning_rate(s, 4, 4, peak=1.0, floor=0.0) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_schedules_are_those_of_the_recorded_run():
    case = json.loads(TRAJECTORY.read_text())
    recorded = case["config"]
    per_epoch, total = recorded["steps_per_epoch"], recorded["epochs"] * recorded["steps_per_epoch"]
    assert len(case["log"]) == total * recorded["accumulation"] == 48
    for row in case["log"]:
        step, peak = row["step"], recorded["lr"]
        lr = learning_rate(step, total, recorded["warmup_epochs"] * per_epoch, peak, recorded["min_lr_fraction"] * peak)
        assert lr == pytest.approx(row["lr"], abs=1e-12)
        assert target_momentum(step, total, recorded["target_momentum"]) == pytest.approx(row["momentum"], abs=1e-12)
        similarity = similarity_target(step, total, recorded["sim_start"], recorded["sim_end"])
        assert similarity == pytest.approx(row["sim_target"], abs=1e-12)
