"""Every arrow between formats: there and back to the bit, and the same features by the tools they are for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from lmim import load_encoder
from lmim.__main__ import main
from lmim.config import ConfigError
from lmim.export import SUFFIXES, TOLERANCE, WHOLE, export
from lmim.formats import read_weights
from tests.conftest import REPOSITORY, train_command

GOLDEN = Path(__file__).parent / "data" / "golden"
PTH = GOLDEN / "infonce_gap" / "checkpoint_latest.pth"
SOURCES = ("run", "infonce_gap", "norm_l2_nogap", "all_targets_no_cue")


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run folder of a tiny training."""
    folder = tmp_path_factory.mktemp("export") / "run"
    assert main(train_command(shards, folder, "parallel.backend=local", "optim.duration=3st")[3:]) == 0
    return folder


@pytest.fixture
def source(request, run) -> tuple[Path, int]:
    """A path to read from, and its number of heads."""
    if request.param == "run":
        return run, 2
    case = json.loads((GOLDEN / request.param / "case.json").read_text())
    return GOLDEN / request.param / "checkpoint_latest.pth", case["config"]["num_heads"]


def encoder_tensors(path: Path, which: str = "online") -> dict[str, torch.Tensor]:
    found = read_weights(path).encoder(which)
    return {name: tensor for name, tensor in found.items() if not name.startswith("projector.")}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_every_arrow_and_back(source, tmp_path):
    """From each readable form to each written one; the checks that `export` makes itself are asked for as well."""
    (origin, heads), forms = source, [form for form in SUFFIXES if form != "onnx"]
    whole = read_weights(origin).tensors
    firsts = {}
    for form in forms:
        firsts[form] = tmp_path / f"first-{form}{SUFFIXES[form]}"
        assert export(origin, firsts[form], form, num_heads=heads, check=True).difference == 0
    for first in forms:
        for second in forms:
            path = tmp_path / f"{first}-{second}{SUFFIXES[second]}"
            if second == "authors" and first not in WHOLE:
                with pytest.raises(ConfigError, match="lacks the projector, target or decoder"):
                    export(firsts[first], path, second, num_heads=heads)
                continue
            export(firsts[first], path, second, num_heads=heads)
            if first in WHOLE and second in WHOLE:
                assert same(read_weights(path).tensors, whole), (first, second)
            assert same(encoder_tensors(path), encoder_tensors(origin)), (first, second)


@pytest.mark.parametrize(
    ("source", "which"),
    [("run", "online"), ("infonce_gap", "target")]
    + [pytest.param(source, which, marks=pytest.mark.slow) for source in SOURCES for which in ("online", "target")],
    indirect=["source"],
)
def test_other_tools_see_the_same_features(source, which, tmp_path):
    """timm, transformers and onnxruntime, on images of their own, one and several at a time."""
    transformers, onnxruntime = pytest.importorskip("transformers"), pytest.importorskip("onnxruntime")
    origin, heads = source
    encoder = load_encoder(origin, which, num_heads=heads)
    side = encoder.grid_size * encoder.patch_size
    images = torch.randn(5, 3, side, side)
    with torch.no_grad():
        expected = encoder.forward_features(images)
        assert expected.std() > 0.1

        export(origin, tmp_path / "timm", "timm", which, num_heads=heads)
        model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=0)

        export(origin, tmp_path / "hf", "huggingface", which, num_heads=heads)
        model = transformers.AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=1e-5, rtol=0)

    export(origin, tmp_path / "vit.onnx", "onnx", which, num_heads=heads)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    for part in (slice(0, 1), slice(0, 5)):
        tokens = torch.from_numpy(session.run(None, {"images": images[part].numpy()})[0])
        torch.testing.assert_close(tokens, expected[part], atol=1e-5, rtol=0)
    if which == "target":
        assert not torch.equal(expected, load_encoder(origin, num_heads=heads).forward_features(images))


