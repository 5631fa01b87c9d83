"""Measure how fast the parts of lmim are, beside what else there is, and record it.

    bench.py data --photos DIR [--rounds N] [--json]
    bench.py step CONFIG [section.key=value ...] [--vary KEY=A,B] [--released] [--json]
    bench.py end2end CONFIG [section.key=value ...] [--json]
    bench.py attention CONFIG [section.key=value ...] [--json]
    bench.py save CONFIG [section.key=value ...] [--json]
    bench.py table

data: images/s per core from files to crops. make_photos.py makes the photos.
step: images/s of training steps, the time of their parts, MFU, memory; under any launcher.
end2end: images/s from shards to steps, beside the loader alone and the steps alone; under any launcher.
attention: milliseconds of one block's attention in each place of the model, by every kernel that is there.
save: what a checkpoint takes from training, written beside it or in it.
table: all records of steps.

All rows are measured in turn, round after round, so that what disturbs the machine disturbs them alike; a row is given
as its median over the rounds with the least and the most, and compared with another row within each round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

RESULTS = Path(__file__).parent / "bench_results"
PACKAGES = ("torch", "torchvision", "numpy", "Pillow", "simplejpeg", "webdataset", "litdata", "mosaicml-streaming")


@dataclass
class Row:
    """One thing to measure: `batches` starts it and yields after each batch; `missing` says why it cannot run."""

    name: str
    data: str
    crop: str
    cores: Sequence[int]
    batches: Callable[[], Iterator[Any]] | None
    missing: str = ""
    rates: list[float] = field(default_factory=list)  # images/s per core, one a round

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def ratio(self, other: Row) -> float:
        """Return how many times as fast as another row, by the median over the rounds."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True))


def measure_rate(row: Row, batch: int, warmup: int, timed: int) -> float:
    """Return images/s per core over `timed` batches, after `warmup` batches; the process keeps to the row's cores."""
    os.sched_setaffinity(0, row.cores)
    stream = row.batches()
    for _ in range(warmup):
        next(stream)
    start = time.perf_counter()
    for _ in range(timed):
        next(stream)
    elapsed_s = time.perf_counter() - start
    stream.close()
    return batch * timed / elapsed_s / len(row.cores)


def progress_bar() -> Progress:
    """Return a bar that counts what is done, with the time it took and will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=False))  # fmt: skip
    return Progress(*columns, console=Console(stderr=True))


def measure_rows(rows: Sequence[Row], *, rounds: int, batch: int, warmup: int, timed: int) -> None:
    """Fill in the rates of all rows that can run, in turn, showing progress."""
    cores = os.sched_getaffinity(0)
    present = [row for row in rows if row.batches]
    try:
        with progress_bar() as progress:
            task = progress.add_task("", total=rounds * len(present))
            for number in range(1, rounds + 1):
                for row in present:
                    progress.update(task, description=f"round {number}: {row.name}, {row.data}")
                    row.rates.append(measure_rate(row, batch, warmup, timed))
                    progress.advance(task)
    finally:
        os.sched_setaffinity(0, cores)


def machine() -> dict[str, Any]:
    """Return the CPU's model, the cores and memory, and the versions of Python and the packages measured."""
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")]  # fmt: skip
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return dict(cpu=cpu[0] if cpu else platform.machine(), cores=len(os.sched_getaffinity(0)),
                memory_gib=round(memory_gib, 1), system=platform.platform(), versions=versions)  # fmt: skip


