"""2k steps are k steps, a kill, and k steps: to the bit on the same ranks, to rounding on any others."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from lmim import checkpoint
from tests.conftest import REPOSITORY, losses, process_environment, run_training, train_command
from tests.faults.processes import processes_of

pytestmark = [pytest.mark.faults, pytest.mark.launch]
STEPS = 24  # of 300 images in batches of 32: more than two epochs and a half, and no epoch ends with a step
RUN = (f"optim.duration={STEPS}st", "checkpoint.every=1st", "checkpoint.keep=100", "data.micro_batch=8")
LOCAL, ZERO, FSDP = "parallel.backend=local", "parallel.backend=deepspeed", "parallel.backend=fsdp"
# name: settings, ranks, launcher
TOPOLOGIES = {
    "one process": ((LOCAL,), 0, ""),
    "ZeRO-1, 1 rank": ((ZERO, "parallel.zero_stage=1"), 1, "deepspeed"),
    "ZeRO-1, 2 ranks": ((ZERO, "parallel.zero_stage=1"), 2, "deepspeed"),
    "ZeRO-3, 2 ranks": ((ZERO, "parallel.zero_stage=3"), 2, "deepspeed"),
    "FSDP2, 2 ranks": ((FSDP,), 2, "torchrun"),
    "FSDP2, 4 ranks": ((FSDP,), 4, "torchrun"),
}
KILLED = ("one process", "ZeRO-1, 2 ranks", "ZeRO-3, 2 ranks", "FSDP2, 2 ranks")
CHANGES = (
    ("ZeRO-1, 2 ranks", "ZeRO-1, 1 rank"),
    ("one process", "ZeRO-1, 2 ranks"),
    ("FSDP2, 2 ranks", "FSDP2, 4 ranks"),
    ("ZeRO-1, 2 ranks", "FSDP2, 2 ranks"),
    ("FSDP2, 2 ranks", "ZeRO-3, 2 ranks"),
    ("ZeRO-3, 2 ranks", "one process"),
)
told: list[tuple[str, ...]] = []


def command_of(shards: Path, folder: Path, topology: str, *settings: str) -> list[str]:
    chosen, ranks, launcher = TOPOLOGIES[topology]
    return train_command(shards, folder, *RUN, *chosen, *settings, ranks=ranks, launcher=launcher)


def train(shards: Path, folder: Path, topology: str, *settings: str) -> str:
    chosen, ranks, launcher = TOPOLOGIES[topology]
    return run_training(shards, folder, *RUN, *chosen, *settings, ranks=ranks, launcher=launcher)


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
    """Return a function that gives the run folder of an unbroken run on a topology, with every step's checkpoint."""
    done: dict[str, Path] = {}

    def unbroken_on(topology: str) -> Path:
        if topology not in done:
            done[topology] = tmp_path_factory.mktemp("unbroken") / "run"
            train(shards, done[topology], topology)
        return done[topology]

    return unbroken_on


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the last checkpoint's tensors, in parts."""
    newest = checkpoint.newest(folder)
    assert newest.name == f"step-{STEPS:08d}"
    weights, moments = checkpoint.load_weights(newest), checkpoint.load_optimizer(newest)
    parts = {part: {n: t for n, t in weights.items() if n.startswith(part)} for part in ("online", "target", "decoder")}
    return {**parts, "AdamW": moments}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any number, relative to the largest of its tensor.

    Left out are the biases of attention keys: their exact gradient is zero, so AdamW makes steps of rounding errors.
    """
    largest = 0.0
    for name, wanted in theirs.items():
        found = ours[name].clone()
        if name.endswith("qkv.bias"):
            found[len(found) // 3 : 2 * len(found) // 3] = wanted[len(found) // 3 : 2 * len(found) // 3]
        elif name.endswith("kv_proj.bias"):
            found[: len(found) // 2] = wanted[: len(found) // 2]
        largest = max(largest, ((found - wanted).abs().max() / wanted.abs().max()).item())
    return largest


@pytest.mark.parametrize("topology", KILLED)
def test_killed_and_gone_on_with(shards, tmp_path, unbroken, topology):
    """kill -9 of all processes once a random step is saved; loader workers there and none after."""
    whole, k = unbroken(topology), random.Random(topology).randrange(3, STEPS - 8)
    folder = tmp_path / "run"
    mark = f"lmim-test-{uuid.uuid4()}"
    process = subprocess.Popen(command_of(shards, folder, topology, "data.workers=1"), cwd=REPOSITORY,
                               env=dict(process_environment(), LMIM_TEST_MARK=mark), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    until = time.monotonic() + 120
    while not (found := checkpoint.complete(folder)) or checkpoint.position_of(found[-1]).step < k:
        assert process.poll() is None and time.monotonic() < until, "the run ended before the kill"
        time.sleep(0.005)
    for pid in processes_of(mark):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    reached = checkpoint.position_of(checkpoint.newest(folder)).step
    assert k <= reached < STEPS
    output = train(shards, folder, topology)
    assert f"after step {reached}\n" in output
    assert losses(folder) == losses(whole)
    ours, theirs = states(folder), states(whole)
    for part, tensors in theirs.items():
        assert ours[part].keys() == tensors.keys()
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in tensors.items()), part
    told.append((topology, "killed, the same again", f"{reached}", "0", "0", "0", "0", "0"))


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=lambda name: name.replace(" ", ""))
def test_gone_on_with_on_others(shards, tmp_path, unbroken, before, after):
    """The state after a random step inside an epoch goes to another number of ranks, backend and loader workers."""
    whole, k = unbroken(before), random.Random(before + after).randrange(3, STEPS - 8)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    name = f"step-{k:08d}"
    shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(whole / "config.yaml", folder)
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:k]))
    assert f"after step {k}\n" in train(shards, folder, after, "data.workers=1")
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses(folder), losses(whole), strict=True))
    ours, theirs = states(folder), states(whole)
    differences = {part: largest_difference(ours[part], tensors) for part, tensors in theirs.items()}
    told.append((before, after, f"{k}", *(f"{figure:.0e}" for figure in (loss, *differences.values()))))
    assert loss < 1e-5 and all(figure < 1e-5 for figure in differences.values())


def test_the_table_of_topologies(capsys):
    table = Table(title=f"{STEPS} steps, broken: largest relative difference to the unbroken run",
                  title_justify="left")  # fmt: skip
    for heading in ("on", "gone on with on", "after step", "loss", "online", "target (EMA)", "decoder", "AdamW"):
        table.add_column(heading, justify="left" if heading.endswith("on") else "right")
    for row in told:
        table.add_row(*row)
    with capsys.disabled():
        Console(width=130).print("", table)
    assert len(told) == len(KILLED) + len(CHANGES)
