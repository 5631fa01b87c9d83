"""Writing tar shards of images, with their index.

Owns the files of a data set until they have their names (the format is told in `shards`). The invariant: the same
source and options give byte-identical files, and a folder holds `index.json` only when all it names is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset import TarWriter

from lmim.config import ConfigError
from lmim.data.datasets import Source, SourceImage
from lmim.data.plan import shuffled
from lmim.data.shards import BLOCK, FORMAT, INDEX, MAX_MEMBER, VERSION, Shard, ShardIndex, Skipped, checksum, scan_tar
from lmim.data.transforms import ImageError, decode_rgb, shrink
from lmim.randomness import fold, purpose

logger = logging.getLogger(__name__)
PART = ".part"  # ends the names of files of a run that is not finished
OURS = re.compile(r"shard-\d{6}\.(tar|npz)(\.part)?")
WRITE_ORDER = purpose("write order")


class _Verified(NamedTuple):
    key: str
    suffix: str
    data: bytes
    label: int | None


def write_shards(source: Source, folder: str | Path, *, samples_per_shard: int = 10_000, shard_bytes: int = 1 << 30,
                 seed: int | None = 0, short_side: int | None = None, jpeg_quality: int = 90, overwrite: bool = False,
                 progress: Callable[[int, int], None] | None = None) -> ShardIndex:  # fmt: skip
    """Write a source as tar shards with an index and return the index.

    A shard ends at `samples_per_shard` or before `shard_bytes`. The order is shuffled by `seed`; None keeps it. Bytes
    pass through untouched, but an image whose short side exceeds `short_side` px is made smaller and stored as JPEG.
    Each image is decoded once; one that is broken is skipped, logged, and named in the index. `progress` is called
    with (images done, images in all). Raises `ConfigError` for a folder that holds shards already, unless `overwrite`,
    where two images share a key, and where none can be decoded. Files get their names when all are written: a run that
    was stopped leaves no shards behind, and what it was to overwrite untouched.
    """
    folder = Path(folder)
    _check_options(samples_per_shard, shard_bytes, short_side, jpeg_quality, seed)
    key, times = Counter(image.key for image in source.images).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{source.name}: {times} images share the key {key}: rename all but one")
    prepare_folder(folder, overwrite)
    order = np.arange(len(source.images))
    if seed is not None:
        order = shuffled(fold(0, seed), WRITE_ORDER, order)
    skipped = [Skipped(path, "not named like an image") for path in source.other_files]
    images = (source.images[i] for i in _counted(order, progress))
    verified = _verify(images, skipped, short_side, jpeg_quality)
    shards = []
    for number, group in itertools.groupby(_number(verified, samples_per_shard, shard_bytes), key=lambda pair: pair[0]):
        shards.append(_write_shard(folder, f"shard-{number:06d}.tar", (sample for _, sample in group)))
    if not shards:
        raise ConfigError(f"{source.name}: none of {len(source.images)} images can be decoded, "
                          f"such as {skipped[-1].path}: {skipped[-1].reason}")  # fmt: skip
    _name_files(folder, shards)
    index = ShardIndex(folder, shards, classes=source.classes, skipped=sorted(skipped))
    _write_index(index)
    return index


def _check_options(samples_per_shard: int, shard_bytes: int, short_side: int | None, jpeg_quality: int,
                   seed: int | None) -> None:  # fmt: skip
    counts = dict(samples_per_shard=samples_per_shard, shard_bytes=shard_bytes, short_side=short_side)
    for option, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} ({value}) must be at least 1")
    if not 1 <= jpeg_quality <= 100:
        raise ConfigError(f"jpeg_quality ({jpeg_quality}) must be in [1, 100]")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed ({seed}) must be in [0, 2**63)")


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make a folder ready to take shards, or raise ConfigError for one that holds any and is not to be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"DST ({folder}) is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not overwrite and ((folder / INDEX).exists() or any(folder.glob("*.tar"))):
        raise ConfigError(f"DST ({folder}) holds shards already: choose another folder, or --overwrite them")
    for path in folder.glob("*" + PART):
        if OURS.fullmatch(path.name):
            path.unlink()


def _name_files(folder: Path, shards: list[Shard]) -> None:
    """Put the finished files in place of what the folder held, which is no data set until the index is written."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name) and path.suffix != PART:
            path.unlink()
    for shard in shards:
        for name in (shard.table, shard.name):
            os.replace(folder / (name + PART), folder / name)


