"""Replay recorded cases of the authors' code through this project's model, objective, optimizer and converter.

    python tools/replay_case.py FOLDER... [--json]

A folder holds `case.json`, `weights_before.safetensors`, `trace.safetensors` and `weights_after.safetensors`: single
steps with every intermediate value, or (`kind: trajectory`) a run with accumulation and schedules. Prints the largest
difference of each quantity beside its tolerance; exits with 1 if any is beyond it and with 2 on unusable folders.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lmim import LatentMIM
from lmim.config import ConfigError
from lmim.convert import from_authors, to_authors
from lmim.optim import build_adamw, ema_update, parameter_groups, set_learning_rate
from lmim.options import ModelConfig, ObjectiveConfig, OptimConfig
from lmim.patches import Views, gather_patches
from lmim.schedules import Schedules

TOLERANCES = {
    "visible patches": 0.0,
    "target patches": 0.0,
    "encoder output": 1e-5,
    "target output": 1e-5,
    "decoder output": 1e-5,
    "loss": 1e-5,
    "similarities": 1e-5,
    "gradients": 1e-5,
    "weights after": 1e-4,
    "decayed names": 0.0,
    "trajectory losses": 1e-4,
    "learning rate": 1e-9,
    "momentum": 1e-9,
    "similarity target": 1e-9,
}


class Differences(dict[str, float]):
    """The largest absolute difference seen of each quantity; a shape that differs counts as infinite."""

    def add(self, quantity: str, ours: Any, recorded: Any) -> None:
        ours, recorded = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, recorded))
        worst = float("inf")
        if ours.shape == recorded.shape:
            worst = (ours.detach() - recorded).abs().max().item()
        # a NaN on either side must not pass as small
        self[quantity] = max(self.get(quantity, 0.0), worst if worst == worst else float("inf"))

    def beyond(self) -> list[str]:
        return [quantity for quantity, worst in self.items() if not worst <= TOLERANCES[quantity]]


def build(recorded: dict[str, Any], weights: dict[str, Tensor]) -> LatentMIM:
    """Build the recorded configuration and load the recorded weights through the converter's map."""
    losses = {"infonce_patches": "infonce"}
    model = ModelConfig(
        embed_dim=recorded["embed_dim"], depth=recorded["depth"], num_heads=recorded["num_heads"],
        patch_size=recorded["patch_size"], grid_size=recorded["grid_size"], patch_gap=recorded["patch_gap"],
        mlp_ratio=recorded["mlp_ratio"], projector_dim=recorded["projector_dim"],
        projector_depth=recorded["projector_depth"], decoder_dim=recorded["decoder_dim"],
        decoder_depth=recorded["decoder_depth"], decoder_num_heads=recorded["decoder_num_heads"],
        visual_cues=recorded["visual_cue_mask_token"], learnable_positions=not recorded["frozen_position_embedding"],
    )  # fmt: skip
    objective = ObjectiveConfig(
        loss=losses.get(recorded["loss"], recorded["loss"]), temperature=recorded["tau"],
        num_visible=recorded["num_visible"], similarity_weight=recorded["avg_sim_coeff"],
        target_input="masked" if recorded["mask_target"] else "all",
    )  # fmt: skip
    latent_mim = LatentMIM(model, objective)
    latent_mim.load_state_dict(from_authors(weights))
    return latent_mim


def optimizer_for(latent_mim: LatentMIM, recorded: dict[str, Any]) -> torch.optim.AdamW:
    config = OptimConfig(weight_decay=recorded["weight_decay"], betas=recorded["betas"])
    return build_adamw(parameter_groups(latent_mim, config.weight_decay), config)


