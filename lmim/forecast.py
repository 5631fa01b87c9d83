"""A run on a cluster that is not there: which way of sharding fits a GPU, how fast it would go, and for how long.

Owns the GPUs' figures, the table of `lmim plan` and the rule by which a setting is recommended. The invariant: table
and JSON are one dictionary. Times are the model FLOPs and the ring's bytes over peak rates and a stated share of them;
latencies, the loader and the optimizer's own time are left out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lmim.config import ConfigError, Split, duration_steps, validate
from lmim.options import Config, ParallelConfig
from lmim.profiling import (
    Collective,
    activation_bytes,
    buffer_bytes,
    collectives,
    count_parameters,
    flops_per_image,
    matrix_peak,
    state_bytes,
)

IMAGENET_IMAGES = 1_281_167
WIDTH = 120  # columns of the table at most, in a terminal or a log
USABLE = 0.85  # share of a GPU's memory to plan with; CUDA's context, NCCL and fragments take the rest


class Gpu(NamedTuple):
    """Dense peaks of bf16 and of fp32 without TF32, memory, NVLink in one direction (half of what is advertised)."""

    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float
    nvlink_gb_per_s: float

    def tflops(self, compute: str) -> float:
        """Return the peak of `precision.compute`."""
        return self.bf16_tflops if compute == "bf16" else self.fp32_tflops


# NVIDIA's data sheets of H100 SXM5, H200 SXM and A100 SXM 80 GB; the peaks without sparsity (H100's 1,979 is with it)
GPUS = {"h100": Gpu(989, 67, 80, 450), "h200": Gpu(989, 67, 141, 450), "a100": Gpu(312, 19.5, 80, 300)}


def known_gpu(name: str) -> str | None:
    """Return the key in `GPUS` of a GPU by the name its driver gives; None for others, slower boards and MIG slices."""
    words = re.findall("[a-z0-9]+", name.lower())
    return None if {"pcie", "nvl", "mig"} & set(words) else next((word for word in words if word in GPUS), None)


def device_peak(device: torch.device, compute: str) -> tuple[float, str]:
    """Return the FLOP/s that MFU is a share of, and whence: a known GPU's dense peak, else what products reach here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    gpu = known_gpu(name) if device.type == "cuda" else None
    if gpu is not None:
        return 1e12 * GPUS[gpu].tflops(compute), f"the dense {compute} peak of {name}"
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    return matrix_peak(device, dtype), f"measured, as {compute} products on {name} ({torch.get_num_threads()} threads)"


