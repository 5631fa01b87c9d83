"""Segmentation without supervision: hierarchical clusters of one image's patch tokens (paper, figure 4).

Owns the tokens' view (twice the training grid, as the paper's 448 px for a 224 px model), the clustering, and the two
maps that show tokens as they are: principal components as colours, and t-SNE. The invariant: the same tokens give the
same labels, coordinates and colours on any rank; a tree cut into more clusters keeps the numbers it had.

Letters: n tokens · D encoder width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmim.patches import normalize_images
from lmim.vit import VisionTransformer

MAX_POINTS = 20_000  # of a tree: their distances take 1.6 GB, and scipy copies them
TSNE_POINTS = 1600  # of larger grids some, evenly spread, are drawn: t-SNE of 3136 takes a minute of one core
TSNE_PERPLEXITY = 30
COLOUR_RANGE = (2, 98)  # percentiles of a principal component that become 0 and 1


@torch.no_grad()
def patch_tokens(encoder: VisionTransformer, images: Tensor, scale: int = 2, layer: int = -1) -> Tensor:
    """Return the patch tokens (B, rows, cols, D) after a block, without norm, of uint8 images enlarged `scale` times.

    `layer` is the block's number, counted from 0, or from the last as -1.
    """
    enlarged = images.float()
    if scale != 1:
        enlarged = torch.nn.functional.interpolate(enlarged, scale_factor=scale, mode="bicubic").clamp(0, 255)
    rows, cols = (side // encoder.patch_size for side in enlarged.shape[2:])
    tokens_BTD = encoder.forward_intermediates(normalize_images(enlarged), [layer])[0]
    return tokens_BTD[:, 1:].unflatten(1, (rows, cols)).float()


def ward_clusters(tokens: Tensor, counts: list[int]) -> list[np.ndarray]:
    """Cut the Ward tree of one image's tokens (rows, cols, D) into each number of clusters: maps of labels from 0."""
    rows, cols, dim = tokens.shape
    labels = tree_clusters(tokens.reshape(rows * cols, dim).cpu().numpy(), counts, "ward")
    return [found.reshape(rows, cols) for found in labels]


def tree_clusters(points: np.ndarray, counts: list[int], linkage: str) -> list[np.ndarray]:
    """Cut the tree of points (n, D) into each number of clusters: labels (n,) from 0, in the order of `counts`.

    `linkage` is "ward" or "average", of Euclidean distances, as scipy's. Cuts of one tree are nested: in the first the
    largest cluster is 0, and of a cluster that is split the largest part keeps its label. There are fewer clusters
    where points are fewer or alike.
    """
    from scipy.cluster.hierarchy import fcluster
    from scipy.cluster.hierarchy import linkage as merge

    if len(points) < 2:
        return [np.zeros(len(points), np.int64) for _ in counts]
    tree = merge(points.astype(np.float64), method=linkage)
    cuts, before = {}, np.zeros(len(points), np.int64)
    for count in sorted(set(counts)):
        before = cuts[count] = _keep_numbers(before, fcluster(tree, count, criterion="maxclust"))
    return [cuts[count] for count in counts]


def _keep_numbers(before: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Number the clusters of a finer cut: the largest part of each former cluster as that, the others from there on."""
    parts, sizes = np.unique(labels, return_counts=True)
    parent = {part: int(before[labels == part][0]) for part in parts}
    taken, unused = {}, int(before.max()) + 1
    for part in parts[np.argsort(-sizes, kind="stable")]:
        if parent[part] not in taken.values():
            taken[part] = parent[part]
        else:
            taken[part], unused = unused, unused + 1
    return np.array([taken[part] for part in parts])[np.searchsorted(parts, labels)]


def explained_share(points: np.ndarray, labels: np.ndarray) -> float:
    """Return the share (0 to 1) of the points' (n, D) variance that lies between clusters."""
    total = ((points - points.mean(axis=0)) ** 2).sum()
    means = np.stack([points[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    within = ((points - means[labels]) ** 2).sum()
    return float(1 - within / total) if total else 1.0


def principal_colours(tokens: np.ndarray) -> np.ndarray:
    """Return the first three principal components of tokens (rows, cols, D) as colours (rows, cols, 3) from 0 to 1."""
    rows, cols, dim = tokens.shape
    points = tokens.reshape(rows * cols, dim).astype(np.float64)
    points = points - points.mean(axis=0)
    axes = np.linalg.eigh(points.T @ points)[1][:, ::-1][:, :3]
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0) < 0, -1, 1)
    components = points @ axes
    low, high = np.percentile(components, COLOUR_RANGE, axis=0)
    return ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1).reshape(rows, cols, 3)


def tsne_points(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return t-SNE coordinates (m, 2) of tokens (n, D), and which of them these are (m,): some, where n is large."""
    from sklearn.manifold import TSNE

    chosen = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), TSNE_POINTS)).round().astype(np.int64))
    perplexity = min(TSNE_PERPLEXITY, (len(chosen) - 1) / 3)
    if perplexity <= 0:
        return np.zeros((len(chosen), 2)), chosen
    embed = TSNE(perplexity=perplexity, init="pca" if len(chosen) > 2 else "random", random_state=0, n_jobs=1)
    return embed.fit_transform(tokens[chosen]), chosen
