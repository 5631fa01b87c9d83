"""Files of other code that hold pickles, read without running what they hold.

Owns `.pth` files, DeepSpeed's ZeRO folders and folders of `torch.distributed.checkpoint` (DCP). The invariant: what a
pickle may build is tensors, plain values, containers of these, and for the classes listed here inert stand-ins that
keep their arguments and do nothing; anything else ends in one line that names the file.

    DeepSpeed   latest, TAG/mp_rank_00_model_states.pt (ZeRO-0, 1, 2), TAG/zero_pp_rank_R_mp_rank_00_model_states.pt
                (ZeRO-3), TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt: layout as in its zero_to_fp32.py
    DCP         .metadata (a pickle: names, shapes, where each chunk lies), *.distcp (chunks, one `torch.save` each)
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lmim.config import ConfigError

logger = logging.getLogger(__name__)
METADATA = ".metadata"
# What damaged or hostile bytes make of an unpickler.
_BROKEN = (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, TypeError, AttributeError, LookupError,
           ImportError, AssertionError, RecursionError, MemoryError, OverflowError, zipfile.BadZipFile)  # fmt: skip


class Inert:
    """What stands in for a class that a pickle names: keeps its arguments and attributes, and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        inert = super().__new__(cls)
        inert.arguments = arguments
        return inert

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


