"""Whoever is gone is named by all who are left, and nobody is who is not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lmim.heartbeat import Heartbeat
from tests.conftest import REPOSITORY, free_port, process_environment

LIMIT_S = 6.0  # of silence; half the time limit of collectives
PROGRAM = f"""
import sys, time, torch
from pathlib import Path
from lmim import dist

todo, ready = sys.argv[1], Path(sys.argv[2])
topology = dist.discover()
ready.with_suffix(".imported").write_text("")  # on a busy machine that may take one longer than the limit below
while len(list(ready.parent.glob("*.imported"))) < topology.world_size:
    time.sleep(0.05)
dist.init(topology, 2 * {LIMIT_S} / 60)
try:
    dist.barrier()
    ready.write_text("")
    until = time.monotonic() + 30
    while todo == "reduce" and time.monotonic() < until:
        dist.barrier()
        time.sleep(0.05)
    if todo == "raise":
        raise ValueError("no such luck")
    if todo == "work":  # alone, and in Python, for longer than a failed collective would be given
        until = time.monotonic() + {LIMIT_S}
        while time.monotonic() < until:
            sum(range(10000))
except Exception as error:
    dist.fail(error)
    raise
finally:
    dist.shutdown()
"""


def start(tmp_path: Path, todos: list[str]) -> list[subprocess.Popen]:
    """Start a process a rank and wait until all have met."""
    shared = dict(process_environment(), WORLD_SIZE=str(len(todos)), LOCAL_WORLD_SIZE=str(len(todos)),
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")  # fmt: skip
    (tmp_path / "program.py").write_text(PROGRAM)
    processes = []
    for rank, todo in enumerate(todos):
        command = [sys.executable, str(tmp_path / "program.py"), todo, str(tmp_path / f"ready{rank}")]
        environment = dict(shared, RANK=str(rank), LOCAL_RANK=str(rank), PYTHONPATH=str(REPOSITORY))
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(len(todos))):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    return processes


def end(process: subprocess.Popen, within_s: float) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, errors


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_named_by_the_others(tmp_path, lost, how):
    processes = start(tmp_path, ["reduce"] * 3)
    os.kill(processes[lost].pid, how)
    try:
        for rank, process in enumerate(processes):
            if rank != lost:
                code, errors = end(process, within_s=5 * LIMIT_S)
                assert code == 1
                assert re.search(rf"rank {lost} on {socket.gethostname()} is (lost|silent)", errors), errors
    finally:
        processes[lost].kill()
        processes[lost].communicate()


@pytest.mark.parametrize("caller", [0, 3])
def test_who_holds_the_store_waits_until_all_have_heard(monkeypatch, caller):
    """Rank 1 is silent and rank 2 slow; rank 0, with the store, or rank 3 finds out."""
    ended, heard = {}, []

    def end_process(heartbeat: Heartbeat, words: str) -> None:
        if heartbeat.rank == 0:
            heard.append(held.check(["heard/2", "heard/3"]))
        ended[heartbeat.rank] = words
        heartbeat._stop.set()
        raise RuntimeError("ended")

    monkeypatch.setattr(Heartbeat, "_end_process", end_process)
    held = torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True)
    for name, value in {f"host/{rank}": f"host-{rank}" for rank in range(4)}.items():
        held.set(name, value)
    held.set("sign/1", "0")  # no other will come
    ranks = {rank: Heartbeat(held.clone(), rank, 4, f"host-{rank}", limit_s=8, progress_limit_s=600)
             for rank in (0, 2, 3)}  # fmt: skip
    for heartbeat in ranks.values():
        heartbeat.limit_s = 600  # nobody else finds out by itself
    ranks[2].interval_s = 0.75 * ranks[2].grace_s  # a slow one, and no longer than that is a rank silent
    try:
        while ranks[0].silent(ranks[0].grace_s) != [1]:
            time.sleep(0.05)
        sign = held.get("sign/2")
        while held.get("sign/2") == sign:
            time.sleep(0.01)  # it has just looked for a verdict
        with pytest.raises(RuntimeError, match="ended"):
            ranks[caller].end("rank 1 on host-1 is lost")
        until = time.monotonic() + 30
        while len(ended) < 3:
            assert time.monotonic() < until, ended
            time.sleep(0.05)
    finally:
        for heartbeat in ranks.values():
            heartbeat._stop.set()
    assert ended == dict.fromkeys([0, 2, 3], "rank 1 on host-1 is lost")
    assert all(heard), "the store went before all had heard"


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_error(tmp_path):
    processes = start(tmp_path, ["reduce", "raise", "reduce"])
    codes_and_errors = [end(process, within_s=5 * LIMIT_S) for process in processes]
    assert [code for code, _ in codes_and_errors] == [1, 1, 1]
    for rank in (0, 2):
        assert f"rank 1 on {socket.gethostname()} is at an end: no such luck" in codes_and_errors[rank][1]
    assert "ValueError: no such luck" in codes_and_errors[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("early", [0, 1])
def test_who_left_in_order_or_is_busy_is_not_lost(tmp_path, early):
    todos = ["work"] * 3
    todos[early] = "leave"
    for process in start(tmp_path, todos):
        code, errors = end(process, within_s=5 * LIMIT_S)
        assert code == 0, errors
