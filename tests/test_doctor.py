"""The doctor finds what is wrong before a run, names it and says what to do; nothing it does is left behind."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmim.__main__ import main
from lmim.config import load_config
from lmim.dist import Board, Topology
from lmim.doctor import arithmetic, images, machine, memory, reached, visit
from lmim.doctor.rows import FAILURE, OK, WARNING, Case, of_ranks
from lmim.doctor.trial import trial_config
from tests.conftest import REPOSITORY, TINY, free_port, process_environment
from tests.servers import serving

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
GB = 10**9


def rows_of(output: str) -> dict[str, dict[str, Any]]:
    """Return the rows of the JSON object in the last line, by check; of a check's several rows the worst."""
    told = json.loads(output.strip().splitlines()[-1])
    assert told["failures"] == sum(row["state"] == FAILURE for row in told["rows"])
    assert told["ok"] == (told["failures"] == 0)
    return {
        row["check"]: row for row in sorted(told["rows"], key=lambda row: (OK, WARNING, FAILURE).index(row["state"]))
    }


def visit_alone(*settings: str, limit: int = 0) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Run a visit by one process and return its exit code, its rows and all it printed; `limit`: bytes of addresses."""
    command = [sys.executable, "-m", "lmim", "doctor", QUICKSTART, "parallel.backend=local", *settings]

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(command, cwd=REPOSITORY, env=dict(process_environment(), OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=280, preexec_fn=limited)  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, rows_of(done.stdout), done.stdout


def visit_of_two(fault: str, *settings: str, module: str = "tests.doctor_ranks") -> tuple[list[int], dict[str, Any]]:
    """Run a visit by two processes, with a fault in the second, and return their exit codes and the first's rows."""
    shared = dict(process_environment(), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")  # fmt: skip
    command = [sys.executable, "-m", module, fault, QUICKSTART, *settings]
    ranks = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                              env=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert outputs[1] == ""  # the first one speaks
    return [rank.returncode for rank in ranks], rows_of(outputs[0])


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


# --- a healthy machine -----------------------------------------------------------------------------------------------


def test_a_healthy_machine_passes_alone(tmp_path):
    code, rows, output = visit_alone(f"run.folder={tmp_path}/deep/run")
    assert code == 0, output
    assert {row["state"] for row in rows.values()} <= {OK, WARNING}
    expected = {"versions", "devices", "clocks", "run folder", "disk space", "reading", "decoding", "network",
                "trial step", "memory", "batch", "schedule"}  # fmt: skip
    assert rows.keys() >= expected
    assert "128 = 1 rank x 128" in rows["batch"]["found"]
    # 10,000 images in steps of 128, eight epochs, a tenth of them warm-up, 2e-3 · 128 / 256
    figures = rows["schedule"]["figures"]
    assert (figures["total_steps"], figures["warmup_steps"], figures["peak_lr"]) == (625, 63, 1e-3)
    assert rows["memory"]["figures"]["peak"] > 50e6  # no process with torch in it is smaller
    assert rows["reading"]["figures"]["read_images_per_s"] > 0
    assert all(row["check"] in output for row in rows.values())
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.launch
def test_a_healthy_machine_passes_on_two_ranks_of_a_launcher(tmp_path):
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port",
               str(free_port()), "-m", "lmim", "doctor", QUICKSTART, f"run.folder={tmp_path}/run"]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(process_environment(), OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    assert "2 ranks" in rows["network, all ranks"]["found"]
    assert rows["network, all ranks"]["figures"]["bytes_per_s"] > 1e6
    assert "128 = 2 ranks x 64" in rows["batch"]["found"] and rows["trial step"]["state"] == OK
    assert "alike on 2 ranks" in rows["versions"]["found"]
    assert leftovers(tmp_path) == []


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def few_checks(monkeypatch):
    """Leave a visit in this process only the checks that start none."""
    kept = ("versions", "run folder", "one folder")
    monkeypatch.setattr(visit, "CHECKS", tuple(one for one in visit.CHECKS if one.name in kept))


def test_a_run_folder_under_a_file(few_checks, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")  # root may write to folders without rights, but not here
    assert main(["doctor", QUICKSTART, f"run.folder={tmp_path}/file/run"]) == 1
    row = rows_of(capsys.readouterr().out)["run folder"]
    assert row["state"] == FAILURE and f"run.folder ({tmp_path}/file/run) cannot be written" in row["found"]
    assert "rank 0" in row["found"] and "owner" in row["advice"]


def test_a_run_folder_on_a_read_only_disk(few_checks, tmp_path, capsys):
    if os.geteuid() == 0:
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(tmp_path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
    else:
        tmp_path.chmod(0o555)
    try:
        assert main(["doctor", QUICKSTART, f"run.folder={tmp_path}/run"]) == 1
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path)], check=True)
        else:
            tmp_path.chmod(0o755)
    row = rows_of(capsys.readouterr().out)["run folder"]
    assert row["state"] == FAILURE and "cannot be written: " in row["found"]


