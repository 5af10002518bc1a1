"""The request id, carried across tasks and hops."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from typing import Final

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata key of the request id, in both directions."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request the current task works for; empty outside of one."""

_ACCEPTABLE: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def accept_request_id(sent: str | bytes | None) -> str:
    """The id to use for a call: the one the caller sent, or a fresh one if that is absent or unfit for logs."""
    if isinstance(sent, str) and _ACCEPTABLE.fullmatch(sent):
        return sent
    return uuid.uuid4().hex
