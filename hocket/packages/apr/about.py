"""What the metadata says about a model, as typed values: its licence, what it was distilled from, its model card.

The values are views of `ModelFacts.metadata`, which `read_metadata` has checked. `section` turns one back into the map
that a file stores. Nothing here is proven by anything but a signature over the file, and the reference enforces none
of it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hocket.packages.apr.metadata import check_card

if TYPE_CHECKING:
    from collections.abc import Mapping

P = TypeVar("P", bound="Part")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A map of the metadata; its declared keys are fields, in the format's order.

    Attributes:
        others: Keys that the format does not declare.
    """

    others: Mapping[str, Any] = field(default_factory=dict)

    def section(self) -> dict[str, Any]:
        """The map that a file stores: declared keys in order, without those that are absent, then the others."""
        section: dict[str, Any] = {}
        for member in fields(self):
            value = getattr(self, member.name)
            absent = member.default if member.default_factory is MISSING else member.default_factory()
            if member.name != "others" and (absent is MISSING or value != absent):
                section[member.name] = _plain(value)
        return section | dict(self.others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence(Part):
    """The metadata's `license`: under what terms a publisher gives a model away.

    Attributes:
        uuid: Of the licence.
        hash: Of its text or key, as its issuer spells it. Nothing compares it.
        expiry: When it ends, ISO 8601 by convention; None: never.
        seats: How many may use the model; None: any number. Shown, never counted.
        licensee: To whom it was given.
        tier: `Personal`, `Team`, `Enterprise` or `Academic`.
    """

    uuid: str
    hash: str
    expiry: str | None = None
    seats: int | None = None
    licensee: str | None = None
    tier: str

    def expired(self, now: datetime) -> bool | None:
        """Whether it has ended; None if that cannot be told, because `expiry` is no ISO 8601 date or time.

        A date alone lasts until the end of that day. Times without a zone are UTC.

        Args:
            now: The time, with its zone.
        """
        if self.expiry is None:
            return False
        try:
            end = _end(self.expiry)
        except ValueError:
            return None
        return end is not None and now >= end


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher(Part):
    """A model that another one learned from.

    Attributes:
        hash: Of the teacher.
        signature: Of the teacher, as its publisher spells it. Nothing verifies it.
        model_type: Its kind, a name of `hocket.packages.apr.header.MODEL_TYPES`.
        param_count: How many parameters it has.
        ensemble_teachers: What it consists of, where it is an ensemble.
    """

    hash: str
    signature: str | None = None
    model_type: str
    param_count: int
    ensemble_teachers: tuple[Teacher, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationParameters(Part):
    """How a student was trained.

    Attributes:
        temperature: That softened the teacher's answers.
        alpha: Weight of the teacher's answers beside the true ones.
        beta: Weight of intermediate layers.
        epochs: Passes over the data.
        final_loss: At the end of training.
    """

    temperature: float
    alpha: float
    beta: float | None = None
    epochs: int
    final_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMapping(Part):
    """Which layer of the student learned from which of the teacher, and how much that counted."""

    student_layer: int
    teacher_layer: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Part):
    """The metadata's `distillation_info`: what a model was distilled from, and how.

    Attributes:
        method: `Standard`, `Progressive` or `Ensemble`.
        teacher: What it learned from.
        params: How.
        layer_mapping: Layer by layer, where that was done.
    """

    method: str
    teacher: Teacher
    params: DistillationParameters
    layer_mapping: tuple[LayerMapping, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData(Part):
    """What a model was trained on.

    Attributes:
        name: Of the data set.
        samples: How many rows.
        hash: Of the data, as the author spells it.
    """

    name: str
    samples: int | None = None
    hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard(Part):
    """The metadata's `model_card`: what its author wants people to know.

    Attributes:
        model_id: Of the model, as the author spells it.
        name: For people.
        version: Of the model.
        author: Who made it.
        created_at: `YYYY-MM-DDTHH:MM:SSZ`.
        framework_version: What trained it, such as `aprender 0.11.0`.
        rust_version: What compiled the framework.
        description: For people.
        license: SPDX name of its terms.
        training_data: What it was trained on.
        hyperparameters: Name to value.
        metrics: Name to value.
        architecture: In words.
        param_count: How many parameters.
        target_hardware: What it is meant to run on, such as `cpu`.
    """

    model_id: str
    name: str
    version: str
    author: str | None = None
    created_at: str
    framework_version: str
    rust_version: str | None = None
    description: str | None = None
    license: str | None = None
    training_data: TrainingData | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    param_count: int | None = None
    target_hardware: tuple[str, ...] = ()


def licence(metadata: Mapping[str, Any]) -> Licence | None:
    """The licence in checked metadata; None if there is none."""
    section = metadata.get("license")
    return None if section is None else _part(Licence, section)


def distillation(metadata: Mapping[str, Any]) -> Distillation | None:
    """What checked metadata says of a model's teachers; None if it says nothing.

    The short form, a teacher's hash alone under `distillation`, is not part of it.
    """
    section = metadata.get("distillation_info")
    if section is None:
        return None
    layers = section.get("layer_mapping")
    return _part(
        Distillation,
        section,
        teacher=_teacher(section["teacher"]),
        params=_part(DistillationParameters, section["params"]),
        layer_mapping=None if layers is None else tuple(_part(LayerMapping, layer) for layer in layers),
    )


def model_card(metadata: Mapping[str, Any]) -> ModelCard | None:
    """The model card in checked metadata; None if there is none."""
    section = metadata.get("model_card")
    return None if section is None else _card(section)


def read_card(section: Mapping[str, Any]) -> ModelCard:
    """A model card from its map, as its author wrote it.

    Raises:
        HocketError: `BAD_METADATA` if a declared key has another type, or one is missing that every card has.
    """
    check_card(section)
    return _card(section)


def _card(section: Mapping[str, Any]) -> ModelCard:
    data = section.get("training_data")
    return _part(
        ModelCard,
        section,
        training_data=None if data is None else _part(TrainingData, data),
        hyperparameters=section.get("hyperparameters") or {},
        metrics=section.get("metrics") or {},
        target_hardware=tuple(section.get("target_hardware") or ()),
    )


def _teacher(section: Mapping[str, Any]) -> Teacher:
    members = section.get("ensemble_teachers")
    return _part(Teacher, section, ensemble_teachers=None if members is None else tuple(map(_teacher, members)))


def _part(kind: type[P], section: Mapping[str, Any], **parts: object) -> P:
    """A part from its map, with `parts` for those fields that are no plain values."""
    declared = {member.name for member in fields(kind)} - {"others"}
    found = {key: section[key] for key in declared & section.keys()} | parts
    return kind(**found, others={key: value for key, value in section.items() if key not in declared})


def _plain(value: Any) -> Any:  # noqa: ANN401 - a JSON value, or parts
    if isinstance(value, Part):
        return value.section()
    return [_plain(member) for member in value] if isinstance(value, tuple) else value


def _end(text: str) -> datetime | None:
    """The first instant after which a date or time has passed; None for the last day there is.

    Raises:
        ValueError: It is neither in ISO 8601.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if day == date.max:
        return None
    return datetime.combine(day + timedelta(days=1), time(), UTC)
