"""The order of samples: every sample once an epoch, however it is cut, mixed as a full permutation would be."""

from __future__ import annotations

import base64
import itertools
import json
import sys
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from lmim.data.datasets import Source, SourceImage
from lmim.data.loader import open_shards, open_stream
from lmim.data.plan import PERIOD, EpochPlan, Recent, Stream
from lmim.data.sharding import write_shards
from lmim.data.shards import FORMAT, VERSION, ShardIndex
from lmim.options import DataConfig

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def starts(*samples: int) -> np.ndarray:
    return np.cumsum([0, *samples])


UNEVEN = starts(7, 0, 31, 1, 12, 1, 50, 3, 0)

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
plans = dict(seed=st.integers(0, 2**63 - 1), block_shards=st.integers(1, 14), lanes=st.integers(1, 6))


# --- one epoch -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(samples=sizes, epoch=st.integers(0, 10**6), lane_run=st.integers(1, 40), cuts=st.data(), **plans)
def test_an_epoch_is_the_data_set_however_it_is_cut(samples, epoch, lane_run, cuts, **options):
    n = sum(samples)
    options |= dict(epoch=epoch, lane_run=lane_run)
    whole = EpochPlan(starts(*samples), **options).ids(0, n)
    assert sorted(whole.tolist()) == list(range(n)) and whole.dtype == np.int64
    places = sorted({0, n, *cuts.draw(st.lists(st.integers(0, n), max_size=5))})
    slices = list(itertools.pairwise(places))
    plan = EpochPlan(starts(*samples), **options)
    found = {piece: plan.ids(*piece) for piece in cuts.draw(st.permutations(slices))}
    np.testing.assert_array_equal(np.concatenate([found[piece] for piece in slices]), whole)


@settings(deadline=None, max_examples=50)
@given(samples=sizes, lane_run=st.integers(1, 40), place=st.data(), **plans)
def test_the_shards_told_for_places_hold_their_samples(samples, lane_run, place, **options):
    plan = EpochPlan(starts(*samples), epoch=3, lane_run=lane_run, **options)
    start = place.draw(st.integers(0, sum(samples) - 1))
    stop = place.draw(st.integers(start, min(sum(samples), start + 30)))
    held = [i for n in plan.shards(start, stop) for i in range(plan.starts[n], plan.starts[n + 1])]
    assert set(plan.ids(start, stop).tolist()) <= set(held) and len(held) == len(set(held))


def test_plans_differ_between_epochs_and_seeds_and_are_pinned():
    orders = {(seed, epoch): tuple(EpochPlan(UNEVEN, seed=seed, epoch=epoch, block_shards=2).ids(0, 105))
              for seed in range(4) for epoch in range(4)}  # fmt: skip
    assert len(set(orders.values())) == 16
    # a change of these numbers changes the order of every run that is resumed
    assert EpochPlan(UNEVEN, seed=0, epoch=0, block_shards=2).ids(0, 6).tolist() == [67, 68, 60, 72, 62, 81]
    laned = EpochPlan(UNEVEN, seed=0, epoch=0, block_shards=2, lanes=3, lane_run=2).ids(0, 6)
    assert laned.tolist() == [67, 68, 65, 55, 8, 46]


def test_plan_refuses_places_beyond_the_epoch_and_takes_empty_slices():
    plan = EpochPlan(UNEVEN, seed=0, epoch=0)
    assert plan.ids(5, 5).tolist() == [] and plan.ids(105, 105).tolist() == []
    for start, stop in ((0, 106), (-1, 3), (4, 3)):
        with pytest.raises(IndexError):
            plan.ids(start, stop)


