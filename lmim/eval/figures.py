"""The figures of a report as files for papers, and one picture of all of them.

Owns their names and how matplotlib draws what the page shows: the same charts, the same maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lmim.config import ConfigError
from lmim.eval.curves import Chart
from lmim.eval.token_maps import CLUSTER_COUNTS, TokenMaps

FORMATS = ("png", "pdf", "svg")
PACKAGES = dict(matplotlib="matplotlib", scipy="scipy", sklearn="scikit-learn", jinja2="jinja2")
COLOURS = ("#0072b2", "#c2410c", "#00795a", "#8b3fa8", "#8a6a00", "#5b6470")  # of curves, as the page's in the light
CLUSTER_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")  # told apart by the colour-blind (Okabe, Ito)
OVERVIEW = ("loss", "similarities", "accuracy")
DPI = 200  # of PNGs for papers
INCHES = (4.6, 3.0)


def check_packages() -> None:
    """Raise ConfigError if a package that a report needs is missing."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"a report needs {', '.join(missing)}, not installed here: pip install 'lmim[report]'")


def save_figures(
    charts: Sequence[Chart], maps: Sequence[TokenMaps], folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Draw each chart, `segmentation` and `tsne` into files of these formats in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    drawn = [(chart.name, _of_chart(chart)) for chart in charts]
    if maps:
        drawn += [("segmentation", _segmentation(maps)), ("tsne", _tsne(maps))]
    paths = [folder / f"{name}.{format}" for format in formats for name, _ in drawn]
    figures = [figure for _ in formats for _, figure in drawn]
    for path, figure in zip(paths, figures, strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def save_overview(title: str, charts: Sequence[Chart], maps: Sequence[TokenMaps], path: Path) -> None:
    """Draw the chief curves above and the segmented images below into one PNG."""
    figure = _figure(15, 10 if maps else 4.6)
    figure.suptitle(title)
    chosen = [chart for chart in charts if chart.name in OVERVIEW]
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.35]) if maps else (figure, None)
    if chosen:
        for axes, chart in zip(above.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            draw_chart(axes, chart)
    if maps:
        below.suptitle("patch tokens of the trained encoder, clustered image by image (Ward)")
        _draw_segmentation(below, maps)
    figure.savefig(path, dpi=110)


def draw_chart(axes: Any, chart: Chart) -> None:
    """Draw a chart on matplotlib's axes."""
    for series in chart.series:
        colour = COLOURS[series.colour % len(COLOURS)]
        if (series.high > series.low).any():
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.2, linewidth=0)
        style = dict(linestyle="--" if series.dashed else "-", marker="o" if series.dots else None, markersize=3)
        axes.plot(series.x, series.mean, color=colour, linewidth=1.1, label=series.label, **style)
    for number, level in enumerate(chart.levels):
        axes.axhline(level.value, color="gray", linewidth=0.9, linestyle=("--", ":", "-.")[number % 3],
                     label=f"{level.label} {level.value:.4g}{chart.unit}")  # fmt: skip
    if chart.logarithmic:
        axes.set_yscale("log")
    title = f"{chart.title} ({chart.unit.strip()})" if chart.unit else chart.title
    axes.set(title=title, xlabel="epoch", ylim=chart.limits)
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if len(chart.series) + len(chart.levels) > 1:
        axes.legend(fontsize=7, frameon=False)


def cluster_colours(labels: np.ndarray) -> np.ndarray:
    """Return the colours (…, 3) of labels, uint8."""
    table = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in CLUSTER_COLOURS], np.uint8)
    return table[labels % len(table)]


# --- figures ---------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no windows, nothing to close

    return Figure(figsize=(width, height), layout="constrained")


def _of_chart(chart: Chart) -> Any:
    figure = _figure(*INCHES)
    draw_chart(figure.subplots(), chart)
    return figure


def _segmentation(maps: Sequence[TokenMaps]) -> Any:
    figure = _figure(1.3 * len(maps) + 0.3, 1.3 * (1 + len(CLUSTER_COUNTS)))
    _draw_segmentation(figure, maps)
    return figure


def _draw_segmentation(figure: Any, maps: Sequence[TokenMaps]) -> None:
    panels = figure.subplots(1 + len(CLUSTER_COUNTS), len(maps), squeeze=False)
    for column, of_image in enumerate(maps):
        panels[0, column].imshow(of_image.image)
        for row, count in enumerate(CLUSTER_COUNTS, start=1):
            panels[row, column].imshow(cluster_colours(of_image.labels[count]), interpolation="nearest")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for row, words in enumerate(["image", *(f"{count} clusters" for count in CLUSTER_COUNTS)]):
        panels[row, 0].set_ylabel(words)


def _tsne(maps: Sequence[TokenMaps]) -> Any:
    figure = _figure(1.6 * len(maps), 3.4)
    panels = figure.subplots(2, len(maps), squeeze=False)
    for (image, scatter), of_image in zip(panels.T, maps, strict=True):
        labels = of_image.labels[CLUSTER_COUNTS[-1]]
        image.imshow(of_image.image)
        scatter.scatter(*of_image.points.T, c=cluster_colours(labels.ravel()[of_image.chosen]) / 255, s=3, linewidths=0)
        scatter.set_box_aspect(1)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return figure
