"""One process, plain PyTorch: the reference that every other backend must agree with.

The fp32 target lies beside the online weights on the one device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lmim.config import Config, Split
from lmim.dist import Topology
from lmim.objective import LatentMIM, StepOutput
from lmim.optim import build_adamw, ema_update, parameter_groups, set_learning_rate
from lmim.parallel import TrainState, attention_kernel, autocast, lend, prepare_blocks
from lmim.schedules import Hyper
from lmim.vit import VisionTransformer


class LocalBackend:
    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split

    def prepare(self, build: Callable[[], LatentMIM]) -> None:
        with torch.device("meta"):
            model = build()
        prepare_blocks(model, self.config)
        self.model = model.to_empty(device=self.topology.device)
        self.model.init_weights(self.config.run.seed)
        optim = self.config.optim
        self.optimizer = build_adamw(parameter_groups(self.model, optim.weight_decay), optim)

    def begin_step(self, hyper: Hyper) -> None:
        ema_update(self.model.target.parameters(), self.model.online.parameters(), hyper.momentum)
        set_learning_rate(self.optimizer, hyper.lr)
        self.similarity_target = hyper.similarity_target

    def forward_backward(self, images: Tensor, keys: Tensor, *, last_micro: bool) -> StepOutput:
        with attention_kernel(self.topology):
            with autocast(self.topology, self.config):
                out = self.model(images, keys, self.similarity_target)
            (out.loss / self.split.accumulate).backward()
        return out

    def finish_step(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optim.clip_norm:
            trained = [p for p in self.model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.optim.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def infer(self, which: str) -> AbstractContextManager[VisionTransformer]:
        return lend(self.model.get_submodule(which), self.topology)

    def state(self) -> TrainState:
        weights = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        return TrainState(weights, optimizer_state(self.model, self.optimizer))

    def load_state(self, state: TrainState) -> None:
        self.model.load_state_dict(state.weights)
        load_optimizer_state(self.model, self.optimizer, state.optimizer)

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        del self.model, self.optimizer


def optimizer_state(model: LatentMIM, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return AdamW's state by `{key}/{parameter name}`; empty before the first step."""
    return {
        f"{key}/{name}": value.detach().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(model: LatentMIM, optimizer: torch.optim.AdamW, state: dict[str, Tensor]) -> None:
    """Put a state of `optimizer_state` back; the moments go to the parameters' device."""
    parameters = dict(model.named_parameters())
    for item, value in state.items():
        key, name = item.split("/", 1)
        parameter = parameters[name]
        on_device = key != "step" or optimizer.defaults["fused"]
        optimizer.state[parameter][key] = value.clone().to(parameter.device if on_device else "cpu")
