"""The commands a newcomer meets: quickstart's plan, evaluation and the picture."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmim.__main__ import main
from lmim.config import load_config, save_config
from lmim.data.transforms import eval_view
from lmim.eval.features import Reading, Subject, eval_sizes, read_out
from tests.conftest import REPOSITORY, TINY, process_environment


def test_quickstart_says_what_it_would_do(tmp_path):
    done = subprocess.run(["bash", "launch/quickstart.sh", "--dry-run", "run.folder=somewhere"], cwd=REPOSITORY,
                          env={**process_environment(), "VENV": str(tmp_path / "none")}, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("-m venv", "pip install", "tools/shard_images.py embedded somewhere/shards", "deepspeed --num_gpus 2",
                  "--module lmim train configs/quickstart.yaml", "lmim eval knn", "lmim report somewhere"):  # fmt: skip
        assert words in done.stdout
    assert not (REPOSITORY / "somewhere").exists()


@pytest.fixture(scope="module")
def run_folder(shards, tmp_path_factory):
    """A run of six steps with nearest neighbours after the third and the last."""
    folder = tmp_path_factory.mktemp("front") / "run"
    arguments = [*TINY, "parallel.backend=local", f"run.folder={folder}", f"data.train={shards}/train",
                 f"data.eval={shards}/eval", "optim.duration=6st", "eval.knn_every=3st"]  # fmt: skip
    assert main(["train", str(REPOSITORY / "configs" / "quickstart.yaml"), *arguments]) == 0
    return folder


def test_what_a_run_leaves(run_folder):
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    wanted = {"step", "epoch", "loss", "similarity_predictions", "similarity_visible", "similarity_targets",
              "similarity_positions", "lr",
              "momentum", "similarity_target", "grad_norm", "images_per_second", "data_wait", "memory_gib",
              "skipped_images", "target_deviation", "effective_rank", "images_per_second_per_rank", "mfu",
              "gflop_per_image", "rank_spread", "slowest_rank",
              *(f"{kind}_{part}" for kind in ("grad_norm", "update_norm", "update_ratio")
                for part in ("online", "projector", "decoder"))}  # fmt: skip
    assert set(rows[0]) == wanted
    assert all(row["grad_norm"] > 0 and row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 for row in rows)
    evals = [json.loads(line) for line in (run_folder / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evals] == [-1, 2, 5]
    assert all(0 < row["knn_leave_one_out"] < 1 for row in evals)
    text = (run_folder / "train.log").read_text()
    assert "step 6/6" in text and "done: 6 steps" in text


def test_eval_knn_and_report(run_folder, capsys):
    assert main(["eval", "knn", str(run_folder)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    results = json.loads(lines[-1])
    assert set(results) == {"pixels", "random", "online"}
    assert all(0 < share < 1 for protocols in results.values() for share in protocols.values())
    assert "leave-one-out 1-NN (released)" in lines[0] and "gallery 20-NN (common)" in lines[0]
    last = json.loads((run_folder / "eval.jsonl").read_text().splitlines()[-1])
    assert results["online"]["leave_one_out"] == pytest.approx(last["knn_leave_one_out"], abs=1e-5)
    first = json.loads((run_folder / "eval.jsonl").read_text().splitlines()[0])
    assert results["random"]["leave_one_out"] == pytest.approx(first["knn_leave_one_out"], abs=1e-5)

    assert main(["report", str(run_folder)]) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(summary) == {
        "run_folder",
        "healthy",
        "page",
        "figure",
        "knn_pixels",
        "knn_random",
        "knn_final",
        "images_per_second",
        "ranks",
    }
    assert summary["ranks"] == 1 and summary["knn_final"] == pytest.approx(100 * results["online"]["leave_one_out"])
    with Image.open(summary["figure"]) as figure:
        colours = figure.convert("RGB").getcolors(maxcolors=2**24)
        assert figure.width > 1000 and len(colours) > 500, "an empty picture"
    assert "t-SNE of the patch tokens of image 1" in Path(summary["page"]).read_text()


@pytest.mark.parametrize("trouble", ["gone", "weights cut", "weights gone", "weights not finite"])
def test_report_where_tokens_cannot_be_shown(run_folder, tmp_path, capsys, trouble):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    weights = next((copy / "checkpoints").glob("step-*/weights-00000.safetensors"))
    said = trouble
    if trouble == "gone":
        said = f"They could not be made: data.eval ({tmp_path}/gone)"
        save_config(load_config(copy, [f"data.eval={tmp_path}/gone"]), copy / "config.yaml")
    elif trouble == "weights cut":
        weights.write_bytes(b"cut")
        said = f"They could not be made: {weights.parent}"
    elif trouble == "weights gone":
        weights.unlink()
        said = f"They could not be made: {weights.parent}"
    else:
        from lmim.eval import token_maps

        encoder = token_maps.load_encoder(copy)
        encoder.blocks[0].norm1.weight.data.fill_(float("nan"))
        said = "not finite"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_maps, "load_encoder", lambda path: encoder)
            assert main(["report", str(copy)]) == 0
    if trouble != "weights not finite":
        assert main(["report", str(copy)]) == 0
    text = (copy / "report.html").read_text()
    assert said in text and "<img" not in text


def test_a_run_without_labels_shows_its_training_images(run_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    for name in ("evaluations.jsonl", "eval.jsonl", "knn.json"):
        (copy / name).unlink(missing_ok=True)
    save_config(load_config(copy, ["data.eval="]), copy / "config.yaml")
    assert main(["report", str(copy)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("healthy? ") and said[0].removeprefix("healthy? ") == json.loads(said[-1])["healthy"]
    assert said[1] == f"page: {copy}/report.html"
    text = (copy / "report.html").read_text()
    assert "in images of data.train" in text and "t-SNE of the patch tokens of image 8" in text
    assert f"lmim eval knn {copy} data.eval=SHARDS" in text and "given shards with labels" in text


def test_the_page_s_lines_make_the_features_of_the_evaluations(run_folder, tmp_path, capsys, monkeypatch):
    assert main(["report", str(run_folder)]) == 0
    lines = re.search(r"import lmim\n.*?mean\(1\)", html.unescape((run_folder / "report.html").read_text()), re.S)[0]
    config, pixels = load_config(run_folder), np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    monkeypatch.chdir(tmp_path)
    for name, one in zip(("a.jpg", "b.jpg"), pixels, strict=True):
        Image.fromarray(one).save(name)
    made: dict = {}
    exec(lines, made)
    encoder = made["encoder"]
    seen = np.stack([eval_view(Path(name).read_bytes(), *eval_sizes(config, encoder)) for name in ("a.jpg", "b.jpg")])
    subject, reading = Subject("online", encoder), Reading(layer=len(encoder.blocks) - 1)
    (expected,) = read_out(subject, [reading], torch.from_numpy(seen).permute(0, 3, 1, 2))
    torch.testing.assert_close(made["features"], expected)


def test_report_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "log.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_offline_and_its_run_goes_on(shards, tmp_path):
    from tests.conftest import run_training

    settings = ("parallel.backend=local", "log.wandb=offline")
    run_training(shards, tmp_path / "run", *settings, "optim.duration=2st")
    first = (tmp_path / "run" / "wandb_id.txt").read_text()
    run_training(shards, tmp_path / "run", *settings, "optim.duration=2st")
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == first
    recorded = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(recorded) >= 1 and all(first.strip() in path.name for path in recorded)
    assert any(b"similarity_targets" in path.read_bytes() for path in recorded)


def test_a_copied_run_is_evaluated_where_it_is(run_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "knn.json").unlink(missing_ok=True)
    weights = next((copy / "checkpoints").glob("step-*/weights-00000.safetensors"))
    weights.write_bytes(b"cut")
    assert main(["eval", "knn", str(copy)]) == 2
    assert str(weights) in capsys.readouterr().err


def test_unlabelled_training_images_leave_out_the_gallery(run_folder, shards, tmp_path, capsys):
    """Evaluate on labelled images what was trained on images without labels."""
    from lmim.data.datasets import Source, open_source
    from lmim.data.sharding import write_shards

    images = [image for _, image in zip(range(40), open_source("embedded:train").images, strict=False)]
    plain = tuple(type(i)(i.key, i.suffix, None, i.path, i.load) for i in images)
    write_shards(Source("plain", None, plain), tmp_path / "plain")
    settings = [f"data.train={tmp_path}/plain", f"run.folder={tmp_path}/no-run"]
    assert main(["eval", "knn", str(run_folder), "--checkpoint", str(run_folder), *settings]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert all(protocols["gallery"] is None for protocols in json.loads(lines[-1]).values())
    assert lines[-2].endswith("no labels")


def test_two_runs_cannot_share_a_folder(run_folder, shards, capsys):
    hold = f"""
