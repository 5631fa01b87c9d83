"""The report: what is gathered of a run folder, how it is thinned, judged and drawn, and that nothing in it can run."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
import shutil
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lmim.__main__ import main
from lmim.config import load_config, save_config
from lmim.eval import figures
from lmim.eval.curves import BINS, Chart, Level, Series, chance, charts, overlaid, thin
from lmim.eval.history import read_columns, read_history, read_text_log
from lmim.eval.page import run_page
from lmim.eval.results import record
from lmim.eval.svg import HEIGHT, WIDTH, draw, log_ticks, number, tick_words, ticks
from lmim.eval.tables import evaluations, found_table, in_figures, set_options, words
from lmim.eval.token_maps import CLUSTER_COUNTS, TokenMaps
from lmim.eval.verdict import BAD, GOOD, UNKNOWN, WATCH, judge, skipped_images
from lmim.health import Health
from lmim.objective import chance_level
from lmim.options import Config, HealthConfig, ObjectiveConfig
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


class Parsed(HTMLParser):
    """What a browser would make of a page: its tags, and the text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path, capsys) -> Parsed:
    assert main(["report", str(folder)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    return Parsed(Path(summary["page"]).read_text())


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


def test_a_page_does_not_grow_with_the_run(tmp_path, capsys):
    sizes = []
    for steps in (1000, 30_000):
        folder = write_run(tmp_path / str(steps), rows_of(steps, loss=[1.2 + 0.1 * (s % 13) for s in range(steps)]))
        page_of(folder, capsys)
        sizes.append((folder / "report.html").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0] < 500_000


@pytest.mark.slow
def test_a_million_steps_take_seconds(tmp_path, capsys):
    row, folder = rows_of(1)[0], write_run(tmp_path, [])
    rng = np.random.default_rng(0)
    with (folder / "log.jsonl").open("w") as file:
        for step, loss in enumerate(rng.normal(1.1, 0.05, size=1_000_000).tolist()):
            file.write(json.dumps({**row, "step": step, "epoch": (step + 1) / 1250, "loss": loss}) + "\n")
    began = time.process_time()
    page = page_of(folder, capsys)
    assert time.process_time() - began < 60  # 15 on one quiet core
    assert (folder / "report.html").stat().st_size < 1_000_000
    assert "1,000,000 steps" in page.text


# --- reading ---------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_and_a_line_being_written_is_not(tmp_path):
    good = rows_of(6, mfu=0.3)
    for row in good[:3]:
        del row["mfu"]
    lines = [json.dumps(row).encode() for row in good]
    lines[1:1] = [b'{"step": 1, "epo', b"x\xff", b"[1]", b"3", b'{"step": 2, "epoch": 0.2}',
                  b'{"step": "two", "epoch": 0.2, "loss": 1}', b"[" * 100_000,
                  b'{"epoch": 0.2, "loss": 1, "step": 1' + b"0" * 400 + b"}"]  # fmt: skip
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([*lines[::-1], lines[-1][:20]]))
    columns, damaged = read_columns(path, ("step", "epoch", "loss"))
    assert damaged == 8
    assert columns["step"].tolist() == list(range(6))  # in order, though written backwards
    assert columns["loss"].tolist() == [row["loss"] for row in good]
    assert np.isnan(columns["mfu"]).tolist() == [True] * 3 + [False] * 3
    assert read_columns(tmp_path / "none", ("step",)) == ({}, 0)


def test_alarms_are_known_by_the_very_words_of_the_run(tmp_path):
    """Every alarm that lmim.health gives is found in a text log that it was written to."""
    from lmim.metrics import UnreadableLog, set_up_logging

    set_up_logging(tmp_path, True)
    health = Health(HealthConfig(), ObjectiveConfig(), 176, 0, 1)
    chance = chance_level(176, 0.2)
    told = []
    for step in range(300):
        loss = 50.0 if step == 250 else 1.0 + 0.01 * (step % 3)
        told += health.judge(dict(step=step, loss=loss, similarity_targets=0.5, similarity_positions=0.5))
    told += health.judge(dict(step=300, loss=chance, similarity_targets=0.99, similarity_positions=0.99))
    assert len(told) >= 4
    logger = logging.getLogger("lmim.train")
    for alarm in told:
        logger.warning("%s", alarm.words)
    logger.warning("step %d is left out: its loss (%g) or gradient (norm %g) is not finite", 3, 1.0, math.nan)
    logger.error("something else")
    UnreadableLog(tmp_path, 0).write(3, 17, "broken")
    found = read_text_log(tmp_path / "train.log")
    spikes = sum(alarm.option == "health.on_spike" for alarm in told)
    assert found.counts == {"spike": spikes, "collapse": len(told) - spikes, "skipped step": 1, "unreadable image": 1,
                            "other": 1}  # fmt: skip
    assert [line.words for line in found.alarms] == [alarm.words for alarm in told]
    assert found.others[0].words == "something else" and re.match(r"\d{4}-\d\d-\d\d ", found.others[0].date)


def test_skipped_images_are_added_up_over_starts(tmp_path):
    counts = [0, 1, 1, 4, 0, 0, 2, 2, 1, 3]  # started again before the fifth and the ninth row
    history = read_history(write_run(tmp_path, rows_of(10, skipped_images=counts)))
    assert skipped_images(history) == 4 + 2 + 3


@pytest.mark.parametrize(("text", "steps"), [("8ep", 80), ("300st", 300)])
def test_how_far_the_run_is(tmp_path, text, steps):
    history = read_history(write_run(tmp_path, rows_of(40), optim__duration=text))
    assert history.total_steps == steps and history.steps == 40


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sign", "state"),
    [
        (dict(), "Loss", GOOD),
        (dict(loss=CHANCE * 1.005), "Loss", BAD),
        (dict(loss=math.nan), "Loss", BAD),
        (dict(similarity_targets=0.985), "Targets within an image", BAD),
        (dict(similarity_targets=0.97), "Targets within an image", GOOD),
        (dict(similarity_positions=0.985), "Targets across images, at the same position", BAD),
        (dict(data_wait=0.3), "Waiting for data", WATCH),
        (dict(skipped_images=2), "Images that could not be read", WATCH),
        (dict(grad_norm=[math.nan] + [1.0] * 39), "Steps left out", WATCH),
        (dict(), "Nearest-neighbour accuracy", UNKNOWN),
    ],
)
def test_each_sign_is_judged(tmp_path, values, sign, state):
    verdict = judge(read_history(write_run(tmp_path, rows_of(40, **values))))
    assert {check.sign: check.state for check in verdict.checks}[sign] == state
    assert verdict.state == (state if state in (BAD, WATCH) else GOOD)
    if state in (BAD, WATCH):
        assert sign[1:] in verdict.words


