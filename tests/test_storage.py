"""Reads of shards from real servers that fail: nothing comes short, what may pass is tried again, the rest is named."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from lmim.config import ConfigError
from lmim.data.cache import ReadAhead, ShardCache, Wanted
from lmim.data.shards import ShardIndex
from lmim.data.storage import Damaged, Storage, StorageError, StorageOptions, expand, without_secrets
from tests.conftest import free_port
from tests.servers import serving

QUICK = StorageOptions(timeout_s=1.0, retry_s=5.0)


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.tar").write_bytes(random.Random(number).randbytes(100_000))
    return folder


@pytest.fixture
def server(files):
    with serving(files) as server:
        yield server


def ranges(server, count: int = 20) -> list[tuple[str, int, int]]:
    return [(f"{server.url}/{n % 10}.tar", 900 * n, 900 * n + 4000) for n in range(count)]


def truth(files: Path, wanted: list[tuple[str, int, int]]) -> list[bytes]:
    return [(files / url.rpartition("/")[2]).read_bytes()[start:stop] for url, start, stop in wanted]


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_local_and_remote_ranges_are_the_bytes_of_the_files(server, files):
    wanted = ranges(server)
    local = [(str(files / url.rpartition("/")[2]), start, stop) for url, start, stop in wanted]
    mixed = [pair[i % 2] for i, pair in enumerate(zip(wanted, local, strict=True))]
    for one in (wanted, local, mixed):
        assert Storage(QUICK).read_ranges(one) == truth(files, wanted)
    assert Storage(QUICK).read(f"{server.url}/3.tar") == (files / "3.tar").read_bytes()


def test_a_range_costs_its_bytes_and_no_more(server, files):
    Storage(QUICK).read_ranges(ranges(server))
    assert server.bytes_sent == 20 * 4000


@pytest.mark.parametrize("fault", ["cut", "stall", "whole", "slow", 503, 429, 500, 408])
def test_what_may_pass_is_tried_again_and_nothing_comes_short(server, files, fault):
    wanted = ranges(server)
    server.faults = {f"{n}.tar": [fault, fault] for n in range(0, 10, 4)}
    assert Storage(QUICK).read_ranges(wanted) == truth(files, wanted)
    if fault != "slow" and fault != "whole":
        assert server.requests["0.tar"] >= 3


def test_a_server_that_comes_up_late_is_waited_for(files):
    with serving(files) as server:
        port = server.server_address[1]
    late = {}

    def start():
        time.sleep(1.5)
        late["context"] = serving(files, port)
        late["server"] = late["context"].__enter__()

    thread = threading.Thread(target=start)
    thread.start()
    wanted = [(f"http://127.0.0.1:{port}/1.tar", 5, 500)]
    assert Storage(QUICK).read_ranges(wanted) == truth(files, wanted)
    thread.join()
    late["context"].__exit__(None, None, None)


def test_what_does_not_pass_ends_the_read_with_place_time_and_reason(server):
    server.always = {"1.tar": 503}
    url = f"{server.url}/1.tar".replace("//", "//user:word@") + "?token=secret"
    with pytest.raises(StorageError, match=r"1\.tar\?… cannot be read: 503.*tried again for 1 s") as caught:
        Storage(StorageOptions(timeout_s=1, retry_s=1)).read_ranges([(url, 0, 10)])
    assert "word" not in str(caught.value) and "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_or_too_short_is_damaged_and_the_rest_is_read(server, files):
    wanted = ranges(server, 4)
    (files / "1.tar").unlink()
    (files / "2.tar").write_bytes((files / "2.tar").read_bytes()[:4000])
    server.always = {"3.tar": 410}
    found = Storage(QUICK).read_ranges(wanted)
    assert found[0] == truth(files, wanted[:1])[0]
    assert [type(one) for one in found[1:]] == [Damaged] * 3
    words = [str(one) for one in found[1:]]
    assert "1.tar does not exist" in words[0] and "2.tar is shorter" in words[1] and "3.tar is refused" in words[2]
    beyond = Storage(QUICK).read_ranges([(wanted[2][0], 5000, 6000)])[0]
    assert isinstance(beyond, Damaged)
    local = Storage(QUICK).read_ranges([(str(files / "1.tar"), 0, 1), (str(files / "2.tar"), 3000, 4001)])
    assert "No such file" in str(local[0]) and "shorter" in str(local[1])


def test_trouble_of_the_host_is_no_damage_of_the_data(files, monkeypatch):
    def refuse(*arguments):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(StorageError, match=r"1\.tar cannot be read: Too many open files"):
        Storage(QUICK).read_ranges([(str(files / "1.tar"), 0, 5)])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_credentials_ends_the_read_at_once(server, status):
    server.always = {"1.tar": status}
    with pytest.raises(StorageError, match=rf"1\.tar may not be read \({status}.*look at the credentials"):
        Storage(QUICK).read_ranges([(f"{server.url}/1.tar", 0, 10)])
    assert server.requests["1.tar"] <= 2


def test_a_server_without_ranges_serves_small_shards_and_is_refused_for_large_ones(server, files):
    (files / "large.tar").write_bytes(bytes((16 << 20) + 1))
    server.always = {"large.tar": "whole", "1.tar": "whole"}
    assert Storage(QUICK).read_ranges(ranges(server)) == truth(files, ranges(server))
    with pytest.raises(StorageError, match="knows ranges, such as nginx"):
        Storage(QUICK).read_ranges([(f"{server.url}/large.tar", n, n + 10) for n in range(20)])
    assert server.requests["large.tar"] == 1  # not twenty large answers side by side


def read_in_child(storage: Storage, wanted, answer) -> None:
    answer.put(storage.read_ranges(wanted))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_storage_that_was_used_reads_on_in_a_worker_process(server, files, method):
    storage, wanted = Storage(QUICK), ranges(server, 6)
    storage.read_ranges([*wanted, (str(files / "1.tar"), 0, 9)])
    context = multiprocessing.get_context(method)
    answer = context.Queue()
    child = context.Process(target=read_in_child, args=(storage, wanted, answer), daemon=True)
    child.start()
    assert answer.get(timeout=60) == truth(files, wanted) == storage.read_ranges(wanted)
    child.join()


# --- other places ----------------------------------------------------------------------------------------------------


def test_s3(files, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in dict(AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_ACCESS_KEY_ID="a",
                                AWS_SECRET_ACCESS_KEY="b", AWS_DEFAULT_REGION="us-east-1").items():  # fmt: skip
            monkeypatch.setenv(name, value)
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")
        for path in files.iterdir():
            client.upload_file(str(path), "photos", f"train/{path.name}")
        wanted = [(f"s3://photos/train/{n}.tar", 10 * n, 10 * n + 3000) for n in range(10)]
        storage = Storage(QUICK)
        assert storage.read_ranges(wanted) == truth(files, wanted)
        assert storage.read("s3://photos/train/4.tar") == (files / "4.tar").read_bytes()
        assert storage.size("s3://photos/train/4.tar") == 100_000
        found = storage.read_ranges([("s3://photos/train/no.tar", 0, 5), ("s3://photos/train/1.tar", 99_999, 100_002)])
        assert "does not exist" in str(found[0]) and "shorter" in str(found[1])
    finally:
        server.stop()


def test_gs(files, monkeypatch):
    import urllib.request

    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="photos")
    server.start()
    try:
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        upload = f"{address}/upload/storage/v1/b/photos/o?uploadType=media&name=train/1.tar"
        urllib.request.urlopen(urllib.request.Request(upload, (files / "1.tar").read_bytes(), method="POST"))
        storage, url = Storage(QUICK), "gs://photos/train/1.tar"
        wanted = [(url, 10 * n, 10 * n + 3000) for n in range(10)]
        assert storage.read_ranges(wanted) == truth(files, wanted)
        assert storage.read(url) == (files / "1.tar").read_bytes() and storage.size(url) == 100_000
        found = storage.read_ranges([("gs://photos/train/no.tar", 0, 5), (url, 99_999, 100_002)])
        assert "does not exist" in str(found[0]) and "shorter" in str(found[1])
    finally:
        server.stop()


def lives(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


def test_commands_run_only_where_that_is_allowed(files):
    url = f"pipe:cat {files}/1.tar"
    with pytest.raises(ConfigError, match=r"data\.allow_pipe=true"):
        b"".join(Storage(QUICK).fetch(url))
    allowed = Storage(StorageOptions(timeout_s=60, retry_s=1, allow_pipe=True))
    assert b"".join(allowed.fetch(url)) == (files / "1.tar").read_bytes()
    with pytest.raises(Damaged, match="exit code 3"):
        b"".join(allowed.fetch("pipe:echo some; exit 3"))
    impatient = Storage(StorageOptions(timeout_s=3, retry_s=1, allow_pipe=True))
    with pytest.raises(StorageError, match="printed nothing for 3 s"):
        b"".join(impatient.fetch(f"pipe:sleep 987 & echo $! > {files}/pid; wait"))
    until = time.monotonic() + 60  # the kernel may take a moment, and nobody may reap what was killed
    while lives((files / "pid").read_text().strip()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_unknown_kind_of_place_gets_one_line():
    with pytest.raises(ConfigError, match="pip install 'lmim") as caught:
        Storage(QUICK).read_ranges([("gopher://host/a.tar", 0, 1)])
    assert "\n" not in str(caught.value)


def test_addresses_expand_and_keep_their_secrets(tmp_path):
    for name in ("b1.tar", "a1.tar", "a2.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/a*.tar") == [f"{tmp_path}/a1.tar", f"{tmp_path}/a2.tar"]
    assert expand("s3://b/{00..02}.tar") == [f"s3://b/0{n}.tar" for n in range(3)]
    assert expand(f"{tmp_path}/no*") == [] and expand("plain") == ["plain"]
    assert without_secrets("https://me:word@host/a?key=1") == "https://host/a?…"
    assert without_secrets("https://me:w@rd@host/a@b") == "https://host/a@b"
    assert without_secrets("/data/a?b@c") == "/data/a?b@c"
    assert without_secrets("pipe:curl -H 'Token: 1' host") == "pipe:curl …"


# --- the cache -------------------------------------------------------------------------------------------------------


def shards_of(files: Path, url: str) -> list[Wanted]:
    return [Wanted(f"{url}/{n}.tar", 100_000, hashlib.sha256((files / f"{n}.tar").read_bytes()).hexdigest())
            for n in range(10)]  # fmt: skip


def cache_of(folder: Path, limit_bytes: int = 10**9) -> ShardCache:
    return ShardCache(folder, limit_bytes, Storage(QUICK))


def kept_bytes(folder: Path) -> int:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # else one that makes room and one that takes it would both be counted
        return sum(path.stat().st_size for path in folder.iterdir())


def test_ranges_come_from_the_copy_once_it_is_here(server, files, tmp_path):
    cache = cache_of(tmp_path / "cache")
    shard = shards_of(files, server.url)[3]
    assert cache.path(shard.url) is None and cache.bring(shard) and cache.bring(shard)
    assert server.requests["3.tar"] == 1
    before = server.bytes_sent
    wanted = [(shard.url, 10, 5000)]
    assert cache.storage.read_ranges(wanted) == truth(files, wanted) and server.bytes_sent == before
    assert all(len(path.name) < 40 and path.parent == tmp_path / "cache" for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("fault", ["cut", "stall", "whole", 503])
def test_a_copy_is_whole_or_not_there(server, files, tmp_path, fault):
    cache = cache_of(tmp_path / "cache")
    server.faults = {"3.tar": [fault]}
    shard = shards_of(files, server.url)[3]
    assert cache.bring(shard) and cache.path(shard.url).read_bytes() == (files / "3.tar").read_bytes()


def test_a_copy_that_is_not_what_was_indexed_is_refused(server, files, tmp_path):
    cache, shards = cache_of(tmp_path / "cache"), shards_of(files, server.url)
    server.faults = {"3.tar": ["damage"]}
    (files / "4.tar").write_bytes(b"short")
    (files / "5.tar").unlink()
    for number, words in ((3, "is not what its index says"), (4, "shorter"), (5, "does not exist")):
        with pytest.raises(Damaged, match=words):
            cache.bring(shards[number])
        assert cache.path(shards[number].url) is None
    assert kept_bytes(tmp_path / "cache") == 0
    assert cache.bring(shards[3])


def test_the_oldest_make_room_but_none_that_is_needed(server, files, tmp_path):
    cache, shards = cache_of(tmp_path / "cache", 350_000), shards_of(files, server.url)
    for number in (0, 1, 2):
        assert cache.bring(shards[number])
        time.sleep(0.02)
    cache.path(shards[0].url)  # used again
    assert cache.bring(shards[3]) and kept_bytes(tmp_path / "cache") <= 350_000
    assert [n for n in range(10) if cache.path(shards[n].url)] == [0, 2, 3]
    assert not cache.bring(shards[4], keep=[shard.url for shard in shards])
    assert [n for n in range(10) if cache.path(shards[n].url)] == [0, 2, 3]


def bring_all(folder: Path, shards: list[Wanted], seed: int, seen) -> None:
    cache, draws = cache_of(folder, 450_000), random.Random(seed)
    for _ in range(30):
        shard = draws.choice(shards)
        if cache.bring(shard):
            path = cache.path(shard.url)
            if path is not None:  # else another made room of it
                data = cache.storage.read_ranges([(shard.url, 0, 100_000)])[0]
                assert hashlib.sha256(data).hexdigest() == shard.sha256
        seen.put(kept_bytes(folder) if seed else 0)
    seen.put(-1)


def test_many_processes_share_one_folder_and_a_killed_one_leaves_nothing(server, files, tmp_path):
    """Four processes draw from ten shards where four have room; one is killed while it copies."""
    folder, shards = tmp_path / "cache", shards_of(files, server.url)
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    server.faults = {"9.tar": ["stall"]}
    stuck = context.Process(target=cache_of(folder, 450_000).bring, args=(shards[9],))
    stuck.start()
    while not list(folder.glob("*.part")):
        time.sleep(0.01)
    workers = [context.Process(target=bring_all, args=(folder, shards, seed, seen)) for seed in range(4)]
    for worker in workers:
        worker.start()
    os.kill(stuck.pid, signal.SIGKILL)
    done, sizes = 0, []
    while done < 4:
        size = seen.get(timeout=60)
        done, sizes = done + (size < 0), [*sizes, size]
    for worker in [*workers, stuck]:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 300_000 < max(sizes) <= 450_000
    assert cache_of(folder, 450_000).bring(shards[0]) and not list(folder.glob("*.part"))


def test_read_ahead_brings_what_is_needed_in_order_and_troubles_are_not_fatal(server, files, tmp_path, caplog):
    cache, shards = cache_of(tmp_path / "cache", 350_000), shards_of(files, server.url)
    (files / "1.tar").unlink()
    ahead = ReadAhead(cache)
    ahead.want(shards)
    for _ in range(200):
        time.sleep(0.02)
        if sum(cache.path(shard.url) is not None for shard in shards) == 3:
            break
    assert [n for n in range(10) if cache.path(shards[n].url)] == [0, 2, 3]  # what has room
    assert "1.tar is not kept" in caplog.text or "1.tar does not exist" in caplog.text
    ahead.want(shards[5:7])
    for _ in range(200):
        time.sleep(0.02)
        if cache.path(shards[6].url):
            break
    assert cache.path(shards[5].url) and cache.path(shards[6].url)


def test_a_copy_removed_a_moment_ago_is_read_from_where_the_shard_lies(server, files, tmp_path):
    storage = Storage(QUICK)
    storage.cached = lambda url: tmp_path / "gone.tar"
    wanted = ranges(server, 4)
    assert storage.read_ranges(wanted) == truth(files, wanted)


def test_copies_that_were_removed_are_not_held_open(server, files, tmp_path):
    cache, shards = cache_of(tmp_path / "cache", 350_000), shards_of(files, server.url)
    for shard in shards:
        assert cache.bring(shard)
        assert cache.storage.read_ranges([(shard.url, 0, 9)]) == truth(files, [(shard.url, 0, 9)])
    names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in names if str(tmp_path) in name]


def test_a_shard_without_room_pushes_nothing_out(server, files, tmp_path):
    cache, shards = cache_of(tmp_path / "cache", 350_000), shards_of(files, server.url)
    assert all(cache.bring(shard) for shard in shards[:3])
    assert not cache.bring(shards[4]._replace(bytes=400_000))
    assert not cache.bring(shards[4], keep=[shard.url for shard in shards[:3]])
    assert all(cache.path(shard.url) for shard in shards[:3])


def test_complaints_about_an_index_hide_the_password(server):
    with pytest.raises(ConfigError, match="has no index") as caught:
        ShardIndex.open(server.url.replace("//", "//user:word@"), option="data.train")
    assert "word" not in str(caught.value)


def test_a_full_disk_is_no_end(server, files, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = cache_of(tmp_path / "cache")
    ReadAhead(cache).want(shards_of(files, server.url)[:2])
    for _ in range(200):
        time.sleep(0.02)
        if "No space left" in caplog.text:
            break
    assert caplog.text.count("No space left") == 1
    wanted = ranges(server, 4)
    assert cache.storage.read_ranges(wanted) == truth(files, wanted)


def test_another_data_set_at_the_same_address_is_not_read_from_old_copies(server, files, tmp_path):
    old = ShardCache(tmp_path / "cache", 10**9, Storage(QUICK), version="one")
    shard = shards_of(files, server.url)[0]
    assert old.bring(shard)
    (files / "0.tar").write_bytes(bytes(100_000))
    new = ShardCache(tmp_path / "cache", 10**9, Storage(QUICK), version="other")
    assert new.path(shard.url) is None and new.storage.read_ranges([(shard.url, 0, 9)]) == [bytes(9)]


def test_a_cache_travels_to_a_worker_process(server, files, tmp_path):
    cache = cache_of(tmp_path / "cache")
    shard = shards_of(files, server.url)[0]
    cache.bring(shard)
    before = server.bytes_sent
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.storage.read_ranges([(shard.url, 0, 9)]) == [(files / "0.tar").read_bytes()[:9]]
    assert server.bytes_sent == before
