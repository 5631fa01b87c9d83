"""The rows of `bench.py data`: from image files to crops, by lmim and by others, on the same photos.

Every loader reads what it reads best, written at the start: lmim and webdataset the same tar shards, litdata and
mosaicml-streaming formats of their own, with the same image bytes. The crop is either the usual one (Pillow and
torchvision, to normalised floats) or lmim's (to uint8). A loader has one worker and shares one core with it, so that
its rate compares with the bare loop's.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import simplejpeg
import torch
import webdataset as wds
from bench import Row, measure_rows, print_table, write_record
from PIL import Image
from rich.console import Console
from torchvision import transforms as tv

from lmim.config import ConfigError, Split
from lmim.data.datasets import open_source
from lmim.data.loader import train_batches
from lmim.data.sharding import write_shards
from lmim.data.shards import ShardIndex, ShardReader
from lmim.data.sources import Source
from lmim.data.transforms import DECODERS, train_view
from lmim.dist import Topology
from lmim.options import DataConfig

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SHORT_SIDE, QUALITY = 320, 90
WARMUP_BATCHES = 8  # a loader's memory has then been touched, and its queue is full
COPIES = 3  # of each photo, so that there are batches to measure after those
SAMPLES_PER_SHARD = 100
USUAL, TURBO = "PIL + torchvision", f"lmim {DECODERS[0]}"

Crop = Callable[[bytes], torch.Tensor]


class UsualCrop:
    """The pipeline as people write it: Pillow, RandomResizedCrop, ToTensor, Normalize."""

    def __init__(self, size: int):
        self.transform = tv.Compose([
            tv.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, interpolation=tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])  # fmt: skip

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB"))


class LmimCrop:
    """lmim's crop with its flip, by a key that counts up."""

    def __init__(self, size: int, decoder: str):
        self.size, self.decoder, self.key = size, decoder, 0

    def __call__(self, data: bytes) -> torch.Tensor:
        self.key += 1
        return torch.from_numpy(train_view(data, self.size, SCALE, RATIO, True, self.key, decoder=self.decoder))


# --- what the rows run: each yields after a batch --------------------------------------------------------------------


def decode_only(images: list[bytes], batch: int) -> Iterator[None]:
    """Decode whole JPEGs with libjpeg-turbo."""
    endless = itertools.cycle(images)
    while True:
        for data in itertools.islice(endless, batch):
            simplejpeg.decode_jpeg(data)
        yield


def crop_loop(images: list[bytes], crop: Crop, batch: int) -> Iterator[None]:
    """Decode and crop, without a loader and without stacking batches."""
    endless = itertools.cycle(images)
    while True:
        for data in itertools.islice(endless, batch):
            crop(data)
        yield


def lmim_loader(folder: Path, size: int, batch: int, workers: int, steps: int) -> Iterator[Any]:
    """Read shards through lmim's loader."""
    config = DataConfig(workers=workers, global_batch=batch, crop_scale=list(SCALE), crop_ratio=list(RATIO))
    topology = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
    return train_batches(config, ShardIndex.open(folder), seed=0, size=size, split=Split(1, batch, 1),
                         topology=topology, start_step=0, total_steps=steps)  # fmt: skip


def webdataset_loader(folder: Path, crop: Crop, batch: int) -> Iterator[Any]:
    """Read the same shards through plain webdataset."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    images = wds.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None).shuffle(SAMPLES_PER_SHARD)
    crops = images.map(lambda sample: crop(sample["jpg"])).batched(batch, collation_fn=torch.stack)
    yield from wds.WebLoader(crops, batch_size=None, num_workers=1, worker_init_fn=one_thread)


def litdata_loader(folder: Path, crop: Crop, batch: int) -> Iterator[Any]:
    """Read litdata's chunks through its loader."""
    import litdata

    class Crops(litdata.StreamingDataset):
        def __getitem__(self, place: Any) -> torch.Tensor:
            return crop(super().__getitem__(place))

    yield from litdata.StreamingDataLoader(Crops(str(folder), shuffle=True), batch_size=batch, num_workers=1,
                                           collate_fn=torch.stack, worker_init_fn=one_thread)  # fmt: skip


def mosaic_loader(folder: Path, crop: Crop, batch: int) -> Iterator[Any]:
    """Read MosaicML's MDS shards through its data set."""
    import streaming

    class Crops(streaming.StreamingDataset):
        def __getitem__(self, place: int) -> torch.Tensor:
            return crop(super().__getitem__(place)["image"])

    streaming.base.util.clean_stale_shared_memory()
    crops = Crops(local=str(folder), shuffle=True, batch_size=batch)
    yield from torch.utils.data.DataLoader(crops, batch_size=batch, num_workers=1, collate_fn=torch.stack,
                                           worker_init_fn=one_thread)  # fmt: skip


def one_thread(worker_id: int) -> None:
    """Keep a worker to one thread."""
    torch.set_num_threads(1)


# --- the files they read ---------------------------------------------------------------------------------------------


