"""Ask a SQLite file a question: an expert writes the SQL, SQLite runs it, and the rows are shown.

    python -m examples.use_cases.query examples/use_cases/films.db "For all films with rating over 7, give the title."

The expert is told tables and columns, never a row. What it writes is a model's text, so it may read this file and
nothing else: the file is opened for reading, and statements that do more, run for long or make much are refused.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from examples.use_cases.asking import answers, arguments, plain, run, who

if TYPE_CHECKING:
    from hocket.client import RouterClient

_READS: Final = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION})
_TABLES: Final = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name"
_ROWS_MAX: Final = 100
_SECONDS_MAX: Final = 5.0
_STEPS_BETWEEN_LOOKS: Final = 10_000
_VALUE_BYTES_MAX: Final = 1_000_000
_TOKENS_MAX: Final = 96


def opened(database: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)


def schema(database: Path) -> str:
    """The tables, as the expert has learnt to read them: `Table films (title text, year integer)`, one a line."""
    with closing(opened(database)) as connection:
        lines = []
        for (table,) in connection.execute(_TABLES).fetchall():
            columns = connection.execute("SELECT name, type FROM pragma_table_info(?)", (table,))
            said = ", ".join(f"{name} {'integer' if 'INT' in kind.upper() else 'text'}" for name, kind in columns)
            lines.append(f"Table {table} ({said})")
    return "\n".join(lines)


def rows(database: Path, statement: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run a statement that only reads.

    Returns:
        Names of columns, and at most a hundred rows.

    Raises:
        sqlite3.Error: SQLite refuses it, or it was stopped.
        sqlite3.Warning: It is several statements.
    """
    end = time.monotonic() + _SECONDS_MAX
    with closing(opened(database)) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES_MAX)
        connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS_BETWEEN_LOOKS)
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY)
        cursor = connection.execute(statement)
        return [column[0] for column in cursor.description or ()], cursor.fetchmany(_ROWS_MAX)


async def query(router: RouterClient, database: Path, question: str, *, as_json: bool) -> None:
    """Have SQL written, run it, and print what it finds."""
    [answer] = await answers(router, [f"{schema(database)}\n{question}"], {"sql": 1.0}, max_tokens=_TOKENS_MAX)
    statement = plain(answer.text)
    if not as_json:
        print(statement)
    try:
        columns, found = rows(database, statement)
    except (sqlite3.Error, sqlite3.Warning) as error:
        sys.exit(f"SQLite refuses {statement!r}: {error}")
    if as_json:
        print(json.dumps({"sql": statement, "columns": columns, "rows": found, "experts": who(answer)}, default=str))
        return
    for row in [columns, *found]:
        print("  " + " | ".join(plain(str(value)) for value in row))


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("database", type=Path, help="a SQLite file")
    parser.add_argument("question", help="name tables and columns as they are called")
    chosen = parser.parse_args()
    try:
        schema(chosen.database)
    except sqlite3.Error as error:
        parser.error(f"cannot read {chosen.database}: {error}")
    run(lambda router: query(router, chosen.database, chosen.question, as_json=chosen.json), chosen.router)


if __name__ == "__main__":
    main()
