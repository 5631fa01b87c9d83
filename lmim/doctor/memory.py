"""How much memory of the host this process may still take, and what sets that limit.

Owns the reading of /proc and of control groups (version 1 and 2), as containers and schedulers set them; elsewhere
nothing is known. What the page cache holds counts as free: the system gives it up.
"""

from __future__ import annotations

import resource
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> tuple[int | None, str]:
    """Return bytes and the limit's name; None where it cannot be told."""
    limits = [*_of_groups()]
    meminfo = _fields(PROC / "meminfo")
    if "MemAvailable" in meminfo:
        limits.append((meminfo["MemAvailable"], "the host's free memory"))
    return min(limits, default=(None, "unknown"))


def address_space() -> tuple[int, int] | None:
    """Return how much address space this process has taken at most, and may take (`ulimit -v`); None without limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    return _fields(PROC / "self" / "status").get("VmPeak", 0), soft


def peak_memory() -> int:
    """Return the most memory that this process has had, in bytes."""
    # ru_maxrss would count what its parent had when it was forked
    peak = _fields(PROC / "self" / "status").get("VmHWM")
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fields(path: Path) -> dict[str, int]:
    """Return the fields of a file of /proc that are in kB, in bytes."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}
    except OSError:
        return {}


def _of_groups() -> list[tuple[int, str]]:
    """Return what each control group that this process is in, and those above it, leave it."""
    try:
        lines = [line.split(":", 2) for line in (PROC / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for number, controllers, path in lines:
        if number == "0":
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *(above for above in own.parents if above == root or root in above.parents)):
            room = _room(folder, *names)
            if room is not None:
                found.append((room, f"the memory limit of control group {folder.relative_to(GROUPS)}"))
    return found


def _room(folder: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group in this container, or "max"
        return None
    return None if most >= 1 << 60 else max(most - taken + int(stat.get(cache, 0)), 0)
