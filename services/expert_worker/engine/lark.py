"""Grammars for llguidance, which reads a dialect of Lark.

llguidance has a lexer: it divides a text into terminals, each as long as it can be where it stands, and parses those.
GBNF knows only characters. So what becomes one terminal decides which texts are left, and as little as possible does:
words of literals, other characters of literals one by one, repeated classes, and what a repeated class would leave
nothing to, together with it. What is lost is a text in which a repetition stops although it could go on, or a word is
the beginning of another that could stand there: with `names ws "FROM"`, where `ws` may be empty, `aFROM` is one more
name. Everything that is accepted is of the grammar.

A rule that ends with itself (`list ::= item | item "," list`) becomes a repetition: the work for a text's next token
does not grow with its length then.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from hocket.packages.expert.gbnf import (
    ROOT,
    Choice,
    Class,
    Reference,
    Repeat,
    Series,
    Text,
    choice,
    closure,
    read,
    references,
    series,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hocket.packages.expert.gbnf import Node, Rules

HEADER: Final = '%llguidance {"no_forcing": true}'
"""Where a text can only go on in one way, llguidance would allow no other tokens than those that the tokenizer makes of
it: of the name of a special token that one, by which an answer would end, or show nothing."""
_WORDS: Final = re.compile(r"\w+|\W")


def to_lark(grammar: str) -> str:
    """A grammar in GBNF, for llguidance.

    Raises:
        HocketError: `BAD_GRAMMAR` as `gbnf.read`.
    """
    return _Writer({name: _without_tail(name, node) for name, node in read(grammar).items()}).text()


def _without_tail(name: str, rule: Node) -> Node:
    """A rule that ends with itself, as a repetition: `x ::= x | a | b x` is `x ::= b* a`."""
    itself = Reference(name)
    nodes = rule.nodes if isinstance(rule, Choice) else (rule,)
    tailed = [node for node in nodes if isinstance(node, Series) and node.nodes[-1:] == (itself,)]
    heads = [series(node.nodes[:-1]) for node in tailed]
    others = [node for node in nodes if node != itself and node not in tailed]
    if any(name in references(head) for head in heads):
        return choice([*tailed, *others])
    return series([Repeat(choice(heads), 0, None), choice(others)]) if heads else choice(others)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the texts of a node may be. Sets of characters are bits.

    Attributes:
        empty: Whether one is empty.
        single: Whether all are one character.
        first: What may come first.
        lone: What may be all of it, repetitions left out.
        tail: What its last terminal could swallow, were it to come next.
    """

    empty: bool
    single: bool
    first: int
    lone: int
    tail: int


