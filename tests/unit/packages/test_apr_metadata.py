from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it comes without type information
import pytest

from hocket.errors import HocketError, Reason
from hocket.packages.apr.metadata import read_metadata, write_metadata
from hocket.packages.limits import DEFAULT_LIMITS

FULL: dict[str, Any] = {
    "created_at": "1764278947",
    "aprender_version": "0.11.0",
    "model_name": "everything",
    "description": "ü" * 40,
    "training": {"samples": 70000, "duration_ms": 2**40, "source": "mnist"},
    "hyperparameters": {"alpha": 0.1, "nested": [None, True, -1, -40000, {"a": 1.5}]},
    "metrics": {"accuracy": 1},
    "custom": {"theirs": {"x": []}},
    "distillation": "abc",
    "distillation_info": {
        "method": "Ensemble",
        "teacher": {
            "hash": "h",
            "model_type": "Knn",
            "param_count": 3,
            "ensemble_teachers": [{"hash": "g", "model_type": "Custom", "param_count": 2**33}],
        },
        "params": {"temperature": 2.5, "alpha": 0.5, "beta": 0.25, "epochs": 2**32 - 1, "final_loss": 1.0},
        "layer_mapping": [{"student_layer": 0, "teacher_layer": 1, "weight": 0.5}],
    },
    "license": {
        "uuid": "u",
        "hash": "h",
        "expiry": "2031-01-31T00:00:00Z",
        "seats": 300,
        "licensee": "l",
        "tier": "Team",
    },
    "model_card": {
        "model_id": "m",
        "name": "n",
        "version": "1",
        "created_at": "2025-11-27T00:00:00Z",
        "framework_version": "aprender 0.11.0",
        "training_data": {"name": "t", "samples": 5},
        "target_hardware": ["cpu"],
        "carbon": {"kg": 0.5},
    },
    "later": "kept",
}


def refusal(data: bytes, **limits: int) -> Reason:
    with pytest.raises(HocketError) as error:
        read_metadata(data, replace(DEFAULT_LIMITS, **limits))
    return error.value.reason


def changed(path: str, value: object) -> bytes:
    """The full metadata with one value replaced, packed without the code under test."""
    copy: dict[str, Any] = msgpack.unpackb(msgpack.packb(FULL))
    inner: Any = copy
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    packed: bytes = msgpack.packb(copy)
    return packed


def test_metadata_is_written_and_read_back_whole_and_in_order() -> None:
    again = read_metadata(write_metadata(FULL))

    assert again == FULL
    assert list(again) == list(FULL)


def test_only_declared_32_bit_floats_are_written_as_such() -> None:
    data = write_metadata(FULL)

    assert data.count(b"\xca") == 5
    assert b"\xa6weight\xca" + struct.pack(">f", 0.5) in data
    assert b"\xa5alpha\xcb" + struct.pack(">d", 0.1) in data
    whole = {"distillation_info": {"params": {"alpha": 1}}}
    assert write_metadata(whole).endswith(b"\xca" + struct.pack(">f", 1))


def test_the_bytes_are_those_of_the_reference() -> None:
    wanted = "82aa637265617465645f6174aa31373634323738393437b0617072656e6465725f76657273696f6ea6302e31312e30"

    assert write_metadata({"created_at": "1764278947", "aprender_version": "0.11.0"}).hex() == wanted


def test_no_key_is_needed_and_null_means_absent() -> None:
    assert read_metadata(b"\x80") == {}
    assert read_metadata(changed("license", None))["license"] is None


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        ("created_at", 5, "5"),
        ("training", ["x"], {}),
        ("training.samples", -1, 0),
        ("training.samples", True, 1),
        ("training.duration_ms", 0.5, 2**64 - 1),
        ("hyperparameters", [], {}),
        ("distillation_info.method", "Quick", "Standard"),
        ("distillation_info.method", [], "Progressive"),
        ("distillation_info.teacher.model_type", "linear", "LinearRegression"),
        ("distillation_info.teacher.ensemble_teachers", {}, []),
        ("distillation_info.params.alpha", "0.5", 1),
        ("distillation_info.params.alpha", True, 0.5),
        ("distillation_info.params.alpha", 1e39, 3e38),
        ("distillation_info.params.epochs", 2**32, 2**32 - 1),
        ("distillation_info.layer_mapping", {}, []),
        ("license.seats", 2**32, 0),
        ("license.tier", "Gold", "Academic"),
        ("model_card.target_hardware", [1], ["gpu"]),
    ],
)
def test_a_declared_field_of_another_type_is_refused(path: str, wrong: object, right: object) -> None:
    assert refusal(changed(path, wrong)) is Reason.BAD_METADATA
    read_metadata(changed(path, right))


def test_a_nested_declaration_holds_at_every_level() -> None:
    deep = {"hash": "h", "ensemble_teachers": [{"ensemble_teachers": [{"hash": 1}]}]}

    assert refusal(changed("distillation_info.teacher", deep)) is Reason.BAD_METADATA


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x81",
        b"\x81\xa1a",
        b"\xc1",
        b"\x90",
        b"\xc0",
        b"\x80\x80",
        b"\x81\x01\x01",
        b"\x81\x90\x01",
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\xa1a\x82\xa1b\x01\xa1b\x01",
        b"\x81\xa1a\xc4\x01x",
        b"\x81\xa1a\xd4\x05x",
        b"\x81\xa1a\xd6\xff\0\0\0\0",
        b"\x81\xa1a\xc7\x01\x05x",
        b"\x81\xa2\xff\xff\x01",
        b"\x81\xa1a\xdb\xff\xff\xff\xff",
        b"\x81\xa1a\xcb" + struct.pack(">d", float("nan")),
        b"\x81\xa1a\xca" + struct.pack(">f", float("inf")),
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=bytes.hex,
)
def test_anything_but_one_well_formed_map_is_refused(data: bytes) -> None:
    assert refusal(data) is Reason.BAD_METADATA


def test_depth_count_and_string_length_are_limited() -> None:
    nested = b"\x81\xa1a\x91\x91\x01"

    read_metadata(nested, replace(DEFAULT_LIMITS, metadata_depth=3, metadata_values=5))
    assert refusal(nested, metadata_depth=2) is Reason.TOO_LARGE
    assert refusal(nested, metadata_values=4) is Reason.TOO_LARGE
    assert refusal(b"\x81\xa2ab\x01", metadata_string_chars=1) is Reason.TOO_LARGE


def test_announced_lengths_cost_nothing() -> None:
    assert refusal(b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 1000) is Reason.TOO_LARGE
    assert refusal(b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x90" * 2**20) is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "metadata",
    [
        {1: 2},
        {"a": b"bytes"},
        {"a": object()},
        {"a": 2**64},
        {"a": float("nan")},
        {"a": "\ud800"},
        {"created_at": 5},
        {"license": {"tier": "Gold"}},
        {"distillation_info": {"params": {"alpha": 1e39}}},
    ],
)
def test_what_could_not_be_read_back_is_not_written(metadata: dict[str, Any]) -> None:
    with pytest.raises(HocketError) as error:
        write_metadata(metadata)

    assert error.value.reason is Reason.BAD_METADATA


def test_metadata_nested_without_end_is_not_written() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless

    with pytest.raises(HocketError) as error:
        write_metadata(endless)

    assert error.value.reason is Reason.BAD_METADATA
