"""The evaluation commands on checkpoints of this project and of others: read-outs, the cache, the loop, mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from lmim.__main__ import main
from lmim.config import load_config
from lmim.data.datasets import Source, open_source
from lmim.data.sharding import write_shards
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval import features as features_module
from lmim.eval.feature_cache import FeatureCache, identity_of
from lmim.eval.features import Reading, Subject, check_readings, eval_sizes, extract, read_out
from lmim.eval.results import read_results
from lmim.formats import build_decoder, build_encoder, read_weights
from lmim.patches import normalize_images
from lmim.vit import VisionTransformer
from tests.conftest import REPOSITORY, TINY, free_port, losses, process_environment, run_training

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
QUICK = ["probe.least_steps=20", "probe.epochs=1", "probe.attentive_epochs=1", "probe.shots=[1,2]", "probe.trials=2",
         "probe.attentive_learning_rates=[0.001]"]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(shards, tmp_path_factory):
    """A run of four steps that judges both encoders by all cheap evaluations."""
    folder = tmp_path_factory.mktemp("evaluations") / "run"
    arguments = [*TINY, "parallel.backend=local", f"run.folder={folder}", f"data.train={shards}/train",
                 f"data.eval={shards}/eval", "optim.duration=4st", "eval.knn_every=2st", "eval.gallery_every=4st",
                 "eval.fewshot_every=2st", "eval.encoders=[online,target]", *QUICK]  # fmt: skip
    assert main(["train", QUICKSTART, *arguments]) == 0
    return folder


def evaluated(capsys, *arguments: str) -> dict:
    """Run an evaluation and return its last line."""
    assert main(["eval", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *arguments: str) -> str:
    """Run an evaluation that must be refused and return its one line."""
    capsys.readouterr()
    assert main(["eval", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- commands --------------------------------------------------------------------------------------------------------


def test_every_evaluation_is_recorded_with_what_it_printed(run_folder, capsys):
    for name, settings in (("knn", ["eval.k=[1,5]"]), ("linear", []), ("attentive", []), ("fewshot", []),
                           ("fewshot", ["probe.classifier=logistic"])):  # fmt: skip
        found = evaluated(capsys, name, run_folder, *settings, "--which", "target")
        assert set(found) == {"random", "target"} | ({"pixels"} if name != "attentive" else set())
        last = read_results(run_folder)[-1]
        assert (last["evaluation"], last["which"], last["figures"]) == (name, "target", found)
    assert set(found["target"]) == {"1", "2"} and set(found["target"]["1"]) == {"accuracy", "interval"}


def test_a_list_of_k_has_a_column_each(run_folder, capsys):
    several = evaluated(capsys, "knn", run_folder, "eval.k=[5,1]", "eval.baselines=[]")["online"]
    for k in (1, 5):
        one = evaluated(capsys, "knn", run_folder, f"eval.k={k}", "eval.baselines=[]")["online"]
        assert set(one) == {"leave_one_out", "gallery"} and one["gallery"] == several[f"gallery_{k}"]
    assert several["gallery"] == several["gallery_5"]


def test_the_loop_gives_what_the_commands_give(run_folder, capsys):
    rows = [json.loads(line) for line in (run_folder / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [-1, 1, 3]
    assert set(rows[0]) - set(rows[1]) == {"knn_gallery", "target_knn_gallery"}  # due after four steps, and at first
    assert rows[0]["knn_gallery"] == rows[0]["target_knn_gallery"]  # the target starts as a copy
    for which, prefix in (("online", ""), ("target", "target_")):
        near = evaluated(capsys, "knn", run_folder, "--which", which)
        assert near[which]["leave_one_out"] == rows[-1][f"{prefix}knn_leave_one_out"]
        assert near[which]["gallery"] == rows[-1][f"{prefix}knn_gallery"]
        shots = evaluated(capsys, "fewshot", run_folder, "--which", which)
        for count in ("1", "2"):
            assert shots[which][count]["accuracy"] == pytest.approx(rows[-1][f"{prefix}fewshot_{count}"], abs=1e-4)
            assert shots["random"][count]["accuracy"] == pytest.approx(rows[0][f"fewshot_{count}"], abs=1e-4)


@pytest.mark.launch
@pytest.mark.slow
def test_two_ranks_of_a_launcher_print_what_one_does(run_folder, capsys):
    alone = evaluated(capsys, "linear", run_folder)
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port",
               str(free_port()), "-m", "lmim", "eval", "linear", str(run_folder)]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True,
                          timeout=250)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    for name, found in json.loads(lines[0]).items():
        assert found["accuracy"] == pytest.approx(alone[name]["accuracy"], abs=1e-4), name


# --- encoders of others ----------------------------------------------------------------------------------------------


def test_a_vit_of_timm_is_evaluated_at_its_own_view(shards, tmp_path, capsys):
    """Another width, patch and grid than the configuration's, with learned positions; features are timm's."""
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0)
    torch.nn.init.normal_(model.pos_embed, std=0.5, generator=torch.Generator().manual_seed(0))
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    data = [f"data.train={shards}/train", f"data.eval={shards}/eval", f"run.folder={tmp_path}/none", "data.workers=0",
            "model.embed_dim=48", "model.num_heads=4", "eval.resize=null", *QUICK]  # fmt: skip
    for name in ("knn", "linear", "attentive", "fewshot"):
        found = evaluated(capsys, name, QUICKSTART, "--checkpoint", tmp_path / "vit.safetensors", *data)
        assert {"random", "online"} <= set(found), name
    config = load_config(QUICKSTART, data)
    encoder = build_encoder(read_weights(tmp_path / "vit.safetensors"), num_heads=4)
    assert tuple(eval_sizes(config, encoder)) == (37, 32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model.eval().forward_intermediates(normalize_images(images), norm=True, intermediates_only=True,
                                                    output_fmt="NLC", return_prefix_tokens=True)  # fmt: skip
        subject = Subject("online", encoder)
        for layer in (0, 1, 2):
            readings = [Reading(layer, pooling, True) for pooling in ("patch_mean", "class_token")]
            patch_mean, class_token = read_out(subject, readings, images)
            patches, prefix = theirs[layer]
            assert torch.allclose(patch_mean, patches.mean(dim=1), atol=1e-5)
            assert torch.allclose(class_token, prefix[:, 0], atol=1e-5)


def test_heads_that_nothing_tells_are_asked_for(shards, tmp_path, capsys):
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4, num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    line = refused(capsys, "knn", QUICKSTART, f"data.eval={shards}/eval", "--checkpoint", tmp_path / "vit.safetensors")
    assert "width 48" in line and "model.num_heads" in line


def test_the_predictor_reads_all_cells_with_all_patches_in_sight(run_folder, capsys):
    weights = read_weights(run_folder)
    encoder, decoder = build_encoder(weights), build_decoder(weights)
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = read_out(Subject("x", encoder, decoder), [Reading(1, "predictor")], images)
        flat = normalize_images(images).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(3, 49, 48)
        cells = torch.arange(49).expand(3, -1)
        expected = decoder(encoder(flat, cells), cells, cells)[:, 1:].mean(dim=1)
    assert torch.allclose(found, expected, atol=1e-5)
    for name in ("knn", "linear"):
        settings = ["eval.pooling=predictor", "probe.poolings=[predictor]", "eval.crop=40", "eval.resize=40"]
        assert json.dumps(evaluated(capsys, name, run_folder, *settings)).count("online") > 0


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cached_features_are_those_computed_and_no_others(shards, tmp_path, monkeypatch):
    config = load_config(QUICKSTART, ["data.workers=0"])
    index = ShardIndex.open(shards / "eval")
    encoder = VisionTransformer(grid_size=7, patch_size=4, embed_dim=32, depth=2, num_heads=2, projector_depth=0)
    encoder.init_weights(0)
    subject, cache = Subject("x", encoder.eval()), FeatureCache(tmp_path / "cache", 1e9)
    readings = check_readings([Reading(-1, "class_patch_mean"), Reading(0)], subject, "eval.layer")
    computed = []
    read = features_module.read_out

    def counting(subject, readings, images):
        computed.append(len(images))
        return read(subject, readings, images)

    monkeypatch.setattr(features_module, "read_out", counting)

    def features(*, view=None, readings=readings, ids=None):
        computed.clear()
        view = view or eval_sizes(config, encoder)
        found = extract(subject, readings, index, view, config, ALONE, ids=ids, cache=cache)
        return found, sum(computed)

    first, count = features()
    assert count == 100 and len(list((tmp_path / "cache").iterdir())) == 3  # class token, and two patch means
    again, count = features()
    assert count == 0 and torch.equal(again.labels, first.labels) and torch.equal(again.ids, first.ids)
    assert all(torch.equal(first.by(reading), again.by(reading)) for reading in readings)
    assert features(readings=readings[1:])[1] == 0  # a part of what is there
    assert features(view=features_module.View(32, 28))[1] == 100
    assert features(ids=np.arange(50))[1] == 50
    assert features(readings=[readings[0]._replace(norm=True)])[1] == 100
    with torch.no_grad():
        encoder.norm.bias[0] += 1e-3
    assert features()[1] == 100
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    found, count = features()
    assert count == 100 and all(torch.equal(found.by(r), first.by(r)) for r in readings)  # before the last norm


def test_heads_are_part_of_an_encoders_identity():
    with torch.device("meta"):
        shapes = [VisionTransformer(embed_dim=32, depth=1, num_heads=heads, projector_depth=0) for heads in (2, 4)]
    identities = []
    for encoder in shapes:
        encoder.to_empty(device="cpu")
        encoder.init_weights(0)
        identities.append(identity_of(encoder))
    assert identities[0] != identities[1] == identity_of(shapes[1])


def test_the_cache_stays_under_its_limit_and_drops_what_was_used_longest_ago(tmp_path):
    import os

    cache = FeatureCache(tmp_path, 1000)
    for number, key in enumerate("abc"):
        cache.write(key, dict(x=torch.zeros(60)))  # 240 bytes and a header
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    assert cache.read("a") is not None  # now the last one used
    cache.write("d", dict(x=torch.zeros(60)))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}
    cache.write("e", dict(x=torch.zeros(1000)))
    assert cache.read("e") is None and cache.read("b") is None


# --- mistakes --------------------------------------------------------------------------------------------------------


def shards_of(folder: Path, labels: list[int | None], classes: tuple[str, ...] | None = None) -> Path:
    """Write shards of embedded images under other labels."""
    images = islice(open_source("embedded:eval").images, len(labels))
    some = tuple(type(i)(i.key, i.suffix, label, i.path, i.load) for i, label in zip(images, labels, strict=True))
    write_shards(Source("made up", classes, some), folder)
    return folder


def test_labels_that_are_missing(run_folder, tmp_path, capsys):
    plain = shards_of(tmp_path / "plain", [None] * 20)
    for name in ("linear", "attentive", "fewshot"):
        assert "data.train" in refused(capsys, name, run_folder, f"data.train={plain}")
        assert "data.train is empty" in refused(capsys, name, run_folder, "data.train=")
    for name in ("knn", "linear", "attentive", "fewshot"):
        line = refused(capsys, name, run_folder, f"data.eval={plain}")
        assert "data.eval" in line and "each with a label" in line


def test_classes_that_do_not_fit(run_folder, tmp_path, capsys):
    names = tuple("abcd")
    test = shards_of(tmp_path / "test", [0, 1, 2, 3] * 4, names)
    without = shards_of(tmp_path / "without", [0, 1, 3] * 4, names)
    for name in ("knn", "linear", "attentive", "fewshot"):
        line = refused(capsys, name, run_folder, f"data.train={without}", f"data.eval={test}")
        assert "no image of class 2 (c)" in line and "data.eval" in line
    other = shards_of(tmp_path / "other", [0, 1, 2, 3] * 4, ("a", "b", "x", "d"))
    line = refused(capsys, "knn", run_folder, f"data.train={other}", f"data.eval={test}")
    assert "class 2 is x in the one and c in the other" in line


def test_classes_of_one_image(run_folder, tmp_path, capsys):
    names = tuple("abc")
    few = shards_of(tmp_path / "few", [0, 0, 0, 1, 2, 2], names)
    line = refused(capsys, "fewshot", run_folder, f"data.train={few}", f"data.eval={few}")
    assert "1 image of class 1 (b)" in line and "probe.shots ([1, 2])" in line
    one = shards_of(tmp_path / "one", [0] * 6)
    line = refused(capsys, "fewshot", run_folder, f"data.train={one}", f"data.eval={one}", "probe.shots=[1]")
    assert "one class only" in line
    assert set(evaluated(capsys, "fewshot", run_folder, f"data.train={few}", f"data.eval={few}", "probe.shots=[1]"))


def test_sources_without_an_encoder_or_a_decoder(run_folder, shards, tmp_path, capsys):
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "no.safetensors")
    for name in ("knn", "linear", "attentive", "fewshot"):
        line = refused(capsys, name, run_folder, "--checkpoint", tmp_path / "no.safetensors")
        assert "no.safetensors" in line
        assert "does not exist" in refused(capsys, name, run_folder, "--checkpoint", tmp_path / "nowhere")
    model = timm.models.VisionTransformer(img_size=28, patch_size=4, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    for name in ("knn", "fewshot", "linear"):
        line = refused(capsys, name, run_folder, "eval.pooling=predictor", "probe.poolings=[predictor]",
                       "--checkpoint", tmp_path / "vit.safetensors")  # fmt: skip
        assert "holds no decoder" in line and "predictor" in line
    line = refused(capsys, "knn", run_folder, "--which", "target", "--checkpoint", tmp_path / "vit.safetensors")
    assert "no target" in line


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("eval.layer=2", ["eval.layer (2)", "has 2"]),
        ("eval.pooling=mean", ["eval.pooling (mean)", "patch_mean, class_token"]),
        ("eval.crop=30", ["eval.crop (30)", "4 px", "28"]),
        ("eval.crop=32", ["eval.resize (28)", "32"]),
        ("eval.k=none", ["eval.k (none)"]),
        ("eval.k=[1,0]", ["eval.k ([1, 0])", "above 0"]),
        ("eval.k=[]", ["eval.k ([])"]),
        ("eval.baselines=[pixel]", ["eval.baselines", "pixels, random"]),
        ("probe.shots=[]", ["probe.shots is empty"]),
        ("probe.held_out=0", ["probe.held_out (0.0)", "above 0"]),
        ("probe.classifier=svm", ["probe.classifier (svm)", "ridge, logistic"]),
        ("probe.trials=0", ["probe.trials (0)", "above 0"]),
    ],
)
def test_options_that_cannot_be(run_folder, capsys, setting, named):
    line = refused(capsys, "knn", run_folder, setting)
    assert [words for words in named if words not in line] == [], line


def test_layers_of_a_linear_probe(run_folder, capsys):
    assert "probe.layers (5)" in refused(capsys, "linear", run_folder, "probe.layers=[0,5]")
    found = evaluated(capsys, "linear", run_folder, "probe.layers=[0,1]", "eval.baselines=[]")["online"]
    assert {head["layer"] for head in found["heads"]} == {0, 1} and len(found["heads"]) == 2 * 3 * 7


def test_the_loop_refuses_what_only_a_checkpoint_can_give(shards, tmp_path, capsys):
    base = ["train", QUICKSTART, *TINY, "parallel.backend=local", f"run.folder={tmp_path}/run",
            f"data.eval={shards}/eval", "optim.duration=1st", "eval.gallery_every=1st"]  # fmt: skip
    plain = shards_of(tmp_path / "plain", [None] * 40)
    for setting, words in ((f"data.train={plain}", "data.train"),
                           ("eval.pooling=predictor", "eval.pooling (predictor)"),
                           ("eval.encoders=[]", "eval.encoders is empty")):  # fmt: skip
        capsys.readouterr()
        assert main([*base, f"data.train={shards}/train", setting]) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["linear", "attentive", "fewshot", "finetune"])
def test_one_class_is_nothing_to_tell_apart(run_folder, tmp_path, capsys, name):
    one = shards_of(tmp_path / "one", [0] * 6)
    line = refused(capsys, name, run_folder, f"data.train={one}", f"data.eval={one}", "probe.shots=[1]",
                   f"finetune.folder={tmp_path}/tuned")  # fmt: skip
    assert "one class only" in line and str(one) in line


def unreadable(shards: Path, folder: Path) -> Path:
    """Return a copy of shards in which every image's bytes are zeros."""
    shutil.copytree(shards, folder)
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as archive:
            members = [member for member in archive if member.name.endswith(".png")]
        with tar.open("r+b") as file:
            for member in members:
                file.seek(member.offset_data)
                file.write(bytes(member.size))
    return folder


