"""How a run is asked to stop: a signal, a file, a time limit, a launcher that is gone.

Owns the request and the agreement. The invariant: all ranks stop after the same step, whichever of them was asked.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch

from lmim import dist

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK_EVERY_S = 1.0  # at the file and the launcher; the clock costs nothing


class StopRequest:
    """Turns a request to any rank into one decision that all ranks take at the same call of `agreed`.

    `agreed()` is called once a step, and between the batches of an evaluation, on every rank. It returns what was
    agreed in the call before and starts the next agreement, a maximum over one number on the CPU, so nothing waits for
    it. A second SIGINT ends the process at once.
    """

    def __init__(self, stop_file: Path | None = None, limit_s: float = 0.0):
        self.reason: str | None = None  # of this rank
        self.stop_file, self._limit_s = stop_file, limit_s
        self._began = self._looked = time.monotonic()
        self._launchers = _launchers()
        self._decided = False
        self._flag = torch.zeros(1)
        self._pending = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if self.reason is None and self.stop_file is not None:  # of the ranks the first
            # not logged: it may be a line of the log that was interrupted
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            os.write(2, f"{name}: stopping after this step, with a checkpoint{again}\n".encode())
        self.reason = self.reason or name

    def _look(self) -> None:
        now = time.monotonic()
        if self._limit_s and now - self._began > self._limit_s:
            self.reason = self.reason or f"run.time_limit_minutes ({self._limit_s / 60:g})"
        if self.reason or now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        if self.stop_file is not None and self.stop_file.exists():
            self.reason = str(self.stop_file)
        elif self._launchers and _launchers(len(self._launchers)) != self._launchers:
            self.reason = "the end of its launcher"

    def agreed(self) -> bool:
        """Tell whether all ranks stop now; a collective."""
        dist.progress()
        self._look()
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._decided = bool(self._flag.item())
        if not self._decided:
            self._flag.fill_(float(self.reason is not None))
            self._pending = dist.start_maximum(self._flag)
            if self._pending is None:
                self._decided = self.reason is not None
        return self._decided

    def reasons(self) -> str:
        """Say what asked for the stop that was agreed, and take a stop file away; a collective."""
        found = dict.fromkeys(reason for reason in dist.gather_objects(self.reason) if reason)
        if self.stop_file is not None:  # whoever asked first: it has been heard, and must not stop the next start
            self.stop_file.unlink(missing_ok=True)
        return " and ".join(found)

    def close(self) -> None:
        """Finish the agreement in flight and give the signals back."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _launchers(count: int = 2) -> list[int]:
    """Return the ids of the launcher's processes above this one, nearest first; none if something else started it.

    torchrun is one. deepspeed is two, one on each host and one of the user's, and when either is killed by a signal it
    leaves its ranks behind. Whatever else may have started this process may end before it, such as a shell.
    """
    found, pid = [], os.getppid()
    for _ in range(count):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
        if not any(name in command for name in ("torchrun", "torch.distributed.run", "deepspeed")):
            break
        found.append(pid)
        pid = parent
    return found


def ignore_stop_signals() -> None:
    """Leave stop signals to the parent: a loader worker that died of Ctrl-C would keep its rank from saving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
