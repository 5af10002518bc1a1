"""What `inspect` shows of the metadata of an `.apr` file: licence, model card, origin, and whatever else is there.

All of it is what the file says about itself. Texts are cut, since a file may say a lot.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hocket.cli import output
from hocket.packages.apr import about

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hocket.packages.apr.about import Distillation, Licence, ModelCard, Teacher

_Pairs: TypeAlias = "list[tuple[str, object]]"

_CHARS_SHOWN: Final = 300
_ENTRIES_SHOWN: Final = 12
_TEACHERS_SHOWN: Final = 8
_UNIX_DIGITS: Final = 12
"""Decimal Unix seconds have no more, for many thousand years."""
_DECLARED: Final = frozenset(
    {
        "created_at",
        "aprender_version",
        "model_name",
        "description",
        "training",
        "hyperparameters",
        "metrics",
        "custom",
        "distillation",
        "distillation_info",
        "license",
        "model_card",
    }
)


def licence_document(metadata: Mapping[str, Any], now: datetime) -> dict[str, Any] | None:
    """The licence as JSON-able values, and whether it has ended: null where its end is no date or time."""
    licence = about.licence(metadata)
    return None if licence is None else {**licence.section(), "expired": licence.expired(now)}


def print_about(metadata: Mapping[str, Any], now: datetime) -> None:
    """Print a card for each part of the metadata that is there.

    Args:
        metadata: As checked.
        now: What the licence's end is compared with.
    """
    licence, card, origin = about.licence(metadata), about.model_card(metadata), about.distillation(metadata)
    custom = {key: value for key, value in (metadata.get("custom") or {}).items() if key != "hocket"}
    unknown = {key: value for key, value in metadata.items() if key not in _DECLARED}
    for title, pairs in (
        ("Licence", _licence(licence, now) if licence else []),
        ("Model card", _card(card) if card else []),
        ("Distilled", _distilled(metadata, origin)),
        ("Training", _training(metadata)),
        ("Also in the metadata", _entries({"custom": custom or None, **unknown})),
    ):
        if any(value is not None for _, value in pairs):
            output.say("")
            output.card(title, pairs)


def _licence(licence: Licence, now: datetime) -> _Pairs:
    ended = licence.expired(now)
    if licence.expiry is None:
        end = "never"
    else:
        told = {True: "HAS ENDED", False: "holds now", None: "CANNOT BE READ as a date"}[ended]
        end = f"{_text(licence.expiry)} ({told})"
    return [
        ("tier", licence.tier),
        ("for", _text(licence.licensee)),
        ("ends", end),
        ("seats", "any number" if licence.seats is None else f"{licence.seats} (shown, never counted)"),
        ("id", _text(licence.uuid)),
        ("hash", _text(licence.hash)),
        *_entries(licence.others),
    ]


def _card(card: ModelCard) -> _Pairs:
    data = card.training_data
    return [
        ("model", f"{_text(card.name)} {_text(card.version)} ({_text(card.model_id)})"),
        ("author", _text(card.author)),
        ("licence", _text(card.license)),
        ("made", _text(card.created_at)),
        ("framework", " ".join(filter(None, (_text(card.framework_version), _text(card.rust_version))))),
        ("architecture", _text(card.architecture)),
        ("parameters", None if card.param_count is None else f"{card.param_count:,}"),
        ("runs on", _listed(card.target_hardware)),
        ("trained on", None if data is None else _joined([data.name, _count(data.samples, "rows"), data.hash])),
        ("settings", _map(card.hyperparameters)),
        ("metrics", _map(card.metrics)),
        ("description", _text(card.description)),
        *_entries(card.others),
    ]


def _distilled(metadata: Mapping[str, Any], origin: Distillation | None) -> _Pairs:
    pairs: _Pairs = [("from", _text(metadata.get("distillation")))]
    if origin is None:
        return pairs
    how = origin.params
    layers = origin.layer_mapping
    return [
        *pairs,
        ("method", origin.method),
        ("teacher", _teacher(origin.teacher)),
        *[("  member", _teacher(member)) for member in (origin.teacher.ensemble_teachers or ())[:_TEACHERS_SHOWN]],
        (
            "training",
            _map(
                {
                    "temperature": how.temperature,
                    "alpha": how.alpha,
                    "beta": how.beta,
                    "epochs": how.epochs,
                    "final_loss": how.final_loss,
                    **how.others,
                }
            ),
        ),
        ("layers", None if layers is None else f"{len(layers)} mapped"),
        *_entries(origin.others),
    ]


def _teacher(teacher: Teacher) -> str:
    members = teacher.ensemble_teachers
    return _joined(
        [
            f"{teacher.model_type} {teacher.hash}",
            f"{teacher.param_count:,} parameters",
            None if members is None else f"an ensemble of {len(members)}",
            None if teacher.signature is None else f"signature {teacher.signature} (verified by nobody)",
        ]
    )


def _training(metadata: Mapping[str, Any]) -> _Pairs:
    training = metadata.get("training") or {}
    known = {"samples", "duration_ms", "source"}
    duration = training.get("duration_ms")
    return [
        ("written", _written(metadata)),
        ("data", _text(training.get("source"))),
        ("rows", _count(training.get("samples"))),
        ("took", None if duration is None else f"{duration / 1000:g} s"),
        ("settings", _map(metadata.get("hyperparameters") or {})),
        ("metrics", _map(metadata.get("metrics") or {})),
        *_entries({key: value for key, value in training.items() if key not in known}),
    ]


def _written(metadata: Mapping[str, Any]) -> str:
    """When, and by which library; decimal Unix seconds as a date."""
    time = str(metadata["created_at"])
    if time.isascii() and time.isdecimal() and len(time) < _UNIX_DIGITS:
        time = datetime.fromtimestamp(int(time), UTC).isoformat(sep=" ", timespec="seconds")
    return f"{_text(time)}, in the form of aprender {_text(metadata['aprender_version'])}"


def _entries(values: Mapping[str, Any]) -> _Pairs:
    """Keys that nobody declared, as they are; the first few of them."""
    shown: _Pairs = [(_text(key) or "", _text(value)) for key, value in list(values.items())[:_ENTRIES_SHOWN]]
    more = len(values) - _ENTRIES_SHOWN
    return [*shown, ("...", f"and {more} more")] if more > 0 else shown


def _map(values: Mapping[str, Any]) -> str | None:
    return _listed(f"{key} {_text(value)}" for key, value in values.items() if value is not None)


def _listed(texts: Iterable[str]) -> str | None:
    every = list(texts)
    more = f" and {len(every) - _ENTRIES_SHOWN} more" if len(every) > _ENTRIES_SHOWN else ""
    return _text(", ".join(every[:_ENTRIES_SHOWN]) + more) if every else None


def _joined(texts: Iterable[str | None]) -> str:
    return _text(", ".join(text for text in texts if text)) or ""


def _count(number: int | None, what: str = "") -> str | None:
    return None if number is None else f"{number:,} {what}".strip()


def _text(value: Any) -> str | None:  # noqa: ANN401 - a JSON value
    """A value on one line, cut where it is long; None stays None."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _CHARS_SHOWN else f"{text[:_CHARS_SHOWN]} ... ({len(text)} characters)"
