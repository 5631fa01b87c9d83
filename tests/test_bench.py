"""bench.py: every row of `data` on a handful of photos, the record, and what it says to mistakes."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The tool as a module, writing its records to a folder of the test, where the other libraries are missing."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tools")
    monkeypatch.setitem(sys.modules, "litdata", None)
    monkeypatch.setitem(sys.modules, "streaming", None)
    module = importlib.import_module("bench")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def photos(tmp_path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 60, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        folder = tmp_path / "photos" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


def test_data_measures_every_row_and_records_it(bench, photos, tmp_path, capsys):
    cores = os.sched_getaffinity(0)
    assert bench.main(["data", "--photos", str(photos), "--size", "16", "--batch", "4", "--rounds", "2", "--json"]) == 0
    assert os.sched_getaffinity(0) == cores
    (path,) = (tmp_path / "results").glob("data_*.json")
    record = json.loads(path.read_text())
    assert record["settings"]["images_per_round"] == 40
    assert record["machine"]["versions"]["torch"] and len(record["commit"]) >= 40
    printed = capsys.readouterr().out
    assert str(path) in printed
    for row in record["rows"]:
        if row["name"].startswith(("litdata", "mosaicml")):
            assert "is not installed" in row["missing"] and row["rates"] == [] and row["median"] is None
        elif not row["missing"]:
            assert len(row["rates"]) == 2 and min(row["rates"]) <= row["median"] <= max(row["rates"])
        assert row["name"].split()[0] in printed
    measured = {(row["name"].split(",")[0], row["data"]) for row in record["rows"] if row["rates"]}
    names = ("libjpeg-turbo", "loop", "lmim loader", "webdataset")
    assert measured == {(name, files) for name in names for files in ("photos", "short side 320")}


def test_ratios_compare_within_a_round(bench):
    ours, theirs = (bench.Row(name, "photos", "none", [0], None) for name in ("ours", "theirs"))
    ours.rates, theirs.rates = [100.0, 10.0, 30.0], [50.0, 5.0, 10.0]  # the second round was disturbed
    assert ours.ratio(theirs) == 2 and ours.median == 30


def test_mistakes_end_in_one_line(bench, photos, tmp_path, capsys):
    assert bench.main(["data", "--photos", str(tmp_path / "none")]) == 2
    assert "does not exist" in (said := capsys.readouterr().err) and "make_photos.py" in said
    assert bench.main(["data", "--photos", str(photos), "--batch", "12"]) == 2
    assert "--batch (12)" in (said := capsys.readouterr().err) and said.count("\n") == 1
