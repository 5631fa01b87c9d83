"""What holds on CPUs holds on a GPU; run where there is one: `bash tests/run.sh tests/test_gpu.py`."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmim import checkpoint, dist
from lmim.config import Split
from lmim.data.datasets import open_source
from lmim.data.loader import train_batches
from lmim.data.sharding import write_shards
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.norms import StepNorms
from lmim.options import DataConfig
from tests.conftest import REPOSITORY, losses, train_command
from tests.ranks import Driver, Finetuner, freshness, not_a_number, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CPU = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
LOCAL = ["parallel.backend=local"]
BACKENDS = {
    "local": LOCAL,
    **{f"ZeRO-{stage}": ["parallel.backend=deepspeed", f"parallel.zero_stage={stage}"] for stage in range(4)},
    "FSDP2": ["parallel.backend=fsdp", "parallel.smallest_group_mb=0"],
    "FSDP2, kept": ["parallel.backend=fsdp", "parallel.smallest_group_mb=0.1", "parallel.keep_gathered=true"],
}
COMPILE, RECOMPUTE = "parallel.compile=true", "parallel.activation_checkpointing=true"


@pytest.fixture(autouse=True)
def fsdp_wraps_on_one_gpu_too(monkeypatch):
    """By itself it leaves alone what needs no other rank, and here there is none."""
    monkeypatch.setattr("lmim.parallel.fsdp.needs_others", lambda part, mesh: True)


@pytest.fixture(scope="module")
def gpu():
    """A process group of this process alone, on its GPU."""
    topology = dist.discover()
    assert topology.device.type == "cuda"
    dist.init(topology, 10)
    yield topology
    dist.shutdown()


@pytest.fixture(scope="module")
def on_cpu():
    torch.set_num_threads(8)
    return train(LOCAL, CPU)


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a tensor relative to its largest number, biases of attention keys left out."""
    kept = [name for name in theirs if not name.endswith(("qkv.bias", "kv_proj.bias"))]
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in kept)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_gpu_takes_the_steps_of_a_cpu(gpu, on_cpu, name):
    """20 steps in fp32; the state goes out after ten and into a backend built anew."""
    ours = train(BACKENDS[name], gpu, resume=True)
    assert ours["losses"] == pytest.approx(on_cpu["losses"], rel=1e-5)
    assert largest_difference(ours["weights"], on_cpu["weights"]) < 2e-3


@pytest.mark.parametrize("name", BACKENDS)
def test_bf16_follows_fp32(gpu, on_cpu, name):
    ours = train([*BACKENDS[name], "precision.compute=bf16"], gpu)
    assert ours["losses"] != on_cpu["losses"]
    assert ours["losses"] == pytest.approx(on_cpu["losses"], rel=0.02)


@pytest.mark.parametrize("switches", [(), (COMPILE,), (RECOMPUTE,), (COMPILE, RECOMPUTE)], ids="+".join)
@pytest.mark.parametrize("name", BACKENDS)
def test_the_target_is_fresh(gpu, name, switches):
    found = freshness([*BACKENDS[name], *switches], gpu)
    rounding = 1e-5 if COMPILE in switches else 0  # graphs with and without a gradient are fused differently
    assert found["before"] > 0.1 and found["after"] <= rounding


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_whose_gradient_is_not_a_number_is_left_out(gpu, name):
    found = not_a_number(BACKENDS[name], gpu)
    assert found["optimizer_steps"] == [1, 2, 2, 3, 4, 5] and found["changed"] == []


@pytest.mark.parametrize("switches", [(), (COMPILE,), (RECOMPUTE,), ("optim.clip_norm=0.1",)], ids="+".join)
@pytest.mark.parametrize("name", ["local", "FSDP2"])
def test_no_step_waits_for_the_device(gpu, name, switches):
    """Torch raises where anything in a step would make the host wait for the GPU."""
    norms = take_steps_without_waiting(Driver([*BACKENDS[name], "precision.compute=bf16", *switches], gpu))
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


