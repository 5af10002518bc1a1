"""Settings that would stop the service are refused where they are written."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.router.settings import RouterSettings


@pytest.mark.parametrize(
    ("name", "wrong", "fits"),
    [
        ("aggregators", (), ("a:1",)),
        ("in_flight_max", 0, 1),
        ("in_flight_per_model_max", -1, 0),
        ("default_deadline_seconds", 0.0, 0.1),
        ("generate_deadline_seconds", 0.0, 0.1),
        ("patience_seconds", 0.0, 0.1),
        ("patience_seconds", math.nan, 0.1),
        ("patience_seconds", math.inf, 3600.0),
        ("drain_notice_seconds", -0.1, 0.0),
        ("drain_grace_seconds", -0.1, 0.0),
    ],
)
def test_what_would_stop_the_router_is_refused(name: str, wrong: Any, fits: Any) -> None:
    with pytest.raises(ValueError, match=name):
        RouterSettings(**{name: wrong})
    assert getattr(RouterSettings(**{name: fits}), name) == fits


@pytest.mark.parametrize(
    ("in_flight_max", "per_model_max", "compartment"), [(256, 0, 192), (1, 0, 1), (2, 0, 2), (256, 3, 3), (16, 300, 16)]
)
def test_the_compartment_of_a_model_is_part_of_the_router(
    in_flight_max: int, per_model_max: int, compartment: int
) -> None:
    settings = RouterSettings(in_flight_max=in_flight_max, in_flight_per_model_max=per_model_max)
    assert settings.compartment == compartment
