"""Whole shards kept on a local disk, and a thread that brings them there before they are needed.

Owns the cache folder, which all processes of a host share. The invariants: a file with a shard's name is complete and
has the checksum of the index; the folder never holds more than its bound; a shard is brought by one process at a time;
what a killed process leaves behind counts for nothing and is removed. Samples of shards that are not here yet are read
from where they lie, so nothing waits for a whole shard, except where a shard cannot be read in parts (`pipe:`).

Names are hashes of addresses: nothing that a remote index says chooses a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lmim.data.storage import Damaged, Storage, StorageError, without_secrets

logger = logging.getLogger(__name__)
PART, LOCK = ".part", ".lock"


class Wanted(NamedTuple):
    """A remote shard: its address, size in bytes, and checksum if it is known."""

    url: str
    bytes: int
    sha256: str | None


class ShardCache:
    """Copies of remote shards in a folder that holds at most `limit_bytes`; `storage` then reads from them.

    `version` is the data set's fingerprint: another data set at the same address has copies of its own.
    """

    def __init__(self, folder: Path, limit_bytes: int, storage: Storage, version: str = ""):
        self.folder, self.limit_bytes, self.storage, self.version = folder, limit_bytes, storage, version
        folder.mkdir(parents=True, exist_ok=True)
        storage.cached = self.path

    def path(self, url: str) -> Path | None:
        """Return the copy of a shard, marked as used, or None where there is none."""
        path = self._place(url)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def bring(self, shard: Wanted, keep: Collection[str] = (), *, wait: bool = False) -> bool:
        """Copy a shard here, and tell whether it is here now.

        It is not where another process is at it, unless we `wait`, or where there is no room beside those in `keep`.
        Raises `Damaged` where it is not what the index says, `StorageError`, and OSError where the disk fails.
        """
        place = self._place(shard.url)
        if place.exists():
            return True
        with _locked(place.with_suffix(LOCK), wait=wait) as mine:
            if not mine:
                return False
            if place.exists():
                return True
            part = place.with_suffix(PART)
            if not self._reserve(part, shard.bytes, {self._place(url).name for url in keep}):
                return False
            try:
                self._copy(shard, part)
                with _locked(self.folder / LOCK, wait=True):  # else one that counts might see neither name
                    os.replace(part, place)
            finally:
                with _locked(self.folder / LOCK, wait=True):
                    part.unlink(missing_ok=True)
        return True

    def _place(self, url: str) -> Path:
        return self.folder / (hashlib.sha256(f"{self.version} {url}".encode()).hexdigest()[:32] + ".tar")

    def _reserve(self, part: Path, size: int, keep: set[str]) -> bool:
        """Make an empty file of `size` bytes, for which room is made, or return False."""
        with _locked(self.folder / LOCK, wait=True):
            shards, taken = [], 0
            for path in [*self.folder.glob("*.tar"), *self.folder.glob("*" + PART)]:
                status = path.stat()
                if path.suffix == PART and path != part and not _is_locked(path.with_suffix(LOCK)):
                    path.unlink(missing_ok=True)  # of a process that was killed
                    continue
                taken += status.st_size if path != part else 0
                if path.suffix == ".tar" and path.name not in keep:
                    shards.append((status.st_mtime_ns, path, status.st_size))
            oldest_first = iter(sorted(shards))
            if taken - sum(bytes for *_, bytes in shards) + size > self.limit_bytes:
                return False
            while taken + size > self.limit_bytes:
                oldest = next(oldest_first)
                oldest[1].unlink(missing_ok=True)  # who has it open reads on
                taken -= oldest[2]
            with part.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk says so here
        return True

    def _copy(self, shard: Wanted, part: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with part.open("r+b") as file:
            for chunk in self.storage.fetch(shard.url, shard.bytes):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.truncate(size)
        if size != shard.bytes or shard.sha256 not in (None, digest.hexdigest()):
            raise Damaged(f"{without_secrets(shard.url)} is not what its index says: "
                          f"{size} bytes of {shard.bytes}, SHA-256 {digest.hexdigest()}")  # fmt: skip


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock file, which ends with this process at the latest; yield whether it could be had."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _is_locked(path: Path) -> bool:
    with _locked(path, wait=False) as free:
        return not free


class ReadAhead:
    """A thread of a worker process that brings shards into the cache, in the order in which they will be needed.

    What it cannot bring is read sample by sample, so its troubles are logged once and never end a run.
    """

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self._wanted: Sequence[Wanted] | None = ()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failed: set[str] = set()

    def want(self, shards: Sequence[Wanted]) -> None:
        """Take these shards for the next that are needed, in this order; the first call starts the thread."""
        with self._news:
            if shards == self._wanted:
                return
            self._wanted = shards
            self._news.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread after the shard in hand."""
        with self._news:
            self._wanted = None
            self._news.notify()

    def _run(self) -> None:
        done: Sequence[Wanted] = ()
        while True:
            with self._news:
                self._news.wait_for(lambda done=done: self._wanted is not done)
                shards = self._wanted
            if shards is None:
                return
            for shard in shards:
                if self._wanted is not shards:  # told of others meanwhile
                    break
                if shard.url not in self._failed:
                    self._bring(shard, [one.url for one in shards])
            else:
                done = shards

    def _bring(self, shard: Wanted, keep: list[str]) -> None:
        try:
            self.cache.bring(shard, keep)
        except (Damaged, StorageError, OSError) as error:
            if not self._failed:
                logger.warning("%s is not kept in %s (%s): its images are read one by one",
                               without_secrets(shard.url), self.cache.folder, error)  # fmt: skip
            self._failed.add(shard.url)
