"""A step of decoding: what experts cost, how near it comes to reading its memory once, and what scattered pages cost.

The same batch decodes with the base alone, by an engine that knows of no experts and by one that does, with one expert
for all, with ten composed in every answer, and with an expert each; in turns, in one process. A step cannot be faster
than reading once what it computes with: the weights of the base and of every expert in it, and the keys and values
so far. That floor stands beside it, by the bandwidth that a copy or a product of a large matrix with a vector comes to
in the same run.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.answers import Text, answer_all
from benchmarks.rig import (
    COMPOSED,
    DISTINCT,
    arena_for,
    experts_of,
    measure_shapes,
    opened,
    pool_for,
    runner_for,
    running,
)
from services.expert_worker.engine.pages import SCRATCH_PAGES
from services.expert_worker.engine.part import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.rig import Measured, Rig, Row
    from services.expert_worker.engine.engine import Engine
    from services.expert_worker.engine.expert import AdapterExpert, Mixture

_PLAIN: Final = "plain layers"
_BASE: Final = "base alone"
_ONE: Final = "1 expert for all"
_TEN: Final = f"{COMPOSED} experts composed"
_ALL: Final = f"{DISTINCT} experts, one each"
_MIXED: Final = "mixtures of 1 to 4 each"
_BUDGETS: Final = {_BASE: 1.0, _ONE: 1.03, _TEN: 1.10, _ALL: 1.25}
"""Beside an engine that knows of no experts, whose layers are the base's own; on CUDA, with graphs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        prompt_tokens: Of each answer.
        new_tokens: Of each answer.
        rounds: In which the kinds of work take turns.
        matrix_bytes: What the bandwidth is measured with; more than caches hold.
        scattered: How many sequences, of how many positions, read pages in a row and scattered ones.
    """

    prompt_tokens: int
    new_tokens: int
    rounds: int
    matrix_bytes: int
    scattered: tuple[int, int]


def mixtures_of(experts: Sequence[AdapterExpert], batch: int) -> dict[str, list[Mixture]]:
    """Who answers each text of a batch, by the name of the work; in a batch of one nobody is distinct."""
    found: dict[str, list[Mixture]] = {
        _BASE: [()] * batch,
        _ONE: [((experts[0], 1.0),)] * batch,
        _TEN: [tuple((one, 0.1) for one in experts[:COMPOSED])] * batch,
    }
    if batch > 1:
        found[_ALL] = [((experts[n % DISTINCT], 1.0),) for n in range(batch)]
        found[_MIXED] = [tuple((experts[(n * 3 + k) % DISTINCT], 0.5) for k in range(1 + n % 4)) for n in range(batch)]
    return found


def bandwidth(rig: Rig, size_bytes: int) -> tuple[float, str]:
    """Bytes per second that the device comes to, and by what."""
    dtype = rig.base.dtype
    width = 4096
    matrix = torch.ones((max(1, size_bytes // dtype.itemsize // width), width), dtype=dtype, device=rig.device)
    copy, vector = torch.empty_like(matrix), torch.ones(width, dtype=dtype, device=rig.device)
    seconds = rig.compared({"a copy": lambda: copy.copy_(matrix), "a product": lambda: matrix @ vector}, rounds=5)
    found = {"a copy": 2 * matrix.nbytes / seconds["a copy"], "a product": matrix.nbytes / seconds["a product"]}
    best = max(found, key=lambda name: found[name])
    return found[best], best


def read_bytes(rig: Rig, mixtures: Sequence[Mixture], positions: float) -> float:
    """What a step must read: the base, each of its experts once, and so many positions of every answer."""
    experts = {expert.digest: expert for mixture in mixtures for expert, _ in mixture}
    kv_bytes = len(mixtures) * positions * rig.base.kv_shape.position_bytes(rig.base.dtype)
    return rig.base.size_bytes + sum(expert.size_bytes for expert in experts.values()) + kv_bytes


async def _step_seconds(rig: Rig, engine: Engine, plan: Plan, mixtures: Sequence[Mixture]) -> list[float]:
    """Of each step in which the whole batch decodes."""
    texts = [Text(rig.prompt(plan.prompt_tokens), mixture, plan.new_tokens) for mixture in mixtures]
    answered = await answer_all(engine, texts)
    begin = max(each.first_seconds for each in answered)
    end = min(each.times[-1] for each in answered)
    times = [time for time in answered[0].times if begin <= time <= end]
    return [after - before for before, after in pairwise(times)]


async def _steps(rig: Rig, plan: Plan, experts: Sequence[AdapterExpert], speed: float) -> list[Row]:
    """Rows for one answer and for a batch."""
    plain = opened(rig.folder / f"base-{rig.shape}", rig.device)  # whose layers nobody wraps
    page = rig.page_positions
    positions = DISTINCT * (plan.prompt_tokens + plan.new_tokens + 2 * page)
    arena = arena_for(rig.base, DISTINCT)
    rows: list[Row] = []
    async with (
        running(rig.base, arena, threads=rig.threads, positions=positions) as engine,
        running(plain, None, threads=rig.threads, positions=positions) as bare,
    ):
        for batch in (1, DISTINCT):
            works = mixtures_of(experts, batch)
            times: dict[str, list[float]] = {name: [] for name in (_PLAIN, *works)}
            for turn in range(plan.rounds + 1):  # the first round warms
                for name in times:
                    where, mixtures = (bare, works[_BASE]) if name == _PLAIN else (engine, works[name])
                    found = await _step_seconds(rig, where, plan, mixtures)
                    times[name] += found if turn else []
            middle = {name: statistics.median(each) for name, each in times.items()}
            for name, seconds in middle.items():
                size = read_bytes(rig, works.get(name, works[_BASE]), plan.prompt_tokens + plan.new_tokens / 2)
                rows.append(
                    {
                        "batch": str(batch), "work": name, "step ms": 1e3 * seconds, "tokens/s": batch / seconds,
                        "x the first": seconds / middle[_PLAIN],
                        "budget": f"{_BUDGETS[name]:.2f}" if name in _BUDGETS else "-",
                        "floor ms": 1e3 * size / speed, "x its floor": seconds * speed / size,
                        "% bandwidth": 100 * size / speed / seconds,
                    }
                )  # fmt: skip
    return rows


def _scattered(rig: Rig, plan: Plan, speed: float) -> list[Row]:
    """Rows for a pass over pages in a row, and over pages among those of everybody else."""
    count, positions = plan.scattered
    pages = -(-positions // rig.page_positions)
    runner = runner_for(rig.base, pool_for(rig.base, count * pages), None, rows_max=count)
    tables = {
        "in a row": [range(SCRATCH_PAGES + n * pages, SCRATCH_PAGES + (n + 1) * pages) for n in range(count)],
        "scattered": [range(SCRATCH_PAGES + n, SCRATCH_PAGES + count * pages, count) for n in range(count)],
    }

    def step(table: Sequence[range]) -> Callable[[], object]:
        parts = [
            Part(start=positions - 1, embeddings=None, token_ids=(5,), pages=tuple(each), mixture=(), sampled=True)
            for each in table
        ]
        return lambda: runner.run(parts)

    seconds = rig.compared({name: step(table) for name, table in tables.items()}, rounds=5 * plan.rounds)
    size = read_bytes(rig, [()] * count, positions)
    return [
        {
            "batch": str(count), "work": f"{positions} positions, {name}", "step ms": 1e3 * each,
            "tokens/s": count / each, "x the first": each / seconds["in a row"], "budget": "-",
            "floor ms": 1e3 * size / speed, "x its floor": each * speed / size,
            "% bandwidth": 100 * size / speed / each,
        }
        for name, each in seconds.items()
    ]  # fmt: skip


def plan_of(rig: Rig) -> Plan:
    """What there is time for."""
    if rig.device.type == "cuda":
        return Plan(prompt_tokens=512, new_tokens=128, rounds=rig.rounds, matrix_bytes=2**31, scattered=(32, 2048))
    if rig.is_quick:
        return Plan(prompt_tokens=16, new_tokens=64, rounds=rig.rounds, matrix_bytes=2**28, scattered=(8, 1024))
    return Plan(prompt_tokens=4, new_tokens=6, rounds=max(3, rig.rounds), matrix_bytes=2**28, scattered=(8, 256))


async def measure(rig: Rig, plan: Plan | None = None) -> Measured:
    """One shape."""
    plan = plan or plan_of(rig)
    speed, by = bandwidth(rig, plan.matrix_bytes)
    scattering = _scattered(rig, plan, speed)  # first: from `_steps` on the base's layers are wrapped
    rows = await _steps(rig, plan, experts_of(rig, DISTINCT), speed) + scattering
    in_a_row, scattered = (row["step ms"] for row in scattering)
    return rows, {
        "bandwidth": f"{speed / 1e9:.1f} GB/s by {by} of {plan.matrix_bytes / 1e6:.0f} MB, as many threads",
        "floor": "base, distinct experts, keys and values read once at that bandwidth; what fits a cache can be faster",
        "x the first": "beside plain layers, those of an engine that knows of no experts; budgets are for CUDA",
        "scattered pages": f"{scattered / in_a_row:.2f} x pages in a row",
    }


if __name__ == "__main__":
    asyncio.run(measure_shapes(__doc__, "decoding", measure))
