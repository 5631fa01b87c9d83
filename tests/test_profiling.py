"""The analytic model of `lmim plan`, against torch's FLOP counter, autograd, and what live backends hold and send."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmim import dist
from lmim.__main__ import main
from lmim.config import crop_size, load_config, validate
from lmim.objective import LatentMIM
from lmim.options import Config, ParallelConfig
from lmim.parallel import prepare_blocks
from lmim.profiling import (
    ENGINE_BUCKET,
    FP32,
    activation_bytes,
    collectives,
    count_parameters,
    flops_per_image,
    gathered_together,
    state_bytes,
)
from tests.backend_costs import measure
from tests.conftest import REPOSITORY, free_port, process_environment
from tests.ranks import FSDP_CAN_GATHER_BF16
from tests.test_cli_mistakes import refused


def recipe(name: str, *overrides: str) -> Config:
    return load_config(REPOSITORY / "configs" / f"{name}.yaml", overrides)


def on_meta(config: Config) -> LatentMIM:
    with torch.device("meta"):
        return LatentMIM(config.model, config.objective)


def run_forward(model: LatentMIM, config: Config, images: int, device: str = "cpu") -> Tensor:
    side = crop_size(config.model)
    crops = torch.zeros(images, 3, side, side, device=device)  # no bytes: their mean would stay behind, a fake tensor
    return model(crops, torch.arange(images, device=device), 0.5).loss


# --- parameters and FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quickstart", "vit_base_imagenet1k", "vit_huge_imagenet1k"])
def test_parameters(name):
    config = recipe(name)
    model, parts = on_meta(config), count_parameters(config)
    for part in ("online", "target", "decoder"):
        assert getattr(parts, part).parameters == sum(p.numel() for p in model.get_submodule(part).parameters())


def test_the_encoder_is_timms_and_its_projector():
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", num_classes=0)
    encoder = sum(p.numel() for p in base.parameters()) - base.pos_embed.numel()  # ours are fixed
    projector = 2 * 768 * 4096 + 4096**2 + 2 * (4096 + 4096 + 768)
    assert count_parameters(recipe("vit_base_imagenet1k")).online.parameters == encoder + projector


FLOP_CASES = [
    ("quickstart", ()), ("vit_tiny_imagenet1k", ()), ("vit_base_imagenet1k", ()), ("vit_huge_imagenet1k", ()),
    ("quickstart", ("objective.target_input=all", "model.projector_depth=0", "objective.loss=mse")),
    ("quickstart", ("model.visual_cues=false", "model.learnable_positions=true", "model.decoder_depth=3")),
    ("quickstart", ("model.decoder_attention=self", "objective.target=joint")),
    ("vit_small_imagenet1k", ("objective.num_decoded=44",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides"), FLOP_CASES)
def test_flops_are_those_that_torch_counts(name, overrides):
    config = recipe(name, *overrides)
    model = on_meta(config)
    # by plain products: before torch 2.15 the counter does not know the CPU's flash attention
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        run_forward(model.to_empty(device="cpu"), config, images=1).backward()
    counted = {part: sum(counter.get_flop_counts()[f"LatentMIM.{part}"].values()) for part in ("online", "decoder")}
    told = flops_per_image(config)
    assert told.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    if config.objective.target == "ema":
        forward = sum(counter.get_flop_counts()["LatentMIM.target"].values())
        assert told.target_forward == pytest.approx(forward, rel=0.001)
    assert told.online_forward < counted["online"] and told.decoder_forward < counted["decoder"]


@pytest.mark.parametrize(("variant", "giga"), [("small", 33.4), ("base", 66.7), ("large", 174.2)])
def test_flops_are_those_measured_of_the_authors_recipe(variant, giga):
    assert flops_per_image(recipe(f"vit_{variant}_imagenet1k")).total / 1e9 == pytest.approx(giga, rel=0.01)


# --- what autograd keeps ---------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], model: LatentMIM) -> int:
    """Return the bytes of all storages that autograd saves in a forward and that are no parameters or buffers."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


