"""Weights from anywhere: read as those who wrote them do, and refused by name where they are not what they say."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lmim import load_encoder
from lmim.config import ConfigError
from lmim.export import export
from lmim.formats import read_weights
from lmim.pickles import write_dcp
from lmim.vit import VisionTransformer, resized_positions, sincos_positions
from tests.foreign import KINDS, write_foreign

GOLDEN = Path(__file__).parent / "data" / "golden"
PTH = GOLDEN / "infonce_gap" / "checkpoint_latest.pth"
HEADS = 4


def one_line(error) -> str:
    words = str(error.value)
    assert "\n" not in words and words
    return words


# --- as those who wrote them -----------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [pytest.param("zero3", 2, marks=pytest.mark.slow), ("fsdp2", 2)]
    + [pytest.param(kind, ranks, marks=pytest.mark.slow) for kind in KINDS for ranks in (1, 3)],
)
def test_sharded_folders_of_other_code(tmp_path, kind, ranks):
    """Frozen weights too, which DeepSpeed's own script drops at stage 1."""
    write_foreign(kind, ranks, tmp_path)
    found, truth = read_weights(tmp_path / "saved"), load_file(tmp_path / "truth.safetensors")
    assert found.tensors.keys() == truth.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in truth.items())
    assert load_encoder(tmp_path / "saved", "target", num_heads=2).forward_features(torch.zeros(1, 3, 28, 28)).ndim == 3
    if kind != "fsdp2":
        tag = (tmp_path / "saved" / "latest").read_text()
        assert read_weights(tmp_path / "saved" / tag).tensors.keys() == truth.keys()
        whole = sorted(path.name for path in (tmp_path / "saved" / tag).iterdir())
        for name in whole:  # a rank's file is missing
            (tmp_path / "saved" / tag / name).rename(tmp_path / "away")
            if len(whole) > 1 and (ranks > 1 or "model" in name):
                with pytest.raises(ConfigError, match=str(tmp_path)):
                    read_weights(tmp_path / "saved")
            (tmp_path / "away").rename(tmp_path / "saved" / tag / name)


TIMM = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


@pytest.mark.parametrize("wrapper", ["bare", "model", "state_dict", "teacher", "safetensors"])
def test_a_vit_of_timm(tmp_path, wrapper):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TIMM).eval()
    state = model.state_dict()
    path = tmp_path / ("vit.safetensors" if wrapper == "safetensors" else "vit.pth")
    if wrapper == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if wrapper == "bare" else {wrapper: state, "epoch": 3}, path)
    encoder = load_encoder(path, num_heads=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(images), model.forward_features(images), atol=1e-5, rtol=0)
        ours = encoder.forward_intermediates(images, [0, 1])
        theirs = model.forward_intermediates(images, [0, 1], intermediates_only=True, output_fmt="NLC")
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[:, 1:], wanted, atol=1e-5, rtol=0)
    assert set(read_weights(path).left_out) == {"head.weight", "head.bias"}
    with pytest.raises(ConfigError, match="no target"):
        load_encoder(path, "target", num_heads=3)


def test_a_file_of_mae(tmp_path):
    """MAE's own file: an encoder under `model`, with a decoder beside it that is left out."""
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 24)}
    torch.save({"model": state | decoder}, tmp_path / "mae_pretrain.pth")
    assert set(read_weights(tmp_path / "mae_pretrain.pth").left_out) == set(decoder)
    load_encoder(tmp_path / "mae_pretrain.pth", num_heads=3)


