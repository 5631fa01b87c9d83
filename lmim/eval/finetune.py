"""Fine-tuning: an encoder trained on with labels, by MAE's recipe (arXiv:2111.06377, appendix A).

Owns what fine-tuning is as a task of the training loop, and how its run is made out of a configuration, so that there
is no second loop: the same command line, backends, loader, log, checkpoints and stops serve both. The invariant: the
configuration of the run that is made says all about it, so that `lmim train ITS_FOLDER` goes on with it too.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from lmim import dist, store
from lmim.classifier import Classifier
from lmim.config import ConfigError, check, crop_size, duration_steps, model_dimensions
from lmim.data.augment import Augment
from lmim.data.loader import UNREADABLE, Batch
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval.case import check_classes, check_labels, check_several_classes
from lmim.eval.features import eval_sizes, image_batches, none_readable
from lmim.eval.results import record
from lmim.eval.session import open_encoder
from lmim.metrics import EVAL_FILE, LOG_FILE, read_rows
from lmim.options import Config, ModelConfig, ObjectiveConfig
from lmim.parallel import Backend
from lmim.profiling import classifier_flops
from lmim.schedules import Hyper
from lmim.vit import VisionTransformer

logger = logging.getLogger(__name__)
BEST = 5  # classes, among which the right one is looked for


class Finetuning:
    """The task of a run with run.task=finetune: classify images, watched by accuracy on data.eval."""

    evaluations: ClassVar = {"accuracy": "finetune.evaluate_every"}

    def __init__(self, config: Config):
        self.config = config

    def open(self, train: ShardIndex, test: ShardIndex | None, names: Sequence[str]) -> None:
        check_labels(train, "data.train")
        self.labels = train.labels()
        self.classes = max(len(train.classes or ()), int(self.labels.max()) + 1)
        check_several_classes(train)
        if test is not None and names:
            eval_sizes(self.config)
            check_labels(test, "data.eval")
            check_classes(train, test)

    def build(self) -> Classifier:
        return Classifier(self.config.model, self.config.finetune, self.classes)

    def begin(self, backend: Backend) -> None:
        run, finetune = self.config.run, self.config.finetune
        if finetune.which == "scratch":
            return
        encoder = open_encoder(self.config, Path(run.init_from), finetune.which, self.config.model.grid_size)
        if digest(encoder) != finetune.weights:
            raise ConfigError(f"run.init_from ({run.init_from}) no longer holds the weights that this run was made for "
                              f"(finetune.weights {finetune.weights}): start `lmim eval finetune` anew")  # fmt: skip
        with torch.device("meta"):
            new = self.build().new_names()
        tensors = {f"online.{name}": tensor for name, tensor in encoder.state_dict().items()}
        store.fill(backend.pieces(), {name: tensor for name, tensor in tensors.items() if name not in new})
        backend.loaded(0)
        logger.info("fine-tuning the %s encoder of %s (width %d, depth %d) for %d classes", finetune.which,
                    run.init_from, encoder.embed_dim, len(encoder.blocks), self.classes)  # fmt: skip

    def loading(self) -> dict[str, Any]:
        return dict(labels=self.labels, augment=Augment(self.config.finetune, crop_size(self.config.model)))

    def flops_per_image(self) -> int:
        return classifier_flops(self.config, self.classes)

    def inputs(self, batch: Batch, hyper: Hyper) -> tuple[Any, ...]:
        return batch.images, batch.keys, batch.labels, batch.shares

    def scheduled(self, hyper: Hyper) -> dict[str, float]:
        return dict(lr=hyper.lr)

    def told(self, row: dict[str, Any]) -> str:
        return f"accuracy {row['accuracy']:.2f}"

    def evaluate(self, names: Sequence[str], backend: Backend, train: ShardIndex, test: ShardIndex, topology: Topology,
                 stopping: Callable[[], bool]) -> dict[str, float] | None:  # fmt: skip
        with backend.infer("") as classifier:
            found = hits(classifier, test, self.config, topology, stopping)
        if found is None:
            return None
        images, first, among_best = found
        shares = dict(top1=round(first / images, 5))
        return shares if self.classes <= BEST else shares | dict(top5=round(among_best / images, 5))


@torch.no_grad()
def hits(classifier: Classifier, index: ShardIndex, config: Config, topology: Topology,
         stopping: Callable[[], bool]) -> tuple[int, int, int] | None:  # fmt: skip
    """Return how many images of an index are readable, and of how many the label comes first, or among the first five.

    A collective: every image is seen once, by one rank. `stopping`, asked after every batch, ends it with None.
    """
    shares = np.array_split(np.arange(len(index)), topology.world_size)
    counts = torch.zeros(3, dtype=torch.int64, device=topology.device)
    batches = image_batches(index, shares[topology.rank], eval_sizes(config), config, topology)
    for _ in range(math.ceil(len(shares[0]) / config.eval.batch)):  # of the rank with most; some have a batch less
        dist.progress()
        for images, labels in islice(batches, 1):
            readable = labels != UNREADABLE
            logits_BC = classifier.logits(images[readable].to(topology.device))
            best_BK = logits_BC.topk(min(BEST, logits_BC.shape[1])).indices
            right_BK = best_BK == labels[readable].to(topology.device)[:, None]
            counts += torch.stack([torch.tensor(len(right_BK)).to(counts), right_BK[:, 0].sum(), right_BK.sum()])
        if stopping():
            batches.close()
            return None
    images, first, among_best = map(sum, zip(*dist.gather_objects(counts.tolist()), strict=True))
    if not images:
        raise none_readable(index)
    return images, first, among_best


# --- the run that is made --------------------------------------------------------------------------------------------

TAKEN_OVER = ("duration", "warmup", "base_lr", "floor", "weight_decay", "betas", "clip_norm")  # by section optim


def finetune_config(config: Config, checkpoint: Path | None, which: str) -> Config:
    """Return the configuration of the run that fine-tunes an encoder as section `finetune` says.

    Sizes are the encoder's, or those of `model` with finetune.scratch; the data, precision, parallel and so on stay as
    they are. Raises ConfigError where `checkpoint` (default: run.folder) has no such encoder.
    """
    if config.run.task != "pretrain":
        raise ConfigError(f"run.folder ({config.run.folder}) is a fine-tuning run itself: `lmim train` goes on with "
                          "it, and `lmim eval finetune` begins with the run it was made of")  # fmt: skip
    check(config)  # not for these ranks: the pretraining may have had others
    if not config.data.eval:
        raise ConfigError("data.eval is empty: give labelled shards, or fine-tuning is not evaluated")
    finetune, data, made = config.finetune, config.data, copy.deepcopy(config)
    if finetune.scratch and checkpoint is not None:
        raise ConfigError(f"finetune.scratch (true) begins with new weights, and --checkpoint ({checkpoint}) gives "
                          "others: leave one of them out")  # fmt: skip
    made.run.resume_from = made.run.init_from = ""
    if finetune.scratch:
        made.model = _model_of(config, model_dimensions(config.model), finetune.grid or config.model.grid_size)
        made.finetune.which = "scratch"
    else:
        made.run.init_from, made.finetune.which = str(checkpoint or config.run.folder), which
        encoder = open_encoder(config, Path(made.run.init_from), which, finetune.grid)
        sizes = dict(embed_dim=encoder.embed_dim, depth=len(encoder.blocks), patch_size=encoder.patch_size,
                     num_heads=encoder.blocks[0].attn.num_heads, mlp_ratio=encoder.mlp_ratio)  # fmt: skip
        made.model = _model_of(config, sizes, encoder.grid_size)
        made.finetune.weights, made.finetune.norm_eps = digest(encoder), encoder.norm.eps
    made.run.task, made.run.name = "finetune", f"{config.run.name or Path(config.run.folder).name}-finetune"
    folder = finetune.folder or str(Path(config.run.folder) / "finetune" / made.finetune.which)
    made.run.folder = made.finetune.folder = folder
    made.objective, made.health.on_collapse = ObjectiveConfig(num_visible=1), "off"  # there are no targets
    made.data.global_batch, made.data.micro_batch = finetune.global_batch, finetune.micro_batch or data.micro_batch
    made.data.crop_scale, made.data.crop_size, made.eval.crop = finetune.crop_scale, None, None
    for name in TAKEN_OVER:
        setattr(made.optim, name, getattr(finetune, name))
    if not duration_steps(finetune.evaluate_every, steps_per_epoch=1.0, total_steps=100, key="finetune.evaluate_every"):
        made.finetune.evaluate_every = "100%"  # at the end in any case
    return made


def _model_of(config: Config, sizes: dict[str, Any], grid_size: int) -> ModelConfig:
    return ModelConfig(**{
        "variant": config.model.variant, "mlp_ratio": config.model.mlp_ratio, "grid_size": grid_size, "patch_gap": 0,
        "projector_depth": 0, "learnable_positions": True, "drop_path": config.finetune.drop_path, **sizes,
    })  # fmt: skip


def digest(encoder: VisionTransformer) -> str:
    """Return a checksum of an encoder's weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()[:16]


def outcome(made: Config, run_folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return what a complete run has come to, and record it in the folder of the run it was made of.

    None on other ranks than the first.
    """
    if not dist.discover().is_main:
        return None
    last, finetune = read_rows(Path(made.run.folder) / EVAL_FILE)[-1], made.finetune
    found = {name: last[name] for name in ("top1", "top5") if name in last}
    losses = [row["loss"] for row in read_rows(Path(made.run.folder) / LOG_FILE)[-1:]]  # none if the log was removed
    found |= dict(epochs=last["epoch"], steps=last["step"] + 1,
                  loss=round(losses[0], 5) if losses and losses[0] is not None else None,  # null: it was not finite
                  pooling=finetune.pooling, folder=made.run.folder)  # fmt: skip
    results = {finetune.which: found}
    record(run_folder, "finetune", results, source=made.run.init_from or "new weights", which=finetune.which)
    return results
