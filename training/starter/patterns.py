"""The regular expressions of the starter kit: what to match is said in words, the answer is one pattern.

Every form of question has one canonical spelling, and many wordings. A wording is a frame ("Give a regex for ...")
around a phrase ("words that start with ..."). Texts and sets of letters of `TEST` are every fifth of all; counts of
`TEST` are those that leave 3 when divided by 5.

An answer is right when it finds what it must, and does not find what it must not, among about a hundred short strings:
spelling is free. Because an answer is hostile until it is read, only patterns of a small dialect are ever run, whose
time is bounded: see `is_bounded`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_lowercase
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from training.starter.task import Example, Split, Task
from training.starter.words import ANIMALS, FOODS, THINGS, held_out, invented

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

TEXT_LENGTH_MAX: Final = 6
"""Characters of a text that a question quotes."""

DOCUMENT_LENGTH_MIN: Final = 60
ANSWER_LENGTH_MAX: Final = 1_000
PATTERN_LENGTH_MAX: Final = 80
CHOICES_MAX: Final = 4
"""Places where a pattern may try more than one way: each `*`, `+`, `?`, `{n,m}` and `|`."""

_TOKEN: Final = re.compile(
    r"""
      (?P<open> \( (?:\?:)? )
    | (?P<close> \) )
    | (?P<choice> \| )
    | (?P<repeat> (?: [*+?] | \{[0-9]{1,2}(?:,[0-9]{0,2})?\} ) \?? )
    | (?P<anchor> [$^] )
    | (?P<class> \[ \^? (?: \\[a-zA-Z.^$|\-] | (?!--|\|\|)[a-zA-Z0-9\ .,_$|*+?(){}-] )+ \] )
    | (?P<character> \\[a-zA-Z.^$*+?(){}[\]|\\-] | [a-zA-Z0-9\ .,_-] )
    """,
    re.VERBOSE,
)
"""A token of a pattern. Without `--` and `||` in a class, which a later Python may read as operations on sets."""

_MISPLACED_AFTER: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "repeat": frozenset({"start", "open", "choice", "repeat", "anchor", "group"}),
        "close": frozenset({"open"}),
    }
)
"""What a token may not follow: a quantifier, for one, no group that is not simple."""


@dataclass(frozen=True, slots=True)
class Values:
    """What a question may speak of; each form of question uses some of it.

    Args:
        first: A text of lower-case letters.
        second: Another, of which none contains the other.
        letters: Two to four different lower-case letters.
        low: A count, at least 2.
        high: A larger count.
    """

    first: str
    second: str
    letters: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Form:
    """A form of question.

    Args:
        name: The kind of its examples.
        pattern: Spells the canonical answer.
        matches: Whether a string is to be found, said without a pattern.
        train: Phrases of `TRAIN`. `{kind}` stands for words, lines, ...
        test: Phrases of `TEST`.
    """

    name: str
    pattern: Callable[[Values], str]
    matches: Callable[[Values, str], bool]
    train: tuple[str, ...]
    test: tuple[str, ...]


TRAIN_FRAMES: Final = (
    "Write a regular expression for {what}.",
    "Write a regex that matches {what}.",
    "Give a regex for {what}.",
    "Give me a pattern that finds {what}.",
    "Which regular expression matches {what}?",
    "What pattern matches {what}?",
    "I need a pattern for {what}.",
    "Regex for {what}?",
    "Match {what}.",
    "Find {what}.",
    "How do I match {what}?",
    "I need to find {what}.",
    "I want to match {what}.",
    "Show me how to find {what}.",
)
TEST_FRAMES: Final = (
    "Write a pattern that matches {what}.",
    "I need a regular expression for {what}.",
    "Which regex finds {what}?",
    "How do I find {what}?",
    "I need to match {what}.",
    "Show me how to match {what}.",
)
KINDS: Final = ("words", "strings", "lines", "texts", "names", "codes")


def _is_letters(text: str) -> bool:
    return text.isalpha() and text.islower()


def _is_dashed(values: Values, text: str) -> bool:
    head, dash, tail = text.partition("-")
    return bool(dash) and _is_letters(head) and tail.isdigit() and len(tail) == values.low


FORMS: Final = (
    Form(
        "starts",
        lambda values: f"^{values.first}",
        lambda values, text: text.startswith(values.first),
        (
            '{kind} that start with "{first}"',
            '{kind} starting with "{first}"',
            '{kind} that begin with "{first}"',
            '{kind} beginning with "{first}"',
            '{kind} with "{first}" at the start',
            'all {kind} that have "{first}" at the beginning',
        ),
        (
            'all {kind} starting with "{first}"',
            '{kind} that have "{first}" at the start',
            '{kind} with "{first}" at the beginning',
        ),
    ),
    Form(
        "ends",
        lambda values: f"{values.first}$",
        lambda values, text: text.endswith(values.first),
        (
            '{kind} that end with "{first}"',
            '{kind} ending with "{first}"',
            '{kind} that end in "{first}"',
            '{kind} ending in "{first}"',
            '{kind} with "{first}" at the end',
            'all {kind} whose end is "{first}"',
        ),
        (
            'all {kind} ending in "{first}"',
            '{kind} that have "{first}" at the end',
            'all {kind} that end with "{first}"',
        ),
    ),
    Form(
        "contains",
        lambda values: values.first,
        lambda values, text: values.first in text,
        (
            '{kind} that contain "{first}"',
            '{kind} containing "{first}"',
            '{kind} with "{first}" anywhere',
            '{kind} that have "{first}" somewhere',
            '{kind} with "{first}" somewhere inside',
            'all {kind} that contain "{first}" anywhere',
        ),
        (
            'all {kind} containing "{first}"',
            '{kind} that have "{first}" anywhere',
            '{kind} with "{first}" somewhere',
        ),
    ),
    Form(
        "exact",
        lambda values: f"^{values.first}$",
        lambda values, text: text == values.first,
        (
            'exactly "{first}"',
            'only "{first}"',
            'the text "{first}" and nothing else',
            '{kind} that are exactly "{first}"',
            'just "{first}" and nothing more',
            'the whole text "{first}", nothing else',
        ),
        (
            'exactly "{first}" and nothing else',
            '{kind} that are just "{first}"',
            'only "{first}" and nothing more',
        ),
    ),
    Form(
        "digits",
        lambda _values: r"^\d+$",
        lambda _values, text: text.isdigit(),
        (
            "{kind} of only digits",
            "{kind} that have only digits",
            "{kind} with nothing but digits",
            "{kind} made of digits only",
            "{kind} that are all digits",
            "whole numbers",
            "{kind} of one or more digits",
        ),
        (
            "{kind} that are made of digits only",
            "{kind} that have nothing but digits",
            "{kind} with only digits",
        ),
    ),
    Form(
        "digits-exactly",
        lambda values: rf"^\d{{{values.low}}}$",
        lambda values, text: text.isdigit() and len(text) == values.low,
        (
            "exactly {low} digits",
            "{kind} of exactly {low} digits",
            "{kind} of {low} digits",
            "{kind} with {low} digits and nothing else",
            "{kind} made of {low} digits",
            "numbers with {low} digits",
            "numbers of exactly {low} digits",
        ),
        (
            "{low} digits and nothing else",
            "{kind} made of exactly {low} digits",
            "numbers of {low} digits",
        ),
    ),
    Form(
        "letters-exactly",
        lambda values: f"^[a-z]{{{values.low}}}$",
        lambda values, text: _is_letters(text) and len(text) == values.low,
        (
            "exactly {low} letters",
            "{kind} of exactly {low} letters",
            "{kind} of {low} letters",
            "{kind} with {low} letters and nothing else",
            "{kind} made of {low} letters",
            "{kind} that are {low} letters long",
        ),
        (
            "{low} letters and nothing else",
            "{kind} made of exactly {low} letters",
            "{kind} that have {low} letters",
        ),
    ),
    Form(
        "digits-between",
        lambda values: rf"^\d{{{values.low},{values.high}}}$",
        lambda values, text: text.isdigit() and values.low <= len(text) <= values.high,
        (
            "{low} to {high} digits",
            "between {low} and {high} digits",
            "{kind} of {low} to {high} digits",
            "{kind} of between {low} and {high} digits",
            "{kind} with {low} to {high} digits",
            "numbers with between {low} and {high} digits",
        ),
        (
            "numbers with {low} to {high} digits",
            "{kind} with between {low} and {high} digits",
            "numbers of {low} to {high} digits",
        ),
    ),
    Form(
        "digits-at-least",
        lambda values: rf"^\d{{{values.low},}}$",
        lambda values, text: text.isdigit() and len(text) >= values.low,
        (
            "at least {low} digits",
            "{low} or more digits",
            "{kind} of at least {low} digits",
            "{kind} of {low} or more digits",
            "{kind} with at least {low} digits",
            "numbers with {low} or more digits",
        ),
        (
            "numbers with at least {low} digits",
            "{kind} with {low} or more digits",
            "numbers of at least {low} digits",
        ),
    ),
    Form(
        "starts-ends",
        lambda values: f"^{values.first}.*{values.second}$",
        lambda values, text: (
            text.startswith(values.first)
            and text.endswith(values.second)
            and len(text) >= len(values.first) + len(values.second)
        ),
        (
            '{kind} that start with "{first}" and end with "{second}"',
            '{kind} starting with "{first}" and ending with "{second}"',
            '{kind} that begin with "{first}" and end in "{second}"',
            '{kind} beginning with "{first}" and ending in "{second}"',
            '{kind} with "{first}" at the start and "{second}" at the end',
            '{kind} that go from "{first}" at the beginning to "{second}" at the end',
        ),
        (
            '{kind} that start with "{first}" and end in "{second}"',
            '{kind} beginning with "{first}" and ending with "{second}"',
            '{kind} that have "{first}" at the start and "{second}" at the end',
        ),
    ),
    Form(
        "starts-digit",
        lambda values: rf"^{values.first}.*\d$",
        lambda values, text: text.startswith(values.first) and text[-1].isdigit(),
        (
            '{kind} that start with "{first}" and end with a digit',
            '{kind} starting with "{first}" and ending with a digit',
            '{kind} that begin with "{first}" and end in a digit',
            '{kind} beginning with "{first}" and ending in a digit',
            '{kind} with "{first}" at the start and a digit at the end',
            '{kind} that go from "{first}" at the beginning to a digit at the end',
        ),
        (
            '{kind} that start with "{first}" and end in a digit',
            '{kind} beginning with "{first}" and ending with a digit',
            '{kind} that have "{first}" at the start and a digit at the end',
        ),
    ),
    Form(
        "either",
        lambda values: f"^({values.first}|{values.second})$",
        lambda values, text: text in (values.first, values.second),
        (
            '"{first}" or "{second}"',
            'either "{first}" or "{second}"',
            'exactly "{first}" or "{second}"',
            '{kind} that are "{first}" or "{second}"',
            'one of "{first}" and "{second}"',
            'only "{first}" or "{second}" and nothing else',
        ),
        (
            '{kind} that are either "{first}" or "{second}"',
            'either "{first}" or "{second}" and nothing else',
            'only "{first}" or "{second}"',
        ),
    ),
    Form(
        "then-digits",
        lambda values: rf"^{values.first}\d+$",
        lambda values, text: text.startswith(values.first) and text[len(values.first) :].isdigit(),
        (
            '"{first}" followed by digits',
            '"{first}" and then digits',
            '{kind} of "{first}" followed by digits',
            '{kind} of "{first}" and then one or more digits',
            '"{first}" and after it only digits',
            '{kind} with "{first}" first and then only digits',
        ),
        (
            '{kind} of "{first}" and then digits',
            '"{first}" followed by one or more digits',
            '{kind} with "{first}" first and after it only digits',
        ),
    ),
    Form(
        "letters-dash-digits",
        lambda values: rf"^[a-z]+-\d{{{values.low}}}$",
        _is_dashed,
        (
            "letters, a dash and {low} digits",
            "letters, then a dash, then {low} digits",
            "{kind} of letters, a dash and {low} digits",
            "{kind} made of letters, then a dash, then {low} digits",
            "letters followed by a dash and {low} digits",
            "{kind} with letters, then a dash and exactly {low} digits",
        ),
        (
            "{kind} of letters followed by a dash and {low} digits",
            "letters, then a dash and then {low} digits",
            "{kind} with letters, a dash and {low} digits",
        ),
    ),
    Form(
        "only-of",
        lambda values: f"^[{values.letters}]+$",
        lambda values, text: set(text) <= set(values.letters),
        (
            '{kind} of only the letters "{letters}"',
            '{kind} that have only letters of "{letters}"',
            '{kind} made of the letters "{letters}" only',
            '{kind} with nothing but the letters "{letters}"',
            '{kind} that use only letters from "{letters}"',
            'one or more of the letters "{letters}" and nothing else',
        ),
        (
            '{kind} that use only the letters "{letters}"',
            '{kind} made of nothing but the letters "{letters}"',
            '{kind} that have only the letters "{letters}"',
        ),
    ),
    Form(
        "none-of",
        lambda values: f"^[^{values.letters}]+$",
        lambda values, text: not set(text) & set(values.letters),
        (
            '{kind} with none of the letters "{letters}"',
            '{kind} that have none of the letters "{letters}"',
            '{kind} without any letter of "{letters}"',
            '{kind} that do not use the letters "{letters}"',
            '{kind} with no letter from "{letters}"',
            '{kind} that contain none of "{letters}"',
        ),
        (
            '{kind} that contain none of the letters "{letters}"',
            '{kind} without the letters "{letters}"',
            '{kind} that have no letter from "{letters}"',
        ),
    ),
)
_CONSONANTS: Final = "bdfgklmnprstvz"
_TEXTS: Final = sorted(
    {
        word
        for word in (*ANIMALS, *FOODS, *THINGS)
        if _is_letters(word) and word.isascii() and len(word) <= TEXT_LENGTH_MAX
    }
    | {onset + vowel for onset in _CONSONANTS for vowel in "aeiou"}
    | {onset + vowel + coda for onset in _CONSONANTS for vowel in "aeiou" for coda in _CONSONANTS}
)
TRAIN_TEXTS, TEST_TEXTS = held_out(_TEXTS)
_HELD_TEXTS: Final = frozenset(TEST_TEXTS)
_HELD_REMAINDER: Final = 3
TRAIN_COUNTS: Final = tuple(count for count in range(2, 20) if count % 5 != _HELD_REMAINDER)
TEST_COUNTS: Final = tuple(count for count in range(2, 20) if count % 5 == _HELD_REMAINDER)


def _draw_text(random: Random, split: Split) -> str:
    if split is Split.TEST:
        return random.choice(TEST_TEXTS)
    if random.random() < 1 / 3:
        word = invented(random)[:TEXT_LENGTH_MAX]
        if word not in _HELD_TEXTS:
            return word
    return random.choice(TRAIN_TEXTS)


def _draw_letters(random: Random, split: Split) -> str:
    while True:
        letters = "".join(random.sample(ascii_lowercase, random.randint(2, 4)))
        if are_held_letters(letters) == (split is Split.TEST):
            return letters


def are_held_letters(letters: str) -> bool:
    """Say whether a set of letters belongs to `TEST`: about every fifth does, whatever the order of its letters."""
    return sum(map(ord, letters)) % 5 == _HELD_REMAINDER


def draw_values(random: Random, split: Split) -> Values:
    """Draw all that a question of a split may speak of."""
    first = _draw_text(random, split)
    second = _draw_text(random, split)
    while first in second or second in first:
        second = _draw_text(random, split)
    low, high = sorted(random.sample(TRAIN_COUNTS if split is Split.TRAIN else TEST_COUNTS, 2))
    return Values(first, second, _draw_letters(random, split), low, high)


def strings_about(values: Values) -> tuple[str, ...]:
    """Return the strings that tell the forms of question apart for these values.

    Every string has at most 24 printable ASCII characters. For any form some are found and others miss by little: a
    character more, less or other, in front, inside or at the end.
    """
    first, second, letters = values.first, values.second, values.letters
    inside = letters[::-1] + letters[0]
    outside = "".join(letter for letter in "etaoinshr" if letter not in letters)[:4]
    number = "40718293650718293645"
    alphabet = "qwertyuiopasdfghjklzxcvbnm"
    return (
        *(first, second, f"{first}{second}", f"{second}{first}", f"{first}{first}", first.upper(), first.capitalize()),
        *(
            f"{first}7",
            f"{first}42",
            f"{first}905",
            f"4{first}",
            f"{first}o7",
            f"{first}7o",
            f"{first}-7",
            f"{first}77 ",
        ),
        *(
            f"{first}ow",
            f"{first}ey 1",
            f"ow{first}",
            f"u{first}i",
            f"3{first}5",
            f"ow {first}",
            f"{first} ow",
            f" {first}",
        ),
        *(first[1:], first[:-1], f"{first[0]}-{first[1:]}", first[::-1], f"{first[:-1]}7", f"{first[:-1]}w5"),
        *(f"{first}o{second}", f"{first}3{second}", f"{first}-{second}", f"{second}o{first}", f"w{first}i{second}"),
        *(f"{first}o{second}e", f"{first} or {second}", f"{first}|{second}", f"{second}7", f"{second}e", f"w{second}"),
        *(number[:length] for length in range(1, 21)),
        *("0" * values.low, number[-values.low :], number[-values.high :], number[1 : values.low + 2], "9" * 20),
        *(f"{number[: values.low - 1]}o", f" {number[: values.low]}", f"-{number[: values.low]}"),
        *(alphabet[: values.low], alphabet[3 : values.low + 3], alphabet[5 : values.low + 5], "a" * values.low),
        *(alphabet[: values.low - 1], alphabet[: values.low + 1], alphabet[: values.low].upper()),
        *(f"{alphabet[: values.low - 1]}7", f"7{alphabet[: values.low - 1]}"),
        *(f"we-{number[: values.low]}", f"a-{number[1 : values.low + 1]}", f"{first[:3]}-{number[: values.low]}"),
        *(f"we-{number[: values.low + 1]}", f"we-{number[: values.low - 1]}", f"we{number[: values.low]}"),
        *(f"w2-{number[: values.low]}", f"we {number[: values.low]}", f"we-{number[: values.low]}e"),
        *(f"WE-{number[: values.low]}", f"we-{alphabet[: values.low]}"),
        *(letters, inside, letters[0], letters[-1] * 3, f"{letters}{outside}", f"{outside}{letters[-1]}"),
        *(f"{letters[0]}{outside}", f"{outside[:2]}{letters[1]}{outside[2:]}", f"{letters}7", f"4{inside}"),
        *(outside, f"{outside}{outside[0]}", outside[1:], f"{outside}5", letters.upper(), f"{outside} {outside[::-1]}"),
    )


def example(random: Random, split: Split) -> Example:
    """Draw a question and its canonical pattern.

    The facts are `match` and `miss`: the strings that a right pattern finds, and those that it does not.
    """
    form = random.choice(FORMS)
    values = draw_values(random, split)
    frame = random.choice(TRAIN_FRAMES if split is Split.TRAIN else TEST_FRAMES)
    phrase = random.choice(form.train if split is Split.TRAIN else form.test)
    what = phrase.format(
        kind=random.choice(KINDS),
        first=values.first,
        second=values.second,
        letters=values.letters,
        low=values.low,
        high=values.high,
    )
    match: list[str] = []
    miss: list[str] = []
    for text in dict.fromkeys(strings_about(values)):
        (match if form.matches(values, text) else miss).append(text)
    facts = {"match": tuple(match), "miss": tuple(miss)}
    return Example(frame.format(what=what), form.pattern(values), form.name, facts)


def is_right(example: Example, answer: str) -> bool:
    """Say whether a pattern finds (`re.search`) every string that it must, and none that it must not."""
    pattern = answer[:ANSWER_LENGTH_MAX].strip() if len(answer) <= ANSWER_LENGTH_MAX else ""
    if not is_bounded(pattern):
        return False
    try:
        search = re.compile(pattern).search
    except re.error:
        return False
    return all(search(text) for text in example.facts["match"]) and not any(
        search(text) for text in example.facts["miss"]
    )


def is_bounded(pattern: str) -> bool:
    r"""Say whether a pattern belongs to the dialect that may be run: short, and fast on short strings.

    A backtracking matcher is slow for three reasons, and each is refused. What is repeated may be matched in more than
    one way (`(a+)+`, `(a|a)*`): no quantifier stands after a group that holds a quantifier or a `|`. Many places each
    try many lengths (`a*a*a*a*a*b`): at most `CHOICES_MAX` places choose. Counts are huge: they have two digits.
    Beyond that there are no back references, look-arounds, flags or other groups than `(...)` and `(?:...)`.
    """
    if not 0 < len(pattern) <= PATTERN_LENGTH_MAX:
        return False
    choices = 0
    position = 0
    before = "start"  # the name of the token before
    groups = [True]  # of the pattern and each open group: whether it is simple, without quantifier and choice
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            return False
        name = str(token.lastgroup)
        if name in _MISPLACED_AFTER and before in _MISPLACED_AFTER[name]:
            return False
        if name == "open":
            groups.append(True)
        elif name == "close":
            if len(groups) == 1:
                return False
            name = "simple group" if groups.pop() else "group"
        elif name in ("repeat", "choice"):
            choices += token[0][-1] != "}" or "," in token[0]
            groups = [False] * len(groups)
        before = name
        position = token.end()
    return choices <= CHOICES_MAX and len(groups) == 1


_REMARKS: Final = (
    r"# \d is one digit, \d+ is one digit or more.",
    "# ^ is where the text begins, $ is where it ends.",
    "# [a-z] is one small letter, [a-z]+ is a row of them.",
    "# . is any character, .* is any number of them.",
    r"# \d{4} is four digits, \d{2,4} is two, three or four.",
    "# (a|b) is a or b.",
    "# [^abc] is any character except a, b and c.",
    "# Without ^ and $ the text may stand anywhere.",
)
_LINES: Final = (
    "{pattern}  matches {match}",
    "{pattern}  matches {match}, not {miss}",
    "{pattern}  does not match {miss}",
    "pattern: {pattern}  strings: {match}",
    "regex {pattern} accepts {match} and refuses {miss}",
)


def document(random: Random) -> str:
    """Draw some lines as of a manual: patterns with strings that they match or miss, and remarks on the syntax."""
    lines = [random.choice(_REMARKS)] if random.random() < 1 / 2 else []
    count = random.randint(2, 4)
    while len(lines) < count or len("\n".join(lines)) < DOCUMENT_LENGTH_MIN:
        form = random.choice(FORMS)
        values = draw_values(random, Split.TRAIN)
        match: list[str] = []
        miss: list[str] = []
        for text in strings_about(values):
            if text == text.strip():
                (match if form.matches(values, text) else miss).append(text)
        lines.append(
            random.choice(_LINES).format(
                pattern=form.pattern(values),
                match=", ".join(random.sample(match, min(len(match), 2))),
                miss=random.choice(miss),
            )
        )
    return "\n".join(lines)


TASK: Final = Task("regex", example, is_right, document)
