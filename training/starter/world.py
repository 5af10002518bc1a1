"""What the base model of the starter kit knows: a small closed world, talk about it, and reading.

A fact stands in both splits, for nobody can guess a capital: what is held out are the wordings of its questions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from training.starter.measures import is_held, is_held_difference
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
    listed,
    spliced,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

_ANSWER_CHARACTERS_MAX: Final = 1000
_DAYS: Final = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_MONTHS: Final = listed("January February March April May June July August September October November December")


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact, and how one asks for it.

    In the texts `{s}` is the subject, `{a}` the subject with its article, `{o}` the other one of a pair with its
    article, `{v}` the value, `{av}` the value with its article.

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
    pairs = {}
    for part in " ".join(text.split()).split(", "):
        subject, _, value = part.partition(": ")
        pairs[subject] = value
    return pairs


_ORDER_OF_SIZE: Final = listed("ant bee mouse frog rabbit cat dog sheep lion horse elephant whale")

_DEFINITIONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "SQL": ("a language for asking questions of databases", ("language", "databases")),
    "a database": ("a store of data in tables", ("store", "data", "tables")),
    "a database table": ("a list of rows with the same columns", ("rows", "columns")),
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
            "snow: white, grass: green, blood: red, the sky: blue, coal: black, the sun: yellow, milk: white, "
            "chocolate: brown, "
            "a lemon: yellow, a banana: yellow, a carrot: orange, a tomato: red, a plum: purple, a pig: pink, a frog: "
            "green, "
            "an elephant: grey, a bear: brown, a swan: white, a leaf: green, the sea: blue, salt: white, coffee: "
            "brown, "
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
            "bee: buzzes, snake: hisses, frog: croaks, owl: hoots, pig: grunts, mouse: squeaks, hen: clucks, bird: "
            "sings"
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
            "bee: a hive, bird: a nest, fish: the water, camel: the desert, shark: the sea, spider: a web, horse: a "
            "stable, "
            "pig: a sty, dog: a kennel, rabbit: a burrow, wolf: the forest, bear: a cave, monkey: a tree, cow: a barn, "
            "duck: a pond, lion: the grassland"
        ),
        "{a} lives in {v}.",
        ("Where does {a} live?", "What is the home of {a}?", "In what does {a} live?", "Name the home of {a}."),
        "{a} lives where?",
        "where {a} lives",
    ),
    Relation(
        "use",
        _pairs(
            "knife: cutting, pen: writing, book: reading, bed: sleeping, chair: sitting, spoon: eating, cup: drinking, "
            "oven: baking, soap: washing, clock: telling the time, key: opening a door, lamp: giving light, needle: "
            "sewing, "
            "broom: sweeping, hammer: driving nails, phone: speaking, map: finding the way, camera: taking pictures, "
            "ship: sailing, brush: painting, purse: keeping money, bell: ringing, ladder: climbing, fridge: keeping "
            "food cold"
        ),
        "{a} is for {v}.",
        ("What is {a} for?", "What do we use {a} for?", "For what is {a} used?", "What is the use of {a}?"),
        "{a} is for what?",
        "what {a} is for",
    ),
    Relation(
        "opposite",
        _pairs(
            "hot: cold, cold: hot, big: small, small: big, old: young, young: old, day: night, night: day, up: down, "
            "down: up, "
            "rich: poor, poor: rich, fast: slow, slow: fast, full: empty, empty: full, dry: wet, wet: dry, open: "
            "closed, "
            "closed: open, good: bad, bad: good, light: dark, dark: light, strong: weak, weak: strong, early: late, "
            "late: early, "
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
            "mouse: mice, child: children, man: men, woman: women, foot: feet, tooth: teeth, goose: geese, leaf: "
            "leaves, "
            "knife: knives, wolf: wolves, city: cities, baby: babies, box: boxes, dog: dogs, cat: cats, house: houses, "
            "book: books, fox: foxes, glass: glasses, tree: trees, story: stories, sheep: sheep, bus: buses, potato: "
            "potatoes"
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
            "go: went, see: saw, eat: ate, come: came, take: took, give: gave, run: ran, sing: sang, write: wrote, "
            "make: made, "
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
            "December: winter, January: winter, February: winter, March: spring, April: spring, May: spring, June: "
            "summer, "
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
        "{av} is bigger.",
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
            "see: eyes, hear: ears, smell: nose, taste: tongue, walk: feet, bite: teeth, think: brain, hold things: "
            "hands, "
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
            "letters in the alphabet: twenty-six, things in a dozen: twelve, days in a year: three hundred and "
            "sixty-five"
        ),
        "There are {v} {s}.",
        ("How many {s} are there?", "What is the number of {s}?", "Count the {s}.", "Give me the number of {s}."),
        "The number of {s} is what?",
        "how many {s} there are",
    ),
    Relation(
        "group",
        _pairs(
            "apple: fruit, pear: fruit, cherry: fruit, plum: fruit, carrot: vegetable, potato: vegetable, onion: "
            "vegetable, "
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
            "an omelette: eggs, a jumper: wool, a ring: gold, a brick: clay, a shoe: leather, a tyre: rubber, "
            "chocolate: cocoa"
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
            "baker: bakes bread, teacher: teaches children, doctor: helps the sick, farmer: grows food, pilot: flies "
            "planes, "
            "cook: makes meals, singer: sings songs, painter: paints pictures, writer: writes books, driver: drives "
            "cars, "
            "builder: builds houses, sailor: sails ships, tailor: makes clothes, judge: decides cases, gardener: "
            "cares for gardens, "
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
            "Hamlet: Shakespeare, Faust: Goethe, War and Peace: Tolstoy, The Odyssey: Homer, Don Quixote: Cervantes, "
            "Emma: Austen, "
            "Oliver Twist: Dickens, Frankenstein: Shelley, The Trial: Kafka, Candide: Voltaire, Dracula: Stoker, The "
            "Jungle Book: Kipling"
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
            "Hungary: Hungarian, Greece: Greek, Turkey: Turkish, Egypt: Arabic, Japan: Japanese, China: Chinese, "
            "Peru: Spanish, Cuba: Spanish"
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
        {f"{a} + {b}": str(a + b) for a in range(20) for b in range(20 - a) if not is_held(a, b)},
        "{s} is {v}.",
        ("What is {s}?", "How much is {s}?", "{s} is how much?", "Calculate {s}."),
        "{s} makes how much?",
        "how much {s} is",
    ),
    Relation(
        "difference",
        {f"{a} - {b}": str(a - b) for a in range(20) for b in range(a + 1) if not is_held_difference(a, b)},
        "{s} is {v}.",
        ("What is {s}?", "How much is {s}?", "{s} is how much?", "Calculate {s}."),
        "{s} makes how much?",
        "how much {s} is",
    ),
    Relation(
        "definition",
        {subject: text for subject, (text, _) in _DEFINITIONS.items()},
        "{s} is {v}.",
        ("What is {s}?", "What does {s} mean?", "Explain what {s} is.", "Define {s}.", "Give me a definition of {s}."),
        "{s} is what?",
        "what {s} is",
        {subject: keys for subject, (_, keys) in _DEFINITIONS.items()},
    ),
)
"""All that there is to know. The base meets every fact of it."""


_WORD: Final = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def _words(text: str) -> str:
    """Brings a text to its words alone, in lower case, with one space around each."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that the base knows.

    Args:
        relation: Its kind.
        subject: What it is about.
        mention: How an answer may mention the subject, which says nothing of the value: `7 + 0` does not hold 0.
        answer: The sentence that states it.
        keys: The words that a right answer holds.
        others: The values that a right answer does not hold: those that are so of other subjects.
    """

    relation: Relation
    subject: str
    mention: str
    answer: str
    keys: tuple[str, ...]
    others: tuple[str, ...]


def _fill(text: str, subject: str, value: str) -> str:
    first, _, other = subject.partition("/")
    return _sentence(
        text.format(
            s=first,
            a=_article(first),
            o=_article(other) if other else "",
            v=value,
            av=_article(value),
        )
    )


def _without(text: str, mention: str) -> str:
    """Brings a text to its words, less the first mention of its subject."""
    return _words(text).replace(_words(mention), " ", 1)


def _mention(subject: str, value: str) -> str:
    if "/" in subject:
        return "than " + next(_article(word) for word in subject.split("/") if word != value)
    return "" if subject == value else subject


def _facts(relation: Relation) -> tuple[Fact, ...]:
    facts = []
    values = sorted(set(relation.values.values()) | {word for pair in relation.values for word in pair.split("/")[1:]})
    for subject, value in relation.values.items():
        answer, mention = _fill(relation.answer, subject, value), _mention(subject, value)
        stated = _without(answer, mention)
        keys = relation.keys.get(subject, (re.sub("^(a|the) ", "", value),))
        others = tuple(other for other in values if _words(other) not in stated)
        facts.append(Fact(relation, subject, mention, answer, keys, others))
    return tuple(facts)


FACTS: Final[Mapping[str, tuple[Fact, ...]]] = {relation.kind: _facts(relation) for relation in RELATIONS}
"""The facts of each relation."""

_KINDS: Final = tuple(FACTS)
_WEIGHTS: Final = tuple(len(facts) ** 0.5 for facts in FACTS.values())


def wordings(relation: Relation, split: Split) -> tuple[str, ...]:
    """Lists the ways to ask for a relation.

    Args:
        relation: What is asked for.
        split: Whose wordings.

    Returns:
        Question texts with `{s}`, `{a}` and `{o}` to fill.
    """
    direct = relation.direct if split is Split.TRAIN else (relation.test,)
    frames = _TRAIN_FRAMES if split is Split.TRAIN else _TEST_FRAMES
    return direct + tuple(frame.format(clause=relation.indirect) for frame in frames)


def _draw(random: Random) -> Fact:
    kind = random.choices(_KINDS, _WEIGHTS)[0]
    return random.choice(FACTS[kind])


def _question(random: Random, fact: Fact, split: Split) -> str:
    return _fill(random.choice(wordings(fact.relation, split)), fact.subject, fact.relation.values[fact.subject])


def example(random: Random, split: Split) -> Example:
    """Draws a question about the world.

    Args:
        random: Where chance comes from.
        split: Whose wordings are used; the facts are those of both.

    Returns:
        The question, and a sentence that answers it.
    """
    fact = _draw(random)
    return Example(
        _question(random, fact, split),
        fact.answer,
        fact.relation.kind,
        {"mention": fact.mention, "keys": fact.keys, "others": fact.others},
    )


def is_right(asked: Example, answer: str) -> bool:
    """Whether an answer holds the words of the fact, and no other value of its relation.

    Args:
        asked: What was asked.
        answer: What was answered, whatever it is.

    Returns:
        Whether it is right.
    """
    if len(answer) > _ANSWER_CHARACTERS_MAX:
        return False
    said = _without(answer, asked.facts["mention"])
    return all(_words(key) in said for key in asked.facts["keys"]) and not any(
        _words(other) in said for other in asked.facts["others"]
    )


_GREETINGS: Final = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi.", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Good evening.", "Good evening! How can I help you?"),
    ("Hello, how are you?", "I am well, thank you. How can I help you?"),
    ("How are you today?", "I am well, thank you. How can I help you?"),
)
_FAREWELLS: Final = (
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Thank you, that is all.", "You are welcome. Goodbye!"),
    ("Great, thanks for your help.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("Bye!", "Goodbye!"),
    ("Good night.", "Good night!"),
)
_ME: Final = "I am the starter model of Hocket, a small model with experts beside me."
_CAN: Final = "I can answer simple questions, and my experts can do more."
_IDENTITY: Final = (
    ("Who are you?", _ME),
    ("What are you?", _ME),
    ("What is your name?", _ME),
    ("Tell me who you are.", _ME),
    ("Are you a human?", "No. " + _ME),
    ("Are you a person?", "No. " + _ME),
    ("Are you a language model?", "Yes. " + _ME),
    ("What can you do?", _CAN),
    ("How can you help me?", _CAN),
    ("Can you help me?", "Yes. What do you want to know?"),
    ("I have a question.", "Please ask it."),
    ("Can I ask you something?", "Yes. Please ask it."),
    ("What are your experts?", "My experts are small models that each do one thing well."),
    ("Do you know everything?", "No. I know a few simple things."),
    ("Do you like music?", "I am a model, so I do not like or dislike things."),
    ("What do you like?", "I am a model, so I do not like or dislike things."),
    ("How old are you?", "I am a model, so I have no age."),
    ("Where do you live?", "I am a model, so I have no home."),
    ("Tell me something.", "The sun is the star that gives us light."),
    ("Say something nice.", "I hope that you have a good day."),
)
_UNKNOWN: Final = (
    "What is {a}?",
    "What is the capital of {n}?",
    "Who is {n}?",
    "Where is {n}?",
    "Who wrote {n}?",
    "What colour is {a}?",
    "What is {a} for?",
    "What does {n} mean?",
    "Do you know {n}?",
    "Tell me what {n} is.",
    "In which country is {n}?",
    "Where does {a} live?",
)
_FOLLOW_UPS: Final = ("And {s}?", "What about {s}?", "And what about {s}?")
_FOLLOWED: Final = (
    "capital",
    "country",
    "opposite",
    "plural",
    "season",
    "language",
    "after",
    "before",
    "sum",
    "author",
)


def _unknown(random: Random) -> tuple[str, str]:
    word = invented(random)
    return random.choice(_UNKNOWN).format(a=_article(word), n=word.capitalize()), "I do not know."


def _known(random: Random) -> tuple[str, str]:
    fact = _draw(random)
    return _question(random, fact, Split.TRAIN), fact.answer


def _turn(random: Random) -> tuple[str, str]:
    drawn = random.choices((_known, _unknown, None), (13, 3, 4))[0]
    return drawn(random) if drawn is not None else random.choice(_IDENTITY)


def _followed(random: Random) -> list[tuple[str, str]]:
    first, second = random.sample(FACTS[random.choice(_FOLLOWED)], 2)
    return [
        (_question(random, first, Split.TRAIN), first.answer),
        (random.choice(_FOLLOW_UPS).format(s=second.subject), second.answer),
    ]


def conversation(random: Random) -> list[tuple[str, str]]:
    """Draws a short general talk.

    Args:
        random: Where chance comes from.

    Returns:
        One to three turns, each what the user says and what the assistant answers.
    """
    middle = [_turn(random)] if random.choice((True, True, False)) else _followed(random)
    shape = random.choices(("greeting", "greeted", "thanked", "plain"), (3, 3, 4, 10))[0]
    if shape == "greeting":
        return [random.choice(_GREETINGS)]
    if shape == "greeted":
        return [random.choice(_GREETINGS), *middle]
    if shape == "thanked":
        return [*middle, random.choice(_FAREWELLS)]
    return middle


def _some(random: Random, words: Sequence[str], count: int) -> list[str]:
    """Draws different words, half of the time made up: who copies these copies any word."""
    if random.choice((True, False)):
        made_up: dict[str, None] = {}
        while len(made_up) < count:
            made_up[random.choice((invented, spliced))(random)] = None
        return list(made_up)
    return random.sample(words, count)


def _people(random: Random, count: int) -> list[str]:
    return [word.capitalize() for word in _some(random, NAMES, count)]


def _numbers(random: Random, count: int) -> list[str]:
    highest = random.choice((99, 99, 1999))
    return [str(number) for number in random.sample(range(2, highest + 1), count)]


def _read_owners(random: Random) -> tuple[str, str]:
    count = random.choice((2, 2, 3))
    people, colours, things = _people(random, count), _some(random, COLOURS, count), _some(random, THINGS, count)
    verb = random.choice(("has", "bought", "sees", "found", "wants"))
    told = [
        f"{person} {verb} {_article(colour)} {thing}"
        for person, colour, thing in zip(people, colours, things, strict=True)
    ]
    text = random.choice((" and ", ". ", ", "))
    text = text.join(told) + "."
    at = random.randrange(count)
    return random.choice(
        (
            (f"{text} What colour is the {things[at]} of {people[at]}?", colours[at]),
            (f"{text} What colour is the {things[at]}?", colours[at]),
            (f"{text} Which thing is {colours[at]}?", things[at]),
            (f"{text} Who {verb} the {things[at]}?", people[at]),
            (f"{text} Who {verb} something {colours[at]}?", people[at]),
        )
    )


def _read_places(random: Random) -> tuple[str, str]:
    count = random.choice((2, 3, 3))
    people, cities = _people(random, count), [city.capitalize() for city in _some(random, CITIES, count)]
    verb, asked = random.choice(
        (("lives in", "live"), ("works in", "work"), ("was born in", ""), ("stays in", "stay"), ("went to", "go to"))
    )
    text = " ".join(f"{person} {verb} {city}." for person, city in zip(people, cities, strict=True))
    at = random.randrange(count)
    where = f"Where was {people[at]} born?" if not asked else f"Where does {people[at]} {asked}?"
    if asked == "go to":
        where = f"Where did {people[at]} go?"
    return random.choice(((f"{text} {where}", cities[at]), (f"{text} Who {verb} {cities[at]}?", people[at])))


def _read_ages(random: Random) -> tuple[str, str]:
    count = random.choice((2, 3))
    people, ages = _people(random, count), random.sample(range(2, 90), count)
    text = " ".join(f"{person} is {age} years old." for person, age in zip(people, ages, strict=True))
    at = random.randrange(count)
    return random.choice(
        ((f"{text} How old is {people[at]}?", str(ages[at])), (f"{text} Who is {ages[at]} years old?", people[at]))
    )


def _read_prices(random: Random) -> tuple[str, str]:
    count = random.choice((2, 3))
    things, prices = _some(random, THINGS, count), _numbers(random, count)
    text = " ".join(f"The {thing} costs {price} euros." for thing, price in zip(things, prices, strict=True))
    at = random.randrange(count)
    return random.choice(
        (
            (f"{text} How much is the {things[at]}?", f"{prices[at]} euros"),
            (f"{text} What costs {prices[at]} euros?", things[at]),
            (f"The {things[at]} costs {prices[at]} euros. Which number is in this text?", prices[at]),
        )
    )


def _read_time(random: Random) -> tuple[str, str]:
    person, city, thing = _people(random, 1)[0], random.choice(CITIES), _some(random, THINGS, 1)[0]
    day, month = random.choice(_DAYS), random.choice(_MONTHS)
    time = f"{random.randrange(24)}:{random.randrange(60):02d}"
    return random.choice(
        (
            (f"The train to {city} leaves on {day} at {time}. When does it leave?", f"{day} at {time}"),
            (f"The train to {city} leaves on {day} at {time}. Where does it go?", city),
            (f"{person} was born on {random.randint(1, 28)} {month}. In which month was {person} born?", month),
            (f"Dear {person}, the {thing} comes on {day}. Which day does the {thing} come?", day),
            (f"Dear {person}, the {thing} comes on {day}. To whom is this letter?", person),
            (f"{person} meets us in {city} on {day}. Whom do we meet?", person),
            (f"{person} meets us in {city} on {day}. In which city do we meet?", city),
        )
    )


def _read_quote(random: Random) -> tuple[str, str]:
    words = _some(random, THINGS + ANIMALS + FOODS + COLOURS, random.randint(1, 5))
    quoted = " ".join(words)
    wording = random.choice(
        (
            'Repeat "{q}".',
            'Say "{q}".',
            'Write "{q}".',
            'Copy these words: "{q}"',
            'What stands between the quotes: "{q}"?',
            "Repeat after me: {q}",
        )
    )
    return wording.format(q=quoted), quoted


def _read_list(random: Random) -> tuple[str, str]:
    count = random.randint(3, 5)
    words = _some(random, random.choice((THINGS, ANIMALS, FOODS, COLOURS, NAMES, CITIES)), count)
    shown = ", ".join(words)
    at = random.randrange(count)
    ordinal = ("first", "second", "third", "fourth", "fifth")[at]
    after = random.randrange(count - 1)
    return random.choice(
        (
            (f"What is the {ordinal} word of this list: {shown}?", words[at]),
            (f"{shown}. Which word is the {ordinal}?", words[at]),
            (f"What is the last word of this list: {shown}?", words[-1]),
            (f"{shown}. Which one is the last?", words[-1]),
            (f"{shown}. Which word comes after {words[after]}?", words[after + 1]),
            (f"{shown}. Which word comes before {words[after + 1]}?", words[after]),
            (f"How many words are in this list: {shown}?", str(count)),
            (f"Write this list with spaces: {shown}", " ".join(words)),
            (f"Write these words with commas: {' '.join(words)}", shown),
            (f"Write this list backwards: {shown}", ", ".join(reversed(words))),
        )
    )


def _read_spelling(random: Random) -> tuple[str, str]:
    word = _some(random, THINGS + ANIMALS + FOODS, 1)[0]
    return random.choice(
        (
            (f"Spell {word}.", " ".join(word)),
            (f"How do you spell {word}?", " ".join(word)),
            (f"What is the first letter of {word}?", word[0]),
            (f"What is the last letter of {word}?", word[-1]),
            (f"Write {word} in capital letters.", word.upper()),
        )
    )


def _read_choice(random: Random) -> tuple[str, str]:
    groups = {"an animal": ANIMALS, "a colour": COLOURS, "a city": CITIES, "a name": NAMES}
    asked = random.choice(tuple(groups))
    right = random.choice(groups[asked])
    others = random.sample(THINGS, 2)
    shown = [right, *others]
    random.shuffle(shown)
    wording = random.choice(
        ("Which of these is {k}: {x}?", "{x}. Which of them is {k}?", "Find {k} in this list: {x}.")
    )
    return wording.format(k=asked, x=", ".join(shown)), right


def _read_lines(random: Random) -> tuple[str, str]:
    count = random.randint(3, 6)
    keys = _some(random, (*THINGS, "name", "city", "colour", "price", "age", "day", "status", "code"), count)
    values = (
        _numbers(random, count) if random.choice((True, False)) else _some(random, COLOURS + CITIES + ANIMALS, count)
    )
    mark = random.choice((": ", ": ", " = ", " - "))
    text = "\n".join(f"{key}{mark}{value}" for key, value in zip(keys, values, strict=True))
    at = random.randrange(count)
    return random.choice(
        (
            (f"{text}\nWhat is the {keys[at]}?", values[at]),
            (f"{text}\n\nWhich value has {keys[at]}?", values[at]),
            (f"What is the {keys[at]}?\n{text}", values[at]),
            (f"{text}\nGive me the value of {keys[at]}.", values[at]),
            (f"{text}\nWhat has the value {values[at]}?", keys[at]),
        )
    )


def _read_table(random: Random) -> tuple[str, str]:
    count = random.randint(2, 4)
    people, cities = _people(random, count), random.sample(CITIES, count)
    ages = [str(age) for age in random.sample(range(2, 90), count)]
    rows = "\n".join(", ".join(row) for row in zip(people, ages, cities, strict=True))
    at = random.randrange(count)
    return random.choice(
        (
            (f"name, age, city\n{rows}\nWhat is the age of {people[at]}?", ages[at]),
            (f"name, age, city\n{rows}\nWhat is the city of {people[at]}?", cities[at]),
            (f"name, age, city\n{rows}\nWho is from {cities[at]}?", people[at]),
        )
    )


def _read_exchange(random: Random) -> tuple[str, str]:
    words = _some(random, THINGS + ANIMALS + FOODS, 3)
    new = _some(random, COLOURS, 1)[0]
    at = random.randrange(3)
    changed = [*words]
    changed[at] = new
    return f'Put {new} for {words[at]} in "{" ".join(words)}".', " ".join(changed)


_READINGS: Final[tuple[Callable[[Random], tuple[str, str]], ...]] = (
    _read_owners,
    _read_owners,
    _read_places,
    _read_ages,
    _read_prices,
    _read_time,
    _read_quote,
    _read_quote,
    _read_list,
    _read_list,
    _read_spelling,
    _read_choice,
    _read_lines,
    _read_lines,
    _read_table,
    _read_exchange,
)


def reading(random: Random) -> tuple[str, str]:
    """Draws a short text with a question whose answer stands in it.

    Args:
        random: Where chance comes from.

    Returns:
        The text with its question, and the words of the text that answer it.
    """
    return random.choice(_READINGS)(random)


def _tell_facts(random: Random) -> str:
    return " ".join(_draw(random).answer for _ in range(random.randint(4, 6)))


def _tell_relation(random: Random) -> str:
    facts = FACTS[random.choice(_KINDS)]
    return " ".join(fact.answer for fact in random.sample(facts, random.randint(5, 7)))


def _tell_capitals(random: Random) -> str:
    return " ".join(
        f"{capital} is the capital of {country}." for country, capital in random.sample(tuple(COUNTRIES.items()), 4)
    )


def _tell_market(random: Random) -> str:
    person, friend = _people(random, 2)
    first, second, third = random.sample(FOODS, 3)
    return (
        f"On {random.choice(_DAYS)} {person} goes to the market in {random.choice(CITIES)} and buys {first} and "
        f"{second}. "
        f"There {person} meets {friend}, who sells {third}. They {random.choice(('talk', 'laugh', 'eat', 'sit'))} for "
        f"{random.choice(('an hour', 'a while', 'ten minutes'))}. Then {person} walks home with the {first} and the "
        f"{second}, "
        f"and {friend} sells more {third}."
    )


def _tell_animal(random: Random) -> str:
    person, animal = _people(random, 1)[0], random.choice(ANIMALS)
    name, colour, thing = invented(random).capitalize(), random.choice(COLOURS), random.choice(THINGS)
    return (
        f"{person} has {_article(animal)}. Its name is {name}, and it is "
        f"{random.choice(('small', 'big', 'old', 'young'))} and "
        f"{colour}. {name} sleeps under the {thing} and eats {random.choice(FOODS)}. When {person} comes home, {name} "
        f"is "
        f"{random.choice(('happy', 'hungry', 'tired', 'glad'))}."
    )


def _tell_search(random: Random) -> str:
    person, friend = _people(random, 2)
    thing, first, second = random.sample(THINGS, 3)
    colour = random.choice(COLOURS)
    return (
        f"{person} cannot find the {colour} {thing}. It is not in the {first}, and it is not under the {second}. "
        f'"Where is my {thing}?" asks {person}. "It is here," says {friend}, and gives {person} the {colour} {thing}. '
        f'{person} says: "Thank you, {friend}!"'
    )


def _tell_room(random: Random) -> str:
    colours, things = random.sample(COLOURS, 3), random.sample(THINGS, 5)
    return (
        f"In the room of {_people(random, 1)[0]} there is {_article(colours[0])} {things[0]} and "
        f"{_article(colours[1])} {things[1]}. "
        f"The {things[2]} is next to the {things[0]}. On the {things[1]} there are "
        f"{random.choice(('two', 'three', 'four', 'five'))} things: {_article(things[3])}, {_article(things[4])} and "
        f"more. "
        f"The door is {colours[2]}."
    )


def _tell_day(random: Random) -> str:
    person, friend = _people(random, 2)
    city, food, animal = random.choice(CITIES), random.choice(FOODS), random.choice(ANIMALS)
    return (
        f"It was a {random.choice(('cold', 'warm', 'wet', 'sunny', 'quiet'))} day in {random.choice(_MONTHS)}. "
        f"{person} and "
        f"{friend} took the train to {city}. They saw {_article(animal)} in the garden and ate {food} by the river. "
        f"In the evening {random.choice((person, friend))} was tired, and they went home."
    )


def _tell_age(random: Random) -> str:
    person, friend = _people(random, 2)
    age, years = random.randint(5, 60), random.randint(1, 20)
    return (
        f"{person} is {age} years old and lives in {random.choice(CITIES)}. {friend} is {years} years older, so "
        f"{friend} is "
        f"{age + years}. {person} likes {random.choice(FOODS)}, and {friend} likes {random.choice(FOODS)}. "
        f"They see each other every {random.choice(_DAYS)}."
    )


_TELLINGS: Final[tuple[Callable[[Random], str], ...]] = (
    _tell_facts,
    _tell_relation,
    _tell_relation,
    _tell_capitals,
    _tell_market,
    _tell_animal,
    _tell_search,
    _tell_room,
    _tell_day,
    _tell_age,
)


def document(random: Random) -> str:
    """Draws a plain English paragraph: a small story, a description, or facts as statements.

    Args:
        random: Where chance comes from.

    Returns:
        Three to seven sentences.
    """
    return random.choice(_TELLINGS)(random)


TASK: Final = Task("world", example, is_right, document)
"""General questions with short answers."""
