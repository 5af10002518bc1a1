"""Every row of a batch computes with its own experts, exactly, whatever else is in the batch or was before."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.expert import AdapterExpert, Piece
from services.expert_worker.engine.mixing import Method, Mixer
from services.expert_worker.engine.projection import Projection, Update
from tests.adapters import HEAD, KINDS, SHAPES, Known, ToyBase, arena_of, assert_close, dense, toy_expert
from tests.bases import LAYERS, tiny_base
from tests.engines import NAME, expert_of, opened, random_package
from tests.passes import Passes, ids_of, part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

METHODS = [Method.CONCATENATED, Method.SEGMENTS, None]
ROW_BYTES = 4 * sum(map(sum, SHAPES.values()))
"""Of one rank in float32."""

Request = tuple[int, "Sequence[tuple[Known, float]]"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def experts_of_every_kind(base: ToyBase) -> list[Known]:
    """Twelve: of all kinds, ranks 1 to 9, on some or all projections."""
    places: list[list[str]] = [list(SHAPES), ["block.0.up", HEAD], ["block.1.down"]]
    return [
        toy_expert(
            base, kind, [p for p in places[n % 3] if kind != "ia3" or p != HEAD], rank=n % 9 + 1, seed=len(kind) + n
        )
        for kind in KINDS
        for n in range(2 * KINDS.index(kind), 2 * KINDS.index(kind) + 2)
    ]


def mixed(base: ToyBase, arena: Arena | None = None, method: Method | None = None) -> Mixer:
    return Mixer(base.causal_lm, base.projections, arena or arena_of(base, 200), method=method)


def run(base: ToyBase, mixer: Mixer, x: Tensor, requests: Sequence[Request], kept: Tensor | None = None) -> Tensor:
    """One step: `[n, 50]`."""
    rows_kept = None if kept is None else kept.numpy()
    mixer.begin([(rows, tuple((known.expert, w) for known, w in mixture)) for rows, mixture in requests], rows_kept)
    try:
        answer: Tensor = base.causal_lm(x[None], kept)[0]
    finally:
        mixer.end()
    return answer


def rows_for(requests: Sequence[Request], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(rows for rows, _ in requests), 24, generator=generator)


def expected(base: ToyBase, x: Tensor, requests: Sequence[Request]) -> Tensor:
    parts = torch.split(x, [rows for rows, _ in requests])
    return torch.cat([dense(base, part, mixture) for part, (_, mixture) in zip(parts, requests, strict=True)])


def random_requests(experts: Sequence[Known], count: int, rows_max: int, seed: int) -> list[Request]:
    random = np.random.default_rng(seed)
    requests: list[Request] = []
    for _ in range(count):
        chosen = random.choice(len(experts), int(random.integers(0, 11)), replace=False)
        mixture = [(experts[n], float(random.uniform(-0.5, 1.2))) for n in chosen]
        requests.append((int(random.integers(1, rows_max + 1)), mixture))
    return requests


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows_max", [1, 7, 60])
def test_a_batch_computes_what_each_request_would_alone_with_its_experts_merged(
    method: Method | None, rows_max: int
) -> None:
    base = ToyBase()
    experts = experts_of_every_kind(base)
    mixer = mixed(base, method=method)
    for seed in range(3):
        requests = random_requests(experts, 12, rows_max, seed)
        x = rows_for(requests)
        want = expected(base, x, requests)
        assert_close(run(base, mixer, x, requests), want)


@pytest.mark.parametrize("method", METHODS)
def test_the_head_sees_only_the_rows_that_are_kept_with_the_experts_of_each(method: Method | None) -> None:
    base = ToyBase()
    requests = random_requests(experts_of_every_kind(base), 8, 5, seed=1)
    x = rows_for(requests)
    kept = torch.cumsum(torch.tensor([rows for rows, _ in requests]), 0)[::2] - 1
    answer = run(base, mixed(base, method=method), x, requests, kept)
    assert_close(answer, expected(base, x, requests)[kept])


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("method", [Method.CONCATENATED, Method.SEGMENTS])
def test_half_precision_is_as_exact_as_the_base_is(method: Method, dtype: torch.dtype, tolerance: float) -> None:
    base = ToyBase(dtype)
    requests = random_requests(experts_of_every_kind(base), 6, 5, seed=2)
    x = rows_for(requests).to(dtype)
    answer = run(base, mixed(base, method=method), x, requests)
    want = expected(base, x, requests)
    assert answer.dtype is dtype
    assert (answer.double() - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", [Method.CONCATENATED, Method.SEGMENTS])
def test_in_half_precision_a_request_alone_is_the_same_to_one_rounding_as_in_company(
    method: Method, dtype: torch.dtype
) -> None:
    base, other = ToyBase(dtype), ToyBase(dtype)
    experts = experts_of_every_kind(base)
    together, alone = mixed(base, method=method), mixed(other, method=Method.SEGMENTS)
    for seed in range(4):
        requests = random_requests(experts, 12, 6, seed)
        x = rows_for(requests).to(dtype)
        company = run(base, together, x, requests).double()
        parts = torch.split(x, [rows for rows, _ in requests])
        lone = torch.cat([run(other, alone, part, [own]) for part, own in zip(parts, requests, strict=True)]).double()
        apart = (company - lone).norm(dim=1) / lone.norm(dim=1)
        assert float(apart.max()) < torch.finfo(dtype).eps


# --- the base alone


def test_a_step_without_weights_is_the_bare_base() -> None:
    base = ToyBase()
    [known, *_] = experts_of_every_kind(base)
    x = torch.randn(5, 24)
    plain = base.causal_lm(x[None])[0]
    arena = arena_of(base, 20)
    mixer = mixed(base, arena)
    for mixture in ([], [(known, 0.0)]):
        assert torch.equal(run(base, mixer, x, [(5, mixture)]), plain)
    assert arena.used_bytes == 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_whose_weights_are_0_are_the_base_to_the_last_bit_beside_rows_with_experts(method: Method | None) -> None:
    base = ToyBase()
    experts = experts_of_every_kind(base)
    x = torch.randn(9, 24)
    plain = base.causal_lm(x[None])[0]
    requests: list[Request] = [
        (3, []),
        (3, [(known, 0.7) for known in experts]),
        (3, [(known, 0.0) for known in experts]),
    ]
    answer = run(base, mixed(base, method=method), x, requests)
    assert torch.equal(answer[:3], plain[:3])
    assert torch.equal(answer[6:], plain[6:])
    assert not torch.isclose(answer[3:6], plain[3:6]).any(dim=1).all()


def test_after_a_step_nothing_of_it_is_left() -> None:
    base = ToyBase()
    [known, *_] = experts_of_every_kind(base)
    x = torch.randn(5, 24)
    plain = base.causal_lm(x[None])[0]
    mixer = mixed(base)
    run(base, mixer, x, [(5, [(known, 1.0)])])
    assert torch.equal(base.causal_lm(x[None])[0], plain)
    mixer.begin([(5, ((known.expert, 1.0),))])  # and then the pass failed
    mixer.begin([(5, ())])
    assert torch.equal(base.causal_lm(x[None])[0], plain)


def test_an_expert_that_is_a_soft_prompt_takes_no_room() -> None:
    base = ToyBase()
    known = toy_expert(base, "soft_prompt", [])
    arena = arena_of(base, 1)
    assert arena.fits([known.expert])
    run(base, mixed(base, arena), torch.randn(5, 24), [(5, [(known, 1.0)])])
    assert arena.used_bytes == 0


def test_what_others_ask_of_a_linear_layer_a_projection_answers() -> None:
    base = ToyBase()
    linear = base.projections["block.0.up"]
    mixed(base)
    wrapped = base.causal_lm.block[0]["up"]
    assert isinstance(wrapped, Projection)
    assert wrapped.weight is linear.weight
    assert wrapped.bias is linear.bias


# --- isolation


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_whose_numbers_overflow_spoils_only_rows_that_use_it(method: Method | None) -> None:
    base = ToyBase()
    [known, *_] = experts_of_every_kind(base)
    huge = {name: Piece(a=torch.full((2, i), 3e38), b=torch.full((2, o), 3e38)) for name, (i, o) in SHAPES.items()}
    hostile = Known(made(huge, "hostile"), "lora", 1, {})
    x = torch.randn(6, 24)
    requests: list[Request] = [(2, [(known, 1.0)]), (2, [(hostile, 1.0)]), (2, [])]
    answer = run(base, mixed(base, method=method), x, requests)
    assert not answer[2:4].isfinite().all()
    spared: list[Request] = [requests[0], requests[2]]
    x = torch.cat([x[:2], x[4:]])
    assert_close(torch.cat([answer[:2], answer[4:]]), expected(base, x, spared))


def made(pieces: dict[str, Piece], digest: str) -> AdapterExpert:
    from hocket.packages.adapter import Decoding  # noqa: PLC0415 - here alone
    from hocket.requirements import Constraints  # noqa: PLC0415 - as above

    return AdapterExpert(digest, pieces, None, None, Decoding(), Constraints(), 0)


def test_two_versions_under_one_name_compute_at_once_each_as_itself() -> None:
    base = ToyBase()
    versions = [toy_expert(base, "dora", seed=seed) for seed in (1, 2)]
    requests: list[Request] = [(2, [(versions[0], 1.0)]), (2, [(versions[1], 1.0)])]
    x = rows_for(requests)
    answer = run(base, mixed(base), x, requests)
    assert_close(answer, expected(base, x, requests))


# --- the arena


@pytest.mark.parametrize(
    "kinds",
    [("lora", "lora"), ("dora", "dora"), ("ia3", "dora"), ("dora", "ia3"), ("biased", "dora"), ("ia3", "biased")],
)
def test_an_expert_in_the_place_of_another_sees_nothing_of_it(kinds: tuple[str, str]) -> None:
    base = ToyBase()
    first = toy_expert(base, kinds[0], rank=4, seed=1)
    second = toy_expert(base, kinds[1], rank=4, seed=2, ranks={"block.0.up": 1, "block.1.down": 2})
    arena = arena_of(base, 5)
    mixer = mixed(base, arena)
    assert not arena.fits([first.expert, second.expert])
    for known in (first, second, first):
        requests: list[Request] = [(3, [(known, 0.8)])]
        x = rows_for(requests)
        answer = run(base, mixer, x, requests)
        assert_close(answer, expected(base, x, requests))


def test_experts_that_fit_only_laid_out_anew_are() -> None:
    base = ToyBase()
    small = [toy_expert(base, "lora", rank=2, seed=seed) for seed in range(4)]
    large = toy_expert(base, "dora", rank=4, seed=9)
    arena = arena_of(base, 9)
    mixer = mixed(base, arena)
    x = torch.randn(4, 24)
    run(base, mixer, x, [(1, [(known, 1.0)]) for known in small])
    requests: list[Request] = [(1, [(small[1], 1.0)]), (1, [(small[3], 0.5)]), (2, [(large, 1.0)])]
    answer = run(base, mixer, x, requests)  # the free rows were 2 + 2 + 1, the last for factors
    assert_close(answer, expected(base, x, requests))
    assert arena.used_bytes == 9 * ROW_BYTES


def test_experts_beyond_the_arena_do_not_fit_and_are_refused() -> None:
    base = ToyBase()
    one, other = (toy_expert(base, "lora", rank=4, seed=seed) for seed in (1, 2))
    gated = toy_expert(base, "dora", rank=4, seed=3)
    arena = arena_of(base, 8)
    mixer = mixed(base, arena)
    assert arena.fits([one.expert, other.expert, one.expert])
    assert not arena.fits([one.expert, gated.expert])
    assert arena.fits([gated.expert])
    assert not arena.fits([toy_expert(base, "biased_dora", rank=7, seed=4).expert])
    assert arena.fits([toy_expert(base, "biased_dora", rank=6, seed=4).expert])
    with pytest.raises(HocketError) as refusal:
        run(base, mixer, torch.randn(2, 24), [(2, [(one, 1.0), (gated, 1.0)])])
    assert refusal.value.reason is Reason.DEVICE_MEMORY
    run(base, mixer, torch.randn(2, 24), [(2, [(one, 1.0), (other, 1.0)])])
    assert arena.used_bytes == arena.slab.size_bytes


def test_an_expert_that_is_still_there_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ToyBase()
    known = toy_expert(base, "dora")
    copied: list[Any] = []
    monkeypatch.setattr(Arena, "_copy_in", lambda _, expert, seat: copied.append((expert, seat)))
    mixer = mixed(base)
    for _ in range(3):
        run(base, mixer, torch.randn(2, 24), [(2, [(known, 1.0)])])
    assert len(copied) == 1


def test_the_expert_that_was_used_longest_ago_leaves_first(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ToyBase()
    one, other, third = (toy_expert(base, "lora", rank=4, seed=seed) for seed in (1, 2, 3))
    copied: list[Any] = []
    monkeypatch.setattr(Arena, "_copy_in", lambda _, expert, seat: copied.append((expert, seat)))
    mixer = mixed(base, arena_of(base, 8))
    for known in (one, other, one, third, one, other):
        run(base, mixer, torch.randn(2, 24), [(2, [(known, 1.0)])])
    assert [expert for expert, _ in copied] == [known.expert for known in (one, other, third, other)]


def test_the_arena_keeps_no_expert_alive() -> None:
    base = ToyBase()
    known = toy_expert(base, "dora")
    there = weakref.ref(known.expert)
    run(base, mixed(base), torch.randn(2, 24), [(2, [(known, 1.0)])])
    del known
    gc.collect()
    assert there() is None


# --- the choice between the two ways


def test_few_rows_are_computed_for_all_experts_at_once_and_many_by_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ToyBase()
    experts = [toy_expert(base, "lora", ["block.0.up"], rank=64, seed=seed) for seed in range(8)]
    mixer = mixed(base, arena_of(base, 512))
    calls = counted(monkeypatch)
    for rows, count in ((1, 1), (400, 8)):
        requests = [(rows, [(known, 1.0)]) for known in experts]
        run(base, mixer, rows_for(requests), requests)
        assert len(calls) == count
        calls.clear()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each product with rows of A is for, from now on."""
    calls: list[int] = []
    inner = Update.shrunk

    def shrunk(update: Update, x: Tensor, stack: Tensor) -> Tensor:
        calls.append(len(stack))
        return inner(update, x, stack)

    monkeypatch.setattr(Update, "shrunk", shrunk)
    return calls


