"""Grammars in GBNF, the notation of llama.cpp: rules of characters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.text_limits import CONSTRAINT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

_RULES_MAX: Final = 1000
_DEPTH_MAX: Final = 32
_REPEAT_MAX: Final = 2000
_BRANCHES_MAX: Final = 500
"""Alternatives with rules in them. Where all of them can stand at one place, the parser's work for a character grows
with their number's cube."""
ROOT: Final = "root"
"""The rule to begin with."""
_LAST_CHARACTER: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}
_REPEATS: Final = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_QUOTED_CHARS: Final = 40
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_RULE: Final = re.compile(r"[A-Za-z0-9_-]+[ \t]*::=")
_NUMBER: Final = re.compile(rf"[0-9]{{1,{len(str(_REPEAT_MAX))}}}")
_BLANKS: Final = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES: Final = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")


@dataclass(frozen=True, slots=True)
class Text:
    """A literal, not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Class:
    """Any one character of these ranges, which ascend and do not touch; none at all if there are none."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """What another rule says."""

    name: str


@dataclass(frozen=True, slots=True)
class Series:
    """One after the other; nothing if there are none."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of them."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """So many times; any number from the least on if there is no most."""

    node: Node
    least: int
    most: int | None


Node: TypeAlias = "Text | Class | Reference | Series | Choice | Repeat"
Rules: TypeAlias = "dict[str, Node]"
"""What stands behind `::=`, by the name before it."""
NOTHING: Final = Series(())
"""The empty text."""


def series(nodes: Sequence[Node]) -> Node:
    """One after the other, those that are nothing left out."""
    parts = [node for node in nodes if node != NOTHING]
    return parts[0] if len(parts) == 1 else Series(tuple(parts))


def choice(nodes: Sequence[Node]) -> Node:
    """One of them, of at least one."""
    return nodes[0] if len(nodes) == 1 else Choice(tuple(nodes))


def read(grammar: str) -> Rules:
    """The rules of a grammar, without those and the alternatives that no text comes to.

    Args:
        grammar: Rules `name ::= ...`, of which one is `root`. Literals, character classes, `.`, groups, `|`, `*`, `+`,
            `?`, `{m}`, `{m,}`, `{m,n}`, comments; rules may go on over lines after `::=`, before and after `|`, and in
            groups, be left-recursive, and have empty alternatives.

    Raises:
        HocketError: `BAD_GRAMMAR` if it is none, uses what it does not define, is larger than 64 KiB, 1,000 rules, 500
            alternatives with rules in them, 32 nested groups or 2,000 repetitions, or if no text could ever satisfy it.
    """
    if len(grammar.encode()) > CONSTRAINT_BYTES_MAX:
        raise _refusal(f"it is larger than {CONSTRAINT_BYTES_MAX} bytes")
    return _without_dead_ends(_Reader(grammar).rules())


def problem_of(grammar: str) -> str | None:
    """Why answers cannot follow a grammar; None if they can, as far as that shows without a tokenizer."""
    try:
        read(grammar)
    except HocketError as error:
        return error.message
    return None


def _refusal(why: str) -> HocketError:
    """What a grammar that cannot be used is refused with."""
    return HocketError(Reason.BAD_GRAMMAR, f"the grammar cannot be used: {why}")


def references(node: Node) -> Iterator[str]:
    """The rules that a node names, each as often as it does."""
    match node:
        case Reference(name):
            yield name
        case Series(nodes) | Choice(nodes):
            for each in nodes:
                yield from references(each)
        case Repeat(repeated):
            yield from references(repeated)


def _branches(node: Node) -> int:
    """Alternatives with rules in them."""
    match node:
        case Choice(nodes):
            return sum(map(_branches, nodes)) + sum(next(references(each), None) is not None for each in nodes)
        case Series(nodes):
            return sum(map(_branches, nodes))
        case Repeat(repeated):
            return _branches(repeated)
        case _:
            return 0


