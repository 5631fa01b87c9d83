"""Masks of regions: how they are read and written, and how well two of them agree.

Owns palette PNGs and the measures: mean IoU after Hungarian matching of clusters to classes, and the region (J) and
boundary (F) measures of DAVIS with their mean, recall and decay (Perazzi et al., CVPR 2016; davis2017-evaluation). The
invariant: a measure is a share from 0 to 1 that depends on the two masks alone; pixels with the value of VOID in the
truth count on neither side.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from lmim.config import ConfigError
from lmim.data.transforms import BROKEN_FILE

VOID = 255
BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal
RECALL_ABOVE = 0.5
DECAY_PARTS = 4


# --- files -----------------------------------------------------------------------------------------------------------


def read_mask(path: Path, option: str) -> np.ndarray:
    """Return the numbers (H, W) of a palette or grey PNG; complaints name the file and `option`."""
    try:
        with Image.open(path) as image:
            mode, numbers = image.mode, np.array(image)
    except FileNotFoundError:
        raise ConfigError(f"{option}: {path} is missing") from None
    except BROKEN_FILE as error:
        raise ConfigError(f"{option}: {path} is no image: {' '.join(str(error).split())}") from error
    if mode not in ("P", "L", "1", "I", "I;16"):
        raise ConfigError(f"{option}: {path} holds colours ({mode}): a mask is a palette or grey image, whose numbers "
                          "are the classes")  # fmt: skip
    return numbers.astype(np.int64)


def image_size(path: Path, option: str) -> tuple[int, int]:
    """Return (height, width) of an image file from its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise ConfigError(f"{option}: {path} is missing") from None
    except BROKEN_FILE as error:
        raise ConfigError(f"{option}: {path} is no image: {' '.join(str(error).split())}") from error


def palette() -> list[int]:
    """Return the 256 colours of PASCAL VOC and DAVIS as one list of red, green and blue."""
    colours = []
    for number in range(256):
        channels = [0, 0, 0]
        for place in range(8):  # the number's bits, dealt out to the channels in turn, from the highest place down
            for channel in range(3):
                channels[channel] |= ((number >> (3 * place + channel)) & 1) << (7 - place)
        colours += channels
    return colours


def write_mask(path: Path, labels: np.ndarray) -> None:
    """Write labels (H, W) below 256 as a palette PNG, complete or not at all."""
    image = Image.frombytes("P", labels.shape[::-1], labels.astype(np.uint8).tobytes())
    image.putpalette(palette())
    temporary = path.with_suffix(".tmp")
    image.save(temporary, "PNG")
    temporary.replace(path)


# --- clusters against classes ----------------------------------------------------------------------------------------


def confusion(clusters: np.ndarray, classes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return how many pixels each cluster shares with each class, (clusters, classes), negative classes left out."""
    seen = classes >= 0
    pairs = clusters[seen].astype(np.int64) * shape[1] + classes[seen]
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


def matched_iou(shared: np.ndarray) -> np.ndarray:
    """Return each class's IoU with the cluster that is matched to it, from pixel counts (clusters, classes).

    The matching is one to one and maximises the sum of IoU (Hungarian). A class that gets no cluster has 0, one without
    pixels NaN.
    """
    from scipy.optimize import linear_sum_assignment

    shared = shared.astype(np.float64)
    union = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0, keepdims=True) - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    found = np.zeros(shared.shape[1])
    clusters, classes = linear_sum_assignment(iou, maximize=True)
    found[classes] = iou[clusters, classes]
    found[shared.sum(axis=0) == 0] = math.nan
    return found


# --- one object of a video -------------------------------------------------------------------------------------------


def region_measure(mask: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """Return J, the IoU of two boolean masks (H, W); 1 where both are empty."""
    seen = np.ones_like(truth) if void is None else ~void
    union = ((mask | truth) & seen).sum()
    return float((mask & truth & seen).sum() / union) if union else 1.0


def boundary_measure(mask: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """Return F, the harmonic mean of precision and recall of a boolean mask's boundary (H, W).

    Precision is the share of the mask's boundary pixels that lie within BOUNDARY_TOLERANCE of the diagonal, rounded up
    to whole px, of one of the truth's; recall the share of the truth's that lie so near to the mask's.
    """
    seen = np.ones_like(truth) if void is None else ~void
    reach = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*truth.shape))
    ours, theirs = boundary(mask & seen), boundary(truth & seen)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())  # 1 where neither has a boundary
    precision, recall = _share_within(ours, theirs, reach), _share_within(theirs, ours, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the boundary pixels (H, W) of a boolean mask: those that differ from a neighbour to the right or below.

    The one to the lower right counts too; the last row and column have their neighbours along the edge only.
    """
    right, below, both = (np.pad(mask, ((0, y), (0, x)), mode="edge")[y:, x:] for y, x in ((0, 1), (1, 0), (1, 1)))
    found = (mask ^ right) | (mask ^ below) | (mask ^ both)
    found[-1], found[:, -1] = (mask ^ right)[-1], (mask ^ below)[:, -1]
    found[-1, -1] = False
    return found


def _share_within(points: np.ndarray, others: np.ndarray, reach_px: int) -> float:
    from scipy.ndimage import distance_transform_edt

    return float((distance_transform_edt(~others)[points] <= reach_px).mean())


def over_frames(values: np.ndarray) -> dict[str, float]:
    """Return a measure's mean over frames, its recall (share above 0.5) and decay (first quarter less the last)."""
    ends = (np.round(np.linspace(1, len(values), DECAY_PARTS + 1) + 1e-10) - 1).astype(np.int64)
    parts = [values[start : stop + 1].mean() for start, stop in pairwise(ends)]
    return dict(mean=float(values.mean()), recall=float((values > RECALL_ABOVE).mean()),
                decay=float(parts[0] - parts[-1]))  # fmt: skip
