"""The configuration: how it is read, what follows from it, and one check of the whole before anything starts.

Owns how files and overrides are read, durations, and `validate`; the options are in `options`. The invariants:
dataclass defaults < `base:` file < file < `section.key=value`; an unknown key is an error; every complaint
is one line that names the key, its value, what is allowed and how to mend it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmim.options import (
    BELOW_ONE,
    CHOICES,
    FINETUNE_NEUTRAL,
    NEUTRAL,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    UNIT_INTERVAL,
    VARIANTS,
    Config,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    ModelConfig,
    ParallelConfig,
)

RANDAUGMENT = r"rand(-(m|mmax)(\d|10)|-(n|inc)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3a|3aw))*"  # of timm
SECRET = re.compile(r"(?<=://)[^/@]*:[^/]*@|[?&][^=]*(sig|token|key|secret|password|credential)[^=]*=.*", re.IGNORECASE)
MAX_SOURCES = 256  # with weights: their turns are counted in 1024ths
MAX_GRID = 256  # cells a side that `draw_views` can number
MAX_SEED = 2**63 - 1


class ConfigError(ValueError):
    """A user's mistake: one line that names the key, its value, what is allowed and how to mend it."""


# --- durations -------------------------------------------------------------------------------------------------------


def duration_steps(text: str, *, steps_per_epoch: float, total_steps: int = 0, key: str = "duration") -> int:
    """Return how many optimizer steps '800ep', '125000st' or '5%' (of `total_steps`) are, rounded up."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ep|st|%)", text.strip())
    if not match:
        raise ConfigError(f"{key} ({text}) is no duration: write 800ep (epochs), 125000st (steps) or 5% (of the run)")
    number, unit = float(match[1]), match[2]
    if unit == "%" and not total_steps:
        raise ConfigError(
            f"{key} ({text}) cannot be a share of the run it defines: write epochs (800ep) or steps (9st)"
        )
    per_unit = {"ep": steps_per_epoch, "st": 1.0, "%": total_steps / 100}[unit]
    return math.ceil(round(number * per_unit, 6))


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files its `base:` names, and `section.key=value` overrides into a `Config`.

    A folder stands for the `config.yaml` inside it (a run's own resolved configuration).
    """
    path = Path(path)
    moved = []
    if path.is_dir():
        moved = [(str(path), "run.folder", str(path))]  # wherever it was when it was written
        path = path / "config.yaml"
    config = OmegaConf.structured(Config)
    for source, key, value in [*_file_items(path, ()), *moved, *_override_items(overrides)]:
        _assign(config, source, key, value)
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def config_from_dict(content: dict[str, Any], source: str) -> Config:
    """Return the `Config` that a nested dictionary (a checkpoint's) stands for; `source` is named in complaints."""
    if not (isinstance(content, dict) and all(isinstance(keys, dict) for keys in content.values())):
        raise ConfigError(f"{source} holds no configuration: its sections must hold keys")
    config = OmegaConf.structured(Config)
    for section, keys in content.items():
        for key, value in keys.items():
            _assign(config, source, f"{section}.{key}", value)
    try:
        read = OmegaConf.to_object(config)
        _check_choices(flatten(read))
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
    return read


def _file_items(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, str, Any]]:
    if not path.is_file():
        near = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        hint = difflib.get_close_matches(str(path), near, n=1)
        raise ConfigError(f"config file {path} does not exist" + (f"; did you mean {hint[0]}?" if hint else ""))
    if path.resolve() in seen:
        raise ConfigError(f"base ({path}) leads back to itself: remove one `base:` of {', '.join(map(str, seen))}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} holds a {type(content).__name__}; it must hold sections: {_sections()}")
    base = content.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"base ({base}) in {path} must be one file name")
        yield from _file_items(path.parent / base, (*seen, path.resolve()))
    for section, keys in content.items():
        if isinstance(keys, dict):
            yield from ((str(path), f"{section}.{key}", value) for key, value in keys.items())
        elif keys is not None and section in _sections().split(", "):
            raise ConfigError(f"{section} ({keys}) in {path} must hold keys, such as {section}: {{key: value}}")
        elif keys is not None:  # a section without keys is a section left as it is
            yield str(path), str(section), keys


