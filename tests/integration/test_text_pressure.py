"""What is documented to happen when memory is full, readers are slow or leave, uploads fail, and numbers are none.

Four services that talk over sockets, with little memory. Each test ends with nothing running and nothing held.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from prometheus_client import REGISTRY

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.client.router import Constraint
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.rpc.channel import Channels
from hocket.rpc.local import LocalChannel
from hocket.rpc.status import from_rpc_error
from hocket.v1 import expert_worker_pb2, text_pb2
from services.expert_worker.engine.arena import Arena
from tests.bases import tiny_base
from tests.deployments import Deployment, deployed
from tests.engines import NAME, random_package
from tests.experts import expert_package, module_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.expert_worker.app import WorkerApp
    from services.expert_worker.engine.constraints import Constraints

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECONDS: Final = 30.0
CONTEXT: Final = 1024
SMALL_BYTES: Final = 12_288
"""What a package of rank 4 takes; one of rank r takes r / 4 times as much."""
WIDE: Final = 64
BUDGET_BYTES: Final = (1 + WIDE // 4) * SMALL_BYTES
"""Room for a small package, which is pinned, and a wide one."""
PINNED, SMALL, OTHER = (random_package(seed=seed, name=f"small-{seed}") for seed in range(3))
WIDE_ONE = random_package(rank=WIDE, seed=3, name="wide")
HUGE = random_package(rank=WIDE + 16, seed=4, name="huge")
PACKAGES: Final = {"small-0": PINNED, "small-1": SMALL, "small-2": OTHER, "wide": WIDE_ONE, "huge": HUGE}
PROMPT: Final = "7#" * 240
"""480 tokens, which is 30 of 72 pages."""
Event = Any


@dataclass
class Setting:
    """A suite and clients of it.

    Attributes:
        deployment: Its clients, over sockets.
        worker: Asks the worker over a socket, without anybody in between.
        beside: Asks it without a socket, whose buffers would hide that nobody reads.
    """

    deployment: Deployment
    worker: ExpertWorkerClient
    beside: ExpertWorkerClient

    @property
    def app(self) -> WorkerApp:
        assert self.deployment.app is not None
        return self.deployment.app

    async def publish(self, package: bytes, name: str) -> None:
        await self.deployment.publish(package, f"acme/{name}@1.0.0")

    def generate(self, *experts: bytes, count: int = 20, prompt: str = "a", weight: float = 0.5, **options: Any) -> Any:
        chosen = {digest_of(package): weight for package in experts}
        wanted: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "timeout_seconds": SECONDS, **options}
        return self.deployment.router.generate(prompt, experts=chosen, max_tokens=count, **wanted)

    async def answer(self, *experts: bytes, **options: Any) -> list[int]:
        return [token_id async for event in self.generate(*experts, **options) for token_id in ids_of(event)]

    async def refused(self, *experts: bytes, **options: Any) -> HocketError:
        with pytest.raises(HocketError) as refusal:
            await self.answer(*experts, **options)
        return refusal.value

    async def job(self, *experts: bytes, count: int, prompt: str = "a") -> text_pb2.TextJob:
        """What the worker is asked for."""
        engine = (await self.worker.list_experts()).engine
        plan = text_pb2.TextPlan(base=engine.base.digest, seed=1)
        plan.experts.extend(text_pb2.TextExpert(digest=digest_of(each), weight=0.5) for each in experts)
        sampling = text_pb2.Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
        return text_pb2.TextJob(plan=plan, input=text_pb2.TextInput(prompt=prompt), sampling=sampling)

    @asynccontextmanager
    async def unread(self, *experts: bytes, count: int = 150, **asked: Any) -> AsyncIterator[Any]:
        """An answer that begins, is not read on, and so pauses."""
        stream = self.beside.run_text(await self.job(*experts, count=count, **asked), SECONDS, print)
        await anext(stream)
        await self.until(running_count=1, still=True)
        try:
            yield stream
        finally:
            await stream.aclose()

    async def until(self, *, still: bool = False, **wanted: int) -> expert_worker_pb2.ListExpertsResponse:
        """Until the worker says so of its engine; `still` until no token is chosen any more."""
        async with asyncio.timeout(SECONDS):
            while True:
                before = tokens_chosen(self.app)
                listed = await self.worker.list_experts()
                if all(getattr(listed.engine, name) == value for name, value in wanted.items()):
                    await asyncio.sleep(0.02 if still else 0)
                    if not still or tokens_chosen(self.app) == before:
                        return listed
                await asyncio.sleep(0.002)

    async def made_way(self, count: int) -> None:
        """Until so many answers have made way."""
        async with asyncio.timeout(SECONDS):
            while (await self.worker.list_experts()).engine.preemption_count < count:  # noqa: ASYNC110 - told by an rpc
                await asyncio.sleep(0.002)

    async def freed(self, package: bytes) -> None:
        """Until nobody uses an expert."""
        async with asyncio.timeout(SECONDS):
            while await in_use(self, package):  # noqa: ASYNC110 - told by an rpc
                await asyncio.sleep(0.002)

    async def coming(self, package: bytes) -> None:
        """Until an expert is on its way to memory."""
        async with asyncio.timeout(SECONDS):
            while digest_of(package) not in {each.digest for each in self.app.residency.absent}:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)

    @property
    def arena(self) -> Arena:
        assert self.app._text is not None
        return self.app._text.arena

    @property
    def constraints(self) -> Constraints:
        texts = self.app._servicer.texts
        assert texts is not None
        return texts._constraints

    async def baseline(self) -> None:
        """Until nothing runs, waits or holds anything, in all that the worker tells."""
        async with asyncio.timeout(5):
            while True:
                listed = await self.until(running_count=0, waiting_count=0, kv_used_page_count=0)
                gauges = [REGISTRY.get_sample_value(name) for name in ("hocket_text_running", "hocket_kv_pages_used")]
                if not any(expert.in_use_count for expert in listed.experts) and gauges == [0.0, 0.0]:
                    break
                await asyncio.sleep(0.002)
        assert self.app.residency.used_bytes <= BUDGET_BYTES


def ids_of(event: Event) -> list[int]:
    return [token.id for token in event.tokens] if isinstance(event, text_pb2.TextDelta) else []


def tokens_chosen(app: WorkerApp) -> int:
    """Of the answers that run."""
    assert app._text is not None
    return sum(len(sequence.answer_ids) for sequence in app._text.engine._answers)


async def in_use(setting: Setting, package: bytes) -> int:
    listed = (await setting.worker.list_experts()).experts
    return sum(expert.in_use_count for expert in listed if expert.digest == digest_of(package))


class Reading:
    """An answer that is read in the background."""

    def __init__(self, events: Any) -> None:
        self.ids: list[int] = []
        self._started = False
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._read(events))

    async def _read(self, events: Any) -> None:
        try:
            async for event in events:
                self._started |= isinstance(event, text_pb2.TextStart)
                self.ids += ids_of(event)
                self._changed.set()
        finally:
            self._changed.set()

    @property
    def done(self) -> bool:
        return self.task.done()

    async def until(self, count: int) -> None:
        """It runs, and so many tokens have come."""
        async with asyncio.timeout(SECONDS):
            while len(self.ids) < count or not self._started:
                assert not self.done, self.task.exception()
                self._changed.clear()
                await self._changed.wait()

    async def whole(self) -> list[int]:
        await asyncio.wait_for(self.task, SECONDS)
        return self.ids


@asynccontextmanager
async def reading(setting: Setting, *experts: bytes, **options: Any) -> AsyncIterator[Reading]:
    """An answer that is read; at the end of the block its reader leaves."""
    running = Reading(setting.generate(*experts, **options))
    try:
        yield running
    finally:
        running.task.cancel()
        await asyncio.wait([running.task])


def one_number(number: float, name: str = "numbers") -> bytes:
    """A package whose tensors hold this number first."""
    tensors = {}
    for layer in range(2):
        path = module_path(layer, "q_proj")
        tensors[f"{path}.lora_A.weight"] = np.full((4, 64), 0.1, np.float32)
        tensors[f"{path}.lora_B.weight"] = np.full((64, 4), 0.1, np.float32)
    tensors[f"{module_path(1, 'q_proj')}.lora_A.weight"][:] = number
    return expert_package(name, rank=4, modules=("q_proj",), base=NAME, tensors=tensors)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setting]:
    torch.set_num_threads(1)
    base = tiny_base(tmp_path_factory.mktemp("bases") / NAME, max_position_embeddings=CONTEXT)
    worker = {"budget_bytes": BUDGET_BYTES, "slab_bytes": 720_000, "step_tokens": 64, "sequences_max": 2}
    folder = tmp_path_factory.mktemp("suite")
    async with opened(folder, base, preload=(digest_of(PINNED),), **worker) as setting:
        for name, package in PACKAGES.items():
            await setting.publish(package, name)
        async for _ in setting.beside.load(digest_of(PINNED)):
            pass
        yield setting


@asynccontextmanager
async def opened(folder: Path, base: Path, **worker: Any) -> AsyncIterator[Setting]:
    async with deployed("four servers", folder, base=base, worker=worker) as deployment:
        assert deployment.app is not None
        channels = Channels()
        try:
            yield Setting(
                deployment,
                ExpertWorkerClient(channels.get(deployment.app._address)),
                ExpertWorkerClient(LocalChannel(deployment.app.handlers)),
            )
        finally:
            await channels.close()


@pytest_asyncio.fixture(loop_scope="module")
async def setting(suite: Setting) -> AsyncIterator[Setting]:
    yield suite
    await suite.baseline()


class TestSlowReaders:
    async def test_one_who_stops_reading_pauses_its_own_answer_and_misses_nothing(self, setting: Setting) -> None:
        wanted = await setting.answer(SMALL, count=80)
        async with setting.unread(SMALL, count=80) as stream:
            assert await setting.answer(count=30) == await setting.answer(count=30)
            assert (await setting.until(running_count=1)).engine.kv_used_page_count > 0
            ids = [token_id async for event in stream for token_id in ids_of(getattr(event, event.WhichOneof("event")))]
        assert ids == wanted

    async def test_one_who_reads_no_further_is_ended_by_the_server_s_own_deadline(
        self, suite: Setting, tmp_path: Path
    ) -> None:
        known = suite.app._known_base()
        assert known is not None
        async with opened(tmp_path, known.path, slab_bytes=2**20, text_deadline_seconds=0.3) as setting:
            job = await setting.job(count=CONTEXT)
            job.sampling.top_logprobs = 20
            call = setting.worker._stub.RunText(expert_worker_pb2.RunTextRequest(job=job))
            await setting.until(running_count=1)
            await setting.baseline()
            with pytest.raises(HocketError) as refusal:
                await read(call)
            assert refusal.value.reason is Reason.DEADLINE


async def read(call: Any) -> None:
    """Read a raw call to its end."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


