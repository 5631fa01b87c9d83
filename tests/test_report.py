"""The page and the figures: all that a run folder holds is shown, and nothing in it can run."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim.__main__ import main
from lmim.config import load_config, save_config
from lmim.eval import figures
from lmim.eval.curves import chance, charts, overlaid
from lmim.eval.history import read_history
from lmim.eval.page import run_page
from lmim.eval.results import record
from lmim.eval.token_maps import CLUSTER_COUNTS, TokenMaps
from tests.conftest import REPOSITORY
from tests.run_folders import CHANCE, rows_of, write_run


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
