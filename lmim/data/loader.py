"""The training loader: which samples each rank's micro-batches hold, and how they become tensors.

Owns the walk along the endless stream of epochs. Position p of the stream is sample p mod n of epoch p div n, in the
order of `EpochPlan`; step s takes positions [s·G, (s+1)·G), so every sample comes once an epoch, batches run across
the ends of epochs, and nothing is dropped or repeated unless `data.tail` says so. The invariant: what a step holds is a
function of the step alone, whatever the ranks, the workers and where the run was resumed; seeking costs nothing.

The stages are joined by webdataset's `DataPipeline`; its shard list and tar reader give way to reads by offset, since a
sequential reader can neither seek nor split a shard over ranks.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from lmim.config import ConfigError, Split
from lmim.data.augment import Augment
from lmim.data.cache import ReadAhead, ShardCache, Wanted
from lmim.data.datasets import open_source
from lmim.data.memory import BatchMemory, Slot
from lmim.data.nvjpeg import Undecoded, decode_views, undecoded
from lmim.data.plan import Stream
from lmim.data.sharding import write_shards
from lmim.data.shards import INDEX, Sample, ShardIndex, ShardReader
from lmim.data.storage import Damaged, Storage, StorageOptions, is_remote
from lmim.data.transforms import ImageError, eval_view, train_view
from lmim.dist import Topology, available_cores, barrier, give_back_freed_memory
from lmim.options import Config, DataConfig
from lmim.randomness import sample_key
from lmim.stop import ignore_stop_signals

logger = logging.getLogger(__name__)
UNREADABLE = -2  # label of an evaluation image that could not be read
NAMED_SKIPPED = 10  # images of an evaluation that a worker could not read
EMBEDDED = ("embedded:train", "embedded:eval")
MAX_WORKERS = 16
PREFETCH = 4  # batches that a worker is ahead
SUBSTITUTES = 64  # how many following samples are tried in place of one that cannot be read
RESTARTS = 3  # how often in a row loader workers that died are replaced


class DataError(RuntimeError):
    """The training data cannot be read any further; the message says why and what to do."""


def open_storage(config: DataConfig) -> Storage:
    """Return what reads shards as `data` says."""
    return Storage(StorageOptions(config.timeout_s, 60 * config.retry_minutes, config.allow_pipe))


def open_shards(option: str, spec: str | list[str], run_folder: Path, storage: Storage | None = None,
                max_bad_fraction: float = 0.0) -> ShardIndex | None:  # fmt: skip
    """Open the shards that an option names, several as one data set, None if it is empty; complaints name the option.

    "embedded:train" and "embedded:eval" are sharded into the run folder at first use, by one rank. For
    `max_bad_fraction` see `ShardIndex.open`.
    """
    if not spec:
        return None
    specs = spec if isinstance(spec, list) else [spec]
    indexes = [
        ShardIndex.open(_sharded(one, run_folder), option=option, storage=storage, max_bad_fraction=max_bad_fraction)
        for one in specs
    ]
    return ShardIndex.join(indexes, option)


def _sharded(spec: str, run_folder: Path) -> str:
    if spec not in EMBEDDED:
        return spec
    folder = run_folder / "shards" / spec.partition(":")[2]
    if not (folder / INDEX).is_file():
        try:
            write_shards(open_source(spec), folder, overwrite=True)
        except OSError as error:
            raise ConfigError(f"run.folder ({run_folder}) cannot be written: {error.strerror}") from error
    return str(folder)


def open_data(config: Config, topology: Topology) -> tuple[ShardIndex | None, ShardIndex | None]:
    """Open `data.train` and `data.eval` on every rank; embedded images are sharded by the first."""
    folder, data = Path(config.run.folder), config.data

    def open_both() -> tuple[ShardIndex | None, ShardIndex | None]:
        train = open_shards("data.train", data.train, folder, open_storage(data), data.max_bad_fraction)
        test = open_shards("data.eval", data.eval, folder, open_storage(data))
        for index in (train, test):
            if index is not None and data.cache and any(is_remote(index.url(n)) for n in range(len(index.shards))):
                limit_bytes, largest = int(data.cache_gb * 1e9), max(shard.bytes for shard in index.shards)
                if limit_bytes < largest:
                    raise ConfigError(f"data.cache_gb ({data.cache_gb:g}) has no room for the largest shard of "
                                      f"{largest / 1e9:.3g} GB: give it room for many")  # fmt: skip
                index.cache = ShardCache(Path(data.cache), limit_bytes, index.storage, index.fingerprint)
        return train, test

    found = open_both() if topology.is_main else (None, None)
    barrier()
    return found if topology.is_main else open_both()


class Unreadable(NamedTuple):
    """A sample that was skipped, and why."""

    sample_id: int
    reason: str


class Batch(NamedTuple):
    """One micro-batch: crops (B, 3, S, S) uint8 in channels-last memory, keys and sample ids (B,) int64.

    `skipped` are the samples that could not be read; others stand in their places, with the keys of those places.
    `cursor` is how many positions of the stream all ranks' whole steps have taken once this batch is done: from there a
    run goes on. `labels` (B,) int64 are there where they are asked for, and `shares` (B,) of them, see `Augment`.
    """

    images: Tensor
    keys: Tensor
    sample_ids: Tensor
    skipped: list[Unreadable]
    cursor: int
    labels: Tensor | None = None
    shares: Tensor | None = None


class Fetched(NamedTuple):
    """Positions [start, start + B) of the stream with their samples' bytes, not yet decoded."""

    start: int
    epochs: np.ndarray
    sample_ids: np.ndarray
    samples: list[Sample | Damaged]