def _override_items(overrides: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not of the form section.key=value")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text.partition('=')[2]}"]))["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{key}: the value is not valid YAML: {' '.join(str(error).split())}") from error
        yield "the command line", key, value


def _sections() -> str:
    return ", ".join(f.name for f in dataclasses.fields(Config))


def flatten(config: Config) -> dict[str, Any]:
    """Return {'section.key': value} for every option."""
    return {f"{section}.{key}": value for section, keys in dataclasses.asdict(config).items()
            for key, value in keys.items()}  # fmt: skip


def _nearest_option(key: str, known: dict[str, Any]) -> str:
    """Say what was probably meant: the nearest option, or the sections there are."""
    section = key.partition(".")[0]
    sections = _sections().split(", ")
    if section not in sections:
        near = difflib.get_close_matches(section, sections, n=1, cutoff=0.5)
        return f"sections are {_sections()}" + (f"; did you mean {near[0]}?" if near else "")
    options = [option for option in known if option.startswith(f"{section}.")]
    has_it = [option for option in options if key.rpartition(".")[2] in re.split(r"[._]", option)]  # lr is in base_lr
    near = difflib.get_close_matches(key, has_it or options, n=1, cutoff=0.0)
    return f"did you mean {near[0]}?"


def _assign(config: Any, source: str, key: str, value: Any) -> None:
    known = flatten(Config())
    if key not in known:
        raise ConfigError(f"{key} (in {source}) is not an option; {_nearest_option(key, known)}")
    if value is None and isinstance(known[key], str):
        value = ""  # `data.eval=` and `eval:` without a value mean the empty text
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        example = "" if known[key] is None else f", such as {known[key]!r}"
        section, name = key.split(".")
        annotation = next(f.type for f in dataclasses.fields(getattr(Config(), section)) if f.name == name)
        wanted = re.sub(r"Optional\[(.*)\]", r"\1", str(annotation))
        raise ConfigError(f"{key} ({value!r} in {source}) must be of type {wanted}{example}") from error


# --- what follows from it --------------------------------------------------------------------------------------------


def model_dimensions(model: ModelConfig) -> dict[str, int]:
    """Return embed_dim, depth, num_heads and patch_size: the variant's, where not set by themselves."""
    chosen = dict(VARIANTS[model.variant])
    return {key: getattr(model, key) if getattr(model, key) is not None else chosen[key] for key in chosen}


def crop_size(model: ModelConfig) -> int:
    """Return the side in px of the crop that the grid of patches with gaps needs."""
    return model.grid_size * (model_dimensions(model)["patch_size"] + model.patch_gap)


def result_options(config: Config) -> dict[str, Any]:
    """Return the options that affect the result, by dotted key: what a resumed run may not change."""
    dims = {f"model.{key}": value for key, value in model_dimensions(config.model).items()}
    neutral = NEUTRAL
    if config.run.task == "finetune":
        neutral = tuple(name for name in NEUTRAL if name != "finetune.") + FINETUNE_NEUTRAL
    kept = {
        k: v
        for k, v in flatten(config).items()
        if not any(k == n or (n[-1] == "." and k.startswith(n)) for n in neutral)
    }
    return {**kept, **dims}


def config_hash(config: Config) -> str:
    """Return a hex digest of the options that affect the result."""
    return hashlib.sha256(json.dumps(result_options(config), sort_keys=True).encode()).hexdigest()


