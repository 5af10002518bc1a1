"""The task `sql`: a schema and a question become one SQLite SELECT, which is judged by running it.

A question names tables, columns and values literally, so that answering is choosing a form and copying. The schema
stands before the question, one table to a line:

    Table singers (name text, age integer, city text)
    How many singers with city Rome are there?

    SELECT COUNT(*) FROM singers WHERE city = 'Rome'

Every fifth table, column and value, every seventh number, and every fifth made-up word belong to tests alone, and so
do the wordings under `test` of each form.
"""
# ruff: noqa: S608 - statements are put together from words of our own lists

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hocket.evaluation import execution_match
from training.starter.drawing import asked, chance, invented_of, number_between, number_of
from training.starter.task import Example, Split, Task
from training.starter.words import ANIMALS, CITIES, COLOURS, COUNTRIES, FOODS, NAMES, THINGS, held_out, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

TABLES: Final = listed(
    "singers books players cars houses students teachers films songs shops hotels doctors patients orders products "
    "customers employees farms trains flights animals plants rivers mountains museums schools clubs games towns ships "
    "lakes bands authors painters phones boats writers courses teams letters recipes bikes guests rooms trees islands "
    "gardens bridges castles planets stars actors dancers drivers pilots nurses bakers lamps chairs horses"
)
"""Nouns in the plural; without the last letter, a key is named after them: `author_id`."""

_COUNTRIES: Final = tuple(COUNTRIES)

TEXT_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "name": NAMES,
    "city": CITIES,
    "country": _COUNTRIES,
    "colour": COLOURS,
    "owner": NAMES,
    "title": THINGS,
    "food": FOODS,
    "pet": ANIMALS,
    "town": CITIES,
    "first_name": NAMES,
    "color": COLOURS,
    "kind": ANIMALS,
    "maker": NAMES,
    "origin": _COUNTRIES,
    "leader": NAMES,
    "category": THINGS,
    "type": THINGS,
    "label": THINGS,
    "home": CITIES,
    "friend": NAMES,
    "state": _COUNTRIES,
    "place": CITIES,
    "animal": ANIMALS,
    "region": _COUNTRIES,
    "seller": NAMES,
    "dish": FOODS,
    "genre": THINGS,
    "nation": _COUNTRIES,
    "manager": NAMES,
    "shade": COLOURS,
}
"""Columns of text, and what stands in them."""

INTEGER_COLUMNS: Final = listed(
    "age price year weight height size length salary score points pages speed rating stock width votes distance seats "
    "floors budget power wins goals depth birth_year cost capacity level area volume sales rank duration grade "
    "visitors amount"
)

HINTS: Final[Mapping[Split, Sequence[str]]] = {
    Split.TRAIN: (
        "Write SQL: {}",
        "SQL: {}",
        "SQL query: {}",
        "Write a SQL query. {}",
        "Answer with SQL: {}",
        "{} Write SQL.",
        "{} Answer with a SQL query.",
        "{} (SQL)",
        "Give me the query: {}",
        "{} Give me the SQL.",
    ),
    Split.TEST: ("Write the SQL query: {}", "{} Answer with SQL.", "Give me the SQL: {}", "{} Write a query."),
}

OPERATORS: Final[Mapping[str, Sequence[str]]] = {
    ">": ("more than", "greater than", "above", "over", ">"),
    "<": ("less than", "smaller than", "below", "under", "<"),
    ">=": ("at least", ">="),
    "<=": ("at most", "<="),
    "=": ("exactly", "equal to", "="),
}
"""How comparisons are said."""

EQUALS: Final = (
    "with {column} {value}",
    "whose {column} is {value}",
    "where {column} is {value}",
    "where the {column} is {value}",
    "having {column} {value}",
    "that have {column} {value}",
    "with the {column} {value}",
)
COMPARES: Final = (
    "with {column} {operator} {value}",
    "whose {column} is {operator} {value}",
    "where {column} is {operator} {value}",
    "where the {column} is {operator} {value}",
    "having {column} {operator} {value}",
    "that have {column} {operator} {value}",
)
LINKED: Final = (
    "with {} and {}",
    "with {} and with {}",
    "having {} and {}",
    "that have {} and {}",
    "that have {} and also {}",
)

