"""The tables of a report, as text: what evaluations found, the log in figures, and which options were set.

Owns how a recorded value is written. The invariant: a value of any kind that a file may hold becomes text; nothing here
is HTML, and what shows it escapes it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmim.config import flatten
from lmim.eval.curves import charts, evaluation_label
from lmim.eval.history import History
from lmim.eval.svg import number
from lmim.options import Config

# shares from 0 to 1, by their names: they are written in percent
SHARES = re.compile(
    r"accuracy|leave_one_out|gallery|top_?\d|iou|explained|held_out|interval|J&F|\b[JF]_|by_video|recall"
)
MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the run, that the table of figures shows
LISTED = 8  # of a list's values


class Table(NamedTuple):
    """Heads of the columns, and rows whose first cell is a head too."""

    heads: list[str]
    rows: list[list[str]]


class Evaluation(NamedTuple):
    """One evaluation that was run."""

    name: str
    weights: str
    found: Table
    date: str
    command: str
    pictures: list[str]


def evaluations(history: History) -> list[Evaluation]:
    """Return every evaluation of a run, oldest first: amid training, of `knn.json`, and of `evaluations.jsonl`."""
    found = []
    if history.evals:
        rows = []
        for key, values in history.evals.items():
            if key not in ("step", "epoch"):
                first, best, last = values[0], values.max(), values[-1]
                rows.append([evaluation_label(key), *(words(key, float(v)) for v in (first, best, last))])
        table = Table(["while training", "first", "best", "last"], rows)
        found.append(Evaluation("while training", f"{len(history.evals['step'])} times, up to step {history.steps}",
                                table, "", "lmim train …", []))  # fmt: skip
    recorded = [_evaluation(row) for row in history.results]
    if history.knn and not any(row["evaluation"] == "knn" for row in history.results):
        command = shlex.join(["lmim", "eval", "knn", str(history.folder)])
        found.append(Evaluation("knn", "as knn.json says", found_table(history.knn), "", command, []))
    return found + recorded


def _evaluation(row: dict[str, Any]) -> Evaluation:
    pictures = row.get("pictures")
    return Evaluation(str(row["evaluation"]), f"{row['which']} of {row['source']}", found_table(row["figures"]),
                      str(row["date"]).replace("T", " ").replace("+00:00", " UTC"), str(row["command"]),
                      [str(name) for name in pictures] if isinstance(pictures, list) else [])  # fmt: skip


def found_table(figures: Any) -> Table:
    """Return recorded figures as a table: one row for each kind of features where they are by kind, else one a value.

    An accuracy with its interval becomes one cell.
    """
    if not isinstance(figures, dict):
        return Table(["", "value"], [["value", words("", figures)]])
    if figures and all(isinstance(value, dict) for value in figures.values()):
        by_kind = {str(kind): dict(_leaves(value, ())) for kind, value in figures.items()}
        columns = list(dict.fromkeys(column for leaves in by_kind.values() for column in leaves))
        rows = [[kind, *(leaves.get(column, "–") for column in columns)] for kind, leaves in by_kind.items()]
        return Table(["features", *columns], rows)
    return Table(["", "value"], [[name, text] for name, text in _leaves(figures, ())])


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield " ".join(path).replace("_", " "), words(" ".join(path), value)
        return
    value = dict(value)
    if isinstance(value.get("accuracy"), float) and isinstance(value.get("interval"), float):
        accuracy, interval = 100 * value.pop("accuracy"), 100 * value.pop("interval")
        yield " ".join((*path, "accuracy")), f"{accuracy:.2f} ± {interval:.2f} %"
    for name, below in value.items():
        yield from _leaves(below, (*path, str(name)))


def words(name: str, value: Any) -> str:
    """Return a recorded value as text: shares, known by name, in percent."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        return str(value)
    if isinstance(value, list):
        more = [f"… ({len(value)})"] if len(value) > LISTED else []
        return ", ".join([words(name, one) for one in value[:LISTED]] + more)
    if isinstance(value, float) and 0 <= value <= 1 and (SHARES.search(name) or name.startswith(("knn", "fewshot"))):
        return f"{100 * value:.2f} %"
    return number(value) if isinstance(value, float) else str(value)


def in_figures(history: History) -> Table | None:
    """Return the curves' values at five moments, or None before the first step."""
    drawn = charts(history)
    if not drawn:
        return None
    last = history.log["epoch"][-1] if history.log else history.evals["epoch"][-1]
    rows = []
    for chart in drawn:
        for series in chart.series:
            near = [abs(series.x - moment * last).argmin() for moment in MOMENTS]
            name = chart.title if len(chart.series) == 1 else f"{chart.title}: {series.label}"
            rows.append([name, *(number(series.mean[at]) + chart.unit for at in near)])
    heads = [f"epoch {number(moment * last)}" for moment in MOMENTS]
    return Table(["", *heads], rows)


def set_options(config: Config) -> Table:
    """Return the options whose values are not the defaults."""
    defaults = flatten(Config())
    rows = [[key, option_words(value), option_words(defaults[key])] for key, value in flatten(config).items()
            if value != defaults[key]]  # fmt: skip
    return Table(["option", "value", "default"], rows)


def different_options(histories: list[History], names: list[str]) -> Table:
    """Return the options in which runs differ, but for the folder."""
    flat = [flatten(history.config) if history.config else {} for history in histories]
    keys = dict.fromkeys(key for options in flat for key in options if key not in ("run.folder", "run.name"))
    rows = [[key, *(option_words(options.get(key)) for options in flat)] for key in keys
            if any(options.get(key) != flat[0].get(key) for options in flat)]  # fmt: skip
    return Table(["option", *names], rows)


def option_words(value: Any) -> str:
    """Return an option's value as it would be typed."""
    if value is None or value == "":
        return "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)
