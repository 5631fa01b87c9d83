"""An evaluation that needs an encoder and no labelled shards: opened on every rank, its work done in turns.

The invariants: what is wrong with the encoder is said before any rank waits for another; every way out leaves the
process group; each piece of work is done by one rank and its outcome known to all, in order, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lmim.config import ConfigError, model_dimensions
from lmim.dist import Topology, discover, fail, gather_objects, init, shutdown
from lmim.formats import Weights, build_encoder, read_weights
from lmim.options import VARIANTS, Config
from lmim.vit import VisionTransformer

Outcome = TypeVar("Outcome")


def open_encoder(config: Config, source: Path, which: str, grid: int | None = None) -> VisionTransformer:
    """Return the encoder of `source`; with `grid`, its positions are resized to so many cells a side."""
    return encoder_of(config, read_weights(source), which, grid)


def encoder_of(config: Config, weights: Weights, which: str, grid: int | None = None) -> VisionTransformer:
    """Return an encoder of `weights`; where they do not tell its heads, a configuration of the same width does.

    Else the variant of that width; raises ConfigError where there is none.
    """
    dims, width, heads = model_dimensions(config.model), weights.sizes["embed_dim"], None
    if not weights.sizes["num_heads"]:
        if dims["embed_dim"] == width:
            heads = dims["num_heads"]
        elif width not in {variant["embed_dim"] for variant in VARIANTS.values()}:
            raise ConfigError(f"{weights.path} does not tell its number of attention heads (width {width}): set "
                              f"model.embed_dim={width} and model.num_heads")  # fmt: skip
    return build_encoder(weights, which, grid=grid, num_heads=heads)


def check_layer(layer: int, option: str, encoder: VisionTransformer) -> None:
    """Raise unless an encoder has the block that `option` names."""
    depth = len(encoder.blocks)
    if not -depth <= layer < depth:
        raise ConfigError(f"{option} ({layer}) must be one of the encoder's {depth} blocks: {-depth} to {depth - 1}")


@contextmanager
def on_ranks(config: Config) -> Iterator[Topology]:
    """Join the process group of a launcher, or none, for as long as the evaluation takes."""
    topology = discover()
    init(topology, config.parallel.timeout_minutes)
    try:
        yield topology
    except BaseException as error:
        fail(error)
        raise
    finally:
        shutdown()


def in_turns(work: Callable[[Any], Outcome], pieces: Sequence[Any], topology: Topology) -> list[Outcome]:
    """Return work(piece) of all pieces in their order, on every rank, though each rank does its share alone.

    Ranks meet after every piece, so that none waits longer for the others than a piece takes. A mistake that one finds
    is told by all: `ConfigError` of the first piece that has one.
    """
    outcomes: list[Outcome] = []
    for start in range(0, len(pieces), topology.world_size):
        mine, found, mistake = start + topology.rank, None, None
        if mine < len(pieces):
            try:
                found = work(pieces[mine])
            except ConfigError as error:
                mistake = str(error)
        for outcome, said in gather_objects((found, mistake))[: len(pieces) - start]:
            if said is not None:
                raise ConfigError(said)
            outcomes.append(outcome)
    return outcomes
