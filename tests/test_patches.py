"""Views: patches cut where the spec says, drawn evenly, from the sample's key alone."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as tv

from lmim.patches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Views,
    draw_views,
    gather_patches,
    join_patches,
    normalize_images,
    normalize_patches,
    tile_patches,
)

G, P, J = 5, 3, 2
GEOMETRY = dict(patch_size=P, patch_gap=J)


def images(count: int, side: int, dtype=torch.uint8) -> torch.Tensor:
    drawn = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype)


def views(count: int, *, grid=G, visible=6, gap=J, jitter="released", first=0) -> Views:
    return draw_views(
        torch.arange(first, first + count) * 7919, grid_size=grid, num_visible=visible, patch_gap=gap, gap_jitter=jitter
    )


def cut_by_loops(batch: np.ndarray, cells: np.ndarray, drawn: Views, patch: int, gap: int) -> np.ndarray:
    """(B, K, P·P·3): pixel by pixel, in the order row, column, channel."""
    grid = batch.shape[2] // (patch + gap)
    out = np.zeros((*cells.shape, patch * patch * 3), batch.dtype)
    for b in range(cells.shape[0]):
        for k, cell in enumerate(cells[b]):
            top = cell // grid * (patch + gap) + int(drawn.gap_row_BN[b, cell])
            left = cell % grid * (patch + gap) + int(drawn.gap_col_BN[b, cell])
            numbers = [batch[b, c, top + i, left + j] for i in range(patch) for j in range(patch) for c in range(3)]
            out[b, k] = numbers
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("jitter", ["released", "full"])
def test_patches_are_what_loops_cut(jitter, memory, dtype):
    batch, drawn = images(3, G * (P + J), dtype).contiguous(memory_format=memory), views(3, jitter=jitter)
    for cells in (drawn.visible_BV, drawn.masked_BM):
        cut = gather_patches(batch, cells, drawn, **GEOMETRY)
        assert cut.dtype == dtype
        np.testing.assert_array_equal(cut.numpy(), cut_by_loops(batch.numpy(), cells.numpy(), drawn, P, J))


def test_without_a_gap_the_patches_tile_the_image():
    batch, drawn = images(2, G * P), views(2, gap=0)
    cells = torch.arange(G * G).expand(2, -1)
    cut = gather_patches(batch, cells, drawn, patch_size=P, patch_gap=0)
    np.testing.assert_array_equal(cut.numpy(), cut_by_loops(batch.numpy(), cells.numpy(), drawn, P, 0))
    assert torch.equal(cut, tile_patches(batch, P))


def test_tiles_join_to_the_image_also_where_it_is_not_square():
    batch = torch.randn(2, 3, 3 * P, 5 * P)
    tiles = tile_patches(batch, P)
    assert tiles.shape == (2, 15, P * P * 3)
    assert torch.equal(join_patches(tiles, P, rows=3), batch)
    second_row_third_column = batch[1, :, P : 2 * P, 2 * P : 3 * P].permute(1, 2, 0).flatten()
    assert torch.equal(tiles[1, 5 + 2], second_row_third_column)


@pytest.mark.parametrize(("jitter", "choices"), [("released", [0, 1, 2, 3]), ("full", [0, 1, 2, 3, 4])])
def test_offsets_cover_their_range_evenly_and_independently(jitter, choices):
    drawn = views(2000, gap=4, jitter=jitter)
    rows, cols = drawn.gap_row_BN.numpy().ravel(), drawn.gap_col_BN.numpy().ravel()
    for offsets in (rows, cols):
        assert np.unique(offsets).tolist() == choices
        assert stats.chisquare(np.bincount(offsets)).pvalue > 1e-4
    table = np.zeros((len(choices), len(choices)))
    np.add.at(table, (rows, cols), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(("gap", "jitter"), [(0, "released"), (0, "full"), (1, "released")])
def test_offsets_are_zero_where_there_is_no_choice(gap, jitter):
    drawn = views(50, gap=gap, jitter=jitter)
    assert drawn.gap_row_BN.sum() == drawn.gap_col_BN.sum() == 0


def test_visible_and_masked_cells_are_one_permutation():
    drawn = views(200, grid=14, visible=20)
    assert drawn.visible_BV.shape == (200, 20) and drawn.masked_BM.shape == (200, 176)
    cells = torch.cat([drawn.visible_BV, drawn.masked_BM], 1)
    assert torch.equal(cells.sort(1).values, torch.arange(196).expand(200, -1))
    assert len(np.unique(cells.numpy(), axis=0)) == 200


def test_every_cell_is_equally_often_visible():
    B, N, V = 20_000, G * G, 6
    drawn = views(B, visible=V)
    counts, p = np.bincount(drawn.visible_BV.numpy().ravel(), minlength=N), V / N
    # V draws without replacement an image: the counts' covariance is B·p(1−p)·N/(N−1) times the centring matrix
    statistic = ((counts - B * p) ** 2).sum() / (B * p * (1 - p) * N / (N - 1))
    assert 1e-4 < stats.chi2.sf(statistic, N - 1) < 1 - 1e-4
    for place in (0, V - 1):
        assert stats.chisquare(np.bincount(drawn.visible_BV[:, place].numpy(), minlength=N)).pvalue > 1e-4


def test_views_depend_on_the_samples_key_alone():
    whole, part = views(12), views(5, first=4)
    for all_of_them, some in zip(whole, part, strict=True):
        assert torch.equal(all_of_them[4:9], some)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, views(12), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_the_views_of_the_cpu():
    keys = torch.arange(500) * 104729
    options = dict(grid_size=14, num_visible=20, patch_gap=4, gap_jitter="released")
    for here, there in zip(draw_views(keys, **options), draw_views(keys.cuda(), **options), strict=True):
        assert torch.equal(here, there.cpu())


def test_normalisation_is_torchvisions():
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406) and IMAGENET_STD == (0.229, 0.224, 0.225)
    batch, drawn = images(2, G * (P + J)), views(2)
    expected = tv.normalize(tv.to_dtype(batch, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(normalize_images(batch), expected, rtol=1e-5, atol=1e-5)
    ours = normalize_patches(gather_patches(batch, drawn.masked_BM, drawn, **GEOMETRY))
    theirs = cut_by_loops(expected.numpy(), drawn.masked_BM.numpy(), drawn, P, J)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_floats_count_as_normalised():
    patches = torch.randn(2, 3, P * P * 3)
    assert torch.equal(normalize_patches(patches), patches)
