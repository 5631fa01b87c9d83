"""torchrun that hands signals on to its ranks, and their exit code to whoever started it.

torchrun kills ranks that save for more than half a minute after SIGTERM, dies of SIGUSR1, and turns every code of a
rank into 1. A scheduler must tell a run that was stopped (75: start it again) from a mistake (2: do not) and a failure.

    python launch/torchrun.py TORCHRUN'S ARGUMENTS
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

STOPPED = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that a rank takes as a request to stop
heard: set[int] = set()


def hand_on(number: int, frame: FrameType | None) -> None:
    """Signal every rank of this host; without any yet there is nothing to save."""
    heard.add(number)
    ranks = children()
    if not ranks:
        sys.exit(STOPPED)
    for pid in ranks:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it has ended since
            continue


def children() -> list[int]:
    """Return the ids of this process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended since
            continue
        if parent == os.getpid():
            found.append(int(stat.parent.name))
    return found


def run(arguments: list[str]) -> int:
    """Run torchrun and return the exit code of the rank that failed first, or 0."""
    for number in SIGNALS:
        signal.signal(number, hand_on)
    # seconds, in which a container's first process would not hear a signal that it has no handler for
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--signals-to-handle", "SIGHUP,SIGQUIT", *arguments])  # the others stay ours
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        # a rank that was asked to stop before it could listen had nothing to save
        return STOPPED if -failure.exitcode in heard else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
