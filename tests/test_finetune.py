"""Fine-tuning: MAE's recipe beside timm's code, through the one loop, on every backend, stopped and gone on with."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay

from lmim import checkpoint, load_encoder
from lmim.__main__ import main
from lmim.classifier import Classifier
from lmim.config import ConfigError, load_config, validate
from lmim.convert import to_timm
from lmim.data.augment import AUGMENT, Augment, seed
from lmim.dist import Topology
from lmim.eval.finetune import finetune_config
from lmim.eval.results import read_results
from lmim.formats import read_weights
from lmim.options import FinetuneConfig, ModelConfig
from lmim.patches import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from lmim.randomness import draw
from lmim.stop import StopRequest
from tests.conftest import REPOSITORY, TINY, free_port, losses, process_environment, train_command
from tests.ranks import finetune, result, run_jobs

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
MODEL = ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=4, grid_size=7, patch_gap=0, projector_depth=0)
PLAIN = dict(randaugment="", erasing=0.0, mixup=0.0, cutmix=0.0)
MAE = [f"finetune.{key}={getattr(FinetuneConfig(), key)}" for key in
       ("layer_decay", "drop_path", "crop_scale", "randaugment", "erasing", "mixup", "cutmix")]  # fmt: skip
RECIPE = [*MAE, "finetune.duration=8st", "finetune.warmup=2st", "finetune.evaluate_every=4st",
          "finetune.base_lr=2e-3"]  # fmt: skip


def classifier(pooling: str = "mean", classes: int = 5, **options) -> Classifier:
    """Return an untrained classifier whose head, which begins near zero, and norms are random."""
    built = Classifier(MODEL, FinetuneConfig(pooling=pooling, **options), classes)
    built.init_weights(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name or name.startswith("head"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return built


def of_timm(pooling: str = "mean", classes: int = 5) -> timm.models.VisionTransformer:
    return timm.models.VisionTransformer(
        img_size=28, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=classes, fc_norm=pooling == "mean",
        global_pool="avg" if pooling == "mean" else "token",
    )  # fmt: skip


def images(count: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# --- beside timm -----------------------------------------------------------------------------------------------------


def timm_name(name: str, pooling: str) -> str:
    """Return what timm calls a parameter: the norm of pooled patches is `fc_norm` there."""
    name = name.removeprefix("online.")
    return name.replace("norm.", "fc_norm.", 1) if pooling == "mean" and name.startswith("norm.") else name


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_layers_learn_and_decay_as_timms_do(pooling):
    ours, theirs = classifier(pooling, layer_decay=0.65), of_timm(pooling)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.65)
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    groups = ours.parameter_groups(0.05)
    found = {timm_name(n, pooling): (g["lr_scale"], g["weight_decay"]) for g in groups for n in g["names"]}
    assert found == expected
    # and as MAE's appendix says: the head at 1, then 0.65 of the layer above, down to the embeddings
    assert sorted({scale for scale, _ in found.values()}, reverse=True) == pytest.approx([0.65**k for k in range(5)])
    assert found["head.weight"] == (1.0, 0.05) and found["pos_embed"] == (pytest.approx(0.65**4), 0.0)
    for group in groups:
        parameters = dict(ours.named_parameters())
        assert all(parameters[n] is p for n, p in zip(group["names"], group["params"], strict=True))


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_logits_are_timms(pooling):
    ours, theirs = classifier(pooling).eval(), of_timm(pooling).eval()
    state = {timm_name(name, pooling): t for name, t in to_timm(ours.online.state_dict(), 4).items()}
    theirs.load_state_dict(state | {f"head.{n}": t for n, t in ours.head.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(images()), theirs(normalize_images(images())), atol=2e-4, rtol=1e-4)


def test_the_loss_of_mixed_images_is_timms():
    model, labels = classifier(label_smoothing=0.1).eval(), torch.tensor([4, 0, 1, 1, 2, 3, 0, 2])
    shares = torch.tensor([0.3, 0.3, 1.0, 1.0, 0.9, 0.9, 0.5, 0.5])
    out = model(images(), torch.arange(8), labels, shares)
    targets = [mixup_target(labels[i : i + 2], 5, shares[i].item(), 0.1) for i in range(0, 8, 2)]
    logits = model.logits(images())
    assert out.loss.item() == pytest.approx(SoftTargetCrossEntropy()(logits, torch.cat(targets)).item(), rel=1e-5)
    larger = torch.tensor([0, 4, 1, 1, 2, 3, 0, 2])
    assert out.accuracy.item() == (logits.argmax(1) == larger).double().mean().item()
    alone = model(images()[:3], torch.arange(3), labels[:3], torch.ones(3))  # the third has no neighbour
    smoothed = torch.nn.functional.cross_entropy(logits[:3], labels[:3], label_smoothing=0.1)
    assert alone.loss.item() == pytest.approx(smoothed.item(), rel=1e-5)


def test_every_parameter_gets_a_value_and_the_head_begins_near_zero():
    model = Classifier(MODEL, FinetuneConfig(), 1000)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    model.init_weights(0)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not model.head.bias.any()


# --- augmentations ---------------------------------------------------------------------------------------------------


def crops(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)


def test_augmentations_follow_from_the_keys_alone():
    augment, keys = Augment(FinetuneConfig(), 28), np.arange(100, 108)
    together, apart, again = crops(), crops(), crops()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    shares = augment(together, keys)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(5), np.random.seed(5)
    parts = [augment(apart[i : i + 2], keys[i : i + 2]) for i in (4, 6, 0, 2)]
    assert (apart == together).all() and (np.concatenate([parts[i] for i in (2, 3, 0, 1)]) == shares).all()
    assert (augment(again, keys + 1) != shares).any() and (again != together).any()
    assert (shares[::2] == shares[1::2]).all() and ((shares >= 0) & (shares <= 1)).all() and len(set(shares)) == 4


def test_randaugment_is_timms():
    ours, keys = crops(), np.arange(8)
    Augment(FinetuneConfig(**(PLAIN | dict(randaugment="rand-m9-mstd0.5-inc1"))), 28)(ours, keys)
    how = dict(translate_const=12, img_mean=(124, 116, 104), interpolation=Image.Resampling.BICUBIC)
    transform, changed = rand_augment_transform("rand-m9-mstd0.5-inc1", how), 0
    for crop, key, before in zip(ours, keys, crops(), strict=True):
        seed(draw(int(key), AUGMENT, 0))
        assert (np.asarray(transform(Image.fromarray(before))) == crop).all()
        changed += (before != crop).any()
    assert changed >= 5


def test_mixed_images_are_what_their_share_says():
    for options, kind in ((dict(mixup=0.8), "mixup"), (dict(cutmix=1.0), "cutmix")):
        mixed, before = crops(16), crops(16)
        shares = Augment(FinetuneConfig(**(PLAIN | options)), 28)(mixed, np.arange(16))
        for i, share in enumerate(shares):
            own, other = before[i].astype(float), before[i ^ 1].astype(float)
            if kind == "mixup":
                np.testing.assert_allclose(mixed[i], share * own + (1 - share) * other, atol=0.51)
            else:
                kept = (mixed[i] == before[i]).all(axis=-1)
                assert ((mixed[i] == before[i ^ 1]).all(axis=-1) | kept).all()
                assert kept.mean() == pytest.approx(share, abs=1e-6)
        assert 0.2 < shares.mean() < 0.8


def test_random_erasing_leaves_a_share_and_fills_a_rectangle_with_noise():
    grey = np.full((400, 28, 28, 3), 117, np.uint8)
    Augment(FinetuneConfig(**(PLAIN | dict(erasing=0.25))), 28)(grey, np.arange(400))
    changed = (grey != 117).any(axis=-1)
    erased = changed.any(axis=(1, 2))
    assert 0.17 < erased.mean() < 0.33  # 0.25 ± 4 standard errors
    for mask in changed[erased]:
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert mask.sum() > 0.9 * area and 0.01 < area / 28**2 < 0.36
    noise = grey[changed].astype(float) / 255
    assert noise.mean(axis=0) == pytest.approx(IMAGENET_MEAN, abs=0.02)
    assert noise.std(axis=0) == pytest.approx(IMAGENET_STD, rel=0.12)  # some of it is cut at black and white


# --- backends --------------------------------------------------------------------------------------------------------

BACKENDS = {
    "ZeRO-0": ["parallel.backend=deepspeed", "parallel.zero_stage=0"],
    "ZeRO-1": ["parallel.backend=deepspeed", "parallel.zero_stage=1"],
    "ZeRO-3": ["parallel.backend=deepspeed", "parallel.zero_stage=3"],
    "FSDP2": ["parallel.backend=fsdp", "parallel.smallest_group_mb=0"],
}


def settings_of(shards: Path, folder: Path, *more: str) -> list[str]:
    return [f"data.train={shards}/train", f"data.eval={shards}/eval", f"run.folder={folder}", "finetune.scratch=true",
            *MAE, "eval.batch=30", *more]  # fmt: skip


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> dict:
    """One process with accumulation 4, all augmentations and mixing on."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    return finetune([*settings_of(shards, folder), "parallel.backend=local"], ALONE)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_trajectory_on_every_backend(reference, shards, tmp_path, ranks):
    """Eight steps with mixing, augmentations and drop-path, the state taken out and put back after four."""
    jobs = [dict(do="finetune", name=name, settings=[*settings_of(shards, tmp_path), *chosen])
            for name, chosen in BACKENDS.items() if ranks == 2 or name in ("ZeRO-1", "FSDP2")]  # fmt: skip
    run_jobs(ranks, jobs, tmp_path)
    assert len(set(reference["losses"])) == 8
    for name in (job["name"] for job in jobs):
        ours = result(tmp_path, name)
        assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-5), name
        assert ours["norms"] == pytest.approx(reference["norms"], rel=1e-4), name
        assert ours["scales"] == pytest.approx([0.65**3, 0.65**2, 0.65, 1.0]) == reference["scales"], name
        assert ours["shares"] == reference["shares"], name
        for key, value in reference["weights"].items():
            if not key.endswith("qkv.bias"):  # keys' exact gradient is zero: AdamW makes steps of rounding errors
                torch.testing.assert_close(ours["weights"][key], value, atol=1e-5, rtol=1e-4, msg=f"{name} {key}")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory) -> Path:
    """A run of four steps that every fine-tuning begins with."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert main(train_command(shards, folder, "parallel.backend=local", "optim.duration=4st")[3:]) == 0
    return folder


def command(run: Path, *more: str) -> list[str]:
    return ["eval", "finetune", str(run), *RECIPE, *more]


@pytest.fixture(scope="module")
def unbroken(pretrained, shards) -> Path:
    """Return the folder of a fine-tuning that was never stopped."""
    assert main(command(pretrained)) == 0
    return pretrained / "finetune" / "online"


def test_what_it_leaves(unbroken, pretrained, capsys):
    assert main(command(pretrained)) == 0  # complete: nothing is trained again
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = [json.loads(line) for line in (unbroken / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [-1, 3, 7]
    assert (found["online"]["top1"], found["online"]["top5"]) == (rows[-1]["top1"], rows[-1]["top5"])
    assert found["online"]["steps"] == 8 and 0 < found["online"]["top1"] <= found["online"]["top5"] <= 1
    last = read_results(pretrained)[-1]
    assert (last["evaluation"], last["which"], last["figures"]) == ("finetune", "online", found)
    row = json.loads((unbroken / "log.jsonl").read_text().splitlines()[0])
    assert {"loss", "accuracy", "grad_norm", "lr", "images_per_second"} <= set(row)
    assert not {"momentum", "similarity_target", "similarity_targets"} & set(row)


def test_its_weights_begin_with_the_encoders_and_are_read_as_one(unbroken, pretrained, tmp_path):
    arguments = command(pretrained, "finetune.base_lr=1e-12", f"finetune.folder={tmp_path}/still")
    assert main(arguments) == 0
    before, after = load_encoder(pretrained).state_dict(), load_encoder(tmp_path / "still").state_dict()
    for name, tensor in after.items():
        expected = torch.full_like(tensor, "weight" in name) if name.startswith("norm.") else before[name]
        torch.testing.assert_close(tensor, expected, atol=1e-9, rtol=0, msg=name)
    weights = read_weights(unbroken)
    assert set(weights.left_out) == {"head.weight", "head.bias"} and weights.sizes["projector_depth"] == 0
    moved = load_encoder(unbroken).state_dict()
    assert not torch.equal(moved["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(moved["pos_embed"], before["pos_embed"])  # learned, as in MAE


def copy_of(run: Path, folder: Path) -> Path:
    """Return a copy of a run without its fine-tunings."""
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("finetune")))


def stop_after(monkeypatch, looks: int) -> None:
    """Let a run see a request to stop when it looks for one so many times: at each step and evaluation's batch."""
    seen = itertools.count(1)
    reason = lambda: "the test" if next(seen) >= looks else None  # noqa: E731
    monkeypatch.setattr(StopRequest, "_look", lambda self: setattr(self, "reason", reason()))


