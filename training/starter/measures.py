"""Units, dates and money: short word problems whose answer is a number with its unit, a day or a month.

Held out of TRAIN are a fifth of all pairs of numbers (`is_held`), of all units with their quantities, and of all days
with their distances; a fifth of all things and names; and the wordings under `_WORDINGS[...][Split.TEST]`. A held pair
`(a, b)` of a sum or a product has its mirror `(b, a)` in TRAIN, so that every result can be known.

The short tables (the multiples of 12, 24 and 60; the days and months in order) are general knowledge: they stand whole
in `fact`, as they do in a schoolbook, and it is the questions about a fifth of them that are held out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from training.starter.task import Example, Split, Task
from training.starter.words import NAMES, THINGS, held_out, invented

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

_ANSWER_CHARACTERS_MAX: Final = 1_000
_DOCUMENT_CHARACTERS_MIN: Final = 60
_HELD_EVERY: Final = 5
_INVENTED_SHARE: Final = 1 / 3
_TABLE_MAX: Final = 12
_DAY_OF_MONTH_MAX: Final = 28
_MULTIPLES_MAX: Final = {10: 12, 12: 12, 24: 7, 60: 12, 100: 12, 1000: 12}
"""The short tables: of each factor, how far its table goes."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One of a unit is `factor` of a smaller one.

    Args:
        large: How the large unit is written after a number.
        small: How the small unit is written after a number.
        large_names: What else a question may call it.
        small_names: What else a question may call it.
        factor: How many small ones are a large one.
        quantity_max: The most large ones that are asked for.
    """

    large: str
    small: str
    large_names: tuple[str, ...]
    small_names: tuple[str, ...]
    factor: int
    quantity_max: int


CONVERSIONS: Final = (
    Conversion("km", "m", ("km", "kilometres"), ("m", "metres"), 1000, 99),
    Conversion("m", "cm", ("m", "metres"), ("cm", "centimetres"), 100, 99),
    Conversion("cm", "mm", ("cm", "centimetres"), ("mm", "millimetres"), 10, 99),
    Conversion("kg", "g", ("kg", "kilograms"), ("g", "grams"), 1000, 99),
    Conversion("litres", "ml", ("litres",), ("ml", "millilitres"), 1000, 99),
    Conversion("euros", "cents", ("euros",), ("cents",), 100, 99),
    Conversion("hours", "minutes", ("hours",), ("minutes",), 60, 12),
    Conversion("minutes", "seconds", ("minutes",), ("seconds",), 60, 12),
    Conversion("days", "hours", ("days",), ("hours",), 24, 7),
    Conversion("weeks", "days", ("weeks",), ("days",), 7, 12),
    Conversion("years", "months", ("years",), ("months",), 12, 12),
)
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_CURRENCIES: Final = ("euros", "dollars", "pounds")
_PAYMENTS: Final = (10, 20, 50, 100)
_THINGS: Final = dict(
    zip(
        Split,
        held_out([thing for thing in THINGS if re.fullmatch("(?![aeiou]).*(?<!fe|sh)(?<![sx])", thing)]),
        strict=True,
    )
)
"""Things of TRAIN and of TEST that take `a` before them and an `s` after them."""
_NAMES: Final = dict(zip(Split, held_out(NAMES), strict=True))

_SYNONYMS: Final[Mapping[str, str]] = {
    synonym: unit
    for unit, synonyms in {
        "km": "kilometre kilometres kilometer kilometers",
        "m": "metre metres meter meters",
        "cm": "centimetre centimetres centimeter centimeters",
        "mm": "millimetre millimetres millimeter millimeters",
        "kg": "kilogram kilograms kilo kilos",
        "g": "gram grams",
        "litres": "l litre liter liters",
        "ml": "millilitre millilitres milliliter milliliters",
        "euros": "euro eur €",
        "cents": "cent ct",
        "dollars": "dollar usd $",
        "pounds": "pound gbp £",
        "years": "year",
        "months": "month",
        "weeks": "week",
        "days": "day",
        "hours": "hour h hrs hr",
        "minutes": "minute min mins",
        "seconds": "second s sec secs",
    }.items()
    for synonym in synonyms.split()
}

_WORDINGS: Final[Mapping[str, Mapping[Split, tuple[str, ...]]]] = {
    "convert": {
        Split.TRAIN: (
            "How many {target} are {a} {source}?",
            "How many {target} are there in {a} {source}?",
            "Convert {a} {source} to {target}.",
            "Please convert {a} {source} into {target}.",
            "What is {a} {source} in {target}?",
            "{a} {source} in {target}?",
            "Write {a} {source} in {target}.",
            "Give {a} {source} as {target}.",
            "Change {a} {source} to {target}.",
            "I have {a} {source}. How many {target} is that?",
        ),
        Split.TEST: (
            "Please give {a} {source} in {target}.",
            "Convert to {target}: {a} {source}.",
            "What are {a} {source} in {target}?",
            "In {target}, how many are {a} {source}?",
        ),
    },
    "day-after": {
        Split.TRAIN: (
            "Which day is {a} days after {day}?",
            "What day is {a} days after {day}?",
            "What day of the week comes {a} days after {day}?",
            "Today is {day}. Which day is it in {a} days?",
            "If today is {day}, what day is it in {a} days?",
            "It is {day}. What day is it {a} days later?",
            "Count {a} days from {day}. Which day is it?",
            "{name} leaves on {day} and comes back {a} days later. On which day?",
        ),
        Split.TEST: (
            "Today is {day}. What day comes {a} days later?",
            "What day of the week is it {a} days after {day}?",
            "{name} leaves on {day}. Which day is it {a} days later?",
        ),
    },
    "day-before": {
        Split.TRAIN: (
            "Which day is {a} days before {day}?",
            "What day is {a} days before {day}?",
            "What day of the week comes {a} days before {day}?",
            "Today is {day}. Which day was it {a} days ago?",
            "If today is {day}, what day was it {a} days ago?",
            "It is {day}. What day was it {a} days earlier?",
            "Count {a} days back from {day}. Which day is it?",
            "{name} comes on {day} and left {a} days earlier. On which day?",
        ),
        Split.TEST: (
            "Today is {day}. What day was it {a} days earlier?",
            "What day of the week is it {a} days before {day}?",
            "It is {day}. Which day was {a} days ago?",
        ),
    },
    "month-after": {
        Split.TRAIN: (
            "Which month is {a} months after {month}?",
            "What month is {a} months after {month}?",
            "What month of the year comes {a} months after {month}?",
            "It is {month}. Which month is it in {a} months?",
            "If it is {month} now, what month is it in {a} months?",
            "It is {month}. What month is it {a} months later?",
            "Count {a} months from {month}. Which month is it?",
            "{name} leaves in {month} and comes back {a} months later. In which month?",
        ),
        Split.TEST: (
            "It is {month} now. What month comes {a} months later?",
            "What month of the year is it {a} months after {month}?",
            "{name} leaves in {month}. Which month is it {a} months later?",
        ),
    },
    "date-after": {
        Split.TRAIN: (
            "What is the date {b} days after {a} {month}?",
            "Which date is {b} days after {a} {month}?",
            "Today is {a} {month}. What is the date in {b} days?",
            "If today is {a} {month}, which date is it in {b} days?",
            "It is {a} {month}. What date is it {b} days later?",
            "Count {b} days from {a} {month}. What is the date?",
            "{name} leaves on {a} {month} and comes back {b} days later. On which date?",
            "What date comes {b} days after {a} {month}?",
        ),
        Split.TEST: (
            "Today is {a} {month}. Which date comes {b} days later?",
            "What date is it {b} days after {a} {month}?",
            "{name} leaves on {a} {month}. What is the date {b} days later?",
        ),
    },
    "date-before": {
        Split.TRAIN: (
            "What is the date {b} days before {a} {month}?",
            "Which date is {b} days before {a} {month}?",
            "Today is {a} {month}. What was the date {b} days ago?",
            "If today is {a} {month}, which date was it {b} days ago?",
            "It is {a} {month}. What date was it {b} days earlier?",
            "Count {b} days back from {a} {month}. What is the date?",
            "{name} comes on {a} {month} and left {b} days earlier. On which date?",
            "What date comes {b} days before {a} {month}?",
        ),
        Split.TEST: (
            "Today is {a} {month}. Which date was it {b} days earlier?",
            "What date is it {b} days before {a} {month}?",
            "It is {a} {month}. What was the date {b} days ago?",
        ),
    },
    "change": {
        Split.TRAIN: (
            "A {thing} costs {b} {currency}. What is the change from {a} {currency}?",
            "A {thing} costs {b} {currency}. How much change is there from {a} {currency}?",
            "What is the change from {a} {currency} if a {thing} costs {b} {currency}?",
            "{name} buys a {thing} for {b} {currency} and pays with {a} {currency}. What is the change?",
            "I pay {a} {currency} for a {thing} that costs {b} {currency}. How much change do I get?",
            "{name} has {a} {currency} and buys a {thing} for {b} {currency}. How much is left?",
            "The price of a {thing} is {b} {currency}. {name} pays {a} {currency}. How much comes back?",
            "I have {a} {currency}. A {thing} costs {b} {currency}. What is left?",
        ),
        Split.TEST: (
            "{name} pays {a} {currency} for a {thing} that costs {b} {currency}. What is the change?",
            "The price of a {thing} is {b} {currency}. What is the change from {a} {currency}?",
            "I buy a {thing} for {b} {currency} and pay with {a} {currency}. How much change do I get?",
        ),
    },
    "together": {
        Split.TRAIN: (
            "A {thing} costs {a} {currency} and a {other} {b} {currency}. What do they cost together?",
            "A {thing} costs {a} {currency} and a {other} costs {b} {currency}. What is the price of both?",
            "What do a {thing} for {a} {currency} and a {other} for {b} {currency} cost together?",
            "{name} buys a {thing} for {a} {currency} and a {other} for {b} {currency}. How much is that together?",
            "How much are a {thing} at {a} {currency} and a {other} at {b} {currency} together?",
            "The {thing} is {a} {currency}, the {other} is {b} {currency}. How much for both?",
            "{name} pays {a} {currency} for a {thing} and {b} {currency} for a {other}. How much is that in all?",
            "I buy a {thing} for {a} {currency} and a {other} for {b} {currency}. What do I pay?",
        ),
        Split.TEST: (
            "{name} buys a {thing} for {a} {currency} and a {other} for {b} {currency}. What do they cost together?",
            "A {thing} costs {a} {currency} and a {other} {b} {currency}. How much is that in all?",
            "The {thing} is {a} {currency}, the {other} is {b} {currency}. What is the price of both together?",
        ),
    },
    "each": {
        Split.TRAIN: (
            "What do {a} {thing}s cost at {b} {currency} each?",
            "How much do {a} {thing}s cost at {b} {currency} each?",
            "A {thing} costs {b} {currency}. What do {a} {thing}s cost?",
            "One {thing} costs {b} {currency}. How much are {a} {thing}s?",
            "{name} buys {a} {thing}s for {b} {currency} each. What is the price of all?",
            "{name} buys {a} {thing}s at {b} {currency} each. How much is that in all?",
            "The price of one {thing} is {b} {currency}. What is the price of {a} {thing}s?",
            "I buy {a} {thing}s for {b} {currency} each. What do I pay?",
        ),
        Split.TEST: (
            "{name} buys {a} {thing}s at {b} {currency} each. What do they cost?",
            "One {thing} costs {b} {currency}. What is the price of {a} {thing}s?",
            "I buy {a} {thing}s at {b} {currency} each. How much is that in all?",
        ),
    },
}


def is_held(first: int, second: int) -> bool:
    """Whether a pair is of TEST. The mirror of a held pair never is one."""
    return first % _HELD_EVERY != 0 and (first + 2 * second) % _HELD_EVERY == 0


def is_held_difference(whole: int, part: int) -> bool:
    """Whether a subtraction is of TEST: for each whole, two parts of ten."""
    return (whole + whole // 10 + 2 * part) % _HELD_EVERY == 0


def _sum(random: Random, whole_max: int) -> tuple[int, int]:
    """Two numbers to add, most of them a larger and a small one, in either order."""
    small = random.randint(2, 12)
    pair = (random.randint(2, whole_max - small), small)
    return pair if random.random() < 2 / 3 else pair[::-1]


def _difference(random: Random, whole_max: int) -> tuple[int, int]:
    """A number of at most `whole_max`, and a smaller one to take away."""
    whole = random.randint(4, whole_max)
    return whole, random.randint(2, min(12, whole - 1))


def _product(random: Random) -> tuple[int, int]:
    return random.randint(2, _TABLE_MAX), random.randint(2, 9)


def _currency(random: Random) -> str:
    return random.choice(_CURRENCIES)


def _convert(random: Random) -> tuple[bool, Mapping[str, object], str]:
    index = random.randrange(len(CONVERSIONS))
    unit = CONVERSIONS[index]
    quantity = random.randint(2, unit.quantity_max)
    held = (quantity + 2 * index) % _HELD_EVERY == 0
    large, small = random.choice(unit.large_names), random.choice(unit.small_names)
    if random.random() < 1 / 4:
        values = {"a": quantity * unit.factor, "source": small, "target": large}
        return held, values, f"{quantity} {unit.large}"
    return held, {"a": quantity, "source": large, "target": small}, f"{quantity * unit.factor} {unit.small}"


def _day(random: Random, *, sign: int) -> tuple[bool, Mapping[str, object], str]:
    index, distance = random.randrange(len(DAYS)), random.randint(2, 6)
    values = {"a": distance, "day": DAYS[index]}
    return (index + 2 * distance) % _HELD_EVERY == 0, values, DAYS[(index + sign * distance) % len(DAYS)]


def _month_after(random: Random) -> tuple[bool, Mapping[str, object], str]:
    index, distance = random.randrange(len(MONTHS)), random.randint(2, 5)
    values = {"a": distance, "month": MONTHS[index]}
    return (index + 2 * distance) % _HELD_EVERY == 0, values, MONTHS[(index + distance) % len(MONTHS)]


def _date_after(random: Random) -> tuple[bool, Mapping[str, object], str]:
    distance = random.randint(2, 12)
    day, month = random.randint(1, _DAY_OF_MONTH_MAX - distance), random.choice(MONTHS)
    return is_held(day, distance), {"a": day, "b": distance, "month": month}, f"{day + distance} {month}"


def _date_before(random: Random) -> tuple[bool, Mapping[str, object], str]:
    (day, distance), month = _difference(random, _DAY_OF_MONTH_MAX), random.choice(MONTHS)
    return is_held_difference(day, distance), {"a": day, "b": distance, "month": month}, f"{day - distance} {month}"


def _change(random: Random) -> tuple[bool, Mapping[str, object], str]:
    paid = random.choice(_PAYMENTS)
    price, currency = random.randint(2, min(paid - 2, 39)), _currency(random)
    return is_held_difference(paid, price), {"a": paid, "b": price, "currency": currency}, f"{paid - price} {currency}"


def _together(random: Random) -> tuple[bool, Mapping[str, object], str]:
    (first, second), currency = _sum(random, 60), _currency(random)
    return is_held(first, second), {"a": first, "b": second, "currency": currency}, f"{first + second} {currency}"


def _each(random: Random) -> tuple[bool, Mapping[str, object], str]:
    (count, price), currency = _product(random), _currency(random)
    return is_held(count, price), {"a": count, "b": price, "currency": currency}, f"{count * price} {currency}"


_FORMS: Final[Mapping[str, Callable[[Random], tuple[bool, Mapping[str, object], str]]]] = {
    "convert": _convert,
    "day-after": lambda random: _day(random, sign=1),
    "day-before": lambda random: _day(random, sign=-1),
    "month-after": _month_after,
    "date-after": _date_after,
    "date-before": _date_before,
    "change": _change,
    "together": _together,
    "each": _each,
}
"""Of each form: whether the drawn values are of TEST, the values, and the answer."""
_KINDS: Final = ("convert", "convert", *_FORMS)


def _thing(random: Random, split: Split) -> str:
    if split is Split.TRAIN:
        while random.random() < _INVENTED_SHARE:
            word = invented(random)
            if not word.endswith("s"):
                return word
    return random.choice(_THINGS[split])


def _example(random: Random, split: Split) -> Example:
    kind = random.choice(_KINDS)
    while True:
        held, values, answer = _FORMS[kind](random)
        if held == (split is Split.TEST):
            break
    thing = other = _thing(random, split)
    while other == thing:
        other = _thing(random, split)
    wording = random.choice(_WORDINGS[kind][split])
    name = random.choice(_NAMES[split])
    return Example(wording.format(**values, thing=thing, other=other, name=name), answer, kind)


def _normal(text: str) -> list[str]:
    """The numbers and words of an answer, without what does not count: case, spaces, a final dot, a unit's spelling."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower()).strip().removesuffix(".")
    words = re.findall(r"\d+|[^\W\d]+|\S", text)
    return [_SYNONYMS.get(word, word) for word in words]


