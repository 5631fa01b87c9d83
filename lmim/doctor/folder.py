"""The run folder: who may write it, whether all ranks see the same one, how fast it is and how much fits.

The invariant: nothing stays behind. The probes lie in a hidden folder of this visit's own, in the run folder or, where
that does not exist yet, in the nearest folder above it that does.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from lmim import checkpoint
from lmim.config import ConfigError, duration_steps
from lmim.doctor.rows import FAILURE, OK, WARNING, Case, Finding, Found, Row, duration, of_ranks, size
from lmim.options import Config
from lmim.profiling import FP32, count_parameters
from lmim.resume import check_run_folder

PROBE_BYTES = 16 << 20
SLOW_SAVE_S = 600.0


def look_at_rights(case: Case) -> Finding:
    """Write and sync a probe, and return how fast that was and the bytes that are free."""
    folder = Path(case.config.run.folder)
    check_run_folder(case.config)
    try:
        probes = _probes(case)
        probes.mkdir(exist_ok=True)
        began = time.perf_counter()
        with (probes / f"rank-{case.topology.rank}").open("wb") as file:
            file.write(os.urandom(1 << 20) * (PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        usage = shutil.disk_usage(probes)
        held = sum(path.is_dir() for path in checkpoint.complete(folder))
        return dict(bytes_per_s=PROBE_BYTES / seconds, free=usage.free, checkpoints=held, folder=str(probes.parent))
    except OSError as error:
        raise ConfigError(f"run.folder ({folder}) cannot be written: {error.strerror}") from error


def _probes(case: Case) -> Path:
    """Return the folder of this visit's probes."""
    folder = Path(case.config.run.folder).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder / f".lmim-doctor-{case.token}"


def look_at_sharing(case: Case) -> Finding:
    """Return how many ranks' probes this rank sees, once all have written."""
    try:
        probes = _probes(case)
        # a network folder's list of names may be some seconds old; a new one is asked for where a name is looked up
        return dict(seen=[rank for rank in case.board.ranks if (probes / f"rank-{rank}").exists()])
    except OSError as error:
        raise ConfigError(f"run.folder cannot be listed: {error.strerror}") from error


def clean(case: Case) -> None:
    """Remove this rank's probe, and the folder of all once it is empty."""
    with suppress(OSError):
        probes = _probes(case)
        (probes / f"rank-{case.topology.rank}").unlink(missing_ok=True)
        probes.rmdir()


def judge_rights(case: Case, found: Found) -> list[Row]:
    """Compare how long a save takes with what is bearable, and what is free with what will be written."""
    rights, config = found["run folder"], case.config
    whole = checkpoint_bytes(config)
    share = whole / case.topology.world_size
    slowest = min(rights, key=lambda rank: rights[rank]["bytes_per_s"])
    save_s = share / rights[slowest]["bytes_per_s"]
    words = (
        f"{config.run.folder} can be written, {size(rights[slowest]['bytes_per_s'])}/s; a save takes {duration(save_s)}"
    )
    advice = "" if save_s < SLOW_SAVE_S else "a save takes long: choose a faster disk, or set checkpoint.every higher"
    rows = [Row("run folder", WARNING if advice else OK, words, advice,
                figures=dict(write_bytes_per_s=rights[slowest]["bytes_per_s"], save_s=save_s))]  # fmt: skip
    kept, steps = config.checkpoint.keep + 1, _kept_for_good(case, found)
    fullest = min(rights, key=lambda rank: rights[rank]["free"])
    free, held = rights[fullest]["free"], min(rights[fullest]["checkpoints"], kept)
    needed = whole * (kept - held + steps)
    words = f"{size(free)} free, {size(needed)} needed: {kept - held + steps} checkpoints of {size(whole)}"
    state = FAILURE if free < needed else WARNING if free < 1.2 * needed else OK
    advice = "" if state == OK else ("make room, or set checkpoint.keep or keep_every lower, or take another "
                                     "run.folder")  # fmt: skip
    rows.append(Row("disk space", state, words, advice, figures=dict(free_bytes=free, needed_bytes=needed)))
    return rows


def judge_sharing(case: Case, found: Found) -> list[Row]:
    """All ranks' probes must be seen by all."""
    sharing = {rank: of["seen"] for rank, of in found["one folder"].items()}
    written = set(found["run folder"])
    apart = [rank for rank, seen in sharing.items() if not written <= set(seen)]
    if not apart:
        return []
    return [Row("one folder", FAILURE, f"{of_ranks(apart)} do not see what others wrote to {case.config.run.folder}",
                "give run.folder a place on a disk that all hosts share")]  # fmt: skip


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of one checkpoint over all ranks: weights, target and AdamW's two moments, in fp32."""
    parts = count_parameters(config)
    buffers = parts.online.buffers + parts.target.buffers + parts.decoder.buffers
    return FP32 * (3 * parts.trained + parts.target.parameters + buffers)


def _kept_for_good(case: Case, found: Found) -> int:
    """Return how many checkpoints `checkpoint.keep_every` will keep; 0 where the number of steps is unknown."""
    config, images = case.config, [of["epoch_images"] for of in found.get("images", {}).values()]
    try:
        per_epoch = images[0] / config.data.global_batch if images else 0.0
        total = duration_steps(config.optim.duration, steps_per_epoch=per_epoch)
        every = duration_steps(config.checkpoint.keep_every, steps_per_epoch=per_epoch, total_steps=total)
    except ConfigError:  # a share of no steps at all
        return 0
    return total // every if every else 0
