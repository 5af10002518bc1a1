"""Large package files as memory that the kernel pages in, instead of a copy of them.

A map of a file that shrinks ends the process by SIGBUS when a missing page is touched, and one that is written to
changes under whoever has verified it. So a file is mapped only while this process holds a read lease on it (fcntl(2),
F_SETLEASE): the kernel gives one only if nobody can write to the file now, and from then on holds up whoever opens it
for writing or cuts it off until the lease ends, at most for /proc/sys/fs/lease-break-time (45 seconds). The lease
belongs to the open file, which the map keeps open, so that it ends with the map. Where no lease can be had, the file is
read.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

MAPPED_BYTES_MIN: Final = 50 * 10**6
"""Files above this are mapped: for smaller ones a copy costs less than it saves."""


def read_or_map(path: Path, size_bytes_max: int) -> bytes | memoryview | None:
    """The content of a file, which stays as it is as long as somebody holds it.

    Args:
        path: The file.
        size_bytes_max: The most it may have.

    Returns:
        The content; read-only memory of the file itself if it is large and can be leased; None if it is too large.

    Raises:
        OSError: It cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size > size_bytes_max:
            return None
        if os.fstat(file).st_size > MAPPED_BYTES_MIN and _lease(file):
            # The size is asked for again by mmap itself: under the lease it cannot change.
            with contextlib.suppress(OSError, ValueError):  # no room for a map, or empty since
                return memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
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
