"""The task `cypher`: the schema of a property graph and a question become one Cypher statement.

A question names labels, properties, relations and values literally. The schema stands before it on one line; a
label's properties stand where it is met first, and the first of them is what its nodes are called by:

    Graph (Person {name, age})-[:KNOWS]->(Person), (Person)-[:LIVES_IN]->(City {name})
    List each Person that Anna knows.

    MATCH (a:Person {name: 'Anna'})-[:KNOWS]->(b:Person) RETURN b.name

No engine runs the statements: an answer is right if its tokens are those of the right one, its variables renamed.

Every fifth label, property, relation and value, every seventh number, and every fifth made-up word belong to tests
alone, and so do the wordings under `test` of each form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from training.starter.drawing import asked, chance, invented_of, number_between, number_of
from training.starter.task import Example, Split, Task
from training.starter.words import CITIES, NAMES, held_out, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from random import Random

LABELS: Final = listed(
    "Person City Movie Company Book Player Singer Country Song Team Student School Teacher Actor Author Film Shop "
    "Product Customer Doctor Hotel Station Airport Museum River Band Album Game Club Village Farmer Animal Island "
    "Writer Painter Pilot Ship Bank Office Project User Group Page Topic Server Device Town Course Gene Protein"
)
"""Labels of nodes."""

KEYS: Final = listed("name title code label nickname")
"""Properties that nodes are called by."""

PROPERTIES: Final = listed(
    "age year price size height weight score population length rating salary points area budget goals depth pages "
    "votes speed capacity level sales rank power cost"
)
"""Properties that are numbers."""

RELATIONS: Final = listed(
    "KNOWS LIVES_IN LIKES WORKS_AT FOLLOWS OWNS READS VISITED PLAYS_FOR LOVES WROTE ACTED_IN HELPS BOUGHT SELLS "
    "TEACHES STUDIES_AT SEES TRUSTS MANAGES BELONGS_TO WATCHED MADE LEADS JOINED CALLS USES FOUND_IN MET STARTED"
)
"""Types of relations, which are verbs: a question says them as they stand, or as `lives in`."""

VALUES: Final = (*NAMES, *CITIES)
"""What nodes are called."""

HINTS: Final[Mapping[Split, Sequence[str]]] = {
    Split.TRAIN: (
        "Write Cypher: {}",
        "Cypher: {}",
        "Cypher query: {}",
        "Write a Cypher query. {}",
        "Answer with Cypher: {}",
        "Ask the graph: {}",
        "{} Write Cypher.",
        "{} Answer with a Cypher query.",
        "{} (Cypher)",
        "{} Give me the Cypher.",
    ),
    Split.TEST: ("Write the Cypher query: {}", "{} Answer with Cypher.", "Give me the Cypher: {}", "{} Ask the graph."),
}

OPERATORS: Final[Mapping[str, Sequence[str]]] = {
    ">": ("more than", "greater than", "above", "over", ">"),
    "<": ("less than", "smaller than", "below", "under", "<"),
    ">=": ("at least", ">="),
    "<=": ("at most", "<="),
}
"""How comparisons are said."""

AGGREGATES: Final[Mapping[str, Sequence[str]]] = {
    "max": ("highest", "maximum", "largest"),
    "min": ("lowest", "minimum", "smallest"),
    "avg": ("average", "mean"),
    "sum": ("total", "summed"),
}
ORDERS: Final[Mapping[str, Sequence[str]]] = {" DESC": ("highest", "largest"), "": ("lowest", "smallest")}

_ANSWER_CHARACTERS: Final = 1_000
_TOKEN: Final = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\w+|<>|<=|>=|->|<-|\S", re.DOTALL)
_WORD: Final = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True, slots=True)
class Node:
    """A label of a schema.

    Args:
        label: As Cypher says it.
        key: The property that nodes are called by.
        numbers: Its properties that are numbers.
    """

    label: str
    key: str
    numbers: tuple[str, ...]

    def __str__(self) -> str:
        return f"({self.label} {{{', '.join((self.key, *self.numbers))}}})"


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation of a schema: from nodes of one label to nodes of another, or of the same."""

    start: Node
    kind: str
    end: Node


@dataclass(frozen=True, slots=True)
class Query:
    """A statement, and what stands in the places of a wording."""

    cypher: str
    slots: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Lists:
    """The words of a split."""

    labels: Sequence[str]
    keys: Sequence[str]
    properties: Sequence[str]
    relations: Sequence[str]
    values: Sequence[str]


