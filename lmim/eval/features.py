"""Features of images: what an encoder says of each, gathered from all ranks.

Owns the view (resize, centre crop, patches without gaps), the read-outs, and the extraction. The invariant: every
sample that was asked for is there exactly once, in order, on any number of ranks.

    patch_mean         mean of the patch tokens after a block; as released, before the last norm
    class_token        the class token after a block
    class_patch_mean   both, one beside the other
    predictor          mean of the decoder's predictions of all cells, with all patches as its context
                       (CAPI, arXiv:2502.08769, table 5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim import dist
from lmim.config import ConfigError, model_dimensions
from lmim.data.loader import UNREADABLE, eval_batches, loader_workers
from lmim.data.shards import ShardIndex
from lmim.data.transforms import ImageError, eval_view
from lmim.dist import Topology, gather_rows
from lmim.eval.feature_cache import FeatureCache, identity_of
from lmim.options import Config
from lmim.patches import normalize_images
from lmim.vit import Decoder, VisionTransformer

RESIZE = 256 / 224  # of the short side, relative to the centre that is seen
MOST_PIXELS = 32  # a side, of raw pixels as features: an image of 224 px would be 150,528 numbers


class View(NamedTuple):
    """How an evaluation sees an image: the short side resized to `resize` px, then the centre of `crop` x `crop` px."""

    resize: int
    crop: int


class Subject(NamedTuple):
    """What features come from: an encoder, perhaps with the decoder it was trained with; raw pixels without one."""

    name: str
    encoder: VisionTransformer | None = None
    decoder: Decoder | None = None  # at the grid of the view


class Reading(NamedTuple):
    """One way to make a feature: the block whose tokens are read (-1: the last), how they are pooled, and the norm."""

    layer: int = -1
    pooling: str = "patch_mean"
    norm: bool = False


class Features(NamedTuple):
    """Labels (n,) and sample ids (n,) of the readable images, and their features in parts, on the CPU."""

    parts: dict[Reading, Tensor]  # class_patch_mean is two of them
    labels: Tensor
    ids: Tensor

    def by(self, reading: Reading) -> Tensor:
        """Return the features (n, D), fp32."""
        return torch.cat([self.parts[part] for part in _parts(reading)], dim=1)


def _parts(reading: Reading) -> list[Reading]:
    if reading.pooling != "class_patch_mean":
        return [reading]
    return [reading._replace(pooling=pooling) for pooling in ("class_token", "patch_mean")]


def eval_sizes(config: Config, encoder: VisionTransformer | None = None) -> View:
    """Return the view that `eval` and an encoder ask for; without an encoder, the configuration's model.

    The crop is `eval.crop`, or else the grid of patches without gaps; `eval.resize` is by default 256/224 of it.
    """
    dims = model_dimensions(config.model)
    grid, patch = (encoder.grid_size, encoder.patch_size) if encoder else (config.model.grid_size, dims["patch_size"])
    crop = config.eval.crop or grid * patch
    if crop % patch:
        raise ConfigError(f"eval.crop ({crop}) must be a multiple of the encoder's patch side ({patch} px): take "
                          f"{max(crop // patch, 1) * patch}")  # fmt: skip
    if config.eval.resize is not None and config.eval.resize < crop:
        raise ConfigError(f"eval.resize ({config.eval.resize}) must be at least the centre crop, {crop} px "
                          "(eval.crop, or else the encoder's cells x patch side): raise it, or set null")  # fmt: skip
    return View(config.eval.resize or round(crop * RESIZE), crop)


def load_images(paths: Sequence[str | Path], encoder: VisionTransformer, size: int | None = None,
                resize: int | None = None) -> Tensor:  # fmt: skip
    """Return image files as `encoder` takes them, floats (B, 3, S, S).

    The short side is resized to `resize` px by bicubic interpolation, the centre of S x S px taken, and ImageNet's mean
    and deviation taken off. S is `size`, a multiple of the patch side, or else the encoder's own grid of patches, and
    `resize` 256/224 of it: the evaluations' view unless `eval.crop` or `eval.resize` are set.
    Raises OSError and ImageError, which names the file.
    """
    crop = size or encoder.grid_size * encoder.patch_size
    if crop % encoder.patch_size:
        raise ValueError(f"size ({size}) must be a multiple of the encoder's patch side ({encoder.patch_size} px)")
    views = []
    for path in paths:
        try:
            views.append(eval_view(Path(path).read_bytes(), resize or round(crop * RESIZE), crop))
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
    return normalize_images(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2))


def reading_of(config: Config) -> Reading:
    """Return the reading that `eval` asks for."""
    return Reading(config.eval.layer, config.eval.pooling, config.eval.norm)


def check_readings(readings: Sequence[Reading], subject: Subject, option: str) -> list[Reading]:
    """Return the readings with blocks counted from 0; raises where an encoder has no such block."""
    if subject.encoder is None:
        return [Reading()]
    depth, counted = len(subject.encoder.blocks), []
    for reading in readings:
        if not -depth <= reading.layer < depth:
            raise ConfigError(f"{option} ({reading.layer}) must be a block of {subject.name}, which has {depth}: from "
                              f"0 to {depth - 1}, or from the end -1 to {-depth}")  # fmt: skip
        layer = reading.layer % depth
        if reading.pooling == "predictor" and layer != depth - 1:
            raise ConfigError(f"{option} ({reading.layer}) must be -1 with the pooling predictor, which reads the last "
                              "block's tokens only")  # fmt: skip
        counted.append(reading._replace(layer=layer))
    return counted


def read_out(subject: Subject, readings: Sequence[Reading], images: Tensor) -> list[Tensor]:
    """Return the features (B, D) of uint8 images (B, 3, S, S) by each reading of one part, in fp32, on their device."""
    if subject.encoder is None:
        return [raw_pixels(images)]
    images = normalize_images(images)
    layers = sorted({reading.layer for reading in readings})
    tokens = dict(zip(layers, subject.encoder.forward_intermediates(images, layers), strict=True))
    return [_pooled(subject, tokens[reading.layer], reading).float() for reading in readings]


def _pooled(subject: Subject, tokens_BTD: Tensor, reading: Reading) -> Tensor:
    if reading.pooling == "predictor":
        return predictions(subject, tokens_BTD).mean(dim=1)
    if reading.norm:
        tokens_BTD = subject.encoder.norm(tokens_BTD)
    return tokens_BTD[:, 0] if reading.pooling == "class_token" else tokens_BTD[:, 1:].mean(dim=1)


def predictions(subject: Subject, tokens_BTD: Tensor) -> Tensor:
    """Return the decoder's predictions (B, N, D) of all N cells from the last block's tokens of all N."""
    encoder, decoder = subject.encoder, subject.decoder
    B, T, _ = tokens_BTD.shape
    cells_BN = torch.arange(T - 1, device=tokens_BTD.device).expand(B, -1)
    return decoder(encoder.projector(encoder.norm(tokens_BTD)), cells_BN, cells_BN)[:, 1:]


def raw_pixels(images: Tensor) -> Tensor:
    """Return the pixels as they are, (B, 3·S·S), of images averaged down to at most 32 px a side."""
    images = images.float()
    if images.shape[-1] > MOST_PIXELS:
        images = F.adaptive_avg_pool2d(images, MOST_PIXELS)
    return images.flatten(1)


def extract(subject: Subject, readings: Sequence[Reading], index: ShardIndex, view: View, config: Config,
            topology: Topology, *, ids: np.ndarray | None = None, cache: FeatureCache | None = None,
            stopping: Callable[[], bool] = lambda: False) -> Features | None:  # fmt: skip
    """Return the features of an index's readable images (of those in `ids`, if given) on the CPU of every rank.

    `readings` are those that `check_readings` returned. What the cache holds of the same content is not computed.
    `stopping`, a collective, is asked after every batch; where it says so, all ranks return None.
    """
    ids = np.arange(len(index)) if ids is None else ids
    readings = list(dict.fromkeys(part for reading in readings for part in _parts(reading)))
    keys = []
    if cache is not None:
        source = (identity_of(subject.encoder), index.fingerprint, ids.tobytes(), tuple(view))
        through = identity_of(subject.decoder)
        keys = [cache.key(*source, tuple(reading), through if reading.pooling == "predictor" else "")
                for reading in readings]  # fmt: skip
        found = [cache.read(key) for key in keys]
        if all(dist.gather_objects(all(content is not None for content in found))):
            return Features({reading: content["features"] for reading, content in zip(readings, found, strict=True)},
                            found[0]["labels"], found[0]["ids"])  # fmt: skip
    features = _extract(subject, readings, index, view, config, topology, ids, stopping)
    if cache is not None and features is not None and topology.local_rank == 0:
        for key, reading in zip(keys, readings, strict=True):
            cache.write(key, dict(features=features.parts[reading], labels=features.labels, ids=features.ids))
    return features


@torch.no_grad()
def _extract(subject: Subject, readings: list[Reading], index: ShardIndex, view: View, config: Config,
             topology: Topology, ids: np.ndarray, stopping: Callable[[], bool]) -> Features | None:  # fmt: skip
    shares = np.array_split(ids, topology.world_size)
    rounds = math.ceil(len(shares[0]) / config.eval.batch)  # of the ranks with most; some have a batch less
    mine = shares[topology.rank]
    parts: list[list[Tensor]] = [[] for _ in readings]
    labels = []
    batches = image_batches(index, mine, view, config, topology)
    for _ in range(rounds):
        dist.progress()
        for images, batch_labels in islice(batches, 1):
            readable = batch_labels != UNREADABLE
            for part, feature in zip(
                parts, read_out(subject, readings, images[readable].to(topology.device)), strict=True
            ):
                part.append(feature.cpu())
            labels.append(batch_labels)
        if stopping():
            batches.close()
            return None
    if not any(dist.gather_objects(any(bool((part != UNREADABLE).any()) for part in labels))):
        raise none_readable(index)
    if not labels:  # fewer samples than ranks: no rows, but of the right width
        nothing = torch.zeros(1, 3, view.crop, view.crop, dtype=torch.uint8, device=topology.device)
        parts = [[feature[:0].cpu()] for feature in read_out(subject, readings, nothing)]
        labels.append(torch.zeros(0, dtype=torch.int64))
    found = torch.cat(labels)
    readable = found != UNREADABLE
    gathered = {}
    for reading, part in zip(readings, parts, strict=True):
        gathered[reading] = gather_rows(torch.cat(part))
        part.clear()
    return Features(gathered, gather_rows(found[readable]), gather_rows(torch.from_numpy(mine.copy())[readable]))


def none_readable(index: ShardIndex) -> ConfigError:
    """Return the complaint where no image that is needed of an index can be read."""
    return ConfigError(f"none of the images of {index.folder} that are needed can be read: repair the shards (python "
                       "tools/verify_shards.py)")  # fmt: skip


def image_batches(index: ShardIndex, ids: np.ndarray, view: View, config: Config,
                  topology: Topology) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield (uint8 images (B, 3, S, S), labels (B,)) of samples in their order, `eval.batch` at a time."""
    workers = loader_workers(config.data, topology)
    return eval_batches(index, ids, resize=view.resize, crop=view.crop, batch=config.eval.batch, workers=workers)
