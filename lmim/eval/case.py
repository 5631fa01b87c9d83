"""What one evaluation has before it: encoders and what they are compared with, the data, and the ranks that measure.

Owns the opening and the checks that all evaluations share. The invariant: what is wrong with the encoder or the options
is said before any rank waits for another, and every way out leaves the process group.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lmim.config import ConfigError, check
from lmim.data.loader import open_data
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval.feature_cache import FeatureCache
from lmim.eval.features import Features, Reading, Subject, View, check_readings, eval_sizes, extract
from lmim.eval.results import record
from lmim.eval.session import encoder_of, on_ranks
from lmim.formats import build_decoder, read_weights
from lmim.options import Config
from lmim.vit import init_parameters

logger = logging.getLogger(__name__)
MOST_CLASSES = 100_000  # a classifier has an output for every number up to the largest label


@dataclass(frozen=True)
class Case:
    """Everything that an evaluation reads; the encoder under evaluation is the last subject."""

    config: Config
    topology: Topology
    subjects: list[Subject]
    view: View
    train: ShardIndex | None
    test: ShardIndex
    source: Path
    which: str
    cache: FeatureCache | None

    def features(self, subject: Subject, readings: list[Reading], index: ShardIndex,
                 ids: np.ndarray | None = None) -> Features:  # fmt: skip
        """Return the features of an index by readings that `check_readings` returned."""
        found = extract(subject, readings, index, self.view, self.config, self.topology, ids=ids, cache=self.cache)
        assert found is not None
        return found

    def record(self, evaluation: str, figures: dict[str, Any]) -> dict[str, Any] | None:
        """Add the figures to the run folder and return them on the first rank; the others get None."""
        if not self.topology.is_main:
            return None
        record(Path(self.config.run.folder), evaluation, figures, source=self.source, which=self.which)
        return figures


@contextmanager
def opened(config: Config, source: Path, which: str, readings: list[Reading], option: str = "eval.layer", *,
           pixels: bool = True) -> Iterator[Case]:  # fmt: skip
    """Open encoder and data for an evaluation that uses some readings, on every rank of a launcher or alone.

    `option` is what complaints about a reading's layer call it. Raises ConfigError.
    """
    check(config)
    weights = read_weights(source)
    encoder = encoder_of(config, weights, which)
    view = eval_sizes(config, encoder)
    subject = Subject(which, encoder)
    if any(reading.pooling == "predictor" for reading in readings):
        subject = Subject(which, encoder, build_decoder(weights, grid=view.crop // encoder.patch_size))
    check_readings(readings, subject, option)
    subjects = [*_baselines(config, subject, pixels), subject]
    cache = FeatureCache(Path(config.eval.cache), config.eval.cache_gb * 1e9) if config.eval.cache else None
    with on_ranks(config) as topology:
        for one in subjects:
            for network in (one.encoder, one.decoder):
                if network is not None:
                    network.to(topology.device).eval()
        train, test = open_data(config, topology)
        check_labels(test, "data.eval")
        yield Case(config, topology, subjects, view, train, test, source, which, cache)


def _baselines(config: Config, subject: Subject, pixels: bool) -> list[Subject]:
    """Return what `eval.baselines` names: raw pixels, and a network of the subject's shape as it is initialised."""
    found = []
    if "pixels" in config.eval.baselines and pixels:
        found.append(Subject("pixels"))
    if "random" in config.eval.baselines:
        encoder = copy.deepcopy(subject.encoder)
        init_parameters(encoder, config.run.seed, "online.")  # as the run's own encoder began
        decoder = copy.deepcopy(subject.decoder)
        if decoder is not None:
            init_parameters(decoder, config.run.seed, "decoder.")
        found.append(Subject("random", encoder, decoder))
    return found


# --- labels ----------------------------------------------------------------------------------------------------------


def check_labels(index: ShardIndex | None, key: str) -> None:
    """Raise unless every sample has a label and there are two samples at least."""
    if index is None:
        raise ConfigError(f"{key} is empty: give a folder of labelled shards")
    if len(index) < 2 or (index.labels() < 0).any():
        wanted = "to train without, set data.eval= (empty)" if key == "data.eval" else "or give one that has them"
        raise ConfigError(f"{key} ({index.folder}) needs two images or more, each with a label: shard a folder with "
                          f"one subfolder a class; {wanted}")  # fmt: skip
    if index.labels().max() >= MOST_CLASSES:
        raise ConfigError(f"{key} ({index.folder}) has the label {index.labels().max()}: number classes from 0 on, "
                          f"{MOST_CLASSES} at most")  # fmt: skip


def check_classes(train: ShardIndex, test: ShardIndex) -> None:
    """Raise unless training and evaluation images share their classes, as far as the latter need."""
    if train.classes and test.classes and train.classes != test.classes:
        shared = min(len(train.classes), len(test.classes))
        number = next((n for n in range(shared) if train.classes[n] != test.classes[n]), shared)
        words = [f"{index.classes[number]}" if number < len(index.classes) else "none" for index in (train, test)]
        raise ConfigError(f"data.train and data.eval number their classes differently: class {number} is {words[0]} "
                          f"in the one and {words[1]} in the other: shard both with the same classes")  # fmt: skip
    missing = sorted({*test.labels().tolist()} - {*train.labels().tolist()})
    if missing:
        name = class_name(test, missing[0])
        raise ConfigError(f"data.train ({train.folder}) has no image of class {name}, which data.eval holds"
                          + (f" (nor of {len(missing) - 1} others)" if len(missing) > 1 else "")
                          + ": give training images of every class, or evaluation images of those alone")  # fmt: skip


def check_several_classes(train: ShardIndex) -> None:
    """Raise where all training images are of one class: there is nothing to tell apart."""
    if len(np.unique(train.labels())) < 2:
        raise ConfigError(f"data.train ({train.folder}) holds images of one class only: a classifier needs two or more")


def class_name(index: ShardIndex, label: int) -> str:
    """Return a class's number, and its name where the index knows it."""
    return f"{label} ({index.classes[label]})" if index.classes and label < len(index.classes) else str(label)


def class_count(*labels: Tensor) -> int:
    """Return how many classes there are at least: the largest label and one."""
    return int(max(part.max() for part in labels)) + 1
