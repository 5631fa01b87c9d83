"""The configuration: every option, its default, and one check of the whole before anything starts.

Owns the dataclasses (the only place with defaults), how files and overrides are read, durations, and `validate`. The
invariants: dataclass defaults < `base:` file < file < `section.key=value`; an unknown key is an error; every complaint
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

VARIANTS = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}


class ConfigError(ValueError):
    """A user's mistake: one line that names the key, its value, what is allowed and how to mend it."""


@dataclass
class RunConfig:
    folder: str = "runs/latent_mim"  # config, logs, checkpoints and figures of this run
    task: str = "pretrain"  # or finetune, as `lmim eval finetune` sets it for a run of its own
    name: str = ""  # shown by wandb; empty: the folder's last part
    seed: int = 0  # weights, order of samples, crops, flips, gaps and masks follow from it
    resume_from: str = ""  # another run's folder or checkpoint to go on from, where this run has none of its own
    init_from: str = ""  # else weights to begin with, at step 0: anything that `lmim export` reads
    time_limit_minutes: float = 0.0  # then save and stop, to be started again; 0: none


@dataclass
class ModelConfig:
    variant: str = "base"  # tiny, small, base, large or huge; the next four override its parts
    embed_dim: Optional[int] = None
    depth: Optional[int] = None
    num_heads: Optional[int] = None
    patch_size: Optional[int] = None  # px
    grid_size: int = 14  # cells a side
    patch_gap: int = 4  # px between patches; the crop is grid_size · (patch_size + patch_gap) px
    mlp_ratio: float = 4.0
    projector_dim: int = 4096
    projector_depth: int = 3  # 0: no projector
    decoder_dim: int = 512
    decoder_depth: int = 3
    decoder_num_heads: int = 16
    decoder_attention: str = "cross"  # mask tokens to each other, then to visible ones; self: all to all
    visual_cues: bool = True  # mask tokens start from the visible tokens nearby
    learnable_positions: bool = False
    drop_path: float = 0.0  # of the online encoder; grows linearly with depth to this rate
    dropout: float = 0.0  # of the online encoder's branches


@dataclass
class ObjectiveConfig:
    loss: str = "infonce"  # infonce, norm_l2, mse, l1, smooth_l1 or cosine
    temperature: float = 0.2
    num_visible: int = 20  # of grid_size² cells
    target: str = "ema"  # what makes targets: a moving average, or joint: the online encoder itself, with gradient
    target_input: str = "masked"  # what the target encoder sees: masked patches, or all
    gap_jitter: str = "released"  # offsets 0 … gap − 1 as released, or full: 0 … gap
    similarity_weight: float = 0.0  # of the penalty that steers the mean patch similarity; 0: off
    similarity_start: float = 0.75
    similarity_end: float = 0.25
    momentum: float = 0.99  # of the target at the start; goes to 1 along half a cosine


@dataclass
class DataConfig:
    # folder or address of tar shards (tools/shard_images.py), a list of several, or the embedded images
    train: Any = "embedded:train"
    eval: str = "embedded:eval"  # labelled shards for nearest-neighbour accuracy; empty: none
    global_batch: int = 1024  # images per optimizer step over all ranks
    micro_batch: Optional[int] = None  # images per forward on one rank; empty: global_batch / ranks
    crop_size: Optional[int] = None  # px; empty: grid_size · (patch_size + patch_gap), which it must equal
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # share of the image's area
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333333333333])
    flip: bool = True
    decoder: str = "turbo"  # turbo (libjpeg-turbo), pillow (4 times slower), or nvjpeg (on the GPU)
    weights: list[float] = field(default_factory=list)  # how often each of several sources is drawn; empty: by size
    block_shards: int = 64  # shards whose samples are shuffled together
    lanes: int = 1  # parts of the data read side by side; with as many as hosts, each reads its own shards only
    tail: str = "carry"  # images of an epoch that fill no batch: carry (go on in the next), drop, or repeat some more
    max_bad_fraction: float = 0.01  # a run stops when a larger share of the images cannot be read
    cache: str = ""  # folder for copies of remote shards; empty: images are read one by one from where they are
    cache_gb: float = 100.0  # most that it holds; two blocks of shards per lane that this host reads should fit
    timeout_s: float = 30.0  # of remote places: to connect, and between two packets
    retry_minutes: float = 10.0  # how long a remote place that fails is tried again before the run ends
    allow_pipe: bool = False  # run the commands of `pipe:` addresses in a shell
    workers: Optional[int] = None  # loader processes per rank; empty: from the number of cores


