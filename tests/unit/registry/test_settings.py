from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.registry.settings import RegistrySettings


def test_the_defaults_stay_on_this_machine_and_want_signatures() -> None:
    settings = RegistrySettings(Path("data"), Path("trust"))

    assert (settings.host, settings.port, settings.allow_unsigned) == ("127.0.0.1", 50052, False)
    assert settings.trust_poll_seconds < 5


@pytest.mark.parametrize(
    "changes",
    [
        {"lease_seconds": 0},
        {"trust_poll_seconds": -1},
        {"upload_idle_seconds": 0},
        {"package_bytes_max": 0},
        {"uploads_max": 0},
        {"workers_max": 0},
        {"in_flight_max": 0},
    ],
)
def test_a_setting_that_would_stop_everything_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        RegistrySettings(Path("data"), Path("trust"), **changes)