def _counted(order: np.ndarray, progress: Callable[[int, int], None] | None) -> Iterator[int]:
    for done, i in enumerate(order.tolist()):
        yield i
        if progress is not None:
            progress(done + 1, len(order))


def _verify(images: Iterable[SourceImage], skipped: list[Skipped], short_side: int | None,
            jpeg_quality: int) -> Iterator[_Verified]:  # fmt: skip
    """Yield what decodes, made smaller where asked for; append what does not to `skipped`."""
    for image in images:
        try:
            data = image.read()
            if len(data) > MAX_MEMBER:
                raise ImageError(f"{len(data)} bytes are more than the {MAX_MEMBER} allowed")
            decoded = decode_rgb(data)
        except (ImageError, OSError) as error:
            reason = str(error) if isinstance(error, ImageError) else f"cannot be read: {error.strerror}"
            logger.info("skipped %s: %s", image.path, reason)
            skipped.append(Skipped(image.path, reason))
            continue
        smaller = None if short_side is None else shrink(decoded, short_side, jpeg_quality)
        suffix = image.suffix if smaller is None else "jpg"
        yield _Verified(image.key, suffix, smaller or data, image.label)


def _number(samples: Iterable[_Verified], most_samples: int, most_bytes: int) -> Iterator[tuple[int, _Verified]]:
    """Pair each sample with the number of its shard."""
    number = count = size = 0
    for sample in samples:
        members = [len(sample.data)] if sample.label is None else [len(sample.data), 1]
        takes = sum(BLOCK + -(-member // BLOCK) * BLOCK for member in members)
        if count and (count == most_samples or size + takes > most_bytes):
            number, count, size = number + 1, 0, 0
        count, size = count + 1, size + takes
        yield number, sample


def _write_shard(folder: Path, name: str, samples: Iterable[_Verified]) -> Shard:
    """Write one tar, and its table from what the tar's headers then say, both under provisional names."""
    part = folder / (name + PART)
    with open(part, "wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for sample in samples:
            label = {} if sample.label is None else {"cls": str(sample.label).encode()}
            tar.write({"__key__": sample.key, sample.suffix: sample.data, **label})
    table = scan_tar(part)
    with open(part, "rb") as written:
        images = (os.pread(written.fileno(), size, at) for size, at in zip(table.sizes.tolist(), table.offsets.tolist()))
        table = table._replace(checksums=np.array([checksum(image) for image in images], np.int64))
    table_name = Path(name).stem + ".npz"
    with open(folder / (table_name + PART), "wb") as table_file:
        np.savez_compressed(table_file, **table._asdict())
    digest = hashlib.sha256()
    with open(part, "rb") as written:
        while chunk := written.read(1 << 20):
            digest.update(chunk)
    return Shard(name, len(table.keys), part.stat().st_size, digest.hexdigest(), table_name)


def _write_index(index: ShardIndex) -> None:
    labels = index.labels()
    image_bytes = sum(int(index.table(number).sizes.sum()) for number in range(len(index.shards)))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "samples": len(index),
        "mean_image_bytes": round(image_bytes / len(index), 1),
        "classes": index.classes,
        "class_counts": index.classes and np.bincount(labels, minlength=len(index.classes)).tolist(),
        "shards": [shard._asdict() for shard in index.shards],
        "skipped": [skipped._asdict() for skipped in index.skipped],
    }
    part = Path(index.folder, INDEX + PART)
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    os.replace(part, Path(index.folder, INDEX))
