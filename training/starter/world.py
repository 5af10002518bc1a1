"""What the base model of the starter kit knows: a small closed world, talk about it, and reading.

A fact stands in both splits, for nobody can guess a capital: what is held out are the wordings of its questions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Final

from training.starter.task import Example, Split, Task
from training.starter.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    COUNTRIES,
    FOODS,
    NAMES,
    THINGS,
    invented,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

_ANSWER_CHARACTERS_MAX: Final = 1000
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS: Final = (
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


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact, and how one asks for it.

    In the texts `{s}` is the subject, `{a}` the subject with its article, `{v}` the value, `{o}` the lesser of a pair.

    Args:
        kind: The name of the relation, for reports.
        values: What is so of each subject. A pair is written `subject/other`.
        answer: The sentence that answers, and states the fact.
        direct: Questions that stand in `TRAIN`, at least four.
        test: A question that stands in `TEST` alone.
        indirect: The question as a clause: `what the capital of {s} is`.
        keys: The words that a right answer holds, where they are not the value itself.
    """

    kind: str
    values: Mapping[str, str]
    answer: str
    direct: tuple[str, ...]
    test: str
    indirect: str
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_TRAIN_FRAMES: Final = (
    "Tell me {clause}.",
    "Can you tell me {clause}?",
    "I want to know {clause}.",
    "Please say {clause}.",
    "I would like to know {clause}.",
    "Do you know {clause}?",
)
_TEST_FRAMES: Final = ("Please tell me {clause}.", "I would like you to say {clause}.")


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' and not noun.startswith(('eu', 'uni')) else 'a'} {noun}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pairs(text: str) -> dict[str, str]:
    """Reads `subject: value, subject: value`."""
    return dict((part.split(": ")[0], part.split(": ")[1]) for part in " ".join(text.split()).split(", "))


_ORDER_OF_SIZE: Final = ("ant", "bee", "mouse", "frog", "rabbit", "cat", "dog", "sheep", "lion", "horse", "elephant", "whale")

_DEFINITIONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "SQL": ("a language for asking questions of databases", ("language", "databases")),
    "a database": ("a store of data in tables", ("store", "data", "tables")),
    "a table": ("a list of rows with the same columns", ("rows", "columns")),
    "a query": ("a question to a database", ("question", "database")),
    "Cypher": ("a language for asking questions of graphs", ("language", "graphs")),
    "a graph": ("a set of nodes with edges between them", ("nodes", "edges")),
    "a node": ("a point of a graph", ("point", "graph")),
    "JSON": ("a way to write data as text with names and values", ("data", "text", "names", "values")),
    "a regular expression": ("a pattern that describes strings", ("pattern", "strings")),
    "a pattern": ("a form that many things follow", ("form", "things")),
    "Esperanto": ("a language that Zamenhof made for all peoples", ("language", "Zamenhof")),
    "a metre": ("a measure of length", ("length",)),
    "a gram": ("a measure of weight", ("weight",)),
    "a litre": ("a measure of volume", ("volume",)),
    "an hour": ("a measure of time with sixty minutes", ("time", "sixty")),
    "a euro": ("the money of many countries of Europe", ("money", "Europe")),
    "a dollar": ("the money of America", ("money", "America")),
    "a review": ("a text that says how good a thing is", ("text", "good")),
    "a topic": ("what a text is about", ("about",)),
    "an expert": ("a small model that does one thing well", ("model", "one", "well")),
    "a mixture of experts": ("a model that shares its work between many experts", ("shares", "experts")),
    "a router": ("the part that chooses the experts for a question", ("chooses", "experts")),
    "a base model": ("the model that all experts start from", ("experts", "start")),
    "an adapter": ("a small set of weights that changes a model", ("weights", "model")),
    "Hocket": ("a system that answers with many small experts", ("system", "experts")),
    "a hocket": ("a melody that is shared between voices", ("melody", "voices")),
    "a capital": ("the first city of a country", ("city", "country")),
    "a country": ("a land with a people and laws", ("land", "laws")),
    "a language": ("a way to speak and write", ("speak", "write")),
    "a language model": ("a program that writes the next word", ("program", "word")),
    "a computer": ("a machine that runs programs", ("machine", "programs")),
    "a program": ("a list of steps for a computer", ("steps", "computer")),
    "a river": ("water that runs to the sea", ("water", "sea")),
    "a mountain": ("a very high hill", ("high", "hill")),
    "an island": ("land with water around it", ("land", "water")),
    "a desert": ("a dry land with little rain", ("dry", "rain")),
    "rain": ("water that falls from clouds", ("water", "clouds")),
    "ice": ("water that is very cold and hard", ("water", "cold")),
    "a library": ("a house with many books", ("house", "books")),
    "a school": ("a place where children learn", ("children", "learn")),
    "a hospital": ("a place where the sick are helped", ("sick",)),
    "the sun": ("the star that gives us light", ("star", "light")),
    "the moon": ("a ball of rock that goes around the earth", ("rock", "earth")),
}


