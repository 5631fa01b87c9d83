"""A data set's files until they have their names.

Owns the folder `unfinished` in a data set's folder: the plan, the finished shards with a record each, and those being
written (`.part`). The invariants: a folder holds `index.json` only when all it names is complete, and what was there
before stays until then; a record is written last, so a shard with one is whole; a run that was stopped at any point is
taken up where it was by any run of the same plan, on any machine that sees the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lmim.config import ConfigError
from lmim.data.shards import FORMAT, INDEX, UNFINISHED, VERSION, Shard, ShardIndex, Skipped
from lmim.data.storage import is_remote

PART = ".part"  # ends the names of files that are being written
OURS = re.compile(r"shard-\d{6,}\.(tar|npz)(\.part)?")
WRITE_BUFFER = 1 << 20  # bytes
LOCK_TIMEOUT_S = 10.0  # a worker whose run was killed ends at its next report, within a second
MOST_LABELS = 1 << 20  # beyond it the labels of plain tars are taken for ids, of which no histogram is made


@dataclass(frozen=True)
class Plan:
    """What was fixed before a byte was read: options, the list of images as a hash, and how many shards there are."""

    source: str
    options: dict[str, Any]
    listing: str
    shards: int
    images: int
    classes: tuple[str, ...] | None
    skipped: tuple[Skipped, ...]

    @property
    def identity(self) -> str:
        """The hash of all that decides on a byte of the data set."""
        words = json.dumps([self.options, self.listing, self.shards, self.classes])
        return hashlib.sha256(words.encode()).hexdigest()


class Record(NamedTuple):
    """A finished shard: its plan's identity, what it holds, how many images it was to hold, and those that it lacks."""

    plan: str
    shard: Shard
    images: int
    skipped: list[Skipped]


def shard_name(number: int) -> str:
    """Return the stem of a shard's files."""
    return f"shard-{number:06d}"


def write_whole(path: Path, text: str, work: Path) -> None:
    """Write a small file that is never seen half-written, through one in the folder of unfinished files."""
    part = work / f"{path.name}.{uuid.uuid4().hex}{PART}"  # other parts may write the same file
    part.write_text(text, encoding="ascii")
    os.replace(part, path)


# --- beginning -------------------------------------------------------------------------------------------------------


