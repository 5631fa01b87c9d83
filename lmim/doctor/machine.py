"""What every rank runs on: versions of what is installed, its device, its clock.

Owns which versions must agree, how far clocks may be apart, and what a GPU must be. Nothing here starts work on a GPU.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import statistics
import subprocess
import time
from pathlib import Path

import torch

from lmim.dist import available_cores
from lmim.doctor.memory import available_memory
from lmim.doctor.rows import FAILURE, OK, WARNING, Case, Finding, Found, Row, by_value, of_ranks, size
from lmim.version import __version__

PACKAGES = ("torch", "deepspeed", "torchvision", "timm", "numpy", "webdataset", "safetensors")
MUST_AGREE = ("lmim", "lmim's files", "python", "torch", "deepspeed", "CUDA")  # others differ without harm, mostly
WARN_CLOCK_S, FAIL_CLOCK_S = 1.0, 10.0
CLOCK_ROUNDS = 3
NVIDIA_SMI_S = 20.0
BUSY = 0.05  # share of a GPU's memory that others may use


# --- versions --------------------------------------------------------------------------------------------------------


def look_at_versions(case: Case) -> Finding:
    """Return the versions by name."""
    found = {"lmim": __version__, "lmim's files": _own_files(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return {**found, "CUDA": torch.version.cuda or "none"}


def _own_files() -> str:
    """Return a checksum of this package's source: two checkouts of one version may differ."""
    digest, folder = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def judge_versions(case: Case, found: Found) -> list[Row]:
    """Compare them over all ranks."""
    versions = found["versions"]
    differing = {}
    for name in next(iter(versions.values())):
        values = by_value({rank: of[name] for rank, of in versions.items()})
        if len(values) > 1:
            differing[name] = ", ".join(f"{value} on {of_ranks(ranks)}" for value, ranks in values.items())
    told = versions[min(versions)]
    if not differing:
        named = ", ".join(f"{name} {told[name]}" for name in ("lmim", "python", "torch", "deepspeed"))
        return [Row("versions", OK, f"{named}" + f"; alike on {len(versions)} ranks" * (len(versions) > 1),
                    figures=told)]  # fmt: skip
    state = FAILURE if differing.keys() & set(MUST_AGREE) else WARNING
    words = "; ".join(f"{name} {values}" for name, values in differing.items())
    return [Row("versions", state, words, "give all hosts the same environment: one container image, or one folder "
                "that all of them see", figures=told)]  # fmt: skip


# --- devices ---------------------------------------------------------------------------------------------------------


def look_at_device(case: Case) -> Finding:
    """Return this rank's host and device, memory in bytes."""
    available, limit = available_memory()
    found = dict(host=socket.gethostname(), cores=available_cores(), memory=available, memory_limit=limit)
    device = case.topology.device
    if device.type != "cuda":
        return dict(found, gpu=None, unused_gpu=any(Path("/dev").glob("nvidia[0-9]*")))
    gpu = torch.cuda.get_device_properties(device)
    identity = str(getattr(gpu, "uuid", device.index))
    driver, used = _nvidia_smi(identity)
    return dict(found, gpu=gpu.name, identity=identity, gpu_memory=gpu.total_memory, driver=driver, used=used,
                capability=[gpu.major, gpu.minor])  # fmt: skip


