"""Processes: which rank this is, and how ranks reduce and agree.

Owns the discovery of the launcher (deepspeed, torchrun, Slurm, Open MPI, or none) and the process group's life. The
invariant: whatever one rank decides that others must follow goes through a collective here.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lmim.config import ConfigError
from lmim.heartbeat import Heartbeat

logger = logging.getLogger(__name__)
MOST_SILENCE_S = 300.0  # of a rank, whatever the time limit of collectives
SIDE_TIMEOUT = timedelta(hours=2)  # of what waits for the slowest disk; who is gone is found by the heartbeat
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of mallopt: blocks that come from the system each by itself; bytes
_heartbeat: Heartbeat | None = None

# launcher: names of (rank, world size, rank on this host, ranks on this host)
_LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
}


@dataclass(frozen=True)
class Topology:
    """Where this process stands among all of a run, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover() -> Topology:
    """Read rank and world size from the launcher's environment; alone if there is none.

    A Slurm allocation counts as a launcher only inside `srun` (SLURM_STEP_ID) with more than one task, so that a shell
    inside an allocation still starts one process.
    """
    env = os.environ
    for launcher, names in _LAUNCHERS.items():
        rank, world, local_rank, local_world = (env.get(name) for name in names)
        if rank is None or world is None:
            continue
        if launcher == "slurm" and ("SLURM_STEP_ID" not in env or world == "1"):
            continue
        try:
            numbers = int(rank), int(world), int(local_rank or 0), int(local_world or _ranks_here(world))
        except ValueError as error:
            raise ConfigError(
                f"{names[0]}={rank}, {names[1]}={world}, {names[2]}={local_rank} must be numbers"
            ) from error
        return Topology(*numbers, _device(numbers[2], launcher), launcher)
    return Topology(0, 1, 0, 1, _device(0, "none"), "none")


