"""Wrong input ends with one clear line, exit code 2 and no traceback; odd images train or are skipped by name."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from lmim.__main__ import main
from tests.conftest import REPOSITORY, TINY, process_environment, run_training, train_command

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


def refused(capsys, arguments: list[str]) -> str:
    """Run a command that must be refused and return its one line."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture
def attempt(capsys, shards, tmp_path):
    """Return a function that starts a tiny local run with some settings and returns the line that refuses it."""

    def run(*settings: str) -> str:
        base = [f"run.folder={tmp_path}/run", f"data.train={shards}/train", f"data.eval={shards}/eval"]
        return refused(capsys, ["train", QUICKSTART, *TINY, "parallel.backend=local", *base, *settings])

    return run


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optim.base_lrr=1", ["optim.base_lrr", "did you mean optim.base_lr"]),
        ("optim.lr=1", ["optim.lr", "did you mean optim.base_lr"]),
        ("optimizer.lr=1", ["optimizer.lr", "did you mean optim?"]),
        ("optim.base_lr=fast", ["optim.base_lr", "fast", "float"]),
        ("model.depth=2.5", ["model.depth", "2.5", "int"]),
        ("data.crop_size=36", ["data.crop_size (36)", "7 x (4 + 1) = 35"]),
        ("data.global_batch=40", ["data.global_batch (40)", "1 x 16 = 16", "32 and 48"]),
        ("objective.num_visible=49", ["objective.num_visible (49)", "7 x 7 = 49", "at most 47"]),
        ("objective.loss=infonse", ["objective.loss (infonse)", "infonce, norm_l2"]),
        ("optim.duration=30", ["optim.duration (30)", "800ep"]),
        ("data.train=/nowhere/at/all", ["data.train", "/nowhere/at/all"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_train_refuses(attempt, setting, named):
    line = attempt(setting)
    for words in named:
        assert words in line, line


def test_folder_without_images_and_without_shards(attempt, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in attempt(f"data.train={empty}")
    (empty / "notes.txt").write_text("no image")
    done = subprocess.run([sys.executable, "tools/shard_images.py", str(empty), str(tmp_path / "out")], cwd=REPOSITORY,
                          env=process_environment(), capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and str(empty) in done.stderr


def test_missing_config_file(capsys):
    line = refused(capsys, ["train", str(REPOSITORY / "configs" / "quickstartt.yaml")])
    assert "does not exist" in line and "quickstart.yaml" in line


def test_another_run_folder_and_another_model(shards, tmp_path, capsys, attempt):
    run_training(shards, tmp_path / "run", "optim.duration=2st", "parallel.backend=local")
    line = attempt("optim.duration=2st", "optim.base_lr=0.5")
    assert "run.folder" in line and "optim.base_lr (0.002 there, 0.5 now)" in line
    # other data than the run was trained on
    line = attempt("optim.duration=2st", f"data.train={shards}/eval")
    assert "data.train" in line and "another run.folder" in line
    # a damaged checkpoint
    weights = next((tmp_path / "run" / "checkpoints").glob("step-*/weights-00000.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    assert "damaged" in attempt("optim.duration=2st")


@pytest.mark.launch
def test_the_launcher_hands_the_line_and_the_code_through(shards, tmp_path):
    from tests.conftest import train_command

    command = train_command(shards, tmp_path / "run", "data.global_batch=33", ranks=2)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True, timeout=120
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in output
    assert output.count("error: data.global_batch (33) is not divisible by ranks x micro batch (2 x 16 = 32)") == 1


def test_an_unreadable_image_is_counted_named_and_skipped(shards, tmp_path):
    """Damage one member inside a shard, after it was made: the run goes on and says which image it left out."""
    import shutil

    shutil.copytree(shards / "train", tmp_path / "train")
    tar = tmp_path / "train" / "shard-000001.tar"
    with tarfile.open(tar) as archive:
        member = next(m for m in archive if m.name.endswith(".png"))
    with tar.open("r+b") as file:
        file.seek(member.offset_data + 40)  # header and size stay: a download that stopped early looks like this
        file.write(bytes(member.size - 40))
    run_folder = tmp_path / "run"
    output = run_training(
        shards, run_folder, "optim.duration=1ep", "parallel.backend=local", f"data.train={tmp_path}/train"
    )
    assert f": {member.name}: its bytes in" in output
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_images"] == 1 and rows[0]["skipped_images"] <= 1


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("optim.base_lr=1.0e+30", 1, "loss or gradient was not finite in 3 steps in a row"),
        ("data.tail=drop", 2, "data.tail (drop) leaves nothing of 300 images"),
    ],
)
def test_what_ends_a_run_stands_in_its_log_and_report(shards, tmp_path, capsys, setting, code, words):
    folder = tmp_path / "run"
    arguments = train_command(shards, folder, "parallel.backend=local", "optim.duration=20st", "optim.warmup=0st",
                              setting, *(["data.global_batch=320"] if code == 2 else []))[3:]  # fmt: skip
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert printed.err.count(words) == 1 and words not in printed.out  # said once on the screen
    lines = [line for line in (folder / "train.log").read_text().splitlines() if words in line]
    assert len(lines) == 1 and " ERROR the run ends here: " in lines[0]
    if code == 1:
        assert main(["report", str(folder)]) == 0
        page = (folder / "report.html").read_text()
        assert "Ended by an error after step" in page and words in page


def test_a_fault_of_the_program_stands_in_the_log_too(shards, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(sys.modules["lmim.train"], "_steps", broken)
    with pytest.raises(ZeroDivisionError):
        main(train_command(shards, tmp_path / "run", "parallel.backend=local", "optim.duration=1st")[3:])
    last = (tmp_path / "run" / "train.log").read_text().splitlines()[-1]
    assert last.endswith("ERROR the run ends here: ZeroDivisionError: a fault")


@pytest.mark.slow
def test_too_many_unreadable_images_end_the_run_with_a_clear_line(shards, tmp_path):
    """One of five shards holds zeros: on two ranks the run stops by itself, and goes on where that is allowed."""
    import shutil

    shutil.copytree(shards / "train", tmp_path / "train")
    tar = tmp_path / "train" / "shard-000001.tar"
    size = tar.stat().st_size
    tar.write_bytes(bytes(size))
    settings = ("optim.duration=2ep", f"data.train={tmp_path}/train", "parallel.backend=deepspeed")
    command = train_command(shards, tmp_path / "run", *settings, ranks=2)
    done = subprocess.run(command, cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "images could not be read, such as train-" in line and "data.max_bad_fraction allows 0.01" in line
    assert "verify_shards.py" in line and str(tmp_path / "run" / "unreadable") in line
    named = [row.split("\t") for path in (tmp_path / "run" / "unreadable").iterdir()
             for row in path.read_text().splitlines()]  # fmt: skip
    bad = {int(sample_id) for _, sample_id, _ in named}
    assert bad == set(range(64, 128)) and len(named) - len(bad) <= 20  # ten steps of 32 are an epoch and 20
    run_training(shards, tmp_path / "allowed", *settings, "data.max_bad_fraction=0.5", ranks=2)
    rows = [json.loads(line) for line in (tmp_path / "allowed" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_images"] in range(2 * 64, 2 * 64 + 5)  # two epochs, and the start of the third


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_image_mode_trains(tmp_path, mode):
    """Shard a folder of one mode, take two steps on it."""
    source = tmp_path / "images"
    source.mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    for number in range(4):
        grey = Image.linear_gradient("L").resize((40, 40 + number))
        image = grey.convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else grey.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if suffix == "jpg" else "PNG")
        (source / f"{number}.{suffix}").write_bytes(buffer.getvalue())
    from lmim.data.datasets import open_source
    from lmim.data.sharding import write_shards

    write_shards(open_source(str(source)), tmp_path / "shards")
    arguments = ["train", QUICKSTART, *TINY, "parallel.backend=local", f"run.folder={tmp_path}/run", "data.eval=",
                 f"data.train={tmp_path}/shards", "data.global_batch=4", "data.micro_batch=4",
                 "optim.duration=2st"]  # fmt: skip
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["skipped_images"] == 0 and row["loss"] > 0 for row in rows)
