"""The stream: every sample once an epoch, in one order for any ranks, micro-batches, workers and starting step."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim.config import Split
from lmim.data.datasets import Source, SourceImage
from lmim.data.loader import DataError, MicroBatches, eval_batches, train_batches
from lmim.data.plan import EpochPlan, Stream
from lmim.data.sharding import write_shards
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.options import DataConfig
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


# --- exactly once, on any ranks and workers --------------------------------------------------------------------------

ODD_BATCH = 12  # divisible by 1, 2, 3 and 4 ranks; the data set of 30 by none of its multiples


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Plain webdataset tars of 7, 1 and 22 images: fewer than workers, and no size that divides another."""
    folder = tmp_path_factory.mktemp("uneven")
    number = 0
    for name, count in (("a", 7), ("b", 1), ("c", 22)):
        with wds.TarWriter(str(folder / f"{name}.tar")) as tar:
            for _ in range(count):
                tar.write({"__key__": f"image-{number:02d}", "png": np.full((9, 8, 3), 8 * number, np.uint8)})
                number += 1
    return ShardIndex.open(folder)


def global_batches(index, *, ranks, workers, first, last, accumulate=1, **options):
    """Return the steps' (sample ids, keys, mean pixels), put together from every rank."""
    config = DataConfig(workers=workers, global_batch=ODD_BATCH, **options)
    split = Split(ranks, ODD_BATCH // ranks // accumulate, accumulate)
    streams = [
        train_batches(config, index, seed=5, size=8, split=split, start_step=first, total_steps=last,
                      topology=Topology(rank, ranks, rank, ranks, CPU, "none"))
        for rank in range(ranks)
    ]  # fmt: skip
    parts = [list(batches) for batches in streams]
    steps = []
    for step in range(last - first):
        micros = [micro for part in parts for micro in part[step * accumulate : (step + 1) * accumulate]]
        means = torch.cat([m.images.float().mean(dim=(1, 2, 3)) for m in micros]).tolist()
        steps.append((torch.cat([m.sample_ids for m in micros]).tolist(), torch.cat([m.keys for m in micros]).tolist(),
                      means))  # fmt: skip
    return steps


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_global_batches_are_the_same_on_any_ranks_and_workers(uneven, ranks, workers):
    expected = global_batches(uneven, ranks=1, workers=0, first=0, last=5)  # two epochs of 30
    assert global_batches(uneven, ranks=ranks, workers=workers, first=0, last=5) == expected
    ids = [sample_id for step in expected for sample_id in step[0]]
    assert sorted(ids[:30]) == sorted(ids[30:]) == list(range(30))
    # the pixels are those of the images: each is of one grey, told by its number
    keys = [bytes(key) for n in range(3) for key in uneven.table(n).keys]
    greys = [8 * int(keys[i].decode().rpartition("-")[2]) for i in ids]
    assert [mean for step in expected for mean in step[2]] == pytest.approx(greys)


@settings(deadline=None, max_examples=60)
@given(samples=st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(sum), seed=st.integers(0, 2**32),
       ranks=st.integers(1, 4), workers=st.integers(1, 5), accumulate=st.integers(1, 3), micro=st.integers(1, 7),
       start=st.integers(0, 5), lanes=st.integers(1, 4))  # fmt: skip
def test_ranks_and_workers_share_out_every_position_once(samples, seed, ranks, workers, accumulate, micro, start,
                                                         lanes):  # fmt: skip
    """Without pictures and processes: what the workers of all ranks are told to read, from any step on."""
    split = Split(ranks, micro, accumulate)
    batch, steps = ranks * micro * accumulate, 8
    stream = Stream(np.cumsum([0, *samples]), seed=seed, global_batch=batch, lanes=min(lanes, batch), block_shards=3)
    expected = stream.at(start * batch, steps * batch)[1].tolist()
    found: list[list[int]] = [[] for _ in range(steps - start)]
    for rank in range(ranks):
        turns = []
        for worker in range(workers):
            info = SimpleNamespace(id=worker, num_workers=workers)
            with mock.patch("torch.utils.data.get_worker_info", return_value=info):
                turns.append(list(MicroBatches(split, rank, start * accumulate, steps * accumulate)))
        in_turn = [begin for row in itertools.zip_longest(*turns) for begin in row if begin is not None]
        assert len(in_turn) == (steps - start) * accumulate
        for number, begin in enumerate(in_turn):
            found[number // accumulate] += stream.at(begin, begin + micro)[1].tolist()
    assert [sample_id for step in found for sample_id in step] == expected


def test_every_batch_comes_with_the_cursor_to_go_on_from(uneven):
    batches = train_batches(DataConfig(workers=1, global_batch=ODD_BATCH), uneven, seed=5, size=8, split=Split(1, 4, 3),
                            topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=2, total_steps=4)  # fmt: skip
    assert [batch.cursor for batch in batches] == [24, 24, 36, 36, 36, 48]


@pytest.mark.parametrize("seed", range(3))
def test_resume_after_any_batch_on_other_ranks_and_workers(uneven, seed):
    draws = np.random.default_rng(seed)
    expected = global_batches(uneven, ranks=1, workers=0, first=0, last=9)
    step = int(draws.integers(1, 8))
    ranks, workers = int(draws.integers(1, 5)), int(draws.integers(0, 4))
    # as often as it is stopped: state that froze at the first resume would show at the second
    again = global_batches(uneven, ranks=ranks, workers=workers, first=step, last=step + 1)
    again += global_batches(uneven, ranks=4 // ranks or 1, workers=1, first=step + 1, last=9)
    assert again == expected[step:]


def test_the_first_batch_after_a_resume_reads_little(tmp_path):
    """What the process reads, as the system counts it, for the first batch of 16 from 40 shards in one block."""
    noise = np.random.default_rng(0)
    images = tuple(
        SourceImage(f"{i:04d}", "png", None, f"{i}", partial(png_bytes, noise.integers(0, 256, (48, 48, 3), np.uint8)))
        for i in range(40 * 30)
    )
    index = write_shards(Source("noise", None, images), tmp_path / "shards", samples_per_shard=30)
    assert len(index.shards) == 40

    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    def first_batch(step):
        batches = train_batches(DataConfig(workers=0, global_batch=16), ShardIndex.open(tmp_path / "shards"), seed=0,
                                size=8, split=Split(1, 16, 1), topology=Topology(0, 1, 0, 1, CPU, "none"),
                                start_step=step, total_steps=100)  # fmt: skip
        before = bytes_read()
        next(batches)
        return bytes_read() - before

    first_batch(0)  # what is read once a process: modules and the like
    index_bytes = (tmp_path / "shards" / "index.json").stat().st_size
    assert index_bytes < first_batch(50) < 2 * max(shard.bytes for shard in index.shards)


def png_bytes(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# --- what cannot be read ---------------------------------------------------------------------------------------------


def damage(folder: Path, index: ShardIndex, number: int, places: list[int]) -> list[int]:
    """Flip one bit of some images of a shard and return their sample ids."""
    table = index.table(number)
    with (folder / index.shards[number].name).open("r+b") as file:
        for place in places:
            at = int(table.offsets[place] + table.sizes[place] // 2)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    return [int(index.starts[number]) + place for place in places]


def test_damaged_images_are_counted_named_and_replaced_alike_everywhere(shards, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "train")
    index = ShardIndex.open(tmp_path / "train")
    sound = stream(index)
    bad = set(damage(tmp_path / "train", index, 1, [0, 3, 4]) + damage(tmp_path / "train", index, 4, [1]))
    order = sound[0].tolist()
    following = [next(i for i in order[p:] + order[:1] if i not in bad) for p in range(len(order))]
    for how in (dict(), dict(ranks=2, micro=8), dict(workers=2), dict(ranks=4, micro=8, workers=1)):
        found = stream(ShardIndex.open(tmp_path / "train"), **how)
        assert found[0].tolist() == following  # the sound ones stay where they were
        assert torch.equal(found[1], sound[1])  # and every place keeps its draws
    batches = list(train_batches(
        DataConfig(workers=0, global_batch=BATCH), ShardIndex.open(tmp_path / "train"), seed=5, size=10,
        split=Split(1, BATCH, 1), topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=20,
    ))  # fmt: skip
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert Counter(skip.sample_id for skip in skipped) == Counter(i for i in order if i in bad)
    keys = {i: bytes(index.table(int(index.locate(i)[0])).keys[int(index.locate(i)[1])]).decode() for i in bad}
    assert all(skip.reason.startswith(f"{keys[skip.sample_id]}.png: ") for skip in skipped)
    assert all("not those that were written" in skip.reason for skip in skipped)


def test_a_shard_cut_off_while_in_use_loses_what_is_gone_and_no_more(shards, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "train")
    index = ShardIndex.open(tmp_path / "train")
    table = index.table(2)
    os.truncate(tmp_path / "train" / index.shards[2].name, int(table.offsets[40]))
    gone = set(range(int(index.starts[2]) + 40, int(index.starts[3])))
    batches = train_batches(
        DataConfig(workers=0, global_batch=50), index, seed=5, size=10, split=Split(1, 50, 1),
        topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=6,
    )  # fmt: skip
    batches = list(batches)
    assert {skip.sample_id for batch in batches for skip in batch.skipped} == gone
    assert {i for batch in batches for i in batch.sample_ids.tolist()} == set(range(300)) - gone


def test_where_nothing_can_be_read_it_says_so(shards, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "train")
    index = ShardIndex.open(tmp_path / "train")
    for shard in index.shards:
        os.truncate(tmp_path / "train" / shard.name, 0)
    with pytest.raises(DataError, match=r"64 images in a row cannot be read, the first is .*shorter") as caught:
        stream(index, steps=1)
    assert "\n" not in str(caught.value)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(index, caplog):
    batches = train_batches(
        DataConfig(workers=2, global_batch=BATCH), index, seed=5, size=10, split=Split(1, BATCH, 1),
        topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=60,
    )  # fmt: skip
    ids = []
    for number, batch in enumerate(batches):
        ids += batch.sample_ids.tolist()
        if number in (3, 25):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert ids == stream(index, steps=60)[0].tolist()
    assert caplog.text.count("a loader worker died and is replaced") == 2
    assert not multiprocessing.active_children()


def jpeg_stream(folder: Path, steps: int):
    """Batches of 16 whose JPEGs, 0.5 MB a batch, go to the device: more than a pipe between processes holds."""
    noise = np.random.default_rng(0)
    with wds.TarWriter(str(folder / "a.tar")) as tar:
        for number in range(40):
            tar.write({"__key__": f"{number:02d}", "jpg": noise.integers(0, 256, (200, 200, 3), np.uint8)})
    return train_batches(
        DataConfig(workers=2, global_batch=16, decoder="nvjpeg"), ShardIndex.open(folder), seed=5, size=8,
        split=Split(1, 16, 1), topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=steps,
    )  # fmt: skip


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_while_it_hands_over_is_replaced(tmp_path, which):
    batches = jpeg_stream(tmp_path, 12)
    next(batches)
    time.sleep(2)  # until the pipe is full and a worker in the middle of a batch
    workers = sorted(multiprocessing.active_children(), key=lambda worker: worker.pid)
    os.kill(workers[which].pid, signal.SIGKILL)
    assert len(list(batches)) == 11


def test_workers_end_when_their_trainer_is_killed(tmp_path):
    report, send = multiprocessing.Pipe(duplex=False)

    def train():
        next(batches := jpeg_stream(tmp_path, 100))
        time.sleep(2)
        send.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(60)
        batches.close()

    trainer = multiprocessing.get_context("fork").Process(target=train)
    trainer.start()
    pids = report.recv()
    trainer.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
              for pid in pids):  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_worker_that_dies_after_an_evaluation_does_not_break_into_a_step(index):
    list(eval_batches(index, np.arange(8), resize=8, crop=8, batch=4, workers=1))
    batches = train_batches(
        DataConfig(workers=1, global_batch=BATCH), index, seed=5, size=10, split=Split(1, BATCH, 1),
        topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=40,
    )  # fmt: skip
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.5)  # a step; torch's handler of SIGCHLD would raise here
    assert len(list(batches)) == 39


def test_workers_end_with_the_loader_even_where_they_ignore_signals(index):
    batches = train_batches(
        DataConfig(workers=2, global_batch=BATCH), index, seed=5, size=10, split=Split(1, BATCH, 1),
        topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=1000,
    )  # fmt: skip
    for _ in range(2):  # one of each worker, which has started by then and ignores signals
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    workers[0].terminate()
    next(batches)
    assert workers[0].is_alive()  # a stop signal to the whole job leaves it to its trainer
    batches.close()
    for worker in workers:
        worker.join(timeout=10)
    assert not any(worker.is_alive() for worker in workers)


def test_an_error_in_a_worker_is_raised_and_not_taken_for_its_death(index, monkeypatch):
    monkeypatch.setattr("lmim.data.loader.train_view", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        stream(index, workers=2)


# --- decoding on the device ------------------------------------------------------------------------------------------


def jpeg_bytes(number: int, width: int = 90) -> bytes:
    """A smooth picture, as photos are; noise would show how colour is interpolated."""
    across = np.linspace(0, 6, width)[None, :, None] + np.linspace(0, 4, 70)[:, None, None]
    pixels = (127 + 120 * np.sin(across + number + np.arange(3))).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def test_views_decoded_on_the_device_are_those_of_the_workers(tmp_path):
    """JPEGs, and between them a PNG and one that is broken where the header does not show it."""
    whole = [(f"{i:02d}", "jpg", jpeg_bytes(i, 90 + i)) for i in range(12)]
    broken = whole[5][2][:-400] + bytes(400)
    files = [*whole[:5], ("05", "jpg", broken), *whole[6:], ("12", "png", png_bytes(np.full((40, 40, 3), 9, "u1")))]
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for key, suffix, data in files:
            tar.write({"__key__": key, suffix: data})
    index = ShardIndex.open(tmp_path)

    def batches(decoder, workers):
        return list(train_batches(
            DataConfig(workers=workers, global_batch=13, decoder=decoder), index, seed=5, size=32,
            split=Split(1, 13, 1), topology=Topology(0, 1, 0, 1, CPU, "none"), start_step=0, total_steps=3,
        ))  # fmt: skip

    for workers in (0, 2):
        for ours, theirs in zip(batches("nvjpeg", workers), batches("turbo", 0), strict=True):
            assert torch.equal(ours.sample_ids, theirs.sample_ids) and torch.equal(ours.keys, theirs.keys)
            assert (ours.images.float() - theirs.images.float()).abs().mean() < 1
            assert [skip.sample_id for skip in ours.skipped] == [skip.sample_id for skip in theirs.skipped] == [5]


# --- batches ---------------------------------------------------------------------------------------------------------


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