def test_the_last_steps_count_and_not_the_first(tmp_path):
    loss = [CHANCE] * 960 + [1.0] * 40
    assert judge(read_history(write_run(tmp_path / "a", rows_of(1000, loss=loss)))).state == GOOD
    assert judge(read_history(write_run(tmp_path / "b", rows_of(1000, loss=loss[::-1])))).state == BAD


def test_no_verdict_amid_the_warm_up(tmp_path):
    folder = write_run(tmp_path, rows_of(8, loss=CHANCE))  # of 80, 8 warm up
    verdict = judge(read_history(folder))
    assert verdict.state == UNKNOWN and "warming up" in verdict.words
    (folder / "done.json").write_text('{"steps": 8, "ranks": 2, "device": "cpu"}')
    assert judge(read_history(folder)).state == BAD


@pytest.mark.parametrize(("evals", "state"), [([0.5, 0.6], GOOD), ([0.5, 0.45], WATCH)])
def test_accuracy_is_judged_by_the_encoder_as_initialised(tmp_path, evals, state):
    verdict = judge(read_history(write_run(tmp_path, rows_of(80), evals)))
    assert verdict.checks[3].state == state and "50.0 %" in verdict.checks[3].words
    early = judge(read_history(write_run(tmp_path, rows_of(20), evals)))
    assert early.checks[3].state == (GOOD if state == GOOD else UNKNOWN)


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


