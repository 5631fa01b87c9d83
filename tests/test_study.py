"""study.py: its commands are valid, its tables say what was measured, and the README's are those of kept records."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest

from lmim.config import flatten, load_config, validate
from tests.conftest import REPOSITORY

RECORDS = REPOSITORY / "tools" / "bench_results"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The tool as a module, writing its records to a folder of the test."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    monkeypatch.setattr(importlib.import_module("bench"), "RESULTS", tmp_path / "results")
    return importlib.import_module("study")


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_every_ablation_changes_one_option_of_the_whole_method(study):
    quickstart = REPOSITORY / study.QUICKSTART
    whole = flatten(load_config(quickstart, study.WHOLE))
    for name, (_, change) in study.ABLATIONS.items():
        config = load_config(quickstart, [*study.WHOLE, *filter(None, [change])])
        validate(config, 1)
        differs = [key for key, value in flatten(config).items() if value != whole[key]]
        assert differs == ([] if name == "whole" else [change.partition("=")[0]])


def test_the_table_of_ablations_has_means_and_deviations(study):
    runs = [dict(leave_one_out=0.5 + i / 100, gallery=0.6, linear=0.7 - i / 100, similarity_targets=0.1 * i,
                 similarity_positions=0.25) for i in range(3)]  # fmt: skip
    lines = list(study.ablations_table(dict(rows={"whole": runs, "joint": runs[:1]})))
    assert [line.count("|") for line in lines] == [7] * 4
    deviation = 100 * statistics.stdev([0.5, 0.51, 0.52])
    assert lines[2] == (f"| the whole method | 51.0 ± {deviation:.1f} | 60.0 ± 0.0 | 69.0 ± 1.0 | 0.10 ± 0.10 | "
                        "0.25 ± 0.00 |")  # fmt: skip
    assert lines[3].startswith("| no moving average: joint targets | 50.0 ± 0.0 |")


@pytest.mark.parametrize("kind", ["evaluations", "ablations"])
def test_tables_in_the_texts_are_those_of_the_newest_records(study, kind):
    newest = sorted(RECORDS.glob(f"{kind}_*.json"))[-1]
    text = (REPOSITORY / ("README.md" if kind == "evaluations" else "lmim/eval/README.md")).read_text()
    assert "\n".join(study.TABLES[kind](json.loads(newest.read_text()))) in text
    assert f"tools/study.py {kind}" in text


def test_a_command_that_fails_is_named_with_its_last_line(study, tmp_path, capsys):
    assert study.main(["evaluations", str(tmp_path / "run"), "model.depht=3"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: lmim train")]
    assert "exit code 2" in line and "model.depht" in line and "model.depth" in line


def test_unknown_rows_are_refused(study, capsys):
    with pytest.raises(SystemExit):
        study.main(["ablations", "--rows", "whole,jiont"])
    assert "jiont is none of whole, joint" in capsys.readouterr().err


TINY = ["model.embed_dim=16", "model.depth=1", "model.projector_dim=16", "model.decoder_dim=16", "optim.duration=4st",
        "optim.warmup=1st", "data.global_batch=8", "parallel.backend=local", "data.workers=0", "eval.knn_every=0st",
        "probe.least_steps=10", "probe.epochs=1", "finetune.duration=3st", "finetune.warmup=1st"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_studies_measure_what_the_commands_say(study, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    settings = [*TINY, f"data.train={shards}/train", f"data.eval={shards}/eval"]
    run = tmp_path / "run"
    assert study.main(["evaluations", str(run), *settings]) == 0
    record = record_of(tmp_path / "results")
    assert [re.match(r"lmim (\w+ ?\w*)", command)[1] for command in record["commands"]] == [
        "train configs", "eval knn", "eval linear", "eval fewshot", "eval finetune", "eval finetune"
    ]  # fmt: skip
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert record["found"]["knn"] == rows[0]["figures"] and record["found"]["linear"] == rows[1]["figures"]
    assert record["found"]["finetune"] == {**rows[3]["figures"], **rows[4]["figures"]}
    table = capsys.readouterr().out
    assert f"{100 * rows[0]['figures']['pixels']['leave_one_out']:.1f}" in table and "| – |" in table

    (tmp_path / "results").rename(tmp_path / "first")
    words = ["ablations", *settings, "--seeds", "2", "--rows", "no_gaps", "--runs", str(tmp_path / "runs")]
    assert study.main(words) == 0
    record = record_of(tmp_path / "results")
    no_gaps = record["rows"]["no_gaps"]
    assert len(no_gaps) == 2 and no_gaps[0]["loss"] != no_gaps[1]["loss"]
    for seed, found in enumerate(no_gaps):
        config = load_config(tmp_path / "runs" / "no_gaps" / f"seed_{seed}")
        assert (config.model.patch_gap, config.run.seed, config.objective.similarity_weight) == (0, seed, 0.1)
        assert 0 < found["linear"] <= 1 and found["commands"][0].startswith("lmim train configs/quickstart.yaml ")
