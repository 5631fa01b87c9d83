"""The end2end part of bench.py: from shards to steps, beside the loader alone and the steps alone.

All three run in turn, round after round, in the same processes: batches that nobody trains on, steps on one batch that
stays where it is, and steps on batches as they come. What the last falls short of the slower of the first two is what
the two take from each other: cores, memory, the interpreter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import write_figures
from bench_step import build, configured, device_name, synchronize
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lmim import dist
from lmim.config import ConfigError, crop_size
from lmim.data.loader import PREFETCH, Batch, loader_workers, open_data, train_batches
from lmim.options import Config

LOADER, STEPS, BOTH = "loader alone", "steps alone", "both"


class Source:
    """Micro-batches of a loader, and the seconds that were waited for them."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches, self.waited_s = batches, 0.0

    def take(self) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - began
        return batch.images, batch.keys


def run_end2end(options: argparse.Namespace, topology: dist.Topology) -> None:
    """Measure the three and print or record them; rates are of all ranks."""
    with tempfile.TemporaryDirectory() as scratch:  # where embedded images are written
        rates, waited = measure(configured(options, [f"run.folder={scratch}"]), options, topology)
    if topology.is_main:
        report(rates, waited, options, topology)


def measure(
    config: Config, options: argparse.Namespace, topology: dist.Topology
) -> tuple[dict[str, list[float]], list[float]]:
    """Return the rates of each round, and the shares of the time of both that were waited for batches."""
    index, _ = open_data(config, topology)
    if index is None or not len(index):
        raise ConfigError(f"data.train ({config.data.train}) holds no images: give a folder of shards")
    row = build(BOTH, config, topology, released=False)
    split, device = row.backend.split, topology.device
    ready = loader_workers(config.data, topology) * (PREFETCH + 1)  # made while others are measured: not counted
    steps_in_all = options.rounds * (2 * options.steps + -(-2 * ready // split.accumulate))
    source = Source(train_batches(config.data, index, seed=config.run.seed, size=crop_size(config.model), split=split,
                                  topology=topology, start_step=0, total_steps=steps_in_all))  # fmt: skip

    def loader_alone() -> None:
        for _ in range(options.steps * split.accumulate):
            source.take()

    def steps_alone() -> None:
        for _ in range(options.steps):
            row.step()

    def both() -> None:
        for _ in range(options.steps):
            row.step(take=source.take)

    rates: dict[str, list[float]] = {LOADER: [], STEPS: [], BOTH: []}
    waited = []
    for _ in range(options.rounds):
        for name, run in ((LOADER, loader_alone), (STEPS, steps_alone), (BOTH, both)):
            if name != STEPS:
                for _ in range(ready):
                    source.take()
            synchronize(device)
            source.waited_s, began = 0.0, time.perf_counter()
            run()
            synchronize(device)
            taken_s = time.perf_counter() - began
            rates[name].append(options.steps * row.global_batch / taken_s)
        waited.append(source.waited_s / taken_s)
    row.backend.close()
    return rates, waited


def report(rates: dict[str, list[float]], waited: list[float], options: argparse.Namespace,
           topology: dist.Topology) -> None:  # fmt: skip
    """Print the table, and record it if asked."""
    where = device_name(topology.device)
    table = Table(title=f"{Path(options.config).stem} on {topology.world_size} x {where}", title_justify="left")
    for heading in ("", "images/s", "least - most"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in rates.items():
        table.add_row(name, f"{statistics.median(found):,.0f}", f"{min(found):,.0f} - {max(found):,.0f}")
    Console(width=100).print(table)
    limits = [min(pair) for pair in zip(rates[LOADER], rates[STEPS], strict=True)]
    share = statistics.median(both / limit for both, limit in zip(rates[BOTH], limits, strict=True))
    print(f"both reach {share:.1%} of the slower one alone; {statistics.median(waited):.1%} of the time is waiting")
    if options.json:
        figures = dict(
            rows=[dict(name=name, images_per_second=round(statistics.median(found), 1), least=round(min(found), 1),
                       most=round(max(found), 1)) for name, found in rates.items()],
            share_of_the_slower=round(share, 4), waited_share=round(statistics.median(waited), 4),
        )  # fmt: skip
        settings = dict(config=str(options.config), overrides=options.overrides, steps=options.steps,
                        rounds=options.rounds, ranks=topology.world_size, device=where)  # fmt: skip
        print(f"written to {write_figures('end2end', figures, **settings)}")