import pathlib, sys
from lmim.resume import lock_run_folder
lock = lock_run_folder(pathlib.Path({str(run_folder)!r}))
print("held", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    arguments = [*TINY, "parallel.backend=local", f"data.train={shards}/train", f"data.eval={shards}/eval",
                 "optim.duration=6st"]  # fmt: skip
    assert main(["train", str(run_folder), *arguments]) == 2
    assert "is in use by a run that is going on" in capsys.readouterr().err
    other.communicate(timeout=30)
    assert main(["train", str(run_folder), *arguments]) == 0
    assert main(["train", str(run_folder), *arguments]) == 0  # the lock is given back


def test_a_damaged_line_costs_no_other(tmp_path, caplog):
    from lmim.metrics import JsonLines, read_rows

    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 0}\nx\xff\n[1]\n{"step": 1}\n{"step": 2}\n{"st')
    JsonLines(log, 2).close()
    assert [row["step"] for row in read_rows(log)] == [0, 1]


def test_a_disk_that_is_gone_for_a_while_costs_no_row(tmp_path, monkeypatch, caplog):
    """Such as a network share: even to ask for the file's size fails."""
    from lmim.metrics import JsonLines, read_rows

    def gone(*arguments):
        raise OSError(116, "Stale file handle")

    log = JsonLines(tmp_path / "log.jsonl", 0)
    log.write({"step": 0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", gone)
        patch.setattr(os, "ftruncate", gone)
        log.write({"step": 1})
    assert "Stale file handle" in caplog.text
    log.write({"step": 2})
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [0, 1, 2]


def test_a_skipped_image_that_cannot_be_written_down_ends_no_run(tmp_path, caplog):
    from lmim.metrics import UnreadableLog

    (tmp_path / "unreadable").touch()  # no folder, as on a disk where none can be made
    unreadable = UnreadableLog(tmp_path, 0)
    unreadable.write(3, 7, "broken JPEG")
    assert unreadable.images == 1 and "it lacks image 7" in caplog.text


def test_what_takes_the_place_of_a_file_is_on_the_disk_first(tmp_path, monkeypatch):
    """A power cut after the renaming could otherwise leave an empty log or configuration."""
    from lmim.config import save_config
    from lmim.metrics import JsonLines
    from lmim.options import Config

    synced, placed, sync, replace = {}, {}, os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}) or sync(fd))

    def placing(self, target):
        placed[target.name] = synced.get(self.stat().st_ino) == self.stat().st_size > 0
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", placing)
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    JsonLines(tmp_path / "log.jsonl", 1).close()
    save_config(Config(), tmp_path / "config.yaml")
    assert placed == {"log.jsonl": True, "config.yaml": True}