class Filled(NamedTuple):
    """What a worker hands over: a batch from position `start` on, its crops in shared memory where there is a slot.

    Arrays, since every tensor that is sent between processes costs a connection. `undecoded` are left to the device.
    """

    start: int
    images: Slot | Tensor
    keys: np.ndarray
    sample_ids: np.ndarray
    skipped: list[Unreadable]
    undecoded: list[Undecoded]
    shares: np.ndarray | None = None


class MicroBatches(torch.utils.data.IterableDataset):
    """Source of the pipeline: the first positions of this rank's micro-batches, those of them that this worker loads.

    Micro-batch i of a rank (step i div A, micro i mod A) is worker i mod W's; torch's loader takes from its workers in
    turn, so the order is the same for any W. A rank's micro-batches of a step are one part of the step, so that the
    ranks of a host read their own lanes.
    """

    def __init__(self, split: Split, rank: int, start: int, stop: int):
        self.split, self.rank, self.start, self.stop = split, rank, start, stop

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        split = self.split
        for number in range(self.start + first, self.stop, stride):
            step, micro = divmod(number, split.accumulate)
            yield ((step * split.world_size + self.rank) * split.accumulate + micro) * split.micro_batch


class Fetch:
    """Reads the bytes of each micro-batch while the one before is decoded, and has whole shards brought to the cache.

    Only once the first batch is there: what a run waits for when it starts is not behind what it will need later.
    """

    def __init__(self, stream: Stream, reader: ShardReader, micro_batch: int):
        self.stream, self.reader, self.micro_batch = stream, reader, micro_batch

    def __call__(self, starts: Iterator[int]) -> Iterator[Fetched]:
        cache = self.reader.index.cache
        read_ahead = None if cache is None else ReadAhead(cache)
        with ThreadPoolExecutor(1) as pool, nullcontext() if read_ahead is None else closing(read_ahead):
            ahead = None
            for start in starts:
                following = pool.submit(self.fetch, start)
                if ahead is not None:
                    yield (fetched := ahead.result())
                    if read_ahead is not None:
                        read_ahead.want(self.needed(fetched.start))
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def needed(self, start: int) -> list[Wanted]:
        """Return the shards of the blocks that micro-batch `start` lies in, and of those that come after them."""
        later = start + self.stream.block_samples
        numbers = [n for p in (start, later) for n in self.stream.shards(p, p + self.micro_batch)]
        wanted = (self.reader.index.wanted(number) for number in dict.fromkeys(numbers))
        return [shard for shard in wanted if is_remote(shard.url)]

    def fetch(self, start: int) -> Fetched:
        epochs, ids = self.stream.at(start, start + self.micro_batch)
        return Fetched(start, epochs, ids, self.reader.read_many(ids))


