"""Sources, shards and the epoch plan: against webdataset's own reader, the files they were made from, and tar's."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lmim.config import ConfigError
from lmim.data.datasets import EMBEDDED_FOLDER, FASHION_MNIST_CLASSES, open_source
from lmim.data.sharding import write_shards
from lmim.data.shards import Shard, ShardIndex, ShardReader
from lmim.data.storage import Damaged


def image_bytes(value: int, file_format: str = "PNG", size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, 255 - value, 7)).save(out, file_format)
    return out.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three classes with 30 images in all, nested, of two formats, with dots and other letters in their names."""
    names = [f"class.{i % 3}/{'deep/er/' if i % 2 else ''}photo{i:02d}{'.v1' if i % 5 == 0 else ''}" for i in range(28)]
    files = {
        f"{name}.{'JPEG' if i % 4 else 'png'}": image_bytes(i, "JPEG" if i % 4 else "PNG")
        for i, name in enumerate(names)
    }
    files |= {"class.1/same.png": image_bytes(90), "class.1/same.jpg": image_bytes(91, "JPEG")}
    return put(tmp_path / "photos", files)


def plain_webdataset(index: ShardIndex) -> list[dict]:
    paths = [index.url(number) for number in range(len(index.shards))]
    return list(wds.WebDataset(paths, shardshuffle=False, empty_check=False))


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, count", [("train", 10_000), ("eval", 2_000)])
def test_embedded_images_are_the_first_of_fashion_mnist(split, count):
    source = open_source(f"embedded:{split}")
    assert len(source.images) == count and source.classes == FASHION_MNIST_CLASSES
    image = Image.open(io.BytesIO(source.images[0].read()))
    assert (image.mode, image.size, image.format) == ("L", (28, 28), "PNG")
    # known of the data set: both splits begin with an ankle boot; the mean of its train images is 0.2860
    assert source.images[0].label == 9
    mean = np.mean([np.asarray(Image.open(io.BytesIO(image.read()))).mean() / 255 for image in source.images[:1000]])
    assert abs(mean - 0.286) < 0.01


def test_embedded_files_are_small_and_keep_their_notice():
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= 7e6
    notice = (EMBEDDED_FOLDER / "NOTICE").read_text()
    assert "Zalando SE" in notice and "The above copyright notice and this permission notice" in notice


def test_class_folders_give_labels_in_the_order_of_their_names(photos):
    source = open_source(photos)
    assert source.classes == ("class.0", "class.1", "class.2")
    assert len(source.images) == 30
    for image in source.images:
        assert image.path.startswith(source.classes[image.label] + "/")
        assert image.read() == (photos / image.path).read_bytes()
    assert [image.path for image in source.images] == sorted(
        (image.path for image in source.images), key=lambda p: p.split("/")
    )


def test_keys_are_unique_have_no_dot_and_name_the_file(photos):
    images = open_source(photos).images
    assert len({image.key for image in images}) == len(images)
    for image in images:
        assert "." not in image.key and image.key.isascii()
        assert unquote(image.key) in (image.path.rpartition(".")[0], image.path)


def test_images_beside_folders_mean_no_labels_and_hidden_files_are_passed_over(tmp_path):
    folder = put(tmp_path / "flat", {"a.png": image_bytes(1), "sub/ü b.JPG": image_bytes(2, "JPEG"),
                                     ".hidden.png": b"", ".thumbs/c.png": b"", "notes.txt": b"words"})  # fmt: skip
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "sub" / "round").symlink_to(folder, target_is_directory=True)
    source = open_source(folder)
    assert source.classes is None and {image.label for image in source.images} == {None}
    assert [image.path for image in source.images] == ["a.png", "link.png", "sub/ü b.JPG"]
    assert [image.suffix for image in source.images] == ["png", "png", "jpg"]
    assert source.other_files == ("notes.txt",)


@pytest.mark.parametrize(
    "files, spec, words",
    [
        ({}, "nowhere", "does not exist"),
        ({"empty/notes.txt": b""}, "empty", "holds no images.*jpeg"),
        ({"file.png": b""}, "file.png", "is no folder"),
        ({}, "embedded:test", "embedded:train and embedded:eval"),
        ({"in/train/a/x.png": b"", "in/val/a/y.png": b""}, "in", "holds splits.*in/train"),
    ],
)
def test_unusable_sources_say_so_in_one_line(tmp_path, files, spec, words):
    put(tmp_path, files)
    with pytest.raises(ConfigError, match=words) as caught:
        open_source(spec if ":" in spec else tmp_path / spec, option="SRC")
    assert f"SRC ({spec if ':' in spec else tmp_path / spec})" in one_line(caught)


