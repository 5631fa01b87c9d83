"""Weights, written as what other tools read, and held against what those make of them.

Owns the files and folders of every format that is written. The invariant: a destination appears whole or not at all,
and nothing that exists is written over.

    authors      a .pth of the authors' code: both encoders and the decoder
    safetensors  one .safetensors file under lmim's names: whatever the source has
    dcp          a folder of `torch.distributed.checkpoint` under lmim's names: whatever the source has
    timm         a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`: one encoder
    huggingface  a folder for transformers' `AutoModel.from_pretrained(FOLDER)`: one encoder
    onnx         a graph from images (batch, 3, S, S), normalised, to tokens (batch, 1 + N, D): one encoder

The last three end at the last norm, as `forward_features` does, and know no projector.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lmim import convert, pickles, store
from lmim.config import ConfigError
from lmim.formats import SIZES_FILE, SIZES_KEY, Weights, build_encoder, heads_of, read_weights
from lmim.options import VARIANTS
from lmim.patches import IMAGENET_MEAN, IMAGENET_STD
from lmim.vit import NORM_EPS, VisionTransformer

logger = logging.getLogger(__name__)
SUFFIXES = {"authors": ".pth", "safetensors": ".safetensors", "dcp": "", "timm": "", "huggingface": "", "onnx": ".onnx"}
WHOLE = ("authors", "safetensors", "dcp")  # formats of all that a source has
ONNX_OPSET = 20  # the first that has GELU
ONNX_FILE_BYTES = 1 << 31  # protobuf's limit; beyond it weights lie in a second file
TOLERANCE = 1e-5  # of features in fp32, relative to the largest
CHECK_BATCH = 3


class Exported(NamedTuple):
    """What was read and written."""

    source: str
    kind: str
    destination: str
    format: str
    which: str  # "online" or "target"; "all" for formats of all that there is
    changed: list[str]  # what was done to the tensors, in words
    left_out: list[str]  # names of the source that the destination has no place for
    difference: float | None  # of features on the same images, relative to the largest; None if that was not asked for


def export(
    source: str | Path,
    destination: str | Path,
    format: str,
    which: str | None = None,
    *,
    num_heads: int | None = None,
    grid: int | None = None,
    check: bool = False,
) -> Exported:
    """Read weights from anywhere and write them as one of `SUFFIXES`; raises ConfigError where that cannot be.

    `which` is the encoder for formats that hold one (default: online). `grid` resizes its positions for images of so
    many cells a side. With `check` what was written is read by the tool it is for, and must give the same features on
    the same images, to `TOLERANCE`; else nothing is left of it.
    """
    destination = Path(destination)
    _refuse_mistakes(destination, format, which, grid)
    weights = read_weights(source)
    temporary = destination.with_name(f".{destination.name}.tmp")
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        path = temporary / destination.name
        if format in WHOLE:
            left_out, difference = _whole(weights, format, path, num_heads, check)
        else:
            left_out, difference = _one(weights, format, which or "online", path, num_heads, grid, check)
        if difference is not None and not difference <= TOLERANCE:
            raise ConfigError(f"{destination} is not written: its features differ from those of {weights.path} by "
                              f"{difference:.1e} of the largest, more than {TOLERANCE:.0e}")  # fmt: skip
        for part in sorted(temporary.iterdir(), key=lambda part: part == path):  # the destination itself comes last
            part.rename(destination.with_name(part.name))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{destination} cannot be written: {error}") from error
    finally:
        _remove(temporary)
    return Exported(str(weights.path), weights.kind, str(destination), format,
                    "all" if format in WHOLE else which or "online", list(weights.changed), left_out,
                    difference)  # fmt: skip


def format_of(destination: Path) -> str | None:
    """Return the format that a destination's suffix stands for, if any."""
    return next((name for name, suffix in SUFFIXES.items() if suffix and suffix == destination.suffix), None)