class Decode:
    """Makes a micro-batch's crops; a sample that cannot be read gives its place to the next that can.

    The rule is a function of the position and of what is damaged, so every rank and every resume follows it alike. The
    substitute is cropped and masked by the key of the place it takes: its own turn shows it differently.
    """

    def __init__(self, stream: Stream, reader: ShardReader, config: DataConfig, seed: int, size: int,
                 augment: Augment | None = None):  # fmt: skip
        self.stream, self.reader, self.config, self.seed, self.size = stream, reader, config, seed, size
        self.augment = augment
        self.memory: BatchMemory | None = None  # where there are workers

    def __call__(self, fetched: Fetched) -> Filled:
        worker = torch.utils.data.get_worker_info()
        slot = self.memory.take(worker.id) if worker and self.memory else None
        shape = (len(fetched.samples), self.size, self.size, 3)
        crops = np.empty(shape, np.uint8) if slot is None else self.memory.array(slot)
        images = torch.from_numpy(crops).permute(0, 3, 1, 2) if slot is None else slot
        keys = sample_key(self.seed, fetched.epochs, fetched.sample_ids)
        filled = Filled(fetched.start, images, keys, fetched.sample_ids.copy(), [], [])
        for i, sample in enumerate(fetched.samples):
            jpeg = self._for_device(sample, i, int(keys[i]))
            reason = "" if jpeg else self._crop(sample, int(keys[i]), crops[i])
            if jpeg:
                filled.undecoded.append(jpeg)
            if reason:
                self.substitute(filled, i, reason, crops[i])
        return filled if self.augment is None else filled._replace(shares=self.augment(crops, keys))

    def _for_device(self, sample: Sample | Damaged, place: int, key: int) -> Undecoded | None:
        if self.config.decoder != "nvjpeg" or isinstance(sample, Damaged):
            return None
        try:
            return undecoded(sample.image, place, self.config, key)
        except ImageError:
            return None  # the workers' decoder says what is wrong

    def _crop(self, sample: Sample | Damaged, key: int, out: np.ndarray) -> str:
        """Write a sample's crop to `out` (S, S, 3), or return why it cannot be."""
        if isinstance(sample, Damaged):
            return str(sample)
        config = self.config
        try:
            train_view(sample.image, self.size, config.crop_scale, config.crop_ratio, config.flip, key,
                       decoder=config.decoder, out=out)  # fmt: skip
        except ImageError as error:
            return f"{sample.key}.{sample.suffix}: {error}"
        return ""

    def substitute(self, filled: Filled, place: int, reason: str, out: np.ndarray) -> None:
        """Put the next sample that can be read in a place of the batch, and its crop in `out`."""
        missing = Unreadable(int(filled.sample_ids[place]), reason)
        position = filled.start + place + 1
        for sample_id in self.stream.at(position, position + SUBSTITUTES)[1]:
            if not self._crop(self.reader.read_many(np.array([sample_id]))[0], int(filled.keys[place]), out):
                filled.sample_ids[place] = int(sample_id)
                filled.skipped.append(missing)
                return
        raise DataError(f"data.train: {SUBSTITUTES} images in a row cannot be read, the first is {reason}")