@dataclass
class OptimConfig:
    duration: str = "300ep"  # durations: 800ep (epochs), 125000st (steps), 5% (of the whole run)
    warmup: str = "30ep"
    base_lr: float = 1.5e-4  # the peak is base_lr · global_batch / 256
    floor: float = 0.25  # share of the peak where the learning rate starts and ends
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    clip_norm: float = 0.0  # of the whole gradient; 0: no clipping
    max_skipped_steps: int = 3  # in a row, left out as loss or gradient was not finite, that end the run


@dataclass
class PrecisionConfig:
    compute: str = "bf16"  # bf16 autocast over fp32 weights, or fp32
    reduce: str = "fp32"  # gradients are summed over ranks in fp32 or bf16
    gather: str = "fp32"  # cut weights (fsdp, ZeRO-3) are gathered in fp32, or matrices in bf16: half the bytes


@dataclass
class ParallelConfig:
    backend: str = "deepspeed"  # deepspeed, fsdp (FSDP2), or local: one process
    zero_stage: int = 1  # deepspeed: what is cut over ranks: 0 nothing, 1 AdamW, 2 gradients too, 3 weights too
    deepspeed_config: str = ""  # JSON file of further DeepSpeed options, such as offload_optimizer
    shard_ranks: Optional[int] = None  # fsdp: ranks that share one copy; empty: all; fewer: HSDP; 1: replicas
    keep_gathered: bool = False  # fsdp, ZeRO-3: weights stay gathered from forward to backward: faster, more memory
    activation_checkpointing: bool = False  # blocks run again in the backward instead of keeping activations
    compile: bool = False  # torch.compile, block by block
    timeout_minutes: float = 30.0  # of any collective


@dataclass
class LogConfig:
    every: str = "10st"  # how often values leave the device, and the progress line moves
    wandb: str = "off"  # off, online or offline
    wandb_project: str = "lmim"
    tensorboard: bool = False  # its files are in `tensorboard` in the run folder


@dataclass
class EvalConfig:
    knn_every: str = "10%"  # leave-one-out accuracy on data.eval while training; 0st: never
    gallery_every: str = "0st"  # accuracy on data.eval of neighbours in data.train while training; 0st: never
    fewshot_every: str = "0st"  # few-shot ridge accuracy while training, by the options of `probe`; 0st: never
    encoders: list[str] = field(default_factory=lambda: ["online"])  # judged while training: online, target, or both
    resize: Optional[int] = None  # px of the short side; empty: the crop · 256 / 224
    crop: Optional[int] = None  # px of the centre; empty: the encoder's cells · its patch side
    batch: int = 250  # images per forward
    layer: int = -1  # whose block's tokens are read; -1: the last's
    pooling: str = "patch_mean"  # or class_token, class_patch_mean (one beside the other), predictor
    norm: bool = False  # tokens pass the encoder's last norm first; as released they do not
    k: Any = 20  # gallery protocol: neighbours that vote, or a list of such numbers
    temperature: float = 0.07  # gallery protocol: votes weigh exp(cosine / temperature)
    gallery_images: Optional[int] = None  # of data.train that make the gallery, evenly spread; empty: all
    baselines: list[str] = field(default_factory=lambda: ["pixels", "random"])  # evaluated beside the encoder; []: none
    cache: str = ""  # folder that keeps features by content, for the next evaluation; empty: none
    cache_gb: float = 20.0  # most that it holds; what was used longest ago goes first


@dataclass
class ProbeConfig:
    layers: list[int] = field(default_factory=lambda: [-1])  # linear: tried together, as are poolings and rates
    poolings: list[str] = field(default_factory=lambda: ["patch_mean", "class_token", "class_patch_mean"])
    # linear: of a batch of 256
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5])
    batch_norm: bool = True  # linear: features are standardised before the layer, without learned scale (MAE)
    epochs: int = 10  # linear; on ImageNet-1K 12,510 steps of 1024, as DINOv2's probe
    least_steps: int = 4000  # linear: more epochs where there are fewer steps
    batch: int = 1024
    weight_decay: float = 0.0
    held_out: float = 0.1  # share of data.train that chooses among what was tried
    attentive_learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # attentive: AdamW's
    attentive_epochs: int = 20
    attentive_batch: int = 256
    memory_gb: float = 4.0  # attentive: a rank's tokens are kept if they need no more; else encoded in every epoch
    shots: list[int] = field(default_factory=lambda: [1, 5, 10])  # fewshot: training images a class
    trials: int = 10  # fewshot: draws of them
    classifier: str = "ridge"  # fewshot: ridge, or logistic
    l2: Optional[float] = None  # fewshot: penalty; empty: a tenth of the features' width for ridge, 1 for logistic