def test_timm_opens_a_standard_size_by_its_name(tmp_path):
    """ViT-Ti/16 at 224 px has a name of timm's: the file loads into that model too."""
    from safetensors.torch import save_file

    from lmim.vit import VisionTransformer

    encoder = VisionTransformer(embed_dim=192, depth=12, num_heads=3, projector_depth=0).eval()
    encoder.init_weights(1)
    save_file({f"online.{name}": t for name, t in encoder.state_dict().items()}, tmp_path / "e.safetensors")
    export(tmp_path / "e.safetensors", tmp_path / "timm", "timm")
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    by_name = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=tmp_path / "timm" / "model.safetensors"
    ).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = encoder.forward_features(images)
        torch.testing.assert_close(by_name.forward_features(images), wanted, atol=1e-5, rtol=0)


def test_transformers_prepares_images_as_the_evaluation_does(tmp_path):
    """Short side to 256/224 of the crop, centre crop, ImageNet's mean and deviation."""
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    from torchvision.transforms import v2

    export(PTH, tmp_path / "hf", "huggingface", num_heads=4)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    side = processor.crop_size["height"]
    pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
    theirs = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    resize = v2.Resize(round(side * 256 / 224), v2.InterpolationMode.BICUBIC)
    wanted = v2.functional.to_image(v2.CenterCrop(side)(resize(Image.fromarray(pixels)))).float() / 255
    wanted = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(wanted)
    assert theirs.shape == wanted.shape == (3, side, side)
    torch.testing.assert_close(theirs, wanted, atol=2e-2, rtol=0)


def test_another_grid_is_exported(tmp_path):
    export(PTH, tmp_path / "timm", "timm", grid=6, num_heads=4, check=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    images = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        wanted = load_encoder(PTH, num_heads=4).forward_features(images)
        torch.testing.assert_close(model.forward_features(images), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["timm", "huggingface", "onnx"])
def test_a_check_that_fails_leaves_nothing(tmp_path, monkeypatch, format):
    """The other tool is made to see other weights than those that were written."""
    import lmim.export as module

    def writes_another(encoder, path):
        encoder.norm.bias.data += 10 * TOLERANCE * encoder.forward_features(module.check_images(encoder)).abs().max()
        write(encoder, path)
        encoder.norm.bias.data -= 1

    write = module._WRITERS[format]
    monkeypatch.setitem(module._WRITERS, format, writes_another)
    destination = tmp_path / f"out{SUFFIXES[format]}"
    with pytest.raises(ConfigError, match="is not written: its features differ"):
        export(PTH, destination, format, num_heads=4, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        export(PTH, tmp_path / "file" / "x.safetensors", "safetensors")
    (tmp_path / "x.onnx.data").touch()
    with pytest.raises(ConfigError, match=r"x\.onnx\.data exists"):
        export(PTH, tmp_path / "x.onnx", "onnx", num_heads=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x"], "--format is not given"),
        (["x.safetensors", "--which", "target"], "leave out which"),
        (["x.pth", "--grid", "7"], "leave out grid"),
        (["x", "--format", "safetensors"], "must end in .safetensors"),
        (["x", "--format", "timm"], "num_heads"),
        (["x", "--format", "timm", "--num-heads", "5"], "must divide"),
        (["x", "--format", "timm", "--num-heads", "4", "--grid", "-1"], "must be at least 1"),
        (["there.safetensors"], "exists"),
        ([".", "--format", "dcp"], "a folder that exists"),
        (["new/..", "--format", "dcp"], "a folder that exists"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").touch()
    assert main(["export", str(PTH), *arguments]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.safetensors"]


def test_the_command_and_the_script(run, tmp_path):
    """The script does what the command does; alone, each tells what a path holds."""
    command = [sys.executable, "tools/convert_checkpoint.py", run]
    done = subprocess.run([*command, tmp_path / "e.safetensors", "--check"], cwd=REPOSITORY, capture_output=True,
                          text=True, check=True)  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["format"], told["which"], told["difference"], told["left_out"]) == ("safetensors", "all", 0.0, [])
    assert "largest difference" in done.stdout and "checkpoint of lmim train" in done.stdout
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["encoder"].startswith("width 32, depth 2, 2 heads")
    assert set(told["numbers"]) == {"online", "target", "decoder"}


def test_features_in_three_lines(run):
    import lmim

    encoder = lmim.load_encoder(run)
    images = torch.randn(2, 3, 28, 28)
    tokens = encoder.forward_features(images)
    pooled = encoder.forward_intermediates(images, 1)[0][:, 1:].mean(1)
    assert tokens.shape == (2, 50, 32) and pooled.shape == (2, 32)