@pytest.fixture
def fused_attention(monkeypatch):
    """Let attention of heads on GPUs run the fused kernel, which torch does not choose where there is no GPU."""
    plain = F.scaled_dot_product_attention

    def chosen(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        if q.dim() < 4 or q.dtype == k.dtype == torch.float32 != v.dtype:
            return plain(q, k, v, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", chosen)


def saved_on_gpu(config: Config, images: int) -> int:
    """Return what autograd saves with CUDA's rules of autocast, on tensors without memory."""
    model = on_meta(config)
    prepare_blocks(model, config, torch.device("cuda"))
    bf16 = config.precision.compute == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", bf16)
        try:
            return saved_bytes(lambda: run_forward(model, config, images, "cuda"), model)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


VARIATIONS = [
    (),
    ("model.decoder_attention=self", "objective.target=joint", "objective.num_decoded=60"),
    ("parallel.attention=plain", "objective.loss=mse", "objective.num_decoded=60"),
]


@pytest.mark.parametrize("compared_with", VARIATIONS)
@pytest.mark.parametrize(
    ("name", "compute", "checkpointing"),
    [
        ("vit_base_imagenet1k", "bf16", "false"),
        ("vit_base_imagenet1k", "bf16", "true"),
        ("vit_tiny_imagenet1k", "fp32", "true"),
        ("vit_huge_imagenet1k", "bf16", "false"),
        ("vit_huge_imagenet1k", "fp32", "false"),
    ],
)
def test_activations_are_those_that_autograd_saves_on_a_gpu(
    name, compute, checkpointing, compared_with, fused_attention
):
    config = recipe(name, f"precision.compute={compute}", f"parallel.activation_checkpointing={checkpointing}",
                    *compared_with)  # fmt: skip
    two, four = saved_on_gpu(config, 2), saved_on_gpu(config, 4)
    told = activation_bytes(config)
    assert told.kept_per_image - 3 * crop_size(config.model) ** 2 == pytest.approx((four - two) / 2, rel=0.01)
    if compute == "bf16":
        assert told.weight_copies == pytest.approx(2 * two - four, rel=0.05)
    if checkpointing == "true":  # one block more than without, and nothing else
        without = activation_bytes(recipe(name, f"precision.compute={compute}", *compared_with))
        assert 0 < told.rerun_per_image < without.kept_per_image / 3


@pytest.mark.parametrize("overrides", [(), ("model.decoder_depth=3", "objective.num_visible=20")])
def test_activations_are_those_that_autograd_saves_on_a_cpu(overrides):
    """In fp32 and with fused attention, as runs on CPUs do in that precision."""
    config = recipe("quickstart", "precision.compute=fp32", *overrides)
    model = LatentMIM(config.model, config.objective)
    model.init_weights()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        found = saved_bytes(lambda: run_forward(model, config, images=8), model) / 8
    assert activation_bytes(config).kept_per_image == pytest.approx(found, rel=0.05)


# --- what backends hold and send -------------------------------------------------------------------------------------

BACKENDS = [
    "parallel.zero_stage=0 data.micro_batch=2",
    "parallel.zero_stage=1 data.micro_batch=2",
    "parallel.zero_stage=2 data.micro_batch=1",
    "parallel.zero_stage=3 data.micro_batch=1 parallel.deepspeed_config=tests/data/no_prefetch.json",
    "parallel.backend=fsdp data.micro_batch=1",
    "parallel.backend=fsdp data.micro_batch=1 parallel.shard_ranks=1",
]
BF16 = "precision.reduce=bf16 data.micro_batch=2"
MODELS = [
    "model.depth=2",
    "model.embed_dim=96 model.depth=3 model.num_heads=3 model.projector_dim=384",
    "model.learnable_positions=true model.projector_depth=0 model.decoder_depth=2 model.depth=3",
]
SETTINGS = [
    *(f"data.global_batch=4 {backend} {model}" for backend in BACKENDS for model in MODELS),
    f"data.global_batch=4 {BACKENDS[3]} parallel.keep_gathered=true",
    f"data.global_batch=4 {BF16} parallel.zero_stage=0",
    f"data.global_batch=4 {BF16} parallel.zero_stage=2",
    f"data.global_batch=4 {BF16} {BACKENDS[3]} precision.gather=bf16 data.micro_batch=2",
    f"data.global_batch=4 {BF16} parallel.backend=fsdp{' precision.gather=bf16' * FSDP_CAN_GATHER_BF16}",
    *(
        f"data.global_batch=4 objective.target=joint {cut}"
        for cut in (
            BACKENDS[3],
            "parallel.backend=fsdp",
            "parallel.backend=fsdp parallel.smallest_group_mb=0",
            "parallel.backend=fsdp parallel.keep_gathered=true",
            "parallel.backend=fsdp parallel.keep_gathered=true parallel.smallest_group_mb=0",
            "parallel.backend=fsdp data.micro_batch=1",
            "parallel.backend=fsdp data.micro_batch=1 parallel.smallest_group_mb=0",
            "parallel.backend=fsdp data.micro_batch=1 parallel.keep_gathered=true",
            "parallel.backend=fsdp data.micro_batch=1 parallel.keep_gathered=true parallel.smallest_group_mb=0",
        )
    ),
]


def assert_told(config: Config, found: dict[str, Any], world_size: int) -> None:
    told = state_bytes(config, world_size)._asdict()
    assert {"weights", "gradients", "optimizer"} <= found["held"].keys()
    for kind, held in found["held"].items():
        assert told[kind] == pytest.approx(held, rel=0.1), kind
    sent = {c.name: c.payload_bytes for c in collectives(config, validate(config, world_size))}
    assert found["sent"].keys() >= sent.keys()
    for name, payload in found["sent"].items():
        assert sent.get(name, 0) == pytest.approx(payload, rel=0.05, abs=100), name  # norms are a few numbers


@pytest.mark.parametrize("model", MODELS)
def test_local_holds_what_is_told(model):
    config = recipe("quickstart", "parallel.backend=local", "data.global_batch=4", *model.split())
    assert_told(config, measure(config, dist.Topology(0, 1, 0, 1, torch.device("cpu"), "none")), 1)


def test_gradients_without_zero_are_reduced_in_deepspeeds_own_buckets():
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

    assert MEMORY_OPT_ALLREDUCE_SIZE == ENGINE_BUCKET


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict]:
    """What two ranks of every backend hold and send, all in one start."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.backend_costs", *SETTINGS]
    ranks = [
        subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         env={**process_environment(), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                              "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                              "OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_two_ranks_hold_and_send_what_is_told(of_two_ranks, settings):
    assert len(of_two_ranks) == len(SETTINGS)
    config = recipe("quickstart", *settings.split())
    found = of_two_ranks[SETTINGS.index(settings)]
    assert_told(config, found, 2)
    assert found["buffer"] <= max(found["sent"].values())  # nothing waits in more than what is sent


@pytest.mark.parametrize("variant, together", [("base", [2] * 6 + [1]), ("large", [1] * 25), ("huge", [1] * 33)])
def test_blocks_that_fsdp_gathers_together(variant, together):
    """By default; the last is the projector."""
    online = count_parameters(recipe(f"vit_{variant}_imagenet1k")).online
    groups = gathered_together([numbers for numbers, _ in online.units], ParallelConfig().smallest_group_mb)
    assert [len(group) for group in groups] == together and sum(together) == len(online.units)
    assert online.groups(0) == [*(numbers for numbers, _ in online.units), online.groups(0)[-1]]
    assert FP32 * sum(online.groups()) == online.cut_bytes(1)


@pytest.mark.parametrize("keep", ["false", "true"])
def test_hsdp_of_eight_ranks_holds_and_sends_what_is_told(keep):
    """With a process group that sends nothing: 4 ranks share a copy, of which there are two; 2 micro-batches."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = recipe("quickstart", "data.global_batch=32", "data.micro_batch=2", "parallel.backend=fsdp",
                    "parallel.shard_ranks=4", f"parallel.keep_gathered={keep}")  # fmt: skip
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        found = measure(config, dist.Topology(0, 8, 0, 8, torch.device("cpu"), "none"))
    finally:
        torch.distributed.destroy_process_group()
    if keep == "true":  # the target lies gathered until the next step
        found["held"].pop("ema")
    assert_told(config, found, 8)


