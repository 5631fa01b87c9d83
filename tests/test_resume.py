"""A run that is stopped and started again goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, losses, process_environment, run_training, train_command

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
    assert f"step {steps_done} of 24" in output
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
