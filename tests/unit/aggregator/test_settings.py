"""Settings that would stop the service are refused where they are written."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.aggregator.settings import AggregatorSettings


@pytest.mark.parametrize(
    ("name", "wrong", "fits"),
    [
        ("in_flight_max", 0, 1),
        ("in_flight_per_expert_max", -1, 0),
        ("default_deadline_seconds", 0.0, 0.1),
        ("patience_seconds", 0.0, 0.1),
        ("patience_seconds", math.nan, 0.1),
        ("patience_seconds", math.inf, 3600.0),
        ("drain_notice_seconds", -0.1, 0.0),
        ("drain_grace_seconds", -0.1, 0.0),
    ],
)
def test_what_would_stop_the_aggregator_is_refused(name: str, wrong: Any, fits: Any) -> None:
    with pytest.raises(ValueError, match=name):
        AggregatorSettings(**{name: wrong})
    assert getattr(AggregatorSettings(**{name: fits}), name) == fits
