"""A suite under load while everything around it changes: every answer is right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np
import psutil
import pytest

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.router import Answer
from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of, is_digest
from hocket.mixtures import FixedGate, MixtureRecord, MixtureRef, SoftmaxGate, gate_tensor
from hocket.packages import Purpose, apr
from hocket.packages import model as m
from hocket.rpc.handlers import Handlers
from hocket.rpc.local import LocalChannel
from hocket.telemetry import metrics
from hocket.trust_folder import TrustFolder
from hocket.v1 import plan_pb2
from services.expert_worker.loader import prepare
from services.expert_worker.residency import Residency
from services.router.placement import Loads
from tests.apr_oracle import predict, tolerance
from tests.builders import grow
from tests.deployments import Deployment, deployed
from tests.signing import ACME_SEED, ZETA_ID, ZETA_SEED, envelope_of, trusted
from tests.worker_numerics import opened

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.long

T = TypeVar("T")

WIDTH = 6
POOL_ROWS = 96
CLIENTS = 24
ROUNDS = 4
REQUESTS_PER_ROUND = 1000
GROWTH_BYTES_MAX = 24 * 2**20

WITHDRAWN = {"YANKED", "KEY_REVOKED"}
BUSY = {"EXPERT_LOADING", "QUEUE_FULL"}
"""What a tight budget may answer for a moment; nothing here waits longer than its deadline."""


@dataclass
class Expert:
    """A published expert and what the reference says about the pool's rows.

    Attributes:
        data: The package.
        output: float32 [POOL_ROWS, C].
        slack: How far an answer may be from it in any column, [POOL_ROWS].
    """

    data: bytes
    output: Any
    slack: Any

    @property
    def digest(self) -> str:
        return digest_of(self.data)


@dataclass
class World:
    """Everything that was ever published, and the rows that requests draw from."""

    dice: random.Random
    rows: Any
    experts: dict[str, Expert] = field(default_factory=dict)
    records: dict[str, tuple[MixtureRecord, Any]] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)

    def make(self, number: int, *, labels: tuple[str, ...] | None = None) -> bytes:
        """An expert of some layout; the same number makes the same one."""
        dice = np.random.default_rng(number)
        weights, bias = dice.standard_normal(WIDTH).astype(np.float32), float(np.float32(dice.standard_normal()))
        model: Any
        if labels is not None:
            stump = grow((int(dice.integers(WIDTH)), float(np.float32(dice.normal())), (0, 1), (1, 1)))
            model = (
                m.LogisticRegression(weights, bias)
                if number % 2
                else m.RandomForestClassifier((m.DecisionTreeClassifier(stump),) * 3, 3)
            )
        else:
            leaves = [float(np.float32(value)) for value in dice.standard_normal(3)]
            tree = grow(
                (0, 0.25, (leaves[0], 3), (1, float(np.float32(dice.normal())), (leaves[1], 2), (leaves[2], 1)))
            )
            model = (
                m.LinearRegression(weights, bias),
                m.Ridge(weights, bias, alpha=0.5),
                m.RandomForestRegressor((m.DecisionTreeRegressor(tree),) * 40, 40),
            )[number % 3]
        data = apr.write(model, labels=labels, created_at=str(number))
        linear = isinstance(model, m.LinearRegression | m.Ridge | m.LogisticRegression)
        slack = tolerance(model, self.rows) if linear else np.full(POOL_ROWS, 1e-6)
        self.experts[digest_of(data)] = Expert(data, predict(model, self.rows, 2), slack)
        return data

    def record(self, name: str, *members: bytes | str, softmax: bool = False, **changes: Any) -> tuple[Any, bytes]:
        """A mixture of packages and of mixtures by digest, with random weights."""
        refs = tuple(
            ExpertId(digest_of(member)) if isinstance(member, bytes) else MixtureRef(member) for member in members
        )
        tensor, weights = b"", None
        gate: FixedGate | SoftmaxGate = FixedGate(tuple(self.dice.uniform(0.1, 1) for _ in refs))
        if softmax:
            weights = np.array([[self.dice.gauss(0, 1) for _ in refs] for _ in range(WIDTH)], np.float32)
            tensor = gate_tensor(weights)
            gate = SoftmaxGate(WIDTH, len(refs), digest_of(tensor))
        record = MixtureRecord(name, refs, gate, changes.pop("top_k", len(refs)), **changes)
        self.records[record.digest] = record, weights
        return record, tensor

    def weights(self, model: str, rows: Any, top_k: int | None = None) -> dict[str, Any]:
        """By the mixture's own record: the weight of each expert in each of these rows of the pool, normalised."""
        if model in self.experts:
            return {model: np.ones(len(rows))}
        sums = self._weights(model, rows, top_k)
        total = sum(sums.values())
        return {expert: weight / total for expert, weight in sums.items() if weight.any()}

    def _weights(self, model: str, rows: Any, top_k: int | None) -> dict[str, Any]:
        record, tensor = self.records[model]
        if isinstance(record.gate, FixedGate):
            scores = np.tile(np.array(record.gate.weights) / sum(record.gate.weights), (len(rows), 1))
        else:
            scores = np.exp(self.rows[rows].astype(np.float64) @ tensor.astype(np.float64))
            scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
        ranking = np.argsort(-scores, axis=1, kind="stable")[:, : top_k or record.top_k]
        sums: dict[str, Any] = {}
        for place, member in enumerate(record.members):
            share = np.where((ranking == place).any(axis=1), scores[:, place], 0.0)
            inner = {str(member): 1.0} if isinstance(member, ExpertId) else self._weights(member.digest, rows, None)
            for expert, weight in inner.items():
                sums[expert] = sums.get(expert, 0.0) + share * weight
        return sums

    def check(self, answer: Answer, rows: Any, top_k: int | None, withdrawn_before: set[str]) -> None:
        """Hold an answer against the reference's outputs and the mixture's own weights."""
        planned = self.weights(answer.plan.digest, rows, top_k)
        assert {expert.expert for expert in answer.plan.experts} == set(planned)
        arrived = {c.expert for c in answer.contributions if c.state == plan_pb2.CONTRIBUTION_STATE_ARRIVED}
        assert not arrived & withdrawn_before, "an expert answered that was withdrawn before the request"
        missing = {c.reason for c in answer.contributions if c.expert not in arrived}
        assert missing <= WITHDRAWN | BUSY, missing
        coverage = sum(planned[expert] for expert in arrived)
        np.testing.assert_allclose(answer.coverage, coverage, rtol=1e-9)
        expected = sum(
            (planned[expert] / coverage)[:, None] * self.experts[expert].output[rows] for expert in sorted(arrived)
        )
        slack = np.max([self.experts[expert].slack[rows] for expert in arrived], axis=0)
        assert (np.abs(answer.value - expected) <= slack[:, None]).all()
        for contribution in answer.contributions:
            if contribution.expert in arrived:
                effective = np.zeros(len(rows))
                effective[list(contribution.rows)] = contribution.weights
                np.testing.assert_allclose(effective, planned[contribution.expert] / coverage, rtol=1e-9)


