"""Nearest-neighbour accuracy, by the two protocols of the field.

* `leave_one_out`, the released evaluator's: 1-NN inside the evaluation set, each image against all others.
* `gallery`, the common one: the training set as gallery, k = 20 votes weighted by exp(cosine / 0.07)
  (arXiv:1805.01978).

Both use cosine similarity of the features. Between classes with equal votes the lower number wins; which of several
equally near samples counts is left to the library.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim.checkpoint import check_same_tensors
from lmim.config import Config, ConfigError, model_dimensions, validate
from lmim.data.loader import open_data
from lmim.data.shards import ShardIndex
from lmim.dist import Topology, discover, fail, init, shutdown
from lmim.eval.features import extract, patch_mean, raw_pixels
from lmim.formats import load_encoder
from lmim.objective import LatentMIM
from lmim.vit import VisionTransformer

logger = logging.getLogger(__name__)
CHUNK = 1024
RESULTS_FILE = "knn.json"


def leave_one_out(features: Tensor, labels: Tensor) -> float:
    """Return the share (0 to 1) of samples whose nearest other sample has their label."""
    features = F.normalize(features.float(), dim=1)
    correct = 0
    for start in range(0, len(features), CHUNK):
        similarity = features[start : start + CHUNK] @ features.T
        rows = torch.arange(len(similarity), device=features.device)
        similarity[rows, rows + start] = -torch.inf
        correct += int((labels[similarity.argmax(dim=1)] == labels[start : start + CHUNK]).sum())
    return correct / len(features)


def gallery(features: Tensor, labels: Tensor, gallery_features: Tensor, gallery_labels: Tensor, *, k: int,
            temperature: float) -> float:  # fmt: skip
    """Return the share (0 to 1) of samples whose k nearest gallery samples elect their label by weighted votes."""
    features, gallery_features = (F.normalize(x.float(), dim=1) for x in (features, gallery_features))
    classes = int(max(labels.max(), gallery_labels.max())) + 1
    k = min(k, len(gallery_features))
    correct = 0
    for start in range(0, len(features), CHUNK):
        similarity, nearest = (features[start : start + CHUNK] @ gallery_features.T).topk(k, dim=1)
        votes = torch.zeros(len(similarity), classes, device=features.device)
        votes.scatter_add_(1, gallery_labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels[start : start + CHUNK]).sum())
    return correct / len(features)


def check_labels(index: ShardIndex | None, key: str) -> None:
    """Raise unless every sample has a label and there are two samples at least."""
    if index is None:
        raise ConfigError(f"{key} is empty: give a folder of labelled shards")
    if len(index) < 2 or (index.labels() < 0).any():
        raise ConfigError(
            f"{key} ({index.folder}) needs two images or more, each with a label, for nearest neighbours: "
            "shard a folder with one subfolder a class; to train without, set data.eval= (empty)"
        )


def online_accuracy(encoder: VisionTransformer, index: ShardIndex, config: Config, topology: Topology,
                    stopping: Callable[[], bool]) -> float | None:  # fmt: skip
    """Return the leave-one-out accuracy that the training loop reports; None where the run is to stop meanwhile."""
    found = extract(patch_mean(encoder), index, config, topology, stopping)
    if found is None:
        return None
    features, labels = found
    return leave_one_out(features.to(topology.device), labels.to(topology.device))


def evaluate_checkpoint(config: Config, checkpoint: Path, which: str) -> dict[str, dict[str, float]] | None:
    """Measure both protocols for raw pixels, the encoder as initialised and as trained; write and return them.

    Runs on every rank of a launcher, or alone. The first rank writes `knn.json` into `run.folder` if that exists and
    returns {features: {"leave_one_out": share, "gallery": share}}; the others return None.
    """
    topology, folder = discover(), Path(config.run.folder)
    validate(config, world_size=1)
    heads = model_dimensions(config.model)["num_heads"]
    trained = load_encoder(checkpoint, which, num_heads=heads if checkpoint.is_file() else None)
    random = LatentMIM(config.model, config.objective)
    theirs, ours = ({f"{which}.{name}": tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
                    for encoder in (trained, random.online))  # fmt: skip
    check_same_tensors(theirs, ours, checkpoint)
    random.init_weights(config.run.seed)
    init(topology, config.parallel.timeout_minutes)
    try:
        train, test = open_data(config, topology)
        check_labels(test, "data.eval")
        if train is not None and (train.labels() < 0).any():
            logger.warning("data.train has no labels, so the gallery protocol is left out")
            train = None
        encoders = (("random", random.online), (which, trained))
        maps = {"pixels": raw_pixels} | {name: patch_mean(e.to(topology.device).eval()) for name, e in encoders}
        results = {name: _both_protocols(function, test, train, config, topology) for name, function in maps.items()}
    except BaseException as error:
        fail(error)
        raise
    finally:
        shutdown()
    if not topology.is_main:
        return None
    if folder.is_dir():
        path = folder / RESULTS_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(read_results(folder) | results, indent=1) + "\n")
        temporary.replace(path)
    return results


def read_results(run_folder: Path) -> dict[str, dict[str, float | None]]:
    """Return what `knn.json` of a run folder holds; nothing where it is missing or damaged."""
    try:
        content = json.loads((run_folder / RESULTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _both_protocols(function: Callable[[Tensor], Tensor], test: ShardIndex, train: ShardIndex | None, config: Config,
                    topology: Topology) -> dict[str, float | None]:  # fmt: skip
    x, y = (t.to(topology.device) for t in extract(function, test, config, topology))
    alone = round(leave_one_out(x, y), 5)
    if train is None:
        return dict(leave_one_out=alone, gallery=None)
    gallery_x, gallery_y = (t.to(topology.device) for t in extract(function, train, config, topology))
    votes = gallery(x, y, gallery_x, gallery_y, k=config.eval.k, temperature=config.eval.temperature)
    return dict(leave_one_out=alone, gallery=round(votes, 5))
