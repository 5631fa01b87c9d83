"""What a run tells of itself: is it true, does it see a collapse, and does it keep secrets?"""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmim.__main__ import main
from lmim.classifier import Classifier
from lmim.config import crop_size, load_config, validate
from lmim.dist import Topology
from lmim.eval.finetune import Finetuning
from lmim.forecast import known_gpu
from lmim.health import UNEVEN_FLUSHES, Stragglers
from lmim.metrics import Cost, ForwardClock, Meters, effective_rank
from lmim.norms import StepNorms, norms
from lmim.objective import across_images
from lmim.profiling import classifier_flops
from tests.conftest import REPOSITORY, TINY, process_environment, train_command
from tests.ranks import Driver
from tests.test_cli_mistakes import refused

pytestmark = pytest.mark.timeout(600)  # the first test also makes the run that others read
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")
LOCAL = ["parallel.backend=local"]
QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
SECRETS = dict(WANDB_API_KEY="0123456789abcdef" * 2 + "planted0", AWS_SECRET_ACCESS_KEY="planted/aws/secret")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(shards, tmp_path_factory) -> Path:
    """A run that was stopped and went on, with all sinks, and secrets in its environment."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    settings = (*LOCAL, "optim.duration=8st", "log.every=2st", "log.wandb=offline", "log.tensorboard=true")
    for changes, code in (("run.time_limit_minutes=0.0001",), 75), ((), 0):
        done = subprocess.run(train_command(shards, folder, *settings, *changes), cwd=REPOSITORY, capture_output=True,
                              env={**process_environment(), **SECRETS}, text=True, timeout=280)  # fmt: skip
        assert done.returncode == code, done.stderr
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    return folder


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_no_file_of_a_run_holds_a_secret(watched):
    files = [path for path in watched.rglob("*") if path.is_file()]
    assert {".wandb", ".safetensors", ".yaml", ".log", ".jsonl"} <= {path.suffix for path in files}
    found = [path for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()]
    assert found == []


@pytest.mark.parametrize("address", ["s3://AKIA:pl%2Fnted@bucket/train", "https://me:pl%2Fnted@host/train",
                                     "https://host/train?X-Amz-Signature=pl%2Fnted"])  # fmt: skip
def test_an_address_with_a_secret_is_refused_without_telling_it(address, capsys, tmp_path):
    for option in ("data.train", "data.eval"):
        line = refused(capsys, ["train", QUICKSTART, *LOCAL, f"{option}={address}", f"run.folder={tmp_path}/run"])
        assert option in line and "pl%2Fnted" not in line and "AKIA" not in line
    assert not (tmp_path / "run").exists()


def test_a_port_or_a_name_is_no_secret():
    for address in (
        "https://host:8080/a@b",
        "https://me@host/a",
        "s3://bucket/a:b@c",
        "/data/a:b@c",
        "https://host/a?v=1",
    ):
        split = validate(load_config(QUICKSTART, [f"data.train={address}"]), 1)
        assert split.micro_batch == 128, address


class Wandb(BaseHTTPRequestHandler):
    """As much of wandb's server as its own `wandb sync` asks for; keeps what it is sent."""

    protocol_version = "HTTP/1.1"
    history: dict[int, dict]
    config: dict

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        answer: dict = {}
        if self.path == "/graphql":
            asked, answer = json.loads(body), {"data": {}}
            name, given = asked.get("operationName"), asked.get("variables") or {}
            if name == "UpsertBucket":
                self.config.update(json.loads(given.get("config") or "{}"))
                project = dict(id="p", name="lmim", entity=dict(id="e", name="me"))
                bucket = dict(id="b", name=given.get("name"), displayName="run", project=project, config="{}")
                answer["data"] = dict(upsertBucket=dict(bucket=bucket, inserted=True))
            if name == "CreateRunFiles":
                answer["data"] = dict(createRunFiles=dict(runID="b", uploadHeaders=[], files=[]))
        elif self.path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                row = json.loads(line)
                self.history.setdefault(row["_step"], {}).update(row)
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_PUT = do_GET = do_POST

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def wandb_server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (Wandb,), dict(history={}, config={}))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_wandb_reads_its_offline_run_back(watched, wandb_server):
    """By its own `wandb sync`, which sends all that it reads to a server: here to one of the test."""
    run_id = (watched / "wandb_id.txt").read_text().strip()
    folders = sorted((watched / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    environment = {**process_environment(), "WANDB_API_KEY": "x" * 40,
                   "WANDB_BASE_URL": f"http://127.0.0.1:{wandb_server.server_port}"}  # fmt: skip
    for folder in folders:
        done = subprocess.run([sys.executable, "-m", "wandb", "sync", "--yes", str(folder)], env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0 and "Finished syncing" in done.stdout + done.stderr, done.stderr
    history, config = wandb_server.RequestHandlerClass.history, wandb_server.RequestHandlerClass.config
    for row in rows_of(watched):
        kept = {name: history[row["step"]][name] for name in row if name != "step"}
        assert kept == pytest.approx({name: value for name, value in row.items() if name != "step"}, rel=1e-6)
    assert config["optim"]["value"]["duration"] == "8st" and config["device"]["value"]["peak_flops"] > 0


def test_tensorboard_reads_its_files_back(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(watched / "tensorboard"))
    read.Reload()
    rows = rows_of(watched)
    assert [event.step for event in read.Scalars("loss")] == list(range(8))
    for name in ("loss", "mfu", "target_deviation"):
        assert [event.value for event in read.Scalars(name)] == pytest.approx([row[name] for row in rows], rel=1e-6)
    told = [row["step"] for row in rows if "update_ratio_online" in row]
    assert [event.step for event in read.Scalars("update_ratio_online")] == told and told[-1] == 7


def test_without_its_package_tensorboard_is_refused(shards, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    where = [f"run.folder={tmp_path}/run", f"data.train={shards}/train", "data.eval="]
    line = refused(capsys, ["train", QUICKSTART, *TINY, *LOCAL, *where, "log.tensorboard=true"])
    assert "log.tensorboard (true)" in line and "pip install 'lmim[tensorboard]'" in line


# --- is it true? -----------------------------------------------------------------------------------------------------


def test_flops_and_mfu_are_those_of_what_ran(watched):
    driver = Driver([*LOCAL, "parallel.attention=plain"], ALONE)  # the counter of torch 2.14 passes over the fused one
    inputs = next(iter(driver.micro_batches(0)))
    driver.backend.begin_step(driver.schedules.at(0))
    with FlopCounterMode(display=False) as counter:
        driver.backend.forward_backward(*inputs, last_micro=False)
    per_image = counter.get_total_flops() / len(inputs[0])
    words = [line for line in (watched / "train.log").read_text().splitlines() if "MFU: " in line][-1]  # a start's own
    peak = 1e12 * float(words.split(" of ")[1].split(" TFLOP/s")[0])
    for row in rows_of(watched):
        assert 1e9 * row["gflop_per_image"] == pytest.approx(per_image, rel=0.05)
        assert row["images_per_second_per_rank"] == row["images_per_second"]
    row = rows_of(watched)[-1]
    assert row["mfu"] == pytest.approx(row["images_per_second"] * per_image / peak, rel=0.05)


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_flops_of_fine_tuning_are_those_that_torch_counts(pooling):
    config = load_config(QUICKSTART, [*TINY, "model.patch_gap=0", f"finetune.pooling={pooling}"])
    model, side = Classifier(config.model, config.finetune, 10), crop_size(config.model)
    model.init_weights()
    images, labels = torch.zeros(4, 3, side, side, dtype=torch.uint8), torch.arange(4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, labels, labels, torch.ones(4)).loss.backward()
    assert classifier_flops(config, 10) == pytest.approx(counter.get_total_flops() / 4, rel=0.01)
    task = Finetuning(config)
    task.classes = 10
    assert task.flops_per_image() == classifier_flops(config, 10)


def test_norms_of_parts_are_those_of_their_tensors():
    driver = Driver(LOCAL, ALONE)
    driver.step(0)
    driver.backward(1)
    model = driver.backend.model
    before = {name: p.detach().clone().numpy().ravel() for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.numpy().ravel().copy() for name, p in model.named_parameters() if p.requires_grad}
    watching = StepNorms(driver.backend.gradients(), driver.backend.pieces(), 1)
    total = float(driver.backend.finish_step())
    found = norms({name: square.item() for name, square in watching.squares().items()})
    after = {name: p.detach().numpy().ravel() for name, p in model.named_parameters()}
    members = dict(
        online=[name for name in before if name.startswith("online.") and not name.startswith("online.projector.")],
        projector=[name for name in before if name.startswith("online.projector.")],
        decoder=[name for name in before if name.startswith("decoder.")],
    )
    assert sum(map(len, members.values())) == len(before) and len(found) == 3 * len(members)
    for part, names in members.items():
        gradient = np.concatenate([gradients[name] for name in names]).astype(np.float64)
        weights = np.concatenate([after[name] for name in names]).astype(np.float64)
        update = weights - np.concatenate([before[name] for name in names])
        expected = [np.sqrt(x @ x) for x in (gradient, update)]
        assert [found[f"grad_norm_{part}"], found[f"update_norm_{part}"]] == pytest.approx(expected, rel=1e-4)
        assert found[f"update_ratio_{part}"] == pytest.approx(expected[1] / np.sqrt(weights @ weights), rel=1e-4)
    assert math.hypot(*(found[f"grad_norm_{part}"] for part in members)) == pytest.approx(total, rel=1e-5)


def test_effective_rank_is_the_entropy_of_singular_values():
    features = np.random.default_rng(0).normal(size=(12, 7)) @ np.diag([5, 3, 2, 1, 0.5, 0.1, 0.01])
    shares = np.linalg.svd(features, compute_uv=False)
    shares /= shares.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.eye(6)) == pytest.approx(6, rel=1e-6)
    assert effective_rank(torch.ones(6, 9)) == pytest.approx(1, rel=1e-3)
    assert math.isnan(effective_rank(torch.full((3, 3), math.nan)))


def test_deviation_across_images_is_that_of_each_cell():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(6, 4, 5, generator=generator) + 0.5
    cells = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(6)])
    units = (tokens / tokens.norm(dim=-1, keepdim=True)).numpy().astype(np.float64)
    by_cell = {n: units[cells.numpy() == n] for n in cells.unique().tolist()}
    means = {n: of.mean(axis=0) for n, of in by_cell.items()}
    found = across_images(tokens, cells, 7)
    expected = sum(len(of) * of.std(axis=0).mean() for of in by_cell.values()) / 24 * math.sqrt(5)
    assert found.deviation.item() == pytest.approx(expected, rel=1e-4)
    pooled = [np.mean([units[b, m] - means[cells[b, m].item()] for m in range(4)], axis=0) for b in range(6)]
    np.testing.assert_allclose(found.pooled_BF[:, :-1].numpy(), pooled, atol=1e-6)
    shared = math.sqrt(sum(len(of) * means[n] @ means[n] for n, of in by_cell.items()) / 24)
    np.testing.assert_allclose(found.pooled_BF[:, -1].numpy(), shared, rtol=1e-5)


@pytest.mark.parametrize("alike", ["everything", "positions"])
def test_figures_of_tokens_that_tell_nothing_of_their_image(alike):
    """All the same, or a code of the position: pooled over other cells in each image, such a code differs too."""
    generator = torch.Generator().manual_seed(4)
    cells = torch.stack([torch.randperm(49, generator=generator)[:39] for _ in range(32)])
    codes = torch.randn(49, 64, generator=generator) if alike == "positions" else torch.ones(49, 64)
    collapsed = across_images(codes[cells] + 0.01 * torch.randn(32, 39, 64, generator=generator), cells, 49)
    healthy = across_images(torch.randn(32, 39, 64, generator=generator), cells, 49)
    assert collapsed.deviation < 0.02 and healthy.deviation > 0.9
    assert effective_rank(collapsed.pooled_BF) < 1.2 and effective_rank(healthy.pooled_BF) > 20
    plain = effective_rank(codes[cells].mean(dim=1))
    assert (plain > 10) if alike == "positions" else (plain < 1.1), "what positions share need not be taken out"


def test_figures_of_runs_that_collapse(shards, tmp_path):
    """No average and no side without a gradient; without a loss that tells patches apart, all becomes the same."""
    joint = ("objective.target=joint", "objective.momentum=0")
    runs = dict(healthy=(), positional=joint, constant=(*joint, "objective.loss=mse"))
    last = {}
    for name, settings in runs.items():
        where = [f"run.folder={tmp_path}/{name}", f"data.train={shards}/train", f"data.eval={shards}/eval"]
        plain = ["objective.similarity_weight=0", "optim.duration=60st", "optim.base_lr=1e-2", "log.every=30st",
                 "data.micro_batch=32"]  # fmt: skip
        assert main(["train", QUICKSTART, *TINY, *LOCAL, *where, *plain, *settings]) == 0
        last[name] = rows_of(tmp_path / name)[-1]
    for figure, least in (("target_deviation", 0.15), ("effective_rank", 1.5)):
        healthy, positional, constant = (last[name][figure] for name in runs)
        assert healthy - least > positional > constant, (figure, last)
    assert last["positional"]["loss"] < 0.6 * last["healthy"]["loss"], "to the loss it looks like the better run"
    assert last["constant"]["similarity_targets"] > 0.98 > last["positional"]["similarity_targets"]
    assert last["positional"]["similarity_positions"] > last["healthy"]["similarity_positions"] + 0.2


# --- which rank is slow? ---------------------------------------------------------------------------------------------


def test_the_clock_times_forward_passes_only():
    class Slow(nn.Module):
        def forward(self) -> None:
            time.sleep(0.05)

    model = Slow()
    clock = ForwardClock(model, torch.device("cpu"))
    for _ in range(2):
        model()
    time.sleep(1.5)
    assert 0.1 <= clock.take_s() < 1.5
    assert clock.take_s() == 0


def test_a_rank_that_stays_slow_is_named_once():
    def told(*spreads: tuple[int, float]) -> list[int]:
        judge = Stragglers()
        rows = (dict(step=step, slowest_rank=rank, rank_spread=spread) for step, (rank, spread) in enumerate(spreads))
        return [row["step"] for row in rows if judge.judge(row)]

    slow, even, other = (3, 0.2), (3, 0.01), (1, 0.2)
    assert told(*[slow] * 6) == [UNEVEN_FLUSHES - 1]
    assert told(slow, slow, even, slow, slow, slow) == [5]
    assert told(*[slow, other] * 4) == []
    assert told(*[even] * 8) == []


def test_one_rank_alone_is_never_slow():
    meters = Meters(ALONE, 8, Cost(1e9, 1e12))
    meters.waited(1.0)
    meters.add(0, 0.1, [_output()], {}, torch.tensor(2.0), dict(grad_norm_online=torch.tensor(9.0)))
    (row,) = meters.flush()
    assert (row["rank_spread"], row["slowest_rank"]) == (0.0, 0)
    assert row["grad_norm_online"] == 3.0 and "effective_rank" not in row


def _output():
    from lmim.classifier import ClassifierOutput

    return ClassifierOutput(torch.tensor(1.0), torch.tensor(0.5))


SLOW_RUN = """
import os, sys, time
from lmim import __main__
from lmim.objective import LatentMIM
plain = LatentMIM.patches
def patches(*arguments):
    time.sleep(0.1 * (os.environ["RANK"] == "1"))
    return plain(*arguments)
LatentMIM.patches = patches
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.launch
@pytest.mark.slow
def test_a_slow_rank_of_a_real_run_is_named(shards, tmp_path):
    script = tmp_path / "slow_run.py"
    script.write_text(SLOW_RUN)
    settings = ("optim.duration=12st", "log.every=2st", "parallel.zero_stage=1")
    command = train_command(shards, tmp_path / "run", *settings, ranks=2, launcher="torchrun")
    at = command.index("-m")
    command[at : at + 2] = [str(script)]
    done = subprocess.run(command, cwd=REPOSITORY, env={**process_environment(), "PYTHONPATH": str(REPOSITORY)},
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run" / "train.log").read_text()
    assert "rank 1 holds the others up" in text and f"(host {os.uname().nodename})" in text
    assert rows_of(tmp_path / "run")[-1]["slowest_rank"] == 1


@pytest.mark.parametrize(("name", "gpu"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA H100 PCIe", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_gpus_are_known_by_their_names(name, gpu):
    assert known_gpu(name) == gpu
