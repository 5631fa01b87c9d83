"""State-dict maps between this project's names and those of other code: the only place that knows foreign names.

Owns pure functions from one dictionary of tensors to another; they move no data, so they work on meta tensors too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# The authors' released code: (ours, theirs); the first pair that fits is applied.
_AUTHORS_MODULES = (("online.", "encoder."), ("target.", "target_encoder."), ("decoder.", "decoder."))
_PARTS = tuple(ours for ours, _ in _AUTHORS_MODULES)
_AUTHORS_ENCODER = (
    ("patch_embed.proj.", "embed.proj."),
    ("pos_embed", "pos_embed.pos_embeds"),
    ("projector.", "head."),
)
_AUTHORS_DECODER = (
    ("pos_embed", "pos_embed.pos_embeds"),
    (".norm2.", ".norm2q."),
    (".norm_context.", ".norm2kv."),
)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...], source: int) -> str:
    for pair in pairs:
        old, new = pair[source], pair[1 - source]
        if old in name:
            return name.replace(old, new, 1)
    return name


def _authors_name(name: str, source: int) -> str:
    """Translate one name; `source` is 0 from ours to theirs, 1 back."""
    for pair in _AUTHORS_MODULES:
        if name.startswith(pair[source]):
            rest = name.removeprefix(pair[source])
            inner = _AUTHORS_DECODER if pair[0] == "decoder." else _AUTHORS_ENCODER
            return pair[1 - source] + _renamed(rest, inner, source)
    raise KeyError(f"{name} belongs to none of {', '.join(pair[source] for pair in _AUTHORS_MODULES)}")


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map a LatentMIM state dict to the authors' names and shapes (position tables lose their leading 1)."""
    return {
        _authors_name(name, 0): tensor[0] if name.endswith("pos_embed") else tensor for name, tensor in state.items()
    }


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the authors' names (with or without the `module.` prefix of their files) and shapes to LatentMIM's."""
    result = {}
    for name, tensor in state.items():
        ours = _authors_name(re.sub(r"^module\.", "", name), 1)
        result[ours] = tensor[None] if ours.endswith("pos_embed") and tensor.ndim == 2 else tensor
    return result


# --- other Vision Transformers ---------------------------------------------------------------------------------------
# timm's names are ours but for the patch embedding, a convolution there. Hugging Face's follow, block by block.

_HUGGING_FACE = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
)
_HUGGING_FACE_BLOCK = (  # in this order: the third's name ends as the last one's
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
_TRANSFORMERS_5 = (  # what version 5 calls its modules, though its files keep the names above
    ("attention.q_proj.", "attention.attention.query."),
    ("attention.k_proj.", "attention.attention.key."),
    ("attention.v_proj.", "attention.attention.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
_QKV = ("query", "key", "value")
# Parts of other models that a plain encoder has no use for: heads, poolers, decoders.
_LEFT_OUT = {
    "timm": ("head.", "fc_norm.", "pre_logits.", "mask_token", "decoder_"),
    "huggingface": ("pooler.", "embeddings.mask_token"),
}


def patches_to_convolution(weight: Tensor, patch_size: int) -> Tensor:
    """Map the linear weight (D, P·P·3) over (row, column, channel) to that of a convolution, (D, 3, P, P)."""
    return weight.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2).contiguous()


def convolution_to_patches(weight: Tensor) -> Tensor:
    """Undo `patches_to_convolution`."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def to_timm(encoder: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Map a VisionTransformer's state dict to timm's names and shapes; the projector is left out."""
    kept = {name: tensor for name, tensor in encoder.items() if not name.startswith("projector.")}
    kept["patch_embed.proj.weight"] = patches_to_convolution(kept["patch_embed.proj.weight"], patch_size)
    return kept


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map timm's names and shapes to a VisionTransformer's, without its projector; names it does not know stay."""
    result = {name: tensor for name, tensor in state.items() if not name.startswith(_LEFT_OUT["timm"])}
    weight = result["patch_embed.proj.weight"]
    if weight.ndim == 4:  # linear in timm's oldest files
        result["patch_embed.proj.weight"] = convolution_to_patches(weight)
    return result


def to_huggingface(encoder: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Map a VisionTransformer's state dict to the names of transformers' `ViTModel`; the projector is left out."""
    result = {}
    for name, tensor in to_timm(encoder, patch_size).items():
        block = re.match(r"blocks\.(\d+)\.(.*)", name)
        if not block:
            result[_renamed(name, _HUGGING_FACE, 0)] = tensor
            continue
        before, rest = f"encoder.layer.{block[1]}.", block[2]
        if rest.startswith("attn.qkv."):
            for part, cut in zip(_QKV, tensor.chunk(3), strict=True):
                result[f"{before}attention.attention.{part}.{rest.removeprefix('attn.qkv.')}"] = cut.contiguous()
        else:
            result[before + _renamed(rest, _HUGGING_FACE_BLOCK, 0)] = tensor
    return result


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the names of transformers' `ViTModel`, in files or in memory, to a VisionTransformer's.

    Names it does not know stay.
    """
    result, cuts = {}, {}
    for name, tensor in state.items():
        if name.startswith(_LEFT_OUT["huggingface"]):
            continue
        if inside := re.match(r"layers\.(\d+)\.(.*)", name):
            name = f"encoder.layer.{inside[1]}.{_renamed(inside[2], _TRANSFORMERS_5, 0)}"
        block = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        part = block and re.fullmatch(r"attention\.attention\.(query|key|value)\.(weight|bias)", block[2])
        if part:
            cuts.setdefault(f"blocks.{block[1]}.attn.qkv.{part[2]}", {})[part[1]] = tensor
        elif block:
            result[f"blocks.{block[1]}.{_renamed(block[2], _HUGGING_FACE_BLOCK, 1)}"] = tensor
        else:
            result[_renamed(name, _HUGGING_FACE, 1)] = tensor
    for name, parts in cuts.items():
        shapes = {tuple(part.shape) for part in parts.values()}
        if parts.keys() == set(_QKV) and len(shapes) == 1 and () not in shapes:
            result[name] = torch.cat([parts[part] for part in _QKV])
        else:  # left as they are, to be named by whoever compares
            result |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return from_timm(result)


# --- whose names they are --------------------------------------------------------------------------------------------

# A name that only this naming has, and which all of its files have.
_MARKS = {
    "lmim": "online.patch_embed.proj.weight",
    "authors": "target_encoder.embed.proj.weight",
    "huggingface": "embeddings.patch_embeddings.projection.weight",
    "timm": "patch_embed.proj.weight",
}


def naming_of(names: Iterable[str]) -> tuple[str, str]:
    """Return (naming, prefix): "lmim", "authors", "huggingface" or "timm", and what its names have in front.

    Wrappers put words such as `module.` or `backbone.` in front. Raises ValueError where no naming or more than one
    model of it is found.
    """
    names = list(names)
    for naming, mark in _MARKS.items():
        found = [name.removesuffix(mark) for name in names if name.endswith(mark)]
        found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
        if len(found) > 1:
            raise ValueError(f"it holds several models: {', '.join(f'{prefix}*' for prefix in found)}")
        if found:
            return naming, found[0]
    raise ValueError("its names are not those of a Vision Transformer of lmim, the authors' code, timm or transformers")


def to_ours(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """Map whatever naming a state dict has to LatentMIM's: (naming, tensors, names that are left out).

    An encoder alone becomes `online.*`. Names that neither side knows are kept, under `online.`, for a comparison with
    the model to name them. Raises ValueError as `naming_of`, KeyError for a name the authors' model does not have.
    """
    naming, prefix = naming_of(state)
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    left_out = [name for name in state if not name.startswith(prefix)]
    if naming == "lmim":
        for name in inside:
            if not name.startswith(_PARTS):
                raise KeyError(f"{prefix}{name} belongs to none of {', '.join(_PARTS)}")
        return naming, inside, left_out
    if naming == "authors":
        return naming, from_authors(inside), left_out
    left_out += [prefix + name for name in inside if name.startswith(_LEFT_OUT[naming])]
    encoder = (from_timm if naming == "timm" else from_huggingface)(inside)
    return naming, {f"online.{name}": tensor for name, tensor in encoder.items()}, left_out
