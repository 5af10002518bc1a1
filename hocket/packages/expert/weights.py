"""Tensors out of safetensors bytes.

    0        8         length of the header, little-endian
    8        length    JSON: name -> {dtype, shape, data_offsets}, perhaps padded with spaces
    then     the rest  little-endian row-major data, tiling the file without holes or overlaps

The safetensors library decides about the layout: offsets, sizes, shapes, holes, trailing bytes. What it does not look
at is looked at here, before it sees the file: repeated names, and counts. And one thing afterwards: that every number
is finite, because a single NaN in a shared batch would be everybody's.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, deserialize

from hocket.errors import HocketError, Reason
from hocket.packages import strict_json
from hocket.packages.adapter import RawTensor
from hocket.packages.limits import DEFAULT_LIMITS, Limits

_LENGTH_BYTES: Final = 8
_HEADER_DEPTH: Final = 3
"""The header, an entry, its shape."""
_METADATA: Final = "__metadata__"
_QUOTES_PER_TENSOR: Final = 32
"""Most in the header, on average: 10 spell a tensor, others belong to its metadata. Parsing costs memory for each."""
_CHUNK_VALUES: Final = 2**18
"""Looked at together, so that looking takes little memory."""

_EXPONENTS: Final[dict[str, tuple[str, int]]] = {
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""How to read a value's bits, and its exponent: all ones say infinite, or not a number (IEEE 754)."""


def read_tensors(data: bytes, limits: Limits = DEFAULT_LIMITS, *, what: str = "the weights") -> dict[str, RawTensor]:
    """The tensors of a safetensors file, by name in order.

    Args:
        data: The whole file.
        limits: Bounds on the header and the number of tensors.
        what: Names the file in messages.

    Raises:
        HocketError: `BAD_WEIGHTS` for a file that is malformed, has a name twice, a tensor that is neither F32, F16
            nor BF16, is empty, or holds a number that is not finite; `TOO_LARGE` beyond a limit.
    """
    text = _header(data, limits, what)
    header = _checked(text, limits, what)
    try:
        deserialize(data)  # type: ignore[no-untyped-call]  # compiled, without type information; its copies are let go
    except SafetensorError as error:
        raise _bad(what, f"{error}") from error
    values = memoryview(data).toreadonly()[_LENGTH_BYTES + len(text) :]
    tensors = {}
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        tensor = RawTensor(entry["dtype"], tuple(entry["shape"]), values[begin:end])
        if not tensor.data:
            raise _bad(what, f"tensor {name!r} has no values")
        if not _is_finite(tensor):
            raise _bad(what, f"tensor {name!r} holds a number that is not finite: training has diverged")
        tensors[name] = tensor
    return tensors


def _header(data: bytes, limits: Limits, what: str) -> bytes:
    """The header, of a size that can be parsed."""
    if len(data) < _LENGTH_BYTES:
        raise _bad(what, "they are cut short")
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if header_bytes > len(data) - _LENGTH_BYTES:
        raise _bad(what, f"the header has {header_bytes} bytes, the file only {len(data)}")
    if header_bytes > limits.tensor_header_bytes:
        raise _too_large(what, f"the header has {header_bytes} bytes", limits.tensor_header_bytes)
    text = data[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]
    if (quotes := text.count(b'"')) > limits.tensors * _QUOTES_PER_TENSOR:
        raise _too_large(what, f"the header has {quotes} quotes", limits.tensors * _QUOTES_PER_TENSOR)
    return text


def _checked(text: bytes, limits: Limits, what: str) -> dict[str, Any]:
    """The header's entries by name, once what the library would accept, or work long on, has been refused."""
    try:
        header: Any = strict_json.loads(
            text,
            what="the header",
            bytes_max=limits.tensor_header_bytes,
            depth_max=_HEADER_DEPTH,
        )
    except HocketError as error:
        if error.reason is not Reason.BAD_JSON:
            raise
        raise _bad(what, error.message) from error
    if not isinstance(header, dict):
        raise _bad(what, "the header is not an object")
    header.pop(_METADATA, None)
    if len(header) > limits.tensors:
        raise _too_large(what, f"there are {len(header)} tensors", limits.tensors)
    for name in sorted(header):
        dtype = header[name].get("dtype") if isinstance(header[name], dict) else None
        if not isinstance(dtype, str) or dtype not in _EXPONENTS:
            raise _bad(what, f"tensor {name!r} has dtype {str(dtype)[:20]!r}: store it as F32, F16 or BF16")
    return header


def _is_finite(tensor: RawTensor) -> bool:
    layout, exponent = _EXPONENTS[tensor.dtype]
    bits = np.frombuffer(tensor.data, layout)
    for start in range(0, len(bits), _CHUNK_VALUES):
        if ((bits[start : start + _CHUNK_VALUES] & exponent) == exponent).any():
            return False
    return True


def _bad(what: str, why: str) -> HocketError:
    return HocketError(Reason.BAD_WEIGHTS, f"{what} are not a safetensors file that can be used: {why}")


def _too_large(what: str, found: str, most: int) -> HocketError:
    return HocketError(Reason.TOO_LARGE, f"{what}: {found}, more than the limit of {most}")
