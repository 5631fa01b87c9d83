"""Decoding and views: pixels against torchvision's own transforms, by hand for every mode; broken files."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from lmim.data.transforms import (
    DECODERS,
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
def test_pillow_views_equal_torchvision_resized_crop(width, height):
    image = picture(width, height)
    flips = 0
    for key in range(20):
        expected = torchvision_view(image, 35, key)
        data = encoded(image)
        np.testing.assert_array_equal(train_view(data, 35, SCALE, RATIO, False, key, decoder="pillow"), expected)
        flipped = train_view(data, 35, SCALE, RATIO, True, key, decoder="pillow")
        flips += not np.array_equal(flipped, expected)
        assert np.array_equal(flipped, expected) or np.array_equal(flipped, expected[:, ::-1])
    assert 0 < flips < 20


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("resize, crop", [(40, 35), (35, 35), (37, 32), (30, 35), (17, 64)])
def test_eval_view_equals_torchvision(width, height, resize, crop):
    image = picture(width, height)
    expected = tv.Compose([tv.Resize(resize, InterpolationMode.BICUBIC), tv.CenterCrop(crop)])(image)
    np.testing.assert_array_equal(eval_view(encoded(image), resize, crop), np.asarray(expected))


ENCODINGS = {
    "JPEG 4:2:0": lambda image: encoded(image, "JPEG", quality=94, subsampling="4:2:0"),
    "JPEG 4:2:2": lambda image: encoded(image, "JPEG", quality=94, subsampling="4:2:2"),
    "JPEG 4:4:4": lambda image: encoded(image, "JPEG", quality=94, subsampling="4:4:4"),
    "JPEG stored as RGB": lambda image: encoded(image, "JPEG", quality=94, keep_rgb=True),
    "JPEG grey": lambda image: encoded(image.convert("L"), "JPEG", quality=94),
    "JPEG progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "JPEG with restarts": lambda image: encoded(image, "JPEG", restart_marker_blocks=2),
    "JPEG CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=94),
    "JPEG on its side": lambda image: encoded(image, "JPEG", exif=on_its_side()),
    "PNG": encoded,
    "PNG grey": lambda image: encoded(image.convert("L")),
    "PNG palette": lambda image: encoded(image.quantize(32)),
    "WebP": lambda image: encoded(image, "WEBP", quality=90),
}


def on_its_side() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def smooth(width: int, height: int) -> Image.Image:
    """Waves of several lengths in each channel and a hard edge, as photos have them."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + c) + np.cos(y / (5 + c)) + np.sin((x + 2 * y) / 40) for c in range(3)]
    pixels = np.stack(waves, axis=-1) * 40 + 128
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 60)
    return Image.fromarray(pixels.astype(np.uint8))


