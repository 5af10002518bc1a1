"""What an operator may choose about an expert worker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError
from hocket.identity import check_name, is_digest
from hocket.settings import check_counts

if TYPE_CHECKING:
    from pathlib import Path

_DEVICE: Final = re.compile(r"auto|cpu|cuda:[0-9]{1,3}")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Table `[worker]`.

    Args:
        data_dir: Where it keeps its cache of packages (`cache/`) and what was withdrawn (`revocations.json`).
        trust_dir: The trust folder it decides by, `<publisher>.toml` each.
        host: Interface to listen on.
        port: Port to listen on; metrics are on port + 1000.
        advertise: Address by which others reach it; empty for `host:port`, with this machine's name for the host when
            it listens on all interfaces.
        name: How it calls itself, unique in its registry; empty for one made from its address.
        registry: Address of the registry it announces itself to and pulls packages from.
        admin_token_file: Secret file with the token that loading and unloading needs; None leaves them open.
        worker_token_file: Secret file with the token it announces itself with; None where the registry asks for none.
        device: Where it computes: `cpu`, `cuda:0`, or `auto` for the first CUDA device if there is one.
        budget_bytes: Memory for experts on that device; 0 for a share of what is free at start.
        cache_bytes: Disk for the cache of packages; what was used longest ago makes room, what is in memory stays.
        compute_threads: Threads of one pass on a CPU; 0 for half of the cores.
        workers_on_machine: Workers that share this machine and its device: what is chosen for `budget_bytes` and
            `compute_threads` is divided by it.
        allow_unsigned: Admit packages that nobody trusted has signed. Logged at start, counted per use.
        preload: Digests of packages to load at start.
        queue_max: Requests waiting for the device; the next one is refused as `QUEUE_FULL`.
        loading_max: Packages being loaded; the next one is refused as `QUEUE_FULL`.
        in_flight_max: Calls answered at once; the next one is refused as `QUEUE_FULL`.
        default_deadline_seconds: Deadline of a call that brings none.
        drain_notice_seconds: At shutdown, time in which calls are still taken, so that callers learn to go elsewhere.
        drain_grace_seconds: Time for running calls to end after that.
    """

    data_dir: Path
    trust_dir: Path
    host: str = "127.0.0.1"
    port: int = 50054
    advertise: str = ""
    name: str = ""
    registry: str = "127.0.0.1:50052"
    admin_token_file: Path | None = None
    worker_token_file: Path | None = None
    device: str = "auto"
    budget_bytes: int = 0
    cache_bytes: int = 10 * 2**30
    compute_threads: int = 0
    workers_on_machine: int = 1
    allow_unsigned: bool = False
    preload: tuple[str, ...] = ()
    queue_max: int = 512
    loading_max: int = 1024
    in_flight_max: int = 1024
    default_deadline_seconds: float = 30.0
    drain_notice_seconds: float = 0.5
    drain_grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.name:
            try:
                check_name(self.name, "worker name")
            except HocketError as error:
                raise ValueError(error.message) from error
        if _DEVICE.fullmatch(self.device) is None:
            raise ValueError(f"device must be auto, cpu or cuda:<number>, not {self.device!r}")
        if min(self.budget_bytes, self.compute_threads, self.cache_bytes) < 0:
            raise ValueError("budget_bytes and compute_threads must be 0 (choose for me) or more, cache_bytes too")
        check_counts(self, "queue_max", "loading_max", "in_flight_max", "workers_on_machine")
        if self.default_deadline_seconds <= 0:
            raise ValueError("default_deadline_seconds must be above 0")
        for digest in self.preload:
            if not is_digest(digest):
                raise ValueError(f"preload names packages by sha256:<64 hex digits>, not {digest!r}")
