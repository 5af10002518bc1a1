from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from hocket.cli.colours import Colours


def colour(style: Style) -> tuple[int, int, int]:
    assert style.color is not None
    return tuple(style.color.get_truecolor())  # type: ignore[return-value]  # three numbers


def test_the_base_alone_has_no_colour() -> None:
    assert Colours().style({}) == Colours().style({"a": 0.0}) == Style.null()


def test_experts_keep_their_colour_and_nobody_shares_one() -> None:
    colours = Colours()
    first = [colour(colours.style({name: 1.0})) for name in "abcdefghij"]

    assert [colour(colours.style({name: 0.5})) for name in "abcdefghij"] == first
    assert len(set(first)) == len(first)
    for before, after in pairwise(first):
        assert max(abs(x - y) for x, y in zip(before, after, strict=True)) > 60


@given(st.floats(-100, 100).filter(lambda weight: abs(weight) > 1e-6))
def test_a_mixture_lies_between_its_members(weight: float) -> None:
    colours = Colours()
    alone = [colour(colours.style({name: 1.0})) for name in "ab"]
    mixed = colour(colours.style({"a": weight, "b": 1.0}))

    for channel in range(3):
        low, high = sorted(each[channel] for each in alone)
        assert low - 1 <= mixed[channel] <= high + 1


def test_a_heavier_expert_counts_more_also_with_a_negative_weight() -> None:
    colours = Colours()
    a, b = (colour(colours.style({name: 1.0})) for name in "ab")
    mixed = colour(colours.style({"a": -3.0, "b": 1.0}))

    assert sum(abs(x - y) for x, y in zip(mixed, a, strict=True)) < sum(
        abs(x - y) for x, y in zip(mixed, b, strict=True)
    )
