"""The command tools/shard_images.py, run as a user runs it."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lmim.data.shards import ShardIndex, ShardReader

TOOL = Path(__file__).parents[1] / "tools" / "shard_images.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def folder_of_images(folder: Path, broken: int = 0) -> Path:
    out = io.BytesIO()
    Image.new("L", (40, 30), 9).save(out, "PNG")
    for i in range(6):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    for i in range(broken):
        (folder / "class0" / f"broken{i:02d}.png").write_bytes(b"no pixels")
    return folder


def test_a_folder_becomes_shards_and_the_last_line_says_what_they_hold(tmp_path):
    images, dst = folder_of_images(tmp_path / "images", broken=12), tmp_path / "shards"
    done = run(images, dst, "--samples-per-shard", 4, "--short-side", 15, "--quality", 80, "--seed", 3)
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    index = ShardIndex.open(dst)
    # 18 files make 5 shards of at most 4, whichever of them are broken
    assert "\n" not in line and f"5 shards, 6 samples, 2 classes, {index.bytes} bytes, 12 skipped: " in line
    assert line.count("class0/broken") == 10 and line.endswith("; and 2 more")
    assert "18/18 images" in done.stderr
    assert ShardReader(index).read(0).suffix == "jpg"


def test_parts_merging_and_an_index_of_tars_by_the_command_line(tmp_path, capsys):
    images = folder_of_images(tmp_path / "images")
    main = runpy.run_path(str(TOOL))["main"]

    def printed(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out.strip()

    whole = printed(images, tmp_path / "whole", "--samples-per-shard", 2, "--workers", 2)
    assert printed(images, tmp_path / "a", "--samples-per-shard", 2, "--part", "2/2").startswith("part 2/2 is done")
    assert main([str(tmp_path / "a"), "--merge"]) == 2
    assert "lacks 2 shards" in capsys.readouterr().err
    assert printed(images, tmp_path / "b", "--samples-per-shard", 2, "--part", "1/2").startswith("part 1/2 is done")
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    assert printed(tmp_path / "a", "--merge") == whole.replace(str(tmp_path / "whole"), str(tmp_path / "a"))
    for name in ("index.json", "shard-000000.tar", "shard-000002.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    line = printed(f"{tmp_path}/whole/shard-00000{{0,2}}.tar", tmp_path / "index", "--index-only")
    assert "2 shards, 4 samples, no labels" in line
    assert ShardReader(ShardIndex.open(tmp_path / "index")).read(3).key.startswith("class")
    for wrong in (["--merge", "x", "y"], ["x"], ["x", "y", "--part", "3/2"], ["x", "y", "--merge", "--index-only"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


def test_ctrl_c_keeps_what_is_done_and_says_so(tmp_path):
    images = folder_of_images(tmp_path / "images")
    Image.effect_noise((1500, 1500), 60).save(tmp_path / "large.png")  # slow to read: all would take a minute or more
    for i in range(1000):
        (images / "class0" / f"copy{i}.png").hardlink_to(tmp_path / "large.png")
    command = [sys.executable, TOOL, images, tmp_path / "dst", "--samples-per-shard", "2", "--workers", "2",
               "--short-side", "64"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("dst/unfinished/*.json"))[1:]:  # the plan, and a shard's record
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130, err
    assert err == "shard_images: stopped; start it again with the same options to go on\n"
    assert not (tmp_path / "dst" / "index.json").exists()


def test_both_embedded_splits(tmp_path):
    assert runpy.run_path(str(TOOL))["main"](["embedded", str(tmp_path / "data")]) == 0
    assert [len(ShardIndex.open(tmp_path / "data" / split)) for split in ("train", "eval")] == [10_000, 2_000]


def test_user_mistakes_end_with_one_line_and_exit_code_2(tmp_path, capsys):
    images, dst = folder_of_images(tmp_path / "images"), tmp_path / "shards"
    main = runpy.run_path(str(TOOL))["main"]
    assert main([str(images), str(dst), "--no-shuffle"]) == 0
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere", tmp_path / "new"], "does not exist"),
        ([tmp_path / "empty", tmp_path / "new"], "holds no images"),
        (["embedded:test", tmp_path / "new"], "embedded:train and embedded:eval"),
        ([images, dst], "--overwrite"),
        ([images, images / "shards"], "lies in SRC"),
        ([tmp_path / "empty", tmp_path / "new", "--index-only"], "holds no tars"),
        ([images, dst, "--overwrite", "--samples-per-shard", 0], "samples_per_shard (0) must be at least 1"),
    ):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and words in err, err
    assert main([str(images), str(dst), "--overwrite"]) == 0


def test_a_mistake_shows_no_traceback(tmp_path):
    done = run(tmp_path / "nowhere", tmp_path / "new")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("shard_images: SRC (")
