"""Tensors on disk: what each rank holds of them, written beside training and read back by any number of ranks.

Owns the pieces that backends speak in and the files they lie in. A piece is a run of a tensor's numbers in the order of
the whole, flattened: so rows that FSDP2 cuts, flat cuts of ZeRO and whole tensors are all the same thing, and what one
way of sharding wrote, any other reads. Saves go through `torch.distributed.checkpoint`, which plans them over the ranks
and shares what went wrong. The files are safetensors and JSON: reading them runs no code of their author.

    weights-00000.safetensors     what rank 0 wrote of online.*, target.* and decoder.*
    optimizer-00000.safetensors   what rank 0 wrote of exp_avg/* and exp_avg_sq/*

A piece of whole rows keeps its rows' shape, so that whole tensors, as one process writes them, look like themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException as CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lmim.config import ConfigError

BLOCK = 1 << 20  # bytes read at once for a checksum


class Piece(NamedTuple):
    """What this rank holds of a tensor: numbers in a row, from `start` on of the whole.

    `numbers` is a flat view of live memory, to be copied from or into. Where `copies` ranks hold the same piece, this
    rank's is the `copy`-th.
    """

    name: str
    shape: tuple[int, ...]  # of the whole
    start: int
    numbers: Tensor
    copy: int = 0
    copies: int = 1


def whole(name: str, tensor: Tensor, copy: int = 0, copies: int = 1) -> Piece:
    """Return a tensor as one piece; the tensor must be contiguous."""
    return Piece(name, tuple(tensor.shape), 0, tensor.detach().view(-1), copy, copies)


def written_here(pieces: Iterable[Piece]) -> list[Piece]:
    """Return those of a rank's pieces that it writes, so that of equal pieces one is written and ranks write alike.

    Every rank comes to the same shares from names and shapes alone: the largest tensors first, each to the rank that
    has least to write.
    """
    pieces = list(pieces)
    writers: dict[tuple[int, str], int] = {}
    for copies in {piece.copies for piece in pieces}:
        load = [0] * copies
        sizes = {piece.name: math.prod(piece.shape) for piece in pieces if piece.copies == copies}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            writer = load.index(min(load))
            load[writer] += sizes[name]
            writers[copies, name] = writer
    return [piece for piece in pieces if writers[piece.copies, piece.name] == piece.copy and piece.numbers.numel()]


class FileRecord(NamedTuple):
    """One file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


def write(
    folder: Path,
    pieces: list[Piece],
    finish: Callable[[dict[str, tuple[int, ...]], list[FileRecord]], None],
    group: torch.distributed.ProcessGroup | None,
) -> None:
    """Write every rank's pieces into `folder`, each number once; a collective of `group`, or of this process alone.

    Where everything is written and synced, the first rank calls `finish(shapes of the whole tensors, files)`. If
    anything fails on any rank, all raise `CheckpointException`.
    """
    with warnings.catch_warnings():  # that it is alone, it is told
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({}, storage_writer=_Writer(folder, finish), planner=_Planner(pieces), process_group=group,
                 no_dist=group is None)  # fmt: skip


