"""bench.py: every row of `data` on a handful of photos, the record, and what it says to mistakes."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lmim import LatentMIM, load_config, profiling
from lmim.config import ConfigError
from lmim.dist import Topology


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


def test_step_measures_rows_their_parts_and_records_them(bench, tmp_path, capsys, monkeypatch):
    """Two rows and one in the released code's shape, on a tiny model, by a clock that goes on a millisecond a look."""
    module, milliseconds = importlib.import_module("bench_step"), itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(milliseconds) / 1e3))
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(profiling.PEAK_SIDE, "cpu", 128)
    settings = ["parallel.backend=local", "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
                "model.projector_dim=48", "model.decoder_dim=32", "model.decoder_num_heads=2"]  # fmt: skip
    options = (
        "--batch 8 --rounds 5 --steps 4 --vary precision.compute=fp32,bf16 --released --together --profile 3 --json"
    )
    command = ["step", "configs/quickstart.yaml", *settings, *options.split()]
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert bench.main(command) == 0
    (path,) = (tmp_path / "results").glob("step_*.json")
    record = json.loads(path.read_text())
    assert [row["name"] for row in record["rows"]] == ["released code's shape", "compute=fp32", "compute=bf16"]
    for row in record["rows"]:
        looks = {"views and patches": 2, "decoder": 2}  # before target and encoder; before and after the decoder
        assert row["parts_ms"] == dict.fromkeys(module.PARTS, 1) | looks
        assert row["least"] == row["images_per_second"] == row["most"] == 4 * 8 / 1e-3 and row["times_first"] == 1
        share = 1e9 * row["gflop_per_image"] * row["images_per_second"] / (1e12 * record["peak_tflops"])
        assert row["mfu"] == pytest.approx(share, rel=2e-3) and len(row["kernels"]) == 3
    capsys.readouterr()
    assert bench.main(["table"]) == 0
    assert "compute=bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_apart_each_round_of_a_row_has_a_process_of_its_own(bench, tmp_path, monkeypatch):
    """There the released code's shape gives memory back and gets it anew, as by itself, and lmim keeps it."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(Path(__file__).parent.parent)
    command = ["step", "configs/quickstart.yaml", "parallel.backend=local", "model.depth=1", "--released", "--apart",
               "--rounds", "2", "--steps", "6", "--json"]  # fmt: skip
    assert bench.main(command) == 0
    (path,) = (tmp_path / "results").glob("step_*.json")
    theirs, ours = json.loads(path.read_text())["rows"]
    assert (theirs["name"], ours["name"]) == ("released code's shape", "as configured") and theirs["times_first"] == 1
    for row in (theirs, ours):
        assert 0 < row["least"] < row["most"] and row["images_per_second"] == pytest.approx(
            (row["least"] + row["most"]) / 2, abs=0.2)  # fmt: skip
        assert row["parts_ms"]["backward"] > 0
    assert ours["page_faults"] < theirs["page_faults"] / 2


def test_apart_is_of_one_rank(bench):
    module = importlib.import_module("bench_step")
    with pytest.raises(ConfigError, match=r"--apart .* 2 ranks"):
        module.measure_apart([], SimpleNamespace(), Topology(0, 2, 0, 2, torch.device("cpu"), "torchrun"))


def test_attention_measures_every_kernel_and_records_it(bench, tmp_path, capsys, monkeypatch):
    """By a clock that goes on a millisecond a look; a kernel that is not there is told."""
    module, milliseconds = importlib.import_module("bench_attention"), itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(milliseconds) / 1e3))
    monkeypatch.setitem(module.KERNELS, "cuDNN", module.ON_GPUS["cuDNN"])
    command = ["attention", "configs/quickstart.yaml", "parallel.backend=local", "precision.compute=bf16"]
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert bench.main([*command, "--batch", "4", "--steps", "2", "--rounds", "3", "--json"]) == 0
    (path,) = (tmp_path / "results").glob("attention_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["target", "encoder", "decoder, self", "decoder, cross"]
    for row in rows:
        assert row["ms"] == dict.fromkeys(("plain", "fused"), [pytest.approx(0.5)] * 3)
        assert list(row["missing"]) == ["cuDNN"]
    assert "cuDNN" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["model.decoder_attention=cross", "model.decoder_attention=self",
                                     "objective.target=joint"])  # fmt: skip
def test_attention_is_measured_as_the_model_attends(bench, monkeypatch, setting):
    """Shapes and gradients against those of a live forward, FLOPs against torch's own counter."""
    module, vit = importlib.import_module("bench_attention"), importlib.import_module("lmim.vit")
    settings = [setting, "model.depth=2", "model.decoder_num_heads=4", "precision.compute=fp32"]
    config = load_config(Path(__file__).parent.parent / "configs" / "quickstart.yaml", settings)
    model, seen, attend = LatentMIM(config.model, config.objective), set(), vit.attend
    model.init_weights()

    def watched(q, k, v, kernel):
        assert k.shape == v.shape
        if q.ndim == 4:  # else visual cues, which have no heads
            seen.add((*q.shape[:3], *k.shape[2:], q.requires_grad))
        return attend(q, k, v, kernel)

    monkeypatch.setattr(vit, "attend", watched)
    model(torch.zeros(2, 3, 35, 35, dtype=torch.uint8), torch.arange(2), 0.75)
    found = module.places(config, 2)
    assert {(p.batch, p.heads, p.queries, p.keys, p.channels, p.gradient) for p in found} == seen
    for place in found:
        run = module.once(place, "plain", config, Topology(0, 1, 0, 1, torch.device("cpu"), "none"))
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == round(1e9 * place.gflop)


