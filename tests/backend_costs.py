"""Run on every rank: what live backends hold and send, for `test_profiling`. Prints JSON on the first rank.

python -m tests.backend_costs SETTINGS [SETTINGS ...]     each: overrides separated by spaces
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmim import dist
from lmim.config import load_config, validate
from lmim.objective import LatentMIM
from lmim.options import Config
from lmim.parallel import Backend, build_backend
from lmim.schedules import Hyper

NAMES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_": "all_gather",
         "_reduce_scatter_base_": "reduce_scatter"}  # fmt: skip
HYPER = Hyper(lr=1e-3, momentum=0.9, similarity_target=0.5)


class CountCollectives(TorchDispatchMode):
    """Sums up the bytes of whole tensors by collective, and finds the largest buffer that is asked for empty."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.largest_buffer = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name in NAMES:
            self.bytes[NAMES[name]] += max(map(_bytes, args))
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.largest_buffer = max(self.largest_buffer, _bytes(out))
        return out


def _bytes(argument: object) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Return the bytes of the tensors' storages that were not seen before."""
    total = 0
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def held(backend: Backend, config: Config) -> dict[str, int]:
    """Return the bytes that this rank holds after a backward, by kind."""
    model = backend.model
    whole_or_cut = lambda p: getattr(p, "ds_tensor", p)  # noqa: E731
    weights = [whole_or_cut(p) for part in (model.online, model.decoder) for p in part.parameters()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    adamw = backend.adamw if config.parallel.backend == "deepspeed" else backend.optimizer
    master = []
    if config.parallel.backend == "deepspeed" and config.parallel.zero_stage:
        zero = backend.engine.optimizer
        if config.parallel.zero_stage == 3:
            gradients.append(zero.grad_partitions_flat_buffer)
            master = zero.fp32_partitioned_groups_flat
        else:
            gradients += [g for group in zero.averaged_gradients.values() for g in group]
            master = zero.single_partition_of_fp32_groups
    seen: set[int] = set()
    return dict(
        weights=storage_bytes([*weights, *model.buffers()], seen),
        gradients=storage_bytes(gradients, seen),
        optimizer=storage_bytes([*master, *(t for state in adamw.state.values() for t in state.values())], seen),
        ema=storage_bytes([whole_or_cut(p) for p in model.target.parameters()], seen),
    )


def measure(config: Config, topology: dist.Topology, steps: int = 2) -> dict[str, Any]:
    """Return what a backend holds in the last of some steps, what is sent in it, and its largest buffer; in bytes."""
    split = validate(config, topology.world_size)
    backend = build_backend(config, topology, split)
    with CountCollectives() as prepared:
        backend.prepare(lambda: LatentMIM(config.model, config.objective))
    for step in range(steps):  # AdamW's state comes in the first, and ZeRO-3 learns its order
        images = torch.zeros(split.micro_batch, 3, 35, 35, dtype=torch.uint8)
        with CountCollectives() as sent:
            backend.begin_step(HYPER)
            for micro in range(split.accumulate):
                inputs = (images, torch.arange(split.micro_batch), HYPER.similarity_target)
                backend.forward_backward(*inputs, last_micro=micro == split.accumulate - 1)
            if step == steps - 1:
                bytes_held = held(backend, config)
            backend.finish_step()
    backend.close()
    return dict(held=bytes_held, sent=dict(sent.bytes), buffer=max(prepared.largest_buffer, sent.largest_buffer))


if __name__ == "__main__":
    topology = dist.discover()
    dist.init(topology, 5)
    for settings in sys.argv[1:]:
        found = measure(load_config("configs/quickstart.yaml", settings.split()), topology)
        ranks = dist.gather_objects(found["held"])
        found["held"] = {kind: max(rank[kind] for rank in ranks) for kind in ranks[0]}
        if topology.is_main:
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.shutdown()
