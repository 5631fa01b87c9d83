"""Backends run side by side in a few processes: `python -m tests.ranks JOBS.json FOLDER`, one process a rank.

A job names a backend's settings and what to do with it. One start of the processes does many jobs, since importing
torch and DeepSpeed costs more than twenty steps of the tiny model.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lmim import dist
from lmim.checkpoint import Position, Saver, load_optimizer, load_pieces, load_weights, newest, position_of
from lmim.config import crop_size, load_config, validate
from lmim.data.loader import open_data, train_batches
from lmim.eval import attentive, fewshot, knn, linear
from lmim.eval.case import Case
from lmim.eval.features import Reading, Subject, check_readings, eval_sizes
from lmim.eval.finetune import Finetuning, finetune_config
from lmim.norms import StepNorms, norms
from lmim.objective import LatentMIM
from lmim.options import Config
from lmim.parallel import Backend, build_backend
from lmim.patches import Views
from lmim.schedules import Hyper, Schedules
from tests.conftest import REPOSITORY, TINY, free_port, process_environment

GLOBAL_BATCH, CROP = 32, 35
FSDP_CAN_GATHER_BF16 = "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__  # from torch 2.15 on


def run_jobs(ranks: int, jobs: list[dict[str, Any]], folder: Path, timeout_s: float = 280) -> None:
    """Do jobs on so many processes; each leaves FOLDER/NAME.rankR.pt."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    shared = dict(
        process_environment(),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        MALLOC_MMAP_THRESHOLD_="100000",
    )  # what is freed leaves the process, for its memory to be measured
    command = [sys.executable, "-m", "tests.ranks", str(folder / "jobs.json"), str(folder)]
    processes = []
    for rank in range(ranks):
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log,
                                              env=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))))  # fmt: skip
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(
        (folder / f"rank{rank}.log").read_text()[-3000:] for rank, code in enumerate(codes) if code
    )


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """Return what a job left."""
    return torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True)


def tiny_config(settings: list[str]) -> Config:
    return load_config(REPOSITORY / "configs" / "quickstart.yaml", [*TINY, "data.micro_batch=8", *settings])


