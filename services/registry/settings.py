"""What an operator may choose about the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hocket.packages import DEFAULT_LIMITS
from hocket.settings import check_counts

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """Table `[registry]`.

    Args:
        data_dir: Folder of `registry.db` and `blobs/`; private to one registry process.
        trust_dir: Trust folder, read and never written.
        host: Interface to listen on.
        port: Port to listen on; metrics are on port + 1000.
        admin_token_file: Secret file with the token that changing anything needs; None leaves it open.
        worker_token_file: Secret file with the token that Announce needs; None leaves it open.
        allow_unsigned: Admit what nobody trusted has signed. Logged at start, counted per use, shown on the package.
        allow_expired_licences: Admit packages whose licence has ended. Logged at start.
        lease_seconds: How long a worker stays listed without another word from it.
        trust_poll_seconds: How often the trust folder is looked at.
        package_bytes_max: Largest package.
        uploads_max: Uploads taken in at once; the next one waits. Each may hold a package in memory, and its
            decoded content.
        upload_idle_seconds: Longest silence within an upload.
        workers_max: Workers listed at once.
        in_flight_max: Calls admitted at once, feeds and leases not counted; the next is refused as `QUEUE_FULL`.
        drain_notice_seconds: At shutdown, time in which calls are still taken, so that callers learn to go elsewhere.
        drain_grace_seconds: Time for running calls to end after that.
    """

    data_dir: Path
    trust_dir: Path
    host: str = "127.0.0.1"
    port: int = 50052
    admin_token_file: Path | None = None
    worker_token_file: Path | None = None
    allow_unsigned: bool = False
    allow_expired_licences: bool = False
    lease_seconds: float = 10.0
    trust_poll_seconds: float = 2.0
    package_bytes_max: int = DEFAULT_LIMITS.package_bytes
    uploads_max: int = 4
    upload_idle_seconds: float = 30.0
    workers_max: int = 1024
    in_flight_max: int = 1024
    drain_notice_seconds: float = 0.5
    drain_grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("lease_seconds", "trust_poll_seconds", "upload_idle_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        check_counts(self, "package_bytes_max", "uploads_max", "workers_max", "in_flight_max")
