"""Weights of a Vision Transformer, read from whatever holds them.

Owns the recognition of what a path is, and the way from there to an encoder. What a file says of itself is not
believed: sizes are read off the tensors, and names and shapes are held against the model they would fill before any of
them is used. Nothing that a file contains is run (see `pickles`).

    run folder, checkpoint    of `lmim train`, any backend and number of ranks
    .pth, .pt, .bin           `torch.save` of a state dict, bare or under a key such as `state_dict` or `model`
    .safetensors              one file
    folder with config.json   of transformers (also in several files) or timm
    folder with .metadata     of `torch.distributed.checkpoint` (DCP)
    folder with latest        of DeepSpeed's `save_checkpoint`, ZeRO-0 to 3, or one tag in it

Whose the names are, the authors', timm's, transformers' or ours, is recognised apart from that (`convert.to_ours`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from lmim import checkpoint, convert, pickles, store
from lmim.config import ConfigError, model_dimensions
from lmim.options import VARIANTS
from lmim.vit import NORM_EPS, Decoder, VisionTransformer, resized_positions

PARTS = ("online", "target", "decoder")  # of LatentMIM; a fine-tuned classifier has the first, and a head
SIZES_KEY = "lmim"  # of a .safetensors file's metadata, and the name of a DCP folder's extra file
SIZES_FILE = "lmim.json"
# Where `torch.save`d dictionaries keep the weights: the authors' code, MAE, DeiT, timm; DINO's teacher.
_STATE_KEYS = ("state_dict", "model", "module", "model_state_dict", "teacher")
RELEASED_DECODER_HEADS = 16
_TRANSFORMERS_MODELS = ("vit", "vit_mae", "vit_msn")


@dataclass(frozen=True)
class Weights:
    """Weights under LatentMIM's names, fp32 on the CPU, as far as a source has them; `online.*` are always there."""

    path: Path
    kind: str  # what the source is, in words
    tensors: dict[str, Tensor]
    sizes: dict[str, Any]  # arguments of VisionTransformer; `num_heads` is None where the source does not tell
    left_out: tuple[str, ...] = ()  # names there that belong to no encoder, target or decoder
    changed: tuple[str, ...] = ()  # what was done to the tensors, in words
    decoder: dict[str, Any] = field(default_factory=dict)  # arguments of Decoder that its tensors do not tell

    def encoder(self, which: str) -> dict[str, Tensor]:
        """Return one encoder's state dict, "online" or "target"; raises ConfigError if the source has none such."""
        if which not in ("online", "target"):
            raise ConfigError(f"which ({which}) must be online or target")
        found = {k.removeprefix(f"{which}."): v for k, v in self.tensors.items() if k.startswith(f"{which}.")}
        if not found:
            raise ConfigError(f"{self.path} ({self.kind}) holds one encoder and no target: give which=online")
        return found


def load_encoder(
    path: str | Path, which: str = "online", *, grid: int | None = None, num_heads: int | None = None
) -> VisionTransformer:
    """Return a trained encoder in evaluation mode, ready for `forward_features` and `forward_intermediates`.

    `path` is anything this module reads; `which` is "online" or "target". `grid` is the number of cells a side that
    images will have, where it is not that of the training: positions are computed anew, or resized if they were
    learned. Sizes are read off the tensors, but they do not tell the number of attention heads: where the source does
    not say it, a known width (tiny to huge) does, and any other needs `num_heads`.
    """
    return build_encoder(read_weights(path), which, grid=grid, num_heads=num_heads)


def build_encoder(
    weights: Weights, which: str = "online", *, grid: int | None = None, num_heads: int | None = None
) -> VisionTransformer:
    """Return an encoder around the tensors of `weights`, as `load_encoder`."""
    sizes = dict(weights.sizes, num_heads=heads_of(weights, num_heads))
    state = weights.encoder(which)
    with torch.device("meta"):
        encoder = VisionTransformer(**sizes)
    check_encoder(weights, which, encoder)
    if grid is not None and grid != encoder.grid_size:
        if grid < 1:
            raise ConfigError(f"grid ({grid}) must be at least 1")
        state["pos_embed"] = resized_positions(state["pos_embed"], encoder.grid_size, (grid, grid))
        with torch.device("meta"):
            encoder = VisionTransformer(**dict(sizes, grid_size=grid))
    encoder.load_state_dict(state, assign=True)
    return encoder.requires_grad_(True).eval()


