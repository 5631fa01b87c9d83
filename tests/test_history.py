"""What is read of a run folder, how it is judged, and its tables."""

from __future__ import annotations

import json
import logging
import math
import re

import numpy as np
import pytest

from lmim.eval.history import read_columns, read_history, read_text_log
from lmim.eval.results import record
from lmim.eval.tables import evaluations, found_table, in_figures, set_options, words
from lmim.eval.verdict import BAD, GOOD, UNKNOWN, WATCH, judge, skipped_images
from lmim.health import Health
from lmim.objective import chance_level
from lmim.options import Config, HealthConfig, ObjectiveConfig
from tests.run_folders import CHANCE, rows_of, write_run

# --- reading ---------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_and_a_line_being_written_is_not(tmp_path):
    good = rows_of(6, mfu=0.3)
    for row in good[:3]:
        del row["mfu"]
    lines = [json.dumps(row).encode() for row in good]
    lines[1:1] = [b'{"step": 1, "epo', b"x\xff", b"[1]", b"3", b'{"step": 2, "epoch": 0.2}',
                  b'{"step": "two", "epoch": 0.2, "loss": 1}', b"[" * 100_000,
                  b'{"epoch": 0.2, "loss": 1, "step": 1' + b"0" * 400 + b"}"]  # fmt: skip
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([*lines[::-1], lines[-1][:20]]))
    columns, damaged = read_columns(path, ("step", "epoch", "loss"))
    assert damaged == 8
    assert columns["step"].tolist() == list(range(6))  # in order, though written backwards
    assert columns["loss"].tolist() == [row["loss"] for row in good]
    assert np.isnan(columns["mfu"]).tolist() == [True] * 3 + [False] * 3
    assert read_columns(tmp_path / "none", ("step",)) == ({}, 0)


def test_alarms_are_known_by_the_very_words_of_the_run(tmp_path):
    """Every alarm that lmim.health gives is found in a text log that it was written to."""
    from lmim.metrics import UnreadableLog, set_up_logging

    set_up_logging(tmp_path, True)
    health = Health(HealthConfig(), ObjectiveConfig(), 176, 0, 1)
    chance = chance_level(176, 0.2)
    told = []
    for step in range(300):
        loss = 50.0 if step == 250 else 1.0 + 0.01 * (step % 3)
        told += health.judge(dict(step=step, loss=loss, similarity_targets=0.5, similarity_positions=0.5))
    told += health.judge(dict(step=300, loss=chance, similarity_targets=0.99, similarity_positions=0.99))
    assert len(told) >= 4
    logger = logging.getLogger("lmim.train")
    for alarm in told:
        logger.warning("%s", alarm.words)
    logger.warning("step %d is left out: its loss (%g) or gradient (norm %g) is not finite", 3, 1.0, math.nan)
    logger.error("something else")
    UnreadableLog(tmp_path, 0).write(3, 17, "broken")
    found = read_text_log(tmp_path / "train.log")
    spikes = sum(alarm.option == "health.on_spike" for alarm in told)
    assert found.counts == {"spike": spikes, "collapse": len(told) - spikes, "skipped step": 1, "unreadable image": 1,
                            "other": 1}  # fmt: skip
    assert [line.words for line in found.alarms] == [alarm.words for alarm in told]
    assert found.others[0].words == "something else" and re.match(r"\d{4}-\d\d-\d\d ", found.others[0].date)


def test_skipped_images_are_added_up_over_starts(tmp_path):
    counts = [0, 1, 1, 4, 0, 0, 2, 2, 1, 3]  # started again before the fifth and the ninth row
    history = read_history(write_run(tmp_path, rows_of(10, skipped_images=counts)))
    assert skipped_images(history) == 4 + 2 + 3


@pytest.mark.parametrize(("text", "steps"), [("8ep", 80), ("300st", 300)])
def test_how_far_the_run_is(tmp_path, text, steps):
    history = read_history(write_run(tmp_path, rows_of(40), optim__duration=text))
    assert history.total_steps == steps and history.steps == 40


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sign", "state"),
    [
        (dict(), "Loss", GOOD),
        (dict(loss=CHANCE * 1.005), "Loss", BAD),
        (dict(loss=math.nan), "Loss", BAD),
        (dict(similarity_targets=0.985), "Targets within an image", BAD),
        (dict(similarity_targets=0.97), "Targets within an image", GOOD),
        (dict(similarity_positions=0.985), "Targets across images, at the same position", BAD),
        (dict(data_wait=0.3), "Waiting for data", WATCH),
        (dict(skipped_images=2), "Images that could not be read", WATCH),
        (dict(grad_norm=[math.nan] + [1.0] * 39), "Steps left out", WATCH),
        (dict(), "Nearest-neighbour accuracy", UNKNOWN),
    ],
)
def test_each_sign_is_judged(tmp_path, values, sign, state):
    verdict = judge(read_history(write_run(tmp_path, rows_of(40, **values))))
    assert {check.sign: check.state for check in verdict.checks}[sign] == state
    assert verdict.state == (state if state in (BAD, WATCH) else GOOD)
    if state in (BAD, WATCH):
        assert sign[1:] in verdict.words


