"""The training loader: which samples each rank's micro-batches hold, and how they become tensors.

Owns the walk along the endless stream of epochs. Position p of the stream is sample p mod n of epoch p div n, in the
order of `EpochPlan`; step s takes positions [s·G, (s+1)·G), so every sample comes once an epoch, batches run across
the ends of epochs, and nothing is dropped or repeated. The invariant: what a step holds is a function of the step
alone, whatever the ranks, the workers and where the run was resumed; seeking costs nothing.

The stages are webdataset's (`DataPipeline`, `map`, `batched`, `WebLoader`); its shard list and tar reader give way to
reads by offset, since a sequential reader can neither seek nor split a shard over ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from lmim.config import Config, ConfigError, DataConfig, Split
from lmim.data.datasets import open_source
from lmim.data.shards import EpochPlan, ShardIndex, ShardReader, write_shards
from lmim.data.transforms import DECODERS, ImageError, eval_view, train_view
from lmim.dist import Topology, available_cores, barrier, ignore_stop_signals
from lmim.randomness import sample_key

logger = logging.getLogger(__name__)
EMBEDDED = ("embedded:train", "embedded:eval")
MAX_WORKERS = 16
SUBSTITUTES = 64  # how many following samples are tried in place of one that cannot be read


def open_shards(option: str, spec: str, run_folder: Path) -> ShardIndex | None:
    """Open the folder of shards that an option names, None if it is empty; complaints name the option.

    "embedded:train" and "embedded:eval" are sharded into the run folder at first use, by one rank.
    """
    if not spec:
        return None
    if spec not in EMBEDDED:
        return ShardIndex.open(Path(spec), option=option)
    folder = run_folder / "shards" / spec.partition(":")[2]
    if not (folder / "index.json").is_file():
        write_shards(open_source(spec), folder, overwrite=True)
    return ShardIndex.open(folder, option=option)


def open_data(config: Config, topology: Topology) -> tuple[ShardIndex | None, ShardIndex | None]:
    """Open `data.train` and `data.eval` on every rank; embedded images are sharded by the first."""
    folder = Path(config.run.folder)
    options = (("data.train", config.data.train), ("data.eval", config.data.eval))
    if topology.is_main:
        for option, spec in options:
            open_shards(option, spec, folder)
    barrier()
    train, test = (open_shards(option, spec, folder) for option, spec in options)
    return train, test


class Batch(NamedTuple):
    """One micro-batch: crops (B, 3, S, S) uint8 in channels-last memory, keys (B,) int64, and what was skipped."""

    images: Tensor
    keys: Tensor
    sample_ids: Tensor
    skipped: list[str]


class Stream:
    """Maps positions of the endless stream to (epoch, sample id)."""

    def __init__(self, index: ShardIndex, seed: int, block_shards: int):
        self.index, self.seed, self.block_shards = index, seed, block_shards
        self._plan: EpochPlan | None = None

    def samples(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (epoch, sample id) of positions [start, stop)."""
        while start < stop:
            epoch, offset = divmod(start, len(self.index))
            if self._plan is None or self._plan.epoch != epoch:
                self._plan = EpochPlan(self.index, seed=self.seed, epoch=epoch, block_shards=self.block_shards)
            end = min(offset + stop - start, len(self.index))
            for sample_id in self._plan.ids(offset, end):
                yield epoch, int(sample_id)
            start += end - offset


class MicroBatches(torch.utils.data.IterableDataset):
    """Source of the pipeline: the samples of this rank's micro-batches, those of them that this worker loads.

    Micro-batch i of the run (step i div A, micro i mod A) is worker i mod W's; torch's loader takes from its workers
    in turn, so the order is the same for any W. Micro-batch j of rank r holds slice j·ranks + r of its step.
    """

    def __init__(self, stream: Stream, split: Split, rank: int, start_step: int, total_steps: int):
        self.stream, self.split, self.rank = stream, split, rank
        self.start, self.stop = start_step * split.accumulate, total_steps * split.accumulate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        split = self.split
        for micro in range(self.start + first, self.stop, stride):
            begin = (micro * split.world_size + self.rank) * split.micro_batch
            for offset, (epoch, sample_id) in enumerate(self.stream.samples(begin, begin + split.micro_batch)):
                yield dict(position=begin + offset, epoch=epoch, sample_id=sample_id)


