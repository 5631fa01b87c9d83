"""Ranks find themselves and each other under every launcher, from what it sets and from nothing else."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lmim import dist
from lmim.config import ConfigError
from tests.conftest import REPOSITORY, process_environment

SLURM = dict(SLURM_PROCID="3", SLURM_NTASKS="8", SLURM_LOCALID="1", SLURM_NNODES="4", SLURM_STEP_ID="0")


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets the environment's variables, with none of a launcher's left."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "CROSS_SIZE", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (0, 1, 0, 1, "none")),
        (dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"), (3, 8, 1, 2, "torchrun or deepspeed")),
        (dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", CROSS_SIZE="2"), (3, 8, 1, 4, "torchrun or deepspeed")),
        (SLURM, (3, 8, 1, 2, "slurm")),
        (dict(SLURM, SLURM_NTASKS_PER_NODE="4"), (3, 8, 1, 4, "slurm")),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, (0, 1, 0, 1, "none")),  # a shell in an allocation
        (dict(SLURM, SLURM_NTASKS="1", SLURM_PROCID="0"), (0, 1, 0, 1, "none")),
        (dict(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="1",
              OMPI_COMM_WORLD_LOCAL_SIZE="2"), (3, 8, 1, 2, "openmpi")),
        (dict(SLURM, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"),
         (0, 2, 0, 2, "torchrun or deepspeed")),  # torchrun started by srun
    ],
)  # fmt: skip
def test_rank_and_size_come_from_the_launcher(environment, variables, found):
    environment(**variables)
    here = dist.discover()
    assert (here.rank, here.world_size, here.local_rank, here.local_world_size, here.launcher) == found


@pytest.mark.parametrize(
    ("launcher", "local_rank", "seen", "index"),
    [("slurm", 1, 4, 1), ("slurm", 3, 1, 0), ("openmpi", 3, 1, 0), ("torchrun or deepspeed", 3, 4, 3)],
)  # one GPU is all that a task started by `srun --gpus-per-task=1` sees
def test_every_rank_has_a_gpu(monkeypatch, launcher, local_rank, seen, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert dist._device(local_rank, launcher) == torch.device("cuda", index)


def test_a_rank_without_a_gpu_is_told_so(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", LOCAL_WORLD_SIZE="4")
    with pytest.raises(ConfigError, match="rank 3 of this host has no GPU of its own, as 2 can be seen"):
        dist.discover()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[03-05,7],big1", "gpu03"),
        ("gpu[12,14]", "gpu12"),
        ("rack[1-2]-node[03,05].site", "rack1-node03.site"),
        ("10.0.0.[4-6]", "10.0.0.4"),
    ],
)
def test_the_first_host_of_a_slurm_step_is_where_ranks_meet(environment, hosts, first):
    environment(SLURM_STEP_NODELIST=hosts, SLURM_JOB_NODELIST="other", SLURM_JOB_ID="4711", SLURM_STEP_ID="2")
    found = dist._slurm_meeting_point()
    assert found["MASTER_ADDR"] == first
    assert 20_000 <= int(found["MASTER_PORT"]) < 32_000
    environment(SLURM_STEP_ID="3")
    assert dist._slurm_meeting_point()["MASTER_PORT"] != found["MASTER_PORT"]  # two steps of a job at once


def test_tasks_of_srun_meet_without_further_settings():
    program = "from lmim import dist; t = dist.discover(); dist.init(t, 1); print(dist.gather_objects(t.rank)); " \
              "dist.shutdown()"  # fmt: skip
    shared = dict(process_environment(), SLURM_NTASKS="2", SLURM_STEP_ID="0", SLURM_NNODES="1", OMP_NUM_THREADS="1",
                  SLURM_STEP_NODELIST="localhost", SLURM_JOB_ID=str(os.getpid()))  # fmt: skip
    tasks = [subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                              env=dict(shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
             for rank in range(2)]  # fmt: skip
    assert [task.communicate(timeout=60)[0] for task in tasks] == ["[0, 1]\n"] * 2


FREED = """
import resource, sys, torch
from pathlib import Path
from lmim import dist

page_mib = resource.getpagesize() / 2**20
anew = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt * page_mib
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page_mib
dist.init(dist.discover(), 1)
for _ in range(20):
    held = [torch.ones(int(mib) * 2**18) for mib in sys.argv[1:]]
    del held
    if _ == 0:
        before = anew()
print(anew() - before)
kept = resident()
dist.give_back_freed_memory()
print(kept - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
@pytest.mark.parametrize(("sizes_mib", "most_anew_mib"), [([16] * 4, 64), ([128], 4 * 128)], ids=str)
def test_what_is_freed_is_kept_for_the_next_step(sizes_mib, most_anew_mib):
    """Of what is written 19 times anew, few pages come from the system, also of one large block; they can go back."""
    environment = process_environment() | dict(PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", FREED, *map(str, sizes_mib)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    anew_mib, given_back_mib = map(float, done.stdout.split())
    assert anew_mib <= most_anew_mib and given_back_mib > 0.9 * sum(sizes_mib)


@pytest.mark.parametrize(
    ("name", "value", "adjusted"),
    [
        ("PATH", "/bin", True),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0", True),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072", False),
        ("MALLOC_TRIM_THRESHOLD_", "131072", False),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="no glibc")
def test_memory_that_the_user_has_set_up_is_left_alone(monkeypatch, environment, name, value, adjusted):
    calls = []
    for other in [key for key in os.environ if key.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(other)
    environment(**{name: value})
    library = SimpleNamespace(mallopt=lambda *words: calls.append(words))
    monkeypatch.setattr(dist.ctypes, "CDLL", lambda name: library)
    dist.keep_freed_memory()
    assert calls == ([(-4, 0), (-1, -1)] if adjusted else [])  # M_MMAP_MAX, M_TRIM_THRESHOLD: malloc.h
