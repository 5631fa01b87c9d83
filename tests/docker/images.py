"""Both images, built by buildah without a daemon, on a base made by debootstrap; everything lies in one folder.

pip inside the build uses what the host's pip is configured to use: a pip.conf as a build secret, and folders of wheels
mounted read-only. The invariant: none of it is in a layer of the images.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from tests.conftest import REPOSITORY, SYSTEM_PATH, why_not

NEEDED = ("buildah", "debootstrap", "mount", "tar")
WHY_NOT = why_not("buildah's chroot isolation", NEEDED)  # empty where it can be done
BASE, CPU, CUDA = "localhost/base:latest", "localhost/lmim:cpu", "localhost/lmim:cuda"
HOST = "/run/host"  # in the build: what pip needs of the host
BUILD_TIMEOUT_S = 3000
OPERATORS = """
_names = torch.library.Library("torchvision", "DEF")
for _operator in ("nms", "qnms"):
    _names.define(f"{_operator}(Tensor d, Tensor s, float t) -> Tensor")
"""


class Images:
    """Builds in `folder`; `close` unmounts and removes it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[str, float] = {}
        for name in ("storage", "run", "tmp", "host"):
            (folder / name).mkdir(parents=True)
        driver = "overlay" if self._overlays() else "vfs"
        self.storage = ["--root", folder / "storage", "--runroot", folder / "run", "--storage-driver", driver]
        try:
            self._make_base()
            self._configure_pip()
            self._build(CPU, "docker/Dockerfile.cpu")
            self._build(CUDA, "docker/Dockerfile")  # the same base and wheels: only its last stage is new
        except BaseException:
            self.close()
            raise

    def _overlays(self) -> bool:
        """Return whether the kernel lays folders over each other here; else every layer is a whole copy."""
        below, above, work, joined = (self.folder / "overlay" / name for name in ("below", "above", "work", "joined"))
        for path in (below, above, work, joined):
            path.mkdir(parents=True)
        options = f"lowerdir={below},upperdir={above},workdir={work}"
        if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, joined], capture_output=True).returncode:
            return False
        subprocess.run(["umount", joined], check=True)
        return True

    def _make_base(self) -> None:
        """Make BASE: Debian's smallest, with Python, in place of debian:bookworm-slim."""
        started, root = time.monotonic(), self.folder / "base"
        packages = "--include=ca-certificates,python3,python3-venv"
        _run(["debootstrap", "--variant=minbase", packages, "bookworm", root], timeout=BUILD_TIMEOUT_S)
        shutil.rmtree(root / "var/cache/apt/archives")
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, root, "/")
        self.buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self.buildah("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(root)
        self.seconds["base"] = time.monotonic() - started

    def _configure_pip(self) -> None:
        """Write the pip.conf of the build, and list what it needs mounted."""
        told = _run([sys.executable, "-m", "pip", "config", "list"], cwd=self.folder)
        found: dict[str, str] = {}
        for line in told.splitlines():  # such as global.index-url='https://…' or :env:.index-url='…'
            name, _, value = line.partition("=")
            option = name.rpartition(".")[2]
            if option in ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout", "default-timeout"):
                found[option] = value.strip("'").replace("\\n", " ")
            elif option == "cert":
                shutil.copy(value.strip("'"), self.folder / "host" / "cert.pem")
                found["cert"] = f"{HOST}/cert.pem"
        self._bring_torchvision()
        found["find-links"] = f"{found.get('find-links', '')} {HOST}".strip()
        (self.folder / "pip.conf").write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in found.items()))
        words = " ".join(found.get(name, "") for name in ("index-url", "extra-index-url", "find-links")).split()
        paths = {Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))}
        folders = {path if path.name != "simple" else path.parent for path in paths if path.is_dir()}
        self.mounts = [f"{folder}:{folder}:ro" for folder in folders] + [f"{self.folder}/host:{HOST}:ro"]

    def _bring_torchvision(self) -> None:
        """Put a torchvision beside pip's own that imports beside torch's CPU wheel, where the indexes have none.

        PyPI's is built for CUDA and does not import without it. Its Python part does once the two operators that it
        describes are known by name; lmim, and timm, use nothing compiled of it on a CPU.
        """
        pin = next(line for line in _constraints() if line.startswith("torchvision=="))
        where = self.folder / "tmp"
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", where, pin], timeout=600)
        (wheel,) = where.glob("torchvision-*.whl")
        if "+cpu" in wheel.name:
            return
        version = pin.partition("==")[2]
        old, new = f"torchvision-{version}.dist-info", f"torchvision-{version}+cpu.dist-info"
        target = self.folder / "host" / wheel.name.replace(f"-{version}-", f"-{version}+cpu-")
        with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as made:
            for name in source.namelist():
                if ".so" in name or name.endswith("RECORD"):
                    continue
                data = source.read(name)
                if name == "torchvision/extension.py":
                    data += OPERATORS.encode()
                if name.endswith("METADATA"):
                    data = data.replace(f"\nVersion: {version}".encode(), f"\nVersion: {version}+cpu".encode())
                made.writestr(name.replace(old, new), data)
            made.writestr(f"{new}/RECORD", "")
        wheel.unlink()

    def _build(self, tag: str, dockerfile: str) -> None:
        started = time.monotonic()
        arguments = {"BASE_IMAGE": BASE, "TORCH_INDEX": "", "VERSION": "1.2.3", "REVISION": "abcdef"}
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        words += [word for mount in self.mounts for word in ("--volume", mount)]
        # health checks are Docker's: OCI's own format of an image has none
        self.buildah("bud", "--isolation", "chroot", "--layers", "--format", "docker", "--secret",
                     f"id=pip,src={self.folder}/pip.conf", *words, "--file", dockerfile, "--tag", tag, ".")  # fmt: skip
        self.seconds[tag] = time.monotonic() - started

    def buildah(self, command: str, *words: object) -> str:
        """Run a buildah command in this folder's storage and return what it prints."""
        return _run(["buildah", *self.storage, command, *words], timeout=BUILD_TIMEOUT_S,
                    environment={"TMPDIR": str(self.folder / "tmp")})  # fmt: skip

    def inspect(self, tag: str) -> dict:
        """Return the configuration of an image."""
        return json.loads(self.buildah("inspect", "--type", "image", tag))["Docker"]["config"]

    def megabytes(self, tag: str) -> float:
        """Return the size of an image, unpacked, all layers together."""
        size = next(
            image["size"] for image in json.loads(self.buildah("images", "--json")) if tag in (image["names"] or [])
        )
        number, unit = size.split()
        return float(number) * {"KB": 1e-3, "MB": 1, "GB": 1e3}[unit]

    def container(self, tag: str) -> str:
        return self.buildah("from", tag).strip()

    def run(self, container: str, *words: object, volumes: tuple[str, ...] = (), **environment: str) -> str:
        """Run words in a container, as its own user, and return what they print."""
        options = [word for volume in volumes for word in ("--volume", volume)]
        options += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        return self.buildah("run", "--isolation", "chroot", *options, container, "--", *words)

    def close(self) -> None:
        """Remove the images and all else."""
        if hasattr(self, "storage"):
            for words in (["rm", "--all"], ["rmi", "--all", "--force"]):
                subprocess.run(["buildah", *map(str, self.storage), *words], capture_output=True)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            point = line.split()[1]
            if point.startswith(f"{self.folder}/"):
                subprocess.run(["umount", point], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _constraints() -> list[str]:
    return (REPOSITORY / "docker" / "constraints.txt").read_text().splitlines()


def _run(words: list, timeout: float = 60, cwd: Path = REPOSITORY, environment: dict[str, str] | None = None) -> str:
    variables = {**os.environ, "PATH": SYSTEM_PATH, **(environment or {})}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=variables, capture_output=True, text=True,
                          timeout=timeout)  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
