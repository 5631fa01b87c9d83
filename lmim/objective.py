"""The objective: predict a target encoder's latents of masked patches and tell each from the others of its image.

Owns `LatentMIM` (online encoder, target encoder, decoder), the losses and the similarity penalty (paper, section 3).
The invariants: the gradient reaches the online encoder and the decoder and never the moving average; `forward` holds no
EMA, no schedule and no step counter; normalisations, logits and losses are computed in fp32 whatever the autocast.

Letters: B images · V visible · M masked · P predicted, the first of those · T tokens · N cells · D encoder width ·
R = B·M; z targets, ẑ predictions, τ temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim.config import model_dimensions
from lmim.optim import parameter_groups
from lmim.options import ModelConfig, ObjectiveConfig
from lmim.patches import Views, draw_views, gather_patches, imagenet, normalize_patches
from lmim.vit import Decoder, VisionTransformer, initial_values


class StepOutput(NamedTuple):
    """What one micro-batch comes to, all on its device; only `loss` carries a gradient."""

    loss: Tensor
    similarity_predictions: Tensor
    similarity_visible: Tensor
    similarity_targets: Tensor
    similarity_positions: Tensor  # of targets of different images at the same position; 0 for one image
    target_deviation: Tensor  # of such, over images: 1 spread evenly, 0 all alike, as in both kinds of collapse
    pooled_targets_BF: Tensor  # of each image, no scalar: what the log's effective rank is of


def infonce(predictions_BPD: Tensor, targets_BMD: Tensor, temperature: float) -> Tensor:
    """Patch discrimination: 2τ · cross-entropy of each prediction against all masked patches of the same image.

    Predictions alone are standardised per image and channel over the P tokens, then both sides are L2-normalised.
    Chance level, which is where collapse sits, is 2τ·ln M (`chance_level`).
    """
    std, mean = torch.std_mean(predictions_BPD, dim=1, keepdim=True)
    predictions_BPD = F.normalize((predictions_BPD - mean) / (std + 1e-4), dim=-1)
    logits_BPM = predictions_BPD @ F.normalize(targets_BMD, dim=-1).transpose(1, 2) / temperature
    labels_P = torch.arange(logits_BPM.shape[1], device=logits_BPM.device)
    return 2 * temperature * F.cross_entropy(logits_BPM.flatten(0, 1), labels_P.repeat(len(logits_BPM)))


def norm_l2(predictions_BPD: Tensor, targets_BPD: Tensor, temperature: float) -> Tensor:
    """Mean squared error to targets standardised per token over D, with D − 1 in the variance."""
    var, mean = torch.var_mean(targets_BPD, dim=-1, keepdim=True)
    return F.mse_loss(predictions_BPD, (targets_BPD - mean) / (var + 1e-6).sqrt())


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "infonce": infonce,
    "norm_l2": norm_l2,
    "mse": lambda predictions, targets, temperature: F.mse_loss(predictions, targets),
    "l1": lambda predictions, targets, temperature: F.l1_loss(predictions, targets),
    "smooth_l1": lambda predictions, targets, temperature: F.smooth_l1_loss(predictions, targets),
    "cosine": lambda predictions, targets, temperature: -F.cosine_similarity(predictions, targets, dim=-1).mean(),
}


def chance_level(num_masked: int, temperature: float) -> float:
    """Return the InfoNCE loss of predictions that tell nothing: 2τ·ln M."""
    return 2 * temperature * math.log(num_masked)


def mean_similarity(tokens_BTD: Tensor) -> Tensor:
    """Return the mean cosine over the batch and over all token pairs of an image, the diagonal included.

    Σ_pq cos(p, q) = ‖Σ_p unit_p‖², so it costs O(T·D) and not O(T²·D).
    """
    sums_BD = F.normalize(tokens_BTD, dim=-1).sum(dim=1)
    return sums_BD.square().sum(dim=-1).mean() / tokens_BTD.shape[1] ** 2


class AcrossImages(NamedTuple):
    """How far tokens at one cell differ from image to image."""

    similarity: Tensor  # mean cosine of different images' tokens at a cell, over all such pairs; 0 if there are none
    deviation: Tensor  # √D times the mean deviation of a channel: 1 spread evenly, 0 all alike
    pooled_BF: Tensor  # an image's mean token without what its cells share; last what they share, as one number


def across_images(tokens_BMD: Tensor, cells_BM: Tensor, num_cells: int) -> AcrossImages:
    """Compare tokens, at length 1, with those of other images at the same cell (SimSiam, figure 2, cell by cell).

    Positions are taken out since a position code would look like features that differ: pooled over other cells in each
    image, it does differ. Σ_{a≠b} cos(a, b) = ‖Σ_a unit_a‖² − n at each cell.
    """
    B, M, D = tokens_BMD.shape
    # put at their cells and then summed over images: the same sums in every run, where adding by index takes turns
    units_BND, at_BMD = tokens_BMD.new_zeros(B, num_cells, D), cells_BM[..., None].expand(-1, -1, D)
    units_BND = units_BND.scatter(1, at_BMD, F.normalize(tokens_BMD, dim=-1))
    given_BN = tokens_BMD.new_zeros(B, num_cells).scatter(1, cells_BM, 1.0)
    sums_ND, counts_N = units_BND.sum(dim=0), given_BN.sum(dim=0)
    pairs = (counts_N * (counts_N - 1)).sum()
    similarity = (sums_ND.square().sum() - counts_N.sum()) / pairs.clamp(min=1) * (pairs > 0)
    at_least_one_N = counts_N.clamp(min=1)[:, None]
    means_ND = sums_ND / at_least_one_N
    squares_ND = units_BND.square().sum(dim=0) / at_least_one_N
    deviation_N = (squares_ND - means_ND.square()).clamp(min=0).sqrt().mean(dim=1) * D**0.5
    share_N = counts_N / (B * M)
    shared = (share_N * means_ND.square().sum(dim=1)).sum().sqrt()
    pooled_BF = torch.cat([(units_BND.sum(dim=1) - given_BN @ means_ND) / M, shared.expand(B, 1)], dim=1)
    return AcrossImages(similarity, (share_N * deviation_N).sum(), pooled_BF)


class LatentMIM(nn.Module):
    """Online encoder, its EMA target and the decoder; `forward` is one micro-batch's loss."""

    output = StepOutput

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig):
        super().__init__()
        self.objective, self.model = objective, model
        dims = model_dimensions(model)
        encoder = dict(
            grid_size=model.grid_size,
            mlp_ratio=model.mlp_ratio,
            projector_dim=model.projector_dim,
            projector_depth=model.projector_depth,
            learnable_positions=model.learnable_positions,
            **dims,
        )
        self.patch_size = dims["patch_size"]
        self.online = VisionTransformer(drop_path=model.drop_path, dropout=model.dropout, **encoder)
        self.target = VisionTransformer(**encoder)
        self.target.requires_grad_(False)
        self.decoder = Decoder(
            grid_size=model.grid_size,
            encoder_dim=dims["embed_dim"],
            embed_dim=model.decoder_dim,
            depth=model.decoder_depth,
            num_heads=model.decoder_num_heads,
            mlp_ratio=model.mlp_ratio,
            attention=model.decoder_attention,
            visual_cues=model.visual_cues,
            learnable_positions=model.learnable_positions,
        )

    def parts(self) -> tuple[nn.Module, ...]:
        """Return what is cut as a root of its own; each can then be lent alone."""
        return self.online, self.target, self.decoder

    def between_blocks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Return what else is worth compiling: modules, or some methods of them."""
        return [
            (self.online.projector, ()),
            (self.target.projector, ()),
            (self, ("patches", "compare")),
            (self.online, ("embed",)),
            (self.target, ("embed",)),
            (self.decoder, ("enter", "leave")),
        ]

    def averages(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, target's weight, online encoder's weight that it follows)."""
        pairs = zip(self.target.named_parameters(), self.online.parameters(), strict=True)
        return [(name, target, online) for (name, target), online in pairs]

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return AdamW's groups, by the authors' rule."""
        return parameter_groups(self, weight_decay)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole value) of every parameter and buffer; the target starts as a copy of the online encoder.

        A target's value follows the online encoder's of the same name.
        """
        for name, value in initial_values(self.online, seed, "online."):
            yield f"online.{name}", value
            yield f"target.{name}", value
        for name, value in initial_values(self.decoder, seed, "decoder."):
            yield f"decoder.{name}", value

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter and buffer to its value of `initial_values`."""
        tensors = self.state_dict(keep_vars=True)
        for name, value in self.initial_values(seed):
            tensors[name].copy_(value)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward; the target, which has none, is left alone."""
        self.online.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)

    def forward(
        self, images_BCSS: Tensor, keys_B: Tensor, similarity_target: Tensor | float, views: Views | None = None
    ) -> StepOutput:
        """Return the loss of a micro-batch of crops (uint8, or floats already normalised).

        Views and noise follow from the samples' keys; `views` overrides the drawn ones (replays of recorded cases).
        The similarity penalty squares a mean over this micro-batch, as the released code does: its scope is one rank's
        micro-batch, while the patch loss never crosses images.
        """
        objective = self.objective
        if not isinstance(similarity_target, Tensor):  # a number would be part of what `torch.compile` sees
            similarity_target = torch.full((), similarity_target, device=images_BCSS.device)
        if views is None:
            views = draw_views(
                keys_B,
                grid_size=self.model.grid_size,
                num_visible=objective.num_visible,
                patch_gap=self.model.patch_gap,
                gap_jitter=objective.gap_jitter,
            )
        visible_BV, masked_BM = views.visible_BV, views.masked_BM
        seen_BK = masked_BM if objective.target_input == "masked" else torch.cat([visible_BV, masked_BM], dim=1)
        scale = imagenet(images_BCSS.device) if images_BCSS.dtype == torch.uint8 else None
        seen = self.patches(images_BCSS, seen_BK, views, scale), seen_BK
        if objective.target == "joint":
            targets_BMD = self.online(*seen, keys_B)
        else:
            with torch.no_grad():
                targets_BMD = self.target(*seen)
        targets_BMD = targets_BMD[:, -masked_BM.shape[1] :]
        encoded_BTD = self.online(self.patches(images_BCSS, visible_BV, views, scale), visible_BV, keys_B)
        decoded_BP = masked_BM[:, : objective.num_decoded or None]  # in an order that was drawn
        predictions_BPD = self.decoder(encoded_BTD, visible_BV, decoded_BP)[:, 1:]
        return self.compare(predictions_BPD, encoded_BTD[:, 1:], targets_BMD, masked_BM, similarity_target)

    def patches(
        self, images_BCSS: Tensor, cells_BK: Tensor, views: Views, scale: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Cut the given cells' patches and normalise them: (B, K, P·P·3)."""
        cut = gather_patches(images_BCSS, cells_BK, views, patch_size=self.patch_size, patch_gap=self.model.patch_gap)
        return normalize_patches(cut, scale)

    def compare(
        self,
        predictions_BPD: Tensor,
        visible_BVD: Tensor,
        targets_BMD: Tensor,
        masked_BM: Tensor,
        similarity_target: Tensor | float,
    ) -> StepOutput:
        """Return the loss, and what is watched of predictions, visible tokens and targets at masked cells, in fp32."""
        objective = self.objective
        with torch.autocast(predictions_BPD.device.type, enabled=False):
            predictions_BPD, visible_BVD, targets_BMD = (x.float() for x in (predictions_BPD, visible_BVD, targets_BMD))
            compared = targets_BMD if objective.loss == "infonce" else targets_BMD[:, : predictions_BPD.shape[1]]
            loss = LOSSES[objective.loss](predictions_BPD, compared, objective.temperature)
            of_predictions, of_visible = mean_similarity(predictions_BPD), mean_similarity(visible_BVD)
            if objective.similarity_weight:
                excess = (of_predictions - similarity_target).square() + (of_visible - similarity_target).square()
                loss = loss + objective.similarity_weight * excess
            of_targets = mean_similarity(targets_BMD)
            across = across_images(targets_BMD.detach(), masked_BM, self.model.grid_size**2)
        watched = of_predictions, of_visible, of_targets, *across
        return StepOutput(loss, *(value.detach() for value in watched))
