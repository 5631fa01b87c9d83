"""From the bytes of an image file to the uint8 views that the model is fed, on the CPU.

Owns decoding to RGB, the random resized crop with its flip, and the fixed view for evaluation. The invariants: a
training view is a function of the image and its sample key alone; no bytes, however broken, raise anything but
`ImageError`; the pixels are those of torchvision's transforms on Pillow images (bicubic, antialiased), by two routes:

* "pillow": Pillow decodes, crops and resizes; equal to the last bit.
* "turbo": libjpeg-turbo decodes JPEGs (simplejpeg) and torch's kernel resizes whatever was decoded. The decoded pixels
  are Pillow's; after the resize 0.5 of 100 values (3 at most) differ, by 1 or 2 grey levels. Only where a crop is far
  larger than the view is the JPEG decoded at 1/2, 1/4 or 1/8 of its size (see `CROP_OVER_VIEW`). JPEGs with corrupt
  data are refused, where Pillow guesses pixels; what libjpeg-turbo does not turn into RGB (CMYK) is decoded by Pillow,
  as are the other formats.

What one core takes for a photo of 500 x 375 px and a crop of 280 px, with "turbo": header 2 us, draws 17, decoding 545,
resizing 240, mirroring 25 where it happens. Decoding the crop alone would save little, since most of it is Huffman
decoding of all that comes before (nvimgcodec's regions: 9 % of the decoding).

An alpha channel is dropped, as `convert("RGB")` does everywhere else in the field; EXIF rotation is not applied, as in
torchvision's folders.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
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
DECODERS = ("turbo", "pillow")

# A JPEG is decoded at 1/f of its size where the crop still has this many px there per px of the view. The most that a
# view was found to differ from the full decode, in mean grey levels: with 3, 0.5 on photos, 1.5 on white noise, 1.0 on
# stripes of 3 px; with 2, 0.7, 3.4, 6.4; with 1.25, 2.0, 8.5, 29.
CROP_OVER_VIEW = 3
JPEG_SCALES = (8, 4, 2)  # libjpeg-turbo has fast code for these alone: 6/8 takes 1.6 times as long as the full size
ALIGNED_PX = 1 / 16  # how far the crop may lie off the pixels of a scaled decode
MAX_EXTRA = 16
TURBO_COLOURS = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "GRAY"}  # simplejpeg's name of what is stored, and what we ask
CORRUPT = ("Corrupt JPEG data", "Premature end of JPEG file")
RESAMPLE = torch.ops.aten._upsample_bicubic2d_aa.out

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
        _check_pixels(image.width, image.height)
        image.load()
        return _to_rgb(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        found = f"{len(data)} bytes that are" if data else "an empty file,"
        raise ImageError(f"{found} no image of the formats {', '.join(FORMATS)}") from None
    except BROKEN_FILE as error:
        raise ImageError(f"broken image file: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} px is more than {MAX_PIXELS} pixels")


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


def train_view(data: bytes, size: int, scale: Sequence[float], ratio: Sequence[float], flip: bool, key: int, *,
               decoder: str, out: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """Decode an image file and return a random resized crop as uint8 (size, size, 3), mirrored half the time if `flip`.

    `decoder` is one of `DECODERS`. The view is written to `out` where given: a contiguous array of that shape. Raises
    `ImageError`.
    """
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    mirror = flip and uniform(key, FLIP, 0) < 0.5
    if decoder == "pillow":
        image = decode_rgb(data)
        top, left, h, w = random_resized_crop_box(image.width, image.height, scale, ratio, key)
        view = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
        out[:] = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else view
        return out
    header = _turbo_header(data)
    if header is not None:
        height, width, colours = header
        box = random_resized_crop_box(width, height, scale, ratio, key)
        factor, rows, columns = _choose_scale(box, size)
        pixels = _turbo_decode(data, colours, height, width, factor)
        if pixels is not None:
            _resize(pixels, rows, columns, size, mirror, out)
            return out
    image = decode_rgb(data)
    top, left, h, w = random_resized_crop_box(image.width, image.height, scale, ratio, key)
    crop = np.array(image.crop((left, top, left + w, top + h)))
    _resize(crop, Span(0, h, h / size), Span(0, w, w / size), size, mirror, out)
    return out


def eval_view(data: bytes, resize: int, crop: int) -> np.ndarray:
    """Decode an image file and return torchvision's bicubic Resize(resize) and CenterCrop(crop): uint8 (crop, crop, 3).

    Pillow's exact pixels, whatever `data.decoder` says. Beyond the image's edges, where `crop` exceeds `resize`, the
    view is black. Raises `ImageError`.
    """
    image = _resize_short_side(decode_rgb(data), resize)
    left, top = _central_offset(image.width, crop), _central_offset(image.height, crop)
    return np.array(image.crop((left, top, left + crop, top + crop)))


def eval_mask(mask: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """Return the numbers (crop, crop) of a mask (H, W) at the pixels of `eval_view`: those of the nearest pixels.

    `crop` may not exceed `resize`.
    """
    height, width = mask.shape
    columns, rows = _size_of_short_side(width, height, resize)
    top, left = _central_offset(rows, crop), _central_offset(columns, crop)
    row, column = ((start + np.arange(crop) + 0.5) * pixels / resized for start, pixels, resized in
                   ((top, height, rows), (left, width, columns)))  # fmt: skip
    return mask[row.astype(np.int64)[:, None], column.astype(np.int64)]


def _resize_short_side(image: Image.Image, px: int) -> Image.Image:
    return image.resize(_size_of_short_side(image.width, image.height, px), Image.Resampling.BICUBIC)


def _size_of_short_side(width: int, height: int, px: int) -> tuple[int, int]:
    short, long = sorted((width, height))
    other = int(px * long / short)  # truncated, as torchvision does
    return (px, other) if width <= height else (other, px)


def _central_offset(length: int, crop: int) -> int:
    """Return where a central crop starts: rounded half to even inside the image, negative where it must be padded."""
    return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)


# --- the turbo route -------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Pixels [start, stop) of one axis, resampled `step` px apart, the first `extra` of the results to be dropped."""

    start: int
    stop: int
    step: float
    extra: int = 0


