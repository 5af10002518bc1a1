"""What the starter kit is worth on held-out questions: `make scores`.

A suite with the kit is asked, over gRPC, questions of templates and values that no expert was trained on. The base
alone answers them, another expert, the task's own expert (whom a router that is never wrong would choose), and whoever
the rules gate chooses; then sentences that need two experts, by each of them and by both at several weights. SQL is run
on SQLite and its rows compared, JSON is parsed, patterns are tried on strings; the rest is compared with the answer.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import report
from examples.running import run, suite
from examples.starter.demo import known
from examples.starter.kit import Kit
from hocket.client import Routing, connect, connect_registry
from hocket.evaluation import wilson_interval
from training.starter import esperanto, world
from training.starter.corpus import TASKS
from training.starter.task import Example, Split, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hocket.client import RouterClient

_SEED: Final = "held out"
_IN_FLIGHT: Final = 16
_TOKENS_MAX: Final = 96
_PAIR: Final = ("esperanto-nature", "esperanto-home")
_PAIR_WEIGHTS: Final = ((0.5, 0.5), (0.7, 0.7), (1.0, 1.0))
_BEGIN: Final = "<!-- scores -->"
_END: Final = "<!-- end of scores -->"


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked.

    Args:
        experts: Named, with weights; none for the base alone.
        routed: Whether the gate chooses, one expert or, where it is undecided, two.
    """

    experts: Mapping[str, float]
    routed: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers.

    Args:
        right: How many.
        count: Of how many.
    """

    right: int
    count: int

    def __str__(self) -> str:
        low, high = wilson_interval(self.right, self.count)
        return f"{self.right / self.count:.1%} ({low:.0%}-{high:.0%})"

    def json(self) -> dict[str, float]:
        """Share and the ends of its 95 % interval (Wilson)."""
        low, high = wilson_interval(self.right, self.count)
        return {"share": round(self.right / self.count, 4), "low": round(low, 4), "high": round(high, 4)}


def held_out(task: Task, count: int) -> list[Example]:
    """The held-out questions of a task: the same ones each time."""
    random = Random(f"{task.name}:{_SEED}")  # noqa: S311  # reproducible, not secret
    return [task.example(random, Split.TEST) for _ in range(count)]


async def score(router: RouterClient, task: Task, examples: Sequence[Example], asked: Asked) -> Score:
    """Ask all, several at a time, each for its most probable answer."""
    slots = asyncio.Semaphore(_IN_FLIGHT)
    policy = None if asked.experts else Routing("rules", expert_count_max=2) if asked.routed else Routing("base")

    async def is_right(example: Example) -> bool:
        async with slots:
            answer = await router.answer_text(
                example.prompt,
                experts=asked.experts,
                routing=policy,
                temperature=0.0,
                max_tokens=_TOKENS_MAX,
                timeout_seconds=300,
            )
        return task.is_right(example, answer.text)

    return Score(sum(await asyncio.gather(*map(is_right, examples))), len(examples))


async def measure(kit: Kit, count: int, only: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both tables: tasks, and weights of the mixture."""
    names = [name for name in TASKS if name in only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kit.prepare(folder)
        async with (
            suite(folder) as running,
            connect_registry(running.registry) as registry,
            connect(running.router) as router,
        ):
            experts = [kit.verified(path) for path in kit.experts()]
            for expert in experts:
                await registry.publish(expert.data, expert.release)
            await known(router, [expert.facts.digest for expert in experts])
            return await _ask(router, names, count)


async def _ask(
    router: RouterClient, names: Sequence[str], count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    every = [*TASKS]
    pair = _PAIR if set(_PAIR) <= set(names) else ()
    with _bar() as progress:
        total = 4 * len(names) + 2 + (len(pair) + len(_PAIR_WEIGHTS) + 1 if pair else 0)
        bar = progress.add_task("", total=total)

        async def ask(task: Task, examples: Sequence[Example], asked: Asked) -> Score:
            progress.update(bar, description=task.name)
            result = await score(router, task, examples, asked)
            progress.advance(bar)
            return result

        rows: list[dict[str, Any]] = []
        for name in names:
            task, examples = TASKS[name], held_out(TASKS[name], count)
            other = every[(every.index(name) + 3) % len(every)]
            rows.append(
                {
                    "task": name,
                    "base alone": await ask(task, examples, Asked({})),
                    "another expert": await ask(task, examples, Asked({other: 1.0})),
                    "its expert": await ask(task, examples, Asked({name: 1.0})),
                    "routed": await ask(task, examples, Asked({}, routed=True)),
                }
            )
        examples = held_out(world.TASK, count)
        own = await ask(world.TASK, examples, Asked({}))
        routed = await ask(world.TASK, examples, Asked({}, routed=True))
        rows.append({"task": "general", "base alone": own, "another expert": None, "its expert": own, "routed": routed})

        mixed: list[dict[str, Any]] = []
        if pair:
            examples = held_out(esperanto.MIXED, count)
            members = [{name: 1.0} for name in pair]
            both = [dict(zip(pair, weights, strict=True)) for weights in _PAIR_WEIGHTS]
            for experts in ({}, *members, *both):
                shown = ", ".join(f"{name}:{weight:g}" for name, weight in experts.items()) or "base alone"
                mixed.append({"experts": shown, "right": await ask(esperanto.MIXED, examples, Asked(experts))})
    return rows, mixed


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    keys = [*rows[0]]
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    lines += [f"| {' | '.join('-' if row[key] is None else str(row[key]) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def overall(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All tasks together, each with equally many questions."""
    total: dict[str, Any] = {"task": "**all**"}
    for key in [*rows[0]][1:]:
        scores = [row[key] for row in rows if row[key] is not None]
        total[key] = Score(sum(each.right for each in scores), sum(each.count for each in scores))
    return total


def write_into(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page."""
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def main() -> None:
    """Measure, print, and keep the result."""
    parser = report.command_line(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kit", type=Path, default=Path("starter"))
    parser.add_argument("--count", type=int, default=400, help="questions of each task")
    parser.add_argument("--only", nargs="+", default=[*TASKS], choices=TASKS, metavar="TASK")
    parser.add_argument("--write", nargs="*", type=Path, default=[], metavar="PAGE", help="put the tables into these")
    arguments = parser.parse_args()
    kit = Kit(arguments.kit)
    kit.check()
    rows, mixed = run(measure(kit, arguments.count, arguments.only))
    rows.append(overall(rows))
    text = f"{table(rows)}\n"
    if mixed:
        text += f"\n{table(mixed)}\n"
    Console(width=130).print(text, markup=False, highlight=False)
    for page in arguments.write:
        write_into(page, text)
    if not arguments.no_save:
        kept = [
            {key: value.json() if isinstance(value, Score) else value for key, value in row.items()}
            for row in (*rows, *mixed)
        ]
        report.keep("starter", kept, {"questions of each task": arguments.count})


def _bar() -> Progress:
    return Progress(TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


if __name__ == "__main__":
    main()
