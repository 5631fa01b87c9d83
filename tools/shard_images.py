"""Turn images into webdataset tar shards with an index, which `lmim train` reads.

    python tools/shard_images.py SRC DST [--short-side 320] [--samples-per-shard 10000] [--workers 8] ...
    python tools/shard_images.py SRC DST --part 2/8        (on the second of eight machines)
    python tools/shard_images.py DST --merge               (where the parts were not written into one folder)
    python tools/shard_images.py 'TARS/{000..999}.tar' DST --index-only        (or 's3://...', 'https://...')

SRC is one of
  - a folder of images, with a subfolder for each class or without;
  - ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz beside it;
  - IDX files as MNIST's, Parquet files as Hugging Face's, or webdataset tars: one file, the folder that holds them, a
    glob or a brace range;
  - embedded:train, embedded:eval, or embedded for both (into DST/train and DST/eval).

Broken images are skipped and named. The same images and options give byte-identical shards, whatever the workers and
parts. A run that was stopped, however roughly, goes on when it is started again. Exits with 2 on unusable input and
with 1 where the disk or a worker process fails.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from lmim.config import ConfigError
from lmim.data import storage
from lmim.data.datasets import EMBEDDED_SPLITS, expand, open_source
from lmim.data.pool import WorkerDied
from lmim.data.progress import ImageProgress
from lmim.data.sharding import CHECKS, index_tars, plan_shards, run_plan
from lmim.data.shards import ShardIndex
from lmim.data.storage import Damaged, StorageError
from lmim.data.unfinished import begin, finish
from lmim.dist import available_cores

NAMED = 10  # skipped files that the last line names


def summary(index: ShardIndex) -> str:
    """Return one line: shards, samples, classes, bytes, and what was skipped, the first ten by name."""
    classes = "no labels" if index.classes is None else f"{len(index.classes)} classes"
    named = "; ".join(f"{skip.path} ({skip.reason})" for skip in index.skipped[:NAMED])
    more = f"; and {len(index.skipped) - NAMED} more" if len(index.skipped) > NAMED else ""
    return (f"{index.folder}: {len(index.shards)} shards, {len(index)} samples, {classes}, {index.bytes} bytes, "
            f"{len(index.skipped)} skipped{': ' if named else ''}{named}{more}")  # fmt: skip


def part_of(text: str) -> tuple[int, int]:
    """Parse 'i/n'."""
    part, of = (int(number) for number in text.split("/"))
    if not 1 <= part <= of:
        raise ValueError(text)
    return part, of


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="where the images are")
    parser.add_argument("dst", metavar="DST", type=Path, nargs="?", help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N")
    parser.add_argument("--shard-mb", type=int, default=1024, metavar="M",
                        help="most MiB in a shard, by the sizes of the source's files (default 1024)")  # fmt: skip
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--seed", type=int, default=0, help="of the shuffled order (default 0)")
    order.add_argument("--no-shuffle", action="store_true", help="keep the order of the names")
    parser.add_argument("--short-side", type=int, metavar="PX", help="make larger images smaller, as JPEG")
    parser.add_argument("--quality", type=int, default=90, help="of those JPEGs (default 90)")
    parser.add_argument("--check", choices=CHECKS, default="quick",
                        help="decode: every image; quick: where its header or end leaves doubt (default)")  # fmt: skip
    parser.add_argument("--devkit", type=Path, metavar="FILE", help="ImageNet's, if not beside its validation archive")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="default: the cores")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="i/n", help="write every n-th shard only")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in DST")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merge", action="store_true", help="make the index of finished parts; takes DST alone")
    kind.add_argument("--index-only", action="store_true", help="write the index of existing tars, not their copies")
    options = parser.parse_args(arguments)
    if options.merge == (options.dst is not None):
        parser.error("--merge takes DST alone" if options.merge else "the following arguments are required: DST")
    return options


def run(options: argparse.Namespace) -> None:
    """Do what the command line says, with a line on stdout for each data set."""
    if options.merge:
        found = finish(Path(options.src))
        if isinstance(found, int):
            raise ConfigError(f"DST ({options.src}) lacks {found} shards: run the parts that did not finish again")
        print(summary(found))
        return
    running = dict(overwrite=options.overwrite, workers=options.workers, part=options.part)
    if options.index_only:
        tars = storage.expand(options.src) if storage.is_remote(options.src) else expand(options.src, "SRC")
        with ImageProgress(options.src) as progress:
            tell(index_tars(tars, options.dst, check=options.check, progress=progress, **running), options)
        return
    jobs = [(options.src, options.dst)]
    if options.src == "embedded":
        jobs = [(f"embedded:{split}", options.dst / split) for split in EMBEDDED_SPLITS]
    if Path(options.src).is_dir() and Path(options.src).resolve() in Path(options.dst).resolve().parents:
        raise ConfigError(f"DST ({options.dst}) lies in SRC: choose a folder elsewhere")
    with Console(stderr=True).status(f"listing {options.src}"):  # a minute for ImageNet; shown on a terminal only
        plans = [
            (dst, plan_shards(
                open_source(src, devkit=options.devkit), samples_per_shard=options.samples_per_shard,
                shard_bytes=options.shard_mb << 20, seed=None if options.no_shuffle else options.seed,
                short_side=options.short_side, jpeg_quality=options.quality, check=options.check))
            for src, dst in jobs
        ]  # fmt: skip
    for dst, plan in plans:  # all of them before the first is written
        begin(dst, plan.plan, options.overwrite)
    for dst, plan in plans:
        with ImageProgress(plan.source.name) as progress:
            index = run_plan(plan, dst, progress=progress, **running)
        tell(index, options)


def tell(index: ShardIndex | None, options: argparse.Namespace) -> None:
    """Print the data set's summary, or that other parts are not done."""
    i, n = options.part
    print(f"part {i}/{n} is done, others are not; the last one makes the index" if index is None else summary(index))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        run(options)
    except ConfigError as error:
        print(f"shard_images: {error}", file=sys.stderr)
        return 2
    except (OSError, StorageError, Damaged, WorkerDied) as error:
        print(f"shard_images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shard_images: stopped; start it again with the same options to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
