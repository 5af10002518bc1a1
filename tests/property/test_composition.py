"""The algebra of experts composed in one batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.expert_worker.engine.mixing import Method, Mixer
from tests.adapters import HEAD, KINDS, SHAPES, Known, ToyBase, arena_of, assert_close, dense, toy_expert

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from services.expert_worker.engine.expert import AdapterExpert

BASE = ToyBase()
EXPERTS = [
    toy_expert(BASE, kind, ["block.0.down"] if seed == 4 else list(SHAPES), rank=seed, seed=seed)
    for kind in KINDS
    for seed in (1, 4, 5)
] + [
    toy_expert(BASE, "lora", [HEAD, "block.1.up"], rank=2, seed=7),
    toy_expert(BASE, "dora", rank=5, ranks={"block.0.up": 1, "block.1.down": 3}, seed=8),
]
Mixture = list[tuple[Known, float]]
methods = st.sampled_from([Method.CONCATENATED, Method.SEGMENTS, None])
weights = st.floats(-1.5, 1.5, width=32)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixtures(experts: Sequence[Known] = EXPERTS, *, least: int = 0, most: int = 6) -> st.SearchStrategy[Mixture]:
    pairs = st.tuples(st.sampled_from(experts), weights)
    return st.lists(pairs, min_size=least, max_size=most, unique_by=lambda pair: pair[0].expert.digest)


batches = st.lists(st.tuples(st.integers(1, 4), mixtures()), min_size=1, max_size=5)


def computed(
    parts: Sequence[tuple[int, Sequence[tuple[AdapterExpert, float]]]],
    method: Method | None,
    mixer: Mixer | None = None,
) -> Tensor:
    """`[n, 50]` of rows that depend on n alone."""
    mixer = mixer or Mixer(BASE.causal_lm, BASE.projections, arena_of(BASE, 200), method=method)
    mixer.begin([(rows, tuple(mixture)) for rows, mixture in parts])
    answer: Tensor = BASE.causal_lm(inputs(sum(rows for rows, _ in parts))[None])[0]
    mixer.end()
    return answer.double()


def inputs(count: int) -> Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(count))


def experts_in(mixture: Mixture) -> list[tuple[AdapterExpert, float]]:
    return [(known.expert, weight) for known, weight in mixture]


@few
@given(batches, methods)
def test_every_request_of_a_batch_gets_what_its_own_merge_gives(
    batch: list[tuple[int, Mixture]], method: Method | None
) -> None:
    answer = computed([(rows, experts_in(mixture)) for rows, mixture in batch], method)
    parts = torch.split(inputs(len(answer)), [rows for rows, _ in batch])
    assert_close(answer, torch.cat([dense(BASE, x, mixture) for x, (_, mixture) in zip(parts, batch, strict=True)]))


@few
@given(mixtures(), methods, st.randoms())
def test_the_order_of_experts_does_not_matter(mixture: Mixture, method: Method | None, random: object) -> None:
    shuffled = sorted(experts_in(mixture), key=lambda _: random.random())  # type: ignore[attr-defined]  # hypothesis
    assert_close(computed([(3, experts_in(mixture))], method), computed([(3, shuffled)], method))


@few
@given(batches, methods)
def test_weights_of_0_are_the_base_to_the_last_bit(batch: list[tuple[int, Mixture]], method: Method | None) -> None:
    silent = [(rows, [(known.expert, 0.0) for known, _ in mixture]) for rows, mixture in batch]
    assert torch.equal(computed(silent, method), computed([(rows, ()) for rows, _ in batch], method))
    # beside a request that does use experts
    count = sum(rows for rows, _ in batch)
    busy = (1, [(known.expert, 0.5) for known in EXPERTS])
    assert torch.equal(computed([*silent, busy], method)[:count], computed([(count, ()), (1, ())], method)[:count])


@few
@given(st.sampled_from([known for known in EXPERTS if known.kind != "ia3"]), weights, methods)
def test_what_low_rank_experts_add_to_one_projection_is_linear_in_their_weight(
    known: Known, weight: float, method: Method | None
) -> None:
    [name, piece] = next(iter(known.expert.pieces.items()))
    alone = replace(known.expert, pieces={name: piece})
    x = inputs(3)[None] if name != "block.0.down" else torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(3))
    mixer = Mixer(BASE.causal_lm, BASE.projections, arena_of(BASE, 200), method=method)

    def added(w: float) -> Tensor:
        mixer.begin([(3, ((alone, w),))])
        y: Tensor = BASE.causal_lm.get_submodule(name)(x) - BASE.projections[name](x)
        mixer.end()
        return y.double()

    assert_close(added(weight), weight * added(1.0))


@few
@given(mixtures(least=1), st.sampled_from([0.125, 3.0, 64.0]), methods)
def test_scaling_a_and_unscaling_b_changes_nothing(mixture: Mixture, factor: float, method: Method | None) -> None:
    def rescaled(expert: AdapterExpert) -> AdapterExpert:
        pieces = {
            name: replace(piece, a=piece.a * factor, b=piece.b / factor)
            if piece.a is not None and piece.b is not None
            else piece
            for name, piece in expert.pieces.items()
        }
        return replace(expert, pieces=pieces)

    other = [(rescaled(expert), weight) for expert, weight in experts_in(mixture)]
    assert_close(computed([(3, experts_in(mixture))], method), computed([(3, other)], method))


@few
@given(
    st.integers(6, 20), st.lists(st.lists(mixtures(most=3), min_size=1, max_size=3), min_size=1, max_size=12), methods
)
def test_the_arena_never_takes_more_than_its_budget_and_its_places_are_reused_without_a_trace(
    rows: int, steps: list[list[Mixture]], method: Method | None
) -> None:
    arena = arena_of(BASE, rows, outside_rows=9)
    mixer = Mixer(BASE.causal_lm, BASE.projections, arena, method=method)
    for step in steps:
        if not arena.fits([known.expert for mixture in step for known, _ in mixture]):
            continue
        answer = computed([(2, experts_in(mixture)) for mixture in step], None, mixer)
        parts = torch.split(inputs(len(answer)), 2)
        assert_close(answer, torch.cat([dense(BASE, x, mixture) for x, mixture in zip(parts, step, strict=True)]))
        for outside in (False, True):
            taken = arena._taken(outside=outside)
            assert all(first[1] <= second[0] for first, second in itertools.pairwise(taken))
        assert 0 <= arena.used_bytes <= arena.slab.size_bytes + arena.size_bytes
