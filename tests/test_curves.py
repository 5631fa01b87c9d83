"""Curves: how they are thinned, and drawn where their ticks say."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmim.eval.curves import BINS, Chart, Level, Series, charts, thin
from lmim.eval.history import read_history
from lmim.eval.svg import HEIGHT, WIDTH, draw, log_ticks, number, tick_words, ticks
from tests.run_folders import CHANCE, rows_of, write_run

# --- thinning --------------------------------------------------------------------------------------------------------


def test_thinning_keeps_lowest_mean_and_highest_of_each_part():
    rng = np.random.default_rng(0)
    x, y = np.arange(10_007.0), rng.normal(size=10_007)
    y[[3, 5000]] = np.nan, np.inf
    series = thin("loss", x, y)
    kept = np.isfinite(y)
    edges = [math.floor(i * kept.sum() / BINS) for i in range(BINS)] + [int(kept.sum())]
    for i, (begin, end) in enumerate(pairwise(edges)):
        part_x, part_y = x[kept][begin:end], y[kept][begin:end]
        assert series.low[i] == part_y.min() and series.high[i] == part_y.max()
        assert series.mean[i] == pytest.approx(part_y.mean()) and series.x[i] == pytest.approx(part_x.mean())
    assert len(series.mean) == BINS


def test_short_curves_are_kept_as_they_are_and_empty_ones_left_out():
    x, y = np.arange(5.0), np.array([1, np.nan, 3, 4, np.inf])
    series = thin("loss", x, y)
    assert series.x.tolist() == [0, 2, 3] and series.mean.tolist() == series.low.tolist() == [1, 3, 4]
    assert thin("loss", x, np.full(5, np.nan)) is None and thin("loss", x[:0], y[:0]) is None


def test_a_leap_neither_vanishes_nor_presses_the_rest_flat(tmp_path):
    loss = [1.2] * 20_000
    loss[777] = 5000.0
    chart = charts(read_history(write_run(tmp_path, rows_of(20_000, loss=loss))))[0]
    assert chart.series[0].high.max() == 5000.0  # inside the band
    assert chart.beyond is None or chart.beyond == 5000.0
    noisy = [1.2 + 0.01 * (step % 7) for step in range(20_000)]
    noisy[777] = 5000.0
    chart = charts(read_history(write_run(tmp_path, rows_of(20_000, loss=noisy))))[0]
    assert chart.limits[1] < 2 and chart.beyond == 5000.0


# --- charts ----------------------------------------------------------------------------------------------------------


def chart_of(y: np.ndarray, **options) -> Chart:
    x = np.linspace(0, 10, len(y))
    return Chart("loss", "Loss", [Series("loss", x, y - 0.1, y, y + 0.1)], **options)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_curve_is_drawn_where_its_ticks_say(logarithmic):
    """Read the values back from the drawing by the places of its own tick labels."""
    y = np.exp(np.linspace(0, 6, 40)) + 1
    svg = str(draw(chart_of(y, logarithmic=logarithmic, levels=[Level("chance", 30.0)])).svg)
    labels = re.findall(r'<text x="44" y="([\d.]+)" text-anchor="end">([\d,.e-]+)</text>', svg)
    places = [float(place) - 3.5 for place, _ in labels]
    values = np.array([float(word.replace(",", "")) for _, word in labels])
    scale = np.log(values) if logarithmic else values
    slope, offset = np.polyfit(places, scale, 1)
    points = re.search(r'class="curve c0" d="M([^"]+)"', svg)[1].split("L")
    found = np.array([float(point.split()[1]) for point in points]) * slope + offset
    np.testing.assert_allclose(found, np.log(y) if logarithmic else y, atol=0.02 if logarithmic else 1.0)
    level = float(re.search(r'class="level n0" d="M50 ([\d.]+)H', svg)[1]) * slope + offset
    assert level == pytest.approx(math.log(30) if logarithmic else 30, abs=0.02 if logarithmic else 1.0)
    xs, ys = np.array([point.split() for point in points], float).T
    assert xs.min() > 0 and xs.max() < WIDTH and ys.min() > 0 and ys.max() < HEIGHT


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low, span):
    high = low + span
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        return
    found = ticks(low, high, 5)
    assert 1 <= len(found) <= 8
    slack = 1e-6 * span + 1e-9
    assert all(low - slack <= value <= high + slack for value in found)
    if span > 1e-3 * abs(low):
        assert len(set(tick_words(found))) == len(found)


@given(st.floats(1e-8, 1e3), st.floats(1.01, 1e9))
def test_logarithmic_ticks_are_inside_and_few(low, factor):
    found = log_ticks(low, low * factor)
    assert all(low * 0.999 <= value <= low * factor * 1.001 for value in found)
    assert 1 <= len(found) <= 14


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.10962, "1.11"), (64.451, "64.45"), (123456.7, "123,457"), (2.5e-4, "2.5e-4"), (-0.5, "-0.5"),
     (2e9, "2e9"), (0.99, "0.99"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_every_number_of_the_log_has_its_chart(tmp_path):
    parts = dict(grad_norm_online=0.3, grad_norm_decoder=0.1, update_ratio_online=1e-3)
    rows = rows_of(20, mfu=0.3, effective_rank=20.0, target_deviation=0.7, rank_spread=0.02, **parts)
    folder = write_run(tmp_path, rows, [0.5, 0.6], objective__similarity_weight="0.1")
    (folder / "knn.json").write_text('{"pixels": {"leave_one_out": 0.7, "gallery": null}, "x": 3}')
    found = {chart.name: chart for chart in charts(read_history(folder))}
    assert list(found) == ["loss", "similarities", "accuracy", "effective_rank", "target_deviation", "gradient_norm",
                           "gradient_norms", "updates", "learning_rate", "momentum", "images_per_second", "mfu",
                           "data_wait", "rank_spread", "memory"]  # fmt: skip
    assert found["loss"].levels[0].value == pytest.approx(CHANCE)
    assert [one.label for one in found["similarities"].series][-1] == "steered to"
    assert found["accuracy"].series[0].mean.tolist() == [50, 60] and found["accuracy"].levels[0].value == 70
    assert [one.label for one in found["gradient_norms"].series] == ["online", "decoder"]
    assert found["mfu"].series[0].last == pytest.approx(30)