def _lists(which: int) -> _Lists:
    return _Lists(*(held_out(words)[which] for words in (LABELS, KEYS, PROPERTIES, RELATIONS, VALUES)))


_LISTS: Final = {Split.TRAIN: _lists(0), Split.TEST: _lists(1)}
_TAKEN: Final = frozenset(word.lower() for words in (LABELS, KEYS, PROPERTIES, RELATIONS, VALUES) for word in words)
"""What no made-up word may be: a word of our lists, of which some are held out."""


class _Words:
    """Draws the words of one example: all from the lists of a split, or most of them made up."""

    def __init__(self, random: Random, split: Split) -> None:
        self.random = random
        self.split = split
        self._invents = chance(random, 0.6)

    def _word(self, words: Sequence[str], *, most: bool = True) -> str | None:
        """A word of a list, or nothing where one is to be made up."""
        made_up = self._invents and chance(self.random, 0.7 if most else 0.3)
        return None if made_up else self.random.choice(words)

    def _invented(self) -> str:
        return invented_of(self.random, self.split, _TAKEN)

    def node(self) -> Node:
        """A label with its properties."""
        lists = _LISTS[self.split]
        label = self._word(lists.labels) or self._invented().capitalize()
        # Most graphs call their nodes by `name`, which therefore is no word to hold out.
        key = "name" if chance(self.random, 0.6) else self._word(lists.keys) or self._invented()
        numbers = {self._word(lists.properties) or self._invented() for _ in range(self.random.choice((1, 1, 2)))}
        return Node(label, key, tuple(sorted(numbers - {key})))

    def relation(self) -> str:
        """The type of a relation."""
        return self._word(_LISTS[self.split].relations, most=False) or self._invented().upper()

    def value(self) -> str:
        """What a node is called: at times in two words."""
        value = self._word(_LISTS[self.split].values) or self._invented().capitalize()
        return f"{value} {self._invented().capitalize()}" if chance(self.random, 0.1) else value

    def number(self) -> int:
        """A number to compare with."""
        return number_of(self.random, self.split)


def _graph(words: _Words) -> tuple[Relation, ...]:
    """Draws one or two relations over two or three labels; in a fifth of them, a relation stays with its label."""
    random = words.random
    while True:
        nodes = [words.node() for _ in range(3)]
        kinds = [words.relation() for _ in range(2)]
        told_apart = len({node.label for node in nodes}) == len(nodes) and kinds[0] != kinds[1]
        if told_apart and all(node.numbers for node in nodes):
            break
    a, b, c = nodes
    first = Relation(a, kinds[0], a if chance(random, 0.2) else b)
    if chance(random, 0.4):
        return (first,)
    return first, Relation(random.choice((first.start, first.end)), kinds[1], c)


def _schema(graph: Sequence[Relation]) -> str:
    """Writes a graph on one line: properties stand where a label is met first."""
    met: set[str] = set()

    def shown(node: Node) -> str:
        if node.label in met:
            return f"({node.label})"
        met.add(node.label)
        return str(node)

    return "Graph " + ", ".join(
        f"{shown(relation.start)}-[:{relation.kind}]->{shown(relation.end)}" for relation in graph
    )


def _nodes(graph: Sequence[Relation]) -> list[Node]:
    return list(dict.fromkeys(node for relation in graph for node in (relation.start, relation.end)))


def _named(words: _Words, node: Node, variable: str) -> tuple[str, str]:
    """Draws what a node is called: the pattern of that node, and the name as a question has it."""
    value = words.value()
    said = f"'{value}'" if chance(words.random, 0.15) else value
    return f"({variable}:{node.label} {{{node.key}: '{value}'}})", said


def _verb(words: _Words, kind: str) -> str:
    """A relation as a question has it: made-up ones as they stand, so that there is something to copy."""
    return kind.lower().replace("_", " ") if kind in RELATIONS and chance(words.random, 0.6) else kind


def _all(words: _Words, graph: Sequence[Relation]) -> Query:
    node = words.random.choice(_nodes(graph))
    wanted = words.random.choice((node.key, *node.numbers))
    return Query(f"MATCH (a:{node.label}) RETURN a.{wanted}", {"label": node.label, "wanted": wanted})


def _property(words: _Words, graph: Sequence[Relation]) -> Query:
    node = words.random.choice(_nodes(graph))
    pattern, said = _named(words, node, "a")
    wanted = words.random.choice(node.numbers)
    return Query(f"MATCH {pattern} RETURN a.{wanted}", {"label": node.label, "wanted": wanted, "value": said})


