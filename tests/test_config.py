"""Options: what beats what, what every mistake is told, and that every shipped recipe builds."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml

from lmim.config import (
    ConfigError,
    Split,
    config_hash,
    crop_size,
    duration_steps,
    flatten,
    load_config,
    save_config,
    validate,
)
from lmim.objective import LatentMIM
from lmim.options import Config

CONFIGS = Path(__file__).parent.parent / "configs"


def write(folder: Path, name: str, **sections) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections))
    return path


# --- what beats what -------------------------------------------------------------------------------------------------


def test_defaults_give_way_to_base_to_file_to_overrides(tmp_path):
    write(tmp_path, "low/base.yaml", model=dict(depth=1, num_heads=1, grid_size=5), optim=dict(eps=1e-7))
    write(tmp_path, "mid.yaml", base="low/base.yaml", model=dict(num_heads=2, grid_size=6))
    path = write(tmp_path, "top.yaml", base="mid.yaml", model=dict(grid_size=7))
    config = load_config(path, ["model.grid_size=8", "data.flip=false", "optim.betas=[0.8, 0.9]", "model.grid_size=9"])
    assert (config.model.depth, config.model.num_heads, config.model.grid_size) == (1, 2, 9)
    assert (config.optim.eps, config.optim.betas, config.data.flip) == (1e-7, [0.8, 0.9], False)
    changed = {"model.depth", "model.num_heads", "model.grid_size", "optim.eps", "data.flip", "optim.betas"}
    before, after = flatten(Config()), flatten(config)
    assert {key for key in before if before[key] != after[key]} == changed


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == Config()


def test_defaults_are_the_specs():
    flat = flatten(Config())
    expected = {
        "model.variant": "base",
        "model.grid_size": 14,
        "model.patch_gap": 4,
        "model.projector_dim": 4096,
        "model.projector_depth": 3,
        "model.decoder_dim": 512,
        "model.decoder_depth": 3,
        "model.decoder_num_heads": 16,
        "model.visual_cues": True,
        "model.drop_path": 0.0,
        "objective.loss": "infonce",
        "objective.temperature": 0.2,
        "objective.num_visible": 20,
        "objective.target_input": "masked",
        "objective.gap_jitter": "released",
        "objective.momentum": 0.99,
        "objective.similarity_start": 0.75,
        "objective.similarity_end": 0.25,
        "optim.betas": [0.9, 0.95],
        "optim.eps": 1e-8,
        "optim.weight_decay": 0.05,
        "optim.floor": 0.25,
        "optim.base_lr": 1.5e-4,
        "optim.clip_norm": 0.0,
    }
    assert {key: flat[key] for key in expected} == expected
    assert crop_size(Config().model) == 280


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {  # override: words the one line must hold
    "model.dept=3": ["model.dept", "model.depth"],
    "optim.lr=3": ["optim.lr", "optim."],
    "objectve.loss=mse": ["objectve.loss", "did you mean objective"],
    "model.depth=four": ["model.depth", "four", "int"],
    "model.depth=2.5": ["model.depth", "2.5", "int"],
    "model.depth={a: 1}": ["model.depth", "int"],
    "data.flip=maybe": ["data.flip", "maybe", "bool"],
    "data.flip=null": ["data.flip", "bool"],
    "optim.base_lr=fast": ["optim.base_lr", "fast", "float"],
    "optim.betas=0.9": ["optim.betas", "0.9"],
    "optim.betas=[0.9]": ["optim.betas", "[0.9]", "two"],
    "optim.betas=[0.9, 1.5]": ["optim.betas", "1.5"],
    "data.crop_scale=[1.0, 0.2]": ["data.crop_scale", "[1.0, 0.2]", "smaller first"],
    "data.crop_size=224": ["data.crop_size", "224", "14 x (16 + 4) = 280"],
    "objective.num_visible=196": ["objective.num_visible", "196", "14 x 14"],
    "objective.num_visible=195": ["objective.num_visible", "195"],
    "objective.num_decoded=7": ["objective.num_decoded", "7", "8 to 176", "0 for all"],
    "objective.num_decoded=177": ["objective.num_decoded", "177", "8 to 176"],
    "objective.num_visible=0": ["objective.num_visible", "0", "above 0"],
    "objective.loss=infonse": ["objective.loss", "infonse", "infonce", "smooth_l1"],
    "objective.momentum=1.5": ["objective.momentum", "1.5", "0 to 1"],
    "model.variant=giant": ["model.variant", "giant", "tiny", "huge"],
    "model.num_heads=5": ["model.embed_dim", "768", "model.num_heads", "5"],
    "model.decoder_dim=100": ["model.decoder_dim", "100", "16"],
    "model.drop_path=1.0": ["model.drop_path", "1.0", "below 1"],
    "model.patch_gap=-1": ["model.patch_gap", "-1"],
    "objective.temperature=0": ["objective.temperature", "0"],
    "optim.base_lr=nan": ["optim.base_lr", "nan"],
    "run.seed=-1": ["run.seed", "-1"],
    "data.global_batch=0": ["data.global_batch", "0"],
    "optim.duration=300": ["optim.duration", "300", "800ep", "125000st"],
    "optim.duration=5%": ["optim.duration", "5%", "ep"],
    "optim.warmup=soon": ["optim.warmup", "soon", "5%"],
    "eval.knn_every=-1ep": ["eval.knn_every", "-1ep"],
    "checkpoint.every=1h": ["checkpoint.every", "1h"],
    "run.folder=${nowhere}": ["nowhere"],
    "novalue": ["novalue", "section.key=value"],
    "model=[1": ["model"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_gets_one_line_with_key_value_and_remedy(override, tmp_path):
    path = write(tmp_path, "config.yaml", run=dict(folder="x"))
    with pytest.raises(ConfigError) as caught:
        validate(load_config(path, [override]), world_size=1)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in MISTAKES[override] if word not in message] == [], message


def test_the_same_mistake_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path, "config.yaml", model=dict(dept=3))
    with pytest.raises(ConfigError, match=r"model\.dept .*config\.yaml.* model\.depth"):
        load_config(path)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "words"),
    [
        (
            4096,
            96,
            8,
            "global_batch (4096) is not divisible by ranks x micro batch (8 x 96 = 768); nearest are 3840 and 4608",
        ),
        (100, None, 8, "data.global_batch (100) is not divisible by the number of ranks (8); nearest are 96 and 104"),
        (4, None, 8, "nearest is 8"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(batch, micro, ranks, words):
    config = Config()
    config.data.global_batch, config.data.micro_batch = batch, micro
    with pytest.raises(ConfigError) as caught:
        validate(config, ranks)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("micro", "ranks", "split"),
    [(None, 8, Split(8, 128, 1)), (128, 8, Split(8, 128, 1)), (32, 8, Split(8, 32, 4)), (1024, 1, Split(1, 1024, 1))],
)
def test_a_batch_that_divides_is_split(micro, ranks, split):
    config = Config()
    config.data.micro_batch = micro
    assert validate(config, ranks) == split


def test_the_local_backend_runs_one_process():
    config = Config()
    config.parallel.backend = "local"
    validate(config, 1)
    with pytest.raises(ConfigError, match=r"parallel\.backend \(local\).*deepspeed"):
        validate(config, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model:\n  depth: [1\n", "not valid YAML"),
        ("model: 'open\n", "not valid YAML"),
        ("- a\n- b\n", "list"),
        ("model:\n\tdepth: 1\n", "not valid YAML"),
        ("base: 7\n", "base"),
        ("base: nowhere.yaml\n", "nowhere.yaml does not exist"),
    ],
)
def test_an_unreadable_file_gets_one_line(content, words, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"quikstart\.yaml does not exist; did you mean .*quickstart\.yaml"):
        load_config(tmp_path / "quikstart.yaml")


def test_a_base_that_leads_back_is_refused(tmp_path):
    path = write(tmp_path, "a.yaml", base="b.yaml")
    write(tmp_path, "b.yaml", base="a.yaml")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config(path)


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("800ep", 8000),
        ("0.5ep", 5),
        ("0.31ep", 4),
        ("125000st", 125000),
        ("0st", 0),
        ("5%", 20),
        ("0.1%", 1),
        ("2.5 %", 10),
        ("100%", 400),
    ],
)
def test_durations_count_steps_rounded_up(text, steps):
    assert duration_steps(text, steps_per_epoch=10, total_steps=400) == steps


def test_rounding_up_forgives_float_error():
    assert duration_steps("12ep", steps_per_epoch=10_000 / 256) == 469  # 468.75
    assert duration_steps("3ep", steps_per_epoch=1 / 3) == 1
    assert duration_steps("10%", steps_per_epoch=1, total_steps=30) == 3  # 0.1 · 30 is above 3 in floats


# --- written and read, hashed ----------------------------------------------------------------------------------------


def test_what_is_saved_loads_as_it_was(tmp_path):
    overrides = [
        "model.depth=3",
        "optim.eps=1.234567890123e-8",
        "run.name='a: b'",
        "data.crop_scale=[0.08, 1]",
        "eval.resize=null",
    ]
    config = load_config(CONFIGS / "quickstart.yaml", overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    # a folder is the run's own, wherever it was when its configuration was written
    moved = load_config(tmp_path)
    assert moved.run.folder == str(tmp_path)
    assert load_config(tmp_path, ["run.folder=elsewhere"]).run.folder == "elsewhere"
    moved.run.folder = config.run.folder
    assert moved == config


NEUTRAL_CHANGES = [
    "run.folder=elsewhere",
    "run.name=x",
    "data.train=other",
    "data.eval=other",
    "data.micro_batch=32",
    "data.workers=3",
    "parallel.backend=local",
    "parallel.zero_stage=0",
    "log.every=1st",
    "eval.k=5",
    "segment.linkage=average",
    "davis.top_k=3",
    "checkpoint.keep=9",
    "data.crop_size=280",
]
TELLING_CHANGES = [
    "run.seed=1",
    "model.depth=3",
    "model.drop_path=0.1",
    "objective.loss=mse",
    "objective.num_visible=21",
    "data.global_batch=512",
    "data.flip=false",
    "optim.base_lr=1e-3",
    "optim.duration=10ep",
    "precision.compute=fp32",
    "model.variant=small",
    "data.crop_scale=[0.3, 1.0]",
]


def test_the_hash_ignores_what_leaves_the_result_alone_and_nothing_else(tmp_path):
    path = write(tmp_path, "config.yaml")
    plain = config_hash(Config())
    assert [c for c in NEUTRAL_CHANGES if config_hash(load_config(path, [c])) != plain] == []
    hashes = [config_hash(load_config(path, [c])) for c in TELLING_CHANGES]
    assert plain not in hashes and len(set(hashes)) == len(hashes)
    assert config_hash(load_config(path, ["model.depth=12"])) == plain  # written out, but the variant's own


# --- the recipes that ship -------------------------------------------------------------------------------------------


def shipped() -> list[Path]:
    return sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_config_loads_validates_and_builds(path):
    config = load_config(path)
    for world_size in (1, 2):
        validate(config, world_size)
    with torch.device("meta"):
        model = LatentMIM(config.model, config.objective)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_recipes_are_those_of_the_spec():
    names = {path.name for path in shipped()}
    assert {
        "quickstart.yaml",
        *(f"vit_{size}_imagenet1k.yaml" for size in ("tiny", "small", "base", "large", "huge")),
    } <= names
    rows = {
        "vit_base_imagenet1k": (4096, "800ep", "40ep", 0.1, 2.4e-3),
        "vit_base_imagenet100": (1024, "300ep", "30ep", 0.0, 6e-4),
    }
    for name, (batch, duration, warmup, penalty, peak) in rows.items():
        c = load_config(CONFIGS / f"{name}.yaml")
        assert (c.data.global_batch, c.optim.duration, c.optim.warmup) == (batch, duration, warmup)
        assert c.objective.similarity_weight == penalty
        assert c.optim.base_lr * c.data.global_batch / 256 == pytest.approx(peak)
        assert (c.model.variant, crop_size(c.model), c.data.crop_scale, c.data.flip) == ("base", 280, [0.2, 1.0], True)


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads", "patch"),
    [
        ("tiny", 192, 12, 3, 16),
        ("small", 384, 12, 6, 16),
        ("base", 768, 12, 12, 16),
        ("large", 1024, 24, 16, 16),
        ("huge", 1280, 32, 16, 14),
    ],
)
def test_sizes_are_the_specs(size, width, depth, heads, patch):
    config = load_config(CONFIGS / f"vit_{size}_imagenet1k.yaml")
    with torch.device("meta"):
        online = LatentMIM(config.model, config.objective).online
    assert (online.embed_dim, len(online.blocks), online.blocks[0].attn.num_heads, online.patch_size) == (
        width,
        depth,
        heads,
        patch,
    )


def test_the_reference_of_all_options_is_up_to_date(monkeypatch, capsys):
    monkeypatch.syspath_prepend(CONFIGS.parent / "tools")
    reference = importlib.import_module("config_reference")
    assert reference.main(["--check"]) == 0, capsys.readouterr().out
    lines = (CONFIGS / "README.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    assert len(rows) == len(flatten(Config()))
    assert all(len(row) == 4 and row[3].rstrip(" |") for row in rows), "an option without a word on what it means"
