"""Optimisation: which tensors decay, AdamW, and the fp32 moving average that is the target.

Owns the rules by which names fall into parameter groups and the arithmetic of the EMA. The invariant: the EMA is done
in fp32 whatever the compute precision, since a bf16 average with momentum near 1 stands still.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from lmim.options import OptimConfig

NO_DECAY_WORDS = ("bias", "norm", "embed")


def decays(name: str, parameter: Tensor) -> bool:
    """Tell whether weight decay applies: not to tensors of one dimension, nor to biases, norms and embeddings.

    So the patch embedding, the decoder's input projection and learned positions are exempt, and class and mask tokens
    are not: the authors' rule.
    """
    return parameter.ndim > 1 and not any(word in name for word in NO_DECAY_WORDS)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups of the trained parameters, decayed and exempt; each lists its `names` in the same order.

    The model must not be cut yet where cutting changes the parameters' dimensions.
    """
    groups = [dict(params=[], names=[], weight_decay=decay, lr_scale=1.0) for decay in (weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0] if decays(name, parameter) else groups[1]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return groups of the trained parameters, two a layer, by timm; each lists its `names` and has its `lr_scale`.

    Which layer a name is of and what does not decay is the model's to say (`group_matcher`, `no_weight_decay`); the
    last layer has scale 1, and each one before it `layer_decay` of the next one's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, weight_decay, model.no_weight_decay(), layer_decay=layer_decay)
    return [dict(group, names=[names[id(parameter)] for parameter in group["params"]]) for group in groups]


def build_adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over groups of a model's parameters; the learning rate is set anew before every step."""
    fused = all(p.device.type in ("cuda", "cpu") for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.betas), eps=config.eps, fused=fused)


MOMENTS = ("exp_avg", "exp_avg_sq")


def create_moments(optimizer: torch.optim.AdamW, tensors: Iterable[Tensor]) -> None:
    """Give AdamW its state now, at zero, rather than in its first step, so that one can be read into it before."""
    for tensor in tensors:
        optimizer.state[tensor] = dict(
            step=torch.zeros((), device=tensor.device), **{moment: torch.zeros_like(tensor) for moment in MOMENTS}
        )


def steps_taken(optimizer: torch.optim.AdamW) -> int:
    """Return how many steps AdamW has taken; all of its tensors have taken the same."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_steps_taken(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Set how many steps AdamW has taken."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def leave_out_unless_finite(optimizer: torch.optim.AdamW, norm: Tensor) -> None:
    """Let fused AdamW's next step change nothing if the gradient's norm is not finite; nothing waits for the device."""
    optimizer.found_inf = (~torch.isfinite(norm)).float()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: the share of `lr` that is the group's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def ema_update(targets: Iterable[Tensor], onlines: Iterable[Tensor], momentum: float) -> None:
    """target ← m·target + (1 − m)·online, in place, over lists of fp32 tensors of the same shapes."""
    targets, onlines = list(targets), list(onlines)
    if not targets:  # a model without a moving average
        return
    assert all(t.dtype == torch.float32 == o.dtype for t, o in zip(targets, onlines, strict=True)), "EMA is fp32"
    torch._foreach_lerp_(targets, onlines, 1 - momentum)