def _count(words: _Words, graph: Sequence[Relation]) -> Query:
    label = words.random.choice(_nodes(graph)).label
    return Query(f"MATCH (a:{label}) RETURN count(a)", {"label": label})


def _forwards(words: _Words, graph: Sequence[Relation], returned: str = "b.{}") -> Query:
    relation = words.random.choice(graph)
    pattern, said = _named(words, relation.start, "a")
    return Query(
        f"MATCH {pattern}-[:{relation.kind}]->(b:{relation.end.label}) RETURN {returned.format(relation.end.key)}",
        {"label": relation.end.label, "verb": _verb(words, relation.kind), "value": said},
    )


def _backwards(words: _Words, graph: Sequence[Relation]) -> Query:
    relation = words.random.choice(graph)
    pattern, said = _named(words, relation.end, "b")
    return Query(
        f"MATCH (a:{relation.start.label})-[:{relation.kind}]->{pattern} RETURN a.{relation.start.key}",
        {"label": relation.start.label, "verb": _verb(words, relation.kind), "value": said},
    )


def _count_neighbours(words: _Words, graph: Sequence[Relation]) -> Query:
    return _forwards(words, graph, "count(b)")


def _where(words: _Words, graph: Sequence[Relation]) -> Query:
    node = words.random.choice(_nodes(graph))
    number, value = words.random.choice(node.numbers), words.number()
    operator = words.random.choice(tuple(OPERATORS))
    return Query(
        f"MATCH (a:{node.label}) WHERE a.{number} {operator} {value} RETURN a.{node.key}",
        {
            "label": node.label,
            "wanted": node.key,
            "number": number,
            "value": f"{words.random.choice(OPERATORS[operator])} {value}",
        },
    )


def _top(words: _Words, graph: Sequence[Relation]) -> Query:
    random = words.random
    node = random.choice(_nodes(graph))
    number, order = random.choice(node.numbers), random.choice(tuple(ORDERS))
    limit = 1 if chance(random, 0.4) else number_between(random, words.split, 2, 25)
    return Query(
        f"MATCH (a:{node.label}) RETURN a.{node.key} ORDER BY a.{number}{order} LIMIT {limit}",
        {
            "label": node.label,
            "wanted": node.key,
            "number": number,
            "extreme": random.choice(ORDERS[order]),
            "limit": "" if limit == 1 else f"{limit} ",
        },
    )


def _aggregate(words: _Words, graph: Sequence[Relation]) -> Query:
    node = words.random.choice(_nodes(graph))
    number, function = words.random.choice(node.numbers), words.random.choice(tuple(AGGREGATES))
    return Query(
        f"MATCH (a:{node.label}) RETURN {function}(a.{number})",
        {"label": node.label, "number": number, "extreme": words.random.choice(AGGREGATES[function])},
    )


@dataclass(frozen=True, slots=True)
class Form:
    """A form of question.

    Args:
        kind: Its name.
        build: Draws a statement over a graph.
        train: Wordings to learn from.
        test: Wordings to be tested with.
    """

    kind: str
    build: Callable[[_Words, Sequence[Relation]], Query]
    train: Sequence[str]
    test: Sequence[str]


