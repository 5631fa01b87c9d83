"""The maps between names, held against the models whose names they are, on meta tensors up to ViT-H."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors import safe_open

from lmim import convert
from lmim.objective import LatentMIM
from lmim.options import VARIANTS, ModelConfig, ObjectiveConfig


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def full_size(request) -> tuple[str, dict, LatentMIM]:
    with torch.device("meta"):
        grid = 224 // VARIANTS[request.param]["patch_size"]
        model = LatentMIM(ModelConfig(request.param, grid_size=grid), ObjectiveConfig())
    return request.param, VARIANTS[request.param], model


def encoder_of(model: LatentMIM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.online.state_dict().items() if not name.startswith("projector.")}


def test_authors_names_come_back(full_size):
    ours = full_size[2].state_dict()
    theirs = convert.to_authors(ours)
    assert shapes(convert.from_authors(theirs)) == shapes(ours) and all(t.is_meta for t in theirs.values())
    naming, back, left_out = convert.to_ours({f"module.{name}": tensor for name, tensor in theirs.items()})
    assert (naming, shapes(back), left_out) == ("authors", shapes(ours), [])


def test_timm_names_are_timms(full_size):
    variant, sizes, model = full_size
    theirs = convert.to_timm(model.online.state_dict(), sizes["patch_size"])
    with torch.device("meta"):
        wanted = timm.create_model(f"vit_{variant}_patch{sizes['patch_size']}_224", num_classes=0).state_dict()
    assert shapes(theirs) == shapes(wanted) and all(t.is_meta for t in theirs.values())
    naming, back, left_out = convert.to_ours(theirs)
    assert (naming, left_out) == ("timm", [])
    assert shapes(back) == {f"online.{name}": shape for name, shape in shapes(encoder_of(model)).items()}


def test_huggingface_names_are_transformers(full_size, tmp_path):
    """Names are those of transformers' files, which from version 5 on are not those of its modules; both are read."""
    transformers = pytest.importorskip("transformers")
    _, sizes, model = full_size
    theirs = convert.to_huggingface(model.online.state_dict(), sizes["patch_size"])
    layers = dict(num_hidden_layers=sizes["depth"], patch_size=sizes["patch_size"])
    narrow = transformers.ViTConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8, **layers)
    transformers.ViTModel(narrow, add_pooling_layer=False).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == theirs.keys() and all(t.is_meta for t in theirs.values())
    config = transformers.ViTConfig(hidden_size=sizes["embed_dim"], num_attention_heads=sizes["num_heads"],
                                    intermediate_size=4 * sizes["embed_dim"], **layers)  # fmt: skip
    with torch.device("meta"):
        in_memory = transformers.ViTModel(config, add_pooling_layer=False).state_dict()
    wanted = {f"online.{name}": shape for name, shape in shapes(encoder_of(model)).items()}
    for state in (theirs, in_memory):
        naming, back, left_out = convert.to_ours({f"vit.{name}": tensor for name, tensor in state.items()})
        assert (naming, left_out) == ("huggingface", [])
        assert shapes(back) == wanted


def test_patches_and_a_convolution_say_the_same():
    generator = torch.Generator().manual_seed(0)
    patch, weight = torch.randn(1, 3, 4, 4, generator=generator), torch.randn(8, 48, generator=generator)
    by_patches = patch.permute(0, 2, 3, 1).flatten(1) @ weight.T
    convolution = convert.patches_to_convolution(weight, 4)
    by_convolution = torch.nn.functional.conv2d(patch, convolution).flatten(1)
    torch.testing.assert_close(by_patches, by_convolution, atol=1e-5, rtol=1e-5)
    assert torch.equal(convert.convolution_to_patches(convolution), weight)


@pytest.mark.parametrize(
    ("prefix", "naming"),
    [
        ("", "timm"),
        ("module.", "timm"),
        ("model.module.", "timm"),
        ("backbone.", "timm"),
        ("teacher.backbone.", "timm"),
    ],
)
def test_wrappers_names_are_seen_through(prefix, naming):
    with torch.device("meta"):
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()
    state = {f"{prefix}{name}": tensor for name, tensor in theirs.items()} | {"step": torch.zeros(1)}
    found, back, left_out = convert.to_ours(state)
    assert found == "timm" and len(back) == len(theirs) - 2 + (not prefix)
    assert set(left_out) >= {f"{prefix}head.weight", f"{prefix}head.bias"}
    assert ("step" in left_out) == bool(prefix)


def test_two_models_in_one_are_not_guessed_between():
    names = ("student.patch_embed.proj.weight", "teacher.patch_embed.proj.weight")
    with pytest.raises(ValueError, match=r"student\.\*, teacher\.\*"):
        convert.to_ours(dict.fromkeys(names, torch.zeros(1)))
    with pytest.raises(ValueError, match="not those of a Vision Transformer"):
        convert.to_ours({"conv1.weight": torch.zeros(1)})