def git_commit() -> str:
    """Return the commit of the code, with '+changes' where the working tree differs."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def write_record(name: str, rows: Sequence[Row], **settings: Any) -> Path:
    """Record rows, and the settings they were measured with."""
    listed = []
    for row in rows:
        entry = asdict(row) | dict(median=row.median if row.rates else None, cores=len(row.cores))
        del entry["batches"]
        listed.append(entry)
    return write_figures(name, dict(unit="images/s per core", rows=listed), **settings)


def write_figures(name: str, figures: dict[str, Any], **settings: Any) -> Path:
    """Write figures, settings, machine, commit and date as JSON to tools/bench_results and return the file."""
    now = datetime.now(timezone.utc)
    record = dict(benchmark=name, date=now.isoformat(timespec="seconds"), commit=git_commit(), machine=machine(),
                  settings=settings, **figures)  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{now:%Y%m%d_%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def print_table(title: str, rows: Sequence[Row], references: dict[str, Callable[[Row], Row]]) -> None:
    """Print the rows with how many times as fast as each reference they are."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "crop", "files"):
        table.add_column(heading)
    for heading in ("images/s per core", "least - most", *references):
        table.add_column(heading, justify="right")
    for row in rows:
        if not row.rates:
            table.add_row(row.name, row.crop, row.data, row.missing)
            continue
        spread = f"{min(row.rates):,.0f} - {max(row.rates):,.0f}"
        ratios = [f"{row.ratio(reference(row)):.2f}" for reference in references.values()]
        table.add_row(row.name, row.crop, row.data, f"{row.median:,.0f}", spread, *ratios)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="images/s per core of decoding, cropping and loading")
    data.add_argument("--photos", type=Path, default=Path("data/photos"), metavar="DIR",
                      help="class folders of JPEGs, from make_photos.py (default data/photos)")  # fmt: skip
    data.add_argument("--size", type=int, default=280, metavar="PX", help="side of the crops (default 280)")
    data.add_argument("--batch", type=int, default=64, metavar="N")
    data.add_argument("--rounds", type=int, default=5, metavar="N")
    data.add_argument("--scratch", type=Path, metavar="DIR", help="where the shards are written (default: system's)")
    data.add_argument(
        "--json", action="store_true", help=f"record the figures under {RESULTS.parent.name}/{RESULTS.name}"
    )
    stepped = argparse.ArgumentParser(add_help=False)
    stepped.add_argument("config", help="YAML file")
    stepped.add_argument("overrides", nargs="*", metavar="section.key=value")
    stepped.add_argument("--batch", type=int, metavar="N", help="images of a step, in one micro-batch (one rank)")
    stepped.add_argument("--steps", type=int, default=20, metavar="N", help="of a row in a round (default 20)")
    stepped.add_argument("--rounds", type=int, default=5, metavar="N")
    stepped.add_argument(
        "--json", action="store_true", help=f"record the figures under {RESULTS.parent.name}/{RESULTS.name}"
    )
    step = commands.add_parser("step", parents=[stepped], help="images/s of training steps, their parts, MFU, memory")
    step.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="a row for each value")
    step.add_argument("--released", action="store_true", help="a first row in the shape of the released code")
    in_turn = step.add_mutually_exclusive_group()
    in_turn.add_argument("--together", action="store_true", help="rows in turn, round by round, all in memory at once")
    in_turn.add_argument("--apart", action="store_true", help="rows in turn, each round of each in a new process; "
                         "there the released code's shape has memory as it comes, as it would by itself")  # fmt: skip
    step.add_argument("--profile", type=int, default=0, metavar="N", help="name the N longest kernels")
    commands.add_parser("end2end", parents=[stepped], help="images/s from shards to steps, beside each alone")
    commands.add_parser("attention", parents=[stepped], help="milliseconds of attention alone, by every kernel")
    commands.add_parser("table", help="all records of steps")
    save = commands.add_parser("save", help="what a checkpoint takes from training")
    save.add_argument("config", help="YAML file")
    save.add_argument("overrides", nargs="*", metavar="section.key=value")
    save.add_argument("--saves", type=int, default=20, metavar="N", help="of each kind (default 20)")
    save.add_argument("--every", type=int, default=5, metavar="STEPS", help="between two saves (default 5)")
    save.add_argument("--folder", type=Path, metavar="DIR", help="where checkpoints are written (default: system's)")
    save.add_argument(
        "--json", action="store_true", help=f"record the figures under {RESULTS.parent.name}/{RESULTS.name}"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    if options.command == "save":  # what they import takes seconds
        from bench_save import run_save as run
    elif options.command == "step":
        from bench_step import on_ranks, run_step

        return on_ranks(run_step, options)
    elif options.command == "end2end":
        from bench_end2end import run_end2end
        from bench_step import on_ranks

        return on_ranks(run_end2end, options)
    elif options.command == "attention":
        from bench_attention import run_attention
        from bench_step import on_ranks

        return on_ranks(run_attention, options)
    elif options.command == "table":
        from bench_step import run_table as run
    else:
        from bench_data import run_data as run
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
