"""Checkpoints: folders that appear whole or not at all, and the choice of which to go on from.

Owns the layout on disk, the commit and the retention. The invariant: a folder `step-XXXXXXXX` is complete (its files
were written under another name, synced, and renamed last), so whatever interrupts a save leaves the older ones whole.
Tensors are safetensors files under LatentMIM's own names: reading a checkpoint runs no code of its author.

    run folder/checkpoints/step-00001200/
        weights.safetensors     online.*, target.*, decoder.*: fp32
        optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME
        state.json              step, resolved config, data's identity, and every file's size and checksum
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmim.config import VARIANTS, Config, ConfigError, config_from_dict, config_hash, model_dimensions
from lmim.convert import from_authors
from lmim.vit import VisionTransformer

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int
    samples: int  # the cursor: how far the run has come along its stream of samples, over all ranks
    data_fingerprint: str
    micro_batch: int  # images per forward on one rank: the scope of the similarity penalty


def save(
    run_folder: Path,
    position: Position,
    config: Config,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    keep: int,
) -> Path:
    """Commit one checkpoint and drop all but the newest `keep`; called on one rank."""
    folder = run_folder / "checkpoints"
    final = folder / f"step-{position.step:08d}"
    for leftover in folder.glob(".step-*"):  # of saves that were interrupted
        shutil.rmtree(leftover)
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir(parents=True)
    files = {}
    for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name)
        files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
        _sync(temporary / name)
    state = dict(format=FORMAT, **asdict(position), config=asdict(config), config_hash=config_hash(config), files=files)
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    _sync(temporary / STATE)
    _sync(temporary)
    if final.exists():
        os.rename(final, folder / f".{final.name}.old")
    os.rename(temporary, final)
    _sync(folder)
    for old in [*folder.glob(".step-*.old"), *complete(run_folder)[:-keep]]:
        shutil.rmtree(old)
    return final


def complete(run_folder: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first."""
    folder = run_folder / "checkpoints"
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return [path for path in found if re.fullmatch(r"step-\d{8}", path.name) and (path / STATE).is_file()]


def newest(run_folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    found = complete(run_folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{checkpoint / STATE} is damaged ({error}): delete {checkpoint} to go on from an older one"
        ) from error
    wanted = {"format", "config", "files", *(field.name for field in fields(Position))}
    if not isinstance(state, dict) or not wanted <= state.keys() or state["format"] != FORMAT:
        raise ConfigError(
            f"{checkpoint / STATE} is damaged or not of format {FORMAT}: delete {checkpoint} to go on from an older one"
        )
    return state


def position_of(checkpoint: Path) -> Position:
    """Return where the run stood."""
    state = read_state(checkpoint)
    return Position(**{field.name: state[field.name] for field in fields(Position)})


def config_of(checkpoint: Path) -> Config:
    """Return the resolved configuration a checkpoint was made with."""
    return config_from_dict(read_state(checkpoint)["config"], str(checkpoint))


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read the weights, verified against their checksum."""
    return _load(checkpoint, WEIGHTS)


def load_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """Read the optimizer's state, verified against its checksum."""
    return _load(checkpoint, OPTIMIZER)


def _load(checkpoint: Path, name: str) -> dict[str, Tensor]:
    recorded, path = read_state(checkpoint)["files"][name], checkpoint / name
    if not path.is_file() or path.stat().st_size != recorded["bytes"] or _sha256(path) != recorded["sha256"]:
        raise ConfigError(
            f"{path} is missing or damaged (its checksum differs): delete {checkpoint} to go on from an older one"
        )
    return load_file(path)


def check_same_model(weights: dict[str, Tensor], model: nn.Module, checkpoint: Path) -> None:
    """Raise one clear line if a checkpoint's names or shapes are not the model's."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{checkpoint} is a checkpoint of another model: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} in this configuration; give the `model` section it was trained with"
            )


def load_encoder(path: str | Path, which: str = "online", *, num_heads: int | None = None) -> VisionTransformer:
    """Return a trained encoder in evaluation mode, ready for `forward_features`.

    `path` is a run folder (its newest checkpoint), one checkpoint, or a `.pth` file of the authors' code; `which` is
    "online" or "target". A `.pth` file's sizes are read off its tensors, but they do not tell the number of attention
    heads: a known width (tiny to huge) does, any other needs `num_heads`.
    """
    path = Path(path)
    if path.is_file():
        weights = _load_authors(path)
        sizes = _sizes_of(weights, path, num_heads)
    else:
        checkpoint = path if (path / STATE).is_file() else newest(path)
        if checkpoint is None:
            raise ConfigError(f"{path} holds no complete checkpoint")
        weights, model = load_weights(checkpoint), config_of(checkpoint).model
        sizes = dict(
            model_dimensions(model),
            grid_size=model.grid_size,
            mlp_ratio=model.mlp_ratio,
            projector_dim=model.projector_dim,
            projector_depth=model.projector_depth,
            learnable_positions=model.learnable_positions,
        )
    encoder = VisionTransformer(**sizes)
    encoder.load_state_dict({k.removeprefix(f"{which}."): v for k, v in weights.items() if k.startswith(f"{which}.")})
    return encoder.eval()


def _load_authors(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return from_authors(content["state_dict"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        words = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"{path} is no checkpoint file of the authors' code ({words}): give one, or a run folder"
        ) from error


def _sizes_of(weights: dict[str, Tensor], path: Path, num_heads: int | None) -> dict[str, Any]:
    """Read an encoder's sizes off its tensors' shapes."""
    dim, patch_numbers = weights["online.patch_embed.proj.weight"].shape
    blocks = {name.split(".")[2] for name in weights if name.startswith("online.blocks.")}
    linears = [name for name in weights if re.fullmatch(r"online\.projector\.linear\d+\.weight", name)]
    known = {variant["embed_dim"]: variant["num_heads"] for variant in VARIANTS.values()}
    heads = num_heads or known.get(dim)
    if heads is None:
        raise ConfigError(f"{path} does not tell its number of attention heads (width {dim}): give num_heads")
    return dict(
        grid_size=round((weights["online.pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=round((patch_numbers / 3) ** 0.5),
        embed_dim=dim,
        depth=len(blocks),
        num_heads=heads,
        mlp_ratio=weights["online.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        projector_depth=len(linears),
        projector_dim=weights["online.projector.linear0.weight"].shape[0] if linears else 4096,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