@pytest.mark.parametrize("looks", [1, 5])
def test_stopped_and_started_again_it_takes_the_same_steps(unbroken, pretrained, tmp_path, capsys, monkeypatch, looks):
    """Stopped in its first evaluation, before any step, or amid its steps."""
    folder = copy_of(pretrained, tmp_path / "run") / "finetune" / "online"
    with monkeypatch.context() as patched:
        stop_after(patched, looks)
        assert main(command(tmp_path / "run")) == 75
    newest = checkpoint.newest(folder)
    done = checkpoint.position_of(newest).step if newest else 0
    assert done == (0 if looks == 1 else 4) and "top-1" not in capsys.readouterr().out
    assert main(command(tmp_path / "run")) == 0
    assert (f"going on from {newest}" in (folder / "train.log").read_text()) == bool(newest)
    assert losses(folder) == losses(unbroken)
    assert (folder / "eval.jsonl").read_text() == (unbroken / "eval.jsonl").read_text()
    state = json.loads((checkpoint.newest(folder) / "state.json").read_text())
    assert state["samples"] == 8 * 32 and state["optimizer_steps"] == 8


def test_loader_workers_change_nothing(unbroken, pretrained, tmp_path):
    assert main(command(pretrained, "data.workers=2", f"finetune.folder={tmp_path}/run")) == 0
    assert losses(tmp_path / "run") == losses(unbroken)


