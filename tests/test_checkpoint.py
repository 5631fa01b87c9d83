"""Checkpoints appear whole or not at all, are read back exactly, and give their encoder in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmim import LatentMIM, checkpoint, load_encoder, store
from lmim.config import ConfigError
from lmim.dist import Topology
from lmim.optim import MOMENTS
from lmim.options import CheckpointConfig, Config, ModelConfig

MODEL = ModelConfig(variant="tiny", embed_dim=32, depth=2, num_heads=4, patch_size=4, grid_size=4, projector_dim=16,
                    decoder_dim=16, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


@pytest.fixture
def model() -> LatentMIM:
    latent_mim = LatentMIM(MODEL, Config().objective)
    latent_mim.init_weights(3)
    with torch.no_grad():
        for parameter in latent_mim.target.parameters():
            parameter.add_(0.5)
    return latent_mim


ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")


def save(folder, model, step, keep=2, asynchronous=False, keep_every=0):
    """Commit a checkpoint whose moments hold the step's number."""
    config = dataclasses.replace(
        Config(), model=MODEL, checkpoint=CheckpointConfig(keep=keep, asynchronous=asynchronous)
    )
    saver = checkpoint.Saver(folder, config, ALONE, keep_every)
    pieces = [store.whole(name, tensor) for name, tensor in model.state_dict().items()]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pieces += [store.whole(f"{m}/{name}", torch.full_like(parameter, float(step))) for m in MOMENTS]
    saver.save(checkpoint.Position(step, 16 * step, step - 1, "data", 8), pieces)
    saver.close()
    return folder / "checkpoints" / f"step-{step:08d}"


def test_round_trip_and_retention(tmp_path, model):
    for step in (5, 10, 15, 20):
        path = save(tmp_path, model, step, keep_every=10, asynchronous=step == 20)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000010", "step-00000015", "step-00000020"]
    assert checkpoint.newest(tmp_path) == path and checkpoint.damage(path) is None
    weights, optimizer = checkpoint.load_weights(path), checkpoint.load_optimizer(path)
    assert checkpoint.position_of(path) == checkpoint.Position(20, 320, 19, "data", 8)
    assert checkpoint.config_of(path).model == MODEL
    assert optimizer["exp_avg/online.cls_token"].unique().tolist() == [20.0]
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    checkpoint.check_same_model(path, model)


