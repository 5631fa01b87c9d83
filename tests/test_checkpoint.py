"""Checkpoints appear whole or not at all, are read back exactly, and give their encoder in one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lmim import LatentMIM, checkpoint, load_encoder
from lmim.config import Config, ConfigError, ModelConfig

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


def save(folder, model, step, keep=2):
    config = dataclasses.replace(Config(), model=MODEL)
    moments = {"exp_avg/a": torch.full((3,), float(step))}
    return checkpoint.save(
        folder, checkpoint.Position(step, 16 * step, "data", 8), config, model.state_dict(), moments, keep
    )


def test_round_trip_and_retention(tmp_path, model):
    for step in (5, 10, 15):
        path = save(tmp_path, model, step)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000010", "step-00000015"]
    assert checkpoint.newest(tmp_path) == path
    weights, optimizer = checkpoint.load_weights(path), checkpoint.load_optimizer(path)
    assert checkpoint.position_of(path) == checkpoint.Position(15, 240, "data", 8)
    assert checkpoint.config_of(path).model == MODEL
    assert optimizer["exp_avg/a"].tolist() == [15.0] * 3
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_an_interrupted_save_is_never_chosen(tmp_path, model, monkeypatch):
    save(tmp_path, model, 5)

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    for interrupted in ("save_file", "_sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, interrupted, full_disk)
            with pytest.raises(OSError, match="No space"):
                save(tmp_path, model, 10)
        assert checkpoint.newest(tmp_path).name == "step-00000005"
    assert save(tmp_path, model, 10).name == "step-00000010"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_damage_is_named(tmp_path, model):
    path = save(tmp_path, model, 5)
    (path / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"optimizer\.safetensors is missing or damaged"):
        checkpoint.load_optimizer(path)


@pytest.mark.parametrize("which", ["online", "target"])
def test_load_encoder(tmp_path, model, which):
    path = save(tmp_path, model, 5)
    images = torch.randn(2, 3, 16, 16)
    expected = model.get_submodule(which).eval().forward_features(images)
    for source in (tmp_path, path):
        encoder = load_encoder(source, which)
        assert not encoder.training
        torch.testing.assert_close(encoder.forward_features(images), expected)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        load_encoder(tmp_path / "nothing")