@pytest.mark.slow
def test_a_shard_host_that_answers_slowly(shards, tmp_path):
    with serving(shards / "train") as server:
        slow = {path.name: "slow" for path in (shards / "train").glob("*.tar")}  # 1.2 s for every range
        server.always = slow
        small = [setting for setting in TINY if setting.startswith("model.")]  # its steps outrun the server
        code, rows, output = visit_alone(f"run.folder={tmp_path}/run", f"data.train={server.url}", "data.eval=",
                                         "data.global_batch=32", *small)  # fmt: skip
    assert rows["reading"]["state"] in (WARNING, FAILURE), output
    assert f"{server.url} is slow" in rows["reading"]["advice"] and "data.cache" in rows["reading"]["advice"]
    assert rows["reading"]["figures"]["read_images_per_s"] < rows["reading"]["figures"]["needed_images_per_s"]
    assert rows["trial step"]["state"] == OK and rows["schedule"]["figures"]["epoch_images"] == 300
    assert code == any(row["state"] == FAILURE for row in rows.values())


@pytest.mark.slow
def test_a_rank_on_another_version():
    codes, rows = visit_of_two("version")
    assert codes == [1, 1]
    row = rows["versions"]
    assert (
        row["state"] == FAILURE
        and "2.0.1 on rank 1" in row["found"]
        and f"{torch.__version__.split('+')[0]}" in row["found"]
    )
    assert "same environment" in row["advice"]


@pytest.mark.slow
def test_a_clock_off_by_a_minute():
    codes, rows = visit_of_two("clock")
    assert codes == [1, 1]
    row = rows["clocks"]
    assert row["state"] == FAILURE and "rank 1 is 6" in row["found"] and "behind rank 0" in row["found"]
    assert row["figures"]["skew_s"] == pytest.approx(-61, abs=1.5)
    assert "NTP" in row["advice"] and rows["versions"]["state"] == OK


@pytest.mark.slow
def test_a_batch_that_does_not_divide(tmp_path):
    code, rows, output = visit_alone(f"run.folder={tmp_path}/run", "data.global_batch=36", "data.micro_batch=16")
    assert code == 1
    row = rows["batch"]
    assert row["state"] == FAILURE and "data.global_batch (36)" in row["found"]
    assert (
        "nearest are 32 and 48" in row["found"]
        and "data.micro_batch=3, 4, 6, 9, 12, 18 fit 36 on 1 rank" in row["advice"]
    )
    others = {name: row["state"] for name, row in rows.items() if name != "batch"}
    assert set(others.values()) <= {OK, WARNING} and others["trial step"] == OK, output


@pytest.mark.slow
def test_too_little_memory(tmp_path):
    # 60,000 crops of 35 px: their patches alone are 0.6 GB, and what the backward needs would be 20 GB
    code, rows, output = visit_alone(f"run.folder={tmp_path}/run", "data.global_batch=60000", limit=6 * GB)
    assert code == 1
    row = rows["trial step"]
    assert row["state"] == FAILURE and "rank 0" in row["found"] and "memory" in row["found"], output
    assert "data.micro_batch below 60000" in row["advice"]
    assert rows["reading"]["state"] == OK and rows["disk space"]["state"] == OK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", "rank 1: RuntimeError: nobody has thought of this"),
        ("hangs", "rank 1: no answer within 4 s"),
        ("dies", "rank 1: it gave no word"),
    ],
)
def test_no_rank_waits_for_one_that_fails(fault, words):
    codes, rows = visit_of_two(fault)
    assert codes[0] == 1 and codes[1] == (9 if fault == "dies" else 1)
    assert rows["run folder"]["state"] == (FAILURE if fault == "dies" else OK)
    assert rows["versions"]["state"] == FAILURE and words in rows["versions"]["found"]