# --- writing and reading ---------------------------------------------------------------------------------------------


def test_plain_webdataset_reads_what_the_reader_reads_and_the_files_hold(photos, tmp_path):
    index = write_shards(open_source(photos), tmp_path / "shards", samples_per_shard=8)
    assert [shard.samples for shard in index.shards] == [8, 8, 8, 6] and len(index) == 30
    reader = ShardReader(ShardIndex.open(tmp_path / "shards"))
    theirs = plain_webdataset(index)
    originals = {image.key: image for image in open_source(photos).images}
    assert len(theirs) == 30 and {sample["__key__"] for sample in theirs} == set(originals)
    for sample_id, wanted in enumerate(theirs):
        found = reader.read_wds(sample_id)
        assert found == {name: wanted[name] for name in found} and set(wanted) - set(found) <= {"__local_path__"}
        original, sample = originals[wanted["__key__"]], reader.read(sample_id)
        assert sample == (original.key, original.suffix, (photos / original.path).read_bytes(), original.label)
    assert index.labels().tolist() == [int(sample["cls"]) for sample in theirs]
    assert index.labels().dtype == np.int64


def test_shuffled_by_the_seed_or_in_the_order_of_the_source(photos, tmp_path):
    source = open_source(photos)

    def keys(seed):
        index = write_shards(source, tmp_path / str(seed), seed=seed)
        return [ShardReader(index).read(i).key for i in range(len(index))]

    in_order = [image.key for image in source.images]
    assert keys(None) == in_order
    assert keys(0) != in_order and keys(1) != keys(2) and sorted(keys(3)) == sorted(in_order)


def test_a_second_run_writes_the_same_bytes(photos, tmp_path):
    (photos / "class.0" / "broken.png").write_bytes(b"x")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_shards(open_source(photos), folder, samples_per_shard=7, short_side=5)
        os.utime(photos / "class.1" / "same.png", (1, 1))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["index.json", *(f"shard-{n:06d}.{kind}" for n in range(5) for kind in ("npz", "tar"))]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_index_says_what_the_shards_hold(photos, tmp_path):
    index = write_shards(open_source(photos), tmp_path / "shards", samples_per_shard=13)
    content = json.loads((tmp_path / "shards" / "index.json").read_text())
    sizes = [len(path.read_bytes()) for path in photos.rglob("*.*") if path.is_file()]
    assert content["samples"] == 30 and content["mean_image_bytes"] == pytest.approx(np.mean(sizes), abs=0.1)
    assert content["class_counts"] == [
        sum(f"class.{c}/" in str(p) for p in photos.rglob("*.*") if p.is_file()) for c in range(3)
    ]
    for shard in content["shards"]:
        path = tmp_path / "shards" / shard["name"]
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == path.stat().st_size
    assert ShardIndex.open(tmp_path / "shards").fingerprint == index.fingerprint


def test_shards_end_before_their_bytes_do(photos, tmp_path):
    index = write_shards(open_source(photos), tmp_path / "shards", shard_bytes=10_000)
    assert len(index.shards) > 2 and sum(shard.samples for shard in index.shards) == 30
    for shard in index.shards:
        with tarfile.open(tmp_path / "shards" / shard.name) as tar:
            last = tar.getmembers()[-1]
        assert last.offset_data + 512 <= 10_000


def test_short_side_makes_large_images_smaller_and_passes_small_ones_through(tmp_path):
    files = {"large.png": image_bytes(3, size=64), "small.png": image_bytes(4, size=16)}
    index = write_shards(open_source(put(tmp_path / "in", files)), tmp_path / "shards", short_side=16, seed=None)
    large, small = (ShardReader(index).read(i) for i in range(2))
    assert (large.suffix, Image.open(io.BytesIO(large.image)).size) == ("jpg", (16, 16))
    assert small.image == files["small.png"] and small.label is None


def test_broken_images_are_counted_named_and_skipped(tmp_path, caplog):
    cut = image_bytes(5, "JPEG", size=64)[:-100]
    files = {f"a/{i}.png": image_bytes(i) for i in range(5)}
    files |= {"a/cut.jpg": cut, "a/words.png": b"not pixels", "a/notes.txt": b"words"}
    folder = put(tmp_path / "in", files)
    (folder / "a" / "gone.png").symlink_to(folder / "nothing.png")
    with caplog.at_level(logging.INFO):
        index = write_shards(open_source(folder), tmp_path / "shards")
    assert len(index) == 5
    skipped = dict(ShardIndex.open(tmp_path / "shards").skipped)
    assert list(skipped) == ["a/cut.jpg", "a/gone.png", "a/notes.txt", "a/words.png"]
    assert "truncated" in skipped["a/cut.jpg"].lower() and "No such file" in skipped["a/gone.png"]
    assert "no image of the formats" in skipped["a/words.png"]
    assert "a/cut.jpg" in caplog.text and "a/words.png" in caplog.text


