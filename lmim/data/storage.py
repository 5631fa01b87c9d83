"""Where the bytes of shards come from: local files, http(s), s3, gs, and, where allowed, the output of a command.

Owns every read of shards and indexes. The invariants: bytes are all that was asked for, or an error; what may pass (a
lost connection, a busy server, a stall) is tried again for `retry_s` and then ends the run (`StorageError`); what will
not (a missing object, one that is too short) is `Damaged`, and the caller takes another sample.

Remote addresses go through fsspec (aiohttp, s3fs, gcsfs), which finds credentials and endpoints as those libraries do.
A `Storage` may be forked or pickled: connections belong to the process and the thread that use them.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import random
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand

from lmim.config import ConfigError
from lmim.data.plan import Recent

logger = logging.getLogger(__name__)
OPEN_FILES = 128
AT_ONCE = 32  # requests in flight per process
CHUNK_BYTES = 16 << 20  # of a whole object
FIRST_WAIT_S, LONGEST_WAIT_S, WARN_EVERY_S = 0.25, 20.0, 30.0
PIPE = "pipe:"
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # what is wrong with a local file itself


class Damaged(ValueError):
    """Bytes that are missing, too few or not what was written; says which and why."""


class StorageError(RuntimeError):
    """A place that could not be reached, though it was tried again and again; says where, how long and why."""


@dataclass(frozen=True)
class StorageOptions:
    """How remote places are read; see the options of the same names in `data`."""

    timeout_s: float = 30.0  # to connect, and between two packets
    retry_s: float = 600.0
    allow_pipe: bool = False
    cache: str = ""
    cache_bytes: int = 100 << 30


def is_remote(url: str) -> bool:
    """Tell whether an address is none of a local file."""
    return "://" in url or url.startswith(PIPE)


def expand(spec: str) -> list[str]:
    """Return the addresses that `{000..099}` and, for local files, `*`, `?` and `[` stand for, sorted; or itself."""
    if spec.startswith(PIPE) and "{" not in spec:
        return [spec]
    found = list(braceexpand.braceexpand(spec))
    if is_remote(spec):
        return found
    return [path for one in found for path in (sorted(glob.glob(one)) if glob.has_magic(one) else [one])]


def without_secrets(url: str) -> str:
    """Return an address without user, password and query, and a command without its arguments: all may hold tokens."""
    if url.startswith(PIPE):
        return re.sub(r"\s.*", " …", url, flags=re.DOTALL)
    return re.sub(r"\?.*$", "?…", re.sub(r"//[^/]*@", "//", url)) if "://" in url else url


def _not_cached(url: str) -> None:
    return None


class Storage:
    """Reads whole objects and ranges of bytes, from anywhere; ranges from the copy that `cached` tells, if any."""

    def __init__(self, options: StorageOptions | None = None):
        self.options = options or StorageOptions()
        self.cached: Callable[[str], Path | None] = _not_cached
        self._files: Recent[str, BinaryIO] = Recent(OPEN_FILES)  # a file pushed out closes itself
        self._warned_at = -WARN_EVERY_S
        self._met: set[str] = set()  # kinds of places that have answered

    def read(self, url: str) -> bytes:
        """Return a whole small object, such as an index; `Damaged` where there is none, `StorageError`."""
        if not is_remote(url):
            try:
                return Path(url).read_bytes()
            except OSError as error:
                raise Damaged(f"{url} cannot be read: {error.strerror}") from error
        return self._one(url, None, None)

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | Damaged]:
        """Return bytes [start, stop) of each (address, start, stop); remote ones are asked for side by side."""
        found: list[bytes | Damaged | None] = [None] * len(wanted)
        paths = {url: self._path(url) for url in dict.fromkeys(url for url, _, _ in wanted)}
        local = [(i, paths[url], start, stop) for i, (url, start, stop) in enumerate(wanted) if paths[url]]
        remote = [i for i, (url, _, _) in enumerate(wanted) if not paths[url]]
        self._advise([span for _, *span in local])
        for i, *span in local:
            found[i] = self._local(*span)
            if isinstance(found[i], Damaged) and is_remote(wanted[i][0]):
                remote.append(i)  # the copy was removed a moment ago to make room
        for url, path in paths.items():
            if path and is_remote(url):
                self._files.pop(path, None)  # held open, a removed copy would go on taking its room
        for i, data in zip(remote, self._remote([wanted[i] for i in remote]), strict=True):
            found[i] = data
        return found

    def fetch(self, url: str, size: int | None = None) -> Iterator[bytes]:
        """Yield a whole remote object in pieces, one after the other; `Damaged` where it ends before `size` bytes."""
        if url.startswith(PIPE):
            yield from self._pipe(url)
            return
        size = self.size(url) if size is None else size
        for start in range(0, size, CHUNK_BYTES):
            yield self._one(url, start, min(start + CHUNK_BYTES, size))

    def size(self, url: str) -> int:
        """Return an object's size in bytes."""
        if not is_remote(url):
            return os.stat(url).st_size
        return int(self._retried(url, lambda: self._filesystem(url).info(url)["size"]))

    def open(self, url: str) -> BinaryIO:
        """Open a local or remote object for reading and seeking, such as a tar whose headers are to be read."""
        if url.startswith(PIPE):
            file = tempfile.TemporaryFile()  # noqa: SIM115  whoever asked closes it
            file.writelines(self.fetch(url))
            file.seek(0)
            return file
        return open(url, "rb") if not is_remote(url) else self._filesystem(url).open(url, "rb")

    # --- local ---

    def _path(self, url: str) -> str | None:
        """Return the path of a local file or of the copy of a remote one; None without either."""
        if not is_remote(url):
            return url
        path = self.cached(url)
        return None if path is None else str(path)

    def _file(self, path: str) -> BinaryIO:
        return self._files.get_or_make(path, lambda path: open(path, "rb", buffering=0))

    def _advise(self, wanted: Sequence[tuple[str, int, int]]) -> None:
        """Let the system read what comes, so that a cold disk or a network file system works on all of it at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        for path, start, stop in wanted:
            with suppress(OSError):  # the read that follows says what is wrong
                os.posix_fadvise(self._file(path).fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def _local(self, path: str, start: int, stop: int) -> bytes | Damaged:
        try:
            file = self._file(path)  # by name: another thread that pushes it out does not close it meanwhile
            data = os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            words = f"{path} cannot be read: {error.strerror}"
            if error.errno in LOST:
                return Damaged(words)
            raise StorageError(words) from error  # too many open files, no rights: no other sample would help
        return data if len(data) == stop - start else Damaged(f"{path} is shorter than its index says")

    # --- remote ---

    def _filesystem(self, url: str) -> Any:
        """Return fsspec's file system for an address: one per process, thread and kind, which fsspec keeps."""
        if url.startswith(PIPE):
            raise ConfigError(f"{without_secrets(url)}: a command's output cannot be read in parts: set data.cache")
        import fsspec

        protocol, timeout_s = url.partition("://")[0], self.options.timeout_s
        settings: dict[str, Any] = {}
        try:
            if protocol in ("http", "https"):
                import aiohttp

                # no limit for the whole: large objects take long; one for connecting and for every pause
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
                settings = dict(client_kwargs=dict(timeout=timeout, trust_env=True))  # ~/.netrc, proxies
            elif protocol == "s3":
                settings = dict(config_kwargs=dict(connect_timeout=timeout_s, read_timeout=timeout_s,
                                                   retries=dict(max_attempts=1)))  # fmt: skip
            return fsspec.filesystem(protocol, **settings)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{without_secrets(url)} cannot be read ({error}): pip install 'lmim[remote]'") from error

    def _one(self, url: str, start: int | None, stop: int | None) -> bytes:
        data = self._retried(url, lambda: self._filesystem(url).cat_file(url, start=start, end=stop))
        data = data if start is None else _cut(data, url, start, stop)
        if isinstance(data, Damaged):
            raise data
        return data

    def _remote(self, wanted: list[tuple[str, int, int]]) -> list[bytes | Damaged]:
        """Read ranges side by side, those of one kind of place at a time; what fails is then read alone, with retries.

        While a place is down, its requests thus wait for one that is tried again, rather than all knocking at once.
        """
        found: list[bytes | Damaged | Exception | None] = [None] * len(wanted)
        for protocol in dict.fromkeys(url.partition(":")[0] for url, _, _ in wanted):
            places = [i for i, (url, _, _) in enumerate(wanted) if url.partition(":")[0] == protocol]
            if protocol not in self._met:  # alone: of a server without ranges, not 32 whole shards come at once
                first = places.pop(0)
                found[first] = self._alone(*wanted[first])
                self._met.add(protocol)
            if not places:
                continue
            urls, starts, stops = zip(*(wanted[i] for i in places), strict=True)
            try:
                filesystem = self._filesystem(urls[0])
                data = filesystem.cat_ranges(list(urls), list(starts), list(stops), batch_size=AT_ONCE,
                                             on_error="return")  # fmt: skip
            except _passing() as error:
                data = [error] * len(places)
            for i, one in zip(places, data, strict=True):
                found[i] = _cut(one, *wanted[i]) if isinstance(one, bytes) else one
        return [one if isinstance(one, (bytes, Damaged)) else self._alone(*wanted[i]) for i, one in enumerate(found)]

    def _alone(self, url: str, start: int, stop: int) -> bytes | Damaged:
        try:
            return self._one(url, start, stop)
        except Damaged as error:
            return error

    def _retried(self, url: str, request: Callable[[], Any]) -> Any:
        began, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                return request()
            except FileNotFoundError as error:
                raise Damaged(f"{without_secrets(url)} does not exist") from error
            except PermissionError as error:
                raise StorageError(_no_rights(url, error)) from error
            except _passing() as error:
                if getattr(error, "status", 503) in (401, 403):
                    raise StorageError(_no_rights(url, error)) from error
                if getattr(error, "status", 503) == 416:  # a range that begins beyond the end
                    raise Damaged(f"{without_secrets(url)} is shorter than its index says") from error
                if getattr(error, "status", 503) in REFUSED:
                    raise Damaged(f"{without_secrets(url)} is refused: {_words(error)}") from error
                self._warn(url, error)
                if time.monotonic() - began + wait_s > self.options.retry_s:
                    raise StorageError(f"{without_secrets(url)} cannot be read: {_words(error)}; tried again for "
                                       f"{self.options.retry_s:g} s (data.retry_minutes)") from error  # fmt: skip
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # ranks that failed together do not come back together
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _warn(self, url: str, error: Exception) -> None:
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            logger.warning("%s cannot be read (%s): trying again", without_secrets(url), _words(error))

    def _pipe(self, url: str) -> Iterator[bytes]:
        """Yield what a command prints; its exit code counts, and nothing of it is left running."""
        shown = without_secrets(url)
        if not self.options.allow_pipe:
            raise ConfigError(
                f"{shown}: running commands is off: set data.allow_pipe=true if you trust where it is from"
            )
        process = subprocess.Popen(url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        try:
            while True:
                if not select.select([process.stdout], [], [], self.options.timeout_s)[0]:
                    raise StorageError(f"{shown} has printed nothing for {self.options.timeout_s:g} s (data.timeout_s)")
                chunk = os.read(process.stdout.fileno(), 1 << 20)
                if not chunk:
                    break
                yield chunk
            if process.wait():
                raise Damaged(f"{shown} ended with exit code {process.returncode}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()


REFUSED = (400, 404, 405, 410)  # statuses of http that another try does not change


def _passing() -> tuple[type[Exception], ...]:
    """Return the exceptions that the remote libraries raise for what may pass."""
    kinds: list[type[Exception]] = [OSError, TimeoutError]
    try:
        import aiohttp

        kinds.append(aiohttp.ClientError)
    except ImportError:
        pass
    try:
        from botocore.exceptions import BotoCoreError, ClientError

        kinds += [BotoCoreError, ClientError]
    except ImportError:
        pass
    return tuple(kinds)


def _no_rights(url: str, error: Exception) -> str:
    return f"{without_secrets(url)} may not be read ({_words(error)}): look at the credentials"


def _words(error: Exception) -> str:
    """Return an exception's words in one line, without the address and what secrets it may hold."""
    status = getattr(error, "status", None)
    words = f"{status} {getattr(error, 'message', '')}" if status else " ".join(str(error).split())
    return without_secrets(words.strip()) or type(error).__name__


def _cut(data: bytes, url: str, start: int, stop: int) -> bytes | Damaged:
    """Return [start, stop) of what a server answered: that range, or all of a small object where it knows no ranges."""
    if len(data) > max(stop - start, CHUNK_BYTES):
        raise StorageError(f"{without_secrets(url)}: its server sends all of a file where a part is asked for (as "
                           "python -m http.server does): take one that knows ranges, such as nginx")  # fmt: skip
    if len(data) > stop - start:
        data = data[start:stop]
    if len(data) == stop - start:
        return data
    return Damaged(f"{without_secrets(url)} is shorter than its index says")