AGGREGATES: Final[Mapping[str, Sequence[str]]] = {
    "MAX": ("highest", "maximum", "largest"),
    "MIN": ("lowest", "minimum", "smallest"),
    "AVG": ("average", "mean"),
    "SUM": ("total", "summed"),
}
ORDERS: Final[Mapping[str, Sequence[str]]] = {"DESC": ("highest", "largest"), "ASC": ("lowest", "smallest")}

_RESERVED: Final = frozenset(
    listed(
        "abort action add after all alter always and as asc before begin by case cast check column commit "
        "create cross database default delete desc do drop each else end escape except exists explain fail "
        "filter first for from full glob group having if ignore in index inner insert into is isnull join key "
        "last left like limit match natural no not null of offset on or order outer over plan pragma query "
        "raise regexp release rename replace right row rows select set table temp then ties to union unique "
        "update using view virtual when where window with without"
    )
)
_TAKEN: Final = _RESERVED | {
    word.lower().removesuffix("s")
    for words in (TABLES, TEXT_COLUMNS, INTEGER_COLUMNS, *TEXT_COLUMNS.values())
    for word in words
}
"""What no made-up word may be: a word of SQL, or of our lists, of which some are held out."""
_ROWS: Final = 12
# Of twelve numbers, two are the literal, three below and seven above it: each comparison keeps another count of rows.
_OFFSETS: Final = (0, 1, -1, 9, 31, 0, 1, -1, -12, 4, 57, 110)
_LINKED_COLUMNS: Final = 2  # what each of two linked tables surely has


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a schema.

    Args:
        name: As SQL says it.
        values: What may stand in a column of text; nothing for a column of integers.
    """

    name: str
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {'text' if self.values else 'integer'}"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a schema, with at least one column of text and one of integers."""

    name: str
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.columns))})"


@dataclass(frozen=True, slots=True)
class Query:
    """A statement, and the words that a question about it needs.

    Args:
        sql: The statement.
        slots: What stands in the places of a wording.
        literals: What columns are compared with.
        grouped: The column whose values are counted or told apart.
    """

    sql: str
    slots: Mapping[str, str]
    literals: Mapping[str, str | int] = field(default_factory=dict)
    grouped: str = ""


class _Words:
    """Draws the words of one example: all from the lists of a split, or most of them made up."""

    def __init__(self, random: Random, split: Split) -> None:
        self.random = random
        self.split = split
        self._invents = chance(random, 0.6)

    def _made_up(self) -> bool:
        return self._invents and chance(self.random, 0.7)

    def table(self) -> str:
        """A table's name, in the plural."""
        if self._made_up():
            return invented_of(self.random, self.split, _TAKEN) + "s"
        return self.random.choice(_LISTS[self.split].tables)

    def column(self, *, text: bool) -> Column:
        """A column of text or of integers."""
        lists = _LISTS[self.split]
        if self._made_up():
            values = self.random.choice((NAMES, CITIES, THINGS)) if text else ()
            return Column(invented_of(self.random, self.split, _TAKEN), values)
        if not text:
            return Column(self.random.choice(lists.integers))
        name = self.random.choice(lists.texts)
        return Column(name, TEXT_COLUMNS[name])

    def value(self, column: Column) -> str:
        """A value of text to compare with: at times of two words."""
        if self._made_up():
            value = invented_of(self.random, self.split, _TAKEN)
            return value.capitalize() if chance(self.random, 0.5) else value
        value = self.random.choice(_LISTS[self.split].values[column.values])
        if column.values is NAMES and chance(self.random, 0.1):
            return f"{value} {invented_of(self.random, self.split).capitalize()}"
        return value

    def number(self) -> int:
        """A number to compare with."""
        return number_of(self.random, self.split)


@dataclass(frozen=True, slots=True)
class _Lists:
    """The words of a split."""

    tables: Sequence[str]
    texts: Sequence[str]
    integers: Sequence[str]
    values: Mapping[tuple[str, ...], Sequence[str]]


def _lists(which: int) -> _Lists:
    return _Lists(
        held_out(TABLES)[which],
        held_out(tuple(TEXT_COLUMNS))[which],
        held_out(INTEGER_COLUMNS)[which],
        {values: held_out(values)[which] for values in TEXT_COLUMNS.values()},
    )


