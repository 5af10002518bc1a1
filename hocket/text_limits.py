"""What a request for text may be, by contract: router, aggregator, workers and commands hold to the same numbers."""

from __future__ import annotations

from typing import Final

TEXT_BYTES_MAX: Final = 2**20
"""Most text of a request, in UTF-8."""
MESSAGES_MAX: Final = 1024
"""Most messages of a conversation."""
ROLES: Final = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation."""
LAST_ROLES: Final = ("user", "tool")
"""Who may speak last in a conversation."""
EXPERTS_MAX: Final = 10
"""Most experts of one text."""
WEIGHT_MAX: Final = 100.0
"""Largest magnitude of an expert's weight."""
REPLICAS_MAX: Final = 3
"""Most workers that a plan lists."""


def is_weight(weight: float) -> bool:
    """Whether an expert may have this weight: a number from `-WEIGHT_MAX` to `WEIGHT_MAX`."""
    return abs(weight) <= WEIGHT_MAX  # NaN is not
