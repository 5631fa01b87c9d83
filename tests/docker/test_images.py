"""Both images build, and the CPU one trains as a user without rights; its packages are the pinned ones."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import free_port, losses
from tests.docker.images import CPU, CUDA, WHY_NOT, Images
from tests.test_docker import pins

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    made = Images(tmp_path_factory.mktemp("images"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def on_cpus(images) -> str:
    return images.container(CPU)


@pytest.mark.parametrize("tag", [CPU, CUDA])
def test_an_image_says_what_it_is(images, tag, capsys):
    config = images.inspect(tag)
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["entrypoint.sh"] and config["Cmd"] == ["--help"]
    assert config["Healthcheck"]["Test"] == ["CMD", "healthy.sh"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abcdef"
    with capsys.disabled():
        print(f"\n{tag}: {images.megabytes(tag):.0f} MB, made in {images.seconds[tag]:.0f} s")


def test_a_run_trains_inside_as_a_user_without_rights(images, on_cpus, tmp_path):
    data, runs = tmp_path / "data", tmp_path / "runs"
    for folder in (data, runs):
        folder.mkdir()
        os.chown(folder, 1000, 1000)
    volumes = (f"{data}:/data", f"{runs}:/runs")
    assert images.run(on_cpus, "sh", "-c", "id -u; test -w /opt/lmim || test -w /lmim || echo none") == "1000\nnone\n"
    images.run(on_cpus, "python", "tools/shard_images.py", "embedded", "data/quickstart", volumes=volumes)
    images.run(
        on_cpus, "entrypoint.sh", "train", "configs/quickstart.yaml", "data.train=data/quickstart/train",
        "data.eval=data/quickstart/eval", "optim.duration=2ep", "log.every=1st", "eval.knn_every=100%",
        volumes=volumes, PET_NPROC_PER_NODE="2", PET_MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1",
    )  # fmt: skip
    run = runs / "quickstart"
    assert (run / "done.json").stat().st_uid == 1000 and json.loads((run / "done.json").read_text())
    taken = losses(run)
    assert len(taken) == math.ceil(2 * 10_000 / 128) and np.mean(taken[-20:]) < np.mean(taken[:20]) - 0.1
    measured = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    accuracies = [row["knn_leave_one_out"] for row in measured if "knn_leave_one_out" in row]
    assert accuracies[-1] > accuracies[0] + 0.02, accuracies
    images.run(on_cpus, "healthy.sh", volumes=volumes)
    assert "report.html" in images.run(on_cpus, "entrypoint.sh", "report", "runs/quickstart", volumes=volumes)


def test_packages_are_the_pinned_ones_and_pip_is_as_it_comes(images, on_cpus, tmp_path):
    freeze = images.run(on_cpus, "pip", "freeze", "--all")
    found = dict(line.split("==") for line in freeze.splitlines() if "==" in line)
    pinned = pins()
    for name, version in found.items():
        name = name.lower().replace("_", "-").replace(".", "-")
        assert name in ("pip", "lmim") or version.partition("+")[0] == pinned[name], name
    assert {"torch", "deepspeed", "wandb"} <= set(found)
    assert images.run(on_cpus, "sh", "-c", "pip config list; cat /etc/pip.conf 2> /dev/null || true").strip() == (
        ":env:.disable-pip-version-check='1'\n:env:.no-cache-dir='1'"
    )
    (tmp_path / "packages.txt").write_text(freeze)
    sbom = [Path(sys.executable).parent / "cyclonedx-py", "requirements", tmp_path / "packages.txt"]
    parts = json.loads(subprocess.run(sbom, capture_output=True, text=True, check=True).stdout)["components"]
    assert {"torch", "deepspeed", "wandb"} <= {part["name"] for part in parts}


def test_the_image_for_gpus_runs_and_can_compile(images):
    container = images.container(CUDA)
    assert images.run(container, "entrypoint.sh", "--version").strip()
    doubled = "import torch; print(torch.compile(lambda x: x * 2 + 1)(torch.ones(3)).tolist())"
    assert images.run(container, "python", "-c", doubled).strip() == "[3.0, 3.0, 3.0]"
    variables = dict(line.split("=", 1) for line in images.inspect(CUDA)["Env"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all" and "compute" in variables["NVIDIA_DRIVER_CAPABILITIES"]
