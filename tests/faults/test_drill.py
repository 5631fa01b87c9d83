"""Whatever befalls a run or its folder: nothing that was saved is lost and every step comes out the same."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from lmim import checkpoint
from lmim.__main__ import main
from tests.conftest import REPOSITORY, losses, process_environment, run_training, train_command

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
KILLS = 50
STEPS = 120
told: list[tuple[str, str, str]] = []


RUN = ("parallel.backend=local", f"optim.duration={STEPS}st", "checkpoint.every=1st")


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """A folder in memory: a run that saves after every step would wait for a disk most of its time."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_training(shards, folder, *RUN, f"checkpoint.every={STEPS}st")
    return folder


def same_end(folder: Path, unbroken: Path) -> None:
    """Assert that a run came to the same losses, weights and moments, to the bit."""
    assert losses(folder) == losses(unbroken)
    ours, theirs = checkpoint.newest(folder), checkpoint.newest(unbroken)
    assert ours.name == theirs.name
    for load in (checkpoint.load_weights, checkpoint.load_optimizer):
        mine, wanted = load(ours), load(theirs)
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in wanted)


def forked(arguments: list[str]) -> int:
    """Start a run in a fork of this process, which has imported everything, and return its process."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(main(arguments))
    return pid


def moment_of_a_kill(number: int, folder: Path, random_s: float) -> None:
    """Wait for the moment of kill `number`: in turn, random after the start, after a new checkpoint, amid a save."""
    if number % 3 == 0:
        time.sleep(random_s)
        return
    before, until = set(checkpoint.complete(folder)), time.monotonic() + 60
    while time.monotonic() < until:
        if number % 3 == 1 and set(checkpoint.complete(folder)) - before:
            time.sleep(random_s / 10)
            return
        if number % 3 == 2 and list((folder / "checkpoints").glob(".step-*.tmp")):
            return
        time.sleep(0.0005)


def test_kill_9_at_random_moments(shards, tmp_path, unbroken):
    """Every step saves, beside training; some kills fall into the start, some between saves and some into one."""
    command = train_command(shards, tmp_path / "run", *RUN)
    moments, amid_save, starts, furthest = random.Random(5), 0, 0, 0
    for number in range(KILLS):
        pid = forked(command[3:])
        moment_of_a_kill(number, tmp_path / "run", moments.uniform(0.2, 2.5))
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        amid_save += bool(list((tmp_path / "run" / "checkpoints").glob(".step-*")))
        starts += 1
        found = checkpoint.complete(tmp_path / "run")
        assert all(checkpoint.damage(path) is None for path in found), "a checkpoint appeared that is not whole"
        reached = checkpoint.position_of(found[-1]).step if found else 0
        assert reached >= furthest, "a kill took away what was saved"
        furthest = reached
        if furthest == STEPS:  # begin anew: the kills go on
            same_end(tmp_path / "run", unbroken)
            (tmp_path / "run").rename(tmp_path / f"run-{starts}")
            furthest = 0
    code = os.waitstatus_to_exitcode(os.waitpid(forked(command[3:]), 0)[1])
    assert code == 0
    same_end(tmp_path / "run", unbroken)
    assert amid_save >= KILLS // 6
    told.append((f"kill -9 at {starts} random moments", f"{amid_save} of them amid a save", "the same run, to the bit"))


@pytest.mark.launch
def test_kill_9_of_two_ranks_under_the_launcher(shards, tmp_path, unbroken):
    run = ("parallel.backend=deepspeed", "parallel.zero_stage=3", f"optim.duration={STEPS}st", "checkpoint.every=1st")
    command, moments = train_command(shards, tmp_path / "run", *run, ranks=2), random.Random(6)
    for _ in range(3):
        process = subprocess.Popen(command, cwd=REPOSITORY, env=process_environment(), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(moments.uniform(10, 16))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)
        assert all(checkpoint.damage(path) is None for path in checkpoint.complete(tmp_path / "run"))
    run_training(shards, tmp_path / "run", *run, ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken), rel=1e-5)
    told.append(("kill -9 of two ranks, 3 times", "under deepspeed, ZeRO-3", "the same losses to 1e-5"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(shards, unbroken, small_disk):
    """Two checkpoints fit and a third beside them does not; later there is room again."""
    folder = small_disk / "run"
    command = train_command(shards, folder, *RUN, f"checkpoint.keep={STEPS}")
    one = sum(path.stat().st_size for path in checkpoint.newest(unbroken).iterdir())
    subprocess.run(["mount", "-o", f"remount,size={int(3.5 * one)}", small_disk], check=True)
    process = subprocess.Popen(command, cwd=REPOSITORY, env=process_environment(), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while "could not be written" not in ((folder / "train.log").read_text() if (folder / "train.log").exists() else ""):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    kept = checkpoint.complete(folder)
    assert kept and all(checkpoint.damage(path) is None for path in kept)
    subprocess.run(["mount", "-o", "remount,size=2g", small_disk], check=True)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    failed = output.count("could not be written (rank 0: ")
    assert failed and all(path.is_dir() for path in kept)
    same_end(folder, unbroken)
    told.append((f"a full disk, for {failed} saves", "told each time; the run goes on", "the same run, to the bit"))


@pytest.mark.parametrize("harm", ["cut short", "with a bit flipped", "with a file missing"])
def test_a_damaged_checkpoint(shards, tmp_path, unbroken, harm):
    """The newest is named and the one before is gone on from."""
    folder = tmp_path / "run"
    half = subprocess.Popen(train_command(shards, folder, *RUN), cwd=REPOSITORY, env=process_environment())
    while not (found := checkpoint.complete(folder)) or int(found[-1].name.removeprefix("step-")) < 30:
        time.sleep(0.01)
    half.kill()
    half.wait()
    newest = checkpoint.newest(folder)
    path = newest / "weights-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {"cut short": lambda: path.write_bytes(content[:-1000]), "with a file missing": path.unlink,
     "with a bit flipped": lambda: path.write_bytes(content)}[harm]()  # fmt: skip
    output = run_training(shards, folder, *RUN)
    assert str(path) in output and "going back to an older checkpoint" in output
    same_end(folder, unbroken)
    told.append((f"the newest checkpoint {harm}", "named; the one before is taken", "the same run, to the bit"))


def test_two_trainers_in_one_folder(shards, tmp_path, unbroken):
    folder = tmp_path / "run"
    command = train_command(shards, folder, *RUN)
    first = subprocess.Popen(command, cwd=REPOSITORY, env=process_environment(), stdout=subprocess.DEVNULL)
    while not (folder / "log.jsonl").exists():
        time.sleep(0.05)
    second = subprocess.run(command, cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True)
    assert second.returncode == 2 and "is in use by a run that is going on" in second.stderr
    assert first.wait() == 0
    same_end(folder, unbroken)
    told.append(("a second trainer in the folder", "refused in one line", "the first run, to the bit"))


def test_a_folder_that_cannot_be_written(shards, small_disk):
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = subprocess.run(train_command(shards, small_disk / "run"), cwd=REPOSITORY, env=process_environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: run.folder") and "Read-only" in done.stderr
    told.append(("a read-only folder", "refused in one line", "nothing to lose"))


def test_another_configuration(shards, tmp_path):
    folder = tmp_path / "run"
    run_training(shards, folder, "parallel.backend=local", "optim.duration=3st")
    before = (folder / "log.jsonl").read_text()
    command = train_command(shards, folder, "parallel.backend=local", "optim.duration=3st", "optim.base_lr=0.5")
    done = subprocess.run(command, cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "optim.base_lr" in done.stderr
    output = run_training(shards, folder, "parallel.backend=local", "optim.duration=3st", "checkpoint.keep=7")
    assert "checkpoint.keep (2 there, 7 now)" in output
    assert (folder / "log.jsonl").read_text() == before
    told.append(("another configuration", "refused if it changes the result, else told", "nothing is lost"))


def test_the_table_of_the_drill(capsys):
    table = Table(title="the fault drill", title_justify="left")
    for heading in ("what happens", "what is done", "what comes of it"):
        table.add_column(heading)
    for row in told:
        table.add_row(*row)
    with capsys.disabled():
        Console(width=120).print("", table)
    assert len(told) >= 8
