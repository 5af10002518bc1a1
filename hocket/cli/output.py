"""What commands print: a table or a card for people, or one line of JSON for programs.

With `--json` standard output carries JSON objects alone, one a line, and a refusal is `{"error": {"reason",
"message"}}`, with `"file"` where one of several is to blame. What describes messages of the contract is their proto3
JSON, with the field names of `proto/hocket/v1`.
Everything for people that is not the answer itself goes to standard error.
"""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import COLOR_SYSTEMS, Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message
    from rich.style import Style

    from hocket.errors import HocketError

_PIPE_COLUMNS: Final = 1000
_AS_JSON: Final = "hocket.json"
_SHORT_HEX: Final = 12
BLAMED_FILE: Final = "file"
"""In a refusal's metadata: which of several files it is about."""


def _remember(context: typer.Context, *, value: bool) -> bool:
    context.meta[_AS_JSON] = value
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", callback=_remember)]
"""The option that every command has."""


def wants_json(context: typer.Context) -> bool:
    """Whether the command that runs, or has failed, was asked for JSON."""
    return bool(context.meta.get(_AS_JSON))


def emit(value: object) -> None:
    """Print one JSON value on a line of its own."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def message_json(message: Message) -> dict[str, Any]:
    """A message of the contract as JSON-able values, fields without a value included."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - commands on files do without protobuf

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def console(*, stderr: bool = False) -> Console:
    """Where text for people goes. Into a pipe lines are long rather than cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _PIPE_COLUMNS, highlight=False)


def plain(text: object, style: str | Style = "") -> Text:
    """Text from a file or a server, whose control characters must not reach the terminal."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return Text(visible, style=style)


def painted(text: str, style: Style) -> str:
    """Text with what a terminal needs to show it in a style: nothing where it shows no colours."""
    out = console()
    system = None if out.no_color or out.color_system is None else COLOR_SYSTEMS[out.color_system]
    return style.render(text, color_system=system)


def say(text: str, *, stderr: bool = False) -> None:
    """Print one line of plain text."""
    console(stderr=stderr).print(plain(text), soft_wrap=True)


def next_steps(*commands: Sequence[object]) -> None:
    """Print what to run next: the words of each command, on a line of its own as a shell takes it."""
    for place, words in enumerate(commands):
        say(f"{'      ' if place else 'Next: '}{shlex.join(map(str, words))}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table. Cells are values, or text with a style.

    A column whose name ends with `>` is aligned to the right; one whose name ends with `~` takes several lines where
    the terminal is narrow.
    """
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right, wraps = column.endswith(">"), column.endswith("~")
        name = column.rstrip(">~")
        grid.add_column(
            name, justify="right" if right else "left", no_wrap=not wraps, overflow="fold" if wraps else "ellipsis"
        )
    for row in rows:
        grid.add_row(*map(_cell, row))
    return grid


def card(title: str, pairs: Iterable[tuple[str, object]]) -> None:
    """Print a headline and a list of facts under it, a line each; those that are None are left out."""
    facts = [(name, _cell(value)) for name, value in pairs if value is not None]
    width = max(len(name) for name, _ in facts)
    out = console()
    out.print(plain(title, "bold"))
    for name, value in facts:  # not wrapped: a digest that a terminal breaks is still copied as one word
        out.print(Text.assemble("  ", (name.ljust(width), "dim"), "  ", value), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Print a table, or the sentence `empty` when it has no rows."""
    if rows:
        console().print(table(columns, rows))
    else:
        say(empty)


def short(identity: str) -> str:
    """A digest, expert or key id that people can compare at a glance: `sha256:0123456789ab`, `sha256:...#2`."""
    kind, colon, rest = identity.rpartition(":")
    hexadecimal, sharp, ordinal = rest.partition("#")
    return f"{kind}{colon}{hexadecimal[:_SHORT_HEX]}{sharp}{ordinal}"


def size(size_bytes: int) -> str:
    """A number of bytes for people: `1.5 MiB`."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:  # noqa: PLR2004 - the units' own ratio
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def bar(share: float, width: int = 20) -> str:
    """A share between 0 and 1 as a bar of `width` characters; of `#` where there is no Unicode."""
    share = max(0.0, min(1.0, share))
    if not (sys.stdout.encoding or "utf-8").lower().startswith("utf"):
        return ("#" * round(share * width)).ljust(width)
    eighths = round(share * width * 8)
    partial = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return ("█" * (eighths // 8) + partial).ljust(width)


def refusal_json(error: HocketError) -> dict[str, Any]:
    """A refusal as JSON-able values, as the module says."""
    blamed = {key: value for key, value in error.metadata.items() if key == BLAMED_FILE}
    return {"error": {"reason": str(error.reason), "message": error.message, **blamed}}


def refuse(error: HocketError, *, as_json: bool) -> None:
    """Print a refusal: for programs on standard output, for people on standard error."""
    if as_json:
        emit(refusal_json(error))
        return
    out = console(stderr=True)
    out.print(Text.assemble((f"{error.reason} ", "bold red"), plain(error.message)), soft_wrap=True)
    if error.retry_after_seconds is not None:
        out.print(f"It may work again in {error.retry_after_seconds:g} s.", style="dim")


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, bool):
        return plain("yes" if value else "no")
    return plain("-" if value is None or value == "" else value)
