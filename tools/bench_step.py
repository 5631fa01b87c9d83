"""The step part of bench.py: images/s of training steps, where their time goes, and how much of the peak that is.

A row is one configuration on this machine; `--vary KEY=A,B` makes one of each value. Rows start from the same weights,
are warmed up, put back to where they began, and measured in turn, round after round; matrix products of the same
precision are measured in each round too, and their best rate is the peak that MFU is a share of. FLOPs are those of
`lmim plan`: visible tokens in the online encoder, the target forward only.

How a process keeps its memory, and where in it that lies, moves a step on CPUs by a fifth. With `--apart` every row
has a new process in every round, so that no row runs in what another has left, and chance is drawn anew each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, progress_bar, write_figures
from bench_released import ReleasedBackend
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lmim import LatentMIM, dist
from lmim.config import ConfigError, crop_size, load_config, validate
from lmim.options import Config
from lmim.parallel import Backend, build_backend
from lmim.profiling import flops_per_image, matrix_peak
from lmim.schedules import Schedules

WARM_UP_STEPS = 3
Variation = tuple[str, list[str], bool]  # name, overrides, in the shape of the released code?
GLIBC_AS_IT_IS = "glibc.malloc.tcache_count=7"  # its own default; whoever sets something there is left alone by lmim
PARTS = ("EMA", "views and patches", "target", "encoder", "decoder", "loss", "backward", "optimizer")


class Clock:
    """Marks in the order in which the device comes to them, and the milliseconds between."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self, ends: str) -> None:
        """Say that a part ends here; what follows belongs to the next mark's part."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((ends, event))
        else:
            self.marks.append((ends, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Return the time of each part and forget the marks."""
        synchronize(self.device)
        total = dict.fromkeys(PARTS, 0.0)
        for (_, before), (ends, after) in itertools.pairwise(self.marks):
            if ends:
                total[ends] += before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
        self.marks = []
        return total


def page_faults() -> int:
    """Return how often the system had to give this process a page of memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclasses.dataclass
class StepRow:
    """A configuration and what was measured of it; rates are of all ranks."""

    name: str
    config: Config
    backend: Backend
    step: Callable[..., None]
    global_batch: int
    gflop_per_image: float
    memory_gib: float = 0.0
    page_faults: float = 0.0  # a step
    rates: list[float] = dataclasses.field(default_factory=list)  # images/s, one a round
    shares: list[float] = dataclasses.field(default_factory=list)  # of the peak of the same round
    parts_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def build(name: str, config: Config, topology: dist.Topology, released: bool) -> StepRow:
    """Build a configuration's backend and warm it up; weights and moments are then as they were."""
    split = validate(config, topology.world_size)
    backend = ReleasedBackend(config, topology, split) if released else build_backend(config, topology, split)
    backend.prepare(lambda: LatentMIM(config.model, config.objective))
    device, side, per_rank = topology.device, crop_size(config.model), split.micro_batch
    generator = torch.Generator().manual_seed(topology.rank)
    images = torch.randint(0, 256, (per_rank, side, side, 3), dtype=torch.uint8, generator=generator)
    images = images.to(device).permute(0, 3, 1, 2)  # channels last, as the loader's are
    schedules, numbers = Schedules(10_000, 100, 1e-4, 0.25, 0.996, 0.75, 0.25), itertools.count()
    keys = torch.arange(per_rank, device=device) + per_rank * topology.rank

    def step(clock: Clock | None = None, take: Callable[[], tuple[Tensor, Tensor]] = lambda: (images, keys)) -> None:
        mark = clock.mark if clock else lambda ends: None
        hyper = schedules.at(next(numbers))
        mark("")
        backend.begin_step(hyper)
        mark("EMA")
        for micro in range(split.accumulate):
            last = micro == split.accumulate - 1
            backend.forward_backward(*take(), hyper.similarity_target, last_micro=last)
            mark("backward")
        backend.finish_step()
        mark("optimizer")

    begun = [piece.numbers.clone() for piece in backend.pieces()]
    for _ in range(WARM_UP_STEPS):
        step()
    with torch.no_grad():
        for piece, numbers_then in zip(backend.pieces(), begun, strict=True):
            piece.numbers.copy_(numbers_then)
    backend.loaded(0)
    gflop = flops_per_image(config).total / 1e9
    return StepRow(name, config, backend, step, config.data.global_batch, gflop)


