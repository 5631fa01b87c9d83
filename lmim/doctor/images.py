"""The training images: can they be read and decoded as fast as the plan takes them?

Owns the measurement and the comparison with the step that the trial took. Images are read in the order of the run's
first steps, by as many readers as the rank will have loader workers, while all other ranks do the same. What the
system's page cache holds already is read from there, as in the run.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from lmim.config import ConfigError, crop_size
from lmim.data.datasets import Source, open_source
from lmim.data.loader import EMBEDDED, loader_workers, open_shards, open_storage, open_stream
from lmim.data.plan import Stream
from lmim.data.sharding import write_shards
from lmim.data.shards import Sample, ShardIndex, ShardReader
from lmim.data.storage import Damaged, is_remote, without_secrets
from lmim.data.transforms import ImageError, train_view
from lmim.doctor.rows import FAILURE, OK, WARNING, Case, Finding, Found, Row, of_ranks, size, step_seconds
from lmim.options import Config
from lmim.randomness import sample_key

READ_S, DECODE_S = 6.0, 2.0  # how long each is measured
READ_AT_ONCE, MOST_IMAGES, MOST_READERS = 16, 512, 8
TIMEOUT_S, RETRY_S = 10.0, 10.0  # of a remote place; a run is more patient
FEW_EMBEDDED = 512


def look_at_images(case: Case) -> Finding:
    """Return images/s that this rank reads with all its readers and decodes with one, and how many are damaged."""
    config, ranks = case.config, case.topology.world_size
    index, epoch_images = _open(case)
    workers = loader_workers(config.data, case.topology)
    first = case.topology.rank * MOST_IMAGES
    _, ids = open_stream(replace(config.data, tail="carry"), index, config.run.seed).at(first, first + MOST_IMAGES)
    samples, read_per_s = _read(index, ids, min(max(workers, 1), MOST_READERS))
    whole = [sample for sample in samples if isinstance(sample, Sample)]
    damaged = [str(sample) for sample in samples if isinstance(sample, Damaged)]
    found = dict(epoch_images=epoch_images, workers=workers, ranks=ranks, read_per_s=read_per_s, looked_at=len(samples),
                 image_bytes=float(np.mean([len(sample.image) for sample in whole])) if whole else 0.0)  # fmt: skip
    decode_per_s, broken = _decode(whole, config) if whole else (0.0, [])
    return dict(found, decode_per_s=decode_per_s, damaged=len(damaged) + len(broken),
                example=next(iter(damaged + broken), ""), cache=_cache(config, index))  # fmt: skip


def _open(case: Case) -> tuple[ShardIndex, int]:
    """Open `data.train` without a trace in the run folder, and count the images of an epoch."""
    config, specs = case.config, case.config.data.train
    if not specs:
        raise ConfigError("data.train is empty: give a folder of shards, made by tools/shard_images.py")
    specs = specs if isinstance(specs, list) else [specs]
    more, opened = 0, []
    for number, spec in enumerate(specs):
        if spec in EMBEDDED:  # a run writes these to its folder; some of them are enough here
            source = open_source(spec)
            few = Source(source.name, source.classes, tuple(islice(source.images, FEW_EMBEDDED)), ())
            more += len(source.images) - len(few.images)
            folder = case.temporary / f"embedded-{number}"
            write_shards(few, folder, overwrite=True)
            spec = str(folder)
        opened.append(spec)
    patience = replace(config.data, timeout_s=min(config.data.timeout_s, TIMEOUT_S), retry_minutes=RETRY_S / 60)
    index = open_shards("data.train", opened, Path(config.run.folder), open_storage(patience),
                        config.data.max_bad_fraction)  # fmt: skip
    if index is None or not len(index):
        raise ConfigError(f"data.train ({config.data.train}) holds no images: shard some")
    whole = Stream(np.array([0, len(index) + more]), seed=0, global_batch=config.data.global_batch,
                   tail=config.data.tail)  # fmt: skip
    return index, whole.epoch_samples


def _read(index: ShardIndex, ids: np.ndarray, readers: int) -> tuple[list[Sample | Damaged], float]:
    """Read for some seconds by several threads; return the samples and images/s, without each thread's first batch."""
    batches = iter(np.array_split(ids, max(len(ids) // READ_AT_ONCE, 1)))
    done: list[tuple[float, list[Sample | Damaged]]] = []
    errors: list[Exception] = []
    lock, began = threading.Lock(), time.perf_counter()

    def read() -> None:
        reader = ShardReader(index)
        while time.perf_counter() - began < READ_S:
            with lock:
                batch = next(batches, None)
            if batch is None:
                return
            try:
                samples = reader.read_many(batch)
            except Exception as error:  # noqa: BLE001  (raised again by the thread that waits)
                errors.append(error)
                return
            with lock:
                done.append((time.perf_counter(), samples))

    threads = [threading.Thread(target=read, name="doctor-reads", daemon=True) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    samples = [sample for _, batch in done for sample in batch]
    ends = sorted(end for end, _ in done)
    if len(ends) > 2 * readers:  # from the end of each reader's first batch on
        return samples, READ_AT_ONCE * (len(ends) - readers) / (ends[-1] - ends[readers - 1])
    return samples, len(samples) / (ends[-1] - began)


def _decode(samples: list[Sample], config: Config) -> tuple[float, list[str]]:
    """Make crops for some seconds, in one thread as a loader worker does; return crops/s and what is broken."""
    data, side = config.data, crop_size(config.model)
    out, keys = np.empty((side, side, 3), np.uint8), sample_key(config.run.seed, 0, np.arange(len(samples)))
    decoder = "turbo" if data.decoder == "nvjpeg" else data.decoder
    broken, made, began = [], 0, time.perf_counter()
    while time.perf_counter() - began < DECODE_S:
        sample, key = samples[made % len(samples)], int(keys[made % len(samples)])
        try:
            train_view(sample.image, side, data.crop_scale, data.crop_ratio, data.flip, key, decoder=decoder, out=out)
        except ImageError as error:
            if made < len(samples):
                broken.append(f"{sample.key}.{sample.suffix}: {error}")
        made += 1
    return made / (time.perf_counter() - began), broken


def _cache(config: Config, index: ShardIndex) -> dict[str, float] | None:
    """Return the room for copies of remote shards, and how much of it a host needs; None where there are none."""
    if not config.data.cache or not any(is_remote(index.url(number)) for number in range(len(index.shards))):
        return None
    folder = Path(config.data.cache).absolute()
    while not folder.exists():
        folder = folder.parent
    return dict(free=float(shutil.disk_usage(folder).free), wanted=min(config.data.cache_gb * 1e9, float(index.bytes)))


def judge_images(case: Case, found: Found) -> list[Row]:
    """Compare what the slowest rank reads and decodes with what its steps take."""
    images, config = found["images"], case.config
    step_s = step_seconds(found)
    needed = config.data.global_batch / case.topology.world_size / step_s if step_s else None
    rows = [_reading(case, images, needed), _decoding(case, images, needed)]
    damaged, looked_at = (sum(of[key] for of in images.values()) for key in ("damaged", "looked_at"))
    if damaged:
        state = FAILURE if damaged > config.data.max_bad_fraction * looked_at else WARNING
        example = next(of["example"] for of in images.values() if of["example"])
        rows.append(Row("damaged images", state, f"{damaged} of {looked_at}, such as {example}",
                        "python tools/verify_shards.py names all; repair the shards, or allow more by "
                        "data.max_bad_fraction"))  # fmt: skip
    for rank, of in images.items():
        if of["cache"] and of["cache"]["free"] < of["cache"]["wanted"]:
            words = (f"{size(of['cache']['free'])} free in {config.data.cache} for rank {rank}, data.cache_gb is "
                     f"{config.data.cache_gb:g}")  # fmt: skip
            rows.append(Row("data cache", WARNING, words, "set data.cache_gb to what is free"))
            break
    return rows


def _reading(case: Case, images: dict[int, Finding], needed: float | None) -> Row:
    slowest = min(images, key=lambda rank: images[rank]["read_per_s"])
    reads, of = images[slowest]["read_per_s"], images[slowest]
    train = case.config.data.train
    where = train[0] if isinstance(train, list) else train
    words = f"{reads:,.0f} images/s a rank, {size(reads * of['image_bytes'])}/s"
    words += f"; the steps take {needed:,.0f}" if needed else "; what the steps take is not known"
    figures = dict(read_images_per_s=reads, needed_images_per_s=needed)
    if needed is None or reads >= needed:
        return Row("reading", OK, words, figures=figures)
    advice = f"{without_secrets(where)} is slow for {of_ranks([slowest])}: bring the shards nearer"
    advice += ", or set data.cache" if is_remote(where) and not case.config.data.cache else ""
    advice += ", give more loader workers (data.workers)" if of["workers"] < MOST_READERS else ""
    return Row("reading", FAILURE if reads < needed / 2 else WARNING, words, advice, figures)


def _decoding(case: Case, images: dict[int, Finding], needed: float | None) -> Row:
    """With workers, crops are made beside the steps; without, a rank makes them between its steps."""
    rate = {rank: of["decode_per_s"] * max(of["workers"], 1) for rank, of in images.items()}
    slowest = min(rate, key=rate.__getitem__)
    made, of = rate[slowest], images[slowest]
    by = f"{of['workers']} workers" if of["workers"] else "the rank itself, between its steps"
    words = f"{made:,.0f} images/s a rank, by {by}"
    figures = dict(decode_images_per_s=made, decode_per_core=of["decode_per_s"], workers=of["workers"])
    if needed is None or case.config.data.decoder == "nvjpeg":
        return Row("decoding", OK, words, figures=figures)
    waiting = needed / (needed + made) if not of["workers"] else max(1 - made / needed, 0.0)  # share of the time
    if not of["workers"]:
        words += f": {waiting:.0%} of the time"
    figures["waiting_share"] = waiting
    if waiting <= (0.0 if of["workers"] else 0.2):
        return Row("decoding", OK, words, figures=figures)
    cores = "give each rank more cores and data.workers" if of["workers"] or needed > of["decode_per_s"] else \
        "give each rank a core for data.workers=1"  # fmt: skip
    gpu = ", or nvjpeg" if case.topology.device.type == "cuda" else ""
    advice = f"take shards of smaller images (shard_images.py --short-side 320), data.decoder=turbo{gpu}; {cores}"
    return Row("decoding", FAILURE if waiting > 0.5 else WARNING, words, advice, figures)
