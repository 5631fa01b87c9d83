"""The recorded numbers of the authors' code, through `tools/replay_case.py`, and the map of their names."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmim import LatentMIM, VisionTransformer, formats, load_config, load_encoder
from lmim.config import ConfigError
from lmim.convert import from_authors, to_authors
from lmim.options import Config
from lmim.parallel import prepare_blocks

TOOL = Path(__file__).parent.parent / "tools" / "replay_case.py"
GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("*/case.json"))
SLOW = pytest.mark.slow
# The acceptance's numbers, stated here again so that a loosened tool does not pass by itself.
SINGLE = {
    "visible patches": 0.0,
    "target patches": 0.0,
    "encoder output": 1e-5,
    "target output": 1e-5,
    "decoder output": 1e-5,
    "loss": 1e-5,
    "similarities": 1e-5,
    "gradients": 1e-5,
    "weights after": 1e-4,
    "decayed names": 0.0,
}
TRAJECTORY = {
    "trajectory losses": 1e-4,
    "learning rate": 1e-9,
    "momentum": 1e-9,
    "similarity target": 1e-9,
    "weights after": 1e-4,
}


def run_tool(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tool():
    """The tool as a module: one process for the many cases that are altered by hand."""
    spec = importlib.util.spec_from_file_location("replay_case", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_recorded_cases_are_replayed_within_tolerance():
    assert {path.name for path in CASES} == {"all_targets_no_cue", "infonce_gap", "norm_l2_nogap", "trajectory"}
    done = run_tool("--json", *CASES)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert set(results) == {str(path) for path in CASES}
    for folder, found in results.items():
        limits = TRAJECTORY if Path(folder).name == "trajectory" else SINGLE
        assert found.pop("beyond") == []
        assert set(found) == set(limits)
        assert {quantity: worst for quantity, worst in found.items() if not worst <= limits[quantity]} == {}


@pytest.mark.parametrize("option", ["attention=plain", "attention=fused", pytest.param("compile=true", marks=SLOW)])
def test_every_path_to_the_same_numbers_replays_the_recorded_cases(option, tool, monkeypatch):
    config = load_config(Path(__file__).parent.parent / "configs" / "quickstart.yaml", [f"parallel.{option}"])
    build = tool.build

    def prepared(*recorded) -> LatentMIM:
        model = build(*recorded)
        prepare_blocks(model, config, torch.device("cpu"))
        return model

    monkeypatch.setattr(tool, "build", prepared)
    for folder in CASES:
        limits = TRAJECTORY if folder.name == "trajectory" else SINGLE
        found = tool.replay(folder)
        assert found.keys() == limits.keys()
        assert {quantity: worst for quantity, worst in found.items() if not worst <= limits[quantity]} == {}, folder


def test_the_table_names_every_quantity():
    done = run_tool(GOLDEN / "infonce_gap")
    assert done.returncode == 0 and "BEYOND" not in done.stdout
    assert [quantity for quantity in SINGLE if quantity not in done.stdout] == []


# --- cases altered by hand -------------------------------------------------------------------------------------------


def edit_case(folder: Path, change) -> None:
    case = json.loads((folder / "case.json").read_text())
    change(case)
    (folder / "case.json").write_text(json.dumps(case))


def edit_tensors(folder: Path, file: str, name: str, amount: float) -> None:
    tensors = load_file(folder / file)
    tensors[name].view(-1)[0] += amount
    save_file(tensors, folder / file)


def change_loss(case):
    case["losses"][-1] += 3e-5


def change_similarity(case):
    case["metrics"][1]["avg_sim_trg"] += 3e-5


def change_schedule(key):
    def change(case):
        case["log"][-1][key] += 1e-8

    return change


ALTERATIONS = {
    "loss": ("infonce_gap", "loss", lambda f: edit_case(f, change_loss)),
    "similarity": ("norm_l2_nogap", "similarities", lambda f: edit_case(f, change_similarity)),
    "decayed name": ("all_targets_no_cue", "decayed names", lambda f: edit_case(f, lambda c: c["decayed"].pop())),
    "exempt name": (
        "infonce_gap",
        "decayed names",
        lambda f: edit_case(f, lambda c: c["decayed"].append("encoder.embed.proj.weight")),
    ),
    "weight": (
        "infonce_gap",
        "weights after",
        lambda f: edit_tensors(f, "weights_after.safetensors", "decoder.head.weight", 3e-4),
    ),
    "target weight": (
        "infonce_gap",
        "weights after",
        lambda f: edit_tensors(f, "weights_after.safetensors", "target_encoder.blocks.1.mlp.fc1.weight", 3e-4),
    ),
    "first weight": (
        "norm_l2_nogap",
        "encoder output",
        lambda f: edit_tensors(f, "weights_before.safetensors", "encoder.cls_token", 1e-2),
    ),
    "gradient": (
        "infonce_gap",
        "gradients",
        lambda f: edit_tensors(f, "trace.safetensors", "step0.grad.encoder.cls_token", 3e-5),
    ),
    "patch": (
        "infonce_gap",
        "visible patches",
        lambda f: edit_tensors(f, "trace.safetensors", "step1.visible_patches", 1e-3),
    ),
    "learning rate": ("trajectory", "learning rate", lambda f: edit_case(f, change_schedule("lr"))),
    "momentum": ("trajectory", "momentum", lambda f: edit_case(f, change_schedule("momentum"))),
    "similarity target": ("trajectory", "similarity target", lambda f: edit_case(f, change_schedule("sim_target"))),
    "step's loss": (
        "trajectory",
        "trajectory losses",
        lambda f: edit_case(f, lambda c: c["log"][-1].update(loss=c["log"][-1]["loss"] + 3e-4)),
    ),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_a_case_altered_by_hand_fails_and_is_named(alteration, tool, tmp_path, capsys, monkeypatch):
    name, quantity, alter = ALTERATIONS[alteration]
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    alter(folder)
    monkeypatch.setattr(sys, "argv", ["replay_case.py", str(folder)])
    assert tool.main() == 1
    beyond = [line for line in capsys.readouterr().out.splitlines() if "BEYOND" in line]
    assert any(line.strip().startswith(quantity) for line in beyond)
    if alteration != "first weight":  # that one moves everything after it
        assert len(beyond) == 1


def test_unusable_folders_end_with_one_line(tmp_path):
    done = run_tool(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error:") and str(tmp_path) in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("damage", ["no configuration", "other sizes", "no tensors"])
def test_damaged_cases_end_with_one_line(damage, tool, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "case"
    shutil.copytree(GOLDEN / "infonce_gap", folder)
    if damage == "no configuration":
        (folder / "case.json").write_text("{}")
    elif damage == "other sizes":
        edit_case(folder, lambda case: case["config"].update(embed_dim=64))
    else:
        (folder / "trace.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(sys, "argv", ["replay_case.py", str(folder)])
    assert tool.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- the authors' names ----------------------------------------------------------------------------------------------


def test_full_size_names_and_shapes_are_the_authors_one_to_one():
    recorded = {k: tuple(v) for k, v in json.loads((GOLDEN / "original_vit_base_keys.json").read_text()).items()}
    config = Config()
    with torch.device("meta"):
        ours = LatentMIM(config.model, config.objective).state_dict()
    theirs = to_authors(ours)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == recorded
    back = from_authors({f"module.{name}": tensor for name, tensor in theirs.items()})
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}


def test_the_map_carries_every_value_both_ways():
    recorded = load_file(GOLDEN / "infonce_gap" / "weights_before.safetensors")
    ours = from_authors(recorded)
    assert len(ours) == len(recorded)
    back = to_authors(ours)
    assert set(back) == set(recorded) and all(torch.equal(back[name], recorded[name]) for name in recorded)


def test_names_of_neither_side_are_refused():
    with pytest.raises(KeyError, match=r"head\.weight"):
        from_authors({"module.head.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"encoder\.norm\.weight"):
        to_authors({"encoder.norm.weight": torch.zeros(1)})


@pytest.mark.parametrize("which", ["online", "target"])
@torch.no_grad()
def test_an_authors_checkpoint_loads_as_an_encoder(which):
    """Its sizes are read off its tensors, but the heads: 4 of 8 wide here, which no shape tells."""
    path, case = (
        GOLDEN / "infonce_gap" / "checkpoint_latest.pth",
        json.loads((GOLDEN / "infonce_gap" / "case.json").read_text()),
    )
    recorded = case["config"]
    saved = {k.removeprefix("module."): v for k, v in torch.load(path, weights_only=True)["state_dict"].items()}
    encoder = load_encoder(path, which, num_heads=recorded["num_heads"])
    assert encoder.blocks[0].attn.num_heads == recorded["num_heads"]
    assert (
        not encoder.training and encoder.grid_size == recorded["grid_size"] and len(encoder.blocks) == recorded["depth"]
    )
    prefix = {"online": "encoder.", "target": "target_encoder."}[which]
    theirs = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    ours = encoder.state_dict()
    assert len(ours) == len(theirs)
    assert torch.equal(ours["patch_embed.proj.weight"], theirs["embed.proj.weight"])
    assert torch.equal(ours["projector.linear0.weight"], theirs["head.linear0.weight"])
    assert torch.equal(ours["pos_embed"][0], theirs["pos_embed.pos_embeds"])
    images = torch.zeros(1, 3, *[recorded["grid_size"] * recorded["patch_size"]] * 2)
    assert encoder.forward_features(images).isfinite().all()


@pytest.mark.parametrize(("dim", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_of_an_authors_checkpoint_are_the_variants(dim, heads):
    """No shape tells the heads, and 64 wide is not the rule: huge has 16 of 80."""
    with torch.device("meta"):
        encoder = VisionTransformer(grid_size=14, patch_size=14, embed_dim=dim, depth=1, num_heads=heads)
    weights = {f"online.{name}": tensor for name, tensor in encoder.state_dict().items()}
    sizes = formats.sizes_of(weights, Path("x.pth")) | {"num_heads": None}
    assert formats.heads_of(formats.Weights(Path("x.pth"), "", weights, sizes)) == heads


def test_heads_that_cannot_be_known_are_not_guessed():
    with pytest.raises(ConfigError, match="num_heads"):
        load_encoder(GOLDEN / "infonce_gap" / "checkpoint_latest.pth")


@pytest.mark.parametrize("content", ["nothing", "other"])
def test_a_file_that_is_no_checkpoint_gets_one_line(content, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"nothing") if content == "nothing" else torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"model\.pth"):
        load_encoder(path)