def test_mistakes_in_the_configuration_end_at_once(capsys):
    assert main(["doctor", QUICKSTART, "optim.base_lr=-1"]) == 2
    assert "optim.base_lr (-1.0) must be above 0" in capsys.readouterr().err


# --- judgements, of findings as ranks would tell them ----------------------------------------------------------------


def case_of(ranks: int, *settings: str) -> Case:
    """Return the first of so many ranks, whose findings are made up."""
    topology = Topology(0, ranks, 0, ranks, torch.device("cpu"), "none")
    board = Board(topology, torch.distributed.HashStore())
    return Case(load_config(QUICKSTART, settings), topology, board, Path(), "token")


def gpu(host: str, identity: str, **more: Any) -> dict[str, Any]:
    fields = dict(host=host, cores=8, memory=64 * GB, memory_limit="", gpu="NVIDIA H100", identity=identity,
                  gpu_memory=80 * GB, driver="570.1", used=0.0, capability=[9, 0])  # fmt: skip
    return {**fields, **more}


CPU_ONLY = dict(host="a", cores=8, memory=GB, memory_limit="", gpu=None, unused_gpu=False)


@pytest.mark.parametrize(
    ("ranks", "state", "words"),
    [
        ([gpu("a", "1"), gpu("b", "1")], OK, ""),
        ([gpu("a", "1"), gpu("a", "1")], FAILURE, "ranks 0, 1 share one GPU"),
        ([gpu("a", "1"), CPU_ONLY], FAILURE, "rank 1 see no GPU"),
        ([gpu("a", "1"), gpu("a", "2", driver="550.2")], WARNING, "550.2 on rank 1"),
        ([gpu("a", "1"), gpu("a", "2", gpu="NVIDIA A100")], WARNING, "slowest kind"),
        ([gpu("a", "1"), gpu("a", "2", used=8.0 * GB)], WARNING, "another process uses up to 8.0 GB"),
        ([gpu("a", "1", capability=[7, 0])], WARNING, "precision.compute=fp32"),
        ([{**CPU_ONLY, "unused_gpu": True}], WARNING, "torch sees none"),
        ([CPU_ONLY], OK, ""),
    ],
)
def test_devices(ranks, state, words):
    (row,) = machine.judge_devices(case_of(len(ranks)), dict(devices=dict(enumerate(ranks))))
    assert row.state == state and words in row.advice


def trial_of(peak: int = GB, available: int = 16 * GB, step_s: float = 1.0, **more: Any) -> dict[str, Any]:
    step = dict(step_s=step_s, loss=1.0, peak=peak, address_space=None, device="CPU")
    network = {"all ranks": dict(ranks=2, bytes_per_s=1e9, latency_s=1e-4)}
    return {**dict(available=available, limit="free", shm=GB, failed="", step=step, network=network), **more}


def states(rows: list[Any]) -> dict[str, str]:
    return {row.check: row.state for row in rows}


def test_ranks_of_a_host_share_its_memory():
    case = case_of(2)
    devices = {0: {**CPU_ONLY}, 1: {**CPU_ONLY}}
    one_host = dict(trial={0: trial_of(9 * GB), 1: trial_of(9 * GB)}, devices=devices)
    assert states(reached.judge_trial(case, one_host))["memory"] == FAILURE
    devices[1] = {**CPU_ONLY, "host": "b"}
    assert states(reached.judge_trial(case, one_host))["memory"] == OK
    tight = dict(one_host, trial={0: trial_of(15 * GB), 1: trial_of()})
    assert states(reached.judge_trial(case, tight))["memory"] == WARNING


