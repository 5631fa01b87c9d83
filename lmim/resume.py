"""What a run goes on from, and whose its folder is.

Owns the order of choices: the run's own newest whole checkpoint, then `run.resume_from`, then what its task begins
with: the weights of `run.init_from`, or scratch. The invariants: a damaged checkpoint is named and never loaded; what
would change the result of a run that has begun is refused; a folder has one run at a time.
"""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from lmim import checkpoint, dist, formats, store
from lmim.config import ConfigError, Split, changed_options, load_config
from lmim.objective import LatentMIM
from lmim.options import Config
from lmim.parallel import Backend, Trainable
from lmim.vit import resized_positions

logger = logging.getLogger(__name__)
CONFIG_FILE, LOCK_FILE = "config.yaml", ".lock"
_PARTS = {"decoder": r"decoder\.", "projectors": r"\w+\.projector\."}  # of the model, which a source may lack


def resume(config: Config, backend: Backend, split: Split, data_fingerprint: str, total_steps: int, *,
           build: Callable[[], Trainable], begin: Callable[[Backend], None]) -> int:  # fmt: skip
    """Load what there is to go on from, else `begin`, and return the step to go on with; a collective."""
    run, path = config.run, newest_whole(Path(config.run.folder), backend.topology)
    if path is not None:
        refuse_changes(checkpoint.config_of(path), config, str(path))
    elif run.resume_from:
        path = _named(Path(run.resume_from), backend.topology)
        for change in changed_options(checkpoint.config_of(path), config):
            logger.warning("run.resume_from was made with another configuration: %s", change)
        if (taken := checkpoint.position_of(path).step) >= total_steps:
            raise ConfigError(f"run.resume_from ({path}) has taken {taken} steps, and optim.duration "
                              f"({config.optim.duration}) is {total_steps}: give a longer one")  # fmt: skip
    if path is None:
        begin(backend)
        return 0
    position = checkpoint.position_of(path)
    _check_data(position, path, config, data_fingerprint)
    if config.objective.similarity_weight and position.micro_batch != split.micro_batch:
        logger.warning(
            "micro batch is %d, not %d as before: the similarity penalty averages over a micro-batch, so losses may "
            "differ slightly from an unbroken run's",
            split.micro_batch,
            position.micro_batch,
        )
    with torch.device("meta"):
        checkpoint.check_same_model(path, build())
    checkpoint.load_pieces(path, backend.pieces())
    backend.loaded(position.optimizer_steps)
    logger.info("going on from %s, after step %d", path, position.step)
    return position.step


def begin_with(path: Path, config: Config, backend: Backend) -> None:
    """Give LatentMIM the weights that `formats` reads from anywhere; the optimizer begins anew.

    What the source lacks as a whole keeps its initial value: the decoder, the projectors. Where it holds one encoder,
    the target begins as a copy of it, as in a run from scratch.
    """
    weights = formats.read_weights(path)
    tensors = dict(weights.tensors)
    if not any(name.startswith("target.") for name in tensors):
        tensors |= {name.replace("online.", "target.", 1): tensor for name, tensor in weights.tensors.items()}
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in LatentMIM(config.model, config.objective).state_dict().items()}
    parts = {part: {name for name in ours if re.match(start, name)} for part, start in _PARTS.items()}
    anew = {part: names for part, names in parts.items() if names and not names & tensors.keys()}
    wanted = {name: shape for name, shape in ours.items() if not any(name in names for names in anew.values())}
    for name in tensors.keys() & wanted.keys():
        if name.endswith("pos_embed") and tuple(tensors[name].shape) != wanted[name]:
            tensors[name] = _positions_for(config.model.grid_size, tensors[name])
    checkpoint.check_same_tensors({name: tuple(t.shape) for name, t in tensors.items()}, wanted, weights.path)
    store.fill(backend.pieces(), tensors)
    backend.loaded(0)
    new = f"; it has no {' and no '.join(anew)}: new ones" if anew else ""
    logger.info("beginning with the weights of %s (%s)%s", weights.path, weights.kind, new)


