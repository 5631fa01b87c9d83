"""Decoding and views: pixels against torchvision's own transforms, and by hand for every mode of image."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from lmim.data.transforms import (
    MAX_PIXELS,
    ImageError,
    decode_rgb,
    eval_view,
    random_resized_crop_box,
    shrink,
    train_view,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SIZES = [(80, 50), (31, 90), (35, 35), (224, 225), (20, 17)]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", SIZES)
def test_train_view_equals_torchvision_resized_crop(width, height):
    image = picture(width, height)
    flips = 0
    for key in range(20):
        top, left, h, w = random_resized_crop_box(width, height, SCALE, RATIO, key)
        expected = np.asarray(tvf.resized_crop(image, top, left, h, w, [35, 35], InterpolationMode.BICUBIC))
        np.testing.assert_array_equal(train_view(image, 35, SCALE, RATIO, False, key), expected)
        flipped = train_view(image, 35, SCALE, RATIO, True, key)
        flips += not np.array_equal(flipped, expected)
        assert np.array_equal(flipped, expected) or np.array_equal(flipped, expected[:, ::-1])
    assert 0 < flips < 20


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("resize, crop", [(40, 35), (35, 35), (37, 32), (30, 35), (17, 64)])
def test_eval_view_equals_torchvision(width, height, resize, crop):
    image = picture(width, height)
    expected = tv.Compose([tv.Resize(resize, InterpolationMode.BICUBIC), tv.CenterCrop(crop)])(image)
    np.testing.assert_array_equal(eval_view(image, resize, crop), np.asarray(expected))


@pytest.mark.parametrize(
    "width, height, ratio", [(100, 80, RATIO), (60, 400, RATIO), (500, 60, RATIO), (7, 6, RATIO), (64, 64, (0.1, 10))]
)
def test_crop_boxes_are_distributed_as_torchvision_draws_them(width, height, ratio):
    draws = 4000
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, list(SCALE), list(ratio)) for _ in range(draws)])
    ours = np.array([random_resized_crop_box(width, height, SCALE, ratio, key) for key in range(draws)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):  # the Kolmogorov-Smirnov distance; 0.043 is its 0.1 % point for 4,000 against 4,000
        grid = np.unique(np.concatenate([theirs[:, column], ours[:, column]]))
        cumulative = [np.searchsorted(np.sort(x[:, column]), grid, side="right") / draws for x in (theirs, ours)]
        assert np.abs(cumulative[0] - cumulative[1]).max() < 0.043, ("top", "left", "height", "width")[column]


@pytest.mark.parametrize("width, height", [(10, 1000), (1000, 10)])
def test_crop_falls_back_to_the_centre_as_torchvision_does(width, height):
    expected = tv.RandomResizedCrop.get_params(Image.new("L", (width, height)), [0.9, 1.0], list(RATIO))
    assert random_resized_crop_box(width, height, (0.9, 1.0), RATIO, key=1) == tuple(expected)


def test_half_of_the_views_are_flipped_independently_of_the_crop():
    image = Image.fromarray(np.tile(np.arange(0, 200, 5, dtype=np.uint8)[:, None], (1, 40)).T.copy()).convert("RGB")
    views = [train_view(image, 8, SCALE, RATIO, True, key) for key in range(2000)]
    flipped = np.array([int(view[0, 0, 0]) > int(view[0, -1, 0]) for view in views])  # it brightens to the right
    left = np.array([random_resized_crop_box(40, 40, SCALE, RATIO, key)[1] for key in range(2000)])
    assert abs(flipped.mean() - 0.5) < 0.04
    assert abs(np.corrcoef(flipped, left)[0, 1]) < 0.08


def test_shrink_brings_the_short_side_down_and_leaves_small_images_alone():
    small = shrink(picture(90, 60), 30, 90)
    assert small is not None and Image.open(io.BytesIO(small)).size == (45, 30)
    assert shrink(picture(90, 60), 60, 90) is None


# --- decoding --------------------------------------------------------------------------------------------------------

GREY = np.array([[0, 1, 127, 128, 254, 255]], np.uint8)
COLOUR = np.array([[[255, 0, 0], [0, 255, 0], [10, 20, 30], [255, 255, 255]]], np.uint8)
WIDE = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
WIDE_8_BIT = [0, 0, 1, 128, 255]


def palette_with_transparency() -> bytes:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    return encoded(image, transparency=bytes([0, 128, 255]))


def alpha(values: np.ndarray) -> np.ndarray:
    channels = values if values.ndim == 3 else values[..., None]
    return np.concatenate([channels, np.full((*channels.shape[:2], 1), 7, np.uint8)], axis=2)


CMYK = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
MODES = {
    "1": (encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")), [0, 255]),
    "L": (encoded(Image.fromarray(GREY)), GREY[0]),
    "LA": (encoded(Image.fromarray(alpha(GREY))), GREY[0]),
    "P with transparency": (palette_with_transparency(), [[255, 0, 0], [0, 255, 0], [10, 20, 30]]),
    "RGB": (encoded(Image.fromarray(COLOUR)), COLOUR[0]),
    "RGBA": (encoded(Image.fromarray(alpha(COLOUR))), COLOUR[0]),
    "CMYK": (encoded(CMYK, "TIFF"), [[255, 255, 255], [0, 255, 255], [0, 0, 0]]),
    "I;16 in PNG": (encoded(Image.fromarray(WIDE)), WIDE_8_BIT),
    "I;16 in TIFF": (encoded(Image.fromarray(WIDE), "TIFF"), WIDE_8_BIT),
    "I;16B in TIFF": (encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"), WIDE_8_BIT),
    "16 bits in PGM": (b"P5\n5 1\n65535\n" + WIDE.astype(">u2").tobytes(), WIDE_8_BIT),
    "I": (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), WIDE_8_BIT),
    "I beyond 16 bits": (encoded(Image.fromarray(np.array([[-510, 0, 510]], np.int32)), "TIFF"), [0, 128, 255]),
    "F to 1": (encoded(Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), "TIFF"), [0, 51, 255]),
    "F to 255": (encoded(Image.fromarray(np.array([[0, 51, 254]], np.float32)), "TIFF"), [0, 51, 254]),
    "F to 65535": (encoded(Image.fromarray(np.array([[0, 257 * 51, 65535]], np.float32)), "TIFF"), [0, 51, 255]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_decodes_to_the_rgb_values_it_stands_for(mode):
    data, expected = MODES[mode]
    image = decode_rgb(data)
    assert image.mode == "RGB"
    expected = np.asarray(expected)
    expected = np.repeat(expected[:, None], 3, axis=1) if expected.ndim == 1 else expected
    np.testing.assert_array_equal(np.asarray(image)[0], expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_to_nearly_what_was_encoded(mode):
    flat = Image.new("RGB", (32, 32), (200, 90, 40)).convert(mode)
    pixels = np.asarray(decode_rgb(encoded(flat, "JPEG", quality=95)), np.int64)
    assert np.abs(pixels - np.asarray(flat.convert("RGB"))).max() <= 4


def png_header_of(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc + struct.pack(">I4s", 50, b"IDAT") + b"\0" * 50


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "an empty file"),
        (b"only some words\n", "no image of the formats"),
        (encoded(picture(60, 60), "JPEG")[:-400], "truncated"),
        (encoded(picture(60, 60))[:-4000], "truncated"),
        (encoded(picture(60, 60), "WEBP")[:-300], "no image|broken"),
        (png_header_of(9_000, 10_000), f"more than {MAX_PIXELS} pixels"),
        (png_header_of(60_000, 60_000), "decompression bomb"),
        (encoded(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF"), "not finite"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of the formats"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "cut WebP", "large", "bomb", "NaN", "format not allowed"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_sound_image_raises_one_line_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_rgb(data)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken TIFF tags
def test_damaged_files_raise_nothing_but_image_errors():
    rng = np.random.default_rng(0)
    whole = [encoded(picture(24, 20), name) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")]
    refused = 0
    for trial in range(700):
        data = bytearray(whole[trial % len(whole)])
        for place in rng.integers(0, min(len(data), 300), size=3):
            data[place] = rng.integers(256)
        try:
            decode_rgb(bytes(data))
        except ImageError:
            refused += 1
    assert refused > 100