def _refuse_mistakes(destination: Path, format: str, which: str | None, grid: int | None) -> None:
    if format not in SUFFIXES:
        raise ConfigError(f"format ({format}) must be one of {', '.join(SUFFIXES)}")
    if destination.name in ("", ".."):
        raise ConfigError(f"{destination} is a folder that exists: end it in the name of what shall be written")
    if SUFFIXES[format] and destination.suffix != SUFFIXES[format]:
        raise ConfigError(f"{destination} must end in {SUFFIXES[format]} to be of format {format}")
    if format in WHOLE and (which is not None or grid is not None):
        raise ConfigError(f"{format} holds all there is, as it is: leave out {'grid' if which is None else 'which'}")
    for path in (destination, destination.with_name(f"{destination.name}.data")):
        if path.exists() and (path == destination or format == "onnx"):
            raise ConfigError(f"{path} exists: give another name, or take it away")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def _unused(weights: Weights, which: str) -> list[str]:
    """Return the names that an encoder without its projector leaves behind."""
    return [name for name in weights.tensors if not name.startswith(f"{which}.") or name.startswith(f"{which}.proj")]


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
    store.sync(path)


# --- all that a source has -------------------------------------------------------------------------------------------


def _whole(
    weights: Weights, format: str, path: Path, num_heads: int | None, check: bool
) -> tuple[list[str], float | None]:
    """Write everything; return what is left out, and the difference of features if that is asked for."""
    _write_whole(weights, format, num_heads, path)
    return list(weights.left_out), _compare_whole(weights, path, num_heads) if check else None


def _write_whole(weights: Weights, format: str, num_heads: int | None, path: Path) -> None:
    said = {"num_heads": weights.sizes["num_heads"] or num_heads, "norm_eps": weights.sizes["norm_eps"]}
    if format == "authors":
        needed = ("online.projector.linear0.weight", "target.cls_token", "decoder.cls_token")
        if not all(name in weights.tensors for name in needed):
            raise ConfigError(f"{weights.path} ({weights.kind}) lacks the projector, target or decoder that the "
                              f"authors' code wants: take a format other than authors")  # fmt: skip
        if "decoder.blocks.0.cross_attn.proj.weight" not in weights.tensors:
            raise ConfigError(f"{weights.path} has a decoder of self-attention (model.decoder_attention), and the "
                              "authors' code one of cross-attention: take a format other than authors")  # fmt: skip
        state = {f"module.{name}": tensor for name, tensor in convert.to_authors(weights.tensors).items()}
        torch.save({"state_dict": state}, path)
        store.sync(path)
    elif format == "safetensors":
        save_file(weights.tensors, path, metadata={"format": "pt", SIZES_KEY: json.dumps(said)})
        store.sync(path)
    else:
        pickles.write_dcp(path, weights.tensors)
        _json(path / SIZES_FILE, said)


def _compare_whole(weights: Weights, path: Path, num_heads: int | None) -> float:
    """Read back what was written: tensors must be the same to the bit; return the difference of features."""
    again = read_weights(path)
    for name in weights.tensors.keys() | again.tensors.keys():
        ours, theirs = weights.tensors.get(name), again.tensors.get(name)
        if ours is None or theirs is None or not torch.equal(ours, theirs):
            raise ConfigError(f"{path.name} is not written: {name} came back different")
    encoders = [build_encoder(side, num_heads=heads_of(weights, num_heads)) for side in (weights, again)]
    images = check_images(encoders[0])
    with torch.no_grad():
        return _difference(*(encoder.forward_features(images) for encoder in encoders))


# --- one encoder -----------------------------------------------------------------------------------------------------


def _one(
    weights: Weights, format: str, which: str, path: Path, num_heads: int | None, grid: int | None, check: bool
) -> tuple[list[str], float | None]:
    """Write one encoder; return what is left out, and the difference of features if that is asked for."""
    encoder = build_encoder(weights, which, grid=grid, num_heads=num_heads)
    _WRITERS[format](encoder, path)
    left_out = [*weights.left_out, *_unused(weights, which)]
    return left_out, compare(encoder, format, path) if check else None


