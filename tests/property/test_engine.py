"""What one is answered depends on what one asked, and on nothing else: the whole engine, over a tiny base."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.mixing import Method
from services.expert_worker.engine.pages import SCRATCH_PAGES
from services.expert_worker.engine.scheduler import EngineLimits
from tests.bases import tiny_base
from tests.engines import (
    HEAD,
    NAME,
    SECONDS,
    Lab,
    Told,
    asking,
    expert_of,
    first_difference,
    opened,
    prompt_ids,
    random_package,
    whole_engine,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import AdapterExpert, Mixture
    from services.expert_worker.engine.sequence import TextRequest

TOLERANCE = 3e-5
"""Of log-probabilities: with two experts of weight 2, what rounding does to logits shows several times over."""
TOKENS_MAX = 10
PACKAGES: dict[str, dict[str, Any]] = {
    "wide": {"modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "rank": 3},
    "head": {"modules": ["q_proj", HEAD], "rank": 5},
    "rslora": {"kind": "rslora", "modules": ["down_proj"], "rank": 8},
    "dora": {"kind": "dora", "rank": 4},
    "small": {"kind": "dora", "modules": ["o_proj", "up_proj"], "rank": 1},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "soft_prompt", "rank": 5},
    "other": {"rank": 2},
}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 8, "seed": 3},
    {"temperature": 1.2, "top_k": 19, "seed": 4},
]
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Chosen = tuple[tuple[str, float], ...]
"""Names of experts with their weights."""


@dataclass(frozen=True)
class Asked:
    """A request, by values that can be compared.

    Attributes:
        rows: Tokens of its prompt.
        chosen: The experts.
        sampling: One of `SAMPLING`.
        count: Tokens of its answer.
        leaves: After how many of these its reader leaves; None for never.
        is_slow: Whether its reader lets others pass before each token.
    """

    rows: int
    chosen: Chosen
    sampling: int = 0
    count: int = TOKENS_MAX
    leaves: int | None = None
    is_slow: bool = False


@dataclass
class World:
    """A base, experts, and what each request is answered when it is alone."""

    base: Base = field(repr=False)
    experts: dict[str, AdapterExpert] = field(repr=False)
    known: dict[Any, Told] = field(default_factory=dict, repr=False)

    def mixture(self, chosen: Chosen) -> Mixture:
        return tuple((self.experts[name], weight) for name, weight in chosen)

    def request(self, asked: Asked, count: int | None = None) -> TextRequest:
        return asking(
            prompt_ids(asked.rows, asked.rows),
            self.mixture(asked.chosen),
            max_tokens=count or asked.count,
            top_logprobs=20,
            **SAMPLING[asked.sampling],
        )

    async def alone(self, asks: Sequence[Asked]) -> list[Told]:
        """One after the other, in the plainest way: one pass for the whole prompt, pages that hold the whole text."""
        keys = [(asked.rows, asked.chosen, asked.sampling) for asked in asks]
        if not self.known.keys() >= {*keys}:
            async with whole_engine(self.base, page_positions=64, page_count=1, method=Method.SEGMENTS) as lab:
                for key, asked in zip(keys, asks, strict=True):
                    if key not in self.known:
                        self.known[key] = await lab.ask(self.request(asked, TOKENS_MAX))
        return [self.known[key] for key in keys]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = opened(tiny_base(tmp_path_factory.mktemp("bases") / NAME))
    experts = {
        name: expert_of(random_package(**options, seed=seed, name=f"expert-{name}"), base)
        for seed, (name, options) in enumerate(PACKAGES.items())
    }
    # two versions of one name at once
    for version in ("1.0.0", "2.0.0"):
        package = random_package("dora", seed=int(version[0]) + 100, name="expert-twin", version=version)
        experts[f"twin {version}"] = expert_of(package, base)
    yield World(base, experts)
    torch.set_num_threads(threads)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await work

    asyncio.run(bounded())


def assert_same(request: TextRequest, told: Told, alone: Told, count: int) -> None:
    """An answer of so many tokens is what the same request is answered alone."""
    assert len(told.ids) == count
    assert first_difference(request, told.ids, alone) is None, (told.ids, alone.ids)
    same = [mine == wanted for mine, wanted in zip(told.ids, alone.ids, strict=False)]
    count = same.index(False) if False in same else count
    assert told.logprobs[:count] == pytest.approx(alone.logprobs[:count], rel=TOLERANCE, abs=TOLERANCE)


weights = st.sampled_from([1.0, 0.7, 0.3, -0.5, 2.0])
names = st.sampled_from([*PACKAGES, "twin 1.0.0", "twin 2.0.0"])
mixtures: st.SearchStrategy[Chosen] = st.lists(
    st.tuples(names, weights), max_size=4, unique_by=lambda pair: pair[0]
).map(tuple)
asks = st.builds(
    Asked,
    rows=st.sampled_from([1, 2, 7, 16, 33]),
    chosen=mixtures,
    sampling=st.integers(0, len(SAMPLING) - 1),
    count=st.integers(1, TOKENS_MAX),
    leaves=st.none() | st.none() | st.integers(0, TOKENS_MAX),
    is_slow=st.booleans(),
)


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    """Any engine; how much more than the least its memory is, in pages and in rows of the arena."""
    return {
        "page_positions": draw(st.sampled_from([1, 3, 16, 64])),
        "pages_more": draw(st.integers(0, 40)),
        "rows_more": draw(st.integers(0, 24)),
        "shared": draw(st.booleans()),
        "method": draw(st.sampled_from([None, *Method])),
        "limits": EngineLimits(
            step_tokens=draw(st.integers(1, 40)),
            sequences_max=draw(st.integers(1, 5)),
            queue_max=100,
            unread_max=draw(st.integers(2, 6)),
            patience_seconds=draw(st.sampled_from([0.0, 0.005, 2.0])),
        ),
    }


def least_rows(experts: set[AdapterExpert]) -> int:
    """Of the arena, that these need side by side: for low ranks, and two for everything else."""
    return sum(expert.rank + 2 for expert in experts)


async def read(lab: Lab, world: World, asked: Asked) -> Told:
    """An answer, as far as its reader reads it."""
    told = Told()
    answer = lab.submit(world.request(asked))
    while True:
        if asked.leaves is not None and len(told.ids) >= asked.leaves:
            await answer.aclose()
            return told
        try:
            told.take(await anext(answer))
        except StopAsyncIteration:
            return told
        if asked.is_slow:
            await asyncio.sleep(0.004)


@few
@given(batch=st.lists(asks, min_size=1, max_size=6), engine=engines())
def test_an_answer_is_the_same_whatever_else_there_is(batch: list[Asked], engine: dict[str, Any], world: World) -> None:
    """Batch mates, those who leave or read slowly, chunks, pages, order, the arena: it has room for the least."""
    positions = engine.pop("page_positions")
    pages = max(-(-(prompt_rows(asked, world) + asked.count) // positions) for asked in batch)
    rows = max(least_rows({expert for expert, _ in world.mixture(asked.chosen)}) for asked in batch)
    memory = {"page_count": pages + engine.pop("pages_more"), "arena_rows": rows + engine.pop("rows_more")}

    async def work() -> None:
        wanted = await world.alone(batch)
        async with whole_engine(world.base, page_positions=positions, **memory, **engine) as lab:
            answers = await asyncio.gather(*(read(lab, world, asked) for asked in batch))
            again = await asyncio.gather(*(read(lab, world, asked) for asked in reversed(batch)))
        for asked, told, once_more, alone in zip(batch, answers, reversed(again), wanted, strict=True):
            for each in (told, once_more):
                assert_same(
                    world.request(asked),
                    each,
                    alone,
                    asked.count if asked.leaves is None else min(asked.count, asked.leaves),
                )
                assert asked.leaves is not None or each.finish is not None

    run(work())


def prompt_rows(asked: Asked, world: World) -> int:
    """Rows of a prompt, soft prompts included."""
    prompts = [expert.prompt for expert, _ in world.mixture(asked.chosen) if expert.prompt is not None]
    return asked.rows + sum(map(len, prompts))


@few
@given(batch=st.lists(asks, min_size=1, max_size=4))
def test_weights_of_0_answer_as_the_base_does(batch: list[Asked], world: World) -> None:
    silent = [Asked(a.rows, tuple((name, 0.0) for name, _ in a.chosen), a.sampling, a.count) for a in batch]
    base = [Asked(a.rows, (), a.sampling) for a in batch]

    async def work() -> None:
        wanted = await world.alone(base)
        async with whole_engine(world.base) as lab:
            loud = lab.ask_all([world.request(asked) for asked in batch])
            answers, _ = await asyncio.gather(lab.ask_all([world.request(asked) for asked in silent]), loud)
        for asked, told, alone in zip(silent, answers, wanted, strict=True):
            assert_same(world.request(asked), told, alone, asked.count)

    run(work())


@few
@given(asked=asks, order=st.randoms(use_true_random=False))
def test_the_order_in_which_experts_are_named_changes_nothing(asked: Asked, order: Any, world: World) -> None:
    shuffled = [*asked.chosen]
    order.shuffle(shuffled)
    other = Asked(asked.rows, tuple(shuffled), asked.sampling, asked.count)

    async def work() -> None:
        [wanted] = await world.alone([asked])
        async with whole_engine(world.base, method=Method.CONCATENATED) as lab:
            assert_same(world.request(other), await lab.ask(world.request(other)), wanted, asked.count)

    run(work())


@few
@given(rows=st.sampled_from([1, 7, 33]), weight=weights, mates=st.lists(asks, max_size=3))
def test_two_versions_of_one_name_answer_at_once_each_as_itself(
    rows: int, weight: float, mates: list[Asked], world: World
) -> None:
    versions = [Asked(rows, ((f"twin {number}.0.0", weight),)) for number in (1, 2)]

    async def work() -> None:
        wanted = await world.alone(versions)
        assert wanted[0].logprobs != pytest.approx(wanted[1].logprobs, rel=1e-3)
        async with whole_engine(world.base) as lab:
            both = lab.ask_all([world.request(asked) for asked in versions])
            answers, _ = await asyncio.gather(both, lab.ask_all([world.request(asked) for asked in mates]))
        for asked, told, alone in zip(versions, answers, wanted, strict=True):
            assert_same(world.request(asked), told, alone, TOKENS_MAX)

    run(work())


def test_an_expert_that_left_the_arena_in_mid_answer_comes_back_for_its_next_token(world: World) -> None:
    """A paused answer keeps its right to the room, and others use it meanwhile."""
    slow = Asked(7, (("wide", 1.0),))
    others = [Asked(7, ((name, 1.0),)) for name in ("dora", "head", "rslora", "dora")]
    mine = world.experts["wide"]
    rows = mine.rank + max(least_rows({world.experts[name]}) for asked in others for name, _ in asked.chosen)

    async def work() -> None:
        [wanted, *mates] = await world.alone([slow, *others])
        limits = EngineLimits(step_tokens=16, sequences_max=4, queue_max=9, unread_max=2)
        async with whole_engine(world.base, arena_rows=rows, limits=limits) as lab:
            answer, told = lab.submit(world.request(slow)), Told()
            told.take(await anext(answer))
            for asked, alone in zip(others, mates, strict=True):
                assert_same(world.request(asked), await lab.ask(world.request(asked)), alone, TOKENS_MAX)
            assert lab.engine.state.running_count == 1
            assert lab.arena.copied.count(mine.digest) == 1
            async for event in answer:
                told.take(event)
            assert_same(world.request(slow), told, wanted, TOKENS_MAX)
            assert lab.arena.copied.count(mine.digest) == 2

    run(work())


@pytest.mark.parametrize("chosen", [(), (("wide", 0.7), ("prompt", 1.0), ("ia3", -0.5))], ids=["base", "mixture"])
def test_what_is_found_is_bit_for_bit_what_would_be_computed_in_the_same_steps(chosen: Chosen, world: World) -> None:
    asked = Asked(45, chosen, sampling=1)
    limits = EngineLimits(step_tokens=16, sequences_max=4, queue_max=9)

    async def work() -> None:
        async with whole_engine(world.base, limits=limits) as lab:
            first, again, other = [
                await lab.ask(replace(world.request(asked), tenant=tenant)) for tenant in ("a", "a", "b")
            ]
        rows = prompt_rows(asked, world)
        found = (rows - 1) // 16 * 16 - (rows - asked.rows)
        assert [each.finish.cached_token_count for each in (first, again, other) if each.finish] == [0, found, 0]
        assert first.ids == again.ids == other.ids
        assert first.logprobs == again.logprobs == other.logprobs

    run(work())


def test_the_next_turn_of_a_session_finds_the_answer_of_the_last(world: World) -> None:
    prompt = prompt_ids(20, 1)

    async def work() -> None:
        async with whole_engine(world.base) as lab:
            first = await lab.ask(replace(asking(prompt, max_tokens=30), session="s"))
            turn = asking([*prompt, *first.ids, *prompt_ids(7, 2)], max_tokens=5, top_logprobs=20)
            second = await lab.ask(replace(turn, session="s"))
            alone = await lab.ask(replace(turn, tenant="another"))
        assert second.finish is not None
        assert second.finish.cached_token_count == 48
        assert_same(turn, second, alone, 5)

    run(work())


@pytest.mark.parametrize("shared", [False, True])
def test_those_who_make_way_go_on_as_if_nothing_had_been(*, shared: bool, world: World) -> None:
    every = [
        Asked(rows, chosen, sampling)
        for rows, chosen, sampling in (
            (33, (("wide", 1.0),), 0),
            (7, (("dora", 0.7), ("head", 0.3)), 1),
            (16, (), 2),
            (33, (("prompt", 1.0),), 0),
            (2, (("ia3", 2.0),), 1),
        )
    ]

    async def work() -> None:
        wanted = await world.alone(every)
        async with whole_engine(world.base, page_positions=1, page_count=62, arena_rows=64, shared=shared) as lab:
            answers = await lab.ask_all([world.request(asked) for asked in every])
            if not shared:
                assert lab.engine.state.counts.preemption_count > 0
        for asked, told, alone in zip(every, answers, wanted, strict=True):
            assert_same(world.request(asked), told, alone, TOKENS_MAX)

    run(work())


def test_pages_of_others_in_the_way_of_the_first_one_s_experts_stop_nobody_for_ever(world: World) -> None:
    """The first may grow to where its own experts' rows begin, and so the second's first page lies among them."""
    wide = world.experts["wide"]

    async def work() -> None:
        async with whole_engine(world.base, page_count=8, arena_rows=wide.rank, shared=True) as lab:
            slab = lab.arena.slab
            pages_max = (slab.layer_bytes - wide.rank * slab.row_bytes) // slab.page_bytes - SCRATCH_PAGES
            longest = asking(prompt_ids(8, 1), ((wide, 1.0),), max_tokens=pages_max * 16 - 8)
            other = asking(prompt_ids(8, 2), max_tokens=9)
            answers = await lab.ask_all([longest, other])
            assert [len(told.ids) for told in answers] == [longest.max_tokens, 9]
            assert lab.engine.state.counts.preemption_count > 0

    run(work())


@few
@given(batch=st.lists(asks, min_size=1, max_size=8), engine=engines(), stop_after=st.integers(0, 6))
def test_whoever_is_accepted_is_told_how_it_ends(
    batch: list[Asked], engine: dict[str, Any], stop_after: int, world: World
) -> None:
    """Also when the engine stops: everything is let go of, once."""
    positions = engine.pop("page_positions")
    pages = max(-(-(prompt_rows(asked, world) + asked.count) // positions) for asked in batch)
    memory = {"page_count": pages + engine.pop("pages_more"), "arena_rows": 64 + engine.pop("rows_more")}

    async def ended(lab: Lab, asked: Asked) -> str:
        try:
            told = await read(lab, world, asked)
        except HocketError as error:
            assert error.reason is Reason.DRAINING  # noqa: PT017 - it may also end well
            return "stopped"
        return "left" if told.finish is None else "finished"

    async def work() -> None:
        async with whole_engine(world.base, page_positions=positions, **memory, **engine) as lab:
            readers = [asyncio.create_task(ended(lab, asked)) for asked in batch]
            while len(lab.watch.passes) < stop_after and not all(reader.done() for reader in readers):  # noqa: ASYNC110 - it happens in another thread
                await asyncio.sleep(0.0005)
            await lab.engine.stop()
            assert {*await asyncio.gather(*readers)} <= {"stopped", "left", "finished"}

    run(work())
