"""What the newest encoder of a run sees in a few images: clusters of patch tokens, and t-SNE of the same.

Owns the choice of images and the maps (paper, figure 4). The invariant: the same weights and images give the same maps,
and whatever keeps them from being made is one sentence, not an error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lmim.config import ConfigError, flatten
from lmim.data.loader import UNREADABLE, DataError, eval_batches, open_shards
from lmim.data.shards import ShardIndex
from lmim.data.storage import StorageError
from lmim.dist import discover
from lmim.eval.clusters import patch_tokens, tsne_points, ward_clusters
from lmim.eval.features import eval_sizes
from lmim.eval.history import History
from lmim.formats import load_encoder
from lmim.options import Config

CLUSTER_COUNTS = [3, 4, 5]
IMAGES = 8


class TokenMaps(NamedTuple):
    """One image and what is drawn of its tokens."""

    image: np.ndarray  # uint8 (S, S, 3)
    labels: dict[int, np.ndarray]  # number of clusters: labels (rows, cols) from 0
    points: np.ndarray  # t-SNE (m, 2)
    chosen: np.ndarray  # which of the rows · cols tokens the points are (m,)


def images_shown(config: Config) -> str:
    """Return the option whose images a page shows: `data.eval`, or `data.train` for a run without labels."""
    return "data.eval" if config.data.eval else "data.train"


def token_maps(history: History) -> tuple[list[TokenMaps], str]:
    """Return maps of up to eight images spread over what `images_shown` names, or none and why."""
    config = history.config
    if config is None:
        return [], "The configuration is missing, so the encoder and its images are not known."
    option = images_shown(config)
    if not history.checkpoints:
        return [], "There is no complete checkpoint yet."
    try:
        index = open_shards(option, flatten(config)[option], history.folder)
        images = _some_images(index, config)
        encoder = load_encoder(history.folder)
    except (ConfigError, DataError, StorageError, OSError) as error:
        return [], f"They could not be made: {' '.join(str(error).split())}"
    if not len(images):
        return [], f"No image of {option} could be read."
    device = discover().device
    encoder.to(device).eval()
    tokens = torch.cat([patch_tokens(encoder, image[None].to(device)).cpu() for image in images])  # memory of one image
    if not tokens.isfinite().all():
        return [], "The encoder's tokens are not finite."
    return [_maps(image, of_image) for image, of_image in zip(images, tokens, strict=True)], ""


def _some_images(index: ShardIndex, config: Config) -> torch.Tensor:
    """Return images spread over the index, uint8 (B, 3, S, S); fewer where some cannot be read."""
    resize, crop = eval_sizes(config)
    ids = np.unique(np.linspace(0, len(index) - 1, IMAGES).astype(np.int64))
    batches = eval_batches(index, ids, resize=resize, crop=crop, batch=IMAGES, workers=0)
    return torch.cat([images[labels != UNREADABLE] for images, labels in batches])


def _maps(image: torch.Tensor, tokens: torch.Tensor) -> TokenMaps:
    labels = dict(zip(CLUSTER_COUNTS, ward_clusters(tokens, CLUSTER_COUNTS), strict=True))
    return TokenMaps(image.permute(1, 2, 0).numpy(), labels, *tsne_points(tokens.flatten(0, 1).numpy()))