_LISTS: Final = {Split.TRAIN: _lists(0), Split.TEST: _lists(1)}


def _table(words: _Words, least: int, taken: str = "") -> Table:
    """Draws a table of two to four columns, at least `least`, whose name is not `taken`."""
    random = words.random
    count = random.randint(least, 4)
    texts = random.randint(1, count - 1)
    while True:
        name = words.table()
        columns = [words.column(text=place < texts) for place in range(count)]
        if len({name, *(column.name for column in columns)}) == count + 1 and name != taken:
            break
    if chance(random, 0.4):
        random.shuffle(columns)
    return Table(name, tuple(columns))


def _linked(words: _Words) -> tuple[Table, Table]:
    """Draws two tables, the first of which has a key of the second."""
    while True:
        parent, child = words.table(), words.table()
        texts = [words.column(text=True) for _ in range(2)]
        extra = words.column(text=False)
        if parent != child and texts[0].name not in (texts[1].name, extra.name):
            break
    more = (extra,) if chance(words.random, 0.5) else ()
    return (
        Table(child, (texts[0], *more, Column(f"{parent[:-1]}_id"))),
        Table(parent, (Column("id"), texts[1])),
    )


def _pick(random: Random, table: Table, *, text: bool | None = None, but: Sequence[Column] = ()) -> Column:
    """Picks a column of a table, of text or of integers or of either, that is not among `but`."""
    return random.choice(
        [column for column in table.columns if column not in but and (text is None or bool(column.values) == text)]
    )


def _said(random: Random, value: str) -> str:
    """A value of text as a question has it: at times in quotes."""
    return f"'{value}'" if chance(random, 0.15) else value


def _column(words: _Words, tables: Sequence[Table]) -> Query:
    a = _pick(words.random, tables[0])
    return Query(f"SELECT {a.name} FROM {tables[0].name}", {"a": a.name})


def _columns(words: _Words, tables: Sequence[Table]) -> Query:
    a, b = words.random.sample(tables[0].columns, 2)
    return Query(
        f"SELECT {a.name}, {b.name} FROM {tables[0].name}",
        {"a": a.name, "b": b.name},
    )


def _all(_: _Words, tables: Sequence[Table]) -> Query:
    return Query(f"SELECT * FROM {tables[0].name}", {})


@dataclass(frozen=True, slots=True)
class _Condition:
    """A condition on a column: as SQL has it, as words after `with`, and as a full phrase."""

    column: Column
    sql: str
    short: str
    phrase: str
    literal: str | int


def _equals(words: _Words, table: Table) -> _Condition:
    column = _pick(words.random, table, text=True)
    value = words.value(column)
    said = _said(words.random, value)
    return _Condition(
        column,
        f"{column.name} = '{value}'",
        f"{column.name} {said}",
        words.random.choice(EQUALS).format(column=column.name, value=said),
        value,
    )


def _compares(words: _Words, table: Table) -> _Condition:
    column = _pick(words.random, table, text=False)
    value = words.number()
    operator = words.random.choice(tuple(OPERATORS))
    said = words.random.choice(OPERATORS[operator])
    return _Condition(
        column,
        f"{column.name} {operator} {value}",
        f"{column.name} {said} {value}",
        words.random.choice(COMPARES).format(column=column.name, operator=said, value=value),
        value,
    )


def _filtered(words: _Words, table: Table, condition: _Condition) -> Query:
    a = _pick(words.random, table, but=(condition.column,))
    return Query(
        f"SELECT {a.name} FROM {table.name} WHERE {condition.sql}",
        {"a": a.name, "filter": condition.phrase},
        {condition.column.name: condition.literal},
    )


def _equal(words: _Words, tables: Sequence[Table]) -> Query:
    return _filtered(words, tables[0], _equals(words, tables[0]))


def _compare(words: _Words, tables: Sequence[Table]) -> Query:
    return _filtered(words, tables[0], _compares(words, tables[0]))


