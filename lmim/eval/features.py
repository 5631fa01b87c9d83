"""Features of images: what an encoder says of each, gathered from all ranks.

Owns the view (resize, centre crop, patches without gaps) and the pooling. The invariant: every sample of the index is
there exactly once, in index order, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lmim.config import Config, model_dimensions
from lmim.data.loader import UNREADABLE, default_workers, eval_batches
from lmim.data.shards import ShardIndex
from lmim.dist import Topology, gather_rows
from lmim.patches import normalize_images
from lmim.vit import VisionTransformer


def eval_sizes(config: Config) -> tuple[int, int]:
    """Return (resize of the short side, centre crop) in px: the crop is the grid without gaps, resized by 256/224."""
    crop = config.model.grid_size * model_dimensions(config.model)["patch_size"]
    return config.eval.resize or round(crop * 256 / 224), crop


def patch_mean(encoder: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """Return the map from uint8 images to the mean of the patch tokens before the last norm, (B, D), as released."""

    def features(images: Tensor) -> Tensor:
        tokens_BTD = encoder.forward_intermediates(normalize_images(images), 1)[0]
        return tokens_BTD[:, 1:].float().mean(dim=1)

    return features


def raw_pixels(images: Tensor) -> Tensor:
    """Return the pixels as they are, (B, 3·S·S)."""
    return images.flatten(1).float()


@torch.no_grad()
def extract(function: Callable[[Tensor], Tensor], index: ShardIndex, config: Config, topology: Topology,
            stopping: Callable[[], bool] = lambda: False) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Return (features (n, D) fp32, labels (n,)) of all readable images of an index, on the CPU of every rank.

    `stopping`, a collective, is asked after every batch; where it says so, all ranks return None.
    """
    resize, crop = eval_sizes(config)
    shares = np.array_split(np.arange(len(index)), topology.world_size)
    rounds = math.ceil(len(shares[0]) / config.eval.batch)  # of the ranks with most; some have a batch less
    workers = default_workers(topology) if config.data.workers is None else config.data.workers
    features, labels = [], []
    batches = eval_batches(
        index, shares[topology.rank], resize=resize, crop=crop, batch=config.eval.batch, workers=workers
    )
    for _ in range(rounds):
        for images, batch_labels in islice(batches, 1):
            readable = batch_labels != UNREADABLE
            features.append(function(images[readable].to(topology.device)).cpu())
            labels.append(batch_labels[readable])
        if stopping():
            batches.close()
            return None
    if not features:  # fewer samples than ranks: no rows, but of the right width
        features.append(function(torch.zeros(1, 3, crop, crop, dtype=torch.uint8, device=topology.device))[:0].cpu())
        labels.append(torch.zeros(0, dtype=torch.int64))
    return gather_rows(torch.cat(features)), gather_rows(torch.cat(labels))
