"""What evaluations found: one file of a run folder that all of them write and the report reads.

    evaluations.jsonl   one object for each evaluation that was run, in order

The invariant: rows are only ever added. A row tells what was measured, of which weights, and by which command.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lmim.config import ConfigError

logger = logging.getLogger(__name__)
RESULTS_FILE = "evaluations.jsonl"
FIELDS = ("evaluation", "date", "command", "source", "which", "figures")


def record(
    run_folder: Path,
    evaluation: str,
    figures: dict[str, Any],
    *,
    source: str | Path,
    which: str,
    pictures: Sequence[str] = (),
) -> None:
    """Add a row to a run folder's file, if there is such a folder.

    `evaluation` is what `lmim eval` calls it, `source` where the weights came from, `which` "online" or "target".
    `figures` holds plain values by name: shares from 0 to 1, or lists and dictionaries of such. `pictures` are files in
    the run folder, by their names relative to it.
    """
    if not run_folder.is_dir():
        return
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = dict(evaluation=evaluation, date=now, command=command_line(), source=str(source), which=which,
               figures=figures, pictures=list(pictures))  # fmt: skip
    with told_if_not_written(run_folder / RESULTS_FILE) as path, path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def told_if_not_written(path: Path) -> Iterator[Path]:
    """Warn where a file cannot be written: what was measured for hours is then printed all the same."""
    try:
        yield path
    except OSError as error:
        logger.warning("%s cannot be written (%s): what was found is only printed", path, error.strerror)


def make_folder(folder: Path, option: str) -> None:
    """Make a folder for an evaluation's files, or raise ConfigError before the work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{folder} ({option}) cannot be written: {error.strerror}") from error


def command_line() -> str:
    """Return the command that this process was started with, as a user would type it."""
    program = Path(sys.argv[0])
    words = ["lmim"] if program.name in ("lmim", "__main__.py") else ["python", str(program)]
    return shlex.join([*words, *sys.argv[1:]])


def read_results(run_folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run folder, oldest first; a line that is none is named and left out."""
    path, rows = run_folder / RESULTS_FILE, []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else (), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(field in row for field in FIELDS):
            rows.append(row)
        else:
            logger.warning("%s: line %d is damaged and left out", path, number)
    return rows
