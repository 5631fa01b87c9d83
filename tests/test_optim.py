"""Parameter groups, AdamW and the moving average, against lists and NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from lmim.objective import LatentMIM
from lmim.optim import build_adamw, ema_update, parameter_groups, set_learning_rate
from lmim.options import ModelConfig, ObjectiveConfig, OptimConfig

torch.set_num_threads(1)
DECAYED = {
    "online.cls_token",
    "online.blocks.0.attn.qkv.weight",
    "online.blocks.0.attn.proj.weight",
    "online.blocks.0.mlp.fc1.weight",
    "online.blocks.0.mlp.fc2.weight",
    "online.projector.linear0.weight",
    "online.projector.linear1.weight",
    "decoder.cls_token",
    "decoder.mask_token",
    "decoder.blocks.0.self_attn.qkv.weight",
    "decoder.blocks.0.self_attn.proj.weight",
    "decoder.blocks.0.cross_attn.q_proj.weight",
    "decoder.blocks.0.cross_attn.kv_proj.weight",
    "decoder.blocks.0.cross_attn.proj.weight",
    "decoder.blocks.0.mlp.fc1.weight",
    "decoder.blocks.0.mlp.fc2.weight",
    "decoder.head.weight",
}


@pytest.mark.parametrize("learned", [False, True])
def test_decayed_names_are_the_authors(learned):
    """Exempt are biases, norms, the patch embedding, the decoder's input projection and learned positions."""
    config = ModelConfig(
        embed_dim=8,
        depth=1,
        num_heads=2,
        patch_size=2,
        grid_size=3,
        projector_dim=8,
        projector_depth=2,
        decoder_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        learnable_positions=learned,
    )
    model = LatentMIM(config, ObjectiveConfig(num_visible=3))
    decayed, exempt = parameter_groups(model, 0.05)
    assert set(decayed["names"]) == DECAYED
    trained = {name for name, p in model.named_parameters() if not name.startswith("target.")}
    assert set(exempt["names"]) == trained - DECAYED
    assert {"online.patch_embed.proj.weight", "decoder.embed.weight"} <= set(exempt["names"])
    assert ("online.pos_embed" in exempt["names"]) == learned
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    by_name = dict(model.named_parameters())
    for group in (decayed, exempt):
        assert all(by_name[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_ema_equals_its_closed_form_after_k_steps():
    """θ_k = Π m_i · θ_0 + Σ_i (1 − m_i) · Π_{j>i} m_j · w_i."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 5, generator=generator), torch.randn(3, generator=generator)]
    onlines = [[torch.randn(t.shape, generator=generator) for t in start] for _ in range(20)]
    momenta = np.linspace(0.9, 1.0, 20)
    targets = [t.clone() for t in start]
    for online, momentum in zip(onlines, momenta, strict=True):
        ema_update(targets, online, momentum)
    for n, tensor in enumerate(targets):
        closed = momenta.prod() * start[n].double().numpy()
        for i, m in enumerate(momenta):
            closed = closed + (1 - m) * momenta[i + 1 :].prod() * onlines[i][n].double().numpy()
        np.testing.assert_allclose(tensor.numpy(), closed, atol=2e-6)


def test_ema_with_momentum_one_or_equal_weights_stands_still():
    target, online = torch.randn(50), torch.randn(50)
    kept = target.clone()
    ema_update([target], [online], 1.0)
    assert torch.equal(target, kept)
    ema_update([target], [target.clone()], 0.99)
    assert torch.equal(target, kept)


def test_fp32_ema_moves_where_a_bf16_one_stands_still():
    target, online = torch.ones(8), torch.full((8,), 1.5)
    in_bf16 = target.bfloat16()
    for _ in range(100):
        ema_update([target], [online], 0.9999)
        in_bf16 = (0.9999 * in_bf16.float() + 0.0001 * online).bfloat16()
    assert (in_bf16 == 1).all()
    np.testing.assert_allclose(target.numpy(), 1.5 - 0.5 * 0.9999**100, atol=2e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_ema_refuses_lower_precision(which):
    pair = [torch.ones(2), torch.ones(2)]
    pair[which] = pair[which].bfloat16()
    with pytest.raises(AssertionError, match="fp32"):
        ema_update([pair[0]], [pair[1]], 0.9)


def test_adamw_steps_are_numpys():
    """Decay on the weight and none on the bias, bias-corrected moments, a learning rate set anew every step."""
    model = nn.Linear(4, 3)
    config = OptimConfig(weight_decay=0.1, betas=[0.8, 0.9], eps=1e-6)
    optimizer = build_adamw(parameter_groups(model, config.weight_decay), config)
    names = ("weight", "bias")
    w = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    m, v = ({n: np.zeros_like(w[n]) for n in names} for _ in range(2))
    rng = np.random.default_rng(0)
    for k, lr in enumerate([0.1, 0.03, 0.2, 0.01], start=1):
        set_learning_rate(optimizer, lr)
        for n, p in model.named_parameters():
            g = rng.normal(size=w[n].shape)
            p.grad = torch.tensor(g, dtype=torch.float32)
            m[n], v[n] = 0.8 * m[n] + 0.2 * g, 0.9 * v[n] + 0.1 * g * g
            w[n] = w[n] * (1 - lr * (0.1 if n == "weight" else 0.0))
            w[n] -= lr * (m[n] / (1 - 0.8**k)) / (np.sqrt(v[n] / (1 - 0.9**k)) + 1e-6)
        optimizer.step()
    for n, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), w[n], atol=1e-5)