def test_end2end_measures_loader_steps_and_both(bench, tmp_path, capsys, monkeypatch):
    """By a clock that goes on a millisecond a look: once for a round, and around the wait for each micro-batch."""
    for name in ("bench_step", "bench_end2end"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module, milliseconds = importlib.import_module("bench_end2end"), itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(milliseconds) / 1e3))
    settings = ["parallel.backend=local", "model.embed_dim=32", "model.depth=1", "model.num_heads=2", "data.workers=1",
                "model.decoder_dim=32", "model.decoder_num_heads=2", "data.micro_batch=4"]  # fmt: skip
    command = ["end2end", "--steps", "3", "--rounds", "3", "configs/quickstart.yaml", "data.global_batch=8", *settings]
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert bench.main([*command, "--json"]) == 0
    (path,) = (tmp_path / "results").glob("end2end_*.json")
    record = json.loads(path.read_text())
    images, micro_batches = 3 * 8, 3 * 2
    loader, steps, both = (images / 1e-3 / looks for looks in (2 * micro_batches + 1, 1, 2 * micro_batches + 1))
    rates = {row["name"]: row["images_per_second"] for row in record["rows"]}
    assert rates == pytest.approx({"loader alone": loader, "steps alone": steps, "both": both}, abs=0.1)
    assert record["share_of_the_slower"] == 1 and "100.0% of the slower" in capsys.readouterr().out
    assert record["waited_share"] == pytest.approx(micro_batches / (2 * micro_batches + 1), abs=1e-3)
    assert bench.main([*command, "data.train="]) == 2 and "data.train" in capsys.readouterr().err


def test_rows_of_a_step_begin_from_the_same_weights(bench):
    """The warm-up leaves no trace: weights and AdamW's state are as they were."""
    module = importlib.import_module("bench_step")
    settings = ["parallel.backend=local", "model.embed_dim=32", "model.depth=1", "model.num_heads=2", "data.eval=",
                "model.decoder_dim=32", "model.decoder_num_heads=2", "data.global_batch=4"]  # fmt: skip
    config = load_config(Path(__file__).parent.parent / "configs" / "quickstart.yaml", settings)
    alone = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
    for released in (False, True):
        row = module.build("row", config, alone, released)
        wanted = LatentMIM(config.model, config.objective)
        wanted.init_weights(config.run.seed)
        for name, tensor in row.backend.model.state_dict().items():
            assert torch.equal(tensor, wanted.state_dict()[name]), name
        states = row.backend.optimizer.state.values()
        assert all(not tensor.any() for state in states for tensor in state.values())