# What training scripts leave in a .pth beside the weights: their command line, a best score.
PTH_CLASSES = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "_codecs.encode",
)
DEEPSPEED_CLASSES = (
    *PTH_CLASSES,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_DCP = "torch.distributed.checkpoint"
DCP_CLASSES = (
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata",
      "TensorProperties", "MetadataIndex", "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
)  # fmt: skip


def _refusal(path: Path, error: BaseException) -> ConfigError:
    """Return the one line that says why a file is not read."""
    words = str(error)
    named = re.search(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", words)
    if named:
        return ConfigError(f"{path} is refused: it names {named[1]}, which is no tensor or plain value; nothing of it "
                           "was run")  # fmt: skip
    if isinstance(error, pickle.UnpicklingError):  # torch's words are many, and advise to trust the file
        found = re.search(r"(?i)(?:unsupported|invalid|trying to|can only|pickle data|corrupt)[^\n]*", words)
        words = f"it holds more than tensors and plain values, and nothing of it was run: {found[0] if found else ''}"
    return ConfigError(f"{path} cannot be read ({' '.join(words.split())[:150] or type(error).__name__})")


def read_pth(path: Path, classes: tuple[str, ...] = PTH_CLASSES) -> Any:
    """Return what `torch.save` wrote, on the CPU; `classes` are stood in for, any others are refused by ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    try:
        mapped = _is_plain_zip(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, name) for name in classes]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _BROKEN as error:
        raise _refusal(path, error) from error


def _is_plain_zip(file: Path | io.BytesIO) -> bool:
    """Tell whether a file is a zip, as `torch.save` writes; AssertionError if one that is packed, as it never does.

    Mapped into memory, packed bytes would be read as numbers; and a small pickle could be packed from a huge one.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    assert not packed, f"it is a compressed zip, in which {packed[0]} lies packed: unpack and zip it without"
    return True


def own_tensors(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return copies that need the file no more; raises ConfigError naming a tensor that claims more than the file has.

    A few bytes can say to be a tensor of any size: by strides of zero, as a sparse one, or on the `meta` device.
    """
    copies = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: {name!r} is no name of a tensor")
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConfigError(
                f"{path}: {name} {tuple(tensor.shape)} is no plain tensor, or larger than its bytes there"
            )
        copies[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copies


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def is_deepspeed(folder: Path) -> bool:
    """Tell whether DeepSpeed's `save_checkpoint` wrote a folder, or the tag in it."""
    found = (folder / "latest").is_file() or any(folder.glob("*mp_rank_*_model_states.pt"))
    return found and not (folder / METADATA).exists()


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a DeepSpeed folder, whole: the fp32 copies of ZeRO-1 to 3, else the module's own.

    `folder` is what was given to `save_checkpoint` (its `latest` tag is taken), or one tag in it. Any number of ranks;
    neither tensor nor pipeline parallel.
    """
    tag = folder
    if (folder / "latest").is_file():
        word = (folder / "latest").read_text(errors="replace").strip()
        if Path(word).name != word or not (folder / word).is_dir():
            raise ConfigError(f"{folder / 'latest'} names {word[:100]!r}, which is no folder beside it")
        tag = folder / word
    files = {"model": {}, "optim": {}}
    for path in tag.glob("*_states.pt"):
        found = re.fullmatch(
            r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt", path.name
        )
        if not found or int(found[2]):
            raise ConfigError(f"{path} is of a tensor, pipeline or expert parallel model, which is not read")
        files[found[3]][int(found[1] or 0)] = path
    if not files["model"]:
        raise ConfigError(f"{tag} has no file *mp_rank_00_model_states.pt")
    for kind, ranks in files.items():
        if sorted(ranks) != list(range(len(ranks))):
            raise ConfigError(f"{tag} lacks {kind} files of some ranks: it has those of {sorted(ranks)}")
    models = [read_pth(files["model"][rank], DEEPSPEED_CLASSES) for rank in sorted(files["model"])]
    optims = [read_pth(files["optim"][rank], DEEPSPEED_CLASSES) for rank in sorted(files["optim"])]
    try:
        weights = _assembled(models, [optim["optimizer_state_dict"] for optim in optims])
    except _BROKEN as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise ConfigError(f"{tag} is not as DeepSpeed writes it ({words})") from error
    return own_tensors(weights, tag)


def _assembled(models: list[dict[str, Any]], optims: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the ranks' parts together; raises what is in `_BROKEN` where they do not fit."""
    first = models[0]
    weights = {name: tensor for name, tensor in first["module"].items() if isinstance(tensor, Tensor)}
    if not optims or not any(key in optims[0] for key in ("fp32_flat_groups", "single_partition_of_fp32_groups")):
        halves = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()} & {"float16", "bfloat16"}
        if halves:
            logger.warning("weights lie there in %s only", " and ".join(sorted(halves)))
    else:
        count = optims[0]["partition_count"]
        ranks = max(count) if isinstance(count, list) else count
        assert ranks == len(optims), f"of {ranks} ranks' optimizer files {len(optims)} are there"
        groups = [{name: tuple(shape) for name, shape in group.items()} for group in first["param_shapes"]]
        if "fp32_flat_groups" in optims[0]:
            assert len(models) == ranks, f"of {ranks} ranks' model files {len(models)} are there"
            buffers = {name: weights[name] for name in first["buffer_names"] if name in weights}
            cuts = [torch.cat([part.view(-1) for part in optim["fp32_flat_groups"]]) for optim in optims]
            weights = buffers | _interleaved(cuts, {n: shape for group in groups for n, shape in group.items()})
            for name, shape in (first["frozen_param_shapes"] or {}).items():
                weights |= _interleaved([m["frozen_param_fragments"][name].view(-1) for m in models], {name: shape})
        else:
            paddings = optims[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
            for index, group in enumerate(groups):
                flat = torch.cat([optim["single_partition_of_fp32_groups"][index].view(-1) for optim in optims])
                start = 0
                for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
                    weights[name] = flat.narrow(0, start, math.prod(shape)).view(shape)
                    start += math.prod(shape) + padding
                assert flat.numel() - start < 2 * ranks * len(optims) + sum(paddings[index]), "numbers are left over"
    for name, origin in first.get("shared_params") or []:
        weights[name] = weights[origin]
    return weights


def _interleaved(cuts: list[Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return ZeRO-3's parameters: each is cut evenly over the ranks, whose cuts lie one after another."""
    start, whole = 0, {}
    for name, shape in shapes.items():
        numbers = math.prod(shape)
        share = -(-numbers // len(cuts))
        whole[name] = torch.cat([cut.narrow(0, start, share) for cut in cuts])[:numbers].view(tuple(shape))
        start += share
    return whole


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) in DCP_CLASSES:
            return Inert
        raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a DCP folder, whole, under the names they were saved by; what is no tensor is left out."""
    path = folder / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        shapes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()
                  if isinstance(name, str) and hasattr(entry, "size")}  # fmt: skip
        tensors, filled = {}, dict.fromkeys(shapes, 0)
        places = [(index, place) for index, place in metadata.storage_data.items() if index.fqn in shapes]
        on_disk = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        for name, shape in shapes.items():
            assert all(type(side) is int and side >= 0 for side in shape), f"{name} has no shape"
            assert math.prod(shape) <= on_disk, f"{name} is larger than the files"
    except _BROKEN as error:
        raise _refusal(path, error) from error
    for index, place in places:
        name = index.fqn
        chunk = _chunk(folder, name, place)
        if name not in tensors:
            tensors[name] = torch.empty(shapes[name], dtype=chunk.dtype)
        into = tensors[name]
        try:
            for dim, offset in enumerate(index.offset or [0] * chunk.ndim):
                into = into.narrow(dim, offset, chunk.shape[dim])
            assert into.shape == chunk.shape, f"a chunk of {tuple(chunk.shape)} lies at {tuple(index.offset)}"
            into.copy_(chunk)
        except _BROKEN as error:
            words = " ".join(str(error).split())[:150]
            raise ConfigError(f"{path}: {name} of shape {shapes[name]} is damaged ({words})") from error
        filled[name] += chunk.numel()
    for name, shape in shapes.items():
        if filled[name] != math.prod(shape) or name not in tensors:
            raise ConfigError(f"{folder}: {name} has {math.prod(shape)} numbers, of which {filled[name]} are there")
    return tensors


def _chunk(folder: Path, name: str, place: Any) -> Tensor:
    """Return one chunk of a tensor; raises ConfigError naming its file and tensor."""
    path = folder / METADATA
    try:
        assert Path(place.relative_path).name == place.relative_path, f"{name} lies outside the folder"
        assert not getattr(place, "transform_descriptors", None), f"{name} is compressed, which is not read"
        path = folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        _is_plain_zip(content)
        content.seek(0)
        chunk = torch.load(content, map_location="cpu", weights_only=True)
        assert isinstance(chunk, Tensor), f"{name} is no tensor"
    except _BROKEN as error:
        raise _refusal(path, error) from error
    return chunk


def write_dcp(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors into a new DCP folder, by this process alone; `torch.distributed.checkpoint.load` reads it."""
    with warnings.catch_warnings():  # that it is alone, it is told
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
