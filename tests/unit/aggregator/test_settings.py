"""Settings that would stop the service are refused where they are written."""

from __future__ import annotations

from typing import Any

import pytest

from services.aggregator.settings import AggregatorSettings


@pytest.mark.parametrize(
    "wrong", [{"patience_seconds": 0.0}, {"patience_seconds": -1.0}, {"in_flight_per_expert_max": -1}]
)
def test_a_patience_or_a_compartment_of_less_than_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AggregatorSettings(**wrong)