def write_litdata(images: list[bytes], folder: Path) -> None:
    """Write image bytes as litdata's chunks."""
    import litdata

    litdata.optimize(images.__getitem__, list(range(len(images))), str(folder), chunk_bytes="64MB", num_workers=1,
                     verbose=False)  # fmt: skip
    multiprocessing.set_start_method("fork", force=True)  # litdata leaves "spawn" behind, for every loader to come


def write_mosaic(images: list[bytes], folder: Path) -> None:
    """Write image bytes as MosaicML's MDS shards."""
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"image": "bytes"}) as writer:
        for data in images:
            writer.write({"image": data})


FOREIGN = {"litdata": (write_litdata, litdata_loader), "mosaicml-streaming": (write_mosaic, mosaic_loader)}


def rows_of(files: str, shards: Path, scratch: Path, *, size: int, batch: int, steps: int) -> list[Row]:
    """Write the formats of others beside `shards` and return the rows that read these files."""
    reader = ShardReader(ShardIndex.open(shards))
    images = [reader.read(sample_id).image for sample_id in range(len(reader.index))]
    cores = sorted(os.sched_getaffinity(0))
    one, two = cores[:1], cores[:2]
    usual, turbo = UsualCrop(size), LmimCrop(size, DECODERS[0])
    rows = [
        Row("libjpeg-turbo, whole image", files, "none", one, partial(decode_only, images, batch)),
        Row("loop", files, USUAL, one, partial(crop_loop, images, usual, batch)),
        *(Row("loop", files, f"lmim {name}", one, partial(crop_loop, images, LmimCrop(size, name), batch))
          for name in reversed(DECODERS)),  # the default's loop beside its loader: speed drifts, neighbours compare
        Row("lmim loader, 1 worker", files, TURBO, one, partial(lmim_loader, shards, size, batch, 1, steps)),
        Row("lmim loader, 2 workers, 2 cores", files, TURBO, two, partial(lmim_loader, shards, size, batch, 2, steps))
        if len(two) == 2 else Row("lmim loader, 2 workers", files, TURBO, one, None, "needs 2 cores"),
    ]  # fmt: skip
    rows += [Row("webdataset, 1 worker", files, name, one, partial(webdataset_loader, shards, crop, batch))
             for name, crop in ((USUAL, usual), (TURBO, turbo))]  # fmt: skip
    for library, (write, load) in FOREIGN.items():
        folder, missing = scratch / f"{library}_{files}", ""
        try:
            write(images, folder)
        except ImportError as error:
            missing = f"{error.name} is not installed"
        rows += [Row(f"{library}, 1 worker", files, name, one, None if missing else partial(load, folder, crop, batch),
                     missing) for name, crop in ((USUAL, usual), (TURBO, turbo))]  # fmt: skip
    return rows


def repeated(photos: Source) -> Source:
    """Return a source with every image several times, under other keys."""
    images = [replace(image, key=f"{image.key}-{n}") for n in range(COPIES) for image in photos.images]
    return replace(photos, images=images, groups=None)


def run_data(options: argparse.Namespace) -> int:
    """Run `bench.py data` and return its exit code."""
    logging.getLogger("streaming").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        photos = repeated(open_source(options.photos, option="--photos"))
    except ConfigError as error:
        print(f"bench: {error}; make_photos.py makes the photos", file=sys.stderr)
        return 2
    steps = len(photos.images) // options.batch
    timed = steps - WARMUP_BATCHES
    if timed < 1:
        print(f"bench: --batch ({options.batch}) is too large for {len(photos.images)} photos: at least "
              f"{WARMUP_BATCHES + 1} batches are needed", file=sys.stderr)  # fmt: skip
        return 2
    originals, shrunken = "photos", f"short side {SHORT_SIDE}"
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows: list[Row] = []
        for files, short_side in ((originals, None), (shrunken, SHORT_SIDE)):
            Console(stderr=True).print(f"writing {files} as shards, litdata and MDS")
            shards = Path(scratch, files)
            write_shards(photos, shards, samples_per_shard=SAMPLES_PER_SHARD, short_side=short_side,
                         jpeg_quality=QUALITY)  # fmt: skip
            rows += rows_of(files, shards, Path(scratch), size=options.size, batch=options.batch, steps=steps)
        measure_rows(rows, rounds=options.rounds, batch=options.batch, warmup=WARMUP_BATCHES, timed=timed)
    loops = {(row.data, row.crop): row for row in rows if row.name == "loop"}
    print_table(
        f"From files to crops of {options.size} px: {timed * options.batch} images a round, {options.rounds} rounds",
        rows,
        {
            "x usual, photos": lambda row: loops[originals, USUAL],
            "x usual, same files": lambda row: loops[row.data, USUAL],
            f"x loop {TURBO}": lambda row: loops[row.data, TURBO],
        },
    )
    if options.json:
        settings = dict(photos=len(photos.images) // COPIES, copies=COPIES, size_px=options.size,
                        batch=options.batch, rounds=options.rounds,
                        images_per_round=timed * options.batch, crop_scale=SCALE, crop_ratio=RATIO,
                        short_side_px=SHORT_SIDE, jpeg_quality=QUALITY)  # fmt: skip
        print(write_record("data", rows, **settings))
    return 0