class Cluster(NamedTuple):
    """Equal nodes of equal GPUs; the network's rate is of each GPU, in one direction."""

    nodes: int
    gpus_per_node: int
    gpu: str
    network_gbit: float = 400.0
    mfu: float = 0.4

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def seconds(self, collective: Collective) -> float:
        """Return how long a ring takes that uses every link between the group's ranks; a node's GPUs share theirs."""
        on_a_node = max(self.gpus_per_node // collective.stride, 1)
        gb_per_s = GPUS[self.gpu].nvlink_gb_per_s
        if collective.ranks > on_a_node:
            gb_per_s = min(gb_per_s, on_a_node * self.network_gbit / 8)
        return collective.wire_bytes / (gb_per_s * 1e9)


def plan(config: Config, cluster: Cluster, epoch_images: int) -> dict[str, Any]:
    """Return everything `lmim plan` tells, units in the keys; raises ConfigError where a run would refuse to start."""
    check_cluster(cluster)
    config, split, notes = _planned_batch(config, cluster.ranks)
    steps = duration_steps(config.optim.duration, steps_per_epoch=epoch_images / config.data.global_batch)
    rows = []
    for parallel in _settings(config.parallel, cluster):
        rows += [_row(config, replace(parallel, activation_checkpointing=on), cluster, split, steps)
                 for on in (False, True)]  # fmt: skip
    recommended = next((row for on in (False, True) for row in rows
                        if row["fits"] and row["activation_checkpointing"] is on), None)  # fmt: skip
    for row in rows:
        row["recommended"] = row is recommended
        if row["configured"] and not row["fits"]:
            largest = row["largest_micro_batch_images"]
            advice = f"data.micro_batch={largest} is the largest power of two that does" if largest else "no batch does"
            notes.append(f"as configured it does not fit: {advice}")
    if config.parallel.deepspeed_config:
        notes.append(f"what {config.parallel.deepspeed_config} offloads or changes of buffers is not counted")
    parts, flops = count_parameters(config), flops_per_image(config)
    numbers = dict(online=parts.online.parameters, target=parts.target.parameters, decoder=parts.decoder.parameters)
    gpu = GPUS[cluster.gpu]
    return dict(
        gpu=cluster.gpu, nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node, ranks=cluster.ranks,
        compute=config.precision.compute, peak_tflops=gpu.tflops(config.precision.compute),
        memory_gb=gpu.memory_gb, usable_memory_gb=USABLE * gpu.memory_gb, nvlink_gb_per_s=gpu.nvlink_gb_per_s,
        network_gbit_per_gpu=cluster.network_gbit, mfu=cluster.mfu,
        global_batch_images=config.data.global_batch, micro_batch_images=split.micro_batch,
        micro_batches_per_step=split.accumulate, epoch_images=epoch_images, steps=steps,
        parameters={**numbers, "trained": parts.trained, "frozen": parts.target.parameters},
        flops_per_image={**flops._asdict(), "total": flops.total},
        settings=rows, notes=notes,
    )  # fmt: skip


def check_cluster(cluster: Cluster) -> None:
    """Refuse a cluster that cannot be, and name the option."""
    for option, value in (("--nodes", cluster.nodes), ("--gpus-per-node", cluster.gpus_per_node),
                          ("--network-gbit", cluster.network_gbit)):  # fmt: skip
        if value <= 0:
            raise ConfigError(f"{option} ({value}) must be above 0")
    if not 0 < cluster.mfu <= 1:
        raise ConfigError(f"--mfu ({cluster.mfu}) must be above 0 and at most 1, such as 0.4")


def _planned_batch(config: Config, ranks: int) -> tuple[Config, Split, list[str]]:
    """Return the configuration and how its batch is split; a micro-batch above a rank's share becomes that share."""
    batch, micro = config.data.global_batch, config.data.micro_batch
    if micro is None or batch % ranks or micro * ranks <= batch:
        return config, validate(config, ranks), []
    share = batch // ranks
    config = replace(config, data=replace(config.data, micro_batch=share))
    note = f"data.micro_batch ({micro}) is more than a rank's share of data.global_batch: here {share}"
    return config, validate(config, ranks), [note]


def _settings(configured: ParallelConfig, cluster: Cluster) -> list[ParallelConfig]:
    """Return the ways of sharding from what cuts least to what cuts most, the configured one in place of its like."""
    ranks, inside = cluster.ranks, cluster.gpus_per_node
    own = replace(configured, shard_ranks=configured.shard_ranks or ranks)
    fsdp = replace(own, backend="fsdp", deepspeed_config="")
    zero = [replace(own, backend="deepspeed", zero_stage=stage) for stage in range(4)]
    found = [replace(own, backend="local")] if ranks == 1 else []
    found += [zero[0], replace(fsdp, shard_ranks=1), zero[1], zero[2]]
    hybrid = {inside} | ({own.shard_ranks} if own.backend == "fsdp" else set())
    found += [replace(fsdp, shard_ranks=n) for n in sorted(hybrid) if 1 < n < ranks]
    found.append(zero[3])
    return [*found, replace(fsdp, shard_ranks=ranks)] if ranks > 1 else found


def setting_name(parallel: ParallelConfig, ranks: int) -> str:
    """Return what a way of sharding is called."""
    if parallel.backend == "deepspeed":
        return f"ZeRO-{parallel.zero_stage}"
    if parallel.backend == "local":
        return "local"
    shard = parallel.shard_ranks or ranks
    return {ranks: "FSDP", 1: "FSDP replicas"}.get(shard, f"HSDP of {shard}")


def _row(config: Config, parallel: ParallelConfig, cluster: Cluster, split: Split, steps: int) -> dict[str, Any]:
    """Return what one way of sharding holds, sends and reaches."""
    ranks, precision, given = cluster.ranks, config.precision, config.parallel
    if parallel.backend != "fsdp":  # ZeRO-3 gathers as it reduces, the others gather nothing for the forward
        cut = parallel.backend == "deepspeed" and parallel.zero_stage == 3
        precision = replace(precision, gather=precision.reduce if cut else "fp32")
    elif split.accumulate > 1:  # it would add micro-batches up in bf16
        precision = replace(precision, reduce="fp32")
    name = setting_name(parallel, ranks)
    alike = setting_name(given, ranks) == name and given.activation_checkpointing == parallel.activation_checkpointing
    config = replace(config, parallel=parallel, precision=precision)
    share, usable = config.data.global_batch // ranks, USABLE * GPUS[cluster.gpu].memory_gb * 1e9

    def held(micro: int) -> dict[str, int]:
        buffers = buffer_bytes(config, Split(ranks, micro, share // micro))
        activations = activation_bytes(config).peak(micro)
        return dict(**state_bytes(config, ranks)._asdict(), buffers=buffers, activations=activations)

    total = sum(held(split.micro_batch).values())
    powers = (1 << n for n in range(share.bit_length()))
    fitting = (micro for micro in powers if share % micro == 0 and sum(held(micro).values()) <= usable)
    sent, flops = collectives(config, split), flops_per_image(config)
    worked = flops.total + flops.recomputed * parallel.activation_checkpointing
    flop_per_s = ranks * cluster.mfu * GPUS[cluster.gpu].tflops(precision.compute) * 1e12
    compute_s = config.data.global_batch * worked / flop_per_s
    sending_s = sum(cluster.seconds(collective) for collective in sent)
    # DeepSpeed's stages 0 to 2 reduce and gather after the backward; ZeRO-3 and fsdp do beside it
    beside = parallel.backend == "fsdp" or parallel.zero_stage == 3
    step_s = max(compute_s, sending_s) if beside else compute_s + sending_s
    return {
        "setting": name,
        "activation_checkpointing": parallel.activation_checkpointing,
        "configured": alike,
        **{f"{kind}_bytes": size for kind, size in held(split.micro_batch).items()},
        "total_bytes": total,
        "fits": total <= usable,
        "largest_micro_batch_images": max(fitting, default=0),
        "collectives": [
            dict(name=c.name, ranks=c.ranks, payload_bytes_per_step=c.payload_bytes, wire_bytes_per_step=c.wire_bytes)
            for c in sent
        ],
        "wire_bytes_per_step": sum(c.wire_bytes for c in sent),
        "communication_s_per_step": sending_s,
        "compute_s_per_step": compute_s,
        "images_per_s": config.data.global_batch / step_s,
        "days": steps * step_s / 86400,
    }


# --- the table -------------------------------------------------------------------------------------------------------


def print_plan(told: dict[str, Any]) -> None:
    """Print what `plan` returned, and the `epoch_source` that tells where `epoch_images` are from."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    millions = {name: f"{number / 1e6:.1f} M" for name, number in told["parameters"].items()}
    giga = {name: f"{number / 1e9:.2f} G" for name, number in told["flops_per_image"].items()}
    lines = [
        "parameters  " + ", ".join(f"{name} {number}" for name, number in millions.items()),
        f"FLOPs/image forward: target {giga['target_forward']}, online {giga['online_forward']}, decoder "
        f"{giga['decoder_forward']}, loss {giga['loss_forward']}; backward {giga['backward']}; all {giga['total']}",
        f"cluster     {told['nodes']} x {told['gpus_per_node']} {told['gpu'].upper()}, "
        f"{told['peak_tflops']:g} dense {told['compute']} TFLOP/s at {told['mfu']:.0%} (assumed MFU), NVLink "
        f"{told['nvlink_gb_per_s']:g} GB/s, network {told['network_gbit_per_gpu']:g} Gbit/s a GPU",
        f"batch       {told['global_batch_images']} images a step = {told['ranks']} ranks x "
        f"{told['micro_batches_per_step']} x {told['micro_batch_images']} (micro-batch)",
        f"length      {told['steps']} steps, {told['epoch_images']:,} images an epoch ({told['epoch_source']})",
    ]
    for line in lines + [f"note        {note}" for note in told["notes"]]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table(told))
    legend = (
        f"GB of a rank; it fits within {USABLE:.0%} of {told['memory_gb']:g} GB. ckpt: activation checkpointing.",
        "buffers: gathered weights, buckets, gradients that are not yet reduced.",
        "max micro: the largest micro-batch that fits, a power of two. sent: in a step by each rank, on a ring.",
        "* as configured. > recommended: the first that fits in this order, ckpt only if nothing fits without.",
    )
    for line in legend:
        console.print(line, markup=False, soft_wrap=True)


def _table(told: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("")
    table.add_column("setting", no_wrap=True)
    for head in ("weights", "grads", "AdamW", "EMA", "buffers", "activ.", "total\nGB", "fits", "max\nmicro",
                 "sent\nGB", "sending\nms", "compute\nms", "images\n/s", "days"):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    kinds = ("weights", "gradients", "optimizer", "ema", "buffers", "activations", "total")
    for row in told["settings"]:
        table.add_row(
            ">" * row["recommended"] + "*" * row["configured"],
            row["setting"] + ", ckpt" * row["activation_checkpointing"],
            *(_short(row[f"{kind}_bytes"] / 1e9) for kind in kinds),
            "yes" if row["fits"] else "no",
            str(row["largest_micro_batch_images"]),
            _short(row["wire_bytes_per_step"] / 1e9),
            _short(1e3 * row["communication_s_per_step"]),
            _short(1e3 * row["compute_s_per_step"]),
            f"{row['images_per_s']:.0f}",
            _short(row["days"]),
            style="bold" if row["recommended"] else None,
        )
    return table


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
