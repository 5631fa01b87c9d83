"""Run folders as a run leaves them, written by hand: what the report's tests read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from lmim.config import load_config, save_config
from tests.conftest import REPOSITORY

CHANCE = 2 * 0.2 * math.log(49 - 10)  # of the quickstart: 7 x 7 cells, 10 visible


def rows_of(steps: int, **values: float | list[float]) -> list[dict[str, float]]:
    """Return rows of a healthy run of so many steps, 10 to an epoch; `values` replace columns, or one value of all."""
    rows = []
    for step in range(steps):
        row = dict(step=step, epoch=(step + 1) / 10, loss=1.2 - 0.1 * step / steps, similarity_predictions=0.5,
                   similarity_visible=0.6, similarity_targets=0.55, similarity_positions=0.5, grad_norm=0.4, lr=1e-3,
                   momentum=0.99, similarity_target=0.7, images_per_second=100.0, data_wait=0.01, memory_gib=1.5,
                   skipped_images=0)  # fmt: skip
        rows.append({**row, **{k: v[step] if isinstance(v, list) else v for k, v in values.items()}})
    return rows


def write_run(folder: Path, rows: list[dict], evals: list[float] = (), **settings: str) -> Path:
    """Write a run folder without weights; `evals` are accuracies, the first of the encoder as initialised."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [f"run.folder={folder}", *overrides])
    save_config(config, folder / "config.yaml")
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.log").write_text("2026-01-02 03:04:05,678 INFO step 1/80\n")
    steps = np.linspace(0, len(rows), len(evals)).astype(int) if evals else []
    lines = (dict(step=int(s) - 1, epoch=s / 10, knn_leave_one_out=v) for s, v in zip(steps, evals, strict=True))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder
