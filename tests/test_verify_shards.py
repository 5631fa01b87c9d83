"""Damage that is planted in shards is found and named by tools/verify_shards.py, and nothing else is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import runpy
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim.data.datasets import open_source
from lmim.data.sharding import index_tars, write_shards
from lmim.data.shards import ShardIndex
from tests.servers import serving

TOOL = Path(__file__).parents[1] / "tools" / "verify_shards.py"


def image_bytes(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (24, 24, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Three shards of eight images of two classes."""
    folder = tmp_path_factory.mktemp("whole")
    for i in range(24):
        path = folder / "images" / ("cat", "dog")[i % 3 == 0] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i))
    write_shards(open_source(folder / "images"), folder / "shards", samples_per_shard=8)
    return folder / "shards"


@pytest.fixture
def verify(capsys) -> Callable[..., tuple[int, list[str]]]:
    main = runpy.run_path(str(TOOL))["main"]

    def run(folder: Path, *options: object) -> tuple[int, list[str]]:
        code = main([str(folder), "--workers", "1", *map(str, options)])
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def members(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as archive:
        return [member for member in archive.getmembers() if member.name.endswith(".png")]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("decode, decoded", [("all", 24), ("none", 0), (3, 9), (100, 24)])
def test_sound_shards_are_one_line(whole, verify, decode, decoded):
    code, lines = verify(whole, "--decode", decode)
    size = sum(path.stat().st_size for path in whole.glob("*.tar"))
    assert (code, lines) == (0, [f"{whole}: all is well: 3 shards, 24 samples, {size} bytes, {decoded} images decoded; "
                                 "cat: 16, dog: 8"])  # fmt: skip


def test_workers_find_the_same(copy, verify):
    flip(copy / "shard-000001.tar", members(copy / "shard-000001.tar")[2].offset_data + 60)
    (copy / "shard-000002.tar").unlink()
    assert verify(copy) == verify(copy, "--workers", 3)


def damage_image(folder: Path) -> str:
    member = members(folder / "shard-000001.tar")[5]
    flip(folder / "shard-000001.tar", member.offset_data + member.size // 2)
    return f"member {member.name}: holds other bytes than were written (checksum)"


def damage_header(folder: Path) -> str:
    flip(folder / "shard-000001.tar", members(folder / "shard-000001.tar")[5].offset)
    return "damaged or cut off at byte"


def damage_first_header(folder: Path) -> str:
    flip(folder / "shard-000001.tar", 3)
    return "is no uncompressed tar or is damaged"


def rename_member(folder: Path) -> str:
    """Change a member's name and mend the header's checksum, as an editor of tars would."""
    tar = folder / "shard-000001.tar"
    member = members(tar)[5]
    data = bytearray(tar.read_bytes())
    data[member.offset] ^= 1
    block = data[member.offset : member.offset + 512]
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    data[member.offset + 148 : member.offset + 156] = b"%06o\0 " % total
    tar.write_bytes(data)
    return "has another key than in the side file"


def truncate(folder: Path) -> str:
    tar = folder / "shard-000001.tar"
    os.truncate(tar, 7000)
    return (
        f"has 7000 bytes where its index says {json.loads((folder / 'index.json').read_text())['shards'][1]['bytes']}"
    )


def remove(folder: Path) -> str:
    (folder / "shard-000001.tar").unlink()
    return "is missing"


def swap_side_files(folder: Path) -> str:
    shutil.copy(folder / "shard-000000.npz", folder / "shard-000001.npz")
    return "in the side file"


def remove_side_file(folder: Path) -> str:
    (folder / "shard-000001.npz").unlink()
    return "side file: "


def change_label(folder: Path) -> str:
    with np.load(folder / "shard-000001.npz") as arrays:
        changed = dict(arrays)
    changed["labels"][3] ^= 1
    np.savez_compressed(folder / "shard-000001.npz", **changed)
    return f"member {members(folder / 'shard-000001.tar')[3].name}: has another label than in the side file"


def damage_end(folder: Path) -> str:
    flip(folder / "shard-000001.tar", (folder / "shard-000001.tar").stat().st_size - 5)
    return "sha256 of the file is not the index's"


def count_wrong(folder: Path) -> str:
    edit_index(folder, lambda content: content["shards"][1].update(samples=7))
    return "does not fit shard-000001.tar"


DAMAGES = (damage_image, damage_header, damage_first_header, rename_member, truncate, remove, swap_side_files,
           remove_side_file, change_label, damage_end, count_wrong)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_with_its_shard(copy, verify, damage):
    words = damage(copy)
    code, lines = verify(copy, "--decode", "none")
    assert code == 1
    assert any(line.startswith("shard-000001.tar: ") and words in line for line in lines), lines
    assert {line.partition(":")[0] for line in lines[:-1]} == {"shard-000001.tar"}
    assert f"{copy}: {len(lines) - 1} problems: 3 shards" in lines[-1]


@pytest.mark.parametrize("key, value, words", [
    ("samples", 23, "index.json: samples is 23, but the shards hold 24"),
    ("class_counts", [8, 16], "index.json: class_counts is [8, 16], but the shards hold [16, 8]"),
])  # fmt: skip
def test_wrong_totals_of_the_index_are_named(copy, verify, key, value, words):
    edit_index(copy, lambda content: content.update({key: value}))
    code, lines = verify(copy)
    assert code == 1 and lines[0] == words and len(lines) == 2


def write_tar(path: Path, images: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_an_undecodable_image_with_the_right_checksum_is_named(tmp_path, verify):
    """A flipped bit in the source passes the quick check, and every checksum is that of the broken bytes."""
    broken = bytearray(image_bytes(3))
    broken[len(broken) // 2] ^= 255
    tar = write_tar(
        tmp_path / "tars" / "a.tar", {"good.png": image_bytes(1), "bad.png": broken, "x.png": image_bytes(2)}
    )
    index_tars([tar], tmp_path / "index")
    assert verify(tmp_path / "index", "--decode", "none") == (0, [
        f"{tmp_path}/index: all is well: 1 shards, 3 samples, {tar.stat().st_size} bytes, 0 images decoded; no labels"
    ])  # fmt: skip
    code, lines = verify(tmp_path / "index", "--decode", "all")
    assert code == 1 and lines[0].startswith(f"{tar}: member bad.png cannot be decoded: broken image file")
    assert len(lines) == 2
    content = json.loads((tmp_path / "index" / "index.json").read_text())
    assert content["shards"][0]["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()


def test_plain_tars_without_an_index(tmp_path, verify):
    write_tar(tmp_path / "a.tar", {"1.png": image_bytes(1), "1.cls": b"4", "2.png": image_bytes(2)})
    write_tar(tmp_path / "b.tar", {"3.png": image_bytes(3)})
    code, lines = verify(tmp_path)
    assert code == 0 and len(lines) == 1
    assert "2 shards, 3 samples" in lines[0] and "no index, 3 images decoded; 4: 1 (2 without label)" in lines[0]
    write_tar(tmp_path / "c.tar", {"3.png": image_bytes(4), "5.png": image_bytes(5)[:80]})
    write_tar(tmp_path / "d.tar", {"6.png": image_bytes(6), "7.png": image_bytes(7), "6.jpg": image_bytes(6)})
    os.truncate(write_tar(tmp_path / "e.tar", {"8.png": image_bytes(8)}), 900)
    code, lines = verify(tmp_path)
    assert code == 1 and len(lines) == 5
    assert lines[0].startswith("c.tar: member 5.png cannot be decoded: ")
    assert lines[1].startswith("e.tar: is no uncompressed tar or is damaged") or "e.tar: is damaged" in lines[1]
    assert set(lines[2:4]) == {
        "b.tar: key 3 is there 2 times, in b.tar, c.tar",
        "d.tar: key 6 is there 2 times, in d.tar",
    }


def test_unusable_input_is_one_line_and_exit_code_2(tmp_path, copy, capsys):
    (copy / "index.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for folder, options, words in ((tmp_path / "nowhere", (), "does not exist"), (tmp_path / "empty", (), "no shards"),
                                   (copy, (), "is no index"), (copy, ("--workers", 0), "workers (0)")):  # fmt: skip
        main = runpy.run_path(str(TOOL))["main"]
        assert main([str(folder), *map(str, options)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and words in err


def test_remote_tars_are_indexed_and_verified_where_they_are(whole, tmp_path, verify, capsys):
    tool = runpy.run_path(str(TOOL.with_name("shard_images.py")))["main"]
    tars = sorted(whole.glob("*.tar"))
    with serving(whole) as server:
        spec = f"{server.url}/shard-00000{{0..2}}.tar"
        assert tool([spec, str(tmp_path / "index"), "--index-only", "--workers", "2"]) == 0
        assert "3 shards, 24 samples" in capsys.readouterr().out
        index = ShardIndex.open(tmp_path / "index")
        assert [shard.name for shard in index.shards] == [f"{server.url}/{tar.name}" for tar in tars]
        assert [shard.sha256 for shard in index.shards] == [
            hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars
        ]
        assert verify(tmp_path / "index", "--workers", 2)[0] == 0
        code, lines = verify(server.url)
        assert code == 0 and "3 shards, 24 samples" in lines[0] and "cat: 16, dog: 8" in lines[0]
        moved = whole / "moved.tar"
        tars[1].rename(moved)
        try:
            code, lines = verify(tmp_path / "index")
        finally:
            moved.rename(tars[1])
        assert code == 1 and len(lines) == 2
        assert lines[0].startswith(f"{server.url}/shard-000001.tar: ") and "does not exist" in lines[0]
