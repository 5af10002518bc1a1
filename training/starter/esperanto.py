"""Esperanto, in two halves: an expert of nature, an expert of the home, and sentences that need both.

The halves share grammar words and a few verbs and adjectives; their nouns, and all other verbs and adjectives, are
disjoint. A sentence is drawn in English and in Esperanto together, and one is the translation of the other.

Held out of TRAIN are combinations of words (`_is_held`: a fifth of all of subject, verb and object), never words, and
the wordings under `_WORDINGS[...][Split.TEST]`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from training.starter.task import Example, Split, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

_ANSWER_CHARACTERS_MAX: Final = 1_000
_DOCUMENT_CHARACTERS_MIN: Final = 60
_HELD_EVERY: Final = 5
_HATS: Final = {"cx": "ĉ", "gx": "ĝ", "hx": "ĥ", "jx": "ĵ", "sx": "ŝ", "ux": "ŭ"}
"""The letters of Esperanto that ASCII lacks, by their usual spelling in ASCII."""


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun: its two English forms, and its root: `hund` is inflected to `hundo`, `hundoj`, `hundon`, `hundojn`."""

    english: str
    english_plural: str
    root: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb: its English forms, and its root: `vid` is inflected to `vidas`, `vidis`."""

    english: str
    english_third: str
    english_past: str
    root: str


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words of one half.

    Args:
        actors: Animals or people: what acts.
        things: What is acted on, or where one is.
        on_all: Verbs that take any object.
        on_things: Verbs that take a thing.
        alone: Verbs that take no object.
        adjectives: English and the Esperanto root, for any noun of this half.
    """

    actors: tuple[Noun, ...]
    things: tuple[Noun, ...]
    on_all: tuple[Verb, ...]
    on_things: tuple[Verb, ...]
    alone: tuple[Verb, ...]
    adjectives: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence in both languages, lower case and without a dot; `core` are its words that tell its split."""

    form: str
    core: tuple[int, int, int]
    english: str
    esperanto: str


def _nouns(text: str) -> tuple[Noun, ...]:
    """Reads `english root` or `english/plural root`, separated by commas."""
    nouns = []
    for entry in text.split(","):
        english, root = entry.split()
        singular, _, plural = english.partition("/")
        nouns.append(Noun(singular, plural or singular + "s", root))
    return tuple(nouns)


def _verbs(text: str) -> tuple[Verb, ...]:
    """Reads `english/past root`, separated by commas."""
    verbs = []
    for entry in text.split(","):
        english, root = entry.split()
        base, _, past = english.partition("/")
        third = base[:-1] + "ies" if base == "carry" else base + ("es" if base.endswith("sh") else "s")
        verbs.append(Verb(base, third, past, root))
    return tuple(verbs)


def _adjectives(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [entry.split() for entry in text.split(",")]
    return tuple((english, root) for english, root in pairs)


_SHARED_VERBS: Final = _verbs("see/saw vid, love/loved am, find/found trov")
_SHARED_ADJECTIVES: Final = _adjectives("big grand, small malgrand, beautiful bel, good bon")

NATURE: Final = Lexicon(
    actors=_nouns(
        "dog hund, cat kat, horse ĉeval, cow bovin, bird bird, frog ran, wolf/wolves lup, fox/foxes vulp, bear urs,"
        "rabbit kunikl, mouse/mice mus, goat kapr, pig pork, lion leon, bee abel, snake serpent, owl strig, duck anas"
    ),
    things=_nouns(
        "tree arb, flower flor, forest arbar, leaf/leaves foli, river river, mountain mont, lake lag, sea mar,"
        "field kamp, stone ŝton, cloud nub, star stel, rose roz, wind vent, branch/branches branĉ, island insul,"
        "nest nest, cave kavern"
    ),
    on_all=(
        *_SHARED_VERBS,
        *_verbs(
            "hunt/hunted ĉas, follow/followed sekv, hear/heard aŭd, bite/bit mord, guard/guarded gard, eat/ate manĝ"
        ),
    ),
    on_things=_verbs("drink/drank trink, smell/smelled flar"),
    alone=_verbs("run/ran kur, sleep/slept dorm, swim/swam naĝ, sing/sang kant"),
    adjectives=(
        *_SHARED_ADJECTIVES,
        *_adjectives(
            "white blank, black nigr, wild sovaĝ, young jun, fast rapid, strong fort, green verd, quiet kviet,"
            "hungry malsat, angry koler"
        ),
    ),
)
"""Animals, plants and weather."""

HOME: Final = Lexicon(
    actors=_nouns(
        "mother patrin, father patr, brother frat, sister fratin, son fil, daughter filin, uncle onkl, aunt onklin,"
        "grandmother avin, grandfather av, baker bakist, guest gast, child/children infan, neighbour najbar"
    ),
    things=_nouns(
        "table tabl, chair seĝ, bed lit, door pord, window fenestr, lamp lamp, cup tas, plate teler, spoon kuler,"
        "knife/knives tranĉil, fork fork, pot pot, shirt ĉemiz, coat mantel, hat ĉapel, shoe ŝu, soup sup, cake kuk,"
        "mirror spegul, carpet tapiŝ, oven forn, kitchen kuirej"
    ),
    on_all=(*_SHARED_VERBS, *_verbs("wash/washed lav, carry/carried port, bring/brought alport")),
    on_things=_verbs("buy/bought aĉet, sell/sold vend, take/took pren, use/used uz, break/broke romp"),
    alone=_verbs("sit/sat sid, laugh/laughed rid, work/worked labor, dance/danced danc"),
    adjectives=(
        *_SHARED_ADJECTIVES,
        *_adjectives(
            "red ruĝ, new nov, clean pur, warm varm, heavy pez, sweet dolĉ, happy feliĉ, round rond, dry sek, tired lac"
        ),
    ),
)
"""Kitchen, furniture, family and clothes."""

_PLACES: Final = (("in", "en"), ("on", "sur"), ("under", "sub"), ("near", "apud"))
_NOUN_INDEX: Final[Mapping[Noun, int]] = {
    noun: index for index, noun in enumerate((*NATURE.actors, *NATURE.things, *HOME.actors, *HOME.things))
}
_VERB_INDEX: Final[Mapping[Verb, int]] = {
    verb: index
    for index, verb in enumerate(
        dict.fromkeys(
            verb for lexicon in (NATURE, HOME) for verb in (*lexicon.on_all, *lexicon.on_things, *lexicon.alone)
        )
    )
}
_ADJECTIVE_INDEX: Final[Mapping[tuple[str, str], int]] = {
    adjective: index for index, adjective in enumerate(dict.fromkeys((*NATURE.adjectives, *HOME.adjectives)))
}


def _is_held(core: tuple[int, int, int]) -> bool:
    """Whether a combination of subject, verb (or adjective) and object is of TEST."""
    subject, verb, thing = core
    return (subject + 2 * verb + 3 * thing) % _HELD_EVERY == 0


def _noun_phrase(
    noun: Noun, *, plural: bool, accusative: bool = False, adjective: tuple[str, str] | None = None
) -> tuple[str, str]:
    """A noun with its article in English and in Esperanto, where an adjective agrees in number and in case."""
    ending = ("j" if plural else "") + ("n" if accusative else "")
    english = noun.english_plural if plural else noun.english
    if adjective is None:
        return f"the {english}", f"la {noun.root}o{ending}"
    return f"the {adjective[0]} {english}", f"la {adjective[1]}a{ending} {noun.root}o{ending}"


def _verb_phrase(verb: Verb, *, plural: bool, past: bool, negated: bool = False) -> tuple[str, str]:
    esperanto = verb.root + ("is" if past else "as")
    if negated:
        helper = "did" if past else "do" if plural else "does"
        return f"{helper} not {verb.english}", f"ne {esperanto}"
    english = verb.english_past if past else verb.english if plural else verb.english_third
    return english, esperanto


def _join(form: str, core: tuple[int, int, int], *phrases: tuple[str, str]) -> Sentence:
    return Sentence(form, core, " ".join(each[0] for each in phrases), " ".join(each[1] for each in phrases))


def _acts(random: Random, first: Lexicon, _second: Lexicon) -> Sentence:
    """`the dog sleeps`."""
    noun, verb = random.choice(first.actors), random.choice(first.alone)
    plural, past = random.random() < 1 / 3, random.random() < 1 / 3
    core = (_NOUN_INDEX[noun], _VERB_INDEX[verb], 0)
    return _join("acts", core, _noun_phrase(noun, plural=plural), _verb_phrase(verb, plural=plural, past=past))


def _is(random: Random, first: Lexicon, _second: Lexicon) -> Sentence:
    """`the dogs are big`."""
    noun, adjective = random.choice((*first.actors, *first.things)), random.choice(first.adjectives)
    plural, past = random.random() < 1 / 3, random.random() < 1 / 3
    core = (_NOUN_INDEX[noun], _ADJECTIVE_INDEX[adjective], 0)
    link = ("were" if plural else "was", "estis") if past else ("are" if plural else "is", "estas")
    described = (adjective[0], adjective[1] + ("aj" if plural else "a"))
    return _join("is", core, _noun_phrase(noun, plural=plural), link, described)


def _object(
    random: Random,
    first: Lexicon,
    second: Lexicon,
    *,
    form: str = "object",
    described: bool = False,
    negated: bool = False,
) -> Sentence:
    """`the dog sees the tree`, with adjectives, or with a `not`."""
    subject = random.choice(first.actors)
    verbs = dict.fromkeys((*first.on_all, *first.on_things, *second.on_all, *second.on_things))
    verb = random.choice(tuple(verbs))
    things = second.things if verb in (*first.on_things, *second.on_things) else (*second.actors, *second.things)
    thing = random.choice([noun for noun in things if noun is not subject])
    plural, past = random.random() < 1 / 4, random.random() < 1 / 3
    which = random.choice(((True, False), (False, True), (True, True))) if described else (False, False)
    core = (_NOUN_INDEX[subject], _VERB_INDEX[verb], _NOUN_INDEX[thing])
    return _join(
        form,
        core,
        _noun_phrase(subject, plural=plural, adjective=random.choice(first.adjectives) if which[0] else None),
        _verb_phrase(verb, plural=plural, past=past, negated=negated),
        _noun_phrase(
            thing,
            plural=random.random() < 1 / 4,
            accusative=True,
            adjective=random.choice(second.adjectives) if which[1] else None,
        ),
    )


def _place(random: Random, first: Lexicon, second: Lexicon) -> Sentence:
    """`the dog sleeps under the tree`, `the dog runs with the cat`."""
    subject, verb = random.choice(first.actors), random.choice(first.alone)
    if random.random() < 1 / 4:
        preposition, nouns = ("with", "kun"), [noun for noun in second.actors if noun is not subject]
    else:
        preposition, nouns = random.choice(_PLACES), list(second.things)
    where = random.choice(nouns)
    plural, past = random.random() < 1 / 4, random.random() < 1 / 3
    return _join(
        "place",
        (_NOUN_INDEX[subject], _VERB_INDEX[verb], _NOUN_INDEX[where]),
        _noun_phrase(subject, plural=plural),
        _verb_phrase(verb, plural=plural, past=past),
        preposition,
        _noun_phrase(where, plural=random.random() < 1 / 4),
    )


def _both(random: Random, first: Lexicon, second: Lexicon) -> Sentence:
    """`the dog and the cat sleep`."""
    subject = random.choice(first.actors)
    other = random.choice([noun for noun in second.actors if noun is not subject])
    verb = random.choice((*first.alone, *second.alone) if first is not second else first.alone)
    core = (_NOUN_INDEX[subject], _VERB_INDEX[verb], _NOUN_INDEX[other])
    return _join(
        "both",
        core,
        _noun_phrase(subject, plural=random.random() < 1 / 4),
        ("and", "kaj"),
        _noun_phrase(other, plural=random.random() < 1 / 4),
        _verb_phrase(verb, plural=True, past=random.random() < 1 / 3),
    )


_WITH_OBJECT: Final[Sequence[Callable[[Random, Lexicon, Lexicon], Sentence]]] = (
    _object,
    partial(_object, form="described", described=True),
    partial(_object, form="not", negated=True),
    _place,
    _both,
)
_FORMS: Final[Sequence[Callable[[Random, Lexicon, Lexicon], Sentence]]] = (_acts, _is, _object, *_WITH_OBJECT)

_WORDINGS: Final[Mapping[str, Mapping[Split, tuple[str, ...]]]] = {
    "to-esperanto": {
        Split.TRAIN: (
            "Translate to Esperanto: {text}.",
            "Translate into Esperanto: {text}.",
            'How do you say "{text}" in Esperanto?',
            "In Esperanto, please: {text}.",
            "{text}. Write this in Esperanto.",
            "Say in Esperanto: {text}.",
            'What is "{text}" in Esperanto?',
            "Esperanto for: {text}.",
            'Please translate "{text}" from English to Esperanto.',
            "Put this sentence into Esperanto: {text}.",
            "From English: {text}.",
            'Translate this English sentence: "{text}".',
        ),
        Split.TEST: (
            'Please say "{text}" in Esperanto.',
            "Write in Esperanto, please: {text}.",
            'Translate this sentence from English into Esperanto: "{text}".',
            "How do you write this in Esperanto: {text}?",
        ),
    },
    "to-english": {
        Split.TRAIN: (
            "Translate to English: {text}.",
            "Translate into English: {text}.",
            'How do you say "{text}" in English?',
            "In English, please: {text}.",
            "{text}. Write this in English.",
            'What does "{text}" mean?',
            "What does this mean in English: {text}.",
            'What is "{text}" in English?',
            'Please translate "{text}" from Esperanto to English.',
            "Put this sentence into English: {text}.",
            "From Esperanto: {text}.",
            'Translate this Esperanto sentence: "{text}".',
        ),
        Split.TEST: (
            'Please say "{text}" in English.',
            "Write in English, please: {text}.",
            'Translate this sentence from Esperanto into English: "{text}".',
            'What does this Esperanto sentence mean: "{text}"?',
        ),
    },
}


def _draw(random: Random, pairs: Sequence[tuple[Lexicon, Lexicon]], split: Split) -> Sentence:
    """Draws a sentence of a split, of one of these pairs of lexicons."""
    while True:
        first, second = random.choice(pairs)
        form = random.choice(_FORMS if first is second else _WITH_OBJECT)
        sentence = form(random, first, second)
        if _is_held(sentence.core) == (split is Split.TEST):
            return sentence


def _written(text: str) -> str:
    """A sentence with its capital and its dot."""
    return text[0].upper() + text[1:] + "."


def _example(random: Random, split: Split, *, pairs: Sequence[tuple[Lexicon, Lexicon]]) -> Example:
    sentence = _draw(random, pairs, split)
    direction = random.choice(tuple(_WORDINGS))
    asked, answer = sentence.english, sentence.esperanto
    if direction == "to-english":
        asked, answer = answer[0].upper() + answer[1:], asked
    wording = random.choice(_WORDINGS[direction][split])
    prompt = wording.format(text=asked)
    if wording.startswith("{text}"):
        prompt = prompt[0].upper() + prompt[1:]
    return Example(prompt, _written(answer), f"{sentence.form}-{direction}")


def _normal(text: str) -> str:
    """A sentence without what does not count: case, spaces, a final dot, and which letters write the hats."""
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    text = re.sub("[cghjsu]x", lambda match: _HATS[match[0]], text)
    return text.removesuffix(".").rstrip()


def _is_right(example: Example, answer: str) -> bool:
    return len(answer) <= _ANSWER_CHARACTERS_MAX and _normal(answer) == _normal(example.answer)


def _document(random: Random, *, pairs: Sequence[tuple[Lexicon, Lexicon]]) -> str:
    """Esperanto alone: sentences of TRAIN, some of them about one another."""
    written = [_draw(random, pairs, Split.TRAIN) for _ in range(random.randint(2, 4))]
    text = " ".join(_written(sentence.esperanto) for sentence in written)
    while len(text) < _DOCUMENT_CHARACTERS_MIN:
        text = f"{text} {_written(_draw(random, pairs, Split.TRAIN).esperanto)}"
    return text


def _task(name: str, *pairs: tuple[Lexicon, Lexicon]) -> Task:
    return Task(name, partial(_example, pairs=pairs), _is_right, partial(_document, pairs=pairs))


TASKS: Final = (_task("esperanto-nature", (NATURE, NATURE)), _task("esperanto-home", (HOME, HOME)))
"""What each of the two experts learns."""

MIXED: Final = _task("esperanto-mixed", (NATURE, HOME), (HOME, NATURE))
"""Sentences that need the nouns of both: neither expert alone knows all their words."""
