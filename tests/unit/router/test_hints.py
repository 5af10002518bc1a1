"""`router_hint`: what is read, what it means, and what is no expression."""

from __future__ import annotations

import pytest

from services.router import hints

NUMBERS = {"length": 100.0}


def holds(text: str, *tags: str) -> bool:
    expression = hints.parse(text)
    assert expression is not None, text
    there = {(key, value) for key, _, value in (tag.partition("=") for tag in tags)}
    return hints.holds(expression, there.__contains__, NUMBERS)


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        ("database=sql", ("database=sql",), True),
        ("Database = SQL", ("database=sql",), True),
        ('task="unit conversion"', ("task=unit conversion",), True),
        ("a=1 OR b=2", ("b=2",), True),
        ("a=1 and b=2", ("b=2",), False),
        ("a=1 OR b=2 AND c=3", ("a=1",), True),
        ("(a=1 OR b=2) AND c=3", ("a=1",), False),
        ("NOT a=1 AND b=2", ("b=2",), True),
        ("NOT (a=1 OR b=2)", ("b=2",), False),
        ("length>99", (), True),
        ("length<99.5", (), False),
        ("unknown>0", (), False),
        ("not=1", ("not=1",), True),
    ],
)
def test_an_expression_means_what_it_says(text: str, tags: tuple[str, ...], *, expected: bool) -> None:
    assert holds(text, *tags) is expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sql",
        "a=",
        "a=1 b=2",
        "a=1 OR",
        "OR a=1",
        "(a=1",
        "a=1)",
        "a>many",
        "a<nan",
        "a>inf",
        "a=1; b=2",
        "__import__('os')",
        "(" * 17 + "a=1" + ")" * 17,
        "NOT " * 17 + "a=1",
        " OR ".join(["a=1"] * 65),
        "a=1" + " " * 1024 + "OR b=2",
    ],
)
def test_what_is_no_expression_or_too_large_is_none(text: str) -> None:
    assert hints.parse(text) is None


def test_the_largest_expression_is_read() -> None:
    assert holds("(" * 16 + "a=1" + ")" * 16, "a=1")
    largest = hints.parse(" OR ".join(["a=1"] * 64))
    assert largest is not None
    assert len([*hints.terms(largest)]) == 64
