"""Who lies where in the arena, who comes and who goes; and that steps go on meanwhile."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from random import Random
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.layout import RowLayout, put_vector
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.scheduler import Scheduler
from services.expert_worker.engine.slab import Slab
from tests.adapters import HEAD, KINDS, SHAPES, ToyBase, arena_of, assert_close, dense, toy_expert
from tests.bases import tiny_base
from tests.engines import SECONDS, Told, asking, expert_of, opened, prompt_ids, random_package, whole_engine
from tests.scripted_engine import (
    Everywhere,
    ScriptedRunner,
    alone,
    read,
    running_engine,
    told,
)
from tests.scripted_engine import asking as scripted_request
from tests.scripted_engine import expert as scripted_expert

if TYPE_CHECKING:
    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import AdapterExpert
    from tests.adapters import Known

CPU = torch.device("cpu")


def experts(base: ToyBase, *ranks: int, kind: str = "lora") -> list[AdapterExpert]:
    return [toy_expert(base, kind, rank=rank, seed=seed).expert for seed, rank in enumerate(ranks)]


def come(arena: Arena, expert: AdapterExpert, *, ahead: bool = False) -> bool:
    """Whether an expert is there once it has been brought."""
    arena.bring(expert, ahead=ahead)
    for seat in arena._seats.values():
        if seat.arrival is not None:
            seat.arrival.exception()
    return arena.bring(expert, ahead=ahead)


# --- the layout


def test_a_row_has_a_column_for_each_input_and_output_of_a_layer() -> None:
    base = ToyBase()
    layout = RowLayout(base.projections, torch.float32)
    assert (layout.layer_count, layout.width, layout.outside_width) == (2, 128, 80)  # in sixteens
    up, down = layout.columns["block.1.up"], layout.columns["block.1.down"]
    assert (up.layer, down.layer, layout.columns[HEAD].layer) == (1, 1, None)
    assert (up.inputs, down.inputs, up.outputs, down.outputs) == (
        slice(0, 24),
        slice(24, 64),
        slice(64, 104),
        slice(104, 128),
    )


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 3)])
def test_vectors_of_float32_are_kept_to_the_last_bit(dtype: torch.dtype, rows: int) -> None:
    layout = RowLayout(ToyBase().projections, dtype)
    assert layout.vector_rows == rows
    vector = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 10_000)
    vector[:2] = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    memory = torch.empty(rows, 10_000, dtype=layout.dtype)
    put_vector(memory, vector)
    assert memory.isfinite().all()
    assert torch.equal(memory.double().sum(0).float(), vector)


def test_experts_outside_the_layers_take_rows_there_and_nowhere_else() -> None:
    base = ToyBase()
    head = toy_expert(base, "lora", [HEAD], rank=5).expert
    both = toy_expert(base, "lora", [HEAD, "block.0.up"], rank=4, seed=1).expert
    arena = arena_of(base, 4, outside_rows=8)
    assert arena.fits([head])
    assert arena.fits([both])
    assert not arena.fits([head, both])
    assert arena.bring_now([head])
    assert arena.used_bytes == 5 * 80 * 4
    assert arena.bring_now([both])  # the other makes room
    assert arena.resident == {both.digest}
    assert arena.used_bytes == 4 * 80 * 4 + 4 * 2 * 128 * 4


# --- coming and going


def test_who_is_held_stays_and_nobody_else_has_to() -> None:
    base = ToyBase()
    a, b, c = experts(base, 4, 4, 4)
    arena = arena_of(base, 8)
    arena.hold([a, b])
    assert come(arena, a)
    assert come(arena, b)
    assert not come(arena, c)
    assert arena.resident == {a.digest, b.digest}, "everything is held: who else wants in waits"
    arena.hold([b, c])
    assert come(arena, c)
    assert arena.resident == {b.digest, c.digest}


def test_who_comes_ahead_of_time_takes_no_room_from_those_who_will_be_wanted_too() -> None:
    base = ToyBase()
    a, b, c, d = experts(base, 4, 4, 4, 4)
    arena = arena_of(base, 8)
    arena.bring_now([a, d])
    arena.hold([a], soon=[b, c])
    assert come(arena, b, ahead=True)  # in the place of d
    assert not come(arena, c, ahead=True)
    assert arena.resident == {a.digest, b.digest}
    assert not arena.coming
    arena.hold([a, d], soon=[b])
    assert come(arena, d), "who computes now goes before who will"
    assert arena.resident == {a.digest, d.digest}


def test_pages_get_the_room_of_those_who_need_not_stay_and_the_others_are_pushed_together() -> None:
    base = ToyBase()
    known = [toy_expert(base, "dora", rank=2, seed=seed) for seed in range(3)]
    layout = RowLayout(base.projections, torch.float32)
    slab = Slab(2, 9 * layout.row_bytes, page_bytes=layout.row_bytes, row_bytes=layout.row_bytes, device=CPU)
    arena = Arena(layout, slab, outside_rows=1, device=CPU)
    mixer = Mixer(base.causal_lm, base.projections, arena)
    arena.bring_now([each.expert for each in known])
    assert slab.page_limit == 0
    arena.hold([known[2].expert])  # the lowest
    assert slab.claim_pages(6)
    assert arena.resident == {known[2].expert.digest}
    assert not slab.claim_pages(7)
    check(base, mixer, known[2])
    slab.pages_retreat = lambda end, _kept: end >= 6
    assert not arena.bring_now([known[0].expert, known[2].expert]), "pages in use stay"
    slab.pages_retreat = lambda _end, _kept: True
    assert arena.bring_now([known[0].expert, known[2].expert])


def check(base: ToyBase, mixer: Mixer, known: Known) -> None:
    x = torch.randn(3, 24)
    mixer.begin([(3, ((known.expert, 0.7),))])
    answer = base.causal_lm(x[None])[0]
    mixer.end()
    assert_close(answer, dense(base, x, [(known, 0.7)]))


def test_an_expert_that_could_not_come_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ToyBase()
    (a,) = experts(base, 4)
    arena = arena_of(base, 4)
    told: list[int] = []
    arena.arrived = lambda: told.append(1)
    with monkeypatch.context() as patch:
        patch.setattr(Arena, "_copy_in", fail)
        arena.hold([a])
        with pytest.raises(OSError, match="scripted"):
            come(arena, a)
        assert not arena.resident | arena.coming
        assert arena.used_bytes == 0
    assert arena.bring_now([a])
    assert arena.resident == {a.digest}
    assert len(told) == 2


def test_copies_that_have_begun_are_waited_for_where_the_next_one_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base, stream = ToyBase(), mock.MagicMock()
    (a,) = experts(base, 4)
    arena = arena_of(base, 4)
    monkeypatch.setattr(arena, "_stream", stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: nullcontext())
    monkeypatch.setattr("torch.cuda.Event", mock.MagicMock())
    monkeypatch.setattr(Arena, "_copy_in", fail)
    with pytest.raises(OSError, match="scripted"):
        arena._upload(a, mock.MagicMock(), mock.MagicMock())
    stream.record_event.return_value.synchronize.assert_called_once_with()


def test_nobody_leaves_for_pages_that_would_not_have_room_all_the_same() -> None:
    base = ToyBase()
    a, b, c = experts(base, 2, 2, 2)
    layout = RowLayout(base.projections, torch.float32)
    slab = Slab(2, 9 * layout.row_bytes, page_bytes=layout.row_bytes, row_bytes=layout.row_bytes, device=CPU)
    arena = Arena(layout, slab, outside_rows=1, device=CPU)
    assert arena.bring_now([a, b, c])
    arena.hold([b, c])
    assert not slab.claim_pages(6)
    assert arena.resident == {a.digest, b.digest, c.digest}
    assert slab.claim_pages(5)
    assert arena.resident == {b.digest, c.digest}


class TestWindow:
    """The rows at the end in which the experts of a step lie."""

    def test_it_is_a_power_of_two_and_holds_whoever_computes(self) -> None:
        base = ToyBase()
        a, b, c = experts(base, 3, 4, 6)
        arena = arena_of(base, 100)
        assert arena.bring_now([a, b, c])
        assert arena.window([], outside=False) == range(100, 100)
        assert arena.window([a.digest], outside=False) == range(96, 100)
        assert arena.window([a.digest, b.digest], outside=False) == range(92, 100)
        assert arena.window([a.digest, b.digest, c.digest], outside=False) == range(84, 100)
        assert arena.window([a.digest], outside=True) == range(72, 72), "it adapts nothing there"

    def test_it_is_no_larger_than_the_arena(self) -> None:
        base = ToyBase()
        (a,) = experts(base, 5)
        arena = arena_of(base, 6)
        assert arena.bring_now([a])
        assert arena.window([a.digest], outside=False) == range(6)

    def test_who_lies_among_them_changes_places_with_them_and_is_whole(self) -> None:
        base = ToyBase()
        known = [toy_expert(base, kind, rank=2 + seed, seed=seed) for seed, kind in enumerate(KINDS)]
        arena = arena_of(base, 100)
        mixer = Mixer(base.causal_lm, base.projections, arena)
        assert arena.bring_now([each.expert for each in known])
        random = Random(1)
        for _ in range(20):
            some = random.sample(known, random.randint(1, 3))
            window = arena.window([each.expert.digest for each in some], outside=False)
            places = [arena.place(each.expert.digest, outside=False) for each in some]
            assert all(window.start <= place.start <= place.end <= window.stop for place in places)
            assert len(window) < 2 * sum(place.end - place.start for place in places)
            for each in known:
                check(base, mixer, each)
        assert len(arena.resident) == len(known)

    def test_who_is_on_its_way_stays_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base = ToyBase()
        known = [toy_expert(base, "lora", rank=4, seed=seed) for seed in range(4)]
        arena = arena_of(base, 64)
        mixer = Mixer(base.causal_lm, base.projections, arena)
        goes_on = threading.Event()
        copy_in = Arena._copy_in

        def later(arena: Arena, expert: AdapterExpert, seat: Any) -> None:
            assert goes_on.wait(SECONDS)
            copy_in(arena, expert, seat)

        assert arena.bring_now([each.expert for each in known[:2]])
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "_copy_in", later)
            arena.hold([each.expert for each in known])
            assert not arena.bring(known[2].expert)
        assert not arena.bring(known[3].expert)
        goes_on.set()
        assert arena.bring_now([known[3].expert])
        arena.window([known[3].expert.digest], outside=False)
        for each in known:
            check(base, mixer, each)
        arena.close()


def fail(*_: Any) -> None:
    raise OSError("scripted")


def test_factors_and_biases_in_bfloat16_lose_nothing() -> None:
    base = ToyBase(torch.bfloat16)
    known = toy_expert(base, "ia3", list(SHAPES), seed=3)
    arena = arena_of(base, 8)
    arena.bring_now([known.expert])
    place = arena.place(known.expert.digest, outside=False)
    assert len(place.factors) == 3
    for name, piece in known.expert.pieces.items():
        strips = arena.strips(name)
        strip, factors = (strips.inputs, piece.u) if piece.u is not None else (strips.outputs, piece.o)
        assert factors is not None
        found = strip[place.factors.start : place.factors.stop].double().sum(0).float()
        assert torch.equal(found, factors - 1)


# --- the engine


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return opened(tiny_base(tmp_path_factory.mktemp("bases") / "tiny"))


async def test_answers_go_on_while_an_expert_is_on_its_way(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    late = expert_of(random_package("lora", seed=1), base)
    soon = expert_of(random_package("lora", seed=2), base)
    go_on = threading.Event()
    copy_in = Arena._copy_in

    def slowly(arena: Arena, expert: AdapterExpert, seat: Any) -> None:
        if expert is late:
            assert go_on.wait(SECONDS)
        copy_in(arena, expert, seat)

    async with whole_engine(base) as lab:
        wanted = await lab.ask(asking(prompt_ids(9), ((late, 1.0),)))
        await lab.ask(asking(prompt_ids(9), ((soon, 1.0),)))
        lab.arena.bring_now([])
        lab.arena._leave(late.digest)
        monkeypatch.setattr(Arena, "_copy_in", slowly)
        waiting = asyncio.create_task(lab.ask(asking(prompt_ids(9), ((late, 1.0),))))
        while late.digest not in lab.arena.coming:  # noqa: ASYNC110 - it happens in another thread
            await asyncio.sleep(0.001)
        for mixture in ((), ((soon, 1.0),)):
            assert len((await lab.ask(asking(prompt_ids(9), mixture))).ids) == 12
        assert not waiting.done()
        go_on.set()
        assert (await waiting).ids == wanted.ids


async def test_an_answer_whose_expert_cannot_come_ends_and_the_others_go_on(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (expert_of(random_package("lora", seed=seed), base) for seed in (1, 2))
    copy_in = Arena._copy_in

    def partly(arena: Arena, expert: AdapterExpert, seat: Any) -> None:
        if expert is bad:
            raise torch.OutOfMemoryError("scripted")
        copy_in(arena, expert, seat)

    async with whole_engine(base) as lab:
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "_copy_in", partly)
            other = asyncio.create_task(lab.ask(asking(prompt_ids(9), ((good, 1.0),), max_tokens=40)))
            with pytest.raises(HocketError) as refusal:
                await lab.ask(asking(prompt_ids(9), ((bad, 1.0),)))
            assert refusal.value.reason is Reason.DEVICE_MEMORY
            assert len((await other).ids) == 40
        told: Told = await lab.ask(asking(prompt_ids(9), ((bad, 1.0),)))
        assert len(told.ids) == 12


async def test_answers_whose_pages_stand_in_the_way_of_experts_begin_anew_and_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_way: list[int] = []
    passes: list[int] = []
    runner = ScriptedRunner(script=lambda parts: passes.append(sum(part.row_count for part in parts)))
    restart = Scheduler.restart

    def noted(scheduler: Scheduler) -> None:
        made_way.append(len(scheduler.running))
        restart(scheduler)

    monkeypatch.setattr(Scheduler, "restart", noted)
    monkeypatch.setattr(Everywhere, "bring", lambda *_, **__: len(passes) < 3 or bool(made_way))
    requests = [
        scripted_request([number, 2, 3], mixture=((scripted_expert(f"e{number}"), 1.0),), max_tokens=6)
        for number in range(2)
    ]
    async with running_engine(runner) as engine:
        answers = await asyncio.gather(*(read(engine.submit(request, lambda: None)) for request in requests))
    assert [told(answer) for answer in answers] == [alone(request) for request in requests]
    assert made_way == [2]
    assert max(passes[3:]) > 2, "what had been computed was computed again"
