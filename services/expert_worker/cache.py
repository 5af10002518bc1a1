"""Packages on disk, by digest, with the releases that came with them.

`sha256/ab/<hex>` holds the bytes, `<hex>.releases` beside it the envelopes. Nothing read here is believed: whoever
opens a package compares the digest and verifies the releases again. When the cache grows too large, what was read or
written longest ago goes first. Large packages are mapped rather than read (`services.expert_worker.mapping`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from hocket.packages import DEFAULT_LIMITS
from services.expert_worker.mapping import read_or_map

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

_log: Final = structlog.get_logger("worker")
_DRAFT: Final = ".draft"
_RELEASES: Final = ".releases"
_RELEASES_BYTES_MAX: Final = 2**24
_BLOCK_BYTES: Final = 4096
"""What a file takes on a disk is a multiple of this."""
_TRIMMED_SHARE: Final = 0.9
"""How full the cache is left when it was too full, so that not every write has to look through it."""


@dataclass(frozen=True, slots=True)
class CachedPackage:
    """What lies in the cache under a digest.

    Args:
        data: Supposedly the file of that digest. It may be a map: use it in one go, then ask `mapping.is_intact`.
        releases: DSSE envelopes.
    """

    data: bytes | memoryview
    releases: tuple[bytes, ...]


class PackageCache:
    """A folder of packages. Its methods block, and may be called from several threads at once.

    Args:
        folder: Made at need. Only this worker writes to it.
        size_bytes_max: What it may take on the disk. What is in use stays beyond that.
    """

    def __init__(self, folder: Path, size_bytes_max: int) -> None:
        self._folder = folder
        self._size_bytes_max = size_bytes_max
        self._size_bytes = 0  # at least what the entries take: found at the last look, and written since
        self._trimming = threading.Lock()

    def tidy(self) -> None:
        """Remove what writes that never finished have left, and what is too much."""
        for draft in self._folder.glob(f"sha256/??/*{_DRAFT}"):
            draft.unlink(missing_ok=True)
        self._trim(sum(size_bytes for _, _, size_bytes in self._entries()), ())

    def read(self, digest: str, *, may_map: bool = True) -> CachedPackage | None:
        """What was written under a digest; None if there is nothing, or nothing that can be read.

        Args:
            digest: Which.
            may_map: Whether the bytes may be a map.
        """
        path = self._path(digest)
        try:
            releases = _read_releases(path.with_suffix(_RELEASES))
            if (data := read_or_map(path, DEFAULT_LIMITS.package_bytes, may_map=may_map)) is None:
                return None
            cached = CachedPackage(data, releases)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            _log.warning("cache entry cannot be read", digest=digest, error=str(error))
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was of use just now
        return cached

    def write(self, digest: str, data: bytes, releases: Sequence[bytes], in_use: Collection[str] = ()) -> None:
        """Keep a package, and drop others if that is too much.

        The bytes come last, so that whoever finds them finds the releases too. A cache that cannot be written costs
        time, not answers: the failure is logged.

        Args:
            digest: Which.
            data: The file of that digest.
            releases: DSSE envelopes.
            in_use: Digests that stay.
        """
        path = self._path(digest)
        envelopes = json.dumps([base64.b64encode(envelope).decode() for envelope in releases]).encode()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path.with_suffix(_RELEASES), envelopes)
            write_durably(path, data)
        except OSError as error:
            _log.warning("package not cached", digest=digest, error=str(error))
        self._trim(_on_disk(len(envelopes)) + _on_disk(len(data)), in_use)

    def drop(self, digest: str) -> None:
        """Remove an entry: it is not what it should be, was withdrawn, or has to make room."""
        path = self._path(digest)
        for part in (path, path.with_suffix(_RELEASES)):
            with contextlib.suppress(OSError):
                part.unlink()

    def _trim(self, more_bytes: int, in_use: Collection[str]) -> None:
        """Count what was added; if that is too much, drop what was used longest ago and is not in use."""
        with self._trimming:
            self._size_bytes += more_bytes
            if self._size_bytes <= self._size_bytes_max:
                return
            entries = sorted(self._entries())
            self._size_bytes = sum(size_bytes for _, _, size_bytes in entries)
            if self._size_bytes <= self._size_bytes_max:
                return
            for _, digest, size_bytes in entries:
                if self._size_bytes <= self._size_bytes_max * _TRIMMED_SHARE:
                    break
                if digest not in in_use:
                    self.drop(digest)
                    self._size_bytes -= size_bytes

    def _entries(self) -> list[tuple[float, str, int]]:
        """Every entry, whole or not: when it was used, its digest, and what it takes on the disk."""
        found: dict[str, tuple[float, int]] = {}
        for path in self._folder.glob("sha256/??/*"):
            if path.suffix == _DRAFT:
                continue
            with contextlib.suppress(OSError):  # gone meanwhile
                status = path.stat()
                digest = f"sha256:{path.name.removesuffix(_RELEASES)}"
                time, size_bytes = found.get(digest, (0.0, 0))
                found[digest] = max(time, status.st_mtime), size_bytes + _on_disk(status.st_size)
        return [(time, digest, size_bytes) for digest, (time, size_bytes) in found.items()]

    def _path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._folder / "sha256" / name[:2] / name


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file at once and for good: after a power failure there is the old content or the new.

    Raises:
        OSError: It could not be written; the old content stays.
    """
    descriptor, draft = tempfile.mkstemp(suffix=_DRAFT, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)  # noqa: PTH105 - the draft is a name, not a path
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)  # noqa: PTH108 - the same
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _on_disk(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _read_releases(path: Path) -> tuple[bytes, ...]:
    if path.stat().st_size > _RELEASES_BYTES_MAX:
        raise ValueError("more releases than anyone makes")
    envelopes = json.loads(path.read_bytes())
    if not isinstance(envelopes, list):
        raise TypeError("not a list of releases")
    return tuple(base64.b64decode(envelope, validate=True) for envelope in envelopes)