def stripes(width: int, height: int) -> Image.Image:
    """Lines three px apart: the worst that was found for the order of passes and for scaled decoding."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, ::3] = 255
    pixels[::5] = 128
    return Image.fromarray(pixels)


def torchvision_view(image: Image.Image, size: int, key: int) -> np.ndarray:
    top, left, h, w = random_resized_crop_box(*image.size, SCALE, RATIO, key)
    view = tvf.resized_crop(image.convert("RGB"), top, left, h, w, [size, size], InterpolationMode.BICUBIC)
    return np.asarray(view).astype(np.int64)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_turbo_views_lie_within_two_grey_levels_of_torchvision(encoding):
    sizes = [*SIZES, (1, 40), (40, 1), (17, 31), (5, 7), (1, 1)]
    sources = [(make(w, h), size) for make in (smooth, picture, stripes) for w, h in sizes for size in (64, 35)]
    for source, size in [*sources, (smooth(500, 375), 280), (stripes(500, 375), 280), (picture(900, 700), 120)]:
        data = ENCODINGS[encoding](source)
        for key in range(3):
            difference = np.abs(train_view(data, size, SCALE, RATIO, False, key, decoder="turbo")
                                - torchvision_view(Image.open(io.BytesIO(data)), size, key))  # fmt: skip
            assert difference.max() <= 2 and difference.mean() < 0.05, (source.size, size, key)


@pytest.mark.parametrize("encoding", ["JPEG 4:2:0", "JPEG grey", "JPEG CMYK", "WebP"])
def test_turbo_flips_what_pillow_flips(encoding):
    data = ENCODINGS[encoding](smooth(90, 70))
    for key in range(12):
        views = [train_view(data, 35, SCALE, RATIO, True, key, decoder=name).astype(np.int64) for name in DECODERS]
        assert np.abs(views[0] - views[1]).max() <= 2


@pytest.mark.parametrize("encoding", ["JPEG 4:2:0", "JPEG 4:4:4", "JPEG grey", "JPEG progressive"])
@pytest.mark.parametrize("make", [smooth, picture, stripes])
@pytest.mark.parametrize("width, height, size, factor", [(1501, 1103, 64, 2), (1501, 1103, 64, 4), (3000, 2000, 64, 8)])
def test_scaled_decoding_lies_within_two_grey_levels(encoding, make, width, height, size, factor, monkeypatch):
    data = ENCODINGS[encoding](make(width, height))
    image = Image.open(io.BytesIO(data))
    image.load()
    shapes = []
    decode = simplejpeg.decode_jpeg

    def recorded(*args, **options):
        shapes.append((pixels := decode(*args, **options)).shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorded)
    found = 0
    for key in range(40):
        view = train_view(data, size, SCALE, RATIO, False, key, decoder="turbo")
        if shapes[-1][:2] == (-(-height // factor), -(-width // factor)):
            assert np.abs(view - torchvision_view(image, size, key)).mean() < 2, key
            found += 1
            if found == 3:
                return
    raise AssertionError(f"{found} crops were decoded at 1/{factor}")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoding", ["JPEG 4:2:0", "JPEG grey", "JPEG CMYK", "PNG"])
def test_views_are_written_into_their_slot_of_the_batch(decoder, encoding):
    data = ENCODINGS[encoding](smooth(90, 70))
    for key in range(6):  # some are mirrored
        batch = np.full((3, 24, 24, 3), 77, np.uint8)
        view = train_view(data, 24, SCALE, RATIO, True, key, decoder=decoder, out=batch[1])
        assert np.shares_memory(view, batch)
        np.testing.assert_array_equal(batch[1], train_view(data, 24, SCALE, RATIO, True, key, decoder=decoder))
        assert (batch[0] == 77).all() and (batch[2] == 77).all()


@pytest.mark.parametrize(
    "width, height, key, box",
    [
        (500, 375, 0, (97, 74, 223, 293)),
        (500, 375, 1, (21, 60, 349, 304)),
        (28, 28, 12345, (4, 2, 19, 22)),
        (60, 400, 4294967295, (160, 0, 80, 60)),
        (3000, 2000, 987654321, (461, 1413, 1522, 1477)),
    ],
)
def test_crop_boxes_of_a_key_never_change(width, height, key, box):
    assert random_resized_crop_box(width, height, SCALE, RATIO, key) == box


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
    data = encoded(image)
    views = [train_view(data, 8, SCALE, RATIO, True, key, decoder="turbo") for key in range(2000)]
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
    with pytest.raises(ImageError) as caught:
        train_view(data, 8, SCALE, RATIO, True, 0, decoder="turbo")
    assert "\n" not in str(caught.value)


def test_a_jpeg_beyond_the_pixel_limit_is_refused_by_its_header():
    data = bytearray(encoded(picture(60, 50), "JPEG"))
    place = data.index(bytes.fromhex("ffc0")) + 5  # the frame's height, then its width
    data[place : place + 4] = struct.pack(">HH", 30_000, 30_000)
    for decoder in DECODERS:
        with pytest.raises(ImageError, match=r"30000 x 30000 px|decompression bomb"):
            train_view(bytes(data), 8, SCALE, RATIO, True, 0, decoder=decoder)


FUZZED = ["JPEG 4:2:0", "JPEG grey", "JPEG progressive", "JPEG CMYK", "JPEG on its side", "JPEG with restarts", "PNG",
          "PNG palette", "WebP"]  # fmt: skip
FILES = [ENCODINGS[name](picture(24, 20)) for name in FUZZED]
FILES += [encoded(picture(24, 20), name) for name in ("BMP", "TIFF", "GIF", "PPM")]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken TIFF tags
@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_files_raise_nothing_but_image_errors(decoder):
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(200 * len(FILES)):
        data = bytearray(FILES[trial % len(FILES)])
        for place in rng.integers(0, min(len(data), (300, 10_000)[trial % 2]), size=3):
            data[place] = rng.integers(256)
        try:
            train_view(bytes(data), 16, SCALE, RATIO, True, trial, decoder=decoder)
        except ImageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 500


@settings(max_examples=300, deadline=None)
@given(head=st.sampled_from(FILES), cut=st.integers(0, 5000), tail=st.binary(max_size=64))
@pytest.mark.filterwarnings("ignore")
def test_cut_files_with_a_strange_tail_raise_nothing_but_image_errors(head, cut, tail):
    for decoder in DECODERS:
        with suppress(ImageError):
            view = train_view(head[:cut] + tail, 16, SCALE, RATIO, True, 0, decoder=decoder)
            assert view.shape == (16, 16, 3) and view.dtype == np.uint8


@pytest.mark.parametrize("encoding", ["JPEG 4:2:0", "JPEG grey", "JPEG progressive", "JPEG with restarts"])
def test_turbo_refuses_every_cut_jpeg(encoding):
    data = ENCODINGS[encoding](picture(64, 48))
    for length in range(0, len(data) - 2, max(len(data) // 97, 1)):
        with pytest.raises(ImageError):
            train_view(data[:length], 16, SCALE, RATIO, True, 0, decoder="turbo")


def test_turbo_refuses_corrupt_scans_that_pillow_guesses_at():
    data = ENCODINGS["JPEG 4:2:0"](picture(64, 48))
    middle = len(data) // 2
    corrupt = data[:middle] + data[middle + 40 :]
    decode_rgb(corrupt)
    with pytest.raises(ImageError, match="Corrupt JPEG data"):
        train_view(corrupt, 16, SCALE, RATIO, True, 0, decoder="turbo")
