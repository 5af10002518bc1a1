"""`hocket route`: who would answer, and why, without asking them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, cast

import typer

from hocket.cli import describe, files, output, rows, sampling, servers
from hocket.cli.decisions import why
from hocket.cli.generate import read_prompt
from hocket.errors import HocketError, Reason, Situation
from hocket.text_limits import EXPERTS_MAX, TEXT_BYTES_MAX
from hocket.v1.router_pb2 import EvidenceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hocket.client import Routing, blocking
    from hocket.v1.router_pb2 import Evidence, RouteResponse, TextCandidate, TextDecision

app = typer.Typer()

_ROWS: Final = "For rows"
_BAR_WIDTH: Final = 12
_ROWS_SHOWN: Final = 20
_CANDIDATES_SHOWN: Final = 12
_EVIDENCE_SHOWN: Final = 8
_REFUSED: Final = 2
_STDIN: Final = Path("-")
_LINE_BYTES_MAX: Final = TEXT_BYTES_MAX + 2
"""A text, and the end of its line."""
_OF_ALL_LINES: Final = ("routing", "base")
"""Fields of a request that are the same for every line."""


@app.command()
def route(
    asked: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT|MODEL",
            help="A text, - for standard input; with --row or --input, the model that would answer rows.",
            show_default=False,
        ),
    ] = None,
    *,
    policy: sampling.Policy = None,
    allow: sampling.Allow = None,
    deny: sampling.Deny = None,
    max_experts: sampling.MaxExperts = None,
    base: sampling.Base = "",
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Decide about each line of a file, - for standard input; one JSON object a line comes out.",
        ),
    ] = None,
    source: rows.Input = None,
    row: rows.Rows = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1_000_000,
            help="Experts per row, not the mixture's own number.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    router: servers.Router = servers.ROUTER_ADDRESS,
    json: output.Json = False,
) -> None:
    """Explain who would answer, without asking them.

    For a text the base and every expert that something in it speaks for,
    with what that is. For rows every member of a mixture with the gate's
    weight. Best first; nothing runs.

    $ hocket route "list all users older than 30"
    $ hocket route "list all users" --max-experts 3 --deny acme/expert-json --json
    $ hocket route --batch prompts.txt > decisions.jsonl
    $ hocket route iris --row 5.1,3.5,1.4,0.2
    """
    if source is None and row is None and top_k is None:
        routing = sampling.read_routing(policy=policy, allow=allow, deny=deny, max_experts=max_experts)
        with servers.router(router) as client, sampling.explained():
            if batch is not None:
                _check_alone(asked)
                _route_lines(client, batch, routing, base)
                return
            decision = client.route_text(read_prompt(asked, raw=False), routing=routing, base=base)
        if json:
            output.emit(output.message_json(decision))
        else:
            _print_text_decision(decision, max_experts or 1)
        return
    about_text = {"policy": policy, "allow": allow, "deny": deny, "max-experts": max_experts, "base": base}
    if given := [f"--{name}" for name, value in (*about_text.items(), ("batch", batch)) if value]:
        raise HocketError(Reason.BAD_REQUEST, f"{given[0]} is for a text: leave it out, or the rows")
    if asked is None:
        raise HocketError(Reason.BAD_REQUEST, "name the model that would answer: hocket route MODEL --row 1,2,3")
    matrix = rows.read_rows(source, row)
    with servers.router(router) as client:
        answer = client.route(asked, matrix, top_k=top_k)
        names = {} if json else describe.expert_names(client.get_mixture(asked).members)
    if json:
        output.emit(output.message_json(answer))
    else:
        _print_rows_decision(answer, names)


def _check_alone(asked: str | None) -> None:
    if asked is not None:
        raise HocketError(Reason.BAD_REQUEST, "--batch reads the texts from a file: leave out the argument")


def _route_lines(client: blocking.RouterClient, path: Path, routing: Routing | None, base: str) -> None:
    """A decision for every line, as a line of JSON: `{"prompt", "decision"}`, or `{"prompt", "error"}`.

    The prompt is null where the line is none.

    Raises:
        HocketError: What every further line would be refused for as well: nobody answers, or an option makes no sense.
    """
    refused = False
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), 1):
            prompt = None
            try:
                prompt = _prompt(line, number)
                decision = client.route_text(prompt, routing=routing, base=base)
            except HocketError as error:
                if error.situation is Situation.UNAVAILABLE or (error.field or "").startswith(_OF_ALL_LINES):
                    raise
                refused = True
                output.emit({"prompt": prompt, "error": {"reason": str(error.reason), "message": error.message}})
            else:
                output.emit({"prompt": prompt, "decision": output.message_json(decision)})
    if refused:
        raise typer.Exit(_REFUSED)


def _prompt(line: bytes, number: int) -> str:
    data = line.removesuffix(b"\n").removesuffix(b"\r")
    if len(data) > TEXT_BYTES_MAX:
        raise HocketError(Reason.TOO_LARGE, f"line {number} is longer than {TEXT_BYTES_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise HocketError(Reason.BAD_REQUEST, f"line {number} is not text in UTF-8") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path == _STDIN:
        yield cast("BinaryIO", files.standard_input().buffer)
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, more than a text may have."""
    while line := file.readline(_LINE_BYTES_MAX):
        rest = line
        while len(rest) == _LINE_BYTES_MAX and not rest.endswith(b"\n"):
            rest = file.readline(_LINE_BYTES_MAX)
        yield line


