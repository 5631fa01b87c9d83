"""Nearest-neighbour accuracy, by the two protocols of the field.

* `leave_one_out`, the released evaluator's: 1-NN inside the evaluation set, each image against all others.
* `gallery`, the common one: the training set as gallery, k = 20 votes weighted by exp(cosine / 0.07)
  (arXiv:1805.01978).

Both use cosine similarity of the features. The invariant: neighbours are a function of the features' values alone, not
of ranks and batches, which move features by float rounding. So candidates found in fp32 are measured again in fp64, and
those whose distance differs by less than `TIE` count as equally near: the lower number comes first. Between classes
with equal votes the lower number wins.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim import dist
from lmim.config import neighbours_of
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval.case import Case, check_classes, class_count, opened
from lmim.eval.features import Features, Reading, Subject, check_readings, reading_of
from lmim.eval.results import told_if_not_written
from lmim.options import Config

logger = logging.getLogger(__name__)
CHUNK = 256  # queries at a time
MARGIN = 32  # candidates beyond k, among which fp64 and ties may change the order; more equal images are not seen
TIE = 1e-6  # of distances between features of length 1; float rounding moves them by 3e-7
RESULTS_FILE = "knn.json"


def neighbours(queries: Tensor, gallery: Tensor, k: int, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (cosines fp64, numbers) of the k nearest gallery features of each query, nearest first: (n, k) each.

    `first` says that the queries are the gallery's own, from that number on: none is its own neighbour.
    """
    most = len(gallery) - (first is not None)
    k = min(k, most)
    units = F.normalize(gallery.float(), dim=1)
    cosines, numbers = [], []
    for start in range(0, len(queries), CHUNK):
        chunk = queries[start : start + CHUNK]
        similarity = F.normalize(chunk.float(), dim=1) @ units.T
        if first is not None:
            rows = torch.arange(len(chunk), device=chunk.device)
            similarity[rows, rows + first + start] = -torch.inf
        found = similarity.topk(min(k + MARGIN, most), dim=1).indices
        near, here = (F.normalize(x.double(), dim=-1) for x in (gallery[found], chunk))
        distance, order = (near - here[:, None]).norm(dim=-1).sort(dim=1)
        found = found.gather(1, order)
        apart = distance.diff(dim=1, prepend=distance[:, :1]) >= TIE
        order = (apart.cumsum(dim=1) * len(gallery) + found).argsort(dim=1)[:, :k]
        cosines.append(1 - distance.gather(1, order).square() / 2)
        numbers.append(found.gather(1, order))
    return torch.cat(cosines), torch.cat(numbers)


