"""Large package files are mapped under a lease, and nobody can change or shorten one meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import TrustRoots, open_package
from hocket.packages.model import Lasso
from services.expert_worker import mapping
from services.expert_worker.cache import PackageCache
from services.expert_worker.journal import Journal
from services.expert_worker.mapping import is_intact, read_or_map
from tests.builders import METADATA, apr_bytes, edited, floats, linear
from tests.signing import NOW, STRANGER_SEED, envelope_of, roots

THRESHOLD_BYTES = mapping.MAPPED_BYTES_MIN
LARGE_BYTES = 10_000
"""Files above this are large, in these tests."""
MOST = 10 * LARGE_BYTES
OPEN_FILES = Path("/proc/self/fd")


@pytest.fixture(autouse=True)
def _large_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "MAPPED_BYTES_MIN", LARGE_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(LARGE_BYTES + 1))
    return path


def other_process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)


def fails_to_open_for_writing(path: Path) -> bool:
    """Whether anyone, this process included, would have to wait."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return True
    return False


def test_the_threshold_is_50_megabytes() -> None:
    assert THRESHOLD_BYTES == 50_000_000


def test_a_large_file_is_mapped_and_a_small_one_read(path: Path) -> None:
    content = path.read_bytes()

    mapped = read_or_map(path, MOST)
    path.with_name("small").write_bytes(content[:LARGE_BYTES])
    small = read_or_map(path.with_name("small"), MOST)

    assert isinstance(mapped, memoryview)
    assert mapped.readonly
    assert mapped == content
    assert isinstance(small, bytes)
    assert small == content[:LARGE_BYTES]


def test_a_file_beyond_the_limit_is_none(path: Path) -> None:
    assert read_or_map(path, LARGE_BYTES) is None
    assert read_or_map(path, LARGE_BYTES + 1) is not None
    with pytest.raises(FileNotFoundError):
        read_or_map(path.with_name("missing"), MOST)


def test_whoever_would_change_a_mapped_file_waits_until_the_map_is_gone(path: Path) -> None:
    content = path.read_bytes()
    mapped = read_or_map(path, MOST)
    assert mapped is not None

    assert fails_to_open_for_writing(path)
    shortener = other_process(f"import os; os.truncate({str(path)!r}, 0)")
    with pytest.raises(subprocess.TimeoutExpired):
        shortener.wait(1.5)
    assert bytes(mapped) == content, "not one page is missing"
    assert digest_of(mapped) == digest_of(content)

    del mapped
    gc.collect()
    assert shortener.wait(10) == 0
    assert path.stat().st_size == 0
    assert not fails_to_open_for_writing(path)


def test_a_mapped_file_may_be_removed_or_replaced(path: Path) -> None:
    content = path.read_bytes()
    mapped = read_or_map(path, MOST)

    path.with_name("other").write_bytes(b"other")
    path.with_name("other").replace(path)
    assert mapped == content
    path.unlink()
    assert mapped == content


def test_a_file_that_somebody_can_write_to_is_read(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as writer:
        data = read_or_map(path, MOST)
        writer.truncate(10)

    assert isinstance(data, bytes)
    assert data == content


@pytest.mark.parametrize("refused", ["F_SETSIG", "F_SETLEASE"])
def test_a_file_is_read_where_there_are_no_leases(path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    original: Any = fcntl.fcntl

    def without(file: int, command: int, argument: int) -> Any:
        if command == getattr(fcntl, refused):
            raise OSError(errno.EINVAL, "no leases here")
        return original(file, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without)

    assert isinstance(read_or_map(path, MOST), bytes)


def test_a_file_is_read_where_no_map_can_be_had(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_Map", Mock(side_effect=OSError(errno.ENOMEM, "no room")))

    data = read_or_map(path, MOST)
    assert isinstance(data, bytes)
    assert len(data) == LARGE_BYTES + 1


def test_a_map_that_cannot_be_looked_after_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dup, left = os.dup, [OSError(errno.EMFILE, "too many open files")]

    def first_fails(file: int) -> int:
        if left:
            raise left.pop()
        return dup(file)

    monkeypatch.setattr(os, "dup", first_fails)

    assert isinstance(read_or_map(path, MOST), bytes)
    gc.collect()
    assert not fails_to_open_for_writing(path)


def test_a_map_is_intact_until_somebody_wants_to_change_the_file(path: Path) -> None:
    mapped = read_or_map(path, MOST)
    assert mapped is not None
    path.read_bytes()
    assert is_intact(mapped)

    assert fails_to_open_for_writing(path)
    assert not is_intact(mapped)
    copied = read_or_map(path, MOST, may_map=False)
    assert isinstance(copied, bytes)
    assert is_intact(copied)


def test_no_file_stays_open(path: Path) -> None:
    before = len(list(OPEN_FILES.iterdir()))
    for _ in range(10):
        assert read_or_map(path, MOST) is not None
        read_or_map(path, 1)
    gc.collect()

    assert len(list(OPEN_FILES.iterdir())) == before


def test_the_signal_of_a_broken_lease_ends_nobody(path: Path) -> None:
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL  # whose default is to be ignored
    mapped = read_or_map(path, MOST)
    for _ in range(3):
        assert fails_to_open_for_writing(path)
    assert mapped is not None


class TestPackages:
    MODEL = linear(*([0.5] * LARGE_BYTES))

    def test_a_mapped_package_is_opened_as_if_it_were_read(self, tmp_path: Path) -> None:
        data = apr_bytes(self.MODEL, compression="none")
        cache = PackageCache(tmp_path / "cache", 2**30)
        digest = digest_of(data)
        cache.write(digest, data, (envelope_of(data),))

        cached = cache.read(digest)
        assert cached is not None
        assert isinstance(cached.data, memoryview)
        package = open_package(cached.data, releases=cached.releases, trust=roots(), now=NOW, digest=digest)
        assert package.facts.digest == digest

        path = tmp_path / "cache" / "sha256" / digest[7:9] / digest[7:]
        assert fails_to_open_for_writing(path)
        del cached
        gc.collect()
        assert not fails_to_open_for_writing(path), "the decoded package holds nothing of the file"

    @pytest.mark.parametrize("sound", [True, False])
    def test_layouts_that_do_not_fit_and_proofs_that_do_not_hold_keep_nothing_of_the_file(
        self, path: Path, *, sound: bool
    ) -> None:
        lasso = Lasso(floats(*[0.5] * LARGE_BYTES), 0.5, alpha=0.25)
        data = apr_bytes(lasso, metadata=METADATA, compression="none")  # not said to be one: a Ridge is tried before
        if not sound:
            data = edited(data, len(data) - 5, b"\xff")
        path.write_bytes(data)
        releases = (envelope_of(data, STRANGER_SEED), envelope_of(data))

        gc.disable()
        try:
            mapped = read_or_map(path, MOST)
            assert isinstance(mapped, memoryview)
            with contextlib.nullcontext() if sound else pytest.raises(HocketError) as refusal:
                package = open_package(mapped, releases=releases, trust=roots(), now=NOW)
                assert isinstance(package.model, Lasso)
            del mapped, refusal
            assert not fails_to_open_for_writing(path)
        finally:
            gc.enable()

    def test_a_package_that_was_cut_off_before_is_refused_by_its_digest(self, tmp_path: Path) -> None:
        data = apr_bytes(self.MODEL, compression="none")
        cache = PackageCache(tmp_path / "cache", 2**30)
        cache.write(digest_of(data), data, ())
        os.truncate(tmp_path / "cache" / "sha256" / digest_of(data)[7:9] / digest_of(data)[7:], len(data) - 5000)

        cached = cache.read(digest_of(data))
        assert cached is not None
        assert isinstance(cached.data, memoryview)
        with pytest.raises(HocketError) as refusal:
            open_package(cached.data, trust=TrustRoots(), now=NOW, digest=digest_of(data))
        assert refusal.value.reason is Reason.DIGEST_MISMATCH

    def test_only_this_worker_can_look_into_its_cache(self, tmp_path: Path) -> None:
        cache = PackageCache(tmp_path / "cache", 2**30)
        cache.write(digest_of(b"x"), b"x", ())

        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_worker_that_dies_of_a_missing_page_after_all_knows_the_package_that_it_was_loading(tmp_path: Path) -> None:
    """What no lease can help against, such as a disk that fails, ends the process: but never unnoticed."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2**16))
    code = f"""
        import mmap, os
        from pathlib import Path
        from services.expert_worker.journal import Journal
        journal = Journal(Path({str(tmp_path / "journal")!r}))
        journal.open()
        with open({str(path)!r}, "rb") as file, journal.loading({digest_of(b"package")!r}):
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            os.truncate({str(path)!r}, 0)
            mapped[2**15]
    """
    for _ in range(3):
        path.write_bytes(bytes(2**16))
        assert other_process(code).wait() == -signal.SIGBUS

    journal = Journal(tmp_path / "journal")
    journal.open()
    with pytest.raises(HocketError) as refusal:
        journal.check(digest_of(b"package"))
    assert refusal.value.reason is Reason.QUARANTINED
    journal.close()
