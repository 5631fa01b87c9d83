"""The one seam for sharding: what a backend does for the training loop.

Owns the protocol and the choice. DeepSpeed runs backward, clipping and the optimizer step as one engine, other ways of
sharding do not, so the seam is the step and not the wrapping of a model. The invariant: every backend takes the same
trajectory, and its state goes in and out in pieces under the canonical names of the model's `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmim.config import Split
from lmim.dist import Topology
from lmim.options import Config
from lmim.schedules import Hyper
from lmim.store import Piece


class Trainable(Protocol):
    """What a backend asks of an `nn.Module`: `LatentMIM`, and the `Classifier` of fine-tuning.

    `forward` takes tensors and numbers, and returns an `output`.
    """

    output: type[tuple]  # a NamedTuple of tensors on the device, of which scalars are logged; `loss` has a gradient

    def parts(self) -> tuple[nn.Module, ...]:
        """Return what is cut as a root of its own, of all parameters; each has `blocks`, which are cut further."""

    def between_blocks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Return modules that are worth compiling beside the blocks, or the methods of them that are."""

    def averages(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, moving average, weight that it follows); none, for a model without such."""

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return AdamW's groups of the trained parameters, with `names` and `lr_scale`."""

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole value) of every parameter and buffer."""

    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter and buffer to its initial value."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward."""


class Backend(Protocol):
    """One step is: begin_step, forward_backward of every micro-batch, finish_step; all of it stays on the device."""

    topology: Topology
    model: Any  # what `prepare` built, as it is trained

    def prepare(self, build: Callable[[], Trainable]) -> None:
        """Build the model on `meta`, place and initialise it, and make the optimizer."""

    def begin_step(self, hyper: Hyper) -> None:
        """Set the learning rate and move the target: target ← m·target + (1 − m)·online, as the weights stand."""

    def forward_backward(self, *inputs: Tensor | float, last_micro: bool) -> Any:
        """Run the model on one micro-batch and return its output; gradients are means over micro-batches and ranks."""

    def finish_step(self) -> Tensor:
        """Clip, run AdamW and return the gradient's norm before clipping, on the device.

        Where that is not finite, weights and moments stay as they are, on all ranks.
        """

    def gradients(self) -> list[Piece]:
        """Return what this rank holds of the gradient of every trained weight, before `finish_step`; may be nothing."""

    def infer(self, which: str) -> AbstractContextManager[Any]:
        """Lend a part of the model ("online", "target"; "": the whole) for evaluation: no gradient, no noise, fp32."""

    def pieces(self) -> list[Piece]:
        """Return views of all that this rank holds: NAME of weights and target, and {exp_avg,exp_avg_sq}/NAME."""

    def optimizer_steps(self) -> int:
        """Return how many steps AdamW has taken."""

    def loaded(self, optimizer_steps: int) -> None:
        """Take over what was read into the pieces."""

    def abandon(self) -> None:
        """Drop the step in hand, after an error, without a word to the other ranks."""

    def close(self) -> None:
        """Free what the backend holds; the process group stays."""


def weights_are_cut(config: Config, world_size: int) -> bool:
    """Tell whether a forward gathers weights, and so waits for other ranks."""
    parallel = config.parallel
    if parallel.backend == "fsdp":
        return (parallel.shard_ranks or world_size) > 1
    return parallel.backend == "deepspeed" and parallel.zero_stage == 3


def autocast(topology: Topology, config: Config) -> AbstractContextManager:
    """Return the autocast of `precision.compute`: weights and sums stay fp32, matrix products run in bf16."""
    return torch.autocast(topology.device.type, torch.bfloat16, enabled=config.precision.compute == "bf16")


def attention_kernels(module: nn.Module) -> dict[nn.Module, str]:
    """Return the kernel of each attention in a module."""
    return {inner: inner.kernel for inner in module.modules() if hasattr(inner, "kernel")}


