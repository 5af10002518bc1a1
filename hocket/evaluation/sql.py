"""SQL scored by what it finds: run on SQLite, in memory, and the rows compared.

Scripts and queries come from datasets and from models, so both are hostile. A database lives for one query, sees no
file (`ATTACH`, `PRAGMA`, virtual tables, triggers and extensions are not authorised), and a query may only read. Steps,
time, sizes of values, patterns and results are bounded.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.evaluation.scores import unfenced

if TYPE_CHECKING:
    from collections.abc import Callable

SqlRows: TypeAlias = "list[tuple[Any, ...]]"
"""Rows of a result: None, int, float, str or bytes."""


@dataclass(frozen=True, slots=True)
class SqlLimits:
    """What a script and a query may take.

    Attributes:
        script_bytes: Most bytes of the script.
        query_bytes: Most bytes of the query.
        steps: Most steps of SQLite's virtual machine, for each of the two.
        seconds: Most time, for each of the two.
        value_bytes: Most bytes of a value, and of a row.
        database_bytes: Most bytes of the database.
        rows: Most rows of a result.
        result_bytes: Most bytes of a result, in all values.
        pattern_bytes: Most bytes of a LIKE or GLOB pattern.
        depth: Most expressions inside each other.
        columns: Most columns of a table or a result.
    """

    script_bytes: int = 2**20
    query_bytes: int = 2**14
    steps: int = 5_000_000
    seconds: float = 2.0
    value_bytes: int = 2**13
    database_bytes: int = 2**25
    rows: int = 10_000
    result_bytes: int = 2**22
    pattern_bytes: int = 64
    depth: int = 100
    columns: int = 128


SQL_LIMITS: Final = SqlLimits()

_PAGE_BYTES: Final = 4096
_STEPS_BETWEEN: Final = 100  # string functions take their time within one
_READING: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_BUILDING: Final = _READING | {
    sqlite3.SQLITE_ALTER_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_VIEW,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_REINDEX,
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_UPDATE,
}
_FORBIDDEN_FUNCTIONS: Final = frozenset({"load_extension", "fts3_tokenizer"})
_HIDDEN: Final = re.compile(
    r"""'(?:[^']|'')*+'?|"(?:[^"]|"")*+"?|`[^`]*+`?|\[[^\]]*+\]?|--[^\n]*|/\*.*?(?:\*/|\Z)""", re.DOTALL
)
"""Strings, quoted names and comments."""
_BRACKETED: Final = re.compile(r"\([^()]*+\)")
_ORDERED: Final = re.compile(r"\border\s+by\b", re.IGNORECASE)
_SIGNIFICANT_DIGITS: Final = 9
_FAILURES: Final = (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError)
"""What sqlite3 raises for text that it cannot run, and for values that are too large."""


def run_query(script: str, query: str, limits: SqlLimits = SQL_LIMITS) -> SqlRows:
    """The rows that a query finds in the database that a script makes.

    Args:
        script: Statements that make tables and fill them.
        query: One statement that reads.
        limits: What both may take.

    Raises:
        HocketError: `BAD_DATASET` if the script fails, is not allowed or takes too much; `BAD_REQUEST` if the query
            does, `TOO_LARGE` if it finds too much.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)) as database:
        database.execute(f"PRAGMA max_page_count = {limits.database_bytes // _PAGE_BYTES}")
        for category, bound in (
            (sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.script_bytes),
            (sqlite3.SQLITE_LIMIT_COLUMN, limits.columns),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, limits.depth),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
            (sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 32),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, limits.pattern_bytes),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            database.setlimit(category, bound)
        try:
            _guard(database, _BUILDING, limits)
            database.executescript(script)
        except _FAILURES as error:
            raise HocketError(Reason.BAD_DATASET, f"the script that makes the database fails: {error}") from error
        database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.query_bytes)
        try:
            _guard(database, _READING, limits)
            cursor = database.execute(query)
            if cursor.description is None:
                raise HocketError(Reason.BAD_REQUEST, "the query says nothing")
            return _fetched(cursor, limits)
        except _FAILURES as error:
            raise HocketError(Reason.BAD_REQUEST, f"the query fails: {error}") from error


def execution_match(answer: str, reference: str, script: str, limits: SqlLimits = SQL_LIMITS) -> bool:
    """Whether an answer in SQL finds what the reference finds.

    Columns are compared in their order and not by name; rows in their order where the reference has an ORDER BY of its
    own (not of a part in brackets), otherwise as a multiset; numbers by their first nine digits, 1 is 1.0. A fence of
    Markdown around the answer is no part of it. An answer that fails, writes or takes too much is wrong.

    Raises:
        HocketError: `BAD_DATASET` if the script or the reference fails.
    """
    try:
        wanted = run_query(script, reference, limits)
    except HocketError as error:
        raise HocketError(Reason.BAD_DATASET, f"the reference does not run: {error.message}") from error
    try:
        found = run_query(script, unfenced(answer), limits)
    except HocketError:
        return False
    ours, theirs = ([tuple(map(_comparable, row)) for row in rows] for rows in (found, wanted))
    return ours == theirs if is_ordered(reference) else Counter(ours) == Counter(theirs)


def is_ordered(query: str) -> bool:
    """Whether a query has an ORDER BY that is not in brackets."""
    bare = _HIDDEN.sub(" ", query)
    while (outer := _BRACKETED.sub(" ", bare)) != bare:
        bare = outer
    return _ORDERED.search(bare) is not None


def _guard(database: sqlite3.Connection, allowed: frozenset[int], limits: SqlLimits) -> None:
    """Let nothing but this happen, and end it after its steps or its time."""

    def authorise(action: int, *details: str | None) -> int:
        if action not in allowed or (action == sqlite3.SQLITE_FUNCTION and details[1] in _FORBIDDEN_FUNCTIONS):
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    database.set_authorizer(authorise)
    database.set_progress_handler(_ending(limits), _STEPS_BETWEEN)


def _ending(limits: SqlLimits) -> Callable[[], int]:
    deadline = time.monotonic() + limits.seconds
    calls_left = limits.steps // _STEPS_BETWEEN

    def ends() -> int:
        nonlocal calls_left
        calls_left -= 1
        return int(calls_left < 0 or time.monotonic() > deadline)

    return ends


def _fetched(cursor: sqlite3.Cursor, limits: SqlLimits) -> SqlRows:
    rows: SqlRows = []
    size = 0
    for row in cursor:
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) == limits.rows or size > limits.result_bytes:
            raise HocketError(Reason.TOO_LARGE, f"the query finds more than {limits.rows} rows, or too much in them")
        rows.append(row)
    return rows


def _comparable(value: Any) -> Any:  # noqa: ANN401 - a value of SQLite
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
