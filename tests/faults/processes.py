"""Finding all processes of a run, whatever sessions and groups its launcher puts them into."""

from __future__ import annotations

from pathlib import Path


def processes_of(mark: str) -> dict[int, list[str]]:
    """Return {process: its command} of all that were started with a mark in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
    return found