def changed_options(old: Config, new: Config, *, neutral: bool = False) -> list[str]:
    """Say which options that affect the result differ, or those that do not: "optim.base_lr (0.1 there, 0.2 now)"."""
    before, now = result_options(old), result_options(new)
    if neutral:
        before, now = ({k: v for k, v in flatten(of).items() if k not in before} for of in (old, new))
    both = [key for key in now if key in before]  # section `finetune` is one task's: `run.task` tells the difference
    return [f"{key} ({before[key]} there, {now[key]} now)" for key in both if before[key] != now[key]]


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave an empty file in the place of the old one
    temporary.replace(path)


# --- the one check ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How a step's images are split: accumulate micro-batches of micro_batch images on each of world_size ranks."""

    world_size: int
    micro_batch: int
    accumulate: int


def validate(config: Config, world_size: int) -> Split:
    """Check the whole configuration for a number of ranks and return how a batch is split over them."""
    check(config)
    _check_ranks(config.parallel, world_size)
    split = _split(config, world_size)
    _check_finetune(config, split)
    return split


def check(config: Config) -> None:
    """Check all that does not depend on the number of ranks: what an evaluation needs of the configuration of a run."""
    flat = flatten(config)
    _check_choices(flat)
    if not config.run.folder.strip():
        raise ConfigError("run.folder is empty: name the folder that shall hold this run's files")
    _check_ranges(flat)
    _check_model(config)
    _check_data(config.data)
    _check_eval(config)
    for key in (
        "optim.duration",
        "optim.warmup",
        "log.every",
        "eval.knn_every",
        "eval.gallery_every",
        "eval.fewshot_every",
        "finetune.duration",
        "finetune.warmup",
        "finetune.evaluate_every",
        "health.patience",
        "checkpoint.every",
        "checkpoint.keep_every",
    ):
        total = 0 if key.endswith(".duration") else 100
        duration_steps(flat[key], steps_per_epoch=1.0, total_steps=total, key=key)
    _check_parallel(config)
    _check_recipe(config.finetune)


def _check_choices(flat: dict[str, Any]) -> None:
    for key, allowed in CHOICES.items():
        of = flat[key]
        if any(one not in allowed for one in (of if isinstance(of, list) else [of])):
            raise ConfigError(f"{key} ({of}) must be one of {', '.join(map(str, allowed))}")


def _check_ranges(flat: dict[str, Any]) -> None:
    rules = [
        (POSITIVE, lambda x: x > 0, "above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or above"),
        (UNIT_INTERVAL, lambda x: 0 <= x <= 1, "from 0 to 1"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "from 0 to below 1"),
    ]
    for keys, holds, words in rules:
        for key in keys:
            values = flat[key] if isinstance(flat[key], list) else [flat[key]]
            if any(value is not None and not holds(value) for value in values):
                raise ConfigError(f"{key} ({flat[key]}) must be {words}")
    for key, value in flat.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in values):
            raise ConfigError(f"{key} ({value}) must be finite")
    for key, most in (("run.seed", MAX_SEED), ("model.grid_size", MAX_GRID)):
        if flat[key] > most:
            raise ConfigError(f"{key} ({flat[key]}) must be at most {most}")
    for key in NOT_EMPTY:
        if not flat[key]:
            raise ConfigError(f"{key} is empty: give one value at least, such as {flatten(Config())[key]}")
    for key in ("optim.betas", "finetune.betas", "data.crop_scale", "data.crop_ratio", "finetune.crop_scale"):
        if len(flat[key]) != 2 or (not key.endswith(".betas") and not 0 < flat[key][0] <= flat[key][1]):
            raise ConfigError(
                f"{key} ({flat[key]}) must be two numbers, the smaller first, such as {flatten(Config())[key]}"
            )


