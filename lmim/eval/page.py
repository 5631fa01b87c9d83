"""The report as one HTML page that needs nothing but itself: no network, no other file, no script to be read.

Owns what the page says, in which order, and how pictures get into it; `page.html`, `page.css` and `page.js` beside
this file are its looks. The invariants: whatever comes from a file is escaped by the template, and the page's own
policy lets no script run but `page.js`; pictures are read from the run folder only, and drawn anew at a bounded size.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from lmim.eval import tables
from lmim.eval.curves import BINS, Chart, chance
from lmim.eval.figures import CLUSTER_COLOURS, cluster_colours
from lmim.eval.history import History
from lmim.eval.svg import draw, number, percent
from lmim.eval.tables import Evaluation
from lmim.eval.token_maps import CLUSTER_COUNTS, TokenMaps, images_shown
from lmim.eval.verdict import judge, now
from lmim.metrics import RUN_ENDS
from lmim.options import EvalConfig
from lmim.version import __version__

HERE = Path(__file__).parent
PHOTO_SIDE = 64  # px: larger images are written as JPEG
PICTURE_SIDE = 1600  # px: larger pictures of evaluations are drawn smaller
PICTURES = 6  # of evaluations, the newest
SCATTER = 100  # side of a t-SNE drawing, in its own units


class Tile(NamedTuple):
    """One figure at the head of the page."""

    name: str
    value: str
    words: str


def run_page(history: History, drawn: Sequence[Chart], maps: Sequence[TokenMaps], why_no_maps: str) -> str:
    """Return the page of one run."""
    images_of = images_shown(history.config) if history.config else "data.eval"
    labelled = images_of == "data.eval"
    return _render(
        title=history.name,
        state=_state(history),
        tiles=_tiles(history),
        verdict=judge(history),
        alarms=list(history.text.alarms),
        warnings=list(history.text.others),
        unreadable=history.unreadable.examples,
        notes=history.notes,
        charts=_charts(drawn),
        figures=tables.in_figures(history),
        maps=[_map(n, one) for n, one in enumerate(maps, start=1)],
        counts=CLUSTER_COUNTS,
        why_no_maps=why_no_maps,
        evaluations=tables.evaluations(history),
        pictures=_pictures(history),
        weights=_weights(history),
        options=tables.set_options(history.config) if history.config else None,
        config=_text(history.folder / "config.yaml"),
        command=shlex.join(["lmim", "report", str(history.folder)]),
        evaluate=shlex.join(["lmim", "eval", "knn", str(history.folder)]) + " data.eval=SHARDS" * (not labelled),
        labelled=labelled,
        images_of=images_of,
        runs=None,
    )


def comparison_page(histories: Sequence[History], names: Sequence[str], drawn: Sequence[Chart]) -> str:
    """Return the page of several runs."""
    runs = [dict(name=name, colour=n, state=_state(history), tiles=_tiles(history), verdict=judge(history),
                 folder=str(history.folder), notes=history.notes)
            for n, (name, history) in enumerate(zip(names, histories, strict=True))]  # fmt: skip
    evaluations = [(name, row) for name, history in zip(names, histories, strict=True)
                   for row in tables.evaluations(history)]  # fmt: skip
    return _render(
        title=" · ".join(names),
        state=f"{len(names)} runs compared",
        charts=_charts(drawn),
        runs=runs,
        options=tables.different_options(list(histories), list(names)),
        evaluations=[row._replace(name=f"{name}: {row.name}") for name, row in evaluations],
        command=shlex.join(["lmim", "report", *(str(history.folder) for history in histories)]),
    )


def _render(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                              undefined=StrictUndefined)  # fmt: skip
    environment.filters |= dict(number=number, breakable=_breakable)
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        script=Markup(script), style=Markup((HERE / "page.css").read_text()), script_digest=Markup(digest),
        version=__version__, made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), bins=BINS, **values,
    )  # fmt: skip


def _breakable(text: str) -> Markup:
    """Return text, escaped, whose long names may be broken after each part, where lines end."""
    return Markup(re.sub(r"([./=])(?=\w)", r"\1<wbr>", str(escape(text))))


# --- what it says ----------------------------------------------------------------------------------------------------


def _state(history: History) -> str:
    """Say how far the run has come."""
    total, of = history.total_steps, ""
    if total:
        of = f" of {total:,} ({percent(min(history.steps / total, 1), 0)})"
    if history.done is not None:
        return f"Complete: {history.steps:,} steps."
    last = history.text.last
    if last is not None and last.words.startswith("stopped by "):
        return f"Stopped after step {history.steps:,}{of}, at {last.date}; the same command goes on from there."
    if last is not None and last.words.startswith(RUN_ENDS):
        return f"Ended by an error after step {history.steps:,}{of}, at {last.date}: {last.words[len(RUN_ENDS) :]}"
    when = f" The log last grew at {history.written:%Y-%m-%d %H:%M:%S %Z}." if history.written else ""
    return f"Not complete: step {history.steps:,}{of}.{when}"


def _tiles(history: History) -> list[Tile]:
    loss, speed, level = now(history, "loss"), now(history, "images_per_second"), chance(history)
    epoch = float(history.log["epoch"][-1]) if history.log else 0.0
    tiles = [
        Tile("Epochs", number(epoch), f"{history.steps:,} steps"),
        Tile("Loss", "–" if loss is None else f"{loss:.3f}", "" if level is None else f"chance {level:.3f}"),
    ]
    accuracy = history.evals.get("knn_leave_one_out", np.zeros(0))
    if len(accuracy):
        tiles.append(Tile("Nearest neighbour", percent(accuracy[-1]), f"first {percent(accuracy[0])}"))
    tiles.append(Tile("Images per second", "–" if speed is None else f"{speed:,.0f}", _left(history, speed)))
    if history.done and "ranks" in history.done:
        ranks = history.done["ranks"]
        tiles.append(Tile("Ranks", str(ranks), f"on {history.done.get('device', '?')}"))
    newest = history.checkpoints[0].name.removeprefix("step-").lstrip("0") if history.checkpoints else ""
    tiles.append(Tile("Newest checkpoint", f"step {int(newest):,}" if newest else "none yet", ""))
    return tiles


def _left(history: History, speed: float | None) -> str:
    """Say how long the run still takes at this speed."""
    total = history.total_steps
    if history.done is not None or not total or not speed or history.config is None:
        return "mean of the last steps"
    seconds = max(total - history.steps, 0) * history.config.data.global_batch / speed
    size, unit = next(
        (s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")) if seconds >= s or s == 1
    )
    return f"{seconds / size:.1f} {unit} of training left"


def _weights(history: History) -> dict[str, Any]:
    folder, seen = str(history.folder), history.config.eval if history.config else EvalConfig()
    view = "".join(f", {name}={px}" for name, px in (("size", seen.crop), ("resize", seen.resize)) if px)
    lines = [
        "import lmim",
        f"encoder = lmim.load_encoder({folder!r})  # the EMA encoder: load_encoder({folder!r}, 'target')",
        f"images = lmim.load_images(['a.jpg', 'b.jpg'], encoder{view})  # as the evaluations see them",
        "features = encoder.forward_intermediates(images, 1)[0][:, 1:].mean(1)  # (B, D), as the paper pools",
    ]
    export = shlex.join(["lmim", "export", folder, "vit-timm", "--format", "timm", "--check"])
    return dict(checkpoints=[str(path) for path in history.checkpoints], lines="\n".join(lines), export=export)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


# --- drawings and pictures -------------------------------------------------------------------------------------------


def _charts(drawn: Sequence[Chart]) -> list[dict[str, Any]]:
    found = []
    for chart in drawn:
        svg, hover = draw(chart)
        thinned = any((one.high > one.low).any() for one in chart.series)
        found.append(dict(chart=chart, svg=svg, hover=hover, thinned=thinned))
    return found


def _map(n: int, maps: TokenMaps) -> dict[str, Any]:
    finest = maps.labels[CLUSTER_COUNTS[-1]]
    return dict(
        number=n, image=inline(maps.image), labels={c: inline(cluster_colours(maps.labels[c])) for c in CLUSTER_COUNTS},
        tsne=_scatter(maps.points, finest.ravel()[maps.chosen]), cells=f"{finest.shape[0]} × {finest.shape[1]}",
    )  # fmt: skip


def _scatter(points: np.ndarray, labels: np.ndarray) -> list[tuple[str, str]]:
    """Return (colour, path of dots) of each cluster, on a square of SCATTER units."""
    low, span = points.min(axis=0), float(np.ptp(points, axis=0).max()) or 1.0
    offset = (1 - np.ptp(points, axis=0) / span) / 2
    places = 4 + (SCATTER - 8) * ((points - low) / span + offset)
    return [
        (
            CLUSTER_COLOURS[label % len(CLUSTER_COLOURS)],
            "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places[labels == label]),
        )
        for label in np.unique(labels)
    ]


def inline(pixels: np.ndarray) -> str:
    """Return an image (rows, cols, 3) uint8 as a `data:` address: PNG if it is small, else JPEG."""
    small = max(pixels.shape[:2]) <= PHOTO_SIDE
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, **({} if small else dict(quality=85)))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pictures(history: History) -> list[tuple[Evaluation, str, str]]:
    """Return (evaluation, name, `data:` address) of the first picture of the newest evaluations that drew some."""
    found, seen = [], set()
    for row in reversed(tables.evaluations(history)):
        for name in row.pictures[:1]:
            path = (history.folder / name).resolve()
            if path in seen or len(found) == PICTURES or not path.is_relative_to(history.folder.resolve()):
                continue
            seen.add(path)
            try:
                with Image.open(path) as picture:
                    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
                    found.append((row, name, _address(picture.convert("RGB"))))
            except (OSError, ValueError, Image.DecompressionBombError):
                history.notes.append(f"{name}, a picture of {row.name}, could not be read")
    return found


def _address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