def build_decoder(weights: Weights, *, grid: int | None = None) -> Decoder:
    """Return the trained decoder of `weights` in evaluation mode, with the positions of `grid` cells a side.

    A checkpoint of `lmim train` tells its heads and whether it has visual cues; of other sources the released code's
    16 heads and cues are assumed. Raises ConfigError where there is no decoder.
    """
    state = {k.removeprefix("decoder."): v for k, v in weights.tensors.items() if k.startswith("decoder.")}
    if not state:
        raise ConfigError(f"{weights.path} ({weights.kind}) holds no decoder, which the pooling predictor reads "
                          "through: take eval.pooling=patch_mean or class_token")  # fmt: skip
    said = dict(num_heads=RELEASED_DECODER_HEADS) | weights.decoder
    try:
        dim, encoder_dim = state["embed.weight"].shape
        cells = state["pos_embed"].shape[1] - 1
        trained = round(max(cells, 0) ** 0.5)
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        depth = len(_numbers(r"blocks\.(\d+)\..*", state))
        attention = "cross" if "blocks.0.cross_attn.proj.weight" in state else "self"
        if trained**2 != cells or dim % said["num_heads"]:
            raise ValueError(f"{cells} positions, width {dim}, {said['num_heads']} heads")
        side = grid or trained
        if side != trained:
            state["pos_embed"] = resized_positions(state["pos_embed"], trained, (side, side))
        with torch.device("meta"):
            decoder = Decoder(grid_size=side, encoder_dim=encoder_dim, embed_dim=dim, depth=depth,
                              mlp_ratio=_ratio(hidden, dim), attention=attention, **said)  # fmt: skip
        decoder.load_state_dict(state, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{weights.path}: its decoder is not one of Latent MIM: {words}") from error
    return decoder.eval()


def heads_of(weights: Weights, num_heads: int | None = None) -> int:
    """Return the number of attention heads: what the source says, else what was given, else a variant's."""
    dim, said = weights.sizes["embed_dim"], weights.sizes["num_heads"]
    if said and num_heads and said != num_heads:
        raise ConfigError(f"num_heads ({num_heads}) is not what {weights.path} says: {said}")
    heads = said or num_heads or {v["embed_dim"]: v["num_heads"] for v in VARIANTS.values()}.get(dim)
    if heads is None:
        raise ConfigError(f"{weights.path} does not tell its number of attention heads (width {dim}): give num_heads")
    if heads < 1 or dim % heads:
        raise ConfigError(f"num_heads ({heads}) must divide the width ({dim}) of {weights.path}")
    return heads


def check_encoder(weights: Weights, which: str, encoder: VisionTransformer) -> None:
    """Raise ConfigError naming the first tensor that an encoder lacks, or has in another shape, or does not have."""
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.encoder(which).items()}
    ours = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            raise ConfigError(f"{weights.path}: {name} {theirs[name]} is no part of a plain Vision Transformer")
        if name not in theirs:
            raise ConfigError(f"{weights.path} lacks {name} {ours[name]}")
        if theirs[name] != ours[name]:
            raise ConfigError(f"{weights.path}: {name} has shape {theirs[name]}, which must be {ours[name]}")


