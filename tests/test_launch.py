"""What launch scripts start, read from their dry runs and held against lmim's own parsers; their Kubernetes files."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lmim.__main__ import _parser
from lmim.config import load_config, validate
from lmim.dist import Topology, discover
from lmim.options import Config
from lmim.train import DONE, STOPPED
from tests.conftest import REPOSITORY, free_port, process_environment

LAUNCH = REPOSITORY / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), *sorted((REPOSITORY / "docker").glob("*.sh")), LAUNCH / "slurm.sbatch",
         REPOSITORY / "tests/run.sh", REPOSITORY / ".ci/run"]  # fmt: skip
SETTINGS = ["configs/quickstart.yaml", "run.name=two words", "optim.betas=[0.9,0.95]", "data.train=a;b"]
MISTAKE = 2
KUBERNETES = "1.34"  # the oldest that is still supported, and whose Job has all that is used here as stable
PODS = ("job.yaml", "pytorchjob.yaml")


def dry_run(script: str, *words: str, **environment: str) -> list[str]:
    """Return the command that a script would run, its last line; on one rank, unless GPUS says otherwise."""
    clean = {name: value for name, value in process_environment().items() if not name.startswith(("SLURM_", "PET_"))}
    clean |= {"GPUS": "1"} | environment
    done = subprocess.run(["bash", f"launch/{script}", "--dry-run", *words], cwd=REPOSITORY, env=clean,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def trained(words: list[str]) -> Config:
    """Return the configuration that the words behind `lmim` stand for, by lmim's own parser."""
    parsed = _parser().parse_args(words)
    assert parsed.run.__name__ == "_train"
    return load_config(REPOSITORY / parsed.config, parsed.overrides)


def torchrun_arguments(command: list[str]) -> Namespace:
    """Return what torchrun reads from the command of launch/torchrun.sh."""
    from torch.distributed.run import parse_args

    assert command[:2] == ["python", "launch/torchrun.py"]
    return parse_args(command[2:])


def deepspeed_arguments(command: list[str]) -> Namespace:
    from deepspeed.launcher.runner import parse_args

    assert command[0] == "deepspeed"
    return parse_args(command[1:])


def topology_under(monkeypatch, **environment: str) -> Topology:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return discover()


# --- every script ----------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/sh\nrm $1\n")
    command = [Path(sys.executable).parent / "shellcheck", "--external-sources", "--severity=style"]
    done, control = (subprocess.run([*command, *files], cwd=REPOSITORY, capture_output=True, text=True)
                     for files in (SHELL, [tmp_path / "bad.sh"]))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SC2086" in control.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_all_end_in_the_same_command(script):
    command = dry_run(script, *SETTINGS)
    program, *words = command[-len(SETTINGS) - 2 :]
    assert program == "lmim" and words == ["train", *SETTINGS]
    config = trained(words)
    assert config.run.name == "two words" and config.optim.betas == [0.9, 0.95] and config.data.train == "a;b"


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "slurm.sbatch"])
def test_without_a_configuration_a_script_tells_its_usage(script):
    done = subprocess.run(["bash", str(LAUNCH / script)], env=process_environment(), capture_output=True, text=True)
    assert done.returncode == MISTAKE and done.stderr.startswith("usage: ") and not done.stdout


