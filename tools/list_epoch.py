"""Print what a run reads in one epoch: a line a sample, read through the real stream.

    python tools/list_epoch.py DATA --ranks 2 --workers 3 --batch 64 --epoch 0 [--from CURSOR] [--json]

DATA is a folder (or address) of shards. Every rank's batches are read and decoded by the loader that trains, with its
worker processes, and put together in the order of the steps. CURSOR is a position of the stream, as `samples` in a
checkpoint's `state.json`. Columns: step, rank, sample id, key in the tar, and the words from which its crop, its flip
and its mask are drawn. The order depends on none of --ranks and --workers. Exits with 2 on unusable input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lmim.config import ConfigError, validate
from lmim.data.loader import DataError, open_shards, open_stream, train_batches
from lmim.data.transforms import CROP, FLIP
from lmim.dist import Topology
from lmim.options import Config, DataConfig
from lmim.patches import MASK
from lmim.randomness import draw

CROP_PX = 16  # pixels do not matter here; every image is decoded all the same


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", nargs="+", help="folders of shards; several are one data set")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="loader processes per rank (default 0)")
    parser.add_argument("--batch", type=int, default=256, help="images per step over all ranks (default 256)")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--from", dest="cursor", type=int, metavar="CURSOR", help="position to go on from")
    parser.add_argument("--seed", type=int, default=0, help="run.seed (default 0)")
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="data.weights")
    parser.add_argument("--block-shards", type=int, default=defaults.block_shards, help="data.block_shards")
    parser.add_argument("--lanes", type=int, default=defaults.lanes, help="data.lanes")
    parser.add_argument("--tail", choices=("carry", "drop", "repeat"), default=defaults.tail, help="data.tail")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser.parse_args(arguments)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one dictionary a sample, in the order of the stream."""
    if options.ranks < 1 or options.batch < 1 or options.batch % options.ranks:
        raise ConfigError(f"--batch ({options.batch}) must be a multiple of --ranks ({options.ranks}), both above 0")
    config = DataConfig(train=options.data, workers=options.workers, global_batch=options.batch,
                        weights=options.weights, block_shards=options.block_shards, lanes=options.lanes,
                        tail=options.tail)  # fmt: skip
    split = validate(Config(data=config), options.ranks)
    index = open_shards("DATA", options.data, Path("."))
    assert index is not None
    length = open_stream(config, index, options.seed).epoch_samples
    if options.epoch < 0:
        raise ConfigError(f"--epoch ({options.epoch}) must be 0 or above")
    if not length:
        raise ConfigError(f"--tail (drop) leaves nothing of {len(index)} images, less than --batch ({options.batch})")
    start, stop = options.epoch * length, (options.epoch + 1) * length
    cursor = start if options.cursor is None else options.cursor
    if not start <= cursor <= stop:
        raise ConfigError(f"--from ({cursor}) is not in epoch {options.epoch}, which is [{start}, {stop})")
    first_step, end_step = cursor // options.batch, -(-stop // options.batch)
    streams = [
        train_batches(
            config, index, seed=options.seed, size=CROP_PX, split=split, start_step=first_step, total_steps=end_step,
            topology=Topology(rank, options.ranks, rank, options.ranks, torch.device("cpu"), "none"),
        )
        for rank in range(options.ranks)
    ]  # fmt: skip
    for step, batches in enumerate(zip(*streams, strict=True), start=first_step):
        for rank, batch in enumerate(batches):
            begin = step * options.batch + rank * split.micro_batch
            for skip in batch.skipped:
                print(f"skipped: {skip.reason}", file=sys.stderr)
            for i, (sample_id, key) in enumerate(zip(batch.sample_ids.tolist(), batch.keys.tolist(), strict=True)):
                if cursor <= begin + i < stop:
                    number, place = (int(x) for x in index.locate(sample_id))
                    name = bytes(index.table(number).keys[place]).decode(errors="surrogateescape")
                    seeds = dict(crop=draw(key, CROP, 0), flip=draw(key, FLIP, 0), mask=draw(key, MASK, 0))
                    yield dict(step=step, rank=rank, sample_id=sample_id, key=name, **seeds)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    try:
        if not options.json:
            print("step\trank\tsample_id\tkey\tcrop\tflip\tmask")
        for row in rows(options):
            print(json.dumps(row) if options.json else "\t".join(str(value) for value in row.values()))
    except (ConfigError, DataError) as error:
        print(f"list_epoch: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