def _check_model(config: Config) -> None:
    model, dims = config.model, model_dimensions(config.model)
    for dim_key, dim, heads_key, heads in (
        ("model.embed_dim", dims["embed_dim"], "model.num_heads", dims["num_heads"]),
        ("model.decoder_dim", model.decoder_dim, "model.decoder_num_heads", model.decoder_num_heads),
    ):
        if dim % heads:
            raise ConfigError(f"{dim_key} ({dim}) is not divisible by {heads_key} ({heads})")
        if dim % 4:
            raise ConfigError(
                f"{dim_key} ({dim}) must be a multiple of 4 for the position table: take {dim // 4 * 4 + 4}"
            )
    cells = model.grid_size**2
    visible = config.objective.num_visible
    if visible > cells - 2:
        raise ConfigError(
            f"objective.num_visible ({visible}) must leave two of the {model.grid_size} x {model.grid_size} = {cells} "
            f"cells (model.grid_size) masked: at most {cells - 2}"
        )
    decoded = config.objective.num_decoded
    least = min(8, cells - visible)  # InfoNCE standardises over them, and of two only the order would be left
    if decoded and not least <= decoded <= cells - visible:
        raise ConfigError(
            f"objective.num_decoded ({decoded}) must be {least} to {cells - visible} of the masked cells, or 0 for all"
        )
    needed = crop_size(model)
    if config.data.crop_size not in (None, needed):
        raise ConfigError(
            f"data.crop_size ({config.data.crop_size}) does not fit model.grid_size x (patch_size + patch_gap) = "
            f"{model.grid_size} x ({dims['patch_size']} + {model.patch_gap}) = {needed}: set {needed} or leave it out"
        )


def _check_data(data: DataConfig) -> None:
    several = isinstance(data.train, list)
    if not (isinstance(data.train, str) or (several and data.train and all(isinstance(x, str) for x in data.train))):
        raise ConfigError(f"data.train ({data.train}) must be a folder of shards, or a list of such: [one,other]")
    sources = len(data.train) if several else 1
    if data.weights and len(data.weights) != sources:
        raise ConfigError(f"data.weights ({data.weights}) must be one number for each of the {sources} in data.train")
    if sources > 1 and data.weights and data.tail != "carry":
        raise ConfigError(f"data.tail ({data.tail}) must be carry where data.weights are given: sources that are drawn "
                          "at different rates do not end together")  # fmt: skip
    if len(data.weights) > MAX_SOURCES:
        raise ConfigError(f"data.weights: {len(data.weights)} sources are more than {MAX_SOURCES}: shard some together")
    for address in (*(data.train if several else [data.train]), data.eval):
        if SECRET.search(address):
            key, shown = ("data.eval" if address == data.eval else "data.train"), SECRET.sub("…", address)
            raise ConfigError(f"{key} ({shown}) holds a password or key, which config.yaml and checkpoints would show: "
                              "leave it out there and give it by ~/.netrc, or for s3 and gs as their libraries look "
                              "for it, such as AWS_SECRET_ACCESS_KEY")  # fmt: skip
    if data.lanes > data.global_batch:
        raise ConfigError(f"data.lanes ({data.lanes}) must be at most data.global_batch ({data.global_batch})")


def _check_eval(config: Config) -> None:
    evaluation, probe = config.eval, config.probe
    if not neighbours_of(evaluation) or any(type(k) is not int or k < 1 for k in neighbours_of(evaluation)):
        raise ConfigError(f"eval.k ({evaluation.k}) must be a number above 0, or a list of such: [1,20]")
    if probe.held_out <= 0:
        raise ConfigError(f"probe.held_out ({probe.held_out}) must be above 0: it chooses among the learning rates")


def neighbours_of(evaluation: EvalConfig) -> list[Any]:
    """Return the numbers of neighbours that vote, as a list."""
    return evaluation.k if isinstance(evaluation.k, list) else [evaluation.k]


def _check_ranks(parallel: ParallelConfig, world_size: int) -> None:
    if parallel.backend == "local" and world_size > 1:
        raise ConfigError(
            f"parallel.backend (local) runs one process, not {world_size}: choose one of deepspeed and fsdp"
        )
    if parallel.backend == "fsdp" and world_size % (parallel.shard_ranks or world_size):
        fits = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(f"parallel.shard_ranks ({parallel.shard_ranks}) does not divide the number of ranks "
                          f"({world_size}): take one of {fits}")  # fmt: skip


