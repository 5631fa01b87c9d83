"""Tar shards of images: writing them, their index, reading a sample by its number, and the order of an epoch.

Owns the format on disk: `shard-000000.tar` holds per sample KEY.EXT (the image file's bytes) and, where labelled,
KEY.cls (the label in ASCII), so any webdataset reader opens it; `shard-000000.npz` holds where each image lies;
`index.json`, written last, makes the folder a data set. Plain tar shards from elsewhere are indexed in memory.
The invariants: a sample's id is its place in the shards' order; the same source and options give byte-identical
files; the order of an epoch is a function of (seed, epoch) alone, and every sample comes exactly once in it.

Nothing is ever extracted: members are read by offset, and only regular ones with relative names below `MAX_MEMBER`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
from webdataset import TarWriter

from lmim.config import ConfigError
from lmim.data.datasets import Source, SourceImage, holds_images
from lmim.data.transforms import IMAGE_SUFFIXES, ImageError, decode_rgb, shrink
from lmim.randomness import draw, fold, purpose

logger = logging.getLogger(__name__)
FORMAT, VERSION = "lmim-shards", 1
INDEX = "index.json"
PART = ".part"  # ends the names of files of a run that is not finished
OURS = re.compile(r"shard-\d{6}\.(tar|npz)(\.part)?")
MAX_MEMBER = 256 << 20  # bytes
BLOCK = 512  # bytes: tar's unit
OPEN_FILES, OPEN_TABLES, OPEN_BLOCKS = 128, 256, 2  # kept at a time by a reader, an index and a plan
WRITE_ORDER, SHARD_ORDER, SAMPLE_ORDER = purpose("write order"), purpose("shard order"), purpose("sample order")
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's rule for key and suffix
K = TypeVar("K")
V = TypeVar("V")


class Shard(NamedTuple):
    """A tar file of the data set: name, samples, size in bytes, checksum (None where it was not written by us)."""

    name: str
    samples: int
    bytes: int
    sha256: str | None


class Skipped(NamedTuple):
    """A file of the source that is not in the shards, and why."""

    path: str
    reason: str


class ShardTable(NamedTuple):
    """Where a shard's images lie: keys and suffixes (UTF-8), offsets and sizes in bytes, labels (−1: none)."""

    keys: np.ndarray
    suffixes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


class Sample(NamedTuple):
    """One sample as read: the image is the bytes of its file."""

    key: str
    suffix: str
    image: bytes
    label: int | None


