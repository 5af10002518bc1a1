"""Settings that would stop the service are refused where they are written."""

from __future__ import annotations

from typing import Any

import pytest

from services.router.settings import RouterSettings


@pytest.mark.parametrize("wrong", [{"aggregators": ()}, {"in_flight_per_model_max": -1}])
def test_nobody_to_ask_or_a_compartment_of_less_than_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RouterSettings(**wrong)