def _both(words: _Words, tables: Sequence[Table]) -> Query:
    random, table = words.random, tables[0]
    conditions = [_equals(words, table), _compares(words, table)]
    if chance(random, 0.3):
        conditions.reverse()
    first, second = conditions
    a = _pick(random, table, but=(first.column, second.column))
    return Query(
        f"SELECT {a.name} FROM {table.name} WHERE {first.sql} AND {second.sql}",
        {"a": a.name, "filter": random.choice(LINKED).format(first.short, second.short)},
        {condition.column.name: condition.literal for condition in conditions},
    )


def _count(_: _Words, tables: Sequence[Table]) -> Query:
    return Query(f"SELECT COUNT(*) FROM {tables[0].name}", {})


def _count_where(words: _Words, tables: Sequence[Table]) -> Query:
    condition = words.random.choice((_equals, _compares))(words, tables[0])
    return Query(
        f"SELECT COUNT(*) FROM {tables[0].name} WHERE {condition.sql}",
        {"filter": condition.phrase},
        {condition.column.name: condition.literal},
    )


def _aggregate(words: _Words, tables: Sequence[Table]) -> Query:
    column = _pick(words.random, tables[0], text=False)
    function = words.random.choice(tuple(AGGREGATES))
    return Query(
        f"SELECT {function}({column.name}) FROM {tables[0].name}",
        {"column": column.name, "extreme": words.random.choice(AGGREGATES[function])},
    )


def _top(words: _Words, tables: Sequence[Table]) -> Query:
    random = words.random
    column = _pick(random, tables[0], text=False)
    a = _pick(random, tables[0], but=(column,))
    order = random.choice(tuple(ORDERS))
    # Eleven is the most that twelve rows tell from no limit at all.
    limit = 1 if chance(random, 0.4) else number_between(random, words.split, 2, 11)
    return Query(
        f"SELECT {a.name} FROM {tables[0].name} ORDER BY {column.name} {order} LIMIT {limit}",
        {
            "a": a.name,
            "column": column.name,
            "extreme": random.choice(ORDERS[order]),
            "limit": "" if limit == 1 else f"{limit} ",
        },
    )


def _group(words: _Words, tables: Sequence[Table]) -> Query:
    a = _pick(words.random, tables[0], text=True).name
    sql = f"SELECT {a}, COUNT(*) FROM {tables[0].name} GROUP BY {a}"
    return Query(sql, {"a": a}, grouped=a)


def _distinct(words: _Words, tables: Sequence[Table]) -> Query:
    a = _pick(words.random, tables[0], text=True).name
    return Query(f"SELECT DISTINCT {a} FROM {tables[0].name}", {"a": a}, grouped=a)


def _join(_: _Words, tables: Sequence[Table]) -> Query:
    child, parent = tables
    a, key, b = child.columns[0].name, child.columns[-1].name, parent.columns[1].name
    return Query(
        f"SELECT {child.name}.{a}, {parent.name}.{b} FROM {child.name} "
        f"JOIN {parent.name} ON {child.name}.{key} = {parent.name}.id",
        {"a": a, "b": b, "parent": parent.name},
    )


@dataclass(frozen=True, slots=True)
class Form:
    """A form of question.

    Args:
        kind: Its name.
        build: Draws a statement over tables, the first of which is asked.
        train: Wordings to learn from.
        test: Wordings to be tested with.
        columns_min: How many columns a table needs.
    """

    kind: str
    build: Callable[[_Words, Sequence[Table]], Query]
    train: Sequence[str]
    test: Sequence[str]
    columns_min: int = 2


