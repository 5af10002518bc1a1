"""`hocket evaluate`: score answers of a running suite on a dataset."""

from __future__ import annotations

import json as jsonlib
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice, permutations
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hocket.cli import output, sampling, servers
from hocket.cli.text_router import text_router
from hocket.client import Routing
from hocket.datasets import Format, read_rows
from hocket.datasets.writing import writing
from hocket.errors import HocketError, Reason
from hocket.evaluation import (
    METRICS,
    Answered,
    Change,
    Compatibility,
    Question,
    Reply,
    answer_all,
    compare,
    questions,
    wilson_interval,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hocket.cli.sampling import WeightedExpert
    from hocket.cli.text_router import TextRouter
    from hocket.client.router import SamplingOptions

app = typer.Typer(add_completion=False)

_QUESTIONS: Final = "Questions and scores"
_WHO: Final = "Who answers"
_BASE: Final = "base alone"
_ROUTED: Final = "routed"
_STRATA_SHOWN: Final = 40
_STYLES: Final = {
    Compatibility.COMPATIBLE: "green",
    Compatibility.INCOMPATIBLE: "red",
    Compatibility.UNCLEAR: "yellow",
}


@dataclass(frozen=True, slots=True)
class _Contender:
    """Who answers.

    Attributes:
        name: In reports.
        experts: Those that are composed; none where the gate chooses, or for the base alone.
        routing: How they are chosen where none is named.
    """

    name: str
    experts: tuple[WeightedExpert, ...] = ()
    routing: Routing | None = None


@app.command()
def evaluate(
    context: typer.Context,
    datasets: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Datasets; with --pairs also NAME=FILE, the questions of an expert.",
            show_default=False,
        ),
    ],
    *,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:WEIGHT],...",
            help="Adapter experts to compose; may be repeated, to compare.",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = None,
    routed: Annotated[
        bool, typer.Option("--routed", help="Whoever the gate chooses for each question.", rich_help_panel=_WHO)
    ] = False,
    base_only: Annotated[bool, typer.Option("--base-only", help="The base model alone.", rich_help_panel=_WHO)] = False,
    pairs: Annotated[
        str,
        typer.Option(
            metavar="NAME[:WEIGHT],...",
            help="Every two of these experts, composed: does one spoil the other's answers?",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = "",
    metric: Annotated[
        str,
        typer.Option(
            metavar="|".join(METRICS),
            help="How answers are scored; auto: each row decides.",
            rich_help_panel=_QUESTIONS,
        ),
    ] = "auto",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Show scores by what rows have under this key.",
            show_default=False,
            rich_help_panel=_QUESTIONS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only so many rows of each file.", rich_help_panel=_QUESTIONS),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="With --pairs: how much lower a score may be.",
            rich_help_panel=_QUESTIONS,
        ),
    ] = 0.05,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every answer as a line of JSON.", rich_help_panel=_QUESTIONS),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="Questions at a time.", rich_help_panel=_QUESTIONS)
    ] = 8,
    base: sampling.Base = "",
    temperature: sampling.Temperature = 0.0,
    seed: sampling.Seed = None,
    max_tokens: sampling.MaxTokens = None,
    router: servers.Router = servers.ROUTER_ADDRESS,
    device: sampling.Device = None,
    data: sampling.Data = None,
    json: output.Json = False,
) -> None:
    """Score answers of a running suite on a dataset.

    Rows are prompts with completions, or conversations; what is right, and
    how answers are scored, is in them: docs/datasets.md. Scores come with
    the interval that they are in with 95 % certainty.

    With --pairs each expert answers its own questions (rows that have its
    name under "expert", or the file NAME=FILE), alone and composed with each
    of the others.

    $ hocket evaluate sql.test.jsonl --experts sql --experts json --base-only --by kind
    $ hocket evaluate all.test.jsonl --routed --limit 200 --json
    $ hocket evaluate sql=sql.test.jsonl json=json.test.jsonl --pairs sql,json
    """
    contenders = _contenders(experts or (), routed=routed, base_only=base_only)
    composed = sampling.read_experts(pairs)
    if bool(contenders) == bool(composed):
        raise HocketError(Reason.BAD_REQUEST, "say who answers: --experts, --routed or --base-only; or --pairs alone")
    if len(composed) == 1:
        raise HocketError(Reason.BAD_REQUEST, "--pairs needs two experts or more")
    asked = _questions(datasets, [_name(each) for each in composed], metric=metric, by=by, limit=limit)
    runs = _runs_of_pairs(composed, asked) if composed else [(each, asked) for each in contenders]
    options: SamplingOptions = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
    results: dict[str, list[Answered]] = {}
    with (
        text_router(context, router=router, device=device, data=data, base=base, shown=not json) as answering,
        answering.explained(),
        nullcontext(lambda _: None) if out is None else writing(out) as write,
        _progress(sum(len(each) for _, each in runs), shown=not json) as advance,
    ):
        for contender, chosen in runs:
            ask = _asking(answering, contender, options)
            for answered in answer_all(chosen, ask, concurrency=concurrency):
                results.setdefault(contender.name, []).append(answered)
                write(_line(contender, answered))
                advance(contender.name)
    if composed:
        _show_pairs(_changes(composed, results, tolerance), tolerance, as_json=json)
    else:
        _show_scores([(each, results[each.name]) for each in contenders], by, as_json=json)


def _contenders(experts: Iterable[str], *, routed: bool, base_only: bool) -> list[_Contender]:
    found: list[_Contender] = []
    for text in experts:
        chosen = sampling.read_experts(text)
        if not chosen:
            raise HocketError(Reason.BAD_REQUEST, "--experts names nobody: --base-only asks the base alone")
        found.append(_Contender(sampling.written(chosen), tuple(chosen)))
    if routed:
        found.append(_Contender(_ROUTED, routing=Routing()))
    if base_only:
        found.append(_Contender(_BASE, routing=Routing("base")))
    if len({each.name for each in found}) < len(found):
        raise HocketError(Reason.BAD_REQUEST, "the same experts are given twice")
    return found


def _questions(
    datasets: Iterable[str], experts: Sequence[str], *, metric: str, by: str | None, limit: int | None
) -> list[Question]:
    """The questions of all files; with experts only those for them, and each must have some."""
    found: list[Question] = []
    for written in datasets:
        name, equals, path = written.partition("=")
        owner = name if equals and name in experts else ""
        file = Path(path if owner else written)
        try:
            asked = list(questions(islice(read_rows(file), limit), metric=metric, by=by))
        except HocketError as error:
            if output.BLAMED_FILE in error.metadata or "line" not in error.metadata:
                raise
            raise error.restated(f"{file.name}, {error.message}", file=str(file)) from error
        found += [replace(question, expert=owner) for question in asked] if owner else asked
    if experts:
        found = [question for question in found if question.expert in experts]
        for name in experts:
            if not any(question.expert == name for question in found):
                advice = f'rows of {name!r} are missing: give {name}=FILE, or rows with "expert": "{name}"'
                raise HocketError(Reason.BAD_REQUEST, advice)
    return found


def _name(expert: WeightedExpert) -> str:
    return expert if isinstance(expert, str) else expert[0]


def _runs_of_pairs(
    experts: Sequence[WeightedExpert], asked: Sequence[Question]
) -> list[tuple[_Contender, list[Question]]]:
    """Each expert alone on its questions, then with each of the others."""
    own = {_name(each): [question for question in asked if question.expert == _name(each)] for each in experts}
    alone = [(_Contender(_name(each), (each,)), own[_name(each)]) for each in experts]
    return alone + [
        (_Contender(_pair(one, other), (one, other)), own[_name(one)]) for one, other in permutations(experts, 2)
    ]


def _pair(one: WeightedExpert, other: WeightedExpert) -> str:
    return f"{_name(one)} with {_name(other)}"


def _asking(answering: TextRouter, contender: _Contender, options: SamplingOptions) -> Callable[[Question], Reply]:
    def ask(question: Question) -> Reply:
        is_prompt = (
            question.format is Format.PROMPT
        )  # which templates may put otherwise than a conversation of one turn
        answer = answering.client.answer_text(
            question.turns[0]["content"] if is_prompt else None,
            messages=None if is_prompt else question.turns,
            experts=contender.experts,
            routing=contender.routing,
            base=answering.base,
            **options,
        )
        return Reply(answer.text, tuple(each.name or each.digest for each in answer.plan.experts))

    return ask


