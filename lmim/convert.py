"""State-dict maps between this project's names and those of other code: the only place that knows foreign names.

Owns pure functions from one dictionary of tensors to another; they move no data, so they work on meta tensors too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# The authors' released code: (ours, theirs); the first pair that fits is applied.
_AUTHORS_MODULES = (("online.", "encoder."), ("target.", "target_encoder."), ("decoder.", "decoder."))
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