FORMS: Final = (
    Form(
        "column",
        _column,
        (
            "List the {a} of all {table}.",
            "Show the {a} of every row of {table}.",
            "What is the {a} of all {table}?",
            "Give the {a} of each of the {table}.",
            "Select {a} from {table}.",
            "Which {a} do the {table} have?",
            "Find the {a} of all the {table}.",
            "Get the {a} of the {table}.",
            "I want the {a} of all {table}.",
            "For all {table}, show the {a}.",
        ),
        (
            "Show me the {a} of all the {table}.",
            "For each of the {table}, give the {a}.",
            "I want to list the {a} of the {table}.",
            "Get {a} from all {table}.",
        ),
    ),
    Form(
        "columns",
        _columns,
        (
            "List the {a} and {b} of all {table}.",
            "Show the {a} and the {b} of every row of {table}.",
            "What are the {a} and {b} of all {table}?",
            "Give the {a} and {b} of each of the {table}.",
            "Select {a} and {b} from {table}.",
            "Which {a} and {b} do the {table} have?",
            "Find the {a} and the {b} of all the {table}.",
            "Get the {a} and {b} of the {table}.",
            "I want the {a} and the {b} of all {table}.",
            "For all {table}, show the {a} and {b}.",
        ),
        (
            "Show me the {a} and {b} of all the {table}.",
            "For each of the {table}, give the {a} and the {b}.",
            "I want to list {a} and {b} of the {table}.",
            "Get {a} and {b} from all {table}.",
        ),
    ),
    Form(
        "all",
        _all,
        (
            "List all columns of {table}.",
            "Show everything from {table}.",
            "Show all {table}.",
            "List all the {table}.",
            "Give every row of {table}.",
            "Select all columns from {table}.",
            "Find all {table}.",
            "Get everything about the {table}.",
            "I want all rows of {table}.",
            "Show me all rows and columns of {table}.",
        ),
        (
            "Show me everything about the {table}.",
            "Get all rows from {table}.",
            "I want to list all {table}.",
            "Give all columns of the {table}.",
        ),
    ),
    *(
        Form(
            kind,
            build,
            (
                "List the {a} of {table} {filter}.",
                "Show the {a} of all {table} {filter}.",
                "What is the {a} of {table} {filter}?",
                "Give the {a} of the {table} {filter}.",
                "Select {a} from {table} {filter}.",
                "Find the {a} of all the {table} {filter}.",
                "Get the {a} of {table} {filter}.",
                "I want the {a} of all {table} {filter}.",
                "For {table} {filter}, show the {a}.",
                "Which {a} do {table} {filter} have?",
                "Only for {table} {filter}: give me the {a}.",
            ),
            (
                "Show me the {a} of the {table} {filter}.",
                "For all {table} {filter}, give the {a}.",
                "I want to list the {a} of {table} {filter}.",
                "Find {a} for {table} {filter}.",
            ),
            columns_min,
        )
        for kind, build, columns_min in (("equal", _equal, 2), ("compare", _compare, 2), ("both", _both, 3))
    ),
    Form(
        "count",
        _count,
        (
            "How many {table} are there?",
            "Count the {table}.",
            "What is the number of {table}?",
            "Give the number of rows of {table}.",
            "How many rows does {table} have?",
            "Count all rows of {table}.",
            "Find how many {table} there are.",
            "Show the number of all {table}.",
            "I want the count of {table}.",
            "Tell me how many {table} we have.",
        ),
        (
            "Show me how many {table} there are.",
            "Count all the {table}.",
            "I want the number of {table}.",
            "How many {table} do we have?",
        ),
    ),
    Form(
        "count-where",
        _count_where,
        (
            "How many {table} {filter} are there?",
            "Count the {table} {filter}.",
            "What is the number of {table} {filter}?",
            "Give the number of rows of {table} {filter}.",
            "How many rows of {table} are there {filter}?",
            "Count all rows of {table} {filter}.",
            "Find how many {table} there are {filter}.",
            "Show the number of all {table} {filter}.",
            "I want the count of {table} {filter}.",
            "Tell me how many {table} we have {filter}.",
        ),
        (
            "Show me how many {table} there are {filter}.",
            "Count all the {table} {filter}.",
            "I want the number of {table} {filter}.",
            "How many {table} do we have {filter}?",
        ),
    ),
    Form(
        "aggregate",
        _aggregate,
        (
            "What is the {extreme} {column} of all {table}?",
            "Find the {extreme} {column} of the {table}.",
            "Show the {extreme} {column} in {table}.",
            "Give the {extreme} {column} among all {table}.",
            "Which is the {extreme} {column} in the table {table}?",
            "Get the {extreme} {column} over all rows of {table}.",
            "I want the {extreme} {column} of {table}.",
            "For all {table}, compute the {extreme} {column}.",
            "Compute the {extreme} {column} of {table}.",
            "Tell me the {extreme} {column} of all the {table}.",
        ),
        (
            "Show me the {extreme} {column} of all {table}.",
            "For the {table}, find the {extreme} {column}.",
            "What is the {extreme} {column} in {table}?",
            "Tell me the {extreme} {column} among the {table}.",
        ),
    ),
    Form(
        "top",
        _top,
        (
            "List the {a} of the {limit}{table} with the {extreme} {column}.",
            "Show the {a} of the {limit}{table} that have the {extreme} {column}.",
            "What is the {a} of the {limit}{table} with the {extreme} {column}?",
            "Give the {a} of the {limit}{table} having the {extreme} {column}.",
            "Find the {a} of the {limit}{table} with {extreme} {column}.",
            "Get the {a} for the {limit}{table} with the {extreme} {column}.",
            "I want the {a} of the {limit}{table} with the {extreme} {column}.",
            "For the {limit}{table} with the {extreme} {column}, show the {a}.",
            "Which {a} do the {limit}{table} with the {extreme} {column} have?",
            "Take the {limit}{table} with the {extreme} {column} and give the {a}.",
        ),
        (
            "Show me the {a} of the {limit}{table} with the {extreme} {column}.",
            "For the {limit}{table} having the {extreme} {column}, give the {a}.",
            "I want to list the {a} of the {limit}{table} with the {extreme} {column}.",
            "Find the {limit}{table} with the {extreme} {column} and show the {a}.",
        ),
    ),
    Form(
        "group",
        _group,
        (
            "How many {table} are there for each {a}?",
            "Count the {table} for each {a}.",
            "What is the number of {table} per {a}?",
            "Give the number of {table} for every {a}.",
            "Show each {a} with its number of {table}.",
            "Count the {table} by {a}.",
            "Find how many {table} each {a} has.",
            "For each {a}, count the {table}.",
            "List every {a} and the number of its {table}.",
            "I want the count of {table} grouped by {a}.",
            "Group the {table} by {a} and count them.",
        ),
        (
            "For every {a}, show the number of {table}.",
            "Count all {table} per {a}.",
            "Show me how many {table} there are for each {a}.",
            "I want the number of {table} by {a}.",
        ),
    ),
    Form(
        "distinct",
        _distinct,
        (
            "List the different {a} values of {table}.",
            "Show the distinct {a} of all {table}.",
            "What different {a} values do the {table} have?",
            "Give each {a} of {table} only once.",
            "Select distinct {a} from {table}.",
            "Find all different {a} values in {table}.",
            "Get the unique {a} values of the {table}.",
            "I want every {a} of {table} without repeats.",
            "Show each distinct {a} in {table}.",
            "List the {a} of {table} without repeats.",
        ),
        (
            "Show me the different {a} values in {table}.",
            "Get each {a} of the {table} only once.",
            "I want the distinct {a} of all {table}.",
            "Find the unique {a} values of {table}.",
        ),
    ),
    Form(
        "join",
        _join,
        (
            "List the {a} of {table} with the {b} of their {parent}.",
            "Show the {a} of all {table} and the {b} of their {parent}.",
            "What is the {a} of the {table} and the {b} of their {parent}?",
            "Give the {a} of each of the {table} with the {b} of its {parent}.",
            "Join {table} and {parent} and show {a} and {b}.",
            "Find the {a} of {table} together with the {b} of the {parent}.",
            "Get the {a} of all the {table} with the {b} of the {parent}.",
            "For all {table}, show the {a} and the {b} of the {parent}.",
            "I want the {a} of the {table} and the {b} of the {parent}.",
            "Join the {table} with their {parent}: list {a} and {b}.",
        ),
        (
            "Show me the {a} of the {table} with the {b} of their {parent}.",
            "For each of the {table}, give the {a} and the {b} of its {parent}.",
            "Get the {a} of {table} together with the {b} of their {parent}.",
            "Join {table} with {parent} and list {a} and {b}.",
        ),
    ),
)
"""Every form, all equally likely."""


