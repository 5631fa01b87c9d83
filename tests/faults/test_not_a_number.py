"""NaN in one rank's gradients: the step is left out on all ranks, and too many in a row end the run."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from lmim import checkpoint
from tests.conftest import REPOSITORY, process_environment, train_command

pytestmark = [pytest.mark.faults, pytest.mark.launch]
RUN = ("optim.duration=20st", "checkpoint.every=2st", "checkpoint.keep=100", "data.micro_batch=16")
BACKENDS = {
    "alone": ((), 0, ""),
    "ZeRO-1": (("parallel.zero_stage=1",), 2, "deepspeed"),
    "ZeRO-3": (("parallel.zero_stage=3",), 2, "deepspeed"),
    "FSDP2": (("parallel.backend=fsdp",), 2, "torchrun"),
}


def poisoned(shards: Path, folder: Path, backend: str, steps: str) -> subprocess.CompletedProcess[str]:
    """Run twenty steps with NaN in the last rank's gradients at some of them."""
    settings, ranks, launcher = BACKENDS[backend]
    command = train_command(shards, folder, *RUN, *(settings or ("parallel.backend=local",)), ranks=ranks,
                            launcher=launcher)  # fmt: skip
    command[command.index("lmim")] = "tests.faults.poison"
    environment = dict(process_environment(), POISON=f"{max(ranks - 1, 0)}:{steps}",
                       POISON_MICRO_BATCHES="1" if ranks else "2")  # fmt: skip
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)


def left_out(folder: Path) -> list[int]:
    """Return the steps whose gradient was not finite, as logged."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["step"] for row in rows if row["grad_norm"] is None or not math.isfinite(row["grad_norm"])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_left_out_and_three_in_a_row_end_the_run(shards, tmp_path, backend):
    """Two in a row, twice: the run goes on, weights and AdamW's state stand still. Then three in a row."""
    done = poisoned(shards, tmp_path / "run", backend, "3,4,7,8,10,11,12,13")
    assert done.returncode == 1
    assert left_out(tmp_path / "run") == [3, 4, 7, 8, 10, 11, 12]
    assert len(re.findall(r"step \d+ is left out", (tmp_path / "run" / "train.log").read_text())) == 7
    saved = checkpoint.complete(tmp_path / "run")
    taken = {path.name.lstrip("step-0"): checkpoint.position_of(path).optimizer_steps for path in saved}
    assert taken == {"2": 2, "4": 3, "6": 4, "8": 5, "10": 6, "12": 6}
    for path in saved:
        assert checkpoint.damage(path) is None
        tensors = {**checkpoint.load_weights(path), **checkpoint.load_optimizer(path)}
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    words = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(words) == 1 and "not finite in 3 steps in a row, up to step 12" in words[0]
    assert re.findall(r"step-\d{8}", words[0]) == [path.name for path in saved]