FORMS: Final = (
    Form(
        "all",
        _all,
        (
            "List the {wanted} of every {label}.",
            "Show the {wanted} of each {label}.",
            "What is the {wanted} of every {label}?",
            "Give the {wanted} of all {label} nodes.",
            "Find the {wanted} of every {label} node.",
            "Get the {wanted} for each {label}.",
            "Which {wanted} does each {label} have?",
            "I want the {wanted} of all {label} nodes.",
            "For every {label}, show the {wanted}.",
            "Return the {wanted} of each {label} in the graph.",
        ),
        (
            "Show me the {wanted} of every {label}.",
            "For each {label}, give the {wanted}.",
            "I want to list the {wanted} of all {label} nodes.",
            "Get the {wanted} of every {label} in the graph.",
        ),
    ),
    Form(
        "property",
        _property,
        (
            "What is the {wanted} of the {label} {value}?",
            "Show the {wanted} of the {label} {value}.",
            "Give the {wanted} of {label} {value}.",
            "Find the {wanted} of the {label} called {value}.",
            "Get the {wanted} for the {label} {value}.",
            "Which {wanted} does the {label} {value} have?",
            "I want the {wanted} of the {label} called {value}.",
            "For the {label} {value}, show the {wanted}.",
            "There is a {label} called {value}: give me the {wanted}.",
            "Return the {wanted} of the {label} {value}.",
        ),
        (
            "Show me the {wanted} of the {label} called {value}.",
            "For the {label} called {value}, give the {wanted}.",
            "I want the {wanted} for the {label} {value}.",
            "Tell me the {wanted} of the {label} {value}.",
        ),
    ),
    Form(
        "count",
        _count,
        (
            "How many {label} nodes are there?",
            "Count the {label} nodes.",
            "What is the number of {label} nodes?",
            "Give the number of nodes with the label {label}.",
            "Count every {label}.",
            "Find how many {label} nodes there are.",
            "How many nodes have the label {label}?",
            "I want the count of {label} nodes.",
            "Tell me how many {label} nodes the graph has.",
            "Count all nodes with the label {label} in the graph.",
        ),
        (
            "Show me how many {label} nodes there are.",
            "Count all the {label} nodes.",
            "I want the number of {label} nodes.",
            "How many {label} nodes does the graph have?",
        ),
    ),
    Form(
        "forwards",
        _forwards,
        (
            "List each {label} that {value} {verb}.",
            "Show every {label} that {value} {verb}.",
            "Which {label} is it that {value} {verb}?",
            "Give me each {label} that {value} {verb}.",
            "Find all {label} nodes that {value} {verb}.",
            "Get every {label} that {value} {verb}.",
            "I want each {label} that {value} {verb}.",
            "{value} {verb} which {label}?",
            "Return every {label} {value} {verb}.",
            "What {label} nodes are there that {value} {verb}?",
        ),
        (
            "Show me each {label} that {value} {verb}.",
            "I want to list every {label} that {value} {verb}.",
            "Which {label} nodes are there that {value} {verb}?",
            "Get all {label} nodes {value} {verb}.",
        ),
    ),
    Form(
        "backwards",
        _backwards,
        (
            "List each {label} that {verb} {value}.",
            "Show every {label} that {verb} {value}.",
            "Which {label} is it that {verb} {value}?",
            "Give me each {label} that {verb} {value}.",
            "Find all {label} nodes that {verb} {value}.",
            "Get every {label} that {verb} {value}.",
            "I want each {label} that {verb} {value}.",
            "Which {label} {verb} {value}?",
            "Return every {label} that {verb} {value}.",
            "What {label} nodes are there that {verb} {value}?",
        ),
        (
            "Show me each {label} that {verb} {value}.",
            "I want to list every {label} that {verb} {value}.",
            "Which {label} nodes are there that {verb} {value}?",
            "Get all {label} nodes that {verb} {value}.",
        ),
    ),
    Form(
        "count-neighbours",
        _count_neighbours,
        (
            "How many {label} nodes are there that {value} {verb}?",
            "Count each {label} that {value} {verb}.",
            "What is the number of {label} nodes that {value} {verb}?",
            "Give the number of {label} nodes that {value} {verb}.",
            "Count all {label} nodes that {value} {verb}.",
            "Find how many {label} nodes {value} {verb}.",
            "{value} {verb} how many {label} nodes?",
            "I want the count of {label} nodes that {value} {verb}.",
            "Tell me how many {label} nodes {value} {verb}.",
            "Count every {label} {value} {verb}.",
        ),
        (
            "Show me how many {label} nodes {value} {verb}.",
            "Count every {label} that {value} {verb}.",
            "I want the number of {label} nodes that {value} {verb}.",
            "Tell me how many {label} nodes there are that {value} {verb}.",
        ),
    ),
    Form(
        "where",
        _where,
        (
            "List the {wanted} of every {label} with {number} {value}.",
            "Show the {wanted} of each {label} whose {number} is {value}.",
            "What is the {wanted} of every {label} with {number} {value}?",
            "Give the {wanted} of all {label} nodes where {number} is {value}.",
            "Find the {wanted} of every {label} that has {number} {value}.",
            "Get the {wanted} for each {label} with {number} {value}.",
            "Which {wanted} does each {label} whose {number} is {value} have?",
            "I want the {wanted} of all {label} nodes with {number} {value}.",
            "For every {label} where the {number} is {value}, show the {wanted}.",
            "Return the {wanted} of each {label} whose {number} is {value}.",
        ),
        (
            "Show me the {wanted} of every {label} whose {number} is {value}.",
            "For each {label} with {number} {value}, give the {wanted}.",
            "I want to list the {wanted} of all {label} nodes where the {number} is {value}.",
            "Get the {wanted} of every {label} that has {number} {value}.",
        ),
    ),
    Form(
        "top",
        _top,
        (
            "List the {wanted} of the {limit}{label} nodes with the {extreme} {number}.",
            "Show the {wanted} of the {limit}{label} with the {extreme} {number}.",
            "What is the {wanted} of the {limit}{label} with the {extreme} {number}?",
            "Give the {wanted} of the {limit}{label} nodes that have the {extreme} {number}.",
            "Find the {wanted} of the {limit}{label} nodes with {extreme} {number}.",
            "Get the {wanted} for the {limit}{label} with the {extreme} {number}.",
            "I want the {wanted} of the {limit}{label} having the {extreme} {number}.",
            "For the {limit}{label} with the {extreme} {number}, show the {wanted}.",
            "Take the {limit}{label} nodes with the {extreme} {number} and give the {wanted}.",
            "Return the {wanted} of the {limit}{label} nodes with the {extreme} {number}.",
        ),
        (
            "Show me the {wanted} of the {limit}{label} with the {extreme} {number}.",
            "For the {limit}{label} nodes having the {extreme} {number}, give the {wanted}.",
            "I want to list the {wanted} of the {limit}{label} nodes with the {extreme} {number}.",
            "Find the {limit}{label} with the {extreme} {number} and show the {wanted}.",
        ),
    ),
    Form(
        "aggregate",
        _aggregate,
        (
            "What is the {extreme} {number} of all {label} nodes?",
            "Find the {extreme} {number} over every {label}.",
            "Show the {extreme} {number} of the {label} nodes.",
            "Give the {extreme} {number} among all {label} nodes.",
            "Which is the {extreme} {number} of any {label} in the graph?",
            "Get the {extreme} {number} over all {label} nodes.",
            "I want the {extreme} {number} of every {label}.",
            "For all {label} nodes, compute the {extreme} {number}.",
            "Compute the {extreme} {number} of {label} nodes.",
            "Tell me the {extreme} {number} of the {label} nodes.",
        ),
        (
            "Show me the {extreme} {number} of all {label} nodes.",
            "For the {label} nodes, find the {extreme} {number}.",
            "What is the {extreme} {number} over every {label}?",
            "Tell me the {extreme} {number} among all {label} nodes.",
        ),
    ),
)
"""Every form, all equally likely."""


