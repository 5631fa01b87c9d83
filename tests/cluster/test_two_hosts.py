"""A run over two hosts, by the deepspeed launcher and by torchrun, takes the steps of one process; hosts may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESSES, NAMES, Hosts, why_not
from tests.conftest import REPOSITORY, TINY, free_port, losses, process_environment, run_training

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=why_not())]
STEPS = ["optim.duration=24st", "checkpoint.every=4st", "parallel.timeout_minutes=0.5"]
TIME_LIMIT_S = 30 + 30  # parallel.timeout_minutes, and the end of what was started
PROGRAMS = Path(sys.executable).parent


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


def words_of(shards: Path, run_folder: Path, backend: list[str]) -> list[str]:
    return ["train", "configs/quickstart.yaml", *TINY, f"run.folder={run_folder}", f"data.train={shards}/train",
            f"data.eval={shards}/eval", *STEPS, *backend]  # fmt: skip


def start_by_deepspeed(hosts: Hosts, shards: Path, run_folder: Path) -> list[subprocess.Popen]:
    """Start the launcher on the first host: it reaches both by pdsh over ssh."""
    hostfile, environment = hosts.folder / "hostfile", hosts.folder / "deepspeed_env"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    environment.write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nCUDA_VISIBLE_DEVICES=\n")
    command = [str(PROGRAMS / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr",
               ADDRESSES["host-a"], "--master_port", str(free_port()), "--module", "lmim",
               *words_of(shards, run_folder, ["parallel.backend=deepspeed"])]  # fmt: skip
    settings = dict(process_environment(), PDSH_RCMD_TYPE="ssh", PDSH_SSH_ARGS_APPEND=f"-F {hosts.ssh_config}",
                    DS_ENV_FILE=str(environment), DS_ACCELERATOR="cpu")  # fmt: skip
    return [_start(hosts, "host-a", command, settings)]


def start_by_torchrun(hosts: Hosts, shards: Path, run_folder: Path) -> list[subprocess.Popen]:
    """Start torchrun on each host; they meet at the first."""
    port = free_port()
    settings = dict(process_environment(), GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1")
    command = [str(PROGRAMS / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
               "--rdzv-id", "two", "--rdzv-endpoint", f"host-a:{port}", "-m", "lmim",
               *words_of(shards, run_folder, ["parallel.backend=fsdp"])]  # fmt: skip
    return [_start(hosts, name, command, settings) for name in NAMES]


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
