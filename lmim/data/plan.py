"""The order of samples: of one epoch of a data set, and of the endless stream that a run walks along.

Owns the map from a position of the stream to (epoch, sample id). The invariant: the map is a function of the seed and
of the shards' sizes alone, computed where it is looked at. So the order is the same for any number of ranks and loader
workers, a run's cursor is one number (the samples it has taken), and seeking to it replays nothing. Each sample of a
source comes once in each of its epochs.

Position p of a stream of one source is place p mod n of epoch p div n; batches run across the ends of epochs. Several
sources with weights take turns in a fixed pattern, each walking along its own endless stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from lmim.randomness import draw, fold, purpose

SHARD_ORDER, SAMPLE_ORDER, TURNS = purpose("shard order"), purpose("sample order"), purpose("source turns")
OPEN_BLOCKS = 2  # per lane, kept in memory
PERIOD = 1024  # positions in which the sources' turns have exactly the proportions of their weights
TAILS = ("carry", "drop", "repeat")
K = TypeVar("K")
V = TypeVar("V")


class Recent(OrderedDict[K, V], Generic[K, V]):
    """The values asked for last, at most `limit` of them; the others are made again when needed. Pickled empty."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def get_or_make(self, key: K, make: Callable[[K], V]) -> V:
        value = self.pop(key, None)  # in steps that threads may interleave
        value = make(key) if value is None else value
        self[key] = value
        if len(self) > self.limit:
            self.popitem(last=False)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)


def shuffled(key: int, use: int, numbers: np.ndarray) -> np.ndarray:
    """Return the numbers in the order of their hashes; equal hashes, about one pair in 90,000, keep their order."""
    return numbers[np.argsort(np.asarray(draw(key, use, numbers)), kind="stable")]


class EpochPlan:
    """The order of one source's samples in one epoch, computed where it is looked at.

    The shards are shuffled and cut into blocks of about `block_shards`, and the samples of each block are shuffled:
    near to a full permutation, while a reader has only one block's shards open at a time. With several `lanes` this
    sequence is cut into as many equal parts, which are read side by side, `lane_run` samples of each in turn: hosts
    that take their share of every batch from their own lanes read their own shards only. `starts` (shards + 1,) are
    the shards' first sample ids, and the end.
    """

    def __init__(self, starts: np.ndarray, *, seed: int, epoch: int, block_shards: int = 64, lanes: int = 1,
                 lane_run: int = 1):  # fmt: skip
        self.starts, self.seed, self.epoch, self.block_shards = starts, seed, epoch, block_shards
        self.lanes, self.lane_run = lanes, lane_run
        self.samples = int(starts[-1] - starts[0])
        self._lane_samples = self.samples // (lanes * lane_run) * lane_run
        self._key = fold(0, seed, epoch)
        number = len(starts) - 1
        self._shards = shuffled(self._key, SHARD_ORDER, np.arange(number))
        blocks = max(1, -(-number // block_shards))
        self._bounds = np.arange(blocks + 1) * number // blocks  # even: a last block of one shard would mix badly
        self._starts = np.concatenate([[0], np.cumsum(np.diff(starts)[self._shards])])[self._bounds]
        self._blocks: Recent[int, np.ndarray] = Recent(OPEN_BLOCKS * lanes)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Return the sample ids (int64) at places [start, stop) of the epoch; IndexError beyond its end."""
        sequence = self._sequence(start, stop)
        found = np.empty(len(sequence), np.int64)
        blocks = self._block_of(sequence)
        for block in dict.fromkeys(blocks.tolist()):
            here = blocks == block
            found[here] = self._blocks.get_or_make(block, self._block)[sequence[here] - self._starts[block]]
        return found

    def shards(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers of the shards in whose blocks places [start, stop) lie, in the order of the blocks."""
        blocks = dict.fromkeys(self._block_of(self._sequence(start, stop)).tolist())
        return np.concatenate([np.empty(0, np.int64), *(self._block_shards(block) for block in blocks)])

    def _sequence(self, start: int, stop: int) -> np.ndarray:
        """Return the places in the sequence of blocks of the places [start, stop) of the epoch."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"places [{start}, {stop}) are not in an epoch of {self.samples} samples")
        places = np.arange(start, stop)
        if self.lanes == 1:
            return places
        turn, rest = np.divmod(places, self.lanes * self.lane_run)
        lane, run = np.divmod(rest, self.lane_run)
        laned = lane * self._lane_samples + turn * self.lane_run + run
        return np.where(places < self.lanes * self._lane_samples, laned, places)  # what no whole turn is made of

    def _block_of(self, sequence: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, sequence, side="right") - 1

    def _block_shards(self, block: int) -> np.ndarray:
        return self._shards[self._bounds[block] : self._bounds[block + 1]]

    def _block(self, block: int) -> np.ndarray:
        ranges = [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in self._block_shards(block)]
        return shuffled(self._key, SAMPLE_ORDER, np.concatenate(ranges))


class _Walk:
    """One source's endless stream of epochs, of `length` positions each."""

    def __init__(self, starts: np.ndarray, first_shard: int, length: int, **plan: int):
        self.starts, self.first_shard, self.length, self._plan = starts, first_shard, length, plan
        self.samples = int(starts[-1] - starts[0])
        self.block_samples = self.samples * plan["lanes"] // max(1, -(-(len(starts) - 1) // plan["block_shards"]))
        self._plans: Recent[int, EpochPlan] = Recent(2)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, EpochPlan, int, int]]:
        """Return (epoch, its plan, first place, end) of the pieces of epochs that positions [start, stop) make."""
        pieces = []
        while start < stop:
            epoch, place = divmod(start, self.length)
            plan = self._plans.get_or_make(epoch, lambda epoch: EpochPlan(self.starts, epoch=epoch, **self._plan))
            place %= self.samples  # tail "repeat": the last batch is filled up from the epoch's beginning
            end = min(place + stop - start, self.samples, self.length - start % self.length + place)
            start += end - place
            pieces.append((epoch, plan, place, end))
        return pieces

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._pieces(start, stop)
        epochs = [np.full(end - place, epoch) for epoch, _, place, end in pieces]
        ids = [plan.ids(place, end) for _, plan, place, end in pieces]
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *epochs]), np.concatenate([empty, *ids])

    def shards(self, start: int, stop: int) -> list[int]:
        pieces = self._pieces(start, stop)
        return [self.first_shard + int(n) for _, plan, place, end in pieces for n in plan.shards(place, end)]


