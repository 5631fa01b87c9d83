"""Decoding JPEGs on the GPU (`data.decoder: nvjpeg`): loader workers hand over bytes and boxes, the device the rest.

Owns what of a view is left to do on the device, and doing it with torchvision's nvJPEG. The invariant: boxes and
mirrors are those of the other decoders; pixels differ, as nvJPEG interpolates colour otherwise (see `data.decoder`).
Images that are no plain JPEG are decoded by the workers as ever. On a CPU torchvision decodes, so it runs everywhere.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from lmim.data.transforms import FLIP, jpeg_size, random_resized_crop_box
from lmim.options import DataConfig
from lmim.randomness import uniform


class Undecoded(NamedTuple):
    """A JPEG file's bytes, its place in the batch, and the crop: (top, left, height, width), mirrored?"""

    data: bytes
    place: int
    box: tuple[int, int, int, int]
    mirror: bool


def undecoded(data: bytes, place: int, config: DataConfig, key: int) -> Undecoded | None:
    """Return what the device needs to make a view, or None for what is not for nvJPEG to decode."""
    size = jpeg_size(data)
    if size is None:
        return None
    box = random_resized_crop_box(size[1], size[0], config.crop_scale, config.crop_ratio, key)
    mirror = config.flip and uniform(key, FLIP, 0) < 0.5
    return Undecoded(data, place, box, mirror)


def decode_views(images_BCHW: Tensor, jpegs: list[Undecoded]) -> list[int]:
    """Decode, crop and resize JPEGs on the device of `images_BCHW` (uint8) to their places there.

    Returns the places of those that cannot be decoded.
    """
    failed = []
    data = [torch.from_numpy(np.frombuffer(jpeg.data, np.uint8).copy()) for jpeg in jpegs]
    for jpeg, pixels_CHW in zip(jpegs, _decode(data, images_BCHW.device), strict=True):
        if pixels_CHW is None:
            failed.append(jpeg.place)
            continue
        top, left, h, w = jpeg.box
        crop = pixels_CHW[None, :, top : top + h, left : left + w].float()
        view = F.interpolate(crop, images_BCHW.shape[2:], mode="bicubic", antialias=True)[0]
        view = view.flip(2) if jpeg.mirror else view
        images_BCHW[jpeg.place] = view.round_().clamp_(0, 255).to(torch.uint8)
    return failed


def _decode(data: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs to RGB (3, H, W); one that is broken spoils its batch in nvJPEG, so then each is tried alone."""
    try:
        # torchvision 0.29 points to TorchCodec, which older ones do not have beside them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decode_jpeg(data, ImageReadMode.RGB, device) if data else []
    except RuntimeError:
        return [None] if len(data) == 1 else [pixels for one in data for pixels in _decode([one], device)]