def votes(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Return the class (n,) that neighbours with these cosines and labels (n, k) elect."""
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    return torch.zeros(len(labels), classes, dtype=weights.dtype, device=weights.device).scatter_add_(
        1, labels, weights).argmax(dim=1)  # fmt: skip


def leave_one_out(features: Tensor, labels: Tensor, topology: Topology | None = None) -> float:
    """Return the share (0 to 1) of samples whose nearest other sample has their label; ranks search a part each."""
    mine = _own(len(features), topology)
    if mine.start == mine.stop:
        return _share_over_ranks(torch.zeros(0), len(features))
    nearest = neighbours(features[mine], features, 1, first=mine.start)[1][:, 0]
    return _share_over_ranks(labels[nearest] == labels[mine], len(features))


def gallery(features: Tensor, labels: Tensor, gallery_features: Tensor, gallery_labels: Tensor, *, k: int,
            temperature: float, topology: Topology | None = None) -> float:  # fmt: skip
    """Return the share (0 to 1) of samples whose k nearest gallery samples elect their label by weighted votes."""
    return gallery_of_each(features, labels, gallery_features, gallery_labels, ks=[k], temperature=temperature,
                           topology=topology)[k]  # fmt: skip


def gallery_of_each(
    features: Tensor,
    labels: Tensor,
    gallery_features: Tensor,
    gallery_labels: Tensor,
    *,
    ks: list[int],
    temperature: float,
    topology: Topology | None = None,
) -> dict[int, float]:
    """Return `gallery` for each k, from one search."""
    mine, classes = _own(len(features), topology), class_count(labels, gallery_labels)
    correct = {k: torch.zeros(0) for k in ks}
    if mine.start < mine.stop:
        cosines, numbers = neighbours(features[mine], gallery_features, max(ks))
        near = gallery_labels[numbers]
        correct = {k: votes(cosines[:, :k], near[:, :k], classes, temperature) == labels[mine] for k in ks}
    return {k: _share_over_ranks(correct[k], len(features)) for k in ks}


def _own(count: int, topology: Topology | None) -> slice:
    """Return the part of so many rows that this rank searches."""
    rank, ranks = (topology.rank, topology.world_size) if topology else (0, 1)
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def _share_over_ranks(correct: Tensor, count: int) -> float:
    return sum(dist.gather_objects(int(correct.sum()))) / count


def protocols(test: Features, train: Features | None, reading: Reading, config: Config,
              topology: Topology) -> dict[str, float | None]:  # fmt: skip
    """Return both protocols' accuracies: `leave_one_out`, `gallery` (by the first of `eval.k`), and by each k if many.

    `gallery` is None without training features.
    """
    x, y = test.by(reading).to(topology.device), test.labels.to(topology.device)
    found: dict[str, float | None] = dict(leave_one_out=round(leave_one_out(x, y, topology), 5), gallery=None)
    if train is None:
        return found
    ks = neighbours_of(config.eval)
    shares = gallery_of_each(x, y, train.by(reading).to(topology.device), train.labels.to(topology.device), ks=ks,
                             temperature=config.eval.temperature, topology=topology)  # fmt: skip
    found["gallery"] = round(shares[ks[0]], 5)
    return found | ({f"gallery_{k}": round(shares[k], 5) for k in ks} if len(ks) > 1 else {})


def evaluate_checkpoint(config: Config, checkpoint: Path, which: str) -> dict[str, dict[str, float | None]] | None:
    """Measure both protocols for raw pixels, the encoder as initialised and as trained; write and return them.

    Runs on every rank of a launcher, or alone. The first rank writes `knn.json` and a row of `evaluations.jsonl` into
    `run.folder` if that exists and returns {features: {"leave_one_out": share, "gallery": share}}; the others return
    None.
    """
    with opened(config, checkpoint, which, [reading_of(config)]) as case:
        train = case.train
        if train is not None and (train.labels() < 0).any():
            logger.warning("data.train has no labels, so the gallery protocol is left out")
            train = None
        if train is not None:
            check_classes(train, case.test)
            if gallery_ids(len(train), config) is not None and case.topology.is_main:
                logger.warning("the gallery is %d of %d training images (eval.gallery_images)",
                               config.eval.gallery_images, len(train))  # fmt: skip
        results = {subject.name: _of_subject(case, subject, train) for subject in case.subjects}
    found = case.record("knn", results)
    folder = Path(config.run.folder)
    if found is not None and folder.is_dir():
        with told_if_not_written(folder / RESULTS_FILE) as path:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(read_results(folder) | results, indent=1) + "\n")
            temporary.replace(path)
    return found


def _of_subject(case: Case, subject: Subject, train: ShardIndex | None) -> dict[str, float | None]:
    (reading,) = check_readings([reading_of(case.config)], subject, "eval.layer")
    test = case.features(subject, [reading], case.test)
    gallery_features = None
    if train is not None:
        gallery_features = case.features(subject, [reading], train, gallery_ids(len(train), case.config))
    return protocols(test, gallery_features, reading, case.config, case.topology)


def gallery_ids(count: int, config: Config) -> np.ndarray | None:
    """Return the numbers of the training images that make the gallery, evenly spread; None for all."""
    most = config.eval.gallery_images
    return None if most is None or most >= count else np.linspace(0, count - 1, most).astype(np.int64)


def read_results(run_folder: Path) -> dict[str, dict[str, float | None]]:
    """Return what `knn.json` of a run folder holds; nothing where it is missing or damaged."""
    try:
        content = json.loads((run_folder / RESULTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
