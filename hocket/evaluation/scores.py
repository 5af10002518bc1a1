"""Scores of texts and of JSON. They never raise for an answer, and take time linear in the first 100,000 characters."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason
from hocket.packages import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ANSWER_CHARACTERS_MAX: Final = 100_000
"""A longer answer is wrong."""
_JSON_DEPTH_MAX: Final = 64
_FENCE: Final = "```"
_ARTICLES: Final = frozenset({"a", "an", "the"})
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class JsonMatch:
    """How an answer in JSON compares with the reference.

    Attributes:
        parses: Whether it is one strict JSON document.
        keys: Whether it has the same keys, at every depth.
        values: Whether it is equal: keys in any order, lists in theirs, 1 is 1.0 and not true.
        conforms: Whether it fits the schema; as `parses` without one.
    """

    parses: bool
    keys: bool
    values: bool
    conforms: bool

    @property
    def right(self) -> bool:
        """Whether it is equal, and fits the schema."""
        return self.values and self.conforms


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for white space: NFC, runs of it as one space, none around.

    Case and punctuation count, since an answer may be code.
    """
    return len(answer) <= ANSWER_CHARACTERS_MAX and _plain(answer) == _plain(reference)


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of words, 0 to 1, as SQuAD measures it.

    Words are in lower case, without punctuation, and articles are none (P. Rajpurkar et al., 2016). Without words on
    either side it is 1, without on one 0.
    """
    if len(answer) > ANSWER_CHARACTERS_MAX:
        return 0.0
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def json_match(answer: str, reference: str, schema: Mapping[str, Any] | None = None) -> JsonMatch:
    """How an answer in JSON compares with the reference. A fence of Markdown around it is no part of it.

    Args:
        answer: Anything.
        reference: JSON.
        schema: What answers have to fit, as `check_schema` allows it.

    Raises:
        HocketError: `BAD_DATASET` if the reference is no JSON, or the schema says what is not known here.
    """
    try:
        wanted = _parsed(reference)
    except HocketError as error:
        raise HocketError(Reason.BAD_DATASET, f"the reference is no JSON: {error.message}") from error
    if schema is not None:
        check_schema(schema)
    try:
        found = _parsed(unfenced(answer))
    except HocketError:
        return JsonMatch(parses=False, keys=False, values=False, conforms=False)
    return JsonMatch(
        parses=True,
        keys=_keys(found) == _keys(wanted),
        values=_typed(found) == _typed(wanted),
        conforms=schema is None or _conforms(found, schema),
    )


def unfenced(text: str) -> str:
    """What the only fenced block of Markdown in a text holds; the text itself without one, or with several."""
    parts = text.split(_FENCE)
    return parts[1].partition("\n")[2] if len(parts) == 3 else text  # noqa: PLR2004 - before, inside, after


_TYPES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: (
        (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    ),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def check_schema(schema: Any, depth: int = 0) -> None:  # noqa: ANN401 - a JSON value
    """Make sure that a schema says only what is checked here, a part of JSON Schema.

    These are `type` (a name or a list of names), `enum`, `properties`, `required`, `additionalProperties` (true or
    false) and `items`; `title`, `description` and `$schema` say nothing.

    Raises:
        HocketError: `BAD_DATASET` if it says more, or is none.
    """
    if not isinstance(schema, dict) or depth > _JSON_DEPTH_MAX:
        raise HocketError(Reason.BAD_DATASET, "the schema, and each of its properties and items, is a JSON object")
    checks: Mapping[str, Callable[[Any], bool]] = {
        "type": lambda value: all(isinstance(each, str) and each in _TYPES for each in _listed(value)),
        "enum": lambda value: isinstance(value, list),
        "properties": lambda value: isinstance(value, dict),
        "required": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        "additionalProperties": lambda value: isinstance(value, bool),
        "items": lambda value: isinstance(value, dict),
        "title": lambda _: True,
        "description": lambda _: True,
        "$schema": lambda _: True,
    }
    for key, value in schema.items():
        if key not in checks or not checks[key](value):
            raise HocketError(Reason.BAD_DATASET, f"the schema's {key[:64]!r} cannot be checked here: docs/datasets.md")
    for part in (*schema.get("properties", {}).values(), *(each for each in (schema.get("items"),) if each)):
        check_schema(part, depth + 1)


def _conforms(value: Any, schema: Mapping[str, Any]) -> bool:  # noqa: ANN401 - a JSON value
    if "type" in schema and not any(_TYPES[name](value) for name in _listed(schema["type"])):
        return False
    if "enum" in schema and _typed(value) not in map(_typed, schema["enum"]):
        return False
    if isinstance(value, dict):
        return _object_conforms(value, schema)
    if isinstance(value, list) and "items" in schema:
        return all(_conforms(each, schema["items"]) for each in value)
    return True


def _object_conforms(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties", {})
    if not value.keys() >= set(schema.get("required", ())):
        return False
    if not schema.get("additionalProperties", True) and not value.keys() <= properties.keys():
        return False
    return all(_conforms(value[key], part) for key, part in properties.items() if key in value)


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 - a JSON value
    return value if isinstance(value, list) else [value]


def _parsed(text: str) -> Any:  # noqa: ANN401 - a JSON value
    data = text.strip().encode(errors="replace")
    return strict_json.loads(data, what="the text", bytes_max=4 * ANSWER_CHARACTERS_MAX, depth_max=_JSON_DEPTH_MAX)


def _keys(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    """A JSON value without what its objects and lists hold in the end."""
    if isinstance(value, dict):
        return {key: _keys(each) for key, each in value.items()}
    return [_keys(each) for each in value] if isinstance(value, list) else None


def _typed(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    """A JSON value in which true differs from 1."""
    if isinstance(value, dict):
        return {key: _typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_typed(each) for each in value]
    return ("bool", value) if isinstance(value, bool) else value


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]
