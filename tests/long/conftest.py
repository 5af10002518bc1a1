"""Long proofs are quiet, and none of them may meet a bug."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _no_bugs() -> Iterator[None]:
    """Swallow the services' logs; fail if one of them says `bug`."""
    bugs: list[Any] = []

    def listen(_logger: object, _method: str, event: Any) -> Any:
        if event["event"] == "bug":
            bugs.append(event)
        raise structlog.DropEvent

    structlog.configure(processors=[listen])
    yield
    structlog.reset_defaults()
    assert bugs == []
