"""The curves of a run, as numbers: what is drawn of the log, on which scale, and thinned to what a picture can show.

Owns the list of charts and the thinning. The invariants: a chart's size does not depend on how long the run was; what
thinning leaves out stays inside the band from the lowest to the highest value of each bin; a value that is not finite
is never drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmim.eval.history import History
from lmim.health import ALIKE
from lmim.norms import GRADIENT, RATIO
from lmim.objective import chance_level

BINS = 300  # points of a curve: about one for each pixel of a chart
LEAPS_OVER = 3.0  # a scale this many times larger than what 98 % of the values need is cut
SIMILARITIES = dict(similarity_predictions="predictions", similarity_visible="visible tokens",
                    similarity_targets="targets", similarity_positions="targets across images")  # fmt: skip
PROTOCOLS = dict(knn_leave_one_out="1-NN leave-one-out", knn_gallery="k-NN with gallery")
COLOURS = 6  # curves that one chart can tell apart


class Series(NamedTuple):
    """One curve: of each bin the mean position, the lowest value, the mean and the highest."""

    label: str
    x: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    colour: int = 0  # number of a colour
    dashed: bool = False
    dots: bool = False  # few values: each is marked

    @property
    def last(self) -> float:
        return float(self.mean[-1])


class Level(NamedTuple):
    """A horizontal line to compare with."""

    label: str
    value: float


class Chart(NamedTuple):
    """Curves on common axes; x is in epochs."""

    name: str  # of its file
    title: str
    series: list[Series]
    levels: list[Level] = []  # noqa: RUF012 (never changed)
    unit: str = ""
    note: str = ""
    logarithmic: bool = False
    at_least: tuple[float, float] | None = None  # what the vertical axis must show

    @property
    def limits(self) -> tuple[float, float]:
        """Return what the vertical axis shows: everything, unless a few leaps would press all else flat."""
        low = np.concatenate([s.low for s in self.series])
        high = np.concatenate([s.high for s in self.series])
        if self.logarithmic:
            return float(low.min()) / 1.1, float(high.max()) * 1.1
        bottom, top = float(low.min()), float(high.max())
        usual_bottom, usual_top = float(np.percentile(low, 1)), float(np.percentile(high, 99))
        usual = usual_top - usual_bottom
        if usual > 0 and top - bottom > LEAPS_OVER * usual:
            bottom, top = max(bottom, usual_bottom - 0.5 * usual), min(top, usual_top + 0.5 * usual)
        values = [bottom, top, *(level.value for level in self.levels), *(self.at_least or ())]
        bottom, top = min(values), max(values)
        margin = 0.04 * (top - bottom) or 0.04 * abs(top) or 1.0
        if self.at_least:  # a natural scale needs no margin where it is not crossed
            low, high = self.at_least
            return (low if bottom >= low else bottom - margin), (high if top <= high else top + margin)
        return bottom - margin, top + margin

    @property
    def beyond(self) -> float | None:
        """Return the value farthest above or below the axis, None if all are inside."""
        bottom, top = self.limits
        low, high = min(float(s.low.min()) for s in self.series), max(float(s.high.max()) for s in self.series)
        if low >= bottom and high <= top:
            return None
        return high if high - top >= bottom - low else low


def thin(label: str, x: np.ndarray, y: np.ndarray, colour: int = 0, **style: bool) -> Series | None:
    """Return at most BINS points of a curve, each of as many values in a row; None where no value is finite."""
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if not len(y):
        return None
    if len(y) <= BINS:
        return Series(label, x, y, y, y, colour, **style)
    starts = np.linspace(0, len(y), BINS, endpoint=False).astype(np.int64)
    counts = np.diff(starts, append=len(y))
    return Series(label, np.add.reduceat(x, starts) / counts, np.minimum.reduceat(y, starts),
                  np.add.reduceat(y, starts) / counts, np.maximum.reduceat(y, starts), colour, **style)  # fmt: skip


# --- one run ---------------------------------------------------------------------------------------------------------


def charts(history: History) -> list[Chart]:
    """Return the charts of a run: those whose numbers its log holds."""
    found = [
        _loss(history),
        _similarities(history),
        _accuracies(history),
        _effective_rank(history),
        _simple(history, "target_deviation", "target_deviation", "Deviation of targets across images",
                at_least=(0.0, 1.0)),
        _simple(history, "grad_norm", "gradient_norm", "Gradient norm", logarithmic=True),
        _of_parts(history, GRADIENT, "gradient_norms", "Gradient norm of each part"),
        _of_parts(history, RATIO, "updates", "Update of each part, as a share of its weights"),
        _simple(history, "lr", "learning_rate", "Learning rate"),
        _simple(history, "momentum", "momentum", "Momentum of the target (EMA)"),
        _simple(history, "images_per_second", "images_per_second", "Images per second", at_least=(0.0, 0.0)),
        _simple(history, "mfu", "mfu", "Model FLOPs utilisation (MFU)", scale=100, unit=" %", at_least=(0.0, 0.0)),
        _simple(history, "data_wait", "data_wait", "Time spent waiting for data", scale=100, unit=" %",
                at_least=(0.0, 5.0)),
        _simple(history, "rank_spread", "rank_spread", "Excess of the slowest rank's own work (of a step)", scale=100,
                unit=" %", at_least=(0.0, 5.0)),
        _simple(history, "memory_gib", "memory", "Peak memory of the fullest rank", unit=" GiB", at_least=(0.0, 0.0)),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def chance(history: History) -> float | None:
    """Return the loss of predictions that tell nothing, where the objective has such a level."""
    config = history.config
    if config is None or config.objective.loss != "infonce" or config.run.task == "finetune":
        return None
    return chance_level(config.model.grid_size**2 - config.objective.num_visible, config.objective.temperature)


def _column(
    history: History, key: str, label: str, colour: int = 0, scale: float = 1.0, **style: bool
) -> Series | None:
    if key not in history.log:
        return None
    return thin(label, history.log["epoch"], scale * history.log[key], colour, **style)


def _simple(history: History, key: str, name: str, title: str, *, scale: float = 1.0, unit: str = "",
            logarithmic: bool = False, at_least: tuple[float, float] | None = None) -> Chart | None:  # fmt: skip
    series = _column(history, key, title.partition(" (")[0].lower(), scale=scale)
    if series is None:
        return None
    logarithmic = logarithmic and bool((series.low > 0).all())
    return Chart(name, title, [series], unit=unit, logarithmic=logarithmic, at_least=at_least)


def _of_parts(history: History, ahead: str, name: str, title: str) -> Chart | None:
    keys = [key for key in history.log if key.startswith(ahead)]
    found = [_column(history, key, key.removeprefix(ahead), number) for number, key in enumerate(keys)]
    series = [one for one in found if one is not None]
    if not series:
        return None
    return Chart(name, title, series, logarithmic=all((one.low > 0).all() for one in series))


def _loss(history: History) -> Chart | None:
    series, level = _column(history, "loss", "loss"), chance(history)
    if series is None:
        return None
    levels = [] if level is None else [Level("chance = collapse, 2τ·ln M", level)]
    return Chart("loss", "Loss", [series], levels)


def _similarities(history: History) -> Chart | None:
    found = [_column(history, key, label, number) for number, (key, label) in enumerate(SIMILARITIES.items())]
    series = [one for one in found if one is not None]
    if not series:
        return None
    if history.config is not None and history.config.objective.similarity_weight:
        steered = _column(history, "similarity_target", "steered to", len(SIMILARITIES), dashed=True)
        series += [steered] if steered else []
    note = "Targets across images: of different images at the same position."
    return Chart("similarities", "Mean cosine of patch tokens", series, [Level("alike = collapse", ALIKE)],
                 at_least=(0.0, 1.0), note=note)  # fmt: skip


def _accuracies(history: History) -> Chart | None:
    series = []
    for key, values in history.evals.items():
        if key in ("step", "epoch") or key.endswith("effective_rank"):
            continue
        one = thin(evaluation_label(key), history.evals["epoch"], 100 * values, len(series), dots=True)
        series += [one] if one else []
    if not series:
        return None
    levels = [
        Level(words, 100 * history.knn[name]["leave_one_out"])
        for name, words in (("pixels", "raw pixels"), ("random", "encoder as initialised"))
        if name in history.knn and isinstance(history.knn[name].get("leave_one_out"), (int, float))
    ]
    return Chart("accuracy", "Accuracy of frozen features", series[:COLOURS], levels, unit=" %")


def evaluation_label(key: str) -> str:
    """Return what a value of `eval.jsonl` is called in words."""
    encoder, key = ("target: ", key.removeprefix("target_")) if key.startswith("target_") else ("", key)
    return encoder + PROTOCOLS.get(key, key.replace("_", " "))


def _effective_rank(history: History) -> Chart | None:
    found = []
    for columns, dots in ((history.log, False), (history.evals, True)):
        for key in columns:
            if key.endswith("effective_rank"):
                found.append(thin(key.replace("_", " "), columns["epoch"], columns[key], len(found), dots=dots))
    series = [one for one in found if one is not None]
    return Chart("effective_rank", "Effective rank of features", series, at_least=(0.0, 1.0)) if series else None


# --- several runs ----------------------------------------------------------------------------------------------------


def overlaid(histories: list[History], names: list[str]) -> list[Chart]:
    """Return charts with the same curve of several runs, one colour a run, each without its band."""
    drawn, found = [charts(history) for history in histories], []
    for name in dict.fromkeys(chart.name for of_run in drawn for chart in of_run):
        same = {number: chart for number, of_run in enumerate(drawn) for chart in of_run if chart.name == name}
        first = next(iter(same.values()))
        labels = list(dict.fromkeys(one.label for chart in same.values() for one in chart.series))
        for label in labels:
            series = [
                one._replace(label=names[number], low=one.mean, high=one.mean, colour=number, dashed=False)
                for number, chart in same.items() for one in chart.series if one.label == label
            ]  # fmt: skip
            levels = first.levels if all(chart.levels == first.levels for chart in same.values()) else []
            alone = len(labels) == 1
            found.append(first._replace(
                name=name if alone else f"{name}_{label.replace(' ', '_')}", series=series, levels=levels, note="",
                title=first.title if alone else f"{first.title}: {label}",
            ))  # fmt: skip
    return found