def test_defaults_give_way_to_what_is_set_outside(tmp_path):
    def after(**environment: str) -> dict[str, str]:
        clean = {name: value for name, value in process_environment().items()
                 if not name.startswith(("NCCL", "GLOO", "OMP", "FI_"))}  # fmt: skip
        printed = subprocess.run(["bash", "-euc", "set -o pipefail; . launch/env.sh; env -0"], cwd=REPOSITORY,
                                 env=clean | environment, capture_output=True, text=True, check=True)  # fmt: skip
        return dict(line.split("=", 1) for line in printed.stdout.split("\0") if "=" in line)

    cores = len(os.sched_getaffinity(0))
    alone = after(GPUS="1")
    assert alone["NCCL_DEBUG"] == "WARN" and alone["OMP_NUM_THREADS"] == str(cores)
    assert "GLOO_SOCKET_IFNAME" not in alone
    assert after(GPUS=str(4 * cores))["OMP_NUM_THREADS"] == "1"
    chosen = dict(NCCL_DEBUG="INFO", OMP_NUM_THREADS="3", GLOO_SOCKET_IFNAME="", NCCL_SOCKET_IFNAME="ib0")
    several = after(NODES="2", GPUS="1", **chosen)
    assert {name: several[name] for name in chosen} == chosen
    bin_folder = tmp_path / "env" / "bin"
    bin_folder.mkdir(parents=True)
    assert after(GPUS="1", VENV=str(tmp_path / "env"))["PATH"].startswith(f"{bin_folder}:")


# --- each launcher ---------------------------------------------------------------------------------------------------


def test_torchrun_on_one_machine_and_on_several():
    counted = torchrun_arguments(dry_run("torchrun.sh", *SETTINGS, GPUS=""))
    assert counted.nproc_per_node == "1"  # tests hide all GPUs
    alone = torchrun_arguments(dry_run("torchrun.sh", *SETTINGS, GPUS="4"))
    assert (alone.nnodes, alone.nproc_per_node, alone.master_addr) == ("1", "4", "127.0.0.1")
    assert 20_000 <= int(alone.master_port) < 32_000 and alone.module and alone.training_script == "lmim"
    third = dry_run("torchrun.sh", *SETTINGS, GPUS="8", NODES="4", SLURM_NODEID="2", MASTER_ADDR="a", MASTER_PORT="29")
    third = torchrun_arguments(third)
    assert (third.nnodes, third.nproc_per_node, int(third.node_rank)) == ("4", "8", 2)
    assert (third.master_addr, int(third.master_port)) == ("a", 29)
    assert third.training_script_args == ["train", *SETTINGS]


def test_deepspeed_on_this_machine():
    chosen = deepspeed_arguments(dry_run("deepspeed.sh", *SETTINGS, GPUS="4"))
    assert chosen.num_gpus == 4 and chosen.module and chosen.user_script == "lmim"
    by_devices = deepspeed_arguments(dry_run("deepspeed.sh", *SETTINGS, GPUS="", CUDA_VISIBLE_DEVICES="2,3"))
    assert by_devices.num_gpus == -1  # else the launcher leaves CUDA_VISIBLE_DEVICES aside


@pytest.mark.parametrize("runner", ["pdsh", "openmpi", "slurm"])
def test_deepspeed_over_hosts(runner, monkeypatch):
    """Held against the command that the launcher's own runner makes of ours."""
    from deepspeed.launcher import multinode_runner
    from deepspeed.launcher import runner as launcher

    secrets = dict(WANDB_API_KEY="planted", WANDB_MODE="offline", NCCL_DEBUG="INFO")
    command = dry_run("deepspeed.sh", *SETTINGS, RUNNER=runner, HOSTFILE="launch/hostfile.example",
                      RUNNER_ARGS="--extra 1", **secrets)  # fmt: skip
    parsed = deepspeed_arguments(command)
    hosts = launcher.fetch_hostfile(str(REPOSITORY / parsed.hostfile))
    assert hosts == {"gpu-01": 8, "gpu-02": 8} and parsed.force_multi and parsed.master_addr == "gpu-01"
    world = launcher.encode_world_info({host: list(range(slots)) for host, slots in hosts.items()})
    active = {host: list(range(slots)) for host, slots in hosts.items()}
    if runner == "pdsh":
        made, *_ = multinode_runner.PDSHRunner(parsed, world).get_cmd(dict(os.environ), active)
        assert "--module" in made and "gpu-01,gpu-02" in made
    elif runner == "openmpi":
        made = multinode_runner.OpenMPIRunner(parsed, world, hosts).get_cmd(dict(os.environ), active)
        assert made[0] == "mpirun" and made[made.index("-n") + 1] == "16"
        told = {word.partition("=")[0] for word in made if word.startswith("MASTER_")}
        assert told == {"MASTER_ADDR", "MASTER_PORT"}  # `dist.init` asks for both
        topology = topology_under(monkeypatch, OMPI_COMM_WORLD_RANK="9", OMPI_COMM_WORLD_SIZE="16",
                                  OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="8")  # fmt: skip
        assert (topology.rank, topology.world_size, topology.local_world_size) == (9, 16, 8)
    else:
        made = multinode_runner.SlurmRunner(parsed, world, hosts).get_cmd(dict(os.environ), active)
        assert made[0] == "srun" and made[made.index("-n") + 1] == "16" and "--kill-on-bad-exit=0" in made
        assert Path(parsed.user_script).name == "lmim" and "python" in Path(parsed.user_script).read_text()[:200]
    assert "--extra" in made
    if runner != "pdsh":
        assert made[-len(SETTINGS) - 1 :] == ["train", *SETTINGS]


