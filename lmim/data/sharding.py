"""Writing tar shards of images, and indexing tars that exist.

Owns what goes into a shard (the format is told in `shards`, its files until they have their names are `unfinished`'s).
The invariant: which images belong to which shard, and in what order, is fixed before a byte is read, by the source's
list and the options alone. So a shard can be written by any worker, in any run, and gives the same bytes; an image that
is broken only makes its shard shorter.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from PIL import Image

from lmim.config import ConfigError
from lmim.data.plan import shuffled
from lmim.data.pool import Report, run_tasks
from lmim.data.progress import Done
from lmim.data.shards import BLOCK, MAX_MEMBER, Shard, ShardIndex, ShardTable, Skipped, checksum, scan_tar
from lmim.data.sources import Source, SourceImage
from lmim.data.storage import Storage, is_remote
from lmim.data.transforms import BROKEN_FILE, FORMATS, MAX_PIXELS, ImageError, decode_rgb, shrink
from lmim.data.unfinished import (
    UNFINISHED,
    Plan,
    Record,
    begin,
    claimed,
    finish,
    read_record,
    running,
    shard_name,
    write_record,
)
from lmim.randomness import fold, purpose

logger = logging.getLogger(__name__)
WRITE_ORDER = purpose("write order")
CHECKS = ("quick", "decode")
TAR_RECORD = 10_240  # bytes: tar files end with zeros up to a multiple of it
TAIL = 64  # bytes at the end in which a sound JPEG has its end marker
CHUNK = 1 << 20  # bytes


class ShardPlan(NamedTuple):
    """The plan of a source's shards: the order of its images, and where in it each shard begins and the last ends."""

    source: Source
    order: np.ndarray
    bounds: np.ndarray
    plan: Plan


# --- which images go where -------------------------------------------------------------------------------------------