@pytest.mark.parametrize("name", ["knn", "linear", "attentive", "fewshot", "finetune", "segment"])
def test_no_image_that_can_be_read(run_folder, shards, tmp_path, capsys, caplog, name):
    """One line says so, after the first few images by name, and not all of a hundred."""
    for split in ("eval",) if name in ("finetune", "segment") else ("train", "eval"):
        bad = unreadable(shards / split, tmp_path / split)
        caplog.clear()
        line = refused(capsys, name, run_folder, f"data.{split}={bad}", "eval.baselines=[]", *QUICK,
                       f"finetune.folder={tmp_path}/tuned", "finetune.duration=1st", "finetune.warmup=0st")  # fmt: skip
        assert str(bad) in line and "none of the" in line
        assert len([record for record in caplog.records if "skipped" in record.getMessage()]) <= 10


def test_labels_that_are_no_class_numbers(run_folder, shards, tmp_path, capsys):
    def changed(name: str, labels: Callable[[np.ndarray], np.ndarray]) -> Path:
        folder = Path(shutil.copytree(shards / "eval", tmp_path / name))
        for table in folder.glob("*.npz"):
            columns = dict(np.load(table))
            np.savez(table, **(columns | dict(labels=labels(columns["labels"]))))
        return folder

    for name in ("knn", "linear", "attentive", "fewshot"):
        line = refused(capsys, name, run_folder, f"data.eval={changed(f'{name} halves', lambda y: y + 0.5)}")
        assert "does not fit shard-000000.tar: shard the images again" in line
        line = refused(capsys, name, run_folder, f"data.eval={changed(f'{name} huge', lambda y: y + 10**7)}")
        assert "data.eval" in line and "number classes from 0" in line


