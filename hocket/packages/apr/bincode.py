"""bincode 1.3 as the format uses it: fixed-width little-endian scalars, 64-bit counts, one-byte option tags.

Nothing in the bytes says what they are. A `Codec` knows one type's layout in both directions, and combinators build
the codec of a model from those of its fields, so that a layout is written down once, as a table.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hocket.packages.limits import Limits
    from hocket.packages.model import Counts, Floats

T = TypeVar("T")


class Reader:
    """A position in an uncompressed payload.

    Args:
        data: The payload.
        limits: Bounds on what is read.
        copies: Whether what is read is to be used. If it is only to be seen whether it fits, arrays are views.
    """

    __slots__ = ("copies", "data", "limits", "nodes_left", "position")

    def __init__(self, data: memoryview, limits: Limits, *, copies: bool = True) -> None:
        self.data = data
        self.limits = limits
        self.copies = copies
        self.position = 0
        self.nodes_left = limits.tree_nodes

    @property
    def rest(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.position

    def take(self, size_bytes: int) -> memoryview:
        """The next bytes, moving past them."""
        if size_bytes > self.rest:
            raise self.bad(f"{size_bytes} bytes are needed, {self.rest} are left")
        start = self.position
        self.position += size_bytes
        return self.data[start : self.position]

    def bad(self, what: str) -> HocketError:
        """The refusal of what was found at this position."""
        return HocketError(Reason.BAD_PAYLOAD, f"payload byte {self.position}: {what}")

    def too_large(self, what: str, most: int) -> HocketError:
        """The refusal of something beyond a limit."""
        return HocketError(Reason.TOO_LARGE, f"the model has more than {most} {what}")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one type is read and written. `read` raises `BAD_PAYLOAD` or `TOO_LARGE`."""

    read: Callable[[Reader], T]
    write: Callable[[bytearray, T], None]


_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_F32: Final = struct.Struct("<f")


def _read_u64(reader: Reader) -> int:
    value: int = _U64.unpack(reader.take(8))[0]
    return value


def _write_u64(out: bytearray, value: int) -> None:
    out += _U64.pack(value)


def _read_f32(reader: Reader) -> float:
    value: float = _F32.unpack(reader.take(4))[0]
    if not math.isfinite(value):
        raise reader.bad("a parameter is not finite")
    return value


def _write_f32(out: bytearray, value: float) -> None:
    out += _F32.pack(value)


def _read_bool(reader: Reader) -> bool:
    value = reader.take(1)[0]
    if value > 1:
        raise reader.bad(f"a boolean is {value}")
    return value == 1


def _write_bool(out: bytearray, value: bool) -> None:  # noqa: FBT001 - the value to write
    out.append(bool(value))


def view_array(reader: Reader, count: int, dtype: str) -> NDArray[Any]:
    """`count` finite values in a row, as they lie in the payload.

    Args:
        reader: Where to read.
        count: Number of values, any integer.
        dtype: `<f4` or `<u8`.
    """
    stored = np.dtype(dtype)
    if count * stored.itemsize > reader.rest:
        raise reader.bad(f"{count} values are announced, {reader.rest} bytes are left")
    array = np.frombuffer(reader.take(count * stored.itemsize), stored)
    with np.errstate(invalid="ignore"):  # without a mask, for which there may be no room
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise reader.bad("a parameter is not finite")
    array.flags.writeable = False
    return array


def _array(reader: Reader, count: int, dtype: str) -> NDArray[Any]:
    """As `view_array`, but aligned and independent of the payload, if the reader copies."""
    view = view_array(reader, count, dtype)
    if not reader.copies:
        return view
    array = view.astype(view.dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def write_array(out: bytearray, array: NDArray[Any], dtype: str) -> None:
    """The values of an array in a row, in C order."""
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite, which no reader accepts
        out += np.asarray(array).astype(dtype).tobytes()


def _counted(dtype: str) -> Codec[Any]:
    def read(reader: Reader) -> NDArray[Any]:
        return _array(reader, _read_u64(reader), dtype)

    def write(out: bytearray, array: NDArray[Any]) -> None:
        _write_u64(out, np.size(array))
        write_array(out, array, dtype)

    return Codec(read, write)


def _read_matrix(reader: Reader) -> Floats:
    values: Floats = VECTOR.read(reader)
    rows, columns = _read_u64(reader), _read_u64(reader)
    if columns > reader.limits.features:
        raise reader.too_large("features", reader.limits.features)
    if rows * columns != values.size or (rows and not columns):
        raise reader.bad(f"a matrix of {rows} x {columns} has {values.size} values")
    return values.reshape(rows, columns)


def _write_matrix(out: bytearray, matrix: Floats) -> None:
    VECTOR.write(out, matrix)
    rows, columns = matrix.shape
    _write_u64(out, rows)
    _write_u64(out, columns)


U64: Final = Codec(_read_u64, _write_u64)
F32: Final = Codec(_read_f32, _write_f32)
BOOL: Final = Codec(_read_bool, _write_bool)
VECTOR: Final[Codec[Floats]] = _counted("<f4")
U64S: Final[Codec[Counts]] = _counted("<u8")
MATRIX: Final[Codec[Floats]] = Codec(_read_matrix, _write_matrix)


def option(codec: Codec[T]) -> Codec[T | None]:
    """A value that may be absent."""

    def read(reader: Reader) -> T | None:
        tag = reader.take(1)[0]
        if tag > 1:
            raise reader.bad(f"an option tag is {tag}")
        return codec.read(reader) if tag else None

    def write(out: bytearray, value: T | None) -> None:
        out.append(value is not None)
        if value is not None:
            codec.write(out, value)

    return Codec(read, write)


def sequence(codec: Codec[T], limit: Callable[[Limits], int], what: str) -> Codec[tuple[T, ...]]:
    """Several values, each costing more than its bytes, so that their number has a limit of its own."""

    def read(reader: Reader) -> tuple[T, ...]:
        count = _read_u64(reader)
        if count > reader.rest:
            raise reader.bad(f"{count} {what} are announced, {reader.rest} bytes are left")
        if count > limit(reader.limits):
            raise reader.too_large(what, limit(reader.limits))
        return tuple(codec.read(reader) for _ in range(count))

    def write(out: bytearray, values: tuple[T, ...]) -> None:
        _write_u64(out, len(values))
        for value in values:
            codec.write(out, value)

    return Codec(read, write)


def enumeration(members: Sequence[T]) -> Codec[T]:
    """One of several names, stored as its number in this order."""

    def read(reader: Reader) -> T:
        number: int = _U32.unpack(reader.take(_U32.size))[0]
        if number >= len(members):
            raise reader.bad(f"{number} is none of {', '.join(map(str, members))}, counted from 0")
        return members[number]

    def write(out: bytearray, value: T) -> None:
        out += _U32.pack(members.index(value))

    return Codec(read, write)


def record(kind: Callable[..., T], **fields: Codec[Any]) -> Codec[T]:
    """A dataclass whose fields lie in the order given here."""

    def read(reader: Reader) -> T:
        return kind(**{name: codec.read(reader) for name, codec in fields.items()})

    def write(out: bytearray, value: T) -> None:
        for name, codec in fields.items():
            codec.write(out, getattr(value, name))

    return Codec(read, write)
