"""Whether shards are what their index says: checksums, offsets, decodability, keys and counts.

Owns the checks. The invariant: what the tars' own headers say is compared with the side files and the index, and each
difference is told with the shard and the member it is in.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lmim.config import ConfigError
from lmim.data.pool import Report, run_tasks
from lmim.data.progress import Done
from lmim.data.sharding import open_here, read_through
from lmim.data.shards import INDEX, Shard, ShardIndex, ShardTable, checksum, scan_tar
from lmim.data.storage import Damaged, is_remote
from lmim.data.transforms import ImageError, decode_rgb

NAMED = 3  # members that a complaint names
ALL = -1  # images to decode


class Findings(NamedTuple):
    """What is wrong with a data set, and what it holds.

    `problems` are (shard, what is wrong) in the order of the shards; `labels` counts the samples by label, with −1 for
    those without; `classes` are the names or None.
    """

    problems: list[tuple[str, str]]
    shards: int
    samples: int
    bytes: int
    decoded: int
    labels: Counter[int]
    classes: tuple[str, ...] | None
    indexed: bool


class _ShardFindings(NamedTuple):
    number: int
    problems: list[str]
    samples: int
    bytes: int
    decoded: int
    labels: Counter[int]
    key_hashes: np.ndarray


def verify_shards(folder: str | Path, *, decode: int = 16, workers: int = 1,
                  progress: Callable[[Done], None] | None = None) -> Findings:  # fmt: skip
    """Check a folder of shards, here or remote, with or without an index, reading all of their bytes once.

    `decode` images of each shard, evenly spread, are decoded: all for `ALL`. Raises `ConfigError` for a folder that
    holds no shards, or whose index cannot be read.
    """
    if workers < 1 or decode < ALL:
        raise ConfigError(f"workers ({workers}) must be at least 1, and decode ({decode}) all, none or a number")
    folder = str(folder)
    index = _open(folder)
    total = (0, len(index), 0, index.bytes)

    def report(more_images: int, more_bytes: int) -> None:
        nonlocal total
        total = (total[0] + more_images, total[1], total[2] + more_bytes, total[3])
        if progress is not None:
            progress(Done(*total))

    report(0, 0)
    tasks = ((index.url(number), number) for number in range(len(index.shards)))
    workers = max(1, min(workers, len(index.shards)))
    found = list(run_tasks(partial(_verify_shard, index, decode), tasks, workers=workers, report=report))
    found.sort(key=lambda one: one.number)
    names = [shard.name for shard in index.shards]
    problems = [(names[one.number], problem) for one in found for problem in one.problems]
    problems += _shared_keys(index, found)
    labels = sum((one.labels for one in found), Counter())
    findings = Findings(problems, len(found), sum(one.samples for one in found), sum(one.bytes for one in found),
                        sum(one.decoded for one in found), labels, index.classes, _is_indexed(folder))  # fmt: skip
    if findings.indexed and not problems:
        problems += [(INDEX, problem) for problem in _wrong_totals(index, findings)]
    return findings


def _is_indexed(folder: str) -> bool:
    return is_remote(folder) or Path(folder, INDEX).is_file()


def _open(folder: str) -> ShardIndex:
    """Open the index, however damaged the shards are, or make one up of the tars in a folder."""
    if not _is_indexed(folder) and Path(folder).is_dir():
        tars = sorted(Path(folder).glob("*.tar"))
        if tars:
            return ShardIndex(folder, [Shard(tar.name, 0, tar.stat().st_size, None, "") for tar in tars])
    return ShardIndex.open(folder, option="DATA", max_bad_fraction=1.0)


# --- one shard -------------------------------------------------------------------------------------------------------


def _verify_shard(index: ShardIndex, decode: int, number: int, report: Report) -> _ShardFindings:
    path, shard = index.url(number), index.shards[number]
    problems: list[str] = []
    nothing = _ShardFindings(number, problems, 0, 0, 0, Counter(), np.empty(0, np.uint64))
    try:
        size = index.storage.size(path)
    except (OSError, Damaged) as error:
        problems.append("is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}")
        return nothing
    if size != shard.bytes:
        problems.append(f"has {size} bytes where its index says {shard.bytes}")
    expected = None
    try:
        expected = index.table(number) if shard.table else None
    except ConfigError as error:
        problems.append(f"side file: {error}")
    digest = hashlib.sha256()
    try:
        with open_here(path, index.storage) as file:
            table = scan_tar(path, file)
            if expected is not None:  # an index of existing tars leaves out their broken images
                listed = np.isin(table.offsets, expected.offsets)
                table = ShardTable(*(column[listed] for column in table))
            sums, decoded, broken = _read_images(file, table, digest, decode, report)
    except (ConfigError, Damaged, OSError) as error:
        problems.append(str(error).removeprefix(f"{path} ").removeprefix(f"{path}: "))
        return nothing._replace(bytes=size)
    table = table._replace(checksums=sums)
    problems += broken
    if expected is not None:
        problems += _differences(expected, table)
    if shard.sha256 is not None and digest.hexdigest() != shard.sha256:
        problems.append("sha256 of the file is not the index's: some of its bytes are not those that were written")
    labels = Counter(table.labels.tolist())
    if index.classes is not None and max(labels, default=-1) >= len(index.classes):
        problems.append(f"label {max(labels)} is beyond the {len(index.classes)} classes")
    hashes = np.array([xxhash.xxh3_64_intdigest(key) for key in table.keys.tolist()], np.uint64)
    return _ShardFindings(number, problems, len(table.keys), size, decoded, labels, hashes)


def _read_images(file: Any, table: ShardTable, digest: Any, decode: int,
                 report: Report) -> tuple[np.ndarray, int, list[str]]:  # fmt: skip
    """Return the checksums of the images, how many of them were decoded, and what is wrong with those."""
    count = len(table.keys)
    chosen = set(range(count) if decode == ALL else np.linspace(0, count - 1, min(decode, count), dtype=int).tolist())
    sums, broken = np.empty(count, np.int64), []
    for place, data in read_through(file, table, digest, report):
        sums[place] = checksum(data)
        if place in chosen:
            try:
                decode_rgb(data)
            except ImageError as error:
                broken.append(f"{_member(table, place)} cannot be decoded: {error}")
    more = [f"{len(broken) - NAMED} more images cannot be decoded"] if len(broken) > NAMED else []
    return sums, len(chosen), broken[:NAMED] + more


def _member(table: ShardTable, place: int) -> str:
    names = (bytes(column[place]).decode(errors="backslashreplace") for column in (table.keys, table.suffixes))
    return "member " + ".".join(names)


def _differences(expected: ShardTable, found: ShardTable) -> list[str]:
    """Compare what the side file says with what the tar's headers and bytes do."""
    place_of = {offset: place for place, offset in enumerate(found.offsets.tolist())}
    problems: dict[str, list[str]] = {}
    for row, offset in enumerate(expected.offsets.tolist()):
        place = place_of.get(offset)
        if place is None:
            problems.setdefault("not where it is in the side file", []).append(_member(expected, row))
            continue
        for column, words in (("keys", "has another key than in the side file"), ("suffixes", "has another suffix"),
                              ("sizes", "has another size than in the side file"),
                              ("labels", "has another label than in the side file"),
                              ("checksums", "holds other bytes than were written (checksum)")):  # fmt: skip
            was, now = getattr(expected, column)[row], getattr(found, column)[place]
            if was != now and not (column == "checksums" and was == -1):
                problems.setdefault(words, []).append(_member(found, place))
                break
    told = []
    for words, members in problems.items():
        more = f" and {len(members) - NAMED} more" if len(members) > NAMED else ""
        told.append(f"{', '.join(members[:NAMED])}{more}: {words}")
    return told