def test_where_no_image_is_sound_it_is_an_error_and_no_data_set(tmp_path):
    folder = put(tmp_path / "in", {"a.png": b"x", "b.png": b"y"})
    with pytest.raises(ConfigError, match="none of 2 images can be decoded") as caught:
        write_shards(open_source(folder), tmp_path / "shards")
    one_line(caught)
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_stopped_run_leaves_no_data_set_and_what_it_was_to_overwrite(photos, tmp_path):
    source, folder = open_source(photos), tmp_path / "shards"

    def stop(done):
        if done.images == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source, folder, samples_per_shard=4, progress=stop)
    with pytest.raises(ConfigError, match="holds no shards"):
        ShardIndex.open(folder)
    before = write_shards(source, folder, samples_per_shard=4)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, folder, samples_per_shard=10, overwrite=True, progress=stop)
    assert ShardIndex.open(folder).fingerprint == before.fingerprint
    after = write_shards(source, folder, samples_per_shard=10, overwrite=True)
    assert ShardIndex.open(folder).fingerprint == after.fingerprint != before.fingerprint
    assert len(list(folder.iterdir())) == 1 + 2 * 3


def test_reader_and_index_travel_to_worker_processes(photos, tmp_path):
    reader = ShardReader(write_shards(open_source(photos), tmp_path / "shards", samples_per_shard=9))
    wanted = [reader.read(i) for i in range(30)]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.read(i) for i in range(30)] == wanted
    with pytest.raises(IndexError):
        reader.read(30)


# --- tars from elsewhere, and damage ---------------------------------------------------------------------------------


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w", **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_plain_tars_without_an_index_are_a_data_set(tmp_path, caplog):
    long = "very/" * 40 + "long"
    write_tar(
        tmp_path / "b.tar",
        [("3.txt", b"caption"), ("3.JPG", image_bytes(3, "JPEG")), ("README", b""), ("4.json", b"{}")],
    )
    webp = image_bytes(2, "WEBP")
    write_tar(
        tmp_path / "a.tar",
        [("./1.png", image_bytes(1)), ("./1.cls", b" 2\n"), (long + ".webp", webp), (long + ".cls", b"cat")],
    )
    with caplog.at_level(logging.INFO):
        index = ShardIndex.open(tmp_path)
    assert "has no index.json" in caplog.text
    assert [shard.samples for shard in index.shards] == [2, 1] and index.labels().tolist() == [2, -1, -1]
    reader = ShardReader(index)
    found = {reader.read(i).key: reader.read(i).image for i in range(3)}
    assert found == {"./1": image_bytes(1), long: webp, "3": image_bytes(3, "JPEG")}
    theirs = {sample["__key__"] for sample in plain_webdataset(index)}
    assert set(found) == theirs - {"4"}
    before = index.fingerprint
    write_tar(tmp_path / "c.tar", [("5.png", image_bytes(5))])
    assert ShardIndex.open(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    "members, attributes, words",
    [
        ([("/etc/x.png", b"1")], {}, "points outside"),
        ([("a/../../x.png", b"1")], {}, "points outside"),
        ([("x.png", b"")], {"type": tarfile.SYMTYPE, "linkname": "y"}, "is no regular file"),
        ([("x.png", b"")], {"type": tarfile.FIFOTYPE}, "is no regular file"),
        ([("x.txt", b"1")], {}, "suffix of an image"),
    ],
)
def test_unsafe_or_imageless_tars_are_refused(tmp_path, members, attributes, words):
    write_tar(tmp_path / "a.tar", members, **attributes)
    with pytest.raises(ConfigError, match=words) as caught:
        ShardIndex.open(tmp_path)
    one_line(caught)


def test_oversized_members_are_refused(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("a.png", b"12345")])
    monkeypatch.setattr("lmim.data.shards.MAX_MEMBER", 4)
    with pytest.raises(ConfigError, match="more than the 4 allowed"):
        ShardIndex.open(tmp_path)


def test_compressed_and_cut_tars_are_refused(tmp_path):
    write_tar(tmp_path / "zip" / "a.tar", [("a.png", image_bytes(1))], mode="w:gz")
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.png", image_bytes(i)) for i in range(4)]).read_bytes()
    for cut in (1100, 1024, 1536, 3 * 1024 + 5):  # in a header, between members, in data, in the end mark
        put(tmp_path / str(cut), {"a.tar": whole[:cut]})
    put(tmp_path / "flipped", {"a.tar": whole[:2048] + b"\x80" * 512 + whole[2560:]})
    for folder in ("zip", "1100", "1024", "1536", "3077", "flipped"):
        with pytest.raises(ConfigError, match=r"damaged|cut off") as caught:
            ShardIndex.open(tmp_path / folder)
        one_line(caught)


