"""Images cut into clusters of their patch tokens, drawn, and measured where masks are there.

Owns the choice of images and masks and the two figures of merit, both in pixels of the view, both the mean over classes
of the IoU after the matching of `masks.matched_iou`:

* per image: an image's clusters are matched to that image's own classes; the mean over its classes, then over images.
  For each of `segment.clusters`, and with as many clusters as the image's mask has classes (`as_mask`).
* per data set: one clustering and one matching for all images. The mean tokens of every image's finest clusters are
  clustered, by the same linkage, into as many clusters as all masks have classes; pixels are counted over all images
  before they are matched.

The invariant: an image is clustered whole by one rank, so nothing depends on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmim.config import ConfigError, check
from lmim.data.loader import open_shards
from lmim.data.shards import ShardReader
from lmim.data.sources import open_folder
from lmim.data.storage import Damaged
from lmim.data.transforms import ImageError, decode_rgb, eval_mask, eval_view
from lmim.dist import Topology, barrier, progress
from lmim.eval.clusters import (
    MAX_POINTS,
    explained_share,
    patch_tokens,
    principal_colours,
    tree_clusters,
    tsne_points,
)
from lmim.eval.masks import confusion, matched_iou, read_mask
from lmim.eval.panels import Panel, draw_panels
from lmim.eval.results import make_folder, record
from lmim.eval.session import check_layer, in_turns, on_ranks, open_encoder
from lmim.options import Config
from lmim.vit import VisionTransformer

logger = logging.getLogger(__name__)
FOLDER = "segment"  # of the pictures, in the run folder
SHEET = "panels.png"


class Chosen(NamedTuple):
    """One image to segment: `read` returns its name and the bytes of its file."""

    read: Callable[[], tuple[str, bytes]]
    drawn: bool


class Segmented(NamedTuple):
    """What came of one image. Pixel counts (clusters, classes) have a column for each of `classes`."""

    explained: dict[int, float]  # number of clusters asked for: share of the tokens' variance
    means: np.ndarray  # (clusters of the finest cut, D)
    classes: np.ndarray | None  # the mask's numbers, ascending; none without masks
    shared: dict[int, np.ndarray]  # number of clusters asked for: pixel counts
    panel: Panel | None


# --- images and masks ------------------------------------------------------------------------------------------------


def choose_images(config: Config, topology: Topology) -> list[Chosen]:
    """Return the images that the options choose, evenly spread over `segment.images` or else `data.eval`."""
    given = config.segment.images
    if given:
        path = Path(given)
        if not path.exists():
            raise ConfigError(f"segment.images ({given}) does not exist: give an image file or a folder of such")
        if path.is_file():
            return [Chosen(lambda: (path.stem, path.read_bytes()), config.segment.pictures > 0)]
        images = open_folder(path, "segment.images").images
        total, reader = len(images), lambda i: (images[i].key, images[i].read())
    else:
        index = open_shards("data.eval", config.data.eval, Path(config.run.folder)) if topology.is_main else None
        barrier()  # embedded images are sharded by the first rank
        index = index or open_shards("data.eval", config.data.eval, Path(config.run.folder))
        if index is None:
            raise ConfigError("segment.images and data.eval are empty: give images or shards to segment")
        shards, total = ShardReader(index), len(index)

        def reader(i: int) -> tuple[str, bytes]:
            sample = shards.read(i)
            return sample.key, sample.image

    count = min(config.segment.count or total, total)
    numbers = np.unique(np.linspace(0, total - 1, count).round().astype(np.int64)).tolist()
    return [Chosen(partial(reader, i), place < config.segment.pictures) for place, i in enumerate(numbers)]


def read_truth(config: Config, name: str, image_size: tuple[int, int], size: int) -> np.ndarray | None:
    """Return the mask (S, S) at the view's pixels of an image of (height, width) px, −1 where no class is given."""
    if not config.segment.masks:
        return None
    path = Path(config.segment.masks) / f"{name}.png"
    mask = read_mask(path, "segment.masks")
    if mask.shape != image_size:
        raise ConfigError(f"segment.masks: {path} has {mask.shape[1]} x {mask.shape[0]} px, but its image has "
                          f"{image_size[1]} x {image_size[0]}")  # fmt: skip
    return eval_mask(np.where(mask == config.segment.ignore, -1, mask), size, size)