class _Recent(OrderedDict[K, V], Generic[K, V]):
    """The values asked for last, at most `limit` of them; the others are made again when needed. Pickled empty."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def get_or_make(self, key: K, make: Callable[[K], V]) -> V:
        if key not in self:
            self[key] = make(key)
            if len(self) > self.limit:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)


# --- the index -------------------------------------------------------------------------------------------------------


class ShardIndex:
    """What a folder of shards holds, without its images; `len` is the number of samples."""

    def __init__(self, folder: Path, shards: Sequence[Shard], *, classes: Sequence[str] | None = None,
                 skipped: Sequence[Skipped] = (), tables: dict[int, ShardTable] | None = None):  # fmt: skip
        self.folder = folder
        self.shards = tuple(shards)
        self.classes = None if classes is None else tuple(classes)
        self.skipped = tuple(skipped)
        self.starts = np.cumsum([0, *(shard.samples for shard in self.shards)])  # (shards + 1,): first sample ids
        self._scanned = tables
        self._tables: _Recent[int, ShardTable] = _Recent(OPEN_TABLES)

    @staticmethod
    def open(folder: str | Path, *, option: str = "data folder") -> ShardIndex:
        """Read the index of a folder of shards, or make one in memory from its plain tar files.

        Raises `ConfigError`, which calls the folder `option`: missing, without shards, with a shard that is missing
        or of another size than when it was indexed, or with an index of another version.
        """
        folder = Path(folder)
        if not folder.is_dir():
            state = "is no folder" if folder.exists() else "does not exist"
            raise ConfigError(f"{option} ({folder}) {state}: make shards: python tools/shard_images.py SRC {folder}")
        if (folder / INDEX).is_file():
            return _read_index(folder, option)
        tars = sorted(folder.glob("*.tar"))
        if tars:
            return _scan_folder(folder, tars)
        if holds_images(folder):
            raise ConfigError(f"{option} ({folder}) holds images, not shards: "
                              f"shard it first: python tools/shard_images.py {folder} DST")  # fmt: skip
        raise ConfigError(f"{option} ({folder}) holds no shards (no {INDEX}, no *.tar): "
                          f"make them: python tools/shard_images.py SRC {folder}")  # fmt: skip

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the data set, for a run's config hash: of the shards' checksums, or else of names and sizes."""
        lines = (shard.sha256 or f"{shard.name} {shard.bytes}" for shard in self.shards)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def labels(self) -> np.ndarray:
        """Return the label of every sample (N,) int64, −1 where there is none."""
        tables = [self.table(number).labels for number in range(len(self.shards))]
        return np.concatenate(tables) if tables else np.empty(0, np.int64)

    def locate(self, sample_ids: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the shard and the place in it of each sample id; IndexError beyond the data set."""
        ids = np.asarray(sample_ids)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids {ids.min()} to {ids.max()} are not all in [0, {len(self)})")
        numbers = np.searchsorted(self.starts, ids, side="right") - 1
        return numbers, ids - self.starts[numbers]

    def table(self, number: int) -> ShardTable:
        """Return where the images of shard `number` lie, from its side file."""
        if self._scanned is not None:
            return self._scanned[number]
        return self._tables.get_or_make(number, self._load_table)

    def _load_table(self, number: int) -> ShardTable:
        shard = self.shards[number]
        path = self.folder / _table_name(shard.name)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                table = ShardTable(*(arrays[name] for name in ShardTable._fields))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path} cannot be read ({reason}): shard the images again") from error
        fits = all(len(column) == shard.samples for column in table)
        if not fits or (table.offsets < 0).any() or (table.offsets + table.sizes > shard.bytes).any():
            raise ConfigError(f"{path} does not fit {shard.name}: shard the images again")
        return table


def _table_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".npz"


def _read_index(folder: Path, option: str) -> ShardIndex:
    again = "shard the images again: python tools/shard_images.py SRC DST"
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ConfigError(f"{option} ({folder}) has an index of {content['format']} version {content['version']}, "
                              f"but this lmim reads {FORMAT} version {VERSION}: {again}")  # fmt: skip
        shards = [Shard(**shard) for shard in content["shards"]]
        skipped = [Skipped(**skip) for skip in content["skipped"]]
        index = ShardIndex(folder, shards, classes=content["classes"], skipped=skipped)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder / INDEX} is no index of shards ({reason}): {again}") from error
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise ConfigError(f"{option} ({folder}) lacks {shard.name}, which its index lists: copy the folder again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ConfigError(f"{path} has {size} bytes where its index says {shard.bytes}: copy it again")
    return index


# --- reading tar files -----------------------------------------------------------------------------------------------


def _scan_folder(folder: Path, tars: list[Path]) -> ShardIndex:
    logger.info("%s has no %s: reading the headers of %d tar files", folder, INDEX, len(tars))
    tables = {number: scan_tar(path) for number, path in enumerate(tars)}
    shards = [Shard(path.name, len(tables[n].keys), path.stat().st_size, None) for n, path in enumerate(tars)]
    if not any(shard.samples for shard in shards):
        raise ConfigError(f"{folder}: no member of its {len(tars)} tar files has the suffix of an image "
                          f"({', '.join(sorted(IMAGE_SUFFIXES))})")  # fmt: skip
    return ShardIndex(folder, shards, tables=tables)


def scan_tar(path: Path) -> ShardTable:
    """Return where the images of a plain webdataset tar lie, from its headers.

    Members in a row with one key are a sample, of which the first member with an image's suffix counts, and `cls` where
    it holds an integer. Raises `ConfigError` for a compressed, damaged or truncated tar and for unsafe members.
    """
    rows: list[tuple[bytes, bytes, int, int, int]] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = _safe_members(tar, file, path)
            for key, sample in itertools.groupby(members, key=lambda member: member[0]):
                image, label = None, -1
                for _, suffix, member in sample:
                    if suffix in IMAGE_SUFFIXES and image is None:
                        image = (suffix.encode(), member.offset_data, member.size)
                    elif suffix == "cls":
                        label = _label(os.pread(file.fileno(), member.size, member.offset_data))
                if image is not None:
                    rows.append((key.encode(errors="surrogateescape"), *image, label))
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path} is no uncompressed tar or is damaged ({error}): make it again") from error
    keys, suffixes, offsets, sizes, labels = zip(*rows, strict=True) if rows else ((),) * 5
    numbers = (np.array(column, np.int64) for column in (offsets, sizes, labels))
    return ShardTable(np.array(keys, np.bytes_), np.array(suffixes, np.bytes_), *numbers)


def _safe_members(tar: tarfile.TarFile, file: BinaryIO, path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, suffix, member) of the regular members; ConfigError for what no data set should hold."""
    end = 0
    for member in tar:
        wrong = None
        if member.name.startswith("/") or ".." in member.name.split("/"):
            wrong = "has a name that points outside"
        elif not (member.isreg() or member.isdir()) or member.issparse():
            wrong = "is no regular file"
        elif member.size > MAX_MEMBER:
            wrong = f"has {member.size} bytes, more than the {MAX_MEMBER} allowed"
        if wrong:
            raise ConfigError(f"{path}: member {member.name!r} {wrong}: make the tar again without it")
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        match = MEMBER.fullmatch(member.name)
        if member.isreg() and match:
            yield match[1], match[2].lower(), member
    # tarfile takes damage in the middle of a tar for its end: the end is a block of zeros
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise ConfigError(f"{path} is damaged or cut off at byte {end}: copy or make it again")


def _label(text: bytes) -> int:
    return int(text) if re.fullmatch(rb"\s*\d{1,18}\s*", text) else -1


class ShardReader:
    """Reads samples by id from local shards, with at most `OPEN_FILES` files open; one for each thread.

    It may be forked or pickled to worker processes: reads are by offset, so a shared file has no position to disturb.
    """

    def __init__(self, index: ShardIndex):
        self.index = index
        self._files: _Recent[int, BinaryIO] = _Recent(OPEN_FILES)  # a file pushed out closes itself

    def read(self, sample_id: int) -> Sample:
        """Return one sample; IndexError beyond the data set, ConfigError where its shard is gone or too short."""
        number, place = (int(x) for x in self.index.locate(sample_id))
        table = self.index.table(number)
        size, label = int(table.sizes[place]), int(table.labels[place])
        try:
            file = self._files.get_or_make(number, self._open)
            image = os.pread(file.fileno(), size, int(table.offsets[place]))
        except OSError as error:
            raise ConfigError(f"{self._path(number)} cannot be read: {error.strerror}") from error
        if len(image) != size:
            raise ConfigError(f"{self._path(number)} is shorter than its index says: copy it again")
        key = bytes(table.keys[place]).decode(errors="surrogateescape")
        return Sample(key, bytes(table.suffixes[place]).decode(), image, None if label < 0 else label)

    def read_wds(self, sample_id: int) -> dict[str, Any]:
        """Return one sample as webdataset gives it: `__key__`, `__url__`, the image's bytes under its suffix, `cls`."""
        sample = self.read(sample_id)
        number = int(self.index.locate(sample_id)[0])
        found: dict[str, Any] = {"__key__": sample.key, "__url__": self._path(number), sample.suffix: sample.image}
        if sample.label is not None:
            found["cls"] = str(sample.label).encode()
        return found

    def close(self) -> None:
        """Close the open files; a later read opens them again."""
        self._files.clear()

    def _path(self, number: int) -> str:
        return str(self.index.folder / self.index.shards[number].name)

    def _open(self, number: int) -> BinaryIO:
        return open(self._path(number), "rb", buffering=0)


# --- the order of an epoch -------------------------------------------------------------------------------------------


class EpochPlan:
    """The order of all sample ids in one epoch, computed where it is looked at.

    The shards are shuffled and cut into blocks of about `block_shards`, and the samples of each block are shuffled:
    near to a full permutation, while a reader has only one block's shards open at a time.
    """

    def __init__(self, index: ShardIndex, *, seed: int, epoch: int, block_shards: int = 64):
        self.index, self.seed, self.epoch, self.block_shards = index, seed, epoch, block_shards
        self._key = fold(0, seed, epoch)
        number = len(index.shards)
        self._shards = _shuffled(self._key, SHARD_ORDER, np.arange(number))
        blocks = max(1, -(-number // block_shards))
        self._bounds = np.arange(blocks + 1) * number // blocks  # even: a last block of one shard would mix badly
        self._starts = np.concatenate([[0], np.cumsum(np.diff(index.starts)[self._shards])])[self._bounds]
        self._blocks: _Recent[int, np.ndarray] = _Recent(OPEN_BLOCKS)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids (int64) at places [start, stop) of the epoch; IndexError beyond its end."""
        if not 0 <= start <= stop <= len(self.index):
            raise IndexError(f"places [{start}, {stop}) are not in an epoch of {len(self.index)} samples")
        if start == stop:
            return np.empty(0, np.int64)
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        parts = []
        for block in range(int(first), int(last) + 1):
            begin = int(self._starts[block])
            parts.append(self._blocks.get_or_make(block, self._block)[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)

    def _block(self, block: int) -> np.ndarray:
        shards = self._shards[self._bounds[block] : self._bounds[block + 1]]
        ranges = [np.arange(self.index.starts[shard], self.index.starts[shard + 1]) for shard in shards]
        return _shuffled(self._key, SAMPLE_ORDER, np.concatenate(ranges))


def _shuffled(key: int, use: int, ids: np.ndarray) -> np.ndarray:
    """Return the ids in the order of their hashes; equal hashes, about one pair in 90,000 ids, keep their order."""
    return ids[np.argsort(np.asarray(draw(key, use, ids)), kind="stable")]


# --- writing ---------------------------------------------------------------------------------------------------------


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
        order = _shuffled(fold(0, seed), WRITE_ORDER, order)
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
        for name in (_table_name(shard.name), shard.name):
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
    with open(folder / (_table_name(name) + PART), "wb") as table_file:
        np.savez_compressed(table_file, **table._asdict())
    checksum = hashlib.sha256()
    with open(part, "rb") as written:
        while chunk := written.read(1 << 20):
            checksum.update(chunk)
    return Shard(name, len(table.keys), part.stat().st_size, checksum.hexdigest())


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
    part = index.folder / (INDEX + PART)
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    os.replace(part, index.folder / INDEX)
