"""What a run tells: values gathered on the device, and where they go.

Owns the accumulators and the sinks (`log.jsonl`, `train.log` and the terminal, wandb). The invariants: between two
flushes nothing is copied from the device; `log.jsonl` holds exactly one object per optimizer step, also after a resume.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lmim.config import Config
from lmim.dist import Topology, mean_over_ranks

logger = logging.getLogger(__name__)
LOG_FILE, EVAL_FILE, TEXT_FILE, UNREADABLE_FOLDER = "log.jsonl", "eval.jsonl", "train.log", "unreadable"
RUN_ENDS = "the run ends here: "  # how the text log's last line begins where an error ended the run
NAMED_IN_LOG = 10  # images that a rank could not read


class Meters:
    """Collects the steps since the last flush; `flush` averages them over ranks and returns one row per step."""

    def __init__(self, topology: Topology, global_batch: int):
        self.topology, self.global_batch = topology, global_batch
        self._steps: list[tuple[int, float, dict[str, float]]] = []
        self._names: tuple[str, ...] = ()
        self._values: list[Tensor] = []
        self._waited_s = 0.0
        self._skipped_here = 0
        self._since = time.perf_counter()

    def skipped(self, images: int) -> None:
        """Count images of this rank that could not be read."""
        self._skipped_here += images

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited_s += seconds

    def add(self, step: int, epoch: float, micros: list[Any], scheduled: dict[str, float], grad_norm: Tensor) -> None:
        """Keep one step's values on the device: the means of its micro-batches' outputs, and its gradient norm."""
        self._names = (*micros[0]._fields, "grad_norm")
        means = torch.stack([torch.stack(out).float() for out in micros]).mean(dim=0).detach()
        self._values.append(torch.cat([means, grad_norm.detach().float().reshape(1)]))
        self._steps.append((step, epoch, scheduled))

    def flush(self) -> list[dict[str, Any]]:
        """Return the rows of all steps since the last flush; images/s and waiting are those steps' averages."""
        if not self._steps:
            return []
        skipped = torch.full((len(self._values), 1), float(self._skipped_here), device=self.topology.device)
        values = mean_over_ranks(torch.cat([torch.stack(self._values), skipped], dim=1)).tolist()
        elapsed_s = time.perf_counter() - self._since
        shared = dict(
            images_per_second=round(len(self._steps) * self.global_batch / elapsed_s, 1),
            data_wait=round(self._waited_s / elapsed_s, 4),
            memory_gib=round(self._memory_gib(), 3),
            skipped_images=round(values[0][-1] * self.topology.world_size),
        )
        rows = [
            dict(step=step, epoch=round(epoch, 4), **dict(zip(self._names, row[:-1], strict=True)), **scheduled,
                 **shared)
            for (step, epoch, scheduled), row in zip(self._steps, values, strict=True)
        ]  # fmt: skip
        self._steps, self._values, self._waited_s = [], [], 0.0
        self._since = time.perf_counter()
        return rows

    def restart_clock(self) -> None:
        """Leave out what happened since the last flush (an evaluation, a checkpoint) from the next images/s."""
        assert not self._steps, "flush first"
        self._since, self._waited_s = time.perf_counter(), 0.0

    def _memory_gib(self) -> float:
        """Return the peak of the device's memory, or on CPUs of this process's."""
        if self.topology.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def numbers_again(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a log with NaN where null stands for what was not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `.jsonl` file; a line that is none, as a crash may leave, is named and left out."""
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else (), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "step" in row and isinstance(row["step"], int):
            rows.append(row)
        else:
            logger.warning("%s: line %d is damaged and left out", path, number)
    return rows


class JsonLines:
    """A `.jsonl` file that goes on at a step: rows from that step on, written by a run that was cut, are dropped."""

    def __init__(self, path: Path, start_step: int):
        kept = [row for row in read_rows(path) if start_step and row["step"] < start_step]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file in the place of the old one
        temporary.replace(path)
        self._file, self._late = path.open("ab", buffering=0), b""

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; while the disk is full, rows wait in memory for the next one."""
        # JSON knows no NaN: a value that is not finite is written as null
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        waited, lines, size = bool(self._late), self._late + json.dumps(clean).encode() + b"\n", None
        try:
            size = os.fstat(self._file.fileno()).st_size
            if self._file.write(lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._late = b""
        except OSError as error:
            self._late = lines
            if size is not None:
                with suppress(OSError):
                    os.ftruncate(self._file.fileno(), size)  # no half rows
            if not waited:
                logger.warning("%s cannot be written (%s): its rows wait in memory", self._file.name, error.strerror)

    def close(self) -> None:
        if self._late:
            logger.error("%s lacks its last rows: it could not be written", self._file.name)
        self._file.close()


class UnreadableLog:
    """Names every image that was skipped, in a file of this rank; the first few also in the log."""

    def __init__(self, run_folder: Path, rank: int):
        self.path, self.images, self.last = run_folder / UNREADABLE_FOLDER / f"rank-{rank:04d}.tsv", 0, ""

    def write(self, step: int, sample_id: int, reason: str) -> None:
        self.images, self.last = self.images + 1, reason
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{step}\t{sample_id}\t{reason}\n")
        except OSError as error:  # a full disk ends no run
            logger.warning("%s cannot be written (%s): it lacks image %d", self.path, error.strerror, sample_id)
        if self.images <= NAMED_IN_LOG:
            more = f" (further ones only in {self.path})" if self.images == NAMED_IN_LOG else ""
            logger.warning("skipped image %d: %s%s", sample_id, reason, more)


class ProgressLine:
    """One moving line with the time left on a terminal; elsewhere, and in `train.log`, plain lines."""

    def __init__(self, total_steps: int, start_step: int):
        self.total_steps, self._done, self._began = total_steps, start_step, time.perf_counter()
        self._start = start_step
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"), TextColumn("left"),
                TimeRemainingColumn(), console=Console(),
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=total_steps, completed=start_step)
            self._bar.start()

    def update(self, row: dict[str, Any], told: str) -> None:
        """Show the newest step's values; `told` are those that its task tells beside the loss."""
        done = row["step"] + 1
        words = f"epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  {told}  {row['images_per_second']:.0f} images/s"
        if self._bar:
            short = f"loss {row['loss']:.3f} {row['images_per_second']:.0f} images/s"  # fits 80 columns
            self._bar.update(self._task, completed=done, description=short)
        left_s = (time.perf_counter() - self._began) / max(done - self._start, 1) * (self.total_steps - done)
        text = f"step {done}/{self.total_steps}  {words}  waiting {row['data_wait']:.0%}  left {clock(left_s)}"
        logger.info(text, extra={"progress": True})

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _Screen(logging.Handler):
    """Prints to whatever stdout is by then, so that lines go above the moving one and not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def set_up_logging(run_folder: Path | None, is_main: bool) -> None:
    """Send the first rank's messages to the terminal and `train.log`, other ranks' warnings to stderr."""
    root = logging.getLogger("lmim")
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    screen = _Screen() if is_main else logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.addFilter(lambda record: not getattr(record, "file_only", False))
    if sys.stdout.isatty():  # the moving line shows progress there
        screen.addFilter(lambda record: not getattr(record, "progress", False))
    root.addHandler(screen)
    if is_main and run_folder is not None:
        file = logging.FileHandler(run_folder / TEXT_FILE)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


class Wandb:
    """The wandb run of a run folder; a resumed run goes on in it."""

    def __init__(self, config: Config, resolved: dict[str, Any], run_folder: Path):
        import wandb

        marker = run_folder / "wandb_id.txt"
        run_id = marker.read_text().strip() if marker.is_file() else secrets.token_hex(4)
        marker.write_text(run_id + "\n")
        self._run = wandb.init(project=config.log.wandb_project, name=config.run.name or run_folder.name, id=run_id,
                               resume="allow", mode=config.log.wandb, dir=str(run_folder), config=resolved)  # fmt: skip

    def write(self, row: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()