def choose_attention(module: nn.Module, kernel: str) -> None:
    """Let every attention in a module run by one kernel: "fused" or "plain"."""
    for inner in attention_kernels(module):
        inner.kernel = kernel


@contextmanager
def lend(part: nn.Module) -> Iterator[Any]:
    """Lend a part of the model for evaluation: no gradient, no noise, fp32 as when it is evaluated on its own."""
    training, kernels = part.training, attention_kernels(part)
    part.eval()
    choose_attention(part, "fused")
    try:
        # not compiled: every batch size and resolution of an evaluation would make a graph of its own
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield part
    finally:
        part.train(training)
        for module, kernel in kernels.items():
            module.kernel = kernel


@contextmanager
def lend_whole(
    build: Callable[[], Trainable], which: str, tensors: Iterable[tuple[str, Tensor]], topology: Topology
) -> Iterator[Any]:
    """Lend a whole copy of a part that is cut over ranks, filled from its tensors as they are gathered.

    Gathered once, it costs that part's fp32 weights while it is lent; ranks may then run as many forwards as each
    has images, where gathering in every forward would hang as soon as one rank has a batch more than another.
    """
    with torch.device("meta"):
        part = build().get_submodule(which)
    part.to_empty(device=topology.device)
    with torch.no_grad():
        places = part.state_dict(keep_vars=True)
        for name, whole in tensors:
            places[name].copy_(whole)
    with lend(part):
        yield part


def prepare_blocks(model: Trainable, config: Config, device: torch.device, world_size: int = 1) -> None:
    """Choose attention's kernel, set activation checkpointing and compile the model in place, so that names stay.

    It comes before weights are cut. The fused kernel's backward is slow in bf16 on CPUs: three times as long as plain
    products for 177 tokens, and five to nine times for 11 to 40 (`tools/bench_results/README.md`).
    """
    kernel = config.parallel.attention
    if kernel == "auto":
        kernel = "plain" if device.type == "cpu" and config.precision.compute == "bf16" else "fused"
    choose_attention(model, kernel)
    model.set_grad_checkpointing(config.parallel.activation_checkpointing)
    if config.parallel.compile:
        _compile(model, config, device, world_size)


def _compile(model: Trainable, config: Config, device: torch.device, world_size: int) -> None:
    """Let a model's parts compile at their first step.

    Blocks are compiled one by one: those of a part share a graph, and each can be gathered by itself. What lies
    between them is compiled too, where it is many small operations. On CPUs, where entering a graph takes as long as a
    small one runs, each part is one graph instead, unless its blocks are gathered or recomputed one by one, or draw
    noise: its integers, worked into what follows, keep the compiler busy for a quarter of an hour.
    """
    parallel = config.parallel
    how = dict(dynamic=False)  # or online and target, which differ in tokens, would share one graph
    # ZeRO-3 gathers by hooks of every layer, between which there is little to compile
    hooked = parallel.backend == "deepspeed" and parallel.zero_stage == 3
    wrapped = parallel.backend == "fsdp" and world_size > 1
    by_block = device.type != "cpu" or hooked or wrapped or parallel.activation_checkpointing
    by_block = by_block or config.model.drop_path or config.model.dropout or model in model.parts()
    for part in model.parts():
        if by_block:
            for block in part.blocks:
                block.compile(**how)
        else:
            part.forward = torch.compile(part.forward, **how)
    for module, methods in model.between_blocks():
        if (hooked or not by_block) and module is not model:
            continue
        if not methods:
            module.compile(**how)
        for method in methods:
            setattr(module, method, torch.compile(getattr(module, method), **how))


def build_backend(config: Config, topology: Topology, split: Split) -> Backend:
    """Return the backend that `parallel.backend` names, not yet prepared."""
    if config.parallel.backend == "local":
        from lmim.parallel.local import LocalBackend as Chosen
    elif config.parallel.backend == "fsdp":
        from lmim.parallel.fsdp import FsdpBackend as Chosen
    else:
        from lmim.parallel.deepspeed import DeepSpeedBackend as Chosen
    return Chosen(config, topology, split)