def _is_right(example: Example, answer: str) -> bool:
    return len(answer) <= _ANSWER_CHARACTERS_MAX and _normal(answer) == _normal(example.answer)


def _sum_fact(random: Random) -> str | None:
    first, second = _sum(random, 100)
    return None if is_held(first, second) else f"{first} + {second} = {first + second}"


def _difference_fact(random: Random) -> str | None:
    whole, part = _difference(random, 100)
    if random.random() < 1 / 3:
        whole = random.choice(_PAYMENTS)
        part = random.randint(1, whole - 1)
    return None if is_held_difference(whole, part) else f"{whole} - {part} = {whole - part}"


def _product_fact(random: Random) -> str | None:
    first, second = random.randint(2, _TABLE_MAX), random.randint(2, _TABLE_MAX)
    return None if is_held(first, second) else f"{first} x {second} = {first * second}"


def _table_fact(random: Random) -> str:
    factor, count_max = random.choice(tuple(_MULTIPLES_MAX.items()))
    count = random.randint(2, count_max)
    return f"{count} x {factor} = {count * factor}"


def _calendar_fact(random: Random) -> str:
    names, unit, distance_max = random.choice(((DAYS, "day", 6), (MONTHS, "month", 5)))
    index, distance, before = random.randrange(len(names)), random.randint(1, distance_max), random.random() < 1 / 2
    found = names[(index - distance if before else index + distance) % len(names)]
    count = f"{distance} {unit}" + ("" if distance == 1 else "s")
    return f"{count} {'before' if before else 'after'} {names[index]} is {found}"


