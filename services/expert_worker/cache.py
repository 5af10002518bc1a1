"""Packages on disk, by digest, with the releases that came with them.

`sha256/ab/<hex>` holds the bytes, `<hex>.releases` beside it the envelopes. Nothing read here is believed: whoever
opens a package compares the digest and verifies the releases again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from hocket.packages import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_log: Final = structlog.get_logger("worker")
_DRAFT: Final = ".draft"
_RELEASES_BYTES_MAX: Final = 2**24


@dataclass(frozen=True, slots=True)
class CachedPackage:
    """What lies in the cache under a digest.

    Args:
        data: Supposedly the file of that digest.
        releases: DSSE envelopes.
    """

    data: bytes
    releases: tuple[bytes, ...]


class PackageCache:
    """A folder of packages. Its methods block: call them from a thread.

    Args:
        folder: Made at need. Only workers write to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tidy(self) -> None:
        """Remove what writes that never finished have left."""
        for draft in self._folder.glob(f"sha256/??/*{_DRAFT}"):
            draft.unlink(missing_ok=True)

    def read(self, digest: str) -> CachedPackage | None:
        """What was written under a digest; None if there is nothing, or nothing that can be read."""
        path = self._path(digest)
        try:
            if path.stat().st_size > DEFAULT_LIMITS.package_bytes:
                return None
            releases = _read_releases(path.with_suffix(".releases"))
            return CachedPackage(path.read_bytes(), releases)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            _log.warning("cache entry cannot be read", digest=digest, error=str(error))
            return None

    def write(self, digest: str, data: bytes, releases: Sequence[bytes]) -> None:
        """Keep a package. The bytes come last, so that whoever finds them finds the releases too.

        A cache that cannot be written costs time, not answers: the failure is logged.
        """
        path = self._path(digest)
        envelopes = json.dumps([base64.b64encode(envelope).decode() for envelope in releases]).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path.with_suffix(".releases"), envelopes)
            write_durably(path, data)
        except OSError as error:
            _log.warning("package not cached", digest=digest, error=str(error))

    def drop(self, digest: str) -> None:
        """Remove an entry that is not what it should be."""
        with contextlib.suppress(OSError):
            self._path(digest).unlink()

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


def _read_releases(path: Path) -> tuple[bytes, ...]:
    if path.stat().st_size > _RELEASES_BYTES_MAX:
        raise ValueError("more releases than anyone makes")
    envelopes = json.loads(path.read_bytes())
    if not isinstance(envelopes, list):
        raise TypeError("not a list of releases")
    return tuple(base64.b64decode(envelope, validate=True) for envelope in envelopes)
