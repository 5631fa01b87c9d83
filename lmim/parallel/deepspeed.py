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
* ZeRO-1's and 2's norm of the gradient, and clipping by it, wait for the device: without them they do not;
* its own checkpoints are tied to the number of ranks, so state goes in and out by name here.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import Tensor, nn

from lmim import dist
from lmim.config import ConfigError, Split
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
from lmim.parallel import Trainable, lend, lend_whole, prepare_blocks
from lmim.parallel.engine import ZERO, engine_config
from lmim.profiling import bucket_size
from lmim.schedules import Hyper
from lmim.store import Piece, whole


class DeepSpeedBackend:
    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split
        self.zero = config.parallel.zero_stage > 0  # a ZeRO optimizer is wrapped around AdamW
        self.cut = config.parallel.zero_stage == 3  # weights too
        self.engine_config = engine_config(config, split)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        # torch 2.14 would say twice a step that DeepSpeed calls collectives by their old names
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        try:
            DeepSpeedConfig(copy.deepcopy(self.engine_config))
        except (DeepSpeedConfigError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"parallel.deepspeed_config ({config.parallel.deepspeed_config}) is refused by DeepSpeed: {reason}"
            ) from error
        # Compiling its shared-memory all-reduce takes half a minute at a first start on CPUs; gloo is there already.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def prepare(self, build: Callable[[], Trainable]) -> None:
        self.build = build
        with torch.device("meta"):
            self.model = build()
        prepare_blocks(self.model, self.config, self.topology.device)
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.engine_config[ZERO].setdefault("reduce_bucket_size", bucket_size(trained))
        groups = self.model.parameter_groups(self.config.optim.weight_decay)
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
        self._share_masters()
        if self.cut and self.config.parallel.compile:
            self._hide_hooks_from_compiler()
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
        """Let the fp32 masters that ZeRO steps be its fp32 weights, of which it makes copies; not those on the host."""
        zero = self.engine.optimizer
        if self.cut:
            masters, weights = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
        elif self.zero and not zero.cpu_offload:
            masters = zero.single_partition_of_fp32_groups
            weights = [of_ranks[self.topology.rank] for of_ranks in zero.parallel_partitioned_bit16_groups]
        else:
            return
        for master, held in zip(masters, weights, strict=True):
            if held is not None and (master.device, master.dtype) == (held.device, held.dtype):
                master.data = held.data
        if not self.cut:
            zero._link_all_hp_params()  # its parameters know their part of the master

    def _hide_hooks_from_compiler(self) -> None:
        """Let `torch.compile` break at ZeRO-3's gathering and releasing rather than look into it.

        DeepSpeed hides its hook before a layer but not the one after it. While backward computes a block anew, that one
        meets released weights whose gradients are still whole, which the compiler's copy of a tensor cannot be.
        """
        offload = self.engine.optimizer.parameter_offload
        for when, way in itertools.product(("pre", "post"), ("forward", "backward")):
            name = f"{when}_sub_module_{way}_function"
            setattr(offload, name, torch.compiler.disable(getattr(offload, name)))

    def _create_moments(self) -> None:
        """Give AdamW its state now, at zero, rather than in its first step, so that a state can be put in and out."""
        if self.cut:
            stepped = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            stepped = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        create_moments(self.adamw, stepped)
        if self.zero and not self.cut:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what this rank holds of target and online encoder, in pairs."""
        pairs = self.model.averages()
        if not self.cut:
            return [target for _, target, _ in pairs], [online for _, _, online in pairs]
        for name, ours, theirs in pairs:
            alike = ours.ds_shape == theirs.ds_shape and ours.ds_tensor.shape == theirs.ds_tensor.shape
            assert alike and ours.ds_process_group == theirs.ds_process_group, f"{name} is cut otherwise in the target"
            assert not (ours.ds_persist or theirs.ds_persist), f"{name} is kept whole by ZeRO-3"
        return [target.ds_tensor for _, target, _ in pairs], [online.ds_tensor for _, _, online in pairs]

    def begin_step(self, hyper: Hyper) -> None:
        ema_update(self.target_weights, self.online_weights, hyper.momentum)
        set_learning_rate(self.adamw, hyper.lr)
        self.one_reduction = ExitStack()
        if self.zero and self.split.accumulate > 1:
            self.one_reduction.enter_context(self.engine.coalesce_grad_reduction())

    def forward_backward(self, *inputs: Tensor | float, last_micro: bool) -> Any:
        with ExitStack() as quiet:
            out = self.model.output(*self.engine(*inputs))
            if not self.zero and not last_micro:
                quiet.enter_context(self.engine.no_sync())
            self.engine.backward(out.loss / self.split.accumulate)
        if last_micro:
            self.one_reduction.close()
        return out

    def finish_step(self) -> Tensor:
        if self.engine_config[ZERO].get("compute_grad_norm", self.zero):  # DeepSpeed leaves out and clips
            self.engine.step()
            return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.topology.device)
        held = self._averaged_gradients()
        norm = torch.nn.utils.get_total_norm(held)
        if self.zero:  # of this rank's part; and what DeepSpeed does not measure it does not clip
            squares = norm.square()
            torch.distributed.all_reduce(squares, group=self.engine.data_parallel_group)
            norm, limit = squares.sqrt(), self.config.optim.clip_norm
            if limit:
                torch._foreach_mul_(held, (limit / (norm + 1e-6)).clamp(max=1.0))
        leave_out_unless_finite(self.adamw, norm)
        self.engine.step()
        return norm

    def _averaged_gradients(self) -> list[Tensor]:
        """Return what the engine's step is about to take: whole gradients, or under ZeRO-1 and 2 this rank's part."""
        if not self.zero:
            return [p.grad for p in self.model.parameters() if p.grad is not None]
        return [gradient for group in self.engine.optimizer.averaged_gradients.values() for gradient in group]

    def gradients(self) -> list[Piece]:
        return [self._gradient(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _gradient(self, name: str, parameter: nn.Parameter) -> Piece:
        if not self.zero:
            return self._whole(name, parameter.grad)
        if self.cut:
            return Piece(name, tuple(parameter.ds_shape), 0, deepspeed.utils.safe_get_local_grad(parameter).view(-1))
        ours, numbers = parameter._hp_mapping, torch.zeros(0, device=self.topology.device)
        if ours:
            numbers = ours.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        return Piece(name, tuple(parameter.shape), 0, numbers)

    def infer(self, which: str) -> AbstractContextManager[Any]:
        part = self.model.get_submodule(which)
        if not self.cut:
            return lend(part)
        return lend_whole(self.build, which, whole_tensors(part), self.topology)

    def pieces(self) -> list[Piece]:
        found = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if self.cut and isinstance(tensor, nn.Parameter):
                found += self._cuts(name, tensor)
                continue
            found.append(self._whole(name, tensor))
            if tensor.requires_grad and not self.zero:
                found += [self._whole(f"{moment}/{name}", self.adamw.state[tensor][moment]) for moment in MOMENTS]
            elif tensor.requires_grad and (ours := tensor._hp_mapping):  # this rank's part of what the engine steps
                found += [Piece(f"{moment}/{name}", tuple(tensor.shape), ours.lp_fragment_address.start,
                                ours.optim_fragment[moment]) for moment in MOMENTS]  # fmt: skip
        return found

    def _whole(self, name: str, tensor: Tensor) -> Piece:
        return whole(name, tensor, self.topology.rank, self.topology.world_size)

    def _cuts(self, name: str, parameter: nn.Parameter) -> list[Piece]:
        """Return this rank's cuts of a weight and its moments, without the padding behind the end."""
        start = self.topology.rank * parameter.ds_tensor.numel()
        held = slice(max(parameter.ds_numel - start, 0))
        tensors = {name: parameter.ds_tensor}
        if parameter.requires_grad:
            tensors.update({f"{moment}/{name}": self._stepped(parameter, moment) for moment in MOMENTS})
        return [Piece(key, tuple(parameter.ds_shape), start, tensor.detach().view(-1)[held])
                for key, tensor in tensors.items()]  # fmt: skip

    def _stepped(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """Return what the engine steps of this rank's cut, or a moment of it, where it lies, on the device or not."""
        return self.engine.optimizer._get_fp32_opt_state_partition(parameter, True, moment)[0]

    def optimizer_steps(self) -> int:
        return steps_taken(self.adamw)

    @torch.no_grad()
    def loaded(self, optimizer_steps: int) -> None:
        set_steps_taken(self.adamw, optimizer_steps)
        if self.cut:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    self._stepped(parameter).copy_(parameter.ds_tensor)
        elif self.zero:
            self.engine.optimizer.refresh_fp32_params()  # a master on the host follows the weights

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
