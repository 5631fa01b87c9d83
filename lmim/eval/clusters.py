"""Segmentation without supervision: hierarchical clusters of one image's patch tokens (paper, figure 4).

Owns the tokens' view (twice the training grid, as the paper's 448 px for a 224 px model) and Ward clustering.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmim.patches import normalize_images
from lmim.vit import VisionTransformer


@torch.no_grad()
def patch_tokens(encoder: VisionTransformer, images: Tensor, scale: int = 2) -> Tensor:
    """Return the patch tokens (B, rows, cols, D) before the last norm of uint8 images enlarged `scale` times."""
    enlarged = torch.nn.functional.interpolate(images.float(), scale_factor=scale, mode="bicubic").clamp(0, 255)
    rows, cols = (side // encoder.patch_size for side in enlarged.shape[2:])
    tokens_BTD = encoder.forward_intermediates(normalize_images(enlarged), 1)[0]
    return tokens_BTD[:, 1:].unflatten(1, (rows, cols)).float()


def ward_clusters(tokens: Tensor, counts: list[int]) -> list[np.ndarray]:
    """Cut the Ward tree of one image's tokens (rows, cols, D) into each number of clusters: maps of labels from 0."""
    from scipy.cluster.hierarchy import fcluster, ward

    rows, cols, dim = tokens.shape
    tree = ward(tokens.reshape(rows * cols, dim).cpu().numpy())
    return [fcluster(tree, count, criterion="maxclust").reshape(rows, cols) - 1 for count in counts]
