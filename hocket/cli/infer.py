"""`hocket predict`: answers with everyone who gave them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.live import Live

from hocket.cli import describe, output, rows, servers
from hocket.client import Answer, Partial, Planned
from hocket.errors import HocketError, Reason
from hocket.v1.plan_pb2 import CONTRIBUTION_STATE_ARRIVED, ContributionState, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from hocket.v1.plan_pb2 import Contribution, Plan

app = typer.Typer()

_BAR_WIDTH: Final = 12
_ROWS_SHOWN: Final = 20
_SCORES_SHOWN: Final = 10
_ACCEPTING: Final = "ask with on_missing RENORMALISE"
"""How a router says what accepts an answer without an expert."""
_STATE_STYLES: Final = {"arrived": "green", "pending": "dim"}


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(help=r"Mixture name, publisher/name@version, or digest\[#ordinal].", show_default=False)
    ],
    *,
    source: rows.Input = None,
    row: rows.Rows = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1_000_000, help="Experts per row, not the mixture's own number."),
    ] = None,
    partials: Annotated[
        bool | None, typer.Option(help="Follow the answer as experts arrive.", show_default="at a terminal")
    ] = None,
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Leave missing experts out instead of failing.")
    ] = False,
    min_coverage: Annotated[
        float | None, typer.Option(metavar="SHARE", min=0.0, max=1.0, help="Least weight that must be in every row.")
    ] = None,
    straggler_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.001, max=86400, help="Count experts as missing after this long."),
    ] = None,
    router: servers.Router = servers.ROUTER_ADDRESS,
    json: output.Json = False,
) -> None:
    """Ask a mixture, and watch its experts answer.

    At a terminal bars show each expert's weight and what is in so far.
    With --json every event is one line: plan, partials, answer.

    $ hocket predict digits --input rows.npy
    $ hocket predict iris --row 5.1,3.5,1.4,0.2 --row 6.7,3.0,5.2,2.3
    $ cat rows.csv | hocket predict iris --input - --json
    """
    matrix = rows.read_rows(source, row)
    board = None if json else _Board()
    follow = partials if partials is not None else board is not None and board.is_live
    with servers.router(router) as client:
        if board is not None:
            board.names = describe.expert_names(client.get_mixture(model).members)
        events = client.predict(
            model,
            matrix,
            top_k=top_k,
            partials=follow,
            min_coverage=min_coverage,
            straggler_timeout_seconds=straggler_timeout,
            on_missing="renormalise" if renormalise else "fail",
        )
        with board or nullcontext(), _flag_named():
            for event in events:
                if board is None:
                    output.emit(_event_json(event))
                else:
                    board.show(event)
    if board is not None and board.answer is not None:
        _print_answer(board.answer)


@contextmanager
def _flag_named() -> Iterator[None]:
    """Have a refusal of an incomplete answer name the option that accepts it, in place of the contract's field."""
    try:
        yield
    except HocketError as error:
        if error.reason is not Reason.COVERAGE:
            raise
        told = error.message.replace(_ACCEPTING, "ask with --renormalise")
        if told == error.message:
            told += " (--min-coverage says how much has to be there)"
        raise error.restated(told) from error


