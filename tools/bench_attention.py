"""The attention part of bench.py: milliseconds of one block's attention in each place of the model, by every kernel."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench import progress_bar, write_figures
from bench_step import configured, device_name, synchronize
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmim import dist
from lmim.config import validate
from lmim.options import Config
from lmim.parallel import autocast
from lmim.profiling import sizes
from lmim.vit import attend

# `parallel.attention`, and for "fused" whose kernel: torch's own choice, or one of those that GPUs have
KERNELS: dict[str, tuple[str, SDPBackend | None]] = {"plain": ("plain", None), "fused": ("fused", None)}
ON_GPUS = {
    "flash": ("fused", SDPBackend.FLASH_ATTENTION),
    "cuDNN": ("fused", SDPBackend.CUDNN_ATTENTION),
    "efficient": ("fused", SDPBackend.EFFICIENT_ATTENTION),
}


@dataclasses.dataclass
class Place:
    """Where the model attends: queries are (batch, heads, queries, channels), keys and values have `keys` tokens."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    channels: int
    gradient: bool  # forward and backward, or the forward only
    ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by kernel, one a round
    missing: dict[str, str] = dataclasses.field(default_factory=dict)  # kernels that cannot do it, and why

    @property
    def gflop(self) -> float:
        """Two products a head, and four in the backward; what a kernel makes anew there is not counted."""
        one = 2 * self.batch * self.heads * self.queries * self.keys * self.channels / 1e9
        return (2 + 4 if self.gradient else 2) * one


def places(config: Config, batch: int) -> list[Place]:
    """Return where a configuration attends, for one micro-batch."""
    s = sizes(config)
    encoder, decoder = s.D // s.heads, s.E // s.decoder_heads
    found = [
        Place("target", batch, s.heads, 1 + s.seen, 1 + s.seen, encoder, config.objective.target == "joint"),
        Place("encoder", batch, s.heads, 1 + s.V, 1 + s.V, encoder, True),
    ]
    if config.model.decoder_attention == "self":
        tokens = 2 + s.P + s.V
        return [*found, Place("decoder", batch, s.decoder_heads, tokens, tokens, decoder, True)]
    return [
        *found,
        Place("decoder, self", batch, s.decoder_heads, 1 + s.P, 1 + s.P, decoder, True),
        Place("decoder, cross", batch, s.decoder_heads, 1 + s.P, 1 + s.V, decoder, True),
    ]


def once(place: Place, kernel: str, config: Config, topology: dist.Topology) -> Callable[[], Any]:
    """Return what attends once, on random numbers, warmed up; tokens lie before heads, as they leave a linear layer."""
    device = topology.device
    dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(place.batch, tokens, place.heads, place.channels, device=device, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_(place.gradient)
        for tokens in (place.queries, place.keys, place.keys)
    )
    ours, backend = (KERNELS | ON_GPUS)[kernel]
    upstream = torch.ones_like(q)

    def run() -> Any:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext(), torch.set_grad_enabled(place.gradient):
            with autocast(topology, config):
                out = attend(q, k, v, ours)
            return torch.autograd.grad(out, (q, k, v), upstream) if place.gradient else out

    for _ in range(3):
        run()
    return run


def measure(place: Place, config: Config, topology: dist.Topology, *, rounds: int, steps: int) -> None:
    """Fill in what every kernel takes, in turn, round after round."""
    runs, device = {}, topology.device
    for kernel in KERNELS | (ON_GPUS if device.type == "cuda" else {}):
        try:
            runs[kernel] = once(place, kernel, config, topology)
        except RuntimeError as error:  # torch has no such kernel for these numbers, or no memory for it
            place.missing[kernel] = str(error).splitlines()[0]
    for _ in range(rounds):
        for kernel, run in runs.items():
            synchronize(device)
            began = time.perf_counter()
            for _ in range(steps):
                run()
            synchronize(device)
            place.ms.setdefault(kernel, []).append(1e3 * (time.perf_counter() - began) / steps)


def run_attention(options: argparse.Namespace, topology: dist.Topology) -> None:
    """Measure all places and print or record them."""
    config = configured(options, [])
    found = places(config, validate(config, topology.world_size).micro_batch)
    with progress_bar() as progress:
        task = progress.add_task("", total=len(found))
        for place in found:
            progress.update(task, description=place.name)
            measure(place, config, topology, rounds=options.rounds, steps=options.steps)
            progress.advance(task)
    if topology.is_main:
        report(found, config, options, topology)


def report(found: Sequence[Place], config: Config, options: argparse.Namespace, topology: dist.Topology) -> None:
    """Print the table, and record it if asked."""
    where = device_name(topology.device)
    table = Table(title=f"attention of one block on {where}, {config.precision.compute}", title_justify="left")
    for heading in ("", "batch x heads, queries x keys x channels", "kernel"):
        table.add_column(heading)
    for heading in ("ms", "least - most", "TFLOP/s"):
        table.add_column(heading, justify="right")
    for place in found:
        shape = f"{place.batch} x {place.heads}, {place.queries} x {place.keys} x {place.channels}"
        passes = "forward and backward" if place.gradient else "forward"
        for kernel, ms in place.ms.items():
            median = statistics.median(ms)
            table.add_row(f"{place.name}, {passes}", shape, kernel, f"{median:.2f}", f"{min(ms):.2f} - {max(ms):.2f}",
                          f"{place.gflop / median:.3g}")  # fmt: skip
        for kernel, why in place.missing.items():
            table.add_row(f"{place.name}, {passes}", shape, kernel, why)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.json:
        rows = [dataclasses.asdict(place) | dict(gflop=place.gflop) for place in found]
        settings = dict(config=str(options.config), overrides=options.overrides, steps=options.steps,
                        rounds=options.rounds, device=where)  # fmt: skip
        print(f"written to {write_figures('attention', dict(rows=rows), **settings)}")