def read_weights(path: str | Path) -> Weights:
    """Return the weights that a file or folder holds; raises ConfigError with one line where that cannot be."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if any((path / name).exists() for name in (checkpoint.STATE, "checkpoints", "config.yaml")):
        return _read_checkpoint(path)
    kind, state, said = _read_folder(path) if path.is_dir() else _read_file(path)
    try:
        naming, tensors, left_out = convert.to_ours(state)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path} ({kind}) is not read: {error.args[0]}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: {name} is of type {tensor.dtype}, which no weight is")
    changed = sorted({str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"})
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    sizes = sizes_of(tensors, path) | {"num_heads": said.get("num_heads"), "norm_eps": said.get("norm_eps", NORM_EPS)}
    words = (f"{', '.join(changed).replace('torch.', '')} became float32",) if changed else ()
    return Weights(path, f"{kind}, names of {_NAMINGS[naming]}", tensors, sizes, tuple(left_out), words)


_NAMINGS = {"lmim": "lmim", "authors": "the authors' code", "timm": "timm", "huggingface": "transformers"}


def _read_checkpoint(path: Path) -> Weights:
    found = path if (path / checkpoint.STATE).is_file() else checkpoint.newest(path)
    if found is None:
        raise ConfigError(f"{path} holds no complete checkpoint")
    held, config = checkpoint.load_weights(found), checkpoint.config_of(found)
    model = config.model
    tensors = {name: tensor for name, tensor in held.items() if name.split(".")[0] in PARTS}
    decoder = dict(num_heads=model.decoder_num_heads, visual_cues=model.visual_cues,
                   learnable_positions=model.learnable_positions)  # fmt: skip
    sizes = sizes_of(tensors, found) | {
        "num_heads": model_dimensions(model)["num_heads"],
        "norm_eps": config.finetune.norm_eps if config.run.task == "finetune" else NORM_EPS,
        "learnable_positions": model.learnable_positions,
    }
    left_out = tuple(name for name in held if name not in tensors)
    return Weights(found, "checkpoint of lmim train", tensors, sizes, left_out, decoder=decoder)


def describe(weights: Weights) -> dict[str, Any]:
    """Return what a source is and holds, for people and as JSON."""
    sizes = weights.sizes
    numbers = {part: sum(t.numel() for name, t in weights.tensors.items() if name.startswith(f"{part}."))
               for part in PARTS}  # fmt: skip
    side = sizes["grid_size"] * sizes["patch_size"]
    return {
        "path": str(weights.path),
        "kind": weights.kind,
        "encoder": f"width {sizes['embed_dim']}, depth {sizes['depth']}, {sizes['num_heads'] or 'unknown'} heads, "
                   f"patches of {sizes['patch_size']} px, {sizes['grid_size']}² cells ({side} px)",
        "projector": f"{sizes['projector_depth']} layers" if sizes["projector_depth"] else "none",
        "numbers": {part: count for part, count in numbers.items() if count},
        "left_out": list(weights.left_out),
        "changed": list(weights.changed),
    }  # fmt: skip


# --- containers ------------------------------------------------------------------------------------------------------

Content = tuple[str, Mapping[str, Tensor], dict[str, Any]]  # kind in words, tensors as named there, what it says


def _read_file(path: Path) -> Content:
    if path.suffix == ".safetensors":
        with store.opened(path) as (file, starts):
            if starts:
                raise ConfigError(f"{path} is what one rank wrote of a checkpoint: give its folder {path.parent}")
            said = _said((file.metadata() or {}).get(SIZES_KEY, "{}"), path)
            names = file.keys()
            return "safetensors", {name: file.get_tensor(name) for name in names}, said
    if path.suffix == ".onnx":
        raise ConfigError(f"{path} is a graph, whose weights have lost their names: give what it was made of")
    content = pickles.read_pth(path)
    for key in _STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {name: t for name, t in content.items() if isinstance(t, Tensor)} if isinstance(content, dict) else {}
    if not state or not all(isinstance(name, str) for name in state):
        raise ConfigError(f"{path} is not read: it holds no state dict, bare or as {', '.join(_STATE_KEYS)}")
    return "torch.save", pickles.own_tensors(state, path), {}


def _read_folder(path: Path) -> Content:
    if pickles.is_deepspeed(path):
        return "folder of DeepSpeed", pickles.read_deepspeed(path), {}
    if (path / pickles.METADATA).is_file():
        said = _said(path / SIZES_FILE, path / SIZES_FILE) if (path / SIZES_FILE).is_file() else {}
        return "folder of torch.distributed.checkpoint", pickles.read_dcp(path), said
    if (path / "config.json").is_file():
        return _read_hub_folder(path)
    raise ConfigError(
        f"{path} is not read: it is no run folder or checkpoint, nor a folder of DeepSpeed (latest), "
        "torch.distributed.checkpoint (.metadata), transformers or timm (config.json)"
    )


def _read_hub_folder(path: Path) -> Content:
    """Read a folder as transformers and timm save it: config.json beside the weights."""
    try:
        config = _json(path / "config.json")
    except ValueError as error:
        raise ConfigError(f"{path / 'config.json'} is damaged: {error}") from error
    said: dict[str, Any] = {}
    if "model_type" in config:
        kind = f"folder of transformers, {config['model_type']}"
        activation = config.get("hidden_act", "gelu")
        if config["model_type"] not in _TRANSFORMERS_MODELS or activation != "gelu":
            raise ConfigError(f"{path / 'config.json'} is of a {config['model_type']} with {activation}, not of a "
                              f"{' or '.join(_TRANSFORMERS_MODELS)} with gelu")  # fmt: skip
        said = {"num_heads": config.get("num_attention_heads", 12), "norm_eps": config.get("layer_norm_eps", 1e-12)}
    elif "architecture" in config:
        kind = f"folder of timm, {config['architecture']}"
        said = _timm_says(config)
    else:
        raise ConfigError(
            f"{path / 'config.json'} names neither a model_type (transformers) nor an architecture (timm)"
        )
    said = _said(json.dumps(said), path / "config.json")
    state: dict[str, Tensor] = {}
    for file in _files_of_hub_folder(path):
        state |= _read_file(file)[1]
    return kind, state, said


def _timm_says(config: dict[str, Any]) -> dict[str, Any]:
    """Return heads and epsilon of the architecture that timm's config.json names, as far as timm knows it."""
    said, arguments = {}, config.get("model_args")
    if isinstance(config["architecture"], str) and timm.is_model(config["architecture"]):
        with torch.device("meta"):
            model = timm.create_model(config["architecture"], num_classes=0)
        if isinstance(model, timm.models.VisionTransformer):
            said = {"num_heads": model.blocks[0].attn.num_heads, "norm_eps": model.norm.eps}
    if isinstance(arguments, dict) and "num_heads" in arguments:
        said["num_heads"] = arguments["num_heads"]
    return said


