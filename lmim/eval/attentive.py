"""The attentive probe: one learned query attends to an encoder's patch tokens, and a linear layer reads what it gets.

Owns the probe and its training. It can say what patch tokens hold where no single average of them does (V-JEPA,
arXiv:2404.08471; CAPI, arXiv:2502.08769). The encoder is frozen; probes of several learning rates train together on the
same tokens, and the best on a held-out part of the training images is judged on the evaluation images.

The invariants: a batch is a function of seed and step alone, and the gradient is its sum over all images, whichever
rank has each. A rank has the tokens of its own images only: it keeps them in memory where `probe.memory_gb` allows,
else it encodes its images anew in every epoch.

Letters: B images · N patch tokens · D width · C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim import dist
from lmim.data.loader import UNREADABLE
from lmim.data.shards import ShardIndex
from lmim.eval.case import Case, check_classes, check_labels, check_several_classes, opened
from lmim.eval.features import Reading, Subject, check_readings, image_batches, none_readable
from lmim.eval.linear import held_out_split
from lmim.options import Config
from lmim.patches import normalize_images
from lmim.vit import NORM_EPS, CrossAttention, init_parameters

BETAS = (0.9, 0.999)


class AttentiveProbe(nn.Module):
    """Patch tokens (B, N, D) to class scores (B, C): LN, cross-attention of a learned query, LN, linear layer."""

    def __init__(self, dim: int, num_heads: int, classes: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))  # the query
        self.norm_tokens = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = CrossAttention(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        query_B1D = self.cls_token.expand(len(tokens_BND), -1, -1)
        return self.head(self.norm(self.attn(query_B1D, self.norm_tokens(tokens_BND))[:, 0]))


class Tokens:
    """The patch tokens of this rank's share of an index, by sample id; from memory where they fit."""

    def __init__(self, case: Case, subject: Subject, reading: Reading, index: ShardIndex):
        self.case, self.subject, self.reading, self.index = case, subject, reading, index
        self.labels = index.labels()
        topology, encoder = case.topology, subject.encoder
        self.ids = np.array_split(np.arange(len(index)), topology.world_size)[topology.rank]
        self.shape = ((case.view.crop // encoder.patch_size) ** 2, encoder.embed_dim)
        needed = len(self.ids) * math.prod(self.shape) * 4
        self.kept: Tensor | None = None
        if needed <= case.config.probe.memory_gb * 1e9:
            kept = torch.empty(len(self.ids), *self.shape)
            filled = 0
            for tokens in self._encoded(self.ids):
                kept[filled : filled + len(tokens)] = tokens.cpu()
                filled += len(tokens)
            self.kept = kept

    def batches(self, wanted: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tokens (B, N, D), labels (B,)) of each batch's samples that are this rank's; B may be 0."""
        device = self.case.topology.device
        own = [ids[np.isin(ids, self.ids)] for ids in wanted]
        buffer = torch.empty(0, *self.shape, device=device)
        with closing(self._encoded(np.concatenate(own) if self.kept is None else self.ids[:0])) as stream:
            for ids in own:
                if self.kept is not None:
                    tokens = self.kept[np.searchsorted(self.ids, ids)].to(device)
                else:
                    while len(buffer) < len(ids):
                        buffer = torch.cat([buffer, next(stream)])
                    tokens, buffer = buffer[: len(ids)], buffer[len(ids) :]
                readable = ~tokens[:, 0, 0].isnan()
                yield tokens[readable], torch.from_numpy(self.labels[ids]).to(device)[readable]

    @torch.no_grad()
    def _encoded(self, ids: np.ndarray) -> Iterator[Tensor]:
        """Yield the tokens of samples in their order, some at a time; those of an unreadable image are no numbers."""
        case, encoder = self.case, self.subject.encoder
        for images, labels in image_batches(self.index, ids, case.view, case.config, case.topology):
            dist.progress()
            images = normalize_images(images.to(case.topology.device))
            tokens = encoder.forward_intermediates(images, [self.reading.layer], norm=self.reading.norm)[0][:, 1:]
            tokens = tokens.float()
            tokens[labels == UNREADABLE] = torch.nan
            yield tokens


def fit(tokens: Tokens, fitted: np.ndarray, probes: nn.ModuleList, config: Config) -> None:
    """Train probes, one for each learning rate, by AdamW with a cosine to zero; a collective."""
    probe, rates = config.probe, config.probe.attentive_learning_rates
    parameters = list(probes.parameters())
    optimizer = torch.optim.AdamW([dict(params=p.parameters(), lr=r) for p, r in zip(probes, rates, strict=True)],
                                  betas=BETAS, weight_decay=probe.weight_decay or 0.0)  # fmt: skip
    generator = np.random.default_rng(config.run.seed)
    total, step = probe.attentive_epochs * math.ceil(len(fitted) / probe.attentive_batch), 0
    for _ in range(probe.attentive_epochs):
        order = generator.permutation(fitted)
        wanted = [order[i : i + probe.attentive_batch] for i in range(0, len(order), probe.attentive_batch)]
        for ids, (batch, labels) in zip(wanted, tokens.batches(wanted), strict=True):
            dist.progress()
            optimizer.zero_grad()
            if len(batch):  # each probe's loss reaches its own parameters only, so that one backward serves all
                loss = sum(F.cross_entropy(one(batch), labels, reduction="sum") for one in probes) / len(ids)
                loss.backward()
            _sum_gradients(parameters)
            scale = 0.5 * (1 + math.cos(math.pi * step / total))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
            step += 1


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its sum over ranks; a rank without an image of the batch adds zeros."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p, part in zip(parameters, dist.sum_over_ranks(flat).split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


@torch.no_grad()
def accuracies(tokens: Tokens, ids: np.ndarray, probes: nn.ModuleList, batch: int) -> list[float]:
    """Return each probe's accuracy (0 to 1) on the readable ones of some samples; a collective."""
    counts = torch.zeros(len(probes) + 1, dtype=torch.float64)
    for x, labels in tokens.batches([ids[i : i + batch] for i in range(0, len(ids), batch)]):
        dist.progress()
        correct = [(one(x).argmax(dim=1) == labels).sum() for one in probes]
        counts += torch.stack([*correct, torch.tensor(len(x), device=x.device)]).cpu()
    counts = dist.sum_over_ranks(counts)
    if not counts[-1]:
        raise none_readable(tokens.index)
    return (counts[:-1] / counts[-1]).tolist()


def evaluate_checkpoint(config: Config, checkpoint: Path, which: str) -> dict[str, Any] | None:
    """Measure attentive-probe accuracy of the encoder as initialised and as trained.

    The first rank adds a row to `evaluations.jsonl` and returns {features: {"accuracy", "held_out", the setting}}.
    """
    reading = Reading(config.eval.layer, "patch_mean", config.eval.norm)  # the pooling is the probe's
    with opened(config, checkpoint, which, [reading], pixels=False) as case:
        check_labels(case.train, "data.train")
        check_several_classes(case.train)
        check_classes(case.train, case.test)
        results = {}
        for subject in case.subjects:
            (counted,) = check_readings([reading], subject, "eval.layer")
            results[subject.name] = of_subject(case, subject, counted)
    return case.record("attentive", results)


def of_subject(case: Case, subject: Subject, reading: Reading) -> dict[str, Any]:
    """Train probes on a subject's tokens after a block and return accuracy and rate of the best; a collective."""
    config, device = case.config, case.topology.device
    rates = config.probe.attentive_learning_rates
    train = Tokens(case, subject, reading, case.train)
    classes = int(train.labels.max()) + 1
    heads = subject.encoder.blocks[0].attn.num_heads
    probes = nn.ModuleList(AttentiveProbe(subject.encoder.embed_dim, heads, classes) for _ in rates).to(device)
    for probe in probes:
        init_parameters(probe, config.run.seed)  # they differ in their rate alone
    fitted, held_out = (part.numpy() for part in held_out_split(len(train.labels), config.probe.held_out,
                                                                config.run.seed))  # fmt: skip
    fit(train, fitted, probes, config)
    chosen_by = accuracies(train, held_out, probes, config.eval.batch)
    del train  # its memory is for the evaluation images
    judged = accuracies(Tokens(case, subject, reading, case.test), np.arange(len(case.test)), probes, config.eval.batch)
    best = max(range(len(rates)), key=lambda number: chosen_by[number])
    return dict(accuracy=round(judged[best], 5), held_out=round(chosen_by[best], 5), layer=reading.layer,
                learning_rate=rates[best])  # fmt: skip
