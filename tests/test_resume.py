"""A run that is stopped and started again goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lmim import LatentMIM, checkpoint, store
from lmim.__main__ import main
from lmim.export import export
from lmim.formats import read_weights
from lmim.stop import StopRequest
from lmim.vit import sincos_positions
from tests.conftest import REPOSITORY, losses, process_environment, run_training, train_command
from tests.ranks import NotANumber

STEPS = "optim.duration=24st"


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_training(shards, folder, STEPS, "parallel.backend=local")
    return losses(folder)


def interrupt(command: list[str], run_folder: Path, number: int, after_steps: int, group: bool) -> int:
    """Start a run, send a signal once `after_steps` steps are logged, and return its exit code."""
    process = subprocess.Popen(command, cwd=REPOSITORY, env=process_environment(), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        log = run_folder / "log.jsonl"
        deadline = time.monotonic() + 120
        while not log.is_file() or len(log.read_text().splitlines()) < after_steps:
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before the signal"
            time.sleep(0.01)
        (os.killpg if group else os.kill)(process.pid, number)
        return process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


SLOWLY = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGINT, *SLOWLY])
def test_stopped_alone(unbroken, shards, tmp_path, number):
    command = train_command(shards, tmp_path / "run", STEPS, "parallel.backend=local", "data.workers=1")
    assert interrupt(command, tmp_path / "run", number, after_steps=5, group=number == signal.SIGINT) == 75
    steps_done = len(losses(tmp_path / "run"))
    assert 5 <= steps_done < 24
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps_done:08d}").is_dir()
    output = run_training(shards, tmp_path / "run", STEPS, "parallel.backend=local", "data.workers=1")
    assert f"after step {steps_done}\n" in output
    assert losses(tmp_path / "run") == unbroken


@pytest.mark.launch
@pytest.mark.slow
def test_ctrl_c_under_the_launcher(unbroken, shards, tmp_path):
    """Ctrl-C reaches the launcher and both ranks at once, as from a terminal."""
    settings = (STEPS, "parallel.backend=deepspeed")
    command = train_command(shards, tmp_path / "run", *settings, ranks=2)
    interrupt(command, tmp_path / "run", signal.SIGINT, after_steps=5, group=True)
    steps_done = len(losses(tmp_path / "run"))
    assert 5 <= steps_done < 24
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps_done:08d}").is_dir()
    run_training(shards, tmp_path / "run", *settings, ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(unbroken, rel=1e-5)
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert done == {"steps": 24, "ranks": 2, "device": "cpu"}


@pytest.mark.slow
def test_killed_without_warning(unbroken, shards, tmp_path):
    """kill -9 loses the steps since the last checkpoint, and they come out the same when done again.

    Its loader worker lives on for a moment, which must not keep the run folder from the next start.
    """
    settings = (STEPS, "parallel.backend=local", "checkpoint.every=4st", "data.workers=1")
    command = train_command(shards, tmp_path / "run", *settings)
    assert interrupt(command, tmp_path / "run", signal.SIGKILL, after_steps=10, group=False) == -signal.SIGKILL
    run_training(shards, tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == unbroken
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000020", "step-00000024"]  # checkpoint.keep is 2


@pytest.mark.launch
@pytest.mark.slow
def test_goes_on_with_another_backend_and_number_of_ranks(unbroken, shards, tmp_path):
    """From one process to ZeRO-3 on two ranks, and, stopped again, to FSDP2 on as many."""
    zero3 = (STEPS, "parallel.backend=deepspeed", "parallel.zero_stage=3")
    command = train_command(shards, tmp_path / "run", STEPS, "parallel.backend=local")
    assert interrupt(command, tmp_path / "run", signal.SIGINT, after_steps=4, group=True) == 75
    command = train_command(shards, tmp_path / "run", *zero3, ranks=2)
    interrupt(command, tmp_path / "run", signal.SIGINT, after_steps=len(losses(tmp_path / "run")) + 4, group=True)
    assert len(losses(tmp_path / "run")) < 24
    run_training(shards, tmp_path / "run", STEPS, "parallel.backend=fsdp", ranks=2, launcher="torchrun")
    assert losses(tmp_path / "run") == pytest.approx(unbroken, rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(shards, tmp_path):
    settings = ("optim.duration=3st", "parallel.backend=local")
    run_training(shards, tmp_path / "run", *settings)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    run_training(shards, tmp_path / "run", *settings)
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_another_run_is_gone_on_from_or_begun_with(unbroken, shards, tmp_path):
    """`run.resume_from` takes all of a run's state, `run.init_from` its weights; a run's own checkpoint goes first."""
    first, settings = tmp_path / "first", ("parallel.backend=local", "checkpoint.every=4st")

    def start(folder: Path, *changes: str) -> str:
        assert main(train_command(shards, folder, STEPS, *settings, *changes)[3:]) == 0
        return (folder / "train.log").read_text()

    assert main(train_command(shards, first, STEPS, *settings, "run.time_limit_minutes=0.0001")[3:]) == 75
    stopped = checkpoint.newest(first)
    assert f"going on from {stopped}" in start(tmp_path / "on", f"run.resume_from={first}")
    done = checkpoint.position_of(stopped).step
    rows = [json.loads(line) for line in (tmp_path / "on" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(done, 24))
    assert [row["loss"] for row in rows] == unbroken[done:]
    again = start(tmp_path / "on", f"run.resume_from={first}")
    assert f"going on from {checkpoint.newest(tmp_path / 'on')}" in again
    begun = start(tmp_path / "begun", f"run.init_from={stopped}", "optim.duration=1st")
    assert f"beginning with the weights of {stopped}" in begun
    assert losses(tmp_path / "begun")[0] != unbroken[0]
    assert checkpoint.position_of(checkpoint.newest(tmp_path / "begun")).optimizer_steps == 1


def test_a_finished_run_is_not_gone_on_from(shards, tmp_path, capsys):
    """It would be marked as done, with no checkpoint of its own."""
    settings = ("parallel.backend=local", "optim.duration=2st")
    assert main(train_command(shards, tmp_path / "first", *settings)[3:]) == 0
    command = train_command(shards, tmp_path / "run", *settings, f"run.resume_from={tmp_path / 'first'}")[3:]
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "run.resume_from" in line and "has taken 2 steps, and optim.duration (2st) is 2" in line
    assert not (tmp_path / "run" / "done.json").exists()


def test_the_mark_of_a_complete_run_goes_where_the_run_goes_on(shards, tmp_path):
    """Else a launcher would judge by the mark of a run whose last checkpoint is damaged."""
    command = train_command(shards, tmp_path / "run", "parallel.backend=local", "optim.duration=3st",
                            "checkpoint.every=1st")[3:]  # fmt: skip
    assert main(command) == 0
    (checkpoint.newest(tmp_path / "run") / "weights-00000.safetensors").write_bytes(b"")
    (checkpoint.complete(tmp_path / "run")[0] / "weights-00000.safetensors").rename(tmp_path / "away")
    assert main(command) == 2 and (tmp_path / "run" / "done.json").exists()
    (tmp_path / "away").rename(checkpoint.complete(tmp_path / "run")[0] / "weights-00000.safetensors")
    patience = ("run.time_limit_minutes=0.0001", "eval.knn_every=1st")  # stopped before the first step
    assert main([*command, *patience]) == 75 and not (tmp_path / "run" / "done.json").exists()
    assert main(command) == 0 and json.loads((tmp_path / "run" / "done.json").read_text())["steps"] == 3


def test_checkpoints_on_a_disk_that_is_not_mounted_are_not_taken_for_none(shards, tmp_path, capsys):
    """Else the run would begin anew, and its log too."""
    folder, elsewhere = tmp_path / "run", tmp_path / "share"
    command = train_command(shards, folder, "parallel.backend=local", "optim.duration=2st")[3:]
    assert main(command) == 0
    (folder / "checkpoints").rename(elsewhere)
    (folder / "checkpoints").symlink_to(elsewhere)
    log = (folder / "log.jsonl").read_text()
    elsewhere.rename(tmp_path / "away")
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: the checkpoints of {folder} cannot be read") and "mounted" in line
    (tmp_path / "away").rename(elsewhere)
    assert main(command) == 0 and (folder / "log.jsonl").read_text() == log


def test_a_disk_that_is_full_at_the_start_is_one_line(shards, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["lmim.train"], "save_config", full)
    assert main(train_command(shards, tmp_path / "run", "parallel.backend=local", "optim.duration=2st")[3:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: run.folder ({tmp_path / 'run'}) cannot be written: No space left on device"


def no_number(monkeypatch, steps: set[int]) -> None:
    """Make the gradient of some of the following steps NaN; a step has two micro-batches."""
    plain, calls = LatentMIM.forward, []

    def forward(self, *inputs):
        out = plain(self, *inputs)
        if torch.is_grad_enabled():
            calls.append(None)
            if (len(calls) - 1) // 2 in steps:
                return out._replace(loss=NotANumber.apply(out.loss))
        return out

    monkeypatch.setattr(LatentMIM, "forward", forward)


def test_steps_left_out_in_a_row_are_counted_across_starts(shards, tmp_path, monkeypatch, capsys):
    """Else a run that is stopped often enough would never end."""
    command = train_command(shards, tmp_path / "run", "parallel.backend=local", STEPS)[3:]
    one_step = [*command, "run.time_limit_minutes=0.0001"]
    assert main(one_step) == 75
    no_number(monkeypatch, set(range(100)))
    assert [main(one_step), main(one_step), main(command)] == [75, 75, 1]
    assert "not finite in 3 steps in a row, up to step 3 " in capsys.readouterr().err


def test_an_end_with_an_error_keeps_the_checkpoint_in_hand_and_names_it(shards, tmp_path, monkeypatch, capsys):
    plain = store.sync
    monkeypatch.setattr(store, "sync", lambda path: time.sleep(0.3) or plain(path))
    no_number(monkeypatch, {4, 5, 6})
    command = train_command(shards, tmp_path / "run", "parallel.backend=local", STEPS, "checkpoint.every=2st")[3:]
    assert main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    names = [path.name for path in checkpoint.complete(tmp_path / "run")]
    assert names == ["step-00000004", "step-00000006"] and f"from before: {', '.join(names)} in" in line


def test_a_stop_file_stops_no_later_start_whoever_asked_first(tmp_path):
    request = StopRequest(tmp_path / "stop", limit_s=1e-9)
    try:
        (tmp_path / "stop").touch()
        assert request.agreed() and request.reasons().startswith("run.time_limit_minutes")
    finally:
        request.close()
    assert not (tmp_path / "stop").exists()


def test_ctrl_c_is_answered_at_once_and_a_second_one_ends_it(tmp_path, capfd):
    request = StopRequest(tmp_path / "stop")
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == (
            "SIGINT: stopping after this step, with a checkpoint; Ctrl-C again ends it at once\n"
        )
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        request.close()


def test_a_batch_of_more_than_all_images_is_told(shards, tmp_path):
    settings = ("parallel.backend=local", "optim.duration=1st", "data.global_batch=512", "data.micro_batch=256")
    assert main(train_command(shards, tmp_path / "run", *settings)[3:]) == 0
    assert (
        "data.global_batch (512) is more than data.train has images (" in (tmp_path / "run" / "train.log").read_text()
    )


@pytest.mark.parametrize("form", ["pth", "safetensors", "timm", "huggingface"])
def test_a_run_begins_with_weights_of_any_format(shards, tmp_path, form):
    """All of the model, or one encoder that the target copies while projector and decoder are new ones."""
    settings = ("parallel.backend=local", "optim.duration=1st", "optim.base_lr=1e-12")
    assert main(train_command(shards, tmp_path / "first", *settings, "run.seed=7")[3:]) == 0
    source = tmp_path / f"source{'.' + form if form in ('pth', 'safetensors') else ''}"
    export(tmp_path / "first", source, "authors" if form == "pth" else form)
    assert main(train_command(shards, tmp_path / "run", *settings, f"run.init_from={source}")[3:]) == 0
    assert main(train_command(shards, tmp_path / "scratch", *settings)[3:]) == 0
    first, run, scratch = (read_weights(tmp_path / name).tensors for name in ("first", "run", "scratch"))
    told = (tmp_path / "run" / "train.log").read_text()
    assert f"beginning with the weights of {source}" in told
    assert ("it has no decoder and no projectors: new ones" in told) == (form in ("timm", "huggingface"))
    for name, tensor in run.items():
        new = form in ("timm", "huggingface") and (name.startswith("decoder.") or ".projector." in name)
        torch.testing.assert_close(tensor, (scratch if new else first)[name], atol=1e-7, rtol=0, msg=name)
    assert not torch.allclose(first["online.cls_token"], scratch["online.cls_token"], atol=1e-3)


def test_a_run_does_not_begin_with_weights_of_another_size(shards, tmp_path, capsys):
    settings = ("parallel.backend=local", "optim.duration=1st")
    assert main(train_command(shards, tmp_path / "first", *settings, "model.depth=1")[3:]) == 0
    assert main(train_command(shards, tmp_path / "run", *settings, f"run.init_from={tmp_path / 'first'}")[3:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "online.blocks.1.attn.proj.bias is absent there" in line


def test_positions_of_another_grid_are_resized(shards, tmp_path):
    settings = ("parallel.backend=local", "optim.duration=1st", "optim.base_lr=1e-12")
    smaller = ("model.grid_size=5", "objective.num_visible=5")
    assert main(train_command(shards, tmp_path / "first", *settings, *smaller)[3:]) == 0
    assert main(train_command(shards, tmp_path / "run", *settings, f"run.init_from={tmp_path / 'first'}")[3:]) == 0
    first, run = (read_weights(tmp_path / name).tensors for name in ("first", "run"))
    assert torch.equal(run["target.pos_embed"], sincos_positions(32, 5, (7, 7)))
    torch.testing.assert_close(run["decoder.cls_token"], first["decoder.cls_token"], atol=1e-7, rtol=0)
