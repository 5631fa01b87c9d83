"""Every option: its default, what it means, and the values it may have.

Owns the dataclasses, the only place with defaults, and the tables of what is allowed, of which `config.validate` makes
complaints. Which options change a run's result is told here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

VARIANTS = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}


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
    embed_dim: Optional[int] = None  # width of the encoder; empty: the variant's, as for the next three
    depth: Optional[int] = None  # blocks
    num_heads: Optional[int] = None  # of attention
    patch_size: Optional[int] = None  # px
    grid_size: int = 14  # cells a side
    patch_gap: int = 4  # px between patches; the crop is grid_size · (patch_size + patch_gap) px
    mlp_ratio: float = 4.0  # hidden width of the MLPs over that of their tokens
    projector_dim: int = 4096  # hidden width
    projector_depth: int = 3  # 0: no projector
    decoder_dim: int = 512  # width
    decoder_depth: int = 3  # blocks
    decoder_num_heads: int = 16  # of attention
    decoder_attention: str = "cross"  # mask tokens to each other, then to visible ones; self: all to all
    visual_cues: bool = True  # mask tokens start from the visible tokens nearby
    learnable_positions: bool = False  # instead of the fixed sines and cosines
    drop_path: float = 0.0  # of the online encoder; grows linearly with depth to this rate
    dropout: float = 0.0  # of the online encoder's branches


@dataclass
class ObjectiveConfig:
    loss: str = "infonce"  # infonce, norm_l2, mse, l1, smooth_l1 or cosine
    temperature: float = 0.2  # of InfoNCE: lower tells patches apart more sharply
    num_visible: int = 20  # of grid_size² cells
    num_decoded: int = 0  # masked cells that are predicted, drawn anew for each image, at least 8; 0: all
    target: str = "ema"  # what makes targets: a moving average, or joint: the online encoder itself, with gradient
    target_input: str = "masked"  # what the target encoder sees: masked patches, or all
    gap_jitter: str = "released"  # offsets 0 … gap − 1 as released, or full: 0 … gap
    similarity_weight: float = 0.0  # of the penalty that steers the mean patch similarity; 0: off
    similarity_start: float = 0.75  # mean cosine that the penalty steers to at the start
    similarity_end: float = 0.25  # and at the end, along half a cosine
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
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333333333333])  # width over height
    flip: bool = True  # mirror half of the crops
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
    warmup: str = "30ep"  # linear, from the floor to the peak
    base_lr: float = 1.5e-4  # the peak is base_lr · global_batch / 256
    floor: float = 0.25  # share of the peak where the learning rate starts and ends
    weight_decay: float = 0.05  # not of biases, norms, embeddings
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    eps: float = 1e-8  # of AdamW
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
    smallest_group_mb: float = 32.0  # fsdp: blocks are gathered together until they hold so many MB; 0: each alone
    keep_gathered: bool = False  # fsdp, ZeRO-3: weights stay gathered from forward to backward: faster, more memory
    activation_checkpointing: bool = False  # blocks run again in the backward instead of keeping activations
    compile: bool = False  # torch.compile, block by block; on CPUs part by part where weights are whole
    attention: str = "auto"  # fused (one kernel), plain (products and a softmax), or auto: plain in bf16 on CPUs
    timeout_minutes: float = 30.0  # of any collective


@dataclass
class LogConfig:
    every: str = "10st"  # how often values leave the device, and the progress line moves
    wandb: str = "off"  # off, online or offline
    wandb_project: str = "lmim"  # where wandb lists the run
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
    # linear: as eval.pooling
    poolings: list[str] = field(default_factory=lambda: ["patch_mean", "class_token", "class_patch_mean"])
    # linear: of a batch of 256
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5])
    batch_norm: bool = True  # linear: features are standardised before the layer, without learned scale (MAE)
    epochs: int = 10  # linear; on ImageNet-1K 12,510 steps of 1024, as DINOv2's probe
    least_steps: int = 4000  # linear: more epochs where there are fewer steps
    batch: int = 1024  # linear: images per step
    weight_decay: Optional[float] = None  # empty: linear 1 / training images (scikit-learn's C = 1), attentive 0
    held_out: float = 0.1  # share of data.train that chooses among what was tried
    attentive_learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # attentive: AdamW's
    attentive_epochs: int = 20  # attentive
    attentive_batch: int = 256  # attentive: images per step
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
    clusters: list[int] = field(default_factory=lambda: [3, 4, 5])  # how many, each in a picture of its own
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
    warmup: str = "5ep"  # linear, from the floor to the peak
    global_batch: int = 1024  # images per optimizer step over all ranks
    micro_batch: Optional[int] = None  # images per forward on one rank; empty: data.micro_batch
    base_lr: float = 5e-4  # the peak is base_lr · global_batch / 256; ViT-L and H: 1e-3
    floor: float = 0.0  # share of the peak where the learning rate starts and ends
    layer_decay: float = 0.65  # each block learns at so much of the next one's rate; ViT-L and H: 0.75
    weight_decay: float = 0.05  # not of biases, norms, positions and the class token
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    clip_norm: float = 0.0  # of the whole gradient; 0: no clipping
    drop_path: float = 0.1  # ViT-L: 0.2, ViT-H: 0.3
    pooling: str = "mean"  # of the patch tokens, with a norm of its own; or class: the class token
    grid: Optional[int] = None  # cells a side; empty: as pretrained
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the image's area
    randaugment: str = "rand-m9-mstd0.5-inc1"  # as timm writes it; empty: none
    erasing: float = 0.25  # probability of erasing a rectangle
    mixup: float = 0.8  # alpha of the mixing of two images; 0: none
    cutmix: float = 1.0  # alpha of the pasting of one image into another, by turns with mixup; 0: none
    label_smoothing: float = 0.1  # share of a label that is spread over all classes
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
    every: str = "10%"  # 0st: only at the end, or when the run is stopped
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
    "parallel.attention": ("auto", "fused", "plain"),
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
                "parallel.smallest_group_mb",
                "probe.weight_decay", "segment.count", "segment.pictures", "davis.past_frames",
                "davis.neighbourhood", "finetune.weight_decay", "finetune.clip_norm", "finetune.mixup",
                "finetune.cutmix")  # fmt: skip
UNIT_INTERVAL = ("objective.momentum", "optim.floor", "data.crop_scale", "data.max_bad_fraction", "finetune.floor",
                 "finetune.crop_scale", "finetune.erasing", "finetune.layer_decay")  # fmt: skip
BELOW_ONE = ("model.drop_path", "model.dropout", "optim.betas", "probe.held_out", "finetune.betas",
             "finetune.drop_path", "finetune.label_smoothing")  # fmt: skip
NOT_EMPTY = ("eval.encoders", "probe.layers", "probe.poolings", "probe.learning_rates",
             "probe.attentive_learning_rates", "probe.shots", "segment.clusters")  # fmt: skip
