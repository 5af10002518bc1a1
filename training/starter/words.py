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


_ENGLISH: Final = (
    *(word for word in (*ANIMALS, *FOODS, *THINGS) if len(word) > 3),  # noqa: PLR2004
    *listed(
        "about after again almost always animal another answer anything around because become before begin behind "
        "believe between beyond bottom bridge bright bring brother brown build building business carry catch center "
        "century certain chance change chapter charge child choice choose circle clean clear close common complete "
        "consider contain continue control corner correct cousin cover create cross culture current daughter decide "
        "degree design detail develop different dinner direct discover distance doctor double dream drive during "
        "early earth effect eight either element energy enough entire evening every example except expect explain "
        "family famous father feature field figure final finger finish first floor follow force foreign forest forget "
        "forward fourth freedom fresh friend front future garden general gentle glass golden government green ground "
        "group grow happen heart heavy history holiday hundred hurry husband idea image imagine important include "
        "increase inside instead interest island journey justice kitchen knowledge ladder language large later laugh "
        "learn leather leave letter level light listen little local machine magic manner marble market master matter "
        "measure member message middle minute mirror modern moment money morning mother motion mountain movement "
        "music narrow nation nature nearly never night nothing notice number object office often orange order organ "
        "other outside owner palace paper parent passage patient pattern people perfect period person picture pilot "
        "place planet plant player pleasant point police position possible power practice prepare present pretty "
        "price prince private problem process product program promise protect public purpose quality quarter question "
        "quick quiet rather reach ready reason receive record region relation remain remember report result return "
        "right river rough round sample school science season second secret sentence seven several shadow shape sharp "
        "should shoulder silver simple single sister small smooth social soldier something south space speak special "
        "spring square stand station still stone story straight strange stream street strong student subject success "
        "sudden summer supply support surface surprise system teacher thing think third thought thousand through "
        "today together tomorrow travel trouble twenty under understand university until usual valley value village "
        "visitor voice volume water weather week weight welcome western whether while white whole width window winter "
        "within without woman wonder world write yellow"
    ),
)
_KNOWN: Final = frozenset(_ENGLISH)
_SPLICED_MIN: Final = 4
_SPLICED_MAX: Final = 10


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


def spliced(random: Random) -> str:
    """Makes up a word from the beginning of one English word and the end of another: `whaper`, `cheetle`.

    It consists of pieces that real words consist of, unlike what `invented` makes: who copies both copies any word.

    Args:
        random: Where chance comes from.

    Returns:
        A word of 4 to 10 letters from a to z.
    """
    while True:
        one, other = random.choices(_ENGLISH, k=2)
        word = one[: random.randint(2, len(one) - 1)] + other[random.randint(1, len(other) - 2) :]
        if _SPLICED_MIN <= len(word) <= _SPLICED_MAX and word not in _KNOWN:
            return word


def held_out(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Holds every fifth word out.

    Args:
        words: A list, in its order.

    Returns:
        The words kept for training, and those held out for the test.
    """
    held = tuple(words[4::5])
    return tuple(word for word in words if word not in held), held