def edit_index(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | changes))


DAMAGE = {
    "shard-000000.tar is missing": lambda folder: (folder / "shard-000000.tar").unlink(),
    "bytes where its index says": lambda folder: os.truncate(folder / "shard-000001.tar", 1024),
    "version 99": lambda folder: edit_index(folder, version=99),
    "is no index of shards": lambda folder: (folder / "index.json").write_text("{"),
    "is no index of shards ": lambda folder: edit_index(folder, shards=[{"name": 1}]),
    "npz cannot be read": lambda folder: (folder / "shard-000001.npz").write_bytes(b"PK"),
    "does not fit": lambda folder: os.replace(folder / "shard-000000.npz", folder / "shard-000001.npz"),
    "cannot be read.*No such": lambda folder: (folder / "shard-000001.npz").unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damaged_folders_say_so_in_one_line(photos, tmp_path, words):
    write_shards(open_source(photos), tmp_path / "shards", samples_per_shard=16)
    DAMAGE[words](tmp_path / "shards")
    with pytest.raises(ConfigError, match=words) as caught:
        ShardReader(ShardIndex.open(tmp_path / "shards")).read(29)
    assert str(tmp_path / "shards") in one_line(caught)


@pytest.mark.parametrize("failures, readable", [(2, True), (3, False)])
def test_a_side_file_is_read_again_when_another_threads_parsing_got_in_the_way(
    photos, monkeypatch, tmp_path, failures, readable
):
    """CPython's gh-106905, which early patch releases of 3.11 have: a SystemError that says nothing of the file."""
    index = write_shards(open_source(photos), tmp_path / "shards")
    expected, load, left = ShardReader(index).read(29), np.load, [failures]

    def load_disturbed(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise SystemError("AST constructor recursion depth mismatch")
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", load_disturbed)
    fresh = ShardReader(ShardIndex.open(tmp_path / "shards"))
    if readable:
        assert fresh.read(29) == expected
    else:
        with pytest.raises(SystemError, match="recursion depth"):
            fresh.read(29)


def test_a_shard_that_shrinks_or_goes_while_in_use_is_named(photos, tmp_path):
    index = write_shards(open_source(photos), tmp_path / "shards")
    reader = ShardReader(index)
    os.truncate(tmp_path / "shards" / "shard-000000.tar", 2048)
    with pytest.raises(Damaged, match=r"shard-000000\.tar is shorter"):
        reader.read(29)
    (tmp_path / "shards" / "shard-000000.tar").unlink()
    with pytest.raises(Damaged, match=r"shard-000000\.tar cannot be read: No such file"):
        ShardReader(ShardIndex("" + index.folder, index.shards)).read(29)


def test_folders_that_are_no_shards_tell_how_to_make_them(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "empty", "holds no shards"),
                          (photos, "holds images, not shards")):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as caught:
            ShardIndex.open(folder, option="data.train")
        text = one_line(caught)
        assert text.startswith(f"data.train ({folder})") and "python tools/shard_images.py" in text


@pytest.mark.parametrize(
    "option",
    [dict(samples_per_shard=0), dict(shard_bytes=0), dict(short_side=-1), dict(jpeg_quality=101), dict(seed=-1)],
)
def test_wrong_options_are_named(photos, tmp_path, option):
    with pytest.raises(ConfigError) as caught:
        write_shards(open_source(photos), tmp_path / "shards", **option)
    ((name, value),) = option.items()
    assert one_line(caught).startswith(f"{name} ({value}) must be")


def test_shards_are_not_overwritten_unasked(photos, tmp_path):
    write_tar(tmp_path / "theirs" / "shard-000000.tar", [("a.png", image_bytes(1))])
    with pytest.raises(ConfigError, match=r"holds shards already.*--overwrite") as caught:
        write_shards(open_source(photos), tmp_path / "theirs")
    one_line(caught)


def test_locate_finds_the_shard_and_place_of_each_sample():
    counts = (7, 0, 31, 1, 12, 1, 50, 3, 0)
    index = ShardIndex("nowhere", [Shard(f"{n}.tar", count, 0, None, "") for n, count in enumerate(counts)])
    numbers, places = index.locate(np.array([0, 6, 7, 38, 104]))
    assert numbers.tolist() == [0, 0, 2, 3, 7] and places.tolist() == [0, 6, 0, 0, 2]
    for sample_id in (-1, 105):
        with pytest.raises(IndexError):
            index.locate(sample_id)