def test_train_goes_on_with_its_folder_and_others_are_refused(unbroken, pretrained, tmp_path, capsys, monkeypatch):
    folder = copy_of(pretrained, tmp_path / "run") / "finetune" / "online"
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        assert main(command(tmp_path / "run")) == 75
    capsys.readouterr()
    assert main(command(tmp_path / "run", "finetune.mixup=0.2", "finetune.layer_decay=0.5")) == 2
    line = capsys.readouterr().err
    assert "finetune.mixup (0.8 there, 0.2 now)" in line and "finetune.layer_decay (0.65 there, 0.5 now)" in line
    other = tmp_path / "other.safetensors"
    capsys.readouterr()
    assert main(["export", str(unbroken), str(other)]) == 0
    line = refused(capsys, command(tmp_path / "run", "--checkpoint", str(other)))
    assert "was made with another configuration: finetune.weights (" in line
    assert main(["train", str(folder), "finetune.evaluate_every=50%"]) == 0
    assert losses(folder) == losses(unbroken)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("chosen", [["parallel.backend=deepspeed"], ["parallel.backend=fsdp"]], ids=" ".join)
def test_two_ranks_of_a_launcher_print_what_one_does(unbroken, pretrained, tmp_path, chosen):
    copy_of(pretrained, tmp_path / "run")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()),
         "-m", "lmim", *command(tmp_path / "run", *chosen)],
        cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith('{"online"')]) == 1
    assert losses(tmp_path / "run" / "finetune" / "online") == pytest.approx(losses(unbroken), rel=1e-5)
    ours, theirs = (json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
                    for folder in (tmp_path / "run" / "finetune" / "online", unbroken))  # fmt: skip
    assert ours == theirs