def watch_parts(model: LatentMIM, clock: Clock) -> Callable[[], None]:
    """Let a model's parts mark their ends; return what takes that back."""
    hooks = []
    for part, name in ((model.target, "target"), (model.online, "encoder"), (model.decoder, "decoder")):
        before = "decoder" if name == "decoder" else "views and patches"
        hooks.append(part.register_forward_pre_hook(lambda *_, before=before: clock.mark(before)))
        hooks.append(part.register_forward_hook(lambda *_, name=name: clock.mark(name)))
    plain, own = model.compare, vars(model).get("compare")

    def compare(*inputs: Any) -> Any:
        out = plain(*inputs)
        clock.mark("loss")
        return out

    model.compare = compare

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        del model.compare
        if own is not None:
            model.compare = own

    return undo


def measure(rows: Sequence[StepRow], options: argparse.Namespace, topology: dist.Topology) -> float:
    """Fill in the rows' figures and return the peak of a rank's device in FLOP/s, the median of the rounds'."""
    device, ranks, peaks = topology.device, topology.world_size, []
    dtype = torch.bfloat16 if rows[0].config.precision.compute == "bf16" else torch.float32
    for _ in range(options.rounds):
        peaks.append(matrix_peak(device, dtype))
        for row in rows:
            row.step()
            synchronize(device)
            faults, began = page_faults(), time.perf_counter()
            for _ in range(options.steps):
                row.step()
            synchronize(device)
            rate = options.steps * row.global_batch / (time.perf_counter() - began)
            row.rates.append(rate)
            row.page_faults = (page_faults() - faults) / options.steps
            row.shares.append(1e9 * row.gflop_per_image * rate / ranks / peaks[-1])
    for row in rows:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock, found = Clock(device), []
        undo = watch_parts(row.backend.model, clock)
        for _ in range(max(options.steps // 2, 2)):
            row.step(clock)
            found.append(clock.milliseconds())
        undo()
        row.parts_ms = {part: round(statistics.median(times[part] for times in found), 3) for part in PARTS}
        if device.type == "cuda":
            row.memory_gib = torch.cuda.max_memory_allocated(device) / 2**30
    return statistics.median(peaks)


def profile(row: StepRow, device: torch.device, count: int) -> list[tuple[str, float, int]]:
    """Return the kernels (operators on CPUs) that take most of three steps: name, ms a step, calls a step."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(3):
            row.step()
        synchronize(device)
    of = (lambda e: e.self_device_time_total) if device.type == "cuda" else (lambda e: e.self_cpu_time_total)
    events = sorted(profiler.key_averages(), key=of, reverse=True)[:count]
    return [(event.key[:110], of(event) / 3e3, round(event.count / 3)) for event in events]


def variations(options: argparse.Namespace) -> Iterator[Variation]:
    """Yield what every row is of."""
    axes = []
    for text in options.vary:
        key, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--vary ({text}) must be of the form section.key=A,B")
        axes.append([f"{key}={value}" for value in values.split(",")])
    if options.released:
        yield "released code's shape", [], True
    for chosen in itertools.product(*axes):
        yield " ".join(word.partition(".")[2] for word in chosen) or "as configured", list(chosen), False


def configured(options: argparse.Namespace, chosen: list[str]) -> Config:
    config = load_config(options.config, ["data.eval=", *options.overrides, *chosen])
    if options.batch:
        config.data.global_batch = config.data.micro_batch = options.batch
    return config


def on_ranks(run: Callable[[argparse.Namespace, dist.Topology], None], options: argparse.Namespace) -> int:
    """Run a benchmark as a rank of its launcher, or alone, and return the exit code; mistakes get one line."""
    topology = dist.discover()
    dist.init(topology, 30)
    try:
        run(options, topology)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.shutdown()
    return 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def measure_group(
    group: Sequence[Variation], options: argparse.Namespace, topology: dist.Topology
) -> tuple[list[StepRow], float]:
    """Build rows, measure them in turn and free what they hold; return them and the peak."""
    rows = [build(name, configured(options, chosen), topology, released) for name, chosen, released in group]
    peak = measure(rows, options, topology)
    for row in rows:
        row.kernels = profile(row, topology.device, options.profile) if options.profile else []
        row.backend.close()
        row.backend = row.step = None
    if topology.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows, peak


def measure_alone(variation: Variation, options: argparse.Namespace) -> tuple[StepRow, float]:
    """Measure a round of one row, in a process that does nothing else; the released code's shape lets memory be."""
    if variation[2]:
        os.environ["GLIBC_TUNABLES"] = GLIBC_AS_IT_IS
    topology = dist.discover()
    dist.init(topology, 30)
    try:
        (row,), peak = measure_group([variation], options, topology)
    finally:
        dist.shutdown()
    return row, peak


def measure_apart(
    group: Sequence[Variation], options: argparse.Namespace, topology: dist.Topology
) -> tuple[list[StepRow], float]:
    """Measure rows in turn, each round of each in a process of its own; return them and the peak."""
    if topology.world_size > 1:
        raise ConfigError(
            f"--apart starts processes of its own, and here are {topology.world_size} ranks: leave it out"
        )
    rounds: list[list[tuple[StepRow, float]]] = []
    with progress_bar() as progress:
        task = progress.add_task("", total=options.rounds * len(group))
        for number in range(1, options.rounds + 1):
            once = dict(rounds=1, profile=options.profile if number == 1 else 0)
            rounds.append([])
            for variation in group:
                progress.update(task, description=f"round {number}: {variation[0]}")
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    alone = process.submit(measure_alone, variation, argparse.Namespace(**vars(options) | once))
                    rounds[-1].append(alone.result())
                progress.advance(task)
    rows = [row for row, _ in rounds[0]]
    for column, row in enumerate(rows):
        in_rounds = [measured[column][0] for measured in rounds]
        row.rates = [rate for again in in_rounds for rate in again.rates]
        row.shares = [share for again in in_rounds for share in again.shares]
        row.page_faults = statistics.median(again.page_faults for again in in_rounds)
        row.parts_ms = {part: round(statistics.median(again.parts_ms[part] for again in in_rounds), 3)
                        for part in PARTS}  # fmt: skip
    return rows, statistics.median(peak for measured in rounds for _, peak in measured)


def run_step(options: argparse.Namespace, topology: dist.Topology) -> None:
    """Measure all rows and print or record them."""
    asked = list(variations(options))
    for _, chosen, _ in asked:
        validate(configured(options, chosen), topology.world_size)  # before the first is measured
    if options.apart:
        rows, peak = measure_apart(asked, options, topology)
    else:
        groups = [asked] if options.together else [[variation] for variation in asked]
        measured = [measure_group(group, options, topology) for group in groups]
        rows, peak = [row for group, _ in measured for row in group], max(peak for _, peak in measured)
    if topology.is_main:
        report(rows, peak, options, topology)


def figures_of(row: StepRow, first: StepRow) -> dict[str, Any]:
    return dict(
        name=row.name, batch=row.global_batch, gflop_per_image=round(row.gflop_per_image, 2),
        images_per_second=round(row.median, 1), least=round(min(row.rates), 1), most=round(max(row.rates), 1),
        mfu=round(statistics.median(row.shares), 4), memory_gib=round(row.memory_gib, 2),
        page_faults=round(row.page_faults),
        times_first=round(statistics.median(a / b for a, b in zip(row.rates, first.rates, strict=True)), 3),
        parts_ms=row.parts_ms, kernels=row.kernels,
    )  # fmt: skip


def report(rows: Sequence[StepRow], peak: float, options: argparse.Namespace, topology: dist.Topology) -> None:
    """Print the table, and record it if asked."""
    figures = [figures_of(row, rows[0]) for row in rows]
    where = device_name(topology.device)
    title = f"{Path(options.config).stem} on {topology.world_size} x {where}: matrix products {peak / 1e12:.3g} TFLOP/s"
    table = Table(title=title, title_justify="left")
    for heading in ("", "batch", "images/s", "least - most", "x first", "MFU", "GiB", *PARTS):
        table.add_column(heading, justify="right" if heading else "left")
    for row in figures:
        table.add_row(row["name"], str(row["batch"]), f"{row['images_per_second']:,.0f}",
                      f"{row['least']:,.0f} - {row['most']:,.0f}", f"{row['times_first']:.2f}", f"{row['mfu']:.1%}",
                      f"{row['memory_gib']:.1f}", *(f"{row['parts_ms'][part]:.1f}" for part in PARTS))  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for row in figures:
        for name, milliseconds, calls in row["kernels"]:
            print(f"{row['name']}: {milliseconds:8.3f} ms  {calls:5d} x  {name}")
    if options.json:
        settings = dict(config=str(options.config), overrides=options.overrides, vary=options.vary,
                        steps=options.steps, rounds=options.rounds, together=options.together, apart=options.apart,
                        ranks=topology.world_size, device=where)  # fmt: skip
        path = write_figures("step", dict(peak_tflops=float(f"{peak / 1e12:.4g}"), rows=figures), **settings)
        print(f"written to {path}")


def run_table(options: argparse.Namespace) -> int:
    """Print every step record as one table, newest machine last."""
    table = Table(title="step records", title_justify="left")
    for heading in ("date", "device", "config", "row", "batch", "images/s", "MFU", "GiB"):
        table.add_column(heading)
    for path in sorted(RESULTS.glob("step_*.json")):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            config = row.get("model", Path(record["settings"]["config"]).stem)
            table.add_row(
                record["date"][:10],
                record["settings"]["device"],
                config,
                row["name"],
                str(row["batch"]),
                f"{row['images_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                f"{row['memory_gib']:.1f}",
            )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0
