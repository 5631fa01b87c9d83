"""`lmim report`: one HTML page of a run, one picture beside it, and the same figures as files for papers.

Owns what is made and where it lies. The invariant: nothing but these files is written, so a report may be made of a run
that is going on, as often as one likes.

    RUN_FOLDER/report.html       the page; of several runs: comparison.html in the first one's folder
    RUN_FOLDER/report.png        one picture of loss, similarities, accuracy and segmented images
    RUN_FOLDER/figures/NAME.png  each figure by itself, where asked for; of several runs in comparison/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmim.config import ConfigError
from lmim.eval import figures
from lmim.eval.curves import Chart, charts, overlaid
from lmim.eval.history import History, read_history
from lmim.eval.page import comparison_page, run_page
from lmim.eval.token_maps import TokenMaps, token_maps
from lmim.eval.verdict import judge

PAGE_FILE, FIGURE_FILE, COMPARISON_FILE = "report.html", "report.png", "comparison.html"
FIGURES_FOLDER, COMPARISON_FOLDER = "figures", "comparison"
MOST_RUNS = 6  # as many as there are colours


def report(run_folder: Path, formats: Sequence[str] = ()) -> dict[str, Any]:
    """Write page, picture and figures into a run folder; return where, and the run's figures (accuracies in percent).

    Raises ConfigError where the folder is no run's or a package is missing.
    """
    figures.check_packages()
    history = read_history(run_folder)
    drawn = charts(history)
    maps, why = token_maps(history)
    page, picture = run_folder / PAGE_FILE, run_folder / FIGURE_FILE
    _write(page, run_page(history, drawn, maps, why))
    figures.save_overview(f"Latent MIM: {history.name}", drawn, maps, picture)
    summary = dict(
        run_folder=str(run_folder),
        healthy=judge(history).words,
        page=str(page),
        figure=str(picture),
        knn_pixels=_percent(history, "pixels"),
        knn_random=_percent(history, "random"),
        knn_final=_percent(history, "online"),
        images_per_second=_median(history, "images_per_second"),
        ranks=history.done.get("ranks") if history.done else None,
    )
    if formats:
        summary["figures"] = _saved(drawn, maps, run_folder / FIGURES_FOLDER, formats)
    return summary


def compare(run_folders: Sequence[Path], formats: Sequence[str] = ()) -> dict[str, Any]:
    """Write one page of several runs, their curves overlaid, into the first one's folder; return where."""
    figures.check_packages()
    if len(run_folders) > MOST_RUNS:
        raise ConfigError(f"{len(run_folders)} run folders are too many for one page: give {MOST_RUNS} at most")
    histories = [read_history(folder) for folder in run_folders]
    names = _names(histories)
    drawn = overlaid(histories, names)
    page = run_folders[0] / COMPARISON_FILE
    _write(page, comparison_page(histories, names, drawn))
    summary: dict[str, Any] = dict(run_folders=[str(folder) for folder in run_folders], page=str(page))
    if formats:
        summary["figures"] = _saved(drawn, [], run_folders[0] / COMPARISON_FOLDER, formats)
    return summary


def _names(histories: list[History]) -> list[str]:
    """Return what the runs are called, by their folders where two are called alike."""
    names = [history.name for history in histories]
    return names if len(set(names)) == len(names) else [str(history.folder) for history in histories]


def _percent(history: History, features: str) -> float | None:
    share = history.knn.get(features, {}).get("leave_one_out")
    return round(100 * share, 2) if isinstance(share, (int, float)) else None


def _median(history: History, key: str) -> float | None:
    values = history.log.get(key, np.zeros(0))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _saved(drawn: list[Chart], maps: list[TokenMaps], folder: Path, formats: Sequence[str]) -> list[str]:
    return [str(path) for path in figures.save_figures(drawn, maps, folder, formats)]


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