# --- one image -------------------------------------------------------------------------------------------------------


def segment_image(chosen: Chosen, encoder: VisionTransformer, config: Config, size: int,
                  device: torch.device) -> Segmented | None:  # fmt: skip
    """Cluster one image's tokens; None where the image cannot be read."""
    try:
        name, data = chosen.read()
        view = eval_view(data, size, size)
        image = decode_rgb(data)
    except (Damaged, ImageError, OSError) as error:
        logger.warning("skipped an image: %s", error)
        return None
    truth = read_truth(config, name, (image.height, image.width), size)
    tokens = patch_tokens(encoder, torch.from_numpy(view).permute(2, 0, 1)[None].to(device), 1, config.segment.layer)
    grid = tokens[0].cpu().numpy()
    points = grid.reshape(-1, grid.shape[-1])
    classes = None if truth is None else np.unique(truth[truth >= 0])
    counts = sorted({*config.segment.clusters, *([] if classes is None or not len(classes) else [len(classes)])})
    labels = dict(zip(counts, tree_clusters(points, counts, config.segment.linkage), strict=True))
    finest = labels[max(config.segment.clusters)]
    progress()
    shared = {}
    if classes is not None:
        columns = np.where(truth >= 0, np.searchsorted(classes, truth), -1)
        shared = {count: confusion(_at_pixels(found.reshape(grid.shape[:2]), size), columns, (count, len(classes)))
                  for count, found in labels.items()}  # fmt: skip
    return Segmented(
        explained={count: explained_share(points, labels[count]) for count in config.segment.clusters},
        means=np.stack([points[finest == label].mean(axis=0) for label in range(finest.max() + 1)]),
        classes=classes,
        shared=shared,
        panel=_panel(name, view, grid, labels, truth, config) if chosen.drawn else None,
    )


def _at_pixels(labels: np.ndarray, size: int) -> np.ndarray:
    """Return a label map (rows, cols) at the pixels (S, S) of the view."""
    return labels.repeat(size // labels.shape[0], axis=0).repeat(size // labels.shape[1], axis=1)


def _panel(name: str, view: np.ndarray, grid: np.ndarray, labels: dict[int, np.ndarray], truth: np.ndarray | None,
           config: Config) -> Panel:  # fmt: skip
    maps = {count: labels[count].reshape(grid.shape[:2]) for count in sorted(config.segment.clusters)}
    return Panel(name, view, maps, *tsne_points(grid.reshape(-1, grid.shape[-1])), principal_colours(grid), truth)


# --- all images ------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(config: Config, source: Path, which: str) -> dict[str, Any] | None:
    """Segment images with an encoder, on all ranks; draw, record and return figures.

    The first rank returns them, the others None.
    """
    check(config)
    options, out = config.segment, Path(config.segment.out or Path(config.run.folder) / FOLDER)
    if options.masks and not Path(options.masks).is_dir():
        raise ConfigError(f"segment.masks ({options.masks}) is no folder: give one of PNGs with the images' names")
    encoder = open_encoder(config, source, which)
    check_layer(options.layer, "segment.layer", encoder)
    size = view_size(config, encoder)
    if options.pictures:
        make_folder(out, "segment.out, by default in run.folder")
    with on_ranks(config) as topology:
        encoder.to(topology.device)
        chosen = choose_images(config, topology)
        work = partial(segment_image, encoder=encoder, config=config, size=size, device=topology.device)
        found = in_turns(work, chosen, topology)
        segmented = [one for one in found if one is not None]
        if not segmented:
            option = f"segment.images ({options.images})" if options.images else f"data.eval ({config.data.eval})"
            raise ConfigError(f"{option}: none of the {len(found)} images that were chosen could be read")
        if not topology.is_main:
            return None
        figures = dict(images=len(segmented), skipped=len(found) - len(segmented), size=size,
                       grid=size // encoder.patch_size, linkage=options.linkage, layer=options.layer)  # fmt: skip
        figures |= summary(segmented, config)
        pictures = draw([one.panel for one in segmented if one.panel is not None], out)
        run_folder = Path(config.run.folder)
        inside = [str(path.relative_to(run_folder)) for path in pictures if path.is_relative_to(run_folder)]
        record(run_folder, "segment", figures, source=source, which=which, pictures=inside)
        return figures | dict(pictures=[str(path) for path in pictures])


def view_size(config: Config, encoder: VisionTransformer) -> int:
    """Return the side of the view in px; raises ConfigError where the encoder's patches do not tile it."""
    patch = encoder.patch_size
    size = config.segment.size or 2 * encoder.grid_size * patch
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        raise ConfigError(f"segment.size ({size}) must be a multiple of the patch side ({patch} px): take "
                          + (f"{below} or {above}" if below else str(above)))  # fmt: skip
    if (size // patch) ** 2 > MAX_POINTS:
        raise ConfigError(f"segment.size ({size}) gives {(size // patch) ** 2} patches of {patch} px, and more than "
                          f"{MAX_POINTS} are too many: take up to {int(MAX_POINTS**0.5) * patch}")  # fmt: skip
    return size


def summary(segmented: list[Segmented], config: Config) -> dict[str, Any]:
    """Return the explained variance and, with masks, the mIoU per image and of the data set."""
    counts = config.segment.clusters
    figures: dict[str, Any] = dict(explained={str(count): _mean([one.explained[count] for one in segmented])
                                              for count in counts})  # fmt: skip
    judged = [one for one in segmented if one.classes is not None and len(one.classes)]
    if not config.segment.masks:
        return figures
    if not judged:
        raise ConfigError(f"segment.masks ({config.segment.masks}): all pixels are {config.segment.ignore}, which "
                          "segment.ignore leaves out")  # fmt: skip
    figures["miou_per_image"] = {
        str(count): _mean([matched_iou(one.shared[count]).mean() for one in judged]) for count in counts
    } | {"as_mask": _mean([matched_iou(one.shared[len(one.classes)]).mean() for one in judged])}
    classes = np.unique(np.concatenate([one.classes for one in judged]))
    iou = matched_iou(data_set_counts(judged, classes, config))
    by_class = {str(number): round(float(x), 5) for number, x in zip(classes, iou, strict=True)}
    return figures | dict(miou_data_set=_mean(iou), classes=len(classes), iou_by_class=by_class)


def data_set_counts(segmented: list[Segmented], classes: np.ndarray, config: Config) -> np.ndarray:
    """Return pixel counts (clusters, classes) of one clustering of all images' clusters into as many as classes."""
    means = np.concatenate([one.means for one in segmented])
    if len(means) > MAX_POINTS:
        raise ConfigError(f"segment.count: the images have {len(means)} clusters together, and more than {MAX_POINTS} "
                          "are too many to cluster: take fewer images or smaller segment.clusters")  # fmt: skip
    labels = tree_clusters(means, [len(classes)], config.segment.linkage)[0]
    total, start, finest = np.zeros((len(classes), len(classes)), np.int64), 0, max(config.segment.clusters)
    for one in segmented:
        rows = labels[start : start + len(one.means)]
        columns = np.searchsorted(classes, one.classes)
        np.add.at(total, (rows[:, None], columns), one.shared[finest][: len(rows)])
        start += len(rows)
    return total


def draw(panels: list[Panel], out: Path) -> list[Path]:
    """Draw all panels into one picture, and each into one by the image's name; return the files, that of all first."""
    if not panels:
        return []
    draw_panels(panels, out / SHEET)
    paths = [out / SHEET]
    for panel in panels:
        paths.append(out / f"{panel.name.replace('/', '_')}.png")
        draw_panels([panel], paths[-1])
    return paths


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 5)
