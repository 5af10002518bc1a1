from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from hocket.errors import HocketError, Reason
from hocket.packages import Limits
from hocket.packages.expert.weights import read_tensors


def laid_out(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def reason_of(data: bytes, limits: Limits = Limits()) -> Reason:  # noqa: B008 - frozen
    with pytest.raises(HocketError) as refusal:
        read_tensors(data, limits)
    return refusal.value.reason


def test_tensors_are_read_by_name_in_order() -> None:
    values: dict[str, Any] = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1.5], np.float16)}
    tensors = read_tensors(save(values))

    assert list(tensors) == ["a", "b"]
    assert (tensors["b"].dtype, tensors["b"].shape) == ("F32", (2, 3))
    assert bytes(tensors["b"].data) == values["b"].tobytes()
    assert memoryview(tensors["b"].data).readonly
    assert (tensors["a"].dtype, bytes(tensors["a"].data)) == ("F16", values["a"].tobytes())


def test_bfloat16_is_read() -> None:
    assert read_tensors(laid_out({"x": entry("BF16", (1,), (0, 2))}, b"\x80\x3f"))["x"].dtype == "BF16"


def test_a_header_may_be_padded_and_carry_metadata() -> None:
    padded = json.dumps({"__metadata__": {"format": "pt"}, "x": entry()}).encode() + b"   "
    assert list(read_tensors(laid_out(padded, bytes(4)))) == ["x"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x00",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        laid_out(b"nonsense"),
        laid_out([1]),
        laid_out(b'{"x": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}', bytes(4)),
        laid_out({"x": 5}, bytes(4)),
        laid_out({"x": entry(offsets=(0, 8))}, bytes(4)),
        laid_out({"x": entry(shape=(2,))}, bytes(4)),
        laid_out({"x": entry(shape=(-1,))}, bytes(4)),
        laid_out({"x": entry(shape=(2**40, 2**40))}, bytes(4)),
        laid_out({"x": entry()}, bytes(5)),
        laid_out({"x": entry(offsets=(4, 8))}, bytes(8)),
        laid_out({"x": entry(), "y": entry()}, bytes(4)),
        laid_out({"x": entry(), "y": entry(offsets=(8, 12))}, bytes(12)),
        laid_out({"x": {"dtype": "F32", "shape": [[[1]]], "data_offsets": [0, 4]}}, bytes(4)),
        laid_out({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ],
)
def test_a_damaged_layout_is_refused(data: bytes) -> None:
    assert reason_of(data) in {Reason.BAD_WEIGHTS, Reason.TOO_LARGE}


def test_a_name_that_occurs_twice_is_refused() -> None:
    one = json.dumps(entry())
    header = '{"x": ' + one + ', "%s": ' + json.dumps(entry(offsets=(4, 8))) + "}"
    assert list(read_tensors(laid_out((header % "y").encode(), bytes(8)))) == ["x", "y"]
    assert reason_of(laid_out((header % "x").encode(), bytes(8))) is Reason.BAD_WEIGHTS


@pytest.mark.parametrize(("dtype", "size"), [("F64", 8), ("I8", 1), ("F8_E4M3", 1), ("U32", 4), ("nonsense", 4)])
def test_other_number_types_are_refused(dtype: str, size: int) -> None:
    data = laid_out({"x": entry(dtype, (1,), (0, size))}, bytes(size))
    with pytest.raises(HocketError, match="store it as F32, F16 or BF16") as refusal:
        read_tensors(data)
    assert refusal.value.reason is Reason.BAD_WEIGHTS


def test_a_tensor_without_values_is_refused() -> None:
    assert reason_of(laid_out({"x": entry(shape=(0,), offsets=(0, 0))})) is Reason.BAD_WEIGHTS


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_number_that_is_not_finite_is_refused(number: float, kind: Any) -> None:
    values = np.zeros(300_000, kind)
    values[-2] = np.finfo(kind).max
    assert read_tensors(save({"w": values}))
    values[-1] = number
    with pytest.raises(HocketError, match="'w' holds a number that is not finite"):
        read_tensors(save({"w": values}))


@pytest.mark.parametrize(("bits", "finite"), [(0x7F7F, True), (0x7F80, False), (0xFF80, False), (0x7FC0, False)])
def test_so_is_one_in_bfloat16(bits: int, finite: bool) -> None:  # noqa: FBT001 - a parameter
    data = laid_out({"x": entry("BF16", (1,), (0, 2))}, struct.pack("<H", bits))
    if finite:
        assert read_tensors(data)
    else:
        assert reason_of(data) is Reason.BAD_WEIGHTS


def test_the_number_of_tensors_is_bounded() -> None:
    data = save({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)})
    assert len(read_tensors(data, Limits(tensors=2))) == 2
    assert reason_of(data, Limits(tensors=1)) is Reason.TOO_LARGE


def test_the_header_is_bounded_before_it_is_parsed() -> None:
    data = save({"a": np.zeros(1, np.float32)})
    size = struct.unpack("<Q", data[:8])[0]
    assert read_tensors(data, Limits(tensor_header_bytes=size))
    assert reason_of(data, Limits(tensor_header_bytes=size - 1)) is Reason.TOO_LARGE


def test_a_header_of_many_texts_is_refused_before_it_is_parsed() -> None:
    limits = Limits(tensors=2)
    few = {"__metadata__": {f"k{number}": "" for number in range(10)}, "a": entry()}
    assert read_tensors(laid_out(few, bytes(4)), limits)
    many = {"__metadata__": {f"k{number}": "" for number in range(20)}, "a": entry()}
    assert reason_of(laid_out(many, bytes(4)), limits) is Reason.TOO_LARGE
