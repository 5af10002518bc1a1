"""`router_hint`: a boolean expression over features of a text, as packages write it.

    database=sql OR query=sql AND NOT (length>2000)

A comparison is `key=value`, `key>number` or `key<number`. `NOT` binds tighter than `AND`, which binds tighter than
`OR`; parentheses group. Nothing is evaluated but this grammar, and an expression has a bounded size and depth.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from services.router.prompt_features import Tag

CHARS_MAX: Final = 1024
_TERMS_MAX: Final = 64
_DEPTH_MAX: Final = 16
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<mark>[()])|(?P<word>AND|OR|NOT)\b(?!\s*[=<>])|(?P<key>[\w.-]{1,64})\s*(?P<operator>[=<>])\s*"
    r"(?P<value>\"[^\"]{1,64}\"|[\w.+#-]{1,64}))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Term:
    """One comparison.

    Attributes:
        key: Lower-case.
        operator: `=`, `<` or `>`.
        value: Lower-case; a number, where the operator is not `=`.
    """

    key: str
    operator: str
    value: str


@dataclass(frozen=True, slots=True)
class Node:
    """`and`, `or` or `not` of what it holds."""

    operation: str
    parts: tuple[Expression, ...]


Expression: TypeAlias = "Term | Node"


def parse(text: str) -> Expression | None:
    """Read an expression; None for what is none, or is larger than ours may be."""
    if len(text) > CHARS_MAX:
        return None
    try:
        return _Parser(_tokens(text)).whole()
    except ValueError:
        return None


def terms(expression: Expression) -> Iterator[Term]:
    """Every comparison of an expression."""
    if isinstance(expression, Term):
        yield expression
    else:
        for part in expression.parts:
            yield from terms(part)


def wanted(expression: Expression, *, negated: bool = False) -> Iterator[Tag]:
    """The features that speak for an expression: those of `key=value` that stand under no `NOT`, or under two."""
    if isinstance(expression, Term):
        if expression.operator == "=" and not negated:
            yield expression.key, expression.value
    else:
        for part in expression.parts:
            yield from wanted(part, negated=negated != (expression.operation == "not"))


def holds(expression: Expression, is_there: Callable[[Tag], bool], numbers: Mapping[str, float]) -> bool:
    """Whether an expression is true of a text.

    Args:
        expression: What `parse` gave.
        is_there: Whether the text has the feature `(key, value)`.
        numbers: The text's own numbers; a comparison with one that it has not is false.
    """
    if isinstance(expression, Term):
        if expression.operator == "=":
            return is_there((expression.key, expression.value))
        number = numbers.get(expression.key)
        if number is None:
            return False
        return number > float(expression.value) if expression.operator == ">" else number < float(expression.value)
    match expression.operation:
        case "not":
            return not holds(expression.parts[0], is_there, numbers)
        case "and":
            return all(holds(part, is_there, numbers) for part in expression.parts)
        case _:
            return any(holds(part, is_there, numbers) for part in expression.parts)


def _tokens(text: str) -> list[str | Term]:
    found: list[str | Term] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(text)
        at = match.end()
        if match["key"] is None:
            found.append((match["mark"] or match["word"]).lower())
            continue
        term = Term(match["key"].lower(), match["operator"], match["value"].strip('"').lower())
        if term.operator != "=" and not math.isfinite(float(term.value)):
            raise ValueError(text)
        found.append(term)
    if sum(isinstance(token, Term) for token in found) > _TERMS_MAX:
        raise ValueError(text)
    return found


class _Parser:
    """Reads tokens by recursive descent.

    Every method raises `ValueError` where the grammar wants something else.
    """

    def __init__(self, tokens: Sequence[str | Term]) -> None:
        self._tokens = tokens
        self._at = 0

    def whole(self) -> Expression:
        expression = self._any_of(0)
        if self._at < len(self._tokens):
            raise ValueError(self._tokens[self._at])
        return expression

    def _any_of(self, depth: int) -> Expression:
        return self._joined("or", lambda: self._all_of(depth))

    def _all_of(self, depth: int) -> Expression:
        return self._joined("and", lambda: self._one(depth))

    def _joined(self, operation: str, part: Callable[[], Expression]) -> Expression:
        parts = [part()]
        while self._peek() == operation:
            self._at += 1
            parts.append(part())
        return parts[0] if len(parts) == 1 else Node(operation, tuple(parts))

    def _one(self, depth: int) -> Expression:
        part = self._peek()
        self._at += 1
        match part:
            case Term():
                return part
            case "not" if depth < _DEPTH_MAX:
                return Node("not", (self._one(depth + 1),))
            case "(" if depth < _DEPTH_MAX:
                inside = self._any_of(depth + 1)
                if self._peek() == ")":
                    self._at += 1
                    return inside
        raise ValueError(part)

    def _peek(self) -> str | Term | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None