def _tables(words: _Words, form: Form) -> tuple[Table, ...]:
    """Draws the tables of a question, the asked one first: a quarter of single-table questions have another beside."""
    if form.kind == "join":
        return _linked(words)
    if chance(words.random, 0.75):
        return (_table(words, form.columns_min),)
    if form.columns_min == _LINKED_COLUMNS and chance(words.random, 0.5):
        pair = _linked(words)
        return pair if chance(words.random, 0.5) else pair[::-1]
    first = _table(words, form.columns_min)
    return first, _table(words, 2, taken=first.name)


def _column_values(random: Random, column: Column, query: Query) -> list[str | int]:
    """Draws what stands in a column, such that other statements than the right one give other rows.

    A literal stands in some rows, with its neighbours if it is a number; grouped values repeat unequally; other
    values hardly repeat, so that other rows look otherwise. Yet one of them does, so that DISTINCT shows, but where
    rows are ordered, so that the first row never looks like the last.
    """
    literal = query.literals.get(column.name)
    if isinstance(literal, int):
        return [literal + offset for offset in _OFFSETS]
    if not column.values:
        return [*random.sample(range(1, 1_000), _ROWS)]
    if literal is not None or column.name == query.grouped:
        others = random.sample(column.values, 5)
        first, second, third, fourth = [
            *([literal] if literal is not None else []),
            *(value for value in others if value != literal),
        ][:4]
        return [*[first] * 5, *[second] * 4, *[third] * 2, fourth]
    values: list[str | int] = [*random.sample(column.values, _ROWS)]
    if " ORDER BY " not in query.sql:
        values[random.randrange(1, _ROWS)] = values[0]
    return values


