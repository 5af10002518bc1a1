from __future__ import annotations

import struct
from dataclasses import replace

import lz4.block
import pytest
import zstandard

from hocket.errors import HocketError, Reason
from hocket.packages import apr
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import Section
from tests import builders

LINEAR = bytes.fromhex("01 0200000000000000 00000040 000080bf 0000003f 01")  # reference, 17.1


def reason(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Reason | None:
    try:
        apr.decode(apr.split(data, limits), "sha256:", limits)
    except HocketError as refusal:
        return refusal.reason
    return None


def zstd(data: bytes, *, told: bool = False) -> bytes:
    """One frame, which tells its size and checksum or not."""
    return zstandard.ZstdCompressor(write_content_size=told, write_checksum=told).compress(data)


def packed(frame: bytes, size: int = len(LINEAR)) -> bytes:
    return builders.raw_apr(frame, compression_id=1, uncompressed_bytes=size)


def test_a_file_is_taken_apart_into_parts_that_tile_it() -> None:
    data = builders.apr_bytes(compression="none", signing=builders.signer())

    container = apr.split(data)

    assert [section.name for section in container.sections] == [
        "header",
        "metadata",
        "payload",
        "signature",
        "checksum",
    ]
    assert container.sections[0] == Section("header", 0, 32)
    ends = [section.offset + section.size for section in container.sections]
    assert [section.offset for section in container.sections[1:]] == ends[:-1]
    assert ends[-1] == len(data)
    assert bytes(container.signed_bytes) == data[: -96 - 4]
    assert container.signature is not None
    assert container.signature.signature + container.signature.public_key == data[-100:-4]


def test_a_view_is_taken_apart_like_bytes() -> None:
    data = builders.apr_bytes()

    assert apr.split(memoryview(data)).sections == apr.split(data).sections


def test_taking_apart_parses_neither_metadata_nor_payload() -> None:
    container = apr.split(builders.raw_apr(b"no model", b"no map"))

    assert (bytes(container.metadata), bytes(container.payload)) == (b"no map", b"no model")


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"APR1", "APR1"),
        (b"APR2", "APR2"),
        (b"APR\0\x02\0\0\0", "version 2.0 tensor container"),
        (
            b"APR\0\x02\x01" + struct.pack("<HI", 0x2A, 290),
            "version 2.1 tensor container of 290 tensors, zstd, signed, quantized:",
        ),
        (b"APR\0\x07", "unknown version"),
        (b"APR\0\x01\0\0\0\0PST", "route-planning"),
        (b"APBUNDLE", "bundle"),
        (b"GGUF", "GGUF"),
        (struct.pack("<Q", 64) + b'{"a"', "SafeTensors"),
        (b"PK\x03\x04", "504b0304"),
        (b"", "nothing"),
    ],
)
def test_another_format_is_named(start: bytes, named: str) -> None:
    with pytest.raises(HocketError, match=named) as refusal:
        apr.split(start)

    assert refusal.value.reason is Reason.BAD_MAGIC


def test_a_file_that_ends_early_is_refused_at_every_length() -> None:
    data = builders.apr_bytes(signing=builders.signer())

    reasons = {reason(data[:end]) for end in range(1, len(data))}

    assert reasons == {Reason.BAD_LENGTH}
    assert reason(b"") is Reason.BAD_MAGIC
    assert reason(data) is None


def test_a_byte_that_belongs_to_no_part_is_refused() -> None:
    signed = {"flags": 2, "after_payload": bytes(96)}

    assert reason(builders.raw_apr(LINEAR, after_payload=b"\0")) is Reason.BAD_LENGTH
    assert reason(builders.raw_apr(LINEAR, after_payload=bytes(96))) is Reason.BAD_LENGTH
    assert reason(builders.raw_apr(LINEAR, flags=2)) is Reason.BAD_LENGTH
    assert reason(builders.raw_apr(LINEAR, flags=2, after_payload=bytes(97))) is Reason.BAD_LENGTH
    assert reason(builders.raw_apr(LINEAR, **signed)) is None  # type: ignore[arg-type] # named by keywords


def test_a_wrong_checksum_is_refused() -> None:
    data = builders.apr_bytes()

    assert reason(data[:-1] + bytes([data[-1] ^ 1])) is Reason.BAD_CHECKSUM
    assert reason(builders.edited(data, 22, b"\x55" * 10)) is None, "reserved bytes are ignored"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, None),
        ({"version": (1, 9)}, None),
        ({"version": (0, 9)}, Reason.UNSUPPORTED_VERSION),
        ({"version": (2, 0)}, Reason.UNSUPPORTED_VERSION),
        ({"model_type_id": 0x0077}, Reason.UNSUPPORTED_TYPE),
        ({"model_type_id": 0x0007}, Reason.UNSUPPORTED_LAYOUT),
        ({"compression_id": 3}, Reason.BAD_LENGTH),
        ({"compression_id": 4}, Reason.UNSUPPORTED_COMPRESSION),
        ({"compression_id": 255}, Reason.UNSUPPORTED_COMPRESSION),
        ({"flags": 0x01}, Reason.ENCRYPTED),
        ({"flags": 0xFC}, None),
        ({"uncompressed_bytes": len(LINEAR) + 1}, Reason.BAD_LENGTH),
        ({"uncompressed_bytes": 2**30}, Reason.BAD_LENGTH),
        ({"uncompressed_bytes": 2**30 + 1}, Reason.TOO_LARGE),
    ],
)
def test_each_header_field_has_a_reason_of_its_own(change: dict[str, int], wanted: Reason | None) -> None:
    assert reason(builders.raw_apr(LINEAR, **change)) is wanted  # type: ignore[arg-type] # named by keywords


