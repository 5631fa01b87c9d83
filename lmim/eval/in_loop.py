"""The cheap evaluations while a run trains: what each is called, and how one pass over the images serves them all.

Owns which evaluations the loop may ask for. The invariant: an evaluation gives what its command gives for the same
weights, and a request to stop ends it on all ranks at the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

from lmim.config import ConfigError, neighbours_of
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval import fewshot, knn
from lmim.eval.case import check_classes, check_labels
from lmim.eval.features import Features, Subject, check_readings, eval_sizes, extract, reading_of
from lmim.options import Config
from lmim.vit import VisionTransformer

EVALUATIONS = ("knn", "gallery", "fewshot")  # each due after `eval.NAME_every`


def check(names: Sequence[str], config: Config, train: ShardIndex, test: ShardIndex | None) -> None:
    """Raise ConfigError unless the data and the options allow the evaluations of these names."""
    if test is None or not names:
        return
    eval_sizes(config)
    check_labels(test, "data.eval")
    if config.eval.pooling == "predictor":
        raise ConfigError("eval.pooling (predictor) cannot be read while training, where the encoder alone is lent: "
                          "evaluate a checkpoint by it (lmim eval), or set eval.knn_every=0st")  # fmt: skip
    if {"gallery", "fewshot"} & {*names}:
        check_labels(train, "data.train")
        check_classes(train, test)
    if "fewshot" in names:
        fewshot.check_shots(train, config.probe)


def evaluate(names: Sequence[str], encoder: VisionTransformer, train: ShardIndex, test: ShardIndex, config: Config,
             topology: Topology, stopping: Callable[[], bool]) -> dict[str, float] | None:  # fmt: skip
    """Return accuracies (0 to 1) on `data.eval` by their names in `eval.jsonl`; None where the run is to stop.

    A collective. `knn_leave_one_out`; `knn_gallery`; `fewshot_N`, the mean over trials of N shots.
    """
    subject, view = Subject("encoder", encoder), eval_sizes(config)
    (reading,) = check_readings([reading_of(config)], subject, "eval.layer")

    def features(index: ShardIndex, ids: np.ndarray | None = None) -> Features | None:
        return extract(subject, [reading], index, view, config, topology, ids=ids, stopping=stopping)

    found: dict[str, float] = {}
    of_test = features(test)
    if of_test is None:
        return None
    x, y = of_test.by(reading).to(topology.device), of_test.labels.to(topology.device)
    if "knn" in names:
        found["knn_leave_one_out"] = round(knn.leave_one_out(x, y, topology), 5)
    if "gallery" in names:
        of_train = features(train, knn.gallery_ids(len(train), config))
        if of_train is None:
            return None
        shares = knn.gallery_of_each(x, y, of_train.by(reading).to(topology.device),
                                     of_train.labels.to(topology.device), ks=neighbours_of(config.eval)[:1],
                                     temperature=config.eval.temperature, topology=topology)  # fmt: skip
        found["knn_gallery"] = round(next(iter(shares.values())), 5)
    if "fewshot" in names:
        of_train = features(train, fewshot.support_ids(train, config))
        if of_train is None:
            return None
        by_shots = fewshot.accuracies(of_test, of_train, reading, train.labels(), config, topology)
        found |= {f"fewshot_{shots}": round(fmean(values), 5) for shots, values in by_shots.items()}
    return found