# --- all of them -----------------------------------------------------------------------------------------------------


def _shared_keys(index: ShardIndex, found: Sequence[_ShardFindings]) -> list[tuple[str, str]]:
    """Return the first keys that several samples have, in one shard or in several."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(one.key_hashes for one in found)])
    values, counts = np.unique(hashes, return_counts=True)
    problems = []
    for value in values[counts > 1][:NAMED].tolist():
        holders = [one.number for one in found if (one.key_hashes == value).any()]
        place = int(np.flatnonzero(found[holders[0]].key_hashes == value)[0])
        with open_here(index.url(holders[0]), index.storage) as file:
            table = scan_tar(index.url(holders[0]), file)
        key = bytes(table.keys[place]).decode(errors="backslashreplace")
        where = ", ".join(index.shards[number].name for number in holders[:NAMED])
        times = sum(int((found[number].key_hashes == value).sum()) for number in holders)
        problems.append((index.shards[holders[0]].name, f"key {key} is there {times} times, in {where}"))
    if (counts > 1).sum() > NAMED:
        problems.append(("all shards", f"{int((counts > 1).sum()) - NAMED} more keys are shared"))
    return problems


def _wrong_totals(index: ShardIndex, findings: Findings) -> list[str]:
    content = json.loads(index.storage.read(f"{index.folder}/{INDEX}"))
    counted = content["class_counts"]
    labels = [findings.labels[label] for label in range(len(counted or ()))]
    pairs = (("samples", content["samples"], findings.samples), ("class_counts", counted or [], labels))
    return [f"{name} is {was}, but the shards hold {now}" for name, was, now in pairs if was != now]