@contextmanager
def _progress(count: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that is told with each answer whose it is; none where nobody would see it."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.console(stderr=True), transient=True) as progress:
        task = progress.add_task("asking", total=count)
        yield lambda name: progress.update(task, advance=1, description=output.plain(name).markup)


def _line(contender: _Contender, answered: Answered) -> bytes:
    document = {
        "who": contender.name,
        "line": answered.question.line,
        "answer": answered.reply.text,
        "reference": answered.question.reference,
        "metric": answered.question.metric,
        "score": answered.score,
        "experts": answered.reply.experts,
        "seconds": round(answered.seconds, 4),
    }
    return jsonlib.dumps(document).encode()


def _measured(answers: Sequence[Answered]) -> dict[str, Any]:
    right = sum(each.score for each in answers)
    low, high = wilson_interval(right, len(answers))
    return {"rows": len(answers), "score": right / len(answers), "low": low, "high": high}


def _strata(answers: Iterable[Answered]) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = {}
    for answered in answers:
        found.setdefault(answered.question.stratum, []).append(answered)
    return dict(sorted(found.items()))


def _show_scores(results: Sequence[tuple[_Contender, list[Answered]]], by: str | None, *, as_json: bool) -> None:
    if as_json:
        for contender, answers in results:
            document = {
                "who": contender.name,
                **_measured(answers),
                "metrics": Counter(each.question.metric for each in answers),
                "seconds": median(each.seconds for each in answers),
                "answered_by": Counter(", ".join(each.reply.experts) or _BASE for each in answers),
            }
            if by is not None:
                document["by"] = {name: _measured(part) for name, part in _strata(answers).items()}
            output.emit(document)
        return
    rows = []
    for contender, answers in results:
        found = _measured(answers)
        seconds = median(each.seconds for each in answers)
        rows.append((contender.name, output.bar(found["score"]), *_cells(found), f"{seconds:.2f} s"))
    out = output.console()
    out.print(output.table(["who~", "", "score>", "95 % within>", "rows>", "an answer>"], rows))
    for contender, answers in results:
        if contender.name == _ROUTED:
            chosen = Counter(", ".join(each.reply.experts) or _BASE for each in answers)
            counted = [(name, f"{count:,}", output.bar(count / len(answers))) for name, count in chosen.most_common()]
            out.print()
            out.print(output.table(["routed to", "rows>", ""], counted))
    if by is not None:
        for contender, answers in results:
            parts = [(name, _measured(part)) for name, part in islice(_strata(answers).items(), _STRATA_SHOWN)]
            out.print()
            out.print(
                output.table(
                    [f"{contender.name}, by {by}", "", "score>", "95 % within>", "rows>"],
                    [(name, output.bar(found["score"]), *_cells(found)) for name, found in parts],
                )
            )


def _cells(found: dict[str, Any]) -> tuple[str, str, str]:
    return (f"{found['score']:.1%}", f"{found['low']:.1%} - {found['high']:.1%}", f"{found['rows']:,}")


def _changes(experts: Sequence[WeightedExpert], results: dict[str, list[Answered]], tolerance: float) -> list[Change]:
    scores = {name: [each.score for each in answers] for name, answers in results.items()}
    return [
        compare(_name(one), _name(other), scores[_name(one)], scores[_pair(one, other)], tolerance)
        for one, other in permutations(experts, 2)
    ]


def _show_pairs(changes: Sequence[Change], tolerance: float, *, as_json: bool) -> None:
    if as_json:
        for change in changes:
            output.emit(
                {**asdict(change), "drop": {"low": change.drop.low, "high": change.drop.high}, "tolerance": tolerance}
            )
        return
    rows = [
        (
            change.expert,
            change.partner,
            output.bar(change.alone, 10),
            f"{change.alone:.1%}",
            output.bar(change.together, 10),
            f"{change.together:.1%}",
            f"{change.together - change.alone:+.1%}",
            f"{-change.drop.high:+.1%} - {-change.drop.low:+.1%}",
            f"{change.count:,}",
            output.plain(change.verdict, _STYLES[change.verdict]),
        )
        for change in changes
    ]
    columns = ["expert", "with", "", "alone>", "", "together>", "change>", "95 % within>", "rows>", ""]
    output.console().print(output.table(columns, rows))
    average = mean(change.together - change.alone for change in changes)
    output.say(f"On average {average:+.1%}; compatible is at most {tolerance:.1%} lower, with 95 % certainty.")