def test_an_encrypted_file_is_refused_as_such_whatever_else_it_holds() -> None:
    assert reason(builders.raw_apr(b"", b"no map", flags=0x01)) is Reason.ENCRYPTED


@pytest.mark.parametrize("part", ["package_bytes", "metadata_bytes", "uncompressed_bytes"])
def test_each_size_has_a_limit(part: str) -> None:
    data = builders.raw_apr(LINEAR)
    container = apr.split(data)
    size = {
        "package_bytes": len(data),
        "metadata_bytes": len(container.metadata),
        "uncompressed_bytes": len(LINEAR),
    }[part]

    assert reason(data, replace(DEFAULT_LIMITS, **{part: size})) is None
    assert reason(data, replace(DEFAULT_LIMITS, **{part: size - 1})) is Reason.TOO_LARGE


def test_a_zstd_payload_is_exactly_one_frame_of_the_declared_size() -> None:
    frame = zstd(LINEAR)

    assert reason(packed(frame)) is None
    assert reason(packed(zstd(LINEAR, told=True))) is None
    assert reason(packed(frame, len(LINEAR) - 1)) is Reason.BAD_LENGTH
    assert reason(packed(frame, len(LINEAR) + 1)) is Reason.BAD_LENGTH
    assert reason(packed(zstd(LINEAR, told=True), 23)) is Reason.BAD_LENGTH
    assert reason(packed(frame + b"\0")) is Reason.BAD_PAYLOAD
    assert reason(packed(frame + zstd(b""))) is Reason.BAD_PAYLOAD
    assert reason(packed(frame + frame, 2 * len(LINEAR))) is Reason.BAD_LENGTH
    assert reason(packed(frame[:-1])) is Reason.BAD_PAYLOAD
    assert reason(packed(LINEAR)) is Reason.BAD_PAYLOAD
    assert reason(packed(b"")) is Reason.BAD_LENGTH
    assert reason(packed(struct.pack("<II", 0x184D2A50, 4) + b"skip" + frame)) is not None


def test_a_zstd_frame_with_a_large_window_is_refused() -> None:
    def framed(window_log: int) -> bytes:
        options = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
        stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
        return packed(stream.compress(LINEAR) + stream.flush())

    assert reason(framed(23)) is None
    assert reason(framed(24)) is Reason.TOO_LARGE


def test_a_size_that_no_frame_of_that_length_can_hold_is_refused_before_memory_is_taken() -> None:
    assert reason(packed(zstd(LINEAR), 2**30)) is Reason.BAD_LENGTH


def test_a_bomb_is_stopped_at_the_declared_size() -> None:
    assert reason(packed(zstd(bytes(2**26)), len(LINEAR))) is Reason.BAD_LENGTH


def lz4_block(data: bytes, told: int | None = None) -> bytes:
    length = len(data) if told is None else told
    return length.to_bytes(4, "little") + bytes(lz4.block.compress(data, store_size=False))


def lz4_packed(block: bytes, size: int = len(LINEAR)) -> bytes:
    return builders.raw_apr(block, compression_id=3, uncompressed_bytes=size)


def test_an_lz4_payload_is_its_length_and_exactly_one_block_of_it() -> None:
    block = lz4_block(LINEAR)

    assert reason(lz4_packed(block)) is None
    assert reason(lz4_packed(block, len(LINEAR) - 1)) is Reason.BAD_LENGTH
    assert reason(lz4_packed(block, len(LINEAR) + 1)) is Reason.BAD_LENGTH
    assert reason(lz4_packed(lz4_block(LINEAR, len(LINEAR) - 1), len(LINEAR) - 1)) is Reason.BAD_PAYLOAD
    assert reason(lz4_packed(lz4_block(LINEAR, len(LINEAR) + 1), len(LINEAR) + 1)) is Reason.BAD_LENGTH
    assert reason(lz4_packed(block + b"\0")) is Reason.BAD_PAYLOAD
    assert reason(lz4_packed(block[:-1])) is Reason.BAD_PAYLOAD
    assert reason(lz4_packed(block[:3])) is Reason.BAD_PAYLOAD
    assert reason(lz4_packed(block[:4])) is Reason.BAD_LENGTH
    assert reason(lz4_packed(b"")) is Reason.BAD_PAYLOAD


def test_a_size_that_no_lz4_block_of_that_length_can_hold_is_refused_before_memory_is_taken() -> None:
    assert reason(lz4_packed((2**30).to_bytes(4, "little") + bytes(100), 2**30)) is Reason.BAD_LENGTH
    squeezed = lz4_block(bytes(2**20))
    assert len(squeezed) * 255 > 2**20, "the bound lets through what LZ4 makes of zeros"


def test_an_lz4_bomb_is_stopped_at_the_declared_size() -> None:
    assert reason(lz4_packed(lz4_block(bytes(2**26), len(LINEAR)))) is Reason.BAD_PAYLOAD


@pytest.mark.parametrize(("compression", "shown"), [("none", "none"), ("zstd-max", "zstd"), ("lz4", "lz4")])
def test_what_was_compressed_any_way_reads_alike(compression: str, shown: str) -> None:
    data = builders.apr_bytes(compression=compression)

    facts, _ = apr.decode(apr.split(data), "sha256:")

    assert facts.compression == shown
