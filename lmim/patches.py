"""Views: how an image becomes visible and masked patches with gaps (paper, section 3.3).

Owns the geometry of the cells, the gathering of patches out of them, and the draw of which cells are visible and where
in its cell each patch lies. The invariant: a draw is a function of the sample's key alone (see `randomness`).

Letters: B images · G grid side, N = G² cells · P patch side (px) · J gap (px) · V visible · M = N − V masked · K any
number of cells. The crop is S = G·(P+J) px. A flat patch orders its P·P·3 numbers as (row, column, channel).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lmim.randomness import draw, purpose

MASK, GAP_ROW, GAP_COL = purpose("mask"), purpose("gap_row"), purpose("gap_col")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision.transforms.v2, "ImageNet" weights' presets
IMAGENET_STD = (0.229, 0.224, 0.225)


class Views(NamedTuple):
    """What is drawn for a batch: cells are numbered row by row, offsets count px from their cell's upper left."""

    visible_BV: Tensor
    masked_BM: Tensor
    gap_row_BN: Tensor
    gap_col_BN: Tensor


def draw_views(keys_B: Tensor, *, grid_size: int, num_visible: int, patch_gap: int, gap_jitter: str) -> Views:
    """Draw the views of a batch from its samples' keys (int64), on whichever device those lie.

    One uniform permutation of the N cells per image: the first V are visible. Offsets are uniform and independent over
    {0 … J−1} for `gap_jitter` "released" (the authors' code) or {0 … J} for "full" (all that the cell allows).
    """
    cells_N = torch.arange(grid_size**2, device=keys_B.device)
    # All three in one go, as on a GPU a draw is some 140 small operations; filled there, not copied from the host.
    uses_311 = torch.stack([torch.full((1, 1), use, device=keys_B.device) for use in (MASK, GAP_ROW, GAP_COL)])
    words_BN, rows_BN, columns_BN = draw(keys_B[:, None], uses_311, cells_N)
    # Sorting words that end in the cell's number breaks ties the same way on every device.
    order_BN = (words_BN << 16 | cells_N).sort(dim=1).values & 0xFFFF
    choices = max(patch_gap, 1) if gap_jitter == "released" else patch_gap + 1
    return Views(order_BN[:, :num_visible], order_BN[:, num_visible:], rows_BN * choices >> 32,
                 columns_BN * choices >> 32)  # fmt: skip


def gather_patches(images_BCSS: Tensor, cells_BK: Tensor, views: Views, *, patch_size: int, patch_gap: int) -> Tensor:
    """Cut the patches of the given cells out of the crops, as one gather: (B, K, P·P·C), of the images' own type."""
    B, C, S, _ = images_BCSS.shape
    cell_side = patch_size + patch_gap
    grid = S // cell_side
    window_P = torch.arange(patch_size, device=cells_BK.device)
    top_BK = cells_BK // grid * cell_side + views.gap_row_BN.gather(1, cells_BK)
    left_BK = cells_BK % grid * cell_side + views.gap_col_BN.gather(1, cells_BK)
    rows_BKP = top_BK[..., None] + window_P
    cols_BKP = left_BK[..., None] + window_P
    pixel_BKPP = rows_BKP[..., :, None] * S + cols_BKP[..., None, :]
    image_B = torch.arange(B, device=cells_BK.device) * S * S
    flat = images_BCSS.permute(0, 2, 3, 1).reshape(B * S * S, C)  # free for channels-last batches, as the loader's are
    return flat[pixel_BKPP + image_B[:, None, None, None]].flatten(2)


def tile_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images whose sides are multiples of P into patches without gaps: (B, H/P · W/P, P·P·C), row by row."""
    B, C, H, W = images_BCHW.shape
    P = patch_size
    tiles = images_BCHW.reshape(B, C, H // P, P, W // P, P)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)


def join_patches(patches_BNC: Tensor, patch_size: int, rows: int) -> Tensor:
    """Undo `tile_patches`, given how many rows of patches there are: (B, C, H, W)."""
    B, N, numbers = patches_BNC.shape
    P, C = patch_size, numbers // patch_size**2
    tiles = patches_BNC.reshape(B, rows, N // rows, P, P, C)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * P, N // rows * P)


@functools.cache
def imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation on the scale of bytes, made once per device: a copy in every step would wait for it."""
    return torch.tensor(IMAGENET_MEAN, device=device) * 255, torch.tensor(IMAGENET_STD, device=device) * 255


def normalize_patches(patches: Tensor, scale: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Turn uint8 patches (…, P·P·3) into floats with mean and deviation taken off, ImageNet's; pass floats through.

    `scale` is `imagenet(device)`, given by who cannot have it looked up, such as a compiled graph.
    """
    if patches.dtype != torch.uint8:
        return patches
    mean, std = scale or imagenet(patches.device)
    return ((patches.unflatten(-1, (-1, 3)) - mean) / std).flatten(-2)


def normalize_images(images_BCHW: Tensor) -> Tensor:
    """Turn uint8 images into floats with ImageNet's mean and deviation taken off."""
    mean, std = imagenet(images_BCHW.device)
    return (images_BCHW - mean[:, None, None]) / std[:, None, None]
