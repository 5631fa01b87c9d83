"""Random numbers as a function of integers, not as a state.

Owns the one counter-based hash from which everything random about a sample follows: its place in the epoch, its crop
and flip, its gap offsets and its mask. The invariant: a number depends on (seed, epoch, sample id, purpose, counter)
alone, so a run draws the same ones on any number of ranks and loader workers, on CPU and GPU, before and after a
resume, and no random state needs saving.

The functions take Python integers, NumPy int64 arrays or torch int64 tensors alike and return the same kind. No
product leaves 63 bits, so nothing relies on how a library treats integer overflow.

The mixer is lowbias32 of C. Wellons' hash-prospector (public domain), a bijection of 32 bits with an avalanche bias of
0.17: <https://github.com/skeeto/hash-prospector>.
"""

from __future__ import annotations

import zlib
from typing import TypeVar

MASK32 = 0xFFFFFFFF
T = TypeVar("T")  # int | numpy.ndarray | torch.Tensor, all holding integers in [0, 2**63)


def purpose(name: str) -> int:
    """Return the 32-bit word that stands for a named use ('crop', 'mask', ...), so that uses never share draws."""
    return zlib.crc32(name.encode())


def _multiply32(x: T, factor: int) -> T:
    """Return x * factor modulo 2**32 for x in [0, 2**32), with every intermediate value below 2**49."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * (factor & 0xFFFF) & 0xFFFF
    return (low + (high << 16)) & MASK32


def mix32(x: T) -> T:
    """Return a well-mixed bijection of x, for x in [0, 2**32)."""
    if type(x) is int:  # no overflow to avoid: 2.5 times as fast, and a crop takes some 30 of these
        x = (x ^ (x >> 16)) * 0x7FEB352D & MASK32
        x = (x ^ (x >> 15)) * 0x846CA68B & MASK32
        return x ^ (x >> 16)
    x = x ^ (x >> 16)
    x = _multiply32(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply32(x, 0x846CA68B)
    return x ^ (x >> 16)


def fold(key: T, *words: T) -> T:
    """Return the 32-bit key that follows from `key` and each of `words` in turn (non-negative, below 2**63)."""
    key = mix32(key & MASK32)
    for word in words:
        key = mix32(key ^ mix32((word + 0x9E3779B9) & MASK32))
        key = mix32(key ^ (word >> 32))
    return key


def sample_key(seed: int, epoch: int, sample_ids: T) -> T:
    """Return the 32-bit key of every sample in an epoch; all its draws follow from it through `draw`."""
    return fold(sample_ids ^ sample_ids, seed, epoch, sample_ids)


def draw(key: T, use: int, counter: T) -> T:
    """Return the 32-bit word number `counter` of the stream that `key` has for `use` (see `purpose`)."""
    return fold(key, use, counter)


def uniform(key: T, use: int, counter: T) -> T:
    """Return a float in [0, 1) with 32 random bits: a double for Python and NumPy, a float64 tensor for torch."""
    word = draw(key, use, counter)
    if hasattr(word, "double"):  # torch: int64 / int would give the default dtype, which may hold 24 bits only
        word = word.double()
    return word / 4294967296.0
