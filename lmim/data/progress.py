"""How far long work on images is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # between plain progress lines


class Done(NamedTuple):
    """Images done and bytes read, and how many there are in all; 0 where that is not known."""

    images: int
    images_total: int
    bytes: int
    bytes_total: int = 0

    @property
    def share(self) -> float:
        """The share of the work that is done, from 0 to 1."""
        if self.images_total:
            return self.images / self.images_total
        return self.bytes / self.bytes_total if self.bytes_total else 1.0


class ImageProgress:
    """Shows images done, images/s, MB/s and time left. What an earlier run did is not counted in the rates."""

    def __init__(self, name: str):
        self.name, self.first, self.start, self.last_line = name, None, time.monotonic(), time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn(name), BarColumn(), TextColumn("{task.fields[words]}"), TextColumn("ETA"),
                   TimeRemainingColumn())  # fmt: skip
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("", total=1.0, words="") if self.bar else None

    def __enter__(self) -> ImageProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: Done) -> None:
        """Take note of what is done; the first call says what was done before."""
        self.first = self.first or done
        passed_s = max(time.monotonic() - self.start, 1e-9)
        images_s = (done.images - self.first.images) / passed_s
        mb_s = (done.bytes - self.first.bytes) / passed_s / 1e6
        total = f"/{done.images_total}" if done.images_total else ""
        words = f"{done.images}{total} images, {images_s:,.0f} images/s, {mb_s:,.1f} MB/s"
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=done.share, words=words)
        elif done.share >= 1.0 or time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            eta_s = passed_s * (1.0 - done.share) / max(done.share - self.first.share, 1e-9)
            print(f"{self.name}: {words}, ETA {eta_s:.0f} s", file=sys.stderr)
