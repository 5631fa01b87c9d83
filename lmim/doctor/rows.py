"""What the doctor's checks are made of: a case to look at, rows that tell of it, and the time a look may take.

Owns the rows' states and how a look that fails or does not end becomes words. The invariant: whatever a look does, its
rank goes on after the time limit.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmim.dist import Board, Topology
from lmim.options import Config
from lmim.train import MISTAKES

OK, WARNING, FAILURE = "ok", "warning", "failure"
Finding = dict[str, Any]  # what one rank saw, as JSON; {"error": words} where it saw nothing
Found = dict[str, dict[int, Finding]]  # by check and rank, without errors


@dataclass(frozen=True)
class Case:
    """What is looked at, by one of the ranks."""

    config: Config
    topology: Topology
    board: Board
    temporary: Path  # a folder of this rank's own, removed at the end
    token: str  # the same on all ranks, and new in each visit


class Row(NamedTuple):
    """One row of the table: what was found, and what to do where that is not well."""

    check: str
    state: str
    found: str
    advice: str = ""
    figures: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Check(NamedTuple):
    """One look, by every rank, and the judgement of all of them, by the first one."""

    name: str
    look: Callable[[Case], Finding]
    judge: Callable[[Case, Found], list[Row]]
    limit_s: float
    advice: str  # where looking fails


def attempt(look: Callable[[Case], Finding], case: Case, limit_s: float) -> Finding:
    """Return what a look finds, or why it failed: an error in one line, or that it did not end in time.

    It runs in a thread of its own, as a disk or a server that does not answer cannot be interrupted.
    """
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(look(case))
        except Exception as error:  # noqa: BLE001  (whatever it is becomes a row)
            found.append(dict(error=in_words(error)))

    thread = threading.Thread(target=run, name=look.__name__, daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else dict(error=f"no answer within {limit_s:g} s")


def in_words(error: BaseException) -> str:
    """Return an error in one line, with its place where it is none that was foreseen."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (*MISTAKES, ValueError, OSError)):
        return words
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {words}{place}"


def of_ranks(ranks: list[int]) -> str:
    """Return 'rank 3', 'ranks 2, 5' or 'ranks 0 to 7'."""
    ranks = sorted(ranks)
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def by_value(values: dict[int, Any]) -> dict[Any, list[int]]:
    """Return the ranks of each value, most common values first."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in sorted(values.items()):
        ranks.setdefault(value, []).append(rank)
    return dict(sorted(ranks.items(), key=lambda item: -len(item[1])))


def step_seconds(found: Found) -> float | None:
    """Return how long a whole step takes on the slowest rank, as the trial showed; None where none was taken."""
    steps = [of["step"]["step_s"] for of in found.get("trial", {}).values() if of.get("step")]
    return max(steps, default=None)


def size(count: float) -> str:
    """Return bytes as a person says them: 1.2 GB, 340 MB, 12 kB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.{0 if count >= 100 * factor else 1}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 3.2 days, 4.5 h, 12 min, 0.42 s, 3.1 ms."""
    for unit, factor in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
