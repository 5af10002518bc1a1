"""The metadata section: one MessagePack map, never compressed or encrypted.

`_METADATA` declares the fields the format knows, in the order a writer gives them, and which of them a map always has.
Declared fields are checked wherever they occur. Other keys are kept as they are, at any depth, as JSON-able values.
What the parts mean is in `hocket.packages.apr.about`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack  # type: ignore[import-untyped]  # it comes without type information

from hocket.errors import HocketError, Reason
from hocket.packages.apr.header import MODEL_TYPES
from hocket.packages.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Kind(enum.Enum):
    STRING = "a string"
    UINT = "an unsigned integer"
    UINT32 = "an unsigned 32-bit integer"
    FLOAT32 = "a 32-bit float"


@dataclass(frozen=True, slots=True)
class _Map:
    """A map with declared keys: of each its schema, and which of them every such map has."""

    fields: Mapping[str, _Schema]
    always: tuple[str, ...] = ()


# A kind, a map with declared keys, a list of one thing, or one of several names.
_Schema: TypeAlias = "_Kind | _Map | list[_Schema] | frozenset[str]"

_ANYTHING: Final = _Map({})

_TEACHER_FIELDS: Final[dict[str, _Schema]] = {
    "hash": _Kind.STRING,
    "signature": _Kind.STRING,
    "model_type": frozenset(MODEL_TYPES.values()),
    "param_count": _Kind.UINT,
}
_TEACHER: Final = _Map(_TEACHER_FIELDS, ("hash", "model_type", "param_count"))
_TEACHER_FIELDS["ensemble_teachers"] = [_TEACHER]

_DISTILLATION_PARAMETERS: Final = _Map(
    {
        "temperature": _Kind.FLOAT32,
        "alpha": _Kind.FLOAT32,
        "beta": _Kind.FLOAT32,
        "epochs": _Kind.UINT32,
        "final_loss": _Kind.FLOAT32,
    },
    ("temperature", "alpha", "epochs"),
)
_LAYER_MAPPING: Final = _Map(
    {"student_layer": _Kind.UINT, "teacher_layer": _Kind.UINT, "weight": _Kind.FLOAT32},
    ("student_layer", "teacher_layer", "weight"),
)
_DISTILLATION: Final = _Map(
    {
        "method": frozenset({"Standard", "Progressive", "Ensemble"}),
        "teacher": _TEACHER,
        "params": _DISTILLATION_PARAMETERS,
        "layer_mapping": [_LAYER_MAPPING],
    },
    ("method", "teacher", "params"),
)

_LICENCE: Final = _Map(
    {
        "uuid": _Kind.STRING,
        "hash": _Kind.STRING,
        "expiry": _Kind.STRING,
        "seats": _Kind.UINT32,
        "licensee": _Kind.STRING,
        "tier": frozenset({"Personal", "Team", "Enterprise", "Academic"}),
    },
    ("uuid", "hash", "tier"),
)

_MODEL_CARD: Final = _Map(
    {
        "model_id": _Kind.STRING,
        "name": _Kind.STRING,
        "version": _Kind.STRING,
        "author": _Kind.STRING,
        "created_at": _Kind.STRING,
        "framework_version": _Kind.STRING,
        "rust_version": _Kind.STRING,
        "description": _Kind.STRING,
        "license": _Kind.STRING,
        "training_data": _Map({"name": _Kind.STRING, "samples": _Kind.UINT, "hash": _Kind.STRING}, ("name",)),
        "hyperparameters": _ANYTHING,
        "metrics": _ANYTHING,
        "architecture": _Kind.STRING,
        "param_count": _Kind.UINT,
        "target_hardware": [_Kind.STRING],
    },
    ("model_id", "name", "version", "created_at", "framework_version"),
)

_METADATA: Final = _Map(
    {
        "created_at": _Kind.STRING,
        "aprender_version": _Kind.STRING,
        "model_name": _Kind.STRING,
        "description": _Kind.STRING,
        "training": _Map({"samples": _Kind.UINT, "duration_ms": _Kind.UINT, "source": _Kind.STRING}),
        "hyperparameters": _ANYTHING,
        "metrics": _ANYTHING,
        "custom": _ANYTHING,
        "distillation": _Kind.STRING,
        "distillation_info": _DISTILLATION,
        "license": _LICENCE,
        "model_card": _MODEL_CARD,
    },
    ("created_at", "aprender_version"),
)

_MAP_TAGS: Final = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})
_LIST_TAGS: Final = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})
_FOREIGN_TAGS: Final = frozenset({*range(0xC4, 0xCA), *range(0xD4, 0xD9)})  # binary, extensions
_FLOAT32_END: Final = 2.0**128 - 2.0**103  # from here on a double rounds to an infinite float32


def read_metadata(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Decode and check a metadata section.

    Args:
        data: The section, within `limits.metadata_bytes`.
        limits: Bounds on depth, number of values and length of a string.

    Returns:
        JSON-able values: str, int, float (finite), bool, None, list, dict, in file order.

    Raises:
        HocketError: `BAD_METADATA` for anything but one well-formed map with unique string keys, where every declared
            field has its type and none is missing that is always there; `TOO_LARGE` beyond a limit.
    """
    decoder = _Decoder(memoryview(data), limits)
    try:
        value = decoder.value(depth=1)
    except (ValueError, msgpack.UnpackException) as error:
        raise _bad("it is not well-formed MessagePack") from error
    if decoder.rest:
        raise _bad(f"{decoder.rest} bytes follow it")
    if not isinstance(value, dict):
        raise _bad("it is not a map")
    _check(value, _METADATA, "metadata")
    return value