# --- the command -----------------------------------------------------------------------------------------------------


def told_as_json(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("variant", ["base", "large", "huge"])
def test_table_and_json_agree(variant, nodes, capsys):
    arguments = [str(REPOSITORY / "configs" / f"vit_{variant}_imagenet1k.yaml"), "--nodes", str(nodes)]
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120 and not any("…" in line for line in lines)
    told = told_as_json(capsys, *arguments)
    assert told["ranks"] == 8 * nodes and f"{told['parameters']['trained'] / 1e6:.1f} M" in lines[0]
    names = [row["setting"] + ", ckpt" * row["activation_checkpointing"] for row in told["settings"]]
    assert {"ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP", "FSDP replicas", "FSDP, ckpt"} <= set(names)
    assert ("HSDP of 8" in names) == (nodes > 1)
    head = next(i for i, line in enumerate(lines) if "setting" in line) + 2
    for row, name, line in zip(told["settings"], names, lines[head:], strict=False):
        marks, _, values = line.partition(name)
        columns = values.split()
        assert marks.strip() == ">" * row["recommended"] + "*" * row["configured"]
        kinds = ("weights", "gradients", "optimizer", "ema", "buffers", "activations", "total")
        for kind, column in zip(kinds, columns, strict=False):
            assert float(column) == pytest.approx(row[f"{kind}_bytes"] / 1e9, rel=0.005, abs=0.006)
        assert columns[7:9] == ["yes" if row["fits"] else "no", str(row["largest_micro_batch_images"])]
        assert float(columns[-2]) == pytest.approx(row["images_per_s"], abs=1)
        assert row["total_bytes"] == sum(row[f"{kind}_bytes"] for kind in kinds[:-1])
    assert sum(row["recommended"] for row in told["settings"]) == 1
    assert [row["setting"] for row in told["settings"] if row["configured"]] == ["ZeRO-1"]


def test_time_follows_from_flops_and_bytes(capsys):
    """By hand: 4096 images of 66.4 GFLOP on 16 A100 at half their 312 TFLOP/s; two nodes of 8 at 200 Gbit/s a GPU."""
    told = told_as_json(capsys, str(REPOSITORY / "configs/vit_base_imagenet1k.yaml"), "--nodes", "2", "--gpu", "a100",
                        "--mfu", "0.5", "--network-gbit", "200", "--images", "1000000")  # fmt: skip
    rows = {row["setting"]: row for row in told["settings"] if not row["activation_checkpointing"]}
    compute_s = 4096 * 66.4e9 / (16 * 0.5 * 312e12)
    gradients = 4 * told["parameters"]["trained"]
    sending_s = gradients * 2 * 15 / 16 / (8 * 25e9)
    zero = rows["ZeRO-0"]
    assert zero["compute_s_per_step"] == pytest.approx(compute_s, rel=0.01)
    assert zero["communication_s_per_step"] == pytest.approx(sending_s, rel=0.001)
    assert zero["images_per_s"] == pytest.approx(4096 / (compute_s + sending_s), rel=0.01)
    assert rows["FSDP"]["images_per_s"] == pytest.approx(4096 / max(compute_s, sending_s), rel=0.01)
    assert zero["days"] == pytest.approx(math.ceil(800 * 1e6 / 4096) * (compute_s + sending_s) / 86400, rel=0.01)
    in_fp32 = told_as_json(capsys, str(REPOSITORY / "configs/vit_base_imagenet1k.yaml"), "precision.compute=fp32",
                           "--nodes", "2", "--gpu", "a100", "--mfu", "0.5")  # fmt: skip
    assert in_fp32["settings"][0]["compute_s_per_step"] == pytest.approx(compute_s * 312 / 19.5, rel=0.01)
    hybrid = {c["name"]: c for c in rows["HSDP of 8"]["collectives"]}
    assert hybrid["all_reduce"]["ranks"] == 2 and hybrid["reduce_scatter"]["ranks"] == 8
    assert hybrid["all_reduce"]["payload_bytes_per_step"] == pytest.approx(gradients / 8, rel=0.001)


def test_what_does_not_fit_is_not_recommended(capsys):
    """A micro-batch of 4096 ViT-L images is some 170 GB: only checkpointing brings it into an H100."""
    large = str(REPOSITORY / "configs/vit_large_imagenet1k.yaml")
    told = told_as_json(capsys, large, "data.micro_batch=", "--gpus-per-node", "1")
    assert told["micro_batch_images"] == 4096
    plain, rerun = told["settings"][0], told["settings"][1]
    assert plain["setting"] == "local" and not plain["fits"] and rerun["fits"] and rerun["recommended"]
    largest = plain["largest_micro_batch_images"]
    for micro, fits in ((largest, True), (2 * largest, False)):
        told = told_as_json(capsys, large, f"data.micro_batch={micro}", "--gpus-per-node", "1")
        assert told["settings"][0]["fits"] is fits


def test_epoch_is_the_index_where_there_is_one(shards, capsys):
    quickstart = str(REPOSITORY / "configs/quickstart.yaml")
    told = told_as_json(capsys, quickstart, "--gpus-per-node", "2")
    assert (told["epoch_images"], told["epoch_source"], told["steps"]) == (10_000, "embedded", 625)
    told = told_as_json(capsys, quickstart, f"data.train={shards}/train", "--gpus-per-node", "2")
    assert (told["epoch_images"], told["epoch_source"]) == (300, "index of data.train")
    told = told_as_json(capsys, quickstart, "data.train=s3://bucket/far", "--images", "777", "--gpus-per-node", "2")
    assert told["epoch_images"] == 777 and "--images" in told["epoch_source"]


def test_mistakes_are_one_line(capsys):
    base = str(REPOSITORY / "configs/vit_base_imagenet1k.yaml")
    assert "data.global_batch (4096) is not divisible" in refused(capsys, ["plan", base, "--gpus-per-node", "7"])
    assert "--nodes (0)" in refused(capsys, ["plan", base, "--nodes", "0"])
    assert "--mfu (40.0)" in refused(capsys, ["plan", base, "--mfu", "40"])
    assert "parallel.backend (local)" in refused(capsys, ["plan", base, "parallel.backend=local"])
    told = told_as_json(capsys, base, "--nodes", "64")
    assert told["micro_batch_images"] == 8 and "data.micro_batch (256)" in told["notes"][0]
    told = told_as_json(capsys, base, "data.micro_batch=4096", "--gpus-per-node", "1")
    (note,) = told["notes"]
    assert "as configured it does not fit" in note and "data.micro_batch=2048" in note