def living(kind: type[T]) -> list[T]:
    """Every object of a class that this process holds."""
    return [found for found in gc.get_objects() if type(found) is kind]


def task_names() -> Counter[str]:
    tasks = (task for task in asyncio.all_tasks() if not task.done())
    return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)


async def until(check: Callable[[], bool], what: Callable[[], Any], seconds: float = 10.0) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not check():  # noqa: ASYNC110 - what is waited for is spread over four services
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"left behind: {what()}")


@pytest.mark.parametrize("kind", ["one process", "four servers"])
async def test_a_suite_answers_right_while_everything_around_it_changes(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    world = World(random.Random(11), np.random.default_rng(11).standard_normal((POOL_ROWS, WIDTH)).astype(np.float32))
    lasting = [world.make(number) for number in range(12)]
    sizes = [prepare(opened(data)).size_bytes for data in lasting]
    budget_bytes = max(sizes) + sum(sizes) // 4  # so that experts push each other out all the time
    trust = TrustFolder(tmp_path / "trust")
    trust.add_key(trusted(ZETA_SEED, "zeta"))
    async with deployed(kind, tmp_path, worker={"budget_bytes": budget_bytes}) as suite, AsyncExitStack() as stack:
        names = await _furnish(world, suite, lasting)
        worker = await _worker(suite, names[0], stack)
        chaos = Chaos(world, suite, worker, [digest_of(data) for data in lasting])
        await _ask_all(world, suite, names, 200)  # connections, caches and thread pools are there from now on
        await _quiet()
        before, evictions = task_names(), metrics.EXPERT_EVICTIONS._value.get()
        resident_bytes = [psutil.Process().memory_info().rss]
        for number in range(ROUNDS):
            changing = asyncio.create_task(chaos.run(number))
            await _ask_all(world, suite, names, REQUESTS_PER_ROUND)
            await changing
            await _quiet()
            gc.collect()
            resident_bytes.append(psutil.Process().memory_info().rss)

        await until(lambda: not task_names() - before, lambda: task_names() - before)
        for residency in living(Residency):
            assert residency.used_bytes == sum(package.size_bytes for package in residency.packages)
            assert residency.used_bytes <= residency.budget_bytes
            assert [package.digest for package in residency.packages if package.in_use_count] == []
        answered = world.outcomes["answered"]
        evictions = metrics.EXPERT_EVICTIONS._value.get() - evictions
        for name, measured in (
            ("outcomes", {**world.outcomes}),
            ("changes", {**chaos.done, "evict": evictions}),
            ("resident_mib", [size >> 20 for size in resident_bytes]),
        ):
            record_property(name, str(measured))
        assert answered > 0.5 * sum(world.outcomes.values())
        assert world.outcomes["cancelled"] > 100
        assert all(chaos.done[what] for what in ("publish", "put", "yank", "revoke", "load", "unload")), chaos.done
        assert evictions > 100
        assert resident_bytes[-1] - resident_bytes[2] < GROWTH_BYTES_MAX, resident_bytes


async def _furnish(world: World, suite: Deployment, lasting: list[bytes]) -> list[str]:
    """Publish the experts, put the mixtures, and return what to ask for."""
    for data in lasting:
        await suite.publish(data)
    labels = [world.make(100 + number, labels=("no", "yes")) for number in range(4)]
    doomed = [world.make(200 + number) for number in range(8)]
    for data in labels + doomed[:4]:
        await suite.publish(data)
    for data in doomed[4:]:
        await suite.publish(data, f"zeta/p-{digest_of(data)[7:19]}@1", ZETA_SEED)
    kinds: list[tuple[Any, bytes]] = [
        world.record("all", *lasting),
        world.record("gated", *lasting[:8], softmax=True, top_k=2),
        world.record("best", *lasting, softmax=True, top_k=1),
        world.record("labelled", *labels, labels=("yes", "maybe", "no"), softmax=True, top_k=3),
        world.record("half", lasting[0], lasting[1], *doomed),
        world.record("moving", *lasting[:3]),
    ]
    inner, gate = world.record("inner", *lasting[2:6], softmax=True, top_k=2)
    kinds.append((inner, gate))
    await suite.put(inner, gate)
    kinds.append(world.record("outer", inner.digest, lasting[7], lasting[8], top_k=2))
    for record, tensor in kinds:
        await suite.put(record, tensor)
    # The scattered place of a label: "maybe" is nobody's, and the members say "no" before "yes".
    for data in labels:
        expert = world.experts[digest_of(data)]
        no, yes = expert.output.T
        expert.output = np.stack([yes, np.zeros_like(no), no], axis=1)
    return [record.name for record, _ in kinds] + [digest_of(data) for data in lasting[:4] + doomed]


async def _worker(suite: Deployment, model: str, stack: AsyncExitStack) -> ExpertWorkerClient:
    decision = await suite.router.route(model, np.zeros((1, WIDTH), np.float32))
    address = decision.plan.experts[0].replicas[0].address
    if not address.startswith("local:"):
        return ExpertWorkerClient(await stack.enter_async_context(grpc.aio.insecure_channel(address)))
    handlers = [found for found in living(Handlers) if "hocket.v1.ExpertWorkerService" in found.services]
    return ExpertWorkerClient(await stack.enter_async_context(LocalChannel(handlers[-1])))


async def _ask_all(world: World, suite: Deployment, names: list[str], count: int) -> None:
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await _ask(world, suite, world.dice.choice(names))

    async with asyncio.timeout(120):
        await asyncio.gather(*[client() for _ in range(CLIENTS)])


async def _ask(world: World, suite: Deployment, name: str) -> None:
    """One request of any kind, and a judgement of whatever comes of it."""
    dice = world.dice
    rows = np.array([dice.randrange(POOL_ROWS) for _ in range(dice.choice([1, 1, 2, 7, 40]))])
    lenient = dice.random() < 0.5
    top_k = None if is_digest(name) else dice.choice([None, None, 1, 2, 99])
    options: Any = {
        "top_k": top_k,
        "partials": dice.random() < 0.3,
        "on_missing": "renormalise" if lenient else "fail",
    }
    withdrawn_before = set(world.withdrawn)

    async def ask() -> Answer | None:
        leave_early = dice.random() < 0.1
        async with aclosing(suite.router.predict(name, world.rows[rows], **options)) as events:
            async for event in events:
                if leave_early:
                    return None
                if isinstance(event, Answer):
                    return event
        raise AssertionError("the stream ended without an answer")

    task = asyncio.create_task(ask())
    if dice.random() < 0.1:
        await asyncio.sleep(dice.random() * 0.02)
        task.cancel()
    try:
        answer = await task
    except asyncio.CancelledError:
        outcome = "cancelled"
    except HocketError as error:
        _documented(error, top_k, lenient=lenient)
        outcome = error.reason
    else:
        outcome = "left early"
        if answer is not None:
            world.check(answer, rows, top_k, withdrawn_before)
            outcome = "answered"
    world.outcomes[outcome] += 1


def _documented(error: HocketError, top_k: int | None, *, lenient: bool) -> None:
    if error.reason is Reason.TOP_K_OUT_OF_RANGE:
        assert top_k == 99
    elif error.reason is Reason.COVERAGE:
        reasons = set(error.metadata.get("expert_reason", error.metadata.get("expert_reasons", "")).split(","))
        assert lenient or reasons <= WITHDRAWN | BUSY, error.metadata
    else:
        assert error.reason in WITHDRAWN | BUSY, error


@dataclass
class Chaos:
    """What happens meanwhile: publishers, operators, and a worker that is told to load and to forget."""

    world: World
    suite: Deployment
    worker: ExpertWorkerClient
    lasting: list[str]
    done: Counter[str] = field(default_factory=Counter)

    async def run(self, number: int) -> None:
        """The changes of one round, in any order."""
        doomed = list(dict.fromkeys(self.world.experts))[16:24]
        changes: list[Callable[[], Awaitable[None]]] = [
            *[partial(self._publish, 1000 + 50 * number + step) for step in range(15)],
            *[self._move] * 15,
            *[self._load] * 25,
            *[self._unload] * 25,
        ]
        if number in {1, 2}:
            changes.append(partial(self._yank, doomed[number]))
        if number == ROUNDS - 1:
            changes.append(partial(self._revoke, doomed[4:]))
        self.world.dice.shuffle(changes)
        for change in changes:
            await change()
            await asyncio.sleep(self.world.dice.random() * 0.12)

    async def _publish(self, number: int) -> None:
        await self.suite.publish(self.world.make(number))
        self.done["publish"] += 1

    async def _move(self) -> None:
        """Put a new version under a name that requests ask for."""
        members = [self.world.experts[digest].data for digest in self.world.dice.sample(self.lasting, 4)]
        record, _ = self.world.record("moving", *members)
        version = f"acme/moving@2.{self.done['put']}"
        release = envelope_of(record.body(), ACME_SEED, version, purpose=Purpose.MIXTURE, format="mixture")
        await self.suite.registry.put_mixture(record.body(), release)
        await self.suite.known(record.digest)
        self.done["put"] += 1

    async def _load(self) -> None:
        try:
            async for _ in self.worker.load(self.world.dice.choice(self.lasting)):
                pass
        except HocketError as error:
            assert error.reason in BUSY, error  # noqa: PT017 - it may also succeed
        self.done["load"] += 1

    async def _unload(self) -> None:
        try:
            await self.worker.unload(self.world.dice.choice(self.lasting))
        except HocketError as error:
            assert error.reason is Reason.UNKNOWN_EXPERT, error  # noqa: PT017 - it may also succeed
        else:
            self.done["unload"] += 1

    async def _yank(self, digest: str) -> None:
        await self.suite.registry.yank(digest, "found to be wrong")
        await self._gone(digest, Reason.YANKED)
        self.done["yank"] += 1

    async def _revoke(self, digests: list[str]) -> None:
        await self.suite.registry.revoke_key(ZETA_ID, "laptop lost")
        for digest in digests:
            await self._gone(digest, Reason.KEY_REVOKED)
        self.done["revoke"] += 1

    async def _gone(self, digest: str, reason: Reason) -> None:
        """Wait until the router refuses the expert; from then on it must be in no answer."""
        async with asyncio.timeout(5):
            while True:
                try:
                    await self.suite.router.route(digest, self.world.rows[:1])
                except HocketError as error:
                    assert error.reason is reason  # noqa: PT017 - waiting
                    self.world.withdrawn.add(digest)
                    return
                await asyncio.sleep(0.005)


async def _quiet() -> None:
    """Wait until no call runs and nothing is counted as running, anywhere."""

    def calls() -> list[Any]:
        busy: list[Any] = [found.in_flight for found in living(Handlers) if found.in_flight]
        return busy + [found for found in living(Loads) if found.by_expert or any(found.by_worker.values())]

    await until(lambda: not calls(), calls)
