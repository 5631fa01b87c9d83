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
from lmim.doctor import visit
from lmim.doctor.rows import FAILURE, OK, WARNING
from tests.conftest import REPOSITORY, free_port, process_environment
from tests.servers import serving

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
GB = 10**9


def rows_of(output: str) -> dict[str, dict[str, Any]]:
    """Return the rows of the JSON object in the last line, by check; a check's last row counts."""
    told = json.loads(output.strip().splitlines()[-1])
    assert told["failures"] == sum(row["state"] == FAILURE for row in told["rows"])
    assert told["ok"] == (told["failures"] == 0)
    return {row["check"]: row for row in told["rows"]}


def visit_alone(*settings: str, limit: int = 0) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Run a visit by one process and return its exit code, its rows and all it printed; `limit`: bytes of addresses."""
    command = [sys.executable, "-m", "lmim", "doctor", QUICKSTART, "parallel.backend=local", *settings]
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(process_environment(), OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=280,
                          preexec_fn=lambda: limit and resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))  # fmt: skip
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


def test_a_shard_host_that_answers_slowly(shards, tmp_path):
    with serving(shards / "train") as server:
        slow = {path.name: "slow" for path in (shards / "train").glob("*.tar")}  # 1.2 s for every range
        server.always = slow
        code, rows, output = visit_alone(f"run.folder={tmp_path}/run", f"data.train={server.url}", "data.eval=",
                                         "data.global_batch=32", "model.depth=1", "model.projector_dim=64")  # fmt: skip
    assert rows["reading"]["state"] in (WARNING, FAILURE), output
    assert f"{server.url} is slow" in rows["reading"]["advice"] and "data.cache" in rows["reading"]["advice"]
    assert rows["reading"]["figures"]["read_images_per_s"] < rows["reading"]["figures"]["needed_images_per_s"]
    assert rows["trial step"]["state"] == OK and rows["schedule"]["figures"]["epoch_images"] == 300
    assert code == any(row["state"] == FAILURE for row in rows.values())


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


def test_a_clock_off_by_a_minute():
    codes, rows = visit_of_two("clock")
    assert codes == [1, 1]
    row = rows["clocks"]
    assert row["state"] == FAILURE and "rank 1 is 6" in row["found"] and "behind rank 0" in row["found"]
    assert row["figures"]["skew_s"] == pytest.approx(-61, abs=1.5)
    assert "NTP" in row["advice"] and rows["versions"]["state"] == OK


def test_a_batch_that_does_not_divide(tmp_path):
    code, rows, output = visit_alone(f"run.folder={tmp_path}/run", "data.global_batch=36", "data.micro_batch=16")
    assert code == 1
    row = rows["batch"]
    assert row["state"] == FAILURE and "data.global_batch (36)" in row["found"]
    assert "nearest are 32 and 48" in row["found"] and "data.micro_batch=4, 6, 9, 12, 18, 36 fit 36" in row["advice"]
    others = {name: row["state"] for name, row in rows.items() if name != "batch"}
    assert set(others.values()) <= {OK, WARNING} and others["trial step"] == OK, output


def test_too_little_memory(tmp_path):
    # 60,000 crops of 35 px: their patches alone are 0.6 GB, and what the backward needs would be 20 GB
    code, rows, output = visit_alone(f"run.folder={tmp_path}/run", "data.global_batch=60000", limit=6 * GB)
    assert code == 1
    row = rows["trial step"]
    assert row["state"] == FAILURE and "rank 0" in row["found"] and "memory" in row["found"], output
    assert "data.micro_batch below 60000" in row["advice"]
    assert rows["reading"]["state"] == OK and rows["disk space"]["state"] == OK


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
    # the first rank's own look was well: the row of versions comes last, and the failure before it
    assert rows["versions"]["state"] in (OK, FAILURE)


def test_mistakes_in_the_configuration_end_at_once(capsys):
    assert main(["doctor", QUICKSTART, "optim.base_lr=-1"]) == 2
    assert "optim.base_lr (-1.0) must be above 0" in capsys.readouterr().err
