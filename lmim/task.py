"""What a run trains: the part of it that differs between pretraining and fine-tuning.

Owns the protocol, and what pretraining is. The order of things, the backends, the loader, checkpoints, stops and logs
are the same for all tasks and know none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lmim.data.loader import Batch
from lmim.data.shards import ShardIndex
from lmim.dist import Topology
from lmim.eval import in_loop
from lmim.objective import LatentMIM
from lmim.options import Config
from lmim.parallel import Backend, Trainable
from lmim.profiling import flops_per_image
from lmim.resume import begin_with
from lmim.schedules import Hyper


class Task(Protocol):
    """One for each value of `run.task`, made from the configuration."""

    evaluations: ClassVar[dict[str, str]]  # what is evaluated while it runs, and the option that says how often

    def open(self, train: ShardIndex, test: ShardIndex | None, names: Sequence[str]) -> None:
        """Take over the data, or refuse them; `names` are the evaluations that will come, of `test` if there is one."""

    def build(self) -> Trainable:
        """Return the model, on whatever device is the default, without values."""

    def begin(self, backend: Backend) -> None:
        """Give a run that goes on from nothing other weights than initial ones, if it has such; a collective."""

    def loading(self) -> dict[str, Any]:
        """Return what `train_batches` is to do beside making crops."""

    def flops_per_image(self) -> int:
        """Return the FLOPs of one image's forward and backward."""

    def inputs(self, batch: Batch, hyper: Hyper) -> tuple[Any, ...]:
        """Return what the model's forward takes."""

    def scheduled(self, hyper: Hyper) -> dict[str, float]:
        """Return the scheduled values that are logged."""

    def told(self, row: dict[str, Any]) -> str:
        """Say in a few words what a row of the log holds beside the loss."""

    def evaluate(self, names: Sequence[str], backend: Backend, train: ShardIndex, test: ShardIndex, topology: Topology,
                 stopping: Callable[[], bool]) -> dict[str, float] | None:  # fmt: skip
        """Return shares (0 to 1) by name, or None where the run is to stop meanwhile; a collective."""


class Pretraining:
    """Latent masked image modelling (`objective`), watched by what `in_loop` offers."""

    evaluations: ClassVar = {name: f"eval.{name}_every" for name in in_loop.EVALUATIONS}

    def __init__(self, config: Config):
        self.config = config

    def open(self, train: ShardIndex, test: ShardIndex | None, names: Sequence[str]) -> None:
        in_loop.check(names, self.config, train, test)

    def build(self) -> LatentMIM:
        return LatentMIM(self.config.model, self.config.objective)

    def begin(self, backend: Backend) -> None:
        if self.config.run.init_from:
            begin_with(Path(self.config.run.init_from), self.config, backend)

    def loading(self) -> dict[str, Any]:
        return {}

    def flops_per_image(self) -> int:
        return flops_per_image(self.config).total

    def inputs(self, batch: Batch, hyper: Hyper) -> tuple[Any, ...]:
        return batch.images, batch.keys, hyper.similarity_target

    def scheduled(self, hyper: Hyper) -> dict[str, float]:
        return dict(lr=hyper.lr, momentum=hyper.momentum, similarity_target=hyper.similarity_target)

    def told(self, row: dict[str, Any]) -> str:
        return (
            f"similarity predictions {row['similarity_predictions']:.2f} visible {row['similarity_visible']:.2f} "
            f"targets {row['similarity_targets']:.2f}"
        )

    def evaluate(self, names: Sequence[str], backend: Backend, train: ShardIndex, test: ShardIndex, topology: Topology,
                 stopping: Callable[[], bool]) -> dict[str, float] | None:  # fmt: skip
        """A target encoder's values have `target_` in front."""
        values: dict[str, float] = {}
        for which in self.config.eval.encoders:
            with backend.infer(which) as encoder:
                found = in_loop.evaluate(names, encoder, train, test, self.config, topology, stopping)
            if found is None:
                return None
            values |= {name if which == "online" else f"{which}_{name}": value for name, value in found.items()}
        return values
