"""What the demo does with an answer beside judging it: runs the SQL, parses the JSON, tries the pattern."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from hocket.errors import HocketError
from hocket.evaluation import run_query
from training.starter import patterns

if TYPE_CHECKING:
    from examples.starter.prompts import Prompt

_ROWS_MAX = 6


def tried(prompt: Prompt, answer: str) -> list[str]:
    """What comes of an answer, in lines for people; nothing where an answer is all there is to see."""
    match prompt.task.name:
        case "sql":
            return _executed(prompt, answer)
        case "json":
            return [_parsed(answer)]
        case "regex":
            return [_matched(prompt, answer.strip())]
    return []


def _executed(prompt: Prompt, statement: str) -> list[str]:
    try:
        rows = run_query(prompt.example.facts["script"], statement)
    except HocketError as error:
        return [f"SQLite refuses it: {error.message}"]
    shown = [" | ".join(map(str, row)) for row in rows[:_ROWS_MAX]]
    more = [f"... and {len(rows) - _ROWS_MAX} more"] if len(rows) > _ROWS_MAX else []
    return [f"SQLite finds {len(rows)} row{'' if len(rows) == 1 else 's'}:", *(f"  {row}" for row in shown + more)]


def _parsed(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "this is no JSON"
    fields = value.items() if isinstance(value, dict) else ()
    return "parsed: " + ", ".join(f"{name} = {field!r} ({type(field).__name__})" for name, field in fields)


def _matched(prompt: Prompt, pattern: str) -> str:
    if not patterns.is_bounded(pattern):
        return "this is no pattern that may be tried"
    try:
        search = re.compile(pattern).search
    except re.error as error:
        return f"this is no pattern: {error}"
    texts = (*prompt.example.facts["match"], *prompt.example.facts["miss"])
    found, missed = ([text for text in texts if bool(search(text)) is wanted] for wanted in (True, False))
    return f"finds {', '.join(found) or 'nothing'}; does not find {', '.join(missed) or 'anything else'}"
