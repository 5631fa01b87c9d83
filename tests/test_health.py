"""Alarms come where something is wrong, once, and not where nothing is."""

from __future__ import annotations

import math
import random

import pytest

from lmim.health import Health
from lmim.objective import chance_level
from lmim.options import HealthConfig, ObjectiveConfig

CHANCE = chance_level(176, 0.2)


def rows(count: int, **changes) -> list[dict]:
    """Return rows of a run that does well: the loss falls, with noise; `changes` are functions of the step."""
    noise = random.Random(0)
    healthy = dict(
        loss=lambda step: 0.6 + 1.4 * math.exp(-step / 300) + noise.gauss(0, 0.01),
        similarity_targets=lambda step: 0.6,
        similarity_positions=lambda step: 0.3,
    )
    return [dict(step=step, **{key: of(step) for key, of in (healthy | changes).items()}) for step in range(count)]


def alarms(given: list[dict], **options) -> list[tuple[int, str, str]]:
    objective = ObjectiveConfig(temperature=0.2)
    health = Health(HealthConfig(**options), objective, num_masked=176, warmup_steps=100, patience_steps=20)
    return [(row["step"], alarm.option, alarm.words) for row in given for alarm in health.judge(row)]


def test_a_run_that_does_well_has_none():
    assert pytest.approx(2.068, abs=1e-3) == CHANCE
    assert alarms(rows(2000)) == []


def test_a_leap_of_the_loss_is_told_once():
    found = alarms(rows(900, loss=lambda step: 0.8 + 0.01 * (step % 3) + (step in range(500, 505))))
    assert [(step, option) for step, option, _ in found] == [(500, "health.on_spike")]
    assert "1.8200 at step 500" in found[0][2] and "from 0.81" in found[0][2]
    assert alarms(rows(900, loss=lambda step: 0.8 + (step in range(500, 505))), on_spike="off") == []


def test_a_loss_that_is_no_number_is_no_spike_and_spoils_nothing():
    assert alarms(rows(900, loss=lambda step: math.nan if step % 100 == 0 else 0.8)) == []


@pytest.mark.parametrize(("change", "words"), [
    (dict(similarity_targets=lambda step: 0.5 + 0.49 * (step >= 300)), "(similarity_targets 0.990) since step 300"),
    (dict(similarity_positions=lambda step: 0.5 + 0.49 * (step >= 300)), "(similarity_positions 0.990) since step 300"),
    (dict(loss=lambda step: 1.0 if step < 300 else CHANCE), "stays at chance since step 300"),
])  # fmt: skip
def test_collapse_is_told_when_it_lasts(change, words):
    found = alarms(rows(400, **change), on_spike="off")
    assert [(step, option) for step, option, _ in found] == [(319, "health.on_collapse")]
    assert words in found[0][2]
    assert alarms(rows(400, **change), on_spike="off", on_collapse="off") == []


def test_what_passes_by_or_is_there_during_the_warm_up_is_no_collapse():
    assert alarms(rows(99, loss=lambda step: CHANCE), on_spike="off") == []
    assert alarms(rows(400, similarity_targets=lambda step: 0.99 if step % 20 else 0.5)) == []


@pytest.mark.parametrize("change", [
    dict(loss=lambda step: 0.8 + 0.01 * (step % 3) + (step in range(500, 505))),
    dict(similarity_targets=lambda step: 0.5 + 0.49 * (step >= 300)),
])  # fmt: skip
@pytest.mark.parametrize("start", [310, 499, 502])
def test_a_run_that_goes_on_has_the_same_alarms(change, start):
    """The last rows of the log tell what was before."""
    given = rows(900, **change)
    health = Health(HealthConfig(), ObjectiveConfig(temperature=0.2), 176, 100, patience_steps=20)
    for row in given[:start][-health.reach :]:
        health.judge(row)
    found = [(row["step"], alarm.option, alarm.words) for row in given[start:] for alarm in health.judge(row)]
    assert found == [alarm for alarm in alarms(given) if alarm[0] >= start]