class Driver:
    """A backend and the steps it takes on made-up images, the same whatever the number of ranks."""

    def __init__(self, settings: list[str], topology: dist.Topology, steps: int = 20):
        self.config, self.topology = tiny_config(settings), topology
        self.split = validate(self.config, topology.world_size)
        self.schedules = Schedules(steps, 2, 1e-3, 0.25, 0.9, 0.75, 0.25)
        self.backend: Backend = build_backend(self.config, topology, self.split)
        self.backend.prepare(lambda: LatentMIM(self.config.model, self.config.objective))

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (GLOBAL_BATCH, 3, CROP, CROP), dtype=torch.uint8, generator=generator)
        keys = torch.arange(GLOBAL_BATCH) + GLOBAL_BATCH * step
        images, keys = images.to(self.topology.device), keys.to(self.topology.device)
        for micro in range(self.split.accumulate):
            start = (micro * self.topology.world_size + self.topology.rank) * self.split.micro_batch
            here = slice(start, start + self.split.micro_batch)
            yield images[here], keys[here], self.schedules.at(step).similarity_target

    def backward(self, step: int) -> float:
        """Do all of a step but its end, and return the loss over all ranks."""
        self.backend.begin_step(self.schedules.at(step))
        loss = torch.zeros((), device=self.topology.device)
        for micro, inputs in enumerate(self.micro_batches(step)):
            last = micro == self.split.accumulate - 1
            loss += self.backend.forward_backward(*inputs, last_micro=last).loss.detach() / self.split.accumulate
        return dist.mean_over_ranks(loss).item()

    def step(self, step: int) -> tuple[float, float]:
        loss = self.backward(step)
        watched = StepNorms(self.backend.gradients(), self.backend.pieces(), self.topology.world_size)
        norm, squares = float(self.backend.finish_step()), watched.squares()
        self.norms = norms({name: dist.mean_over_ranks(square.clone()).item() for name, square in squares.items()})
        return loss, norm

    def save(self) -> Path:
        """Write a checkpoint into a folder that all ranks get to know."""
        folder = Path(dist.gather_objects(tempfile.mkdtemp() if self.topology.is_main else "")[0])
        saver = Saver(folder, self.config, self.topology)
        saver.save(Position(1, 0, self.backend.optimizer_steps(), "", 0), self.backend.pieces())
        saver.close()
        return newest(folder)

    def load(self, saved: Path) -> None:
        load_pieces(saved, self.backend.pieces())
        self.backend.loaded(position_of(saved).optimizer_steps)

    def groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups without their tensors."""
        optimizer = getattr(self.backend, "adamw", None) or self.backend.optimizer
        kept = ("names", "weight_decay", "betas", "eps", "lr")
        return [{key: group[key] for key in kept} for group in optimizer.param_groups]


class Finetuner(Driver):
    """The same with a classifier, on images of shards that are augmented and mixed."""

    def __init__(self, settings: list[str], topology: dist.Topology, steps: int = 20, start: int = 0):
        self.config, self.topology = finetune_config(tiny_config(settings), None, "online"), topology
        self.split = validate(self.config, topology.world_size)
        self.schedules = Schedules(steps, 2, 1e-3, 0.0, 0.9, 0.75, 0.25)
        self.task = Finetuning(self.config)
        self.train, self.test = open_data(self.config, topology)
        self.task.open(self.train, self.test, ["accuracy"])
        self.backend = build_backend(self.config, topology, self.split)
        self.backend.prepare(self.task.build)
        self.batches = train_batches(self.config.data, self.train, seed=self.config.run.seed, split=self.split,
                                     size=crop_size(self.config.model), topology=topology, start_step=start,
                                     total_steps=steps, **self.task.loading())  # fmt: skip

    def micro_batches(self, step: int) -> Iterator[tuple[Any, ...]]:
        for _ in range(self.split.accumulate):
            yield self.task.inputs(next(self.batches), self.schedules.at(step))

    def shares(self) -> dict[str, float]:
        """Return the accuracies on the evaluation images."""
        return self.task.evaluate(["accuracy"], self.backend, self.train, self.test, self.topology, lambda: False)


# --- jobs ------------------------------------------------------------------------------------------------------------


def train(settings: list[str], topology: dist.Topology, steps: int = 20, resume: bool = False) -> dict[str, Any]:
    """Take steps; with `resume` a state goes out in the middle and into a backend built anew."""
    driver = Driver(settings, topology, steps)
    groups, taken, of_parts = [driver.groups()], [], []
    for step in range(steps):
        if resume and step == steps // 2:
            saved = driver.save()
            driver.backend.close()
            driver = Driver(settings, topology, steps)
            driver.load(saved)
            groups.append(driver.groups())
        taken.append(driver.step(step))
        of_parts.append(driver.norms)
    image = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28).to(topology.device)
    with driver.backend.infer("target") as encoder:
        features = encoder.forward_features(image).cpu()
    saved = driver.save()
    driver.backend.close()
    losses, norms = zip(*taken, strict=True)
    weights, optimizer = load_weights(saved), load_optimizer(saved)
    return dict(losses=losses, norms=norms, groups=groups, features=features, weights=weights, optimizer=optimizer,
                of_parts=of_parts)  # fmt: skip


def finetune(settings: list[str], topology: dist.Topology, steps: int = 8) -> dict[str, Any]:
    """Take steps with a state that goes out in the middle and into a backend built anew; evaluate at the end."""
    driver, taken = Finetuner(settings, topology, steps), []
    for step in range(steps):
        if step == steps // 2:
            saved = driver.save()
            driver.backend.close()
            driver = Finetuner(settings, topology, steps, start=step)
            driver.load(saved)
        taken.append(driver.step(step))
    shares, saved = driver.shares(), driver.save()
    scales = sorted({group["lr"] / driver.schedules.at(steps - 1).lr for group in driver.groups()})
    driver.backend.close()
    losses, norms = zip(*taken, strict=True)
    weights, optimizer = load_weights(saved), load_optimizer(saved)
    return dict(losses=losses, norms=norms, weights=weights, optimizer=optimizer, scales=scales, shares=shares)


def freshness(settings: list[str], topology: dist.Topology) -> dict[str, Any]:
    """Take four steps, then an EMA with momentum 0, and compare what target and online encoder make of one input."""
    driver = Driver(settings, topology)
    for step in range(4):
        driver.step(step)
    model, seen = driver.backend.model, {}
    for which in ("online", "target"):
        model.get_submodule(which).register_forward_hook(
            lambda module, inputs, output, which=which: seen.update({which: output.detach().clone()})
        )
    same_cells = torch.arange(20, device=topology.device).expand(8, -1)
    offsets = torch.zeros(8, driver.config.model.grid_size**2, dtype=torch.long, device=topology.device)
    plain_forward = model.forward
    views = Views(same_cells, same_cells, offsets, offsets)
    model.forward = lambda images, keys, similarity: plain_forward(images, keys, similarity, views)
    differences = []
    for momentum in (1.0, 0.0):
        driver.backend.begin_step(Hyper(lr=0.0, momentum=momentum, similarity_target=0.5))
        for micro, inputs in enumerate(driver.micro_batches(9)):
            last = micro == driver.split.accumulate - 1
            driver.backend.forward_backward(*inputs, last_micro=last)
        driver.backend.finish_step()
        differences.append((seen["online"] - seen["target"]).abs().max().item())
    driver.backend.close()
    return dict(before=differences[0], after=differences[1])


class NotANumber(torch.autograd.Function):
    """Leaves the loss as it is and makes its gradient NaN."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.nan


