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


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_loader_workers_change_nothing(reference, shards, tmp_path, workers):
    run_training(shards, tmp_path / "run", STEPS, "parallel.backend=local", f"data.workers={workers}")
    assert losses(tmp_path / "run") == reference


@pytest.mark.launch
@pytest.mark.parametrize("ranks, settings", [
    pytest.param(1, ["parallel.backend=deepspeed"], marks=pytest.mark.slow),
    (2, ["parallel.backend=deepspeed", "parallel.zero_stage=3"]),
])  # fmt: skip
def test_under_the_deepspeed_launcher(reference, shards, tmp_path, ranks, settings):
    run_training(shards, tmp_path / "run", STEPS, *settings, ranks=ranks)
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=1e-5)


@pytest.mark.launch
@pytest.mark.slow
def test_under_torchrun(reference, shards, tmp_path):
    run_training(shards, tmp_path / "run", STEPS, "parallel.backend=fsdp", ranks=2, launcher="torchrun")
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=1e-5)
