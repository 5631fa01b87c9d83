"""DeepSpeed ZeRO-0 to ZeRO-3 behind the Backend protocol.

Weights are fp32 under every stage (bf16 is autocast, by the engine's `torch_autocast`), and so is the target's copy.
Under ZeRO-0, 1 and 2 weights and target are whole on every rank: each moves the target by the same arithmetic from the
same weights. Under ZeRO-3 the target lies in the engine's module beside the online encoder, every parameter of both cut
flat over all ranks in the same way, and a rank moves its cuts of the target towards its cuts of the online encoder.
The EMA never communicates.

Measured facts this file stands on (DeepSpeed 0.19):
* what is cut must never be kept whole by ZeRO-3 (persistence threshold 0): kept copies do not see the EMA;
* edits of gathered weights are thrown away unless a rank is named as their author: the cuts themselves are written;
* `lower_precision_safe_modules: []` makes autocast sum gradients and gather weights in fp32;
* `coalesce_grad_reduction` reduces the gradients of all of a step's micro-batches once;
* its own checkpoints are tied to the number of ranks, so state goes in and out by name here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from lmim import dist
from lmim.config import Config, ConfigError, Split
from lmim.dist import Topology
from lmim.objective import LatentMIM, StepOutput
from lmim.optim import build_adamw, ema_update, parameter_groups, set_learning_rate
from lmim.parallel import TrainState, attention_kernel, lend, lend_whole, prepare_blocks
from lmim.parallel.engine import engine_config
from lmim.schedules import Hyper
from lmim.vit import VisionTransformer

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedBackend:
    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split
        self.zero = config.parallel.zero_stage > 0  # a ZeRO optimizer is wrapped around AdamW
        self.cut = config.parallel.zero_stage == 3  # weights too
        self.engine_config = engine_config(config, split)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        try:
            DeepSpeedConfig(copy.deepcopy(self.engine_config))
        except (DeepSpeedConfigError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"parallel.deepspeed_config ({config.parallel.deepspeed_config}) is refused by DeepSpeed: {reason}"
            ) from error
        # Compiling its shared-memory all-reduce takes half a minute at a first start on CPUs; gloo is there already.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def prepare(self, build: Callable[[], LatentMIM]) -> None:
        self.build = build
        with torch.device("meta"):
            self.model = build()
        prepare_blocks(self.model, self.config)
        groups = parameter_groups(self.model, self.config.optim.weight_decay)
        if self.cut:
            self._fill_and_cut()
        else:
            self.model.to_empty(device=self.topology.device)
            self.model.init_weights(self.config.run.seed)
        for group in groups:
            group["params"] = [self.model.get_parameter(name) for name in group["names"]]
        self.adamw = build_adamw(groups, self.config.optim)
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.adamw, config=self.engine_config)
        dist.set_timeout([self.engine.data_parallel_group], self.config.parallel.timeout_minutes)
        if self.cut:
            self._share_masters()
        self._create_moments()
        self.target_weights, self.online_weights = self._pairs()

    def _fill_and_cut(self) -> None:
        """Give every parameter its value and cut it before the next, so that one whole tensor is alive at a time."""
        for name, value in self.model.initial_values(self.config.run.seed):
            path, _, leaf = name.rpartition(".")
            owner, value = self.model.get_submodule(path), value.to(self.topology.device, copy=True)
            if leaf in owner._buffers:
                owner._buffers[leaf] = value
                continue
            parameter = nn.Parameter(value, requires_grad=owner._parameters[leaf].requires_grad)
            owner._parameters[leaf] = parameter
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self.engine_config)

    def _share_masters(self) -> None:
        """Let ZeRO-3's fp32 masters be its fp32 weights: it copies them, as it takes a device and its name for two."""
        optimizer = self.engine.optimizer
        for master, weights in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            if weights is not None and (master.device, master.dtype) == (weights.device, weights.dtype):
                master.data = weights.data

    def _create_moments(self) -> None:
        """Give AdamW its state now, at zero, rather than in its first step, so that a state can be put in and out."""
        if self.cut:
            stepped = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            stepped = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        for tensor in stepped:
            self.adamw.state[tensor] = dict(
                step=torch.zeros((), device=tensor.device), **{m: torch.zeros_like(tensor) for m in MOMENTS}
            )
        if self.zero and not self.cut:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what this rank holds of target and online encoder, in pairs."""
        pairs = list(zip(self.model.target.named_parameters(), self.model.online.parameters(), strict=True))
        if not self.cut:
            return [target for (_, target), _ in pairs], [online for _, online in pairs]
        for (name, ours), theirs in pairs:
            alike = ours.ds_shape == theirs.ds_shape and ours.ds_tensor.shape == theirs.ds_tensor.shape
            assert alike and ours.ds_process_group == theirs.ds_process_group, f"{name} is cut otherwise in the target"
            assert not (ours.ds_persist or theirs.ds_persist), f"{name} is kept whole by ZeRO-3"
        return [target.ds_tensor for (_, target), _ in pairs], [online.ds_tensor for _, online in pairs]

    def begin_step(self, hyper: Hyper) -> None:
        ema_update(self.target_weights, self.online_weights, hyper.momentum)
        set_learning_rate(self.adamw, hyper.lr)
        self.similarity_target = hyper.similarity_target
        self.one_reduction = ExitStack()
        if self.zero and self.split.accumulate > 1:
            self.one_reduction.enter_context(self.engine.coalesce_grad_reduction())

    def forward_backward(self, images: Tensor, keys: Tensor, *, last_micro: bool) -> StepOutput:
        with attention_kernel(self.topology), ExitStack() as quiet:
            out = StepOutput(*self.engine(images, keys, self.similarity_target))
            if not self.zero and not last_micro:
                quiet.enter_context(self.engine.no_sync())
            self.engine.backward(out.loss / self.split.accumulate)
        if last_micro:
            self.one_reduction.close()
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
        encoder = self.model.get_submodule(which)
        if not self.cut:
            return lend(encoder, self.topology)
        return lend_whole(self.build, which, whole_tensors(encoder), self.topology)

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
        weights = {name: whole.detach().cpu().clone() for name, whole in whole_tensors(self.model) if main}
        return TrainState(weights, optimizer)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.zero:
            return safe_get_full_optimizer_state(parameter, moment)
        return self.adamw.state[parameter][moment]

    def _any_adam_step(self) -> Tensor:
        return next(iter(self.adamw.state.values()))["step"]

    @torch.no_grad()
    def load_state(self, state: TrainState) -> None:
        if self.cut:
            self._load_cuts(state)
        else:
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

    def _load_cuts(self, state: TrainState) -> None:
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter):
                tensor.copy_(state.weights[name])
                continue
            tensor.ds_tensor.copy_(cut_of(tensor, state.weights[name]))
            if tensor.requires_grad:
                safe_set_local_fp32_param(tensor, cut_of(tensor, state.weights[name]))
                for moment in MOMENTS:
                    value = cut_of(tensor, state.optimizer[f"{moment}/{name}"])
                    safe_set_local_optimizer_state(tensor, value, moment)

    def abandon(self) -> None:
        if hasattr(self, "one_reduction"):  # closed, now or when it is collected, it would reduce gradients: alone
            for stages in ("zero12", "zero3"):
                setattr(self.engine, f"_flush_coalesced_reduction_{stages}", lambda optimizer: None)
            self.one_reduction.close()

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self.model, self.adamw, self.target_weights, self.online_weights


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's tensors by name, whole, one at a time; a collective where they are cut."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if hasattr(tensor, "ds_tensor"):
            with deepspeed.zero.GatheredParameters([tensor]):
                yield name, tensor
        else:
            yield name, tensor


def cut_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return this rank's cut of a whole value, zeros behind the end, as ZeRO-3 cuts the parameter."""
    cut = torch.zeros_like(parameter.ds_tensor)
    numbers = whole.flatten()[torch.distributed.get_rank() * cut.numel() :][: cut.numel()]
    cut[: numbers.numel()] = numbers
    return cut
