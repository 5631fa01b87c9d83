"""The stream: every sample once an epoch, in one order for any ranks, micro-batches, workers and starting step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from lmim.config import DataConfig, Split
from lmim.data.loader import eval_batches, train_batches
from lmim.data.plan import EpochPlan
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.randomness import sample_key

BATCH = 32
CPU = torch.device("cpu")


def stream(index, *, ranks=1, micro=BATCH, workers=0, start=0, steps=20):
    """Return the steps' sample ids, keys and images, put together from every rank's micro-batches."""
    accumulate = BATCH // (ranks * micro)
    parts = []
    for rank in range(ranks):
        batches = train_batches(
            DataConfig(workers=workers, global_batch=BATCH), index, seed=5, size=10,
            split=Split(ranks, micro, accumulate),
            topology=Topology(rank, ranks, rank, ranks, CPU, "none"), start_step=start, total_steps=steps,
        )  # fmt: skip
        parts.append(list(batches))
    assert all(len(part) == (steps - start) * accumulate for part in parts)
    steps_of = [[part[i : i + accumulate] for i in range(0, len(part), accumulate)] for part in parts]
    ordered = [batch for step in zip(*steps_of, strict=True) for micros in step for batch in micros]
    return tuple(torch.cat([getattr(b, name) for b in ordered]) for name in ("sample_ids", "keys", "images"))


@pytest.fixture(scope="module")
def index(shards):
    return ShardIndex.open(shards / "train")


@pytest.fixture(scope="module")
def reference(index):
    return stream(index)


def test_every_sample_once_an_epoch_across_batches(index, reference):
    ids = reference[0].tolist()
    n = len(index)
    assert Counter(ids[:n]) == Counter(range(n)) == Counter(ids[n : 2 * n])
    assert ids[:n] != ids[n : 2 * n]
    plan = EpochPlan(index.starts, seed=5, epoch=0, block_shards=64)
    assert ids[:n] == plan.ids(0, n).tolist()
    epochs = np.arange(len(ids)) // n
    expected = [sample_key(5, int(epoch), sample) for epoch, sample in zip(epochs, ids, strict=True)]
    assert reference[1].tolist() == expected


@pytest.mark.parametrize(
    "how",
    [dict(ranks=2, micro=16), dict(ranks=4, micro=8), dict(ranks=2, micro=4), dict(micro=8), dict(workers=1),
     dict(workers=3, micro=8), dict(ranks=2, micro=8, workers=2)],
)  # fmt: skip
def test_one_order_for_any_split(index, reference, how):
    for ours, expected in zip(stream(index, **how), reference, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("start", [1, 9, 10, 19])
def test_seeking_equals_playing_through(index, reference, start):
    for ours, expected in zip(stream(index, start=start, ranks=2, micro=8, workers=1), reference, strict=True):
        assert torch.equal(ours, expected[start * BATCH :])


def test_batches_are_channels_last_bytes(index, reference):
    images = next(iter(train_batches(
        DataConfig(workers=0, global_batch=BATCH), index, seed=5, size=10, split=Split(1, BATCH, 1),
        topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=1,
    ))).images  # fmt: skip
    assert images.dtype == torch.uint8 and images.shape == (BATCH, 3, 10, 10)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_images_keep_the_order_and_the_labels(shards):
    index = ShardIndex.open(shards / "eval")
    ids = np.arange(len(index))
    batches = list(eval_batches(index, ids, resize=28, crop=28, batch=32, workers=2))
    assert torch.cat([labels for _, labels in batches]).tolist() == index.labels().tolist()
    assert sum(len(images) for images, _ in batches) == len(index)
