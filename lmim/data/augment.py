"""Augmentations of fine-tuning, after the crop and the flip: RandAugment, random erasing, mixup and cutmix, all timm's.

timm draws from the random states of Python, NumPy and torch. The invariant: here those are seeded from the sample's
key, and left as they were, so that a draw is a function of (seed, epoch, sample id), whatever ranks and workers.

Images are mixed two by two, positions 2i and 2i + 1 of the stream, with a share of their own that follows from the key
of the first. A pair lies in one micro-batch, whose size is even, so what is mixed with what does not depend on how a
step is split. timm instead mixes the i-th of a micro-batch with the i-th from its end, with one share for all.

All of it works on uint8. Noise that is erased to is cut at black and white, and a mixture is rounded, as timm's own
loader does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import FastCollateMixup
from timm.data.random_erasing import RandomErasing

from lmim.options import FinetuneConfig
from lmim.patches import IMAGENET_MEAN, IMAGENET_STD
from lmim.randomness import draw, purpose

AUGMENT, MIX = purpose("augment"), purpose("mix")


class Augment:
    """What is done to the crops of a micro-batch, in place."""

    def __init__(self, options: FinetuneConfig, size: int):
        self.randaugment = self.erasing = self.mixing = None
        if options.randaugment:
            grey = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
            how = dict(translate_const=int(0.45 * size), img_mean=grey, interpolation=Image.Resampling.BICUBIC)
            self.randaugment = rand_augment_transform(options.randaugment, how)
        if options.erasing:
            self.erasing = RandomErasing(options.erasing, mode="pixel", device="cpu")
        if options.mixup or options.cutmix:
            # of two classes 0 and 1, the mixed label of an image of class 0 is its share
            self.mixing = FastCollateMixup(options.mixup, options.cutmix, label_smoothing=0.0, num_classes=2)

    def __call__(self, crops_BSSC: np.ndarray, keys_B: np.ndarray) -> np.ndarray:
        """Change the crops (uint8) by their keys, and return the share (B,) that each image has of its own label."""
        shares_B = np.ones(len(crops_BSSC), np.float32)
        with random_states_kept():
            for crop_SSC, key in zip(crops_BSSC, keys_B, strict=True):
                seed(draw(int(key), AUGMENT, 0))
                if self.randaugment:
                    crop_SSC[:] = self.randaugment(Image.fromarray(crop_SSC))
                if self.erasing:
                    _erase(crop_SSC, self.erasing)
            for first in range(0, len(crops_BSSC), 2) if self.mixing else ():
                seed(draw(int(keys_B[first]), MIX, 0))
                pair_2CSS = crops_BSSC[first : first + 2].transpose(0, 3, 1, 2)
                mixed, targets = self.mixing([(image, label) for label, image in enumerate(pair_2CSS)])
                pair_2CSS[:] = mixed.numpy()
                shares_B[first : first + 2] = float(targets[0, 0])
        return shares_B


def seed(word: int) -> None:
    """Seed the random states that timm draws from by 32 bits: Python's, NumPy's and torch's of the CPU."""
    random.seed(word)
    np.random.seed(word)
    torch.default_generator.manual_seed(word)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states of `seed` back at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _erase(crop_SSC: np.ndarray, erasing: RandomErasing) -> None:
    """Erase in a canvas without values, to see which pixels change and to what."""
    canvas_CSS = torch.full(crop_SSC.transpose(2, 0, 1).shape, torch.nan)
    noise_SSC = erasing(canvas_CSS).permute(1, 2, 0).numpy()
    rows, columns = np.nonzero(~np.isnan(noise_SSC[..., 0]))
    if len(rows):
        colours = 255 * (noise_SSC[rows, columns] * IMAGENET_STD + IMAGENET_MEAN)
        crop_SSC[rows, columns] = np.rint(colours).clip(0, 255).astype(np.uint8)
