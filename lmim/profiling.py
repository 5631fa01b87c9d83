"""What a configuration costs, from its numbers alone: parameters, FLOPs, bytes kept on a rank and bytes sent.

Owns the analytic model of the network and of what each backend keeps and sends. The invariant: it follows what the
backends do, not what their names promise; tests compare it with torch's FLOP counter, with the tensors that live
backends hold, with what autograd saves, and with the collectives that are called.

Letters: K patches given · V visible · M masked · T = 1 + K tokens · Q = 1 + M queries · D encoder width · E decoder
width · a bytes of a number that enters a matrix product.
"""

from __future__ import annotations

import functools
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import nn

from lmim.config import Config, ModelConfig, ObjectiveConfig, Split, crop_size, model_dimensions
from lmim.objective import LatentMIM

FP32, BF16 = 4, 2  # bytes
BUCKET, PREFETCH = 500_000_000, 50_000_000  # numbers: DeepSpeed's defaults for gradients, and for ZeRO-3's gathering


class Part(NamedTuple):
    """Numbers in one part of the model."""

    parameters: int
    matrices: int
    block_matrices: int  # those inside blocks
    buffers: int
    largest_group: int  # parameters that FSDP2 gathers together

    def bytes(self, bf16: bool) -> int:
        """Return the bytes of all parameters where matrices travel in bf16, or everything in fp32."""
        return FP32 * self.parameters - (FP32 - BF16) * self.matrices * bf16


def count_parameters(config: Config) -> dict[str, Part]:
    """Count the numbers of online encoder, target and decoder, from the model built on `meta`."""
    return _parts(astuple(config.model))


@functools.cache
def _parts(options: tuple[Any, ...]) -> dict[str, Part]:
    with torch.device("meta"):
        model = LatentMIM(ModelConfig(*options), ObjectiveConfig())
    return {name: _count(model.get_submodule(name)) for name in ("online", "target", "decoder")}


def _count(part: nn.Module) -> Part:
    def numbers(module: nn.Module, matrices: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2 or not matrices)

    groups = [numbers(block) for block in part.blocks]
    if hasattr(part, "projector"):
        groups.append(numbers(part.projector))
    groups.append(numbers(part) - sum(groups))
    buffers = sum(b.numel() for b in part.buffers())
    return Part(numbers(part), numbers(part, True), numbers(part.blocks, True), buffers, max(groups))


class Sizes(NamedTuple):
    """The numbers that costs are made of; see the module's letters."""

    V: int
    M: int
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

    A backward takes twice its forward, but what needs no gradient is left out: the patches, the targets, and fixed
    positions as queries and keys of the visual cues.
    """
    s = sizes(config)
    T, Q = 1 + s.V, 1 + s.M
    embed, blocks, projector = _encoder_flops(s, s.V)
    online = embed + blocks + projector
    block = 8 * Q * s.E**2 + 4 * Q**2 * s.E  # self-attention
    block += 4 * Q * s.E**2 + 4 * T * s.E**2 + 4 * Q * T * s.E  # cross-attention
    block += 4 * Q * s.E * s.decoder_hidden
    cues = 4 * s.M * s.V * s.E * config.model.visual_cues
    decoder = 2 * T * s.D * s.E + cues + s.decoder_depth * block + 2 * Q * s.E * s.D
    loss = 2 * s.M**2 * s.D if config.objective.loss == "infonce" else 0
    backward = 2 * (online + decoder + loss) - embed - loss
    if not config.model.learnable_positions:
        backward -= cues * 3 // 2
    return Flops(sum(_encoder_flops(s, s.seen)), online, decoder, loss, backward, blocks + s.decoder_depth * block)


# --- bytes kept ------------------------------------------------------------------------------------------------------


class StateBytes(NamedTuple):
    """Bytes on one rank between backward and optimizer step; the optimizer's include its own copy of the weights."""

    weights: int
    gradients: int
    optimizer: int
    ema: int


def shard_ranks(config: Config, world_size: int) -> int:
    """Return how many ranks share one copy of what is cut, by fsdp or by ZeRO."""
    parallel = config.parallel
    if parallel.backend == "fsdp":
        return parallel.shard_ranks or world_size
    return world_size if parallel.backend == "deepspeed" and parallel.zero_stage else 1


def cuts_weights(config: Config) -> bool:
    """Tell whether weights and target are cut over ranks too."""
    parallel = config.parallel
    return parallel.backend == "fsdp" or (parallel.backend == "deepspeed" and parallel.zero_stage == 3)


def state_bytes(config: Config, world_size: int) -> StateBytes:
    """Return what one of so many ranks keeps of weights, gradients, AdamW's state and the target; all fp32.

    ZeRO-1 and 2 cut gradients, moments and an fp32 copy of the weights that they step, beside the whole weights: in
    DeepSpeed 0.19 they differ only while the backward runs. ZeRO-3 has such a copy of its cut weights too: it means to
    do without in fp32, but compares a device with a string. fsdp steps the cut weights themselves.
    """
    parts, shared = count_parameters(config), shard_ranks(config, world_size)
    trained = parts["online"].parameters + parts["decoder"].parameters
    buffers = FP32 * sum(part.buffers for part in parts.values())
    of_weights = shared if cuts_weights(config) else 1
    beside = config.parallel.backend == "deepspeed" and config.parallel.zero_stage > 0
    return StateBytes(
        weights=FP32 * trained // of_weights + buffers,
        gradients=FP32 * trained // shared,
        optimizer=(2 + beside) * FP32 * trained // shared,
        ema=FP32 * parts["target"].parameters // of_weights,
    )