@pytest.mark.parametrize(("architecture", "heads"), [("vit_small_patch16_224", 6), ("vit_medium_patch16_gap_256", 8)])
def test_heads_are_asked_of_timm_by_the_architectures_name(tmp_path, architecture, heads):
    """A folder as timm writes it for the hub names the architecture, whose heads need not be in it."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": {}}))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**TIMM, "num_heads": heads, "embed_dim": 48})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert load_encoder(tmp_path).blocks[0].attn.num_heads == heads


@pytest.mark.parametrize("form", ["safetensors", "in parts", "bin", "with a head", "mae"])
def test_a_vit_of_transformers(tmp_path, form):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, image_size=32,
                 patch_size=8, layer_norm_eps=1e-4)  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    if form == "mae":
        config = transformers.ViTMAEConfig(**sizes, mask_ratio=0.0, decoder_hidden_size=12, decoder_num_hidden_layers=1,
                                           decoder_num_attention_heads=2)  # fmt: skip
        model = transformers.ViTMAEForPreTraining(config).eval()
        in_order = torch.arange(16.0).expand(2, 16)
        wanted = model.vit(images, noise=in_order).last_hidden_state
    elif form == "with a head":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()
        wanted = model.vit(images).last_hidden_state
    else:
        model = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()
        wanted = model(images).last_hidden_state
    if form == "bin":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "in parts" else "5GB")
    assert (form == "in parts") == (tmp_path / "model.safetensors.index.json").exists()
    encoder = load_encoder(tmp_path)
    assert encoder.norm.eps == 1e-4 and encoder.blocks[0].mlp.fc1.out_features == 50
    torch.testing.assert_close(encoder.forward_features(images), wanted, atol=1e-5, rtol=0)


# --- other resolutions -----------------------------------------------------------------------------------------------


def test_fixed_positions_are_computed_anew_for_another_grid():
    """A cell's place in the image counts: the mean of its four quarters' places is its own."""
    table, fine = sincos_positions(32, 7), sincos_positions(32, 7, (14, 14))
    assert torch.equal(sincos_positions(32, 7, (7, 7)), table)
    assert torch.equal(resized_positions(table, 7, (14, 14)), fine)
    assert fine[0, 0].count_nonzero() == 0

    def places(table, grid):  # of the lowest frequency: sin(xω) is at most 0.003 here, and so as good as xω
        lowest = table.shape[-1] // 4 - 1
        waves = table[0, 1:, [lowest, lowest + table.shape[-1] // 2]].double()
        return (waves.asin() / 10000.0 ** (-lowest / (lowest + 1))).view(grid, grid, 2)

    quarters = places(fine, 14).view(7, 2, 7, 2, 2).mean(dim=(1, 3))
    torch.testing.assert_close(quarters, places(table, 7), atol=1e-4, rtol=0)


def test_learned_positions_are_resampled_as_timm_does():
    learned = torch.randn(1, 1 + 16, 24)
    wanted = timm.layers.resample_abs_pos_embed(learned, [6, 6], num_prefix_tokens=1)
    assert torch.equal(resized_positions(learned, 4, (6, 6)), wanted)


@pytest.mark.parametrize("learned", [False, True])
def test_load_encoder_at_another_grid(tmp_path, learned):
    encoder = VisionTransformer(grid_size=4, patch_size=4, embed_dim=32, depth=1, num_heads=2, projector_dim=8)
    encoder.init_weights()
    if learned:
        torch.nn.init.normal_(encoder.pos_embed)
    save_file({f"online.{name}": t for name, t in encoder.state_dict().items()}, tmp_path / "e.safetensors")
    wide = load_encoder(tmp_path / "e.safetensors", grid=8, num_heads=2)
    assert wide.grid_size == 8 and wide.pos_embed.shape == (1, 65, 32)
    images = torch.randn(2, 3, 32, 32)
    expected = load_encoder(tmp_path / "e.safetensors", num_heads=2).forward_features(images)
    assert torch.equal(wide.forward_features(images), expected)


# --- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command in whoever unpickles it."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def plant(place: str, folder: Path, canary: Path) -> tuple[Path, Path]:
    """Put a hostile pickle somewhere; return (what is read, the file that has to be named)."""
    evil = Evil(canary)
    if place in ("pth", "old pth", "state dict"):
        path = folder / "model.pth"
        content = {"state_dict": {"module.encoder.norm.weight": evil}} if place == "state dict" else evil
        torch.save(content, path, _use_new_zipfile_serialization=place != "old pth")
        return path, path
    if place == "bare pickle":
        path = folder / "model.pth"
        path.write_bytes(pickle.dumps(evil))
        return path, path
    if place == "transformers":
        (folder / "config.json").write_text('{"model_type": "vit"}')
        torch.save({"embeddings.cls_token": evil}, folder / "pytorch_model.bin")
        return folder, folder / "pytorch_model.bin"
    if place == "deepspeed":
        (folder / "latest").write_text("global_step1")
        (folder / "global_step1").mkdir()
        path = folder / "global_step1" / "mp_rank_00_model_states.pt"
        torch.save({"module": evil}, path)
        return folder, path
    export(PTH, folder / "dcp", "dcp")
    if place == "dcp metadata":
        (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(evil))
        return folder / "dcp", folder / "dcp" / ".metadata"
    chunk = next((folder / "dcp").glob("*.distcp"))
    size = chunk.stat().st_size
    torch.save(evil, folder / "evil.pt")
    content = (folder / "evil.pt").read_bytes()
    metadata = pickle.loads((folder / "dcp" / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == "online.cls_token":
            metadata.storage_data[index] = type(info)(info.relative_path, size, len(content))
    chunk.write_bytes(chunk.read_bytes() + content)
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder / "dcp", chunk


@pytest.mark.parametrize(
    "place",
    ["pth", "old pth", "bare pickle", "state dict", "transformers", "deepspeed", "dcp metadata", "dcp chunk"],
)
def test_a_pickle_is_not_run(tmp_path, place):
    canary = tmp_path / "ran"
    path, culprit = plant(place, tmp_path, canary)
    with pytest.raises(ConfigError) as error:
        read_weights(path)
    assert str(culprit) in one_line(error)
    assert "nothing of it was run" in str(error.value)
    assert "posix.system" in str(error.value) or place == "bare pickle"
    assert not canary.exists()


def test_the_hostile_pickle_would_run(tmp_path):
    """Else the test above shows nothing."""
    path, _ = plant("pth", tmp_path, tmp_path / "ran")
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


BOMBS = {
    "strides of zero": lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
    "on no device": lambda: torch.empty(1 << 20, 1 << 20, device="meta"),
    "sparse": lambda: torch.sparse_coo_tensor(size=(1 << 20, 1 << 20)),
    "integers": lambda: torch.zeros(3, dtype=torch.int64),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_tensor_that_claims_more_than_its_bytes(tmp_path, bomb):
    content = torch.load(PTH, weights_only=True)
    content["state_dict"]["module.encoder.norm.bias"] = BOMBS[bomb]()
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ConfigError) as error:
        load_encoder(tmp_path / "model.pth", num_heads=HEADS)
    assert "norm.bias" in one_line(error) and str(tmp_path / "model.pth") in str(error.value)


@pytest.mark.parametrize("part", ["", "data.pkl", "data/"])
def test_a_zip_that_is_packed_is_not_taken_for_weights(tmp_path, part):
    """Torch maps the packed bytes as if they were numbers; and a packed pickle can be a thousand times its size."""
    with zipfile.ZipFile(PTH) as plain, zipfile.ZipFile(tmp_path / "model.pth", "w") as packed:
        for entry in plain.infolist():
            how = zipfile.ZIP_DEFLATED if part in entry.filename else zipfile.ZIP_STORED
            packed.writestr(entry.filename, plain.read(entry), how)
    with pytest.raises(ConfigError) as error:
        read_weights(tmp_path / "model.pth")
    assert "compressed" in one_line(error) and str(tmp_path / "model.pth") in str(error.value)


def test_a_packed_chunk_is_refused(tmp_path):
    """A few kilobytes of it could fill the memory."""
    folder = tmp_path / "dcp"
    export(PTH, folder, "dcp")
    chunk, plain, packed = next(folder.glob("*.distcp")), io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1, 1, 32), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    metadata, size = pickle.loads((folder / ".metadata").read_bytes()), chunk.stat().st_size
    for index, info in metadata.storage_data.items():
        if index.fqn == "online.cls_token":
            metadata.storage_data[index] = type(info)(info.relative_path, size, len(packed.getvalue()))
    chunk.write_bytes(chunk.read_bytes() + packed.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError) as error:
        read_weights(folder)
    assert "compressed" in one_line(error) and str(chunk) in str(error.value)


@pytest.mark.parametrize("size", [(1.0, 1.0, 32.0), (True, True, 32), "abc", (1, -1, 32), (10**30,)])
def test_a_dcp_size_that_is_none_is_refused(tmp_path, size):
    folder = tmp_path / "dcp"
    export(PTH, folder, "dcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["online.cls_token"].size = size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError) as error:
        read_weights(folder)
    assert str(folder) in one_line(error)


@pytest.mark.parametrize("offset", [("a", 0, 0), (0, 0, 99), (0, 0, 0, 0)])
def test_a_dcp_offset_that_is_none_is_refused(tmp_path, offset):
    folder = tmp_path / "dcp"
    export(PTH, folder, "dcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    [index] = [index for index in metadata.storage_data if index.fqn == "online.cls_token"]
    place, moved = metadata.storage_data.pop(index), dataclasses.replace(index)
    object.__setattr__(moved, "offset", offset)
    metadata.storage_data[moved] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError) as error:
        read_weights(folder)
    assert "online.cls_token" in one_line(error) and str(folder) in str(error.value)


@pytest.mark.parametrize("content", [{"module": {7: torch.zeros(3)}}, {"module": {}, "shared_params": [[7, "a"]]}])
def test_a_deepspeed_name_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "latest").write_text("tag")
    (tmp_path / "tag").mkdir()
    content["module"] |= {"a": torch.zeros(3)}
    torch.save(content, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    with pytest.raises(ConfigError) as error:
        read_weights(tmp_path)
    assert "7 is no name" in one_line(error) and str(tmp_path) in str(error.value)


def test_what_training_scripts_leave_beside_weights_is_passed_over(tmp_path):
    """Their command line and a best score are named in the pickle, and stood in for."""
    content = torch.load(PTH, weights_only=True)
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "half": np.float32(0.5)}
    torch.save({**content, **beside}, tmp_path / "model.pth")
    ours, theirs = read_weights(tmp_path / "model.pth").tensors, read_weights(PTH).tensors
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def lying(header: dict | bytes, data: bytes = bytes(64), claim: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claim is None else claim) + text + data


ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
LIES = {
    "a header longer than the file": lying({"a": ENTRY}, claim=10_000),
    "a header of a petabyte": lying({"a": ENTRY}, claim=1 << 50),
    "offsets beyond the end": lying({"a": {**ENTRY, "data_offsets": [0, 640]}}),
    "offsets that run backward": lying({"a": {**ENTRY, "data_offsets": [64, 0]}}),
    "a shape that is larger than its bytes": lying({"a": {**ENTRY, "shape": [400, 400]}}),
    "a shape that overflows": lying({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}),
    "two tensors on the same bytes": lying({"a": ENTRY, "b": ENTRY}),
    "bytes that belong to nothing": lying({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}),
    "an unknown type": lying({"a": {**ENTRY, "dtype": "PICKLE"}}),
    "no JSON": lying(b"{not json"),
    "nothing at all": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies(tmp_path, lie):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(ConfigError) as error:
        load_encoder(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("said", ["7", '{"num_heads": 7}', '{"num_heads": -4}', '{"num_heads": "4"}', "{"])
def test_what_a_safetensors_file_says_of_itself_is_held_against_its_tensors(tmp_path, said):
    path = tmp_path / "model.safetensors"
    save_file(read_weights(PTH).tensors, path, metadata={"lmim": said})
    with pytest.raises(ConfigError) as error:
        load_encoder(path)
    assert str(path) in one_line(error)


CHANGES = {
    "missing": lambda state, name: state.pop(name),
    "of another shape": lambda state, name: state.update({name: torch.zeros(3, 7)}),
    "extra": lambda state, name: state.update({f"{name}.extra": torch.zeros(2)}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["authors", "safetensors", "dcp", "timm", "huggingface"])
def test_tensors_that_do_not_fit_are_named(tmp_path, form, change):
    suffix = {"authors": ".pth", "safetensors": ".safetensors"}.get(form, "")
    path = tmp_path / f"weights{suffix}"
    export(PTH, path, form, num_heads=HEADS)
    inner = "blocks.1.attn.proj.bias"
    name = {"authors": f"module.encoder.{inner}", "huggingface": "encoder.layer.1.attention.output.dense.bias",
            "timm": inner}.get(form, f"online.{inner}")  # fmt: skip
    file = path / "model.safetensors" if form in ("timm", "huggingface") else path
    if form == "dcp":
        state = read_weights(path).tensors
        CHANGES[change](state, name)
        shutil.rmtree(path)
        write_dcp(path, state)
    elif form == "authors":
        content = torch.load(path, weights_only=True)
        CHANGES[change](content["state_dict"], name)
        torch.save(content, path)
    else:
        state = load_file(file)
        CHANGES[change](state, name)
        save_file(state, file)
    with pytest.raises(ConfigError) as error:
        load_encoder(path, num_heads=HEADS)
    words = one_line(error)
    assert str(path) in words and inner in words


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("part", ["query", "value"])
def test_parts_of_attention_that_do_not_fit_each_other_are_named(tmp_path, part, shape):
    export(PTH, tmp_path / "vit", "huggingface", num_heads=HEADS)
    state = load_file(tmp_path / "vit" / "model.safetensors")
    state[f"encoder.layer.1.attention.attention.{part}.weight"] = torch.zeros(shape)
    save_file(state, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load_encoder(tmp_path / "vit")
    assert str(tmp_path / "vit") in one_line(error) and "blocks.1.attn.qkv.weight" in str(error.value)


def test_a_name_beside_the_models_parts_is_refused(tmp_path):
    save_file({**read_weights(PTH).tensors, "fourth.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors .*fourth\.weight belongs to none of online"):
        read_weights(tmp_path / "model.safetensors")


def test_layers_that_a_plain_vit_does_not_have_are_named(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, init_values=1e-5, **TIMM).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match=r"blocks\.0\.ls1\.gamma"):
        load_encoder(tmp_path / "vit.safetensors", num_heads=3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nothing", "does not exist"),
        (lambda folder: folder, "no run folder or checkpoint"),
        (lambda folder: (folder / "model.onnx").touch() or folder / "model.onnx", "is a graph"),
        (lambda folder: ((folder / "x.pth").write_bytes(b"") and None) or folder / "x.pth", "cannot be read"),
        (lambda folder: torch.save([1, 2], folder / "x.pth") or folder / "x.pth", "no state dict"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}') and folder, "bert"),
        (lambda folder: (folder / "config.json").write_text("[]") and folder, "no JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}') and folder, "lacks model.safet"),
        (lambda folder: (folder / "latest").write_text("../../etc") and folder, "no folder beside it"),
    ],
)
def test_what_is_no_checkpoint_gets_one_line(tmp_path, make, words):
    with pytest.raises(ConfigError) as error:
        load_encoder(make(tmp_path))
    assert words in one_line(error) and str(tmp_path) in str(error.value)


def test_one_ranks_part_of_a_checkpoint_is_no_checkpoint(tmp_path):
    path = tmp_path / "weights-00000.safetensors"
    save_file({"online.norm.weight": torch.zeros(3)}, path, metadata={"starts": '{"online.norm.weight": 3}'})
    with pytest.raises(ConfigError, match="give its folder"):
        load_encoder(path)


def test_files_beside_a_transformers_index_only(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(ConfigError, match="do not lie beside it"):
        load_encoder(tmp_path)
