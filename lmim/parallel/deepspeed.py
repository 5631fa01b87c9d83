"""DeepSpeed ZeRO-0 and ZeRO-1 behind the Backend protocol.

Weights stay fp32 (bf16 is autocast, by the engine's `torch_autocast`), whole on every rank under both stages, and so
does the target: every rank keeps the fp32 copy and moves it by the same arithmetic from the same weights, with no
communication. ZeRO-1 cuts AdamW's moments and its fp32 master over the ranks.

Measured facts this file stands on (DeepSpeed 0.19): the engine scales by the accumulation through output-gradient
hooks, so nobody divides the loss; `lower_precision_safe_modules: []` makes it sum gradients in fp32; its own
checkpoints are tied to the number of ranks, so state goes in and out by name here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor

from lmim.config import Config, Split
from lmim.dist import Topology
from lmim.objective import LatentMIM, StepOutput
from lmim.optim import build_adamw, ema_update, set_learning_rate
from lmim.parallel import TrainState, attention_kernel, lend
from lmim.schedules import Hyper
from lmim.vit import VisionTransformer

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedBackend:
    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split
        self.zero = config.parallel.zero_stage > 0
        deepspeed.utils.logger.setLevel(logging.WARNING)
        # Compiling its shared-memory all-reduce takes half a minute at a first start on CPUs; gloo is there already.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def engine_config(self) -> dict[str, Any]:
        """Return the engine's own configuration, as DeepSpeed's JSON names it."""
        precision, optim = self.config.precision, self.config.optim
        autocast = {"enabled": True, "dtype": "bfloat16"}
        if precision.reduce == "fp32":
            autocast["lower_precision_safe_modules"] = []
        return {
            "train_micro_batch_size_per_gpu": self.split.micro_batch,
            "gradient_accumulation_steps": self.split.accumulate,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {"stage": self.config.parallel.zero_stage},
            "torch_autocast": autocast if precision.compute == "bf16" else {"enabled": False},
            "steps_per_print": None,
        }

    def prepare(self, build: Callable[[], LatentMIM]) -> None:
        with torch.device("meta"):
            model = build()
        self.model = model.to_empty(device=self.topology.device)
        self.model.init_weights(self.config.run.seed)
        self.adamw = build_adamw(self.model, self.config.optim)
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.adamw, config=self.engine_config())
        self._create_moments()

    def _create_moments(self) -> None:
        """Give AdamW its state now, at zero, rather than in its first step, so that a state can be put in and out."""
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                self.adamw.state[parameter] = dict(
                    step=torch.zeros((), device=parameter.device), **{m: torch.zeros_like(parameter) for m in MOMENTS}
                )
        if self.zero:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def begin_step(self, hyper: Hyper) -> None:
        ema_update(self.model.target.parameters(), self.model.online.parameters(), hyper.momentum)
        set_learning_rate(self.adamw, hyper.lr)
        self.similarity_target = hyper.similarity_target

    def forward_backward(self, images: Tensor, keys: Tensor, *, last_micro: bool) -> StepOutput:
        with attention_kernel(self.topology):
            out = StepOutput(*self.engine(images, keys, self.similarity_target))
        self.engine.backward(out.loss)
        if not last_micro:
            self.engine.step()  # counts the micro-batch
        return out

    def finish_step(self) -> Tensor:
        norm = None
        if not self.zero:  # averaged gradients are on the parameters only until the engine's step
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.engine.step()
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.topology.device)
        return norm

    def infer(self, which: str) -> AbstractContextManager[VisionTransformer]:
        return lend(self.model.get_submodule(which), self.topology)

    def state(self) -> TrainState:
        main = self.topology.is_main
        optimizer = {}
        for name, parameter in self._trained():
            for moment in MOMENTS:
                whole = self._moment(parameter, moment)
                if main:
                    optimizer[f"{moment}/{name}"] = whole.detach().cpu()
            if main:
                optimizer[f"step/{name}"] = self._any_adam_step().detach().cpu().clone()
        weights = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()} if main else {}
        return TrainState(weights, optimizer)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _moment(self, parameter: torch.nn.Parameter, moment: str) -> Tensor:
        if self.zero:
            return safe_get_full_optimizer_state(parameter, moment)
        return self.adamw.state[parameter][moment]

    def _any_adam_step(self) -> Tensor:
        return next(iter(self.adamw.state.values()))["step"]

    def load_state(self, state: TrainState) -> None:
        self.model.load_state_dict(state.weights)
        if self.zero:
            self.engine.optimizer.refresh_fp32_params()  # the flat fp32 master follows the weights
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = state.optimizer[f"{moment}/{name}"].to(self.topology.device)
                if self.zero:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    self.adamw.state[parameter][moment].copy_(value)
        step = next(value for key, value in state.optimizer.items() if key.startswith("step/"))
        for values in self.adamw.state.values():
            values["step"].copy_(step)

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self.model, self.adamw