def buffer_bytes(config: Config, split: Split) -> int:
    """Estimate what a backend holds for a while at the peak: gathered weights, buckets, gradients not yet reduced."""
    parts, parallel = count_parameters(config), config.parallel
    online, target, decoder = parts["online"], parts["target"], parts["decoder"]
    trained = online.parameters + decoder.parameters
    half = config.precision.gather == "bf16"
    unreduced = FP32 * trained if split.accumulate > 1 else 0  # all micro-batches are reduced once
    if parallel.backend == "local":
        return 0
    if parallel.backend == "fsdp":
        # the block at work, the next one, and the buffer it comes in; gradients of one, and the buffer they leave in
        largest = max(part.largest_group for part in parts.values())
        gathered = FP32 * 3 * largest
        if parallel.keep_gathered:
            gathered = sum(part.bytes(half) for part in parts.values())
        return gathered + FP32 * 2 * largest + unreduced
    flat = FP32 * min(trained, BUCKET)  # the flat copy that a reduction sends
    if parallel.zero_stage == 0:
        return flat
    bucket = BUCKET * (FP32 + BF16 * (config.precision.reduce == "bf16"))  # one for each type of gradients
    if parallel.zero_stage < 3:
        return bucket + flat + unreduced
    kept = online.bytes(half) + decoder.bytes(half)  # see `collectives`
    return bucket + flat + unreduced + kept + FP32 * min(PREFETCH, target.parameters)


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
    q, k, v, its output and a sum for each query and head; the CPU's plain products keep T × T weights instead. Masks
    of dropout and what `torch.compile` spares are left out.
    """
    s, parts, again = sizes(config), count_parameters(config), config.parallel.activation_checkpointing
    a = BF16 if config.precision.compute == "bf16" else FP32
    T, Q = 1 + s.V, 1 + s.M
    # norms keep their fp32 input and two statistics, products their inputs, GELU its own
    norm = 2 * FP32
    encoder_block = T * (8 * s.D + 2 * norm + 6 * a * s.D + 2 * a * s.hidden + FP32 * s.heads)
    decoder_block = Q * (12 * s.E + 3 * norm + 9 * a * s.E + 2 * a * s.decoder_hidden + 2 * FP32 * s.decoder_heads)
    decoder_block += T * (norm + 3 * a * s.E)
    blocks = s.depth * encoder_block + s.decoder_depth * decoder_block
    if again:  # their inputs
        blocks = FP32 * (s.depth * T * s.D + s.decoder_depth * Q * s.E)
    hidden = s.projector[1:-1]
    rest = a * s.V * s.pixels + T * (4 * s.D + norm)  # patches; the last norm
    rest += T * sum(a * w for w in s.projector[:-1]) + T * sum(8 * w + norm for w in hidden)
    rest += T * (4 * s.D + norm) * bool(s.projector[1:]) + 4 * T * s.D  # the projector's last norm; the output
    rest += a * T * s.D + FP32 * T * s.E + FP32 * s.M * s.V * config.model.visual_cues  # into the decoder
    rest += Q * (4 * s.E + norm + a * s.E)
    rest += 4 * FP32 * s.M * s.D + FP32 * s.M**2 if config.objective.loss == "infonce" else 2 * FP32 * s.M * s.D
    crop = 3 * crop_size(config.model) ** 2
    copies = 0
    if a == BF16 and config.precision.gather == "fp32":
        trained = (parts["online"], parts["decoder"])
        copies = BF16 * sum(part.matrices - again * part.block_matrices for part in trained)
    return ActivationBytes(
        blocks + rest + crop, again * max(encoder_block, decoder_block), _target_peak(s, a) + crop, copies
    )


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

    Gradients are reduced once a step. ZeRO-1 and 2 sum whole buckets on every rank (DeepSpeed's
    `use_multi_rank_bucket_allreduce`), then gather the stepped weights. Cut weights are gathered in every micro-batch:
    all parts in its forward, and under fsdp online encoder and decoder again in its backward. ZeRO-3 keeps those two
    gathered until then (measured in DeepSpeed 0.19.8, however small `stage3_max_reuse_distance` and
    `stage3_max_live_parameters` are). ZeRO-0 sums in fp32 whatever `precision.reduce` is.
    """
    parts, parallel, precision = count_parameters(config), config.parallel, config.precision
    world, shared = split.world_size, shard_ranks(config, split.world_size)
    gathered = {name: part.bytes(precision.gather == "bf16") for name, part in parts.items()}
    forth, back = sum(gathered.values()), gathered["online"] + gathered["decoder"]
    numbers = parts["online"].parameters + parts["decoder"].parameters
    half = precision.reduce == "bf16"
    reduced = parts["online"].bytes(half) + parts["decoder"].bytes(half)
    if parallel.backend == "local":
        sent = []
    elif parallel.backend == "deepspeed" and parallel.zero_stage == 0:
        sent = [Collective("all_reduce", FP32 * numbers, world)]
    elif parallel.backend == "deepspeed" and parallel.zero_stage < 3:
        sent = [Collective("all_reduce", reduced, world), Collective("all_gather", FP32 * numbers, world)]
    elif parallel.backend == "deepspeed":
        sent = [Collective("all_gather", split.accumulate * forth, world), Collective("reduce_scatter", reduced, world)]
    else:
        reduced = numbers * (BF16 if half else FP32)
        weights = split.accumulate * (forth + back)
        if parallel.keep_gathered:
            weights = split.accumulate * back + gathered["target"]
        sent = [Collective("all_gather", weights, shared), Collective("reduce_scatter", reduced, shared),
                Collective("all_reduce", reduced // shared, world // shared, stride=shared)]  # fmt: skip
    return [collective for collective in sent if collective.ranks > 1]
