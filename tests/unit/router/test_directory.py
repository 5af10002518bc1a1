"""The router's view of the registry: what it makes of the feed, and what it does when the feed breaks."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from hocket.client.registry import FetchedMixture
from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import FixedGate, MixtureRecord, MixtureRef
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import AdapterFacts, BaseModel, ModelFacts, OutputColumn, Package, Release, TrustState
from hocket.v1.registry_pb2 import Residency, Synced, WatchResponse, WorkerState
from services.router import directory as module
from services.router.directory import Directory, Snapshot
from services.router.kept import Kept
from services.router.model import release_name
from services.router.placement import Base
from tests.routing import BASE as ROUTING_BASE
from tests.routing import asking_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

KEPT_BEFORE_ADAPTERS = (
    "686f636b65742d726f757465722d310ae03d9d7fdd8c821da06a9f38515cfbdda9b7c71f7471369b70bd811c8d06f9e4"
    "6c000000000000001a6a0a477368613235363a3030303030303030303030303030303030303030303030303030303030"
    "30303030303030303030303030303030303030303030303030303030303030303030311a0361707220012a100a046163"
    "6d6512036c6f771a01312801420650025a00680108000000000000000804120265304200"
)
ACTIVE, REVOKED = TrustState.TRUST_STATE_ACTIVE, TrustState.TRUST_STATE_KEY_REVOKED


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", (0.001,))
    monkeypatch.setattr(module, "_KEEP_SECONDS", 0.0)
    monkeypatch.setattr(module, "_MEND_SECONDS", 0.002)
    with capture_logs():  # where nobody has set up logs, a traceback with the values of all variables takes seconds
        yield


class ScriptedRegistry:
    """A registry client whose feed is a list of events; after each list the feed breaks with the given refusal."""

    def __init__(self, *feeds: list[WatchResponse] | HocketError) -> None:
        self.feeds = list(feeds)
        self.asked: list[int] = []
        self.bodies: dict[str, FetchedMixture] = {}
        self.fetches = 0

    async def watch(self, after_revision: int) -> AsyncIterator[WatchResponse]:
        self.asked.append(after_revision)
        feed = self.feeds.pop(0) if self.feeds else []
        if isinstance(feed, HocketError):
            raise feed
        for event in feed:
            yield event
        if not self.feeds:
            await asyncio.Event().wait()
        raise HocketError(Reason.UNREACHABLE, "the feed broke")

    async def fetch_mixture(self, mixture: str) -> FetchedMixture:
        self.fetches += 1
        return self.bodies[mixture]

    def hold(self, record: MixtureRecord, body: bytes | None = None, state: Any = ACTIVE) -> Mixture:
        message = Mixture(name=record.name, digest=record.digest, state=state)
        self.bodies[record.digest] = FetchedMixture(message, record.body() if body is None else body, b"", b"")
        return message


def package(number: int, *releases: tuple[str, Any], state: Any = ACTIVE, experts: int = 1) -> Package:
    facts = ModelFacts(feature_count=2, columns=[OutputColumn()], expert_count=experts)
    signed = [Release(publisher="acme", name=name, version="1", state=standing) for name, standing in releases]
    return Package(digest=f"sha256:{number:064x}", state=state, releases=signed, model=facts, format="apr")


def event(revision: int = 1, epoch: str = "e1", **of: Any) -> WatchResponse:
    return WatchResponse(revision=revision, epoch=epoch, **of)


def synced(revision: int = 1, epoch: str = "e1") -> WatchResponse:
    return event(revision, epoch, synced=Synced())


@asynccontextmanager
async def following(registry: Any, kept: Kept | None = None) -> AsyncIterator[Directory]:
    directory = Directory(registry, kept)
    tasks = [asyncio.create_task(directory.follow()), asyncio.create_task(directory.keep())]
    try:
        yield directory
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):  # for a machine with other work to do
        while not condition():  # noqa: ASYNC110 - the condition is the test's own
            await asyncio.sleep(0.001)


def revision_of(directory: Directory) -> int:
    try:
        return directory.snapshot.revision
    except HocketError as error:
        assert error.reason is Reason.NOT_READY  # noqa: PT017 - the only refusal there is
        return -1


async def test_a_package_answers_to_digest_and_releases() -> None:
    registry = ScriptedRegistry([event(package=package(1, ("low", ACTIVE), ("alias", ACTIVE))), synced(5)])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 5)
        resolve = directory.snapshot.resolve
        assert resolve("acme/low@1") is resolve("acme/alias@1") is resolve(package(1).digest)
        assert list(directory.snapshot.listed) == ["acme/low@1"]


async def test_an_unknown_model_is_told_of_a_close_one() -> None:
    registry = ScriptedRegistry([event(package=package(1, ("low", ACTIVE))), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        with pytest.raises(HocketError, match=r"did you mean 'acme/low@1'\?"):
            directory.snapshot.resolve("acme/lov@1")
        for short in ("low", "low@1"):
            with pytest.raises(HocketError, match=r"did you mean 'acme/low@1'\?"):
                directory.snapshot.resolve(short)
        with pytest.raises(HocketError, match="`hocket list` shows the packages, `hocket mixtures list`"):
            directory.snapshot.resolve("nothing like it")


async def test_a_withdrawn_release_is_refused_while_its_bytes_serve_under_another() -> None:
    registry = ScriptedRegistry([event(package=package(1, ("low", REVOKED), ("new", ACTIVE))), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        directory.snapshot.resolve("acme/new@1").check_servable()
        with pytest.raises(HocketError) as caught:
            directory.snapshot.resolve("acme/low@1")
        assert caught.value.reason is Reason.KEY_REVOKED


async def test_members_of_a_file_are_addressed_by_ordinal() -> None:
    registry = ScriptedRegistry([event(package=package(1, experts=3)), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        digest = package(1).digest
        assert directory.snapshot.resolve(f"{digest}#2").leaves[0].expert == ExpertId(digest, 2)
        for wrong in (f"{digest}#3", package(2).digest + "#0"):
            with pytest.raises(HocketError, match="UNKNOWN_MODEL"):
                directory.snapshot.resolve(wrong)


async def test_the_members_of_an_encrypted_file_are_addressed_and_its_gate_is_not() -> None:
    sealed = package(1, ("moe", ACTIVE), experts=3)
    sealed.model.encrypted = True
    registry = ScriptedRegistry([event(package=sealed), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        resolve = directory.snapshot.resolve
        assert resolve(f"{sealed.digest}#2").leaves[0].expert == ExpertId(sealed.digest, 2)
        assert not directory.snapshot.listed
        for address in (sealed.digest, "acme/moe@1"):
            with pytest.raises(HocketError, match=f"put a mixture of {sealed.digest}#0") as caught:
                resolve(address)
            assert caught.value.reason is Reason.ENCRYPTED


async def test_a_worker_says_what_it_has_credentials_for() -> None:
    registry = ScriptedRegistry([event(worker=WorkerState(worker="w", address="a:1", unlocks=["acme/iris"])), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert directory.snapshot.workers[0].unlocks == {"acme/iris"}


async def test_an_adapter_answers_no_rows_and_its_addresses_say_so() -> None:
    low, adapter = package(1, ("low", ACTIVE)), package(2, ("sql", ACTIVE))
    adapter.adapter.CopyFrom(AdapterFacts(name="sql", version="1"))
    registry = ScriptedRegistry([event(package=low), event(package=adapter), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert list(directory.snapshot.listed) == ["acme/low@1"]
        wrong = (adapter.digest, "acme/sql@1", "acme/sql", f"{adapter.digest}#0", f"{adapter.digest}#{'9' * 1000}")
        for address in wrong:
            with pytest.raises(HocketError, match="answers text") as caught:
                directory.snapshot.resolve(address)
            assert caught.value.reason is Reason.NOT_SERVABLE
            assert len(caught.value.message) < 400
        assert directory.snapshot.resolve("acme/low@1").digest == low.digest


async def test_adapters_are_found_by_every_name_and_workers_tell_their_base() -> None:
    adapter = package(2, ("sql", ACTIVE))
    adapter.adapter.CopyFrom(AdapterFacts(name="sql", version="1"))
    serving = WorkerState(worker="a", formats=["apr", "expert"], base=BaseModel(name="qwen", digest="sha256:q"))
    registry = ScriptedRegistry(
        [event(package=adapter), event(worker=serving), event(worker=WorkerState(worker="b")), synced()],
        [event(package=package(2, state=REVOKED)), event(worker=serving), synced(2)],
    )
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        experts = directory.snapshot.experts
        for address in (adapter.digest, "acme/sql@1", "acme/sql", "sql"):
            found = experts.find(address, "")
            assert found is not None
            assert found.name == "acme/sql@1"
        assert {worker.name: worker.base for worker in directory.snapshot.workers} == {
            "a": Base("qwen", "sha256:q"),
            "b": None,
        }
        await until(lambda: revision_of(directory) == 2)
        assert directory.snapshot.experts.find("sql", "") is None


async def test_a_mixture_may_be_released_under_an_adapter_s_name() -> None:
    low, adapter = package(1), package(2, ("sql", ACTIVE))
    adapter.adapter.CopyFrom(AdapterFacts(name="sql", version="1"))
    record = MixtureRecord("sql", (ExpertId(low.digest),), FixedGate((1,)), 1)
    registry = ScriptedRegistry()
    message = registry.hold(record)
    message.release.CopyFrom(Release(publisher="acme", name="sql", version="1", state=ACTIVE))
    registry.feeds = [[event(package=low), event(package=adapter), event(mixture=message), synced()]]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert directory.snapshot.resolve("acme/sql@1").digest == record.digest


async def test_a_broken_feed_is_taken_up_where_it_broke_and_serving_goes_on() -> None:
    registry = ScriptedRegistry(
        [event(package=package(1)), synced(7)],
        HocketError(Reason.UNREACHABLE, "gone"),
        [event(9, package=package(2)), synced(9)],
    )
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 9)
        assert registry.asked == [0, 7, 7]
        assert set(directory.snapshot.packages) == {package(1).digest, package(2).digest}


async def test_a_registry_from_a_backup_is_read_anew_and_nobody_notices_meanwhile() -> None:
    gate = asyncio.Event()

    class Slow(ScriptedRegistry):
        async def watch(self, after_revision: int) -> AsyncIterator[WatchResponse]:
            async for item in super().watch(after_revision):
                yield item
                if item.HasField("package") and item.epoch == "e2":
                    await gate.wait()

    registry = Slow(
        [event(package=package(1)), event(package=package(2)), synced(7)],
        HocketError(Reason.REVISION_UNKNOWN, "ahead of this history"),
        [event(2, "e2", package=package(2)), event(2, "e2", package=package(3)), synced(2, "e2")],
    )
    async with following(registry) as directory:
        await until(lambda: registry.asked == [0, 7, 0])
        await asyncio.sleep(0.01)
        assert set(directory.snapshot.packages) == {package(1).digest, package(2).digest}
        gate.set()
        await until(lambda: revision_of(directory) == 2)
        assert set(directory.snapshot.packages) == {package(2).digest, package(3).digest}


async def test_another_life_of_the_registry_is_read_from_its_beginning() -> None:
    second = [event(9, "e2", package=package(2)), synced(9, "e2")]
    registry = ScriptedRegistry([event(package=package(1)), synced(7)], second, second)
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 9)
        assert registry.asked == [0, 7, 0]
        assert set(directory.snapshot.packages) == {package(2).digest}


async def test_a_change_of_several_items_is_repeated_when_it_was_cut() -> None:
    registry = ScriptedRegistry(
        [synced(7), event(8, package=package(1))],
        [event(8, package=package(1)), event(8, package=package(2)), synced(8)],
    )
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 8 and len(directory.snapshot.packages) == 2)
        assert registry.asked == [0, 7]


async def test_a_flood_of_changes_makes_few_snapshots() -> None:
    packages = [package(number) for number in range(1500)]
    flood = [event(8 + number, package=changed) for number, changed in enumerate(packages)]
    registry = ScriptedRegistry([*(event(package=known) for known in packages), synced(7), *flood])
    registry.feeds.append([])
    swaps = 0

    class Counting(Directory):
        async def _swap(self) -> None:
            nonlocal swaps
            swaps += 1
            await super()._swap()

    directory = Counting(registry)  # type: ignore[arg-type]  # scripted
    task = asyncio.create_task(directory.follow())
    await until(lambda: revision_of(directory) == 8 + len(packages) - 1)
    task.cancel()
    assert swaps < 50


async def test_workers_outlive_a_restarted_registry_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EPOCH_GRACE_SECONDS", 0.05)
    second = [event(1, "e2", worker=WorkerState(worker="c")), synced(1, "e2")]
    registry = ScriptedRegistry(
        [
            event(worker=WorkerState(worker="a")),
            event(worker=WorkerState(worker="b")),
            synced(),
            event(worker_gone="b"),
        ],
        second,
        second,
    )
    async with following(registry) as directory:
        await asyncio.wait_for(directory.wait_for_worker(), 2)
        await until(lambda: {worker.name for worker in directory.snapshot.workers} == {"a", "c"})
        await until(lambda: {worker.name for worker in directory.snapshot.workers} == {"c"})


async def test_the_base_of_a_worker_that_has_gone_is_remembered() -> None:
    going = asyncio.Event()

    class Leaving(ScriptedRegistry):
        async def watch(self, after_revision: int) -> AsyncIterator[WatchResponse]:
            async for each in super().watch(after_revision):
                if each.HasField("worker_gone"):
                    await going.wait()
                yield each

    serving = WorkerState(worker="a", formats=["expert"], base=BaseModel(name="qwen", digest="sha256:q"))
    async with following(Leaving([event(worker=serving), synced(), event(worker_gone="a")])) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert not list(directory.snapshot.gone_bases)
        going.set()
        await until(lambda: len(directory.snapshot.gone_bases) == 1)
        assert [base.digest for base, _ in directory.snapshot.gone_bases] == ["sha256:q"]
        assert directory.snapshot.workers == ()


async def test_while_the_registry_is_away_again_nobody_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EPOCH_GRACE_SECONDS", 0.05)

    away = [HocketError(Reason.UNREACHABLE, "nobody answers")] * 9
    registry = ScriptedRegistry(
        [event(worker=WorkerState(worker="a")), synced()], [synced(1, "e2")], [synced(1, "e2")], *away
    )
    async with following(registry) as directory:
        await until(lambda: len(registry.asked) == 4)
        await asyncio.sleep(0.2)
        assert [worker.name for worker in directory.snapshot.workers] == ["a"]


async def test_a_worker_that_left_during_a_broken_feed_is_gone_when_it_is_back() -> None:
    registry = ScriptedRegistry(
        [event(worker=WorkerState(worker="a")), event(worker=WorkerState(worker="b")), synced()],
        [event(worker=WorkerState(worker="a")), synced()],
    )
    async with following(registry) as directory:
        await until(lambda: len(registry.asked) == 2)
        await until(lambda: [worker.name for worker in directory.snapshot.workers] == ["a"])


async def test_a_mixture_whose_body_cannot_be_had_now_is_not_lost() -> None:
    low = package(1)
    record = MixtureRecord("later", (ExpertId(low.digest),), FixedGate((1,)), 1)
    refusals = [HocketError(Reason.UNREACHABLE, "a blip")]

    class Blip(ScriptedRegistry):
        async def fetch_mixture(self, mixture: str) -> FetchedMixture:
            if refusals:
                raise refusals.pop()
            return await super().fetch_mixture(mixture)

    registry = Blip()
    message = registry.hold(record)
    registry.feeds = [
        [event(3, package=low), synced(3), event(5, mixture=message), event(6, package=package(2, state=REVOKED))]
    ]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 6)  # what comes after it is not held up
        assert directory.snapshot.packages[package(2).digest].state == REVOKED
        await until(lambda: "later" in directory.snapshot.addresses)
        assert directory.snapshot.resolve("later").digest == record.digest
        assert registry.asked == [0]


async def test_an_old_version_that_is_complete_at_last_does_not_stand_for_the_new_one() -> None:
    low = package(1)
    old, new = (MixtureRecord("m", (ExpertId(low.digest),), FixedGate((weight,)), 1) for weight in (1, 2))
    arrived, released = asyncio.Event(), asyncio.Event()
    fetched: list[str] = []

    class Late(ScriptedRegistry):
        async def fetch_mixture(self, mixture: str) -> FetchedMixture:
            fetched.append(mixture)
            if fetched.count(mixture) == 1:
                raise HocketError(Reason.UNREACHABLE, "a blip")
            if mixture == old.digest:
                arrived.set()
                await released.wait()
            return await super().fetch_mixture(mixture)

    registry = Late()
    first, second = registry.hold(old), registry.hold(new)

    async def feed(after_revision: int) -> AsyncIterator[WatchResponse]:
        registry.asked.append(after_revision)
        for item in (event(package=low), synced(), event(2, mixture=first)):
            yield item
        await arrived.wait()
        yield event(3, mixture=second)
        released.set()
        await asyncio.Event().wait()

    registry.watch = feed  # type: ignore[method-assign]  # a feed that waits
    async with following(registry) as directory:
        await until(lambda: "m" in directory.snapshot.addresses if released.is_set() else False)
        assert directory.snapshot.resolve("m").digest == new.digest


async def test_what_nobody_understands_does_not_keep_other_mixtures_from_theirs() -> None:
    low = package(1)
    damaged, well = (MixtureRecord(name, (ExpertId(low.digest),), FixedGate((1,)), 1) for name in ("a", "b"))
    asked: list[str] = []

    class Broken(ScriptedRegistry):
        async def fetch_mixture(self, mixture: str) -> FetchedMixture:
            asked.append(mixture)
            if asked.count(mixture) == 1:
                raise HocketError(Reason.UNREACHABLE, "a blip")
            if mixture == damaged.digest:
                raise KeyError(mixture)
            if asked.count(damaged.digest) < 3:
                raise HocketError(Reason.UNREACHABLE, "a blip")
            return await super().fetch_mixture(mixture)

    registry = Broken()
    held = [registry.hold(damaged), registry.hold(well)]
    registry.feeds = [[event(package=low), synced(), *(event(2, mixture=message) for message in held)]]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 2)
        await until(lambda: "b" in directory.snapshot.addresses)


async def test_what_leads_through_an_inner_mixture_of_unknown_state_does_not_serve() -> None:
    low = package(1)
    inner = MixtureRecord("inner", (ExpertId(low.digest),), FixedGate((1,)), 1)
    outer = MixtureRecord("outer", (MixtureRef(inner.digest),), FixedGate((1,)), 1)
    damaged: list[str] = []

    class Damaged(ScriptedRegistry):
        async def fetch_mixture(self, mixture: str) -> FetchedMixture:
            if mixture in damaged:
                raise HocketError(Reason.BLOB_CORRUPT, "damaged")
            return await super().fetch_mixture(mixture)

    registry = Damaged()
    registry.hold(inner)
    message = registry.hold(outer)
    gate = asyncio.Event()

    async def feed(after_revision: int) -> AsyncIterator[WatchResponse]:
        registry.asked.append(after_revision)
        for item in (event(package=low), event(mixture=message), synced()):
            yield item
        await gate.wait()
        yield event(2, mixture=message)
        await asyncio.Event().wait()

    registry.watch = feed  # type: ignore[method-assign]  # a feed that waits
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert "outer" in directory.snapshot.addresses
        damaged.append(inner.digest)
        gate.set()
        await until(lambda: "outer" not in directory.snapshot.addresses)
        damaged.clear()
        await until(lambda: "outer" in directory.snapshot.addresses)


async def test_a_package_is_listed_under_a_release_that_may_be_used() -> None:
    registry = ScriptedRegistry([event(package=package(1, ("low", REVOKED), ("new", ACTIVE))), synced()])
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert list(directory.snapshot.listed) == ["acme/new@1"]


async def test_an_event_nobody_understands_does_not_end_the_following() -> None:
    class Broken(ScriptedRegistry):
        async def fetch_mixture(self, mixture: str) -> FetchedMixture:
            raise KeyError(mixture)

    registry = Broken()
    message = registry.hold(MixtureRecord("x", (ExpertId(package(1).digest),), FixedGate((1,)), 1))
    registry.feeds = [[event(1, mixture=message), synced(1)], [event(2, package=package(1)), synced(2)]]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 2)


async def test_the_last_view_serves_before_the_registry_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REGISTRY_SECONDS", 0.2)
    low = package(1, ("low", ACTIVE))
    record = MixtureRecord("kept", (ExpertId(low.digest),), FixedGate((1,)), 1)
    registry = ScriptedRegistry()
    message = registry.hold(record)
    worker = WorkerState(worker="a", address="a:1")
    registry.feeds = [[event(4, package=low), event(4, mixture=message), event(4, worker=worker), synced(4)]]
    kept = Kept(tmp_path / "router" / "router.view")
    async with following(registry, kept) as directory:
        await until(lambda: revision_of(directory) == 4)
        await until((tmp_path / "router" / "router.view").exists)
    silent = ScriptedRegistry(*[HocketError(Reason.UNREACHABLE, "down")] * 1000)
    async with following(silent, kept) as directory:
        await until(lambda: directory._snapshot is not None)
        assert directory.snapshot.resolve("kept").digest == record.digest
        assert directory.snapshot.resolve("acme/low@1").digest == low.digest
        await asyncio.wait_for(directory.wait_for_worker(), 2)  # and after a while that is all there is to know
        assert silent.asked[:1] in ([], [0])  # the feed will be read from its beginning


async def test_what_was_known_earlier_is_not_ready_while_the_registry_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REGISTRY_SECONDS", 0.05)
    kept = Kept(tmp_path / "router.view")
    await asyncio.to_thread(kept.write, [event(worker=WorkerState(worker="a")), synced(1)], [])
    registry = ScriptedRegistry([synced(2, "e2")])  # which no worker has found yet
    async with following(registry, kept) as directory:
        await until(lambda: revision_of(directory) == 2)
        assert [worker.name for worker in directory.snapshot.workers] == ["a"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(directory.wait_for_worker(), 0.3)
    told = ScriptedRegistry([event(2, "e2", worker=WorkerState(worker="a")), synced(2, "e2")])
    async with following(told, kept) as directory:
        await asyncio.wait_for(directory.wait_for_worker(), 2)


async def test_a_worker_inside_a_process_that_has_ended_is_not_remembered(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "router.view")
    workers = [WorkerState(worker="inside", address="local:worker"), WorkerState(worker="apart", address="a:1")]
    await asyncio.to_thread(kept.write, [*(event(worker=worker) for worker in workers), synced(1)], [])
    silent = ScriptedRegistry(*[HocketError(Reason.UNREACHABLE, "down")] * 1000)
    async with following(silent, kept) as directory:
        await until(lambda: directory._snapshot is not None)
        assert [worker.name for worker in directory.snapshot.workers] == ["apart"]


async def test_a_copy_made_by_a_router_that_knew_no_adapters_is_served_from(tmp_path: Path) -> None:
    """Its bytes, as that router wrote them for a package of one feature and one column."""
    path = tmp_path / "router.view"
    path.write_bytes(bytes.fromhex(KEPT_BEFORE_ADAPTERS))
    silent = ScriptedRegistry(*[HocketError(Reason.UNREACHABLE, "down")] * 1000)
    async with following(silent, Kept(path)) as directory:
        await until(lambda: directory._snapshot is not None)
        model = directory.snapshot.resolve("acme/low@1")
        assert (model.digest, model.feature_count, model.column_count) == (package(1).digest, 2, 1)


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"cut", b"flip"])
async def test_a_damaged_copy_is_no_copy(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "router.view"
    kept = Kept(path)
    kept.write([WatchResponse(package=package(1)), synced(4)], [])
    whole = path.read_bytes()
    path.write_bytes({b"cut": whole[:-1], b"flip": whole[:40] + b"\xff" + whole[41:]}.get(damage, damage))
    events, _ = kept.read()
    assert events == []
    path.write_bytes(whole)
    assert len(kept.read()[0]) == 2


async def test_a_mixture_that_is_not_what_was_announced_is_left_out() -> None:
    low = package(1)
    good = MixtureRecord("good", (ExpertId(low.digest),), FixedGate((1,)), 1)
    forged = MixtureRecord("forged", (ExpertId(low.digest),), FixedGate((2,)), 1)
    registry = ScriptedRegistry()
    messages = [registry.hold(good), registry.hold(forged, good.body())]
    registry.feeds = [[event(package=low), *(event(mixture=message) for message in messages), synced()]]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        assert directory.snapshot.resolve("good").digest == good.digest == digest_of(good.body())
        with pytest.raises(HocketError, match="UNKNOWN_MODEL"):
            directory.snapshot.resolve("forged")


async def test_a_mixture_waits_for_its_packages_and_goes_with_its_name() -> None:
    low = package(1)
    record = MixtureRecord("early", (ExpertId(low.digest),), FixedGate((1,)), 1)
    registry = ScriptedRegistry()
    message = registry.hold(record)
    gone = Mixture(name="early", digest=record.digest, deleted=True)
    registry.feeds = [
        [event(1, mixture=message), synced(1), event(2, package=low)],
        [event(3, mixture=gone), synced(3)],
    ]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) >= 1)
        await until(lambda: revision_of(directory) == 3)
        with pytest.raises(HocketError, match="UNKNOWN_MODEL"):
            directory.snapshot.resolve("early")
        assert registry.fetches == 1


async def test_the_weight_that_comes_through_a_withdrawn_inner_mixture_is_missing() -> None:
    low, high = package(1), package(2)
    inner = MixtureRecord("inner", (ExpertId(low.digest), ExpertId(high.digest)), FixedGate((1, 1)), 2)
    outer = MixtureRecord("outer", (MixtureRef(inner.digest), ExpertId(high.digest)), FixedGate((1, 1)), 2)
    registry = ScriptedRegistry()
    registry.hold(inner, state=REVOKED)
    message = registry.hold(outer)
    registry.feeds = [[event(package=low), event(package=high), event(mixture=message), synced()]]
    async with following(registry) as directory:
        await until(lambda: revision_of(directory) == 1)
        model = directory.snapshot.resolve("outer")
        model.check_servable()
        leaves = [(leaf.expert.digest, leaf.refusal) for leaf in model.leaves]
        assert leaves == [(low.digest, Reason.KEY_REVOKED), (high.digest, Reason.KEY_REVOKED), (high.digest, None)]
        assert model.top.members[1] == 2  # the direct way to the second expert is open


class Swapping(ScriptedRegistry):
    """Revision n brings release n of every package, and one worker that holds package n; then the feed ends."""

    PACKAGES = 6

    async def watch(self, after_revision: int) -> AsyncIterator[WatchResponse]:
        revision = after_revision + 1
        for number in range(self.PACKAGES):
            changed = package(number, (f"p{number}", ACTIVE))
            changed.releases[0].version = str(revision)
            yield event(revision, package=changed)
        yield event(revision, package=asking_for(100, "sql", "sql", version=f"{revision}.0.0"))
        held = [Residency(digest=package(revision).digest)]
        base = BaseModel(name=ROUTING_BASE.name, digest=ROUTING_BASE.digest)
        yield event(revision, worker=WorkerState(worker="w", residency=held, formats=["expert"], base=base))
        yield synced(revision)

    @classmethod
    def torn(cls, snapshot: Snapshot) -> list[str]:
        """The parts of a snapshot that are not of its revision."""
        names = {f"acme/p{number}@{snapshot.revision}" for number in range(cls.PACKAGES)}
        digests = {package(number).digest for number in range(cls.PACKAGES)}
        expert = f"acme/sql@{snapshot.revision}.0.0"
        [gate] = snapshot.gates.values()
        whole = {
            "listed": snapshot.listed.keys() == names,
            "addresses": snapshot.addresses.keys() == names | digests,
            "packages": {release_name(snapshot.packages[digest].releases[0]) for digest in digests} == names,
            "models": {snapshot.resolve(digest).name for digest in digests} == names,
            "workers": snapshot.workers[0].resident == {package(snapshot.revision).digest},
            "experts": expert in snapshot.experts.by_address,
            "gates": [each.name for each in gate.experts] == [expert],
        }
        return [part for part, is_whole in whole.items() if not is_whole]


async def test_whoever_reads_while_snapshots_are_swapped_sees_one_revision_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", (0.0,))
    monkeypatch.setattr(module, "_SWAP_SECONDS", 0.0)
    torn: list[str] = []
    seen: set[int] = set()
    done = threading.Event()

    def read(directory: Directory) -> None:
        while not done.is_set():
            snapshot = directory.snapshot
            torn.extend(Swapping.torn(snapshot))
            seen.add(snapshot.revision)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        async with following(Swapping()) as directory:
            await until(lambda: revision_of(directory) > 0)
            readers = [asyncio.create_task(asyncio.to_thread(read, directory)) for _ in range(2)]
            await until(lambda: len(seen) > 50 or any(reader.done() for reader in readers))
            done.set()
            await asyncio.gather(*readers)
    finally:
        done.set()
        sys.setswitchinterval(interval)
    assert torn == []


GATED = WorkerState(worker="w", formats=["expert"], base=BaseModel(name=ROUTING_BASE.name, digest=ROUTING_BASE.digest))


async def test_while_gates_are_made_the_snapshot_before_serves_and_the_next_one_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    going, build = threading.Event(), module.build_gates
    arrived, fed = threading.Event(), asyncio.Event()

    class Waiting(ScriptedRegistry):
        async def watch(self, after_revision: int) -> AsyncIterator[WatchResponse]:
            async for each in super().watch(after_revision):
                if each.revision == 2:
                    await fed.wait()
                yield each

    def held(*args: Any) -> Any:
        if snapshots:
            arrived.set()
            assert going.wait(20)
        return build(*args)

    snapshots: list[Snapshot] = []
    monkeypatch.setattr(module, "build_gates", held)
    first, second = (asking_for(number, f"e{number}", "sql") for number in (1, 2))
    feed = [event(package=first), event(worker=GATED), synced(), event(2, package=second)]
    async with following(Waiting(feed)) as directory:
        await until(lambda: revision_of(directory) == 1)
        snapshots.append(directory.snapshot)
        fed.set()
        await until(arrived.is_set)
        assert directory.snapshot is snapshots[0]
        going.set()
        await until(lambda: revision_of(directory) == 2)
        [gate] = directory.snapshot.gates.values()
        assert [expert.name for expert in gate.experts] == ["acme/e1@1.0.0", "acme/e2@1.0.0"]


async def test_a_gate_that_cannot_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    build, builds = module.build_gates, 0

    def failing(*args: Any) -> Any:
        nonlocal builds
        builds += 1
        if builds % 2:
            raise RuntimeError(builds)
        return build(*args)

    monkeypatch.setattr(module, "build_gates", failing)
    feed = [event(worker=GATED), synced()]
    async with following(ScriptedRegistry(feed, [*feed, event(2, package=asking_for(1, "e", "sql"))])) as directory:
        await until(lambda: revision_of(directory) == 2)
        assert builds == 4
        assert len(directory.snapshot.gates[ROUTING_BASE.digest].experts) == 1
