"""The networks against timm, torch's own attention and NumPy; names and initialisation as promised."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from lmim.vit import BranchNoise, CrossAttention, Decoder, VisionTransformer, attend, sincos_positions

torch.set_num_threads(1)
SIZES = dict(grid_size=5, patch_size=4, embed_dim=24, depth=3, num_heads=3, projector_dim=40, projector_depth=2)
DECODER = dict(grid_size=5, encoder_dim=24, embed_dim=16, depth=2, num_heads=4)


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Initialise, then move every parameter, so that no zero bias or unit norm hides a mistake."""
    module.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "grid"), [(8, 3), (24, 5), (768, 14)])
def test_position_table_is_the_specs(dim, grid):
    expected = np.zeros((1 + grid**2, dim))
    for r in range(grid):
        for c in range(grid):
            y, x = r * grid / (grid - 1), c * grid / (grid - 1)
            omegas = [10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
            waves = [[wave(along * w) for w in omegas] for along in (x, y) for wave in (math.sin, math.cos)]
            expected[1 + r * grid + c] = np.concatenate(waves)
    table = sincos_positions(dim, grid)
    assert table.dtype == torch.float32 and table.shape == (1, 1 + grid**2, dim)
    np.testing.assert_allclose(table[0].numpy(), expected, atol=1e-6)


# --- the encoder against timm ----------------------------------------------------------------------------------------


def timm_twin(encoder: VisionTransformer) -> TimmViT:
    """Build timm's model from our weights: Linear over (row, column, channel) becomes a convolution."""
    P, D = encoder.patch_size, encoder.embed_dim
    twin = TimmViT(
        img_size=encoder.grid_size * P,
        patch_size=P,
        embed_dim=D,
        depth=SIZES["depth"],
        num_heads=SIZES["num_heads"],
        num_classes=0,
        dynamic_img_size=True,
    )
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("projector.")}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].reshape(D, P, P, 3).permute(0, 3, 1, 2)
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.parametrize("shape", [(20, 20), (32, 24), (40, 40)])
@torch.no_grad()
def test_encoder_is_timms_vision_transformer(shape):
    """On other grids too, where positions were learned; the fixed table is computed anew there (test_formats.py)."""
    encoder = shaken(VisionTransformer(**SIZES, learnable_positions=shape != (20, 20)))
    twin, images = timm_twin(encoder), torch.randn(2, 3, *shape)
    torch.testing.assert_close(encoder.forward_features(images), twin.forward_features(images), atol=1e-5, rtol=1e-5)
    for norm in (False, True):
        theirs = twin.forward_intermediates(
            images, indices=[0, 2], norm=norm, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        ours = encoder.forward_intermediates(images, [0, 2], norm=norm)
        assert len(ours) == len(theirs) == 2
        for mine, (patches, prefix) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.cat([prefix, patches], 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_intermediates_are_chosen_as_in_timm():
    encoder, images = shaken(VisionTransformer(**SIZES)), torch.randn(1, 3, 20, 20)
    all_three = encoder.forward_intermediates(images)
    assert len(all_three) == 3
    for chosen, expected in ((2, [1, 2]), ([-1], [2]), ([2, 0], [2, 0])):
        got = encoder.forward_intermediates(images, chosen)
        assert all(torch.equal(a, all_three[i]) for a, i in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_subset_of_patches_is_read_by_its_cells():
    """All patches, shuffled, give the tokens of the image; the projector is Linear, LN 1e-5, GELU, Linear, LN 1e-5."""
    encoder = shaken(VisionTransformer(**SIZES))
    images, P = torch.randn(2, 3, 20, 20), 4
    order = torch.stack([torch.randperm(25), torch.randperm(25)])
    patches = torch.stack(
        [
            torch.stack(
                [
                    image[:, c // 5 * P : c // 5 * P + P, c % 5 * P : c % 5 * P + P].permute(1, 2, 0).flatten()
                    for c in cells.tolist()
                ]
            )
            for image, cells in zip(images, order, strict=True)
        ]
    )
    expected = encoder.forward_features(images)
    weights = {k: v.double() for k, v in encoder.projector.state_dict().items()}
    expected = expected.double() @ weights["linear0.weight"].T
    expected = nn.functional.layer_norm(expected, (40,), weights["norm0.weight"], weights["norm0.bias"], 1e-5)
    expected = expected * 0.5 * (1 + torch.erf(expected / math.sqrt(2))) @ weights["linear1.weight"].T
    expected = nn.functional.layer_norm(expected, (24,), weights["norm1.weight"], weights["norm1.bias"], 1e-5).float()
    got = encoder(patches, order)
    torch.testing.assert_close(got[:, 0], expected[:, 0], atol=2e-5, rtol=1e-4)
    in_order = torch.stack([tokens[cells] for tokens, cells in zip(expected[:, 1:], order, strict=True)])
    torch.testing.assert_close(got[:, 1:], in_order, atol=2e-5, rtol=1e-4)


# --- initialisation and names ----------------------------------------------------------------------------------------

BUILDERS = {
    "encoder": lambda: VisionTransformer(**SIZES),
    "encoder, learned positions": lambda: VisionTransformer(**SIZES, learnable_positions=True),
    "encoder without projector": lambda: VisionTransformer(**{**SIZES, "projector_depth": 0}),
    "decoder": lambda: Decoder(**DECODER),
    "decoder, learned positions": lambda: Decoder(**DECODER, learnable_positions=True),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_init_weights_sets_every_parameter_and_buffer(name):
    with torch.device("meta"):
        module = BUILDERS[name]()
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(torch.nan)
    module.init_weights(3)
    assert [n for n, t in [*module.named_parameters(), *module.named_buffers()] if not t.isfinite().all()] == []
    assert set(module.state_dict()) == {n for n, _ in [*module.named_parameters(), *module.named_buffers()]}


def test_init_depends_on_seed_and_name_only():
    first, again, other = (VisionTransformer(**SIZES) for _ in range(3))
    torch.manual_seed(1)
    first.init_weights(5)
    torch.manual_seed(2)
    again.init_weights(5)
    other.init_weights(6)
    deeper = VisionTransformer(**{**SIZES, "depth": 4, "projector_depth": 3})
    deeper.init_weights(5)
    drawn = {n for n, p in first.named_parameters() if p.ndim > 1}
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) == (name not in drawn), name
        if name.startswith("blocks."):
            assert torch.equal(tensor, deeper.state_dict()[name])
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, first.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_init_has_the_specs_distributions(name):
    module = BUILDERS[name]()
    module.init_weights(0)
    for key, sub in module.named_modules():
        if isinstance(sub, nn.Linear):
            bound = math.sqrt(6 / (sub.in_features + sub.out_features))
            assert sub.weight.abs().max() <= bound and sub.weight.abs().max() > 0.97 * bound, key
            assert abs(sub.weight.std() / (bound / math.sqrt(3)) - 1) < 0.1 and (
                sub.bias is None or not sub.bias.any()
            ), key
        if isinstance(sub, nn.LayerNorm):
            assert (sub.weight == 1).all() and not sub.bias.any(), key
            assert sub.eps == (1e-5 if key.startswith("projector.") else 1e-6), key
    if name == "decoder":
        assert not module.mask_token.any()


def test_class_tokens_are_normal_with_deviation_002():
    wide = VisionTransformer(grid_size=2, patch_size=1, embed_dim=4096, depth=0, num_heads=1, projector_depth=0)
    wide.init_weights(0)
    assert 0.019 < wide.cls_token.std() < 0.021 and abs(wide.cls_token.mean()) < 0.002


ENCODER_NAMES = {
    "cls_token": (1, 1, 24),
    "pos_embed": (1, 26, 24),
    "norm.weight": (24,),
    "norm.bias": (24,),
    "patch_embed.proj.weight": (24, 48),
    "patch_embed.proj.bias": (24,),
    "projector.linear0.weight": (40, 24),
    "projector.norm0.weight": (40,),
    "projector.norm0.bias": (40,),
    "projector.linear1.weight": (24, 40),
    "projector.norm1.weight": (24,),
    "projector.norm1.bias": (24,),
}
ENCODER_BLOCK = {
    "norm1.weight": (24,),
    "norm1.bias": (24,),
    "attn.qkv.weight": (72, 24),
    "attn.qkv.bias": (72,),
    "attn.proj.weight": (24, 24),
    "attn.proj.bias": (24,),
    "norm2.weight": (24,),
    "norm2.bias": (24,),
    "mlp.fc1.weight": (96, 24),
    "mlp.fc1.bias": (96,),
    "mlp.fc2.weight": (24, 96),
    "mlp.fc2.bias": (24,),
}
DECODER_NAMES = {
    "cls_token": (1, 1, 16),
    "mask_token": (1, 1, 16),
    "pos_embed": (1, 26, 16),
    "embed.weight": (16, 24),
    "embed.bias": (16,),
    "norm.weight": (16,),
    "norm.bias": (16,),
    "head.weight": (24, 16),
    "head.bias": (24,),
}
DECODER_BLOCK = {
    "norm1.weight": (16,),
    "norm1.bias": (16,),
    "self_attn.qkv.weight": (48, 16),
    "self_attn.qkv.bias": (48,),
    "self_attn.proj.weight": (16, 16),
    "self_attn.proj.bias": (16,),
    "norm2.weight": (16,),
    "norm2.bias": (16,),
    "norm_context.weight": (16,),
    "norm_context.bias": (16,),
    "cross_attn.q_proj.weight": (16, 16),
    "cross_attn.q_proj.bias": (16,),
    "cross_attn.kv_proj.weight": (32, 16),
    "cross_attn.kv_proj.bias": (32,),
    "cross_attn.proj.weight": (16, 16),
    "cross_attn.proj.bias": (16,),
    "norm3.weight": (16,),
    "norm3.bias": (16,),
    "mlp.fc1.weight": (64, 16),
    "mlp.fc1.bias": (64,),
    "mlp.fc2.weight": (16, 64),
    "mlp.fc2.bias": (16,),
}


@pytest.mark.parametrize(
    ("build", "names", "block", "depth"),
    [("encoder", ENCODER_NAMES, ENCODER_BLOCK, 3), ("decoder", DECODER_NAMES, DECODER_BLOCK, 2)],
)
@pytest.mark.parametrize("learned", ["", ", learned positions"])
def test_state_dict_names_and_shapes_are_a_contract(build, names, block, depth, learned):
    state = BUILDERS[build + learned]().state_dict()
    expected = dict(names) | {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_without_projector_only_its_names_are_gone():
    assert set(BUILDERS["encoder"]().state_dict()) - set(BUILDERS["encoder without projector"]().state_dict()) == {
        name for name in ENCODER_NAMES if re.match("projector", name)
    }


# --- noise -----------------------------------------------------------------------------------------------------------


def noised(noise: BranchNoise, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return noise(x, noise.draw(keys))


def test_noise_keeps_the_mean_and_drops_what_it_says():
    x, keys = torch.ones(4000, 3, 8), torch.arange(4000) * 31
    paths = noised(BranchNoise(0.3, 0.0, "a"), x, keys)
    assert set(np.round(paths.unique().tolist(), 5)) == {0.0, round(1 / 0.7, 5)}
    assert (paths == paths[:, :1, :1]).all()  # a whole sample's branch at once
    assert abs((paths[:, 0, 0] == 0).float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    elements = noised(BranchNoise(0.0, 0.2, "a"), x, keys)
    assert set(np.round(elements.unique().tolist(), 5)) == {0.0, 1.25}
    assert ((elements.mean(0) - 1).abs() < 5 * 0.5 / math.sqrt(4000)).all()
    both = noised(BranchNoise(0.3, 0.2, "a"), x, keys)
    torch.testing.assert_close(both, paths * elements)


def test_noise_is_a_function_of_key_and_place():
    x, keys = torch.ones(64, 3, 8), torch.arange(64) * 31
    noise = BranchNoise(0.4, 0.2, "encoder 0 attn")
    torch.manual_seed(0)
    whole = noised(noise, x, keys)
    torch.manual_seed(1)
    assert torch.equal(noised(noise, x[10:30], keys[10:30]), whole[10:30])
    assert not torch.equal(noised(BranchNoise(0.4, 0.2, "encoder 1 attn"), x, keys), whole)
    assert noised(noise.eval(), x, keys) is x


@torch.no_grad()
def test_encoder_noise_grows_with_depth_and_is_off_in_evaluation():
    noisy, plain = (shaken(VisionTransformer(**SIZES, **options)) for options in (dict(drop_path=0.5, dropout=0.1), {}))
    assert [b.noise1.drop_path for b in noisy.blocks] == [b.noise2.drop_path for b in noisy.blocks] == [0.0, 0.25, 0.5]
    patches, cells, keys = torch.randn(8, 6, 48), torch.arange(6).expand(8, -1), torch.arange(8)
    quiet = plain(patches, cells)
    assert torch.equal(noisy(patches, cells), quiet) and torch.equal(plain.train()(patches, cells), quiet)
    trained = noisy.train()(patches, cells, keys)
    assert not torch.allclose(trained, quiet)
    torch.testing.assert_close(noisy(patches[2:5], cells[2:5], keys[2:5]), trained[2:5], atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError, match="keys"):
        noisy(patches, cells)


# --- the decoder -----------------------------------------------------------------------------------------------------


ATTENDED = {"heads": (2, 3, 40, 40, 16), "few queries": (2, 3, 7, 40, 16), "one head, as visual cues": (2, 40, 11, 24)}


@pytest.mark.parametrize("shape", ATTENDED.values(), ids=ATTENDED.keys())
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_kernels_of_attention_are_the_definition_to_the_numbers_error(shape, dtype, error):
    """Values and gradients, relative to the largest."""
    *batch, T, S, C = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(*batch, tokens, C, generator=generator).to(dtype) for tokens in (T, S, S, T))
    results = {}
    for kernel in ("fused", "plain", "definition"):
        inputs = [x.to(torch.float64 if kernel == "definition" else dtype).requires_grad_() for x in (q, k, v)]
        if kernel == "definition":
            scores = torch.einsum("...tc,...sc->...ts", *inputs[:2]) / C**0.5
            weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
            out = torch.einsum("...ts,...sc->...tc", weights, inputs[2])
        else:
            out = attend(*inputs, kernel)
        results[kernel] = [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]
    for kernel in ("fused", "plain"):
        for found, wanted in zip(results[kernel], results["definition"], strict=True):
            assert found.dtype == dtype and (found - wanted).abs().max() <= error * wanted.abs().max()


@torch.no_grad()
def test_cross_attention_is_torchs_multihead_attention():
    ours = CrossAttention(24, 3)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias), nn.init.normal_(theirs.out_proj.bias)
    ours.q_proj.weight.copy_(theirs.in_proj_weight[:24]), ours.q_proj.bias.copy_(theirs.in_proj_bias[:24])
    ours.kv_proj.weight.copy_(theirs.in_proj_weight[24:]), ours.kv_proj.bias.copy_(theirs.in_proj_bias[24:])
    ours.proj.weight.copy_(theirs.out_proj.weight), ours.proj.bias.copy_(theirs.out_proj.bias)
    queries, context = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(queries, context), theirs(queries, context, context)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cues", [True, False])
@torch.no_grad()
def test_mask_tokens_carry_visual_cues(cues):
    """What enters the first block, against loops: cues weigh x without positions and without the class token."""
    decoder = shaken(Decoder(**DECODER, visual_cues=cues))
    order = torch.stack([torch.randperm(25), torch.randperm(25)])
    visible, masked, encoded = order[:, :6], order[:, 6:], torch.randn(2, 7, 24)
    seen = {}
    decoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(q=inputs[0], x=inputs[1]))
    assert decoder(encoded, visible, masked).shape == (2, 20, 24)

    w = {k: v.double().numpy() for k, v in decoder.state_dict().items()}
    table = sincos_positions(16, 5)[0].double().numpy()
    for b in range(2):
        x = encoded[b].double().numpy() @ w["embed.weight"].T + w["embed.bias"]
        np.testing.assert_allclose(seen["q"][b, 0], w["cls_token"][0, 0], atol=1e-5)
        np.testing.assert_allclose(seen["x"][b, 0], x[0], atol=1e-5)
        for m, q in enumerate(masked[b].tolist()):
            scores = np.array([table[1 + q] @ table[1 + j] / math.sqrt(16) for j in visible[b].tolist()])
            weights = np.exp(scores) / np.exp(scores).sum()
            cue = sum(weights[j] * x[1 + j] for j in range(6)) if cues else 0
            np.testing.assert_allclose(seen["q"][b, 1 + m], w["mask_token"][0, 0] + cue + table[1 + q], atol=1e-5)
        for j, cell in enumerate(visible[b].tolist()):
            np.testing.assert_allclose(seen["x"][b, 1 + j], x[1 + j] + table[1 + cell], atol=1e-5)


@torch.no_grad()
def test_a_decoder_of_self_attention_is_timms_blocks_over_mask_tokens_and_visible_ones():
    decoder = shaken(Decoder(**DECODER, attention="self"))
    order = torch.stack([torch.randperm(25), torch.randperm(25)])
    visible, masked, encoded = order[:, :6], order[:, 6:], torch.randn(2, 7, 24)
    x = torch.cat(decoder.enter(encoded, visible, masked), dim=1)
    assert x.shape == (2, 1 + 19 + 1 + 6, 16)
    for ours in decoder.blocks:
        theirs = TimmBlock(16, 4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        theirs.load_state_dict(ours.state_dict())
        x = theirs(x)
    expected = decoder.head(decoder.norm(x[:, :20]))
    torch.testing.assert_close(decoder(encoded, visible, masked), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoder_blocks_all_read_the_same_context():
    decoder = shaken(Decoder(**DECODER))
    contexts = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda module, inputs: contexts.append(inputs[1].clone()))
    decoder(torch.randn(1, 4, 24), torch.tensor([[0, 7, 9]]), torch.arange(10, 20)[None])
    assert len(contexts) == 2 and torch.equal(contexts[0], contexts[1])
