"""`tools/list_epoch.py`: what it prints is what the tars hold, once, on any ranks and workers, from any cursor."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import webdataset as wds

from lmim.data.transforms import CROP, FLIP
from lmim.patches import MASK
from lmim.randomness import draw, sample_key
from tests.conftest import REPOSITORY


@pytest.fixture
def list_epoch(monkeypatch, capsys):
    """Run the tool's main and return (exit code, what it printed, its complaints)."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    tool = importlib.import_module("list_epoch")

    def run(*words: object) -> tuple[int, str, str]:
        code = tool.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def rows(list_epoch):
    def run(*words: object) -> list[dict]:
        code, printed, complaints = list_epoch(*words, "--json")
        assert code == 0, complaints
        return [json.loads(line) for line in printed.splitlines()]

    return run


def test_an_epoch_is_every_image_once_on_any_ranks_and_workers(shards, rows):
    paths = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    keys = [sample["__key__"] for sample in wds.WebDataset(paths, shardshuffle=False)]
    first = rows(shards / "train", "--batch", 24, "--epoch", 1)
    assert [keys[row["sample_id"]] for row in first] == [row["key"] for row in first]
    assert sorted(row["key"] for row in first) == sorted(keys)
    for row in first[:5]:
        key = sample_key(0, 1, row["sample_id"])
        assert [row["crop"], row["flip"], row["mask"]] == [draw(key, use, 0) for use in (CROP, FLIP, MASK)]
    assert [row["step"] for row in first] == [(300 + i) // 24 for i in range(300)]
    again = rows(shards / "train", "--batch", 24, "--epoch", 1, "--ranks", 4, "--workers", 2)
    assert [{**row, "rank": 0} for row in again] == first
    assert [row["rank"] for row in again[12:36]] == [i // 6 for i in range(24)]  # step 13 begins at place 12
    rest = rows(shards / "train", "--batch", 24, "--epoch", 1, "--ranks", 3, "--from", 500)
    assert [{**row, "rank": 0} for row in rest] == first[200:]


def test_a_table_for_people_from_the_command_line(shards):
    command = [sys.executable, "tools/list_epoch.py", str(shards / "eval"), "--batch", "20"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split("\t") == ["step", "rank", "sample_id", "key", "crop", "flip", "mask"] and len(lines) == 101


@pytest.mark.parametrize(
    "words, text",
    [
        (["--batch", 10, "--ranks", 3], "--batch (10) must be a multiple of --ranks (3), both above 0"),
        (["--lanes", 0], "data.lanes (0) must be above 0"),
        (
            ["--weights", 1, 2, "--workers", 0],
            "data.weights ([1.0, 2.0]) must be one number for each of the 1 in data.train",
        ),
        (["--epoch", -1], "--epoch (-1) must be 0 or above"),
        (["--tail", "drop"], "--tail (drop) leaves nothing of 100 images, less than --batch (256)"),
        (["--epoch", 2, "--from", 5], "--from (5) is not in epoch 2, which is [200, 300)"),
    ],
)
def test_mistakes_get_one_line(shards, list_epoch, words, text):
    code, _, complaints = list_epoch(shards / "eval", *words)
    assert code == 2 and complaints == f"list_epoch: {text}\n"