def test_the_last_steps_count_and_not_the_first(tmp_path):
    loss = [CHANCE] * 960 + [1.0] * 40
    assert judge(read_history(write_run(tmp_path / "a", rows_of(1000, loss=loss)))).state == GOOD
    assert judge(read_history(write_run(tmp_path / "b", rows_of(1000, loss=loss[::-1])))).state == BAD


def test_no_verdict_amid_the_warm_up(tmp_path):
    folder = write_run(tmp_path, rows_of(8, loss=CHANCE))  # of 80, 8 warm up
    verdict = judge(read_history(folder))
    assert verdict.state == UNKNOWN and "warming up" in verdict.words
    (folder / "done.json").write_text('{"steps": 8, "ranks": 2, "device": "cpu"}')
    assert judge(read_history(folder)).state == BAD


@pytest.mark.parametrize(("evals", "state"), [([0.5, 0.6], GOOD), ([0.5, 0.45], WATCH)])
def test_accuracy_is_judged_by_the_encoder_as_initialised(tmp_path, evals, state):
    verdict = judge(read_history(write_run(tmp_path, rows_of(80), evals)))
    assert verdict.checks[3].state == state and "50.0 %" in verdict.checks[3].words
    early = judge(read_history(write_run(tmp_path, rows_of(20), evals)))
    assert early.checks[3].state == (GOOD if state == GOOD else UNKNOWN)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_recorded_figures_become_tables():
    by_kind = found_table({"pixels": {"accuracy": 0.5}, "online": {"accuracy": 0.625, "layer": -1, "rate": 0.01}})
    assert by_kind.heads == ["features", "accuracy", "layer", "rate"]
    assert by_kind.rows == [["pixels", "50.00 %", "–", "–"], ["online", "62.50 %", "-1", "0.01"]]
    shots = found_table({"online": {"5": {"accuracy": 0.5, "interval": 0.01, "n": 3}}})
    assert shots.heads == ["features", "5 accuracy", "5 n"] and shots.rows == [["online", "50.00 ± 1.00 %", "3"]]
    flat = found_table({"images": 8, "miou": {"3": 0.25}, "list": list(range(10)), "none": None, "on": True})
    assert flat.rows == [["images", "8"], ["miou 3", "25.00 %"], ["list", "0, 1, 2, 3, 4, 5, 6, 7, … (10)"],
                         ["none", "–"], ["on", "True"]]  # fmt: skip
    assert found_table([1, 2]).rows == [["value", "1, 2"]]
    assert words("learning_rate", 0.5) == "0.5" and words("knn", 0.5) == "50.00 %"


def test_every_evaluation_is_listed_with_its_command(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", rows_of(20), [0.5, 0.7, 0.6])
    (folder / "knn.json").write_text('{"online": {"leave_one_out": 0.6, "gallery": null}}')
    monkeypatch.setattr("sys.argv", ["lmim", "eval", "linear", "a b"])
    record(folder, "linear", {"online": {"accuracy": 0.5}}, source="x.pth", which="target")
    found = evaluations(read_history(folder))
    assert [row.name for row in found] == ["while training", "knn", "linear"]
    assert found[0].found.rows == [["1-NN leave-one-out", "50.00 %", "70.00 %", "60.00 %"]]
    assert found[1].command == f"lmim eval knn {folder}" and found[1].found.rows == [["online", "60.00 %", "–"]]
    assert found[2].command == "lmim eval linear 'a b'" and found[2].weights == "target of x.pth"
    record(folder, "knn", {"online": {"leave_one_out": 0.6}}, source="x.pth", which="online")
    assert [row.name for row in evaluations(read_history(folder))] == ["while training", "linear", "knn"]


def test_the_log_in_figures_and_the_options_that_were_set(tmp_path):
    history = read_history(write_run(tmp_path, rows_of(40, loss=[float(step) for step in range(40)])))
    table = in_figures(history)
    assert table.rows[0] == ["Loss", "0", "9", "19", "29", "39"]  # at epochs 0.1, 1, 2, 3, 4
    rows = {row[0]: row[1:] for row in set_options(history.config).rows}
    assert rows["model.embed_dim"] == ["128", "(empty)"] and rows["optim.duration"] == ["8ep", "300ep"]
    assert "model.mlp_ratio" not in rows
    assert set_options(Config()).rows == []
