"""A doctor's visit: what is looked at, in which order, and the table that tells of it.

Owns the order of checks. The invariant: every check ends on every rank within its time limit, and all ranks know what
each of them found, or that it gave no word; so none waits for another for ever, and the table is always printed.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lmim import dist
from lmim.config import ConfigError, check
from lmim.doctor import arithmetic, folder, images, machine, reached, trial
from lmim.doctor.rows import (
    FAILURE,
    OK,
    WARNING,
    Case,
    Check,
    Finding,
    Found,
    Row,
    attempt,
    by_value,
    in_words,
    of_ranks,
)
from lmim.options import Config

WIDTH = 120  # columns of the table at least, in a log
MEET_S, GRACE_S = 300.0, 20.0  # for all ranks to come; for the others, once the first has done a check
ENVIRONMENT = "see that the environment is the same on all hosts"
CHECKS = (
    Check("versions", machine.look_at_versions, machine.judge_versions, 30.0, ENVIRONMENT),
    Check("devices", machine.look_at_device, machine.judge_devices, 60.0, "see that nvidia-smi and torch work there"),
    Check("clocks", machine.look_at_clock, machine.judge_clocks, 90.0, "see that ranks reach the first host"),
    Check("run folder", folder.look_at_rights, folder.judge_rights, 60.0,
          "give a run.folder that every rank can write: look at its owner, its mount and its quota"),
    Check("one folder", folder.look_at_sharing, folder.judge_sharing, 30.0, "see that its disk answers on all hosts"),
    Check("images", images.look_at_images, images.judge_images, 90.0,
          "see that data.train can be read from there: the address, the network, the credentials"),
    Check("trial", trial.look_at_trial, reached.judge_trial, trial.TRIAL_S + 2 * trial.GRACE_S,
          "mend what is named first"),
    Check("arithmetic", arithmetic.nothing, arithmetic.judge_arithmetic, 5.0, ""),
)  # fmt: skip


class Stopped(BaseException):
    """This process was asked to end."""


def doctor(config: Config) -> int:
    """Look at everything a run of this configuration needs, on all ranks; return 0 where nothing fails, else 1.

    Raises ConfigError for what is wrong with the configuration whatever the machine. The first rank prints a table and,
    last, a JSON object.
    """
    check(config)
    if config.run.task != "pretrain":
        raise ConfigError(f"run.task ({config.run.task}) cannot be looked at: give the pretraining's configuration")
    topology = dist.discover()
    logging.getLogger("lmim").setLevel(logging.ERROR)  # what is tried again is measured, not told
    try:
        board = dist.Board(topology, dist.meet(topology, timedelta(seconds=MEET_S)))
        token = board.share("begin", secrets.token_hex(4), MEET_S)[0]
    except (RuntimeError, dist.RankLost) as error:
        return _not_met(topology, error)
    rows, stopped = [], ""
    with tempfile.TemporaryDirectory(prefix="lmim-doctor-", ignore_cleanup_errors=True) as temporary:
        case = Case(config, topology, board, Path(temporary), token)
        found: Found = {}
        errors: dict[str, dict[int, str]] = {}
        try:
            with _stop_signals():
                look(case, found, errors)
        except Stopped as error:
            stopped = f"stopped by {error} while {CHECKS[min(len(found), len(CHECKS) - 1)].name} was looked at"
        except dist.RankLost as error:
            stopped = str(error)
        finally:
            folder.clean(case)
        if topology.is_main:
            rows = judge(case, found, errors)
    if stopped:
        rows.append(Row("visit", FAILURE, stopped, "a rank ended before its time: look at what the launcher says"))
    code = _told(rows) if topology.is_main else 1
    with suppress(RuntimeError, dist.RankLost):  # who is gone by now is not missed
        if not stopped:
            code = board.share("end", code, GRACE_S)[0]
            board.close()
    return code


def look(case: Case, found: Found, errors: dict[str, dict[int, str]]) -> None:
    """Let all ranks take every look, and sort what they found from what failed; both are filled as they go on."""
    for one in CHECKS:
        outcome = attempt(one.look, case, one.limit_s)
        of_all = case.board.share(one.name, outcome, one.limit_s + GRACE_S)
        if one.name == "one folder":
            folder.clean(case)  # all have looked
        silent = dict(error="it gave no word: it is gone, or cannot reach the first rank")
        told: dict[int, Finding] = {rank: silent if of is None else of for rank, of in enumerate(of_all)}
        errors[one.name] = {rank: of["error"] for rank, of in told.items() if "error" in of}
        found[one.name] = {rank: of for rank, of in told.items() if "error" not in of}


def judge(case: Case, found: Found, errors: dict[str, dict[int, str]]) -> list[Row]:
    """Return all rows, in the order of the checks; a judgement that fails is a row as well."""
    rows = []
    for one in CHECKS:
        for reason, ranks in by_value(errors.get(one.name, {})).items():
            rows.append(Row(one.name, FAILURE, f"{of_ranks(ranks)}: {reason}", one.advice))
        if not found.get(one.name):
            continue
        try:
            rows += one.judge(case, found)
        except Exception as error:  # noqa: BLE001  (the other rows are still worth to be seen)
            rows.append(Row(one.name, FAILURE, f"the findings could not be judged: {in_words(error)}", one.advice))
    return rows


def _not_met(topology: dist.Topology, error: Exception) -> int:
    here = f"rank {topology.rank} on {socket.gethostname()}"
    words = f"{here} did not meet all {topology.world_size} ranks: {in_words(error)}"
    advice = "see that all ranks are started, and that MASTER_ADDR and MASTER_PORT can be reached from every host"
    if topology.is_main:
        return _told([Row("ranks", FAILURE, words, advice)])
    print(f"error: {words}: {advice}", file=sys.stderr)
    return 1


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Stopped`: a launcher sends them to all ranks when one of them has died."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the table -------------------------------------------------------------------------------------------------------


def _told(rows: list[Row]) -> int:
    """Print the table and one JSON object, and return the exit code."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found, and what to do")
    colours = {OK: "green", WARNING: "yellow", FAILURE: "red"}
    for row in rows:
        words = row.found + (f"\n-> {row.advice}" if row.advice else "")
        table.add_row(f"[{colours[row.state]}]{row.state}[/]", row.check, words.replace("[", r"\["))
    console.print(table)
    counts = {state: sum(row.state == state for row in rows) for state in (FAILURE, WARNING)}
    told = dict(ok=not counts[FAILURE], failures=counts[FAILURE], warnings=counts[WARNING],
                rows=[row._asdict() for row in rows])  # fmt: skip
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    return 1 if counts[FAILURE] else 0