def _write_timm(encoder: VisionTransformer, path: Path) -> None:
    if encoder.norm.eps != NORM_EPS:
        logger.warning("timm's norms add %g to the variance and not %g: features differ a little", NORM_EPS,
                       encoder.norm.eps)  # fmt: skip
    side = encoder.grid_size * encoder.patch_size
    variant = next((name for name, sizes in VARIANTS.items() if sizes["embed_dim"] == encoder.embed_dim), "base")
    architecture = f"vit_{variant}_patch{encoder.patch_size}_{side}"
    sizes = dict(img_size=side, patch_size=encoder.patch_size, embed_dim=encoder.embed_dim, depth=len(encoder.blocks),
                 num_heads=encoder.blocks[0].attn.num_heads, mlp_ratio=encoder.mlp_ratio)  # fmt: skip
    config = {
        "architecture": architecture if timm.is_model(architecture) else "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": sizes,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "num_classes": 0,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    path.mkdir()
    save_file(convert.to_timm(encoder.state_dict(), encoder.patch_size), path / "model.safetensors", {"format": "pt"})
    store.sync(path / "model.safetensors")
    _json(path / "config.json", config)


def _write_huggingface(encoder: VisionTransformer, path: Path) -> None:
    side = encoder.grid_size * encoder.patch_size
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": side,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": encoder.norm.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "encoder_stride": encoder.patch_size,
    }
    # short side to 256/224 of the crop, as the paper's evaluation; transformers' ViT processor knows no crop
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    path.mkdir()
    state = convert.to_huggingface(encoder.state_dict(), encoder.patch_size)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    store.sync(path / "model.safetensors")
    _json(path / "preprocessor_config.json", processor)
    _json(path / "config.json", config)


class _Features(nn.Module):
    """What a graph is made of: images in, tokens out."""

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.forward_features(images)


def _write_onnx(encoder: VisionTransformer, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  what torch's exporter is built on
    except ImportError as error:
        raise ConfigError("format onnx needs onnxscript: pip install 'lmim[export]'") from error
    from torch.export import Dim

    images = check_images(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Features(encoder).eval(), (images,), input_names=["images"], output_names=["tokens"],
            dynamic_shapes={"images": {0: Dim("batch")}}, opset_version=ONNX_OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    program.model.metadata_props.update(mean=json.dumps(IMAGENET_MEAN), std=json.dumps(IMAGENET_STD))
    numbers = sum(tensor.numel() for tensor in encoder.state_dict().values())
    program.save(path, external_data=4 * numbers > 0.9 * ONNX_FILE_BYTES)
    store.sync(path)


_WRITERS = {"timm": _write_timm, "huggingface": _write_huggingface, "onnx": _write_onnx}


def check_images(encoder: VisionTransformer) -> Tensor:
    """Return random images of the size that an encoder's positions are for, the same in each call."""
    side = encoder.grid_size * encoder.patch_size
    return torch.randn(CHECK_BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(encoder: VisionTransformer, format: str, path: Path) -> float:
    """Return how far the features of what lies at `path`, read by the tool it is for, are from the encoder's.

    The largest difference on `check_images`, relative to the largest feature.
    """
    images = check_images(encoder)
    try:
        theirs = _READERS[format](path, images)
    except ImportError as error:
        raise ConfigError(f"check of {format} needs {error.name}: pip install 'lmim[export]'") from error
    return _difference(encoder.forward_features(images), theirs)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise ConfigError(f"features have shape {tuple(theirs.shape)} and not {tuple(ours.shape)}")
    return float((ours - theirs).abs().max() / ours.abs().max())


def _timm_features(path: Path, images: Tensor) -> Tensor:
    return timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval().forward_features(images)


def _transformers_features(path: Path, images: Tensor) -> Tensor:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, add_pooling_layer=False, dtype=torch.float32).eval()
    return model(images).last_hidden_state


def _onnx_features(path: Path, images: Tensor) -> Tensor:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    # one image and several: the batch has to be free
    parts = [
        torch.from_numpy(session.run(["tokens"], {"images": part.numpy()})[0]) for part in (images[:1], images[1:])
    ]
    return torch.cat(parts)


_READERS = {"timm": _timm_features, "huggingface": _transformers_features, "onnx": _onnx_features}
