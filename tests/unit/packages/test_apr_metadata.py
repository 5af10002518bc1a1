from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it comes without type information
import pytest

from hocket.errors import HocketError, Reason
from hocket.packages.apr.metadata import read_metadata, write_metadata
from hocket.packages.limits import DEFAULT_LIMITS
from tests.builders import FULL

NEEDED = {"created_at": "0", "aprender_version": "0.11.0"}


def refusal(data: bytes, **limits: int) -> Reason:
    with pytest.raises(HocketError) as error:
        read_metadata(data, replace(DEFAULT_LIMITS, **limits))
    return error.value.reason


ABSENT: Any = object()
WITH_A_NUMBER_AS_KEY: dict[Any, Any] = {**NEEDED, 1: 2}


def with_value(path: str, value: object) -> dict[str, Any]:
    """The full metadata with one value replaced, or left out."""
    copy: dict[str, Any] = msgpack.unpackb(msgpack.packb(FULL))
    inner: Any = copy
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return copy


def changed(path: str, value: object) -> bytes:
    """The same, packed without the code under test."""
    packed: bytes = msgpack.packb(with_value(path, value))
    return packed


def beside(value: bytes) -> bytes:
    """What every metadata has, and one more value of these bytes under the key `a`."""
    packed: bytes = msgpack.packb(NEEDED)
    return bytes([packed[0] + 1]) + packed[1:] + b"\xa1a" + value


def test_metadata_is_written_and_read_back_whole_and_in_order() -> None:
    again = read_metadata(write_metadata(FULL))

    assert again == FULL
    assert list(again) == list(FULL)


def test_only_declared_32_bit_floats_are_written_as_such() -> None:
    data = write_metadata(FULL)

    assert data.count(b"\xca") == 5
    assert b"\xa6weight\xca" + struct.pack(">f", 0.5) in data
    assert b"\xa5alpha\xcb" + struct.pack(">d", 0.1) in data
    assert b"\xa5alpha\xca" + struct.pack(">f", 1) in write_metadata(with_value("distillation_info.params.alpha", 1))


def test_the_bytes_are_those_of_the_reference() -> None:
    wanted = "82aa637265617465645f6174aa31373634323738393437b0617072656e6465725f76657273696f6ea6302e31312e30"

    assert write_metadata({"created_at": "1764278947", "aprender_version": "0.11.0"}).hex() == wanted


def test_null_means_absent() -> None:
    assert read_metadata(changed("license", None))["license"] is None
    assert read_metadata(changed("model_card.training_data", None))["model_card"]["training_data"] is None


@pytest.mark.parametrize(
    "path",
    [
        "created_at",
        "aprender_version",
        "distillation_info.method",
        "distillation_info.teacher",
        "distillation_info.teacher.hash",
        "distillation_info.teacher.model_type",
        "distillation_info.teacher.param_count",
        "distillation_info.teacher.ensemble_teachers.0.hash",
        "distillation_info.params",
        "distillation_info.params.temperature",
        "distillation_info.params.alpha",
        "distillation_info.params.epochs",
        "distillation_info.layer_mapping.0.student_layer",
        "distillation_info.layer_mapping.0.teacher_layer",
        "distillation_info.layer_mapping.0.weight",
        "license.uuid",
        "license.hash",
        "license.tier",
        "model_card.model_id",
        "model_card.name",
        "model_card.version",
        "model_card.created_at",
        "model_card.framework_version",
        "model_card.training_data.name",
    ],
)
def test_what_is_always_there_must_be(path: str) -> None:
    assert refusal(changed(path, ABSENT)) is Reason.BAD_METADATA
    assert refusal(changed(path, None)) is Reason.BAD_METADATA


@pytest.mark.parametrize(
    "path",
    [
        "model_name",
        "description",
        "training",
        "training.samples",
        "training.duration_ms",
        "training.source",
        "hyperparameters",
        "metrics",
        "custom",
        "distillation",
        "distillation_info",
        "distillation_info.teacher.ensemble_teachers",
        "distillation_info.params.beta",
        "distillation_info.params.final_loss",
        "distillation_info.layer_mapping",
        "license",
        "license.expiry",
        "license.seats",
        "license.licensee",
        "model_card",
        "model_card.training_data",
        "model_card.training_data.samples",
        "model_card.target_hardware",
        "model_card.carbon",
        "later",
    ],
)
def test_everything_else_may_be_absent(path: str) -> None:
    assert read_metadata(changed(path, ABSENT)) == with_value(path, ABSENT)


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
    teacher = {"hash": "h", "model_type": "Knn", "param_count": 1}

    def deep(innermost: dict[str, Any]) -> bytes:
        ensemble = {**teacher, "ensemble_teachers": [{**teacher, "ensemble_teachers": [innermost]}]}
        return changed("distillation_info.teacher", ensemble)

    read_metadata(deep(teacher))
    assert refusal(deep({**teacher, "hash": 1})) is Reason.BAD_METADATA


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
        b"\x81\xa2\xff\xff\x01",
        b"\x82\xa1a\x01\xa1a\x02",
        beside(b"\x82\xa1b\x01\xa1b\x01"),
        beside(b"\xc4\x01x"),
        beside(b"\xd4\x05x"),
        beside(b"\xd6\xff\0\0\0\0"),
        beside(b"\xc7\x01\x05x"),
        beside(b"\xdb\xff\xff\xff\xff"),
        beside(b"\xcb" + struct.pack(">d", float("nan"))),
        beside(b"\xca" + struct.pack(">f", float("inf"))),
        beside(b"\x01") + b"\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=bytes.hex,
)
def test_anything_but_one_well_formed_map_is_refused(data: bytes) -> None:
    assert refusal(data) is Reason.BAD_METADATA


def test_depth_count_and_string_length_are_limited() -> None:
    nested = beside(b"\x91\x91\x01")

    read_metadata(nested, replace(DEFAULT_LIMITS, metadata_depth=3, metadata_values=9, metadata_string_chars=16))
    assert refusal(nested, metadata_depth=2) is Reason.TOO_LARGE
    assert refusal(nested, metadata_values=8) is Reason.TOO_LARGE
    assert refusal(nested, metadata_string_chars=15) is Reason.TOO_LARGE


def test_announced_lengths_cost_nothing() -> None:
    assert refusal(beside(b"\xdd\xff\xff\xff\xff" * 1000)) is Reason.TOO_LARGE
    assert refusal(beside(b"\xdd\xff\xff\xff\xff" + b"\x90" * 2**20)) is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "metadata",
    [
        WITH_A_NUMBER_AS_KEY,
        {**NEEDED, "a": b"bytes"},
        {**NEEDED, "a": object()},
        {**NEEDED, "a": 2**64},
        {**NEEDED, "a": float("nan")},
        {**NEEDED, "a": "\ud800"},
        {**NEEDED, "created_at": 5},
        {"created_at": "0"},
        with_value("license.tier", "Gold"),
        with_value("distillation_info.params.alpha", 1e39),
    ],
)
def test_what_could_not_be_read_back_is_not_written(metadata: dict[str, Any]) -> None:
    with pytest.raises(HocketError) as error:
        write_metadata(metadata)

    assert error.value.reason is Reason.BAD_METADATA


def test_metadata_nested_without_end_is_not_written() -> None:
    endless: dict[str, Any] = dict(NEEDED)
    endless["a"] = endless

    with pytest.raises(HocketError) as error:
        write_metadata(endless)

    assert error.value.reason is Reason.BAD_METADATA
