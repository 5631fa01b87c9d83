"""Where the bytes of shards come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO

from lmim.data.plan import Recent

OPEN_FILES = 128


class Damaged(ValueError):
    """Bytes that are missing, too few or not what was written; says which and why."""


class Storage:
    """Reads local files."""

    def __init__(self) -> None:
        self._files: Recent[str, BinaryIO] = Recent(OPEN_FILES)

    def read(self, url: str) -> bytes:
        try:
            with open(url, "rb") as file:
                return file.read()
        except OSError as error:
            raise Damaged(f"{url} cannot be read: {error.strerror}") from error

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | Damaged]:
        return [self._range(*one) for one in wanted]

    def _range(self, url: str, start: int, stop: int) -> bytes | Damaged:
        try:
            file = self._files.get_or_make(url, lambda path: open(path, "rb", buffering=0))
            data = os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            return Damaged(f"{url} cannot be read: {error.strerror}")
        return data if len(data) == stop - start else Damaged(f"{url} is shorter than its index says")

    def close(self) -> None:
        self._files.clear()
