"""The DeepSpeed engine's configuration: what this project's options say, and what a user's own JSON adds.

Invariant: an option has one value. Where the JSON sets what the configuration also sets, both must say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmim.config import Config, ConfigError, Split

# what would break the trajectory or the target's fp32 copy, with the reason
REFUSED = {
    "optimizer": "this project's AdamW with its parameter groups is used: set optim.*",
    "scheduler": "the learning rate follows optim.*",
    "fp16.enabled": "training is in bf16 or fp32: set precision.compute",
    "bf16.enabled": "weights stay fp32 and bf16 is autocast: set precision.compute=bf16",
    "data_types.grad_accum_dtype": "gradients are summed as precision.reduce says",
    "communication_data_type": "gradients are summed as precision.reduce says",
    "managed_gradient_accumulation": "micro-batches are summed by this project",
    "zero_optimization.zero_hpz_partition_size": "its second copy of the weights does not see the target's EMA",
    "zero_optimization.zero_quantized_weights": "the target's EMA needs fp32 weights",
    "zero_optimization.zero_quantized_nontrainable_weights": "the target's EMA needs fp32 weights",
    "zero_optimization.stage3_param_persistence_threshold": "weights that are kept whole do not see the target's EMA",
    "zero_optimization.mics_shard_size": "take parallel.backend=fsdp with parallel.shard_ranks",
}
DEFAULTS: dict[str, Any] = {
    "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on offloaded state
    "steps_per_print": None,
    # Its own linear layer rounds otherwise under autocast. Without it, ZeRO-3 keeps a bf16 copy of the online weights
    # from forward to backward; parallel.activation_checkpointing spares that too.
    "zero_optimization": {"memory_efficient_linear": False},
}
FAR = 10**9  # numbers; DeepSpeed's default: a ViT's weights then stay gathered from forward to backward
OFF = (None, False, "auto", {}, 0, 1)


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
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["stage3_max_reuse_distance"] = FAR if parallel.keep_gathered else 0
    fixed = {
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": zero,
        "torch_autocast": autocast,
    }
    if precision.reduce == "bf16" and parallel.zero_stage == 0:
        fixed["communication_data_type"] = "bf16"  # ZeRO-0 reduces as this says and not as autocast does
    if not parallel.deepspeed_config:
        return _over(DEFAULTS, fixed)
    theirs = _read(Path(parallel.deepspeed_config))
    _refuse_contradictions(theirs, config, split)
    theirs.pop("train_batch_size", None)
    return _over(_over(DEFAULTS, theirs), fixed)


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
        if key in said and value != "auto" and value != said[key][1]:
            option, ours = said[key]
            raise ConfigError(f"parallel.deepspeed_config ({path}): {key} is {value} there, but {option} makes it "
                              f"{ours}: make them agree, or leave it out there")  # fmt: skip
        refused = next((name for name in REFUSED if key == name or key.startswith(f"{name}.")), None)
        if refused and value not in OFF:
            raise ConfigError(f"parallel.deepspeed_config ({path}): {key} ({value}) cannot be used: {REFUSED[refused]}")


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `below` with those of `above` in their place, section by section."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged
