"""A second reader of GBNF: Earley's algorithm over characters, as the notation defines it, slow and without a lexer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\n]*) | (?P<line>\r?\n) | (?P<rule>[\w-]+[ \t]*::=) | (?P<name>[\w-]+)
    | "(?P<text>(?:\\.|[^"\\])*)" | \[(?P<set>\^?(?:\\.|[^\]\\])*)\] | (?P<count>\{[\d,]+\}) | (?P<sign>[|()*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
Symbol: TypeAlias = "str | Callable[[str], bool]"
"""A rule's name, or which characters may stand here."""
_Item: TypeAlias = "tuple[str, tuple[Symbol, ...], int, int]"
"""A rule's name, one of its series, how much of that has been seen, and where it has begun."""


@dataclass
class Recogniser:
    """Tells texts of a grammar from others."""

    grammar: str
    rules: dict[str, list[tuple[Symbol, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokens = [token for token in _TOKEN.finditer(self.grammar) if token.lastgroup != "space"]
        self._place = self._made = 0
        while (token := self._peek()) is not None:
            self._place += 1
            if token.lastgroup != "line":
                self.rules[token[0].removesuffix("::=").strip()] = self._choice(depth=0)
        self._empty: set[str] = set()
        while True:
            more = {name for name, rule in self.rules.items() if any(self._is_empty(series) for series in rule)}
            if more == self._empty:
                break
            self._empty = more

    def accepts(self, text: str) -> bool:
        """Whether it is a text of the grammar."""
        items = self._after(text)
        return any(name == "root" and seen == len(series) and not begin for name, series, seen, begin in items)

    def begins(self, text: str) -> bool:
        """Whether a text could begin so."""
        return bool(self._after(text))

    def _is_empty(self, series: Sequence[Symbol]) -> bool:
        return all(isinstance(symbol, str) and symbol in self._empty for symbol in series)

    def _after(self, text: str) -> set[_Item]:
        columns: list[set[_Item]] = [{("root", series, 0, 0) for series in self.rules["root"]}]
        self._close(columns)
        for character in text:
            columns.append(
                {
                    (name, series, seen + 1, begin)
                    for name, series, seen, begin in columns[-1]
                    if seen < len(series) and callable(symbol := series[seen]) and symbol(character)
                }
            )
            self._close(columns)
        return columns[-1]

    def _close(self, columns: list[set[_Item]]) -> None:
        here = len(columns) - 1
        work = list(columns[here])
        while work:
            name, series, seen, begin = work.pop()
            found: list[_Item] = []
            if seen == len(series):
                found += [
                    (outer, its, at + 1, start)
                    for outer, its, at, start in columns[begin]
                    if at < len(its) and its[at] == name
                ]
            elif isinstance(symbol := series[seen], str):
                found += [(symbol, each, 0, here) for each in self.rules[symbol]]
                if symbol in self._empty:
                    found.append((name, series, seen + 1, begin))
            for item in found:
                if item not in columns[here]:
                    columns[here].add(item)
                    work.append(item)

    def _peek(self) -> re.Match[str] | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _choice(self, depth: int) -> list[tuple[Symbol, ...]]:
        found: list[tuple[Symbol, ...]] = []
        series: list[Symbol] = []
        fresh = True
        while (token := self._peek()) is not None and token[0] != ")" and token.lastgroup != "rule":
            if token.lastgroup == "line":
                following = [each for each in self._tokens[self._place :] if each.lastgroup != "line"][:1]
                if not depth and not fresh and (not following or following[0][0] != "|"):
                    break
                self._place += 1
            elif token[0] == "|":
                self._place += 1
                found.append(tuple(series))
                series, fresh = [], True
            else:
                series += self._repeated(self._symbols(depth))
                fresh = False
        return [*found, tuple(series)]

    def _symbols(self, depth: int) -> list[Symbol]:
        token = self._tokens[self._place]
        self._place += 1
        if token["text"] is not None:
            return [_one_of({character}) for character in _unescaped(token["text"])]
        if token["set"] is not None:
            return [_set(token["set"])]
        if token["sign"] == ".":
            return [lambda _: True]
        if token["sign"] == "(":
            inner = self._choice(depth + 1)
            self._place += 1
            return [self._rule(inner)]
        return [token["name"]]

    def _repeated(self, symbols: list[Symbol]) -> list[Symbol]:
        token = self._peek()
        if token is None or (token["count"] is None and token["sign"] not in ("*", "+", "?")):
            return symbols
        self._place += 1
        if token["count"] is None:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[token[0]]
        else:
            first, comma, last = token[0].strip("{}").partition(",")
            least, most = int(first), (int(last) if last else None) if comma else int(first)
        if most is not None:
            optional = self._rule([tuple(symbols), ()])
            return [*symbols * least, *[optional] * (most - least)]
        rest = self._rule([])
        self.rules[rest] += [(rest, *symbols), ()]
        return [*symbols * least, rest]

    def _rule(self, series: list[tuple[Symbol, ...]]) -> str:
        self._made += 1
        self.rules[f"/{self._made}"] = series
        return f"/{self._made}"


def _unescaped(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        digits = match[1] or match[2] or match[3]
        return chr(int(digits, 16)) if digits else {"n": "\n", "r": "\r", "t": "\t"}.get(match[4], match[4])

    return _ESCAPE.sub(one, text)


def _one_of(characters: set[str]) -> Callable[[str], bool]:
    return lambda character: character in characters


def _set(text: str) -> Callable[[str], bool]:
    units = [match[0] for match in re.finditer(r"\\(?:x..|u.{4}|U.{8}|.)|.", text.removeprefix("^"), re.DOTALL)]
    ranges = []
    while units:
        first = last = _unescaped(units.pop(0))
        if len(units) > 1 and units[0] == "-":
            units.pop(0)
            last = _unescaped(units.pop(0))
        ranges.append((first, last))
    inside = not text.startswith("^")
    return lambda character: any(first <= character <= last for first, last in ranges) is inside


def published(name: str) -> str:
    """The grammar of a published expert: sql, neo4j, json or elastic."""
    folder = os.environ.get("HOCKET_FIXTURES")
    if not folder:
        pytest.skip("HOCKET_FIXTURES names no folder with published packages")
    return (Path(folder) / "expert" / f"expert-{name}" / "grammar.gbnf").read_text()


def bits(mask: Any) -> list[int]:
    """The tokens that a mask allows."""
    import numpy as np  # noqa: PLC0415 - beside its only use

    return [int(token_id) for token_id in np.flatnonzero(np.unpackbits(mask, bitorder="little"))]
