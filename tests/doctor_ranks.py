"""One rank of a doctor's visit with something wrong on the last rank: `python -m tests.doctor_ranks FAULT ARGUMENTS`.

What is wrong is faked where it would come from, and only checks that start no process are made, so that a visit takes
as long as importing torch does.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from typing import Any

from lmim.__main__ import main
from lmim.doctor import visit
from lmim.doctor.rows import Case

FEW = ("versions", "devices", "clocks", "run folder", "one folder")
SHORT_S = 4.0


def _another_version() -> None:
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "2.0.1" if name == "torch" else version(name)


def _clock_off() -> None:
    now = time.time
    time.time = lambda: now() - 61.0


def _look_in_place(look: Any) -> None:
    one = visit.CHECKS[0]
    visit.CHECKS = (one._replace(look=look, limit_s=SHORT_S), *visit.CHECKS[1:])


def _raises(case: Case) -> None:
    raise RuntimeError("nobody has thought of this")


def _hangs(case: Case) -> None:
    time.sleep(600)


def _dies(case: Case) -> None:
    os._exit(9)


FAULTS = {
    "none": lambda: None,
    "version": _another_version,
    "clock": _clock_off,
    "raises": lambda: _look_in_place(_raises),
    "hangs": lambda: _look_in_place(_hangs),
    "dies": lambda: _look_in_place(_dies),
}

if __name__ == "__main__":
    visit.GRACE_S = SHORT_S
    visit.CHECKS = tuple(one._replace(limit_s=2 * SHORT_S) for one in visit.CHECKS if one.name in FEW)
    if os.environ["RANK"] == "1":
        FAULTS[sys.argv[1]]()
    sys.exit(main(["doctor", *sys.argv[2:]]))
