"""Checkpoints as other code writes them: `python -m tests.foreign KIND FOLDER`, one process a rank.

The model is ours; engines, sharding and files are DeepSpeed's and torch's own, used as their documents say. The truth
beside them, `truth.safetensors`, is what their own tools gather.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import save_file
from torch import nn

from lmim.config import load_config
from lmim.objective import LatentMIM
from tests.conftest import REPOSITORY, TINY, free_port, process_environment

KINDS = ("zero0", "zero1", "zero2", "zero3", "zero1-bf16", "zero3-bf16", "fsdp2")


def write_foreign(kind: str, ranks: int, folder: Path) -> None:
    """Let so many ranks write FOLDER/saved and FOLDER/truth.safetensors."""
    shared = dict(process_environment(), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    command = [sys.executable, "-m", "tests.foreign", kind, str(folder)]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, env=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)),
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-4000:]


def tiny_model() -> LatentMIM:
    """Return a small model whose tensors all differ from their initial values and from each other."""
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [*TINY, "model.visual_cues=false"])
    model = LatentMIM(config.model, config.objective)
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model


def batch(model: LatentMIM) -> tuple[torch.Tensor, torch.Tensor, float]:
    side = model.model.grid_size * (model.patch_size + model.model.patch_gap)
    return torch.rand(4, 3, side, side), torch.arange(4), 0.5


def deepspeed_writes(kind: str, folder: Path) -> None:
    """Take two steps with DeepSpeed's engine, save, and gather with DeepSpeed's own script."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deepspeed.init_distributed("gloo")
    stage, bf16 = int(kind[4]), kind.endswith("bf16")
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16},
              "zero_allow_untested_optimizer": True}  # fmt: skip
    model = tiny_model()
    for module in model.modules():  # our own precision is autocast's, over fp32 weights; DeepSpeed's bf16 casts weights
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda norm, given: (given[0].to(norm.weight.dtype),))
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == decayed]}
              for decayed in (True, False)]  # fmt: skip
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=config,
                                  optimizer=torch.optim.AdamW(groups, 1e-3))[0]  # fmt: skip
    images, keys, similarity = batch(model)
    for _ in range(2):
        engine.backward(engine(images.bfloat16() if bf16 else images, keys, similarity).loss)
        engine.step()
    engine.save_checkpoint(str(folder / "saved"))
    if torch.distributed.get_rank() == 0:
        gathered = get_fp32_state_dict_from_zero_checkpoint(str(folder / "saved")) if stage else {}
        truth = gathered or engine.module.state_dict()
        # which is given beside the trained ones at stages 2 and 3, and dropped at stage 1: it stands still in any case
        frozen = {name: p.detach() for name, p in tiny_model().named_parameters() if name.startswith("target.")}
        frozen = {name: tensor.bfloat16() if bf16 else tensor for name, tensor in frozen.items()}
        truth = {name: tensor.float().contiguous() for name, tensor in {**truth, **frozen}.items()}
        save_file(truth, folder / "truth.safetensors")
    engine.destroy()


def fsdp2_writes(folder: Path) -> None:
    """Shard with `fully_shard` and save with `torch.distributed.checkpoint`, an optimizer beside the model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model(*batch(model)).loss.backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "step": 1}, checkpoint_id=folder / "saved")
    truth = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in truth.items()}, folder / "truth.safetensors")


if __name__ == "__main__":
    wanted, into = sys.argv[1], Path(sys.argv[2])
    fsdp2_writes(into) if wanted == "fsdp2" else deepspeed_writes(wanted, into)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