_FACTS: Final = (_sum_fact, _difference_fact, _product_fact, _table_fact, _calendar_fact)


def fact(random: Random) -> str:
    """Draws a line of a schoolbook's tables: `7 + 5 = 12`, `6 x 60 = 360`, `3 days after Monday is Thursday`.

    Args:
        random: Where chance comes from.

    Returns:
        A line of sums, differences and products of TRAIN, or of the short tables.
    """
    while True:
        line = random.choice(_FACTS)(random)
        if line is not None:
            return line


def _unit_line(random: Random) -> str:
    unit = random.choice(CONVERSIONS)
    large = unit.large if len(unit.large) < len("day") else unit.large.removesuffix("s")
    return f"1 {large} = {unit.factor} {unit.small}"


def _order(random: Random) -> str:
    """Some days or months in their order."""
    names = random.choice((DAYS, MONTHS))
    start, count = random.randrange(len(names)), random.randint(3, 7)
    return ", ".join(names[(start + index) % len(names)] for index in range(count))


def _document(random: Random) -> str:
    lines: list[str] = []
    while (length := sum(map(len, lines))) < _DOCUMENT_CHARACTERS_MIN or (
        length < _DOCUMENT_CHARACTERS_MIN * 5 and random.random() < 1 / 2
    ):
        lines.append(random.choice((fact, fact, fact, _unit_line, _order))(random))
    return "\n".join(lines)


TASK: Final = Task("measures", _example, _is_right, _document)
