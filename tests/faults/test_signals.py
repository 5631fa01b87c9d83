"""Every way to stop a run leaves one complete checkpoint of one step, and no process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from lmim import checkpoint
from lmim.__main__ import main
from tests.conftest import REPOSITORY, losses, process_environment, run_training, train_command
from tests.faults.processes import processes_of

pytestmark = [pytest.mark.faults, pytest.mark.launch]
# so many steps that no run ends by itself; one in two seconds or so is slow enough to be stopped in
STEPS = ("optim.duration=100000st", "checkpoint.every=0st", "log.every=1st")
BACKENDS = {"deepspeed": "parallel.backend=deepspeed", "torchrun": "parallel.backend=fsdp"}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHERS = ("deepspeed", "torchrun")


def ranks_of(mark: str) -> list[int]:
    """Return the processes that train, as both launchers start them; loader workers are forks of them."""
    trains = [pid for pid, words in processes_of(mark).items() if words[1:4] == ["-u", "-m", "lmim"]]
    return sorted(pid for pid in trains if parent_of(pid) not in trains)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Started:
    """A run under a launcher, two ranks, as it trains."""

    def __init__(self, shards: Path, folder: Path, launcher: str, *settings: str):
        self.folder, self.mark = folder, f"lmim-test-{uuid.uuid4()}"
        command = train_command(shards, folder, *STEPS, BACKENDS[launcher], *settings, ranks=2, launcher=launcher)
        environment = dict(process_environment(), LMIM_TEST_MARK=self.mark)
        self.launcher = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        until = time.monotonic() + 120
        while not (folder / "log.jsonl").is_file() or len((folder / "log.jsonl").read_text().splitlines()) < 5:
            assert self.launcher.poll() is None and time.monotonic() < until, "the run did not start"
            time.sleep(0.1)

    def on_each_host(self) -> int:
        """Return the process between deepspeed's own and the ranks."""
        found = parent_of(ranks_of(self.mark)[0])
        assert "deepspeed.launcher.launch" in processes_of(self.mark)[found] and found != self.launcher.pid
        return found

    def ended(self) -> int:
        """Wait until no process is left and return the launcher's exit code."""
        code = self.launcher.wait(timeout=60)
        until = time.monotonic() + 60
        while processes_of(self.mark):
            assert time.monotonic() < until, f"left over: {processes_of(self.mark)}"
            time.sleep(0.1)
        return code

    def kill(self) -> None:
        for pid in processes_of(self.mark):
            os.kill(pid, signal.SIGKILL)


WAYS = [
    *((launcher, to, number) for launcher in LAUNCHERS for to in ("a rank", "the launcher") for number in SIGNALS),
    *(("deepspeed", "its process on the host", number) for number in SIGNALS),
    *((launcher, "the stop file", None) for launcher in LAUNCHERS),
    *((launcher, "the time limit", None) for launcher in LAUNCHERS),
]
# What a launcher returns where its ranks return 75; a signal that it does not handle ends it, and the ranks see that.
CODES = {
    ("deepspeed", "a rank"): (75, 75, 75),
    ("deepspeed", "the launcher"): (-15, -10, -2),
    ("deepspeed", "its process on the host"): (1, 0, 1),
    ("torchrun", "a rank"): (1, 1, 1),
    ("torchrun", "the launcher"): (1, -10, 1),
}
told: dict[tuple, tuple] = {}


@pytest.mark.parametrize(("launcher", "to", "number"), WAYS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_stop(shards, tmp_path, launcher, to, number):
    limit = ("run.time_limit_minutes=0.2",) if to == "the time limit" else ()
    run = Started(shards, tmp_path / "run", launcher, *limit)
    try:
        if to == "the stop file":
            (run.folder / "stop").touch()
        elif number is not None:
            assert len(ranks_of(run.mark)) == 2
            at = {"a rank": lambda: ranks_of(run.mark)[-1], "the launcher": lambda: run.launcher.pid,
                  "its process on the host": run.on_each_host}  # fmt: skip
            os.kill(at[to](), number)
        code = run.ended()
    finally:
        run.kill()
    asked_otherwise = 75 if launcher == "deepspeed" else 1
    assert code == (CODES[launcher, to][SIGNALS.index(number)] if number else asked_otherwise)
    saved = checkpoint.complete(run.folder)
    assert len(saved) == 1 and checkpoint.damage(saved[0]) is None
    steps = checkpoint.position_of(saved[0]).step
    assert len(losses(run.folder)) == steps, "the log goes as far as the checkpoint"
    assert not (run.folder / "done.json").exists() and not (run.folder / "stop").exists()
    words = [line for line in (run.folder / "train.log").read_text().splitlines() if "stopped by" in line]
    assert len(words) == 1
    told[launcher, to, number] = (steps, code, words[0].partition("stopped by ")[2].partition(" after")[0])


def test_the_table_of_stops(capsys):
    table = Table(title="two ranks, stopped", title_justify="left")
    for heading in ("launcher", "signal to, or", "signal", "checkpoint", "launcher's exit code", "told"):
        table.add_column(heading)
    for (launcher, to, number), (steps, code, words) in told.items():
        table.add_row(launcher, to, number.name if number else "", f"step {steps}", str(code), words)
    with capsys.disabled():
        Console(width=120).print("", table)
    assert len(told) == len(WAYS)


def test_many_stops_and_a_finished_run_repeat_no_step_and_lose_none(shards, tmp_path):
    """A time limit that is over at once lets every start take one step; the last is started once more."""
    settings = ("optim.duration=8st", "parallel.backend=local", "checkpoint.every=0st")
    run_training(shards, tmp_path / "unbroken", *settings)
    command = train_command(shards, tmp_path / "run", *settings, "run.time_limit_minutes=0.0001")[3:]
    for done in range(1, 9):
        assert main(command) == (75 if done < 8 else 0)
        assert len(losses(tmp_path / "run")) == done
        assert (tmp_path / "run" / "done.json").exists() == (done == 8)
    assert main(command) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    ends = [checkpoint.newest(tmp_path / name) for name in ("run", "unbroken")]
    for load in (checkpoint.load_weights, checkpoint.load_optimizer):
        ours, theirs = map(load, ends)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(tensor) for name, tensor in theirs.items())
