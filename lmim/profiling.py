"""What a configuration costs, from its numbers alone: parameters, FLOPs, bytes kept on a rank and bytes sent.

Owns the analytic model of the network and of what each backend keeps and sends. The invariant: it follows what the
backends do, not what their names promise, so how FSDP2 groups weights is stated here; tests compare it with torch's
FLOP counter, with the tensors that live backends hold, with what autograd saves, and with the collectives that are
called.

Letters: K patches given · V visible · M masked · P predicted of those · T = 1 + K tokens · Q = 1 + P queries · D
encoder width · E decoder width · a bytes of a number that enters a matrix product.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lmim.config import Split, crop_size, model_dimensions
from lmim.objective import LatentMIM
from lmim.optim import parameter_groups
from lmim.options import Config, ModelConfig, ObjectiveConfig

FP32, BF16 = 4, 2  # bytes
BUCKET, PREFETCH = 50_000_000, 50_000_000  # numbers that ZeRO reduces together, and that ZeRO-3 gathers ahead
ENGINE_BUCKET = 500_000_000  # numbers that DeepSpeed reduces together without ZeRO


class Part(NamedTuple):
    """One part of the model."""

    shapes: tuple[tuple[int, ...], ...]  # of its parameters
    block_matrices: int  # numbers in the matrices inside blocks
    buffers: int  # numbers
    units: tuple[tuple[int, int], ...]  # of blocks and projector, as FSDP2 may gather them: numbers, those in matrices

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes))

    def groups(self, smallest_mb: float = 0.0) -> list[int]:
        """Return the numbers of what is gathered together, the last of them what is left for the part's root."""
        numbers = [of_unit for of_unit, _ in self.units]
        groups = [sum(numbers[place] for place in group) for group in gathered_together(numbers, smallest_mb)]
        return [*groups, self.parameters - sum(groups)]

    def root_bytes(self, smallest_mb: float, *, bf16: bool = False) -> int:
        """Return the bytes of what is left for the part's root, in fp32 or with matrices in bf16."""
        grouped = gathered_together([numbers for numbers, _ in self.units], smallest_mb)
        matrices = self.matrices - sum(self.units[place][1] for group in grouped for place in group)
        return FP32 * self.groups(smallest_mb)[-1] - (FP32 - BF16) * matrices * bf16

    @property
    def matrices(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes if len(shape) == 2)

    def cut_bytes(self, ranks: int, *, flat: bool = False, bf16: bool = False) -> int:
        """Return the bytes of the fullest of some ranks, of parameters cut by rows as FSDP2 does, or flat as ZeRO-3.

        In fp32, or with matrices in bf16. What is sent is padded to that much from every rank.
        """
        total = 0
        for shape in self.shapes:
            numbers = math.prod(shape)
            cut = -(-numbers // ranks) if flat else -(-shape[0] // ranks) * (numbers // shape[0])
            total += cut * (BF16 if bf16 and len(shape) == 2 else FP32)
        return total


class Parts(NamedTuple):
    """The parts of the model, and how many numbers the tensors of each group of AdamW's have, in order."""

    online: Part
    target: Part
    decoder: Part
    groups: tuple[tuple[int, ...], ...]

    @property
    def trained(self) -> int:
        return self.online.parameters + self.decoder.parameters

    def trained_cut_bytes(self, ranks: int, *, flat: bool = False, bf16: bool = False) -> int:
        return sum(part.cut_bytes(ranks, flat=flat, bf16=bf16) for part in (self.online, self.decoder))


def count_parameters(config: Config) -> Parts:
    """Count the numbers of online encoder, target and decoder, from the model built on `meta`."""
    return _parts(astuple(config.model))


@functools.cache
def _parts(options: tuple[Any, ...]) -> Parts:
    with torch.device("meta"):
        model = LatentMIM(ModelConfig(*options), ObjectiveConfig())
    groups = (tuple(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.0))
    return Parts(_count(model.online), _count(model.target), _count(model.decoder), tuple(groups))


def _count(part: nn.Module) -> Part:
    return Part(
        shapes=tuple(tuple(p.shape) for p in part.parameters()),
        block_matrices=sum(p.numel() for p in part.blocks.parameters() if p.ndim == 2),
        buffers=sum(b.numel() for b in part.buffers()),
        units=tuple((count_numbers(unit), count_numbers(unit, matrices=True)) for unit in gathered_units(part)),
    )


def gathered_units(part: nn.Module) -> list[nn.Module]:
    """Return what of a part FSDP2 gathers when it is needed: blocks, and a projector that is not empty."""
    found = [*part.blocks, *([part.projector] if hasattr(part, "projector") else [])]
    return [module for module in found if count_numbers(module)]


def count_numbers(module: nn.Module, *, matrices: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2 or not matrices)


def gathered_together(numbers: Sequence[int], smallest_mb: float) -> list[list[int]]:
    """Return the places of neighbours that FSDP2 gathers together, given how many numbers each has.

    A group is full when it holds `smallest_mb` in fp32. What does not fill one is gathered with the rest of the part.
    """
    groups, group = [], []
    for place in range(len(numbers)):
        group.append(place)
        if FP32 * sum(numbers[i] for i in group) >= smallest_mb * 1e6:
            groups, group = [*groups, group], []
    return groups


class Sizes(NamedTuple):
    """The numbers that costs are made of; see the module's letters."""

    V: int
    M: int
    P: int  # of M, those that are predicted
    seen: int  # patches that the target reads
    pixels: int  # numbers in a patch
    D: int
    depth: int
    heads: int
    hidden: int
    projector: list[int]  # widths, from D to D
    E: int
    decoder_depth: int
    decoder_heads: int
    decoder_hidden: int


def sizes(config: Config) -> Sizes:
    """Return the sizes of a configuration."""
    model, objective, dims = config.model, config.objective, model_dimensions(config.model)
    D, cells = dims["embed_dim"], model.grid_size**2
    masked = cells - objective.num_visible
    return Sizes(
        V=objective.num_visible,
        M=masked,
        P=objective.num_decoded or masked,
        seen=masked if objective.target_input == "masked" else cells,
        pixels=dims["patch_size"] ** 2 * 3,
        D=D,
        depth=dims["depth"],
        heads=dims["num_heads"],
        hidden=int(D * model.mlp_ratio),
        projector=[D] + [model.projector_dim] * (model.projector_depth - 1) + [D] * (model.projector_depth > 0),
        E=model.decoder_dim,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_num_heads,
        decoder_hidden=int(model.decoder_dim * model.mlp_ratio),
    )


# --- FLOPs -----------------------------------------------------------------------------------------------------------


class Flops(NamedTuple):
    """FLOPs of one image: matrix products alone, two for each multiply-add."""

    target_forward: int
    online_forward: int
    decoder_forward: int
    loss_forward: int
    backward: int
    recomputed: int  # by activation checkpointing, which runs blocks forward again; not part of the total

    @property
    def total(self) -> int:
        return self.target_forward + self.online_forward + self.decoder_forward + self.loss_forward + self.backward


def _encoder_flops(s: Sizes, K: int) -> tuple[int, int, int]:
    """Return the FLOPs of patch embedding, blocks and projector for K patches and the class token."""
    T = 1 + K
    block = 8 * T * s.D**2 + 4 * T**2 * s.D + 4 * T * s.D * s.hidden
    projector = sum(2 * T * a * b for a, b in zip(s.projector, s.projector[1:], strict=False))
    return 2 * K * s.pixels * s.D, s.depth * block, projector


def flops_per_image(config: Config) -> Flops:
    """Count the FLOPs of one image: V + 1 tokens in the online encoder, the target forward only, Q queries decoded.

    A backward takes twice its forward, but what needs no gradient is left out: the patches, the targets of a moving
    average, and fixed positions as queries and keys of the visual cues.
    """
    s = sizes(config)
    T, Q = 1 + s.V, 1 + s.P
    embed, blocks, projector = _encoder_flops(s, s.V)
    online = embed + blocks + projector
    A = Q + T if config.model.decoder_attention == "self" else Q  # tokens in a block of the decoder
    block = 8 * A * s.E**2 + 4 * A**2 * s.E + 4 * A * s.E * s.decoder_hidden
    if config.model.decoder_attention == "cross":
        block += 4 * Q * s.E**2 + 4 * T * s.E**2 + 4 * Q * T * s.E
    cues = 4 * s.P * s.V * s.E * config.model.visual_cues
    decoder = 2 * T * s.D * s.E + cues + s.decoder_depth * block + 2 * Q * s.E * s.D
    loss = 2 * s.P * s.M * s.D if config.objective.loss == "infonce" else 0
    target_embed, target_blocks, target_projector = _encoder_flops(s, s.seen)
    target = target_embed + target_blocks + target_projector
    backward = 2 * (online + decoder + loss) - embed - loss
    if config.objective.target == "joint":
        backward += 2 * target - target_embed + loss
    if not config.model.learnable_positions:
        backward -= cues * 3 // 2
    return Flops(target, online, decoder, loss, backward, blocks + s.decoder_depth * block)


def classifier_flops(config: Config, classes: int) -> int:
    """Count the FLOPs of one image in fine-tuning: every patch of the crop, no projector, a head on what is pooled.

    The backward takes twice the forward, but for the patches, which need no gradient.
    """
    s = sizes(config)
    embed, blocks, _ = _encoder_flops(s, config.model.grid_size**2)
    return 3 * (embed + blocks + 2 * s.D * classes) - embed


PEAK_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is the peak


def matrix_peak(device: torch.device, dtype: torch.dtype, limit_s: float = 0.5) -> float:
    """Return the best FLOP/s of large matrix products that run one after another for so long."""
    side, at_once, best = PEAK_SIDE[device.type], 4 if device.type == "cuda" else 1, 0.0
    generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    begun = time.perf_counter()
    while not best or time.perf_counter() - begun < limit_s:
        began = time.perf_counter()
        for _ in range(at_once):
            product = a @ b
        product[0, 0].item()  # waits for the device
        best = max(best, at_once * 2 * side**3 / (time.perf_counter() - began))
    return best


# --- bytes kept ------------------------------------------------------------------------------------------------------


class StateBytes(NamedTuple):
    """Bytes on the fullest rank between backward and optimizer step; AdamW's include its own copy of the weights."""

    weights: int
    gradients: int
    optimizer: int
    ema: int


def state_bytes(config: Config, world_size: int) -> StateBytes:
    """Return what one of so many ranks keeps of weights, gradients, AdamW's state and the target; all fp32.

    ZeRO-1 and 2 cut gradients and moments; in DeepSpeed 0.19 they differ only while the backward runs.
    """
    parts, parallel = count_parameters(config), config.parallel
    buffers = FP32 * (parts.online.buffers + parts.target.buffers + parts.decoder.buffers)
    zero = parallel.zero_stage if parallel.backend == "deepspeed" else 0
    if zero in (1, 2):
        weights, ema = FP32 * parts.trained, FP32 * parts.target.parameters
        optimizer = 2 * FP32 * -(-parts.trained // world_size)
        return StateBytes(weights + buffers, _gradients_of_zero(parts, world_size), optimizer, ema)
    ranks = _copy_ranks(config, world_size)
    cut, ema = parts.trained_cut_bytes(ranks, flat=zero == 3), parts.target.cut_bytes(ranks, flat=zero == 3)
    return StateBytes(cut + buffers, cut, 2 * cut, ema)


def _copy_ranks(config: Config, world_size: int) -> int:
    """Return how many ranks share one copy of the weights."""
    parallel = config.parallel
    if parallel.backend == "fsdp":
        return parallel.shard_ranks or world_size
    return world_size if parallel.backend == "deepspeed" and parallel.zero_stage == 3 else 1


def _gradients_of_zero(parts: Parts, ranks: int) -> int:
    """Return the fullest rank's gradients under ZeRO-1 and 2: what its cut runs through, it keeps whole."""
    kept = np.zeros(ranks, np.int64)
    for group in parts.groups:
        ends = np.cumsum(group)
        cuts = np.minimum(np.arange(ranks + 1) * -(-ends[-1] // ranks), ends[-1])
        first, last = np.searchsorted(ends, cuts[:-1], side="right"), np.searchsorted(ends, cuts[1:], side="left")
        starts = np.concatenate([[0], ends])
        kept += np.where(cuts[:-1] < cuts[1:], starts[np.minimum(last, len(group) - 1) + 1] - starts[first], 0)
    return FP32 * int(kept.max())


def bucket_size(trained: int) -> int:
    """Return how many of `trained` numbers ZeRO is to reduce together.

    ZeRO-2 and 3, and ZeRO-1 where it copies gradients, have a buffer of that many (all but ZeRO-3 a new one in every
    step): by DeepSpeed's default 5e8 numbers, 2 GB in fp32, more than most ViTs have.
    """
    return min(BUCKET, trained)


def buffer_bytes(config: Config, split: Split) -> int:
    """Estimate what a backend holds for a while at the peak: gathered weights, buckets, gradients not yet reduced."""
    parts, parallel = count_parameters(config), config.parallel
    half = config.precision.gather == "bf16"
    unreduced = FP32 * parts.trained if split.accumulate > 1 else 0  # all micro-batches are reduced once
    if parallel.backend == "local" or (parallel.backend == "fsdp" and split.world_size == 1):
        return 0
    if parallel.backend == "fsdp":
        # the group at work, the next one, and the buffer it comes in; gradients of one, and the buffer they leave in
        largest = max(max(part.groups(parallel.smallest_group_mb)) for part in (parts.online, parts.decoder))
        gathered = FP32 * 3 * largest
        if parallel.keep_gathered:
            gathered = parts.trained_cut_bytes(1, bf16=half)
            if _copy_ranks(config, split.world_size) > 1:
                gathered += parts.target.cut_bytes(1, bf16=half)
        return gathered + FP32 * 2 * largest + unreduced
    stage, in_bf16, bucket = parallel.zero_stage, config.precision.reduce == "bf16", bucket_size(parts.trained)
    sent = FP32 + BF16 * in_bf16  # of each number of the flat copy that a reduction sends
    if stage == 0:
        return sent * min(parts.trained, ENGINE_BUCKET)
    if stage == 1:  # the backward leaves whole gradients; those in bf16 wait in buffers, as ZeRO-2's do
        return FP32 * parts.trained + (sent + 2 * FP32 * in_bf16) * bucket
    if stage == 2:  # a buffer for each type
        return unreduced + (sent + FP32 * (1 + in_bf16)) * bucket
    kept = FP32 * max(*parts.online.groups(), *parts.decoder.groups())
    if parallel.keep_gathered:
        kept = parts.trained_cut_bytes(1, bf16=half)
    return unreduced + 2 * sent * bucket + kept + FP32 * min(PREFETCH, parts.target.parameters)


class ActivationBytes(NamedTuple):
    """Bytes that the backward needs, of each image, and the target's forward at its peak.

    The target runs before anything is kept, so the larger of the two counts.
    """

    kept_per_image: int  # by autograd, from online encoder, decoder and loss; and the crop
    rerun_per_image: int  # of the one block that activation checkpointing runs again
    target_per_image: int
    weight_copies: int  # bf16 copies that autocast makes and the backward uses again; the same for any batch

    def peak(self, micro_batch: int) -> int:
        """Return the bytes of a micro-batch of so many images."""
        per_image = max(self.kept_per_image + self.rerun_per_image, self.target_per_image)
        return self.weight_copies + micro_batch * per_image


def activation_bytes(config: Config) -> ActivationBytes:
    """Return what autograd keeps on a GPU, as the configuration checkpoints activations.

    Under bf16 autocast, inputs of matrix products are bf16, the residual stream and norms fp32. Fused attention keeps
    q, k, v, its output and a sum for each query and head; plain products keep weights of all pairs instead of that sum,
    in fp32 and as they enter the next product. Masks of dropout and what `torch.compile` spares are left out.
    """
    s, parts, again = sizes(config), count_parameters(config), config.parallel.activation_checkpointing
    a = BF16 if config.precision.compute == "bf16" else FP32
    T, Q, norm, joint = 1 + s.V, 1 + s.P, _NORM, config.objective.target == "joint"
    plain = config.parallel.attention == "plain"
    encoder_block, rest = _kept_by_encoder(s, s.V, a, plain)
    encoder_blocks, tokens = s.depth * encoder_block, s.depth * T
    if joint:
        target_block, target_rest = _kept_by_encoder(s, s.seen, a, plain)
        encoder_blocks, tokens = encoder_blocks + s.depth * target_block, tokens + s.depth * (1 + s.seen)
        encoder_block, rest = max(encoder_block, target_block), rest + target_rest
    if config.model.decoder_attention == "self":
        A = Q + T
        decoder_block = A * (8 * s.E + 2 * norm + 6 * a * s.E + 2 * a * s.decoder_hidden)
        decoder_block += A * s.decoder_heads * _kept_weights(A, a, plain)
    else:
        A = Q
        decoder_block = Q * (12 * s.E + 3 * norm + 9 * a * s.E + 2 * a * s.decoder_hidden)
        decoder_block += Q * s.decoder_heads * (_kept_weights(Q, a, plain) + _kept_weights(T, a, plain))
        decoder_block += T * (norm + 3 * a * s.E)
    blocks = encoder_blocks + s.decoder_depth * decoder_block
    if again:  # their inputs
        blocks = FP32 * (tokens * s.D + s.decoder_depth * A * s.E)
    rest += a * T * s.D + FP32 * T * s.E + FP32 * s.P * s.V * config.model.visual_cues  # into the decoder
    rest += Q * (4 * s.E + norm + a * s.E)
    if config.objective.loss == "infonce":  # targets with a gradient need the predictions that they are compared with
        rest += FP32 * (((4 if joint else 3) * s.P + s.M) * s.D + s.P * s.M)
    else:
        as_they_are = config.objective.loss in ("mse", "l1", "smooth_l1")  # a view, which keeps all targets
        rest += FP32 * (s.P + (s.M if as_they_are else s.P)) * s.D
    crop = 3 * crop_size(config.model) ** 2
    copies = 0
    if a == BF16 and config.precision.gather == "fp32":
        copies = BF16 * sum(part.matrices - again * part.block_matrices for part in (parts.online, parts.decoder))
    return ActivationBytes(
        blocks + rest + crop, again * max(encoder_block, decoder_block), _target_peak(s, a) + crop, copies
    )


_NORM = 2 * FP32  # norms keep their fp32 input and two statistics, products their inputs, GELU its own


def _kept_weights(context: int, a: int, plain: bool) -> int:
    """Return what is kept of the weights of one query of one head: their sum, or all of them."""
    return context * (FP32 + BF16 * (a == BF16)) if plain else FP32


def _kept_by_encoder(s: Sizes, K: int, a: int, plain: bool) -> tuple[int, int]:
    """Return what is kept of K patches by one block, and by all that is no block."""
    T = 1 + K
    block = T * (8 * s.D + 2 * _NORM + 6 * a * s.D + 2 * a * s.hidden + s.heads * _kept_weights(T, a, plain))
    rest = a * K * s.pixels + T * (4 * s.D + _NORM)  # patches; the last norm
    rest += T * sum(a * w for w in s.projector[:-1]) + T * sum(8 * w + _NORM for w in s.projector[1:-1])
    rest += T * (4 * s.D + _NORM) * bool(s.projector[1:]) + 4 * T * s.D  # the projector's last norm; the output
    return block, rest


def _target_peak(s: Sizes, a: int) -> int:
    """Return the target's bytes of an image at the peak of its forward: in an MLP, or in a norm of the projector."""
    mlp = 8 * s.D + a * s.D + 2 * a * s.hidden
    widest = max(s.projector[1:-1], default=0)
    return (1 + s.seen) * max(mlp, (a + 2 * FP32) * widest)


# --- bytes sent ------------------------------------------------------------------------------------------------------


class Collective(NamedTuple):
    """What a rank takes part in during one step: all bytes of the tensors, and a ring's bytes out of each rank.

    The group's members stand `stride` ranks apart.
    """

    name: str
    payload_bytes: int
    ranks: int
    stride: int = 1

    @property
    def wire_bytes(self) -> int:
        rounds = 2 if self.name == "all_reduce" else 1
        return rounds * (self.ranks - 1) * self.payload_bytes // self.ranks


def collectives(config: Config, split: Split) -> list[Collective]:
    """Return the collectives of one step, of which the EMA has none; those of a few numbers are left out.

    Gradients are reduced once a step (FSDP2 with a joint target and several micro-batches: those of the online
    encoder's groups twice). ZeRO-1 and 2 sum whole buckets on every rank (DeepSpeed's
    `use_multi_rank_bucket_allreduce`), then gather the stepped weights. Cut weights are gathered in every micro-batch:
    all parts in its forward, what has a gradient again in its backward unless it is kept. What ZeRO-3 has gathered
    ahead at the turn (`PREFETCH` numbers at most) it need not gather twice; that is left out.
    """
    parts, parallel, precision = count_parameters(config), config.parallel, config.precision
    world, half, numbers = split.world_size, precision.reduce == "bf16", parts.trained
    ranks, flat = _copy_ranks(config, world), parallel.backend == "deepspeed"
    how = dict(flat=flat, bf16=precision.gather == "bf16")
    back = ranks * parts.trained_cut_bytes(ranks, **how)
    target = ranks * parts.target.cut_bytes(ranks, **how)
    if config.objective.target == "joint" and not parallel.keep_gathered:
        target *= 2  # the online encoder in its place, also in the backward
    reduced = ranks * parts.trained_cut_bytes(ranks, flat=flat, bf16=half)
    if parallel.backend == "local":
        sent = []
    elif flat and parallel.zero_stage == 0:
        sent = [Collective("all_reduce", numbers * (BF16 if half else FP32), world)]
    elif flat and parallel.zero_stage < 3:
        sent = [Collective("all_reduce", reduced, world), Collective("all_gather", FP32 * numbers, world)]
    elif flat:
        weights = split.accumulate * (back * (1 if parallel.keep_gathered else 2) + target)
        sent = [Collective("all_gather", weights, world), Collective("reduce_scatter", reduced, world)]
    else:
        size, smallest_mb = BF16 if half else FP32, parallel.smallest_group_mb
        reduced = parts.trained_cut_bytes(ranks) * size // FP32  # everything in bf16
        weights = split.accumulate * (2 * back + target)
        if parallel.keep_gathered:
            weights = split.accumulate * back + target
        if config.objective.target == "joint":
            if parallel.keep_gathered:
                weights = split.accumulate * (back + target)
            # from its one backward to its other a root stays gathered, and a group reduces what it has summed up
            weights -= split.accumulate * parts.online.root_bytes(smallest_mb, bf16=how["bf16"])
            if split.accumulate > 1:
                reduced += sum(parts.online.groups(smallest_mb)[:-1]) * size // ranks
        sent = [Collective("all_gather", weights, ranks), Collective("reduce_scatter", ranks * reduced, ranks),
                Collective("all_reduce", reduced, world // ranks, stride=ranks)]  # fmt: skip
    return [collective for collective in sent if collective.ranks > 1]