def not_a_number(settings: list[str], topology: dist.Topology) -> dict[str, Any]:
    """Take six steps; in the third the gradient of the last rank's first micro-batch is NaN, and its loss is not."""
    driver = Driver(settings, topology, steps=6)
    model, plain, poisoned = driver.backend.model, driver.backend.model.forward, []

    def forward(*inputs):
        out = plain(*inputs)
        if poisoned and topology.rank == topology.world_size - 1:
            poisoned.clear()
            return out._replace(loss=NotANumber.apply(out.loss))
        return out

    model.forward = forward
    taken, steps = [], []
    for step in range(6):
        if step == 2:
            before = load_weights(driver.save())
            poisoned.append(step)
        taken.append(driver.step(step))
        steps.append(driver.backend.optimizer_steps())
        if step == 2:
            after = load_weights(driver.save())
    changed = [name for name in before if not name.startswith("target") and not torch.equal(before[name], after[name])]
    weights = load_weights(driver.save())
    driver.backend.close()
    losses, norms = zip(*taken, strict=True)
    return dict(losses=losses, norms=norms, optimizer_steps=steps, changed=changed, weights=weights)


class Collectives(TorchDispatchMode):
    """Counts the bytes and calls of every collective: of what is summed, what is gathered, what is scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.dtypes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            tensors = [x for x in _flat([*args, *(kwargs or {}).values()]) if isinstance(x, Tensor)]
            name = func.__name__.split(".")[0].strip("_")
            if tensors and name not in ("wait_tensor", "barrier"):
                largest = max(tensors, key=lambda tensor: tensor.nbytes)
                self.bytes[name] += largest.nbytes
                self.calls[name] += 1
                self.dtypes[f"{name} {largest.dtype}"] += largest.nbytes
        return func(*args, **(kwargs or {}))


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(list(value))
        else:
            yield value


def communication(settings: list[str], topology: dist.Topology) -> dict[str, Any]:
    """Count the collectives of the EMA and of a whole step, after two steps for what is done once."""
    driver = Driver(settings, topology)
    for step in range(2):
        driver.step(step)
    with Collectives() as of_ema:
        driver.backend.begin_step(driver.schedules.at(2))
    with Collectives() as of_step:
        for micro, inputs in enumerate(driver.micro_batches(2)):
            last = micro == driver.split.accumulate - 1
            driver.backend.forward_backward(*inputs, last_micro=last)
        driver.backend.finish_step()
    driver.backend.close()
    return dict(ema=dict(of_ema.bytes), step=dict(of_step.bytes), dtypes=dict(of_step.dtypes),
                calls=dict(of_step.calls))  # fmt: skip


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "is_nonzero")
SIZED_BY_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave.Tensor")


class Calls(TorchFunctionMode):
    """Notes every method by which Python would read a tensor's values, which on a GPU waits for all that is queued."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes every operator that reads values, whoever calls it: of its result the host must know number or size."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(str(func).removeprefix("aten.").startswith(name) for name in SIZED_BY_VALUES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def waits(settings: list[str], topology: dist.Topology, read_loss: bool = False) -> dict[str, Any]:
    """Take four steps, and name what reads a tensor's values in the last: all of the step, and the norms of parts."""
    driver, found = Driver(settings, topology), []
    for step in range(3):
        driver.step(step)
    micros = list(driver.micro_batches(3))
    with Calls(found), Operators(found):
        driver.backend.begin_step(driver.schedules.at(3))
        for number, inputs in enumerate(micros):
            out = driver.backend.forward_backward(*inputs, last_micro=number == len(micros) - 1)
        watched = StepNorms(driver.backend.gradients(), driver.backend.pieces(), topology.world_size)
        norm = driver.backend.finish_step()
        watched.squares()
        if read_loss:
            out.loss.item()
    driver.backend.close()
    return dict(found=found, norm=float(norm))


