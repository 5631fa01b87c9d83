"""Where images come from before they are sharded: what a SRC means, IDX files, and the images of the package.

Owns the choice of the reader for a source; folders are read by `sources`, tars by `archives`, Parquet by `parquet`.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from lmim.config import ConfigError
from lmim.data.archives import open_imagenet, open_tars
from lmim.data.parquet import open_parquet
from lmim.data.sources import Images, Source, SourceImage, holds_images, open_folder
from lmim.data.storage import expand as expand_addresses

__all__ = ["EMBEDDED_SPLITS", "Source", "SourceImage", "expand", "open_source", "read_idx"]
EMBEDDED_FOLDER = Path(__file__).parent / "embedded" / "fashion_mnist"
EMBEDDED_SPLITS = ("train", "eval")
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                         "Ankle boot")  # fmt: skip
KINDS = ("tar", "parquet", "idx")
WANTED = ("give a folder of images, tars, Parquet or IDX files, one such file, a glob or brace range of them, "
          "embedded:train or embedded:eval")  # fmt: skip


def open_source(spec: str | Path, *, option: str = "SRC", devkit: Path | None = None) -> Source:
    """List the images of a source without reading them.

    A source is 'embedded:train' or 'embedded:eval'; a folder of images (see `sources.open_folder`); webdataset tars,
    Parquet files or a pair of IDX files, given as one file, a glob, a brace range or the folder that holds them; or an
    official ImageNet archive, of which the validation images need the `devkit` archive, looked for beside it. `option`
    is what a `ConfigError` (no such folder, no images) calls the spec.
    """
    text = str(spec)
    if text.partition(":")[0] == "embedded":
        return _open_embedded(text, option)
    if Path(text).is_dir() and holds_images(Path(text)):
        return open_folder(Path(text), option)
    paths = expand(text, option)
    if not paths:
        return open_folder(Path(text), option)
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1 or "" in kinds:
        state = "mixes kinds of files" if len(kinds) > 1 else "is no folder and no tar, Parquet or IDX file"
        raise ConfigError(f"{option} ({spec}) {state}: {WANTED}")
    if kinds == {"parquet"}:
        return open_parquet(text, paths, option)
    if kinds == {"idx"}:
        return _open_idx(text, paths, option)
    return open_imagenet(paths, option, devkit) or open_tars(text, paths, option)


def expand(spec: str, option: str) -> list[Path]:
    """Return the files that a path, glob or brace range names, sorted, and of a folder those of a known kind."""
    folder = Path(spec)
    if folder.is_dir():
        return sorted(path for path in folder.iterdir() if _kind(path) and not path.name.startswith("."))
    if folder.exists():
        return [folder]
    paths = [Path(path) for path in expand_addresses(spec)]
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        what = f": {missing[0]}" if missing and missing[0] != spec else ""
        raise ConfigError(f"{option} ({spec}) does not exist{what}: {WANTED}")
    return paths


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    kind = "idx" if "-ubyte" in name or name.endswith(".idx") else name.rpartition(".")[2]
    return kind if kind in KINDS and (kind == "idx" or name == path.name) else ""


# --- IDX files, and the embedded images ------------------------------------------------------------------------------


def _open_embedded(spec: str, option: str) -> Source:
    split = spec.partition(":")[2]
    if split not in EMBEDDED_SPLITS:
        raise ConfigError(f"{option} ({spec}) is unknown: the embedded images are embedded:train and embedded:eval")
    images, labels = (EMBEDDED_FOLDER / f"{split}-{kind}.idx.gz" for kind in ("images", "labels"))
    return _idx_source(spec, split, images, read_idx(images).shape, read_idx(labels), FASHION_MNIST_CLASSES)


def _open_idx(spec: str, paths: list[Path], option: str) -> Source:
    images = [path for path in paths if "images" in path.name]
    if len(images) != 1:
        found = ", ".join(path.name for path in images) or "none with 'images' in its name"
        raise ConfigError(f"{option} ({spec}) must be one IDX file of images, but holds {found}: give the one to take")
    name = images[0].name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    stem = images[0].with_name(name.removesuffix(".gz"))
    beside = next((path for path in (stem, stem.with_name(stem.name + ".gz")) if path.exists()), None)
    try:
        pixels, labels = read_idx(images[0]), None if beside is None else read_idx(beside)
    except (ValueError, OSError, EOFError, struct.error) as error:
        raise ConfigError(f"{option} ({spec}) cannot be read: {error}: download it again") from error
    if pixels.ndim not in (3, 4) or (labels is not None and labels.shape != pixels.shape[:1]):
        shapes = f"{pixels.shape} images" + ("" if labels is None else f" and {labels.shape} labels")
        raise ConfigError(f"{option} ({spec}) holds {shapes}: wanted (N, height, width[, 3]) and (N,)")
    classes = None if labels is None else tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
    return _idx_source(spec, images[0].name.partition(".")[0], images[0], pixels.shape, labels, classes)


def _idx_source(spec: str, stem: str, path: Path, shape: tuple[int, ...], labels: np.ndarray | None,
                classes: tuple[str, ...] | None) -> Source:  # fmt: skip
    size = math.prod(shape[1:])

    def image(i: int) -> SourceImage:
        label = None if labels is None else int(labels[i])
        return SourceImage(f"{stem}-{i:05d}", "png", label, f"{spec}/{i:05d}", partial(_idx_png, path, i), size)

    return Source(spec, classes, Images(shape[0], image))


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of an IDX file (the format of MNIST), gzip'd or not; ValueError where it is none."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    kind, dims = struct.unpack_from(">HBB", data)[1:]
    if data[:2] != b"\0\0" or kind != 8:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {data[:4].hex()}")
    shape = struct.unpack_from(f">{dims}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


_idx_in_use = lru_cache(maxsize=1)(read_idx)


def _idx_png(path: Path, i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(_idx_in_use(path)[i]).save(out, "PNG")
    return out.getvalue()