# --- tables ----------------------------------------------------------------------------------------------------------


def test_recorded_figures_become_tables():
    by_kind = found_table({"pixels": {"accuracy": 0.5}, "online": {"accuracy": 0.625, "layer": -1, "rate": 0.01}})
    assert by_kind.heads == ["features", "accuracy", "layer", "rate"]
    assert by_kind.rows == [["pixels", "50.00 %", "–", "–"], ["online", "62.50 %", "-1", "0.01"]]
    shots = found_table({"online": {"5": {"accuracy": 0.5, "interval": 0.01, "n": 3}}})
    assert shots.heads == ["features", "5 accuracy", "5 n"] and shots.rows == [["online", "50.00 ± 1.00 %", "3"]]
    flat = found_table({"images": 8, "miou": {"3": 0.25}, "list": list(range(10)), "none": None, "on": True})
    assert flat.rows == [["images", "8"], ["miou 3", "25.00 %"], ["list", "0, 1, 2, 3, 4, 5, 6, 7, … (10)"],
                         ["none", "–"], ["on", "True"]]  # fmt: skip
    assert found_table([1, 2]).rows == [["value", "1, 2"]]
    assert words("learning_rate", 0.5) == "0.5" and words("knn", 0.5) == "50.00 %"


def test_every_evaluation_is_listed_with_its_command(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", rows_of(20), [0.5, 0.7, 0.6])
    (folder / "knn.json").write_text('{"online": {"leave_one_out": 0.6, "gallery": null}}')
    monkeypatch.setattr("sys.argv", ["lmim", "eval", "linear", "a b"])
    record(folder, "linear", {"online": {"accuracy": 0.5}}, source="x.pth", which="target")
    found = evaluations(read_history(folder))
    assert [row.name for row in found] == ["while training", "knn", "linear"]
    assert found[0].found.rows == [["1-NN leave-one-out", "50.00 %", "70.00 %", "60.00 %"]]
    assert found[1].command == f"lmim eval knn {folder}" and found[1].found.rows == [["online", "60.00 %", "–"]]
    assert found[2].command == "lmim eval linear 'a b'" and found[2].weights == "target of x.pth"
    record(folder, "knn", {"online": {"leave_one_out": 0.6}}, source="x.pth", which="online")
    assert [row.name for row in evaluations(read_history(folder))] == ["while training", "linear", "knn"]


def test_the_log_in_figures_and_the_options_that_were_set(tmp_path):
    history = read_history(write_run(tmp_path, rows_of(40, loss=[float(step) for step in range(40)])))
    table = in_figures(history)
    assert table.rows[0] == ["Loss", "0", "9", "19", "29", "39"]  # at epochs 0.1, 1, 2, 3, 4
    rows = {row[0]: row[1:] for row in set_options(history.config).rows}
    assert rows["model.embed_dim"] == ["128", "(empty)"] and rows["optim.duration"] == ["8ep", "300ep"]
    assert "model.mlp_ratio" not in rows
    assert set_options(Config()).rows == []


# --- the page --------------------------------------------------------------------------------------------------------

NASTY = "<script>document.title='run'</script><img src=x onerror=alert(1)>\"'&"


def nasty_run(folder: Path) -> Path:
    """Write a run all of whose texts try to be markup."""
    write_run(folder, rows_of(40, similarity_targets=0.99), [0.5, 0.6])
    config = load_config(folder)
    config.run.name = NASTY
    config.run.resume_from = "</code></pre><script>alert(2)</script>"
    save_config(config, folder / "config.yaml")
    with (folder / "train.log").open("a") as file:
        file.write(f"2026-01-02 03:04:05,678 WARNING the loss leaps to {NASTY}\n")
        file.write(f"2026-01-02 03:04:06,678 WARNING other {NASTY}\n")
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "rank-0000.tsv").write_text(f"3\t17\t{NASTY}\n")
    row = dict(evaluation=NASTY, date=NASTY, command=NASTY, source=NASTY, which=NASTY,
               figures={NASTY: {NASTY: NASTY}}, pictures=["../secret.png", NASTY])  # fmt: skip
    evals = [json.loads(line) | {f"knn_{NASTY}": 0.5} for line in (folder / "eval.jsonl").read_text().splitlines()]
    (folder / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evals))
    (folder / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "knn.json").write_text(json.dumps({NASTY: {NASTY: NASTY}, "pixels": {"leave_one_out": NASTY}}))
    return folder


