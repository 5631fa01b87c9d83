"""One trajectory: the same losses on any backend, number of ranks and number of loader workers."""

from __future__ import annotations

import pytest

from tests.conftest import losses, run_training

STEPS = "optim.duration=20st"


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> list[float]:
    """Losses of one process with accumulation 2."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_training(shards, folder, STEPS, "parallel.backend=local")
    values = losses(folder)
    assert len(values) == 20 and len(set(values)) == 20
    return values


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_workers_change_nothing(reference, shards, tmp_path, workers):
    run_training(shards, tmp_path / "run", STEPS, "parallel.backend=local", f"data.workers={workers}")
    assert losses(tmp_path / "run") == reference


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_takes_the_same_trajectory(reference, shards, tmp_path, stage, ranks):
    run_training(
        shards, tmp_path / "run", STEPS, "parallel.backend=deepspeed", f"parallel.zero_stage={stage}", ranks=ranks
    )
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=1e-5)


@pytest.mark.launch
def test_clipping_is_on_the_whole_gradient(reference, shards, tmp_path):
    clip = (STEPS, "optim.clip_norm=0.05")
    run_training(shards, tmp_path / "local", *clip, "parallel.backend=local")
    run_training(shards, tmp_path / "zero1", *clip, "parallel.backend=deepspeed", ranks=2)
    assert losses(tmp_path / "zero1") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    assert losses(tmp_path / "local")[-1] != pytest.approx(reference[-1], rel=1e-5)
