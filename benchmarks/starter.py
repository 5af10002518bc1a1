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
from examples.running import run
from examples.starter.kit import Kit
from examples.starter.serving import serving
from hocket.client import Routing
from hocket.evaluation import drop_interval, wilson_interval
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
_PAIR_WEIGHTS: Final = (0.5, 0.6, 0.7, 0.8, 1.0)
_ANOTHER: Final = 3
"""How many places further on the other expert stands that is asked."""
_FACTS: Final = 250
"""Different held-out questions that the world surely has."""
_WHOLE: Final = "<!-- scores -->"
_SHORT: Final = "<!-- scores in short -->"
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

    @classmethod
    def of(cls, right: Sequence[bool]) -> Score:
        """The score of judged answers."""
        return cls(sum(right), len(right))

    def __str__(self) -> str:
        shown = self.json()
        return f"{shown['share']:.1%} ({shown['low']:.1%}-{shown['high']:.1%})"

    def json(self) -> dict[str, float]:
        """Share and the ends of its 95 % interval (Wilson)."""
        low, high = wilson_interval(self.right, self.count)
        return {"share": round(self.right / self.count, 4), "low": round(low, 4), "high": round(high, 4)}


def questions(task: Task, count: int, split: Split = Split.TEST) -> list[Example]:
    """Different questions of a task, held-out ones unless told: the same ones each time."""
    random = Random(f"{task.name}:{_SEED}")  # noqa: S311  # reproducible, not secret
    found: dict[str, Example] = {}
    while len(found) < count:
        example = task.example(random, split)
        found.setdefault(example.prompt, example)
    return [*found.values()]


async def judge(router: RouterClient, task: Task, examples: Sequence[Example], asked: Asked) -> list[bool]:
    """Ask all, several at a time, each for its most probable answer.

    Returns:
        Which answers are right.
    """
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

    return [*await asyncio.gather(*map(is_right, examples))]


async def measure(kit: Kit, count: int, only: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both tables: tasks, and weights of the mixture."""
    with tempfile.TemporaryDirectory() as temporary:
        async with serving(kit, Path(temporary)) as (_, router):
            with _bar() as progress:
                tasks = await _tasks(router, [name for name in TASKS if name in only], count, progress)
                return tasks, await _mixture(router, count, progress) if {*_PAIR} <= {*only} else []


async def _tasks(router: RouterClient, names: Sequence[str], count: int, progress: Progress) -> list[dict[str, Any]]:
    every = [*TASKS]
    rows: list[dict[str, Any]] = []
    for name in progress.track(names, description="tasks"):
        task, examples = TASKS[name], questions(TASKS[name], count)
        other = every[(every.index(name) + _ANOTHER) % len(every)]
        who = {
            "base alone": Asked({}),
            "another expert": Asked({other: 1.0}),
            "its expert": Asked({name: 1.0}),
            "routed": Asked({}, routed=True),
        }
        scores = {column: Score.of(await judge(router, task, examples, asked)) for column, asked in who.items()}
        rows.append({"task": name, **scores})
    examples = questions(world.TASK, min(count, _FACTS))
    own = Score.of(await judge(router, world.TASK, examples, Asked({})))
    routed = Score.of(await judge(router, world.TASK, examples, Asked({}, routed=True)))
    general = {
        "task": "general questions",
        "base alone": own,
        "another expert": None,
        "its expert": own,
        "routed": routed,
    }
    return [*rows, overall(rows), general]


async def _mixture(router: RouterClient, count: int, progress: Progress) -> list[dict[str, Any]]:
    """Both experts on sentences that need both. Their weights are chosen on sentences that are not scored."""
    both = [dict.fromkeys(_PAIR, weight) for weight in _PAIR_WEIGHTS]
    tried = questions(esperanto.MIXED, count // 2, Split.TRAIN)
    found = [
        sum(await judge(router, esperanto.MIXED, tried, Asked(each)))
        for each in progress.track(both, description="weights")
    ]
    chosen = both[found.index(max(found))]
    examples = questions(esperanto.MIXED, count)
    who = {"base alone": {}, **{f"{name}:1": {name: 1.0} for name in _PAIR}, _named(chosen): chosen}
    right = {
        name: await judge(router, esperanto.MIXED, examples, Asked(experts))
        for name, experts in progress.track(who.items(), description="mixture")
    }
    rows: list[dict[str, Any]] = [{"experts": name, "right": Score.of(each)} for name, each in right.items()]
    best = max((right[f"{name}:1"] for name in _PAIR), key=sum)
    low, high = drop_interval([float(each) for each in right[_named(chosen)]], [float(each) for each in best])
    gain = (sum(right[_named(chosen)]) - sum(best)) / count
    return [*rows, {"experts": "both, less the better one", "right": f"{gain:+.1%} ({low:+.0%} to {high:+.0%})"}]


def _named(experts: Mapping[str, float]) -> str:
    return ", ".join(f"{name}:{weight:g}" for name, weight in experts.items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    keys = [*rows[0]]
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    lines += [f"| {' | '.join('-' if row[key] is None else str(row[key]) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def overall(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All tasks together, each with equally many questions."""
    columns = [*rows[0]][1:]
    right, count = (
        {key: sum(getattr(row[key], part) for row in rows) for key in columns} for part in ("right", "count")
    )
    return {
        "task": "all nine" if len(rows) == len(TASKS) else "all",
        **{key: Score(right[key], count[key]) for key in columns},
    }


def tables(rows: Sequence[Mapping[str, Any]], mixed: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """All tables, and what sums each up, by the marker of the place where they go."""
    parts = {_WHOLE: (rows, mixed), _SHORT: (rows[-2:], mixed[-2:])}
    return {marker: "".join(f"{table(part)}\n\n" for part in shown if part)[:-1] for marker, shown in parts.items()}


def write_into(page: Path, texts: Mapping[str, str]) -> None:
    """Replace what stands between the markers of a page; without both, the page is left as it is.

    Args:
        page: Of Markdown.
        texts: What goes there, by the first marker.

    Raises:
        ValueError: They are not both there.
    """
    text = page.read_text()
    begin = next((marker for marker in texts if marker in text), _WHOLE)
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(_END)
    if not (found and end):
        raise ValueError(f"{page} has no place for the tables: {_WHOLE} or {_SHORT}, and {_END}")
    page.write_text(f"{before}{begin}\n{texts[begin]}\n{_END}{after}")


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
    texts = tables(rows, mixed)
    Console(width=150).print(texts[_WHOLE], markup=False, highlight=False)
    for page in arguments.write:
        write_into(page, texts)
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
