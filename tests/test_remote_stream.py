"""The stream from servers that fail: the same batches as from local files, and what is lost is counted and named."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch

from lmim.config import Split
from lmim.data.loader import open_data, train_batches
from lmim.data.shards import ShardIndex
from lmim.data.storage import StorageError
from lmim.dist import Topology
from lmim.options import Config, DataConfig
from tests.servers import serving

BATCH, STEPS = 30, 12
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")


@pytest.fixture
def server(shards, tmp_path):
    """Five shards of 64 images, the last of 44, on a server."""
    shutil.copytree(shards / "train", tmp_path / "served")
    with serving(tmp_path / "served") as server:
        yield server


def batches(train: str, *, start: int = 0, ranks: int = 1, **options):
    """Return the steps' (ids, pixels) and what was skipped, read by two workers for each rank."""
    config = Config()
    config.data = DataConfig(train=train, eval="", workers=options.pop("workers", 2), global_batch=BATCH, timeout_s=2.0,
                             retry_minutes=0.2, **options)  # fmt: skip
    index, _ = open_data(config, ALONE)
    split = Split(ranks, BATCH // ranks, 1)
    streams = [
        train_batches(config.data, index, seed=5, size=12, split=split, start_step=start, total_steps=STEPS,
                      topology=Topology(rank, ranks, rank, ranks, torch.device("cpu"), "none"))
        for rank in range(ranks)
    ]  # fmt: skip
    steps, skipped = [], []
    for parts in zip(*streams, strict=True):
        steps.append((torch.cat([p.sample_ids for p in parts]).tolist(), torch.cat([p.images for p in parts])))
        skipped += [skip for part in parts for skip in part.skipped]
    return steps, skipped


def same(ours, theirs) -> bool:
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(ours, theirs, strict=True))


def name(number: int) -> str:
    return f"shard-{number:06d}.tar"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fault", ["cut", 503, "slow", "stall", "whole"])
def test_faults_that_pass_change_nothing(server, shards, tmp_path, fault, cached):
    expected, _ = batches(str(shards / "train"))
    server.faults = {name(n): [None, fault, None, None, fault, fault] for n in range(0, 5, 2)}
    found, skipped = batches(server.url, cache=str(tmp_path / "cache") if cached else "")
    assert same(found, expected) and not skipped
    left = [fault for faults in server.faults.values() for fault in faults]
    assert cached or not left  # all of them happened


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_stream_and_says_where(server):
    server.always = {name(1): 503}
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"shard-000001\.tar cannot be read: 503.*tried again for 12 s"):
        batches(server.url)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers, ranks", [(0, 1), (2, 3)])
def test_damage_is_counted_named_and_replaced_by_one_rule(server, shards, tmp_path, workers, ranks, cached):
    """A shard cut off, bits flipped in another, a third one gone: on any ranks and workers, from any step."""
    index = ShardIndex.open(shards / "train")
    bad = set()
    table = index.table(1)
    os.truncate(server.folder / name(1), int(table.offsets[60]) + 3)
    bad |= set(range(64 + 60, 128))
    with (server.folder / name(2)).open("r+b") as file:
        for place in (0, 7):
            file.seek(int(index.table(2).offsets[place]) + 30)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))
            bad.add(128 + place)
    (server.folder / name(4)).unlink()
    bad |= set(range(256, 300))
    sound, _ = batches(str(shards / "train"))
    order = [sample_id for ids, _ in sound for sample_id in ids]
    following = [next((i for i in order[p:] if i not in bad), None) for p in range(len(order))]
    options = dict(workers=workers, ranks=ranks, cache=str(tmp_path / "cache") if cached else "")
    for start in (0, 5):
        found, skipped = batches(server.url, start=start, **options)
        ids = [sample_id for step, _ in found for sample_id in step]
        expected = following[start * BATCH :]
        pairs = [(a, b) for a, b in zip(ids, expected, strict=True) if b is not None]
        assert all(a == b for a, b in pairs) and len(pairs) > len(ids) - 10
        assert sorted(skip.sample_id for skip in skipped) == sorted(i for i in order[start * BATCH :] if i in bad)
    reasons = {skip.sample_id: skip.reason for skip in skipped}
    assert all("shorter than its index says" in reasons[i] for i in reasons if 124 <= i < 128)
    assert all("not those that were written" in reasons[i] for i in reasons if 128 <= i < 192)
    assert all("does not exist" in reasons[i] for i in reasons if i >= 256)


def test_the_first_batch_after_a_resume_fetches_little_and_later_ones_nothing(server, tmp_path):
    """Less than two shards' bytes for a batch from all five shards; then these are brought here whole."""

    def stream(workers):
        config = Config()
        config.data = DataConfig(train=server.url, eval="", workers=workers, global_batch=BATCH,
                                 cache=str(tmp_path / "cache"))  # fmt: skip
        index, _ = open_data(config, ALONE)
        return index, train_batches(config.data, index, seed=5, size=12, split=Split(1, BATCH, 1), topology=ALONE,
                                    start_step=7, total_steps=200)  # fmt: skip

    index, batches = stream(workers=0)
    before = server.bytes_sent  # the index itself
    next(batches)
    assert 0 < server.bytes_sent - before < 2 * max(shard.bytes for shard in index.shards)
    batches.close()
    _, batches = stream(workers=2)
    for _ in range(100):
        next(batches)
        time.sleep(0.05)
        if len(list((tmp_path / "cache").glob("*.tar"))) == 5:
            break
    for _ in range(20):  # what the workers had read before
        next(batches)
    sent = server.bytes_sent
    for _ in range(20):
        next(batches)
    assert server.bytes_sent == sent
    batches.close()


@pytest.mark.slow
def test_training_reads_s3_through_a_cache(shards, tmp_path, monkeypatch):
    """`lmim train` on an address: moto's server answers in the S3 protocol."""
    import boto3
    from moto.server import ThreadedMotoServer

    from tests.conftest import losses, run_training

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in dict(AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_ACCESS_KEY_ID="a",
                               AWS_SECRET_ACCESS_KEY="b", AWS_DEFAULT_REGION="us-east-1").items():  # fmt: skip
            monkeypatch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")
        for path in (shards / "train").iterdir():
            client.upload_file(str(path), "photos", f"train/{path.name}")
        settings = ("optim.duration=6st", "parallel.backend=local", "data.workers=1")
        run_training(shards, tmp_path / "local", *settings)
        run_training(shards, tmp_path / "s3", *settings, "data.train=s3://photos/train", f"data.cache={tmp_path}/cache")
        assert losses(tmp_path / "s3") == losses(tmp_path / "local")
    finally:
        server.stop()
