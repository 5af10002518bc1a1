"""From rows of a dataset to questions, and the score of each answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hocket.datasets.rows import Format, Row, stratum
from hocket.errors import HocketError, Reason
from hocket.evaluation.scores import check_schema, exact_match, f1, json_match
from hocket.evaluation.sql import execution_match, run_query
from hocket.packages import strict_json
from hocket.text_limits import LAST_ROLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SQLITE: Final = "sqlite"
"""The key of a row under which the script of its database is."""
SCHEMA: Final = "schema"
"""The key of a row under which the schema of its answer is."""
_REFERENCE_BYTES_MAX: Final = 2**18


class Metric(StrEnum):
    """How answers are scored."""

    EXACT = "exact"
    F1 = "f1"
    SQL = "sql"
    JSON = "json"


METRICS: Final = ("auto", *Metric)
"""What may be asked for; `auto` lets each row decide."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what is right.

    Attributes:
        line: Of its row.
        format: Of its row: whether a prompt is put to whoever answers, or a conversation.
        turns: The conversation so far: `{"role", "content"}` each.
        reference: The right answer.
        metric: How answers are scored.
        stratum: What it belongs to in reports.
        expert: Whom it is for, where the row says.
        script: The database that SQL is run on.
        schema: What JSON has to fit.
    """

    line: int
    format: Format
    turns: tuple[Mapping[str, str], ...]
    reference: str
    metric: Metric
    stratum: str
    expert: str
    script: str
    schema: Mapping[str, Any] | None

    def score(self, answer: str) -> float:
        """How good an answer is, 0 to 1. Never raises, and takes bounded time."""
        match self.metric:
            case Metric.EXACT:
                return float(exact_match(answer, self.reference))
            case Metric.F1:
                return f1(answer, self.reference)
            case Metric.SQL:
                return float(execution_match(answer, self.reference, self.script))
            case Metric.JSON:
                return float(json_match(answer, self.reference, self.schema).right)


def questions(rows: Iterable[Row], *, metric: str = "auto", by: str | None = None) -> Iterator[Question]:
    """The questions of a dataset. What could not be scored is found here, before anybody is asked.

    Args:
        rows: Of prompts or conversations.
        metric: One of `METRICS`. `auto` runs SQL for a row with `sqlite`, compares JSON for one with `schema`, or
            whose answer is a JSON object or list, and text otherwise.
        by: The key whose values are strata.

    Raises:
        HocketError: `BAD_REQUEST` for another metric; `BAD_DATASET` for plain text, a row without the key, a
            conversation in which nobody asks, a database or a reference that fails.
    """
    if metric not in METRICS:
        raise HocketError(Reason.BAD_REQUEST, f"{metric!r:.40} is no metric: choose one of {', '.join(METRICS)}")
    for row in rows:
        try:
            yield _question(row, metric, by)
        except HocketError as error:
            raise error.restated(f"line {row.line}: {error.message}", line=str(row.line)) from error


def _question(row: Row, metric: str, by: str | None) -> Question:
    if row.format is Format.TEXT:
        raise HocketError(Reason.BAD_DATASET, "plain text asks nothing: give prompts or messages")
    if row.question[-1]["role"] not in LAST_ROLES:
        raise HocketError(Reason.BAD_DATASET, f"the turn before the answer must be of {' or '.join(LAST_ROLES)}")
    chosen = _chosen(row) if metric == "auto" else Metric(metric)
    script, schema, expert = row.document.get(SQLITE, ""), row.document.get(SCHEMA), row.document.get("expert", "")
    if not isinstance(script, str) or not isinstance(expert, str):
        raise HocketError(Reason.BAD_DATASET, f"{SQLITE!r} and 'expert' are texts")
    if chosen is Metric.SQL:
        if not script:
            raise HocketError(Reason.BAD_DATASET, f"SQL is run on the database that {SQLITE!r} holds: it is missing")
        try:
            run_query(script, row.answer)
        except HocketError as error:
            raise HocketError(Reason.BAD_DATASET, f"the reference cannot be run: {error.message}") from error
    if chosen is Metric.JSON:
        if schema is not None:
            check_schema(schema)
        json_match("", row.answer, schema)
    return Question(
        line=row.line,
        format=row.format,
        turns=row.question,
        reference=row.answer,
        metric=chosen,
        stratum="" if by is None else stratum(row, by),
        expert=expert,
        script=script,
        schema=schema,
    )


def _chosen(row: Row) -> Metric:
    if SQLITE in row.document:
        return Metric.SQL
    if SCHEMA in row.document or row.answer.lstrip()[:1] in ("{", "["):
        return Metric.JSON if SCHEMA in row.document or _is_json(row.answer) else Metric.EXACT
    return Metric.EXACT


def _is_json(text: str) -> bool:
    try:
        strict_json.loads(text.strip().encode(), what="it", bytes_max=_REFERENCE_BYTES_MAX, depth_max=64)
    except HocketError:
        return False
    return True
