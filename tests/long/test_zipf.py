"""Far more experts than memory holds, asked for by Zipf's law: nothing fails, nobody starves, no byte is exceeded."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.identity import digest_of
from hocket.rpc.local import LocalChannel
from hocket.telemetry import metrics
from hocket.v1 import text_pb2
from tests.bases import tiny_base
from tests.deployments import deployed
from tests.engines import NAME, asking, expert_of, first_difference, opened, random_package, whole_engine
from tests.long.test_text_soak import SHAPES, publish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.expert_worker.app import WorkerApp

pytestmark = pytest.mark.long

EXPERTS = 2000
REQUESTS = 3000
CLIENTS = 24
SECONDS = 120.0
"""Longest wait of a request. None comes near; a starved one would wait for ever."""
TOKENS = 4
CHECKED = 60


@dataclass
class Peaks:
    """The most that was taken of each budget, and what was wrong."""

    bytes_: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def look(self, app: WorkerApp) -> None:
        assert app._text is not None
        arena, state = app._text.arena, app._text.engine.state
        for what, used, most in (
            ("host", app.residency.used_bytes, app.residency.budget_bytes),
            ("arena", arena.used_bytes, arena.slab.size_bytes + arena.size_bytes),
            ("pages", state.counts.used_page_count, state.page_count),
        ):
            self.bytes_[what] = max(self.bytes_.get(what, 0), used)
            if not 0 <= used <= most:
                self.wrong.append(f"{what}: {used} of {most}")


async def test_two_thousand_experts_share_the_memory_of_a_few(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tiny_base(tmp_path / NAME)
    base = opened(folder)
    packages = [
        random_package(**SHAPES[number % len(SHAPES)], seed=number, name=f"e{number}") for number in range(EXPERTS)
    ]
    digests = [digest_of(package) for package in packages]
    sizes = [expert_of(package, base).size_bytes for package in packages[: len(SHAPES)]]
    worker = {
        "budget_bytes": 20 * max(sizes),
        "slab_bytes": 2**20,
        "sequences_max": 8,
        "text_queue_max": 4 * CLIENTS,
        "preload": (digests[-1],),
    }
    dice = random.Random(8)
    weights = [1 / (rank + 1) for rank in range(EXPERTS)]
    asked = [
        tuple(sorted({*dice.choices(range(EXPERTS), weights, k=dice.choice([1, 1, 1, 2, 3]))})) for _ in range(REQUESTS)
    ]
    peaks, waits, answers = Peaks(), [], {}
    evictions = metrics.EXPERT_EVICTIONS._value.get()
    async with deployed("one process", tmp_path / "suite", base=folder, worker=worker) as suite:
        app = suite.app
        assert app is not None
        for package in packages:
            await publish(suite, package)
        app.residency.release(await app.residency.acquire(digests[-1], SECONDS))  # it was not there at the start
        client = ExpertWorkerClient(LocalChannel(app.handlers))
        queue = [*enumerate(asked)]

        async def clients() -> None:
            while queue:
                number, chosen = queue.pop()
                job = job_of(app, [digests[each] for each in chosen], [digests[dice.randrange(EXPERTS)]])
                begin, ids = time.monotonic(), []
                async for event in client.run_text(job, SECONDS, lambda _: None):
                    if event.WhichOneof("event") == "start":
                        waits.append(time.monotonic() - begin)
                    ids += [token.id for token in event.delta.tokens]
                    peaks.look(app)
                answers[number] = ids

        async with asyncio.timeout(900):
            await asyncio.gather(*(clients() for _ in range(CLIENTS)))
        assert digests[-1] in app.residency.digests, "it is pinned"
    assert peaks.wrong == []
    assert len(answers) == len(waits) == REQUESTS
    waits.sort()
    evictions = metrics.EXPERT_EVICTIONS._value.get() - evictions
    assert evictions > REQUESTS / 10
    record_property("waits_ms_p50_p99_max", [round(1e3 * waits[int(q * (REQUESTS - 1))]) for q in (0.5, 0.99, 1.0)])
    record_property("evictions", evictions)
    record_property("peaks", str(peaks.bytes_))
    assert waits[-1] < SECONDS / 4
    await check(opened(folder), packages, {tuple(asked[number]): ids for number, ids in answers.items()}, dice)


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
