"""What the trial showed: the rows of network, step and memory.

Owns the limits beyond which a network, a step or a host's memory is not well.
"""

from __future__ import annotations

import math

from lmim.config import Split, crop_size, validate
from lmim.data.loader import PREFETCH, loader_workers
from lmim.doctor.rows import (
    FAILURE,
    OK,
    WARNING,
    Case,
    Finding,
    Found,
    Row,
    by_value,
    duration,
    of_ranks,
    size,
    step_seconds,
)
from lmim.doctor.trial import is_memory, trial_config
from lmim.forecast import GPUS, known_gpu
from lmim.profiling import collectives, flops_per_image, state_bytes

FULL = 0.9  # of the memory
SLOW_NETWORK = 0.5  # share of a step that is spent on sending
BY_OTHERS = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "this rank ends",
             "another rank")  # fmt: skip


def judge_trial(case: Case, found: Found) -> list[Row]:
    """Return the rows of network, step and memory."""
    trials = found["trial"]
    return [*_network(case, trials, step_seconds(found)), *_step(case, trials), *_memory(case, trials, found),
            *_shared_memory(case, found)]  # fmt: skip


def _network(case: Case, trials: dict[int, Finding], step_s: float | None) -> list[Row]:
    if case.topology.world_size == 1:
        return [Row("network", OK, "one rank, nothing to send")]
    networks = {rank: of["network"] for rank, of in trials.items() if of.get("network")}
    if not networks:
        return []  # told by the step
    names = {name: name if name == "all ranks" else f"{name} hosts" for of in networks.values() for name in of}
    rows = []
    for name, shown in names.items():
        slowest = min((of[name] for of in networks.values() if name in of), key=lambda one: one["bytes_per_s"])
        words = (f"all-reduce over {slowest['ranks']} ranks: {size(slowest['bytes_per_s'])}/s of each rank, latency "
                 f"{duration(slowest['latency_s'])}")  # fmt: skip
        advice = ""
        if name == "all ranks" and step_s:
            config = trial_config(case.config, slowest["ranks"])
            micro_batches = -(-case.config.data.global_batch // (slowest["ranks"] * config.data.micro_batch))
            split = Split(slowest["ranks"], config.data.micro_batch, micro_batches)
            sent = sum(one.wire_bytes for one in collectives(case.config, split))
            share = sent / slowest["bytes_per_s"] / step_s
            words += f"; a step sends {size(sent)}, {min(share, 1):.0%} of its time"
            if share > SLOW_NETWORK:
                advice = ("see that the fast network is used (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, launch/env.sh); "
                          "larger batches, precision.reduce=bf16 or less sharding send less")  # fmt: skip
        rows.append(Row(f"network, {shown}", WARNING if advice else OK, words, advice, slowest))
    return rows


def _step(case: Case, trials: dict[int, Finding]) -> list[Row]:
    failed = {rank: of["failed"] for rank, of in trials.items() if of["failed"]}
    if failed:
        causes = {rank: words for rank, words in failed.items() if not any(one in words.lower() for one in BY_OTHERS)}
        words = "; ".join(f"{of_ranks(ranks)}: {reason}" for reason, ranks in by_value(causes or failed).items())
        advice = "mend what is named; the same step would fail in the run"
        if any(is_memory(reason) for reason in failed.values()):
            micro = trial_config(case.config, case.topology.world_size).data.micro_batch or 1
            advice = (f"set data.micro_batch below {micro}, parallel.activation_checkpointing=true, or shard more "
                      "(parallel.zero_stage=3, backend=fsdp): `lmim plan` tells what fits")  # fmt: skip
        return [Row("trial step", FAILURE, words, advice)]
    steps = {rank: of["step"] for rank, of in trials.items()}
    slowest = max(steps, key=lambda rank: steps[rank]["step_s"])
    step_s, config = steps[slowest]["step_s"], case.config
    per_s = config.data.global_batch / step_s
    words = f"{duration(step_s)} a step of {config.data.global_batch} images, {per_s:,.0f} images/s"
    flop_per_s = per_s * flops_per_image(config).total / case.topology.world_size
    gpu = GPUS.get(known_gpu(steps[slowest]["device"]))
    words += f", {flop_per_s / 1e12:.3g} TFLOP/s a rank"
    words += f", MFU {flop_per_s / 1e12 / gpu.tflops(config.precision.compute):.0%}" if gpu else ""
    figures = dict(step_s=step_s, images_per_s=per_s, flop_per_s_per_rank=flop_per_s)
    if not all(math.isfinite(of["loss"]) for of in steps.values()):
        advice = "set precision.compute=fp32, to see whether rounding is the reason"
        return [Row("trial step", FAILURE, "its loss is not finite", advice, figures)]
    return [Row("trial step", OK, words, figures=figures)]


def _memory(case: Case, trials: dict[int, Finding], found: Found) -> list[Row]:
    steps = {rank: of["step"] for rank, of in trials.items() if of.get("step")}
    if not steps:
        return []
    hosts = {rank: of.get("host", "") for rank, of in found.get("devices", {}).items()}
    uses = []  # (share, words)
    for rank, of in steps.items():
        if of.get("gpu_total"):
            uses.append((of["gpu_reserved"] / of["gpu_total"],
                         f"{size(of['gpu_allocated'])} allocated and {size(of['gpu_reserved'])} reserved at most, of "
                         f"{size(of['gpu_total'])} of rank {rank}'s GPU"))  # fmt: skip
        if of["address_space"]:
            taken, most = of["address_space"]
            uses.append(
                (taken / most, f"{size(taken)} of the {size(most)} of address space (ulimit -v) of rank {rank}")
            )
    for host, ranks in by_value({rank: hosts.get(rank, "") for rank in steps}).items():
        peak = sum(steps[rank]["peak"] for rank in ranks)
        room = [(trials[rank]["available"], trials[rank]["limit"]) for rank in ranks if trials[rank]["available"]]
        if room:
            available, limit = min(room)
            name = f" on {host}" if len(set(hosts.values())) > 1 else ""
            uses.append((peak / available, f"{size(peak)} at most{name}, of {len(ranks)} "
                         f"rank{'s' * (len(ranks) > 1)}, of {size(available)} ({limit})"))  # fmt: skip
    share, words = max(uses, default=(0.0, f"{size(max(of['peak'] for of in steps.values()))} a rank at most"))
    state = FAILURE if share >= 1 else WARNING if share > FULL else OK
    advice = "" if state == OK else "set data.micro_batch lower, or parallel.activation_checkpointing=true"
    first = steps[min(steps)]
    kept = sum(state_bytes(case.config, case.topology.world_size))
    words += f"; {size(kept)} of it weights, gradients, AdamW and target"
    return [Row("memory", state, words, advice, dict(share=share, state_bytes=kept, **first))]


def _shared_memory(case: Case, found: Found) -> list[Row]:
    """Loader workers hand batches over in shared memory, of which containers have 64 MB unless told otherwise."""
    config, split = case.config, _split(case)
    workers = loader_workers(config.data, case.topology)
    needed = workers * (PREFETCH + 2) * split.micro_batch * 3 * crop_size(config.model) ** 2
    needed *= case.topology.local_world_size
    free = min((of["shm"] for of in found.get("trial", {}).values() if of.get("shm")), default=None)
    if not needed or free is None:
        return []
    if free >= needed:
        return [Row("shared memory", OK, f"{size(free)} free in /dev/shm, {size(needed)} for loader workers")]
    return [Row("shared memory", FAILURE, f"{size(free)} free in /dev/shm, loader workers need {size(needed)}",
                "give the container more (docker run --shm-size, or an emptyDir of medium Memory), or set data.workers "
                "lower")]  # fmt: skip


def _split(case: Case) -> Split:
    ranks = case.topology.world_size
    return validate(trial_config(case.config, ranks), ranks)
