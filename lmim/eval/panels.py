"""Pictures of one image's patch tokens: the image, its clusters, t-SNE in the same colours, principal components.

Owns what a panel holds and how it is drawn (paper, figure 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PANEL_INCHES = 1.55
DPI = 110


class Panel(NamedTuple):
    """What is drawn of one image, as plain arrays: the view, label maps by number of clusters, and the rest."""

    name: str
    image: np.ndarray  # uint8 (S, S, 3)
    labels: dict[int, np.ndarray]  # number of clusters: (rows, cols), by rising number
    tsne: np.ndarray  # (m, 2)
    tsne_tokens: np.ndarray  # (m,) which tokens these are
    colours: np.ndarray  # (rows, cols, 3) of three principal components
    truth: np.ndarray | None  # (S, S), negative where no class is given


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Draw one row an image into a PNG, which appears whole or not at all."""
    from matplotlib.figure import Figure

    counts, with_truth = list(panels[0].labels), any(panel.truth is not None for panel in panels)
    titles = ["image", *(f"{count} clusters" for count in counts), f"t-SNE, {counts[-1]} clusters", "PCA as RGB"]
    titles += ["mask"] * with_truth
    size = (PANEL_INCHES * len(titles), PANEL_INCHES * len(panels) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    grid = figure.subplots(len(panels), len(titles), squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        _draw_row(row, panel)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=7)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=DPI, format="png")
    temporary.replace(path)


def _draw_row(row: Sequence[Any], panel: Panel) -> None:
    for axes in row:
        axes.set(xticks=[], yticks=[])
    image, *clusters = row[: 1 + len(panel.labels)]
    image.imshow(panel.image)
    image.set_ylabel(panel.name, fontsize=6)
    for axes, labels in zip(clusters, panel.labels.values(), strict=True):
        axes.imshow(_colours(labels), interpolation="nearest")
    tsne, components, *truth = row[1 + len(panel.labels) :]
    finest = list(panel.labels.values())[-1].ravel()[panel.tsne_tokens]
    tsne.scatter(*panel.tsne.T, c=_colours(finest), s=1.2, linewidths=0)
    tsne.set_box_aspect(1)
    components.imshow(panel.colours, interpolation="nearest")
    if truth and panel.truth is not None:
        truth[0].imshow(_colours(panel.truth), interpolation="nearest")


def _colours(labels: np.ndarray) -> np.ndarray:
    """Return matplotlib's colours (…, 4) of labels, the same for the same number everywhere; white below 0."""
    from matplotlib import colormaps

    table = colormaps["tab10" if labels.max() < 10 else "tab20"]
    return np.where((labels < 0)[..., None], 1.0, table(labels % table.N))
