"""The journal: what a worker that was killed had in hand is known to the next one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from prometheus_client import REGISTRY

from hocket.errors import HocketError, Reason
from services.expert_worker import journal as module
from services.expert_worker.journal import CRASHES_MAX, Journal, raw_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
A, B, C = ("sha256:" + letter * 64 for letter in "abc")
SECONDS = 10.0

CHILD = """
import sys, contextlib
from pathlib import Path
from services.expert_worker.journal import Journal, raw_digest

path, what, end, *digests = sys.argv[1:]
journal = Journal(Path(path))
journal.open()
with contextlib.ExitStack() as marks:
    for digest in digests:
        if what == "loading":
            marks.enter_context(journal.loading(digest))
    if what == "computing":
        journal.begin_pass({raw_digest(digest) for digest in digests})
    if end == "killed":
        print("marked", flush=True)
        sys.stdin.read()
    if what == "computing":
        journal.end_pass()
    if end == "killed afterwards":
        marks.close()
        print("marked", flush=True)
        sys.stdin.read()
    journal.close()
"""


def live(path: Path, what: str, end: str, *digests: str) -> None:
    """A process that marks packages, and then is killed or ends as it should."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), what, end, *digests],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        if end == "cleanly":
            assert child.wait(SECONDS) == 0
            return
        assert child.stdout is not None
        assert child.stdout.readline() == b"marked\n"
        child.kill()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    journal.open()
    try:
        yield journal
    finally:
        journal.close()


def crashes(path: Path) -> dict[str, int]:
    """What the file says."""
    return {f"sha256:{package.hex()}": count for package, (count, _) in module._read(path.read_bytes()).crashes.items()}


def busy(path: Path) -> set[str]:
    return {f"sha256:{package.hex()}" for package in module._read(path.read_bytes()).busy}


def crash(path: Path, *digests: str, times: int = 1) -> None:
    """Lives that end with these packages busy, without the processes: the file is left as a kill would leave it."""
    for _ in range(times):
        journal = Journal(path)
        journal.open()
        journal.begin_pass({raw_digest(digest) for digest in digests})
        left = path.read_bytes()
        journal.close()
        path.write_bytes(left)


def refusal(journal: Journal, digest: str) -> HocketError | None:
    try:
        journal.check(digest)
    except HocketError as error:
        return error
    return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal"


class TestKills:
    """Real processes and SIGKILL."""

    @pytest.mark.parametrize("what", ["loading", "computing"])
    def test_what_a_killed_process_had_in_hand_counts(self, path: Path, what: str) -> None:
        live(path, what, "killed", A, B)
        with structlog.testing.capture_logs() as logs, opened(path) as journal:
            assert crashes(path) == {A: 1, B: 1}
            assert journal.suspects == {raw_digest(A), raw_digest(B)}
        said = {entry["digest"]: entry["crashes"] for entry in logs if entry["event"] == "busy when the worker ended"}
        assert said == {A: 1, B: 1}

    @pytest.mark.parametrize("end", ["cleanly", "killed afterwards"])
    def test_what_it_had_finished_or_left_cleanly_does_not(self, path: Path, end: str) -> None:
        live(path, "computing", end, A, B)
        with opened(path):
            assert crashes(path) == {}

    def test_three_of_them_are_a_quarantine_which_the_next_life_keeps(self, path: Path) -> None:
        for kills in range(1, CRASHES_MAX + 1):
            live(path, "loading", "killed", A)
            with structlog.testing.capture_logs() as logs, opened(path) as journal:
                assert (refusal(journal, A) is None) == (kills < CRASHES_MAX)
                assert refusal(journal, B) is None
            assert any(entry["event"].startswith("quarantined") for entry in logs) == (kills == CRASHES_MAX)
        with opened(path) as journal:
            error = refusal(journal, A)
            assert error is not None
            assert (error.reason, error.metadata) == (Reason.QUARANTINED, {"digest": A})
            assert journal.suspects == frozenset()


