"""The request id, carried across tasks and hops."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from typing import Final

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata key of the request id, in both directions."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request the current task works for; empty outside of one."""

_LENGTH_MAX: Final = 128


def accept_request_id(sent: str | bytes | None) -> str:
    """The id to use for a call: the one the caller sent, or a fresh one if that is absent or unfit for logs."""
    if isinstance(sent, str) and 0 < len(sent) <= _LENGTH_MAX and sent.isascii() and sent.isprintable():
        return sent
    return uuid.uuid4().hex