def build(settings: list[str], topology: dist.Topology) -> dict[str, Any]:
    """Build a model of real size and tell by how much this process's memory rose, at the end and at its peak."""
    config = load_config(REPOSITORY / "configs" / "vit_huge_imagenet1k.yaml", settings)
    split = validate(config, topology.world_size)
    with torch.device("meta"):
        whole = LatentMIM(config.model, config.objective)
    numbers = sum(p.numel() for p in whole.parameters())
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    block = sum(p.numel() for p in whole.online.blocks[0].parameters())
    largest = max(p.numel() for p in whole.parameters())
    backend = build_backend(config, topology, split)  # imports DeepSpeed
    torch.distributed.all_reduce(torch.zeros(1))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    backend.prepare(lambda: LatentMIM(config.model, config.objective))
    risen = dict(end=_memory("VmRSS") - before, peak=_memory("VmHWM") - before)
    backend.close()
    return dict(numbers=numbers, trained=trained, block=block, largest=largest, **risen)


def _memory(field: str) -> int:
    """Return a field of this process's status in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[field].split()[0]) * 1024


def _case(settings: list[str], topology: dist.Topology) -> Case:
    config = tiny_config(settings)
    encoder = LatentMIM(config.model, config.objective).online
    encoder.init_weights(0)
    subject = Subject("random", encoder.eval())
    train, test = open_data(config, topology)
    return Case(config, topology, [subject], eval_sizes(config, encoder), train, test, Path(), "online", None)


def evaluations(settings: list[str], topology: dist.Topology) -> dict[str, Any]:
    """Run every evaluation of an untrained encoder and return its accuracies, and which images had features."""
    probes = ["probe.least_steps=60", "probe.epochs=1", "probe.attentive_epochs=2", "probe.attentive_batch=50",
              "probe.shots=[1,3]", "probe.trials=3"]  # fmt: skip
    case = _case([*probes, *settings], topology)
    (subject,), config = case.subjects, case.config
    readings = check_readings([Reading(), Reading(pooling="class_token")], subject, "eval.layer")
    train, test = (case.features(subject, readings, index) for index in (case.train, case.test))
    found = dict(ids=train.ids, **knn.protocols(test, train, readings[0], config, topology))
    support = case.features(subject, readings, case.train, fewshot.support_ids(case.train, config))
    by_shots = fewshot.accuracies(test, support, readings[0], case.train.labels(), config, topology)
    found["fewshot"] = [value for values in by_shots.values() for value in values]
    probed = linear.probe_features(train, test, readings, config, topology)
    found["linear"] = [probed["accuracy"], *(head["held_out"] for head in probed["heads"])]
    probed = attentive.of_subject(case, subject, readings[0])
    found["attentive"] = [probed["accuracy"], probed["held_out"]]
    few = case.features(subject, readings, case.train, np.arange(3))
    found |= {"few ids": few.ids, "few": few.by(readings[0])}
    return found


JOBS = {
    job.__name__: job for job in (train, finetune, freshness, not_a_number, communication, waits, build, evaluations)
}


def main(jobs: Path, folder: Path) -> None:
    topology = dist.discover()
    dist.init(topology, timeout_minutes=12)  # compiling takes minutes where others compute; `run_jobs` ends what hangs
    try:
        for job in json.loads(jobs.read_text()):
            outcome = JOBS[job["do"]](job["settings"], topology, **job.get("options", {}))
            torch.save(outcome, folder / f"{job['name']}.rank{topology.rank}.pt")
            gc.collect()
            torch.compiler.reset()  # several backends' graphs would go beyond what torch compiles of one function
    finally:
        dist.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
