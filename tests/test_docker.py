"""The images' files, without building them: linters, what compose.yaml tells lmim and torchrun, pins, no secrets.

tests/docker builds the images for real (-m docker).
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.distributed.run import get_args_parser

from lmim.config import load_config
from tests.conftest import REPOSITORY

DOCKER = REPOSITORY / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"]
SCRIPTS = [DOCKER / "entrypoint.sh", DOCKER / "healthy.sh"]
SECRET_NAME = r"\w*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)\w*"


def lint(program: str, *words: object) -> str:
    """Return what a linter of the test environment finds."""
    path = Path(sys.executable).parent / program
    done = subprocess.run([path, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr if done.returncode else done.stdout


def test_hadolint_finds_nothing(tmp_path):
    assert lint("hadolint", "--no-color", *DOCKERFILES) == ""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo ls\n")
    assert "DL3004" in lint("hadolint", "--no-color", tmp_path / "Dockerfile")


def test_both_images_are_made_alike_up_to_what_gpus_need():
    shared = [path.read_text().partition("FROM ${BASE_IMAGE}")[2].partition(" AS lmim\n") for path in DOCKERFILES]
    assert shared[0][0] == shared[1][0] != ""
    on_gpus, on_cpus = (last.replace("for NVIDIA GPUs", "for CPUs") for _, _, last in shared)
    assert on_gpus.endswith(on_cpus)
    assert "g++" in on_gpus.removesuffix(on_cpus)


def secrets(text: str) -> list[str]:
    """Return the build arguments and variables of a Dockerfile whose names are those of secrets."""
    names = re.findall(r"^\s*ARG\s+(\w+)", text, re.M)
    for words in re.findall(r"^\s*ENV\s+((?:.*\\\n)*.*)", text, re.M):
        names += re.findall(r"(\w+)=", words) or words.split()[:1]
    return [name for name in names if re.fullmatch(SECRET_NAME, name, re.I)]


@pytest.mark.parametrize(
    "text", ["ARG WANDB_API_KEY", "ENV A=1 HF_TOKEN=x", "ENV A=1 \\\n  db_password=x", "ENV HF_TOKEN x"]
)
def test_a_secret_in_a_dockerfile_is_seen(text):
    assert len(secrets(text)) == 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_secret_is_built_in(path):
    text = path.read_text()
    assert secrets(text) == []
    assert "ENV " in text and "ARG " in text
    assert re.findall(r"\n(?:USER) (.*)", text)[-1] == "1000:1000"


def pins() -> dict[str, str]:
    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_every_requirement_is_pinned_to_a_release_that_satisfies_it():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(REPOSITORY / "setup.cfg")
    done = subprocess.run([sys.executable, DOCKER / "requirements.py", "report", "remote"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=True)  # fmt: skip
    requirements = [Requirement(line) for line in done.stdout.splitlines()]
    expected = [setup["options"]["install_requires"]]
    expected += [setup["options.extras_require"][extra] for extra in ("report", "remote")]
    assert [str(r) for r in requirements] == [str(Requirement(x)) for x in "".join(expected).split("\n") if x]
    pinned = pins()
    for requirement in requirements:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_are_valid(path, tmp_path):
    check = ["--builtin-schema", "vendor.compose-spec"]
    assert "ok" in lint("check-jsonschema", *check, path)
    (tmp_path / "bad.yaml").write_text(path.read_text().replace("services:", "servces:"))
    assert "servces" in lint("check-jsonschema", *check, tmp_path / "bad.yaml")


def compose() -> dict:
    """Return compose.yaml, its ${VARIABLE:-default}s at their defaults."""
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE[0].read_text()))


def nodes() -> dict[str, dict]:
    return {name: service for name, service in compose()["services"].items() if name != "shards"}


def test_the_containers_words_are_a_run_that_lmim_reads(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    made = compose()["services"]["shards"]["command"]
    assert (REPOSITORY / made[0]).exists()
    for service in nodes().values():
        command, config, *settings = service["command"]
        assert command == "train"
        read = load_config(config, settings)
        assert [read.data.train, read.data.eval] == [f"{made[2]}/train", f"{made[2]}/eval"]
        # data/ and runs/ lead to the volumes
        assert made[2].startswith("data/") and read.run.folder.startswith("runs/")
        assert {volume.split(":")[1] for volume in service["volumes"]} == {"/data", "/runs"}


def test_the_containers_variables_are_those_that_torchrun_reads(monkeypatch):
    found = []
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    before = vars(get_args_parser().parse_args(["script"]))
    for service in nodes().values():
        variables = {k: v for k, v in service["environment"].items() if k.startswith("PET_")}
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            read = vars(get_args_parser().parse_args(["script"]))
        assert all(str(read[name.removeprefix("PET_").lower()]) == value for name, value in variables.items())
        changed = {name for name in read if read[name] != before[name]}
        assert {"nnodes", "master_addr"} <= changed
        found.append(read)
    assert [int(read["nnodes"]) for read in found] == [len(found)] * len(found) == [2, 2]
    assert sorted(int(read["node_rank"]) for read in found) == [0, 1]
    assert {(read["master_addr"], str(read["master_port"])) for read in found} == {("node-0", "29500")}
    assert nodes()["node-0"]["environment"]["PET_NODE_RANK"] == "0"  # the meeting point is the first node


def test_compose_passes_secrets_on_and_holds_none():
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not (re.fullmatch(SECRET_NAME, name) and value), f"{name} has a value"
    assert "WANDB_API_KEY" in nodes()["node-0"]["environment"]


@pytest.mark.parametrize(
    ("ranks", "started"),
    [(None, "lmim|train|a b"), ("", "lmim|train|a b"), ("2", "torchrun|--module|lmim|train|a b")],
)
def test_the_entry_point_ends_in_lmim(tmp_path, ranks, started):
    for name in ("lmim", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf %s "$(basename "$0")"; printf "|%s" "$@"; exit 75\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | ({} if ranks is None else {"PET_NPROC_PER_NODE": ranks})
    done = subprocess.run([SCRIPTS[0], "train", "a b"], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (started, 75)


def test_health_is_that_something_is_written(tmp_path):
    def healthy(minutes: str) -> bool:
        environment = {"PATH": os.environ["PATH"], "LMIM_RUNS": str(tmp_path), "LMIM_SILENCE_MINUTES": minutes}
        done = subprocess.run([SCRIPTS[1]], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == (done.stdout == ""), done.stdout
        return done.returncode == 0

    assert not healthy("5")
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    log.touch()
    assert healthy("5")
    os.utime(log, (time.time() - 600, time.time() - 600))
    assert not healthy("5")
    assert healthy("15")


def test_what_is_copied_is_not_ignored_and_nothing_else_is_sent():
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for words in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILES[0].read_text(), re.M):
        copied |= {word.split("/")[0] for word in words.split()}
    assert copied == sent
    assert all((REPOSITORY / name).exists() for name in sent)
