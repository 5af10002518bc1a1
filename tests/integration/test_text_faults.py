"""Text from a suite of real processes while parts of it are killed, stopped, and what they serve is withdrawn.

One router, one aggregator, one registry, and two workers with the same base.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from examples.publishing import Publisher
from hocket import known_bases
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.router import TextPlanned
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.rpc.channel import Channels
from hocket.v1 import text_pb2
from tests.bases import tiny_base
from tests.clusters import Cluster
from tests.engines import NAME, random_package
from tests.registries import trust_in
from tests.signing import ACME_SEED, ZETA_ID, ZETA_SEED

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from hocket.client import RouterClient
    from tests.clusters import Member

pytestmark = pytest.mark.long  # two workers that import torch and transformers, each time one is killed

ACME = Publisher("acme", ACME_SEED)
ZETA = Publisher("zeta", ZETA_SEED)
CONTEXT = 16384
ENDLESS = CONTEXT - 64
"""Tokens of an answer that takes longer than any test."""
WORKERS = ("worker-1", "worker-2")
PACKAGES = {
    "one": random_package(seed=1, name="one"),
    "two": random_package("ia3", seed=2, name="two"),
}
PROMPT = "select name from people"
SECONDS = 60.0
LIVES = 4
Event = Any


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    trust_in(folder)
    base = tiny_base(folder / NAME, max_position_embeddings=CONTEXT)
    known_bases.add(folder / "bases", base)
    memory = {"slab_bytes": 2**25, "budget_bytes": 2**22}
    cluster = Cluster.of(folder, workers=2, worker={"bases_dir": folder / "bases", **memory})
    try:
        cluster.start()
        asyncio.run(prepare(cluster))
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
async def whole(cluster: Cluster) -> None:
    """Every test begins with all processes, and each worker is known to the router."""
    await cluster.mend()
    await served_by(cluster, *WORKERS)


async def prepare(cluster: Cluster) -> None:
    await cluster.ready()
    async with cluster.registry() as registry:
        for name, data in PACKAGES.items():
            await registry.publish(data, ACME.release(data, name, package_format="expert"))


async def served_by(cluster: Cluster, *names: str) -> None:
    """Until the router plans with these workers."""
    async with asyncio.timeout(SECONDS), cluster.client() as client:
        while {replica.worker for replica in (await plan(client)).replicas} != {*names}:  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.05)


async def plan(client: RouterClient) -> text_pb2.TextPlan:
    """What the router would do, as far as one token shows it."""
    try:
        async with aclosing(generate(client, 1)) as events:
            async for event in events:
                assert isinstance(event, TextPlanned)
                return event.plan
    except HocketError as error:
        assert error.reason in {Reason.UNKNOWN_BASE, Reason.NO_REPLICA, Reason.NOT_READY}, error  # noqa: PT017
    return text_pb2.TextPlan()


def generate(
    client: RouterClient, count: int, experts: dict[str, float] | None = None, **options: Any
) -> AsyncGenerator[Event, None]:
    settings: dict[str, Any] = {"ignore_eos": True, "temperature": 0.0, "timeout_seconds": SECONDS, **options}
    return client.generate(PROMPT, experts=experts or {}, max_tokens=count, **settings)


class Reading:
    """An answer that is being read in the background.

    Attributes:
        plan: Of the answer.
        worker: Whose it is, once it has said so.
        ids: The tokens that have come.
        finish: Its end.
        changed: Set at each event.
    """

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self.plan = text_pb2.TextPlan()
        self.worker = ""
        self.ids: list[int] = []
        self.finish: text_pb2.TextFinish | None = None
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncGenerator[Event, None]) -> None:
        try:
            async for event in events:
                match event:
                    case TextPlanned():
                        self.plan = event.plan
                    case text_pb2.TextStart():
                        self.worker = event.worker
                    case text_pb2.TextDelta():
                        self.ids += [token.id for token in event.tokens]
                    case text_pb2.TextFinish():
                        self.finish = event
                self._changed.set()
        finally:
            self._changed.set()

    async def until(self, count: int) -> None:
        """So many tokens are there, or the plan for 0."""
        async with asyncio.timeout(SECONDS):
            while len(self.ids) < count or not self.plan.replicas:
                assert not self.task.done(), self.task.exception()
                self._changed.clear()
                await self._changed.wait()

    async def refused(self) -> HocketError:
        with pytest.raises(HocketError) as refusal:
            await asyncio.wait_for(self.task, SECONDS)
        assert self.finish is None
        return refusal.value

    async def whole(self) -> list[int]:
        """Every token, once it has ended well."""
        await asyncio.wait_for(self.task, SECONDS)
        assert self.finish is not None
        assert self.finish.usage.completion_token_count == len(self.ids)
        return self.ids

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@asynccontextmanager
async def reading(client: RouterClient, count: int, *experts: str, **options: Any) -> AsyncIterator[Reading]:
    running = Reading(generate(client, count, dict.fromkeys(experts, 0.5), **options))
    try:
        yield running
    finally:
        await running.leave()


async def answer(client: RouterClient, count: int, *experts: str) -> Reading:
    async with reading(client, count, *experts) as running:
        await running.whole()
        return running


@asynccontextmanager
async def worker(member: Member) -> AsyncIterator[ExpertWorkerClient]:
    channels = Channels()
    try:
        yield ExpertWorkerClient(channels.get(member.address))
    finally:
        await channels.close()


async def hold(member: Member, name: str) -> None:
    """Have a worker load an expert: while one holds it and is not busy, no other is asked first."""
    async with worker(member) as client:
        assert [step async for step in client.load(digest_of(PACKAGES[name]))]


async def idle(member: Member) -> None:
    """Until a worker computes nothing, and holds nothing for anybody."""
    async with asyncio.timeout(SECONDS), worker(member) as client:
        while True:
            listed = await client.list_experts()
            engine = listed.engine
            busy = engine.running_count + engine.waiting_count + engine.kv_used_page_count
            if not busy + sum(expert.in_use_count for expert in listed.experts):
                return
            await asyncio.sleep(0.02)


async def both_answer(client: RouterClient) -> None:
    """Until each of the workers has answered: whoever has just been started again is only then one to fall back on."""
    async with asyncio.timeout(SECONDS):
        while {each.worker for each in await asyncio.gather(*(answer(client, 3) for _ in range(8)))} != {*WORKERS}:
            pass


async def test_texts_go_on_without_the_registry(cluster: Cluster) -> None:
    async with cluster.client() as client:
        for name in WORKERS:
            await hold(cluster[name], "one")
        wanted = (await answer(client, 100, "one")).ids
        async with reading(client, 100, "one") as running:
            await running.until(1)
            cluster["registry"].kill()
            assert await running.whole() == wanted
        assert (await answer(client, 100, "one")).ids == wanted


async def test_a_worker_killed_in_mid_answer_breaks_that_one_and_the_next_comes_from_the_other(
    cluster: Cluster,
) -> None:
    async with cluster.client() as client:
        wanted = (await answer(client, 40, "one")).ids
        async with reading(client, ENDLESS, "one") as broken:
            await broken.until(40)
            cluster[broken.worker].kill()
            begin = time.monotonic()
            refusal = await broken.refused()
            assert time.monotonic() - begin < 5.0
            assert (refusal.reason, refusal.metadata["worker"]) == (Reason.STREAM_BROKEN, broken.worker)
            assert int(refusal.metadata["tokens"]) == len(broken.ids) >= 40
            assert broken.ids[:40] == wanted  # what has come is right
            begin = time.monotonic()
            following = await answer(client, 40, "one")
            assert time.monotonic() - begin < 5.0
            assert following.worker != broken.worker
            assert following.ids == wanted


async def test_a_worker_killed_before_its_first_event_is_not_noticed(cluster: Cluster) -> None:
    async with cluster.client() as client:
        await both_answer(client)
        wanted = (await answer(client, 10)).ids
        silent = (await plan(client)).replicas[0].worker
        for name in WORKERS:  # whoever is asked first says nothing
            cluster[name].send(signal.SIGSTOP)
        async with reading(client, 10) as running:
            await running.until(0)
            first = running.plan.replicas[0].worker
            assert {first, silent} <= {*WORKERS}
            (other,) = {*WORKERS} - {first}
            await asyncio.sleep(0.3)
            assert not running.task.done()
            cluster[first].kill()
            cluster[other].send(signal.SIGCONT)
            assert await running.whole() == wanted
            assert running.worker == other


async def test_a_worker_that_is_asked_to_end_ends_its_answers_first(cluster: Cluster) -> None:
    async with cluster.client() as client, reading(client, 2000, "two") as running:
        await running.until(20)
        ending = asyncio.create_task(cluster[running.worker].end())
        (other,) = {*WORKERS} - {running.worker}
        await served_by(cluster, other)
        beside = await answer(client, 20, "two")
        assert not running.task.done(), "too quick to prove anything"
        assert beside.worker == other
        assert len(await running.whole()) == 2000
        assert await ending == 0
        assert beside.ids == running.ids[:20]


@pytest.mark.parametrize("how", ["yank", "revoke"])
async def test_an_expert_withdrawn_in_mid_answer_ends_that_and_begins_no_other(cluster: Cluster, how: str) -> None:
    data = random_package(seed=len(how), name=how)
    digest = digest_of(data)
    async with cluster.registry() as registry, cluster.client() as client:
        owner = ZETA if how == "revoke" else ACME
        await registry.publish(data, owner.release(data, how, package_format="expert"))
        await known(client, digest)
        async with reading(client, 3000, digest) as running:
            await running.until(20)
            if how == "revoke":
                await registry.revoke_key(ZETA_ID)
            else:
                await registry.yank(digest, "found to be wrong")
            reason = {"yank": Reason.YANKED, "revoke": Reason.KEY_REVOKED}[how]
            while (refused := await refusal_of(client, digest)) is not reason:
                assert refused is None, refused
                await asyncio.sleep(0.02)
            assert not running.task.done(), "too quick to prove anything"
            assert len(await running.whole()) == 3000
        for name in WORKERS:
            await idle(cluster[name])
            async with worker(cluster[name]) as member:
                assert digest not in {expert.digest for expert in (await member.list_experts()).experts}


async def refusal_of(client: RouterClient, digest: str) -> Reason | None:
    """Why one is refused that asks now; None if it is not."""
    try:
        await answer(client, 1, digest)
    except HocketError as error:
        return error.reason
    return None


async def known(client: RouterClient, digest: str) -> None:
    async with asyncio.timeout(SECONDS):
        while await refusal_of(client, digest) is Reason.UNKNOWN_EXPERT:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def test_workers_killed_again_and_again_break_only_their_own_answers(cluster: Cluster) -> None:
    """Each answer is either whole and right, or broken off and right so far. Both workers serve before each kill."""
    async with cluster.client() as client:
        wanted = (await answer(client, 200, "one", "two")).ids
        broken: list[str] = []
        whole: list[str] = []

        async def ask() -> None:
            while True:
                async with reading(client, 200, "one", "two") as running:
                    try:
                        await running.whole()
                        whole.append(running.worker)
                    except HocketError as error:
                        assert error.reason is Reason.STREAM_BROKEN, error  # noqa: PT017 - it may also end well
                        broken.append(running.worker)
                    assert running.ids == wanted[: len(running.ids)]

        asking = [asyncio.create_task(ask()) for _ in range(4)]

        async def answered_by(*names: str) -> None:
            begin = len(whole)
            async with asyncio.timeout(SECONDS):
                while not {*names} <= {*whole[begin:]}:
                    await asyncio.wait(asking, timeout=0.02, return_when=asyncio.FIRST_EXCEPTION)
                    assert [task.exception() for task in asking if task.done()] == []

        try:
            for life in range(LIVES):
                for name in WORKERS:
                    await hold(cluster[name], "one")
                    await hold(cluster[name], "two")
                await answered_by(*WORKERS)
                cluster[WORKERS[life % 2]].kill()
                await answered_by(WORKERS[1 - life % 2])
                await cluster.mend()
                await served_by(cluster, *WORKERS)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
        assert 0 < len(broken) <= LIVES * len(asking)
        for name in WORKERS:
            await idle(cluster[name])
