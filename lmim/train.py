"""Training: build, resume, loop, finish. The only file that knows the order of things.

What is trained, by which data and measured how, is the task's to say: pretraining, or fine-tuning.

The invariant: what step k computes is a function of the configuration, the data and k; so a run that was stopped and
started again, on other ranks or workers, goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmim import checkpoint, dist
from lmim.config import ConfigError, crop_size, duration_steps, flatten, load_config, save_config, validate
from lmim.data.loader import Batch, DataError, open_data, open_stream, train_batches
from lmim.data.storage import StorageError
from lmim.eval.finetune import Finetuning
from lmim.forecast import device_peak
from lmim.health import Health, Stragglers
from lmim.metrics import (
    EVAL_FILE,
    LOG_FILE,
    RUN_ENDS,
    Cost,
    ForwardClock,
    JsonLines,
    Meters,
    ProgressLine,
    TensorBoard,
    UnreadableLog,
    Wandb,
    numbers_again,
    read_rows,
    set_up_logging,
)
from lmim.norms import StepNorms
from lmim.options import Config
from lmim.parallel import Backend, build_backend, weights_are_cut
from lmim.resume import CONFIG_FILE, check_run_folder, lock_run_folder, resume, tell_changes
from lmim.schedules import Schedules
from lmim.stop import StopRequest
from lmim.task import Pretraining, Task

logger = logging.getLogger(__name__)
TASKS: dict[str, Callable[[Config], Task]] = {"pretrain": Pretraining, "finetune": Finetuning}  # by run.task
DONE, STOPPED = 0, 75  # exit codes; 75 asks a scheduler to start the run again (EX_TEMPFAIL of sysexits.h)
UNREADABLE_JUDGED_AFTER = 1000  # images; a share of fewer says little
DONE_FILE, STOP_FILE, STACKS_FOLDER = "done.json", "stop", "stacks"


class TrainingError(Exception):  # no RuntimeError, as of a collective: all ranks come to it, and none is lost
    """The run cannot go on; the message says why and from where to take it up."""


MISTAKES = (ConfigError, DataError, checkpoint.SaveError, StorageError, TrainingError)  # one line says it all


def last_line(error: Exception) -> str:
    """Return an error's words in one line: a loader worker's error comes with its traceback in front."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class Plan:
    """What follows from configuration and data: the number of steps, the schedules and when things are due."""

    def __init__(self, config: Config, epoch_samples: int, evaluations: dict[str, str]):
        self.epoch_samples = epoch_samples
        self.steps_per_epoch = epoch_samples / config.data.global_batch
        self.total_steps = self.steps(config.optim.duration, "optim.duration")
        optim, objective = config.optim, config.objective
        self.schedules = Schedules(
            total_steps=self.total_steps,
            warmup_steps=self.steps(optim.warmup, "optim.warmup"),
            peak_lr=optim.base_lr * config.data.global_batch / 256,
            floor=optim.floor,
            momentum=objective.momentum,
            similarity_start=objective.similarity_start,
            similarity_end=objective.similarity_end,
        )
        if self.schedules.warmup_steps > self.total_steps:
            raise ConfigError(f"optim.warmup ({optim.warmup}) is longer than optim.duration ({optim.duration})")
        self.log_every = max(self.steps(config.log.every, "log.every"), 1)
        # 0st: only at the end, or when the run is stopped
        self.checkpoint_every = self.steps(config.checkpoint.every, "checkpoint.every") or self.total_steps
        self.keep_every = self.steps(config.checkpoint.keep_every, "checkpoint.keep_every")
        options = flatten(config)
        self.evaluate_every = {name: self.steps(options[key], key) for name, key in evaluations.items()}

    def steps(self, duration: str, key: str) -> int:
        total = getattr(self, "total_steps", 0)
        steps = duration_steps(duration, steps_per_epoch=self.steps_per_epoch, total_steps=total, key=key)
        if key == "optim.duration" and steps < 1:
            raise ConfigError(f"optim.duration ({duration}) is no step at all")
        return steps

    def due(self, done: int, every: int) -> bool:
        """Tell whether what comes every so many steps comes after `done` of them; it always does after the last."""
        return every > 0 and (done % every == 0 or done == self.total_steps)

    def evaluations(self, done: int | None = None) -> list[str]:
        """Return which evaluations come after so many steps; without a number, which come at all."""
        return [name for name, every in self.evaluate_every.items()
                if (every > 0 if done is None else self.due(done, every))]  # fmt: skip