def _turbo_header(data: bytes) -> tuple[int, int, str] | None:
    """Return a JPEG's height, width and the colours to ask for, or None for what is Pillow's to decode or refuse."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height)
    return (height, width, TURBO_COLOURS[stored]) if stored in TURBO_COLOURS else None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the height and width of a JPEG in grey or YCbCr, None for any other file; ImageError beyond the limit."""
    header = _turbo_header(data)
    return None if header is None else header[:2]


def _turbo_decode(data: bytes, colours: str, height: int, width: int, factor: int) -> np.ndarray | None:
    """Decode a JPEG at 1/factor of its size, rounded up; None for what Pillow may know how to decode."""
    at_least = {} if factor == 1 else dict(min_height=-(-height // factor), min_width=-(-width // factor))
    try:
        return simplejpeg.decode_jpeg(data, colours, **at_least)
    except ValueError as error:
        if str(error).startswith(CORRUPT):
            raise ImageError(f"broken image file: {error}") from error
        return None


def _choose_scale(box: tuple[int, int, int, int], size: int) -> tuple[int, Span, Span]:
    """Return the factor f to decode at 1/f of the size, and the rows and columns of the box there."""
    top, left, h, w = box
    for factor in JPEG_SCALES:
        if min(h, w) >= CROP_OVER_VIEW * factor * size:
            rows, columns = _scaled_span(top, h, factor, size), _scaled_span(left, w, factor, size)
            if rows and columns:
                return factor, rows, columns
    return 1, Span(top, top + h, h / size), Span(left, left + w, w / size)


def _scaled_span(start: int, length: int, factor: int, size: int) -> Span | None:
    """Return the span of pixels [start, start + length) at 1/factor of the size.

    It may start between two pixels there, but torch resamples from whole pixels only. So the span begins `extra`
    results earlier, where it meets a whole pixel; None where it meets none.
    """
    step = length / factor / size
    for extra in range(MAX_EXTRA):
        first = start / factor - extra * step
        if first >= -ALIGNED_PX and abs(first - round(first)) <= ALIGNED_PX:
            return Span(round(first), math.ceil((start + length) / factor), step, extra)
    return None


def _resize(pixels_HWC: np.ndarray, rows: Span, columns: Span, size: int, mirror: bool, out: np.ndarray) -> None:
    """Resample a rectangle of RGB or grey pixels to `out`: bicubic, antialiased.

    torch's uint8 kernels for channels-last memory come from Pillow-SIMD: 0.23 ms, where Pillow takes 1.4 ms for an
    average crop of 500 x 375 px to 280 px. The form with `out`, which `interpolate` does not offer, is 0.1 ms faster.
    """
    crop = _channels_first(pixels_HWC[rows.start : rows.stop, columns.start : columns.stop])
    slot = _channels_first(out)
    channels, h, w = crop.shape[1:]
    height, width, y_scale = size + rows.extra, size + columns.extra, 1 / rows.step
    if h - height > max(2 * (w - width), 0):
        # Pillow 13 shrinks what is high in this way first, torch always last; both cut what leaves [0, 255] in between
        between = _channels_first(np.empty((height, w, channels), np.uint8))
        crop, y_scale = RESAMPLE(crop, [height, w], False, y_scale, 1.0, out=between), 1.0
    direct = (channels, height, width) == (3, size, size)
    view = slot if direct else _channels_first(np.empty((height, width, channels), np.uint8))
    RESAMPLE(crop, [height, width], False, y_scale, 1 / columns.step, out=view)
    if not direct:
        slot.copy_(view[:, :, rows.extra :, columns.extra :])
    if mirror:
        slot.copy_(slot.flip(3))


def _channels_first(pixels_HWC: np.ndarray) -> torch.Tensor:
    """Return a view (1, C, H, W) of pixels, channels last in memory."""
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
