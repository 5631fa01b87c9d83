"""Images that come in archives: what is listed and read equals what plain tar, pyarrow and the builders put there."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lmim.config import ConfigError
from lmim.data.datasets import open_source
from lmim.data.sharding import write_shards
from lmim.data.shards import ShardIndex, ShardReader


def image_bytes(value: int, file_format: str = "JPEG", size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, 255 - value, 7)).save(out, file_format)
    return out.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def by_webdataset(folder: Path) -> dict[str, tuple[bytes, int | None]]:
    """Return {key: (image, label)} of the shards in a folder, read by plain webdataset."""
    samples = wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    images = {}
    for sample in samples:
        (image,) = (value for name, value in sample.items() if name in ("jpg", "jpeg", "png", "webp"))
        images[sample["__key__"]] = (image, int(sample["cls"]) if "cls" in sample else None)
    return images


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert text and "\n" not in text
    return text


# --- ImageNet --------------------------------------------------------------------------------------------------------

WNIDS = ["n02119789", "n01440764", "n02100735"]  # in the order of ILSVRC2012_ID, which is not the sorted one
TRUTH = [3, 1, 1, 2, 3]


@pytest.fixture
def imagenet(tmp_path):
    """The three archives in their real layout, with three classes, nine and five images."""
    from scipy.io import savemat

    folder = tmp_path / "imagenet"
    folder.mkdir()
    train = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{i}.JPEG": image_bytes(10 * c + i, size=9 + i % 5) for i in (7, 10026, 3)})
        for c, wnid in enumerate(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(train))
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": image_bytes(100 + i) for i in (2, 1, 5, 3, 4)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
             ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]  # fmt: skip
    rows = [(i + 1, wnid, f"words {i}", "gloss", 0, np.empty(0), 0, 3) for i, wnid in enumerate(WNIDS)]
    rows.append((4, "n00001740", "entity", "above them", 3, np.array([1, 2, 3]), 1, 0))  # not a class
    synsets = np.array(rows, dtype=kinds).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    top = "ILSVRC2012_devkit_t12"
    devkit = {
        f"{top}/readme.txt": b"words", f"{top}/data/meta.mat": meta.getvalue(),
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in TRUTH).encode(),
    }  # fmt: skip
    (folder / f"{top}.tar.gz").write_bytes(gzip.compress(tar_bytes(devkit)))
    return folder


def test_imagenet_train_archive_is_read_in_place(imagenet, tmp_path):
    source = open_source(imagenet / "ILSVRC2012_img_train.tar")
    assert source.classes == tuple(sorted(WNIDS)) and source.other_files == ()
    write_shards(source, tmp_path / "shards", samples_per_shard=4)
    wanted = {
        f"{wnid}/{wnid}_{i}": (image_bytes(10 * c + i, size=9 + i % 5), sorted(WNIDS).index(wnid))
        for c, wnid in enumerate(WNIDS) for i in (7, 10026, 3)
    }  # fmt: skip
    assert by_webdataset(tmp_path / "shards") == wanted
    assert sorted(path.name for path in imagenet.iterdir()) == [
        "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]  # fmt: skip


def test_imagenet_validation_has_the_labels_of_the_train_archive(imagenet, tmp_path):
    source = open_source(imagenet / "ILSVRC2012_img_val.tar")
    assert source.classes == open_source(imagenet / "ILSVRC2012_img_train.tar").classes
    write_shards(source, tmp_path / "shards")
    wanted = {
        f"ILSVRC2012_val_{i:08d}": (image_bytes(100 + i), sorted(WNIDS).index(WNIDS[TRUTH[i - 1] - 1]))
        for i in range(1, 6)
    }
    assert by_webdataset(tmp_path / "shards") == wanted
    elsewhere = tmp_path / "kit.tgz"
    (imagenet / "ILSVRC2012_devkit_t12.tar.gz").rename(elsewhere)
    assert len(open_source(imagenet / "ILSVRC2012_img_val.tar", devkit=elsewhere).images) == 5
    with pytest.raises(ConfigError, match=r"ILSVRC2012_devkit_t12.tar.gz does not exist.*--devkit") as caught:
        open_source(imagenet / "ILSVRC2012_img_val.tar")
    one_line(caught)
    elsewhere.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="no development kit") as caught:
        open_source(imagenet / "ILSVRC2012_img_val.tar", devkit=elsewhere)
    one_line(caught)


def test_imagenet_without_scipy_and_both_archives_at_once_are_one_line(imagenet, monkeypatch):
    with pytest.raises(ConfigError, match="several splits") as caught:
        open_source(imagenet)
    one_line(caught)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ConfigError, match="pip install scipy") as caught:
        open_source(imagenet / "ILSVRC2012_img_val.tar")
    one_line(caught)


@pytest.mark.parametrize("cut", [100, 700, 3_000, -20_000])
def test_a_cut_imagenet_archive_says_so(imagenet, cut):
    path = imagenet / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"damaged|cut off") as caught:
        open_source(path)
    one_line(caught)


# --- IDX -------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize("shape", [(7, 5, 4), (7, 5, 4, 3)])
def test_idx_files_plain_and_zipped(tmp_path, suffix, pack, shape):
    pixels, labels = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(7, dtype=np.uint8) % 3
    (tmp_path / f"train-images-idx{len(shape)}-ubyte{suffix}").write_bytes(pack(idx(pixels)))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    for spec in (tmp_path, tmp_path / f"train-images-idx{len(shape)}-ubyte{suffix}"):
        source = open_source(spec)
        assert source.classes == ("0", "1", "2")
        index = write_shards(source, tmp_path / "shards", seed=None, overwrite=True)
        for i, (image, label) in enumerate(by_webdataset(Path(index.folder)).values()):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), pixels[i])
            assert label == labels[i]
        for path in (tmp_path / "shards").iterdir():
            path.unlink()
        (tmp_path / "shards").rmdir()
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").unlink()
    assert open_source(tmp_path).classes is None and open_source(tmp_path).images[0].label is None


def test_two_idx_splits_and_broken_ones_are_refused(tmp_path):
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 3, 3), np.uint8)))
    with pytest.raises(ConfigError, match="holds t10k-images-idx3-ubyte, train-images-idx3-ubyte") as caught:
        open_source(tmp_path)
    one_line(caught)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    for data, words in ((None, r"\(3,\) labels"), (b"\0\0\x0d\3", "no IDX file"), (b"", "cannot be read")):
        if data is not None:
            (tmp_path / "t10k-images-idx3-ubyte").write_bytes(data)
        with pytest.raises(ConfigError, match=words) as caught:
            open_source(tmp_path / "t10k-images-idx3-ubyte")
        one_line(caught)


# --- Parquet ---------------------------------------------------------------------------------------------------------

pa = pytest.importorskip("pyarrow")
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "elk"], "_type": "ClassLabel"}}


def write_parquet(path: Path, images: list[bytes | None], labels: list[int | None], *, rows: int = 4,
                  features: dict | None = None, plain: bool = False) -> None:  # fmt: skip
    import pyarrow.parquet as pq

    column = images if plain else [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64()), "note": ["x"] * len(images)})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def test_parquet_in_the_layout_of_hugging_face(tmp_path):
    images = [image_bytes(i, ("JPEG", "PNG", "WEBP")[i % 3]) for i in range(23)]
    labels = [i % 3 for i in range(23)]
    for n, (a, b) in enumerate([(0, 10), (10, 11), (11, 23)]):
        path = tmp_path / "data" / f"train-{n:05d}-of-00003.parquet"
        write_parquet(path, images[a:b], labels[a:b], features=FEATURES)
    pattern = str(tmp_path / "data" / "train-*-of-00003.parquet")
    for spec in (tmp_path / "data", pattern, pattern.replace("*", "{00000..00002}")):
        source = open_source(spec)
        assert source.classes == ("cat", "dog", "elk") and len(source.images) == 23
        assert [image.read() for image in source.images] == images
        assert [image.label for image in source.images] == labels
    index = write_shards(source, tmp_path / "shards", samples_per_shard=6, workers=2)
    assert sorted(by_webdataset(tmp_path / "shards").values()) == sorted(zip(images, labels, strict=True))
    reader = ShardReader(index)
    for i in range(23):
        sample = reader.read(i)
        kind = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[Image.open(io.BytesIO(sample.image)).format]
        assert sample.suffix == kind


def test_shuffled_parquet_reads_each_row_group_as_few_times_as_can_be(tmp_path, monkeypatch):
    from lmim.data import parquet

    write_parquet(tmp_path / "a.parquet", [image_bytes(i) for i in range(60)], [0] * 60, rows=5)
    source, orders = open_source(tmp_path / "a.parquet"), set()
    for seed in range(3):
        parquet._row_group.cache_clear()
        index = write_shards(source, tmp_path / str(seed), samples_per_shard=12, seed=seed)
        assert parquet._row_group.cache_info().misses <= 12 + 5  # groups, and one more where a shard cuts one
        keys = [ShardReader(index).read(i).key for i in range(60)]
        groups = [int(key.rpartition("/")[2]) // 5 for key in keys]
        assert len({tuple(keys[i : i + 5]) for i in range(0, 60, 5)}) == 12 and keys != sorted(keys)
        assert all(len(set(groups[i : i + 5])) == 1 for i in range(0, 60, 5))
        orders.add(tuple(groups))
    assert len(orders) == 3


def test_parquet_with_plain_bytes_without_names_and_with_gaps(tmp_path):
    write_parquet(tmp_path / "a.parquet", [image_bytes(1), None, image_bytes(3)], [5, 0, None], plain=True)
    source = open_source(tmp_path / "a.parquet")
    assert source.classes is None and [image.label for image in source.images] == [5, 0, None]
    index = write_shards(source, tmp_path / "shards", seed=None)
    assert [skip.reason for skip in index.skipped] == ["cannot be read: holds no bytes"]
    assert list(by_webdataset(tmp_path / "shards").values()) == [(image_bytes(1), 5), (image_bytes(3), None)]


def test_unusable_parquet_is_one_line(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        write_parquet(tmp_path / "both" / f"{split}-00000-of-00001.parquet", [image_bytes(1)], [0])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for spec, words in (("both", r"several splits \(test, train\)"), ("text.parquet", "no column of images"),
                        ("broken.parquet", "cannot be read as Parquet")):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as caught:
            open_source(tmp_path / spec)
        one_line(caught)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="pip install pyarrow") as caught:
        open_source(tmp_path / "text.parquet")
    one_line(caught)


# --- webdataset tars -------------------------------------------------------------------------------------------------


def write_tars(folder: Path, prefix: str = "{n}") -> dict[str, tuple[bytes, int | None]]:
    """Write three tars as img2dataset does, with captions; return what they hold."""
    held = {}
    folder.mkdir()
    for n in range(3):
        members = {}
        for i in range(4):
            key = f"{prefix.format(n=n)}_{i}"
            held[key if "{n}" in prefix else f"{n:05d}/{key}"] = (image_bytes(10 * n + i), n if i else None)
            members[f"{key}.jpg"] = image_bytes(10 * n + i)
            members[f"{key}.txt"], members[f"{key}.json"] = b"caption", b"{}"
            if i:
                members[f"{key}.cls"] = str(n).encode()
        (folder / f"{n:05d}.tar").write_bytes(tar_bytes(members))
    return held


def test_tars_by_folder_glob_and_brace_range(tmp_path):
    held = write_tars(tmp_path / "tars")
    for number, spec in enumerate(("tars", "tars/*.tar", "tars/0000{0..2}.tar")):
        write_shards(open_source(tmp_path / spec), tmp_path / str(number), samples_per_shard=5)
        assert by_webdataset(tmp_path / str(number)) == held
    two = open_source(tmp_path / "tars/0000{0,2}.tar")
    assert len(two.images) == 8 and two.classes is None


def test_keys_that_tars_share_are_told_apart(tmp_path):
    held = write_tars(tmp_path / "tars", prefix="same")
    write_shards(open_source(tmp_path / "tars"), tmp_path / "shards")
    assert by_webdataset(tmp_path / "shards") == held and len(held) == 12


def test_sharding_shards_again_keeps_classes_and_labels(tmp_path):
    for i in range(6):
        path = tmp_path / "in" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i, "PNG"))
    write_shards(open_source(tmp_path / "in"), tmp_path / "one", samples_per_shard=2)
    source = open_source(tmp_path / "one")
    assert source.classes == ("class0", "class1")
    write_shards(source, tmp_path / "two", samples_per_shard=4)
    assert by_webdataset(tmp_path / "two") == by_webdataset(tmp_path / "one")


@pytest.mark.parametrize("spec, words", [("tars/9*.tar", "does not exist"), ("tars/{0..9}.tar", "exist: .*0.tar"),
                                         ("mixed", "mixes kinds"), ("cut.tar", "damaged")])  # fmt: skip
def test_unusable_tars_are_one_line(tmp_path, spec, words):
    write_tars(tmp_path / "tars")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.parquet").write_bytes(b"")
    (tmp_path / "mixed" / "a.tar").write_bytes(tar_bytes({}))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "tars" / "00000.tar").read_bytes()[:1200])
    with pytest.raises(ConfigError, match=words) as caught:
        open_source(tmp_path / spec)
    assert "SRC" in one_line(caught) or "cut.tar" in one_line(caught)


def test_listed_images_travel_to_other_processes(imagenet, tmp_path):
    write_tars(tmp_path / "tars")
    write_parquet(tmp_path / "a.parquet", [image_bytes(1)], [0])
    (tmp_path / "x-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 3, 3), np.uint8)))
    specs = [imagenet / "ILSVRC2012_img_train.tar", imagenet / "ILSVRC2012_img_val.tar", tmp_path / "tars",
             tmp_path / "a.parquet", tmp_path / "x-images-idx3-ubyte", "embedded:eval"]  # fmt: skip
    for spec in specs:
        image = open_source(spec).images[0]
        packed = pickle.dumps(image)
        assert len(packed) < 700 and pickle.loads(packed).read() == image.read()
    assert ShardIndex.open(tmp_path / "tars").labels().max() == 2
