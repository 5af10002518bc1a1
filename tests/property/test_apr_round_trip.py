"""Any model is written and read back unchanged, and no bytes bring anything out of the reader but a refusal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError
from hocket.packages import apr
from hocket.packages import model as m
from hocket.packages.apr.metadata import read_metadata, write_metadata
from hocket.packages.apr.quantization import quantized_model
from tests import builders
from tests.apr_strategies import MODELS


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_model_survives_writing_and_reading(family: str, data: Any) -> None:
    model = data.draw(MODELS[family])
    compression = data.draw(st.sampled_from(["none", "zstd"]))

    again = apr.decode(apr.split(builders.apr_bytes(model, compression=compression)), "sha256:")[1]

    assert builders.same(again, model)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_free_metadata_survives_writing_and_reading(custom: dict[str, Any]) -> None:
    metadata = {**builders.METADATA, "custom": custom}

    assert read_metadata(write_metadata(metadata)) == metadata


def read(data: bytes) -> None:
    """Read a file to the end. Anything but a refusal fails the test."""
    try:
        facts, model = apr.decode(apr.split(data), "sha256:")
    except HocketError:
        return
    name = type(model).__name__
    assert facts.layout in {name, f"{name}Block", f"Quantized<{name}>"}


SMALL = {
    "linear": builders.linear(),
    "tree": m.DecisionTreeClassifier(builders.grow((1, 0.5, (0, 3), (2, 4))), max_depth=3),
    "mixture": builders.mixture(),
    "quantised": quantized_model(builders.linear(), m.QuantKind.Q8_0),
}
RECORDS = {"quantised": {"custom": {"hocket": {"layout": "Quantized<LinearRegression>"}}}}


@pytest.mark.parametrize("layout", SMALL)
def test_every_flipped_bit_under_a_right_checksum_is_refused_or_decoded(layout: str) -> None:
    metadata = {**builders.METADATA, **RECORDS.get(layout, {})}
    data = builders.apr_bytes(SMALL[layout], metadata=metadata, compression="none")

    for bit in range(8 * (len(data) - 4)):
        byte = bit // 8
        read(builders.edited(data, byte, bytes([data[byte] ^ 1 << bit % 8])))


@pytest.mark.parametrize("layout", SMALL)
def test_every_flipped_bit_under_the_old_checksum_is_refused(layout: str) -> None:
    data = builders.apr_bytes(SMALL[layout], metadata={**builders.METADATA, **RECORDS.get(layout, {})})

    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(HocketError):
            apr.split(bytes(flipped))


@settings(max_examples=200, deadline=None)
@given(payload=st.binary(max_size=200), model_type_id=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 9, 10, 0x21, 0x40]))
def test_any_payload_is_refused_or_decoded(payload: bytes, model_type_id: int) -> None:
    read(builders.raw_apr(payload, model_type_id=model_type_id))


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=60))
def test_any_compressed_payload_is_refused_or_decoded(payload: bytes) -> None:
    magic = bytes.fromhex("28b52ffd")
    read(builders.raw_apr(magic + payload, compression_id=1, uncompressed_bytes=22))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_metadata_is_refused_or_decoded(metadata: bytes) -> None:
    read(builders.raw_apr(bytes.fromhex("01 0100000000000000 00000040 0000003f 01"), b"\x81\xa1a" + metadata))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=160))
def test_any_bytes_are_refused_or_taken_apart(data: bytes) -> None:
    read(data)
    read(b"APRN\1\0" + data)
