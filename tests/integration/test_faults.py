"""A suite of real processes under traffic keeps answering while parts of it are killed, stopped and replaced.

Two routers, two aggregators, two workers and the one registry. Every answer is compared with the same expected bits,
and a fault that meets less than 20 calls per second is void.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from examples.publishing import Publisher, known, uniform_mixture
from hocket.client import connect
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.errors import HocketError, Reason, Situation
from hocket.identity import digest_of
from hocket.packages.model import DecisionTreeRegressor, RandomForestRegressor
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.v1 import expert_worker_pb2, plan_pb2
from tests.builders import METADATA, apr_bytes, chain, floats, linear
from tests.clusters import CALLS_PER_SECOND_MIN, Cluster, traffic
from tests.registries import numbers, trust_in
from tests.signing import ACME_SEED, ZETA_ID, ZETA_SEED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from hocket.client import Answer
    from tests.clusters import Member, Traffic

ACME = Publisher("acme", ACME_SEED)
MIXTURE = "quartet"
EXPERTS = [apr_bytes(linear(float(number), 2.0, -1.0)) for number in range(4)]
ROWS = [[1.0, 2.0, 3.0]]
EXPECTED = np.array([[np.mean([number + 2 * 2.0 - 3.0 + 0.5 for number in range(4)])]], np.float32)
"""The mean of what each expert says: its coefficients are (number, 2, -1), its intercept 0.5."""
REGISTRY_KILLS = 20
PATIENCE_SECONDS = 0.5
"""After which an aggregator asks another replica: its own default."""
REVOKED_SECONDS = 5.0
"""Within which a revocation reaches every worker: the time that docs/security.md states."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Everything runs, and both workers hold the four experts of a mixture."""
    folder = tmp_path_factory.mktemp("cluster")
    trust_in(folder)
    cluster = Cluster.of(folder, routers=2, aggregators=2, workers=2)
    try:
        cluster.start()
        asyncio.run(prepare(cluster))
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
async def whole(cluster: Cluster) -> None:
    """Every test begins with all processes, whatever the one before has left."""
    await cluster.mend()


async def prepare(cluster: Cluster) -> None:
    await cluster.ready()
    async with cluster.registry() as registry:
        digests = [await ACME.publish(registry, data, f"e{number}") for number, data in enumerate(EXPERTS)]
        await ACME.put(registry, uniform_mixture(MIXTURE, digests))
    for router in cluster.of_service("router"):
        async with connect(router.address) as client:
            await known(client, MIXTURE)
    for name in ("worker-1", "worker-2"):
        await hold(cluster[name])


async def hold(member: Member) -> None:
    """Have a worker load the experts of the mixture: while one holds them and is not busy, no other is asked."""
    async with worker(member) as client:
        for data in EXPERTS:
            await load(client, digest_of(data))


async def load(client: ExpertWorkerClient, digest: str, when_verifying: Callable[[], object] | None = None) -> None:
    """Have a worker load a package, and do something in the middle of it."""
    async with aclosing(client.load(digest)) as steps:
        async for step in steps:
            if when_verifying is not None and step.state >= expert_worker_pb2.LOAD_STATE_VERIFYING:
                when_verifying()


@asynccontextmanager
async def worker(member: Member) -> AsyncIterator[ExpertWorkerClient]:
    channels = Channels()
    try:
        yield ExpertWorkerClient(channels.get(member.address))
    finally:
        await channels.close()


@asynccontextmanager
async def asked(cluster: Cluster) -> AsyncIterator[Traffic]:
    """Traffic over all routers."""
    async with cluster.client() as client, traffic([client], MIXTURE, ROWS, EXPECTED) as running:
        yield running


def answered_by(name: str, answer: Answer) -> bool:
    return any(contribution.worker == name for contribution in answer.contributions)


def moved_on(answer: Answer) -> bool:
    return any(contribution.attempt_count > 1 for contribution in answer.contributions)


