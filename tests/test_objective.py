"""The losses against loops, the known values of collapse, and who gets a gradient."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim.objective import LOSSES, LatentMIM, across_images, chance_level, mean_similarity
from lmim.options import ModelConfig, ObjectiveConfig
from lmim.patches import normalize_images
from lmim.vit import sincos_positions

torch.set_num_threads(1)
TINY = dict(
    embed_dim=8,
    depth=1,
    num_heads=2,
    patch_size=2,
    grid_size=3,
    patch_gap=1,
    projector_dim=12,
    projector_depth=2,
    decoder_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)


def latent_mim(seed: int = 0, *, visible: int = 3, **options) -> LatentMIM:
    """Build a tiny one; options go to the section that has them."""
    model = {k: v for k, v in options.items() if hasattr(ModelConfig(), k)}
    objective = {k: v for k, v in options.items() if k not in model}
    built = LatentMIM(ModelConfig(**{**TINY, **model}), ObjectiveConfig(**{"num_visible": visible, **objective}))
    built.init_weights(seed)
    with torch.no_grad():  # the target differs from the online encoder, as it does after the first step
        for parameter in built.target.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return built


def crops(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


# --- the losses ------------------------------------------------------------------------------------------------------


def infonce_by_loops(p: np.ndarray, z: np.ndarray, tau: float) -> float:
    (B, P, D), M = p.shape, z.shape[1]
    terms = []
    for b in range(B):
        standard = np.empty((P, D))
        for d in range(D):
            column = p[b, :, d]
            mean = sum(column) / P
            deviation = math.sqrt(sum((column - mean) ** 2) / (P - 1))
            standard[:, d] = (column - mean) / (deviation + 1e-4)
        for i in range(P):
            scores = [
                standard[i] @ z[b, j] / math.sqrt(standard[i] @ standard[i]) / math.sqrt(z[b, j] @ z[b, j]) / tau
                for j in range(M)
            ]
            terms.append(math.log(sum(math.exp(s) for s in scores)) - scores[i])
    return 2 * tau * sum(terms) / len(terms)


def norm_l2_by_loops(p: np.ndarray, z: np.ndarray, tau: float) -> float:
    D, terms = p.shape[2], []
    for b, m in np.ndindex(p.shape[:2]):
        mean = sum(z[b, m]) / D
        deviation = math.sqrt(sum((z[b, m] - mean) ** 2) / (D - 1) + 1e-6)
        terms += [(p[b, m, d] - (z[b, m, d] - mean) / deviation) ** 2 for d in range(D)]
    return sum(terms) / len(terms)


def each(function):
    """Return the mean over single numbers of function(p − z)."""
    return lambda p, z, tau: sum(function(d) for d in (p - z).ravel()) / p.size


ORACLES = {
    "infonce": infonce_by_loops,
    "norm_l2": norm_l2_by_loops,
    "mse": each(lambda d: d * d),
    "l1": each(abs),
    "smooth_l1": each(lambda d: d * d / 2 if abs(d) < 1 else abs(d) - 0.5),
    "cosine": lambda p, z, tau: (
        -np.mean(
            [
                a @ b / math.sqrt((a @ a) * (b @ b))
                for a, b in zip(p.reshape(-1, p.shape[2]), z.reshape(-1, z.shape[2]), strict=True)
            ]
        )
    ),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("tau", [0.2, 0.7])
def test_losses_are_what_loops_compute(name, tau):
    assert set(ORACLES) == set(LOSSES)
    predictions, targets = tokens(1, 3, 7, 5), 2 * tokens(2, 3, 7, 5)
    expected = ORACLES[name](predictions.double().numpy(), targets.double().numpy(), tau)
    assert LOSSES[name](predictions, targets, tau).item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", ORACLES)
def test_of_a_part_of_the_masked_cells_the_loss_is_that_of_their_predictions(name):
    """InfoNCE still tells them from all that is masked; the other losses compare each with its own target."""
    model, found = latent_mim(loss=name, num_decoded=4), {}
    for part in ("target", "decoder"):
        getattr(model, part).register_forward_hook(lambda m, i, out, part=part: found.update({part: out[:, 1:]}))
    out = model(crops(5), torch.arange(5), 0.5)
    predictions, targets = (found[part].detach().double().numpy() for part in ("decoder", "target"))
    assert predictions.shape[1] == 4 and targets.shape[1] == 6
    expected = ORACLES[name](predictions, targets if name == "infonce" else targets[:, :4], 0.2)
    assert out.loss.item() == pytest.approx(expected, rel=2e-5)
    all_of_them, by_number = (latent_mim(loss=name, num_decoded=n)(crops(5), torch.arange(5), 0.5) for n in (0, 6))
    assert torch.equal(all_of_them.loss, by_number.loss) and not torch.equal(all_of_them.loss, out.loss)


def test_mean_similarity_is_the_mean_over_all_pairs():
    x = tokens(3, 2, 6, 5)
    pairs = [
        (p @ q / (p.norm() * q.norm())).item() for image in x for p, q in itertools.product(image, image)
    ]  # the diagonal included
    assert mean_similarity(x).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_collapse_sits_at_chance_level_with_similarity_one():
    assert chance_level(176, 0.2) == pytest.approx(2 * 0.2 * math.log(176)) == pytest.approx(2.068, abs=5e-4)
    one_target = tokens(4, 2, 1, 192).expand(2, 176, 192)
    assert LOSSES["infonce"](tokens(5, 2, 176, 192), one_target, 0.2).item() == pytest.approx(2.068, abs=5e-4)
    assert mean_similarity(one_target).item() == pytest.approx(1, abs=1e-5)
    constant = tokens(6, 2, 1, 192).expand(2, 176, 192)
    assert LOSSES["infonce"](constant, tokens(7, 2, 176, 192), 0.2).item() == pytest.approx(2.068, abs=1e-2)


def test_a_pure_position_code_satisfies_the_loss():
    """Positional collapse: nearly orthogonal codes of the cells, the same for every image, reach 0.32 at D = 192.

    The floor of codes that are exactly orthogonal is 2τ·ln(1 + (M−1)·e^(−1/τ)) = 0.312. The sine table is far from
    orthogonal, so this code is what an encoder would learn, not the table it is given.
    """
    codes = torch.randn(196, 192, generator=torch.Generator().manual_seed(0))
    masked = torch.stack([torch.randperm(196, generator=torch.Generator().manual_seed(i))[20:] for i in range(4)])
    assert LOSSES["infonce"](codes[masked], codes[masked], 0.2).item() == pytest.approx(0.32, abs=0.01)
    floor = 0.4 * math.log(1 + 175 * math.exp(-5))
    one_hot = torch.eye(176)[None]
    assert LOSSES["infonce"](one_hot, one_hot, 0.2).item() == pytest.approx(floor, abs=5e-3)
    table = sincos_positions(192, 14)[0, 1:][masked]
    assert LOSSES["infonce"](table, table, 0.2).item() == pytest.approx(1.543, abs=0.01)


# --- the penalty -----------------------------------------------------------------------------------------------------


def test_penalty_squares_the_distance_of_both_similarities():
    plain, steered = latent_mim(), latent_mim(similarity_weight=0.1)
    out, penalised = (m(crops(4), torch.arange(4), 0.6) for m in (plain, steered))
    distances = [(s.item() - 0.6) ** 2 for s in (out.similarity_predictions, out.similarity_visible)]
    assert penalised.loss.item() == pytest.approx(out.loss.item() + 0.1 * sum(distances), abs=1e-6)
    assert out.loss.requires_grad and not any(s.requires_grad for s in out[1:])


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("loss", ["infonce", "mse"])
def test_gradient_reaches_online_encoder_and_decoder_and_not_the_target(loss, learned):
    model = latent_mim(loss=loss, learnable_positions=learned, similarity_weight=0.1)
    model(crops(4), torch.arange(4), 0.5).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("target.")}
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    # biases may have an exact zero: attention keys' always, and the head's under InfoNCE, which standardises it away
    assert [n for n, p in trained.items() if p.ndim > 1 and not p.grad.abs().max() > 1e-9] == []
    assert learned == ("online.pos_embed" in trained) == ("decoder.pos_embed" in trained)


@pytest.mark.parametrize("target_input", ["masked", "all"])
@pytest.mark.parametrize("loss", ["infonce", "norm_l2", "mse"])
def test_a_joint_target_has_a_gradient_of_its_own(loss, target_input):
    """By finite differences in fp64 along a random direction: the loss depends on the encoder through targets too."""
    model = latent_mim(loss=loss, target="joint", target_input=target_input).double()
    images, keys = crops(2), torch.arange(2)

    def loss_of() -> Tensor:
        with mock.patch.object(Tensor, "float", Tensor.double):
            return model(normalize_images(images).double(), keys, 0.5).loss

    loss_of().backward()
    encoder = [p for p in model.online.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in encoder]
    slope = sum((p.grad * d).sum() for p, d in zip(encoder, direction, strict=True)).item()
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            torch._foreach_add_(encoder, direction, alpha=step)
            values.append(loss_of().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    assert all(p.grad is None for p in model.target.parameters())


OPTIONS = dict(
    target=["ema", "joint"],
    decoder_attention=["cross", "self"],
    target_input=["masked", "all"],
    gap_jitter=["released", "full"],
    visual_cues=[True, False],
    learnable_positions=[False, True],
    projector_depth=[0, 1, 2, 3],
    drop_path=[0.0, 0.3],
)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_combination_of_options_trains(loss):
    images, keys = crops(2), torch.arange(2)
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        model = latent_mim(loss=loss, dropout=options["drop_path"] / 3, similarity_weight=0.1, **options)
        out = model(images, keys, 0.5)
        out.loss.backward()
        assert all(value.isfinite().all() for value in out), options
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad), options


def test_options_change_what_they_name():
    def loss_with(**options) -> float:
        return latent_mim(depth=2, **options)(crops(4), torch.arange(4), 0.5).loss.item()

    plain = loss_with()
    changed = dict(
        target_input="all",
        gap_jitter="full",
        num_decoded=4,
        decoder_attention="self",
        visual_cues=False,
        projector_depth=1,
        drop_path=0.9,
        dropout=0.3,
    )
    for key, value in changed.items():
        assert loss_with(**{key: value}) != pytest.approx(plain, abs=1e-6), key
    assert loss_with() == plain


# --- batches and precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, dict(drop_path=0.5, dropout=0.2, depth=2), dict(loss="norm_l2", target_input="all")]
)
def test_splitting_a_batch_changes_neither_loss_nor_gradient(options):
    images, keys = crops(6), torch.arange(6) * 1001
    whole, split = latent_mim(**options), latent_mim(**options)
    loss = whole(images, keys, 0.5).loss
    loss.backward()
    parts = [split(images[part], keys[part], 0.5).loss / 3 for part in (slice(0, 2), slice(2, 4), slice(4, 6))]
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-6)
    theirs = dict(split.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_computed_in_fp32_under_bf16_autocast(loss):
    model, outputs = latent_mim(loss=loss, similarity_weight=0.1), {}
    for part in ("online", "target", "decoder"):
        model.get_submodule(part).register_forward_hook(
            lambda m, inputs, out, part=part: outputs.update({part: out, f"{part} reads": inputs})
        )
    with torch.autocast("cpu", torch.bfloat16):
        out = model(crops(4), torch.arange(4), 0.5)
    assert outputs["decoder"].dtype == torch.bfloat16
    masked = outputs["decoder"].shape[1] - 1
    parts = outputs["decoder"][:, 1:], outputs["online"][:, 1:], outputs["target"][:, -masked:]
    in_fp32 = model.compare(*(x.float() for x in parts), outputs["decoder reads"][2], 0.5)
    assert all(value.dtype == torch.float32 for value in out)
    assert all(torch.equal(a, b) for a, b in zip(out, in_fp32, strict=True))


def test_position_similarity_is_the_mean_cosine_of_pairs_of_images_at_a_cell():
    generator = torch.Generator().manual_seed(1)
    tokens, cells = torch.randn(5, 4, 6, generator=generator), torch.stack([torch.randperm(7)[:4] for _ in range(5)])
    pairs = [F.cosine_similarity(tokens[a, i], tokens[b, j], dim=0)
             for a in range(5) for b in range(5) if a != b
             for i in range(4) for j in range(4) if cells[a, i] == cells[b, j]]  # fmt: skip
    found = across_images(tokens, cells, 7).similarity
    torch.testing.assert_close(found, torch.stack(pairs).mean(), atol=1e-6, rtol=1e-5)
    by_position = torch.randn(7, 6, generator=generator)[cells]
    assert across_images(by_position, cells, 7).similarity.item() == pytest.approx(1, abs=1e-5)
    assert across_images(tokens[:1], cells[:1], 7).similarity == 0