class _Planner(SavePlanner):
    def __init__(self, pieces: list[Piece]):
        self.pieces = {MetadataIndex(piece.name, [piece.start]): piece for piece in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, piece in self.pieces.items():
            chunk = ChunkStorageMetadata(torch.Size([piece.start]), torch.Size([piece.numbers.numel()]))
            data = TensorWriteData(chunk, TensorProperties(dtype=piece.numbers.dtype), torch.Size(piece.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Make sure that every number of every tensor is written once."""
        shapes, covered = {}, {}
        for item in (item for plan in all_plans for item in plan.items):
            name, data = item.index.fqn, item.tensor_data
            assert shapes.setdefault(name, data.size) == data.size, f"ranks differ on the shape of {name}"
            covered.setdefault(name, []).append((data.chunk.offsets[0], data.chunk.sizes[0]))
        for name, chunks in covered.items():
            end = 0
            for start, numbers in sorted(chunks):
                assert start == end, f"numbers of {name} from {end} to {start} are written twice or not at all"
                end = start + numbers
            assert end == math.prod(shapes[name]), f"{name} is written up to {end} only"
        return all_plans, Metadata({}, planner_data={name: tuple(shape) for name, shape in sorted(shapes.items())})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index].numbers


class _Writer(StorageWriter):
    def __init__(self, folder: Path, finish: Callable[[dict[str, tuple[int, ...]], list[FileRecord]], None]):
        self.folder, self.then = folder, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.folder.mkdir(parents=True)
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        kinds: dict[str, list[WriteItem]] = {"weights": [], "optimizer": []}
        for item in plan.items:
            kinds["optimizer" if "/" in item.index.fqn else "weights"].append(item)
        results = []
        for kind, items in kinds.items():
            if items:
                record = _write_file(self.folder / f"{kind}-{plan.storage_data:05d}.safetensors", items, planner)
                results.append(WriteResult(MetadataIndex(record.name), record.bytes, record))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.then(metadata.planner_data, [result.storage_data for of_rank in results for result in of_rank])


def _write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> FileRecord:
    """Write pieces into one file; where a tensor is in pieces, the file's header tells where this one starts."""
    tensors, starts = {}, {}
    for item in items:
        name, numbers, shape = item.index.fqn, planner.resolve_data(item), item.tensor_data.size
        start = item.tensor_data.chunk.offsets[0]
        row = math.prod(shape[1:])
        rows = start % row == 0 == numbers.numel() % row
        tensors[name] = numbers.view(-1, *shape[1:]) if shape and rows else numbers.view(shape if not shape else -1)
        if numbers.numel() != math.prod(shape):
            starts[name] = start
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    sync(path)
    return FileRecord(path.name, path.stat().st_size, sha256_of(path))


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path, files: Iterable[str], pieces: Iterable[Piece]) -> None:
    """Fill pieces from a checkpoint's files; raises ConfigError naming the file and tensor that do not fit."""
    wanted: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.numbers.numel():
            wanted.setdefault(piece.name, []).append(piece)
    missing = {(name, piece.start): piece.numbers.numel() for name, found in wanted.items() for piece in found}
    for file in files:
        path = folder / file
        with opened(path) as (stored, starts):
            for name in wanted.keys() & set(stored.keys()):
                numbers = stored.get_tensor(name).view(-1)
                start = starts.get(name, 0)
                for piece in wanted[name]:
                    begin = max(start, piece.start)
                    end = min(start + numbers.numel(), piece.start + piece.numbers.numel())
                    if begin < end:
                        into = piece.numbers[begin - piece.start : end - piece.start]
                        into.copy_(numbers[begin - start : end - start])
                        missing[name, piece.start] -= end - begin
    for (name, start), numbers in missing.items():
        if numbers:
            raise ConfigError(f"{folder} lacks {numbers} numbers of {name} from {start} on: it is damaged")


def fill(pieces: Iterable[Piece], tensors: dict[str, Tensor]) -> None:
    """Fill those pieces of whose tensors a whole is given."""
    for piece in pieces:
        if piece.name in tensors:
            numbers = tensors[piece.name].reshape(-1)
            piece.numbers.copy_(numbers[piece.start : piece.start + piece.numbers.numel()])


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, int]]]:
    """Open a safetensors file and tell where the pieces in it start; what is wrong with it is one line."""
    try:
        with safe_open(path, "pt") as file:
            starts = json.loads((file.metadata() or {}).get("starts", "{}"))
            if not isinstance(starts, dict) or not all(type(s) is int and s >= 0 for s in starts.values()):
                raise ValueError("it does not tell where its pieces start")
            yield file, starts
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from error


def sha256_of(path: Path) -> str:
    """Return the checksum of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(BLOCK):
            digest.update(part)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
