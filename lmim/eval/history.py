"""What a run folder tells: its log, evaluations, alarms and checkpoints, read while the run may go on.

Owns the reading of a folder that somebody else writes. The invariants: nothing that is missing, damaged or half written
raises, but for a folder that is no run's at all; what could not be read is said in `notes`; the log is read line by
line into columns of numbers, so that a million steps take memory for their numbers only.
"""

from __future__ import annotations

import json
import logging
import re
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmim.checkpoint import complete
from lmim.config import ConfigError, duration_steps, load_config
from lmim.eval.knn import RESULTS_FILE as KNN_FILE
from lmim.eval.knn import read_results as read_knn
from lmim.eval.results import RESULTS_FILE, read_results
from lmim.metrics import EVAL_FILE, LOG_FILE, TEXT_FILE, UNREADABLE_FOLDER
from lmim.options import Config

logger = logging.getLogger(__name__)
NEEDED = ("step", "epoch", "loss")  # of a row of the log
KEPT_LINES = 50  # of alarms, and of other warnings: the newest
NAMED_IMAGES = 5
TEXT_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (INFO|WARNING|ERROR) (.*)")
ALARMS = {  # what lmim.health and lmim.train write, by kind
    "spike": re.compile(r"the loss leaps to "),
    "collapse": re.compile(r".* since step \d+: collapse$"),
    "skipped step": re.compile(r"step \d+ is left out: "),
    "unreadable image": re.compile(r"skipped image \d+: "),
}


class Line(NamedTuple):
    """A line of the text log."""

    date: str
    words: str


@dataclass
class TextLog:
    """What `train.log` warns of, and its last line."""

    counts: Counter[str] = field(default_factory=Counter)  # by kind of ALARMS, or "other"
    alarms: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))  # spikes and collapses
    others: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    last: Line | None = None


@dataclass
class Unreadable:
    """Images that could not be read: how often one was met, how many there are, and some with the reason."""

    met: int = 0
    images: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class History:
    """Everything that a report is made of."""

    folder: Path
    config: Config | None
    log: dict[str, np.ndarray]  # float64 columns of one length, by name; NaN where a row has no such number
    evals: dict[str, np.ndarray]  # likewise, of the evaluations amid training
    results: list[dict[str, Any]]  # rows of `evaluations.jsonl`
    knn: dict[str, dict[str, Any]]  # of `knn.json`: shares by protocol of each kind of features
    text: TextLog
    unreadable: Unreadable
    checkpoints: list[Path]  # complete ones, the newest first
    done: dict[str, Any] | None  # the mark of a complete run
    written: datetime | None  # when the log last grew
    notes: list[str]  # what is missing or damaged

    @property
    def name(self) -> str:
        """Return what the run is called."""
        return (self.config.run.name if self.config else "") or self.folder.resolve().name

    @property
    def steps(self) -> int:
        """Return how many steps the log holds the last of."""
        return int(self.log["step"][-1]) + 1 if "step" in self.log else 0

    @property
    def steps_per_epoch(self) -> float:
        """Return how many steps an epoch has, to the four digits of the log's epochs; 0 before the first step."""
        return self.steps / self.log["epoch"][-1] if self.steps and self.log["epoch"][-1] > 0 else 0.0

    def duration(self, text: str) -> int | None:
        """Return how many steps a duration of the configuration is; None where that cannot be known yet."""
        if self.config is None or not self.steps_per_epoch:
            return None
        try:
            total = duration_steps(self.config.optim.duration, steps_per_epoch=self.steps_per_epoch)
            return duration_steps(text, steps_per_epoch=self.steps_per_epoch, total_steps=total)
        except ConfigError:
            return None

    @property
    def total_steps(self) -> int | None:
        """Return how many steps the run has when it is complete, if that can be told."""
        if self.done is not None and isinstance(self.done.get("steps"), int):
            return self.done["steps"]
        return self.duration(self.config.optim.duration) if self.config else None