def _print_text_decision(decision: TextDecision, count_max: int) -> None:
    plan = decision.plan
    everybody = [(decision.base, True), *((each, False) for each in decision.candidates[:_CANDIDATES_SHOWN])]
    everybody.sort(key=lambda each: (-each[0].weight, -each[0].probability, -each[0].score))
    lines = [_candidate_line(each, is_base=is_base) for each, is_base in everybody]
    title = f"{plan.base_name or output.short(plan.base)}, registry revision {plan.revision}"
    columns = ("who", "probability", ">", "score>", "", "weight>", "evidence~")
    output.console().print(output.table(columns, lines, title=title))
    if (more := decision.candidate_count - _CANDIDATES_SHOWN) > 0:
        output.say(f"... and {more} more")
    said = why(plan)
    if decision.HasField("thresholds") and decision.candidate_count:
        least = decision.thresholds.confidence_min
        said += f" (confidence {decision.confidence:.2f}, an expert needs {least:g})"
    output.say(said)
    if tied := _tied(decision, count_max):
        names = " and ".join(f"{_name(each)} {each.probability:.3f}" for each in tied)
        output.say(f"undecided between {names}: --max-experts {len(tied)} lets them answer together")


def _tied(decision: TextDecision, count_max: int) -> list[TextCandidate]:
    """Who is about as likely to be the right one, where fewer than these were to answer; else nobody."""
    chosen = [each for each in decision.candidates if each.chosen]
    if not chosen or len(chosen) < count_max or not decision.HasField("thresholds"):
        return []
    least = decision.thresholds.share_min * max(each.probability for each in chosen)
    near = [each for each in decision.candidates if each.probability >= least]
    return near[:EXPERTS_MAX] if len(near) > len(chosen) else []


def _candidate_line(candidate: TextCandidate, *, is_base: bool) -> tuple[object, ...]:
    name = _name(candidate)
    shown = [_evidence_text(each) for each in candidate.evidence[:_EVIDENCE_SHOWN]]
    if candidate.HasField("hivellm"):
        scores = candidate.hivellm
        shown.append(f"(keyword router {scores.keyword:.4f}, embedding router {scores.embedding:.4f})")
    if len(candidate.evidence) > _EVIDENCE_SHOWN:
        shown.append(f"and {len(candidate.evidence) - _EVIDENCE_SHOWN} more")
    return (
        f"{name} (base)" if is_base else name,
        output.plain(output.bar(candidate.probability, _BAR_WIDTH), "cyan"),
        f"{candidate.probability:.3f}",
        f"{candidate.score:.2f}",
        output.plain("chosen", "green") if candidate.chosen else " ",
        f"{candidate.weight:.3f}" if candidate.weight else " ",
        ", ".join(shown) or " ",
    )


def _name(candidate: TextCandidate) -> str:
    return candidate.name or output.short(candidate.digest)


def _evidence_text(evidence: Evidence) -> str:
    kind = EvidenceKind.Name(evidence.kind).removeprefix("EVIDENCE_KIND_").lower()
    return f"{kind} {evidence.text!r} {evidence.contribution:+.2f}"


def _print_rows_decision(decision: RouteResponse, names: Mapping[str, str]) -> None:
    plan = decision.plan
    lines: list[tuple[object, ...]] = []
    for row, ranking in enumerate(decision.rows[:_ROWS_SHOWN]):
        for place, candidate in enumerate(ranking.candidates[:_CANDIDATES_SHOWN]):
            lines.append(
                (
                    str(row) if place == 0 else " ",
                    names.get(candidate.expert, output.short(candidate.expert)),
                    output.plain(output.bar(candidate.gate_weight, _BAR_WIDTH), "cyan"),
                    f"{candidate.gate_weight:.4f}",
                    output.plain("chosen", "green") if candidate.chosen else " ",
                    f"{candidate.weight:.4f}" if candidate.chosen else " ",
                )
            )
    title = f"{plan.model}, {output.short(plan.digest)}, registry revision {plan.revision}"
    columns = ("row>", "expert", "gate", "weight>", "", "final weight>")
    output.console().print(output.table(columns, lines, title=title))
    if len(decision.rows) > _ROWS_SHOWN:
        output.say(f"... and {len(decision.rows) - _ROWS_SHOWN} more rows: --json has them all")
    for expert in plan.overflowed:
        output.say(f"{names.get(expert, expert)} is full: its rows went to the next of the ranking")
    for planned in plan.experts:
        if planned.unavailable_reason:
            output.say(f"{names.get(planned.expert, planned.expert)} cannot run: {planned.unavailable_reason}")
