"""Wrong settings of backends get one line each, and a DeepSpeed JSON says nothing against the configuration."""

from __future__ import annotations

import json

import pytest
import torch

from lmim.config import ConfigError, Split, load_config, validate
from lmim.dist import Topology
from lmim.objective import LatentMIM
from lmim.options import Config
from lmim.parallel import attention_kernels, build_backend, lend, prepare_blocks
from lmim.parallel.engine import engine_config
from tests.conftest import REPOSITORY, TINY

MISTAKES = [
    (8, "parallel.zero_stage=4", ["parallel.zero_stage", "(4)", "0, 1, 2, 3"]),
    (8, "parallel.backend=ddp", ["parallel.backend", "(ddp)", "deepspeed, fsdp, local"]),
    (2, "parallel.backend=local", ["parallel.backend (local)", "2", "fsdp"]),
    (8, "parallel.backend=fsdp parallel.shard_ranks=3", ["parallel.shard_ranks (3)", "(8)", "1, 2, 4, 8"]),
    (4, "parallel.backend=fsdp parallel.shard_ranks=8", ["parallel.shard_ranks (8)", "(4)", "1, 2, 4"]),
    (4, "parallel.backend=fsdp parallel.shard_ranks=0", ["parallel.shard_ranks (0)", "above 0"]),
    (4, "parallel.backend=fsdp parallel.deepspeed_config=a.json", ["deepspeed_config (a.json)", "(fsdp)"]),
    (4, "precision.reduce=bf16 precision.compute=fp32", ["precision.reduce (bf16)", "precision.compute (fp32)"]),
    (4, "precision.gather=bf16", ["precision.gather (bf16)", "parallel.backend=fsdp", "zero_stage=3"]),
    (4, "precision.gather=bf16 parallel.zero_stage=3", ["precision.gather (bf16)", "precision.reduce (fp32)", "alike"]),
]


@pytest.mark.parametrize(("ranks", "settings", "words"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_setting_that_cannot_be_names_what_can(ranks, settings, words):
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", settings.split())
    with pytest.raises(ConfigError) as caught:
        validate(config, ranks)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("device", "settings", "kernel"),
    [
        ("cpu", "precision.compute=bf16", "plain"),
        ("cpu", "precision.compute=fp32", "fused"),
        ("cuda", "precision.compute=bf16", "fused"),
        ("cuda", "parallel.attention=plain", "plain"),
        ("cpu", "precision.compute=bf16 parallel.attention=fused", "fused"),
    ],
)
def test_the_kernel_of_attention_follows_device_and_precision_and_is_lent_fused(device, settings, kernel):
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [*TINY, *settings.split()])
    with torch.device("meta"):
        model = LatentMIM(config.model, config.objective)
    prepare_blocks(model, config, torch.device(device))
    kernels = attention_kernels(model)
    assert len(kernels) == 2 * config.model.depth + 2 * config.model.decoder_depth + 1  # encoders; decoder; cues
    assert set(kernels.values()) == {kernel}
    with lend(model.online):
        assert set(attention_kernels(model.online).values()) == {"fused"}
        assert set(attention_kernels(model.target).values()) == {kernel}
    assert attention_kernels(model) == kernels


def with_json(tmp_path, content: object, *settings: str) -> Config:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_config(REPOSITORY / "configs" / "quickstart.yaml", [*settings, f"parallel.deepspeed_config={path}"])


SPLIT = Split(world_size=4, micro_batch=16, accumulate=2)
CONTRADICTIONS = [
    ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3", "parallel.zero_stage", "it 1"]),
    ({"train_batch_size": 64}, ["train_batch_size is 64", "data.global_batch", "128"]),
    ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu is 8", "data.micro_batch", "16"]),
    ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps is 1", "data.global_batch", "it 2"]),
    ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "optim.clip_norm", "0.0"]),
    ({"torch_autocast": {"enabled": False}}, ["torch_autocast.enabled is False", "precision.compute", "True"]),
    ({"fp16": {"enabled": True}}, ["fp16.enabled", "precision.compute"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled", "precision.compute=bf16"]),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, ["optimizer.type (Adam)", "optim.*"]),
    ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation (False)"]),
    ({"communication_data_type": "fp16"}, ["communication_data_type (fp16)", "precision.reduce"]),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, ["zero_hpz_partition_size (8)", "EMA"]),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device (nvme)", "EMA"]),
    ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op (sum)", "averaged"]),
    ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm (False)"]),
    ("{", ["is not valid JSON"]),
    ("[]", ["one object"]),
]


