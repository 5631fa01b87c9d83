"""Features kept on disk by what they are made of, so that the next evaluation need not compute them.

Owns the folder `eval.cache`. A file's name is a hash of the encoder's weights and sizes, the data's fingerprint, the
samples, the view and the reading; neither ranks nor batch sizes are in it. The invariants: a file appears whole or not
at all, however many processes write the same; the folder stays under its limit, what was used longest ago going first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmim.config import ConfigError

logger = logging.getLogger(__name__)
FORMAT = "lmim features 1"  # part of every key: to be raised when views, read-outs or files change


def identity_of(module: nn.Module | None) -> str:
    """Return a hex digest of a network's structure, parameters and buffers; empty for None."""
    if module is None:
        return ""
    digest = hashlib.sha256(repr(module).encode())  # names, widths, epsilons
    heads = [getattr(part, "num_heads", None) for part in module.modules()]
    digest.update(repr((heads, getattr(module, "visual_cues", None), getattr(module, "grid_size", None))).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """A folder of safetensors files of at most `limit_bytes`."""

    def __init__(self, folder: Path, limit_bytes: float):
        self.folder, self.limit_bytes = folder, limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"eval.cache ({folder}) cannot be made: {error.strerror}") from error

    def key(self, *parts: Any) -> str:
        """Return the name of what is made of these parts."""
        digest = hashlib.sha256(FORMAT.encode())
        for part in parts:
            content = part if isinstance(part, bytes) else repr(part).encode()
            digest.update(f"{len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return what was kept under a key, None if nothing whole is there."""
        path = self._path(key)
        try:
            content = load_file(path)
            os.utime(path)  # for the order of going
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged and made anew: %s", path, error)
            return None
        return content

    def write(self, key: str, content: dict[str, Tensor]) -> None:
        """Keep tensors under a key, unless they alone are over the limit; a full disk is told and changes nothing."""
        size = sum(tensor.nbytes for tensor in content.values())
        if size > self.limit_bytes:
            logger.warning(
                "features of %.3g GB are not kept: eval.cache_gb is %.3g", size / 1e9, self.limit_bytes / 1e9
            )
            return
        self._make_room(size)
        temporary = self.folder / f"{key}.{socket.gethostname()}.{os.getpid()}.tmp"
        try:
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, temporary)
            temporary.replace(self._path(key))
        except (OSError, SafetensorError) as error:
            logger.warning("features are not kept in %s: %s", self.folder, error)
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        files = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process makes room too
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        files.sort()
        total = sum(bytes_ for _, bytes_, _ in files)
        while files and total + size > self.limit_bytes:
            _, bytes_, path = files.pop(0)
            path.unlink(missing_ok=True)
            total -= bytes_