@pytest.mark.parametrize("name", ["local", "FSDP2"])
def test_no_step_of_fine_tuning_waits_for_the_device(gpu, shards, tmp_path, name):
    where = [f"data.train={shards}/train", f"data.eval={shards}/eval", f"run.folder={tmp_path}"]
    settings = [*where, "finetune.scratch=true", "finetune.mixup=0.8", "finetune.drop_path=0.2"]
    norms = take_steps_without_waiting(Finetuner([*BACKENDS[name], "precision.compute=bf16", *settings], gpu))
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


def take_steps_without_waiting(driver: Driver) -> list[float]:
    """Return the gradient norms of some steps, in which waiting for the GPU is an error."""
    batches, found = {step: list(driver.micro_batches(step)) for step in range(5)}, []
    for step, micros in batches.items():
        torch.cuda.synchronize()
        if step >= 2:  # graphs are compiled by then
            torch.cuda.set_sync_debug_mode("error")
        try:
            driver.backend.begin_step(driver.schedules.at(step))
            for number, inputs in enumerate(micros):
                driver.backend.forward_backward(*inputs, last_micro=number == len(micros) - 1)
            norms = StepNorms(driver.backend.gradients(), driver.backend.pieces(), 1)
            found.append(driver.backend.finish_step())
            norms.squares()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    driver.backend.close()
    return [norm.item() for norm in found]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", ["turbo", "nvjpeg"])
def test_batches_come_to_the_gpu(gpu, shards, tmp_path, workers, decoder):
    """The same crops as on the CPU; nvJPEG's differ by little. The embedded images are PNG: photos are JPEG."""
    smooth = np.random.default_rng(0).integers(0, 256, (40, 6, 8, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(smooth):
        image = Image.fromarray(pixels).resize((120, 90), Image.BICUBIC)
        image.save(tmp_path / "photos" / f"{number}.jpg", quality=95)
    write_shards(open_source(str(tmp_path / "photos")), tmp_path / "jpegs", samples_per_shard=16)
    split = Split(1, 8, 1)

    def batches(topology: Topology, decoder: str, workers: int) -> list[torch.Tensor]:
        data = DataConfig(global_batch=8, micro_batch=8, workers=workers, decoder=decoder)
        stream = train_batches(data, ShardIndex.open(tmp_path / "jpegs"), seed=3, size=48, split=split,
                               topology=topology, start_step=0, total_steps=6)  # fmt: skip
        return [(batch.images, batch.keys) for batch in stream]

    for (theirs, keys), (ours, our_keys) in zip(batches(CPU, "turbo", 0), batches(gpu, decoder, workers), strict=True):
        assert ours.device.type == "cuda" and torch.equal(our_keys.cpu(), keys)
        difference = (ours.cpu().float() - theirs.float()).abs()
        assert (difference.max() == 0) if decoder == "turbo" else (difference.mean() < 2)


def test_a_run_on_the_gpu_is_stopped_and_goes_on(shards, tmp_path):
    """Through the command line, as its user starts it: bf16, asynchronous checkpoints, the deepspeed backend."""
    settings = ("parallel.backend=deepspeed", "optim.duration=12st", "precision.compute=bf16", "checkpoint.every=5st")
    environment_free = dict(cwd=REPOSITORY, capture_output=True, text=True)
    for folder, changes in (("whole", ()), ("cut", ("run.time_limit_minutes=0.0001",))):
        done = subprocess.run(train_command(shards, tmp_path / folder, *settings, *changes), **environment_free)
        assert done.returncode == (75 if changes else 0), done.stderr
    done = subprocess.run(train_command(shards, tmp_path / "cut", *settings), **environment_free)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cut" / "done.json").read_text())["device"] == "cuda"
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    ends = [checkpoint.load_weights(checkpoint.newest(Path(tmp_path / name))) for name in ("cut", "whole")]
    assert largest_difference(*ends) < 1e-2
