"""Large package files as memory that the kernel pages in, instead of a copy of them.

A map of a file that shrinks ends the process by SIGBUS when a missing page is touched, and one that is written to
changes under whoever has verified it. So a file is mapped only while this process holds a read lease on it (fcntl(2),
F_SETLEASE): the kernel gives one only if nobody can write to the file now, and from then on holds up whoever opens it
for writing or cuts it off until the lease ends, at most for /proc/sys/fs/lease-break-time (45 seconds). The lease
belongs to the open file, which the map keeps open, so that it ends with the map. Where no lease can be had, the file is
read.

After those seconds the file is anybody's to change. So whoever uses a map does so in one go, and then asks `is_intact`:
as soon as somebody waits it is not, and what came of it does not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from pathlib import Path

MAPPED_BYTES_MIN: Final = 50 * 10**6
"""Files above this are mapped: for smaller ones a copy costs less than it saves."""


class _Map(mmap.mmap):
    """A map that still knows its open file, to ask for the lease on it."""

    file: int = -1

    def __new__(cls, file: int) -> Self:
        """A map of the whole file."""
        mapped = super().__new__(cls, file, 0, access=mmap.ACCESS_READ)
        mapped.file = os.dup(file)
        return mapped

    def __del__(self) -> None:
        if self.file >= 0:  # else there was no room for another descriptor
            os.close(self.file)


def is_intact(content: bytes | memoryview) -> bool:
    """Whether what `read_or_map` gave is still as it was: a copy always is, a map until somebody wants to change it."""
    mapped = content.obj if isinstance(content, memoryview) else None
    return not isinstance(mapped, _Map) or fcntl.fcntl(mapped.file, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def read_or_map(path: Path, size_bytes_max: int, *, may_map: bool = True) -> bytes | memoryview | None:
    """The content of a file.

    Args:
        path: The file.
        size_bytes_max: The most it may have.
        may_map: Whether it may be a map.

    Returns:
        The content; read-only memory of the file itself if it is large and can be leased; None if it is too large.

    Raises:
        OSError: It cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size > size_bytes_max:
            return None
        if may_map and os.fstat(file).st_size > MAPPED_BYTES_MIN and _lease(file):
            # The size is asked for again by mmap itself: under the lease it cannot change.
            with contextlib.suppress(OSError, ValueError):  # no room for a map, or empty since
                return memoryview(_Map(file))
        with os.fdopen(os.dup(file), "rb") as stream:
            data = stream.read(size_bytes_max + 1)
            return data if len(data) <= size_bytes_max else None
    finally:
        os.close(file)


def _lease(file: int) -> bool:
    """Whether the kernel promises that nobody changes this file as long as it is open here."""
    try:
        # Whoever has to wait makes the kernel send a signal; by default it would end this process, this one is ignored.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:  # somebody writes to it, it belongs to somebody else, or the file system has no leases
        return False
    return True