def _inserts(table: Table, columns: Sequence[Sequence[str | int]]) -> str:
    rows = ", ".join(
        "(" + ", ".join(f"'{value}'" if isinstance(value, str) else str(value) for value in row) + ")"
        for row in zip(*columns, strict=True)
    )
    return f"CREATE TABLE {table}; INSERT INTO {table.name} VALUES {rows};"


def _script(random: Random, tables: Sequence[Table], query: Query) -> str:
    """Writes the database that a question is about: every key of a linked table is one of its parent's."""
    filled = {table: [_column_values(random, column, query) for column in table.columns] for table in tables}
    for table in tables:
        for parent in tables:
            for place, column in enumerate(table.columns):
                if column.name == f"{parent.name[:-1]}_id" and column.name not in query.literals:
                    filled[table][place] = random.sample(filled[parent][0][: _ROWS // 2] * 2, _ROWS)
    return "\n".join(_inserts(table, columns) for table, columns in filled.items())


def example(random: Random, split: Split) -> Example:
    """Draws a question about one or two tables; its `facts` hold the `script` that builds them."""
    words = _Words(random, split)
    form = random.choice(FORMS)
    tables = _tables(words, form)
    query = form.build(words, tables)
    wording = random.choice(form.train if split is Split.TRAIN else form.test)
    question = asked(random, wording.format(table=tables[0].name, **query.slots), HINTS[split])
    shown = [f"Table {table}" for table in tables]
    if chance(random, 0.5):
        shown.reverse()
    return Example("\n".join((*shown, question)), query.sql, form.kind, {"script": _script(random, tables, query)})


def is_right(asked_about: Example, answer: str) -> bool:
    """Whether a statement gives the rows of the right one: in its order where that one orders, else in any."""
    return execution_match(answer, asked_about.answer, asked_about.facts["script"])


def document(random: Random) -> str:
    """Draws a schema and statements over it, as a file of SQL has them; a third show how a table is made and filled."""
    words = _Words(random, Split.TRAIN)
    tables = _linked(words) if chance(random, 0.2) else (_table(words, 3),)
    forms = FORMS if len(tables) > 1 else FORMS[:-1]
    if chance(random, 1 / 3):
        values = [
            [words.value(column) if column.values else words.number() for _ in range(2)] for column in tables[0].columns
        ]
        lines = [_inserts(tables[0], values).replace("; ", ";\n")]
        forms, tables = FORMS[:-1], tables[:1]
    else:
        lines = [f"Table {table}" for table in tables]
    fitting = [form for form in forms if form.columns_min <= len(tables[0].columns)]
    lines += [f"{form.build(words, tables).sql};" for form in random.sample(fitting, random.randint(2, 3))]
    return "\n".join(lines)


TASK: Final = Task("sql", example, is_right, document)
