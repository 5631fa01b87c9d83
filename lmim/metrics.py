"""What a run tells: values gathered on the device, and where they go.

Owns the accumulators and the sinks (`log.jsonl`, `train.log` and the terminal, TensorBoard, wandb). The invariants:
between two flushes nothing is copied from the device, and a flush is one reduction over ranks; `log.jsonl` holds
exactly one object per optimizer step, also after a resume.
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
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lmim.config import ConfigError
from lmim.dist import Topology, sum_over_ranks
from lmim.norms import norms
from lmim.options import Config

logger = logging.getLogger(__name__)
LOG_FILE, EVAL_FILE, TEXT_FILE, UNREADABLE_FOLDER = "log.jsonl", "eval.jsonl", "train.log", "unreadable"
RUN_ENDS = "the run ends here: "  # how the text log's last line begins where an error ended the run
NAMED_IN_LOG = 10  # images that a rank could not read
RANKED_IMAGES = 256  # of a micro-batch, that an effective rank is of: more would take longer than a step


def effective_rank(features_BF: Tensor) -> float:
    """Return the exponential of the entropy of the singular values' shares (RankMe, arXiv:2210.02885): 1 … min(B, F).

    1 where all images have the same features, up to a factor. It waits for the device.
    """
    gram_BB = (features_BF @ features_BF.T).double().cpu()
    if not gram_BB.isfinite().all():
        return math.nan
    shares = torch.linalg.eigvalsh(gram_BB).clamp(min=0).sqrt()
    shares = shares / shares.sum()
    return torch.special.entr(shares).sum().exp().item()


class ForwardClock:
    """Times a model's forward passes, on a GPU by its own clock, without waiting for it."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.on_gpu, self._marks = device.type == "cuda", []
        model.register_forward_pre_hook(lambda *_: self._mark())
        model.register_forward_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        if self.on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def take_s(self) -> float:
        """Return how long all passes since the last call took; it waits for the last of them."""
        marks, self._marks = self._marks, []
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        if self.on_gpu and pairs:
            pairs[-1][1].synchronize()
            return sum(began.elapsed_time(ended) for began, ended in pairs) / 1000
        return sum(ended - began for began, ended in pairs)


class Cost(NamedTuple):
    """What an image's step costs, and what one rank's device could do."""

    flops_per_image: float
    peak_flops: float  # FLOP/s


