"""The metadata section: one MessagePack map, never compressed or encrypted.

`_METADATA` declares the fields the format knows, in the order a writer gives them. Declared fields are checked where
they occur; whether one is present is not, since nothing here depends on it. Other keys are kept as they are, at any
depth, as JSON-able values.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

from hocket.errors import HocketError, Reason
from hocket.packages.apr.header import MODEL_TYPES
from hocket.packages.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Kind(enum.Enum):
    ANY = "any JSON value"
    MAP = "a map"
    STRING = "a string"
    UINT = "an unsigned integer"
    UINT32 = "an unsigned 32-bit integer"
    FLOAT32 = "a 32-bit float"


# A kind, a map with declared keys, a list of one thing, or one of several names.
_Schema: TypeAlias = "_Kind | Mapping[str, _Schema] | list[_Schema] | frozenset[str]"

_TEACHER: Final[dict[str, _Schema]] = {
    "hash": _Kind.STRING,
    "signature": _Kind.STRING,
    "model_type": frozenset(MODEL_TYPES.values()),
    "param_count": _Kind.UINT,
}
_TEACHER["ensemble_teachers"] = [_TEACHER]

_METADATA: Final[_Schema] = {
    "created_at": _Kind.STRING,
    "aprender_version": _Kind.STRING,
    "model_name": _Kind.STRING,
    "description": _Kind.STRING,
    "training": {"samples": _Kind.UINT, "duration_ms": _Kind.UINT, "source": _Kind.STRING},
    "hyperparameters": _Kind.MAP,
    "metrics": _Kind.MAP,
    "custom": _Kind.MAP,
    "distillation": _Kind.STRING,
    "distillation_info": {
        "method": frozenset({"Standard", "Progressive", "Ensemble"}),
        "teacher": _TEACHER,
        "params": {
            "temperature": _Kind.FLOAT32,
            "alpha": _Kind.FLOAT32,
            "beta": _Kind.FLOAT32,
            "epochs": _Kind.UINT32,
            "final_loss": _Kind.FLOAT32,
        },
        "layer_mapping": [{"student_layer": _Kind.UINT, "teacher_layer": _Kind.UINT, "weight": _Kind.FLOAT32}],
    },
    "license": {
        "uuid": _Kind.STRING,
        "hash": _Kind.STRING,
        "expiry": _Kind.STRING,
        "seats": _Kind.UINT32,
        "licensee": _Kind.STRING,
        "tier": frozenset({"Personal", "Team", "Enterprise", "Academic"}),
    },
    "model_card": {
        "model_id": _Kind.STRING,
        "name": _Kind.STRING,
        "version": _Kind.STRING,
        "author": _Kind.STRING,
        "created_at": _Kind.STRING,
        "framework_version": _Kind.STRING,
        "rust_version": _Kind.STRING,
        "description": _Kind.STRING,
        "license": _Kind.STRING,
        "training_data": {"name": _Kind.STRING, "samples": _Kind.UINT, "hash": _Kind.STRING},
        "hyperparameters": _Kind.MAP,
        "metrics": _Kind.MAP,
        "architecture": _Kind.STRING,
        "param_count": _Kind.UINT,
        "target_hardware": [_Kind.STRING],
    },
}

_FLOAT32_MAX: Final = 3.4028235677973362e38  # largest double that rounds to a finite float32


def read_metadata(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Decode and check a metadata section.

    Args:
        data: The section, within `limits.metadata_bytes`.
        limits: Bounds on depth, number of values and length of a string.

    Returns:
        JSON-able values: str, int, float (finite), bool, None, list, dict, in file order.

    Raises:
        HocketError: `BAD_METADATA` for anything but one well-formed map with unique string keys and declared types;
            `TOO_LARGE` beyond a limit.
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
    _check(value, _METADATA, "")
    return value


def write_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Encode metadata in the order given, declared 32-bit floats as such; the inverse of `read_metadata`.

    Raises:
        HocketError: `BAD_METADATA` for a value that has no form in the format, or one that could not be read back.
    """
    parts: list[bytes] = []
    try:
        _encode(metadata, _METADATA, parts, 1)
    except (ValueError, OverflowError) as error:
        raise _bad(f"it cannot be written: {error}") from error
    data = b"".join(parts)
    read_metadata(data)
    return data


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
        self._unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1), max_str_len=limits.metadata_string_bytes)
        self._unpacker.feed(data)

    @property
    def rest(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._unpacker.tell()

    def value(self, depth: int) -> Any:  # noqa: ANN401 - a JSON value
        self._values += 1
        if self._values > self._limits.metadata_values:
            raise HocketError(Reason.TOO_LARGE, f"the metadata has more than {self._limits.metadata_values} values")
        if not self.rest:
            raise _bad("it ends inside a value")
        tag = self._data[self._unpacker.tell()]
        if tag & 0xF0 == 0x80 or tag in (0xDE, 0xDF):
            return self._map(self._unpacker.read_map_header(), self._inside(depth))
        if tag & 0xF0 == 0x90 or tag in (0xDC, 0xDD):
            inside = self._inside(depth)
            return [self.value(inside) for _ in range(self._unpacker.read_array_header())]
        if 0xC4 <= tag <= 0xC9 or 0xD4 <= tag <= 0xD8:
            raise _bad("binary and extension values have no meaning in it")
        value = self._unpacker.unpack()
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
    if value is None:
        return  # an optional field, spelled out
    if isinstance(schema, Mapping):
        if not isinstance(value, dict):
            raise _bad(f"{path} must be a map")
        for key, inner in schema.items():
            if key in value:
                _check(value[key], inner, f"{path}.{key}".removeprefix("."))
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise _bad(f"{path} must be a list")
        for element in value:
            _check(element, schema[0], f"{path}[]")
    elif isinstance(schema, frozenset):
        if value not in schema:
            raise _bad(f"{path} must be one of {', '.join(sorted(schema))}")
    elif not _is(value, schema):
        raise _bad(f"{path} must be {schema.value}")


def _is(value: object, kind: _Kind) -> bool:
    match kind:
        case _Kind.ANY:
            return True
        case _Kind.MAP:
            return isinstance(value, dict)
        case _Kind.STRING:
            return isinstance(value, str)
        case _Kind.FLOAT32:
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FLOAT32_MAX
        case _Kind.UINT | _Kind.UINT32:
            most = 2**32 if kind is _Kind.UINT32 else 2**64
            return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most


_packer: Final = msgpack.Packer()
_float32_packer: Final = msgpack.Packer(use_single_float=True)
