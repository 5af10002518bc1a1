from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from hocket.packages import apr
from hocket.packages.apr import about
from hocket.packages.apr.metadata import read_metadata, write_metadata
from tests import builders
from tests.builders import FULL

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def licence(**terms: Any) -> about.Licence:
    return about.Licence(uuid="u", hash="h", tier="Team", **terms)


def test_each_part_is_a_value_and_becomes_the_same_map_again() -> None:
    metadata = read_metadata(write_metadata(FULL))

    for part, key in (
        (about.licence(metadata), "license"),
        (about.distillation(metadata), "distillation_info"),
        (about.model_card(metadata), "model_card"),
    ):
        assert part is not None
        assert part.section() == FULL[key]
        assert list(part.section()) == list(FULL[key]), "in the order of the file"


def test_what_is_not_there_is_none() -> None:
    empty = builders.METADATA

    assert (about.licence(empty), about.distillation(empty), about.model_card(empty)) == (None, None, None)
    assert about.licence({**empty, "license": None}) is None


def test_unknown_keys_are_kept_wherever_they_are() -> None:
    metadata = {**FULL, "license": {**FULL["license"], "issuer": {"name": "x"}}}
    metadata["distillation_info"] = {**FULL["distillation_info"], "notes": [1]}

    found, origin, card = about.licence(metadata), about.distillation(metadata), about.model_card(metadata)

    assert found is not None
    assert found.others == {"issuer": {"name": "x"}}
    assert found.section() == metadata["license"]
    assert origin is not None
    assert origin.section() == metadata["distillation_info"]
    assert card is not None
    assert card.others == {"carbon": {"kg": 0.5}}


def test_the_parts_have_the_types_that_a_program_wants() -> None:
    origin, card = about.distillation(FULL), about.model_card(FULL)

    assert origin is not None
    assert origin.teacher.ensemble_teachers is not None
    assert origin.teacher.ensemble_teachers[0].param_count == 2**33
    assert origin.params.epochs == 2**32 - 1
    assert origin.layer_mapping == (about.LayerMapping(student_layer=0, teacher_layer=1, weight=0.5),)
    assert card is not None
    assert card.training_data == about.TrainingData(name="t", samples=5)
    assert card.target_hardware == ("cpu",)


def test_a_card_made_here_is_written_as_the_reference_writes_one() -> None:
    card = about.ModelCard(
        model_id="m",
        name="n",
        version="1",
        created_at="2026-06-01T12:00:00Z",
        framework_version="aprender 0.11.0",
        target_hardware=("cpu", "cuda"),
        others={"carbon": 1},
    )

    section = card.section()

    assert list(section) == [
        "model_id",
        "name",
        "version",
        "created_at",
        "framework_version",
        "target_hardware",
        "carbon",
    ]
    assert section["target_hardware"] == ["cpu", "cuda"]
    data = builders.apr_bytes(metadata={**builders.METADATA, "model_card": section})
    assert about.model_card(apr.decode(apr.split(data), "sha256:")[0].metadata) == card


def test_what_is_absent_or_empty_is_left_out_as_the_reference_does() -> None:
    assert "seats" not in licence().section()
    assert licence(seats=0).section()["seats"] == 0
    card = about.model_card({**FULL, "model_card": {**FULL["model_card"], "metrics": {}, "author": None}})
    assert card is not None
    assert not {"metrics", "author"} & card.section().keys()
    origin = about.distillation(FULL)
    assert origin is not None
    assert replace(origin, layer_mapping=()).section()["layer_mapping"] == []


@pytest.mark.parametrize(
    ("expiry", "expired"),
    [
        (None, False),
        ("2031-01-31T00:00:00Z", False),
        ("2026-06-01T12:00:00Z", True),
        ("2026-06-01T12:00:01Z", False),
        ("2026-06-01T11:59:59", True),
        ("2026-06-01T12:30:00", False),
        ("2026-06-01T13:30:00+02:00", True),
        ("2026-06-01T14:30:00+02:00", False),
        ("20260601T115959Z", True),
        ("2026-06-01", False),
        ("2026-05-31", True),
        ("9999-12-31", False),
        ("9999-12-31T23:59:59-23:00", False),
        ("0001-01-01T00:00:00+23:00", True),
        ("never", None),
        ("", None),
        ("1764278947", None),
        ("2031-13-01", None),
    ],
)
def test_a_licence_ends_when_its_expiry_says(expiry: str | None, *, expired: bool | None) -> None:
    assert licence(expiry=expiry).expired(NOW) is expired