class Meters:
    """Collects the steps since the last flush; `flush` averages them over ranks and returns one row per step.

    `forward` times what a rank computes by itself; None where weights are cut, since a forward then waits for others.
    """

    def __init__(self, topology: Topology, global_batch: int, cost: Cost, forward: ForwardClock | None = None):
        self.topology, self.global_batch, self.cost, self.forward = topology, global_batch, cost, forward
        self._steps: list[tuple[int, float, dict[str, float]]] = []
        self._names: tuple[str, ...] = ()
        self._values: list[Tensor] = []
        self._squares: dict[str, Tensor] = {}
        self._pooled_BF: Tensor | None = None
        self._waited_s = 0.0
        self._skipped_here = 0
        self._since = time.perf_counter()

    def skipped(self, images: int) -> None:
        """Count images of this rank that could not be read."""
        self._skipped_here += images

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited_s += seconds

    def add(self, step: int, epoch: float, micros: list[Any], scheduled: dict[str, float], grad_norm: Tensor,
            squares: dict[str, Tensor] | None = None) -> None:  # fmt: skip
        """Keep one step's values on the device: the means of its micro-batches' outputs, and its gradient norm.

        `squares` are those of `StepNorms`, of the last step before a flush.
        """
        scalars = [{name: value for name, value in out._asdict().items() if value.ndim == 0} for out in micros]
        self._names = (*scalars[0], "grad_norm")
        means = torch.stack([torch.stack(list(of.values())).float() for of in scalars]).mean(dim=0).detach()
        self._values.append(torch.cat([means, grad_norm.detach().float().reshape(1)]))
        self._steps.append((step, epoch, scheduled))
        self._squares, self._pooled_BF = squares or {}, getattr(micros[-1], "pooled_targets_BF", None)

    def flush(self) -> list[dict[str, Any]]:
        """Return the rows of all steps since the last flush; images/s, waiting and spread are those steps' averages.

        The last one also has what takes long: the norms of each part and the effective rank.
        """
        if not self._steps:
            return []
        forward_s = self.forward.take_s() if self.forward else 0.0
        ours = [self._waited_s, self._waited_s + forward_s, self._memory_gib(), float(self._skipped_here)]
        once = {} if self._pooled_BF is None else dict(effective_rank=effective_rank(self._pooled_BF[:RANKED_IMAGES]))
        values, squares, told, of_ranks = self._reduced(list(once.values()), ours)
        elapsed_s = time.perf_counter() - self._since
        waited, worked, memory, skipped = of_ranks
        slowest, excess_s = _slowest(worked)
        rate = len(self._steps) * self.global_batch / elapsed_s
        shared = dict(
            images_per_second=round(rate, 1),
            images_per_second_per_rank=round(rate / self.topology.world_size, 1),
            gflop_per_image=float(f"{self.cost.flops_per_image / 1e9:.5g}"),
            mfu=round(rate / self.topology.world_size * self.cost.flops_per_image / self.cost.peak_flops, 5),
            data_wait=round(max(waited) / elapsed_s, 4),
            rank_spread=round(excess_s / elapsed_s, 4),
            slowest_rank=slowest,
            memory_gib=round(max(memory), 3),
            skipped_images=round(sum(skipped)),
        )
        rows = [
            dict(step=step, epoch=round(epoch, 4), **dict(zip(self._names, row, strict=True)), **scheduled, **shared)
            for (step, epoch, scheduled), row in zip(self._steps, values, strict=True)
        ]
        rows[-1] |= dict(zip(once, told, strict=True)) | norms(dict(zip(self._squares, squares, strict=True)))
        self._steps, self._values, self._waited_s = [], [], 0.0
        self._since = time.perf_counter()
        return rows

    def _reduced(
        self, once: list[float], ours: list[float]
    ) -> tuple[list[list[float]], list[float], list[float], list[list[float]]]:
        """Return means over ranks of the steps' values, the squares and `once`; and each of `ours` of every rank.

        One reduction does it all: what is one rank's own has its place among zeros.
        """
        world, device = self.topology.world_size, self.topology.device
        places = torch.zeros(world, len(ours))
        places[self.topology.rank] = torch.tensor(ours)
        squares = [square.to(device).reshape(1) for square in self._squares.values()]
        parts = [torch.stack(self._values).flatten(), torch.cat(squares or [torch.zeros(0)]), torch.tensor(once),
                 places.flatten()]  # fmt: skip
        total = sum_over_ranks(torch.cat([part.to(device) for part in parts]))
        *means, of_ranks = total.split([part.numel() for part in parts])
        values, squares, once = (mean / world for mean in means)
        rows, of_ranks = values.view(len(self._values), -1), of_ranks.view(world, -1).T
        return rows.tolist(), squares.tolist(), once.tolist(), of_ranks.tolist()

    def restart_clock(self) -> None:
        """Leave out what happened since the last flush (an evaluation, a checkpoint) from the next images/s."""
        assert not self._steps, "flush first"
        self._since, self._waited_s = time.perf_counter(), 0.0

    def _memory_gib(self) -> float:
        """Return the peak of the device's memory, or on CPUs of this process's."""
        if self.topology.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _slowest(seconds: list[float]) -> tuple[int, float]:
    """Return the rank that takes longest, and by how much longer than the median of the others."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = seconds[:slowest] + seconds[slowest + 1 :]
    return slowest, seconds[slowest] - median(others) if others else 0.0


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
            short = f"loss {row['loss']:.3f} {row['images_per_second']:.0f} images/s MFU {row['mfu']:.0%}"  # 80 columns
            self._bar.update(self._task, completed=done, description=short)
        left_s = (time.perf_counter() - self._began) / max(done - self._start, 1) * (self.total_steps - done)
        words += f"  MFU {row['mfu']:.1%}  waiting {row['data_wait']:.0%}  left {clock(left_s)}"
        text = f"step {done}/{self.total_steps}  {words}"
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


class TensorBoard:
    """TensorBoard's files in a run folder; a resumed run goes on in them, without what it had logged beyond."""

    def __init__(self, run_folder: Path, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"log.tensorboard (true) needs a package ({error}): pip install 'lmim[tensorboard]', or "
                              "set it to false") from error  # fmt: skip
        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=start_step or None)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The wandb run of a run folder; a resumed run goes on in it."""

    def __init__(self, config: Config, resolved: dict[str, Any], run_folder: Path):
        import wandb

        marker = run_folder / "wandb_id.txt"
        run_id = marker.read_text().strip() if marker.is_file() else secrets.token_hex(4)
        marker.write_text(run_id + "\n")
        try:
            self._run = wandb.init(
                project=config.log.wandb_project, name=config.run.name or run_folder.name, id=run_id, resume="allow",
                mode=config.log.wandb, dir=str(run_folder), config=resolved,
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise ConfigError(f"log.wandb ({config.log.wandb}): {' '.join(str(error).split())}: `wandb login` or "
                              "WANDB_API_KEY, or log.wandb=offline and `wandb sync` later") from error  # fmt: skip

    def write(self, row: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()