@pytest.mark.parametrize("method", [Method.CONCATENATED, Method.SEGMENTS])
@pytest.mark.parametrize(
    ("modules", "products"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), [3, 1, 2, 1]),
        (("q_proj", "v_proj"), [2]),
        (("k_proj", "o_proj", "up_proj"), [1, 1, 1]),
    ],
)
def test_projections_that_read_the_same_input_share_one_product(
    tmp_path: Path, method: Method, modules: tuple[str, ...], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(tiny_base(tmp_path / NAME))
    arena = arena_of(base, 64)
    mixer = Mixer(base.causal_lm, base.projections, arena, method=method)
    passes = Passes(base, mixer=mixer)
    mixture = ((expert_of(random_package(modules=modules), base), 0.5),)
    calls = counted(monkeypatch)
    passes.run([part(0, ids_of(5), passes.take(5), mixture=mixture)])
    assert calls == products * LAYERS


def test_inputs_that_experts_change_are_not_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = opened(tiny_base(tmp_path / NAME))
    passes = Passes(base, mixer=Mixer(base.causal_lm, base.projections, arena_of(base, 64)))
    lora = expert_of(random_package(modules=("gate_proj", "up_proj", "down_proj")), base)
    ia3 = expert_of(random_package("ia3", ("k_proj", "down_proj")), base)
    calls = counted(monkeypatch)
    passes.run([part(0, ids_of(5), passes.take(5), mixture=((lora, 0.5), (ia3, 1.0)))])
    assert calls == [2, 1] * LAYERS
