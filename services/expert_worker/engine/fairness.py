"""Whose turn it is among tenants: virtual token counters.

Every tenant counts the rows that are computed for it, and whoever has the fewest is next. A tenant that comes begins
with as many as the one that has the fewest of those who are here: nobody saves up turns by staying away. What it has
above that stays counted while it is away, so that nobody begins anew by coming back.

Sheng et al., Fairness in Serving Large Language Models (2024), without the weight on tokens of the answer.
"""

from __future__ import annotations


class TokenCounters:
    """The counters. For one thread."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._present: dict[str, int] = {}
        """How many sequences each tenant has here."""

    def __getitem__(self, tenant: str) -> int:
        """Rows of a tenant that is here."""
        return self._counts[tenant]

    def enter(self, tenant: str) -> None:
        """One more sequence of a tenant is here."""
        if tenant not in self._present:
            self._counts[tenant] = max(self._counts.get(tenant, 0), self._least())
        self._present[tenant] = self._present.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One sequence fewer."""
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            self._forget()

    def charge(self, tenant: str, row_count: int) -> None:
        """So many rows are for a tenant that is here."""
        self._counts[tenant] += row_count

    def _least(self) -> int:
        return min((self._counts[tenant] for tenant in self._present), default=0)

    def _forget(self) -> None:
        """Forget tenants that would not be treated in another way if they came back: all of them, if nobody is here."""
        least = self._least()
        self._counts = {
            tenant: count
            for tenant, count in self._counts.items()
            if tenant in self._present or (self._present and count > least)
        }
