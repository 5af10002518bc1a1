"""Far more experts than memory holds, asked for by Zipf's law: nothing fails, nobody starves, no byte is exceeded."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.identity import digest_of
from hocket.rpc.local import LocalChannel
from hocket.telemetry import metrics
from hocket.v1 import text_pb2
from services.expert_worker import loader
from services.expert_worker.budget import Budget
from services.expert_worker.page_locked import in_pages
from tests.bases import tiny_base
from tests.deployments import deployed
from tests.engines import HEAD, NAME, asking, expert_of, first_difference, opened, random_package, whole_engine
from tests.long.test_text_soak import publish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from services.expert_worker.app import WorkerApp
    from services.expert_worker.budget import Wait
    from services.expert_worker.loader import Prepared, Served

pytestmark = pytest.mark.long

EXPERTS = 2000
REQUESTS = 3000
CLIENTS = 24
SECONDS = 120.0
"""Deadline of a request. None comes near; a starved one would wait for ever."""
WAIT_P99, WAIT_MAX = 20.0, 40.0
"""Seconds until a text begins: generous, on a machine that does other things as well."""
PATIENCE = 0.5
"""Seconds until a load that waits for room has the turn: short, so that many have."""
LEAVING_SHARE = 0.05
TOKENS = 4
CHECKED = 60
RANKS = (1, 2, 3, 5, 8, 13, 24, 40, 64)
KINDS: list[dict[str, Any]] = [
    {},
    {"kind": "dora"},
    {"kind": "rslora", "modules": ["down_proj"]},
    {"kind": "dora", "modules": ["o_proj", "up_proj"]},
    {"modules": ["k_proj", "gate_proj"]},
]
SMALL: list[dict[str, Any]] = [
    {"kind": "ia3"},
    {"kind": "soft_prompt", "rank": 4},
    {"modules": ["q_proj", HEAD], "rank": 2},  # outside the layers the arena has room for 72 rows in all
]
READ_AT_ONCE = 8
"""Packages that a worker has in memory at most before they have room: four from its cache, four from the registry."""


@dataclass
class Alive:
    """Bytes of host memory that experts really take: added up as they are placed, and as the memory itself goes.

    Experts are placed as beside a CUDA device, where each lies in pages of its own; this is what would lock these.

    Attributes:
        budget_bytes: What they may take together.
        placed: Bytes of what is placed, by address.
        placed_peak: The most they took.
        read_bytes: Of packages that were read and are not placed yet, or could not be.
        read_peak: The most these took.
        wrong: What was.
    """

    budget_bytes: int
    placed: dict[int, int] = field(default_factory=dict)
    placed_peak: int = 0
    read_bytes: int = 0
    read_peak: int = 0
    wrong: list[str] = field(default_factory=list)
    guard: threading.RLock = field(default_factory=threading.RLock)  # memory may go while it is held

    def lock(self, address: int, size_bytes: int) -> int:
        with self.guard:
            self.placed[address] = size_bytes
            taken = sum(self.placed.values())
            self.placed_peak = max(self.placed_peak, taken)
            if taken > self.budget_bytes:
                self.wrong.append(f"{taken} of {self.budget_bytes}")
        return 0

    def unlock(self, address: int) -> int:
        with self.guard:
            del self.placed[address]
        return 0

    def prepare(self, *arguments: Any, **options: Any) -> Prepared:
        prepared = loader.prepare(*arguments, **{**options, "page_locked_adapters": True})
        (flat,) = prepared.tensors
        self._read(flat.nbytes)
        weakref.finalize(flat, self._read, -flat.nbytes)
        return prepared

    def place(self, prepared: Prepared, _device: torch.device) -> tuple[Served, ...]:
        return prepared.assemble(loader._page_locked(prepared, self))

    def _read(self, size_bytes: int) -> None:
        with self.guard:
            self.read_bytes += size_bytes
            self.read_peak = max(self.read_peak, self.read_bytes)


@dataclass
class World:
    """What is there, what was asked for, and what came of it.

    Attributes:
        asked: Experts of each request, by number.
        answers: Tokens of those who stayed.
        waits: Seconds until a text began.
        left: Requests that were cancelled.
        waiting_peak: The most loads that waited for room at once.
        turns: Loads that had the turn.
    """

    dice: random.Random
    digests: list[str]
    asked: list[tuple[int, ...]]
    answers: dict[int, list[int]] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    left: int = 0
    waiting_peak: int = 0
    turns: set[Wait] = field(default_factory=set)

    async def ask(self, app: WorkerApp, client: ExpertWorkerClient, number: int) -> None:
        digests = [self.digests[each] for each in self.asked[number]]
        job = job_of(app, digests, [self.digests[self.dice.randrange(EXPERTS)]])
        begin, ids = time.monotonic(), []
        async for event in client.run_text(job, SECONDS, lambda _: None):
            if event.WhichOneof("event") == "start":
                self.waits.append(time.monotonic() - begin)
            ids += [token.id for token in event.delta.tokens]
            self.look(app)
        self.answers[number] = ids

    async def leave(self, app: WorkerApp, client: ExpertWorkerClient, number: int) -> None:
        """Ask, and go away at some time."""
        asking = asyncio.create_task(self.ask(app, client, number))
        await asyncio.wait([asking], timeout=self.dice.expovariate(4.0))
        asking.cancel()
        await asyncio.wait([asking])
        self.left += asking.cancelled()
        if not asking.cancelled():
            asking.result()

    def look(self, app: WorkerApp) -> None:
        waits = app.residency.host.waits
        self.waiting_peak = max(self.waiting_peak, len(waits))
        if (turn := app.residency.host.turn) is not None:
            self.turns.add(turn)


def made(number: int, dice: random.Random) -> bytes:
    """A random expert of any kind and size."""
    if dice.random() < 0.1:
        return random_package(**dice.choice(SMALL), seed=number, name=f"e{number}")
    return random_package(**{**dice.choice(KINDS), "rank": dice.choice(RANKS)}, seed=number, name=f"e{number}")


async def test_two_thousand_experts_share_the_memory_of_a_few(
    tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_base(tmp_path / NAME)
    base = opened(folder)
    dice = random.Random(8)
    packages = [made(number, dice) for number in range(EXPERTS)]
    sizes = sorted(in_pages(expert_of(package, base).size_bytes) for package in packages)
    row_bytes = 4 * sum(linear.in_features + linear.out_features for linear in base.projections.values())
    alive = Alive(4 * sizes[-1])
    for name in ("prepare", "place"):
        monkeypatch.setattr(f"services.expert_worker.app.{name}", getattr(alive, name))
    monkeypatch.setattr("services.expert_worker.app.Budget", partial(Budget, patience_seconds=PATIENCE))
    weights = [1 / (rank + 1) for rank in range(EXPERTS)]
    world = World(
        dice,
        [digest_of(package) for package in packages],
        [
            tuple(sorted({*dice.choices(range(EXPERTS), weights, k=dice.choice([1, 1, 1, 2, 3]))}))
            for _ in range(REQUESTS)
        ],
    )
    pinned = world.digests[-1]
    worker = {
        "budget_bytes": alive.budget_bytes,
        "slab_bytes": 300 * row_bytes + 80 * 16 * base.kv_shape.position_bytes(base.dtype),
        "sequences_max": 8,
        "text_queue_max": 4 * CLIENTS,
        "preload": (pinned,),
    }
    evictions = metrics.EXPERT_EVICTIONS._value.get()
    async with deployed("one process", tmp_path / "suite", base=folder, worker=worker) as suite:
        app = suite.app
        assert app is not None
        for package in packages:
            await publish(suite, package)
        app.residency.release(await app.residency.acquire(pinned, SECONDS))  # it was not there at the start
        client = ExpertWorkerClient(LocalChannel(app.handlers))
        queue = [*range(REQUESTS)]

        async def clients() -> None:
            while queue:
                act = world.leave if dice.random() < LEAVING_SHARE else world.ask
                await act(app, client, queue.pop())

        begin = time.monotonic()
        async with asyncio.timeout(1200):
            await asyncio.gather(*(clients() for _ in range(CLIENTS)))
        seconds = time.monotonic() - begin
        assert pinned in app.residency.digests, "it is pinned"
        assert app.residency.used_bytes == sum(package.size_bytes for package in app.residency.packages)
        assert sum(alive.placed.values()) <= app.residency.used_bytes, "something is alive that nobody counts"
    waits = sorted(world.waits)
    evictions = metrics.EXPERT_EVICTIONS._value.get() - evictions
    for name, measured in (
        ("waits_ms_p50_p99_max", [round(1e3 * waits[int(q * (len(waits) - 1))]) for q in (0.5, 0.99, 1.0)]),
        ("requests", {"answered": len(world.answers), "left": world.left, "per_second": round(REQUESTS / seconds, 1)}),
        ("sizes_least_median_largest", (sizes[0], sizes[EXPERTS // 2], sizes[-1])),
        ("bytes", {"budget": alive.budget_bytes, "placed": alive.placed_peak, "read": alive.read_peak}),
        ("waiting", {"peak": world.waiting_peak, "turns": len(world.turns), "evictions": evictions}),
    ):
        record_property(name, str(measured))
    assert alive.wrong == []
    assert alive.placed_peak > 0.8 * alive.budget_bytes, "the budget was not what was short"
    assert alive.read_peak <= alive.budget_bytes + READ_AT_ONCE * sizes[-1]  # what has room is read until it is placed
    assert len(world.answers) + world.left == REQUESTS
    assert world.left > LEAVING_SHARE * REQUESTS / 4
    assert evictions > REQUESTS / 10
    assert world.turns
    assert waits[int(0.99 * (len(waits) - 1))] < WAIT_P99
    assert waits[-1] < WAIT_MAX
    answers = {world.asked[number]: ids for number, ids in world.answers.items()}
    await check(opened(folder), packages, answers, dice)


def job_of(app: WorkerApp, digests: list[str], hints: list[str]) -> text_pb2.TextJob:
    assert app._text is not None
    plan = text_pb2.TextPlan(
        base=app._text.base.model.digest or "",
        experts=[text_pb2.TextExpert(digest=digest, weight=0.5) for digest in digests],
    )
    sampling = text_pb2.Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return text_pb2.TextJob(plan=plan, input=text_pb2.TextInput(raw="select"), sampling=sampling, hints=hints)


async def check(
    base: Any, packages: list[bytes], answers: dict[tuple[int, ...], list[int]], dice: random.Random
) -> None:
    """Some of the answers are what an engine says that has room for everything."""
    prompt = base.tokenizer("select", add_special_tokens=False)["input_ids"]
    async with whole_engine(base, arena_rows=1024) as lab:
        for chosen in dice.sample(sorted(answers), CHECKED):
            mixture = tuple((expert_of(packages[each], base), 0.5) for each in chosen)
            request = asking(prompt, mixture, max_tokens=TOKENS, top_logprobs=20)
            alone = await lab.ask(request)
            assert len(answers[chosen]) == TOKENS
            assert first_difference(request, answers[chosen], alone) is None
