"""The words that the tasks of the starter kit share."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random


def listed(text: str) -> tuple[str, ...]:
    """Reads a list that is written with spaces between its words.

    Args:
        text: The words.

    Returns:
        The words, in their order.
    """
    return tuple(text.split())


NAMES: Final = listed(
    "Ana Tom Mia Ben Eva Leo Sara Paul Nora Jack Lily Omar Ruth Hugo Clara Ivan Maria Adam Julia Felix "
    "Anna Max Lena David Rosa Peter Zoe Mark Alice Sam Emma Karl Ines Noah Laura Oscar Vera Simon Grace Ali "
    "Lucy Victor Elena Frank Amy Daniel Nina Robert Helen Jonas Kate Martin Olga Henry Jane "
    "Bruno Marta George Iris Yusuf"
)
"""First names."""

COUNTRIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "France": "Paris",
        "Spain": "Madrid",
        "Italy": "Rome",
        "Germany": "Berlin",
        "Portugal": "Lisbon",
        "England": "London",
        "Ireland": "Dublin",
        "Norway": "Oslo",
        "Sweden": "Stockholm",
        "Finland": "Helsinki",
        "Denmark": "Copenhagen",
        "Poland": "Warsaw",
        "Austria": "Vienna",
        "Hungary": "Budapest",
        "Greece": "Athens",
        "Turkey": "Ankara",
        "Egypt": "Cairo",
        "Kenya": "Nairobi",
        "Japan": "Tokyo",
        "China": "Beijing",
        "India": "Delhi",
        "Peru": "Lima",
        "Cuba": "Havana",
        "Canada": "Ottawa",
    }
)
"""Countries, each with its capital."""

CITIES: Final = (
    *COUNTRIES.values(),
    *listed(
        "Hamburg Milan Porto Seville Lyon Boston Chicago Bergen Krakow Geneva Turin Munich Leeds Osaka Denver Toronto"
    ),
)
"""Cities: the capitals, then others."""

COLOURS: Final = listed("red blue green yellow black white brown orange purple pink grey gold silver")
"""Colours."""

ANIMALS: Final = listed(
    "dog cat horse cow sheep goat pig duck hen goose lion tiger bear wolf fox mouse rabbit frog bee spider "
    "eagle owl shark whale snake camel monkey elephant zebra donkey"
)
"""Animals."""

FOODS: Final = listed(
    "bread cheese milk rice soup apple pear plum lemon banana onion carrot potato tomato salad cake butter "
    "honey egg fish bean grape cherry pasta pizza sugar salt tea coffee juice"
)
"""Things to eat and drink."""

THINGS: Final = listed(
    "book chair table lamp pen cup plate knife spoon bag box clock key door window bed boat kite ball hat "
    "coat shoe ring drum bike car train map phone brush rope basket mirror pillow ladder hammer "
    "bottle candle coin stamp"
)
"""Things of a house."""

_ONSETS: Final = listed("b bl br d dr f fl g gl gr h j k kl l m n p pl pr r s sk sn sp st t tr v w z")
_VOWELS: Final = listed("a e i o u")
_CODAS: Final = ("", "", "", "n", "r", "l", "m", "s", "t", "k")


def invented(random: Random) -> str:
    """Makes up a pronounceable lower-case word of two or three syllables.

    Args:
        random: Where chance comes from.

    Returns:
        A word of 4 to 10 letters from a to z.
    """
    syllables = random.choice((2, 2, 3))
    body = "".join(random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(syllables))
    return body + random.choice(_CODAS)


def held_out(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Holds every fifth word out.

    Args:
        words: A list, in its order.

    Returns:
        The words kept for training, and those held out for the test.
    """
    held = tuple(words[4::5])
    return tuple(word for word in words if word not in held), held
