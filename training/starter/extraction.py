"""The extraction of fields into JSON, of the starter kit.

A text of a sentence or two speaks of a person, an order, a meeting, the weather, a book or a pet. The request names two
to four fields, in any order, and the answer is one JSON object of exactly these, in that order, on one line. A field
of which the text does not speak is `null` (the form `missing`).

A wording is a request around a text. `TEST` has its own requests, its own sentences and its own values: every fifth
word of a list, and the numbers that leave 3 when divided by 7 (of a price: its cents; of a time: its five minutes).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from training.starter.drawing import number_between
from training.starter.task import Example, Split, Task
from training.starter.words import ANIMALS, CITIES, COLOURS, NAMES, THINGS, held_out, invented, listed, spliced

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

Value = str | int | float
"""What a field may hold, if it is not null."""

ANSWER_LENGTH_MAX: Final = 1_000
FIELD_COUNT_MIN: Final = 2
DOCUMENT_LENGTH_MIN: Final = 60
DOCUMENT_LENGTH_MAX: Final = 400
MISSING_SHARE: Final = 1 / 6
INVENTED_SHARE: Final = 1 / 3


@dataclass(frozen=True, slots=True)
class Field:
    """A field that can be asked for.

    Args:
        kind: Its type, as JSON Schema names it.
        draw: Draws its value for a split.
        show: Writes the value into a sentence.
    """

    kind: str
    draw: Callable[[Random, Split], Value]
    show: Callable[[Value], str] = str


@dataclass(frozen=True, slots=True)
class Domain:
    """What a text speaks of.

    Args:
        name: The kind of its examples.
        fields: Its fields by name.
        train: Sentences of `TRAIN`, with `{field}` where a value stands. A few leave one field out.
        test: Sentences of `TEST`.
    """

    name: str
    fields: Mapping[str, Field]
    train: tuple[str, ...]
    test: tuple[str, ...]


JOBS: Final = listed(
    "baker teacher doctor nurse farmer painter pilot cook driver writer singer lawyer gardener tailor plumber "
    "dentist waiter builder florist barber"
)
SKIES: Final = listed("sunny cloudy rainy windy foggy clear stormy snowy grey misty")
PLACES: Final = listed(
    "library kitchen hall office garden museum school cafe station studio theatre park hotel bakery church"
)
DAYS: Final = (
    *listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    *(f"{number} {month}" for month in listed("January March May July August October") for number in range(1, 29, 3)),
)
ITEMS: Final = tuple(f"{thing}s" for thing in THINGS if not thing.endswith(("x", "sh", "y", "fe")))
QUALITIES: Final = (*listed("old last little lost quiet long dark secret broken silent"), *COLOURS)


def _words(words: Sequence[str], make: Callable[[str], str] | None = None) -> Callable[[Random, Split], Value]:
    """Return what draws a word of a list, or for `TRAIN` now and then what is made of an invented word."""
    kept, held = held_out(words)
    held_words = frozenset(held)

    def draw(random: Random, split: Split) -> Value:
        if split is Split.TEST:
            return random.choice(held)
        if make is not None and random.random() < INVENTED_SHARE:
            made = make(random.choice((invented, spliced))(random))
            if made not in held_words:
                return made
        return random.choice(kept)

    return draw


def _numbers(low: int, high: int) -> Callable[[Random, Split], Value]:
    """Return what draws an integer from `low` to `high`."""

    def draw(random: Random, split: Split) -> Value:
        return number_between(random, split, low, high)

    return draw


def _price(random: Random, split: Split) -> Value:
    """Draw a price: whole, or with two decimals of which the last is not 0, as JSON would drop it."""
    if random.random() < 1 / 2:
        return _whole_price(random, split)
    while True:
        cents = number_between(random, split, 101, 9_999)
        if cents % 10:
            return cents / 100


def _time(random: Random, split: Split) -> Value:
    slot = number_between(random, split, 7 * 12, 22 * 12 - 1)  # five minutes each
    return f"{slot // 12}:{slot % 12 * 5:02}"


def _title(random: Random, split: Split) -> Value:
    return f"The {str(_quality(random, split)).capitalize()} {str(_thing(random, split)).capitalize()}"


def _show_price(price: Value) -> str:
    return f"{price:.2f}" if isinstance(price, float) else str(price)


_name = _words(NAMES, str.capitalize)
_city = _words(CITIES, str.capitalize)
_thing = _words(THINGS, str)
_quality = _words(QUALITIES)
_whole_price = _numbers(2, 99)

DOMAINS: Final = (
    Domain(
        "person",
        {
            "name": Field("string", _name),
            "age": Field("integer", _numbers(18, 90)),
            "city": Field("string", _city),
            "job": Field("string", _words(JOBS, str)),
        },
        (
            "{name} is {age} years old and lives in {city}.",
            "{name} lives in {city}, is {age} years old and works as a {job}.",
            "{name} works as a {job} in {city}.",
            "{name}, {age}, is a {job} from {city}.",
            "The {job} {name} lives in {city} and is {age}.",
            "In {city} lives {name}, a {job} of {age} years.",
            "My friend {name} is a {job}. {name} is {age} and lives in {city}.",
            "This is {name} from {city}. At {age}, {name} works as a {job}.",
            "At the age of {age}, {name} is a {job} in {city}.",
            "{name} is a {job} and {age} years old.",
        ),
        (
            "{name} is {age} years old and works as a {job} in {city}.",
            "{name} from {city} is a {job}. {name} is {age}.",
            "The {job} {name} is {age} years old.",
            "My friend {name}, {age}, lives in {city}.",
        ),
    ),
    Domain(
        "order",
        {
            "customer": Field("string", _name),
            "item": Field("string", _words(ITEMS, "{}s".format)),
            "quantity": Field("integer", _numbers(2, 60)),
            "price": Field("number", _price, _show_price),
        },
        (
            "{customer} bought {quantity} {item} for {price} euros.",
            "{customer} ordered {quantity} {item} at {price} euros.",
            "{customer} ordered {quantity} {item}.",
            "{quantity} {item} were sold to {customer} for {price} euros.",
            "We sold {quantity} {item} to {customer}. The price was {price} euros.",
            "An order of {quantity} {item} came from {customer}, and the price is {price} euros.",
            "The {item} cost {price} euros, and {customer} took {quantity}.",
            "For {price} euros {customer} got {quantity} {item}.",
            "The shop sent {quantity} {item} to {customer} and asked for {price} euros.",
            "We sold {quantity} {item} for {price} euros.",
        ),
        (
            "The shop sold {quantity} {item} to {customer} for {price} euros.",
            "{customer} got {quantity} {item}. The price was {price} euros.",
            "An order of {quantity} {item} came from {customer}.",
            "For {price} euros we sent {quantity} {item} to {customer}.",
        ),
    ),
    Domain(
        "meeting",
        {
            "day": Field("string", _words(DAYS)),
            "time": Field("string", _time),
            "place": Field("string", _words(PLACES, str)),
            "host": Field("string", _name),
        },
        (
            "The meeting is on {day} at {time} in the {place}.",
            "{host} holds a meeting on {day} at {time} in the {place}.",
            "On {day} {host} meets the team at {time} in the {place}.",
            "We meet {host} in the {place} on {day} at {time}.",
            "The {place} is booked by {host} for {day} at {time}.",
            "{host} asks us to come to the {place} at {time} on {day}.",
            "Come to the {place} on {day}. {host} starts the meeting at {time}.",
            "At {time} on {day} the team of {host} meets in the {place}.",
            "{host} meets the team on {day} at {time}.",
            "The meeting with {host} is in the {place}. It starts on {day} at {time}.",
        ),
        (
            "The meeting with {host} is on {day} at {time} in the {place}.",
            "We meet in the {place} at {time} on {day}.",
            "On {day} at {time} {host} holds a meeting in the {place}.",
            "{host} asks the team to come to the {place} on {day} at {time}.",
        ),
    ),
    Domain(
        "weather",
        {
            "city": Field("string", _city),
            "day": Field("string", _words(DAYS)),
            "temperature": Field("integer", _numbers(-15, 38)),
            "sky": Field("string", _words(SKIES)),
        },
        (
            "It is {sky} in {city} with {temperature} degrees.",
            "On {day} it was {sky} in {city}, with {temperature} degrees.",
            "{city} has {temperature} degrees on {day}, and it is {sky}.",
            "The weather in {city} on {day}: {sky}, {temperature} degrees.",
            "{day} was {sky} in {city}. We had {temperature} degrees.",
            "In {city} we had {temperature} degrees and a {sky} day on {day}.",
            "A {sky} {day} in {city}, and {temperature} degrees.",
            "At {temperature} degrees, {day} is a {sky} day in {city}.",
            "On {day} {city} had {temperature} degrees.",
            "The weather on {day} is {sky} in {city}, and we have {temperature} degrees.",
        ),
        (
            "On {day} we had {temperature} degrees in {city}, and it was {sky}.",
            "The weather in {city} is {sky} on {day}, with {temperature} degrees.",
            "In {city} it is {sky}, and we have {temperature} degrees.",
            "{city} had a {sky} day on {day}. It was {temperature} degrees.",
        ),
    ),
    Domain(
        "book",
        {
            "title": Field("string", _title),
            "author": Field("string", _name),
            "year": Field("integer", _numbers(1850, 2024)),
            "pages": Field("integer", _numbers(60, 900)),
        },
        (
            "{author} wrote {title} in {year}.",
            "{author} wrote {title} in {year}. It has {pages} pages.",
            "{title} is a book by {author} from {year} with {pages} pages.",
            "The book {title} has {pages} pages and was written by {author} in {year}.",
            "In {year} {author} wrote a book of {pages} pages, {title}.",
            "{title} by {author} came out in {year} and has {pages} pages.",
            "I read {title}, the book that {author} wrote in {year}. It has {pages} pages.",
            "With {pages} pages, {title} by {author} came out in {year}.",
            "{title} has {pages} pages and came out in {year}.",
            "The {pages} pages of {title} were written in {year} by {author}.",
        ),
        (
            "{title} was written by {author} in {year} and has {pages} pages.",
            "The book {title} by {author} came out in {year}. It has {pages} pages.",
            "{author} wrote the {pages} pages of {title}.",
            "In {year} {title} came out, a book by {author} with {pages} pages.",
        ),
    ),
    Domain(
        "pet",
        {
            "name": Field("string", _name),
            "animal": Field("string", _words(ANIMALS, str)),
            "colour": Field("string", _words(COLOURS)),
            "age": Field("integer", _numbers(1, 30)),
        },
        (
            "{name} is a {colour} {animal}.",
            "{name} is a {colour} {animal} and {age} years old.",
            "Our {animal} {name} is {age} years old and {colour}.",
            "We have a {colour} {animal}. It is called {name} and is {age} years old.",
            "The {colour} {animal} is called {name}. It is {age}.",
            "My {animal} is {colour}, is called {name} and is {age} years old.",
            "A {animal} of {age} years, {colour}, is called {name}.",
            "At {age}, our {colour} {animal} {name} still plays.",
            "Our {animal} {name} is {age} years old.",
            "{name}, the {colour} {animal}, is {age} years old.",
        ),
        (
            "Our {colour} {animal} is called {name} and is {age} years old.",
            "{name} is a {animal} of {age} years. It is {colour}.",
            "We have a {animal}. It is called {name} and is {colour}.",
            "My {colour} {animal} {name} is {age}.",
        ),
    ),
)

TRAIN_REQUESTS: Final = (
    "Extract {fields} as JSON: {text}",
    "Give {fields} as JSON: {text}",
    "Write {fields} as a JSON object: {text}",
    "Read the text and return JSON with {fields}: {text}",
    "Extract the {fields} of this text as JSON: {text}",
    "{text} Extract {fields} as JSON.",
    "{text} Return JSON with {fields}.",
    "{text} Please write the {fields} as JSON.",
    "Extract {fields}: {text}",
    "Find {fields} in this text: {text}",
    "Read the text and give {fields}: {text}",
    "Extract the fields {fields} from this text: {text}",
    "{text} Find the {fields}.",
    "{text} Extract the fields {fields}.",
    "Fields: {fields}. Text: {text}",
    "Please read this and return {fields}: {text}",
)
TEST_REQUESTS: Final = (
    "Read this text and extract {fields} as JSON: {text}",
    "Return a JSON object with {fields}: {text}",
    "{text} Give the {fields} as JSON.",
    "Extract {fields} from this text: {text}",
    "Please find the fields {fields} in this text: {text}",
    "{text} Extract the {fields}.",
)


_BEFORE_VOWEL: Final = re.compile(r"\b([Aa])(?= [aeiou])")
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")


def mentioned(sentence: str) -> frozenset[str]:
    """Return the fields that a sentence speaks of."""
    return frozenset(_PLACEHOLDER.findall(sentence))


@dataclass(frozen=True, slots=True)
class _Sentences:
    """The sentences of a domain and split, those that speak of every field apart from those that leave one out."""

    whole: tuple[str, ...]
    partial: tuple[str, ...]


def _parted(domain: Domain, sentences: tuple[str, ...]) -> _Sentences:
    count = len(domain.fields)
    return _Sentences(
        tuple(sentence for sentence in sentences if len(mentioned(sentence)) == count),
        tuple(sentence for sentence in sentences if len(mentioned(sentence)) < count),
    )


_SENTENCES: Final = {
    (domain.name, split): _parted(domain, domain.train if split is Split.TRAIN else domain.test)
    for domain in DOMAINS
    for split in Split
}
_MENTIONED: Final = {sentence: mentioned(sentence) for domain in DOMAINS for sentence in (*domain.train, *domain.test)}


def _draw_text(random: Random, split: Split, domain: Domain, sentence: str) -> tuple[str, dict[str, Value | None]]:
    """Draw the values of a sentence: the text, and every field of the domain, None where the text is silent."""
    spoken = _MENTIONED[sentence]
    values = {name: field.draw(random, split) if name in spoken else None for name, field in domain.fields.items()}
    shown = {name: domain.fields[name].show(value) for name, value in values.items() if value is not None}
    text = sentence.format(**shown)
    text = _BEFORE_VOWEL.sub(r"\1n", text)
    return text, values


def _draw_sentence(random: Random, split: Split, domain: Domain, *, partial: bool) -> str:
    sentences = _SENTENCES[domain.name, split]
    return random.choice(sentences.partial if partial else (*sentences.whole, *sentences.partial))


def _draw_fields(random: Random, domain: Domain, spoken: frozenset[str], *, missing: bool) -> list[str]:
    """Draw what is asked for, in order: fields that the text speaks of and, if wanted, one that it does not."""
    present = [name for name in domain.fields if name in spoken]
    if not missing:
        return random.sample(present, random.randint(FIELD_COUNT_MIN, len(present)))
    absent = [name for name in domain.fields if name not in spoken]
    asked = [random.choice(absent), *random.sample(present, random.randint(1, len(present)))]
    random.shuffle(asked)
    return asked


def _listing(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def example(random: Random, split: Split) -> Example:
    """Draw a text, a request for some of its fields, and the JSON object that answers it.

    The facts are `values`, what each field asked for holds, and `types`, how JSON Schema names the type of each.
    """
    domain = random.choice(DOMAINS)
    missing = random.random() < MISSING_SHARE
    sentence = _draw_sentence(random, split, domain, partial=missing)
    text, values = _draw_text(random, split, domain, sentence)
    asked = _draw_fields(random, domain, _MENTIONED[sentence], missing=missing)
    request = random.choice(TRAIN_REQUESTS if split is Split.TRAIN else TEST_REQUESTS)
    expected = {name: values[name] for name in asked}
    facts = {"values": expected, "types": {name: domain.fields[name].kind for name in asked}}
    kind = "missing" if missing else domain.name
    return Example(request.format(fields=_listing(asked), text=text), json.dumps(expected), kind, facts)


def schema(example: Example) -> dict[str, Any]:
    """Return the JSON Schema of every answer that an example's request allows: any values, right or wrong.

    Every field may be null, so that the schema does not say whether the text speaks of it.
    """
    types: Mapping[str, str] = example.facts["types"]
    return {
        "type": "object",
        "properties": {name: {"type": [kind, "null"]} for name, kind in types.items()},
        "required": list(types),
        "additionalProperties": False,
    }


_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def conforms(example: Example, answer: str) -> bool:
    """Say whether an answer is one JSON object that the schema of the example allows, whatever its values are."""
    found = _read_object(answer)
    wanted = schema(example)
    properties: Mapping[str, Mapping[str, list[str]]] = wanted["properties"]
    return (
        found is not None
        and found.keys() == properties.keys()
        and all(
            any(type(value) in _PYTHON_TYPES[kind] for kind in properties[name]["type"])
            for name, value in found.items()
        )
    )


def is_right(example: Example, answer: str) -> bool:
    """Say whether an answer is one JSON object with the fields that were asked for, in any order, and their values.

    Types count: neither `"31"` nor `31.0` is the age 31.
    """
    found = _read_object(answer)
    values: Mapping[str, Value | None] = example.facts["values"]
    return (
        found is not None
        and conforms(example, answer)
        and all(type(found[name]) is type(value) and found[name] == value for name, value in values.items())
    )


def _read_object(answer: str) -> dict[str, object] | None:
    """Read strict JSON: None for what is long, malformed or no object, and for repeated names, NaN and infinities."""
    if len(answer) > ANSWER_LENGTH_MAX:
        return None
    try:
        found = json.loads(answer.strip(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def document(random: Random) -> str:
    """Draw JSON as of a file, some records or a configuration, or else a few plain sentences: never both."""
    style = random.choice((_records, _lines, _configuration, _prose))
    while True:
        text = style(random)
        if DOCUMENT_LENGTH_MIN <= len(text) <= DOCUMENT_LENGTH_MAX:
            return text


def _record(random: Random, domain: Domain) -> dict[str, Value | None]:
    names = random.sample(list(domain.fields), random.randint(FIELD_COUNT_MIN, len(domain.fields)))
    return {
        name: None if random.random() < MISSING_SHARE / 2 else domain.fields[name].draw(random, Split.TRAIN)
        for name in names
    }


def _records(random: Random) -> str:
    domain = random.choice(DOMAINS)
    records = [_record(random, domain) for _ in range(random.randint(1, 3))]
    plural = f"{domain.name}s"
    return json.dumps(random.choice((records, {plural: records}, {"count": len(records), plural: records})))


def _lines(random: Random) -> str:
    domain = random.choice(DOMAINS)
    return "\n".join(json.dumps(_record(random, domain)) for _ in range(random.randint(1, 4)))


def _configuration(random: Random) -> str:
    word = _words(THINGS, str)
    settings: dict[str, object] = {
        "name": word(random, Split.TRAIN),
        "port": _numbers(1_000, 9_999)(random, Split.TRAIN),
        "debug": random.random() < 1 / 2,
        "tags": [word(random, Split.TRAIN) for _ in range(random.randint(0, 3))],
        "limit": None if random.random() < 1 / 3 else _numbers(1, 99)(random, Split.TRAIN),
        "owner": {"name": _name(random, Split.TRAIN), "city": _city(random, Split.TRAIN)},
    }
    names = random.sample(list(settings), random.randint(3, len(settings)))
    return json.dumps({name: settings[name] for name in names}, indent=random.choice((None, 2)))


def _prose(random: Random) -> str:
    sentences = []
    for _ in range(random.randint(2, 4)):
        domain = random.choice(DOMAINS)
        sentence = _draw_sentence(random, Split.TRAIN, domain, partial=False)
        sentences.append(_draw_text(random, Split.TRAIN, domain, sentence)[0])
    return " ".join(sentences)


TASK: Final = Task("json", example, is_right, document)