def _neighbours(cycle: Sequence[str], step: int) -> dict[str, str]:
    return {word: cycle[(position + step) % len(cycle)] for position, word in enumerate(cycle)}


RELATIONS: Final = (
    Relation(
        "capital",
        COUNTRIES,
        "The capital of {s} is {v}.",
        (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Name the capital of {s}.",
            "{s}: what is its capital?",
        ),
        "The capital of {s} is which city?",
        "what the capital of {s} is",
    ),
    Relation(
        "country",
        {city: country for country, city in COUNTRIES.items()},
        "{s} is in {v}.",
        ("In which country is {s}?", "Which country is {s} in?", "Where is {s}?", "{s} is a city of which country?"),
        "{s} is in which country?",
        "in which country {s} is",
    ),
    Relation(
        "colour",
        _pairs(
            "snow: white, grass: green, blood: red, the sky: blue, coal: black, the sun: yellow, milk: white, chocolate: brown, "
            "a lemon: yellow, a banana: yellow, a carrot: orange, a tomato: red, a plum: purple, a pig: pink, a frog: green, "
            "an elephant: grey, a bear: brown, a swan: white, a leaf: green, the sea: blue, salt: white, coffee: brown, "
            "a cherry: red, night: black"
        ),
        "The colour of {s} is {v}.",
        ("What colour is {s}?", "What is the colour of {s}?", "Which colour has {s}?", "Name the colour of {s}."),
        "The colour of {s} is what?",
        "what colour {s} is",
    ),
    Relation(
        "sound",
        _pairs(
            "dog: barks, cat: meows, cow: moos, sheep: bleats, duck: quacks, lion: roars, wolf: howls, horse: neighs, "
            "bee: buzzes, snake: hisses, frog: croaks, owl: hoots, pig: grunts, mouse: squeaks, hen: clucks, bird: sings"
        ),
        "{a} {v}.",
        (
            "What sound does {a} make?",
            "Which sound does {a} make?",
            "What is the sound of {a}?",
            "How does {a} sound?",
        ),
        "{a} makes which sound?",
        "what sound {a} makes",
    ),
    Relation(
        "legs",
        _pairs(
            "dog: four, cat: four, horse: four, cow: four, hen: two, duck: two, spider: eight, bee: six, ant: six, "
            "snake: no, fish: no, frog: four, eagle: two, lion: four, crab: ten, whale: no"
        ),
        "{a} has {v} legs.",
        (
            "How many legs does {a} have?",
            "How many legs has {a}?",
            "What is the number of legs of {a}?",
            "Count the legs of {a}.",
        ),
        "{a} has how many legs?",
        "how many legs {a} has",
    ),
    Relation(
        "home",
        _pairs(
            "bee: hive, bird: nest, fish: water, camel: desert, shark: sea, spider: web, horse: stable, pig: sty, dog: kennel, "
            "rabbit: burrow, wolf: forest, bear: cave, monkey: tree, cow: barn, duck: pond, lion: grassland"
        ),
        "{a} lives in a {v}.",
        ("Where does {a} live?", "What is the home of {a}?", "In what does {a} live?", "Name the home of {a}."),
        "{a} lives where?",
        "where {a} lives",
    ),
    Relation(
        "use",
        _pairs(
            "knife: cutting, pen: writing, book: reading, bed: sleeping, chair: sitting, spoon: eating, cup: drinking, "
            "oven: baking, soap: washing, clock: telling the time, key: opening a door, lamp: giving light, needle: sewing, "
            "broom: sweeping, hammer: driving nails, phone: speaking, map: finding the way, camera: taking pictures, "
            "ship: sailing, brush: painting, purse: keeping money, bell: ringing, ladder: climbing, fridge: keeping food cold"
        ),
        "{a} is for {v}.",
        ("What is {a} for?", "What do we use {a} for?", "For what is {a} used?", "What is the use of {a}?"),
        "{a} is for what?",
        "what {a} is for",
    ),
    Relation(
        "opposite",
        _pairs(
            "hot: cold, cold: hot, big: small, small: big, old: young, young: old, day: night, night: day, up: down, down: up, "
            "rich: poor, poor: rich, fast: slow, slow: fast, full: empty, empty: full, dry: wet, wet: dry, open: closed, "
            "closed: open, good: bad, bad: good, light: dark, dark: light, strong: weak, weak: strong, early: late, late: early, "
            "clean: dirty, dirty: clean, left: right, right: left, true: false, false: true, happy: sad, sad: happy, "
            "loud: quiet, quiet: loud, hard: soft, soft: hard"
        ),
        "The opposite of {s} is {v}.",
        (
            "What is the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "Give me the opposite of {s}.",
        ),
        "The opposite of {s} is which word?",
        "what the opposite of {s} is",
    ),
    Relation(
        "plural",
        _pairs(
            "mouse: mice, child: children, man: men, woman: women, foot: feet, tooth: teeth, goose: geese, leaf: leaves, "
            "knife: knives, wolf: wolves, city: cities, baby: babies, box: boxes, dog: dogs, cat: cats, house: houses, "
            "book: books, fox: foxes, glass: glasses, tree: trees, story: stories, sheep: sheep, bus: buses, potato: potatoes"
        ),
        "The plural of {s} is {v}.",
        (
            "What is the plural of {s}?",
            "Which word is the plural of {s}?",
            "Name the plural of {s}.",
            "Give me the plural of {s}.",
        ),
        "The plural of {s} is which word?",
        "what the plural of {s} is",
    ),
    Relation(
        "past",
        _pairs(
            "go: went, see: saw, eat: ate, come: came, take: took, give: gave, run: ran, sing: sang, write: wrote, make: made, "
            "say: said, have: had, buy: bought, think: thought, find: found, walk: walked, play: played, read: read, "
            "drink: drank, sleep: slept"
        ),
        "The past of {s} is {v}.",
        (
            "What is the past of {s}?",
            "What is the past of the verb {s}?",
            "Name the past of {s}.",
            "Give me the past of the verb {s}.",
        ),
        "The past of the verb {s} is which word?",
        "what the past of {s} is",
    ),
    Relation(
        "after",
        _neighbours(_DAYS, 1) | _neighbours(_MONTHS, 1),
        "After {s} comes {v}.",
        ("What comes after {s}?", "What follows {s}?", "What is next after {s}?", "Name what comes after {s}."),
        "After {s} comes what?",
        "what comes after {s}",
    ),
    Relation(
        "before",
        _neighbours(_DAYS, -1) | _neighbours(_MONTHS, -1),
        "Before {s} comes {v}.",
        ("What comes before {s}?", "What was before {s}?", "What is just before {s}?", "Name what comes before {s}."),
        "Before {s} comes what?",
        "what comes before {s}",
    ),
    Relation(
        "season",
        _pairs(
            "December: winter, January: winter, February: winter, March: spring, April: spring, May: spring, June: summer, "
            "July: summer, August: summer, September: autumn, October: autumn, November: autumn"
        ),
        "{s} is in {v}.",
        ("In which season is {s}?", "Which season is {s} in?", "What is the season of {s}?", "Name the season of {s}."),
        "{s} is in which season?",
        "in which season {s} is",
    ),
    Relation(
        "bigger",
        {
            f"{left}/{right}": max(left, right, key=_ORDER_OF_SIZE.index)
            for left in _ORDER_OF_SIZE
            for right in _ORDER_OF_SIZE
            if left != right
        },
        "{v} is bigger.",
        (
            "Which is bigger, {a} or {o}?",
            "What is bigger, {a} or {o}?",
            "{a} or {o}: which is bigger?",
            "Is {a} bigger or {o}?",
        ),
        "Which of the two is bigger: {a} or {o}?",
        "which is bigger, {a} or {o}",
    ),
    Relation(
        "body",
        _pairs(
            "see: eyes, hear: ears, smell: nose, taste: tongue, walk: feet, bite: teeth, think: brain, hold things: hands, "
            "breathe: lungs, speak: mouth"
        ),
        "We {s} with the {v}.",
        (
            "What do we {s} with?",
            "With what do we {s}?",
            "With which part of the body do we {s}?",
            "What does a man {s} with?",
        ),
        "We {s} with which part of the body?",
        "what we {s} with",
    ),
    Relation(
        "count",
        _pairs(
            "days in a week: seven, months in a year: twelve, hours in a day: twenty-four, minutes in an hour: sixty, "
            "seconds in a minute: sixty, seasons in a year: four, fingers on a hand: five, sides of a triangle: three, "
            "sides of a square: four, wheels of a car: four, wheels of a bike: two, eyes of a man: two, "
            "letters in the alphabet: twenty-six, things in a dozen: twelve, days in a year: three hundred and sixty-five"
        ),
        "There are {v} {s}.",
        ("How many {s} are there?", "What is the number of {s}?", "Count the {s}.", "Give me the number of {s}."),
        "The number of {s} is what?",
        "how many {s} there are",
    ),
    Relation(
        "group",
        _pairs(
            "apple: fruit, pear: fruit, cherry: fruit, plum: fruit, carrot: vegetable, potato: vegetable, onion: vegetable, "
            "dog: animal, horse: animal, lion: animal, mouse: animal, eagle: bird, owl: bird, duck: bird, goose: bird, "
            "shark: fish, bee: insect, ant: insect, rose: flower, tulip: flower, oak: tree, pine: tree, hammer: tool, "
            "saw: tool, piano: instrument, drum: instrument, violin: instrument, table: piece of furniture, "
            "chair: piece of furniture, car: vehicle, bus: vehicle, train: vehicle, coat: garment, hat: garment"
        ),
        "{a} is {av}.",
        ("What kind of thing is {a}?", "What is {a}?", "What sort of thing is {a}?", "To which group belongs {a}?"),
        "{a} is what kind of thing?",
        "what kind of thing {a} is",
    ),
    Relation(
        "young",
        _pairs(
            "dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, lion: cub, hen: chick, duck: duckling, "
            "goat: kid, pig: piglet, frog: tadpole, swan: cygnet"
        ),
        "A young {s} is {av}.",
        (
            "What is a young {s} called?",
            "What do we call a young {s}?",
            "What is the name of a young {s}?",
            "Name the young of {a}.",
        ),
        "A young {s} is called what?",
        "what a young {s} is called",
    ),
    Relation(
        "source",
        _pairs(
            "bread: flour, cheese: milk, butter: milk, wine: grapes, paper: wood, a window: glass, honey: nectar, "
            "an omelette: eggs, a jumper: wool, a ring: gold, a brick: clay, a shoe: leather, a tyre: rubber, chocolate: cocoa"
        ),
        "{s} is made from {v}.",
        (
            "What is {s} made from?",
            "From what is {s} made?",
            "What do we make {s} from?",
            "What does one need to make {s}?",
        ),
        "{s} is made from what?",
        "what {s} is made from",
    ),
    Relation(
        "work",
        _pairs(
            "baker: bakes bread, teacher: teaches children, doctor: helps the sick, farmer: grows food, pilot: flies planes, "
            "cook: makes meals, singer: sings songs, painter: paints pictures, writer: writes books, driver: drives cars, "
            "builder: builds houses, sailor: sails ships, tailor: makes clothes, judge: decides cases, gardener: cares for gardens, "
            "fisherman: catches fish"
        ),
        "{a} {v}.",
        ("What does {a} do?", "What is the work of {a}?", "What is the job of {a}?", "Describe the work of {a}."),
        "The work of {a} is what?",
        "what {a} does",
    ),
    Relation(
        "author",
        _pairs(
            "Hamlet: Shakespeare, Faust: Goethe, War and Peace: Tolstoy, The Odyssey: Homer, Don Quixote: Cervantes, Emma: Austen, "
            "Oliver Twist: Dickens, Frankenstein: Shelley, The Trial: Kafka, Candide: Voltaire, Dracula: Stoker, The Jungle Book: Kipling"
        ),
        "{v} wrote {s}.",
        ("Who wrote {s}?", "Who is the author of {s}?", "Name the author of {s}.", "Which author wrote {s}?"),
        "The author of {s} is who?",
        "who wrote {s}",
    ),
    Relation(
        "language",
        _pairs(
            "France: French, Spain: Spanish, Italy: Italian, Germany: German, Portugal: Portuguese, England: English, "
            "Norway: Norwegian, Sweden: Swedish, Finland: Finnish, Denmark: Danish, Poland: Polish, Austria: German, "
            "Hungary: Hungarian, Greece: Greek, Turkey: Turkish, Egypt: Arabic, Japan: Japanese, China: Chinese, Peru: Spanish, Cuba: Spanish"
        ),
        "The language of {s} is {v}.",
        (
            "What is the language of {s}?",
            "Which language do people speak in {s}?",
            "What do people speak in {s}?",
            "Name the language of {s}.",
        ),
        "The language of {s} is which?",
        "which language people speak in {s}",
    ),
    Relation(
        "sum",
        {f"{a} + {b}": str(a + b) for a in range(20) for b in range(20 - a)},
        "{s} is {v}.",
        ("What is {s}?", "How much is {s}?", "{s} is how much?", "Calculate {s}."),
        "{s} makes how much?",
        "how much {s} is",
    ),
    Relation(
        "difference",
        {f"{a} - {b}": str(a - b) for a in range(20) for b in range(a + 1)},
        "{s} is {v}.",
        ("What is {s}?", "How much is {s}?", "{s} is how much?", "Calculate {s}."),
        "{s} makes how much?",
        "how much {s} is",
    ),
    Relation(
        "definition",
        {subject: text for subject, (text, _) in _DEFINITIONS.items()},
        "{s} is {v}.",
        ("What is {s}?", "What does {s} mean?", "Explain what {s} is.", "Define {s}.", "What do we call {s}?"),
        "{s} is what?",
        "what {s} is",
        {subject: keys for subject, (_, keys) in _DEFINITIONS.items()},
    ),
)
"""All that there is to know. The base meets every fact of it."""


def _fill(text: str, subject: str, value: str) -> str:
    first, _, other = subject.partition("/")
    shown_value = _article(value) if other else value
    return _sentence(
        text.format(
            s=first,
            a=_article(first) if first != "sheep/" else first,
            o=_article(other) if other else "",
            v=shown_value,
            av=_article(value),
        )
    )


def _wordings(relation: Relation, split: Split) -> tuple[str, ...]:
    frames = _TRAIN_FRAMES if split is Split.TRAIN else _TEST_FRAMES
    plain = relation.direct if split is Split.TRAIN else (relation.test,)
    return plain + tuple(frame.format(clause=relation.indirect) for frame in frames)


def _holds(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words.lower())}(?!\w)", text.lower()) is not None


@cache
def _others(relation: Relation, subject: str) -> tuple[str, ...]:
    """Lists the values that a right answer may not hold: those of the relation that the model answer has no use for."""
    answer = _fill(relation.answer, subject, relation.values[subject])
    if "/" in subject:
        return tuple(word for word in subject.split("/") if word != relation.values[subject])
    return tuple(sorted({value for value in relation.values.values() if not _holds(answer, value)}))