def begin(folder: Path, plan: Plan, overwrite: bool) -> bool:
    """Make a folder ready for the shards of a plan, and tell whether it holds them already, finished.

    Raises `ConfigError` for a folder that holds other shards, or an unfinished run of another plan, and is not to be
    overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"DST ({folder}) is a file: choose a folder")
    work = folder / UNFINISHED
    old = _read_plan(work) if (work / "plan.json").exists() else None
    if old is not None and old.identity == plan.identity:
        return False
    if old is not None and not overwrite:
        raise ConfigError(f"DST ({folder}) holds an unfinished run of another plan ({_difference(old, plan)}): "
                          "use the same again to go on, choose another folder, or --overwrite it")  # fmt: skip
    if (folder / INDEX).exists() and not overwrite and _finished_plan(folder / INDEX) == plan.identity:
        return True
    holds_tars = "index_only" not in plan.options and any(folder.glob("*.tar"))
    if not overwrite and ((folder / INDEX).exists() or holds_tars):
        raise ConfigError(f"DST ({folder}) holds shards already: choose another folder, or --overwrite them")
    if old is not None:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)  # another part may have made it
    write_whole(work / "plan.json", json.dumps(asdict(plan)), work)
    return False


@contextmanager
def running(folder: Path, part: tuple[int, int]) -> Iterator[None]:
    """Keep other runs from doing the same part at the same time: `ConfigError` where one does."""
    with open(folder / UNFINISHED / f"part-{part[0]}-of-{part[1]}.lock", "wb") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, and workers do not inherit it
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"DST ({folder}) is being written by a run that is going on: stop that, choose another "
                              "folder, or give each a --part of its own") from error  # fmt: skip
        except OSError:  # a file system without locks
            pass
        yield


def _read_plan(work: Path) -> Plan:
    path = work / "plan.json"
    try:
        content = json.loads(path.read_bytes())
        classes = content.pop("classes")
        skipped = tuple(Skipped(*skip) for skip in content.pop("skipped"))
        return Plan(**content, classes=None if classes is None else tuple(classes), skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove {work} and start again") from error


def _finished_plan(path: Path) -> str | None:
    try:
        return json.loads(path.read_bytes())["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _difference(old: Plan, new: Plan) -> str:
    names = sorted(old.options.keys() | new.options.keys())
    pairs = ((name, old.options.get(name), new.options.get(name)) for name in names)
    found = [f"{name} {was} there, {now} now" for name, was, now in pairs if was != now]
    if old.listing != new.listing:
        found.append(f"{old.images} images of {old.source} there, {new.images} of {new.source} now, "
                     "not the same names and sizes")  # fmt: skip
    return ", ".join(found) or "the classes"


# --- one shard -------------------------------------------------------------------------------------------------------


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO]:
    """Give `path`.part, empty and open for writing, to this process alone, and rename it to `path` at the end."""
    part = path.with_name(path.name + PART)
    start = time.monotonic()
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        file = open(descriptor, "wb", buffering=WRITE_BUFFER)  # noqa: SIM115  it stays open while it is locked
        try:
            # a POSIX lock: another run, or a worker that outlived its own, may be writing the same shard
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                break
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() - start > LOCK_TIMEOUT_S:
                file.close()
                raise ConfigError(f"{part} is being written by another run: stop that, or give each a --part of its "
                                  "own") from error  # fmt: skip
            time.sleep(0.1)
        except OSError:  # a file system without locks
            break
        file.close()
    with file:
        file.truncate(0)
        yield file
        file.flush()
        os.replace(part, path)


def write_record(work: Path, number: int, record: Record) -> None:
    """Note that a shard is finished."""
    content = record._replace(shard=record.shard._asdict())._asdict()
    write_whole(work / (shard_name(number) + ".json"), json.dumps(content), work)


def read_record(folder: Path, number: int, identity: str) -> Record | None:
    """Return the record of a shard of the plan that is finished and there, else None."""
    work = folder / UNFINISHED
    try:
        content = json.loads((work / (shard_name(number) + ".json")).read_bytes())
        record = Record(content["plan"], Shard(**content["shard"]), content["images"],
                        [Skipped(*skip) for skip in content["skipped"]])  # fmt: skip
        if record.plan != identity:
            return None
        for name, size in ((record.shard.name, record.shard.bytes), (record.shard.table, None)):
            if is_remote(name):
                continue
            path = work / name if (work / name).exists() else folder / name  # there where naming was cut short
            if path.stat().st_size != (size or path.stat().st_size):
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the end ---------------------------------------------------------------------------------------------------------


def finish(folder: Path) -> ShardIndex | int:
    """Name the shards and write the index, or return how many shards are still to be written.

    Raises `ConfigError` where there is nothing to finish, and where not one image is sound.
    """
    work = folder / UNFINISHED
    if not (work / "plan.json").exists():
        if (folder / INDEX).exists():
            return ShardIndex.open(folder)
        raise ConfigError(f"DST ({folder}) holds no shards that were written in parts: copy all parts' folders, with "
                          f"their '{UNFINISHED}' folders, into one")  # fmt: skip
    with open(work / "finish.lock", "wb") as lock:
        _wait_for(lock)  # the last two parts may finish at the same time
        if not (work / "plan.json").exists():
            return ShardIndex.open(folder)
        plan = _read_plan(work)
        found = [read_record(folder, number, plan.identity) for number in range(plan.shards)]
        records = [record for record in found if record is not None]
        if len(records) < plan.shards:
            return plan.shards - len(records)
        skipped = [*plan.skipped, *(skip for record in records for skip in record.skipped)]
        if not any(record.shard.samples for record in records):
            shutil.rmtree(work)
            example = skipped[-1] if skipped else Skipped(plan.source, "no images")
            raise ConfigError(f"{plan.source}: none of {sum(record.images for record in records)} images can be "
                              f"decoded, such as {example.path}: {example.reason}")  # fmt: skip
        shards = [record.shard for record in records]
        _name_files(folder, shards)
        index = ShardIndex(folder, shards, classes=plan.classes, skipped=sorted(skipped))
        _write_index(index, plan.identity)
        shutil.rmtree(work)
    return index


def _wait_for(file: BinaryIO) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: the work is the same whoever does it
        return


def _name_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Put the finished files in place of what the folder held, which is no data set until the index is written."""
    (folder / INDEX).unlink(missing_ok=True)
    names = [name for shard in shards for name in (shard.table, shard.name)]
    for name in names:
        if not is_remote(name) and not os.path.isabs(name) and (folder / UNFINISHED / name).exists():
            os.replace(folder / UNFINISHED / name, folder / name)
    # indexed tars may lie here, under such names
    kept = {os.path.realpath(folder / name) for name in names if not is_remote(name)}
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name) and os.path.realpath(path) not in kept:
            path.unlink()


def _write_index(index: ShardIndex, identity: str) -> None:
    labels: Counter[int] = Counter()
    measures: dict[str, Counter[int]] = {"sizes": Counter(), "widths": Counter(), "heights": Counter()}
    for shard in index.shards:
        with np.load(Path(index.folder, shard.table)) as arrays:
            labels.update(arrays["labels"].tolist())
            for name, counter in measures.items():
                counter.update(arrays[name].tolist())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "plan": identity,
        "samples": len(index),
        "bytes": index.bytes,
        "mean_image_bytes": round(sum(size * count for size, count in measures["sizes"].items()) / len(index), 1),
        "image_bytes": _spread(measures["sizes"]),
        "width": _spread(measures["widths"]),
        "height": _spread(measures["heights"]),
        "classes": index.classes,
        "class_counts": _histogram(labels, index.classes),
        "shards": [shard._asdict() for shard in index.shards],
        "skipped": [skipped._asdict() for skipped in index.skipped],
    }
    write_whole(Path(index.folder, INDEX), _dump(content), Path(index.folder, UNFINISHED))


def _spread(counts: Counter[int]) -> dict[str, int]:
    """Return the least, the (lower) median and the greatest of counted values."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return {"min": values[0], "median": values[int(np.searchsorted(below, (below[-1] + 1) // 2))], "max": values[-1]}


def _histogram(labels: Counter[int], classes: Sequence[str] | None) -> list[int] | None:
    most = max(labels)
    if most < 0 or most >= MOST_LABELS:
        return None
    return [labels[label] for label in range(max(most + 1, len(classes or ())))]


def _dump(content: dict[str, Any]) -> str:
    """Return JSON with a line for each entry, and one for each shard and skipped file."""
    lines = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
