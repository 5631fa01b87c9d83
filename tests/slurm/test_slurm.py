"""`launch/slurm.sbatch` on a real Slurm: stopped by USR1 a run saves, is queued again, and ends as an unbroken one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY, free_port, losses, process_environment, run_training
from tests.slurm.daemons import WHY_NOT, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
STEPS = 120
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = Slurm(tmp_path_factory.mktemp("slurm"), (free_port(), free_port()))
    yield started
    started.close()


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> list[float]:
    """Losses of one process without Slurm."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_training(shards, folder, f"optim.duration={STEPS}st", "parallel.backend=local")
    return losses(folder)


class Job:
    """A run of two ranks under Slurm."""

    def __init__(self, slurm: Slurm, shards: Path, folder: Path, steps: int, *options: str):
        self.slurm, self.run, self.log = slurm, folder / "run", folder / "job.log"
        path = {"PATH": f"{process_environment()['PATH']}:{slurm.environment['PATH']}", "OMP_NUM_THREADS": "1"}
        words = [*TINY, f"run.folder={self.run}", f"data.train={shards}/train", f"data.eval={shards}/eval",
                 f"optim.duration={steps}st", "parallel.backend=fsdp"]  # fmt: skip
        self.number = slurm.command(
            "sbatch", "--parsable", "--cpus-per-task=1", "--gpus-per-node=2", f"--output={self.log}", *options,
            "launch/slurm.sbatch", "configs/quickstart.yaml", *words, cwd=REPOSITORY, env=slurm.environment | path,
        ).strip()  # fmt: skip

    def told(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def steps(self) -> int:
        log = self.run / "log.jsonl"
        return len(log.read_text().splitlines()) if log.is_file() else 0

    def wait(self, holds: Callable[[], bool], within_s: float) -> float:
        """Wait until something holds, and return for how long."""
        began = time.monotonic()
        while not holds():
            state = self.told()["JobState"]
            waited = time.monotonic() - began
            assert waited < within_s and state not in ENDS - {"COMPLETED"}, f"{state}: {self.log.read_text()}"
            time.sleep(0.3)
        return time.monotonic() - began

    def queued_again(self, times: int) -> bool:
        told = self.told()
        return told["Restarts"] == str(times) and told["JobState"] == "PENDING"

    def start_soon(self) -> None:
        """Start what Slurm would hold back for two minutes, as it does with every job that is queued again.

        In the second in which it was queued it would fail, as its old credential is revoked.
        """
        self.slurm.command("scontrol", "update", f"JobId={self.number}", "StartTime=now+5")


# one task a GPU; one a node, in which torchrun starts two ranks
@pytest.mark.parametrize("tasks", [2, 1])
def test_a_stopped_run_is_queued_again_and_ends(slurm, shards, reference, tmp_path, tasks):
    job = Job(slurm, shards, tmp_path, STEPS, f"--ntasks-per-node={tasks}", "--time=10")
    job.wait(lambda: job.steps() > 5, within_s=240)
    # as Slurm does before the time limit: to all tasks, not to the script
    slurm.command("scancel", "--signal=USR1", job.number)
    job.wait(lambda: job.queued_again(1), within_s=60)
    done = job.steps()
    assert 5 < done < STEPS and not (job.run / "done.json").exists()
    assert f"stopped by SIGUSR1 after step {done}" in (job.run / "train.log").read_text()
    job.start_soon()
    job.wait(lambda: job.told()["JobState"] == "COMPLETED", within_s=240)
    assert job.told()["Restarts"] == "1" and job.told()["ExitCode"] == "0:0"
    assert json.loads((job.run / "done.json").read_text()) is not None
    assert "going on from" in job.log.read_text()
    assert losses(job.run) == pytest.approx(reference, rel=1e-5)


def test_the_time_limit_stops_a_run_that_goes_on_and_scancel_ends_it(slurm, shards, tmp_path):
    job = Job(slurm, shards, tmp_path, 1_000_000, "--ntasks-per-node=2", "--time=3", "--signal=USR1@60")
    job.wait(lambda: job.queued_again(1), within_s=240)
    done = job.steps()
    assert done > 0 and f"stopped by SIGUSR1 after step {done}" in (job.run / "train.log").read_text()
    job.start_soon()
    job.wait(lambda: job.steps() > done, within_s=240)
    losses(job.run)  # each step once, in order
    slurm.command("scancel", job.number)
    deadline = time.monotonic() + 60
    while job.told()["JobState"] != "CANCELLED":
        assert time.monotonic() < deadline and job.told()["JobState"] in ("RUNNING", "COMPLETING"), job.told()
        time.sleep(0.3)
    assert job.told()["Restarts"] == "1"
