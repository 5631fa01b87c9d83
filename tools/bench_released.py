"""The same step as people wrote it before: what `bench.py step --released` compares with.

Written for the benchmark after what is known of the released code's shape: eager PyTorch, softmax attention by hand,
half precision with a loss scaler on GPUs, one parameter after another in the moving average, and values brought to the
host amid every step. The loss and the model are lmim's, so both compute the same thing.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from timm.layers import Attention
from torch import Tensor, nn

from lmim.config import Split
from lmim.dist import Topology
from lmim.objective import LatentMIM, StepOutput
from lmim.optim import MOMENTS, create_moments, parameter_groups, set_learning_rate, set_steps_taken
from lmim.options import Config
from lmim.schedules import Hyper
from lmim.store import Piece, whole
from lmim.vit import CrossAttention


def _by_hand(attention: CrossAttention, queries: Tensor, context: Tensor) -> Tensor:
    q = attention.q_proj(queries).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    k, v = attention.kv_proj(context).unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


class ReleasedBackend:
    """The Backend protocol's steps, on one process."""

    def __init__(self, config: Config, topology: Topology, split: Split):
        self.config, self.topology, self.split = config, topology, split

    def prepare(self, build) -> None:
        self.model: LatentMIM = build().to(self.topology.device)
        self.model.init_weights(self.config.run.seed)
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.fused_attn, module.forward = False, Attention.forward.__get__(module)
            elif isinstance(module, CrossAttention):
                module.forward = _by_hand.__get__(module)
        groups = parameter_groups(self.model, self.config.optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(self.config.optim.betas))
        create_moments(self.optimizer, (p for p in self.model.parameters() if p.requires_grad))
        for state in self.optimizer.state.values():
            state["step"] = state["step"].cpu()
        on_gpu = self.topology.device.type == "cuda"
        self.dtype = torch.float16 if on_gpu else torch.bfloat16
        self.scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)

    def begin_step(self, hyper: Hyper) -> None:
        for theirs, ours in zip(self.model.target.parameters(), self.model.online.parameters(), strict=True):
            theirs.data = theirs.data * hyper.momentum + ours.data * (1 - hyper.momentum)
        set_learning_rate(self.optimizer, hyper.lr)

    def forward_backward(self, *inputs: Tensor | float, last_micro: bool) -> StepOutput:
        half = self.config.precision.compute == "bf16"
        cues = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)  # the decoder's visual cues are written by hand
        with torch.autocast(self.topology.device.type, self.dtype) if half else nullcontext(), cues:
            out = self.model(*inputs)
        out.loss.item()
        for value in out[1:4]:  # the three similarities that it logs
            value.item()
        self.scaler.scale(out.loss / self.split.accumulate).backward()
        return out

    def finish_step(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        norm.item()
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize()
        return norm

    def pieces(self) -> list[Piece]:
        found = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            found.append(whole(name, tensor))
            found += [whole(f"{moment}/{name}", self.optimizer.state[tensor][moment])
                      for moment in MOMENTS if tensor.requires_grad]  # fmt: skip
        return found

    def loaded(self, optimizer_steps: int) -> None:
        set_steps_taken(self.optimizer, optimizer_steps)

    def close(self) -> None:
        del self.model, self.optimizer
