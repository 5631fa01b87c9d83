"""The arithmetic of batch, learning rate and length: what the configuration makes of this number of ranks.

Nothing is measured here; a batch that does not divide is answered with the numbers that would.
"""

from __future__ import annotations

from lmim.config import ConfigError, validate
from lmim.doctor.rows import FAILURE, OK, WARNING, Case, Finding, Found, Row, duration, step_seconds
from lmim.options import Config
from lmim.train import TASKS, Plan

NAMED = 6  # numbers that would fit


def nothing(case: Case) -> Finding:
    """Return nothing: the first rank knows all it needs."""
    return {}


def judge_arithmetic(case: Case, found: Found) -> list[Row]:
    """Return the rows of batch, and of learning rate and length."""
    return [batch(case.config, case.topology.world_size), length(case.config, found)]


def batch(config: Config, ranks: int) -> Row:
    """Say how a step's images are split, or what would divide."""
    whole = config.data.global_batch
    try:
        split = validate(config, ranks)
    except ConfigError as error:
        return Row("batch", FAILURE, str(error), _fitting(config, ranks))
    words = f"{whole} = {_many(ranks)} x {split.micro_batch} (micro-batch) x {split.accumulate} (accumulation)"
    return Row("batch", OK, words, figures=dict(global_batch=whole, ranks=ranks, micro_batch=split.micro_batch,
                                                accumulate=split.accumulate))  # fmt: skip


def _many(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def _fitting(config: Config, ranks: int) -> str:
    """Name the micro-batches and numbers of ranks that would divide the batch, those nearest to what was asked for."""
    whole, micro = config.data.global_batch, config.data.micro_batch or 1
    advice = []
    if whole % ranks == 0:
        share = whole // ranks
        near = sorted((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - micro))[:NAMED]
        advice.append(f"data.micro_batch={', '.join(map(str, sorted(near)))} fit {whole} on {_many(ranks)}")
    near = sorted((n for n in range(1, 2 * ranks + 1) if whole % (n * micro) == 0), key=lambda n: abs(n - ranks))[
        :NAMED
    ]
    if near and ranks not in near:
        advice.append(f"as it is it fits {', '.join(map(str, sorted(near)))} ranks")
    return "; ".join(advice)


def length(config: Config, found: Found) -> Row:
    """Say what the learning rate and the number of steps come to."""
    optim, whole = config.optim, config.data.global_batch
    images = [of["epoch_images"] for of in found.get("images", {}).values()]
    peak = optim.base_lr * whole / 256
    rate = f"peak lr {peak:.3g} = {optim.base_lr:.3g} x {whole} / 256, floor {optim.floor * peak:.3g}"
    if not images:
        return Row("schedule", WARNING, f"{rate}; steps are not known without data.train", "mend data.train")
    try:
        if not images[0]:
            raise ConfigError(f"data.tail (drop) leaves nothing of data.train for data.global_batch ({whole})")
        plan = Plan(config, images[0], TASKS[config.run.task](config).evaluations)
    except ConfigError as error:
        return Row(
            "schedule",
            FAILURE,
            str(error),
            "change what is named; durations are as 800ep (epochs), 125000st (steps) or 5% (of the run)",
        )
    warmup = plan.schedules.warmup_steps
    total = plan.total_steps
    words = (f"{images[0]:,} images = {plan.steps_per_epoch:.1f} steps an epoch; {optim.duration} = {total:,} steps, "
             f"warm-up {warmup:,}; {rate}")  # fmt: skip
    step_s = step_seconds(found)
    if step_s:
        words += f"; {duration(step_s * total)} at the trial's speed"
    figures = dict(peak_lr=peak, steps_per_epoch=plan.steps_per_epoch, total_steps=total, warmup_steps=warmup,
                   epoch_images=images[0], seconds=step_s * total if step_s else None)  # fmt: skip
    if whole > images[0]:
        return Row("schedule", WARNING, words, f"a batch is more than an epoch: set data.global_batch below "
                   f"{images[0]}", figures)  # fmt: skip
    return Row("schedule", OK, words, figures=figures)