def _files_of_hub_folder(path: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                files = set(_json(index)["weight_map"].values())
                if any(Path(file).name != file for file in files):
                    raise ValueError("it names files that do not lie beside it")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{index} is damaged: {error}") from error
            return [path / file for file in sorted(files)]
    raise ConfigError(f"{path} lacks model.safetensors and pytorch_model.bin")


def _json(text: str | Path) -> dict[str, Any]:
    """Return a JSON object out of a text or a file; raises ValueError."""
    try:
        said = json.loads(text.read_text() if isinstance(text, Path) else text)
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(said, dict):
        raise ValueError("it holds no JSON object")
    return said


def _said(text: str | Path, path: Path) -> dict[str, Any]:
    """Return what a file of ours says beyond its tensors, or what is read as such from other configurations."""
    try:
        said = _json(text)
        heads, eps = said.get("num_heads"), said.get("norm_eps", NORM_EPS)
        if not (heads is None or (type(heads) is int and heads > 0)):
            raise ValueError(f"num_heads ({heads}) must be above 0")
        if not (isinstance(eps, float) and 0 < eps < 1):
            raise ValueError(f"norm_eps ({eps}) must lie between 0 and 1")
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    return {"num_heads": heads, "norm_eps": eps}


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read the online encoder's sizes off its tensors; raises ConfigError where they cannot be an encoder's."""
    encoder = {k.removeprefix("online."): tuple(v.shape) for k, v in tensors.items() if k.startswith("online.")}

    def shape_of(name: str, dims: int) -> tuple[int, ...]:
        if name not in encoder:
            raise ConfigError(f"{path} lacks {name}")
        if len(encoder[name]) != dims or 0 in encoder[name]:
            raise ConfigError(f"{path}: {name} has shape {encoder[name]}, which must have {dims} sides")
        return encoder[name]

    dim, patch_numbers = shape_of("patch_embed.proj.weight", 2)
    cells = shape_of("pos_embed", 3)[1] - 1
    hidden = shape_of("blocks.0.mlp.fc1.weight", 2)[0]
    patch_size, grid_size = round((patch_numbers / 3) ** 0.5), round(max(cells, 0) ** 0.5)
    if 3 * patch_size**2 != patch_numbers or not cells or grid_size**2 != cells:
        raise ConfigError(f"{path}: patches of {patch_numbers} numbers and {cells} positions are no RGB squares on a "
                          "square grid beside a class token")  # fmt: skip
    linears = _numbers(r"projector\.linear(\d+)\.weight", encoder)
    projector_dim = shape_of("projector.linear0.weight", 2)[0] if linears else 4096
    return dict(
        grid_size=grid_size,
        patch_size=patch_size,
        embed_dim=dim,
        depth=len(_numbers(r"blocks\.(\d+)\..*", encoder)),
        mlp_ratio=_ratio(hidden, dim),
        projector_depth=len(linears),
        projector_dim=projector_dim,
    )


def _numbers(pattern: str, names: Iterable[str]) -> set[int]:
    return {int(found[1]) for found in (re.fullmatch(pattern, name) for name in names) if found}


def _ratio(hidden: int, dim: int) -> float:
    """Return the ratio whose product with `dim`, rounded down as the model does, is `hidden` again."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
