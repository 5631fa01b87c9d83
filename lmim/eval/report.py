"""One picture of a run: how it went, and what its patch tokens see."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmim.config import Config, ConfigError, load_config
from lmim.data.loader import eval_batches, open_shards
from lmim.data.shards import ShardIndex
from lmim.eval.clusters import patch_tokens, ward_clusters
from lmim.eval.features import eval_sizes
from lmim.eval.knn import read_results
from lmim.formats import load_encoder
from lmim.metrics import EVAL_FILE, LOG_FILE, read_rows
from lmim.objective import chance_level

FIGURE_FILE = "report.png"
CLUSTER_COUNTS = [3, 4, 5]
IMAGES = 8


def report(run_folder: Path) -> dict[str, Any]:
    """Draw `report.png` into a run folder and return its figures as plain values (accuracies in percent)."""
    log, evals = read_rows(run_folder / LOG_FILE), read_rows(run_folder / EVAL_FILE)
    if not log:
        raise ConfigError(f"{run_folder} holds no {LOG_FILE} with steps: give the folder of a run that was started")
    config = load_config(run_folder)
    knn = read_results(run_folder)
    done = run_folder / "done.json"
    figure = draw(run_folder, config, log, evals, knn)

    def percent(features: str) -> float | None:
        return round(100 * knn[features]["leave_one_out"], 2) if features in knn else None

    return dict(
        run_folder=str(run_folder),
        figure=str(figure),
        knn_pixels=percent("pixels"),
        knn_random=percent("random"),
        knn_final=percent("online"),
        images_per_second=statistics.median(row["images_per_second"] for row in log),
        ranks=json.loads(done.read_text())["ranks"] if done.is_file() else None,
    )


def draw(run_folder: Path, config: Config, log: list[dict], evals: list[dict], knn: dict[str, dict]) -> Path:
    """Draw curves above and segmented images below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 10), layout="constrained")
    figure.suptitle(f"Latent MIM: {run_folder}")
    curves, pictures = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    loss, similarity, accuracy = curves.subplots(1, 3)
    _draw_loss(loss, config, log)
    _draw_similarities(similarity, log)
    _draw_knn(accuracy, evals, knn)
    if config.data.eval:
        _draw_clusters(pictures, run_folder, config)
    path = run_folder / FIGURE_FILE
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_loss(axes: Any, config: Config, log: list[dict]) -> None:
    epochs, values = [row["epoch"] for row in log], [row["loss"] for row in log]
    axes.plot(epochs, values, linewidth=0.8)
    if config.objective.loss == "infonce":
        masked = config.model.grid_size**2 - config.objective.num_visible
        level = chance_level(masked, config.objective.temperature)
        axes.axhline(level, color="gray", linestyle="--", label=f"chance = collapse, 2τ ln M = {level:.2f}")
        axes.legend(fontsize=8)
    axes.set(title="loss", xlabel="epoch")


def _draw_similarities(axes: Any, log: list[dict]) -> None:
    epochs = [row["epoch"] for row in log]
    for name, label in (("predictions", "predictions"), ("visible", "visible tokens"), ("targets", "targets")):
        axes.plot(epochs, [row[f"similarity_{name}"] for row in log], linewidth=0.8, label=label)
    axes.set(title="mean cosine between patches of an image", xlabel="epoch", ylim=(0, 1.02))
    axes.legend(fontsize=8)


def _draw_knn(axes: Any, evals: list[dict], knn: dict[str, dict]) -> None:
    rows = [row for row in evals if "knn_leave_one_out" in row]
    axes.plot(
        [r["epoch"] for r in rows], [100 * r["knn_leave_one_out"] for r in rows], marker="o", label="online encoder"
    )
    for name, style in (("pixels", ":"), ("random", "--")):
        if name in knn:
            value = 100 * knn[name]["leave_one_out"]
            axes.axhline(value, color="gray", linestyle=style, label=f"{name} {value:.1f} %")
    axes.set(title="leave-one-out nearest neighbour (%)", xlabel="epoch")
    axes.legend(fontsize=8)


def _draw_clusters(figure: Any, run_folder: Path, config: Config) -> None:
    index = open_shards("data.eval", config.data.eval, run_folder)
    images = _some_images(index, config)
    tokens = patch_tokens(load_encoder(run_folder), images)
    panels = figure.subplots(1 + len(CLUSTER_COUNTS), len(images), squeeze=False)
    figure.suptitle("patch tokens of the trained encoder, clustered image by image (Ward)")
    for column, (image, image_tokens) in enumerate(zip(images, tokens, strict=True)):
        panels[0, column].imshow(image.permute(1, 2, 0).numpy())
        for row, labels in enumerate(ward_clusters(image_tokens, CLUSTER_COUNTS), start=1):
            panels[row, column].imshow(labels, cmap="tab10", vmin=0, vmax=9)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for row, words in enumerate(["image", *(f"{count} clusters" for count in CLUSTER_COUNTS)]):
        panels[row, 0].set_ylabel(words)


def _some_images(index: ShardIndex, config: Config) -> torch.Tensor:
    """Return up to eight images spread over the index, uint8 (B, 3, S, S)."""
    resize, crop = eval_sizes(config)
    ids = np.unique(np.linspace(0, len(index) - 1, IMAGES).astype(np.int64))
    return torch.cat(
        [images for images, _ in eval_batches(index, ids, resize=resize, crop=crop, batch=IMAGES, workers=0)]
    )
