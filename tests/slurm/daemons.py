"""A whole Slurm on one machine: munged, one controller and one node on loopback, in a folder of its own.

Needs root, Debian's slurm-wlm and munge, and no running Slurm, cgroups or accounting: processes are followed by their
parents (proctrack/linuxproc), and none is bound to a core (task/none). The node has two GPUs in name only.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from tests.conftest import SYSTEM_PATH, why_not

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
WHY_NOT = why_not("starting Slurm's daemons", NEEDED)  # empty where it can be done
CONFIGURATION = """\
ClusterName=lmim
SlurmctldHost={host}(127.0.0.1)
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
"""


class Slurm:
    """Starts the daemons in `folder`; `close` ends them and the jobs that are left."""

    def __init__(self, folder: Path, ports: tuple[int, int]):
        self.folder = folder
        self.environment = dict(os.environ, PATH=SYSTEM_PATH, SLURM_CONF=str(folder / "slurm.conf"))
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=socket.gethostname().split(".")[0], folder=folder, controller_port=ports[0],
                                 node_port=ports[1])
        )  # fmt: skip
        (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")  # any two devices; no GPU is opened
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemons: list[subprocess.Popen] = []
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                        f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log",
                        f"--pid-file={folder}/munge.pid")  # fmt: skip
            self._until(lambda: (folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            self._until(lambda: "idle" in self.command("sinfo", "--noheader", "--format=%T", check=False))
        except BaseException:
            self.close()
            raise

    def _start(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}.out").open("w")
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))

    def _until(self, holds, within_s: float = 30) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                told = "".join(f"{path.name}: {path.read_text()}" for path in self.folder.glob("*.[ol][uo]*"))
                raise RuntimeError(f"Slurm does not start: {told}")
            time.sleep(0.2)

    def command(self, *words: str, check: bool = True, **options) -> str:
        """Run one of Slurm's commands and return what it prints."""
        options = dict(env=self.environment, timeout=30) | options
        done = subprocess.run(words, capture_output=True, text=True, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of a job, such as JobState and Restarts."""
        words = self.command("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def close(self) -> None:
        if len(self._daemons) == 3:
            self.command("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.command("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
