"""Tensors that were written in any pieces are read back in any others, to the bit."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmim import store
from lmim.config import ConfigError
from lmim.store import Piece

SHAPES = {"a": (7, 5), "b": (), "c": (4, 3, 2), "exp_avg/a": (7, 5), "d": (11,), "e": (1,)}
TENSORS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in SHAPES.items()}


def cut(data, tensors: dict[str, torch.Tensor]) -> list[Piece]:
    """Cut every tensor at places that hypothesis draws; some of rows, some amid a row."""
    pieces = []
    for name, tensor in tensors.items():
        inner = data.draw(st.sets(st.integers(1, tensor.numel() - 1), max_size=4)) if tensor.numel() > 1 else set()
        for start, end in pairwise([0, *sorted(inner), tensor.numel()]):
            pieces.append(Piece(name, tuple(tensor.shape), start, tensor.view(-1)[start:end]))
    return pieces


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_cut_is_read_by_any_other(tmp_path_factory, data):
    """Pieces are written as by several ranks, one of which may hold a tensor's end and another its start."""
    folder = tmp_path_factory.mktemp("store")
    pieces, ranks = cut(data, TENSORS), data.draw(st.integers(1, 3))
    of_rank = [{} for _ in range(ranks * 5)]  # a rank holds one piece of a tensor at most
    for piece in pieces:
        places = [held for held in of_rank if piece.name not in held]
        places[data.draw(st.integers(0, len(places) - 1))][piece.name] = piece
    files = []
    for rank, held in enumerate(of_rank):
        if held:
            planner = store._Planner(list(held.values()))
            path = folder / f"{rank}.safetensors"
            files.append(store._write_file(path, planner.create_local_plan().items, planner).name)
    found = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    store.read(folder, files, cut(data, found))
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_one_process_writes_once_and_tells_what(tmp_path):
    told = []
    pieces = [store.whole(name, tensor) for name, tensor in TENSORS.items()]
    store.write(tmp_path / "new", pieces, lambda *arguments: told.append(arguments), None)
    [(shapes, files)] = told
    assert shapes == SHAPES
    assert [file.name for file in files] == ["weights-00000.safetensors", "optimizer-00000.safetensors"]
    for file in files:
        assert (file.bytes, file.sha256) == (
            (tmp_path / "new" / file.name).stat().st_size, store.sha256_of(tmp_path / "new" / file.name)
        )  # fmt: skip


@pytest.mark.parametrize("pieces", [
    [Piece("a", (4,), 0, torch.zeros(3))],
    [Piece("a", (4,), 0, torch.zeros(3)), Piece("a", (4,), 2, torch.zeros(2))],
    [Piece("a", (4,), 1, torch.zeros(3))],
])  # fmt: skip
def test_numbers_that_are_missing_or_doubled_are_not_written(tmp_path, pieces):
    with pytest.raises(store.CheckpointException, match=r"a is|numbers of a"):
        store.write(tmp_path / "new", pieces, lambda *arguments: pytest.fail("committed"), None)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=40), st.sampled_from([1, 2, 3, 8]))
def test_ranks_share_the_writing_of_what_all_hold(sizes, ranks):
    shapes = {f"t{i}": (size,) for i, size in enumerate(sizes)}
    chosen = [store.written_here([Piece(name, shape, 0, torch.empty(1), rank, ranks) for name, shape in shapes.items()])
              for rank in range(ranks)]  # fmt: skip
    names = [piece.name for pieces in chosen for piece in pieces]
    assert sorted(names) == sorted(shapes)
    loads = [sum(piece.shape[0] for piece in pieces) for pieces in chosen]
    assert max(loads) <= sum(sizes) / ranks + max(sizes)


def lying_header(path, **entry) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


@pytest.mark.parametrize("lie", [
    dict(shape=[2000]), dict(data_offsets=[0, 8000]), dict(data_offsets=[-8, 0]), dict(dtype="F99"),
])  # fmt: skip
def test_a_lying_header_is_refused(tmp_path, lie):
    lying_header(tmp_path / "x.safetensors")
    into = [store.whole("a", torch.ones(2))]
    store.read(tmp_path, ["x.safetensors"], into)
    assert into[0].numbers.tolist() == [0, 0]
    lying_header(tmp_path / "x.safetensors", **lie)
    with pytest.raises(ConfigError, match=r"x\.safetensors cannot be read"):
        store.read(tmp_path, ["x.safetensors"], into)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ConfigError, match=r"x\.safetensors cannot be read"):
        store.read(tmp_path, ["x.safetensors"], into)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="lacks 2 numbers of b from 0 on"):
        store.read(tmp_path, ["x.safetensors"], [store.whole("b", torch.zeros(2))])
