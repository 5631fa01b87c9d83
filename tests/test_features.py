"""Files as an encoder takes them: torchvision's own transforms, and the features of the evaluations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

import lmim
from lmim.data.transforms import ImageError
from tests.conftest import REPOSITORY


@pytest.fixture
def photos(tmp_path):
    """Write smooth pictures of several shapes and modes; return their paths."""
    paths = []
    for number, (size, mode) in enumerate([((90, 60), "RGB"), ((50, 130), "L"), ((64, 64), "RGBA")]):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def encoder():
    config = lmim.load_config(REPOSITORY / "configs" / "quickstart.yaml")
    encoder = lmim.LatentMIM(config.model, config.objective).online
    encoder.init_weights(0)
    return encoder.eval()


@pytest.mark.parametrize("size", [None, 56])
def test_files_come_as_torchvision_makes_them(photos, encoder, size):
    crop = size or 28
    resize = tv.Resize(round(crop * 256 / 224), tv.InterpolationMode.BICUBIC)
    scale = tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    theirs = tv.Compose(
        [tv.Lambda(lambda image: image.convert("RGB")), resize, tv.CenterCrop(crop), tv.ToTensor(), scale]
    )
    expected = torch.stack([theirs(Image.open(path)) for path in photos])
    images = lmim.load_images(photos, encoder, size)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert encoder.forward_features(images).shape == (3, 1 + (crop // 4) ** 2, 128)


def test_what_is_no_image_is_named(photos, encoder, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=str(broken)):
        lmim.load_images([*photos, broken], encoder)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        lmim.load_images([str(tmp_path / "gone.jpg")], encoder)
    with pytest.raises(ValueError, match=r"size \(30\).*patch side \(4 px\)"):
        lmim.load_images(photos, encoder, 30)