def example(random: Random, split: Split) -> Example:
    """Draws a question about a graph."""
    words = _Words(random, split)
    form = random.choice(FORMS)
    graph = _graph(words)
    query = form.build(words, graph)
    wording = random.choice(form.train if split is Split.TRAIN else form.test)
    question = asked(random, wording.format(**query.slots), HINTS[split])
    return Example(f"{_schema(graph)}\n{question}", query.cypher, form.kind)


def _variables(tokens: Sequence[str]) -> Iterator[str]:
    """Finds what a statement calls its nodes and relations: words that open a `(` or `[` which calls no function."""
    for before, bracket, token in zip(["", *tokens], tokens, tokens[1:], strict=False):
        opens = bracket == "[" or (bracket == "(" and (before.upper() == "MATCH" or not _WORD.fullmatch(before)))
        if opens and _WORD.fullmatch(token):
            yield token


def normalised(statement: str) -> tuple[str, ...]:
    """Reads a statement as tokens that spacing, quotes, a last semicolon and the choice of variables do not change.

    Args:
        statement: A Cypher statement, whoever wrote it.

    Returns:
        Its tokens: strings begin with `'` whichever quotes they stood in, and variables are `$1`, `$2`, ... in the
        order in which patterns name them.
    """
    tokens: list[str] = _TOKEN.findall(statement.strip().removesuffix(";"))
    names = {name: f"${place}" for place, name in enumerate(dict.fromkeys(_variables(tokens)), start=1)}
    found: list[str] = []
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        if len(token) > 1 and token[0] in "'\"":
            found.append("'" + token[1:-1])
        elif before in (":", ".") or (before in ("{", ",") and after == ":"):  # a label, a type, or a property
            found.append(token)
        else:
            found.append(names.get(token, token))
    return tuple(found)


def is_right(asked_about: Example, answer: str) -> bool:
    """Whether a statement is the right one, but for spacing, quotes, a last semicolon and names of variables."""
    return len(answer) <= _ANSWER_CHARACTERS and normalised(answer) == normalised(asked_about.answer)


def document(random: Random) -> str:
    """Draws the schema of a graph and statements over it, as a file of Cypher has them."""
    words = _Words(random, Split.TRAIN)
    graph = _graph(words)
    forms = random.sample(FORMS, random.randint(2, 3))
    return "\n".join((_schema(graph), *(f"{form.build(words, graph).cypher};" for form in forms)))


TASK: Final = Task("cypher", example, is_right, document)
