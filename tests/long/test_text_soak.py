"""Text under load while everything around it changes: every answer is right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.router import TextPlanned
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages.expert.reader import decode
from hocket.rpc.local import LocalChannel
from hocket.telemetry import metrics
from hocket.v1 import text_pb2
from tests.bases import tiny_base
from tests.deployments import deployed
from tests.engines import HEAD, NAME, asking, expert_of, first_difference, opened, random_package, whole_engine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from services.expert_worker.app import WorkerApp
    from services.expert_worker.engine.expert import AdapterExpert
    from tests.deployments import Deployment

pytestmark = pytest.mark.long

ROUNDS = 4
ROUND_SECONDS = 9.0
CLIENTS = 12
TOKENS_MAX = 40
GROWTH_BYTES_MAX = 24 * 2**20
WITHDRAWN = {Reason.YANKED, Reason.KEY_REVOKED}
BUSY = {Reason.EXPERT_LOADING, Reason.QUEUE_FULL}
"""What little memory may answer for a moment."""
LATE = {Reason.DEADLINE, Reason.EXPERT_LOADING}
SHAPES: list[dict[str, Any]] = [
    {"rank": 3},
    {"kind": "dora", "rank": 4},
    {"kind": "ia3"},
    {"kind": "rslora", "modules": ["down_proj"], "rank": 8},
    {"modules": ["q_proj", HEAD], "rank": 2},
    {"kind": "soft_prompt", "rank": 4},
    {"kind": "dora", "modules": ["o_proj", "up_proj"], "rank": 1},
    {"modules": ["k_proj", "gate_proj"], "rank": 6},
]
PROMPTS = ["select name from people", "a", "the quick brown fox " * 12]
SAMPLING: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 19, "seed": 5}]

Key = tuple[str, tuple[tuple[str, float], ...], int]
"""Prompt, experts with weights, sampling."""


@dataclass
class World:
    """Everything that was ever published, and every answer that has come.

    Answers are held against the engine alone when all is over: it would need the base meanwhile.

    Attributes:
        packages: By digest.
        withdrawn: Digests that the router refuses.
        answers: What was answered, as far as it came.
        outcomes: How requests ended.
    """

    dice: random.Random
    packages: dict[str, bytes] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    answers: dict[Key, set[tuple[int, ...]]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)

    def make(self, number: int) -> bytes:
        """Half of them are versions of one name."""
        name, version = (f"e{number}", "1.0.0") if number % 2 else ("moving", f"1.0.{number}")
        data = random_package(**SHAPES[number % len(SHAPES)], seed=number, name=name, version=version)
        self.packages[digest_of(data)] = data
        return data

    def key(self) -> Key:
        """What to ask next: mostly what was asked before, so that there is less to compare with."""
        if self.answers and self.dice.random() < 0.75:
            return self.dice.choice([*self.answers])
        there = [*self.packages]
        count = self.dice.choice([0, 1, 1, 2, 3, 5])
        chosen = self.dice.sample(there, min(count, len(there)))
        names = set()
        experts = []
        for digest in chosen:
            name = named(self.packages[digest]).partition("@")[0]
            if name not in names:  # two versions of one name do not go together
                experts.append((digest, self.dice.choice([1.0, 0.5, -0.3])))
            names.add(name)
        return self.dice.choice(PROMPTS), tuple(sorted(experts)), self.dice.randrange(len(SAMPLING))


def named(package: bytes) -> str:
    """By its manifest: `e1@1.0.0`."""
    facts, _ = decode(package, digest_of(package))
    return f"{facts.name}@{facts.version}"


async def ask(world: World, suite: Deployment) -> None:
    """One request of any kind, read in any way, and a note of whatever comes of it."""
    key = _, experts, _ = world.key()
    withdrawn_before = {*world.withdrawn}
    manner = world.dice.choices(["whole", "leave", "slow", "late", "cancel"], [6, 1, 1, 1, 1])[0]
    ids: list[int] = []
    task = asyncio.create_task(read(world, suite, key, manner, ids))
    if manner == "cancel":
        await asyncio.wait([task], timeout=world.dice.random() * 0.3)
        task.cancel()
    try:
        outcome = await task
    except asyncio.CancelledError:
        outcome = "cancelled"
    except HocketError as error:
        outcome = error.reason
        allowed = BUSY | (WITHDRAWN if experts else set()) | (LATE if manner == "late" else set())
        assert outcome in allowed, (error, error.metadata)  # noqa: PT017 - it may also succeed
    else:
        assert not withdrawn_before & {digest for digest, _ in experts}, "a withdrawn expert has answered"
    world.outcomes[outcome] += 1
    world.answers.setdefault(key, set()).add(tuple(ids))


async def read(world: World, suite: Deployment, key: Key, manner: str, ids: list[int]) -> str:
    """Put the tokens of an answer into `ids`, and say how it ended."""
    prompt, experts, sampling = key
    seconds = world.dice.uniform(0.02, 0.2) if manner == "late" else 30.0
    leaves = world.dice.randrange(TOKENS_MAX)
    options: dict[str, Any] = {"max_tokens": TOKENS_MAX, "ignore_eos": True, **SAMPLING[sampling]}
    async with aclosing(suite.router.generate(prompt, experts=experts, timeout_seconds=seconds, **options)) as events:
        async for event in events:
            match event:
                case TextPlanned():
                    assert {each.digest for each in event.plan.experts} == {digest for digest, _ in experts}
                case text_pb2.TextDelta():
                    ids.extend(token.id for token in event.tokens)
                    if manner == "leave" and len(ids) > leaves:
                        return "left"
                    if manner == "slow" and world.dice.random() < 0.2:
                        await asyncio.sleep(0.01)
                case text_pb2.TextFinish():
                    assert len(ids) == event.usage.completion_token_count == TOKENS_MAX
    return "answered"


@dataclass
class Chaos:
    """What happens meanwhile: publishers, operators, and a worker that is told to load and to forget."""

    world: World
    suite: Deployment
    worker: ExpertWorkerClient
    done: Counter[str] = field(default_factory=Counter)

    async def run(self, number: int, end: float) -> None:
        """Changes, until a moment on the clock of `time.monotonic`."""
        rare: list[Callable[[], Awaitable[None]]] = [
            partial(self._publish, 100 + 10 * number + step) for step in (0, 1)
        ]
        rare.append(self._yank)
        while time.monotonic() < end:
            await self.world.dice.choice([self._load, self._unload, self._unload])()
            if rare and self.world.dice.random() < 0.1:
                await rare.pop(0)()
            await asyncio.sleep(self.world.dice.random() * 0.05)

    async def _publish(self, number: int) -> None:
        data = self.world.make(number)
        del self.world.packages[digest_of(data)]  # nobody asks for it before the router knows it
        await publish(self.suite, data)
        self.world.packages[digest_of(data)] = data
        self.done["publish"] += 1

    async def _load(self) -> None:
        try:
            async for _ in self.worker.load(self.world.dice.choice([*self.world.packages])):
                pass
        except HocketError as error:
            assert error.reason in BUSY | WITHDRAWN, error  # noqa: PT017 - it may also succeed
        self.done["load"] += 1

    async def _unload(self) -> None:
        try:
            await self.worker.unload(self.world.dice.choice([*self.world.packages]))
        except HocketError as error:
            assert error.reason is Reason.UNKNOWN_EXPERT, error  # noqa: PT017 - it may also succeed
        else:
            self.done["unload"] += 1

    async def _yank(self) -> None:
        digest = self.world.dice.choice([*({*self.world.packages} - self.world.withdrawn)])
        await self.suite.registry.yank(digest, "found to be wrong")
        async with asyncio.timeout(10):
            while True:
                try:
                    async for _ in self.suite.router.generate("a", experts=[digest], max_tokens=1):
                        pass
                except HocketError as error:
                    if error.reason is Reason.YANKED:
                        break
                    assert error.reason in BUSY, error  # noqa: PT017 - waiting
                await asyncio.sleep(0.01)
        self.world.withdrawn.add(digest)
        self.done["yank"] += 1


async def publish(suite: Deployment, data: bytes) -> None:
    await suite.publish(data, f"acme/{named(data)}")


async def quiet(app: WorkerApp, client: ExpertWorkerClient) -> None:
    """Until nothing is computed, and nothing held."""
    async with asyncio.timeout(10):
        while True:
            listed = await client.list_experts()
            engine = listed.engine
            busy = engine.running_count + engine.waiting_count + engine.kv_used_page_count
            if not busy + sum(expert.in_use_count for expert in listed.experts):
                break
            await asyncio.sleep(0.01)
    assert app.residency.used_bytes == sum(package.size_bytes for package in app.residency.packages)
    assert app.residency.used_bytes <= app.residency.budget_bytes


async def test_texts_are_right_while_everything_around_them_changes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tiny_base(tmp_path / NAME)
    base = opened(folder)
    world = World(random.Random(5))
    lasting = [world.make(number) for number in range(16)]
    sizes = [expert_of(data, base).size_bytes for data in lasting]
    row_bytes = 4 * sum(linear.in_features + linear.out_features for linear in base.projections.values())
    worker = {
        "budget_bytes": sum(sorted(sizes)[-5:]) + 1024,  # so that experts push each other out all the time
        "slab_bytes": 80 * row_bytes + 60 * 16 * base.kv_shape.position_bytes(base.dtype),
        "sequences_max": 6,
        "step_tokens": 32,
    }
    async with deployed("one process", tmp_path / "suite", base=folder, worker=worker) as suite:
        app = suite.app
        assert app is not None
        client = ExpertWorkerClient(LocalChannel(app.handlers))
        for data in lasting:
            await publish(suite, data)
        chaos = Chaos(world, suite, client)
        evictions = metrics.EXPERT_EVICTIONS._value.get()
        resident_bytes = []
        for number in range(ROUNDS):
            end = time.monotonic() + ROUND_SECONDS

            async def clients(end: float = end) -> None:
                while time.monotonic() < end:
                    await ask(world, suite)

            async with asyncio.timeout(ROUND_SECONDS + 60):
                await asyncio.gather(chaos.run(number, end), *(clients() for _ in range(CLIENTS)))
            await quiet(app, client)
            gc.collect()
            resident_bytes.append(psutil.Process().memory_info().rss)
        evictions = metrics.EXPERT_EVICTIONS._value.get() - evictions
    for name, measured in (
        ("outcomes", {**world.outcomes}),
        ("changes", {**chaos.done, "evict": evictions}),
        ("resident_mib", [size >> 20 for size in resident_bytes]),
    ):
        record_property(name, str(measured))
    await check(world, folder)
    assert world.outcomes["answered"] > 0.3 * world.outcomes.total()
    assert all(world.outcomes[what] for what in ("left", "cancelled", Reason.DEADLINE)), world.outcomes
    assert all(chaos.done[what] for what in ("publish", "load", "unload", "yank")), chaos.done
    assert evictions > 20
    assert resident_bytes[-1] - resident_bytes[1] < GROWTH_BYTES_MAX, resident_bytes


async def check(world: World, folder: Path) -> None:
    """Hold every answer against an engine that has nothing else to do, and all experts in its arena."""
    base = opened(folder)
    experts: dict[str, AdapterExpert] = {digest: expert_of(data, base) for digest, data in world.packages.items()}
    compared = 0
    async with whole_engine(base, arena_rows=1024) as lab:
        for (prompt, chosen, sampling), answers in world.answers.items():
            if not any(answers):
                continue
            text = base.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            mixture = tuple((experts[digest], weight) for digest, weight in chosen)
            sampled: dict[str, Any] = {"top_logprobs": 20, **SAMPLING[sampling]}
            request = asking(base.tokenizer.encode(text), mixture, max_tokens=TOKENS_MAX, **sampled)
            alone = await lab.ask(request)
            for ids in answers:
                assert first_difference(request, ids, alone) is None, (prompt, chosen, sampling)
                compared += bool(ids)
    assert compared > 100
