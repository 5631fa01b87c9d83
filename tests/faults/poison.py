"""`lmim` with NaN in one rank's gradients: `python -m tests.faults.poison train …`, started by any launcher.

POISON=RANK:STEP,STEP names the rank and the steps; the loss itself stays as it is.
"""

from __future__ import annotations

import os
import sys

import torch

from lmim.__main__ import main
from lmim.objective import LatentMIM
from tests.ranks import NotANumber

MICRO_BATCHES = int(os.environ.get("POISON_MICRO_BATCHES", "1"))  # of a step, on a rank


def poison() -> None:
    """Let some forwards of this rank return a loss whose gradient is NaN."""
    rank, _, steps = os.environ["POISON"].partition(":")
    if os.environ.get("RANK", "0") != rank:
        return
    plain, chosen, calls = LatentMIM.forward, {int(step) for step in steps.split(",")}, []

    def forward(self, *inputs):
        out = plain(self, *inputs)
        if torch.is_grad_enabled():
            calls.append(None)
            if (len(calls) - 1) // MICRO_BATCHES in chosen:
                return out._replace(loss=NotANumber.apply(out.loss))
        return out

    LatentMIM.forward = forward


if __name__ == "__main__":
    poison()
    sys.exit(main())
