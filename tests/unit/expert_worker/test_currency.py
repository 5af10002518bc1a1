"""What keeps a worker current: the trust folder, the registry's feed, its lease, and the tasks that never end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import structlog

from hocket.errors import HocketError, Reason
from hocket.packages import Policy
from hocket.trust_folder import TrustFolder
from hocket.v1 import package_pb2
from hocket.v1.registry_pb2 import Residency, WorkerState
from services.expert_worker import authority as authority_module
from services.expert_worker.announce import Announcer
from services.expert_worker.authority import Authority
from services.expert_worker.background import keep_running
from services.expert_worker.feed import Feed
from services.expert_worker.revocations import RevocationFile, Withdrawn
from tests.signing import ACME_ID, trusted
from tests.worker_registry import LEASE_SECONDS, WorkerRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
KEY = "ab" * 32


@asynccontextmanager
async def going_on(run: Callable[[], Awaitable[None]]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(keep_running("test", run))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.expert_worker.background._PAUSE_SECONDS_MIN", 0.01)
    monkeypatch.setattr("services.expert_worker.background._PAUSE_SECONDS_MAX", 0.02)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(TrustFolder(tmp_path / "trust"), Policy())


@pytest.fixture
def registry() -> WorkerRegistry:
    return WorkerRegistry()


class TestTrustFolder:
    def test_a_change_is_noticed_within_five_seconds(self) -> None:
        assert authority_module.POLL_SECONDS <= 2

    async def test_keys_that_come_and_go_are_noticed(
        self, authority: Authority, tmp_path: Path, registry: WorkerRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(authority_module, "POLL_SECONDS", 0.01)
        await authority.read_folder()
        async with going_on(authority.follow_folder):
            before = authority.standing
            await asyncio.sleep(0.05)
            assert authority.standing is before
            TrustFolder(tmp_path / "trust").add_key(trusted())
            await registry.until(lambda: ACME_ID in authority.standing.roots.keys)
            authority.changed.clear()
            TrustFolder(tmp_path / "trust").remove_key(ACME_ID)
            await registry.until(lambda: not authority.standing.roots.keys)
            assert authority.changed.is_set()

    def test_withdrawing_what_is_withdrawn_is_no_change(self, authority: Authority) -> None:
        assert authority.withdraw(Withdrawn(digests=frozenset({A})))
        before = authority.standing
        assert not authority.withdraw(Withdrawn(digests=frozenset({A})))
        assert authority.standing is before


class TestFeed:
    @pytest.fixture
    def heard(self) -> list[str]:
        return []

    @pytest.fixture
    def file(self, tmp_path: Path) -> RevocationFile:
        return RevocationFile(tmp_path / "revocations.json")

    @pytest.fixture
    def feed(self, registry: WorkerRegistry, authority: Authority, file: RevocationFile, heard: list[str]) -> Feed:
        return Feed(registry.client(), authority, file, heard.append)

    async def test_the_opening_state_and_every_change_count(
        self, registry: WorkerRegistry, authority: Authority, feed: Feed, file: RevocationFile, heard: list[str]
    ) -> None:
        registry.yank(A)
        registry.tell(worker=WorkerState(worker="other"))
        registry.tell(package=package_pb2.Package(digest=C, state=package_pb2.TRUST_STATE_ACTIVE))
        async with going_on(feed.follow):
            await registry.until(lambda: A in file.read().digests)
            registry.yank(B)
            registry.revoke(KEY)
            await registry.until(lambda: file.read() == Withdrawn(frozenset({KEY}), frozenset({A, B})))
        assert authority.standing.withdrawn == file.read()
        assert heard == [C]

    async def test_a_broken_feed_is_taken_up_where_it_broke(
        self, registry: WorkerRegistry, authority: Authority, feed: Feed
    ) -> None:
        registry.yank(A)
        async with going_on(feed.follow):
            await registry.until(lambda: A in authority.standing.withdrawn.digests)
            registry.refuse(Reason.NOT_READY)
            registry.yank(B)
            await registry.until(lambda: len(registry.watches) > 2)
            assert B not in authority.standing.withdrawn.digests
            registry.refuse(None)
            await registry.until(lambda: B in authority.standing.withdrawn.digests)
        assert registry.watches[0] == 0
        assert set(registry.watches[1:]) == {1}

    async def test_a_feed_that_breaks_before_it_was_whole_is_heard_from_the_beginning(
        self, registry: WorkerRegistry, feed: Feed
    ) -> None:
        registry.refuse(Reason.NOT_READY)
        async with going_on(feed.follow):
            await registry.until(lambda: len(registry.watches) > 2)
        assert set(registry.watches) == {0}

    async def test_a_registry_that_lost_its_history_is_heard_from_the_beginning_and_nothing_is_forgotten(
        self, registry: WorkerRegistry, authority: Authority, feed: Feed
    ) -> None:
        registry.yank(A)
        registry.yank(B)
        async with going_on(feed.follow):
            await registry.until(lambda: B in authority.standing.withdrawn.digests)
            registry.refuse(Reason.NOT_READY)
            registry.history.clear()
            registry.yank(C)
            await registry.until(lambda: len(registry.watches) > 1)
            registry.refuse(None)
            await registry.until(lambda: C in authority.standing.withdrawn.digests)
        assert authority.standing.withdrawn.digests == {A, B, C}
        assert registry.watches[-1] == 0

    async def test_another_life_of_the_registry_is_heard_from_the_beginning(
        self, registry: WorkerRegistry, authority: Authority, feed: Feed
    ) -> None:
        registry.yank(A)
        async with going_on(feed.follow):
            await registry.until(lambda: A in authority.standing.withdrawn.digests)
            registry.refuse(Reason.NOT_READY)
            registry.history.clear()
            registry.yank(B)
            registry.yank(C)
            registry.epoch = "second"
            await registry.until(lambda: len(registry.watches) > 1)
            registry.refuse(None)
            await registry.until(lambda: B in authority.standing.withdrawn.digests)
        assert registry.watches[-1] == 0

    async def test_a_disk_that_cannot_be_written_does_not_stop_the_feed(
        self, registry: WorkerRegistry, authority: Authority, heard: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "data").write_text("a file where the folder should be")
        file = RevocationFile(tmp_path / "data" / "revocations.json")
        feed = Feed(registry.client(), authority, file, heard.append)
        registry.yank(A)
        async with going_on(feed.follow):
            await registry.until(lambda: A in authority.standing.withdrawn.digests)
            (tmp_path / "data").unlink()
            registry.yank(B)
            await registry.until(lambda: file.read().digests == {A, B})


class TestLease:
    async def test_the_state_is_told_at_once_on_change_and_before_the_lease_ends(
        self, registry: WorkerRegistry
    ) -> None:
        state = WorkerState(worker="w", address="local:worker")
        announcer = Announcer(registry.client("secret"), lambda: WorkerState.FromString(state.SerializeToString()))
        async with going_on(announcer.hold):
            await registry.until(lambda: len(registry.states) == 1)
            state.residency.append(Residency(digest=A))
            announcer.notice()
            announcer.notice()
            await registry.until(lambda: len(registry.states) == 2)
            assert registry.states[1].residency[0].digest == A
            begin = asyncio.get_running_loop().time()
            await registry.until(lambda: len(registry.states) == 5)
            assert asyncio.get_running_loop().time() - begin < 3 * LEASE_SECONDS
        assert registry.tokens == ["Bearer secret"]

    async def test_a_broken_lease_is_taken_up_again(self, registry: WorkerRegistry) -> None:
        announcer = Announcer(registry.client(), lambda: WorkerState(worker="w"))
        registry.refuse(Reason.NOT_READY)
        async with going_on(announcer.hold):
            await registry.until(lambda: len(registry.tokens) > 2)
            assert registry.states == []
            registry.refuse(None)
            await registry.until(lambda: len(registry.states) > 0)

    async def test_a_last_word_does_not_wait_for_a_registry_that_is_away(self, registry: WorkerRegistry) -> None:
        announcer = Announcer(registry.client(), lambda: WorkerState(worker="w"))
        async with going_on(announcer.hold):
            await registry.until(lambda: len(registry.states) == 1)
            await announcer.tell(1.0)
            assert len(registry.states) == 2
        await announcer.tell(0.01)


class TestBackground:
    async def test_what_ends_or_fails_runs_again(self) -> None:
        runs: list[int] = []
        enough = asyncio.Event()

        async def run() -> None:
            runs.append(1)
            match len(runs):
                case 2 | 3:
                    raise HocketError(Reason.UNREACHABLE, "away")
                case 4:
                    raise ZeroDivisionError
                case 6:
                    enough.set()

        with structlog.testing.capture_logs() as logs:
            async with going_on(run), asyncio.timeout(5):
                await enough.wait()
        assert [(entry["event"], entry["log_level"]) for entry in logs] == [
            ("interrupted", "warning"),
            ("bug", "error"),
        ]

    async def test_after_a_long_run_the_next_trouble_is_news(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.expert_worker.background._SETTLED_SECONDS", -1)
        runs: list[int] = []

        async def run() -> None:
            runs.append(1)
            raise HocketError(Reason.UNREACHABLE, "away")

        with structlog.testing.capture_logs() as logs:
            async with going_on(run):
                await WorkerRegistry().until(lambda: len(runs) >= 2)
        assert len(logs) >= 2