def read_history(folder: Path) -> History:
    """Read a run folder; raises ConfigError where nothing says that it is one."""
    if not (folder / LOG_FILE).is_file() and not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} holds no {LOG_FILE} with steps: give the folder of a run that was started")
    notes: list[str] = []
    log, damaged = read_columns(folder / LOG_FILE, NEEDED)
    if damaged:
        notes.append(f"{_lines(damaged)} of {LOG_FILE} could not be read and are left out")
    if not log:
        notes.append(f"{LOG_FILE} holds no steps yet")
    evals, damaged = read_columns(folder / EVAL_FILE, ("step", "epoch"))
    if damaged:
        notes.append(f"{_lines(damaged)} of {EVAL_FILE} could not be read and are left out")
    try:
        config = load_config(folder)
    except ConfigError as error:
        config = None
        notes.append(f"the configuration is missing here: {error}")
    if (folder / KNN_FILE).is_file() and not _is_object(folder / KNN_FILE):
        notes.append(f"{KNN_FILE} is damaged and left out")
    path = folder / LOG_FILE
    written = datetime.fromtimestamp(path.stat().st_mtime).astimezone() if path.is_file() else None
    return History(
        folder=folder, config=config, log=log, evals=evals, results=_results(folder, notes), knn=_knn(folder),
        text=read_text_log(folder / TEXT_FILE), unreadable=read_unreadable(folder / UNREADABLE_FOLDER),
        checkpoints=complete(folder)[::-1], done=_done(folder, notes), written=written, notes=notes,
    )  # fmt: skip


# --- numbers ---------------------------------------------------------------------------------------------------------


def read_columns(path: Path, needed: tuple[str, ...]) -> tuple[dict[str, np.ndarray], int]:
    """Return the numbers of a `.jsonl` file as columns, in order of their steps, and how many lines are damaged.

    A row counts if it has all numbers that are `needed`. A last line without its end belongs to a run that is writing
    it. There are no columns where there are no rows.
    """
    tables: dict[tuple[str, ...], array[float]] = {}  # rows with the same names, one after another
    damaged = 0
    if not path.is_file():
        return {}, 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                if tuple(row) not in tables:
                    row = _numbers(row, needed)
                tables.setdefault(tuple(row), array("d")).extend(array("d", row.values()))
            except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
                damaged += line.endswith(b"\n")
    return _columns(tables), damaged


def _numbers(row: dict[str, Any], needed: tuple[str, ...]) -> dict[str, float]:
    """Return a row's numbers; raises ValueError where one is missing that is needed."""
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    if not all(name in numbers for name in needed):
        raise ValueError(f"no {', '.join(needed)}")
    return numbers


def _columns(tables: dict[tuple[str, ...], array[float]]) -> dict[str, np.ndarray]:
    blocks = {names: np.frombuffer(table).reshape(-1, len(names)) for names, table in tables.items()}
    columns = {
        name: np.concatenate([block[:, names.index(name)] if name in names else np.full(len(block), np.nan)
                              for names, block in blocks.items()])
        for name in dict.fromkeys(name for names in blocks for name in names)
    }  # fmt: skip
    if not columns:
        return {}
    order = np.argsort(columns["step"], kind="stable")
    return {name: column[order] for name, column in columns.items()}


def _lines(count: int) -> str:
    return f"{count:,} lines" if count > 1 else "1 line"


# --- the other files -------------------------------------------------------------------------------------------------


def read_text_log(path: Path) -> TextLog:
    """Return what a text log warns of, by kind; of a file of any length."""
    found = TextLog()
    if not path.is_file():
        return found
    with path.open(errors="replace") as file:
        for line in file:
            match = TEXT_LINE.match(line)
            if match is None:
                continue
            found.last = Line(match[1], match[3])
            if match[2] == "INFO":
                continue
            kind = next((kind for kind, pattern in ALARMS.items() if pattern.match(match[3])), "other")
            found.counts[kind] += 1
            if kind in ("spike", "collapse"):
                found.alarms.append(found.last)
            elif kind == "other":
                found.others.append(found.last)
    return found


def read_unreadable(folder: Path) -> Unreadable:
    """Return what the ranks' lists of skipped images say together."""
    found, seen = Unreadable(), set()
    for path in sorted(folder.glob("rank-*.tsv")):
        for line in path.read_text(errors="replace").splitlines():
            step, _, rest = line.partition("\t")
            image, _, reason = rest.partition("\t")
            if not reason:
                continue
            found.met += 1
            if image not in seen and len(found.examples) < NAMED_IMAGES:
                found.examples.append(f"image {image} at step {step}: {reason}")
            seen.add(image)
    found.images = len(seen)
    return found


def _results(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    path = folder / RESULTS_FILE
    rows = read_results(folder)
    lines = len(path.read_text(errors="replace").splitlines()) if path.is_file() else 0
    if lines > len(rows):
        notes.append(f"{_lines(lines - len(rows))} of {RESULTS_FILE} could not be read and are left out")
    return rows


def _knn(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: shares for name, shares in read_knn(folder).items() if isinstance(shares, dict)}


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(errors="replace")), dict)
    except ValueError:
        return False


def _done(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    path = folder / "done.json"
    if not path.is_file():
        return None
    if not _is_object(path):
        notes.append("done.json is damaged; the run is taken as complete")
        return {}
    return json.loads(path.read_text(errors="replace"))