def _check_parallel(config: Config) -> None:
    parallel, precision = config.parallel, config.precision
    cut = parallel.backend == "fsdp" or (parallel.backend == "deepspeed" and parallel.zero_stage == 3)
    if parallel.deepspeed_config and parallel.backend != "deepspeed":
        raise ConfigError(f"parallel.deepspeed_config ({parallel.deepspeed_config}) means nothing to parallel.backend "
                          f"({parallel.backend}): leave it empty, or take deepspeed")  # fmt: skip
    for key, value in (("reduce", precision.reduce), ("gather", precision.gather)):
        if value == "bf16" and precision.compute == "fp32":
            raise ConfigError(f"precision.{key} (bf16) needs precision.compute (fp32) to be bf16 too: set one or the "
                              "other")  # fmt: skip
    if precision.gather == "bf16" and not cut:
        raise ConfigError("precision.gather (bf16) needs weights that are cut over ranks: take parallel.backend=fsdp, "
                          "or deepspeed with parallel.zero_stage=3, or leave it at fp32")  # fmt: skip
    if cut and parallel.backend == "deepspeed" and precision.gather != precision.reduce:
        raise ConfigError(
            f"precision.gather ({precision.gather}) and precision.reduce ({precision.reduce}) must be the same under "
            "DeepSpeed's ZeRO-3: set both alike, or take parallel.backend=fsdp"
        )


def _check_recipe(finetune: FinetuneConfig) -> None:
    if finetune.randaugment and not re.fullmatch(RANDAUGMENT, finetune.randaugment):
        raise ConfigError(f"finetune.randaugment ({finetune.randaugment}) must be written as timm does, with "
                          f"magnitudes up to 10, such as {FinetuneConfig().randaugment}, or empty")  # fmt: skip
    if finetune.grid is not None and not 2 <= finetune.grid <= MAX_GRID:
        raise ConfigError(f"finetune.grid ({finetune.grid}) must be from 2 to {MAX_GRID} cells a side")


def _check_finetune(config: Config, split: Split) -> None:
    finetune = config.finetune
    if config.run.task != "finetune":
        return
    if config.model.patch_gap:
        raise ConfigError("run.task (finetune) is set by `lmim eval finetune`, with all that goes with it: start that")
    if config.data.decoder == "nvjpeg":
        raise ConfigError("data.decoder (nvjpeg) makes crops on the GPU, and fine-tuning augments them before: take "
                          "turbo")  # fmt: skip
    if (finetune.mixup or finetune.cutmix) and split.micro_batch % 2:
        raise ConfigError(f"finetune.micro_batch ({split.micro_batch}) must be even for finetune.mixup and cutmix, "
                          "which mix images two by two: set another, or both of these to 0")  # fmt: skip


def _split(config: Config, world_size: int) -> Split:
    batch, micro = config.data.global_batch, config.data.micro_batch
    section = "finetune" if config.run.task == "finetune" else "data"
    if micro is None:
        if batch % world_size:
            raise ConfigError(
                f"{section}.global_batch ({batch}) is not divisible by the number of ranks ({world_size}); "
                f"{_nearest(batch, world_size)}"
            )
        micro = batch // world_size
    if batch % (world_size * micro):
        unit = world_size * micro
        raise ConfigError(f"{section}.global_batch ({batch}) is not divisible by ranks x micro batch "
                          f"({world_size} x {micro} = {unit}); {_nearest(batch, unit)}")  # fmt: skip
    return Split(world_size, micro, batch // (world_size * micro))


def _nearest(batch: int, unit: int) -> str:
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    return f"nearest are {below} and {above}" if below else f"the nearest is {above}"