def _ranks_here(world: str) -> int:
    """Return how many ranks share this host where only the number of hosts is told (deepspeed: CROSS_SIZE)."""
    hosts = os.environ.get("CROSS_SIZE") or os.environ.get("SLURM_NNODES") or "1"
    return max(int(world) // max(int(hosts), 1), 1)


def _device(local_rank: int, launcher: str) -> torch.device:
    """Return this rank's GPU: the one that its number on the host names, or the only one its scheduler lets it see."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if launcher in ("slurm", "openmpi") and seen == 1:  # such as srun --gpus-per-task=1
        return torch.device("cuda", 0)
    if local_rank >= seen:
        raise ConfigError(
            f"rank {local_rank} of this host has no GPU of its own, as {seen} can be seen: start no more ranks a host"
        )
    return torch.device("cuda", local_rank)


def _slurm_meeting_point() -> dict[str, str]:
    """Return the first host of the job step, and a port that follows from job and step, as `srun` gives neither.

    The list of hosts is Slurm's, such as 'gpu[03-05,7],big1', whose first is gpu03.
    """
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", hosts)
    if not first:
        return {}
    numbers = [int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    port = 20_000 + (numbers[0] * 31 + numbers[1]) % 12_000  # below those that connections going out are given
    return dict(MASTER_ADDR=re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0]), MASTER_PORT=str(port))


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def meet(topology: Topology, timeout: timedelta, *, join: bool = False) -> torch.distributed.Store:
    """Return the store through which all ranks find each other; with `join`, one that others have opened already."""
    # nobody to meet: a port, however free it looked, may be taken by the time it is opened
    if topology.world_size == 1:
        return torch.distributed.HashStore()
    if topology.launcher == "slurm":
        for name, value in _slurm_meeting_point().items():
            os.environ.setdefault(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{name} is not set: the first host's address and a free port there must reach every rank"
            )
    if join:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch.distributed.TCPStore(host, port, topology.world_size, is_master=False, timeout=timeout)
    store, *_ = next(rendezvous("env://", topology.rank, topology.world_size, timeout=timeout))
    return store


def keep_freed_memory() -> None:
    """Let glibc keep what the main thread frees for the next step; else the system takes it and clears it anew.

    It does nothing where there is no glibc, or its settings are in the environment.
    """
    adjust = _of_glibc("mallopt")
    settings = os.environ.get("GLIBC_TUNABLES", "")
    if adjust is None or "glibc.malloc" in settings or any(name.startswith("MALLOC_") for name in os.environ):
        return
    adjust(_MMAP_MAX, 0)  # a threshold would not do: at most 32 MiB, and a flat gradient is larger
    adjust(_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Give the system what is freed and kept; before a fork, as a child would hold it for as long as it lives."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def init(topology: Topology, timeout_minutes: float, stacks: Path | None = None,
         store: torch.distributed.Store | None = None) -> None:  # fmt: skip
    """Start the process group (NCCL and gloo on GPUs, gloo on CPUs) and give each rank its share of cores.

    If a rank is lost or stuck, the others leave in the folder `stacks` what their threads were at. Ranks meet at
    `store` where they have one already.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(available_cores() // topology.local_world_size, 1))
    if topology.device.type == "cpu":
        keep_freed_memory()
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    index = topology.device.index if topology.device.type == "cuda" else topology.local_rank
    defaults = dict(RANK=topology.rank, WORLD_SIZE=topology.world_size, LOCAL_RANK=index,  # DeepSpeed's device
                    LOCAL_WORLD_SIZE=topology.local_world_size)  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    timeout = timedelta(minutes=timeout_minutes)
    store = store or meet(topology, timeout)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if topology.device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore("lmim", store),
        timeout=timeout,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    if topology.world_size > 1:
        global _heartbeat
        signs = torch.distributed.PrefixStore("heartbeat", store.clone())
        limit_s = min(30 * timeout_minutes, MOST_SILENCE_S)  # before those who wait for it are taken for stuck
        _heartbeat = Heartbeat(signs, topology.rank, topology.world_size, socket.gethostname(), limit_s,
                               60 * timeout_minutes, stacks)  # fmt: skip


def fail(error: BaseException) -> None:
    """Say that this rank ends with an error; if it came from others that are gone, name them and end at once.

    Where a peer is gone, closing the process group in order would wait for it.
    """
    global _heartbeat
    if _heartbeat is None:
        return
    gone = _heartbeat.missing() if isinstance(error, RuntimeError) else None
    if gone:
        logger.debug("what failed here", exc_info=error)
        _heartbeat.end(gone)
    _heartbeat.leave(" ".join(str(error).split()) or type(error).__name__)
    _heartbeat = None


def shutdown() -> None:
    """Leave the process group; without it CPU runs may abort at exit."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.leave()
        _heartbeat = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def side_group() -> torch.distributed.ProcessGroup | None:
    """Return a group of all ranks for work beside the steps, whose collectives never meet theirs; None if alone."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=SIDE_TIMEOUT)


def set_timeout(groups: list[torch.distributed.ProcessGroup], minutes: float) -> None:
    """Set the time limit of groups that a library made, which take its default and not that of `init`."""
    # torch 2.15 has it under a public name
    change = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout
    for group in groups:
        change(timedelta(minutes=minutes), group)


def start_maximum(flag: Tensor) -> torch.distributed.Work | None:
    """Start to replace a CPU tensor by its maximum over all ranks; None if alone, where it is that already."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)


def progress() -> None:
    """Say that this rank's main thread goes on; who says nothing for the time limit of collectives is ended."""
    if _heartbeat is not None:
        _heartbeat.progress()


def barrier() -> None:
    """Wait for all ranks."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(torch.zeros(1))


def sum_over_ranks(values: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a tensor over all ranks, or over those of a group."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks."""
    values = sum_over_ranks(values)
    return values / torch.distributed.get_world_size() if torch.distributed.is_initialized() else values


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on all ranks. For small things: they are pickled."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every rank's rows (counts may differ) in rank order, on all ranks, as a CPU tensor."""
    rows = rows.cpu()
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return rows
    counts = gather_objects(len(rows))
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def groups_of_hosts(hosts: list[str]) -> dict[str, tuple[int, torch.distributed.ProcessGroup]]:
    """Return {name: (ranks, group)} of this rank's groups "within" its host and "between" hosts; a collective.

    `hosts` are the ranks' hosts. Between hosts stand the first ranks of each. Groups of one rank are left out.
    """
    own, found = torch.distributed.get_rank(), {}
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    groups = [("within", ranks) for ranks in by_host.values()] if len(by_host) > 1 else []
    for name, ranks in [*groups, ("between", [ranks[0] for ranks in by_host.values()])]:
        if len(ranks) > 1:
            group = torch.distributed.new_group(ranks)  # by all ranks, also those that are not in it
            if own in ranks:
                found[name] = (len(ranks), group)
    return found


class RankLost(Exception):
    """The first rank is gone, or was never there."""


class Board:
    """What ranks leave for each other, with time limits, where a collective would wait for ever for who is gone.

    `share` returns the same on all ranks, as the first one collects it. A rank that was silent once is waited for no
    more. Values are JSON.
    """

    def __init__(self, topology: Topology, store: torch.distributed.Store):
        self.rank, self.ranks = topology.rank, range(topology.world_size)
        self.store = torch.distributed.PrefixStore("board", store)
        self.lost: set[int] = set()

    def share(self, name: str, value: Any, limit_s: float) -> list[Any]:
        """Return every rank's value, in rank order, None for a rank that is silent for so long."""
        try:
            self.store.set(f"{name}/{self.rank}", json.dumps(value))
            if self.rank == 0:
                self.store.set(f"{name}/all", json.dumps(self._collect(name, limit_s)))
            self.store.wait([f"{name}/all"], timedelta(seconds=2 * limit_s + 10))
            values = json.loads(self.store.get(f"{name}/all"))
        except RuntimeError as error:
            raise RankLost(f"rank 0 is gone, or gave no word for {2 * limit_s + 10:g} s ({name})") from error
        self.lost = {rank for rank in self.ranks if values[rank] is None}
        return values

    def _collect(self, name: str, limit_s: float) -> list[Any]:
        keys = {rank: f"{name}/{rank}" for rank in self.ranks}
        deadline = time.monotonic() + limit_s
        awaited = [key for rank, key in keys.items() if rank not in self.lost]
        while not self.store.check(awaited) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys.values()]

    def mark(self, name: str) -> None:
        """Leave a mark that any rank may look for."""
        self.store.set(f"mark/{name}", "")

    def marked(self, name: str) -> bool:
        """Tell whether any rank has left that mark."""
        return self.store.check([f"mark/{name}"])

    def close(self, limit_s: float = 5.0) -> None:
        """Let the others go first: the first rank may hold the store."""
        self.store.set(f"end/{self.rank}", "")
        deadline = time.monotonic() + limit_s
        others = [f"end/{rank}" for rank in self.ranks if rank not in self.lost]
        while self.rank == 0 and not self.store.check(others) and time.monotonic() < deadline:
            time.sleep(0.02)
