"""One rank of the trial, in a process of its own: `python -m lmim.doctor.step FOLDER`.

Reads FOLDER/config.yaml; leaves network.json, step.json and, if it fails, error.json there. It ends with the process
that started it, which holds its stdin open.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lmim import dist
from lmim.config import crop_size, load_config, validate
from lmim.doctor.memory import address_space, peak_memory
from lmim.doctor.rows import in_words
from lmim.doctor.trial import TRIAL_S, leave
from lmim.options import Config
from lmim.parallel import build_backend
from lmim.randomness import sample_key
from lmim.schedules import Schedules
from lmim.train import TASKS

MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
LARGE_ROUNDS, SMALL_ROUNDS = 5, 20
STEPS = 3  # the first one makes what is made once


def main(folder: Path) -> int:
    """Meet the others, measure the network, take some steps."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):  # if the host runs out of memory, this is what to end, and nothing else
        Path("/proc/self/oom_score_adj").write_text("1000")
    topology = dist.discover()
    try:
        config = load_config(folder / "config.yaml")
        minutes = TRIAL_S / 60
        dist.init(topology, minutes, store=dist.meet(topology, timedelta(minutes=minutes), join=True))
        leave(folder / "network.json", time_network(topology))
        leave(folder / "step.json", take_steps(config, topology))
    except BaseException as error:
        leave(folder / "error.json", in_words(error))
        dist.fail(error)
        raise
    dist.shutdown()
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # by the descriptor: at the end of Python, a lock on sys.stdin that is held would abort it
    os._exit(1)


def time_network(topology: dist.Topology) -> dict[str, Any]:
    """Return, by group of ranks, the bytes/s that leave each in a large all-reduce, and the seconds of a tiny one."""
    if topology.world_size == 1:
        return {}
    hosts = dist.gather_objects(socket.gethostname())
    groups: dict[str, tuple[int, Any]] = {"all ranks": (len(hosts), None), **dist.groups_of_hosts(hosts)}
    found = {}
    for name in ("all ranks", "within", "between"):  # in the same order on all ranks
        if name in groups:
            ranks, group = groups[name]
            large = torch.ones(MESSAGE_BYTES[topology.device.type] // 4, device=topology.device)
            small = torch.ones(1, device=topology.device)
            large_s = _seconds(lambda: dist.sum_over_ranks(large, group), LARGE_ROUNDS, topology)  # noqa: B023
            small_s = _seconds(lambda: dist.sum_over_ranks(small, group), SMALL_ROUNDS, topology)  # noqa: B023
            wire_bytes = 2 * (ranks - 1) / ranks * large.nbytes  # as in a ring
            found[name] = dict(ranks=ranks, bytes_per_s=wire_bytes / large_s, latency_s=small_s)
        dist.barrier()
    return found


def _seconds(work: Callable[[], Any], rounds: int, topology: dist.Topology) -> float:
    """Return the median of some rounds, after one that connects the ranks."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        _wait(topology)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait(topology: dist.Topology) -> None:
    if topology.device.type == "cuda":
        torch.cuda.synchronize()


def take_steps(config: Config, topology: dist.Topology) -> dict[str, Any]:
    """Take steps of the configured model, backend and precision on random crops; return time, loss and peak memory."""
    split, device = validate(config, topology.world_size), topology.device
    task = TASKS[config.run.task](config)
    backend = build_backend(config, topology, split)
    backend.prepare(task.build)
    objective = config.objective
    schedules = Schedules(1000, 10, config.optim.base_lr * config.data.global_batch / 256, config.optim.floor,
                          objective.momentum, objective.similarity_start, objective.similarity_end)  # fmt: skip
    side = crop_size(config.model)
    images = torch.randint(0, 256, (split.micro_batch, side, side, 3), dtype=torch.uint8, device=device)
    images = images.permute(0, 3, 1, 2)  # channels last, as the loader's
    keys = sample_key(config.run.seed, 0, torch.arange(split.micro_batch, device=device) + topology.rank)
    times = []
    for step in range(STEPS):
        dist.barrier()
        began, hyper = time.perf_counter(), schedules.at(step)
        backend.begin_step(hyper)
        for micro in range(split.accumulate):
            last = micro == split.accumulate - 1
            out = backend.forward_backward(images, keys, hyper.similarity_target, last_micro=last)
        backend.finish_step()
        _wait(topology)
        times.append(time.perf_counter() - began)
    found = dict(micro_step_s=min(times[1:]) / split.accumulate, loss=float(out.loss), peak=peak_memory(),
                 address_space=address_space(), device="CPU")  # fmt: skip
    if device.type == "cuda":
        found |= dict(device=torch.cuda.get_device_name(device), gpu_allocated=torch.cuda.max_memory_allocated(device),
                      gpu_reserved=torch.cuda.max_memory_reserved(device),
                      gpu_total=torch.cuda.get_device_properties(device).total_memory)  # fmt: skip
    backend.close()
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
