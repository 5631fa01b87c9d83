"""Signs of life: which rank, on which host, is gone when a run cannot go on.

Every rank counts up a number in the process group's store from a thread of its own, so it goes on while the main thread
computes or waits for others. Rank 0 watches all of them and the others watch rank 0; whoever finds that a rank has been
silent for the limit tells all, and every rank ends: whatever waits in a collective would wait for ever. When a
collective fails, as it does at once where the system notices that a peer is gone, `missing` says who it was.

Invariant: no silence shorter than the limit ends a run by itself, and a rank that left in order is never called lost.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
INTERVAL_S = 2.0  # between two signs; a store that serves 512 ranks then has some 800 short requests a second
MISSED = 4  # intervals without a sign: the rank is gone, if a collective has failed too
LEFT, FAILED = b"left", b"failed "


class Heartbeat:
    """The signs of one rank; `store` is a connection that nobody else uses (its requests block)."""

    def __init__(self, store: Any, rank: int, world_size: int, host: str, limit_s: float, progress_limit_s: float,
                 stacks: Path | None = None):  # fmt: skip
        self.store, self.rank, self.world_size, self.limit_s, self.stacks = store, rank, world_size, limit_s, stacks
        self.progress_limit_s, self._progress = progress_limit_s, time.monotonic()
        self.interval_s = min(INTERVAL_S, limit_s / (2 * MISSED))
        self.grace_s = MISSED * self.interval_s
        self.watched = range(world_size) if rank == 0 else (0,)
        self.hosts: dict[int, str] = {rank: host}
        self._signs: dict[int, tuple[bytes, float]] = {}  # the last sign, and when it was first seen
        self._answered = time.monotonic()  # when the store last answered
        self._stop = threading.Event()
        store.set_timeout(timedelta(seconds=max(limit_s, 1)))
        store.set(f"host/{rank}", host)
        store.set(f"sign/{rank}", b"0")
        for other in range(world_size):
            self.hosts[other] = store.get(f"host/{other}").decode()
        self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in (self._signal, self._judge)]
        for thread in self._threads:
            thread.start()

    def _signal(self) -> None:
        """Give signs and read those of others, until the store is gone."""
        count = 0
        try:
            while not self._stop.is_set():
                count += 1
                self.store.set(f"sign/{self.rank}", str(count).encode())
                watched = self.watched
                signs = self.store.multi_get([f"sign/{rank}" for rank in watched])
                now = time.monotonic()
                self._signs |= {rank: (sign, now) for rank, sign in zip(watched, signs, strict=True)
                                if sign != self._signs.get(rank, (None,))[0]}  # fmt: skip
                self._answered = now
                if self.store.check(["verdict"]):
                    words = self.store.get("verdict").decode()
                    self._let_all_hear()
                    self._end_process(words)
                self._stop.wait(self.interval_s)
        except RuntimeError as error:  # the process that holds the store is gone
            logger.debug("no store: %s", error)

    def _judge(self) -> None:
        """End this process once a watched rank has been silent for the limit, or has failed and left nobody free.

        It stands apart from what waits for the store, and looks twice: a process that was itself stopped for a while
        finds every sign old at first.
        """
        suspects: list[int] = []
        while not self._stop.wait(self.interval_s):
            silent = self.silent(self.limit_s)
            words = (
                f"{self.name(silent)} silent for {self.limit_s:.0f} s" if silent else self._failed(after_s=self.grace_s)
            )
            if words and suspects == silent:
                self.end(words)
            suspects = silent
            if time.monotonic() - self._progress > self.progress_limit_s:
                self.end(f"{self.name([self.rank])} stuck: no step for {self.progress_limit_s / 60:g} minutes")

    def progress(self) -> None:
        """Say that the main thread goes on."""
        self._progress = time.monotonic()

    def end(self, words: str) -> None:
        """Tell all ranks why, if the store still answers, and end this process."""
        self._stop.set()
        if time.monotonic() - self._answered < self.grace_s:
            with suppress(RuntimeError):
                self.store.set("verdict", words)
            self._let_all_hear()
        self._end_process(words)

    def _let_all_hear(self) -> None:
        """Say that this rank knows the verdict; where the store is, wait until all know it that still give signs.

        The store is gone with rank 0, and a rank that had not read the verdict by then would blame rank 0.
        """
        with suppress(RuntimeError):
            self.store.set(f"heard/{self.rank}", b"")
            if self.rank == 0:
                ended = {rank for rank, (sign, _) in self._signs.items() if sign.startswith((LEFT, FAILED))}
                deaf = ended.union(self.silent(self.grace_s))
                awaited = [f"heard/{rank}" for rank in range(self.world_size) if rank not in deaf]
                self.store.wait(awaited, timedelta(seconds=2 * self.grace_s))

    def silent(self, seconds: float) -> list[int]:
        """Return the watched ranks, in order, that have given no sign for so long and neither left nor failed."""
        if time.monotonic() - self._answered > seconds:
            return [0]  # the store is with it
        return [rank for rank, (sign, since) in sorted(self._signs.items())
                if self._answered - since > seconds and not sign.startswith((LEFT, FAILED))]  # fmt: skip

    def _failed(self, after_s: float) -> str | None:
        failed = {rank: sign for rank, (sign, since) in self._signs.items()
                  if sign.startswith(FAILED) and self._answered - since >= after_s}  # fmt: skip
        if not failed:
            return None
        rank, sign = min(failed.items())
        return f"{self.name([rank])} at an end: {sign.removeprefix(FAILED).decode()}"

    def name(self, ranks: list[int]) -> str:
        """Return 'rank 3 on host-b is' or 'ranks 2, 3 on host-b are'."""
        hosts = ", ".join(dict.fromkeys(self.hosts.get(rank, "an unknown host") for rank in ranks))
        one = len(ranks) == 1
        return f"rank{'' if one else 's'} {', '.join(map(str, ranks))} on {hosts} {'is' if one else 'are'}"

    def missing(self) -> str | None:
        """Return who is gone or has failed, after a wait of some intervals; None if all others are alive."""
        self.watched = range(self.world_size)
        deadline = time.monotonic() + 2 * self.grace_s
        while time.monotonic() < deadline:
            words, silent = self._failed(after_s=0), [r for r in self.silent(self.grace_s) if r != self.rank]
            if silent:
                words = f"{self.name(silent)} lost: no sign of life for {self.grace_s:.0f} s"
            if words:
                return words
            time.sleep(self.interval_s / 4)
        return None

    def leave(self, error: str = "") -> None:
        """Say that this rank ends, in order or with an error of its own, and stop watching."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=self.interval_s)
        if time.monotonic() - self._answered < self.grace_s:
            with suppress(RuntimeError):
                self.store.set(f"sign/{self.rank}", FAILED + error[:500].encode() if error else LEFT)

    def _end_process(self, words: str) -> None:
        """Say why, and what every thread is at, and end this process at once: its main thread may wait for ever."""
        logger.error("%s: this rank ends; the same command goes on from the last checkpoint", words)
        faulthandler.dump_traceback()  # to stderr
        if self.stacks is not None:
            with suppress(OSError):
                self.stacks.mkdir(exist_ok=True)
                with (self.stacks / f"rank-{self.rank:04d}.txt").open("w") as file:
                    file.write(f"{words}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)
