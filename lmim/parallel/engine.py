"""The DeepSpeed engine's configuration: what this project's options say, and what a user's own JSON adds.

Invariant: an option has one value. Where the JSON sets what the configuration also sets, both must say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmim.config import ConfigError, Split
from lmim.options import Config
from lmim.profiling import PREFETCH

# what would break the trajectory or the target's fp32 copy: the value that does no harm, and the reason
ZERO = "zero_optimization"
REFUSED: dict[str, tuple[Any, str]] = {
    "optimizer": ({}, "this project's AdamW with its parameter groups is used: set optim.*"),
    "scheduler": ({}, "the learning rate follows optim.*"),
    "fp16.enabled": (False, "training is in bf16 or fp32: set precision.compute"),
    "bf16.enabled": (False, "weights stay fp32 and bf16 is autocast: set precision.compute=bf16"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are added up in fp32"),
    "communication_data_type": (None, "gradients are summed as precision.reduce says"),
    "managed_gradient_accumulation": (True, "micro-batches are added up by this project"),
    f"{ZERO}.zero_hpz_partition_size": (1, "its second copy of the weights does not see the target's EMA"),
    f"{ZERO}.zero_quantized_weights": (False, "the target's EMA needs fp32 weights"),
    f"{ZERO}.zero_quantized_nontrainable_weights": (False, "the target's EMA needs fp32 weights"),
    f"{ZERO}.stage3_param_persistence_threshold": (0, "weights that are kept whole do not see the target's EMA"),
    f"{ZERO}.stage3_module_granularity_threshold": (0, "modules gathered whole do not see the target's EMA"),
    f"{ZERO}.offload_param.device": (("cpu", "none"), "the target's EMA needs fp32 weights in memory"),
    f"{ZERO}.offload_optimizer.device": (("cpu", "none"), "checkpoints need the optimizer's state in memory"),
    f"{ZERO}.compute_grad_norm": (True, "the gradient's norm is logged and tells steps that must be left out"),
    "gradient_allreduce_op": ("mean", "gradients are averaged over ranks"),
    f"{ZERO}.mics_shard_size": (-1, "take parallel.backend=fsdp with parallel.shard_ranks"),
}
DEFAULTS: dict[str, Any] = {
    "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on offloaded state
    "steps_per_print": None,
    # Its own linear layer rounds otherwise under autocast. Without it, ZeRO-3 keeps a bf16 copy of the online weights
    # from forward to backward; parallel.activation_checkpointing spares that too.
    ZERO: {"memory_efficient_linear": False, "stage3_prefetch_bucket_size": PREFETCH},
}
FAR = 10**9  # numbers; DeepSpeed's default: a ViT's weights then stay gathered from forward to backward


def engine_config(config: Config, split: Split) -> dict[str, Any]:
    """Return the engine's configuration as DeepSpeed's JSON names it.

    Micro-batches are added up by the backend, so the engine's own accumulation is 1. Raises ConfigError where
    `parallel.deepspeed_config` contradicts the configuration.
    """
    parallel, precision = config.parallel, config.precision
    autocast: dict[str, Any] = {"enabled": precision.compute == "bf16", "dtype": "bfloat16"}
    if precision.reduce == "fp32":
        autocast["lower_precision_safe_modules"] = []
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    below = DEFAULTS
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        below = _over(DEFAULTS, {ZERO: {"stage3_max_reuse_distance": FAR if parallel.keep_gathered else 0}})
    fixed = {
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm,
        ZERO: zero,
        "torch_autocast": autocast,
    }
    if precision.reduce == "bf16" and parallel.zero_stage == 0:
        fixed["communication_data_type"] = "bf16"  # ZeRO-0 reduces as this says and not as autocast does
    theirs: dict[str, Any] = {}
    if parallel.deepspeed_config:
        theirs = _without_unsaid(_read(Path(parallel.deepspeed_config)))
        _refuse_contradictions(theirs, config, split)
        theirs.pop("train_batch_size", None)
    overlapped = theirs.get(ZERO, {}).get("overlap_comm")
    if parallel.zero_stage == 1 and precision.reduce == "fp32" and not overlapped:
        # gradients are reduced from where they lie: copied into a bucket, they are flattened again for the collective.
        # (In bf16 they would be rounded before they are divided, and again after it.)
        below = _over(below, {ZERO: {"contiguous_gradients": False}})
    if parallel.zero_stage in (1, 2) and not _offloads(theirs):
        # DeepSpeed's own norm of a cut gradient waits for the device in every step: the backend takes it, and clips
        zero["compute_grad_norm"], fixed["gradient_clipping"] = False, 0.0
    return _over(_over(below, theirs), fixed)


def _offloads(options: dict[str, Any]) -> bool:
    """Return whether the engine keeps the optimizer's state on the host."""
    return options.get(ZERO, {}).get("offload_optimizer", {}).get("device", "none") != "none"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"parallel.deepspeed_config ({path}) cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"parallel.deepspeed_config ({path}) is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"parallel.deepspeed_config ({path}) must hold one object of DeepSpeed's options")
    return content


def _refuse_contradictions(theirs: dict[str, Any], config: Config, split: Split) -> None:
    path, precision = config.parallel.deepspeed_config, config.precision
    said = {
        "train_batch_size": ("data.global_batch", config.data.global_batch),
        "train_micro_batch_size_per_gpu": ("data.micro_batch", split.micro_batch),
        "gradient_accumulation_steps": ("data.global_batch / (ranks x data.micro_batch)", split.accumulate),
        "gradient_clipping": ("optim.clip_norm", config.optim.clip_norm),
        "zero_optimization.stage": ("parallel.zero_stage", config.parallel.zero_stage),
        "torch_autocast.enabled": ("precision.compute", precision.compute == "bf16"),
        "torch_autocast.dtype": ("precision.compute", "bfloat16"),
        "torch_autocast.lower_precision_safe_modules": ("precision.reduce", [] if precision.reduce == "fp32" else None),
    }
    for key, value in _flat(theirs):
        if key in said and value != said[key][1]:
            option, ours = said[key]
            raise ConfigError(f"parallel.deepspeed_config ({path}): {key} is {value} there, but {option} makes it "
                              f"{ours}: make them agree, or leave it out there")  # fmt: skip
        for refused, (harmless, reason) in REFUSED.items():
            allowed = harmless if isinstance(harmless, tuple) else (harmless,)
            if (key == refused or key.startswith(f"{refused}.")) and value not in (*allowed, None):
                raise ConfigError(f"parallel.deepspeed_config ({path}): {key} ({value}) cannot be used: {reason}")


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _without_unsaid(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is "auto", by which Hugging Face's files ask the program that reads them to choose, or null."""
    return {key: _without_unsaid(value) if isinstance(value, dict) else value
            for key, value in options.items() if value not in ("auto", None)}  # fmt: skip


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `below` with those of `above` in their place, section by section."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged
