"""Video object segmentation by label propagation, as DINO evaluates it (arXiv:2104.14294, section 4.2.2) on DAVIS-2017.

The masks of a video's first frame are carried from frame to frame: each patch takes the labels of the patches most like
it in the first frame and the few before, within a neighbourhood. Nothing is trained. Owns the folder layout, the
propagation and the measures of a data set. The invariant: each video is propagated whole by one rank, so figures and
masks do not depend on the number of ranks; memory does not grow with a video's length.

    JPEGImages/480p/VIDEO/00000.jpg    Annotations/480p/VIDEO/00000.png    ImageSets/2017/val.txt

Of DINO's script this differs where it reads frames: Pillow's bicubic resize instead of OpenCV's bilinear. First and
last frames are not measured, as davis2017-evaluation has it.

Letters: h, w patches a column and row · D encoder width · C objects, the background first.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lmim.config import ConfigError, check
from lmim.data.transforms import ImageError, decode_rgb
from lmim.dist import Topology, progress
from lmim.eval.masks import VOID, boundary_measure, image_size, over_frames, read_mask, region_measure, write_mask
from lmim.eval.results import make_folder, record
from lmim.eval.session import check_layer, in_turns, on_ranks, open_encoder
from lmim.options import Config, DavisConfig
from lmim.patches import normalize_images
from lmim.vit import VisionTransformer

logger = logging.getLogger(__name__)
RESOLUTION = "480p"
LONG_SIDE_UNIT = 64  # px: DINO rounds the long side down to a multiple of it
FOLDER = "davis"  # of the masks, in the run folder

Embed = Callable[[Tensor], Tensor]  # uint8 (3, H, W), sides multiples of the patch, to features (h, w, D)


# --- the data set ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """One video: its frames in order and their masks; of unpublished truth there is the first mask alone."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]

    @property
    def measured(self) -> bool:
        return len(self.masks) == len(self.frames)


def find_videos(config: DavisConfig) -> list[Video]:
    """Return the videos of a split, every file seen and every size compared; raises ConfigError naming what is not."""
    if not config.folder:
        raise ConfigError("davis.folder is empty: give the DAVIS-2017 folder, which holds JPEGImages, Annotations and "
                          "ImageSets")  # fmt: skip
    folder = Path(config.folder)
    for part in (folder, folder / "JPEGImages" / RESOLUTION, folder / "Annotations" / RESOLUTION):
        if not part.is_dir():
            raise ConfigError(f"davis.folder ({folder}): no such folder: {part}")
    split = folder / "ImageSets" / "2017" / f"{config.split}.txt"
    if not split.is_file():
        there = ", ".join(sorted(path.stem for path in split.parent.glob("*.txt"))) or "none"
        raise ConfigError(f"davis.split ({config.split}): {split} is missing; there are: {there}")
    names = split.read_text(errors="replace").split()
    if not names:
        raise ConfigError(f"davis.split ({config.split}): {split} names no video")
    return [_open_video(folder, name) for name in names]


def _open_video(folder: Path, name: str) -> Video:
    images, annotations = (folder / part / RESOLUTION / name for part in ("JPEGImages", "Annotations"))
    if not images.is_dir():
        raise ConfigError(f"davis.folder: video {name} has no folder {images}")
    frames = sorted(images.glob("*.jpg"))
    if len(frames) < 2:
        raise ConfigError(f"davis.folder: video {name} has {len(frames)} frames in {images}: it needs two or more")
    for number, frame in enumerate(frames):
        if frame.stem != f"{number:05d}":
            raise ConfigError(f"davis.folder: video {name} lacks the frame {images / f'{number:05d}.jpg'}: the next "
                              f"there is {frame.name}")  # fmt: skip
    masks = [annotations / f"{frame.stem}.png" for frame in frames]
    if not masks[0].is_file():
        raise ConfigError(f"davis.folder: video {name} lacks its first annotation, {masks[0]}")
    there = [mask for mask in masks if mask.is_file()]
    for mask in sorted({*annotations.glob("*.png")} - {*masks}):
        raise ConfigError(f"davis.folder: video {name} lacks the frame {images / mask.stem}.jpg, of which {mask} is "
                          "the annotation")  # fmt: skip
    if 1 < len(there) < len(masks):
        missing = next(mask for mask in masks if not mask.is_file())
        raise ConfigError(f"davis.folder: video {name} lacks the annotation {missing}: give all, or the first alone")
    size = image_size(frames[0], "davis.folder")
    for path in (*frames, *there):
        found = image_size(path, "davis.folder")
        if found != size:
            raise ConfigError(f"davis.folder: {path} has {found[1]} x {found[0]} px, but the first frame of video "
                              f"{name} has {size[1]} x {size[0]}")  # fmt: skip
    return Video(name, tuple(frames), tuple(there))


# --- propagation -----------------------------------------------------------------------------------------------------


def propagate(features: Iterable[Tensor], first: Tensor, config: DavisConfig) -> Iterator[Tensor]:
    """Yield soft labels (C, h, w) of every frame after the first, from frames' features (h, w, D) and its labels.

    A patch's labels are the mean of those of the `top_k` patches with the largest cosine in the first frame and the
    `past_frames` before, weighted by exp(cosine / temperature); among patches no more than `neighbourhood` rows and
    columns away (0: all). Of equal cosines at the end of the `top_k`, all count.
    """
    frames = iter(features)
    source = F.normalize(next(frames), dim=2), first
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.past_frames)
    for frame in frames:
        frame = F.normalize(frame, dim=2)
        sources = [source, *past]
        labels = _labels_from(frame, torch.stack([x for x, _ in sources]), torch.stack([y for _, y in sources]), config)
        past.append((frame, labels))
        yield labels


def _labels_from(frame_hwD: Tensor, sources_nhwD: Tensor, labels_nChw: Tensor, config: DavisConfig) -> Tensor:
    """Return labels (C, h, w) of a frame from n others, row by row: only the rows nearby are compared."""
    h, w, _ = frame_hwD.shape
    reach = config.neighbourhood or max(h, w)
    column = torch.arange(w, device=frame_hwD.device)
    near_ww = (column[:, None] - column).abs() <= reach
    found = []
    for row in range(h):
        rows = slice(max(row - reach, 0), row + reach + 1)
        keys_KD = sources_nhwD[:, rows].flatten(0, 2)
        values_CK = labels_nChw[:, :, rows].transpose(0, 1).flatten(1)
        cosine_wK = frame_hwD[row] @ keys_KD.T
        cosine_wK.view(w, -1, w).masked_fill_(~near_ww[:, None], -torch.inf)
        most = cosine_wK.topk(min(config.top_k, cosine_wK.shape[1]), dim=1).values
        # what lies too far away is -inf, so it weighs nothing even where fewer than `top_k` patches are near
        weights_wK = ((cosine_wK - most[:, :1]) / config.temperature).exp() * (cosine_wK >= most[:, -1:])
        found.append((weights_wK / weights_wK.sum(dim=1, keepdim=True)) @ values_CK.T)
    return torch.stack(found).permute(2, 0, 1)


def hard_labels(soft_Chw: Tensor, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """Return the label of every pixel, uint8 of `size` (H, W): upsampled, each object's labels stretched to 0 … 1."""
    soft = F.interpolate(soft_Chw[None], scale_factor=patch_size, mode="bilinear")[0]
    low, high = soft.amin(dim=(1, 2), keepdim=True), soft.amax(dim=(1, 2), keepdim=True)
    stretched = (soft - low) / (high - low).where(high > low, 1)
    labels = stretched.argmax(dim=0).to(torch.uint8).cpu().numpy()
    return np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))


def input_size(size: tuple[int, int], short_side: int, patch_size: int) -> tuple[int, int]:
    """Return (height, width) px that a frame is resized to: multiples of the patch, the long side one of 64 if it may.

    As DINO: 854 x 480 px become 832 x 480 for patches of 8 and 16 px.
    """
    unit = LONG_SIDE_UNIT if LONG_SIDE_UNIT % patch_size == 0 else patch_size
    short = max(short_side // patch_size, 1) * patch_size
    long = max(int(short * max(size) / min(size)) // unit * unit, short)
    return (short, long) if size[0] <= size[1] else (long, short)


def first_labels(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Return the one-hot labels (C, h, w) of a mask's pixels nearest to the patches' centres; void is background."""
    mask = np.where(mask == VOID, 0, mask).astype(np.uint8)
    small = np.array(Image.fromarray(mask).resize(grid[::-1], Image.Resampling.NEAREST))
    return F.one_hot(torch.from_numpy(small).long(), int(mask.max()) + 1).permute(2, 0, 1).float()


def segment_video(video: Video, embed: Embed, patch_size: int, config: DavisConfig,
                  device: torch.device) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield the mask (H, W) of every frame, the first as it was given, reading one frame after another."""
    mask = read_mask(video.masks[0], "davis.folder")
    height, width = input_size(mask.shape, config.short_side, patch_size)
    labels = first_labels(mask, (height // patch_size, width // patch_size)).to(device)

    def features() -> Iterator[Tensor]:
        for frame in video.frames:
            try:
                image = decode_rgb(frame.read_bytes())
            except (ImageError, OSError) as error:
                raise ConfigError(f"davis.folder: {frame} cannot be read: {error}") from error
            pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
            yield embed(torch.from_numpy(pixels).permute(2, 0, 1).to(device))
            progress()

    yield mask
    for soft in propagate(features(), labels, config):
        yield hard_labels(soft, patch_size, mask.shape)


def frame_features(encoder: VisionTransformer, layer: int, image: Tensor) -> Tensor:
    """Return the patch tokens (h, w, D) after a block and the last norm, as DINO takes them, of one image."""
    tokens = encoder.forward_intermediates(normalize_images(image[None]), [layer], norm=True)[0]
    return tokens[0, 1:].float().unflatten(0, (image.shape[1] // encoder.patch_size, -1))


# --- the evaluation --------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What came of one video: its frames, and of each object (mean, recall, decay) of J and F; none without truth."""

    name: str
    frames: int
    objects: list[dict[str, dict[str, float]]]


@torch.inference_mode()
def evaluate_video(video: Video, embed: Embed, patch_size: int, config: DavisConfig, device: torch.device,
                   out: Path) -> Measured:  # fmt: skip
    """Propagate one video, write its masks to `out`/VIDEO/00000.png, and measure them where the truth is there."""
    folder = out / video.name
    folder.mkdir(parents=True, exist_ok=True)
    objects, regions, boundaries = 0, [], []
    for number, mask in enumerate(segment_video(video, embed, patch_size, config, device)):
        write_mask(folder / f"{number:05d}.png", mask)
        if number == 0:
            objects = int(mask[mask != VOID].max(initial=0))
            if objects == 0:
                raise ConfigError(f"davis.folder: {video.masks[0]} marks no object: number its pixels from 1")
        elif video.measured and number < len(video.frames) - 1:
            truth = read_mask(video.masks[number], "davis.folder")
            pairs = [(mask == one, truth == one, truth == VOID) for one in range(1, objects + 1)]
            regions.append([region_measure(*pair) for pair in pairs])
            boundaries.append([boundary_measure(*pair) for pair in pairs])
    if not regions:
        return Measured(video.name, len(video.frames), [])
    by_object = zip(np.array(regions).T, np.array(boundaries).T, strict=True)
    return Measured(video.name, len(video.frames), [dict(J=over_frames(j), F=over_frames(f)) for j, f in by_object])


def summary(videos: list[Measured]) -> dict[str, Any]:
    """Return J&F, and mean, recall and decay of J and F over all objects of all videos, then J&F of each video."""
    objects = [one for video in videos for one in video.objects]
    figures: dict[str, Any] = dict(videos=len(videos), frames=sum(video.frames for video in videos),
                                   objects=len(objects))  # fmt: skip
    if not objects:
        return figures
    means = {f"{measure}_{kind}": float(np.mean([one[measure][kind] for one in objects]))
             for measure in ("J", "F") for kind in ("mean", "recall", "decay")}  # fmt: skip
    figures |= {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means
    figures["by_video"] = {video.name: np.mean([one[m]["mean"] for one in video.objects for m in ("J", "F")])
                           for video in videos if video.objects}  # fmt: skip
    return {key: {name: round(float(x), 5) for name, x in value.items()} if isinstance(value, dict)
            else round(value, 5) for key, value in figures.items()}  # fmt: skip


def evaluate_checkpoint(config: Config, source: Path, which: str) -> dict[str, Any] | None:
    """Propagate the videos of `davis.folder` with an encoder, on all ranks; write masks, record and return figures.

    The first rank returns them, the others None.
    """
    check(config)
    videos = find_videos(config.davis)
    encoder = open_encoder(config, source, which)
    check_layer(config.davis.layer, "davis.layer", encoder)
    with on_ranks(config) as topology:
        encoder.to(topology.device)
        embed = partial(frame_features, encoder, config.davis.layer)
        return evaluate(config, videos, embed, encoder.patch_size, topology, source=source, which=which)


def evaluate(config: Config, videos: list[Video], embed: Embed, patch_size: int, topology: Topology, *, source: Path,
             which: str) -> dict[str, Any] | None:  # fmt: skip
    """Do what `evaluate_checkpoint` does with any features; `embed` may be anything that gives one vector a patch."""
    out = Path(config.davis.out or Path(config.run.folder) / FOLDER)
    make_folder(out, "davis.out, by default in run.folder")

    def work(video: Video) -> Measured:
        done = evaluate_video(video, embed, patch_size, config.davis, topology.device, out)
        logger.info("%s: %d frames, %d objects measured", video.name, done.frames, len(done.objects))
        return done

    measured = in_turns(work, videos, topology)
    if not topology.is_main:
        return None
    figures = summary(measured)
    record(Path(config.run.folder), "davis", figures, source=source, which=which)
    return figures