class _Board:
    """The experts of a running prediction: live at a terminal, else printed once at the end."""

    def __init__(self) -> None:
        self.names: Mapping[str, str] = {}
        self.answer: Answer | None = None
        self._plan: Plan | None = None
        self._console = output.console()
        self.is_live = self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> None:
        if self.is_live:
            self._live.start()

    def __exit__(self, *_exception: object) -> None:
        self._live.stop()

    def show(self, event: Planned | Partial | Answer) -> None:
        """Take the next event in."""
        contributions: Sequence[Contribution] = ()
        coverage = 0.0
        if isinstance(event, Planned):
            self._plan = event.plan
        else:
            contributions, coverage = event.contributions, float(event.coverage.mean())
        if isinstance(event, Answer):
            self.answer = event
        if self._plan is None:
            return
        if self.is_live:
            self._live.update(self._table(self._plan, contributions, coverage), refresh=True)
        elif isinstance(event, Answer):
            self._console.print(self._table(self._plan, contributions, coverage))

    def _table(self, plan: Plan, contributions: Sequence[Contribution], coverage: float) -> Table:
        by_expert = {contribution.expert: contribution for contribution in contributions}
        lines: list[tuple[object, ...]] = []
        for expert in plan.experts:
            weight = sum(expert.weights) / plan.row_count
            contribution = by_expert.get(expert.expert)
            lines.append(
                (
                    self.names.get(expert.expert, output.short(expert.expert)),
                    output.plain(output.bar(weight, _BAR_WIDTH), "cyan"),
                    f"{weight:.3f}",
                    f"{len(expert.rows)}",
                    _state_text(contribution),
                    " " if contribution is None else _milliseconds(contribution),
                    " " if contribution is None else contribution.worker,
                )
            )
        lines.append(("coverage", output.plain(output.bar(coverage, _BAR_WIDTH), "green"), f"{coverage:.3f}", *" " * 4))
        columns = ("expert", "mean weight", ">", "rows>", "state~", "time>", "worker~")
        return output.table(
            columns, lines, title=f"{plan.model} ({Mode.Name(plan.mode).removeprefix('MODE_').lower()})"
        )


def _state_text(contribution: Contribution | None) -> Any:  # noqa: ANN401 - styled text
    if contribution is None:
        return output.plain("pending", "dim")
    state = ContributionState.Name(contribution.state).removeprefix("CONTRIBUTION_STATE_").lower().replace("_", " ")
    text = f"{state}: {contribution.reason}" if contribution.reason else state
    return output.plain(text, _STATE_STYLES.get(state, "red"))


def _milliseconds(contribution: Contribution) -> str:
    if contribution.state != CONTRIBUTION_STATE_ARRIVED:
        return " "
    return f"{contribution.latency.ToMicroseconds() / 1000:.1f} ms"


def _print_answer(answer: Answer) -> None:
    labels = answer.labels[:_SCORES_SHOWN]
    shown = answer.value[:_ROWS_SHOWN]
    scores = labels or [f"column {column}" if shown.shape[1] > 1 else "value" for column in range(shown.shape[1])]
    lines = []
    for row, values in enumerate(shown):
        best = (answer.labels[int(values.argmax())],) if answer.labels else ()
        coverage = (f"{answer.coverage[row]:.3f}",)
        lines.append((str(row), *best, *(f"{value:.6g}" for value in values[: len(scores)]), *coverage))
    columns = ("row>", *(("answer",) if answer.labels else ()), *(f"{score}>" for score in scores), "coverage>")
    out = output.console()
    out.print()
    out.print(output.table(columns, lines))
    for rest, what in ((len(answer.value) - len(shown), "rows"), (answer.value.shape[1] - len(scores), "columns")):
        if rest > 0:
            output.say(f"... and {rest} more {what}: --json has them all")
    if answer.finish.degradations:
        output.say(f"Given up on the way: {', '.join(answer.finish.degradations)}")
    output.say(f"Request id {answer.request_id}", stderr=True)


def _event_json(event: Planned | Partial | Answer) -> dict[str, Any]:
    match event:
        case Planned():
            return {"event": "plan", "request_id": event.request_id, "plan": output.message_json(event.plan)}
        case Partial():
            return {
                "event": "partial",
                "sequence": event.sequence,
                **_combination_json(event),
                "lower_bound": _numbers(event.lower),
                "upper_bound": _numbers(event.upper),
            }
        case Answer():
            return {
                "event": "answer",
                "request_id": event.request_id,
                "labels": event.labels,
                **_combination_json(event),
                "finish": output.message_json(event.finish),
            }


def _combination_json(event: Partial | Answer) -> dict[str, Any]:
    return {
        "value": _numbers(event.value),
        "coverage": event.coverage.tolist(),
        "contributions": [output.message_json(contribution) for contribution in event.contributions],
    }


def _numbers(matrix: NDArray[np.float32] | None) -> list[list[float]] | None:
    """The shortest decimals that read back as the same float32, not their float64 neighbours."""
    return None if matrix is None else [[float(str(value)) for value in row] for row in matrix]
