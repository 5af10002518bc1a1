"""What holds for every workload of the text engine: of its scheduler, step by step, and of its thread and streams."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.pages import Pages
from services.expert_worker.engine.scheduler import EngineLimits, Scheduler
from services.expert_worker.engine.sequence import Finished, Sequence
from tests.scripted_engine import (
    CONTEXT,
    LETTERS,
    PAGE_POSITIONS,
    TIMEOUT_SECONDS,
    ScriptedRunner,
    alone,
    asking,
    expert,
    read,
    running_engine,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from services.expert_worker.engine.engine import Engine
    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.part import Part
    from services.expert_worker.engine.scheduler import Share
    from services.expert_worker.engine.sequence import TextRequest

ROWS_MAX = 28  # of one request
ARENA_BYTES = 6  # for each request's experts alone, and not for all
EXPERTS = (
    expert("one", size_bytes=1),
    expert("two", size_bytes=2),
    expert("three", size_bytes=3, prompt=[0.5, 0.25]),
    expert("four", size_bytes=4, prompt=[0.75]),
)
BAD = expert("bad", size_bytes=1)


def fits(experts: Collection[AdapterExpert], _page_count: int = 0) -> bool:
    return sum(each.size_bytes for each in experts) <= ARENA_BYTES


@st.composite
def requests(draw: st.DrawFn) -> TextRequest:
    experts = draw(st.lists(st.sampled_from(EXPERTS), max_size=3, unique=True))
    while not fits(experts):
        experts = experts[1:]
    begin = draw(st.sampled_from(([], range(1, 6), range(1, 10))))  # several begin alike
    request = asking(
        [*begin, *draw(st.lists(st.integers(0, 28), min_size=1, max_size=ROWS_MAX - 3 - 8 - len(begin)))],
        mixture=tuple((each, draw(st.sampled_from((0.0, 0.5, -2.0)))) for each in experts),
        max_tokens=draw(st.integers(1, 8)),
        stops=draw(st.lists(st.text("abcdefghijklmnop", min_size=1, max_size=2), max_size=2)),
        temperature=draw(st.sampled_from((0.0, 1.0))),
        seed=draw(st.integers(0, 9)),
        repetition_penalty=draw(st.sampled_from((1.0, 1.3))),
    )
    return replace(
        request,
        tenant=draw(st.sampled_from(("", "a", "b"))),
        session=draw(st.sampled_from(("", "", "s", "t"))),
        priority=draw(st.integers(0, 9)),
    )


limits = st.builds(
    EngineLimits,
    step_tokens=st.integers(1, 40),
    sequences_max=st.integers(1, 6),
    queue_max=st.just(100),
    unread_max=st.integers(1, 4),
    patience_seconds=st.sampled_from((0.0, 3.0, 1000.0)),
    ageing_seconds=st.sampled_from((1.0, 10.0)),
    session_seconds=st.sampled_from((0.0, 5.0, 1000.0)),
)
page_counts = st.integers(-(-ROWS_MAX // PAGE_POSITIONS), 24)


class Steps:
    """A scheduler under a workload, a step a second, every step checked."""

    def __init__(self, page_count: int, limits: EngineLimits, data: st.DataObject) -> None:
        self.limits = limits
        self.pages = Pages(page_count + 1)
        self.scheduler = Scheduler(self.pages, fits, limits)
        self.data = data
        self.now = 0.0
        self.dropped: set[Sequence] = set()
        self.written: dict[int, list[tuple[int, Any]]] = {}
        """What each page holds: of each of its rows, the place and everything that it depends on."""

    def arrive(self, request: TextRequest) -> Sequence:
        sequence = Sequence(request, Detokenizer(LETTERS), PAGE_POSITIONS, CONTEXT, self.now)
        self.scheduler.check(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self, *, reading: bool) -> None:
        before = list(self.scheduler.waiting)
        admitted = self.scheduler.admit(self.now)
        self._check_order(before, admitted)
        self._check_reserve(admitted)
        self._check_memory()
        running = self._ranked()
        counts = {sequence: sequence.preemption_count for sequence in running}
        plan = self.scheduler.plan()
        self._check_preempted([each for each in running if each.preemption_count > counts[each]], running)
        self._check_memory()
        self._check_plan([(share.sequence, share.row_count) for share in plan])
        for share in plan:
            self._write(share)
        for share in plan:
            sequence = share.sequence
            self.scheduler.advance(share)
            if not sequence.rows_left:
                sequence.append(1, self.now)
                sequence.unread_count += 1
                if len(sequence.answer_ids) == sequence.token_count_max:
                    self.drop(sequence)
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if reading or self.data.draw(st.booleans()):
                sequence.unread_count = 0
        self.now += 1.0

    def drop(self, sequence: Sequence) -> None:
        assert self.scheduler.drop(sequence, self.now) != (sequence in self.dropped)
        self.dropped.add(sequence)

    def _ranked(self) -> list[Sequence]:
        going = (each for each in self.scheduler.running if not self.scheduler.is_paused(each))
        return sorted(going, key=self.scheduler._rank)

    def _check_order(self, before: list[Sequence], admitted: list[Sequence]) -> None:
        left = [each for each in before if each not in admitted]
        assert self.scheduler.waiting[: len(left)] == left  # then come those who had to make way
        for passed in left:
            if self.scheduler.is_paused(passed) or self.now - passed.arrival_time < self.limits.patience_seconds:
                continue
            mates = [each for each in admitted if each.request.tenant == passed.request.tenant]
            assert all(self.scheduler._rank(each) < self.scheduler._rank(passed) for each in mates)

    def _check_reserve(self, admitted: list[Sequence]) -> None:
        """Where somebody is admitted there is room left for the longest answers of all those who have made way."""
        back = [each for each in self._ranked() if each.preemption_count]
        reserved_count = sum(each.page_count_max - len(each.pages) for each in back)
        used_count = self.scheduler.counts.used_page_count
        assert not admitted or used_count + reserved_count <= self.pages.count

    def _check_preempted(self, preempted: list[Sequence], ranked: list[Sequence]) -> None:
        """The first in rank makes way to nobody; those who make way are the last."""
        assert not preempted or ranked[0] not in preempted
        going = [each for each in ranked if each not in preempted]
        assert all(self.scheduler._rank(each) < self.scheduler._rank(other) for each in going for other in preempted)

    def _check_memory(self) -> None:
        running = self.scheduler.running
        counts = self.scheduler.counts
        had = Counter(page for sequence in running for page in sequence.pages)
        assert counts.used_page_count == len(had)
        assert counts.used_page_count + counts.cached_page_count + self.pages.free_count == self.pages.count
        for sequence in running:
            assert 0 <= sequence.computed_count < sequence.row_count
            assert sequence.computed_count <= len(sequence.pages) * PAGE_POSITIONS
            assert len(sequence.pages) <= sequence.page_count_max
            assert len(sequence.pages) == len({*sequence.pages})
        for sequence in self.scheduler.waiting:
            assert (sequence.pages, sequence.computed_count) == ([], 0)
        for page, count in had.items():
            whole = [each.pages.index(page) < each.kept_page_count for each in running if page in each.pages]
            assert count == 1 or all(whole)

    def _write(self, share: Share) -> None:
        """What is in pages is what their sequences would have written there themselves."""
        part = share.sequence.part(share.row_count)
        asked = share.sequence.request
        salt = asked.tenant, sorted((each.digest, weight) for each, weight in asked.mixture)
        ids = [*asked.token_ids, *share.sequence.answer_ids]
        rows = [
            (place, (salt, tuple(ids[: max(0, place + 1 - share.sequence.soft_row_count)])))
            for place in range(part.start + part.row_count)
        ]
        for place, row in rows[part.start :]:
            page, offset = part.pages[place // PAGE_POSITIONS], place % PAGE_POSITIONS
            assert sum(page in each.pages for each in self.scheduler.running) == 1
            assert page not in self.scheduler._cache._keys
            self.written[page] = [*self.written.get(page, ())[:offset], (place, row)]
        found = [row for page in part.pages for row in self.written.get(page, ())][: len(rows)]
        assert found == rows

    def _check_plan(self, plan: list[tuple[Sequence, int]]) -> None:
        going = [each for each in self.scheduler.running if not self.scheduler.is_paused(each)]
        assert sum(row_count for _, row_count in plan) <= self.limits.step_tokens
        assert all(0 < row_count <= sequence.rows_left for sequence, row_count in plan)
        assert all(
            sequence.computed_count + row_count <= len(sequence.pages) * PAGE_POSITIONS for sequence, row_count in plan
        )
        planned = [sequence for sequence, _ in plan]
        assert len(planned) == len(set(planned))
        assert set(planned) <= set(going)
        assert fits({each for sequence in planned for each in sequence.experts})
        assert len(planned) <= self.limits.sequences_max
        together = fits({each for sequence in going for each in sequence.experts})
        if together and len(going) <= min(self.limits.sequences_max, self.limits.step_tokens):
            assert all(each in planned for each in going if each.rows_left == 1)
        assert bool(plan) == bool(going)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=12), page_counts, limits, st.data())
def test_memory_and_turns_are_kept_at_every_step_and_everyone_ends(
    asked: list[TextRequest], page_count: int, limits: EngineLimits, data: st.DataObject
) -> None:
    steps = Steps(page_count, limits, data)
    sequences = []
    for request in asked:
        sequences.append(steps.arrive(replace(request, eos_ids=frozenset(), stops=())))
        for _ in range(data.draw(st.integers(0, 3))):
            steps.step(reading=False)
        if data.draw(st.integers(0, 5)) == 0:
            steps.drop(data.draw(st.sampled_from(sequences)))
    rows = sum(each.prompt_row_count + each.token_count_max for each in sequences)
    for _ in range(rows * len(sequences)):
        if steps.dropped == set(sequences):
            break
        steps.step(reading=True)
    assert steps.dropped == set(sequences)
    assert steps.scheduler.counts.used_page_count == 0
    steps.scheduler.restart()
    assert steps.pages.free_count == page_count


@dataclass(frozen=True)
class Client:
    """Who asks, how often it looks away between two events, after how many events it goes, whether its expert fails."""

    request: TextRequest
    pauses: int
    patience: int | None
    fails: bool


clients = st.builds(
    Client,
    requests(),
    st.sampled_from((0, 0, 3, 20)),
    st.none() | st.integers(0, 5),
    st.sampled_from((False, False, False, True)),
)


class Checked(ScriptedRunner):
    """Checks that steps keep to their budget, and fails at the bad expert."""

    def __init__(self, step_tokens: int) -> None:
        super().__init__(self._fail)
        self._step_tokens = step_tokens

    def _fail(self, parts: list[Part]) -> None:
        assert sum(part.row_count for part in parts) <= self._step_tokens
        if any(each is BAD for part in parts for each, _ in part.mixture):
            raise LookupError("bad")


async def attend(engine: Engine, client: Client) -> int:
    """What a client does; how often it was told that nothing touches its experts."""
    request, done = client.request, list[int]()
    if client.fails:
        request = replace(request, mixture=((BAD, 1.0),))
    over = asyncio.Event()

    def note() -> None:
        done.append(1)
        over.set()

    events: list[Any] = []
    error: Exception | None = None
    async with aclosing(engine.submit(request, note)) as answer:
        while client.patience is None or len(events) < client.patience:
            for _ in range(client.pauses):
                await asyncio.sleep(0)
            try:
                events.append(await anext(answer))
            except StopAsyncIteration:
                break
            except LookupError as caught:
                error = caught
                break
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await over.wait()
    if events and isinstance(events[-1], Finished):
        assert told(events) == alone(request)
        assert not client.fails
    else:
        assert client.fails or client.patience is not None
        assert (error is not None) == (client.fails and client.patience not in {0, 1})
    return len(done)


@settings(max_examples=80, deadline=None)
@given(st.lists(clients, min_size=1, max_size=10), page_counts, limits)
def test_everyone_is_told_what_it_would_be_told_alone_whoever_else_is_there_and_however_they_behave(
    attending: list[Client], page_count: int, limits: EngineLimits
) -> None:
    async def scene() -> None:
        runner = Checked(limits.step_tokens)
        async with running_engine(runner, page_count=page_count, limits=limits, fits=fits) as engine:
            counts = await asyncio.gather(*(attend(engine, client) for client in attending))
            assert counts == [1] * len(attending)
            assert engine.state.counts.used_page_count == 0
            assert engine.state.running_count == engine.state.waiting_count == 0
            last = asking([1, 2], max_tokens=3)
            assert told(await read(engine.submit(last, list[int]().clear))) == alone(last)

    with capture_logs():
        asyncio.run(scene())