@dataclass
class SegmentConfig:
    images: str = ""  # an image file or a folder of such; empty: data.eval
    masks: str = ""  # folder of palette or grey PNGs with the images' names; empty: no mIoU
    ignore: int = 255  # number in masks that stands for no class; -1: none
    count: int = 8  # images, spread evenly over all there are; 0: all
    pictures: int = 8  # of these that are drawn
    size: Optional[int] = None  # px of the short side and the centre crop; empty: twice the training grid without gaps
    clusters: list[int] = field(default_factory=lambda: [3, 4, 5])
    linkage: str = "ward"  # or average
    layer: int = -1  # whose block's tokens are clustered; -1: the last's
    out: str = ""  # folder for the pictures; empty: `segment` in the run folder


@dataclass
class DavisConfig:
    folder: str = ""  # DAVIS-2017: JPEGImages/480p, Annotations/480p, ImageSets/2017
    split: str = "val"  # the videos of ImageSets/2017/val.txt
    short_side: int = 480  # px that frames are resized to
    past_frames: int = 7  # that labels come from, beside the first
    neighbourhood: int = 12  # rows and columns of patches that labels come from, each way; 0: all
    top_k: int = 5  # most similar patches that give their labels
    temperature: float = 0.1  # they weigh exp(cosine / temperature)
    layer: int = -1  # whose block's tokens are compared; -1: the last's
    out: str = ""  # folder for the masks; empty: `davis` in the run folder


@dataclass
class FinetuneConfig:
    """MAE's recipe for ViT-B; `lmim eval finetune` makes a run's other sections of it."""

    folder: str = ""  # of the run that fine-tunes; empty: finetune/online (or target, scratch) in run.folder
    duration: str = "100ep"  # ViT-L and H: 50ep
    warmup: str = "5ep"
    global_batch: int = 1024  # images per optimizer step over all ranks
    micro_batch: Optional[int] = None  # images per forward on one rank; empty: data.micro_batch
    base_lr: float = 5e-4  # the peak is base_lr · global_batch / 256; ViT-L and H: 1e-3
    floor: float = 0.0  # share of the peak where the learning rate starts and ends
    layer_decay: float = 0.65  # each block learns at so much of the next one's rate; ViT-L and H: 0.75
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: float = 0.0  # of the whole gradient; 0: no clipping
    drop_path: float = 0.1  # ViT-L: 0.2, ViT-H: 0.3
    pooling: str = "mean"  # of the patch tokens, with a norm of its own; or class: the class token
    grid: Optional[int] = None  # cells a side; empty: as pretrained
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    randaugment: str = "rand-m9-mstd0.5-inc1"  # as timm writes it; empty: none
    erasing: float = 0.25  # probability of erasing a rectangle
    mixup: float = 0.8  # alpha of the mixing of two images; 0: none
    cutmix: float = 1.0  # alpha of the pasting of one image into another, by turns with mixup; 0: none
    label_smoothing: float = 0.1
    evaluate_every: str = "10%"  # accuracy on data.eval
    scratch: bool = False  # begin with new weights of `model`, to see what pretraining is worth
    # the rest is set by `lmim eval finetune`, in the run that it makes
    which: str = "online"  # encoder that is fine-tuned; or target, scratch
    weights: str = ""  # their checksum
    norm_eps: float = 1e-6  # of the encoder's norms


@dataclass
class HealthConfig:
    on_spike: str = "warn"  # the loss leaps up; off, warn, or stop
    on_collapse: str = "warn"  # targets become alike, in an image or at a position, or the loss stays at chance
    patience: str = "1%"  # for so long, after the warm-up