async def test_when_a_worker_is_killed_the_other_replica_answers(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        await calls.until(lambda answer: answered_by("worker-1", answer))
        await calls.fault()
        cluster["worker-1"].kill()
        await calls.count(60)
        assert not answered_by("worker-1", calls.calls[-1].answer or pytest.fail("a call failed"))
        await cluster["worker-1"].restart()
        await hold(cluster["worker-1"])
        await calls.until(lambda answer: answered_by("worker-1", answer))
    assert calls.failed == []
    assert any(moved_on(call.answer) for call in calls.calls if call.answer is not None)
    assert {call.answer.finish.reason for call in calls.calls if call.answer is not None} == {
        plan_pb2.FINISH_REASON_COMPLETE
    }


async def test_a_worker_that_hangs_costs_a_bounded_wait_and_then_none(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        await calls.until(lambda answer: answered_by("worker-2", answer))
        fault = await calls.fault()
        cluster["worker-2"].send(signal.SIGSTOP)
        try:
            await asyncio.sleep(4.0)
            late = time.monotonic()
            await calls.count(40)
        finally:
            cluster["worker-2"].send(signal.SIGCONT)
    assert calls.failed == []
    slowest = max(call.seconds for call in calls.since(fault))
    assert PATIENCE_SECONDS <= slowest < 3 * PATIENCE_SECONDS
    assert statistics.median(call.seconds for call in calls.since(late)) < PATIENCE_SECONDS


async def test_while_an_aggregator_hangs_the_other_goes_on(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        fault = await calls.fault()
        cluster["aggregator-2"].send(signal.SIGSTOP)
        try:
            await asyncio.sleep(2.0)
            went_on = len(calls.since(fault))
        finally:
            cluster["aggregator-2"].send(signal.SIGCONT)
        await calls.count(20)
    assert went_on >= 2 * CALLS_PER_SECOND_MIN
    assert calls.failed == []  # what it held has only waited


async def test_when_an_aggregator_is_killed_the_routers_go_to_the_other(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        await calls.fault()
        cluster["aggregator-1"].kill()
        killed = time.monotonic()
        await calls.count(60)
        await cluster["aggregator-1"].restart()
        await calls.count(20)
    failed = [call for call in calls.calls if call.error is not None]
    # An answer of which a part has come is not asked for again: the contract of Combine.
    assert all(call.begin < killed for call in failed)
    assert len(failed) <= 1


async def test_when_a_router_is_killed_only_what_it_was_answering_is_lost(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        await calls.fault()
        cluster["router-1"].kill()
        await calls.count(60)
        lost = len(calls.failed)
        await cluster["router-1"].restart()
        await calls.count(40)
    assert lost <= 4  # the callers: one call each
    assert all(error.situation is Situation.UNAVAILABLE for error in calls.failed)
    assert len(calls.failed) == lost


async def test_a_router_that_starts_while_the_registry_is_away_serves_what_it_knew(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        await calls.fault()
        cluster["registry"].kill()
        assert await cluster["router-2"].end() == 0
        await cluster["router-2"].restart()
        async with connect(cluster["router-2"].address) as client:
            np.testing.assert_array_equal((await client.answer(MIXTURE, ROWS)).value, calls.expected)
        await cluster["registry"].restart()
        await calls.count(20)
    assert calls.failed == []


@pytest.mark.long
async def test_twenty_kills_of_the_registry_are_unnoticed_and_lose_nothing(cluster: Cluster) -> None:
    acknowledged: set[str] = set()

    async def publish(first: int) -> None:
        """Publish until the registry is gone."""
        async with cluster.registry() as registry:
            for number in range(first, first + 1000):
                data = numbers(float(number))
                try:
                    acknowledged.add(await ACME.publish(registry, data, "n", str(number)))
                except HocketError as error:
                    if error.situation is not Situation.UNAVAILABLE:
                        raise
                    return

    async with asked(cluster) as calls:
        for life in range(REGISTRY_KILLS):
            publishing = asyncio.create_task(publish(1000 * life))
            known_before = len(acknowledged)
            async with asyncio.timeout(20):
                while len(acknowledged) < known_before + 3:  # noqa: ASYNC110 - acknowledgements count themselves
                    await asyncio.sleep(0.005)
            await calls.fault()
            cluster["registry"].kill()
            await publishing
            await cluster["registry"].restart()
        async with cluster.registry() as registry:
            there = {package.digest async for package in registry.list_packages()}
    assert calls.failed == []
    assert len(acknowledged) >= 3 * REGISTRY_KILLS
    assert acknowledged <= there


async def test_a_revocation_reaches_running_workers_and_survives_their_restart(cluster: Cluster) -> None:
    zeta = Publisher("zeta", ZETA_SEED)
    async with cluster.registry() as registry:
        digest = await zeta.publish(registry, apr_bytes(linear(5.0, 5.0, 5.0), metadata={**METADATA, "name": "z"}), "z")
        for name in ("worker-1", "worker-2"):
            await answers(cluster[name], digest)
        async with asked(cluster) as calls:
            await calls.fault()
            await registry.revoke_key(ZETA_ID)
            begin = time.monotonic()
            for name in ("worker-1", "worker-2"):
                while await refusal(cluster[name], digest) is None:  # noqa: ASYNC110 - the news is in another process
                    await asyncio.sleep(0.01)
            assert time.monotonic() - begin < REVOKED_SECONDS
            # The registry is gone when the worker comes back, so what it refuses it remembers itself.
            cluster["registry"].kill()
            cluster["worker-1"].kill()
            cluster["worker-1"].start()  # it is not ready before the registry knows it, but it answers
            await answers(cluster["worker-1"], digest_of(EXPERTS[0]))
            assert await refusal(cluster["worker-1"], digest) is Reason.KEY_REVOKED
            await cluster["registry"].restart()
        assert calls.failed == []


async def answers(member: Member, expert: str) -> None:
    """Return when a worker answers for an expert: it may still have to find its way back to the registry."""
    async with asyncio.timeout(30):
        while await refusal(member, expert) is Reason.UNREACHABLE:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.05)
    assert await refusal(member, expert) is None


async def refusal(member: Member, expert: str) -> Reason | None:
    """What a worker answers to a direct request."""
    async with worker(member) as client:
        try:
            await client.run_tensor(expert, matrix_to_tensor(floats(*ROWS)), 5.0)
        except HocketError as error:
            return error.reason
    return None


@pytest.mark.long
async def test_everything_is_replaced_one_by_one_without_a_failed_call(cluster: Cluster) -> None:
    async with asked(cluster) as calls:
        for name in ("worker-1", "aggregator-1", "router-1", "registry", "worker-2", "aggregator-2", "router-2"):
            await calls.fault()
            assert await cluster[name].end() == 0
            await cluster[name].restart()
            if cluster[name].service == "worker":
                await hold(cluster[name])
            await calls.count(10)
    assert calls.failed == []


@pytest.mark.parametrize("how", ["its deadline passes", "its caller goes"])
async def test_work_ends_on_all_hops_within_100_ms_when(cluster: Cluster, how: str) -> None:
    """Nothing else runs meanwhile, so every call in progress and every execution is this one's."""
    trees = tuple(DecisionTreeRegressor(chain(100, answer=number + 0.5)) for number in range(500))
    slow = apr_bytes(RandomForestRegressor(trees, len(trees)), metadata={**METADATA, "name": "slow"})
    rows = np.ones((1000, 1), np.float32)
    async with cluster.registry() as registry, cluster.client(timeout_seconds=30) as patient:
        digest = await ACME.publish(registry, slow, "slow")
        for router in cluster.of_service("router"):
            async with connect(router.address) as client:
                await known(client, digest)
        await patient.answer(digest, rows[:1])
        begun = await executions(cluster)
        begin = time.monotonic()
        await patient.answer(digest, rows)
        whole, seconds = await executions(cluster) - begun, time.monotonic() - begin
    begun = await executions(cluster)
    async with cluster.client(timeout_seconds=seconds / 4 if "deadline" in how else 30) as client:
        asking = asyncio.create_task(client.answer(digest, rows))
        await asyncio.wait([asking], timeout=seconds / 4 + 0.05)
        if "caller" in how:
            asking.cancel()
            await asyncio.wait([asking])
        assert asking.cancelled() or isinstance(asking.exception(), HocketError)
    await asyncio.sleep(0.1)
    ended = await executions(cluster)
    assert await in_progress(cluster) == 0
    assert 0 < ended - begun < whole
    await asyncio.sleep(0.3)
    assert await executions(cluster) == ended


async def executions(cluster: Cluster) -> float:
    scraped = [await member.metrics() for member in cluster.of_service("worker")]
    return sum(metrics["hocket_executions_total"] for metrics in scraped)


async def in_progress(cluster: Cluster) -> float:
    """Calls that were begun and have not ended, over all hops."""
    count = 0.0
    for member in cluster.members.values():
        for series, value in (await member.metrics()).items():
            if any(f'grpc_method="{method}"' in series for method in ("Predict", "Combine", "RunTensor")):
                count += value if series.startswith("grpc_server_started_total") else 0.0
                count -= value if series.startswith("grpc_server_handled_total") else 0.0
    return count


@pytest.mark.long
async def test_a_package_that_ends_its_worker_three_times_is_quarantined(cluster: Cluster) -> None:
    """What a crash looks like from outside: the worker is gone while it loads the package."""
    member = cluster["worker-2"]
    heavy = apr_bytes(linear(*[0.5] * 2_000_000), metadata={**METADATA, "name": "heavy"})
    async with cluster.registry(timeout_seconds=30) as registry, asked(cluster) as calls:
        digest = await ACME.publish(registry, heavy, "heavy")
        kills = 0
        while await refusal(member, digest) is not Reason.QUARANTINED:
            assert kills < 12
            async with worker(member) as client:
                await client.unload(digest)
                await calls.fault()
                with pytest.raises(HocketError):
                    await load(client, digest, member.kill)
            kills += 1  # it counts unless the load was quicker than the news of it
            await member.restart()
        assert kills >= 3
        await hold(member)
        await calls.until(lambda answer: answered_by("worker-2", answer))  # other experts are served
        async with worker(member) as client:
            await load(client, digest)  # the operator lifts it
        assert await refusal(member, digest) is Reason.BAD_TENSOR  # it runs again: three columns are too few
    assert calls.failed == []