def test_heads_that_nobody_tells_are_asked_for_alike(run_folder, tmp_path, capsys):
    vit = timm.models.VisionTransformer(img_size=28, patch_size=4, embed_dim=48, depth=1, num_heads=4, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    for name in ("knn", "linear", "attentive", "fewshot", "finetune", "segment"):
        line = refused(capsys, name, run_folder, "--checkpoint", tmp_path / "vit.safetensors")
        assert "set model.embed_dim=48 and model.num_heads" in line, name


def test_what_a_run_said_of_its_ranks_stops_no_evaluation(run_folder, capsys):
    """One that was trained with replicas of two ranks, on more than one."""
    settings = ["parallel.backend=fsdp", "parallel.shard_ranks=2", "eval.baselines=[]"]
    assert evaluated(capsys, "knn", run_folder, *settings)["online"]["leave_one_out"] > 0
    assert "segment.clusters" in refused(capsys, "segment", run_folder, *settings, "segment.clusters=[]")


def test_what_cannot_be_recorded_is_printed_all_the_same(run_folder, tmp_path, capsys, caplog):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("*.jsonl", "knn.json")))
    (folder / "evaluations.jsonl").mkdir()  # as a disk that has become read-only, for root too
    (folder / "knn.json").mkdir()
    assert set(evaluated(capsys, "knn", folder, "eval.baselines=[]")) == {"online"}
    assert "evaluations.jsonl cannot be written" in caplog.text and "knn.json cannot be written" in caplog.text


