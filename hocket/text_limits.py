"""What a request for text may be, by contract: router, aggregator, workers and commands hold to the same numbers."""

from __future__ import annotations

from typing import Final

from hocket.errors import HocketError, Reason

TEXT_BYTES_MAX: Final = 2**20
"""Most text of a request, in UTF-8."""
MESSAGES_MAX: Final = 1024
"""Most messages of a conversation."""
ROLES: Final = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation."""
LAST_ROLES: Final = ("user", "tool")
"""Who may speak last in a conversation."""
CONSTRAINT_BYTES_MAX: Final = 2**16
"""Largest JSON schema or grammar that an answer follows."""
EXPERTS_MAX: Final = 10
"""Most experts of one text."""
WEIGHT_MAX: Final = 100.0
"""Largest magnitude of an expert's weight."""
SESSION_CHARS_MAX: Final = 128
"""Longest name of a session."""
TENANT_CHARS_MAX: Final = 64
"""Longest name of a tenant."""
PRIORITY_MAX: Final = 9
"""The most urgent."""
PRIORITY_DEFAULT: Final = 5
"""How urgent a request is that does not say."""
REPLICAS_MAX: Final = 3
"""Most workers that a plan lists."""


def is_weight(weight: float) -> bool:
    """Whether an expert may have this weight: a number from `-WEIGHT_MAX` to `WEIGHT_MAX`."""
    return abs(weight) <= WEIGHT_MAX  # NaN is not


def check_queueing(session: str, tenant: str, priority: int) -> None:
    """Return if a request may be such a turn, of such a tenant, and so urgent.

    Raises:
        HocketError: `BAD_REQUEST`.
    """
    for field, text, chars_max in (("session", session, SESSION_CHARS_MAX), ("tenant", tenant, TENANT_CHARS_MAX)):
        if len(text) > chars_max:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{field} has {len(text)} characters: give it at most {chars_max}, a hash of it for example",
                field=field,
            )
    if not 0 <= priority <= PRIORITY_MAX:
        raise HocketError(
            Reason.BAD_REQUEST, f"priority is {priority}: give a number from 0 to {PRIORITY_MAX}", field="priority"
        )
