"""Worker processes for long work on shards.

Owns the processes. The invariants: a worker that dies is an error that names it and its task, never a hang; workers end
with the process that started them, also where that is killed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from lmim.config import ConfigError
from lmim.data.storage import Damaged, StorageError

REPORT_EVERY_S = 0.1
Report = Callable[[int, int], None]  # takes the images and bytes that are done since the last report
T = TypeVar("T")
R = TypeVar("R")


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of its task; says which."""


def run_tasks(work: Callable[[T, Report], R], tasks: Iterable[tuple[str, T]], *, workers: int,
              report: Report) -> Iterator[R]:  # fmt: skip
    """Yield `work(task, report)` of the named tasks as they are done, in any order; one worker is this process.

    Tasks are made when a worker is free. What `work` raises is raised here; a worker's other mistakes and its death are
    `WorkerDied`.
    """
    if workers == 1:
        yield from (work(task, report) for _, task in tasks)
        return
    waiting = iter(tasks)
    # forked, since a new interpreter takes seconds to import torch
    context = multiprocessing.get_context("fork")
    crew: dict[Connection, BaseProcess] = {}
    names: dict[Connection, str] = {}
    try:
        for name, task in itertools.islice(waiting, workers):
            here, there = context.Pipe()
            crew[here] = context.Process(target=_serve, args=(work, there, [*crew, here]), daemon=True)
            crew[here].start()
            there.close()
            names[here] = name
            here.send(task)
        while names:
            for end in wait(list(names)):
                kind, *values = _receive(end, crew[end], names[end])
                if kind == "report":
                    report(*values)
                    continue
                if kind == "failed":
                    raise values[0]
                name, task = next(waiting, (None, None))
                if name is None:
                    del names[end]
                else:
                    names[end] = name
                    end.send(task)
                yield values[0]
    finally:
        for end, process in crew.items():
            end.close()
            process.terminate()
        for process in crew.values():
            process.join()


def _receive(end: Connection, process: BaseProcess, name: str) -> tuple:
    try:
        return end.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise WorkerDied(f"worker process {process.pid} {how} while at work on {name}: "
                         "start again to go on with what is not done") from None  # fmt: skip


def _serve(work: Callable[[T, Report], R], end: Connection, others: list[Connection]) -> None:
    """Do tasks until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that started this one ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:  # else a pipe stays open as long as any later worker lives
        other.close()
    try:
        while True:
            task = end.recv()
            counter = _Counter(end)
            try:
                result = work(task, counter)
            except (ConfigError, StorageError, Damaged, OSError) as error:
                end.send(("failed", error))
            else:
                counter.send()
                end.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Counter:
    """Adds up reports and sends them on now and then."""

    def __init__(self, end: Connection):
        self.end, self.images, self.bytes, self.last = end, 0, 0, time.monotonic()

    def __call__(self, images: int, size_bytes: int) -> None:
        self.images, self.bytes = self.images + images, self.bytes + size_bytes
        if time.monotonic() - self.last >= REPORT_EVERY_S:
            self.send()

    def send(self) -> None:
        self.end.send(("report", self.images, self.bytes))
        self.images, self.bytes, self.last = 0, 0, time.monotonic()
