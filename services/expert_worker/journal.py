"""What a worker is loading and computing, in a file that outlives it: whoever is found there ended the last life.

A worker that crashes says nothing, so it has to have said it before. Marks are stores into a memory-mapped file: the
kernel keeps them when the process is killed, and no mark costs a system call. They need not survive a power failure,
which is no package's fault.

A crash counts for every package that was busy. Guiltless ones among them are not to be counted again, so packages that
were busy at a recent crash (suspects) do not share a pass, and run one at a time as far as a short wait makes it so.

    offset  bytes
    0       16        "hocket journal 1"
    16      8         u64: packages in the pass in progress
    24      8         unused
    32      1024 x 32 their SHA-256
    32,800  2048 x 48 packages being loaded, and those with crashes: SHA-256, u32 loads in progress, u32 crashes,
                      f64 time of the last crash in seconds since the epoch

Numbers are in the machine's own byte order: the file is of no use to another machine.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

PASS_PACKAGES_MAX: Final = 1024
"""Packages that one pass may mark."""
CRASHES_MAX: Final = 3
"""Crashes from which a package is refused."""
RECENT_SECONDS: Final = 3600.0
"""After that long without a crash, counting begins anew."""

_log: Final = structlog.get_logger("worker")
_MAGIC: Final = b"hocket journal 1"
_COUNT_BYTES: Final = 8
_COUNT: Final = len(_MAGIC) // _COUNT_BYTES
_DIGEST_BYTES: Final = 32
_PASS: Final = 32
_SLOTS: Final = _PASS + PASS_PACKAGES_MAX * _DIGEST_BYTES
_SLOT: Final = struct.Struct("=32sIId")
_SLOT_COUNT: Final = 2 * PASS_PACKAGES_MAX
_SIZE_BYTES: Final = _SLOTS + _SLOT_COUNT * _SLOT.size
_LOADS_MAX: Final = 2**16
"""More at once than any worker makes: the file is damaged."""
_PASS_WAIT_SECONDS: Final = 0.1
_LOAD_WAIT_SECONDS: Final = 2.0
"""How long a suspect waits for another one: a pass holds up every other expert, a load does not."""


@dataclass(slots=True)
class _Entry:
    """A line of the table.

    Args:
        slot: Its place.
        loads: Loads in progress.
        crashes: Crashes at which the package was busy.
        crash_time: The last one, in seconds since the epoch.
    """

    slot: int
    loads: int = 0
    crashes: int = 0
    crash_time: float = 0.0


@dataclass(frozen=True, slots=True)
class _Left:
    """What a life has left in the file.

    Args:
        busy: Packages that were loading or in a pass.
        crashes: Earlier crashes by package: how many, and the time of the last one.
    """

    busy: tuple[bytes, ...] = ()
    crashes: Mapping[bytes, tuple[int, float]] = field(default_factory=dict)


class Journal:
    """Marks, and what they taught.

    Until `open`, and where the file cannot be had, marks are kept in memory only: serving goes on, a crash teaches
    nothing. Loads may be marked from any thread, passes from one.

    Args:
        path: The file; its folder is made at need.

    Attributes:
        suspects: Packages, as `raw_digest` names them, that were busy at a recent crash and are not refused.
    """

    def __init__(self, path: Path) -> None:
        self.suspects: frozenset[bytes] = frozenset()
        self._quarantined: frozenset[bytes] = frozenset()
        self._path = path
        self._file: int | None = None
        self._marks, self._counts = _viewed(mmap.mmap(-1, _SIZE_BYTES))
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}
        self._free = list(range(_SLOT_COUNT))
        self._one_suspect = threading.Lock()
        self._pass_is_alone = False

    def open(self) -> None:
        """Count what the last life left busy, and keep marks in the file from now on. Blocks.

        Raises:
            HocketError: `BAD_REQUEST` if another worker that lives uses the file.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _not_kept(error)
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = os.pread(file, _SIZE_BYTES + 1, 0)
            os.posix_fallocate(file, 0, _SIZE_BYTES)  # a store into a hole would end the process when the disk is full
            os.ftruncate(file, _SIZE_BYTES)
            marks = mmap.mmap(file, _SIZE_BYTES)
        except BlockingIOError:
            os.close(file)
            raise HocketError(
                Reason.BAD_REQUEST,
                f"another worker uses {self._path.parent}: give each worker a worker.data_dir of its own",
            ) from None
        except OSError as error:
            os.close(file)
            _not_kept(error)
            return
        try:
            left = _read(data)
        except ValueError as error:
            left = _Left()
            _log.error("journal damaged: earlier crashes are forgotten", path=str(self._path), error=str(error))
        with self._lock:
            self._file = file
            self._marks, self._counts = _viewed(marks)
            self._learn(left)

    def close(self) -> None:
        """Leave the file without a mark: this life ends as it should. Marks made later go nowhere."""
        with self._lock:
            file, self._file = self._file, None
            if file is None:
                return
            for package, entry in self._entries.items():
                entry.loads = 0
                self._write(package, entry)
            self._counts[_COUNT] = 0
            self._counts.release()
            self._marks.close()
            os.close(file)
            self._marks, self._counts = _viewed(mmap.mmap(-1, _SIZE_BYTES))

    def check(self, digest: str) -> None:
        """Return if a package may be loaded.

        Raises:
            HocketError: `QUARANTINED`.
        """
        if raw_digest(digest) in self._quarantined:
            raise HocketError(
                Reason.QUARANTINED,
                f"this worker has ended {CRASHES_MAX} times while it loaded or ran {digest}: see its log; "
                "the admin's LoadExpert tries it again",
                digest=digest,
            )

    def lift(self, digest: str) -> None:
        """End a quarantine, if there is one; the next crash counts as the first."""
        package = raw_digest(digest)
        with self._lock:
            if package not in self._quarantined:
                return
            self._forget_crashes(package)
        _log.warning("quarantine lifted", digest=digest)

    @contextmanager
    def loading(self, digest: str) -> Iterator[None]:
        """Mark a package while it is verified, laid out or placed, in the thread that does it."""
        package = raw_digest(digest)
        alone = package in self.suspects and self._one_suspect.acquire(timeout=_LOAD_WAIT_SECONDS)
        try:
            with self._lock:
                entry = self._entries.get(package) or self._enter(package)
                entry.loads += 1
                self._write(package, entry)
            try:
                yield
            finally:
                with self._lock:
                    entry.loads = max(0, entry.loads - 1)  # it is 0 after `close`
                    self._write(package, entry)
                    self._tidy(package, entry)
        finally:
            if alone:
                self._one_suspect.release()

    def begin_pass(self, packages: Collection[bytes]) -> None:
        """Mark the packages of a pass, `PASS_PACKAGES_MAX` at most, as `raw_digest` names them."""
        self._pass_is_alone = (
            bool(self.suspects)
            and not self.suspects.isdisjoint(packages)
            and self._one_suspect.acquire(timeout=_PASS_WAIT_SECONDS)
        )
        marks = b"".join(packages)
        self._marks[_PASS : _PASS + len(marks)] = marks
        self._counts[_COUNT] = len(packages)

    def end_pass(self) -> None:
        """The pass has ended, well or not."""
        self._counts[_COUNT] = 0
        if self._pass_is_alone:
            self._one_suspect.release()

    def _learn(self, left: _Left) -> None:
        """Count what the last life has left, and say so; afterwards the file holds nothing else."""
        now = time.time()
        for package, (crashes, crash_time) in left.crashes.items():
            if crashes >= CRASHES_MAX or abs(now - crash_time) <= RECENT_SECONDS:
                self._entries[package] = _Entry(0, 0, crashes, crash_time)
        for package in left.busy:
            entry = self._entries.setdefault(package, _Entry(0))
            entry.crashes, entry.crash_time = min(entry.crashes + 1, CRASHES_MAX), now
            _log.warning("busy when the worker ended", digest=f"sha256:{package.hex()}", crashes=entry.crashes)
        newest = sorted(self._entries.items(), key=lambda item: -item[1].crash_time)[:_SLOT_COUNT]
        self._entries = dict(newest)
        self._free = list(range(len(newest), _SLOT_COUNT))
        self._marks[:] = _MAGIC.ljust(_SIZE_BYTES, b"\0")
        for slot, (package, entry) in enumerate(newest):
            entry.slot = slot
            self._write(package, entry)
        self._regroup()
        for package in self._quarantined:
            _log.error("quarantined: the admin's LoadExpert tries it again", digest=f"sha256:{package.hex()}")

    def _regroup(self) -> None:
        crashed = {package: entry.crashes for package, entry in self._entries.items() if entry.crashes}
        self._quarantined = frozenset(package for package, crashes in crashed.items() if crashes >= CRASHES_MAX)
        self.suspects = frozenset(crashed) - self._quarantined
        metrics.QUARANTINED_PACKAGES.set(len(self._quarantined))

    def _enter(self, package: bytes) -> _Entry:
        """A new line; in a full table, in place of the oldest crash."""
        if not self._free:
            crashes = [(entry.crash_time, old) for old, entry in self._entries.items() if not entry.loads]
            self._forget_crashes(min(crashes)[1])
        entry = self._entries[package] = _Entry(self._free.pop())
        return entry

    def _forget_crashes(self, package: bytes) -> None:
        entry = self._entries[package]
        entry.crashes, entry.crash_time = 0, 0.0
        self._write(package, entry)
        self._tidy(package, entry)
        self._regroup()

    def _tidy(self, package: bytes, entry: _Entry) -> None:
        """Free the line of a package that is neither busy nor suspected."""
        if not (entry.loads or entry.crashes):
            del self._entries[package]
            self._free.append(entry.slot)

    def _write(self, package: bytes, entry: _Entry) -> None:
        offset = _SLOTS + entry.slot * _SLOT.size
        _SLOT.pack_into(self._marks, offset, package, entry.loads, entry.crashes, entry.crash_time)


def raw_digest(digest: str) -> bytes:
    """The 32 bytes behind `sha256:<64 hex>`."""
    return bytes.fromhex(digest.removeprefix("sha256:"))


def _viewed(marks: mmap.mmap) -> tuple[mmap.mmap, memoryview[int]]:
    return marks, memoryview(marks).cast("Q")


def _not_kept(error: OSError) -> None:
    _log.error("journal not kept: a package that ends this worker will not be noticed", error=str(error))


def _read(data: bytes) -> _Left:
    """What a file says; an empty one says nothing.

    Raises:
        ValueError: It is no journal.
    """
    if not data:
        return _Left()
    if len(data) != _SIZE_BYTES or not data.startswith(_MAGIC):
        raise ValueError("not a journal")
    count = memoryview(data)[:_PASS].cast("Q")[_COUNT]
    if count > PASS_PACKAGES_MAX:
        raise ValueError(f"a pass of {count} packages")
    busy = {data[start : start + _DIGEST_BYTES] for start in range(_PASS, _PASS + count * _DIGEST_BYTES, _DIGEST_BYTES)}
    crashes: dict[bytes, tuple[int, float]] = {}
    for package, loads, crash_count, crash_time in _SLOT.iter_unpack(data[_SLOTS:]):
        if loads > _LOADS_MAX or crash_count > CRASHES_MAX or not math.isfinite(crash_time):
            raise ValueError(f"a package of {loads} loads and {crash_count} crashes")
        if loads:
            busy.add(package)
        if crash_count:
            crashes[package] = crash_count, crash_time
    return _Left(tuple(busy), crashes)
