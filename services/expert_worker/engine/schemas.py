"""JSON schemas that llguidance can hold answers to: exactly, and in time."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason
from hocket.packages import strict_json
from hocket.text_limits import CONSTRAINT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_DEPTH_MAX: Final = 64
_EXACT_MAX: Final = 2**53
"""llguidance counts in float64."""
_INT64_MAX: Final = 2**63 - 1
"""A usual bound, which comes out right."""
_MULTIPLE: Final = "multipleOf"
_MULTIPLE_MAX: Final = 10_000
"""The largest common multiple of the numbers of `multipleOf`, zeros at its end left out: there is a state for each
remainder, and no limit of llguidance's knows them."""
_PATTERNS_MAX: Final = 10
"""Patterns of a schema that may have several hold at once: what is of all of them takes for ever to find."""
_JOINING: Final = frozenset({"allOf", "anyOf", "oneOf", "$ref", "pattern"})
"""Keywords of which two hold at once; of the first, what is in it as well."""
_NAME_PATTERNS_MAX: Final = 100
"""Patterns of one object's properties: a name may be of any number of them at once."""
_FORMATS: Final = (
    "date-time",
    "date",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
)
"""Those that llguidance enforces."""
_VALUES: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are no schemas."""
_NAMING: Final = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Keywords of objects that have schemas under names."""
_LISTS: Final = ("enum", "type", "anyOf")
"""Keywords that say nothing may come if their lists are empty."""
_QUOTED: Final = re.compile(r'"([^"]*)"')
_POINTER_CHARS: Final = 200


def read_schema(text: str) -> dict[str, Any]:
    """Parse a schema.

    Raises:
        HocketError: `BAD_SCHEMA` if it is none, or wants what would be enforced only nearly, or takes for ever.
    """
    try:
        schema = strict_json.loads(
            text.encode(), what="the schema", bytes_max=CONSTRAINT_BYTES_MAX, depth_max=_DEPTH_MAX
        )
    except HocketError as error:
        raise HocketError(Reason.BAD_SCHEMA, error.message) from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise bad_schema("it is neither an object nor true")
    objects = []
    for value in _values(schema):
        if isinstance(value, int) and abs(value) > _EXACT_MAX and value != _INT64_MAX:
            raise bad_schema(f"the integer {value} is beyond 2^53, where numbers are not exact")
        if isinstance(value, dict):
            _check_counts(value)
            objects.append(value)
    _check_multiples(objects)
    patterns = {each["pattern"] for each in objects if isinstance(each.get("pattern"), str)}
    if len(patterns) > _PATTERNS_MAX and any("allOf" in each or len(_JOINING & each.keys()) > 1 for each in objects):
        raise bad_schema(f"it has more than {_PATTERNS_MAX} patterns, and may want several at once")
    return schema


def explained(said: str, text: str) -> str:  # noqa: PLR0911 - one for each kind of refusal
    """What llguidance says of a schema, and what to do about it where that is known.

    Args:
        said: Why it refuses the schema.
        text: The schema, which `read_schema` has passed.
    """
    parts = [*_parts(read_schema(text))]
    key, _, rest = said.partition(": ")
    if key == "Unimplemented keys":
        keys = [f"{each} (at {_first(parts, each)})" for each in _QUOTED.findall(rest)]
        them = "it" if len(keys) == 1 else "them"
        return f"{', '.join(keys)} cannot be enforced: leave {them} out, and check answers afterwards"
    if said.startswith("oneOf constraints"):
        return (
            "two branches of oneOf can both match: put what tells them apart, such as a property whose const differs, "
            f"into required of each, or use anyOf (the first oneOf is at {_first(parts, 'oneOf')})"
        )
    if said.startswith("Resource "):
        for pointer, part in parts:
            target = part.get("$ref")
            if isinstance(target, str) and not target.startswith("#"):
                return (
                    f"the $ref at {pointer} leads out of the document, and nothing is fetched: only a $ref inside it "
                    "is followed; put what it names into $defs"
                )
        return "$schema is not known: leave it out"
    if key == "Unknown format":
        return f"the format {rest} is not known: use one of {', '.join(_FORMATS)}, or a pattern"
    if key == "Unsatisfiable schema":
        empty = [(each, pointer) for pointer, part in parts for each in _LISTS if part.get(each) == []]
        if empty and rest == "anyOf is empty":
            rest = "the {} at {} is empty".format(*empty[0])
        return f"no answer can satisfy it: {rest}"
    if said.startswith(("Pointer ", "Anchor ")):
        return f"a $ref leads nowhere: {said}"
    return said


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, itself first, by their JSON pointers."""
    waiting: list[tuple[str, Any]] = [("#", schema)]
    for pointer, value in waiting:  # which grows
        if isinstance(value, list):
            waiting += [(_under(pointer, str(place)), each) for place, each in enumerate(value)]
        if not isinstance(value, dict):
            continue
        yield pointer, value
        for key, inner in value.items():
            if key in _NAMING and isinstance(inner, dict):
                waiting += [(_under(_under(pointer, key), name), each) for name, each in inner.items()]
            elif key not in _VALUES:
                waiting.append((_under(pointer, key), inner))


def _under(pointer: str, name: str) -> str:
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"{pointer}/{escaped}"[:_POINTER_CHARS]


def _first(parts: Sequence[tuple[str, dict[str, Any]]], keyword: str) -> str:
    """Where a keyword stands first."""
    return next((pointer for pointer, part in parts if keyword in part), "#")


def _values(value: Any) -> Iterator[Any]:  # noqa: ANN401 - a JSON value
    """A JSON value and everything in it."""
    waiting = [value]
    while waiting:
        yield (each := waiting.pop())
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _check_counts(part: dict[str, Any]) -> None:
    """Refuse counts of properties that llguidance can be cheated of, and too many patterns of their names.

    It knows the properties again that a schema names, but counts another one each time it comes, and a reader once.
    """
    least, named, by_pattern = part.get("minProperties"), part.get("required"), part.get("patternProperties")
    if isinstance(least, (int, float)) and least > 1 + (len(named) if isinstance(named, list) else 0):
        raise bad_schema(
            f"minProperties is {least}, and an object could reach that by one property twice: name all but one of "
            "them in required"
        )
    if isinstance(by_pattern, dict) and len(by_pattern) > _NAME_PATTERNS_MAX:
        raise bad_schema(f"patternProperties has more than {_NAME_PATTERNS_MAX} patterns")


def _check_multiples(objects: list[dict[str, Any]]) -> None:
    """Refuse numbers that take too many remainders to tell their multiples."""
    common = 1
    for part in objects:
        number = part.get(_MULTIPLE)
        if isinstance(number, (int, float)) and not isinstance(number, bool) and number:
            common = math.lcm(common, _digits(number))
        if common > _MULTIPLE_MAX:
            raise bad_schema(
                f"the numbers of {_MULTIPLE} have no common multiple up to {_MULTIPLE_MAX}, without zeros at its end"
            )


def _digits(number: float) -> int:
    """A number without its sign, its point, and zeros at its end."""
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits)))


def bad_schema(why: str) -> HocketError:
    """The refusal of a schema."""
    return HocketError(Reason.BAD_SCHEMA, f"the JSON schema cannot be used: {why}")