def test_a_network_that_takes_most_of_a_step_is_told():
    case, slow = case_of(2), {"all ranks": dict(ranks=2, bytes_per_s=1e6, latency_s=0.1)}
    rows = reached.judge_trial(case, dict(trial={0: trial_of(), 1: trial_of(network=slow)}))
    told = {row.check: row for row in rows}["network, all ranks"]
    assert told.state == WARNING and "NCCL_SOCKET_IFNAME" in told.advice and "1.0 MB/s" in told.found


def test_who_failed_first_is_named_and_not_who_waited():
    failed = {0: "RuntimeError: Connection closed by peer [127.0.0.1]:4711", 1: "out of memory: the system killed it"}
    trials = {rank: dict(trial_of(failed=words), step=None) for rank, words in failed.items()}
    (row,) = [row for row in reached.judge_trial(case_of(2), dict(trial=trials)) if row.check == "trial step"]
    assert row.state == FAILURE and row.found == "rank 1: out of memory: the system killed it"
    assert "data.micro_batch below 64" in row.advice


@pytest.mark.parametrize(
    ("workers", "decodes", "state"),
    [(4, 40.0, OK), (4, 20.0, WARNING), (4, 10.0, FAILURE), (0, 2000.0, OK), (0, 200.0, WARNING), (0, 50.0, FAILURE)],
)
def test_decoding_against_what_steps_take(workers, decodes, state):
    # 128 images a second on one rank; with workers they must be made in that second, without in what is added to it
    finding = dict(epoch_images=1000, workers=workers, read_per_s=1e4, looked_at=100, image_bytes=1e4,
                   decode_per_s=decodes, damaged=0, example="", cache=None)  # fmt: skip
    rows = images.judge_images(case_of(1), dict(images={0: finding}, trial={0: trial_of()}))
    assert states(rows) == dict(reading=OK, decoding=state)


def test_damaged_images_and_a_full_cache_are_told():
    finding = dict(epoch_images=1000, workers=1, read_per_s=1e4, looked_at=1000, image_bytes=1e4, decode_per_s=1e4,
                   damaged=1, example="cat.png: broken", cache=dict(free=1.0 * GB, wanted=2.0 * GB))  # fmt: skip
    rows = images.judge_images(case_of(1), dict(images={0: finding}))
    assert states(rows) == {"reading": OK, "decoding": OK, "damaged images": WARNING, "data cache": WARNING}
    rows = images.judge_images(case_of(1), dict(images={0: dict(finding, damaged=20)}))
    assert states(rows)["damaged images"] == FAILURE


def test_numbers_that_would_fit_do():
    for batch, micro, ranks in ((36, 16, 1), (4096, 96, 8), (100, None, 8), (7, None, 2)):
        config = load_config(QUICKSTART, [f"data.global_batch={batch}", f"data.micro_batch={micro or 'null'}"])
        config.parallel.backend = "fsdp"
        assert arithmetic.batch(config, ranks).state == FAILURE
        assert (
            arithmetic.batch(trial_config(config, ranks), ranks).state == OK
        )  # of the trial that is taken all the same


def test_a_control_group_is_the_limit_where_it_leaves_less(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    assert memory.available_memory() == (None, "unknown")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable: 8000000 kB\n")
    assert memory.available_memory() == (8_000_000 * 1024, "the host's free memory")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    job = tmp_path / "groups" / "job"
    (job / "step").mkdir(parents=True)
    for folder, most in ((job, "4000000000"), (job / "step", "max")):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text("3000000000")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert memory.available_memory() == (1_500_000_000, "the memory limit of control group job")
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:memory:/slurm\n3:cpu:/\n")
    slurm = tmp_path / "groups" / "memory" / "slurm"
    slurm.mkdir(parents=True)
    (slurm / "memory.limit_in_bytes").write_text("2000000000")
    (slurm / "memory.usage_in_bytes").write_text("1900000000")
    (slurm / "memory.stat").write_text("total_inactive_file 0\n")
    assert memory.available_memory() == (100_000_000, "the memory limit of control group memory/slurm")


def test_ranks_in_words():
    assert [of_ranks(r) for r in ([3], [0, 1], [2, 0, 1], [1, 3, 4])] == ["rank 3", "ranks 0, 1", "ranks 0 to 2",
                                                                         "ranks 1, 3, 4"]  # fmt: skip
