"""What a source of images is, and the first kind of it: folders.

Owns the list of a source's images with their keys and labels; bytes are read when asked for. The invariants: the order
is the same everywhere; a key is unique in its source and, where the source has file names, `urllib.parse.unquote` of it
names the file; the keys made here are ASCII without a dot (webdataset cuts names at the first one). A list of millions
takes some 50 bytes an image beside its name, and any piece of it travels to another process: an image is told by
paths, offsets and sizes, never by open files.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload
from urllib.parse import quote

import numpy as np

from lmim.config import ConfigError
from lmim.data.transforms import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "eval"))


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image: its key, suffix (lower case, no dot), label or None, the path that a report names, and its size.

    The suffix is None where only the bytes tell it. The size in bytes says where shards end; it may be an estimate.
    `load` can be pickled.
    """

    key: str
    suffix: str | None
    label: int | None
    path: str
    load: Callable[[], bytes]
    size: int = 0

    def read(self) -> bytes:
        """Return the bytes of the image file; raises OSError where it cannot be read."""
        return self.load()


@dataclass(frozen=True, slots=True)
class Source:
    """Images in a fixed order, the names of the classes that labels count from 0 or None, and files left aside.

    `groups` are the first images of stretches that are only cheap to read in a row, or None: a shuffle keeps them
    together.
    """

    name: str
    classes: tuple[str, ...] | None
    images: Sequence[SourceImage]
    other_files: tuple[str, ...] = ()
    groups: np.ndarray | None = None


class Names(Sequence[str]):
    """File names packed one after another: 8 bytes each beside their letters, a tenth of a list's."""

    def __init__(self) -> None:
        self._letters = bytearray()
        self._ends = array("q", [0])

    def append(self, name: str) -> None:
        self._letters += os.fsencode(name)
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(bytes(self._letters[self._ends[i] : self._ends[i + 1]]))


class Images(Sequence[SourceImage]):
    """A list whose images are made when they are looked at, by `make(i)`."""

    def __init__(self, count: int, make: Callable[[int], SourceImage]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> SourceImage: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[SourceImage]: ...
    def __getitem__(self, i: int | slice) -> SourceImage | Sequence[SourceImage]:
        if isinstance(i, slice):
            return [self._make(n) for n in range(*i.indices(self._count))]
        if not 0 <= i < self._count:
            raise IndexError(i)
        return self._make(i)


def quoted(path: str) -> str:
    """Return a path with all but letters, digits and '/ _-~' percent-encoded, so that it fits any tar and system."""
    return quote(os.fsencode(path), safe="/ ").replace(".", "%2E")


def suffix_of(name: str) -> str:
    """Return what follows the last dot of a name, in lower case; "" where there is none."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def read_file(path: str) -> bytes:
    """Return the bytes of a file; raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on; raises OSError, also where the file ends before."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise OSError(0, f"{path} ends at byte {offset + len(data)}")
    return data


# --- folders ---------------------------------------------------------------------------------------------------------


def holds_images(folder: Path) -> bool:
    """Tell whether images lie in a folder or in its direct subfolders."""
    names = (name for pattern in ("*", "*/*") for name in folder.glob(pattern))
    return any(suffix_of(path.name) in IMAGE_SUFFIXES for path in names)


def open_folder(folder: Path, option: str) -> Source:
    """List the images of a folder, sorted by the parts of their paths.

    In a folder that holds no image itself, each direct subfolder is a class, in the order of their names, with images
    at any depth. In any other folder the images, at any depth, have no labels. Hidden files are passed over. Raises
    `ConfigError`, which calls the folder `option`.
    """
    names, sizes, whole = Names(), array("q"), bytearray()  # whole: the key needs the suffix, too
    others = []
    try:
        for name, size, shared in _walk(str(folder), "", ()):
            if suffix_of(name.rpartition("/")[2]) in IMAGE_SUFFIXES:
                names.append(name)
                sizes.append(size)
                whole.append(shared)
            else:
                others.append(name)
    except OSError as error:
        raise ConfigError(f"{option} ({folder}) cannot be read: {error.strerror}: {error.filename}") from error
    if not names:
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ConfigError(f"{option} ({folder}) holds no images: give a folder of files ending in {allowed}")
    classes = _class_names(folder, names, option)
    number = {name: label for label, name in enumerate(classes or ())}

    def image(i: int) -> SourceImage:
        name = names[i]
        key = quoted(name if whole[i] else name.rpartition(".")[0])
        label = number.get(name.partition("/")[0])
        return SourceImage(key, suffix_of(name), label, name, partial(read_file, f"{folder}/{name}"), sizes[i])

    return Source(str(folder), classes, Images(len(names), image), tuple(others))


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, int, bool]]:
    """Yield (path, size in bytes, whether another image differs in the suffix alone) of every file not hidden.

    Links are followed, but never back to where we are. A file that cannot be looked at has the size 0.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    folders = {entry.name for entry in entries if entry.is_dir()}
    stems = Counter(entry.name.rpartition(".")[0] for entry in entries
                    if entry.name not in folders and suffix_of(entry.name) in IMAGE_SUFFIXES)  # fmt: skip
    for entry in entries:
        if entry.name in folders:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
        else:
            try:
                size = entry.stat().st_size
            except OSError:
                size = 0
            yield prefix + entry.name, size, stems[entry.name.rpartition(".")[0]] > 1


def _class_names(folder: Path, paths: Names, option: str) -> tuple[str, ...] | None:
    used = set()
    for path in paths:
        top, slash, _ = path.partition("/")
        if not slash:
            return None
        used.add(top)
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if all(name.lower() in SPLIT_NAMES for name in names):
        raise ConfigError(f"{option} ({folder}) holds splits, not classes ({', '.join(names)}): "
                          f"shard each by itself, starting with {folder / names[0]}")  # fmt: skip
    empty = set(names) - used
    if empty:
        logger.warning("%s: class folders without images: %s", folder, ", ".join(sorted(empty)))
    return names
