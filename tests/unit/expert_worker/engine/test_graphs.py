"""Recorded steps compute what the same steps do that are not recorded, whatever numbers they are played with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from services.expert_worker.engine import graphs
from services.expert_worker.engine.graphs import Graphs
from services.expert_worker.engine.runner import Runner
from services.expert_worker.engine.standing import window_size
from tests.adapters import arena_of
from tests.bases import CONTEXT, LAYERS, tiny_base
from tests.engines import NAME, expert_of, opened, random_package
from tests.passes import KINDS, Passes, ids_of, part
from tests.recordings import Tape, Twins, as_on_cuda, on_tape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import AdapterExpert, Mixture
    from services.expert_worker.engine.part import Part

EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def base_of(kind: str) -> Base:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / NAME
            made[kind] = opened(tiny_base(folder, kind, **KINDS[kind]))
        return made[kind]

    return base_of


@pytest.fixture
def base(base_of: Callable[[str], Base]) -> Base:
    return base_of("qwen3")


@pytest.fixture
def twins(base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Twins]:
    as_on_cuda(monkeypatch)
    made = Twins(base, arena=arena_of(base, 256))
    yield made
    made.close()


def expert(base: Base, kind: str = "lora", modules: Sequence[str] = EVERYWHERE, **more: Any) -> AdapterExpert:
    return expert_of(random_package(kind, modules, **more), base)


def test_one_recording_does_for_every_step_of_a_size(twins: Twins) -> None:
    for number in range(4):
        twins.prompt(number, (), count=15 + 3 * number)
    for at in range(6):
        twins.step(*((number, 15 + 3 * number + at, ()) for number in range(3 + at % 2)))
    assert len(twins.recordings) == 1


def test_sizes_are_powers_of_two(twins: Twins) -> None:
    for number in range(9):
        twins.prompt(number, ())
    for count, recordings in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (8, 4), (9, 5)):
        twins.step(*((number, 20, ()) for number in range(count)))
        assert len(twins.recordings) == recordings


def test_more_sequences_than_may_be_recorded_compute_as_they_come(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    twins = Twins(base, arena=arena_of(base, 64), rows_max=2)
    for number in range(3):
        twins.prompt(number, ())
    twins.step(*((number, 20, ()) for number in range(3)))
    assert not twins.recordings
    twins.step(*((number, 20, ()) for number in range(2)))
    assert len(twins.recordings) == 1
    twins.close()


def test_experts_of_every_kind_come_and_go_in_the_recordings_of_others(twins: Twins) -> None:
    base = twins.base
    one, other = expert(base, seed=1), expert(base, seed=2)
    wide = expert(base, rank=16, seed=3)
    mixed: list[Mixture] = [((one, 1.0),), ((other, -0.5),), (), ((one, 0.3), (other, 0.7))]
    for number, mixture in enumerate(mixed):
        twins.prompt(number, mixture)
    twins.step(*((number, 20, mixture) for number, mixture in enumerate(mixed)))
    twins.step(*((number, 21, mixture) for number, mixture in enumerate(mixed)))
    assert len(twins.recordings) == 1
    twins.step((0, 22, ((other, 1.0),)), (1, 22, ((one, 2.0),)), (2, 22, ()), (3, 22, ()))
    assert len(twins.recordings) == 1
    twins.step((0, 23, ((wide, 1.0),)), (1, 23, ()), (2, 23, ()), (3, 23, ()))
    assert len(twins.recordings) == 2
    twins.step((0, 24, ()), (1, 24, ()), (2, 24, ()), (3, 24, ()))
    assert len(twins.recordings) == 3


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("first", ["lora", "dora", "ia3"])
def test_mixtures_of_all_kinds_are_those_of_steps_that_are_not_recorded(
    kind: str, first: str, base_of: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_cuda(monkeypatch)
    base = base_of(kind)
    twins = Twins(base, arena=arena_of(base, 256))
    modules = {"ia3": ("k_proj", "v_proj", "down_proj")}
    experts = [
        expert(base, each, modules.get(each, EVERYWHERE), seed=seed)
        for seed, each in enumerate((first, first, "lora", "dora", "ia3"))
    ]
    head = expert(base, modules=("lm_head", "q_proj"), seed=9)
    mixed: list[Mixture] = [
        ((experts[0], 1.0),),
        tuple((each, 0.4) for each in experts),
        ((head, 0.5), (experts[1], 0.5)),
    ]
    for number, mixture in enumerate(mixed):
        twins.prompt(number, mixture)
    for at in (20, 21):
        twins.step(*((number, at, mixture) for number, mixture in enumerate(mixed)))
        twins.step((0, at, mixed[0]))
        twins.step((0, at, ((experts[1], 0.7),)))
    assert len(twins.recordings) == 2
    twins.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_has_room_for_the_gates_of_as_many_experts_as_its_size_says(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_cuda(monkeypatch)
    base = opened(tiny_base(tmp_path / NAME), dtype=dtype)
    twins = Twins(base, arena=arena_of(base, 64), tolerance=0.05)
    gated = [expert(base, "ia3", ("k_proj", "v_proj", "down_proj"), seed=seed) for seed in range(8)]
    twins.prompt(0, ())
    for count in (5, 8, 6, 7):
        twins.step((0, 20, tuple((each, 0.1) for each in gated[:count])))
    assert len(twins.recordings) == 1 if dtype is torch.float32 else len(twins.recordings) <= 2
    twins.close()


def test_what_pages_of_others_hold_reaches_nobody(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    page_bytes = 16 * base.kv_shape.position_bytes(base.dtype) // base.kv_shape.layers
    arena = arena_of(base, 40, pages_bytes=4 * page_bytes, page_bytes=page_bytes)
    twins = Twins(base, arena=arena)
    mixture: Mixture = ((expert(base, rank=9), 1.0),)
    twins.prompt(0, mixture)
    for used in (0, arena.slab.page_limit):
        arena.slab.pages_retreat = lambda end, _kept, used=used: end >= used  # type: ignore[misc]  # so many stay
        twins.step((0, 20, mixture))
        for layer in range(LAYERS):
            arena.slab.pages(layer)[: arena.slab.page_limit].view(torch.float32).fill_(torch.nan)
        twins.step((0, 21, mixture))
        assert arena.slab.claim_pages(arena.slab.page_limit + 1) or used
    twins.close()


def test_a_size_is_recorded_once_it_has_come_several_times(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    twins = Twins(base, arena=arena_of(base, 64))
    records: list[int] = []

    def noted(compute: Callable[[], object]) -> Callable[[], None]:
        records.append(1)
        return on_tape(compute)

    made = Graphs(base, twins.passes.pool, twins.mixer, rows_max=4, record=noted, compute_first=2)
    twins.recorded = Runner(base, twins.passes.pool, twins.mixer, made).run
    mixture: Mixture = ((expert(base), 1.0),)
    twins.prompt(0, mixture)
    for at, count in ((20, 0), (21, 0), (22, 1), (23, 1)):
        twins.step((0, at, mixture))
        assert len(records) == count
    twins.close()


def test_windows_are_half_as_large_again_as_they_must_be_at_most() -> None:
    sizes = [window_size(count) for count in range(1, 1000)]
    assert all(count <= size for count, size in enumerate(sizes, 1))
    assert all(size < 2 * count for count, size in enumerate(sizes, 1))
    assert all(2 * size < 3 * count for count, size in enumerate(sizes, 1) if count > 16)
    assert all(size % 8 == 0 for size in sizes[4:])
    assert len(set(sizes)) == 17


def test_experts_that_lie_apart_are_brought_together(twins: Twins) -> None:
    experts = [expert(twins.base, rank=8, seed=seed) for seed in range(22)]
    for number in range(2):
        twins.prompt(number, ())
    for each in experts:
        assert twins.arena.bring_now([each])
    twins.step((0, 20, ((experts[-1], 1.0),)))
    recordings = len(twins.recordings)
    assert len(twins.arena.resident) == 22
    twins.step((0, 20, ((experts[3], 1.0),)), (1, 20, ()))
    assert len(twins.arena.window([experts[3].digest], outside=False)) == 8
    for number, each in enumerate((experts[5], experts[20], experts[11])):
        twins.step((number % 2, 20, ((each, 1.0),)))
    assert len(twins.recordings) == recordings + 1
    assert len(twins.arena.resident) == 22


def test_what_others_have_left_in_the_window_changes_nothing(twins: Twins) -> None:
    wide, narrow = expert(twins.base, rank=16), expert(twins.base, "lora", ("q_proj",), rank=9, seed=4)
    twins.prompt(0, ())
    twins.step((0, 20, ((wide, 1.0), (narrow, 1.0))))
    twins.step((0, 20, ((narrow, 1.0),)))
    twins.step((0, 20, ((wide, 1.0),)))


def test_prompts_and_soft_prompts_are_not_recorded(twins: Twins) -> None:
    soft = expert(twins.base, "soft_prompt", rank=1)
    table = twins.passes.take(40)
    twins.recorded([part(0, ids_of(5), table)])
    twins.recorded([part(0, [], table, embeddings=soft.prompt, mixture=((soft, 1.0),))])
    twins.recorded([part(5, ids_of(2), table)])
    assert not twins.recordings


def test_steps_of_a_base_that_cannot_be_recorded_compute_as_they_come(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_cuda(monkeypatch)
    twins = Twins(base, arena=arena_of(base, 64))
    attempts: list[Callable[[], object]] = []

    def refuse(compute: Callable[[], object]) -> Callable[[], None]:
        attempts.append(compute)
        raise RuntimeError("operation not permitted when stream is capturing")

    made = Graphs(base, twins.passes.pool, twins.mixer, rows_max=4, record=refuse, compute_first=0)
    twins.recorded = Runner(base, twins.passes.pool, twins.mixer, made).run
    mixture = ((expert(base), 1.0),)
    twins.prompt(0, mixture)
    twins.step((0, 20, mixture))
    twins.step((0, 21, mixture))
    assert len(attempts) == 1
    twins.close()


def test_the_recording_that_was_played_longest_ago_goes_first(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    twins.prompt(0, ())
    monkeypatch.setattr(graphs, "KNOWN_MAX", 3)
    several = [expert(twins.base, modules=[name]) for name in EVERYWHERE[:4]]
    for place, count in ((0, 1), (1, 2), (2, 3), (0, 3), (3, 4), (0, 4), (2, 4), (1, 5)):
        twins.step((0, 20, ((several[place], 1.0),)))
        assert len(twins.recordings) == count


def test_nothing_before_the_logits_waits_for_the_device(twins: Twins) -> None:
    base = twins.base
    mixture = ((expert(base), 0.5), (expert(base, "dora", seed=1), 0.5), (expert(base, "ia3", ("down_proj",)), 1.0))
    table = twins.passes.take(40)
    steps: list[list[Part]] = [
        [part(0, ids_of(9), table, mixture=mixture), part(0, ids_of(3), [40], mixture=mixture[:1])],
        [part(9, ids_of(1), table, mixture=mixture)],
    ]
    for parts in steps:
        with Tape() as tape:
            twins.passes.run(parts)
        assert len(tape.calls) > 50 * LAYERS
        assert tape.dependent == []
    looks: list[Callable[[torch.Tensor], object]] = [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
    ]
    for look in looks:
        with Tape() as tape:
            look(torch.ones(2))
        assert len(tape.dependent) == 1


def test_the_longest_text_has_a_place_in_the_tables_of_a_recording(twins: Twins) -> None:
    passes = Passes(twins.base, page_count=CONTEXT // 16 + 1, mixer=twins.mixer)
    made = Graphs(twins.base, passes.pool, twins.mixer, rows_max=4, record=on_tape, compute_first=0)
    table = passes.take(CONTEXT)
    passes.run([part(0, ids_of(CONTEXT - 1), table)])
    last = [part(CONTEXT - 1, [7], table)]
    torch.testing.assert_close(made.run(last), passes.run(last), rtol=1e-5, atol=1e-5)
