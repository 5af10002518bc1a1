"""What keys and values are worth that are there already, and what it costs when there is no room for them.

The first token of a prompt of which nothing is found, of the same prompt once more, and of a session's next turn; each
of those that find something beside a prompt that has no more tokens than are left to compute. Then the same texts with
pages for all of them, with half as many pages, so that some have to make way and come back, and with pages for all but
no more texts at once than half the pages hold: what lies between the last two is the price of making way.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.answers import Text, answer, answer_all, seconds_of
from benchmarks.rig import measure_shapes, running

if TYPE_CHECKING:
    from benchmarks.answers import Answered
    from benchmarks.rig import Measured, Rig, Row
    from services.expert_worker.engine.engine import Engine

_TURN_TOKENS = 16
"""Of an answer in a session, and of what is asked next."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        prompt_tokens: Of the prompts whose first token is waited for.
        texts: How many compete for pages.
        pages: What each of these comes to take.
    """

    prompt_tokens: tuple[int, ...]
    texts: int
    pages: int


class _Waits:
    """What was waited for a first token, each time beside its floor.

    Args:
        rig: Where.
        engine: Which.
    """

    def __init__(self, rig: Rig, engine: Engine) -> None:
        self._rig = rig
        self._engine = engine
        self._times: dict[str, list[tuple[float, float]]] = {}
        self._found: dict[str, tuple[int, int]] = {}

    async def take(self, work: str, text: Text) -> Answered:
        """Put a text, then a prompt of as many tokens as were not found of it."""
        answered = await answer(self._engine, text)
        asked, found = self._found[work] = len(text.token_ids), answered.finished.cached_token_count
        floor = await answer(self._engine, Text(self._rig.prompt(asked - found), (), 1))
        self._times.setdefault(work, []).append((answered.first_seconds, floor.first_seconds))
        return answered

    def rows(self) -> list[Row]:
        """The medians, beside the first of them; what came first of each warms."""
        middle = {
            work: [statistics.median(part) for part in zip(*each[1:], strict=True)]
            for work, each in self._times.items()
        }
        without = next(iter(middle.values()))[0]
        return [
            {
                "work": work, "tokens": str(self._found[work][0]), "found": str(self._found[work][1]),
                "ms": 1e3 * seconds, "x without": seconds / without, "floor ms": 1e3 * floor_seconds,
                "x its floor": seconds / floor_seconds, "made way": "-",
            }
            for work, (seconds, floor_seconds) in middle.items()
        ]  # fmt: skip


async def _first_tokens(rig: Rig, engine: Engine, plan: Plan) -> tuple[list[Row], dict[str, str]]:
    """Rows for what is found of a prompt, whole prompts and turns of a session."""
    rows: list[Row] = []
    worth: list[str] = []
    for count in plan.prompt_tokens:
        waits = _Waits(rig, engine)
        for turn in range(rig.rounds + 1):
            prompt, session = rig.prompt(count), f"{count} {turn}"
            first = await waits.take("a prompt of which nothing is found", Text(prompt, (), _TURN_TOKENS, session))
            await waits.take("  the same again", Text(prompt, (), 1))
            said = (*prompt, *first.token_ids, *rig.prompt(_TURN_TOKENS))
            await waits.take("  a session's next turn", Text(said, (), 1, session))
        rows += waits.rows()
        again, next_turn = (1 / row["x without"] for row in rows[-2:])
        worth.append(f"{again:.1f} and {next_turn:.1f} x with {count} tokens")
    return rows, {"first token sooner": f"the same again and the next turn, {', '.join(worth)}"}


async def _competing(rig: Rig, plan: Plan) -> tuple[list[Row], dict[str, str]]:
    """Texts that grow until there are too few pages."""
    page = rig.page_positions
    prompt_tokens, enough = page // 2, plan.texts * plan.pages
    new_tokens = plan.pages * page - prompt_tokens
    sides = {
        "pages for all": (enough, plan.texts),
        "pages for half": (enough // 2, plan.texts),
        "pages for all, half of them at once": (enough, plan.texts // 2),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    made_way: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(rig.rounds + 1):
        for name, (pages, at_once) in sides.items():
            async with running(
                rig.base, None, threads=rig.threads, positions=pages * page, sequences_max=at_once
            ) as engine:
                await answer(engine, Text(rig.prompt(prompt_tokens), (), 2))
                texts = [Text(rig.prompt(prompt_tokens), (), new_tokens) for _ in range(plan.texts)]
                answered = await answer_all(engine, texts)
            times[name].append(seconds_of(answered))
            made_way[name].append(sum(each.finished.preemption_count for each in answered))
    middle = {name: statistics.median(each[1:]) for name, each in times.items()}
    all_seconds, few_seconds, floor_seconds = middle.values()
    rows: list[Row] = [
        {
            "work": f"{plan.texts} answers, {name}", "tokens": str(prompt_tokens + new_tokens), "found": "-",
            "ms": 1e3 * seconds, "x without": seconds / all_seconds, "floor ms": 1e3 * floor_seconds,
            "x its floor": seconds / floor_seconds, "made way": str(statistics.median(made_way[name][1:])),
        }
        for name, seconds in middle.items()
    ]  # fmt: skip
    return rows, {
        "making way": f"{few_seconds / all_seconds:.2f} x with pages for all, {few_seconds / floor_seconds:.2f} x with "
        "half of the answers at once, of which none has to make way"
    }


def plan_of(rig: Rig) -> Plan:
    """What there is time for."""
    if rig.is_quick:
        return Plan(prompt_tokens=(256, 1024, 4096), texts=16, pages=4)
    return Plan(prompt_tokens=(256, 1024), texts=8, pages=2)


async def measure(rig: Rig, plan: Plan | None = None) -> Measured:
    """One shape."""
    plan = plan or plan_of(rig)
    positions = 4 * (max(plan.prompt_tokens) + 4 * rig.page_positions)  # sessions may pin half of it
    async with running(rig.base, None, threads=rig.threads, positions=positions) as engine:
        rows, notes = await _first_tokens(rig, engine, plan)
    competing, more = await _competing(rig, plan)
    floor = (
        "of what finds something, a prompt of as many tokens as were not found; of pages, half of the answers at once"
    )
    return rows + competing, {"floor": floor, **notes, **more}


if __name__ == "__main__":
    asyncio.run(measure_shapes(__doc__, "prefixes", measure))
