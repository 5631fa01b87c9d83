"""Checkpoints: folders that appear whole or not at all, and the choice of which to go on from.

Owns the layout on disk, the commit and the retention. The invariant: a folder `step-XXXXXXXX` is complete (its files
were written under another name, synced, and renamed last), so whatever interrupts a save leaves the older ones whole.

    run folder/checkpoints/step-00001200/
        weights-RANK.safetensors     online.*, target.*, decoder.*: fp32
        optimizer-RANK.safetensors   exp_avg/NAME, exp_avg_sq/NAME
        state.json                   step, resolved config, data's identity; shapes of tensors; checksums of all files
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmim import dist, store
from lmim.config import ConfigError, config_from_dict, config_hash
from lmim.optim import MOMENTS
from lmim.options import Config
from lmim.store import CheckpointException, FileRecord, Piece

logger = logging.getLogger(__name__)
FORMAT = 3
STATE = "state.json"


class SaveError(Exception):  # no RuntimeError, as of a collective: all ranks come to it, and none is lost
    """The newest checkpoint could not be written."""


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int
    samples: int  # the cursor: how far the run has come along its stream of samples, over all ranks
    optimizer_steps: int  # fewer than steps where some were left out
    data_fingerprint: str
    micro_batch: int  # images per forward on one rank: the scope of the similarity penalty


class Saver:
    """Writes a run's checkpoints, one after another; all of it is called on every rank alike.

    With `checkpoint.asynchronous` a save takes from training only the time to copy this rank's pieces to the host,
    where a thread writes them while the next steps run. A save that fails on any rank leaves the older checkpoints as
    they are, is told, and does not stop the run; the next one may succeed.
    """

    def __init__(self, run_folder: Path, config: Config, topology: dist.Topology, keep_every_steps: int = 0):
        self.folder, self.config, self.topology = run_folder / "checkpoints", config, topology
        self.keep_every_steps = keep_every_steps
        self.group = dist.side_group()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.failure: str | None = None
        self.copies: dict[tuple[str, int], Tensor] = {}

    def save(self, position: Position, pieces: list[Piece]) -> None:
        """Start to write a checkpoint; waits for the one before."""
        self.finish()
        pieces = store.written_here(pieces)
        if self.config.checkpoint.asynchronous:
            pieces = [piece._replace(numbers=self._copied(piece)) for piece in pieces]
            if self.topology.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        self.writing = self.thread.submit(self._write, position, pieces)
        if not self.config.checkpoint.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in hand, and say if it failed."""
        if self.writing is None:
            return
        writing, self.writing, self.failure = self.writing, None, None
        while wait([writing], timeout=1).not_done:
            dist.progress()  # the disk is slow, and this rank is not stuck
        try:
            writing.result()
        except (CheckpointException, OSError) as error:
            self.failure = _one_line(error)
            logger.error("a checkpoint could not be written (%s); the newest complete one is %s",
                         self.failure, self._newest())  # fmt: skip

    def close(self) -> None:
        """Finish, and raise SaveError if the newest checkpoint could not be written."""
        self.finish()
        self.thread.shutdown()
        if self.failure:
            raise SaveError(f"the last checkpoint could not be written ({self.failure}); the newest complete one is "
                            f"{self._newest()}")  # fmt: skip

    def _newest(self) -> str:
        try:
            return str(newest(self.folder.parent) or "none")
        except OSError as error:  # such as of a network share that is gone
            return f"not to be seen: {error.strerror}"

    def _copied(self, piece: Piece) -> Tensor:
        key = (piece.name, piece.start)
        if key not in self.copies:
            pinned = piece.numbers.device.type == "cuda"
            self.copies[key] = torch.empty(piece.numbers.shape, dtype=piece.numbers.dtype, pin_memory=pinned)
        return self.copies[key].copy_(piece.numbers, non_blocking=True)

    def _write(self, position: Position, pieces: list[Piece]) -> None:
        final = self.folder / f"step-{position.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self.topology.is_main:
            with suppress(OSError):  # raised here, it would leave the others waiting for this rank's next save
                for leftover in self.folder.glob(".step-*"):  # of saves that were interrupted
                    shutil.rmtree(leftover, ignore_errors=True)

        def commit(shapes: dict[str, tuple[int, ...]], files: list[FileRecord]) -> None:
            state = dict(format=FORMAT, **asdict(position), ranks=self.topology.world_size,
                         config=asdict(self.config), config_hash=config_hash(self.config),
                         files=[file._asdict() for file in files], tensors=shapes)  # fmt: skip
            (temporary / STATE).write_text(json.dumps(dict(state, checksum=_checksum(state)), indent=1))
            store.sync(temporary / STATE)
            store.sync(temporary)
            if final.exists():  # damaged, as the run went on from an older one
                os.rename(final, self.folder / f".{final.name}.old")
            os.rename(temporary, final)
            store.sync(self.folder)
            logger.info("saved %s", final)
            self._retire(position.step)

        try:
            store.write(temporary, pieces, commit, self.group)
        except CheckpointException:  # on all ranks alike
            if self.topology.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # it may have filled the disk
            raise

    def _retire(self, step: int) -> None:
        """Delete the checkpoints that are neither among the newest up to a step nor to be kept for good.

        Later ones are there where the run went back from damaged ones: they must not push out what is whole.
        """
        every = self.keep_every_steps
        with suppress(OSError):
            steps = {path: int(path.name.removeprefix("step-")) for path in complete(self.folder.parent)}
            for path in [path for path in steps if steps[path] <= step][: -self.config.checkpoint.keep]:
                if not (every and steps[path] % every == 0):
                    os.rename(path, self.folder / f".{path.name}.old")  # first: half of one must not pass for whole
            for path in self.folder.glob(".step-*.old"):
                shutil.rmtree(path, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    """Say what failed, and on which ranks."""
    if not isinstance(error, CheckpointException):
        return " ".join(str(error).split())
    reasons = {}
    for rank, (reason, _) in error.failures.items():
        reasons.setdefault(" ".join(str(reason).split()) or type(reason).__name__, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {reason}" for reason, ranks in reasons.items())


# --- choosing and reading --------------------------------------------------------------------------------------------


def complete(run_folder: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first; raises OSError where that cannot be told."""
    folder = run_folder / "checkpoints"
    try:
        names = sorted(os.listdir(folder))  # a glob takes a folder that cannot be read for an empty one
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_symlink():  # to a disk that is not mounted
            raise
        names = []
    return [folder / name for name in names if re.fullmatch(r"step-\d{8}", name) and (folder / name / STATE).is_file()]


def newest(run_folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    found = complete(run_folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`, verified against its own checksum."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from error
    wanted = {"format", "config", "files", "tensors", "checksum", *(field.name for field in fields(Position))}
    if not isinstance(state, dict) or not wanted <= state.keys() or state["format"] != FORMAT:
        raise ConfigError(f"{path} is damaged or not of format {FORMAT}")
    if state.pop("checksum") != _checksum(state):
        raise ConfigError(f"{path} is damaged: its checksum differs")
    try:
        files = [FileRecord(**file) for file in state["files"]]
        tensors = {name: tuple(map(int, shape)) for name, shape in state["tensors"].items()}
        counts = [state[field.name] for field in fields(Position) if field.type == "int"]
        assert all(type(count) is int and count >= 0 for count in counts), "it does not tell where the run stood"
        assert all(Path(file.name).name == file.name for file in files), "a file lies elsewhere"
        assert all(side >= 0 for shape in tensors.values() for side in shape), "a shape is below zero"
        assert sum(map(math.prod, tensors.values())) <= sum(file.bytes for file in files), "files are too small"
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from error
    return dict(state, files=files, tensors=tensors)


def _checksum(state: dict[str, Any]) -> str:
    """Return the checksum of a state's content, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def position_of(checkpoint: Path) -> Position:
    """Return where the run stood."""
    state = read_state(checkpoint)
    return Position(**{field.name: state[field.name] for field in fields(Position)})


def config_of(checkpoint: Path) -> Config:
    """Return the resolved configuration a checkpoint was made with."""
    return config_from_dict(read_state(checkpoint)["config"], str(checkpoint))


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with a checkpoint's files, or None; of its files, one part of so many is read."""
    try:
        files = read_state(checkpoint)["files"]
    except ConfigError as error:
        return str(error)
    for file in files[part::parts]:
        path = checkpoint / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                return f"{path} has {size} bytes and not {file.bytes}"
            if store.sha256_of(path) != file.sha256:
                return f"{path} is damaged: its checksum differs"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def load_pieces(checkpoint: Path, pieces: list[Piece]) -> None:
    """Fill pieces, such as a backend's, from a checkpoint."""
    store.read(checkpoint, [file.name for file in read_state(checkpoint)["files"]], pieces)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return all weights whole, verified against their checksums."""
    return _load_whole(checkpoint, lambda name: "/" not in name)


def load_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """Return AdamW's moments whole, `exp_avg/NAME` and `exp_avg_sq/NAME`, verified against their checksums."""
    return _load_whole(checkpoint, lambda name: "/" in name)


def _load_whole(checkpoint: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    wrong = damage(checkpoint)
    if wrong:
        raise ConfigError(wrong)
    shapes = read_state(checkpoint)["tensors"]
    tensors = {name: torch.empty(shape) for name, shape in shapes.items() if wanted(name)}
    load_pieces(checkpoint, [store.whole(name, tensor) for name, tensor in tensors.items()])
    return tensors


def check_same_model(checkpoint: Path, model: nn.Module) -> None:
    """Raise one clear line if the names or shapes of a checkpoint's tensors are not a model's and its moments'."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours |= {f"{moment}/{name}": tuple(parameter.shape) for name, parameter in model.named_parameters()
             for moment in MOMENTS if parameter.requires_grad}  # fmt: skip
    check_same_tensors(read_state(checkpoint)["tensors"], ours, checkpoint)


def check_same_tensors(theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Raise one clear line if names or shapes of a checkpoint's tensors are not those of a configuration's."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{checkpoint} is a checkpoint of another model: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} in this configuration; give the `model` section it was trained with"
            )
