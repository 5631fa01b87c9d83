"""Two hosts on one machine: network namespaces with an address, a host name and an sshd each, linked by a cable (veth).

Their interfaces are both named eth0, as on hosts that are alike. Needs root. What is started on a host shares the file
system with the other, as a cluster's nodes do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.conftest import SYSTEM_PATH, why_not

NEEDED = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
WHY_NOT = why_not("making network namespaces", NEEDED)  # empty where it can be done
NAMES = ("host-a", "host-b")
ADDRESSES = dict(zip(NAMES, ("10.77.0.1", "10.77.0.2"), strict=True))


class Hosts:
    """Makes both hosts in `folder`, which then also holds ssh's configuration; `close` removes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.namespaces = {name: f"lmim-{os.getpid()}-{name[-1]}" for name in NAMES}
        for left_over in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split():
            pid = left_over.removeprefix("lmim-").split("-")[0]
            if left_over.startswith("lmim-") and not Path(f"/proc/{pid}").exists():
                _remove(left_over)
        try:
            self._link()
            self._start_sshd()
        except BaseException:
            self.close()
            raise

    def _link(self) -> None:
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        for namespace in self.namespaces.values():
            _run("ip", "netns", "add", namespace)
            own_files = Path("/etc/netns", namespace)  # `ip netns exec` lays them over those in /etc
            own_files.mkdir(parents=True, exist_ok=True)
            (own_files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        a, b = self.namespaces.values()
        _run("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, namespace in self.namespaces.items():
            _run("ip", "-n", namespace, "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", namespace, "link", "set", device, "up")

    def _start_sshd(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        key, host_key = self.folder / "key", self.folder / "host_key"
        for file in (key, host_key):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file))
        self.ssh_config = self.folder / "ssh_config"
        self.ssh_config.write_text(
            f"IdentityFile {key}\nUserKnownHostsFile {self.folder}/known_hosts\nStrictHostKeyChecking no\n"
            "LogLevel ERROR\n"
        )
        server = self.folder / "sshd_config"
        server.write_text(
            f"HostKey {host_key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nPermitRootLogin yes\nUsePAM no\n"
            "PidFile none\n"
        )
        for name in NAMES:
            self.start(name, [shutil.which("sshd", path=SYSTEM_PATH), "-f", str(server)]).wait()

    def start(self, name: str, command: list[str], **options) -> subprocess.Popen:
        """Start a command on a host."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh", *command]
        return subprocess.Popen(["ip", "netns", "exec", self.namespaces[name], *inside], **options)

    def received_bytes(self, name: str) -> int:
        """Return how many bytes have come to a host from the other."""
        counter = ["ip", "netns", "exec", self.namespaces[name], "cat", "/sys/class/net/eth0/statistics/rx_bytes"]
        return int(subprocess.run(counter, capture_output=True, text=True, check=True).stdout)

    def processes(self, name: str, words: str) -> list[int]:
        """Return the host's processes with these words in their command line."""
        return [pid for pid in _processes(self.namespaces[name]) if words in _command_line(pid)]

    def close(self) -> None:
        for namespace in self.namespaces.values():
            _remove(namespace)


def _processes(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""  # it has ended


def _remove(namespace: str) -> None:
    for pid in _processes(namespace):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
    shutil.rmtree(Path("/etc/netns", namespace), ignore_errors=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
