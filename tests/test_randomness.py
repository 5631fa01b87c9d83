"""The hash: one function for Python, NumPy and torch, on any device, and random enough."""

import itertools
import zlib

import numpy as np
import pytest
import torch
from scipy import stats

from lmim.randomness import draw, fold, mix32, purpose, sample_key, uniform

EDGES = [0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
WORDS = [*EDGES, 2**32, 2**32 + 1, 1_281_166, 2**40 + 12345, 2**62 + 7]


def lowbias32(x: int) -> int:
    """hash-prospector's lowbias32 as published, in wrapping 32-bit arithmetic."""
    x = np.array([x], dtype=np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return int(x[0])


def folded(key: int, *words: int) -> int:
    """`fold` from its description: mix the key, then in turn every word's low half (plus a constant) and high half."""
    key = lowbias32(key)
    for word in words:
        key = lowbias32(key ^ lowbias32((word + 0x9E3779B9) % 2**32))
        key = lowbias32(key ^ (word >> 32))
    return key


def test_mixer_is_lowbias32():
    values = EDGES + np.random.default_rng(0).integers(0, 2**32, 500).tolist()
    assert [mix32(v) for v in values] == [lowbias32(v) for v in values]


def test_mixer_is_one_to_one():
    values = np.arange(1 << 20, dtype=np.int64) * 4096 % 2**32 + np.arange(1 << 20) % 4096
    assert len(np.unique(mix32(values))) == len(np.unique(values))


def test_python_numpy_and_torch_agree():
    seeds, keys = [0, 1, 2**32 - 1, 2**40], WORDS
    for seed, use, counter in itertools.product(seeds, [purpose("mask"), 0], [0, 195, 2**33]):
        plain = [draw(sample_key(seed, 799, k), use, counter) for k in keys]
        expected = [folded(folded(0, seed, 799, k), use, counter) for k in keys]
        in_numpy = draw(sample_key(seed, 799, np.array(keys)), use, counter)
        in_torch = draw(sample_key(seed, 799, torch.tensor(keys)), use, counter)
        assert plain == expected
        assert in_numpy.dtype == np.int64 and in_numpy.tolist() == expected
        assert in_torch.dtype == torch.int64 and in_torch.tolist() == expected


def test_uniform_is_a_double_with_all_32_bits():
    keys = np.arange(1000)
    in_numpy, in_torch = uniform(keys, 5, 7), uniform(torch.from_numpy(keys), 5, 7)
    assert in_torch.dtype == torch.float64 and in_numpy.dtype == np.float64
    assert in_numpy.tolist() == in_torch.tolist() == [uniform(int(k), 5, 7) for k in keys]
    assert all(value * 2**32 == draw(int(k), 5, 7) for k, value in zip(keys, in_numpy, strict=True))
    assert in_numpy.min() >= 0 and in_numpy.max() < 1


def test_purposes_are_named_by_crc32_and_all_different():
    names = ["mask", "gap_row", "gap_col", "crop", "flip", *(f"drop_path encoder {i} attn" for i in range(32))]
    assert len({purpose(name) for name in names}) == len(names)
    assert purpose("mask") == zlib.crc32(b"mask")


@pytest.mark.parametrize("over", ["samples", "counters", "epochs", "seeds"])
def test_draws_are_uniform_along_every_argument(over):
    n = np.arange(100_000)
    values = {
        "samples": lambda: uniform(sample_key(3, 5, n), purpose("crop"), 0),
        "counters": lambda: uniform(sample_key(3, 5, 17), purpose("crop"), n),
        "epochs": lambda: uniform(fold(n * 0, 3, n, 17), purpose("crop"), 0),
        "seeds": lambda: uniform(fold(n * 0, n, 5, 17), purpose("crop"), 0),
    }[over]()
    for bins in (7, 256):
        counts = np.bincount((values * bins).astype(int), minlength=bins)
        assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4


PAIRS = {
    "purposes": lambda n: (
        uniform(sample_key(0, 0, n), purpose("gap_row"), 0),
        uniform(sample_key(0, 0, n), purpose("gap_col"), 0),
    ),
    "epochs": lambda n: (uniform(sample_key(0, 0, n), 1, 0), uniform(sample_key(0, 1, n), 1, 0)),
    "seeds": lambda n: (uniform(sample_key(0, 0, n), 1, 0), uniform(sample_key(1, 0, n), 1, 0)),
    "neighbours": lambda n: (uniform(sample_key(0, 0, n), 1, 0), uniform(sample_key(0, 0, n + 1), 1, 0)),
    "counters": lambda n: (uniform(sample_key(0, 0, n), 1, 0), uniform(sample_key(0, 0, n), 1, 1)),
    "epoch as sample": lambda n: (uniform(fold(n * 0, 0, n, 1), 1, 0), uniform(fold(n * 0, 0, 1, n), 1, 0)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_draws_are_independent_across(pair):
    first, second = PAIRS[pair](np.arange(100_000))
    table = np.zeros((16, 16))
    np.add.at(table, ((first * 16).astype(int), (second * 16).astype(int)), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_what_the_cpu_draws():
    ids = torch.cat([torch.tensor(WORDS), torch.arange(100_000)])
    counters = torch.arange(9)
    on_cpu = draw(sample_key(7, 3, ids)[:, None], purpose("mask"), counters)
    on_gpu = draw(sample_key(7, 3, ids.cuda())[:, None], purpose("mask"), counters.cuda())
    assert torch.equal(on_cpu, on_gpu.cpu())
    assert torch.equal(uniform(ids, 1, 2), uniform(ids.cuda(), 1, 2).cpu())