def test_hosts_that_read_their_own_lanes_read_their_own_shards():
    """Four hosts, four lanes: each reads a quarter of the shards and its two neighbours' at the seams."""
    plan = EpochPlan(starts(*[50] * 40), seed=0, epoch=0, block_shards=2, lanes=4, lane_run=16)
    seen: list[set[int]] = [set() for _ in range(4)]
    for batch in range(0, 2000 // 64 * 64, 64):
        for host in range(4):
            ids = plan.ids(batch + 16 * host, batch + 16 * host + 16)
            seen[host] |= set((ids // 50).tolist())
    assert all(len(shards) <= 40 / 4 + 2 for shards in seen)
    assert len(set.union(*seen)) == 40


# --- how well it mixes -----------------------------------------------------------------------------------------------


def places_of(ids: np.ndarray) -> np.ndarray:
    places = np.empty(len(ids), np.int64)
    places[ids] = np.arange(len(ids))
    return places


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("block_shards", [4, 16, 50])
def test_order_statistics_are_a_full_permutations(block_shards, lanes):
    """50 shards of 40, 300 epochs: where a sample comes, how far neighbours in the data set come apart, what repeats.

    In a full permutation of n, places are uniform, two samples are n / 3 apart on average, and the orders of two
    epochs are not correlated. Two samples of one shard lie in one block, so those are nearer, and only those.
    """
    n, epochs = 2000, 300
    options = dict(seed=11, block_shards=block_shards, lanes=lanes, lane_run=8)
    places = np.array([places_of(EpochPlan(starts(*[40] * 50), epoch=e, **options).ids(0, n)) for e in range(epochs)])
    for sample in (0, 39, 777, 1999):
        assert kstest((places[:, sample] + 0.5) / n, "uniform").pvalue > 0.001
    apart = np.abs(places[:, :1000] - places[:, 1000:]).mean() / n  # never of one shard
    assert apart == pytest.approx(1 / 3, rel=0.05)
    between = [np.corrcoef(places[e], places[e + 1])[0, 1] for e in range(epochs - 1)]
    assert abs(np.mean(between)) < 4 / np.sqrt(n * epochs) * np.sqrt(50)  # blocks move together: 50 shards, not n


def test_one_block_is_mixed_like_a_full_permutation():
    ids = EpochPlan(starts(*[100] * 50), seed=3, epoch=0, block_shards=50).ids(0, 5000)
    assert abs(np.corrcoef(np.arange(5000), places_of(ids))[0, 1]) < 0.05  # 1 / sqrt(5000) = 0.014
    # neighbours in a permutation are on average a third of its length apart, with a deviation of 0.24 / sqrt(5000)
    assert np.abs(np.diff(ids)).mean() == pytest.approx(5000 / 3, rel=0.05)
    quarters = np.histogram2d(ids, np.arange(5000), bins=4)[0]
    assert ((quarters - 312.5) ** 2 / 312.5).sum() < 27.9  # chi-square of 9 degrees of freedom, 0.1 %


def test_blocks_touch_few_shards_and_mix_all_of_theirs():
    plan = EpochPlan(starts(*[40] * 33), seed=5, epoch=0, block_shards=8)
    numbers = plan.ids(0, plan.samples) // 40
    bounds = [0, 240, 520, 760, 1040, 1320]  # 33 shards of 40 in five even blocks
    for begin, end in itertools.pairwise(bounds):
        assert len(set(numbers[begin:end])) == (end - begin) // 40
        assert len(set(numbers[begin : begin + 40])) >= 5


# --- the endless stream ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(samples=sizes, batch=st.integers(1, 50), tail=st.sampled_from(["carry", "drop", "repeat"]), cuts=st.data(),
       **plans)  # fmt: skip
def test_every_epoch_of_the_stream_has_each_sample_once(samples, batch, tail, cuts, **options):
    n = sum(samples)
    stream = Stream(starts(*samples), global_batch=batch, tail=tail, **options)
    length = stream.epoch_samples
    assert length == dict(carry=n, drop=n // batch * batch, repeat=-(-n // batch) * batch)[tail]
    if not length:
        return
    epochs, ids = stream.at(0, 3 * length)
    assert epochs.tolist() == np.repeat([0, 1, 2], length).tolist()
    for epoch in range(3):
        count = Counter(ids[epoch * length : (epoch + 1) * length].tolist())
        times = set(count.values())
        if tail == "carry":
            assert count == Counter(range(n))
        elif tail == "drop":
            assert times == {1} and set(count) <= set(range(n))
        else:
            assert set(count) == set(range(n)) and max(times) - min(times) <= 1
    start = cuts.draw(st.integers(0, 3 * length))
    stop = cuts.draw(st.integers(start, 3 * length))
    again = Stream(starts(*samples), global_batch=batch, tail=tail, **options).at(start, stop)
    assert again[0].tolist() == epochs[start:stop].tolist() and again[1].tolist() == ids[start:stop].tolist()


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(sizes.filter(lambda part: sum(part) > 50), min_size=2, max_size=3), cuts=st.data(), **plans)
def test_sources_take_turns_by_their_weights_and_each_keeps_its_epochs(parts, cuts, **options):
    weights = cuts.draw(st.lists(st.floats(0.01, 10), min_size=len(parts), max_size=len(parts)))
    bounds = starts(*(sum(part) for part in parts))
    firsts = starts(*(len(part) for part in parts))[:-1].tolist()
    shards = starts(*itertools.chain(*parts))
    stream = Stream(shards, global_batch=16, parts=firsts, weights=weights, **options)
    epochs, ids = stream.at(0, 2 * PERIOD)
    source = np.searchsorted(bounds, ids, side="right") - 1
    for number, weight in enumerate(weights):
        mine = ids[source == number]
        for half in (source[:PERIOD], source[PERIOD:]):
            # a turn is 1/1024, and each source has one at least
            assert abs((half == number).sum() - PERIOD * weight / sum(weights)) < 1 + len(weights)
        size = int(bounds[number + 1] - bounds[number])
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(*bounds[number : number + 2]))
        assert epochs[source == number].tolist() == (np.arange(len(mine)) // size).tolist()
    start = cuts.draw(st.integers(0, 2 * PERIOD))
    stop = cuts.draw(st.integers(start, 2 * PERIOD))
    again = Stream(shards, global_batch=16, parts=firsts, weights=weights, **options).at(start, stop)
    assert again[1].tolist() == ids[start:stop].tolist()


def test_weights_that_halve_the_stream_spread_evenly_over_batches():
    stream = Stream(starts(100, 10), seed=0, global_batch=64, parts=(0, 1), weights=(1, 1))
    counts = [int((stream.at(64 * b, 64 * b + 64)[1] >= 100).sum()) for b in range(64)]
    assert np.mean(counts) == 32 and min(counts) > 16 and max(counts) < 48  # a deviation of 4 in a fair draw
    assert len(set(counts)) > 3


def test_unweighted_sources_are_one_data_set():
    one = Stream(starts(10, 20, 30), seed=0, global_batch=7).at(0, 120)
    several = Stream(starts(10, 20, 30), seed=0, global_batch=7, parts=(0, 2)).at(0, 120)
    assert one[1].tolist() == several[1].tolist()


def test_one_source_may_have_parts_and_a_weight(tmp_path):
    for name, count in (("a", 3), ("b", 5)):
        images = tuple(SourceImage(f"{i}", "png", None, f"{i}", lambda: PNG) for i in range(count))
        write_shards(Source(name, None, images), tmp_path / name, samples_per_shard=2)
    config = DataConfig(train=[f"{tmp_path}/{{a,b}}"], weights=[2.0], global_batch=4, tail="drop")
    index = open_shards("data.train", config.train, tmp_path)
    assert sorted(open_stream(config, index, 0).at(0, 8)[1].tolist()) == list(range(8))


def test_values_kept_for_threads_are_theirs():
    """Threads that push each other's values out get their own all the same."""
    recent = Recent(2)

    def ask(thread: int) -> bool:
        return all(recent.get_or_make((thread, n % 3), lambda key: key) == (thread, n % 3) for n in range(20_000))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(4)))
    finally:
        sys.setswitchinterval(switch)


# --- size ------------------------------------------------------------------------------------------------------------


def test_a_billion_samples_in_a_hundred_thousand_shards_need_little_memory(tmp_path):
    """Index and plan of made-up shards, read from a real index file; what a step touches is as with 10 shards."""
    shards = [dict(name=f"http://host/{n:06d}.tar", samples=10_000, bytes=1 << 30, sha256=f"{n:064x}",
                   table=f"http://host/{n:06d}.npz") for n in range(100_000)]  # fmt: skip
    content = dict(format=FORMAT, version=VERSION, classes=None, skipped=[], shards=shards)
    (tmp_path / "index.json").write_text(json.dumps(content))
    del shards, content
    tracemalloc.start()
    try:
        index = ShardIndex.open(tmp_path)
        stream = Stream(index.starts, seed=0, global_batch=4096)
        assert len(index) == 1_000_000_000
        epochs, ids = stream.at(7_999_999_990, 8_000_000_010)  # across the end of epoch 7
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert epochs.tolist() == [7] * 10 + [8] * 10 and len(set(ids.tolist())) == 20
    assert peak_bytes < 300e6
    assert len(stream.shards(0, 4096)) <= 64
