"""Few-shot accuracy: a linear classifier on frozen features of n training images a class, drawn several times.

Owns the draws, ridge regression in closed form, logistic regression, and the interval over the draws. The invariants: a
draw is a function of seed, trial and the labels, and that of fewer shots is the beginning of that of more; nothing that
is fitted has seen an evaluation image.

Features are standardised by mean and deviation of the drawn images. Ridge is scikit-learn's `RidgeClassifier` (targets
±1, an intercept, the penalty not on it), solved in fp64 in whichever of the two forms is smaller. Logistic regression
minimises scikit-learn's `LogisticRegression`: Σ cross-entropy + l2/2 · ‖W‖², so its C is 1/l2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim import dist
from lmim.config import ConfigError
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval.case import check_classes, check_labels, check_several_classes, class_count, class_name, opened
from lmim.eval.features import Features, Reading, check_readings, reading_of
from lmim.options import Config, ProbeConfig

CONFIDENCE = 0.95
RIDGE_PER_WIDTH = 0.1  # the default penalty: standardised features of width D have length √D
LBFGS_STEPS = 500


def ridge(x: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Return weights (D, classes) and intercepts (classes,) of ridge regression of x (n, D) to targets ±1."""
    targets = 2 * F.one_hot(labels, classes).to(x) - 1
    mean_x, mean_y = x.mean(dim=0), targets.mean(dim=0)
    x, targets = x - mean_x, targets - mean_y
    n, dim = x.shape
    if n < dim:
        weights = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(n).to(x), targets)
    else:
        weights = torch.linalg.solve(x.T @ x + l2 * torch.eye(dim).to(x), x.T @ targets)
    return weights, mean_y - mean_x @ weights


def logistic(x: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Return weights (D, classes) and intercepts of multinomial logistic regression with the penalty l2/2 · ‖W‖²."""
    weights = torch.zeros(x.shape[1], classes).to(x).requires_grad_()
    intercepts = torch.zeros(classes).to(x).requires_grad_()
    solver = torch.optim.LBFGS([weights, intercepts], max_iter=LBFGS_STEPS, history_size=20, tolerance_grad=1e-7,
                               tolerance_change=1e-12, line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        # a mean, which the solver's tolerances are made for
        value = F.cross_entropy(x @ weights + intercepts, labels) + l2 / (2 * len(x)) * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weights.detach(), intercepts.detach()


Fit = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
CLASSIFIERS: dict[str, Fit] = {"ridge": ridge, "logistic": logistic}


def penalty(probe: ProbeConfig, width: int) -> float:
    """Return `probe.l2`, or the default of the classifier."""
    if probe.l2 is not None:
        return probe.l2
    return RIDGE_PER_WIDTH * width if probe.classifier == "ridge" else 1.0


def predict(support: Tensor, labels: Tensor, queries: Tensor, classes: int, probe: ProbeConfig) -> Tensor:
    """Return the class (n,) of each query by the classifier that is fitted to the support, all in fp64."""
    support, queries = support.double(), queries.double()
    std, mean = torch.std_mean(support, dim=0, correction=0)
    std = torch.where(std > 0, std, 1)  # what never varies stays as it is
    support, queries = (support - mean) / std, (queries - mean) / std
    weights, intercepts = CLASSIFIERS[probe.classifier](support, labels, classes, penalty(probe, support.shape[1]))
    return (queries @ weights + intercepts).argmax(dim=1)


def draw(labels: np.ndarray, shots: int, seed: int, trial: int) -> np.ndarray:
    """Return the places of `shots` samples of every class in a trial, each class's beginning with those of fewer."""
    order = np.random.default_rng([seed, trial]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, shuffled inside
    starts = np.searchsorted(labels[order], np.unique(labels))
    return order[(starts[:, None] + np.arange(shots)).ravel()]


def interval(values: list[float]) -> float:
    """Return half the width of the mean's 95 % confidence interval, by Student's t; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t: exact for 1 and 2 degrees of freedom, else to 1 %.

    By the expansion about the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    p = 0.5 + confidence / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)  # fmt: skip
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def support_ids(index: ShardIndex, config: Config) -> np.ndarray:
    """Return the training samples that some trial draws, in order: no others need features."""
    labels, probe = index.labels(), config.probe
    draws = [draw(labels, max(probe.shots), config.run.seed, trial) for trial in range(probe.trials)]
    return np.unique(np.concatenate(draws))


def check_shots(train: ShardIndex, probe: ProbeConfig) -> None:
    """Raise unless there are two classes, and of each as many training images as the most shots."""
    check_several_classes(train)
    labels = train.labels()
    values, counts = np.unique(labels, return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < max(probe.shots):
        words = f"{counts[fewest]} {'image' if counts[fewest] == 1 else 'images'} of class"
        name = class_name(train, int(values[fewest]))
        raise ConfigError(
            f"data.train ({train.folder}) holds {words} {name}, fewer than "
            f"probe.shots ({probe.shots}) asks for: at most {counts[fewest]}, or more images"
        )


def accuracies(test: Features, support: Features, reading: Reading, train_labels: np.ndarray, config: Config,
               topology: Topology) -> dict[int, list[float]]:  # fmt: skip
    """Return for each number of shots every trial's accuracy (0 to 1) on the evaluation images; ranks share trials.

    An image that could not be read is missing from its draw.
    """
    probe, device = config.probe, topology.device
    queries, labels = test.by(reading).to(device), test.labels.to(device)
    rows, known = support.by(reading).to(device), support.labels.to(device)
    classes = class_count(labels, known)
    jobs = [(shots, trial) for shots in probe.shots for trial in range(probe.trials)]
    mine = {}
    for shots, trial in jobs[topology.rank :: topology.world_size]:
        dist.progress()
        wanted = draw(train_labels, shots, config.run.seed, trial)
        places = torch.from_numpy(np.flatnonzero(np.isin(support.ids.numpy(), wanted))).to(device)
        found = predict(rows[places], known[places], queries, classes, probe)
        mine[shots, trial] = float((found == labels).double().mean())
    all_ranks = {job: value for part in dist.gather_objects(mine) for job, value in part.items()}
    return {shots: [all_ranks[shots, trial] for trial in range(probe.trials)] for shots in probe.shots}


def summary(by_shots: dict[int, list[float]]) -> dict[str, dict[str, float]]:
    """Return mean accuracy and half of its 95 % interval by the number of shots, as JSON keys."""
    return {str(shots): dict(accuracy=round(fmean(values), 5), interval=round(interval(values), 5))
            for shots, values in by_shots.items()}  # fmt: skip


def evaluate_checkpoint(config: Config, checkpoint: Path, which: str) -> dict[str, Any] | None:
    """Measure few-shot accuracy of raw pixels, the encoder as initialised and as trained.

    The first rank adds a row to `evaluations.jsonl` and returns {features: {shots: {"accuracy", "interval"}}}.
    """
    with opened(config, checkpoint, which, [reading_of(config)]) as case:
        train, results = case.train, {}
        check_labels(train, "data.train")
        check_classes(train, case.test)
        check_shots(train, config.probe)
        for subject in case.subjects:
            readings = check_readings([reading_of(config)], subject, "eval.layer")
            test = case.features(subject, readings, case.test)
            support = case.features(subject, readings, train, support_ids(train, config))
            results[subject.name] = summary(
                accuracies(test, support, readings[0], train.labels(), config, case.topology)
            )
    return case.record("fewshot", results)