def write_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Encode metadata in the order given, declared 32-bit floats as such; the inverse of `read_metadata`.

    Raises:
        HocketError: `BAD_METADATA` for a value that has no form in the format, or one that could not be read back.
    """
    try:
        data = b"".join(_encode(metadata, _METADATA, depth=1))
    except (ValueError, OverflowError) as error:
        raise _bad(f"it cannot be written: {error}") from error
    read_metadata(data)
    return data


def check_card(section: Mapping[str, Any]) -> None:
    """Check the declared keys of a model card that is not in any metadata yet.

    Raises:
        HocketError: `BAD_METADATA` if one has another type, or is missing where every card has it.
    """
    _check(section, _MODEL_CARD, "model_card")


def _encode(value: object, schema: _Schema | None, depth: int) -> Iterator[bytes]:
    # Packers are not shared: they are not safe to use from several threads.
    packer = msgpack.Packer(use_single_float=schema is _Kind.FLOAT32)
    if depth > DEFAULT_LIMITS.metadata_depth + 1:
        raise _bad("it is nested too deep")
    if isinstance(value, Mapping):
        declared = schema.fields if isinstance(schema, _Map) else {}
        yield packer.pack_map_header(len(value))
        for key, inner in value.items():
            yield packer.pack(key)
            yield from _encode(inner, declared.get(key), depth + 1)
    elif isinstance(value, list | tuple):
        yield packer.pack_array_header(len(value))
        for element in value:
            yield from _encode(element, schema[0] if isinstance(schema, list) else None, depth + 1)
    elif schema is _Kind.FLOAT32 and isinstance(value, int):
        yield packer.pack(float(value))
    elif value is None or isinstance(value, str | int | float):
        yield packer.pack(value)
    else:
        raise _bad(f"a {type(value).__name__} cannot be stored in it")


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_METADATA, f"the metadata is refused: {what}")


class _Decoder:
    """Lets the library decode scalars, and walks maps and lists itself.

    Left alone the library takes memory for the claimed length of each nested list, and 70 times the size of a
    section full of empty ones.
    """

    def __init__(self, data: memoryview, limits: Limits) -> None:
        self._data = data
        self._limits = limits
        self._values = 0
        self._unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
        self._unpacker.feed(data)

    @property
    def _position(self) -> int:
        return int(self._unpacker.tell())

    @property
    def rest(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._position

    def value(self, depth: int) -> Any:  # noqa: ANN401 - a JSON value
        self._values += 1
        if self._values > self._limits.metadata_values:
            raise HocketError(Reason.TOO_LARGE, f"the metadata has more than {self._limits.metadata_values} values")
        if not self.rest:
            raise _bad("it ends inside a value")
        tag = self._data[self._position]
        if tag in _MAP_TAGS:
            return self._map(self._unpacker.read_map_header(), self._inside(depth))
        if tag in _LIST_TAGS:
            inside = self._inside(depth)
            return [self.value(inside) for _ in range(self._unpacker.read_array_header())]
        if tag in _FOREIGN_TAGS:
            raise _bad("binary and extension values have no meaning in it")
        value = self._unpacker.unpack()
        if isinstance(value, str) and len(value) > self._limits.metadata_string_chars:
            raise HocketError(
                Reason.TOO_LARGE,
                f"a metadata string is longer than {self._limits.metadata_string_chars} characters",
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise _bad("a number in it is not finite")
        return value

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth)
            if not isinstance(key, str):
                raise _bad("a key is not a string")
            if key in members:
                raise _bad(f"the key {key[:64]!r} occurs twice")
            members[key] = self.value(depth)
        return members

    def _inside(self, depth: int) -> int:
        if depth > self._limits.metadata_depth:
            raise HocketError(Reason.TOO_LARGE, f"the metadata is nested more than {self._limits.metadata_depth} deep")
        return depth + 1


def _check(value: Any, schema: _Schema, path: str) -> None:  # noqa: ANN401 - a JSON value
    if not _fits(value, schema):
        raise _bad(f"{path} must be {_spoken(schema)}")
    if isinstance(schema, _Map):
        for key in schema.always:
            if value.get(key) is None:
                raise _bad(f"{path}.{key} is missing")
        for key in schema.fields.keys() & value.keys():
            if value[key] is not None:  # else an optional field, spelled out
                _check(value[key], schema.fields[key], f"{path}.{key}")
    elif isinstance(schema, list):
        for element in value:
            _check(element, schema[0], f"{path}[]")


def _fits(value: object, schema: _Schema) -> bool:
    if isinstance(schema, _Map | list):
        return isinstance(value, dict if isinstance(schema, _Map) else list)
    if isinstance(schema, frozenset):
        return isinstance(value, str) and value in schema
    if schema is _Kind.STRING:
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if schema is _Kind.FLOAT32:
        return isinstance(value, int | float) and abs(value) < _FLOAT32_END
    return isinstance(value, int) and 0 <= value < (2**32 if schema is _Kind.UINT32 else 2**64)


def _spoken(schema: _Schema) -> str:
    if isinstance(schema, _Kind):
        return schema.value
    if isinstance(schema, frozenset):
        return f"one of {', '.join(sorted(schema))}"
    return "a map" if isinstance(schema, _Map) else "a list"
