"""FSDP2 behind the Backend protocol: `fully_shard` on blocks, over all ranks, in HSDP or as replicas.

Over ranks every parameter, of the target too, is a DTensor cut along its first dimension over the
`parallel.shard_ranks` ranks that share one copy; groups of such ranks hold replicas. The shards are fp32, and so is the
target's copy: the EMA moves each rank's shard of the target towards its shard of the online encoder, which is cut
alike, and communicates nothing. A target weight is gathered for the forward of its block and freed again. Where each
rank has a whole copy the target is not wrapped, and a rank alone wraps nothing: FSDP2 would copy every weight to where
it is.

Small blocks are gathered in groups: each takes the host some 0.5 ms in each direction
(`tools/bench_results/README.md`), and a short message is latency.

AdamW steps each rank's shards as plain tensors: what it does is the same number by number, while as DTensors several
hundred weights would take the host milliseconds in every step. Only the gradient's norm crosses ranks.

Invariant: the lists of shards are taken once, before any forward, and the target is cut again before the EMA.
Otherwise `parameters()` may yield gathered copies, which the EMA would move in vain: FSDP2 keeps the parameters at a
root gathered after a forward unless told not to.

Online encoder, target and decoder are three roots and not one: each can then be lent alone for evaluation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

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
from lmim.parallel import Trainable, autocast, lend_whole, prepare_blocks
from lmim.profiling import count_numbers, gathered_together, gathered_units
from lmim.schedules import Hyper
from lmim.store import Piece, whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FsdpBackend:
    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split
        self.policy = self._policy()
        # told in every step by torch 2.14: nothing here works in place on what a part returns
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)

    def prepare(self, build: Callable[[], Trainable]) -> None:
        self.build = build
        with torch.device("meta"):
            self.model = build()
        prepare_blocks(self.model, self.config, self.topology.device, self.topology.world_size)
        self._shard()
        self.model.to_empty(device=self.topology.device)
        with torch.no_grad():
            tensors = self.model.state_dict(keep_vars=True)
            for name, value in self.model.initial_values(self.config.run.seed):
                put(tensors[name], value)
        self.target_shards, self.online_shards = self._pairs()
        optim = self.config.optim
        self.shards = {p: local(p) for p in self.model.parameters() if p.requires_grad}
        groups = self.model.parameter_groups(optim.weight_decay)
        self.optimizer = build_adamw([dict(g, params=[self.shards[p] for p in g["params"]]) for g in groups], optim)
        create_moments(self.optimizer, self.shards.values())

    def _mesh(self) -> DeviceMesh:
        world, device = self.topology.world_size, self.topology.device.type
        shard = self.config.parallel.shard_ranks or world
        if shard == world:
            return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (world // shard, shard), mesh_dim_names=("replicate", "shard"))

    def _policy(self) -> MixedPrecisionPolicy:
        """Return the precisions of gathering and reducing; only what autocast rounds to bf16 is gathered in bf16."""
        precision, gathered = self.config.precision, {}
        if precision.reduce == "bf16" and self.split.accumulate > 1:
            raise ConfigError(
                f"precision.reduce (bf16) with parallel.backend=fsdp would add {self.split.accumulate} micro-batches "
                "up in bf16 too: take fp32, which costs little once in so many, or a larger data.micro_batch"
            )
        if precision.gather == "bf16":
            if "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__:
                raise ConfigError(
                    "precision.gather (bf16) needs torch 2.15, which can leave norms and tokens in fp32; this is "
                    f"{torch.__version__}: take fp32, or a newer torch"
                )
            matrices_only = lambda parameter: None if parameter.ndim == 2 else torch.float32  # noqa: E731
            gathered = dict(param_dtype=torch.bfloat16, param_dtype_override_fn=matrices_only)
        return MixedPrecisionPolicy(reduce_dtype=DTYPES[precision.reduce], cast_forward_inputs=False, **gathered)

    def _shard(self) -> None:
        """Cut the model: a group of every few blocks (or every one), and one of what is left of each part."""
        keep, mesh = self.config.parallel.keep_gathered, self._mesh()
        self.share_a_copy = mesh.get_group("shard") if mesh.size(-1) > 1 else None
        dist.set_timeout(mesh.get_all_groups(), self.config.parallel.timeout_minutes)
        how = dict(mesh=mesh, mp_policy=self.policy, reshard_after_forward=not keep)
        for part in self.model.parts():
            if not needs_others(part, mesh):
                continue
            modules = gathered_units(part)
            for group in gathered_together([*map(count_numbers, modules)], self.config.parallel.smallest_group_mb):
                fully_shard([modules[place] for place in group], **how)
            fully_shard(part, **how)
        self.parts = [part for part in self.model.parts() if isinstance(part, FSDPModule)]
        untrained = (part for part in self.parts if not any(p.requires_grad for p in part.parameters()))
        self.never_backward = [m for part in untrained for m in part.modules() if isinstance(m, FSDPModule)]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the local shards of target and online encoder, in pairs."""
        pairs = self.model.averages()
        for name, ours, theirs in pairs:
            cuts = [(t.placements, t.device_mesh) if isinstance(t, DTensor) else None for t in (ours, theirs)]
            alike = self.share_a_copy is None or cuts[0] == cuts[1] is not None
            assert alike and ours.shape == theirs.shape, f"{name} is cut otherwise in the target"
        return [local(target) for _, target, _ in pairs], [local(online) for _, _, online in pairs]

    def begin_step(self, hyper: Hyper) -> None:
        for module in self.never_backward:
            module.reshard()
        ema_update(self.target_shards, self.online_shards, hyper.momentum)
        set_learning_rate(self.optimizer, hyper.lr)

    def forward_backward(self, *inputs: Tensor | float, last_micro: bool) -> Any:
        for part in self.parts:
            part.set_requires_gradient_sync(last_micro)
        with autocast(self.topology, self.config):
            out = self.model(*inputs)
        (out.loss / self.split.accumulate).backward()
        return out

    def finish_step(self) -> Tensor:
        for parameter, shard in self.shards.items():
            shard.grad = None if parameter.grad is None else local(parameter.grad)
        norm = self._gradient_norm()
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.shards.values(), self.config.optim.clip_norm, norm)
        leave_out_unless_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter in self.shards:
            parameter.grad = None
        return norm

    def _gradient_norm(self) -> Tensor:
        """Return the norm of the whole gradient, of which each of the ranks that share a copy holds a part."""
        norm = torch.nn.utils.get_total_norm([shard.grad for shard in self.shards.values() if shard.grad is not None])
        if self.share_a_copy is None:
            return norm
        square = norm.square()
        torch.distributed.all_reduce(square, group=self.share_a_copy)
        return square.sqrt()

    def gradients(self) -> list[Piece]:
        return [self._piece(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]

    def infer(self, which: str) -> AbstractContextManager[Any]:
        return lend_whole(self.build, which, self._whole(self.model.get_submodule(which)), self.topology)

    def _whole(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Gather a module's tensors one after another; a collective."""
        for name, tensor in module.state_dict().items():
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def pieces(self) -> list[Piece]:
        found = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            found.append(piece := self._piece(name, tensor))
            if tensor.requires_grad:
                state = self.optimizer.state[self.shards[tensor]]
                found += [piece._replace(name=f"{moment}/{name}", numbers=state[moment].view(-1)) for moment in MOMENTS]
        return found

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        """Return a rank's rows of a tensor; replicas hold the same."""
        if not isinstance(tensor, DTensor):
            return whole(name, tensor, self.topology.rank, self.topology.world_size)
        mesh, shape = tensor.device_mesh, tuple(tensor.shape)
        rows = -(-shape[0] // mesh.size(-1))
        start = min(mesh.get_local_rank("shard") * rows, shape[0]) * math.prod(shape[1:])
        replicas = dict(copy=mesh.get_local_rank("replicate"), copies=mesh.size(0)) if mesh.ndim == 2 else {}
        return Piece(name, shape, start, local(tensor).view(-1), **replicas)

    def optimizer_steps(self) -> int:
        return steps_taken(self.optimizer)

    def loaded(self, optimizer_steps: int) -> None:
        set_steps_taken(self.optimizer, optimizer_steps)

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        del self.model, self.optimizer, self.shards, self.parts, self.never_backward
        del self.target_shards, self.online_shards


def needs_others(part: nn.Module, mesh: DeviceMesh) -> bool:
    """Tell whether a part's weights are gathered over ranks, or its gradients summed; if not, it needs no wrapping."""
    return mesh.size(-1) > 1 or (mesh.size() > 1 and any(parameter.requires_grad for parameter in part.parameters()))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def put(tensor: Tensor, whole: Tensor) -> Tensor:
    """Write a rank's part of `whole`, which every rank has, into `tensor`, and return that."""
    if isinstance(tensor, DTensor):
        mesh, whole = tensor.device_mesh, whole.to(tensor.device)
        cut = distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None)  # None: nothing is sent
        local(tensor).copy_(local(cut))
    else:
        tensor.copy_(whole)
    return tensor
