"""Memory that loader workers fill with batches and their trainer reads, used again and again.

Owns the slots and who has which. The invariant: a slot is filled only while nothing of what was read from it is alive,
so batches may be kept for as long as one likes; where all slots are in use, a worker takes fresh memory.

Fresh shared memory for every batch costs what the system takes to clear and map its pages: 10 ms for 64 crops of 280 px
on a virtual machine, where making those crops takes 60.
"""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import torch
from torch import Tensor

_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()  # this process's, by number


class BatchMemory:
    """`slots` batches (B, S, S, 3) uint8 for each of some workers, shared with them; touched only when used."""

    def __init__(self, workers: int, slots: int, batch: int, size: int):
        shape = (workers, slots, batch, size, size, 3)
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(int(np.prod(shape))))
        self.bytes = self.bytes.view(shape)
        self.taken = torch.zeros(workers, slots, dtype=torch.uint8).share_memory_()
        self.number = next(_numbers)
        _open[self.number] = self

    def take(self, worker: int) -> Slot | None:
        """Return a slot for this worker to fill, or None where the trainer holds all of them."""
        free = (self.taken[worker] == 0).nonzero()
        if not len(free):
            return None
        self.taken[worker, int(free[0])] = 1
        return Slot(self.number, worker, int(free[0]))

    def array(self, slot: Slot) -> np.ndarray:
        """Return a slot's memory (B, S, S, 3)."""
        return self.bytes[slot.worker, slot.place].numpy()


class Slot:
    """A slot that was filled: what a worker sends in place of the batch."""

    def __init__(self, memory: int, worker: int, place: int):
        self.memory, self.worker, self.place = memory, worker, place

    def tensor(self) -> Tensor:
        """Return the batch (B, 3, S, S), channels last; once it and all views of it are gone, the slot is free."""
        memory = _open[self.memory]
        # torch keeps this array for as long as any tensor on its memory lives
        lent = memory.array(self)[:]
        weakref.finalize(lent, memory.taken.__setitem__, (self.worker, self.place), 0)
        return torch.from_numpy(lent).permute(0, 3, 1, 2)

    def pin_memory(self, device: object = None) -> Tensor:
        """Return a copy in pinned memory: called by torch's pinning thread."""
        return self.tensor().pin_memory()
