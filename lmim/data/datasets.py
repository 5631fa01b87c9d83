"""Where images come from before they are sharded: folders, and the images that ship with the package.

Owns the list of a source's images with their keys and labels; bytes are read when asked for. The invariants: the order
is sorted and the same everywhere; a key is ASCII without a dot (webdataset cuts names at the first one), unique in its
source, and `urllib.parse.unquote` of it names the file.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from lmim.config import ConfigError
from lmim.data.transforms import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)
EMBEDDED_FOLDER = Path(__file__).parent / "embedded" / "fashion_mnist"
EMBEDDED_SPLITS = ("train", "eval")
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                         "Ankle boot")  # fmt: skip
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "eval"))


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image: its key, its suffix (lower case, no dot), its label or None, and the path that a report names."""

    key: str
    suffix: str
    label: int | None
    path: str
    load: Callable[[], bytes]

    def read(self) -> bytes:
        """Return the bytes of the image file; raises OSError where it cannot be read."""
        return self.load()


@dataclass(frozen=True, slots=True)
class Source:
    """Images in a fixed order, the names of the classes that labels count from 0 or None, and files left aside."""

    name: str
    classes: tuple[str, ...] | None
    images: tuple[SourceImage, ...]
    other_files: tuple[str, ...] = ()


def open_source(spec: str | Path, *, option: str = "SRC") -> Source:
    """List the images of 'embedded:train', 'embedded:eval', or a folder with or without class folders.

    In a folder that holds no image itself, each direct subfolder is a class, in the order of their names, with images
    at any depth. In any other folder the images, at any depth, have no labels. Hidden files are passed over. `option`
    is what a `ConfigError` (no such folder, no images) calls the spec.
    """
    if str(spec).partition(":")[0] == "embedded":
        return _open_embedded(str(spec), option)
    return _open_folder(Path(spec), option)


def holds_images(folder: Path) -> bool:
    """Tell whether images lie in a folder or in its direct subfolders."""
    names = (name for pattern in ("*", "*/*") for name in folder.glob(pattern))
    return any(_suffix(path.name) in IMAGE_SUFFIXES for path in names)


# --- the embedded images ---------------------------------------------------------------------------------------------


def _open_embedded(spec: str, option: str) -> Source:
    split = spec.partition(":")[2]
    if split not in EMBEDDED_SPLITS:
        raise ConfigError(f"{option} ({spec}) is unknown: the embedded images are embedded:train and embedded:eval")
    images = read_idx(EMBEDDED_FOLDER / f"{split}-images.idx.gz")
    labels = read_idx(EMBEDDED_FOLDER / f"{split}-labels.idx.gz").tolist()
    listed = (
        SourceImage(f"{split}-{i:05d}", "png", label, f"{spec}/{i:05d}", partial(_encode_png, image))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    )
    return Source(spec, FASHION_MNIST_CLASSES, tuple(listed))


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of a gzip'd IDX file (the format of MNIST); raises ValueError where it is none."""
    data = gzip.decompress(path.read_bytes())
    kind, dims = struct.unpack_from(">HBB", data)[1:]
    if data[:2] != b"\0\0" or kind != 8:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {data[:4].hex()}")
    shape = struct.unpack_from(f">{dims}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _encode_png(pixels_HW: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels_HW).save(out, "PNG")
    return out.getvalue()


# --- folders ---------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, option: str) -> Source:
    if not folder.is_dir():
        state = "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{option} ({folder}) {state}: give a folder of images, embedded:train or embedded:eval")
    try:
        found = sorted(_walk(folder, ()))
    except OSError as error:
        raise ConfigError(f"{option} ({folder}) cannot be read: {error.strerror}: {error.filename}") from error
    paths = [parts for parts in found if _suffix(parts[-1]) in IMAGE_SUFFIXES]
    others = tuple("/".join(parts) for parts in found if _suffix(parts[-1]) not in IMAGE_SUFFIXES)
    if not paths:
        allowed = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ConfigError(f"{option} ({folder}) holds no images: give a folder of files ending in {allowed}")
    classes = _class_names(folder, paths, option)
    number = {name: label for label, name in enumerate(classes or ())}
    listed = (
        SourceImage(key, _suffix(parts[-1]), number.get(parts[0]), "/".join(parts),
                    partial(Path.read_bytes, folder.joinpath(*parts)))
        for key, parts in zip(_keys(paths), paths, strict=True)
    )  # fmt: skip
    return Source(str(folder), classes, tuple(listed), others)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every file that is not hidden, in parts; links are followed, but never back to where we are."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from ((entry.name, *parts) for parts in _walk(Path(entry.path), (*above, real)))
            else:
                yield (entry.name,)


def _class_names(folder: Path, paths: list[tuple[str, ...]], option: str) -> tuple[str, ...] | None:
    if any(len(parts) == 1 for parts in paths):
        return None
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if all(name.lower() in SPLIT_NAMES for name in names):
        raise ConfigError(f"{option} ({folder}) holds splits, not classes ({', '.join(names)}): "
                          f"shard each by itself, starting with {folder / names[0]}")  # fmt: skip
    empty = set(names) - {parts[0] for parts in paths}
    if empty:
        logger.warning("%s: class folders without images: %s", folder, ", ".join(sorted(empty)))
    return names


def _keys(paths: list[tuple[str, ...]]) -> list[str]:
    """Return 'n01/photo' for n01/photo.jpg, and 'n01/photo%2Ejpg' where there is an n01/photo.png, too."""
    stems = [_quoted("/".join(parts).rpartition(".")[0]) for parts in paths]
    count = Counter(stems)
    return [stem if count[stem] == 1 else _quoted("/".join(parts)) for stem, parts in zip(stems, paths, strict=True)]


def _quoted(path: str) -> str:
    """Return a path with all but letters, digits and '/ _-~' percent-encoded, so that it fits any tar and system."""
    return quote(os.fsencode(path), safe="/ ").replace(".", "%2E")


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""
