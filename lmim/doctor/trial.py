"""The trial: all ranks meet as in training, time their all-reduces and take a real step on random crops.

Owns the processes that do so, one a rank (`step`). They are processes of their own so that the memory measured is a
trainer's, and whatever kills or hangs them leaves the doctor alive to tell of it. The invariant: they write to a
temporary folder only, and none outlives its doctor.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmim.config import ConfigError, save_config, validate
from lmim.doctor.memory import available_memory
from lmim.doctor.rows import Case, Finding, of_ranks
from lmim.options import Config

TRIAL_S, GRACE_S = 480.0, 15.0  # in all; and once another rank's trial has failed
OUT_OF_MEMORY = ("out of memory", "memoryerror", "can't allocate memory", "cannot allocate memory", "bad_alloc",
                 "failed to map", "resource temporarily unavailable", "not enough memory")  # fmt: skip


def trial_config(config: Config, ranks: int) -> Config:
    """Return the configuration of a step of the run's micro-batches, of which two show what more would.

    A batch that does not divide gives way to one that does.
    """
    micro = config.data.micro_batch or max(config.data.global_batch // ranks, 1)
    accumulate = -(-config.data.global_batch // (ranks * micro))
    if not config.parallel.deepspeed_config:  # that may name the whole batch
        accumulate = min(accumulate, 2)
    data = replace(config.data, micro_batch=micro, global_batch=ranks * micro * accumulate)
    data.lanes = min(data.lanes, data.global_batch)
    return replace(config, data=data, run=replace(config.run, init_from="", resume_from=""))


def look_at_trial(case: Case) -> Finding:
    """Run this rank's trial and return what it measured, and in "failed" how it failed, if it did."""
    if case.board.lost:
        raise ConfigError(f"not tried, as {of_ranks(sorted(case.board.lost))} gave no word")
    config = trial_config(case.config, case.topology.world_size)
    validate(config, case.topology.world_size)
    available, limit = available_memory()
    folder = case.temporary / "trial"
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    found: Finding = dict(available=available, limit=limit, shm=_shared_memory_bytes(), failed=_run(case, folder))
    for name in ("network", "step"):
        with suppress(OSError, ValueError):
            found[name] = json.loads((folder / f"{name}.json").read_text())
    if "step" in found:
        images = case.config.data.global_batch / case.topology.world_size  # of a rank's whole step
        # what is sent once a step is counted with every micro-batch: a whole step takes this long at most
        found["step"]["step_s"] = found["step"]["micro_step_s"] * images / config.data.micro_batch
    return found


def _shared_memory_bytes() -> int | None:
    """Return the bytes that are free in shared memory; None where that has no place of its own."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _run(case: Case, folder: Path) -> str:
    """Wait for the trial's process to end and say how it failed, if it did."""
    command = [sys.executable, "-m", "lmim.doctor.step", str(folder)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)  # stdin: see step.py
    deadline, others = time.monotonic() + TRIAL_S, False
    try:
        while process.poll() is None:
            if not others and case.board.marked("trial failed"):
                others, deadline = True, min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                process.kill()
                break
            time.sleep(0.1)
        code = process.wait(timeout=GRACE_S)
    finally:
        process.kill()
        process.stdin.close()
    if code == 0:
        return ""
    if time.monotonic() > deadline:
        words = "it waited for another rank" if others else f"it did not end within {TRIAL_S:g} s"
    else:
        words = _why(folder, code)
    case.board.mark("trial failed")
    return words


def _why(folder: Path, code: int) -> str:
    """Say why a trial's process ended, from what it left."""
    lines = [line.strip() for line in (folder / "output").read_text(errors="replace").splitlines() if line.strip()]
    with suppress(OSError, ValueError):
        return json.loads((folder / "error.json").read_text())
    memory = next((line for line in reversed(lines) if any(words in line.lower() for words in OUT_OF_MEMORY)), None)
    if memory:
        return f"out of memory: {memory}"
    if code == -9:
        return "out of memory: the system killed it"
    last = f": {lines[-1]}" if lines else ""
    return f"it ended by {'signal' if code < 0 else 'exit code'} {abs(code)}{last}"


def is_memory(words: str) -> bool:
    """Tell whether a failure is one of memory."""
    return any(one in words.lower() for one in OUT_OF_MEMORY)


def leave(path: Path, value: Any) -> None:
    """Write JSON that is there as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