class Receive:
    """Takes what workers hand over to the device, and decodes there what was left to it.

    Copies to a GPU have a CUDA stream of their own, so that they run beside the step before.
    """

    def __init__(self, decode: Decode, device: torch.device, labels: np.ndarray | None = None):
        self.decode, self.device, self.labels = decode, device, labels
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, filled: Filled, cursor: int) -> Batch:
        images = filled.images.tensor() if isinstance(filled.images, Slot) else filled.images
        small = [torch.from_numpy(filled.keys)]
        if self.labels is not None:
            small += [torch.from_numpy(self.labels[filled.sample_ids]), torch.from_numpy(filled.shares)]
        if self.side is not None:
            images, *small = self._moved(images, *(tensor.pin_memory() for tensor in small))
        for place in decode_views(images, filled.undecoded):
            out = np.empty((self.decode.size, self.decode.size, 3), np.uint8)
            self.decode.substitute(filled, place, f"sample {filled.sample_ids[place]}: broken JPEG", out)
            images[place] = torch.from_numpy(out).permute(2, 0, 1).to(self.device)
        keys, *supervision = small
        return Batch(images, keys, torch.from_numpy(filled.sample_ids), filled.skipped, cursor, *supervision)

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        with torch.cuda.stream(self.side):
            moved = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.side)
        for tensor in moved:
            tensor.record_stream(current)  # else its memory could be given away while the step reads it
        return moved