class TestCounting:
    def test_marks_are_in_the_file_while_they_last(self, path: Path) -> None:
        with opened(path) as journal:
            with journal.loading(A), journal.loading(A):
                assert busy(path) == {A}
            assert busy(path) == set()
            journal.begin_pass({raw_digest(A), raw_digest(B)})
            with journal.loading(C):
                assert busy(path) == {A, B, C}
                journal.end_pass()
                assert busy(path) == {C}

    def test_a_load_that_fails_is_no_mark_any_more(self, path: Path) -> None:
        with opened(path) as journal:
            with pytest.raises(ZeroDivisionError), journal.loading(A):
                raise ZeroDivisionError
            assert busy(path) == set()

    def test_a_load_that_outlives_its_worker_marks_nothing_of_the_next_one(self, path: Path) -> None:
        journal = Journal(path)
        journal.open()
        with journal.loading(A):
            journal.close()
            assert busy(path) == set()
            with opened(path) as successor, successor.loading(B):
                assert busy(path) == {B}
        journal.close()

    def test_what_was_loading_and_in_a_pass_counts_once_per_crash(self, path: Path) -> None:
        with opened(path) as journal, journal.loading(A):
            journal.begin_pass({raw_digest(A)})
            left = path.read_bytes()
            journal.end_pass()
        path.write_bytes(left)
        with opened(path):
            assert crashes(path) == {A: 1}

    def test_counting_begins_anew_after_an_hour_without_a_crash(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = [1e9]
        monkeypatch.setattr("services.expert_worker.journal.time.time", lambda: clock[0])
        crash(path, A, times=2)
        with opened(path):
            pass
        clock[0] += module.RECENT_SECONDS
        with opened(path):
            assert crashes(path) == {A: 2}
        clock[0] += 1
        crash(path, A)
        with opened(path):
            assert crashes(path) == {A: 1}

    def test_a_quarantine_does_not_age(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        crash(path, A, times=3)
        with opened(path) as journal:
            assert refusal(journal, A)
        monkeypatch.setattr(module, "RECENT_SECONDS", -1.0)
        with opened(path) as journal:
            assert refusal(journal, A)

    def test_a_quarantine_is_counted_until_it_is_lifted_and_then_counting_begins_anew(self, path: Path) -> None:
        crash(path, A, B, times=3)
        with opened(path) as journal:
            assert REGISTRY.get_sample_value("hocket_quarantined_packages") == 2
            journal.lift(A)
            journal.lift(C)
            assert (refusal(journal, A), bool(refusal(journal, B))) == (None, True)
            assert REGISTRY.get_sample_value("hocket_quarantined_packages") == 1
        crash(path, A)
        with opened(path) as journal:
            assert (refusal(journal, A), bool(refusal(journal, B))) == (None, True)
            assert crashes(path) == {A: 1, B: 3}

    def test_lifting_what_is_no_quarantine_forgets_nothing(self, path: Path) -> None:
        crash(path, A, times=2)
        with opened(path) as journal:
            journal.lift(A)
            assert crashes(path) == {A: 2}

    def test_a_full_table_forgets_the_oldest_crash(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [1e9]
        monkeypatch.setattr("services.expert_worker.journal.time.time", lambda: clock[0])
        digests = [f"sha256:{number:064x}" for number in range(module._SLOT_COUNT)]
        for start in range(0, len(digests), 1024):
            clock[0] += 1
            crash(path, *digests[start : start + 1024])
        with opened(path) as journal:
            assert len(crashes(path)) == len(digests)
            with journal.loading(A):
                assert busy(path) == {A}
                assert crashes(path).keys() == set(digests[1:])
        crash(path, *digests[:1])
        with opened(path):
            assert digests[0] in crashes(path)


class TestSuspects:
    def test_suspects_run_one_at_a_time_and_others_beside_them(self, path: Path) -> None:
        crash(path, A, B)
        with opened(path) as journal:
            inside, leave, order = threading.Event(), threading.Event(), []

            def load() -> None:
                with journal.loading(A):
                    inside.set()
                    assert leave.wait(SECONDS)
                    order.append("loaded")

            def compute() -> None:
                journal.begin_pass({raw_digest(B)})
                order.append("computed")
                journal.end_pass()

            loading = threading.Thread(target=load)
            loading.start()
            assert inside.wait(SECONDS)
            journal.begin_pass({raw_digest(C)})  # no suspect: does not wait
            journal.end_pass()
            with journal.loading(C):
                pass
            threading.Timer(0.02, leave.set).start()
            compute()
            loading.join(SECONDS)
            assert order == ["loaded", "computed"]
            assert not journal._one_suspect.locked()

    def test_a_suspect_does_not_wait_for_ever(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_LOAD_WAIT_SECONDS", 0.01)
        crash(path, A, B)
        with opened(path) as journal:
            with journal.loading(A), journal.loading(B):
                journal.begin_pass({raw_digest(A)})
                assert busy(path) == {A, B}
                journal.end_pass()
                assert journal._one_suspect.locked()
            assert not journal._one_suspect.locked()


class TestFiles:
    def test_a_journal_that_is_not_open_marks_nothing_and_harms_nobody(self, path: Path) -> None:
        journal = Journal(path)
        with journal.loading(A):
            journal.begin_pass({raw_digest(A)})
            journal.end_pass()
        journal.check(A)
        journal.lift(A)
        journal.close()
        assert not path.exists()

    def test_two_workers_cannot_share_one(self, path: Path) -> None:
        with opened(path):
            with pytest.raises(HocketError, match=r"worker\.data_dir of its own") as refusal:
                Journal(path).open()
            assert refusal.value.reason is Reason.BAD_REQUEST
        with opened(path):
            pass

    @pytest.mark.parametrize("fault", ["no folder", "no file", "no room"])
    def test_a_journal_that_cannot_be_kept_is_said_and_serving_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        path = tmp_path / "journal"
        if fault == "no folder":
            path.write_bytes(b"")
            path = path / "journal"
        elif fault == "no file":
            path.mkdir()
        else:

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(os, "posix_fallocate", full)
        with structlog.testing.capture_logs() as logs, opened(path) as journal, journal.loading(A):
            journal.begin_pass({raw_digest(A)})
            journal.end_pass()
        assert [entry["event"].startswith("journal not kept") for entry in logs] == [True]

    @pytest.mark.parametrize(
        ("offset", "new"),
        [
            (0, b"H"),  # the magic
            (16, (1025).to_bytes(8, sys.byteorder)),  # packages in the pass
            (module._SLOTS + 32, (2**16 + 1).to_bytes(4, sys.byteorder)),  # loads
            (module._SLOTS + 36, (4).to_bytes(4, sys.byteorder)),  # crashes
            (module._SLOTS + 40, b"\xff" * 8),  # the time: not a number
            (module._SIZE_BYTES, b"\0"),  # the length
        ],
    )
    def test_a_damaged_one_is_said_and_begun_anew(self, path: Path, offset: int, new: bytes) -> None:
        crash(path, A, times=3)
        sound = path.read_bytes()
        path.write_bytes(sound[:offset] + new + sound[offset + len(new) :])
        with structlog.testing.capture_logs() as logs, opened(path) as journal:
            assert refusal(journal, A) is None
            assert crashes(path) == {}
        assert [entry["event"].startswith("journal damaged") for entry in logs] == [True]
        path.write_bytes(sound)
        with opened(path) as journal:
            assert refusal(journal, A)

    def test_half_a_file_is_a_damaged_one_and_an_empty_one_is_new(self, path: Path) -> None:
        crash(path, A)
        for size_bytes in (100, 0):
            path.write_bytes(path.read_bytes()[:size_bytes])
            with structlog.testing.capture_logs() as logs, opened(path):
                assert crashes(path) == {}
            assert bool(logs) == bool(size_bytes)
