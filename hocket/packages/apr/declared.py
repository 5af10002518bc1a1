"""What the clear metadata of an encrypted package says about the model inside.

Registries and routers have no credentials. They know of an encrypted model what its `custom.hocket` declares: under the
names of `ModelFacts`, everything that routing needs. Whoever decrypts the package compares, so that nobody can declare
one model and ship another.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason
from hocket.packages.apr.facts import label_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.packages.limits import Limits
    from hocket.packages.model import ModelFacts

FIELDS: Final = (
    "expert_count",
    "expert_layout",
    "labels",
    "layout",
    "n_features",
    "n_features_min",
    "output_columns",
    "output_range",
    "parameter_bytes",
)
"""Fields of `ModelFacts` that are declared, and keys of `custom.hocket`."""

_RECORDED: Final = frozenset({"expert_layout", "labels", "layout", "n_features"})
"""Those of the fields that packages in the clear record, too."""
_MARK: Final = "parameter_bytes"
"""What makes metadata declare a model: others of these keys also occur where nothing is encrypted."""
_PARAMETER_BYTES_MAX: Final = 2**53
"""The largest integer that every reader of JSON keeps."""


def declare(metadata: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """Metadata that declares a model, for a package whose payload will be encrypted.

    Args:
        metadata: Kept as it is, in its order, but for `custom.hocket`, whose keys come sorted.
        facts: Of the model, decoded. One that cannot answer is not declared: there is nothing to route to.
    """
    custom = dict(metadata.get("custom") or {})
    recorded = custom.get("hocket") or {}
    if facts.not_servable is None:
        own = {key: value for key, value in recorded.items() if key not in FIELDS}
        own |= {key: _plain(value) for key in FIELDS if (value := getattr(facts, key)) is not None}
    else:
        own = {key: value for key, value in recorded.items() if key != _MARK}
    custom["hocket"] = dict(sorted(own.items()))
    return {**metadata, "custom": custom}


def undeclare(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without what only an encrypted package declares, for one that has been decrypted.

    Labels, layouts and the input width stay: packages in the clear record them, too.

    Args:
        metadata: Kept as it is, in its order, but for `custom.hocket`.
    """
    custom = metadata.get("custom")
    if not isinstance(custom, dict) or not isinstance(own := custom.get("hocket"), dict) or _MARK not in own:
        return dict(metadata)
    kept = {key: value for key, value in own.items() if key not in FIELDS or key in _RECORDED}
    return {**metadata, "custom": {**custom, "hocket": kept}}


def read_declared(own: Mapping[str, Any], limits: Limits) -> dict[str, Any] | None:
    """What metadata declares, by field of `ModelFacts`; None if it declares no model.

    Args:
        own: `custom.hocket`, whose `layout` and `expert_layout` are known to be text or absent.
        limits: Bounds what is declared.

    Raises:
        HocketError: `BAD_METADATA` for declarations that no model could fulfil, `TOO_LARGE` beyond a limit.
    """
    if own.get(_MARK) is None:
        return None
    if own.get("layout") is None:
        raise _bad("layout is missing")
    n_features = None if own.get("n_features") is None else _count(own, "n_features", 1, limits.features)
    recorded = own.get("labels")
    labels = None if recorded is None else label_names(recorded, limits)
    columns = _count(own, "output_columns", 1, limits.labels)
    if labels is not None and len(labels) != columns:
        raise _bad(f"labels names {len(labels)} columns, output_columns says {columns}")
    return {
        "expert_count": _count(own, "expert_count", 1, limits.experts),
        "expert_layout": own.get("expert_layout"),
        "labels": labels,
        "layout": own["layout"],
        "n_features": n_features,
        "n_features_min": _count(own, "n_features_min", 0, n_features or limits.features),
        "output_columns": columns,
        "output_range": _range(own.get("output_range")),
        _MARK: _count(own, _MARK, 0, _PARAMETER_BYTES_MAX),
    }


def check_declared(own: Mapping[str, Any], facts: ModelFacts, limits: Limits) -> None:
    """Return if a decoded model is what its metadata declares, should it declare anything.

    Args:
        own: `custom.hocket`.
        facts: Of the model.
        limits: Bounds what is declared.

    Raises:
        HocketError: `BAD_METADATA` if it is another one, and as `read_declared`.
    """
    for key, value in (read_declared(own, limits) or {}).items():
        if value != (actual := getattr(facts, key)):
            raise HocketError(
                Reason.BAD_METADATA,
                f"custom.hocket.{key} declares {_short(value)}, the model has {_short(actual)}: encrypt it again",
            )


def _plain(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    return list(value) if isinstance(value, tuple) else value


def _count(own: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = own.get(key)
    if type(value) is not int or value < least:
        raise _bad(f"{key} is not an integer of {least} or more")
    if value > most:
        raise HocketError(Reason.TOO_LARGE, f"custom.hocket.{key} is {value}, more than {most}")
    return value


def _range(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, list) and [type(bound) for bound in value] == [float, float]:
        low, high = value
        if math.isfinite(low) and math.isfinite(high) and low <= high:
            return low, high
    raise _bad("output_range is not two finite numbers, the lower one first")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."  # noqa: PLR2004 - a line of a terminal


def _bad(what: str) -> HocketError:
    return HocketError(Reason.BAD_METADATA, f"custom.hocket declares an encrypted model that cannot be: {what}")
