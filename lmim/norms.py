"""How long a step's gradient and update are, part by part, whatever the backend holds of them.

Owns the parts' names and the arithmetic. The invariant: nothing is sent and nothing waits for the device: a rank adds
up the squares of what it holds, weighed such that their mean over all ranks is the square of the whole tensors' norm;
that mean is taken when the log is written, in the one reduction of all its figures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmim.store import Piece

GRADIENT, UPDATE, RATIO, WEIGHTS = "grad_norm_", "update_norm_", "update_ratio_", "weights_"  # ahead of a part's name


def part_of(name: str) -> str:
    """Return which part a weight is of: online, projector or decoder; of a classifier, online or head."""
    return "projector" if ".projector." in name else name.partition(".")[0]


class StepNorms:
    """Made between a step's backward and its end, it keeps a copy of this rank's trained weights until `squares`."""

    def __init__(self, gradients: list[Piece], pieces: list[Piece], world_size: int):
        self.world_size = world_size
        trained = {piece.name for piece in gradients}
        self.weights = [piece for piece in pieces if piece.name in trained]
        self.before = [piece.numbers.clone() for piece in self.weights]
        self.found = self._squares(GRADIENT, gradients)

    def squares(self) -> dict[str, Tensor]:
        """Return, after the step, what the mean over ranks makes the squares of norms: of gradients, updates, weights.

        Gradients are those before clipping. A step that was left out has no update.
        """
        moved = torch._foreach_sub([piece.numbers for piece in self.weights], self.before)
        steps = [piece._replace(numbers=change) for piece, change in zip(self.weights, moved, strict=True)]
        return self.found | self._squares(UPDATE, steps) | self._squares(WEIGHTS, self.weights)

    def _squares(self, kind: str, pieces: list[Piece]) -> dict[str, Tensor]:
        norms = torch._foreach_norm([piece.numbers for piece in pieces])
        found: dict[str, Tensor] = {}
        for piece, norm in zip(pieces, norms, strict=True):
            name, square = kind + part_of(piece.name), norm.float().square() * (self.world_size / piece.copies)
            found[name] = found[name] + square if name in found else square
        return found


def norms(squares: dict[str, float]) -> dict[str, float]:
    """Return the norms of gradients and updates, and the updates' shares of their weights, from squares over ranks."""
    found = {name: square**0.5 for name, square in squares.items() if not name.startswith(WEIGHTS)}
    for name in [name for name in found if name.startswith(UPDATE)]:
        part = name.removeprefix(UPDATE)
        found[RATIO + part] = found[name] / max(squares[WEIGHTS + part] ** 0.5, 1e-12)
    return found