def test_deepspeed_hands_on_no_secret():
    words = ["bash", "launch/deepspeed.sh", "--dry-run", *SETTINGS]
    environment = dict(WANDB_API_KEY="planted", AWS_SECRET_ACCESS_KEY="planted", HF_TOKEN="planted",
                       WANDB_MODE="offline", NCCL_DEBUG="INFO", HOSTFILE="launch/hostfile.example")  # fmt: skip
    told = subprocess.run(words, cwd=REPOSITORY, env=process_environment() | environment, capture_output=True,
                          text=True, check=True).stdout  # fmt: skip
    assert "planted" not in told and "# WANDB_MODE=offline" in told and "# NCCL_DEBUG=INFO" in told
    assert "# OMP_NUM_THREADS=" in told


def slurm_job(tmp_path: Path, **environment: str) -> list[str]:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'gpu03\\ngpu04\\n'\n")
    scontrol.chmod(0o755)
    path = f"{tmp_path}:{process_environment()['PATH']}"
    return dry_run("slurm.sbatch", *SETTINGS, PATH=path, SLURM_SUBMIT_DIR=str(REPOSITORY), SLURM_JOB_ID="7",
                   SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="8", SLURM_JOB_NODELIST="gpu[03-04]",
                   SLURM_CPUS_PER_TASK="12", **environment)  # fmt: skip


def test_slurm_with_one_task_a_gpu(tmp_path, monkeypatch):
    command = slurm_job(tmp_path, SLURM_NTASKS_PER_NODE="8", SRUN_ARGS="--container-image=a --export=ALL")
    assert command[0] == "srun" and "--kill-on-bad-exit=0" in command and "--cpus-per-task=12" in command
    assert "--container-image=a" in command
    # no shell stands between Slurm and a rank: it would die of the signal
    assert command[command.index("python") :] == ["python", "-m", "lmim", "train", *SETTINGS]
    topology = topology_under(monkeypatch, SLURM_STEP_ID="0", SLURM_PROCID="9", SLURM_NTASKS="16", SLURM_LOCALID="1",
                              SLURM_NTASKS_PER_NODE="8")  # fmt: skip
    assert (topology.launcher, topology.rank, topology.world_size) == ("slurm", 9, 16)
    assert (topology.local_rank, topology.local_world_size) == (1, 8)


def test_slurm_with_one_task_a_node(tmp_path):
    command = slurm_job(tmp_path, SLURM_NTASKS_PER_NODE="1")
    assert command[-len(SETTINGS) - 2 :] == ["bash", "launch/torchrun.sh", *SETTINGS]


def test_slurm_asks_for_the_signal_and_the_queue():
    asked = [line.removeprefix("#SBATCH ") for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
             if line.startswith("#SBATCH ")]  # fmt: skip
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(asked)
    script = (LAUNCH / "slurm.sbatch").read_text()
    assert f'"$code" = {STOPPED} ' in script and f'"$code" = {128 + signal.SIGUSR1} ' in script


