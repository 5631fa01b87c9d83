"""Turn images into webdataset tar shards with an index, which `lmim train` reads.

    python tools/shard_images.py SRC DST [--short-side 320] [--samples-per-shard 10000] [--overwrite] ...

SRC is a folder of images, with a subfolder for each class or without, or `embedded:train`, `embedded:eval`, or
`embedded` for both (into DST/train and DST/eval). Broken images are skipped and named. The same images and options give
byte-identical shards. Exits with 2 on unusable input and with 1 where the disk fails.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmim.config import ConfigError
from lmim.data.datasets import EMBEDDED_SPLITS, open_source
from lmim.data.sharding import prepare_folder, write_shards
from lmim.data.shards import ShardIndex

LINE_EVERY_S = 10.0  # between plain progress lines
NAMED = 10  # skipped files that the last line names


class ImageProgress:
    """Shows images done, images/s and time left: a bar on a terminal, else a line now and then on stderr."""

    def __init__(self, name: str):
        self.name, self.start, self.last_line = name, time.monotonic(), time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:,.0f} images/s"),
                   TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("", total=None, rate=0.0) if self.bar else None

    def __enter__(self) -> ImageProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        rate = done / max(now - self.start, 1e-9)
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, rate=rate)
        elif done == total or now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            eta_s = (total - done) / rate
            print(f"{self.name}: {done}/{total} images, {rate:,.0f} images/s, ETA {eta_s:.0f} s", file=sys.stderr)


def summary(index: ShardIndex) -> str:
    """Return one line: shards, samples, classes, bytes, and what was skipped, the first ten by name."""
    classes = "no labels" if index.classes is None else f"{len(index.classes)} classes"
    named = "; ".join(f"{skip.path} ({skip.reason})" for skip in index.skipped[:NAMED])
    more = f"; and {len(index.skipped) - NAMED} more" if len(index.skipped) > NAMED else ""
    return (f"{index.folder}: {len(index.shards)} shards, {len(index)} samples, {classes}, {index.bytes} bytes, "
            f"{len(index.skipped)} skipped{': ' if named else ''}{named}{more}")  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="folder of images, embedded, embedded:train or embedded:eval")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N")
    parser.add_argument("--shard-mb", type=int, default=1024, metavar="M", help="most MiB in a shard (default 1024)")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--seed", type=int, default=0, help="of the shuffled order (default 0)")
    order.add_argument("--no-shuffle", action="store_true", help="keep the order of the names")
    parser.add_argument("--short-side", type=int, metavar="PX", help="make larger images smaller, as JPEG")
    parser.add_argument("--quality", type=int, default=90, help="of those JPEGs (default 90)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in DST")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    jobs = [(options.src, options.dst)]
    if options.src == "embedded":
        jobs = [(f"embedded:{split}", options.dst / split) for split in EMBEDDED_SPLITS]
    try:
        sources = [(open_source(src), dst) for src, dst in jobs]
        for _, dst in sources:  # all of them before the first is written
            prepare_folder(dst, options.overwrite)
        for source, dst in sources:
            with ImageProgress(source.name) as progress:
                index = write_shards(
                    source, dst, samples_per_shard=options.samples_per_shard, shard_bytes=options.shard_mb << 20,
                    seed=None if options.no_shuffle else options.seed, short_side=options.short_side,
                    jpeg_quality=options.quality, overwrite=options.overwrite, progress=progress,
                )  # fmt: skip
            print(summary(index))
    except ConfigError as error:
        print(f"shard_images: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"shard_images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shard_images: stopped; the shards that were being written are not kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
