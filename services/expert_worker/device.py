"""Where experts live and compute: a CPU or a CUDA device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from hocket.errors import HocketError, Reason

_CUDA_SHARE: Final = 0.8
"""Of the memory that is free at start; the rest is for passes in progress and for fragmentation."""
_HOST_SHARE: Final = 0.5
"""Of the memory that is available at start; the rest is for packages being read, and for the other programs."""
_UNKNOWN_HOST_BYTES: Final = 2 * 2**30
_KIB: Final = 1024


def choose_device(setting: str) -> torch.device:
    """The device that a setting names.

    Args:
        setting: `auto`, `cpu` or `cuda:<number>`.

    Raises:
        HocketError: `BAD_REQUEST` if this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(setting)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"device {setting} is not here ({count} CUDA devices found): "
            "set worker.device to cpu, or check the driver and the container's GPU access",
        )
    return device


@dataclass(frozen=True, slots=True)
class Shares:
    """How a worker with a base divides the memory that it may still take on its device.

    Args:
        experts_bytes: For experts in memory; on a CUDA device for tensor experts alone.
        slab_bytes: For the keys and values of texts and for running experts.
    """

    experts_bytes: int
    slab_bytes: int


def shares(
    free_bytes: int, kv_useful_bytes: int, *, experts_bytes: int, slab_bytes: int, adapters_elsewhere: bool
) -> Shares:
    """What was chosen, and for what was not: up to half for keys and values, then four parts to one.

    Four are for experts in memory and one for those that run; where adapter experts wait in host memory, it is the
    other way round.

    Args:
        free_bytes: What `budget_bytes` says.
        kv_useful_bytes: What as many texts as may run at once can use.
        experts_bytes: As chosen; 0 for not.
        slab_bytes: The same.
        adapters_elsewhere: Whether adapter experts are in another memory until they run.
    """
    kv_bytes = min(kv_useful_bytes, free_bytes // 2)
    running_bytes = (free_bytes - kv_bytes) * (4 if adapters_elsewhere else 1) // 5
    slab_bytes = slab_bytes or kv_bytes + running_bytes
    return Shares(experts_bytes or max(0, free_bytes - slab_bytes), slab_bytes)


def host_bytes(workers: int = 1) -> int:
    """A sensible budget of host memory for the adapter experts of a worker with a CUDA device; see `budget_bytes`."""
    return int(available_host_bytes() * _HOST_SHARE / workers)


def available_bytes(device: torch.device) -> int:
    """Memory of a device that this process may still take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_host_bytes()


def budget_bytes(device: torch.device, workers: int = 1, base_bytes: int = 0) -> int:
    """A sensible budget on a device that nobody but these workers is filling.

    The device's whole memory counts where several start at once: each sees what the others have taken by then.

    Args:
        device: Where.
        workers: How many share it.
        base_bytes: What this one's base has taken there already.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free * _CUDA_SHARE if workers == 1 else total * _CUDA_SHARE / workers - base_bytes))
    return host_bytes(workers)


def available_host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: what the machine has available, within its container's limit.

    Args:
        proc: Where Linux says what the machine has.
        cgroup: Where it says what the container may take (version 2; version 1 is not consulted).
    """
    found = [_available_bytes(proc / "meminfo"), _cgroup_bytes(cgroup)]
    return min((value for value in found if value is not None), default=_UNKNOWN_HOST_BYTES)


def compute_threads(setting: int, workers: int = 1) -> int:
    """Threads of one pass: the setting, or this worker's part of half of the cores this process may use."""
    return setting or max(1, len(os.sched_getaffinity(0)) // 2 // workers)


def _available_bytes(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * _KIB
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_bytes(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        return max(0, int(limit) - int((cgroup / "memory.current").read_text()) + _cached_bytes(cgroup))
    except (OSError, ValueError):
        return None


def _cached_bytes(cgroup: Path) -> int:
    """What a container's memory holds of files, a base's weights not least, and gives up when it is asked for more."""
    try:
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(counts["active_file"]) + int(counts["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0