# --- exit codes of launch/torchrun.py ------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize("code", [DONE, 1, MISTAKE, STOPPED, 128 + 9])
def test_a_rank_s_exit_code_is_torchrun_s(tmp_path, code):
    program = tmp_path / "rank.py"
    ending = f"os.kill(os.getpid(), {code - 128})" if code > 128 else f"raise SystemExit({code})"
    program.write_text(f"import os\n{ending}\n")
    words = ["--nproc-per-node", "1", "--master-port", str(free_port()), str(program)]
    assert subprocess.run([sys.executable, "launch/torchrun.py", *words], cwd=REPOSITORY).returncode == code


@pytest.mark.launch
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_reach_every_rank_and_none_is_hurried(tmp_path, number):
    """Two ranks take a while to end after the signal, and are let."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, signal, sys, time, pathlib\n"
        f"here = pathlib.Path({str(tmp_path)!r}, os.environ['RANK'])\n"
        "def saved(number, frame):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # sent when the first rank has ended
        "    time.sleep(2)\n"
        "    here.with_suffix('.saved').write_text(signal.Signals(number).name)\n"
        f"    sys.exit({STOPPED})\n"
        f"signal.signal(signal.{number}, saved)\n"
        "here.with_suffix('.ready').touch()\n"
        "time.sleep(60)\n"
    )
    words = ["--nproc-per-node", "2", "--master-port", str(free_port()), str(program)]
    process = subprocess.Popen([sys.executable, "launch/torchrun.py", *words], cwd=REPOSITORY)
    try:
        _until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        process.send_signal(getattr(signal, number))
        assert process.wait(timeout=30) == STOPPED
    finally:
        process.kill()
    assert sorted(path.read_text() for path in tmp_path.glob("*.saved")) == [number] * 2


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def documents(file: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "k8s" / file).read_text()))


def one(file: str, kind: str) -> dict:
    (found,) = (document for document in documents(file) if document["kind"] == kind)
    return found


def pod_of(file: str) -> dict:
    if file == "job.yaml":
        return one(file, "Job")["spec"]["template"]["spec"]
    return one(file, "PyTorchJob")["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]


@pytest.mark.parametrize("version", [KUBERNETES, "1.37"])
def test_files_are_valid_kubernetes(version):
    import kubernetes_validate

    checked = 0
    for path in sorted((LAUNCH / "k8s").glob("*.yaml")):
        for document in documents(path.name):
            if document["kind"] == "PyTorchJob":  # a resource of its own: its pods are the part that is Kubernetes'
                specs = document["spec"]["pytorchReplicaSpecs"].values()
                metadata = {"metadata": {"name": "pod"}}
                pods = [dict(apiVersion="v1", kind="Pod", **metadata, spec=of["template"]["spec"]) for of in specs]
            else:
                pods = [document]
            for pod in pods:
                kubernetes_validate.validate(pod, version, strict=True)
                checked += 1
    assert checked == 6


def test_a_wrong_field_is_found():
    import kubernetes_validate

    job = one("job.yaml", "Job")
    job["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize("file", PODS)
def test_pods_have_what_training_needs(file):
    pod = pod_of(file)
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["shared-memory"]["mountPath"] == "/dev/shm"
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    claims = {of["persistentVolumeClaim"]["claimName"] for of in volumes.values() if "persistentVolumeClaim" in of}
    assert claims <= {document["metadata"]["name"] for document in documents("storage.yaml")}
    (secret,) = (source["secretRef"]["name"] for source in container["envFrom"])
    assert f"create secret generic {secret} " in (LAUNCH / "k8s" / file).read_text()
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert pod["terminationGracePeriodSeconds"] > 30  # Kubernetes' own
    gpus = int(next(item["value"] for item in container["env"] if item["name"] == "GPUS"))
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    # the configuration is one that lmim takes for so many ranks, and its folders are volumes
    config = trained(["train", *container["args"]])
    validate(config, 2 * gpus)
    folders = [mount["mountPath"] for mount in mounts.values()]
    for place in (config.run.folder, config.data.train, config.data.eval, config.data.cache):
        assert not place or place.startswith("s3://") or any(place.startswith(folder) for folder in folders), place


def test_indexed_job_is_what_torchrun_sh_reads():
    job, service = one("job.yaml", "Job"), one("job.yaml", "Service")
    spec, pod = job["spec"], pod_of("job.yaml")
    (container,) = pod["containers"]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    name, subdomain = environment["MASTER_ADDR"].split(".")
    assert name == f"{job['metadata']['name']}-0"  # the host name of an Indexed Job's first pod
    assert subdomain == pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert container["ports"][0]["containerPort"] == int(environment["MASTER_PORT"])
    assert container["command"] == ["bash", "launch/torchrun.sh"]
    given = {name: value for name, value in environment.items() if value is not None} | {"NODE_RANK": "1"}
    assert set(environment) == {"NODES", "GPUS", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOME"}
    started = torchrun_arguments(dry_run("torchrun.sh", *container["args"], **given))
    assert (int(started.nnodes), int(started.node_rank)) == (spec["completions"], 1)
    assert (started.master_addr, started.master_port) == (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))


def test_indexed_job_reads_lmim_s_exit_codes():
    spec = one("job.yaml", "Job")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    by_code = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == container["name"] and codes["operator"] == "In"
            by_code |= dict.fromkeys(codes["values"], rule["action"])
    assert by_code == {STOPPED: "Ignore", MISTAKE: "FailJob"}  # a 1 counts towards backoffLimit
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimit"] > 2 * spec["completions"]


def test_pytorchjob_is_what_the_operator_reads():
    job = one("pytorchjob.yaml", "PyTorchJob")
    assert job["apiVersion"] == "kubeflow.org/v1" and set(job["spec"]) == {
        "nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}  # fmt: skip
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert replica["restartPolicy"] == "ExitCode"
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch" and container["ports"][0]["name"] == "pytorchjob-port"
        assert job["spec"]["nprocPerNode"] == container["env"][0]["value"]


@pytest.fixture
def pod_folder(tmp_path) -> Path:
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "torchrun.sh", tmp_path / "launch" / "torchrun.sh")
    return tmp_path


@pytest.mark.parametrize(("code", "told"), [(DONE, 0), (MISTAKE, 2), (STOPPED, 203), (1, 129), (137, 137)])
def test_pytorchjob_s_shell_makes_codes_that_the_operator_reads(pod_folder, code, told):
    """Below 128 is for good, from 128 on is tried again (`restartPolicy: ExitCode`)."""
    (pod_folder / "launch" / "torchrun.sh").write_text(
        f'[ "$NODES $NODE_RANK $1 $2" = "2 1 configs/a.yaml run.name=a b" ] || exit 99\nexit {code}\n'
    )
    (container,) = pod_of("pytorchjob.yaml")["containers"]
    words = [*container["command"], "configs/a.yaml", "run.name=a b"]
    environment = process_environment() | {"PET_NNODES": "2", "PET_NODE_RANK": "1"}
    assert subprocess.run(words, cwd=pod_folder, env=environment).returncode == told


def test_pytorchjob_s_shell_hands_sigterm_on_and_waits(pod_folder):
    (pod_folder / "launch" / "torchrun.sh").write_text(
        f"trap 'sleep 1; touch saved; exit {STOPPED}' TERM; touch ready; while true; do sleep 0.1; done\n"
    )
    (container,) = pod_of("pytorchjob.yaml")["containers"]
    environment = process_environment() | {"PET_NNODES": "2", "PET_NODE_RANK": "1"}
    process = subprocess.Popen(container["command"], cwd=pod_folder, env=environment)
    try:
        _until((pod_folder / "ready").exists)
        process.terminate()
        assert process.wait(timeout=30) == 128 + STOPPED and (pod_folder / "saved").exists()
    finally:
        process.kill()