@dataclass
class CheckpointConfig:
    every: str = "10%"
    keep: int = 2  # newest ones kept
    keep_every: str = "0st"  # those at multiples of this are kept for good; 0st: none
    asynchronous: bool = True  # written beside training, from a copy in host memory


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    davis: DavisConfig = field(default_factory=DavisConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# What a resumed run may change: where things lie and how the work is split, not what is computed. The data's identity
# is its shards' checksum, kept by the checkpoint, not its path.
NEUTRAL = ("run.folder", "run.name", "run.resume_from", "run.init_from", "run.time_limit_minutes", "data.train",
           "data.eval", "data.micro_batch", "data.workers", "data.crop_size", "data.max_bad_fraction", "data.cache",
           "data.cache_gb", "data.timeout_s", "data.retry_minutes", "data.allow_pipe", "optim.max_skipped_steps",
           "precision.gather", "parallel.", "log.", "eval.", "probe.", "finetune.", "segment.", "davis.", "health.",
           "checkpoint.")  # fmt: skip
# Of these, what a fine-tuning run does change by: all of its section but where it lies and when it is looked at.
FINETUNE_NEUTRAL = ("finetune.folder", "finetune.micro_batch", "finetune.evaluate_every")

POOLINGS = ("patch_mean", "class_token", "class_patch_mean", "predictor")
CHOICES = {
    "run.task": ("pretrain", "finetune"),
    "model.variant": tuple(VARIANTS),
    "model.decoder_attention": ("cross", "self"),
    "objective.loss": ("infonce", "norm_l2", "mse", "l1", "smooth_l1", "cosine"),
    "objective.target": ("ema", "joint"),
    "objective.target_input": ("masked", "all"),
    "objective.gap_jitter": ("released", "full"),
    "data.decoder": ("turbo", "pillow", "nvjpeg"),
    "data.tail": ("carry", "drop", "repeat"),
    "precision.compute": ("bf16", "fp32"),
    "precision.reduce": ("fp32", "bf16"),
    "precision.gather": ("fp32", "bf16"),
    "parallel.backend": ("deepspeed", "fsdp", "local"),
    "parallel.zero_stage": (0, 1, 2, 3),
    "finetune.pooling": ("mean", "class"),
    "finetune.which": ("online", "target", "scratch"),
    "log.wandb": ("off", "online", "offline"),
    "eval.encoders": ("online", "target"),
    "eval.pooling": POOLINGS,
    "eval.baselines": ("pixels", "random"),
    "probe.poolings": POOLINGS,
    "probe.classifier": ("ridge", "logistic"),
    "segment.linkage": ("ward", "average"),
    "health.on_spike": ("off", "warn", "stop"),
    "health.on_collapse": ("off", "warn", "stop"),
}
POSITIVE = ("model.embed_dim", "model.depth", "model.num_heads", "model.patch_size", "model.grid_size",
            "model.mlp_ratio", "model.projector_dim", "model.decoder_dim", "model.decoder_depth",
            "model.decoder_num_heads", "objective.temperature", "objective.num_visible", "data.global_batch",
            "data.micro_batch", "data.block_shards", "data.weights", "data.lanes", "data.cache_gb",
            "data.timeout_s", "data.retry_minutes", "optim.base_lr", "optim.eps",
            "parallel.timeout_minutes", "parallel.shard_ranks", "optim.max_skipped_steps",
            "eval.resize", "eval.crop", "eval.batch", "eval.temperature", "eval.gallery_images", "eval.cache_gb",
            "probe.learning_rates", "probe.epochs", "probe.least_steps", "probe.batch",
            "probe.attentive_learning_rates", "probe.attentive_epochs", "probe.attentive_batch", "probe.memory_gb",
            "probe.shots", "probe.trials", "probe.l2", "segment.size", "segment.clusters", "davis.short_side",
            "davis.top_k", "davis.temperature", "finetune.global_batch", "finetune.micro_batch", "finetune.base_lr",
            "finetune.layer_decay", "finetune.norm_eps", "checkpoint.keep")  # fmt: skip
NOT_NEGATIVE = ("run.seed", "run.time_limit_minutes", "model.patch_gap", "model.projector_depth",
                "objective.similarity_weight", "data.workers", "optim.weight_decay", "optim.clip_norm",
                "probe.weight_decay", "segment.count", "segment.pictures", "davis.past_frames",
                "davis.neighbourhood", "finetune.weight_decay", "finetune.clip_norm", "finetune.mixup",
                "finetune.cutmix")  # fmt: skip
UNIT_INTERVAL = ("objective.momentum", "optim.floor", "data.crop_scale", "data.max_bad_fraction", "finetune.floor",
                 "finetune.crop_scale", "finetune.erasing", "finetune.layer_decay")  # fmt: skip
BELOW_ONE = ("model.drop_path", "model.dropout", "optim.betas", "probe.held_out", "finetune.betas",
             "finetune.drop_path", "finetune.label_smoothing")  # fmt: skip
NOT_EMPTY = ("eval.encoders", "probe.layers", "probe.poolings", "probe.learning_rates",
             "probe.attentive_learning_rates", "probe.shots", "segment.clusters")  # fmt: skip
RANDAUGMENT = r"rand(-(m|mmax)(\d|10)|-(n|inc)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3a|3aw))*"  # of timm
SECRET = re.compile(r"(?<=://)[^/@]*:[^/]*@|[?&][^=]*(sig|token|key|secret|password|credential)[^=]*=.*", re.IGNORECASE)
MAX_SOURCES = 256  # with weights: their turns are counted in 1024ths
MAX_GRID = 256  # cells a side that `draw_views` can number
MAX_SEED = 2**63 - 1


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
    near = difflib.get_close_matches(key, [k for k in known if k.startswith(f"{section}.")], n=1, cutoff=0.0)
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