class Run:
    """One run's parts, and what happens between its steps."""

    def __init__(self, config: Config, topology: dist.Topology):
        self.config, self.topology = config, topology
        self.folder = Path(config.run.folder)
        self.split = validate(config, topology.world_size)
        check_run_folder(config)
        self.task = TASKS[config.run.task](config)
        self.backend = build_backend(config, topology, self.split)  # checks what only it knows

    def open_data(self) -> None:
        self.train_index, self.eval_index = open_data(self.config, self.topology)
        if self.train_index is None:
            raise ConfigError("data.train is empty: give a folder of shards, made by tools/shard_images.py")
        data = self.config.data
        if not len(self.train_index):
            raise ConfigError(f"data.train ({data.train}) holds no images: shard some")
        stream = open_stream(data, self.train_index, self.config.run.seed)
        if stream.epoch_samples == 0:
            raise ConfigError(f"data.tail (drop) leaves nothing of {len(self.train_index)} images, which are less than "
                              f"data.global_batch ({data.global_batch}): take carry or repeat")  # fmt: skip
        if len(self.train_index) < data.global_batch:
            logger.warning("data.global_batch (%d) is more than data.train has images (%d): a step takes some twice",
                           data.global_batch, len(self.train_index))  # fmt: skip
        self.plan = Plan(self.config, stream.epoch_samples, self.task.evaluations)
        self.task.open(self.train_index, self.eval_index, self.plan.evaluations())

    def build(self) -> Backend:
        self.backend.prepare(self.task.build)
        return self.backend

    def open_sinks(self, start: int) -> None:
        self.start, self.cursor = start, start * self.config.data.global_batch
        self.skipped_steps = 0  # in a row
        masked = self.config.model.grid_size**2 - self.config.objective.num_visible
        self.health = Health(self.config.health, self.config.objective, masked, self.plan.schedules.warmup_steps,
                             self.plan.steps(self.config.health.patience, "health.patience"))  # fmt: skip
        self.saver = checkpoint.Saver(self.folder, self.config, self.topology, self.plan.keep_every)
        self.stragglers, self.hosts = Stragglers(), dist.gather_objects(socket.gethostname())
        cost, told = self._cost()
        cut = weights_are_cut(self.config, self.topology.world_size)
        clock = None if cut else ForwardClock(self.backend.model, self.topology.device)
        self.meters = Meters(self.topology, self.config.data.global_batch, cost, clock)
        self.unreadable = UnreadableLog(self.folder, self.topology.rank)
        self.sinks: list[Any] = []
        self.watchers: list[TensorBoard | Wandb] = []  # sinks of all that can be drawn
        self.log = self.evals = self.progress = None
        if self.topology.is_main:
            try:
                if start < self.plan.total_steps:
                    (self.folder / DONE_FILE).unlink(missing_ok=True)  # of a run whose checkpoints are gone
                save_config(self.config, self.folder / CONFIG_FILE)
                self.log = JsonLines(self.folder / LOG_FILE, start)
                self.evals = JsonLines(self.folder / EVAL_FILE, start)
            except OSError as error:
                raise ConfigError(f"run.folder ({self.folder}) cannot be written: {error.strerror}") from error
            self.progress = ProgressLine(self.plan.total_steps, start)
            self.sinks = [self.log, self.evals, self.progress]
            if self.config.log.tensorboard:
                self.watchers.append(TensorBoard(self.folder, start))
            if self.config.log.wandb != "off":
                self.watchers.append(Wandb(self.config, asdict(self.config) | dict(device=told), self.folder))
            self.sinks += self.watchers
        self._look_back()

    def _cost(self) -> tuple[Cost, dict[str, Any]]:
        """Return what MFU is made of, and the same in words; a collective."""
        peak_flops, source = device_peak(self.topology.device, self.config.precision.compute)
        peaks = dist.gather_objects(peak_flops)
        cost = Cost(self.task.flops_per_image(), sum(peaks) / len(peaks))
        logger.info("MFU: %.4g GFLOP per image, of %.4g TFLOP/s a rank (%s)", cost.flops_per_image / 1e9,
                    cost.peak_flops / 1e12, source)  # fmt: skip
        return cost, dict(cost._asdict(), peak_source=source, ranks=len(peaks))

    def _look_back(self) -> None:
        """Take up where the log ends: how many steps were left out in a row, and what the alarms have seen."""
        last = max(self.health.reach, self.config.optim.max_skipped_steps)
        rows = read_rows(self.folder / LOG_FILE)[-last:] if self.topology.is_main else []
        for row in map(numbers_again, dist.gather_objects(rows)[0]):
            if row.keys() >= {"grad_norm", *Health.READS}:  # not of an older version
                self.skipped_steps = 0 if _is_finite(row) else self.skipped_steps + 1
                self.health.judge(row)

    def flush(self) -> None:
        rows = self.meters.flush()
        for row in rows if self.topology.is_main else ():
            for sink in (self.log, *self.watchers):
                sink.write(row)
        if rows and self.topology.is_main:
            self.progress.update(rows[-1], self.task.told(rows[-1]))
        for row in rows:
            self._check_finite(row)
            self._check_health(row)
        if rows:
            slow = self.stragglers.judge(rows[-1])
            if slow and self.topology.is_main:
                logger.warning("%s (host %s)", slow, self.hosts[rows[-1]["slowest_rank"]])
            self._check_unreadable(rows[-1]["step"] + 1 - self.start, rows[-1]["skipped_images"])

    def _check_finite(self, row: dict[str, Any]) -> None:
        """Tell a step that was left out, and stop after too many in a row."""
        if _is_finite(row):
            self.skipped_steps = 0
            return
        self.skipped_steps += 1
        logger.warning("step %d is left out: its loss (%g) or gradient (norm %g) is not finite", row["step"],
                       row["loss"], row["grad_norm"])  # fmt: skip
        if self.skipped_steps >= self.config.optim.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self.skipped_steps} steps in a row, up to step {row['step']} "
                f"(optim.max_skipped_steps); checkpoints from before: {self._checkpoints()}"
            )

    def _check_health(self, row: dict[str, Any]) -> None:
        for alarm in self.health.judge(row):
            logger.warning("%s", alarm.words)
            if getattr(self.config.health, alarm.option.removeprefix("health.")) == "stop":
                raise TrainingError(f"{alarm.words}; {alarm.option} is stop; checkpoints: {self._checkpoints()}")

    def _checkpoints(self) -> str:
        """Name the checkpoints there are, once the one in hand is written; a collective."""
        self.saver.finish()
        found = [path.name for path in checkpoint.complete(self.folder)]
        return f"{', '.join(found)} in {self.folder / 'checkpoints'}" if found else "none yet"

    def _check_unreadable(self, steps: int, skipped: int) -> None:
        """Stop, on all ranks at once, where too many of the images since the start could not be read."""
        data, images = self.config.data, steps * self.config.data.global_batch
        if images >= min(UNREADABLE_JUDGED_AFTER, self.plan.epoch_samples) and skipped > data.max_bad_fraction * images:
            last = f", such as {self.unreadable.last}" if self.unreadable.last else ""
            raise TrainingError(
                f"{skipped} of {images} images could not be read{last}; data.max_bad_fraction allows "
                f"{data.max_bad_fraction:g}: see {self.unreadable.path.parent} for all, and repair the shards "
                "(python tools/verify_shards.py), or allow more"
            )

    def evaluate(self, done: int, stop: StopRequest) -> bool:
        """Evaluate what is due after `done` steps, and tell whether it was done: a stop leaves it out.

        The row carries the last finished step, −1 before any.
        """
        names = self.plan.evaluations(done)
        if self.eval_index is None or not names:
            return True
        found = self.task.evaluate(names, self.backend, self.train_index, self.eval_index, self.topology, stop.agreed)
        if found is None:
            return False
        if self.topology.is_main:
            logger.info("step %d  %s", done, ", ".join(f"{name} {100 * value:.1f} %" for name, value in found.items()))
            row = dict(step=done - 1, epoch=round(done / self.plan.steps_per_epoch, 4), **found)
            for sink in (self.evals, *(self.watchers if done else ())):
                sink.write(row)
        return True

    def evaluated(self, done: int) -> bool:
        """Tell whether the accuracy after `done` steps is on record: a stop at that step leaves it out."""
        rows = read_rows(self.folder / EVAL_FILE) if self.topology.is_main else []
        return dist.gather_objects(any(row["step"] == done - 1 for row in rows))[0]

    def save(self, done: int) -> None:
        position = checkpoint.Position(done, self.cursor, self.backend.optimizer_steps(), self.train_index.fingerprint,
                                       self.split.micro_batch)  # fmt: skip
        self.saver.save(position, self.backend.pieces())

    def mark_done(self) -> None:
        """Leave the mark of a complete run: a launcher may lose the exit code."""
        if self.topology.is_main:
            mark = dict(
                steps=self.plan.total_steps, ranks=self.topology.world_size, device=str(self.topology.device.type)
            )
            temporary = self.folder / f".{DONE_FILE}.tmp"
            temporary.write_text(json.dumps(mark) + "\n")
            temporary.replace(self.folder / DONE_FILE)
            logger.info("done: %d steps, %s", self.plan.total_steps, self.folder)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def _is_finite(row: dict[str, Any]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def train(config: Config | str | Path) -> int:
    """Train as the configuration (or its file) says and return 0 if the run is complete, 75 if it was stopped.

    Runs on every rank of a launcher, or alone. The run folder then holds the configuration, `log.jsonl`, `eval.jsonl`,
    `train.log` and checkpoints; started again it goes on from the newest of those.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    topology = dist.discover()
    run = Run(config, topology)
    if topology.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = lock_run_folder(run.folder)  # held until this process ends
        except OSError as error:
            raise ConfigError(f"run.folder ({run.folder}) cannot be written: {error.strerror}") from error
    set_up_logging(run.folder, topology.is_main)
    tell_changes(config)
    dist.init(topology, config.parallel.timeout_minutes, run.folder / STACKS_FOLDER)
    stop = StopRequest(run.folder / STOP_FILE if topology.is_main else None, 60 * config.run.time_limit_minutes)
    try:
        run.open_data()
        backend = run.build()
        start = resume(config, backend, run.split, run.train_index.fingerprint, run.plan.total_steps,
                       build=run.task.build, begin=run.task.begin)  # fmt: skip
        code = _steps(run, backend, start, stop)
        backend.close()
        return code
    except BaseException as error:
        run.backend.abandon()
        dist.fail(error)
        if isinstance(error, Exception):  # whoever called `train` shows it on the screen
            name = "" if isinstance(error, MISTAKES) else f"{type(error).__name__}: "
            logger.error("%s%s%s", RUN_ENDS, name, last_line(error), extra={"file_only": True})
        raise
    finally:
        stop.close()
        dist.shutdown()
        if topology.is_main:
            lock.close()


def _steps(run: Run, backend: Backend, start: int, stop: StopRequest) -> int:
    """The loop."""
    config, plan, split, task = run.config, run.plan, run.split, run.task
    batches = train_batches(
        config.data, run.train_index, seed=config.run.seed, size=crop_size(config.model), split=split,
        topology=run.topology, start_step=start, total_steps=plan.total_steps, **task.loading(),
    )  # fmt: skip
    run.open_sinks(start)
    try:
        evaluated = start > 0 and (not plan.evaluations(start) or run.evaluated(start))
        stopping = not evaluated and not run.evaluate(start, stop)
        run.meters.restart_clock()
        for step in range(start, plan.total_steps):
            if stopping:
                break
            hyper = plan.schedules.at(step)
            backend.begin_step(hyper)
            outputs = []
            for micro in range(split.accumulate):
                batch = next_batch(batches, run, step)
                inputs = task.inputs(batch, hyper)
                outputs.append(backend.forward_backward(*inputs, last_micro=micro == split.accumulate - 1))
            done = step + 1
            norms = None
            if plan.due(done, plan.log_every):
                norms = StepNorms(backend.gradients(), backend.pieces(), split.world_size)
            grad_norm = backend.finish_step()
            run.meters.add(step, done / plan.steps_per_epoch, outputs, task.scheduled(hyper), grad_norm,
                           norms.squares() if norms else {})  # fmt: skip

            stopping = stop.agreed() and done < plan.total_steps
            pause = stopping or bool(plan.evaluations(done)) or plan.due(done, plan.checkpoint_every)
            if pause or plan.due(done, plan.log_every):
                run.flush()
            if not stopping:
                stopping = not run.evaluate(done, stop)
            if stopping or plan.due(done, plan.checkpoint_every):
                run.save(done)
            if pause:
                run.meters.restart_clock()
        run.saver.close()
        if stopping:
            reasons = stop.reasons()
            logger.info("stopped by %s after step %d; the same command goes on from there", reasons,
                        run.cursor // config.data.global_batch)  # fmt: skip
            return STOPPED
        run.mark_done()
        return DONE
    except (TrainingError, DataError, StorageError):
        run.saver.finish()  # else the checkpoint in hand would be lost with this process
        raise
    finally:
        run.close()


def next_batch(batches: Iterator[Batch], run: Run, step: int) -> Batch:
    """Return the next micro-batch, on the device, counting the wait for it and naming what could not be read."""
    began = time.perf_counter()
    batch = next(batches)
    run.cursor = batch.cursor
    run.meters.waited(time.perf_counter() - began)
    run.meters.skipped(len(batch.skipped))
    for skip in batch.skipped:
        run.unreadable.write(step, *skip)
    return batch
