"""The linear probe: a softmax layer on frozen features, many settings of it trained together.

Owns the heads and their choice. Features of the training images are taken once, without augmentation, for every block
and pooling that is tried; then one pass of SGD trains a head for each of them and each learning rate, those of one
feature stacked in one tensor (as DINOv2 does, arXiv:2304.07193). A held-out part of the training images chooses the
setting, by its loss, which scatters less than accuracy; a head of that setting is then fitted to all training images,
and that one alone is judged on the evaluation images.

With `probe.batch_norm` features are standardised over the training images: batch norm without scale and shift (MAE,
arXiv:2111.06377, A.1), whose running statistics are exact here, as features do not change.
Weight decay is that of scikit-learn's LogisticRegression as it comes (C = 1), unless set. Beside that, on the 10,000
standardised features of the embedded images, in percent for patch mean, class token and both: 81.50, 79.85, 82.65 and
theirs 81.35, 79.75, 82.60 with quickstart's encoder; 77.35, 76.90, 79.25 and theirs 77.05, 76.70, 79.30 with an
untrained one.

The invariant: heads differ in nothing but feature and rate (they start at zero and see the same batches), so ranks may
train some each.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim import dist
from lmim.dist import Topology
from lmim.eval.case import Case, check_classes, check_labels, check_several_classes, class_count, opened
from lmim.eval.features import Features, Reading, Subject, check_readings
from lmim.options import Config, ProbeConfig

MOMENTUM = 0.9
CHUNK = 4096


class Head(NamedTuple):
    """A setting that is tried; the learning rate is that of a batch of 256."""

    reading: Reading
    learning_rate: float


class Trained(NamedTuple):
    """The heads of one feature: weights (D, H, C) and biases (H, C), and what is taken off features before."""

    weights: Tensor
    biases: Tensor
    mean: Tensor
    std: Tensor

    def standardized(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def logits(self, standardized: Tensor) -> Tensor:
        """Return (B, H, C) of standardised features (B, D), by one product for all heads."""
        return (standardized @ self.weights.flatten(1)).unflatten(1, self.biases.shape) + self.biases


def fit(x: Tensor, labels: Tensor, classes: int, rates: list[float], probe: ProbeConfig, seed: int,
        device: torch.device) -> Trained:  # fmt: skip
    """Train a head for each learning rate on features (n, D) by SGD with momentum and a cosine to zero."""
    n, dim = x.shape
    mean, std = torch.zeros(dim), torch.ones(dim)
    if probe.batch_norm:
        std, mean = torch.std_mean(x.double(), dim=0, correction=0)
        std = torch.where(std > 1e-6 * std.max(), std, 1).float()  # what never varies says nothing
        mean = mean.float()
    heads = Trained(torch.zeros(dim, len(rates), classes, device=device),
                    torch.zeros(len(rates), classes, device=device), mean.to(device), std.to(device))  # fmt: skip
    peak_H1 = torch.tensor(rates, device=device)[:, None] * probe.batch / 256
    velocity_w, velocity_b = torch.zeros_like(heads.weights), torch.zeros_like(heads.biases)
    x, generator = (x - mean).div_(std), torch.Generator().manual_seed(seed)
    decay = 1 / n if probe.weight_decay is None else probe.weight_decay
    steps_per_epoch = math.ceil(n / probe.batch)
    epochs = max(probe.epochs, math.ceil(probe.least_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        dist.progress()
        for step, rows in enumerate(torch.randperm(n, generator=generator).split(probe.batch)):
            batch, targets = x[rows].to(device), F.one_hot(labels[rows], classes).to(device)
            # the gradient of the mean cross-entropy, by hand: softmax less one-hot
            error_BHC = (heads.logits(batch).softmax(dim=-1) - targets[:, None]) / len(rows)
            gradient_DHC = (batch.T @ error_BHC.flatten(1)).view_as(heads.weights)
            rate_H1 = peak_H1 * 0.5 * (1 + math.cos(math.pi * (epoch * steps_per_epoch + step) / total))
            velocity_w.mul_(MOMENTUM).add_(gradient_DHC + decay * heads.weights)
            velocity_b.mul_(MOMENTUM).add_(error_BHC.sum(dim=0))
            heads.weights.sub_(rate_H1 * velocity_w)
            heads.biases.sub_(rate_H1 * velocity_b)
    return heads


class Judged(NamedTuple):
    """What a head comes to on some images; one that diverged has accuracy 0 and an infinite loss."""

    accuracy: float  # 0 to 1
    loss: float  # mean cross-entropy


def judge(heads: Trained, x: Tensor, labels: Tensor) -> list[Judged]:
    """Judge each head on features (n, D)."""
    device = heads.weights.device
    correct, loss = torch.zeros(2, len(heads.biases), device=device)
    for rows, targets in zip(x.split(CHUNK), labels.to(device).split(CHUNK), strict=True):
        logits_BHC = heads.logits(heads.standardized(rows.to(device)))
        correct += (logits_BHC.argmax(dim=-1) == targets[:, None]).sum(dim=0)
        of_all = targets[:, None].expand(logits_BHC.shape[:2])
        loss += F.cross_entropy(logits_BHC.transpose(1, 2), of_all, reduction="none").sum(dim=0)
    finite = heads.weights.isfinite().all(dim=2).all(dim=0) & loss.isfinite()
    accuracies, losses = correct * finite / len(x), torch.where(finite, loss / len(x), torch.inf)
    return [Judged(*one) for one in zip(accuracies.tolist(), losses.tolist(), strict=True)]


def held_out_split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the places of the training samples that heads are fitted to, and of those that choose among heads."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = min(max(round(share * count), 1), count - 1)
    return order[held_out:].sort().values, order[:held_out].sort().values


def probe_features(train: Features, test: Features, readings: list[Reading], config: Config,
                   topology: Topology) -> dict[str, Any]:  # fmt: skip
    """Train all heads on features and return the setting that the held-out part prefers, and what it comes to."""
    probe, classes = config.probe, class_count(train.labels, test.labels)
    fitted, held_out = held_out_split(len(train.labels), probe.held_out, config.run.seed)
    heads = [Head(reading, rate) for reading in dict.fromkeys(readings) for rate in probe.learning_rates]
    mine, found = heads[topology.rank :: topology.world_size], {}
    for reading in dict.fromkeys(head.reading for head in mine):
        own = [head for head in mine if head.reading == reading]
        x = train.by(reading)
        trained = fit(x[fitted], train.labels[fitted], classes, [head.learning_rate for head in own], probe,
                      config.run.seed, topology.device)  # fmt: skip
        found |= dict(zip(own, judge(trained, x[held_out], train.labels[held_out]), strict=True))
    found = {head: judged for part in dist.gather_objects(found) for head, judged in part.items()}
    best = min(heads, key=lambda head: found[head].loss)  # of equals the first
    accuracy = 0.0
    if topology.is_main:  # the others wait for it
        last = fit(train.by(best.reading), train.labels, classes, [best.learning_rate], probe, config.run.seed,
                   topology.device)  # fmt: skip
        accuracy = judge(last, test.by(best.reading), test.labels)[0].accuracy
    return dict(
        accuracy=round(dist.gather_objects(accuracy)[0], 5),
        held_out=round(found[best].accuracy, 5),
        layer=best.reading.layer,
        pooling=best.reading.pooling,
        learning_rate=best.learning_rate,
        heads=[dict(layer=head.reading.layer, pooling=head.reading.pooling, learning_rate=head.learning_rate,
                    held_out=round(found[head].accuracy, 5), held_out_loss=_or_null(found[head].loss))
               for head in heads],
    )  # fmt: skip


def _or_null(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None  # JSON knows no infinity


def readings_of(config: Config) -> list[Reading]:
    """Return the readings that `probe` wants tried; the predictor reads the last block only."""
    probe = config.probe
    return [Reading(layer, pooling, config.eval.norm) for pooling in probe.poolings
            for layer in (probe.layers if pooling != "predictor" else [-1])]  # fmt: skip


def evaluate_checkpoint(config: Config, checkpoint: Path, which: str) -> dict[str, Any] | None:
    """Measure linear-probe accuracy of raw pixels, the encoder as initialised and as trained.

    The first rank adds a row to `evaluations.jsonl` and returns {features: {"accuracy", "held_out", the setting}}.
    """
    with opened(config, checkpoint, which, readings_of(config), "probe.layers") as case:
        check_labels(case.train, "data.train")
        check_several_classes(case.train)
        check_classes(case.train, case.test)
        results = {subject.name: _of_subject(case, subject) for subject in case.subjects}
    return case.record("linear", results)


def _of_subject(case: Case, subject: Subject) -> dict[str, Any]:
    readings = check_readings(readings_of(case.config), subject, "probe.layers")
    train = case.features(subject, readings, case.train)
    test = case.features(subject, readings, case.test)
    found = probe_features(train, test, readings, case.config, case.topology)
    return found if subject.encoder is not None else {k: v for k, v in found.items() if k not in ("layer", "pooling")}