class TestLeaving:
    """Whoever leaves frees what it has, in whatever state; those beside it see nothing."""

    async def test_while_it_waits_for_its_turn(self, setting: Setting) -> None:
        async with reading(setting, count=500) as first, reading(setting, count=500) as second:
            await asyncio.gather(first.until(1), second.until(1))
            async with reading(setting, SMALL):
                await setting.until(waiting_count=1)
                assert await in_use(setting, SMALL) == 1
            await setting.until(running_count=2, waiting_count=0)
            assert await in_use(setting, SMALL) == 0
            assert (await setting.refused(SMALL, timeout_seconds=0.1)).reason is Reason.DEADLINE

    async def test_while_its_experts_are_loaded(self, setting: Setting) -> None:
        async with setting.unread(WIDE_ONE):
            async with reading(setting, SMALL, PINNED):
                await setting.coming(SMALL)
            await setting.freed(PINNED)
        assert await setting.answer(SMALL, PINNED)

    async def test_while_its_constraint_is_compiled(self, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
        go_on, begun = threading.Event(), threading.Event()
        constraints = setting.constraints
        compile_ = constraints._compile

        def slowly(constraint: Any) -> Any:
            begun.set()
            assert go_on.wait(SECONDS)
            return compile_(constraint)

        monkeypatch.setattr(constraints, "_compile", slowly)
        wanted: dict[str, Any] = {"constraint": Constraint(gbnf='root ::= "yes"'), "ignore_eos": False}
        async with reading(setting, SMALL, **wanted):
            assert await asyncio.to_thread(begun.wait, SECONDS)
            assert await in_use(setting, SMALL) == 1
            assert await setting.answer(OTHER), "who is not constrained waits for no compiler"
        await setting.baseline()
        go_on.set()
        assert await setting.answer(SMALL, **wanted)

    @pytest.mark.parametrize("tokens", [0, 3])
    async def test_while_it_is_computed(self, setting: Setting, tokens: int) -> None:
        wanted = await setting.answer(OTHER, count=40)
        async with reading(setting, OTHER, count=40) as beside:
            async with reading(setting, SMALL, count=400, prompt="b" + PROMPT) as leaving:
                await leaving.until(tokens)
                assert await in_use(setting, SMALL) == 1
            assert await beside.whole() == wanted

    async def test_while_nobody_reads_it(self, setting: Setting) -> None:
        async with setting.unread(SMALL):
            assert await in_use(setting, SMALL) == 1

    async def test_after_it_has_made_way(self, setting: Setting) -> None:
        asked: dict[str, Any] = {"count": 120, "prompt": "a" + PROMPT}
        wanted = await setting.answer(**asked)
        before = (await setting.worker.list_experts()).engine.preemption_count
        async with reading(setting, **asked) as first:
            await first.until(1)
            async with reading(setting, SMALL, count=120, prompt="b" + PROMPT):
                await setting.made_way(before + 1)
                assert await in_use(setting, SMALL) == 1, "who has made way keeps its experts"
            assert len(first.ids) < 120, "too quick to prove anything"
            assert await first.whole() == wanted

    async def test_what_a_session_keeps_is_no_use(self, setting: Setting) -> None:
        async with reading(setting, SMALL, count=400, prompt="c" + PROMPT, session="s") as leaving:
            await leaving.until(5)
        await setting.baseline()
        assert (await setting.worker.list_experts()).engine.kv_cached_page_count > 0
        assert await setting.answer(count=10, prompt="d" + PROMPT), "and makes room"


class TestMemory:
    async def test_an_upload_that_fails_half_way_ends_its_answer_and_the_next_one_tries_again(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arena = setting.arena
        copy_in = Arena._copy_in

        def half(which: Arena, expert: Any, seat: Any) -> None:
            copy_in(which, expert, seat)
            if expert.digest == digest_of(SMALL):
                raise torch.OutOfMemoryError("scripted")

        beside_wanted = await setting.answer(OTHER, count=40)
        arena.bring_now([])
        while digest_of(SMALL) in arena.resident:
            arena._leave(digest_of(SMALL))
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "_copy_in", half)
            async with reading(setting, OTHER, count=40) as beside:
                refusal = await setting.refused(SMALL)
                assert refusal.reason is Reason.DEVICE_MEMORY
                assert refusal.retry_after_seconds is not None
                assert await beside.whole() == beside_wanted
        assert await setting.answer(SMALL)

    async def test_where_everything_is_pinned_or_in_use_experts_are_waited_for(self, setting: Setting) -> None:
        async with setting.unread(WIDE_ONE):
            listed = (await setting.worker.list_experts()).experts
            there = {expert.digest: expert for expert in listed if expert.size_bytes}
            assert sum(expert.size_bytes for expert in there.values()) == BUDGET_BYTES
            refusal = await setting.refused(SMALL, timeout_seconds=0.3)
            assert refusal.reason is Reason.EXPERT_LOADING
            assert await setting.answer(PINNED), "what is there goes on"
            waiting = asyncio.create_task(setting.answer(SMALL))
            await setting.coming(SMALL)
        assert await waiting
        listed = (await setting.worker.list_experts()).experts
        assert digest_of(PINNED) in {expert.digest for expert in listed if expert.size_bytes}

    async def test_what_can_never_fit_is_refused_at_once_and_what_just_fits_is_not(self, setting: Setting) -> None:
        for packages, count in (([HUGE], 1), ([SMALL, OTHER, WIDE_ONE], 1), ([WIDE_ONE], 1000)):
            refusal = await setting.refused(*packages, count=count)
            assert (refusal.reason, refusal.retry_after_seconds) == (Reason.DEVICE_MEMORY, None)
        assert await setting.answer(SMALL, OTHER, count=2)
        async with reading(setting, WIDE_ONE, count=150) as fits:
            await fits.until(1)


class TestNumbers:
    @pytest.mark.parametrize("number", [np.nan, np.inf])
    async def test_weights_that_are_no_numbers_are_refused_when_they_are_published(
        self, setting: Setting, number: float
    ) -> None:
        with pytest.raises(HocketError) as refusal:
            await setting.publish(one_number(number), "numbers")
        assert refusal.value.reason is Reason.BAD_WEIGHTS
        await setting.publish(one_number(0.5, "sound"), "sound")

    async def test_answers_that_become_no_numbers_end_alone(self, setting: Setting) -> None:
        wild = one_number(3e38, "wild")
        await setting.publish(wild, "wild")
        wanted = await setting.answer(OTHER, count=40)
        async with reading(setting, OTHER, count=40) as beside:
            await beside.until(3)
            assert (await setting.refused(wild, weight=100.0)).reason is Reason.BAD_ANSWER
            assert not beside.done, "too quick to prove anything"
            assert await beside.whole() == wanted
        assert await setting.answer(wild, weight=0.0)