class _Writer:
    """Writes Lark.

    Rules become rules (`r0`), what they repeat a rule of its own (`q0`); what is one terminal is called `T0`, and `N0`
    is a rule as a part of terminals.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._repeated: list[Node] = []
        self._terminals: list[str] = []
        self._parts: dict[str, None] = {}
        """Rules that are parts of terminals, in the order in which they are written."""
        borders = sorted({border for node in rules.values() for border in _borders(node)})
        self._bits = {border: bit for bit, border in enumerate(borders)}
        self._ones = {1 << bit for bit, (begin, end) in enumerate(pairwise(borders)) if end == begin + 1}
        """Sets of one character."""
        self._facts: dict[int, _Facts] = {}
        """Of nodes that may become terminals, by their ids: those that are no part of themselves, and repeat nothing
        that always begins alike. A terminal that can only go on, by one character, llguidance follows for ever."""
        closure(rules, lambda node, _: self._facts_of(node) is not None)

    def text(self) -> str:
        """The grammar."""
        lines = [HEADER, f"start: r{self._numbers[ROOT]}"]
        lines += [f"r{self._numbers[name]}: {self._rule(node)}" for name, node in self._rules.items()]
        written = 0
        while written < len(self._repeated):  # as below
            lines.append(f"q{written}: {self._rule(self._repeated[written])}")
            written += 1
        lines += self._terminals
        written = 0
        while written < len(self._parts):  # writing one may need more of them
            name = [*self._parts][written]
            lines.append(f"N{self._numbers[name]}: {self._part(self._rules[name])}")
            written += 1
        return "\n".join([*lines, ""])

    def _rule(self, node: Node) -> str:
        """A node as a part of a rule."""
        match node:
            case Reference(name):
                return f"r{self._numbers[name]}"
            case Series(nodes):
                groups = self._groups(nodes)
                words = [
                    self._rule(group[0]) if len(group) == 1 else self._terminal(Series(tuple(group)))
                    for group in groups
                ]
                return " ".join(words) or '""'
            case Choice(nodes):
                return f"({' | '.join(map(self._rule, nodes))})"
            case Repeat(repeated):
                facts = self._facts_of(node)
                if facts is not None and facts.lone:
                    return self._terminal(node)
                # A rule of its own: of a repeated literal llguidance would make a terminal.
                self._repeated.append(repeated)
                return _times(f"q{len(self._repeated) - 1}", node)
            case _:
                return _characters(node)

    def _groups(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """The parts of a series; each of several nodes has to be one terminal."""
        groups: list[list[Node]] = []
        before: _Facts | None = None
        for node in nodes:
            facts = self._facts_of(node)
            if before is not None and facts is not None and _is_swallowed(before, facts):
                groups[-1].append(node)
            else:
                groups.append([node])
            before = facts
        return groups

    def _terminal(self, node: Node) -> str:
        name = f"T{len(self._terminals)}"
        self._terminals.append(f"{name}: {self._part(node)}")
        return name

    def _part(self, node: Node) -> str:
        """A node as a part of a terminal."""
        match node:
            case Reference(name):
                self._parts.setdefault(name)
                return f"N{self._numbers[name]}"
            case Series(nodes):
                return " ".join(map(self._part, nodes)) or '""'
            case Choice(nodes):
                return f"({' | '.join(map(self._part, nodes))})"
            case Repeat(repeated):
                return _times(self._part(repeated), node)
            case _:
                return _characters(node)

    def _facts_of(self, node: Node) -> _Facts | None:
        """None for what cannot become a terminal."""
        if isinstance(node, Reference):
            return self._facts.get(id(self._rules[node.name]))
        facts = self._facts.get(id(node))
        if facts is None:
            facts = self._find_facts(node)
            if facts is not None:
                self._facts[id(node)] = facts
        return facts

    def _find_facts(self, node: Text | Class | Repeat | Series | Choice) -> _Facts | None:
        match node:
            case Text(text):
                first = self._mask([_one(text[0])])
                single = len(text) == 1
                return _Facts(empty=False, single=single, first=first, lone=first if single else 0, tail=0)
            case Class(ranges):
                mask = self._mask(ranges)
                return _Facts(empty=False, single=True, first=mask, lone=mask, tail=mask)
            case Repeat(repeated, least, most):
                facts = self._facts_of(repeated)
                if facts is None or (most != 1 and facts.first in self._ones):
                    return None
                return _Facts(
                    empty=facts.empty or not least,
                    single=False,
                    first=facts.first,
                    lone=facts.lone,
                    tail=facts.tail | (0 if most == 1 else facts.lone),
                )
            case Series(nodes) | Choice(nodes):
                parts = [facts for each in nodes if (facts := self._facts_of(each)) is not None]
                if len(parts) < len(nodes):
                    return None
                return _one_after_other(parts) if isinstance(node, Series) else _one_of(parts)

    def _mask(self, ranges: Iterable[tuple[int, int]]) -> int:
        return sum((1 << self._bits[last + 1]) - (1 << self._bits[first]) for first, last in ranges)


def _is_swallowed(before: _Facts, after: _Facts) -> bool:
    """Whether two nodes have to be one terminal: the first would leave nothing to the second, or is only its beginning.

    The beginning of a name: alone it would lose against every literal that begins with it.
    """
    return bool(before.tail & after.first) and (before.single or not after.empty)


def _one_after_other(parts: Sequence[_Facts]) -> _Facts:
    first = 0
    for each in reversed(parts):
        first = each.first | (first if each.empty else 0)
    empty = all(each.empty for each in parts)
    return _Facts(empty=empty, single=False, first=first, lone=0, tail=parts[-1].tail if parts else 0)


def _one_of(parts: Sequence[_Facts]) -> _Facts:
    first = lone = tail = 0
    for each in parts:
        first, lone, tail = first | each.first, lone | each.lone, tail | each.tail
    empty, single = any(each.empty for each in parts), all(each.single for each in parts)
    return _Facts(empty=empty, single=single, first=first, lone=lone, tail=tail)


def _one(character: str) -> tuple[int, int]:
    return ord(character), ord(character)


def _borders(node: Node) -> Iterator[int]:
    """Where the ranges of a node begin, and where they have ended."""
    match node:
        case Text(text):
            ranges: Sequence[tuple[int, int]] = [_one(text[0]), _one(text[-1])]
        case Class(own):
            ranges = own
        case Series(nodes) | Choice(nodes):
            for each in nodes:
                yield from _borders(each)
            return
        case Repeat(repeated):
            yield from _borders(repeated)
            return
        case _:
            return
    for first, last in ranges:
        yield from (first, last + 1)


def _characters(node: Text | Class) -> str:
    """A literal or a class in Lark."""
    if isinstance(node, Text):
        return " ".join(json.dumps(word) for word in _WORDS.findall(node.text))
    ranges = [rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in node.ranges]
    return f"/[{''.join(ranges)}]/"


def _times(text: str, repeat: Repeat) -> str:
    """What is repeated, in Lark."""
    return f"({text}){{{repeat.least},{'' if repeat.most is None else repeat.most}}}"