def _positions_for(grid_size: int, table: Tensor) -> Tensor:
    """Return a position table resized to a grid; one that is no square beside a class token stays as it is."""
    cells = table.shape[1] - 1 if table.ndim == 3 else 0
    theirs = round(max(cells, 0) ** 0.5)
    return resized_positions(table, theirs, (grid_size, grid_size)) if cells and theirs**2 == cells else table


def _check_data(position: checkpoint.Position, path: Path, config: Config, data_fingerprint: str) -> None:
    if position.data_fingerprint != data_fingerprint:
        raise ConfigError(
            f"data.train ({config.data.train}) is not the data this run was trained on (its shards' checksums "
            f"differ from {path}'s): give that data, or another run.folder"
        )
    if position.samples != position.step * config.data.global_batch:
        raise ConfigError(f"{path} stands at sample {position.samples}, which is not the end of its step "
                          f"{position.step} with data.global_batch ({config.data.global_batch})")  # fmt: skip


def newest_whole(run_folder: Path, topology: dist.Topology) -> Path | None:
    """Return a run's newest checkpoint that is not damaged; a collective."""
    try:
        found = dist.gather_objects(checkpoint.complete(run_folder) if topology.is_main else [])[0]
    except OSError as error:
        raise ConfigError(f"the checkpoints of {run_folder} cannot be read ({error.strerror}): is their disk "
                          "mounted?") from error  # fmt: skip
    for path in reversed(found):
        wrong = _damage(path, topology)
        if wrong is None:
            return path
        logger.warning("%s: going back to an older checkpoint", wrong)
    if found:
        raise ConfigError(
            f"all checkpoints in {run_folder} are damaged, {wrong}: mend one, or take another run.folder to start anew"
        )
    return None


def _damage(path: Path, topology: dist.Topology) -> str | None:
    """Return what is wrong with a checkpoint; ranks share the reading."""
    named = dist.gather_objects(checkpoint.damage(path, topology.rank, topology.world_size))
    return next(filter(None, named), None)


def _named(path: Path, topology: dist.Topology) -> Path:
    """Return the checkpoint that `run.resume_from` means."""
    if (path / checkpoint.STATE).is_file():
        wrong = _damage(path, topology)
        if wrong:
            raise ConfigError(f"run.resume_from: {wrong}")
        return path
    found = newest_whole(path, topology)
    if found is None:
        raise ConfigError(f"run.resume_from ({path}) holds no complete checkpoint")
    return found


# --- the run folder --------------------------------------------------------------------------------------------------


def check_run_folder(config: Config) -> None:
    """Refuse a run folder that cannot be one, or that was made with another configuration."""
    folder = Path(config.run.folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.folder ({folder}) is a file: give a folder")
    if (folder / CONFIG_FILE).is_file():
        refuse_changes(load_config(folder / CONFIG_FILE), config, f"run.folder ({folder})")


def lock_run_folder(folder: Path) -> TextIO:
    """Take the run folder for this process, or refuse it: two runs would overwrite each other's files."""
    lock = (folder / LOCK_FILE).open("w")
    try:
        # a POSIX lock ends with this process; flock would live on in loader workers that outlast a killed run
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise ConfigError(
            f"run.folder ({folder}) is in use by a run that is going on: stop that, or take another"
        ) from error
    except OSError:  # a file system without locks
        logger.warning("%s cannot be locked: see to it that no other run uses it", folder)
    return lock


def tell_changes(config: Config) -> None:
    """Tell what has changed since the run folder's last start, and changes no result."""
    before = Path(config.run.folder) / CONFIG_FILE
    if before.is_file():
        for change in changed_options(load_config(before), config, neutral=True):
            logger.info("since the last start: %s", change)


def refuse_changes(old: Config, new: Config, made: str) -> None:
    """Refuse a change of anything that affects the result."""
    changed = changed_options(old, new)
    if changed:
        folder = "finetune.folder" if new.run.task == "finetune" else "run.folder"
        raise ConfigError(
            f"{made} was made with another configuration: {'; '.join(changed)}; take another {folder}, or those values"
        )
