"""A run over two hosts, by launch/deepspeed.sh and torchrun.sh, takes the steps of one process; hosts may die."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESSES, NAMES, WHY_NOT, Hosts
from tests.conftest import REPOSITORY, TINY, free_port, losses, process_environment, run_training

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
STEPS = ["optim.duration=24st", "checkpoint.every=4st", "parallel.timeout_minutes=0.5"]
TIME_LIMIT_S = 30 + 30  # parallel.timeout_minutes, and the end of what was started


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> list[float]:
    """Losses of one process on one host."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_training(shards, folder, "optim.duration=24st", "parallel.backend=local")
    return losses(folder)


def words_of(shards: Path, run_folder: Path, backend: str) -> list[str]:
    return ["configs/quickstart.yaml", *TINY, f"run.folder={run_folder}", f"data.train={shards}/train",
            f"data.eval={shards}/eval", *STEPS, f"parallel.backend={backend}"]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Return what the launch scripts are told: the hosts have no default route, whose interface they would take."""
    return dict(process_environment(), GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", **more)


def start_by_deepspeed(hosts: Hosts, shards: Path, run_folder: Path) -> list[subprocess.Popen]:
    """Start the launcher on the first host: it reaches both by pdsh over ssh."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    settings = environment(HOSTFILE=str(hostfile), PDSH_SSH_ARGS_APPEND=f"-F {hosts.ssh_config}",
                           MASTER_PORT=str(free_port()))  # fmt: skip
    command = ["bash", "launch/deepspeed.sh", *words_of(shards, run_folder, "deepspeed")]
    return [_start(hosts, "host-a", command, settings)]


def start_by_torchrun(hosts: Hosts, shards: Path, run_folder: Path) -> list[subprocess.Popen]:
    """Start torchrun on each host; they meet at the first."""
    command = ["bash", "launch/torchrun.sh", *words_of(shards, run_folder, "fsdp")]
    meeting = dict(NODES="2", GPUS="1", MASTER_ADDR="host-a", MASTER_PORT=str(free_port()))
    return [_start(hosts, name, command, environment(NODE_RANK=str(number), **meeting))
            for number, name in enumerate(NAMES)]  # fmt: skip


def _start(hosts: Hosts, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    output = (hosts.folder / f"{name}.log").open("w")
    return hosts.start(name, command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)


LAUNCHERS = {"deepspeed": start_by_deepspeed, "torchrun": start_by_torchrun}


def ended(hosts: Hosts, processes: list[subprocess.Popen], within_s: float) -> tuple[list[int], str]:
    """Return the exit codes and what was printed, on both hosts."""
    try:
        codes = [process.wait(timeout=within_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, "".join((hosts.folder / f"{name}.log").read_text() for name in NAMES[: len(processes)])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_take_the_steps_of_one_process(hosts, reference, shards, tmp_path, launcher):
    before = [hosts.received_bytes(name) for name in NAMES]
    codes, output = ended(hosts, LAUNCHERS[launcher](hosts, shards, tmp_path / "run"), within_s=200)
    assert set(codes) == {0}, output
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=1e-5)
    for name, bytes_before in zip(NAMES, before, strict=True):
        assert hosts.received_bytes(name) - bytes_before > 24 * 100_000, "no gradients came over the cable"


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_host_dies_and_the_run_goes_on_from_the_last_checkpoint(hosts, reference, shards, tmp_path, launcher, lost):
    run_folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    processes = LAUNCHERS[launcher](hosts, shards, run_folder)
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    training = hosts.processes(NAMES[lost], "-m lmim")
    assert training
    for pid in training:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    codes, output = ended(hosts, processes, TIME_LIMIT_S)
    print(f"{launcher}: all ended {time.monotonic() - began:.1f} s after {NAMES[lost]} had died")
    assert 0 not in codes and not any(hosts.processes(name, "-m lmim") for name in NAMES)
    assert f"rank {lost} on {NAMES[lost]} is lost" in output
    assert "the same command goes on from the last checkpoint" in output
    assert len(losses(run_folder)) < 24

    codes, output = ended(hosts, LAUNCHERS[launcher](hosts, shards, run_folder), within_s=200)
    assert set(codes) == {0}, output
    assert "going on from" in output
    assert losses(run_folder) == pytest.approx(reference, rel=1e-5)
