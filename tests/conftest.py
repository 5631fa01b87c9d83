"""What several tests need: small shards, a tiny configuration, and runs in processes of their own."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from lmim.data.datasets import Source, open_source
from lmim.data.sharding import write_shards

REPOSITORY = Path(__file__).parent.parent
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where programs of root's may be, too
TINY = [
    "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.projector_dim=48", "model.decoder_dim=32",
    "model.decoder_depth=1", "model.decoder_num_heads=2", "data.global_batch=32", "data.micro_batch=16",
    "data.workers=0", "eval.knn_every=0st", "checkpoint.every=1000st", "log.every=1st", "precision.compute=fp32",
    "objective.similarity_weight=0.1", "optim.warmup=10%",
]  # fmt: skip


def why_not(what: str, needed: tuple[str, ...]) -> str:
    """Return why what needs root and some programs cannot be done here; empty if it can."""
    if os.geteuid() != 0:
        return f"{what} needs root"
    missing = [name for name in needed if not shutil.which(name, path=SYSTEM_PATH)]
    return f"not installed: {', '.join(missing)}" if missing else ""


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """A shell lets what it starts in the background ignore SIGINT, and so would every process that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_environment_after():
    """Undo what starting a process group or a run leaves in the environment and the log; keep torch to one thread."""
    before = dict(os.environ)
    torch.set_num_threads(1)
    _quiet()  # a module's fixture may have run a training before this one
    yield
    _quiet()
    os.environ.clear()
    os.environ.update(before)


def _quiet() -> None:
    log = logging.getLogger("lmim")
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """300 training and 100 evaluation images of the embedded set, as shards of 64."""
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 300), ("eval", 100)):
        source = open_source(f"embedded:{split}")
        some = Source(source.name, source.classes, tuple(islice(source.images, count)), ())
        write_shards(some, folder / split, samples_per_shard=64)
    return folder


def free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives to outgoing connections (32768 on)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def train_command(
    shards: Path, run_folder: Path, *settings: str, ranks: int = 0, launcher: str = "deepspeed"
) -> list[str]:
    """Return the command of a tiny run: alone for 0 ranks, else through the deepspeed launcher or torchrun."""
    programs, port = Path(sys.executable).parent, str(free_port())
    started_by = {
        "deepspeed": [str(programs / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, "--module", "lmim"],
        "torchrun": [str(programs / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, "-m", "lmim"],
    }
    return [
        *(started_by[launcher] if ranks else [sys.executable, "-m", "lmim"]),
        "train", "configs/quickstart.yaml", *TINY, f"run.folder={run_folder}",
        f"data.train={shards}/train", f"data.eval={shards}/eval", *settings,
    ]  # fmt: skip


def process_environment() -> dict[str, str]:
    """Return an environment as a user's shell has it, with the interpreter's own commands first."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


def run_training(*arguments, **options) -> str:
    """Run a tiny training to its end and return what it printed."""
    done = subprocess.run(train_command(*arguments, **options), cwd=REPOSITORY, env=process_environment(),
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run_folder: Path) -> list[float]:
    """Return the loss of every step, checking that each step stands there once and in order."""
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]