def test_it_learns(pretrained, tmp_path, capsys):
    """On 300 images, without regularisation: far above chance, and above its own start."""
    plain = [f"finetune.{key}={value}" for key, value in PLAIN.items()]
    settings = ["finetune.duration=20ep", "finetune.warmup=1ep", "finetune.base_lr=2e-2", "finetune.crop_scale=[0.6,1]",
                "finetune.label_smoothing=0", "finetune.drop_path=0", "finetune.layer_decay=0.9", "data.flip=false",
                f"finetune.folder={tmp_path}/run", *plain]  # fmt: skip
    assert main(["eval", "finetune", str(pretrained), *settings]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["online"]
    values, first = losses(tmp_path / "run"), json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[0])
    assert np.mean(values[-5:]) < 0.6 * values[0]
    assert found["top1"] > 0.4 and found["top1"] > first["top1"] + 0.2


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_another_models_encoder_at_another_grid(shards, tmp_path, capsys, pooling):
    """A ViT of timm with learned positions: sizes are read off its file, and positions are resized."""
    vit = timm.models.VisionTransformer(img_size=24, patch_size=6, embed_dim=48, depth=2, num_heads=4, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    settings = [*TINY, f"run.folder={tmp_path}/run", "parallel.backend=local", f"data.train={shards}/train",
                f"data.eval={shards}/eval", *RECIPE, "finetune.grid=5", f"finetune.pooling={pooling}",
                "eval.resize=null", "model.embed_dim=48", "model.num_heads=4"]  # fmt: skip
    quickstart = str(REPOSITORY / "configs" / "quickstart.yaml")
    assert main(["eval", "finetune", quickstart, *settings, "--checkpoint", f"{tmp_path}/vit.pth"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["online"]
    assert found["pooling"] == pooling
    tuned = load_encoder(tmp_path / "run" / "finetune" / "online")
    assert (tuned.grid_size, tuned.patch_size, tuned.embed_dim, len(tuned.blocks)) == (5, 6, 48, 2)
    model = load_config(tmp_path / "run" / "finetune" / "online").model
    assert (model.num_heads, model.patch_gap) == (4, 0)


def test_a_last_step_that_was_left_out_has_no_loss_to_tell(pretrained, tmp_path, capsys):
    arguments = command(pretrained, f"finetune.folder={tmp_path}/run", "finetune.base_lr=1e30", "finetune.warmup=0st",
                        "finetune.duration=3st", "precision.compute=fp32")  # fmt: skip
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["online"]
    assert found["loss"] is None and found["steps"] == 3


def test_the_pretrainings_batch_need_not_fit_the_ranks_that_fine_tune(pretrained, monkeypatch):
    """On three ranks: of 32 images for pretraining, and 48 for fine-tuning."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = load_config(pretrained, ["finetune.global_batch=48", "parallel.backend=fsdp"])
    with pytest.raises(ConfigError, match="not divisible"):
        validate(config, 3)
    assert validate(finetune_config(config, None, "online"), 3).accumulate == 1


# --- mistakes --------------------------------------------------------------------------------------------------------


def refused(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--which", "target", "--checkpoint", "ENCODER"], ["holds one encoder and no target", "which=online"]),
        (["--checkpoint", "/nowhere"], ["/nowhere does not exist"]),
        (["--checkpoint", "HEADLESS"], ["is not read"]),
        (["finetune.scratch=true", "--checkpoint", "ENCODER"], ["finetune.scratch", "leave one of them out"]),
        (["finetune.micro_batch=1"], ["finetune.micro_batch (1) must be even", "finetune.mixup"]),
        (["finetune.global_batch=33"], ["finetune.global_batch (33)", "1 x 16 = 16"]),
        (["finetune.randaugment=strong"], ["finetune.randaugment (strong)", "rand-m9-mstd0.5-inc1"]),
        (["finetune.pooling=max"], ["finetune.pooling (max)", "mean, class"]),
        (["finetune.layer_decay=1.5"], ["finetune.layer_decay (1.5)", "from 0 to 1"]),
        (["finetune.duration=soon"], ["finetune.duration (soon)", "800ep"]),
        (["data.decoder=nvjpeg"], ["data.decoder (nvjpeg)", "turbo"]),
        (["data.eval="], ["data.eval is empty"]),
        (["eval.resize=20"], ["eval.resize (20)", "28"]),
        (["finetune.grid=9"], ["eval.resize (28)", "36 px"]),
        (["finetune.grid=1"], ["finetune.grid (1)", "from 2 to 256"]),
        (["finetune.randaugment=rand-m99-inc1"], ["finetune.randaugment (rand-m99-inc1)", "up to 10"]),
        (["finetune.folder=RUN"], ["run.task (pretrain there, finetune now)", "take another finetune.folder"]),
        (["run.task=finetune"], ["is a fine-tuning run itself"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_bad_input_is_refused_in_one_line(pretrained, tmp_path, capsys, more, named):
    vit = timm.models.VisionTransformer(img_size=28, patch_size=4, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "encoder.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "headless.pth")
    places = {"ENCODER": str(tmp_path / "encoder.pth"), "HEADLESS": str(tmp_path / "headless.pth"),
              "finetune.folder=RUN": f"finetune.folder={pretrained}"}  # fmt: skip
    arguments = command(pretrained, f"finetune.folder={tmp_path}/run", *(places.get(word, word) for word in more))
    line = refused(capsys, arguments)
    for words in named:
        assert words in line, line


def test_pretraining_configurations_do_not_become_fine_tuning_by_one_word(shards, tmp_path, capsys):
    arguments = train_command(shards, tmp_path / "run", "parallel.backend=local", "run.task=finetune")[3:]
    assert "lmim eval finetune" in refused(capsys, arguments)


def relabelled(shards: Path, folder: Path, change) -> Path:
    """Copy shards, with the classes of their index and the labels of their tables changed."""
    shutil.copytree(shards, folder)
    for table in folder.glob("*.npz"):
        columns = dict(np.load(table))
        columns["labels"] = change(columns["labels"])
        np.savez(table, **columns)
    return folder


def test_data_without_labels_and_classes_unknown_to_training(pretrained, shards, tmp_path, capsys):
    bare = relabelled(shards / "train", tmp_path / "bare", lambda labels: np.full_like(labels, -1))
    where = f"finetune.folder={tmp_path}/run"
    line = refused(capsys, command(pretrained, where, f"data.train={bare}"))
    assert "data.train" in line and "each with a label" in line
    line = refused(capsys, command(pretrained, where, f"data.eval={bare}"))
    assert "data.eval" in line and "each with a label" in line
    few = relabelled(shards / "train", tmp_path / "few", lambda labels: labels.clip(max=6))
    line = refused(capsys, command(pretrained, where, f"data.train={few}"))
    assert "has no image of class 7" in line and "which data.eval holds" in line
    one = relabelled(shards / "train", tmp_path / "one", lambda labels: labels * 0)
    line = refused(capsys, command(pretrained, where, f"data.train={one}", f"data.eval={one}"))
    assert "data.train" in line