def is_key_bias(name: str, size: int) -> slice | None:
    """Return where a bias holds the attention keys' part, whose exact gradient is zero; None where it holds none."""
    if name.endswith("qkv.bias"):
        return slice(size // 3, 2 * size // 3)
    return slice(0, size // 2) if name.endswith("kv_proj.bias") else None


def compare_weights(differences: Differences, latent_mim: LatentMIM, recorded: dict[str, Tensor]) -> None:
    ours = to_authors(latent_mim.state_dict())
    if set(ours) != set(recorded):
        raise ConfigError(f"weights_after names differ: {', '.join(sorted(set(ours) ^ set(recorded))[:3])} …")
    for name, tensor in recorded.items():
        mine = ours[name].clone()
        keys = is_key_bias(name, tensor.numel())
        if keys is not None:
            mine[keys] = tensor[keys]
        differences.add("weights after", mine, tensor)


def step_views(trace: dict[str, Tensor], prefix: str) -> Views:
    visible, masked = (trace[f"{prefix}.{kind}_index"].long() for kind in ("visible", "masked"))
    no_gap = torch.zeros(len(visible), visible.shape[1] + masked.shape[1], dtype=torch.int64)
    row, col = (trace.get(f"{prefix}.gap_{along}", no_gap).long() for along in ("row", "col"))
    return Views(visible, masked, row, col)


def replay_steps(case: dict[str, Any], latent_mim: LatentMIM, trace: dict[str, Tensor]) -> Differences:
    """Replay single steps: the EMA, forward, backward, AdamW, with every recorded quantity compared."""
    recorded, differences = case["config"], Differences()
    optimizer = optimizer_for(latent_mim, recorded)
    set_learning_rate(optimizer, recorded["lr"])
    outputs: dict[str, Tensor] = {}
    for part in ("online", "target", "decoder"):
        latent_mim.get_submodule(part).register_forward_hook(lambda m, i, out, part=part: outputs.update({part: out}))
    geometry = dict(patch_size=recorded["patch_size"], patch_gap=recorded["patch_gap"])
    for step in range(recorded["steps"]):
        at = f"step{step}"
        ema_update(latent_mim.target.parameters(), latent_mim.online.parameters(), recorded["momentum"])
        image, views = trace[f"{at}.image"], step_views(trace, at)
        for kind in ("visible", "target"):
            cut = gather_patches(image, trace[f"{at}.{kind}_index"], views, **geometry)
            differences.add(f"{kind} patches", cut, trace[f"{at}.{kind}_patches"])
        out = latent_mim(image, None, recorded["sim_target"], views)
        for part, name in (("online", "encoder"), ("target", "target"), ("decoder", "decoder")):
            differences.add(f"{name} output", outputs[part], trace[f"{at}.{name}_out"])
        differences.add("loss", out.loss, case["losses"][step])
        differences.add("loss", out.loss, trace[f"{at}.loss"].squeeze())
        logged = case["metrics"][step]
        for part, theirs in (("predictions", "pred"), ("visible", "vis"), ("targets", "trg")):
            differences.add("similarities", getattr(out, f"similarity_{part}"), logged[f"avg_sim_{theirs}"])
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:  # gradients are recorded there only
            gradients = {n: p.grad for n, p in latent_mim.named_parameters() if p.grad is not None}
            compare_gradients(differences, gradients, trace, f"{at}.grad.")
        optimizer.step()
    return differences


def compare_gradients(differences: Differences, ours: dict[str, Tensor], trace: dict[str, Tensor], prefix: str) -> None:
    recorded = {name.removeprefix(prefix): grad for name, grad in trace.items() if name.startswith(prefix)}
    mine = to_authors(ours)
    for name in set(mine) | set(recorded):
        if name not in mine or name not in recorded:
            differences["gradients"] = float("inf")
        else:
            differences.add("gradients", mine[name], recorded[name])


def replay_trajectory(case: dict[str, Any], latent_mim: LatentMIM, trace: dict[str, Tensor]) -> Differences:
    """Replay a run: accumulation and the three schedules, every loss and scheduled value compared."""
    recorded, differences = case["config"], Differences()
    optimizer = optimizer_for(latent_mim, recorded)
    per_epoch = recorded["steps_per_epoch"]
    schedules = Schedules(
        total_steps=recorded["epochs"] * per_epoch, warmup_steps=recorded["warmup_epochs"] * per_epoch,
        peak_lr=recorded["lr"], floor=recorded["min_lr_fraction"], momentum=recorded["target_momentum"],
        similarity_start=recorded["sim_start"], similarity_end=recorded["sim_end"],
    )  # fmt: skip
    for row in case["log"]:
        hyper = schedules.at(row["step"])
        if row["micro"] == 0:
            ema_update(latent_mim.target.parameters(), latent_mim.online.parameters(), hyper.momentum)
            set_learning_rate(optimizer, hyper.lr)
            optimizer.zero_grad()
        at = f"step{row['step']}.micro{row['micro']}"
        out = latent_mim(trace[f"{at}.image"], None, hyper.similarity_target, step_views(trace, at))
        (out.loss / recorded["accumulation"]).backward()
        differences.add("trajectory losses", out.loss, row["loss"])
        differences.add("learning rate", hyper.lr, row["lr"])
        differences.add("momentum", hyper.momentum, row["momentum"])
        differences.add("similarity target", hyper.similarity_target, row["sim_target"])
        if row["micro"] == recorded["accumulation"] - 1:
            optimizer.step()
    return differences


def replay(folder: Path) -> Differences:
    """Replay one recorded case and return the largest difference of each quantity."""
    try:
        case = json.loads((folder / "case.json").read_text())
        before, trace, after = (load_file(folder / f"{name}.safetensors")
                                for name in ("weights_before", "trace", "weights_after"))  # fmt: skip
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ConfigError(f"{folder} is no recorded case: {error}") from error
    try:
        return _replay(case, before, trace, after)
    except (KeyError, TypeError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder} is no whole recorded case: {type(error).__name__}: {words}") from error


def _replay(
    case: dict[str, Any], before: dict[str, Tensor], trace: dict[str, Tensor], after: dict[str, Tensor]
) -> Differences:
    latent_mim = build(case["config"], before)
    if case.get("kind") == "trajectory":
        differences = replay_trajectory(case, latent_mim, trace)
    else:
        differences = replay_steps(case, latent_mim, trace)
        decayed = parameter_groups(latent_mim, 1.0)[0]["names"]
        mine = set(to_authors({name: torch.empty(0) for name in decayed}))
        differences["decayed names"] = float(len(mine ^ set(case["decayed"])))
    compare_weights(differences, latent_mim, after)
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, wherever it runs
    try:
        results = {str(folder): replay(folder) for folder in arguments.folders}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(
            json.dumps(
                {folder: dict(differences, beyond=differences.beyond()) for folder, differences in results.items()}
            )
        )
    else:
        for folder, differences in results.items():
            print(folder)
            for quantity, worst in differences.items():
                verdict = "BEYOND" if quantity in differences.beyond() else "ok"
                print(f"  {quantity:18} {worst:9.2e}  tolerance {TOLERANCES[quantity]:.0e}  {verdict}")
    return 1 if any(differences.beyond() for differences in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