class Crops:
    """Reads, decodes and crops one sample; one that cannot be read gives its place to the next that can."""

    def __init__(self, stream: Stream, reader: ShardReader, config: DataConfig, size: int):
        self.stream, self.reader, self.config, self.size = stream, reader, config, size

    def __call__(self, wanted: dict[str, Any]) -> dict[str, Any]:
        skipped = []
        position = wanted["position"]
        for epoch, sample_id in self.stream.samples(position, position + SUBSTITUTES):
            sample = self.reader.read(sample_id)
            key = sample_key(self.stream.seed, epoch, sample_id)
            try:
                crop = train_view(sample.image, self.size, self.config.crop_scale, self.config.crop_ratio,
                                  self.config.flip, key, decoder=DECODERS[0])  # fmt: skip
            except ImageError as error:
                skipped.append(f"{sample.key}.{sample.suffix}: {error}")
                continue
            return dict(image=crop, key=key, sample_id=sample_id, skipped=skipped)
        raise ConfigError(f"data.train: {SUBSTITUTES} samples in a row cannot be read, the first is {skipped[0]}")


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack crops (S, S, 3) into a channels-last batch."""
    images = torch.from_numpy(np.stack([s["image"] for s in samples])).permute(0, 3, 1, 2)
    keys, ids = (torch.tensor([s[name] for s in samples], dtype=torch.int64) for name in ("key", "sample_id"))
    return Batch(images, keys, ids, [words for s in samples for words in s["skipped"]])


def default_workers(topology: Topology) -> int:
    """Return a rank's share of the cores less one for itself, at most 16: none where ranks fill the cores."""
    return max(min(available_cores() // topology.local_world_size - 1, MAX_WORKERS), 0)


def _start_worker(worker_id: int) -> None:
    ignore_stop_signals()
    torch.set_num_threads(1)


def train_batches(config: DataConfig, index: ShardIndex, *, seed: int, size: int, split: Split, topology: Topology,
                  start_step: int, total_steps: int) -> Iterator[Batch]:  # fmt: skip
    """Yield this rank's micro-batches of steps [start_step, total_steps) in order."""
    stream = Stream(index, seed, config.block_shards)
    source = MicroBatches(stream, split, topology.rank, start_step, total_steps)
    crops = Crops(Stream(index, seed, config.block_shards), ShardReader(index), config, size)
    pipeline = wds.DataPipeline(
        source, wds.map(crops), wds.batched(split.micro_batch, collation_fn=collate, partial=False)
    )
    workers = default_workers(topology) if config.workers is None else config.workers
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=topology.device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    yield from loader


class EvalImages(torch.utils.data.Dataset):
    """Images of an index at a fixed view, (uint8 (3, S, S), label); one that cannot be read has label −2."""

    def __init__(self, index: ShardIndex, sample_ids: np.ndarray, resize: int, crop: int):
        self.reader, self.sample_ids, self.resize, self.crop = ShardReader(index), sample_ids, resize, crop

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        sample = self.reader.read(int(self.sample_ids[i]))
        try:
            view = eval_view(sample.image, self.resize, self.crop)
        except ImageError as error:
            logger.warning("skipped %s.%s: %s", sample.key, sample.suffix, error)
            return torch.zeros(3, self.crop, self.crop, dtype=torch.uint8), UNREADABLE
        return torch.from_numpy(view).permute(2, 0, 1), -1 if sample.label is None else sample.label


UNREADABLE = -2


def eval_batches(index: ShardIndex, sample_ids: np.ndarray, *, resize: int, crop: int, batch: int,
                 workers: int) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield (images uint8 (B, 3, S, S), labels (B,)) of the given samples, in their order."""
    images = EvalImages(index, sample_ids, resize, crop)
    yield from torch.utils.data.DataLoader(images, batch_size=batch, num_workers=workers, worker_init_fn=_start_worker)