@pytest.mark.parametrize(("content", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_a_json_that_contradicts_names_both_values(tmp_path, content, words):
    with pytest.raises(ConfigError) as caught:
        engine_config(with_json(tmp_path, content, "data.global_batch=128"), SPLIT)
    assert "\n" not in str(caught.value) and "ds.json" in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_missing_json_is_named(tmp_path):
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", ["parallel.deepspeed_config=nowhere.json"])
    with pytest.raises(ConfigError, match=r"parallel\.deepspeed_config \(nowhere\.json\) cannot be read: No such file"):
        engine_config(config, SPLIT)


def test_what_a_json_adds_goes_through(tmp_path):
    """Offloading, sizes of buckets and defaults of ours that are no setting; what agrees, and "auto", is no fault."""
    theirs = {
        "train_batch_size": "auto", "communication_data_type": "auto", "gradient_accumulation_steps": 2,
        "fp16": {"enabled": False},
        "managed_gradient_accumulation": True,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000,
                              "stage3_prefetch_bucket_size": "auto", "memory_efficient_linear": True},
        "wall_clock_breakdown": True,
    }  # fmt: skip
    made = engine_config(with_json(tmp_path, theirs, "data.global_batch=128", "parallel.zero_stage=2"), SPLIT)
    ours = {"stage": 2, "stage3_prefetch_bucket_size": 5 * 10**7}
    zero = {**ours, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    assert made["zero_optimization"] == {**zero, "memory_efficient_linear": True}
    assert made["wall_clock_breakdown"] is True
    assert not {"train_batch_size", "communication_data_type"} & made.keys()
    assert made["gradient_accumulation_steps"] == 1  # the engine's own: the backend adds micro-batches up
    assert made["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


@pytest.mark.parametrize(
    ("stage", "settings", "theirs", "contiguous"),
    [
        (1, "", {}, False),
        (1, "precision.reduce=bf16", {}, None),
        (1, "", {"overlap_comm": True}, None),
        (1, "", {"contiguous_gradients": True}, True),
        (1, "", None, False),
        (2, "", {}, None),
    ],
)
def test_zero_1_reduces_gradients_where_they_lie(tmp_path, stage, settings, theirs, contiguous):
    """Unless they are reduced in bf16 or during the backward, or the user says otherwise; null says nothing."""
    config = with_json(tmp_path, {"zero_optimization": theirs}, f"parallel.zero_stage={stage}", *settings.split())
    assert engine_config(config, SPLIT)["zero_optimization"].get("contiguous_gradients") is contiguous


ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "none")


def test_what_deepspeed_itself_refuses_is_one_line(tmp_path):
    config = with_json(tmp_path, {"sparse_gradients": True})
    with pytest.raises(ConfigError, match=r"ds\.json\) is refused by DeepSpeed: Sparse") as caught:
        build_backend(config, ALONE, validate(config, 1))
    assert "\n" not in str(caught.value)


def test_fsdp_does_not_add_micro_batches_up_in_bf16():
    settings = [*TINY, "parallel.backend=fsdp", "precision.compute=bf16", "precision.reduce=bf16"]
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", settings)
    with pytest.raises(ConfigError, match=r"precision\.reduce \(bf16\).* 2 micro-batches"):
        build_backend(config, ALONE, validate(config, 1))


@pytest.mark.parametrize(("ranks", "settings", "trained", "target"), [
    (2, [], True, True), (2, ["parallel.shard_ranks=1"], True, False), (1, [], False, False),
])  # fmt: skip
def test_fsdp_wraps_what_needs_other_ranks(ranks, settings, trained, target):
    """Weights that are cut, and gradients that are summed; by a process group that sends nothing."""
    from torch.distributed.fsdp import FSDPModule
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [*TINY, "parallel.backend=fsdp", *settings])
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        topology = Topology(0, ranks, 0, ranks, torch.device("cpu"), "none")
        backend = build_backend(config, topology, validate(config, ranks))
        backend.prepare(lambda: LatentMIM(config.model, config.objective))
        wrapped = {name: any(isinstance(m, FSDPModule) for m in part.modules())
                   for name, part in backend.model.named_children()}  # fmt: skip
        assert wrapped == dict(online=trained, target=target, decoder=trained)
        backend.close()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_engine_config_is_one_that_deepspeed_takes(stage):
    from deepspeed.runtime.config import DeepSpeedConfig

    for precision in ("precision.reduce=fp32", "precision.reduce=bf16"):
        config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [f"parallel.zero_stage={stage}", precision])
        read = DeepSpeedConfig(engine_config(config, SPLIT))
        assert read.zero_optimization_stage == stage and read.gradient_accumulation_steps == 1
        if stage == 3:
            assert read.zero_config.param_persistence_threshold == 0


def test_gathering_in_bf16_is_refused_where_torch_cannot_keep_norms_in_fp32(monkeypatch):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    fields = {k: v for k, v in MixedPrecisionPolicy.__dataclass_fields__.items() if k != "param_dtype_override_fn"}
    monkeypatch.setattr(MixedPrecisionPolicy, "__dataclass_fields__", fields)
    settings = [*TINY, "parallel.backend=fsdp", "precision.compute=bf16", "precision.gather=bf16"]
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", settings)
    with pytest.raises(ConfigError, match=r"precision\.gather \(bf16\) needs torch 2\.15"):
        build_backend(config, ALONE, validate(config, 1))
