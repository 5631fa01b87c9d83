"""One process, plain PyTorch: the reference that every other backend must agree with.

The fp32 target lies beside the online weights on the one device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lmim.config import Split
from lmim.dist import Topology
from lmim.optim import (
    MOMENTS,
    build_adamw,
    create_moments,
    ema_update,
    leave_out_unless_finite,
    set_learning_rate,
    set_steps_taken,
    steps_taken,
)
from lmim.options import Config
from lmim.parallel import Trainable, autocast, lend, prepare_blocks
from lmim.schedules import Hyper
from lmim.store import Piece, whole


class LocalBackend:
    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split

    def prepare(self, build: Callable[[], Trainable]) -> None:
        with torch.device("meta"):
            model = build()
        prepare_blocks(model, self.config, self.topology.device)
        self.model = model.to_empty(device=self.topology.device)
        self.model.init_weights(self.config.run.seed)
        optim = self.config.optim
        self.optimizer = build_adamw(self.model.parameter_groups(optim.weight_decay), optim)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        create_moments(self.optimizer, self.trained)
        averages = self.model.averages()
        self.target_weights, self.online_weights = [t for _, t, _ in averages], [o for _, _, o in averages]

    def begin_step(self, hyper: Hyper) -> None:
        ema_update(self.target_weights, self.online_weights, hyper.momentum)
        set_learning_rate(self.optimizer, hyper.lr)

    def forward_backward(self, *inputs: Tensor | float, last_micro: bool) -> Any:
        with autocast(self.topology, self.config):
            out = self.model(*inputs)
        (out.loss / self.split.accumulate).backward()
        return out

    def finish_step(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.optim.clip_norm, norm)
        leave_out_unless_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradients(self) -> list[Piece]:
        return [whole(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]

    def infer(self, which: str) -> AbstractContextManager[Any]:
        return lend(self.model.get_submodule(which))

    def pieces(self) -> list[Piece]:
        found = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            found.append(whole(name, tensor))
            found += [whole(f"{moment}/{name}", self.optimizer.state[tensor][moment])
                      for moment in MOMENTS if tensor.requires_grad]  # fmt: skip
        return found

    def optimizer_steps(self) -> int:
        return steps_taken(self.optimizer)

    def loaded(self, optimizer_steps: int) -> None:
        set_steps_taken(self.optimizer, optimizer_steps)

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        del self.model, self.optimizer, self.trained, self.target_weights, self.online_weights
