"""Tar shards of images: their index, and reading a sample by its number.

Owns the format: `shard-000000.tar` holds per sample KEY.EXT (the image file's bytes) and, where labelled, KEY.cls (the
label in ASCII), so any webdataset reader opens it; `shard-000000.npz` holds where each image lies and its checksum;
`index.json`, written last, makes the folder a data set. Plain tar shards from elsewhere are indexed in memory.
The invariants: a sample's id is its place in the shards' order, and what is read is what was written, or `Damaged`.

Nothing is ever extracted: members are read by offset, and only regular ones with relative names below `MAX_MEMBER`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from lmim.config import ConfigError
from lmim.data.cache import ShardCache, Wanted
from lmim.data.plan import Recent
from lmim.data.sources import holds_images
from lmim.data.storage import PIPE, Damaged, Storage, expand, is_remote, without_secrets
from lmim.data.transforms import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)
FORMAT, VERSION = "lmim-shards", 2
INDEX = "index.json"
UNFINISHED = "unfinished"  # the folder in a data set's folder that holds its shards while they are written
MAX_MEMBER = 256 << 20  # bytes
BLOCK = 512  # bytes: tar's unit
OPEN_TABLES = 256  # kept at a time by an index; a shard of 10,000 samples takes 0.7 MB
NAMED = 3  # damaged shards that a complaint names
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's rule for key and suffix


class Shard(NamedTuple):
    """A tar file of the data set.

    `name` and `table`, the file that says where its images lie, are relative to the index's folder, or whole paths or
    addresses. `sha256` is None where it was not written by us.
    """

    name: str
    samples: int
    bytes: int
    sha256: str | None
    table: str


class Skipped(NamedTuple):
    """A file of the source that is not in the shards, and why."""

    path: str
    reason: str


class ShardTable(NamedTuple):
    """Where a shard's images lie: keys and suffixes (UTF-8), offsets and sizes in bytes, labels and checksums.

    A label is −1 where there is none, as is a checksum (the low 32 bits of XXH3-64 of the image's bytes).
    """

    keys: np.ndarray
    suffixes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    checksums: np.ndarray


class Sample(NamedTuple):
    """One sample as read: the image is the bytes of its file."""

    key: str
    suffix: str
    image: bytes
    label: int | None


def checksum(data: bytes) -> int:
    """Return the low 32 bits of XXH3-64, which takes a tenth of a CRC's time."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


# --- the index -------------------------------------------------------------------------------------------------------


def _table_in(content: bytes, tries: int = 3) -> ShardTable:
    """The table that a side file's bytes hold; ValueError, KeyError, EOFError or BadZipFile where they do not.

    Tried again on SystemError: NumPy parses an array's header with `ast`, which in early patch releases of Python 3.11
    may fail while another thread parses too (https://github.com/python/cpython/issues/106905).
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return ShardTable(*(arrays[name] for name in ShardTable._fields))
    except SystemError:
        if tries <= 1:
            raise
        return _table_in(content, tries - 1)


class ShardIndex:
    """What a folder of shards holds, without its images; `len` is the number of samples.

    `parts` are the first shards of the data sets it was joined from.
    """

    def __init__(self, folder: str | Path, shards: Sequence[Shard], *, classes: Sequence[str] | None = None,
                 skipped: Sequence[Skipped] = (), parts: Sequence[int] = (0,),
                 tables: dict[int, ShardTable] | None = None, storage: Storage | None = None,
                 labelled: bool = True):  # fmt: skip
        self.folder = str(folder)
        self.shards = tuple(shards)
        self.classes = None if classes is None else tuple(classes)
        self.skipped = tuple(skipped)
        self.parts, self.labelled = tuple(parts), labelled
        self.starts = np.cumsum([0, *(shard.samples for shard in self.shards)])  # (shards + 1,): first sample ids
        self.storage = storage or Storage()
        self.cache: ShardCache | None = None
        self._scanned = tables or {}
        self._tables: Recent[int, ShardTable] = Recent(OPEN_TABLES)

    @staticmethod
    def open(location: str | Path, *, option: str = "data folder", storage: Storage | None = None,
             max_bad_fraction: float = 0.0) -> ShardIndex:  # fmt: skip
        """Read the index of a folder of shards, here or remote, or make one in memory from local plain tar files.

        Raises `ConfigError`, which calls the folder `option`: missing, without shards, with an index of another
        version, or with more than `max_bad_fraction` of the samples in local shards that are missing or of another
        size than when they were indexed; fewer are a warning.
        """
        storage = storage or Storage()
        paths = expand(str(location))
        if not paths:
            raise ConfigError(f"{option} ({location}) matches no file")
        if all(path.endswith(".tar") for path in paths):
            return _scan_tars(paths, option, storage)
        if len(paths) > 1:
            indexes = [ShardIndex.open(path, option=option, storage=storage, max_bad_fraction=max_bad_fraction)
                       for path in paths]  # fmt: skip
            return ShardIndex.join(indexes, option)
        location = paths[0]
        if is_remote(location):
            return _read_index(location.rstrip("/"), option, storage)
        folder = Path(location)
        if not folder.is_dir():
            state = "is no folder" if folder.exists() else "does not exist"
            raise ConfigError(f"{option} ({folder}) {state}: make shards: python tools/shard_images.py SRC {folder}")
        if (folder / INDEX).is_file():
            index = _read_index(location, option, storage)
            index.check_files(option, max_bad_fraction)
            return index
        if (folder / UNFINISHED).is_dir():
            raise ConfigError(f"{option} ({folder}) holds no shards yet, they are being written: if that was stopped, "
                              "start tools/shard_images.py again with the same options to go on")  # fmt: skip
        tars = sorted(folder.glob("*.tar"))
        if tars:
            return _scan_tars([str(path) for path in tars], option, storage)
        if holds_images(folder):
            raise ConfigError(f"{option} ({folder}) holds images, not shards: "
                              f"shard it first: python tools/shard_images.py {folder} DST")  # fmt: skip
        raise ConfigError(f"{option} ({folder}) holds no shards (no {INDEX}, no *.tar): "
                          f"make them: python tools/shard_images.py SRC {folder}")  # fmt: skip

    @staticmethod
    def join(indexes: Sequence[ShardIndex], option: str = "data folder") -> ShardIndex:
        """Return one index of several data sets, in their order; labels are kept where the classes agree."""
        first, *others = indexes
        if not others:
            return first
        same = all(index.classes == first.classes for index in others)
        if not same:
            logger.info("%s: the classes of its sources differ, so their labels are not used", option)
        shards = [shard._replace(name=index.url(n), table=_join(index.folder, shard.table))
                  for index in indexes for n, shard in enumerate(index.shards)]  # fmt: skip
        parts = np.cumsum([0, *(len(index.shards) for index in indexes)]).tolist()
        tables = {
            begin + n: table
            for begin, index in zip(parts, indexes, strict=False)
            for n, table in index._scanned.items()
        }
        return ShardIndex(", ".join(index.folder for index in indexes), shards, parts=parts[:-1], tables=tables,
                          classes=first.classes if same else None, labelled=same, storage=first.storage,
                          skipped=[skip for index in indexes for skip in index.skipped])  # fmt: skip

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the data set, for a run's config hash: of the shards' checksums, or else of names and sizes."""
        lines = (shard.sha256 or f"{shard.name.rpartition('/')[2]} {shard.bytes}" for shard in self.shards)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def url(self, number: int) -> str:
        """Return the path or address of shard `number`."""
        return _join(self.folder, self.shards[number].name)

    def wanted(self, number: int) -> Wanted:
        """Return what a cache needs to know of shard `number`."""
        return Wanted(self.url(number), self.shards[number].bytes, self.shards[number].sha256)

    def labels(self) -> np.ndarray:
        """Return the label of every sample (N,) int64, −1 where there is none."""
        if not self.labelled:
            return np.full(len(self), -1)
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
        """Return where the images of shard `number` lie, from its side file; ConfigError where that is damaged."""
        if number in self._scanned:
            return self._scanned[number]
        return self._tables.get_or_make(number, self._load_table)

    def _load_table(self, number: int) -> ShardTable:
        shard = self.shards[number]
        path = _join(self.folder, shard.table)
        try:
            table = _table_in(self.storage.read(path))
        except (Damaged, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{without_secrets(path)} cannot be read ({reason}): shard the images again") from error
        fits = all(len(column) == shard.samples for column in table)
        fits = fits and all(column.dtype.kind in "iu" for column in (table.offsets, table.sizes, table.labels))
        if not fits or (table.offsets < 0).any() or (table.offsets + table.sizes > shard.bytes).any():
            raise ConfigError(f"{path} does not fit {shard.name}: shard the images again")
        return table

    def check_files(self, option: str, max_bad_fraction: float) -> None:
        """Look whether all local shards are there with the size they had when they were indexed; see `open`."""
        wrong, samples = [], 0
        for number, shard in enumerate(self.shards):
            url = self.url(number)
            if is_remote(url):
                continue
            try:
                size = os.stat(url).st_size
                reason = f"has {size} bytes where its index says {shard.bytes}" if size != shard.bytes else ""
            except FileNotFoundError:
                reason = "is missing"
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
            if reason:
                wrong.append(f"{shard.name} {reason}")
                samples += shard.samples
        if wrong:
            words = "; ".join(wrong[:NAMED]) + (f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")
            if samples > max_bad_fraction * len(self):
                raise ConfigError(f"{option} ({self.folder}) is damaged: {words}: copy these again")
            logger.warning("%s (%s) is damaged: %s: copy these again; until then images are skipped", option,
                           self.folder, words)  # fmt: skip


def _join(folder: str, name: str) -> str:
    return name if is_remote(name) or name.startswith("/") else f"{folder}/{name}"


def _read_index(folder: str, option: str, storage: Storage) -> ShardIndex:
    again = "shard the images again: python tools/shard_images.py SRC DST"
    path, shown = _join(folder, INDEX), without_secrets(folder)
    try:
        content = json.loads(storage.read(path))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ConfigError(f"{option} ({shown}) has an index of {content['format']} version {content['version']}, "
                              f"but this lmim reads {FORMAT} version {VERSION}: {again}")  # fmt: skip
        shards = [Shard(**shard) for shard in content["shards"]]
        skipped = [Skipped(**skip) for skip in content["skipped"]]
        return ShardIndex(folder, shards, classes=content["classes"], skipped=skipped, storage=storage)
    except Damaged as error:
        raise ConfigError(f"{option} ({shown}) has no index: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{shown}/{INDEX} is no index of shards ({reason}): {again}") from error


# --- reading tar files -----------------------------------------------------------------------------------------------


def _scan_tars(paths: list[str], option: str, storage: Storage) -> ShardIndex:
    folder = str(Path(paths[0]).parent)
    again = f"write an index of them: python tools/shard_images.py '{folder}/*.tar' DST --index-only"
    if any(is_remote(path) for path in paths):
        raise ConfigError(f"{option} ({without_secrets(paths[0])}): remote tar files need an index; {again}")
    logger.info("%s has no %s: reading the headers of %d tar files; to do it only once, %s", folder, INDEX, len(paths),
                again)  # fmt: skip
    tables = {number: scan_tar(Path(path)) for number, path in enumerate(paths)}
    shards = [Shard(os.path.abspath(path), len(tables[n].keys), os.stat(path).st_size, None, "")
              for n, path in enumerate(paths)]  # fmt: skip
    if not any(shard.samples for shard in shards):
        raise ConfigError(f"{folder}: no member of its {len(paths)} tar files has the suffix of an image "
                          f"({', '.join(sorted(IMAGE_SUFFIXES))})")  # fmt: skip
    return ShardIndex(folder, shards, tables=tables, storage=storage)


def scan_tar(path: str | Path, file: BinaryIO | None = None) -> ShardTable:
    """Return where the images of a plain webdataset tar lie, from its headers.

    Members in a row with one key are a sample, of which the first member with an image's suffix counts, and `cls` where
    it holds an integer. `file`, if given, is read in place of the local file `path`: any that seeks. Raises
    `ConfigError` for a compressed, damaged or truncated tar and for unsafe members.
    """
    if file is None:
        try:
            with open(path, "rb") as local:
                return scan_tar(path, local)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    rows: list[tuple[bytes, bytes, int, int, int]] = []
    for key, sample in itertools.groupby(tar_members(file, str(path)), key=lambda member: member[0]):
        image, label = None, -1
        for _, suffix, member in sample:
            if suffix in IMAGE_SUFFIXES and image is None:
                image = (suffix.encode(), member.offset_data, member.size)
            elif suffix == "cls":
                label = _label(_read_at(file, member.offset_data, member.size))
        if image is not None:
            rows.append((key.encode(errors="surrogateescape"), *image, label))
    keys, suffixes, offsets, sizes, labels = zip(*rows, strict=True) if rows else ((),) * 5
    numbers = (np.array(column, np.int64) for column in (offsets, sizes, labels))
    return ShardTable(np.array(keys, np.bytes_), np.array(suffixes, np.bytes_), *numbers,
                      checksums=np.full(len(rows), -1, np.int64))  # fmt: skip


def tar_members(file: BinaryIO, name: str, start: int = 0) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, suffix, member) of the regular members of a tar that begins at byte `start` of a file.

    Offsets count from the file's beginning. Raises `ConfigError`, which calls the tar `name`, for what is damaged, cut
    off or compressed, and for what no data set should hold.
    """
    end = start
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                wrong = None
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    wrong = "has a name that points outside"
                elif not (member.isreg() or member.isdir()) or member.issparse():
                    wrong = "is no regular file"
                elif member.size > MAX_MEMBER:
                    wrong = f"has {member.size} bytes, more than the {MAX_MEMBER} allowed"
                if wrong:
                    raise ConfigError(f"{name}: member {member.name!r} {wrong}: make the tar again without it")
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                match = MEMBER.fullmatch(member.name)
                if member.isreg() and match:
                    yield match[1], match[2].lower(), member
        # tarfile takes damage in the middle of a tar for its end: the end is a block of zeros
        if _read_at(file, end, BLOCK) != bytes(BLOCK):
            raise ConfigError(f"{name} is damaged or cut off at byte {end}: copy or make it again")
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{name} is no uncompressed tar or is damaged ({error}): make it again") from error


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _label(text: bytes) -> int:
    return int(text) if re.fullmatch(rb"\s*\d{1,18}\s*", text) else -1


class ShardReader:
    """Reads samples by id. It may be forked or pickled to worker processes; one for each thread."""

    def __init__(self, index: ShardIndex):
        self.index = index

    def read_many(self, sample_ids: np.ndarray) -> list[Sample | Damaged]:
        """Return the samples, `Damaged` in place of those that are gone, cut off, or not what was written."""
        numbers, places = self.index.locate(sample_ids)
        tables = [self.index.table(number) for number in numbers.tolist()]
        ranges = []
        for table, number, place in zip(tables, numbers.tolist(), places.tolist(), strict=True):
            start = int(table.offsets[place])
            ranges.append((self.index.url(number), start, start + int(table.sizes[place])))
        self._bring_commands(set(numbers.tolist()))
        data = self.index.storage.read_ranges(ranges)
        return [self._sample(*row) for row in zip(tables, numbers.tolist(), places.tolist(), data, strict=True)]

    def _bring_commands(self, numbers: set[int]) -> None:
        """Have the shards that are a command's output copied to the cache: those cannot be read in parts."""
        for number in numbers:
            if self.index.url(number).startswith(PIPE):
                cache = self.index.cache
                if cache is None or not cache.bring(self.index.wanted(number), wait=True):
                    shown = without_secrets(self.index.url(number))
                    raise ConfigError(f"{shown} needs a copy: set data.cache, and data.cache_gb to "
                                      f"more than {len(numbers)} shards of this batch")  # fmt: skip

    def _sample(self, table: ShardTable, number: int, place: int, image: bytes | Damaged) -> Sample | Damaged:
        key = bytes(table.keys[place]).decode(errors="surrogateescape")
        suffix, label = bytes(table.suffixes[place]).decode(), int(table.labels[place])
        if isinstance(image, Damaged):
            return Damaged(f"{key}.{suffix}: {image}")
        if table.checksums[place] not in (-1, checksum(image)):
            place = without_secrets(self.index.url(number))
            return Damaged(f"{key}.{suffix}: its bytes in {place} are not those that were written")
        return Sample(key, suffix, image, None if label < 0 else label)

    def read(self, sample_id: int) -> Sample:
        """Return one sample; IndexError beyond the data set, `Damaged` where it cannot be read."""
        sample = self.read_many(np.array([sample_id]))[0]
        if isinstance(sample, Damaged):
            raise sample
        return sample

    def read_wds(self, sample_id: int) -> dict[str, Any]:
        """Return one sample as webdataset gives it: `__key__`, `__url__`, the image's bytes under its suffix, `cls`."""
        sample = self.read(sample_id)
        number = int(self.index.locate(sample_id)[0])
        found: dict[str, Any] = {"__key__": sample.key, "__url__": self.index.url(number), sample.suffix: sample.image}
        if sample.label is not None:
            found["cls"] = str(sample.label).encode()
        return found