def _nvidia_smi(identity: str) -> tuple[str, float]:
    """Return the driver's version and the bytes of a GPU that are in use; "unknown" and 0 without nvidia-smi."""
    command = ["nvidia-smi", f"--id=GPU-{identity.removeprefix('GPU-')}", "--query-gpu=driver_version,memory.used",
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout
        driver, used_mib = told.strip().split(", ")
        return driver, float(used_mib) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return "unknown", 0.0


def judge_devices(case: Case, found: Found) -> list[Row]:
    """Every rank must have a device of its own, and all the same kind."""
    devices = found["devices"]
    hosts = by_value({rank: of["host"] for rank, of in devices.items()})
    kinds = by_value({rank: of["gpu"] or "CPU" for rank, of in devices.items()})
    words = ", ".join(f"{kind} on {of_ranks(ranks)}" if len(kinds) > 1 else f"{len(ranks)} x {kind}"
                      for kind, ranks in kinds.items())  # fmt: skip
    first = devices[min(devices)]
    words += f", {len(hosts)} host{'s' * (len(hosts) > 1)}"
    if first["gpu"]:
        words += f", {size(first['gpu_memory'])} each, driver {first['driver']}"
    else:
        words += f", {first['cores']} cores and {size(first['memory'] or 0)} of free memory each"
    wrong, state = [], OK
    with_gpu = {rank: of for rank, of in devices.items() if of["gpu"]}
    shared = [ranks for ranks in by_value({r: (of["host"], of["identity"]) for r, of in with_gpu.items()}).values()
              if len(ranks) > 1]  # fmt: skip
    if shared:
        state = FAILURE
        wrong.append(f"{of_ranks(shared[0])} share one GPU: start one rank a GPU")
    if with_gpu and len(with_gpu) < len(devices):
        state = FAILURE
        missing = [rank for rank in devices if rank not in with_gpu]
        wrong.append(
            f"{of_ranks(missing)} see no GPU: look at CUDA_VISIBLE_DEVICES, the driver and torch's build there"
        )
    warnings = _device_warnings(case, devices, with_gpu, kinds)
    if warnings and state == OK:
        state = WARNING
    figures = dict(hosts=len(hosts), ranks=len(devices), kinds={kind: len(ranks) for kind, ranks in kinds.items()})
    return [Row("devices", state, words, "; ".join([*wrong, *warnings]), figures)]


def _device_warnings(case: Case, devices: dict[int, Finding], with_gpu: dict[int, Finding],
                     kinds: dict[str, list[int]]) -> list[str]:  # fmt: skip
    warnings = []
    unused = [rank for rank, of in devices.items() if not of["gpu"] and of["unused_gpu"]]
    if unused and not with_gpu:
        warnings.append(
            f"{of_ranks(unused)}: there is a GPU, but torch sees none: install torch for this driver's CUDA"
        )
    if len(kinds) > 1 and len(with_gpu) == len(devices):
        warnings.append("all ranks wait for the slowest kind of GPU: use one kind")
    drivers = by_value({rank: of["driver"] for rank, of in with_gpu.items()})
    if len(drivers) > 1:
        told = ", ".join(f"{driver} on {of_ranks(ranks)}" for driver, ranks in drivers.items())
        warnings.append(f"drivers differ ({told}): bring them to one version")
    busy = [rank for rank, of in with_gpu.items() if of["used"] > BUSY * of["gpu_memory"]]
    if busy:
        most = max(with_gpu[rank]["used"] for rank in busy)
        warnings.append(f"another process uses up to {size(most)} of the GPUs of {of_ranks(busy)}: end it")
    old = [rank for rank, of in with_gpu.items() if of["capability"] < [8, 0]]
    if old and case.config.precision.compute == "bf16":
        warnings.append(f"the GPUs of {of_ranks(old)} compute bf16 slowly: set precision.compute=fp32")
    return warnings


# --- clocks ----------------------------------------------------------------------------------------------------------


def look_at_clock(case: Case) -> Finding:
    """Return the time that the clock shows at moments that all ranks share, to some milliseconds."""
    times = []
    for number in range(CLOCK_ROUNDS):
        case.board.share(f"moment {number}", True, 20.0)
        times.append(time.time())
    return dict(times=times)


def judge_clocks(case: Case, found: Found) -> list[Row]:
    """Compare the hosts' clocks with that of the first rank."""
    clocks = {rank: of["times"] for rank, of in found["clocks"].items()}
    if len(clocks) < 2:
        return [Row("clocks", OK, "one rank, nothing to compare")]
    reference = clocks[min(clocks)]
    skew = {rank: statistics.median(t - r for t, r in zip(times, reference, strict=True))
            for rank, times in clocks.items()}  # fmt: skip
    worst = max(skew, key=lambda rank: abs(skew[rank]))
    most = abs(skew[worst])
    state = OK if most < WARN_CLOCK_S else WARNING if most < FAIL_CLOCK_S else FAILURE
    way = "ahead of" if skew[worst] > 0 else "behind"
    words = f"rank {worst} is {most:.1f} s {way} rank {min(clocks)}" if state != OK else f"within {1e3 * most:.0f} ms"
    advice = "" if state == OK else "set the clocks by NTP (chronyc makestep): logs and object stores go by them"
    return [Row("clocks", state, words, advice, figures=dict(skew_s=skew[worst]))]
