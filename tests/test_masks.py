"""Measures of masks against their definitions, written out slowly, and cases worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from lmim.config import ConfigError
from lmim.eval import masks


def best_by_trial(shared: np.ndarray) -> float:
    """Return the largest mean IoU over all one-to-one matchings of clusters to classes, each of them tried."""
    clusters, classes = shared.shape
    padded = np.zeros((max(clusters, classes), classes))
    padded[:clusters] = shared
    best = 0.0
    for order in itertools.permutations(range(len(padded)), classes):
        iou = []
        for of_class, cluster in enumerate(order):
            union = padded[cluster].sum() + padded[:, of_class].sum() - padded[cluster, of_class]
            iou.append(padded[cluster, of_class] / union if union else 0.0)
        best = max(best, float(np.mean(iou)))
    return best


@pytest.mark.parametrize(("clusters", "classes"), [(3, 3), (2, 4), (5, 3), (1, 1), (4, 4), (6, 2)])
def test_matching_is_the_best_of_all(clusters, classes):
    draw = np.random.default_rng(clusters * 10 + classes)
    for _ in range(20):
        shared = draw.integers(0, 50, (clusters, classes)) + np.eye(clusters, classes, dtype=np.int64)
        shared[0] += 1  # every class has pixels
        assert masks.matched_iou(shared).mean() == pytest.approx(best_by_trial(shared), abs=1e-12)


def test_matching_by_hand():
    # cluster 0 covers class 1 whole and two px of class 0; cluster 1 covers the rest of class 0
    assert masks.matched_iou(np.array([[2, 6], [4, 0]])).tolist() == [pytest.approx(4 / 6), pytest.approx(6 / 8)]
    # what is best one by one is not best together: cluster 0 must leave class 0 to cluster 1
    shared = np.array([[60, 50], [50, 0]])
    assert masks.matched_iou(shared).tolist() == [pytest.approx(50 / 110), pytest.approx(50 / 110)]
    # one cluster, two classes: the other class has nothing; a class without pixels is no number
    assert masks.matched_iou(np.array([[3, 7]])).tolist() == [0.0, pytest.approx(0.7)]
    assert math.isnan(masks.matched_iou(np.array([[3, 0], [0, 0]]))[1])


def test_confusion_counts_pixels_and_leaves_out_what_has_no_class():
    clusters, classes = np.array([[0, 0, 1], [2, 1, 1]]), np.array([[0, 1, 1], [-1, 0, 1]])
    assert masks.confusion(clusters, classes, (4, 2)).tolist() == [[1, 1], [1, 2], [0, 0], [0, 0]]


# --- J and F ---------------------------------------------------------------------------------------------------------


def slow_boundary(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the boundary pixel by pixel: where a neighbour to the right, below or between them differs."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [(v, u) for v, u in neighbours if v < height and u < width]
            if any(mask[y, x] != mask[v, u] for v, u in inside):
                found.append((y, x))
    return found


def slow_f(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return F by its definition: every boundary pixel is held against every one of the other's."""
    reach = math.ceil(0.008 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    ours, theirs = slow_boundary(mask), slow_boundary(truth)
    if not ours or not theirs:
        return float(len(ours) == len(theirs))

    def share(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        near = sum(any((y - v) ** 2 + (x - u) ** 2 <= reach**2 for v, u in others) for y, x in points)
        return near / len(points)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def blob(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a union of some rectangles and a disc, of any size and often beyond the edge."""
    y, x = np.mgrid[:height, :width]
    centre, radius = draw.integers(0, (height, width)), draw.integers(2, height // 2)
    found = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    for _ in range(3):
        top, left = draw.integers(-5, (height, width))
        found |= (y >= top) & (y < top + 9) & (x >= left) & (x < left + 6)
    return found


def test_boundary_measure_is_its_definition():
    draw, values = np.random.default_rng(0), []
    for height, width in [(24, 40), (60, 33), (40, 150)] * 8:  # reaches of 1 and 2 px
        truth = blob(draw, height, width)
        mask = np.roll(truth, draw.integers(-3, 4, 2), (0, 1)) ^ (draw.random((height, width)) < 0.01)
        values.append(masks.boundary_measure(mask, truth))
        assert values[-1] == pytest.approx(slow_f(mask, truth), abs=1e-12)
    assert min(values) < 0.5 < 0.7 < max(values)


def test_measures_by_hand():
    truth = np.zeros((20, 20), bool)
    truth[5:10, 5:10] = True  # 25 px; its boundary is the ring of 20 px from 4 to 9
    shifted = np.roll(truth, 2, axis=1)  # 15 px shared, 35 together
    assert masks.region_measure(shifted, truth) == pytest.approx(15 / 35)
    assert masks.region_measure(truth, truth) == masks.boundary_measure(truth, truth) == 1
    # the reach is 0.008 · 28.3 rounded up, 1 px: of the shifted ring 5 px of the top edge are so near to the other's
    # top edge, 5 of the bottom edge likewise, the upper and lower end of the left edge too: 12 of 20, and so both ways
    assert masks.boundary_measure(shifted, truth) == pytest.approx(0.6)
    assert masks.boundary_measure(np.roll(truth, 1, axis=1), truth) == 1  # within the reach
    assert masks.boundary_measure(np.roll(truth, 8, axis=0), truth) == 0


def test_empty_masks():
    empty, some = np.zeros((9, 9), bool), np.eye(9, dtype=bool)
    assert masks.region_measure(empty, empty) == masks.boundary_measure(empty, empty) == 1
    assert masks.region_measure(empty, some) == masks.boundary_measure(empty, some) == 0
    assert masks.region_measure(some, empty) == masks.boundary_measure(some, empty) == 0


def test_void_pixels_count_on_neither_side():
    truth, mask, void = (np.zeros((30, 30), bool) for _ in range(3))
    truth[5:15, 5:15], void[:, 15:] = True, True
    mask[5:15, 5:25] = True  # too large, but only where nothing is known
    assert masks.region_measure(mask, truth, void) == masks.boundary_measure(mask, truth, void) == 1
    assert masks.region_measure(mask, truth) == pytest.approx(0.5)


def test_mean_recall_and_decay_over_frames():
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    # the ends of the quarters are frames 1, 3, 5, 7 and 9; each counts to both sides, as in davis2017-evaluation
    assert masks.over_frames(values) == {
        "mean": pytest.approx(0.6), "recall": pytest.approx(5 / 9), "decay": pytest.approx(0.9 - 0.3)
    }  # fmt: skip
    assert masks.over_frames(np.array([0.8])) == {"mean": 0.8, "recall": 1.0, "decay": 0.0}
    long = np.linspace(1, 0, 400)  # more frames than a byte counts
    assert masks.over_frames(long)["decay"] == pytest.approx(0.75, abs=0.01)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_written_mask_is_read_back_in_the_colours_of_davis(tmp_path):
    labels = np.arange(256).reshape(8, 32)
    masks.write_mask(tmp_path / "m.png", labels)
    assert (masks.read_mask(tmp_path / "m.png", "x") == labels).all()
    colours = np.array(Image.open(tmp_path / "m.png").convert("RGB")).reshape(-1, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
             255: (224, 224, 192)}  # fmt: skip
    assert {number: tuple(colours[number].tolist()) for number in known} == known
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_grey_masks_hold_their_numbers(tmp_path, mode):
    values = np.array([[0, 1], [1, 1]]) if mode == "1" else np.array([[0, 3], [200, 7]])
    kind = {"L": np.uint8, "1": bool, "I;16": np.uint16}[mode]
    Image.fromarray(values.astype(kind)).save(tmp_path / "m.png")
    assert masks.read_mask(tmp_path / "m.png", "x").tolist() == values.tolist()


def test_what_is_no_mask_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no image")
    for name, words in (("colour", "holds colours (RGB)"), ("text", "is no image"), ("none", "is missing")):
        with pytest.raises(ConfigError, match="^segment.masks: [^:]*" + words.replace("(", r"\(").replace(")", r"\)")):
            masks.read_mask(tmp_path / f"{name}.png", "segment.masks")
