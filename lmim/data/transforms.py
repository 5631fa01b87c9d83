"""From the bytes of an image file to the uint8 views that the model is fed, on the CPU, with Pillow and NumPy.

Owns decoding to RGB, the random resized crop with its flip, and the fixed view for evaluation. The invariants: pixels
equal torchvision's transforms on Pillow images (bicubic, antialiased), a training view is a function of the image and
its sample key alone, and no bytes, however broken, raise anything but `ImageError`.

An alpha channel is dropped, as `convert("RGB")` does everywhere else in the field; EXIF rotation is not applied, as in
torchvision's folders. `Image.draft` (scaled JPEG decoding) is not used, since it alters pixels.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lmim.randomness import purpose, uniform

FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_PIXELS = 89_478_485  # Pillow's own default, a quarter of a GiB in RGB; more is taken for a decompression bomb
CROP, FLIP = purpose("crop"), purpose("flip")
CROP_TRIES = 10  # as torchvision

# Truncation and unknown formats are OSErrors. The second row is what Pillow turns into SyntaxError while it opens a
# file, but not while it loads the pixels; OverflowError comes of sizes that C cannot hold.
BROKEN_FILE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, OverflowError,
               IndexError, TypeError, KeyError, EOFError, struct.error)  # fmt: skip


class ImageError(ValueError):
    """Bytes that do not decode to an image: truncated, of no allowed format, or too large; says which."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode the bytes of an image file to 8-bit RGB, with 16-bit and float images scaled rather than clipped.

    Raises `ImageError` with the reason for what is no image, truncated, or beyond `MAX_PIXELS` by its header.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} px is more than {MAX_PIXELS} pixels")
        image.load()
        return _to_rgb(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        found = f"{len(data)} bytes that are" if data else "an empty file,"
        raise ImageError(f"{found} no image of the formats {', '.join(FORMATS)}") from None
    except BROKEN_FILE as error:
        raise ImageError(f"broken image file: {' '.join(str(error).split()) or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same pixels, and a warning
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale wide grey values to uint8: 16-bit ones to their high byte, which is what Pillow does to 16-bit RGB.

    A float image's full scale is the smallest of 1, 255 and 65,535 that holds it. What fits none of these (negative
    or 32-bit values) is stretched from its least to its greatest value.
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ImageError("pixels that are not finite")
    if low >= 0 and values.dtype.kind in "iu" and high <= 65535:
        return (values >> 8).astype(np.uint8)
    if low >= 0 and values.dtype.kind == "f":
        for full_scale in (1, 255, 65535):
            if high <= full_scale:
                return np.rint(values * (255 / full_scale)).astype(np.uint8)
    return np.rint((values - low) * (255 / ((high - low) or 1.0))).astype(np.uint8)


def shrink(image: Image.Image, short_side: int, quality: int) -> bytes | None:
    """Return the image as JPEG with its short side at `short_side` px, or None where it is not larger than that."""
    if min(image.size) <= short_side:
        return None
    out = io.BytesIO()
    _resize_short_side(image, short_side).save(out, "JPEG", quality=quality)
    return out.getvalue()


def random_resized_crop_box(width: int, height: int, scale: Sequence[float], ratio: Sequence[float],
                            key: int) -> tuple[int, int, int, int]:  # fmt: skip
    """Return the box (top, left, height, width) in px of torchvision's RandomResizedCrop, drawn by the hash of `key`.

    `scale` is the range of the box's share of the area, `ratio` that of width / height, drawn log-uniformly. After ten
    boxes that do not fit, the largest central one whose ratio is allowed.
    """

    def between(bounds: Sequence[float], counter: int) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * uniform(key, CROP, counter)

    log_ratio = [math.log(r) for r in ratio]
    for counter in range(0, 4 * CROP_TRIES, 4):
        area = width * height * between(scale, counter)
        aspect = math.exp(between(log_ratio, counter + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(key, CROP, counter + 2) * (height - h + 1))
            left = int(uniform(key, CROP, counter + 3) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def train_view(image: Image.Image, size: int, scale: Sequence[float], ratio: Sequence[float], flip: bool,
               key: int) -> np.ndarray:  # fmt: skip
    """Return a random resized crop, flipped with probability 1/2 if `flip`, as uint8 (size, size, 3)."""
    top, left, h, w = random_resized_crop_box(image.width, image.height, scale, ratio, key)
    view = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    if flip and uniform(key, FLIP, 0) < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(view)


def eval_view(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Return torchvision's Resize(resize, bicubic) and CenterCrop(crop) as uint8 (crop, crop, 3).

    Beyond the image's edges, where `crop` exceeds `resize`, the view is black.
    """
    image = _resize_short_side(image, resize)
    left, top = _central_offset(image.width, crop), _central_offset(image.height, crop)
    return np.array(image.crop((left, top, left + crop, top + crop)))


def _resize_short_side(image: Image.Image, px: int) -> Image.Image:
    short, long = sorted(image.size)
    other = int(px * long / short)  # truncated, as torchvision does
    size = (px, other) if image.width <= image.height else (other, px)
    return image.resize(size, Image.Resampling.BICUBIC)


def _central_offset(length: int, crop: int) -> int:
    """Return where a central crop starts: rounded half to even inside the image, negative where it must be padded."""
    return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)