def test_nothing_that_a_file_holds_becomes_markup(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    page = page_of(nasty_run(tmp_path / "run"), capsys)
    assert page.text.count(NASTY) >= 8  # name, alarm, warning, image, evaluation, command, option: as text
    scripts = page.all("script")
    assert [s.get("type") for s in scripts] == ["application/json"] * (len(scripts) - 1) + [None]
    assert len(scripts) == len(page.all("figure")) + 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.all("img") == []  # no weights, and the picture lies outside the run folder
    raw = (tmp_path / "run" / "report.html").read_text()
    assert raw.count("<script") == len(scripts) and "</script><img" not in raw


def test_the_page_refers_to_nothing_outside(tmp_path, capsys):
    page = page_of(write_run(tmp_path, rows_of(40), [0.5, 0.6]), capsys)
    for _, attributes in page.tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (name, value)
    raw = (tmp_path / "report.html").read_text()
    assert "@import" not in raw and not re.findall(r"url\((?!#)", raw)
    assert not re.findall(r"https?://", raw)


def test_the_page_can_be_read_aloud(tmp_path, capsys):
    """Drawings have words, tables have heads, headings follow each other, scrolling boxes can be reached."""
    page = page_of(write_run(tmp_path, rows_of(40), [0.5, 0.6]), capsys)
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    for attributes in page.all("svg"):
        assert attributes.get("aria-hidden") == "true" or len(attributes["aria-label"]) > 20
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("thead")) == len(page.all("table"))
    for attributes in page.all("div"):
        if attributes.get("class") == "wide":
            assert attributes["tabindex"] == "0" and attributes["role"] == "region" and attributes["aria-label"]
    label = next(a["aria-label"] for a in page.all("svg") if a.get("aria-label", "").startswith("Loss"))
    assert label == ("Loss over epochs: loss from 1.2 to 1.103, between 1.103 and 1.2; "
                     "chance = collapse, 2τ·ln M at 1.465")  # fmt: skip


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(dark):
    css = (REPOSITORY / "lmim" / "eval" / "page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split("@media")[dark]))

    def contrast(a: str, b: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (a, b))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "muted", "link"):
        for ground in ("page", "card", "code"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for state in ("good", "watch", "bad", "unknown"):
        assert contrast(state, f"{state}-fill") >= 4.5, state
    for curve in ("c0", "c1", "c2", "c3", "c4", "c5", "level"):
        assert contrast(curve, "card") >= 3, curve


@pytest.mark.parametrize("missing", ["config.yaml", "eval.jsonl", "train.log", "log.jsonl"])
def test_what_is_missing_is_said(tmp_path, capsys, missing):
    folder = write_run(tmp_path, rows_of(40), [0.5, 0.6])
    (folder / missing).unlink()
    page = page_of(folder, capsys)
    expected = {"config.yaml": ["the configuration is missing", "config.yaml is missing"],
                "eval.jsonl": ["Not measured: it needs data.eval with labels"],
                "train.log": ["train.log is missing"], "log.jsonl": ["log.jsonl holds no steps yet"]}  # fmt: skip
    for said in expected[missing]:
        assert said in page.text
    assert "No checkpoint is complete yet" in page.text
    assert {a["id"] for a in page.all("section") if "id" in a} == {"health", "curves", "tokens", "evaluations",
                                                                   "weights", "options"}  # fmt: skip


def test_damaged_files_are_said(tmp_path, capsys):
    folder = write_run(tmp_path, rows_of(40), [0.5, 0.6])
    for name in ("log.jsonl", "eval.jsonl", "evaluations.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'\xff{"step": \n{"step": 1\n')
    (folder / "knn.json").write_bytes(b"\xff{")
    (folder / "done.json").write_text("{")
    (folder / "config.yaml").write_text("run: [")
    (folder / "train.log").write_bytes(b"\xff\xfe\n2026-01-02 03:04:05,678 WARNING the loss leaps to 3\n")
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "rank-0000.tsv").write_bytes(b"3\n4\t5\n\xff\t6\tbroken\n")
    (folder / "checkpoints" / "step-00000040").mkdir(parents=True)  # not complete
    text = page_of(folder, capsys).text
    for said in ("2 lines of log.jsonl", "2 lines of eval.jsonl", "2 lines of evaluations.jsonl", "knn.json is damaged",
                 "done.json is damaged", "the configuration is missing here", "1 leap of the loss", "image 6",
                 "No checkpoint is complete yet"):  # fmt: skip
        assert said in text, said


def test_a_fine_tuning_is_not_held_against_the_chance_of_pretraining(tmp_path):
    """With 1000 classes it begins above the InfoNCE of a few hundred patches, and nothing has collapsed."""
    folder = write_run(tmp_path, rows_of(40))
    assert chance(read_history(folder)) is not None
    config = load_config(folder)
    config.run.task = "finetune"
    save_config(config, folder / "config.yaml")
    assert chance(read_history(folder)) is None


def test_a_run_that_was_stopped_and_one_that_goes_on(tmp_path, capsys):
    folder = write_run(tmp_path, rows_of(40))
    assert "Not complete: step 40 of 80 (50 %). The log last grew at" in page_of(folder, capsys).text
    with (folder / "train.log").open("a") as file:
        file.write("2026-01-02 03:04:05,678 INFO stopped by SIGTERM after step 40; the same command goes on\n")
    assert "Stopped after step 40 of 80 (50 %), at 2026-01-02 03:04:05" in page_of(folder, capsys).text
    (folder / "done.json").write_text('{"steps": 40, "ranks": 4, "device": "cuda"}')
    text = page_of(folder, capsys).text
    assert "Complete: 40 steps." in text and "on cuda" in text


def pixels_of(address: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"))


def test_token_maps_are_drawn_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    image, points = rng.integers(0, 256, (28, 28, 3), np.uint8), rng.normal(size=(12, 2)) * (3, 1)
    labels = {count: np.arange(12).reshape(3, 4) % count for count in CLUSTER_COUNTS}
    history = read_history(write_run(tmp_path, rows_of(20)))
    page = Parsed(run_page(history, charts(history), [TokenMaps(image, labels, points, np.arange(len(points)))], ""))
    shown = [pixels_of(attributes["src"]) for attributes in page.all("img")]
    np.testing.assert_array_equal(shown[0], image)
    table = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in figures.CLUSTER_COLOURS]
    for pixels, of_count in zip(shown[1:], labels.values(), strict=True):
        np.testing.assert_array_equal(pixels, np.array(table)[of_count])
    dots = [a for a in page.all("path") if a.get("stroke")]
    assert [a["stroke"] for a in dots] == list(figures.CLUSTER_COLOURS)
    places = [[place.removesuffix("h0").split() for place in a["d"].split("M")[1:]] for a in dots]
    assert [len(of_colour) for of_colour in places] == [3, 3, 2, 2, 2]  # 12 tokens in 5 clusters
    found = np.zeros((12, 2))
    for label, of_colour in enumerate(places):
        found[labels[5].ravel() == label] = np.array(of_colour, float)
    assert found.min() >= 4 and found.max() <= 96
    for axis in (0, 1):  # the same scale on both
        slope = np.polyfit(points[:, axis], found[:, axis], 1)[0]
        assert slope == pytest.approx(92 / np.ptp(points, axis=0).max(), rel=0.01)


def test_pictures_of_evaluations_are_shown(tmp_path, capsys):
    folder = write_run(tmp_path / "run", rows_of(40))
    Image.new("RGB", (3000, 1500), "red").save(folder / "panels.png")
    (folder / "broken.png").write_bytes(b"no picture")
    record(folder, "segment", {"images": 8}, source=folder, which="online", pictures=["panels.png", "other.png"])
    record(folder, "broken", {"images": 8}, source=folder, which="online", pictures=["broken.png"])
    page = page_of(folder, capsys)
    assert [a["alt"].partition(",")[0] for a in page.all("img")] == ["panels.png"]
    assert "broken.png, a picture of broken, could not be read" in page.text
    shown = pixels_of(page.all("img")[0]["src"])
    assert shown.shape == (800, 1600, 3) and shown[5, 5, 0] > 240


# --- figures, several runs, mistakes ---------------------------------------------------------------------------------


def test_figures_for_papers_have_fixed_names(tmp_path, capsys):
    folder = write_run(tmp_path, rows_of(400), [0.5, 0.6])
    assert main(["report", str(folder), "--figures", "png", "pdf", "svg"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["loss", "similarities", "accuracy", "gradient_norm", "learning_rate", "momentum", "images_per_second",
             "data_wait", "memory"]  # fmt: skip
    assert summary["figures"] == [f"{folder}/figures/{n}.{kind}" for kind in ("png", "pdf", "svg") for n in names]
    with Image.open(folder / "figures" / "loss.png") as picture:
        assert picture.width == round(figures.INCHES[0] * figures.DPI)
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    assert (folder / "figures" / "loss.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (folder / "figures" / "loss.svg").read_text()


def test_several_runs_on_one_page(tmp_path, capsys):
    folders = [write_run(tmp_path / name, rows_of(40, loss=loss), [0.5, 0.6], optim__base_lr=rate)
               for name, loss, rate in (("first", 1.1, "1e-3"), ("second", 1.2, "2e-3"))]  # fmt: skip
    drawn = overlaid([read_history(folder) for folder in folders], ["first", "second"])
    assert [[one.label for one in chart.series] for chart in drawn] == [["first", "second"]] * len(drawn)
    loss = next(chart for chart in drawn if chart.name == "loss")
    assert [one.last for one in loss.series] == [1.1, 1.2] and [one.colour for one in loss.series] == [0, 1]
    assert loss.levels[0].value == pytest.approx(CHANCE)
    assert main(["report", *map(str, folders), "--figures", "png"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["page"] == str(tmp_path / "first" / "comparison.html")
    page = Parsed(Path(summary["page"]).read_text())
    assert "Options that differ" in page.text and "optim.base_lr0.0010.002" in re.sub(r"\s", "", page.text)
    assert len(page.all("figure")) == len(drawn) == len(list((tmp_path / "first" / "comparison").iterdir()))
    assert not (tmp_path / "first" / "report.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    folders = [write_run(tmp_path / name / "run", rows_of(20)) for name in ("a", "b")]
    assert main(["report", *map(str, folders)]) == 0
    text = Parsed((folders[0] / "comparison.html").read_text()).text
    assert all(str(folder) in text for folder in folders)


def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "run", rows_of(20))
    assert main(["report", *[str(folder)] * 7]) == 2
    assert "7 run folders are too many" in capsys.readouterr().err
    assert main(["report", str(folder), str(tmp_path)]) == 2
    assert f"{tmp_path} holds no log.jsonl" in capsys.readouterr().err
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name in ("matplotlib", "sklearn") else name)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error == "error: a report needs matplotlib, scikit-learn, not installed here: pip install 'lmim[report]'\n"
    assert not (folder / "report.html").exists()


def test_a_report_changes_nothing_but_its_files(tmp_path, capsys):
    folder = write_run(tmp_path / "run", rows_of(20), [0.5, 0.6])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert main(["report", str(folder), "--figures", "png"]) == 0
    mine = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    before = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert {str(path) for path in mine - before if path.parts[0] != "figures"} == {"report.html", "report.png"}
    assert all((folder / path).read_bytes() == (copy / path).read_bytes() for path in before)
