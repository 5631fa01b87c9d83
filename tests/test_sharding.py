"""Runs that write shards: killed and started again, in parts, by several workers; compared byte by byte."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lmim.config import ConfigError
from lmim.data.datasets import Source, SourceImage, open_source
from lmim.data.pool import WorkerDied
from lmim.data.progress import ImageProgress
from lmim.data.sharding import _tar_header, index_tars, look_at, write_shards
from lmim.data.shards import ShardIndex, ShardReader
from lmim.data.transforms import ImageError
from lmim.data.unfinished import finish

IMAGES, PER_SHARD = 120, 7


def image_bytes(value: int, file_format: str = "PNG", size: int = 8) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, file_format)
    return out.getvalue()


def load(value: int, pause_s: float = 0.0, dies: bool = False) -> bytes:
    time.sleep(pause_s)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return image_bytes(value, ("PNG", "JPEG")[value % 2])[: 40 if value % 31 == 5 else None]


def source(pause_s: float = 0.0, dies_at: int = -1) -> Source:
    """Return images of four classes, of which every 31st is cut off."""
    images = [
        SourceImage(
            f"{i:03d}", ("png", "jpg")[i % 2], i % 4, f"{i:03d}.x", partial(load, i, pause_s, i == dies_at), 500
        )
        for i in range(IMAGES)
    ]
    return Source("made up", tuple("abcd"), images, ("notes.txt",))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert text and "\n" not in text
    return text


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run by one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    index = write_shards(source(), folder, samples_per_shard=PER_SHARD)
    assert [skip.path for skip in index.skipped] == ["005.x", "036.x", "067.x", "098.x", "notes.txt"]
    assert len(index) == IMAGES - 4 and len(index.shards) == 18 and index.shards[-1].samples <= 1
    assert all(shard.samples <= PER_SHARD for shard in index.shards)
    found = contents(folder)
    assert len(found) == 1 + 2 * 18 and not any("unfinished" in name for name in found)
    return found


def in_its_own_group(do: Callable[[], object]) -> int:
    """Start `do` in a process group of its own and return its id."""
    pid = os.fork()
    os.setpgid(pid, pid or 0)  # by both, as either may come first
    if pid == 0:
        try:
            do()
        finally:
            os._exit(0)
    return pid


# --- stopped and started again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, workers", [(0, 2), (1, 1), (2, 3)])
def test_three_kills_at_random_leave_the_bytes_of_an_unbroken_run(unbroken, tmp_path, seed, workers):
    rng, folder, pause_s, kills = random.Random(seed), tmp_path / "shards", 0.01, 0
    while kills < 3:
        run = partial(write_shards, source(pause_s), folder, samples_per_shard=PER_SHARD, workers=workers)
        pid = in_its_own_group(run)
        time.sleep(rng.uniform(0.02, 0.15))
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        if (folder / "index.json").exists():  # it was faster than the kill
            shutil.rmtree(folder)
            pause_s, kills = 2 * pause_s, 0
    started = []
    write_shards(source(), folder, samples_per_shard=PER_SHARD, workers=2, progress=started.append)
    assert started[-1].images == IMAGES
    assert contents(folder) == unbroken


def test_a_run_takes_up_the_finished_shards_and_touches_none_of_them(unbroken, tmp_path):
    folder = tmp_path / "shards"

    def stop(done):
        if done.images == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source(), folder, samples_per_shard=PER_SHARD, progress=stop)
    before = {path.name: path.stat().st_ino for path in (folder / "unfinished").glob("*.tar")}
    assert len(before) == 33 // PER_SHARD
    with pytest.raises(ConfigError, match="holds no shards yet, they are being written") as caught:
        ShardIndex.open(folder)
    one_line(caught)
    done = []
    write_shards(source(), folder, samples_per_shard=PER_SHARD, progress=done.append)
    assert done[0].images == len(before) * PER_SHARD and done[-1].images == IMAGES
    assert {name: (folder / name).stat().st_ino for name in before} == before
    assert contents(folder) == unbroken
    stamp = (folder / "index.json").stat().st_mtime_ns
    write_shards(source(), folder, samples_per_shard=PER_SHARD)  # finished: nothing to do
    assert (folder / "index.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_stopped_while_files_get_their_names_is_no_data_set(unbroken, tmp_path, monkeypatch, overwrite):
    folder, replace, calls = tmp_path / "shards", os.replace, []
    if overwrite:
        write_shards(source(), folder, samples_per_shard=9)

    def stop(old, new):
        if Path(new).parent == folder:
            calls.append(new)
            if len(calls) == 9:
                raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source(), folder, samples_per_shard=PER_SHARD, overwrite=overwrite)
    monkeypatch.setattr(os, "replace", replace)
    assert any(folder.glob("*.tar"))
    with pytest.raises(ConfigError, match="holds no shards yet"):
        ShardIndex.open(folder)
    write_shards(source(dies_at=0), folder, samples_per_shard=PER_SHARD)  # would die if it read anything
    assert contents(folder) == unbroken


def test_records_of_another_plan_are_not_taken_for_this_one(unbroken, tmp_path):
    write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, seed=5, part=(1, 2))
    (tmp_path / "unfinished" / "plan.json").unlink()  # as where removing an old run was stopped
    write_shards(source(), tmp_path, samples_per_shard=PER_SHARD)
    assert contents(tmp_path) == unbroken


def test_workers_outlive_a_killed_run_by_no_harm(unbroken, tmp_path):
    folder = tmp_path / "shards"
    pid = in_its_own_group(lambda: write_shards(source(0.01), folder, samples_per_shard=PER_SHARD, workers=2))
    time.sleep(0.15)
    os.kill(pid, signal.SIGKILL)  # its workers go on for a moment
    os.waitpid(pid, 0)
    write_shards(source(), folder, samples_per_shard=PER_SHARD, workers=2)
    assert contents(folder) == unbroken
    time.sleep(0.3)
    assert contents(folder) == unbroken


def test_a_dead_worker_is_an_error_that_names_it(unbroken, tmp_path):
    with pytest.raises(
        WorkerDied, match=r"worker process \d+ was killed by SIGKILL while at work on shard-0000"
    ) as caught:
        write_shards(source(dies_at=60), tmp_path, samples_per_shard=PER_SHARD, workers=2)
    one_line(caught)
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
    write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, workers=2)
    assert contents(tmp_path) == unbroken


def test_a_full_disk_in_a_worker_is_raised_here(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, workers=2)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", [[(1, 3), (2, 3), (3, 3)], [(3, 3), (1, 3), (2, 3)], [(2, 2), (1, 2)], [(30, 30), (1, 1)]]
)
def test_parts_in_any_order_give_the_files_of_one_run(unbroken, tmp_path, order):
    for n, part in enumerate(order):
        assert (tmp_path / "index.json").exists() is False
        index = write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, part=part, workers=1 + n % 3)
        assert (index is None) == (n < len(order) - 1)
    assert contents(tmp_path) == unbroken


def test_parts_at_the_same_time(unbroken, tmp_path):
    pids = [in_its_own_group(partial(write_shards, source(), tmp_path, samples_per_shard=PER_SHARD, part=(i, 3)))
            for i in (1, 2, 3)]  # fmt: skip
    for pid in pids:
        os.waitpid(pid, 0)
    assert contents(tmp_path) == unbroken


def test_the_same_run_twice_at_a_time_is_refused(unbroken, tmp_path):
    pid = in_its_own_group(partial(write_shards, source(0.02), tmp_path, samples_per_shard=PER_SHARD, workers=2))
    while not list(tmp_path.glob("unfinished/*.npz")):
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=r"is being written by a run that is going on.*--part") as caught:
        write_shards(source(), tmp_path, samples_per_shard=PER_SHARD)
    one_line(caught)
    os.waitpid(pid, 0)
    assert contents(tmp_path) == unbroken


def test_parts_of_several_folders_are_merged_by_hand(unbroken, tmp_path):
    for i in (1, 2):
        write_shards(source(), tmp_path / str(i), samples_per_shard=PER_SHARD, part=(i, 2))
    assert finish(tmp_path / "1") == 9
    shutil.copytree(tmp_path / "2", tmp_path / "1", dirs_exist_ok=True)
    assert len(finish(tmp_path / "1")) == IMAGES - 4
    assert contents(tmp_path / "1") == unbroken
    with pytest.raises(ConfigError, match="written in parts") as caught:
        finish(tmp_path / "nowhere")
    one_line(caught)


@pytest.mark.parametrize("wrong", [dict(part=(0, 2)), dict(part=(3, 2)), dict(workers=0)])
def test_wrong_parts_and_workers_are_named(tmp_path, wrong):
    with pytest.raises(ConfigError, match="must be at least 1, and part") as caught:
        write_shards(source(), tmp_path, **wrong)
    one_line(caught)


# --- another plan ----------------------------------------------------------------------------------------------------


def test_another_plan_is_refused_with_what_differs_or_overwrites(unbroken, tmp_path):
    write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, part=(1, 2))
    with pytest.raises(ConfigError, match=r"another plan \(samples_per_shard 7 there, 9 now\).*--overwrite") as caught:
        write_shards(source(), tmp_path, samples_per_shard=9)
    one_line(caught)
    fewer = Source("fewer", tuple("abcd"), source().images[1:])
    with pytest.raises(ConfigError, match="120 images of made up there, 119 of fewer now") as caught:
        write_shards(fewer, tmp_path, samples_per_shard=PER_SHARD)
    one_line(caught)
    write_shards(fewer, tmp_path, samples_per_shard=9, part=(1, 2), overwrite=True)
    write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, overwrite=True)
    assert contents(tmp_path) == unbroken
    with pytest.raises(ConfigError, match="holds shards already"):
        write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, seed=1)


# --- what is in a shard ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b.jpg", "x" * 100, "x" * 101, "grüße.png", "a/" * 90 + "b.cls"])
@pytest.mark.parametrize("size", [0, 1, 511, 98_765, 1 << 27])
def test_headers_are_those_that_tarfile_writes(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert _tar_header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def test_the_index_tells_the_least_median_and_greatest(tmp_path):
    sizes = [(30, 8), (10, 9), (20, 40), (25, 7)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    files = sorted(path.stat().st_size for path in tmp_path.glob("*.png"))
    write_shards(open_source(tmp_path), tmp_path / "shards")
    content = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert content["width"] == {"min": 10, "median": 20, "max": 30}
    assert content["height"] == {"min": 7, "median": 8, "max": 40}
    assert content["image_bytes"] == {"min": files[0], "median": files[1], "max": files[3]}
    assert content["bytes"] == (tmp_path / "shards" / "shard-000000.tar").stat().st_size
    assert content["class_counts"] is None


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_quick_check_finds_every_cut_and_the_other_one_flipped_bits(file_format):
    data = image_bytes(1, file_format, size=64)
    assert look_at(data, decode=False) == look_at(data, decode=True) == (file_format, (64, 64))
    for cut in (0, 4, 100, len(data) // 2, len(data) - 65):
        with pytest.raises(ImageError):
            look_at(data[:cut], decode=False)
    if file_format == "PNG":
        place = len(data) // 2
        flipped = data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
        assert look_at(flipped, decode=False) == ("PNG", (64, 64))
        with pytest.raises(ImageError):
            look_at(flipped, decode=True)


def test_an_end_marker_inside_a_thumbnail_is_none():
    out, thumbnail = io.BytesIO(), image_bytes(2, "JPEG")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)).save(
        out, "JPEG", exif=b"Exif\0\0" + thumbnail)  # fmt: skip
    cut = out.getvalue()[:3000]
    assert b"\xff\xd9" in cut
    with pytest.raises(ImageError, match="truncated"):
        look_at(cut, decode=False)


# --- tars that stay where they are -----------------------------------------------------------------------------------


def test_index_only_names_tars_where_they_are(tmp_path, unbroken):
    write_shards(source(), tmp_path / "tars", samples_per_shard=PER_SHARD)
    tars = sorted((tmp_path / "tars").glob("*.tar"))[:5]
    with tarfile.open(tars[0], "a") as tar:
        for name, data in (("broken.png", image_bytes(3)[:50]), ("sound.png", image_bytes(4))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    one = index_tars(tars, tmp_path / "one")
    assert index_tars(tars, tmp_path / "two", part=(2, 2)) is None
    index_tars(tars, tmp_path / "two", part=(1, 2), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == ["index.json", *(f"shard-{n:06d}.npz" for n in range(5))]
    index = ShardIndex.open(tmp_path / "one")
    assert [shard.name for shard in index.shards] == [str(tar) for tar in tars] and len(index) == len(one)
    assert [shard.sha256 for shard in index.shards] == [hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars]
    assert [skip.path for skip in index.skipped] == [f"{tars[0]}: broken.png"]
    theirs = {sample["__key__"]: sample for sample in wds.WebDataset([str(tar) for tar in tars], shardshuffle=False)}
    assert "broken" in theirs and len(theirs) == len(index) + 1
    reader = ShardReader(index)
    for i in range(len(index)):
        sample = reader.read(i)
        assert theirs[sample.key][sample.suffix] == sample.image
    assert (index.table(0).checksums >= 0).all()


def test_tars_are_indexed_in_their_own_folder_and_none_is_removed(tmp_path):
    folder, link = tmp_path / "data", tmp_path / "link"
    write_shards(source(), folder, samples_per_shard=PER_SHARD)
    before = contents(folder)
    del before["index.json"]
    for path in (*folder.glob("*.npz"), folder / "index.json"):
        path.unlink()
    link.symlink_to(folder, target_is_directory=True)
    for overwrite, place in ((False, folder), (True, folder), (True, link)):
        tars = sorted(place.glob("*.tar"))
        index = index_tars(tars, folder, overwrite=overwrite)
        assert [index.url(number) for number in range(18)] == [str(tar) for tar in tars]
        after = contents(folder)
        del after["index.json"]
        assert after == before


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_counts_all_workers_and_names_the_rates(tmp_path, capsys):
    seen = []
    with ImageProgress("made up") as progress:
        write_shards(source(), tmp_path, samples_per_shard=PER_SHARD, workers=3,
                     progress=lambda done: (seen.append(done), progress(done)))  # fmt: skip
    assert seen[0].images == 0 and seen[-1].images == seen[-1].images_total == IMAGES
    assert seen[-1].bytes == sum(len(image.read()) for image in source().images)
    err = capsys.readouterr().err
    assert err.startswith("made up: 120/120 images, ") and "images/s" in err and "MB/s, ETA 0 s" in err