def loader_workers(config: DataConfig, topology: Topology) -> int:
    """Return `data.workers`; empty: a rank's share of the cores less one for itself, none where ranks fill them."""
    if config.workers is not None:
        return config.workers
    return max(min(available_cores() // topology.local_world_size - 1, MAX_WORKERS), 0)


def _start_worker(worker_id: int) -> None:
    ignore_stop_signals()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_trainer, name="end-with-trainer", daemon=True).start()


def _end_with_trainer() -> None:
    """End this worker when its trainer is gone: torch's watch on it waits while a full pipe is written to."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def open_stream(config: DataConfig, index: ShardIndex, seed: int) -> Stream:
    """Return the order in which a run takes the samples of its training data."""
    weights = config.weights if len(config.weights) > 1 else ()  # one source may still have several parts: `{a,b}`
    return Stream(index.starts, seed=seed, global_batch=config.global_batch, parts=index.parts, weights=weights,
                  block_shards=config.block_shards, lanes=config.lanes, tail=config.tail)  # fmt: skip


def train_batches(config: DataConfig, index: ShardIndex, *, seed: int, size: int, split: Split, topology: Topology,
                  start_step: int, total_steps: int, labels: np.ndarray | None = None,
                  augment: Augment | None = None) -> Iterator[Batch]:  # fmt: skip
    """Yield this rank's micro-batches of steps [start_step, total_steps) in order, on its device.

    Where `labels` of all samples are given, so is `augment`, and `data.decoder` is none that works on the device.
    A worker that is killed is replaced, and the stream goes on where it was; one that keeps dying is a `DataError`.
    """
    assert split.world_size * split.micro_batch * split.accumulate == config.global_batch
    number, stop = start_step * split.accumulate, total_steps * split.accumulate
    decode = Decode(open_stream(config, index, seed), ShardReader(index), config, seed, size, augment)
    receive, deaths = Receive(decode, topology.device, labels), 0
    while number < stop:
        loader = _loader(config, index, seed, decode, split, topology, number, stop)
        with _started(loader) as (batches, workers):
            try:
                for filled in batches:
                    batch = receive(filled, (number + 1) // split.accumulate * config.global_batch)
                    number, deaths = number + 1, 0
                    yield batch
                    del batch  # so that its memory is free for the next
            # the last two: batches that the dead had not handed over
            except (RuntimeError, OSError, EOFError) as error:
                if not _one_died(workers):
                    raise
                deaths += 1
                words = " ".join(str(error).split())
        if number < stop:
            if deaths > RESTARTS:
                raise DataError(f"loader workers died {deaths} times in a row ({words}): is the host out of memory? "
                                "set data.workers lower")  # fmt: skip
            logger.warning("a loader worker died and is replaced: %s", words)


@contextmanager
def _started(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Iterator[Any], set[BaseProcess]]]:
    """Start a loader's workers, and end them for certain: they ignore the signal that torch would end them with.

    A worker's death is noticed where its batch is waited for. Torch's own handler of SIGCHLD would raise in the middle
    of a step.
    """
    before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    if loader.num_workers:
        give_back_freed_memory()
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    ended = threading.Event()
    if workers:
        arguments = (batches._worker_result_queue._writer, workers, ended)
        threading.Thread(target=_end_the_wait, args=arguments, name="workers-watch", daemon=True).start()
    try:
        yield batches, workers
    finally:
        ended.set()
        for worker in workers:
            worker.kill()


def _end_the_wait(handover: Connection, workers: set[BaseProcess], ended: threading.Event) -> None:
    """End the trainer's wait for a batch that a killed worker had handed over in part, which would never end."""
    multiprocessing.connection.wait([worker.sentinel for worker in workers])
    if not ended.is_set() and _one_died(workers):
        for worker in workers:
            worker.kill()
        handover.close()  # the last end to write to: who reads comes to the end


def _one_died(workers: set[BaseProcess]) -> bool:
    """Tell whether a worker ended by a signal or an error; its broken connections may be seen a moment before that."""
    deadline = time.monotonic() + 1.0
    while not any(worker.exitcode for worker in workers):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _as_it_is(filled: Filled) -> Filled:
    return filled


def _loader(config: DataConfig, index: ShardIndex, seed: int, decode: Decode, split: Split, topology: Topology,
            start: int, stop: int) -> torch.utils.data.DataLoader:  # fmt: skip
    workers = min(loader_workers(config, topology), stop - start)
    # one that is filled, one that the trainer reads, and those between
    decode.memory = BatchMemory(workers, PREFETCH + 2, split.micro_batch, decode.size) if workers else None
    fetch = Fetch(open_stream(config, index, seed), ShardReader(index), split.micro_batch)
    return torch.utils.data.DataLoader(
        wds.DataPipeline(MicroBatches(split, topology.rank, start, stop), fetch, wds.map(decode)),
        batch_size=None,
        collate_fn=_as_it_is,  # else arrays become tensors
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=topology.device.type == "cuda",
        prefetch_factor=PREFETCH if workers else None,
    )


class EvalImages(torch.utils.data.Dataset):
    """Images of an index at a fixed view, (uint8 (3, S, S), label); one that cannot be read has label −2."""

    def __init__(self, index: ShardIndex, sample_ids: np.ndarray, resize: int, crop: int):
        self.reader, self.sample_ids, self.resize, self.crop = ShardReader(index), sample_ids, resize, crop
        self.skipped = 0  # by this worker

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitems__(self, places: list[int]) -> list[tuple[Tensor, int]]:
        samples = self.reader.read_many(self.sample_ids[places])
        return [self._view(i, sample) for i, sample in zip(places, samples, strict=True)]

    def _view(self, place: int, sample: Sample | Damaged) -> tuple[Tensor, int]:
        try:
            if isinstance(sample, Damaged):
                raise sample
            view = eval_view(sample.image, self.resize, self.crop)
        except (Damaged, ImageError) as error:
            self.skipped += 1
            if self.skipped <= NAMED_SKIPPED:
                more = " (further ones are not named)" if self.skipped == NAMED_SKIPPED else ""
                logger.warning("skipped sample %d: %s%s", self.sample_ids[place], error, more)
            return torch.zeros(3, self.crop, self.crop, dtype=torch.uint8), UNREADABLE
        return torch.from_numpy(view).permute(2, 0, 1), -1 if sample.label is None else sample.label


def eval_batches(index: ShardIndex, sample_ids: np.ndarray, *, resize: int, crop: int, batch: int,
                 workers: int) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield (images uint8 (B, 3, S, S), labels (B,)) of the given samples, in their order."""
    images = EvalImages(index, sample_ids, resize, crop)
    loader = torch.utils.data.DataLoader(images, batch_size=batch, num_workers=workers, worker_init_fn=_start_worker)
    with _started(loader) as (batches, _):
        yield from batches
