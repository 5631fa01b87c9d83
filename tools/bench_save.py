"""The save part of bench.py: what a checkpoint takes from training, written beside it or in it."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench import write_figures
from rich.console import Console
from rich.table import Table

from lmim import LatentMIM, dist, load_config
from lmim.checkpoint import Position, Saver, newest
from lmim.config import crop_size, validate
from lmim.parallel import build_backend
from lmim.schedules import Schedules

WARM_UP_STEPS = 5


def run_save(options: argparse.Namespace) -> int:
    """Take steps with a save after every so many of them, in turn none, synchronous and asynchronous."""
    config = load_config(options.config, ["parallel.backend=local", *options.overrides])
    topology = dist.discover()
    dist.init(topology, 30)
    split = validate(config, 1)
    backend = build_backend(config, topology, split)
    backend.prepare(lambda: LatentMIM(config.model, config.objective))
    side = crop_size(config.model)
    images = torch.randint(0, 256, (split.micro_batch, 3, side, side), dtype=torch.uint8, device=topology.device)
    keys = torch.arange(split.micro_batch, device=topology.device)
    schedules = Schedules(10_000, 100, 1e-4, 0.25, 0.996, 0.75, 0.25)
    folders = {kind: Path(tempfile.mkdtemp(dir=options.folder)) for kind in ("synchronous", "asynchronous")}
    savers = {}
    for kind, folder in folders.items():
        how = dataclasses.replace(config.checkpoint, asynchronous=kind == "asynchronous")
        savers[kind] = Saver(folder, dataclasses.replace(config, checkpoint=how), topology)

    taken: dict[str, list[float]] = {"none": [], "synchronous": [], "asynchronous": []}  # steps without their save
    calls: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    number = 0

    def step() -> float:
        nonlocal number
        began = time.perf_counter()
        hyper = schedules.at(number)
        backend.begin_step(hyper)
        for micro in range(split.accumulate):
            last = micro == split.accumulate - 1
            backend.forward_backward(images, keys, hyper.similarity_target, last_micro=last)
        float(backend.finish_step())
        number += 1
        return time.perf_counter() - began

    for _ in range(WARM_UP_STEPS):
        step()
    for _ in range(options.saves + 1):  # the first of each makes its buffers
        for kind in taken:
            if kind != "none":
                began = time.perf_counter()
                savers[kind].save(Position(number, 0, number, "", 0), backend.pieces())
                calls[kind].append(time.perf_counter() - began)
            taken[kind].append(sum(step() for _ in range(options.every)))
    for saver in savers.values():
        saver.close()
    size = sum(path.stat().st_size for path in newest(folders["asynchronous"]).iterdir())
    plain_s = statistics.median(taken["none"][1:]) / options.every
    figures = dict(step_ms=round(1e3 * plain_s, 2), checkpoint_mb=round(size / 1e6, 1), saves=options.saves)
    title = f"{Path(options.config).stem}: a step takes {1e3 * plain_s:.1f} ms, a checkpoint {size / 1e6:.1f} MB"
    table = Table(title=title, title_justify="left")
    for heading in (
        "save",
        "the loop stands, ms",
        "of a step",
        f"and the next {options.every} steps are longer by, ms",
    ):
        table.add_column(heading, justify="left" if heading == "save" else "right")
    for kind, times in calls.items():
        stands_s = statistics.median(times[1:])
        longer_s = statistics.median(t - n for t, n in zip(taken[kind][1:], taken["none"][1:], strict=True))
        table.add_row(kind, f"{1e3 * stands_s:.2f}", f"{stands_s / plain_s:.1%}", f"{1e3 * longer_s:.1f}")
        figures[kind] = dict(
            stands_ms=round(1e3 * stands_s, 3), longest_ms=round(1e3 * max(times[1:]), 3),
            share_of_a_step=round(stands_s / plain_s, 4), next_steps_longer_ms=round(1e3 * longer_s, 2),
        )  # fmt: skip
    Console(width=120).print(table)
    if options.json:
        print(f"written to {write_figures('save', figures, config=str(options.config), every=options.every)}")
    backend.close()
    dist.shutdown()
    for folder in folders.values():
        shutil.rmtree(folder)
    return 0
