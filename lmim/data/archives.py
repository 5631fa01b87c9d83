"""Images in tar files: webdataset tars, and the official ImageNet archives as they are downloaded.

Owns where in the archives the images lie, found by reading the tars' headers alone. The invariant: nothing is unpacked;
an image is read by its offset in the outermost file, so a class tar inside a tar costs no more than a file.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from lmim.config import ConfigError
from lmim.data.shards import MEMBER, ShardIndex, scan_tar, tar_members
from lmim.data.sources import Images, Names, Source, SourceImage, quoted, read_range, suffix_of
from lmim.data.transforms import IMAGE_SUFFIXES

VALIDATION = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


# --- webdataset tars -------------------------------------------------------------------------------------------------


def open_tars(spec: str, paths: Sequence[Path], option: str) -> Source:
    """List the images of webdataset tars; `cls` members give the labels, an index in their folder the class names.

    Keys are kept, but where two tars share one, all are told apart by 'NAME OF THE TAR/'.
    """
    if Path(spec).is_dir():
        index = ShardIndex.open(spec, option=option)
        paths = [Path(index.url(number)) for number in range(len(index.shards))]
        tables, classes = [index.table(number) for number in range(len(paths))], index.classes
    else:
        tables, classes = [scan_tar(path) for path in paths], None
    starts = np.cumsum([0, *(len(table.keys) for table in tables)])
    if not starts[-1]:
        raise ConfigError(f"{option} ({spec}): no member of its {len(paths)} tar files has the suffix of an image "
                          f"({', '.join(sorted(IMAGE_SUFFIXES))})")  # fmt: skip
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(key) for table in tables for key in table.keys.tolist()), np.uint64)
    prefixes = [""] * len(paths)
    if len(np.unique(hashes)) < len(hashes):
        prefixes = [quoted(path.name.removesuffix(".tar")) + "/" for path in paths]

    def image(i: int) -> SourceImage:
        number = int(np.searchsorted(starts, i, side="right")) - 1
        table, place, path = tables[number], i - int(starts[number]), paths[number]
        key = bytes(table.keys[place]).decode(errors="surrogateescape")
        suffix, label = bytes(table.suffixes[place]).decode(), int(table.labels[place])
        offset, size = int(table.offsets[place]), int(table.sizes[place])
        return SourceImage(prefixes[number] + key, suffix, None if label < 0 else label, f"{path.name}/{key}.{suffix}",
                           partial(read_range, str(path), offset, size), size)  # fmt: skip

    return Source(spec, classes, Images(int(starts[-1]), image))


# --- ImageNet --------------------------------------------------------------------------------------------------------


def open_imagenet(paths: Sequence[Path], option: str, devkit: Path | None) -> Source | None:
    """List the images of a tar of class tars or of ImageNet's validation tar; None for tars of another kind.

    The class tars' names, sorted, are the classes: WordNet ids, so that both archives give a class the same label.
    """
    firsts = [_first_name(path) for path in paths]
    official = [path for path, first in zip(paths, firsts, strict=True)
                if suffix_of(first) == "tar" or VALIDATION.fullmatch(first)]  # fmt: skip
    if not official:
        return None
    if len(paths) > 1:
        raise ConfigError(f"{option} holds archives of several splits: shard each by itself, such as {official[0]}")
    return _open_class_tars(paths[0]) if suffix_of(firsts[0]) == "tar" else _open_validation(paths[0], option, devkit)


def _first_name(path: Path) -> str:
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            first = tar.next()
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path} is no uncompressed tar or is damaged ({error}): download it again") from error
    return "" if first is None else first.name


class _Columns:
    """What is known of images in one archive, in columns."""

    def __init__(self, path: Path):
        self.path = path
        self.names, self.offsets, self.sizes, self.labels = Names(), array("q"), array("q"), array("i")

    def add(self, name: str, member: tarfile.TarInfo, label: int) -> None:
        self.names.append(name)
        self.offsets.append(member.offset_data)
        self.sizes.append(member.size)
        self.labels.append(label)

    def image(self, i: int) -> SourceImage:
        name = self.names[i]
        load = partial(read_range, str(self.path), self.offsets[i], self.sizes[i])
        key = quoted(name.rpartition(".")[0])
        return SourceImage(key, suffix_of(name), self.labels[i], name, load, self.sizes[i])

    def source(self, classes: Sequence[str], others: Sequence[str]) -> Source:
        return Source(str(self.path), tuple(classes), Images(len(self.names), self.image), tuple(others))


def _open_class_tars(path: Path) -> Source:
    others = []
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as outer:
                inner = [(member.name, member.offset_data, member.size) for member in outer if member.isreg()]
        except tarfile.TarError as error:
            raise ConfigError(f"{path} is damaged or cut off ({error}): download it again") from error
        tars = sorted((Path(name).stem, offset, size) for name, offset, size in inner if suffix_of(name) == "tar")
        others += [name for name, _, _ in inner if suffix_of(name) != "tar"]
        last = max(offset + size for _, offset, size in tars)
        if last > path.stat().st_size:
            raise ConfigError(f"{path} is cut off: it has {path.stat().st_size} of {last} bytes: download it again")
        columns = _Columns(path)
        for label, (wnid, offset, _) in enumerate(tars):
            for key, suffix, member in tar_members(file, f"{path}: {wnid}.tar", offset):
                name = f"{wnid}/{MEMBER.fullmatch(member.name)[0].rpartition('/')[2]}"
                if suffix in IMAGE_SUFFIXES and "." not in key.rpartition("/")[2]:
                    columns.add(name, member, label)
                else:
                    others.append(name)
    return columns.source([wnid for wnid, _, _ in tars], others)


def _open_validation(path: Path, option: str, devkit: Path | None) -> Source:
    classes, truth = _read_devkit(devkit or path.with_name(DEVKIT), option)
    columns, others = _Columns(path), []
    with open(path, "rb") as file:
        for _, _, member in tar_members(file, str(path)):
            match = VALIDATION.fullmatch(member.name)
            if match and 1 <= int(match[1]) <= len(truth):
                columns.add(member.name.rpartition("/")[2], member, truth[int(match[1]) - 1])
            else:
                others.append(member.name)
    return columns.source(classes, others)


def _read_devkit(path: Path, option: str) -> tuple[list[str], list[int]]:
    """Return the sorted WordNet ids and the label of each validation image.

    `meta.mat` holds the synsets, of which those without children are the classes; the ground truth counts
    ILSVRC2012_ID from 1 (readme.txt of the development kit, section 3.2).
    """
    if not path.is_file():
        raise ConfigError(f"{option} is ImageNet's validation archive, whose labels are in {DEVKIT}: {path} does not "
                          "exist: download it there, or name it with --devkit")  # fmt: skip
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError("ImageNet's labels are a MATLAB file, which scipy reads: "
                          "pip install scipy, or 'lmim[sources]'") from error  # fmt: skip
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isreg() and Path(member.name).name in ("meta.mat", GROUND_TRUTH):
                    file = tar.extractfile(member)
                    found[Path(member.name).name] = file.read() if file else b""
        synsets = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets
                 if int(synset["num_children"]) == 0}  # fmt: skip
        classes = sorted(wnids.values())
        number = {wnid: label for label, wnid in enumerate(classes)}
        return classes, [number[wnids[int(line)]] for line in found[GROUND_TRUTH].split()]
    except (tarfile.TarError, zlib.error, OSError, EOFError, KeyError, ValueError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path} is no development kit of ImageNet ({reason}): download it again") from error
