"""bf16 autocast follows fp32, and what must stay fp32 does."""

from __future__ import annotations

import pytest
import torch

from lmim.config import Split, load_config
from lmim.data.loader import train_batches
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.objective import LatentMIM
from lmim.parallel import build_backend
from lmim.schedules import Schedules
from tests.conftest import REPOSITORY

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")


def hundred_losses(shards, precision: str) -> list[float]:
    """Take 100 steps of the quickstart model and objective, with a batch of 32."""
    settings = [f"precision.compute={precision}", "parallel.backend=local", "data.global_batch=32"]
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", settings)
    split = Split(world_size=1, micro_batch=32, accumulate=1)
    backend = build_backend(config, ALONE, split)
    backend.prepare(lambda: LatentMIM(config.model, config.objective))
    schedules = Schedules(100, 10, 5e-4, 0.25, 0.99, 0.75, 0.25)
    batches = train_batches(config.data, ShardIndex.open(shards / "train"), seed=0, size=35, split=split,
                            topology=ALONE, start_step=0, total_steps=100)  # fmt: skip
    losses = []
    for step, batch in enumerate(batches):
        hyper = schedules.at(step)
        backend.begin_step(hyper)
        out = backend.forward_backward(batch.images, batch.keys, hyper.similarity_target, last_micro=True)
        losses.append(out.loss.item())
        backend.finish_step()
    assert all(p.dtype == torch.float32 for p in backend.model.parameters())
    return losses


@pytest.mark.slow
def test_bf16_losses_stay_within_two_percent_of_fp32(shards):
    torch.set_num_threads(2)
    bf16, fp32 = hundred_losses(shards, "bf16"), hundred_losses(shards, "fp32")
    assert bf16 != fp32, "autocast did nothing"
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert fp32[-1] < fp32[0] - 0.2, "the model learned nothing, so agreement says nothing"


def test_residual_stream_and_norms_are_fp32_under_autocast():
    """Norms see and give fp32 in the blocks; the products around them run in bf16."""
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    model = LatentMIM(config.model, config.objective)
    model.init_weights(0)
    seen = {}
    block = model.online.blocks[1]
    block.norm1.register_forward_hook(lambda m, i, o: seen.update(norm_in=i[0].dtype, norm_out=o.dtype))
    block.mlp.fc1.register_forward_hook(lambda m, i, o: seen.update(product=o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.randint(0, 256, (2, 3, 35, 35), dtype=torch.uint8)
        out = model(images, torch.arange(2), 0.5)
    assert seen == {"norm_in": torch.float32, "norm_out": torch.float32, "product": torch.bfloat16}
    assert out.loss.dtype == torch.float32