class Stream:
    """Maps positions of the endless stream of a run to (epoch, sample id).

    `starts` (shards + 1,) are the shards' first sample ids. `parts` are the first shards of the sources, which take
    turns in proportion to `weights`; without weights all shards are one source. `tail` says what becomes of the
    samples of an epoch that fill no whole batch: "carry", they go on in the next epoch's first batch; "drop"; "repeat",
    the batch is filled up from the same epoch's beginning. An epoch is one pass over `epoch_samples` positions.
    """

    def __init__(
        self, starts: np.ndarray, *, seed: int, global_batch: int, parts: Sequence[int] = (0,),
        weights: Sequence[float] = (), block_shards: int = 64, lanes: int = 1, tail: str = "carry",
    ):  # fmt: skip
        assert tail in TAILS and (tail == "carry" or not weights)
        total = int(starts[-1])
        whole = total // global_batch if tail == "drop" else -(-total // global_batch)
        self.epoch_samples = total if tail == "carry" else whole * global_batch
        self._turns = _turns(weights) if weights else np.array([PERIOD])
        bounds = [*parts, len(starts) - 1] if weights else [0, len(starts) - 1]
        self._seed_key = fold(0, seed)
        self._walks = []
        for turns, first, end in zip(self._turns.tolist(), bounds[:-1], bounds[1:], strict=True):
            part = starts[first : end + 1]
            length = int(part[-1] - part[0]) if weights else self.epoch_samples
            lane_run = max(1, round(global_batch * turns / PERIOD / lanes))
            plan = dict(seed=seed, block_shards=block_shards, lanes=lanes, lane_run=lane_run)
            self._walks.append(_Walk(part, first, length, **plan))
        self._patterns: Recent[int, tuple[np.ndarray, np.ndarray]] = Recent(4)

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epochs and the sample ids (int64) of positions [start, stop)."""
        if len(self._walks) == 1:
            return self._walks[0].at(start, stop)
        source, place = self._places(start, stop)
        epochs, ids = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        for number, walk in enumerate(self._walks):
            here = source == number
            if here.any():  # a source's positions in a row of the stream's are in a row, too
                epochs[here], ids[here] = walk.at(int(place[here][0]), int(place[here][-1]) + 1)
        return epochs, ids

    def shards(self, start: int, stop: int) -> list[int]:
        """Return the shards that positions [start, stop) lie in or that are shuffled together with those."""
        if len(self._walks) == 1:
            return self._walks[0].shards(start, stop)
        source, place = self._places(start, stop)
        ends = [(walk, place[source == number]) for number, walk in enumerate(self._walks)]
        return [shard for walk, here in ends if len(here) for shard in walk.shards(int(here[0]), int(here[-1]) + 1)]

    @property
    def block_samples(self) -> int:
        """Positions after which about all sources have gone on to their next blocks."""
        return max(walk.block_samples * PERIOD // int(turns)
                   for walk, turns in zip(self._walks, self._turns, strict=True))  # fmt: skip

    def _places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which source each position [start, stop) takes, and its position in that source's own stream."""
        sources, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for period in range(start // PERIOD, -(-stop // PERIOD)):
            source, rank = self._patterns.get_or_make(period, self._pattern)
            here = slice(max(start - period * PERIOD, 0), stop - period * PERIOD)
            sources.append(source[here])
            places.append(period * self._turns[source[here]] + rank[here])
        return np.concatenate(sources), np.concatenate(places)

    def _pattern(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (PERIOD,) whose turn each position of a period is, and how many turns that source had in it before."""
        order = shuffled(self._seed_key, TURNS, period * PERIOD + np.arange(PERIOD)) - period * PERIOD
        source = np.repeat(np.arange(len(self._turns)), self._turns)[order]
        rank = np.empty(PERIOD, np.int64)
        for number in range(len(self._turns)):
            rank[source == number] = np.arange(self._turns[number])
        return source, rank


def _turns(weights: Sequence[float]) -> np.ndarray:
    """Return how many of PERIOD turns each weight gets: at least one, the rest by largest remainders."""
    exact = np.asarray(weights, np.float64) / sum(weights) * (PERIOD - len(weights))
    turns = np.floor(exact).astype(np.int64)
    short = PERIOD - len(weights) - int(turns.sum())
    turns[np.argsort(turns - exact, kind="stable")[:short]] += 1
    return turns + 1