@pytest.mark.parametrize("setting", ["segment.out", "run.folder"])
def test_pictures_that_have_no_place_are_refused_before_the_work(run_folder, tmp_path, capsys, setting):
    (tmp_path / "file").write_text("no folder")
    line = refused(capsys, "segment", run_folder, "--checkpoint", run_folder, f"{setting}={tmp_path}/file/in")
    assert f"{tmp_path}/file/in" in line and setting in line and "cannot be written" in line


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("chosen", [["parallel.backend=deepspeed", "parallel.zero_stage=1"],
                                    ["parallel.backend=deepspeed", "parallel.zero_stage=3"],
                                    ["parallel.backend=fsdp"]], ids=" ".join)  # fmt: skip
def test_the_loop_of_two_ranks_finds_what_one_finds(run_folder, shards, tmp_path, chosen):
    """All cheap evaluations of both encoders, amid training; batches that the ranks have different numbers of."""
    often = ["optim.duration=4st", "eval.knn_every=2st", "eval.gallery_every=4st", "eval.fewshot_every=2st",
             "eval.encoders=[online,target]", "eval.batch=17", *QUICK]  # fmt: skip
    run_training(shards, tmp_path / "run", *chosen, *often, ranks=2, launcher="torchrun")
    ours, alone = (
        [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", run_folder)
    )
    assert [set(row) for row in ours] == [set(row) for row in alone] and len(ours) == 3
    assert ours[0] == alone[0]  # of the same weights
    for mine, theirs in zip(ours[1:], alone[1:], strict=True):
        assert mine == pytest.approx(theirs, abs=0.021)  # two images of 100: weights differ by rounding
    assert losses(tmp_path / "run") == pytest.approx(losses(run_folder), rel=1e-5)