def test_one_process_leaves_files_that_anything_opens(tmp_path, model):
    tensors = load_file(save(tmp_path, model, 5) / "weights-00000.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_interrupted_save_is_never_chosen_and_does_not_stop_the_run(
    tmp_path, model, monkeypatch, caplog, asynchronous
):
    save(tmp_path, model, 5)

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    for module, interrupted in ((store, "save_file"), (store, "sync"), (checkpoint.os, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(module, interrupted, full_disk)
            caplog.clear()
            with pytest.raises(checkpoint.SaveError, match=r"No space left on device.*step-00000005"):
                save(tmp_path, model, 10, asynchronous=asynchronous)
            assert "could not be written (rank 0: [Errno 28] No space left" in caplog.text
        assert checkpoint.newest(tmp_path).name == "step-00000005"
        assert checkpoint.damage(checkpoint.newest(tmp_path)) is None
    assert save(tmp_path, model, 10).is_dir()
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_damaged_later_checkpoint_does_not_push_out_what_is_saved(tmp_path, model):
    """A run that went back from damaged ones is stopped before it comes to them again."""
    for step in (10, 20, 30):
        (save(tmp_path, model, step, keep=3) / "weights-00000.safetensors").write_bytes(b"")
    save(tmp_path, model, 5, keep=1)
    path = save(tmp_path, model, 7, keep=1)
    assert checkpoint.damage(path) is None
    assert [p.name for p in checkpoint.complete(tmp_path)] == [path.name, *(f"step-000000{n}0" for n in (1, 2, 3))]


def test_a_kill_amid_the_removal_of_an_old_checkpoint_leaves_no_half_of_it(tmp_path, model, monkeypatch):
    save(tmp_path, model, 5, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: next(path.glob("weights-*"), path / "x").unlink())
        save(tmp_path, model, 10, keep=1)
    assert [checkpoint.damage(path) for path in checkpoint.complete(tmp_path)] == [None]
    save(tmp_path, model, 15, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000015"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, model, monkeypatch):
    """Else a run would begin anew over what it has."""
    save(tmp_path, model, 5)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refused)
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("name", ["optimizer-00000.safetensors", "weights-00000.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut short", "a bit flipped", "gone"])
def test_damage_is_named(tmp_path, model, name, harm):
    path = save(tmp_path, model, 5)
    content = (path / name).read_bytes()
    if harm == "gone":
        (path / name).unlink()
    elif harm == "cut short":
        (path / name).write_bytes(content[:-100])
    else:
        at = len(content) // 2 if name != "state.json" else content.index(b'"format"')
        (path / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert str(path / name) in checkpoint.damage(path)
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_weights(path)
    assert str(path / name) in str(caught.value) and "\n" not in str(caught.value)


def rewrite(path, change) -> None:
    """Change a checkpoint's state, as somebody would who means it: with the checksum that belongs to it."""
    state = json.loads((path / "state.json").read_text())
    del state["checksum"]
    change(state)
    (path / "state.json").write_text(json.dumps(dict(state, checksum=checkpoint._checksum(state))))


def test_any_flipped_bit_of_a_state_is_damage(tmp_path, model):
    """A step or a count of optimizer steps that is another number would change the trajectory without a word."""
    path = save(tmp_path, model, 5) / "state.json"
    content, unnoticed = path.read_bytes(), []
    numbers = [at for at in range(len(content)) if content[at : at + 1].isdigit()]
    for at in [*random.Random(0).sample(numbers, 100), content.index(b"optimizer_steps") + 18]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        if checkpoint.damage(path.parent) is None:
            unnoticed.append(at)
    assert unnoticed == []
    path.write_bytes(content)
    assert checkpoint.damage(path.parent) is None


HOSTILE = {
    "a shape below zero": lambda state: state["tensors"].update({"online.cls_token": [1, 1, -32]}),
    "a shape beyond all memory": lambda state: state["tensors"].update({"online.cls_token": [1, 10**6, 10**12]}),
    "a shape beyond all integers": lambda state: state["tensors"].update({"online.cls_token": [10**30]}),
    "a step of words": lambda state: state.update(step="x"),
    "a step below zero": lambda state: state.update(step=-5, samples=-80),
    "no configuration": lambda state: state.update(config=[1]),
    "an empty section": lambda state: state["config"].update(model=None),
    "an unknown variant": lambda state: state["config"]["model"].update(variant="giant"),
    "a variable": lambda state: state["config"]["run"].update(name="${oc.env:NOT_THERE}"),
    "a value that is wanted": lambda state: state["config"]["run"].update(name="???"),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_state_that_cannot_be_is_refused_in_one_line(tmp_path, model, lie):
    path = save(tmp_path, model, 5)
    rewrite(path, HOSTILE[lie])
    with pytest.raises(ConfigError) as caught:
        checkpoint.position_of(path)
        load_encoder(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("starts", ["[1]", "7", '{"online.cls_token": "a"}', '{"online.cls_token": -3}', "[" * 10**5])
def test_a_file_whose_pieces_start_nowhere_is_refused_in_one_line(tmp_path, model, starts):
    path = save(tmp_path, model, 5)
    file = path / "weights-00000.safetensors"
    save_file(load_file(file), file, metadata={"starts": starts})
    record = dict(name=file.name, bytes=file.stat().st_size, sha256=store.sha256_of(file))
    rewrite(path, lambda state: state.update(files=[record, *(f for f in state["files"] if f["name"] != file.name)]))
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_weights(path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named(tmp_path, model):
    path = save(tmp_path, model, 5)
    state = (path / "state.json").read_text()
    for change, words in (
        (lambda tensors: tensors.pop("online.cls_token"), "online.cls_token is absent there"),
        (lambda tensors: tensors.update(extra=[3]), "extra is (3,) there and absent"),
        (lambda tensors: tensors.update({"online.cls_token": [1, 1, 31]}), "online.cls_token is (1, 1, 31) there"),
    ):
        (path / "state.json").write_text(state)
        rewrite(path, lambda content, change=change: change(content["tensors"]))
        with pytest.raises(ConfigError, match="another model") as caught:
            checkpoint.check_same_model(path, model)
        assert words in str(caught.value)


def test_who_waits_for_a_slow_disk_is_not_stuck(tmp_path, model, monkeypatch):
    """Else a save that takes longer than `parallel.timeout_minutes` would end the run, again and again."""
    plain, signs = store.sync, []
    monkeypatch.setattr(store, "sync", lambda path: time.sleep(1.0) or plain(path))
    monkeypatch.setattr(checkpoint.dist, "progress", lambda: signs.append(time.monotonic()))
    path = save(tmp_path, model, 5, asynchronous=True)
    assert checkpoint.damage(path) is None and len(signs) > 2
    assert all(later - sooner < 1.5 for sooner, later in pairwise(signs))


@pytest.mark.parametrize("which", ["online", "target"])
def test_load_encoder(tmp_path, model, which):
    path = save(tmp_path, model, 5)
    images = torch.randn(2, 3, 16, 16)
    expected = model.get_submodule(which).eval().forward_features(images)
    for source in (tmp_path, path):
        encoder = load_encoder(source, which)
        assert not encoder.training
        torch.testing.assert_close(encoder.forward_features(images), expected)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        load_encoder(tmp_path / "empty")