def plan_shards(source: Source, *, samples_per_shard: int = 10_000, shard_bytes: int = 1 << 30, seed: int | None = 0,
                short_side: int | None = None, jpeg_quality: int = 90, check: str = "quick") -> ShardPlan:  # fmt: skip
    """Fix what `write_shards` writes. Raises `ConfigError` for wrong options and where two images share a key."""
    options = dict(samples_per_shard=samples_per_shard, shard_bytes=shard_bytes, seed=seed, short_side=short_side,
                   jpeg_quality=jpeg_quality, check=check)  # fmt: skip
    _check_options(options)
    count = len(source.images)
    takes, keys = np.empty(count, np.int64), np.empty(count, np.uint64)
    listing = hashlib.sha256()
    for i, image in enumerate(source.images):
        listing.update(f"{image.path}\0{image.key}\0{image.suffix}\0{image.label}\0{image.size}\n".encode(
            errors="surrogateescape"))  # fmt: skip
        keys[i] = xxhash.xxh3_64_intdigest(image.key.encode(errors="surrogateescape"))
        takes[i] = BLOCK + -(-image.size // BLOCK) * BLOCK + (0 if image.label is None else 2 * BLOCK)
    _refuse_shared_keys(source, keys)
    order = np.arange(count) if seed is None else _shuffled_order(source, fold(0, seed))
    bounds = _bounds(takes[order], samples_per_shard, shard_bytes)
    skipped = tuple(Skipped(path, "not named like an image") for path in source.other_files)
    listing.update("\n".join(source.other_files).encode(errors="surrogateescape"))
    plan = Plan(source.name, options, listing.hexdigest(), len(bounds) - 1, count, source.classes, skipped)
    return ShardPlan(source, order, bounds, plan)


def _check_options(options: dict[str, Any]) -> None:
    for option in ("samples_per_shard", "shard_bytes", "short_side"):
        if options[option] is not None and options[option] < 1:
            raise ConfigError(f"{option} ({options[option]}) must be at least 1")
    if not 1 <= options["jpeg_quality"] <= 100:
        raise ConfigError(f"jpeg_quality ({options['jpeg_quality']}) must be in [1, 100]")
    if options["seed"] is not None and not 0 <= options["seed"] < 1 << 63:
        raise ConfigError(f"seed ({options['seed']}) must be in [0, 2**63)")
    if options["check"] not in CHECKS:
        raise ConfigError(f"check ({options['check']}) must be one of {', '.join(CHECKS)}")


def _refuse_shared_keys(source: Source, hashes: np.ndarray) -> None:
    """Raise ConfigError where two images share a key; 14 million of the hashes collide once in 190,000 sources."""
    found, counts = np.unique(hashes, return_counts=True)
    if (counts > 1).any():
        same = np.flatnonzero(hashes == found[counts > 1][0])
        raise ConfigError(f"{source.name}: {len(same)} images share the key {source.images[int(same[0])].key}: "
                          "rename all but one")  # fmt: skip


def _shuffled_order(source: Source, key: int) -> np.ndarray:
    """Return the images' numbers shuffled: groups, which are read as a whole, among each other and within."""
    numbers = np.arange(len(source.images))
    if source.groups is None:
        return shuffled(key, WRITE_ORDER, numbers)
    groups = np.split(numbers, source.groups[1:])
    order = shuffled(key, WRITE_ORDER, np.arange(len(groups)))
    return np.concatenate([shuffled(key, WRITE_ORDER, groups[group]) for group in order.tolist()])


def _bounds(takes: np.ndarray, most_samples: int, most_bytes: int) -> np.ndarray:
    """Return where shards begin and end (shards + 1,), for samples that take so many bytes of a tar."""
    ends = np.cumsum(takes)
    bounds, start, before = [0], 0, 0
    while start < len(ends):
        fits = int(np.searchsorted(ends, before + most_bytes, side="right"))
        start = max(start + 1, min(start + most_samples, fits))
        before = int(ends[start - 1])
        bounds.append(start)
    return np.array(bounds)


# --- running a plan --------------------------------------------------------------------------------------------------


def write_shards(source: Source, folder: str | Path, *, overwrite: bool = False, workers: int = 1,
                 part: tuple[int, int] = (1, 1), progress: Callable[[Done], None] | None = None,
                 **options: Any) -> ShardIndex | None:  # fmt: skip
    """Write a source as tar shards with an index and return the index, None where other parts are still to be written.

    A shard ends at `samples_per_shard` (10,000) or before `shard_bytes` (1 GiB), by the sizes of the source's files.
    The order is shuffled by `seed` (0); None keeps it. Bytes pass through untouched, but an image whose short side
    exceeds `short_side` px is made smaller and stored as JPEG of `jpeg_quality` (90). An image that is broken is
    skipped, logged, and named in the index; `check` "decode" decodes each, "quick" only where header and end leave
    doubt. `part` (i, n) writes every n-th shard, from the i-th on; the part that finishes last makes the index.

    A run that was stopped goes on where it was. Raises `ConfigError` for a folder that holds other shards, unless
    `overwrite`, where two images share a key, and where none is sound; `pool.WorkerDied` where a worker process did.
    """
    plan = plan_shards(source, **options)
    return run_plan(plan, folder, overwrite=overwrite, workers=workers, part=part, progress=progress)


def run_plan(
    plan: ShardPlan, folder: str | Path, *, overwrite: bool = False, workers: int = 1,
    part: tuple[int, int] = (1, 1), progress: Callable[[Done], None] | None = None,
) -> ShardIndex | None:  # fmt: skip
    """Write the shards of a plan; see `write_shards`."""
    source, order, bounds, _ = plan

    def task(number: int) -> tuple[int, Sequence[SourceImage]]:
        return number, [source.images[i] for i in order[bounds[number] : bounds[number + 1]].tolist()]

    work = partial(_write_shard, plan.plan.identity, plan.plan.options, Path(folder))
    sizes = [(count, 0) for count in np.diff(bounds).tolist()]
    return _run(plan.plan, Path(folder), task, work, sizes, overwrite, workers, part, progress)


def index_tars(paths: Sequence[str | Path], folder: str | Path, *, check: str = "quick", overwrite: bool = False,
               workers: int = 1, part: tuple[int, int] = (1, 1),
               progress: Callable[[Done], None] | None = None) -> ShardIndex | None:  # fmt: skip
    """Write the index of tars that stay where they are into a folder and return it; see `write_shards`.

    Broken images are left out of the index. The shards are named by their whole paths or addresses, but those that lie
    in the folder by their names.
    """
    if not paths:
        raise ConfigError("SRC holds no tars: give a folder, a glob or a brace range of them")
    if check not in CHECKS:
        raise ConfigError(f"check ({check}) must be one of {', '.join(CHECKS)}")
    tars = [str(path) if is_remote(str(path)) else str(Path(path).absolute()) for path in paths]
    storage = Storage()
    sizes = [(0, storage.size(tar)) for tar in tars]
    words = "".join(f"{tar}\0{size}\n" for tar, (_, size) in zip(tars, sizes, strict=True))
    listing = hashlib.sha256(words.encode()).hexdigest()
    plan = Plan(f"{len(tars)} tars", dict(index_only=True, check=check), listing, len(tars), 0, None, ())
    work = partial(_index_tar, plan.identity, check, Path(folder))
    return _run(plan, Path(folder), lambda n: (n, tars[n]), work, sizes, overwrite, workers, part, progress)


def _run(plan: Plan, folder: Path, task: Callable[[int], Any], work: Callable[[Any, Report], int],
         sizes: Sequence[tuple[int, int]], overwrite: bool, workers: int, part: tuple[int, int],
         progress: Callable[[Done], None] | None) -> ShardIndex | None:  # fmt: skip
    """Do the tasks of a plan that are not done, and finish it; `sizes` are images and bytes of each shard."""
    if workers < 1 or not 1 <= part[0] <= part[1]:
        raise ConfigError(
            f"workers ({workers}) must be at least 1, and part ({part[0]}/{part[1]}) i/n with 1 <= i <= n"
        )
    if begin(folder, plan, overwrite):
        return ShardIndex.open(folder, option="DST")
    mine = range(part[0] - 1, plan.shards, part[1])
    waiting = [number for number in mine if read_record(folder, number, plan.identity) is None]
    images_total, bytes_total = (sum(sizes[number][k] for number in mine) for k in range(2))
    images, size_bytes = (total - sum(sizes[number][k] for number in waiting)
                          for k, total in enumerate((images_total, bytes_total)))  # fmt: skip

    def report(more_images: int, more_bytes: int) -> None:
        nonlocal images, size_bytes
        images, size_bytes = images + more_images, size_bytes + more_bytes
        if progress is not None:
            progress(Done(images, images_total, size_bytes, bytes_total))

    report(0, 0)
    tasks = ((f"{shard_name(number)} of {folder}", task(number)) for number in waiting)
    with running(folder, part):
        for _ in run_tasks(work, tasks, workers=max(1, min(workers, len(waiting))), report=report):
            pass
        index = finish(folder)
    return None if isinstance(index, int) else index


# --- one shard -------------------------------------------------------------------------------------------------------


class _Rows:
    """The table of a shard while it is made."""

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, bytes, int, int, int, int, int, int]] = []

    def add(self, key: str, suffix: str, offset: int, data: bytes, label: int | None, size: tuple[int, int]) -> None:
        label = -1 if label is None else label
        names = (key.encode(errors="surrogateescape"), suffix.encode())
        self.rows.append((*names, offset, len(data), label, checksum(data), *size))

    def save(self, path: Path) -> None:
        """Write the table, and beside what readers need the widths and heights for the index."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * 8
        names = (*ShardTable._fields, "widths", "heights")
        kinds = (np.bytes_, np.bytes_, *[np.int64] * 4, np.int32, np.int32)
        arrays = {name: np.array(column, kind) for name, column, kind in zip(names, columns, kinds, strict=True)}
        with claimed(path) as file:
            np.savez_compressed(file, **arrays)


def _write_shard(identity: str, options: dict[str, Any], folder: Path, task: tuple[int, Sequence[SourceImage]],
                 report: Report) -> int:  # fmt: skip
    """Write one tar, its table and its record into the folder of unfinished files, and return its number."""
    number, images = task
    work, name = folder / UNFINISHED, shard_name(number)
    rows, skipped, digest, at = _Rows(), [], hashlib.sha256(), 0
    with claimed(work / f"{name}.tar") as file:
        for image in images:
            read_bytes = 0
            try:
                data = image.read()
                read_bytes = len(data)
                data, suffix, size = _checked(data, image.suffix, options)
            except (ImageError, OSError) as error:
                reason = str(error) if isinstance(error, ImageError) else f"cannot be read: {error.strerror}"
                logger.info("skipped %s: %s", image.path, reason)
                skipped.append(Skipped(image.path, reason))
            else:
                header = _tar_header(f"{image.key}.{suffix}", len(data))
                rows.add(image.key, suffix, at + len(header), data, image.label, size)
                label = b"" if image.label is None else str(image.label).encode()
                label_header = _tar_header(f"{image.key}.cls", len(label)) if label else b""
                rest = b"".join((_padding(len(data)), label_header, label, _padding(len(label))))
                for piece in (header, data, rest):
                    file.write(piece)
                    digest.update(piece)
                    at += len(piece)
            report(1, read_bytes)
        end = bytes(2 * BLOCK + -(at + 2 * BLOCK) % TAR_RECORD)
        file.write(end)
        digest.update(end)
    rows.save(work / f"{name}.npz")
    shard = Shard(f"{name}.tar", len(rows.rows), at + len(end), digest.hexdigest(), f"{name}.npz")
    write_record(work, number, Record(identity, shard, len(images), skipped))
    return number


def _tar_info(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")


_HEADER = _tar_info("", 0)
_HEADER_SUM = sum(_HEADER[:148]) + 8 * ord(" ") + sum(_HEADER[156:])  # its checksum counts as blanks


def _tar_header(name: str, size: int) -> bytes:
    """Return what tarfile makes of a name and size, in a tenth of its 30 us for short names."""
    if len(name) > 100 or not name.isascii():
        return _tar_info(name, size)
    letters, digits = name.encode(), b"%011o" % size
    total = _HEADER_SUM + sum(letters) + sum(digits) - 11 * ord("0")
    return b"".join((letters.ljust(100, b"\0"), _HEADER[100:124], digits, _HEADER[135:148], b"%06o\0 " % total,
                     _HEADER[156:]))  # fmt: skip


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _index_tar(identity: str, check: str, folder: Path, task: tuple[int, str], report: Report) -> int:
    """Write the table and the record of a tar that stays where it is, and return its number."""
    number, path = task
    work, name = folder / UNFINISHED, shard_name(number)
    rows, skipped, digest = _Rows(), [], hashlib.sha256()
    with open_here(path, Storage()) as file:
        table = scan_tar(path, file)
        for row, data in read_through(file, table, digest, report):
            key = bytes(table.keys[row]).decode(errors="surrogateescape")
            suffix, label = bytes(table.suffixes[row]).decode(), int(table.labels[row])
            try:
                size = look_at(data, decode=check == "decode")[1]
            except ImageError as error:
                skipped.append(Skipped(f"{path}: {key}.{suffix}", str(error)))
            else:
                rows.add(key, suffix, int(table.offsets[row]), data, label, size)
        size_bytes = file.tell()
    rows.save(work / f"{name}.npz")
    place = os.path.basename(path) if os.path.dirname(path) == str(folder.absolute()) else path
    shard = Shard(place, len(rows.rows), size_bytes, digest.hexdigest(), f"{name}.npz")
    write_record(work, number, Record(identity, shard, len(table.keys), skipped))
    return number


def open_here(url: str, storage: Storage) -> BinaryIO:
    """Open a local tar, or a passing copy of a remote one, of which every byte is to be read."""
    if not is_remote(url):
        return open(url, "rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115  whoever asked closes it
    file.writelines(storage.fetch(url))
    file.seek(0)
    return file


def read_through(file: BinaryIO, table: ShardTable, digest: Any, report: Report) -> Iterator[tuple[int, bytes]]:
    """Read a tar once from end to end into `digest`, and yield (place, bytes) of the images of its table on the way."""
    file.seek(0)
    at = 0
    for place, (offset, size) in enumerate(zip(table.offsets.tolist(), table.sizes.tolist(), strict=True)):
        gap, data = file.read(offset - at), file.read(size)
        digest.update(gap)
        digest.update(data)
        at = offset + size
        yield place, data
        report(1, len(gap) + size)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        report(0, len(chunk))


# --- one image -------------------------------------------------------------------------------------------------------


def _checked(data: bytes, suffix: str | None, options: dict[str, Any]) -> tuple[bytes, str, tuple[int, int]]:
    """Return an image as it is stored, its suffix, and (width, height); raises `ImageError`."""
    if len(data) > MAX_MEMBER:
        raise ImageError(f"{len(data)} bytes are more than the {MAX_MEMBER} allowed")
    if options["short_side"] is not None:
        smaller = shrink(decode_rgb(data), options["short_side"], options["jpeg_quality"])
        if smaller is not None:
            data, suffix = smaller, "jpg"
    file_format, size = look_at(data, decode=options["check"] == "decode" and options["short_side"] is None)
    return data, suffix or FORMATS[file_format][0], size


def look_at(data: bytes, *, decode: bool) -> tuple[str, tuple[int, int]]:
    """Return the format and (width, height) of a sound image; raises `ImageError` for others.

    Unless `decode`, the pixels are only decoded where the header or the end of the file leaves doubt, so that flipped
    bits between the two go unnoticed; what is cut off does not.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            file_format, size = str(image.format), image.size
    except BROKEN_FILE:
        return "", decode_rgb(data).size  # raises, and says why
    if decode or size[0] * size[1] > MAX_PIXELS or not _is_whole(data, file_format):
        decode_rgb(data)
    return file_format, size


def _is_whole(data: bytes, file_format: str) -> bool:
    """Tell whether the end of a JPEG, PNG or WebP file is there; False for other formats, which have no sure mark."""
    if file_format == "JPEG":
        return b"\xff\xd9" in data[-TAIL:]  # cannot occur in the coded pixels
    if file_format == "PNG":
        return data.endswith(b"IEND\xaeB`\x82")
    return file_format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 <= len(data)