def closure(rules: Rules, holds: Callable[[Node, Container[str]], bool]) -> dict[str, None]:
    """The rules for which something holds that may depend on its holding for others, those it depends on first."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, node in rules.items():
        for each in {*references(node)}:
            users[each].append(name)
    found: dict[str, None] = {}
    waiting = [*rules]
    while waiting:
        name = waiting.pop()
        if name not in found and holds(rules[name], found):
            found[name] = None
            waiting += users[name]
    return found


def _without_dead_ends(rules: Rules) -> Rules:
    """What a text can consist of: no alternative that never ends, and no rule that nobody names."""
    ending = closure(rules, lambda node, ending: _ending(node, ending) is not None)
    if ROOT not in ending:
        raise _refusal("no text could ever satisfy it")
    left: Rules = {}
    names = [ROOT]
    while names:
        name = names.pop()
        if name not in left and (node := _ending(rules[name], ending)) is not None:
            left[name] = node
            names += references(node)
    return left


def _ending(node: Node, ending: Container[str]) -> Node | None:
    """A node without what never ends; None if nothing is left."""
    match node:
        case Class(ranges):
            return node if ranges else None
        case Reference(name):
            return node if name in ending else None
        case Series(nodes) | Choice(nodes):
            parts = [part for each in nodes if (part := _ending(each, ending)) is not None]
            enough = parts if isinstance(node, Choice) else len(parts) == len(nodes)
            return (choice if isinstance(node, Choice) else series)(parts) if enough else None
        case Repeat(repeated, least, most):
            part = _ending(repeated, ending)
            if (part is None or most == 0) and not least:
                return NOTHING
            return part and Repeat(part, least, most)
        case _:
            return node


class _Reader:
    """Reads GBNF. The methods read what their name says at the place where the last one stopped."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._depth = 0

    def rules(self) -> Rules:
        rules: Rules = {}
        self._skip(lines=True)
        while self._place < len(self._text):
            name = self._name()
            self._skip()
            if not self._take("::="):
                self._fail("expected ::= after the name of a rule")
            if name in rules:
                self._fail(f"the rule {name[:_QUOTED_CHARS]!r} is there twice")
            if len(rules) == _RULES_MAX:
                self._fail(f"more than {_RULES_MAX} rules")
            rules[name] = self._choice()
            self._skip(lines=True)
        wanted = {ROOT}.union(*map(references, rules.values()))
        for name in sorted(wanted - rules.keys()):
            raise _refusal(f"there is no rule {name[:_QUOTED_CHARS]!r}")
        if sum(map(_branches, rules.values())) > _BRANCHES_MAX:
            raise _refusal(f"more than {_BRANCHES_MAX} alternatives with rules in them")
        return rules

    def _choice(self) -> Node:
        nodes = [self._series()]
        while self._at_bar():
            self._take("|")
            nodes.append(self._series())
        return choice(nodes)

    def _at_bar(self) -> bool:
        """Whether another alternative comes, maybe on one of the next lines."""
        place = self._place
        self._skip(lines=True)
        if self._text.startswith("|", self._place):
            return True
        self._place = place
        return False

    def _series(self) -> Node:
        nodes: list[Node] = []
        begin = self._place
        self._skip(lines=True)
        if not self._depth and _RULE.match(self._text, self._place):
            self._place = begin  # the alternative is empty, and the next rule comes
        while (node := self._item()) is not None:
            nodes.append(self._repeated(node))
            self._skip(lines=self._depth > 0)
        return series(nodes)

    def _item(self) -> Node | None:
        """The next thing of a series; None at its end."""
        if self._take('"'):
            return self._literal()
        if self._take("["):
            return self._class()
        if self._take("."):
            return Class(_ranges([(0, _LAST_CHARACTER)]))
        if self._take("("):
            return self._group()
        if _NAME.match(self._text, self._place):
            return Reference(self._name())
        if self._text[self._place : self._place + 1] not in ("", "\n", "\r", "|", ")"):
            self._fail("unexpected character")
        return None

    def _group(self) -> Node:
        if self._depth == _DEPTH_MAX:
            self._fail(f"more than {_DEPTH_MAX} groups inside each other")
        self._depth += 1
        node = self._choice()
        self._depth -= 1
        self._skip(lines=True)
        if not self._take(")"):
            self._fail("expected )")
        return node

    def _literal(self) -> Node:
        characters = []
        while not self._take('"'):
            code = self._character()
            if _SURROGATES[0] <= code <= _SURROGATES[1]:
                self._fail("half of a surrogate pair is no character")
            characters.append(chr(code))
        return Text("".join(characters)) if characters else NOTHING

    def _class(self) -> Node:
        negated = self._take("^")
        ranges = []
        while not self._take("]"):
            first = last = self._character()
            if self._text.startswith("-", self._place) and not self._text.startswith("-]", self._place):
                self._place += 1
                last = self._character()
            if last < first:
                self._fail("a range ends before it begins")
            ranges.append((first, last))
        return Class(_complement(_ranges(ranges)) if negated else _ranges(ranges))

    def _character(self) -> int:
        if self._place == len(self._text) or self._text[self._place] in "\r\n":
            self._fail("a literal or a class does not end")
        self._place += 1
        character = self._text[self._place - 1]
        if character != "\\":
            return ord(character)
        escape = self._text[self._place : self._place + 1]
        self._place += 1
        if escape in _ESCAPES:
            return ord(_ESCAPES[escape])
        digits = self._text[self._place : self._place + _HEX_DIGITS.get(escape, 0)]
        self._place += len(digits)
        try:
            code = int(digits, 16) if digits.isalnum() and len(digits) == _HEX_DIGITS[escape] else -1
        except (KeyError, ValueError):
            code = -1
        if not 0 <= code <= _LAST_CHARACTER:
            self._fail(r"an escape that is none of \n \r \t \\ \" \[ \] \xHH \uHHHH \UHHHHHHHH")
        return code

    def _repeated(self, node: Node) -> Node:
        """What was just read, as often as is said after it."""
        self._skip(lines=self._depth > 0)
        character = self._text[self._place : self._place + 1]
        if character in _REPEATS:
            self._place += 1
            least, most = _REPEATS[character]
        elif self._take("{"):
            least, most = self._counts()
        else:
            return node
        self._skip(lines=self._depth > 0)
        if self._text[self._place : self._place + 1] in ("*", "+", "?", "{"):
            self._fail("two repetitions of the same: put the first into a group")
        return Repeat(node, least, most)

    def _counts(self) -> tuple[int, int | None]:
        least = self._number()
        most: int | None = least
        if self._take(","):
            most = None if self._text.startswith("}", self._place) else self._number()
        if not self._take("}"):
            self._fail("expected }")
        if max(least, most or 0) > _REPEAT_MAX or (most is not None and most < least):
            self._fail(f"a repetition is {{m}}, {{m,}} or {{m,n}} with m not above n and both at most {_REPEAT_MAX}")
        return least, most

    def _number(self) -> int:
        found = _NUMBER.match(self._text, self._place)
        if found is None:
            self._fail(f"expected a number of at most {_REPEAT_MAX}")
        self._place = found.end()
        return int(found[0])

    def _name(self) -> str:
        found = _NAME.match(self._text, self._place)
        if found is None:
            self._fail("expected the name of a rule")
        self._place = found.end()
        return found[0]

    def _skip(self, *, lines: bool = False) -> None:
        """Go past blanks and comments, and past ends of lines where those end nothing."""
        found = (_LINES if lines else _BLANKS).match(self._text, self._place)
        self._place = self._place if found is None else found.end()

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._place):
            return False
        self._place += len(text)
        return True

    def _fail(self, why: str) -> NoReturn:
        line = self._text.count("\n", 0, self._place) + 1
        raise _refusal(f"line {line}: {why}")


def _ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same characters, ascending, each once, without surrogates, which no text has."""
    parts = []
    for first, last in ranges:
        parts += [(first, min(last, _SURROGATES[0] - 1)), (max(first, _SURROGATES[1] + 1), last)]
    united: list[tuple[int, int]] = []
    for first, last in sorted(part for part in parts if part[0] <= part[1]):
        if united and first <= united[-1][1] + 1:
            united[-1] = united[-1][0], max(united[-1][1], last)
        else:
            united.append((first, last))
    return tuple(united)


def _complement(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """All other characters."""
    borders = [(0, -1), *ranges, (_LAST_CHARACTER + 1, 0)]
    return _ranges((before[1] + 1, after[0] - 1) for before, after in pairwise(borders) if before[1] + 1 < after[0])
