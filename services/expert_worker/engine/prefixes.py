"""Keys and values that are found again: pages that several sequences share, and pages that nobody has any more.

A whole page is named by a key: a hash of everything that its keys and values are a function of, which is its own
tokens, those before them, and the salt: the base as it is served, the experts with the exact bits of their weights, and
the tenant. Whoever begins with the same tokens under the same salt takes such pages as they are, and computes the rest.

A page that has a key is never written to again. It counts who has it; when nobody does it stays where it is, idle,
until its place is needed. Idle pages go in the order in which they were left, and those that were left together go
together, so that what is free is in a row. After them go those that a session has pinned, which are the pages of its
last turn, and in the end those of sequences that had to make way and come back: the last of each first, and no more
than are needed.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.pages import Pages

_KEY_BYTES: Final = 32
"""A key stands for its tokens: nobody may find others that have the same."""
_PINNED_SHARE: Final = 0.5
"""Of all pages, what sessions may have pinned."""


def salt_of(variant: str, mixture: Mixture, tenant: str) -> bytes:
    """What the keys of a sequence begin with.

    Soft prompts need no mention: which there are, and in which order, follows from the experts and their weights.

    Args:
        variant: Of the base, as it is served.
        mixture: The experts, in any order, with their weights.
        tenant: Who asks; nobody finds the pages of another one, nor can tell by the time whether there are any.
    """
    salt = blake2b(digest_size=_KEY_BYTES)
    for text in (variant, tenant, *sorted(f"{expert.digest} {_bits(weight)}" for expert, weight in mixture)):
        encoded = text.encode()
        salt.update(len(encoded).to_bytes(8) + encoded)
    return salt.digest()


def page_key(parent: bytes, row_ids: Sequence[int]) -> bytes:
    """The key of a whole page.

    Args:
        parent: Key of the page before; the salt for the first.
        row_ids: Its tokens; a row of a soft prompt has a negative number, of its place.
    """
    return blake2b(parent + array("q", row_ids).tobytes(), digest_size=_KEY_BYTES).digest()


def _bits(weight: float) -> str:
    return struct.pack(">d", weight).hex()


@dataclass(frozen=True, slots=True)
class _Pin:
    """The pages of a session's last turn, and until when they are pinned."""

    pages: tuple[int, ...]
    end_time: float


class PrefixCache:
    """Hands out pages, and knows by key what is in them. For one thread.

    Args:
        pages: Where they are had. Whoever has the cache takes none elsewhere.
    """

    def __init__(self, pages: Pages) -> None:
        pages.shed = self._shed
        self._pages = pages
        self._found: dict[bytes, int] = {}
        """The page of each key."""
        self._keys: dict[int, bytes] = {}
        """The key of each page that has one."""
        self._users: dict[int, int] = {}
        """How many sequences have a page that has a key."""
        self._idle: dict[int, int] = {}
        """Idle pages that are neither pinned nor awaited: when each was left, the first one first."""
        self._idle_pinned: set[int] = set()
        self._awaited: dict[int, None] = {}
        """Idle pages of sequences that come back, and that are not pinned; in the order in which they go."""
        self._pins: dict[tuple[str, str], _Pin] = {}  # the one that was pinned first, first
        self._pinned: Counter[int] = Counter()
        self._left_count = 0

    @property
    def page_count(self) -> int:
        """Pages that sequences can have."""
        return self._pages.count

    @property
    def used_count(self) -> int:
        """Pages that sequences have, each counted once."""
        return self._pages.count - self._pages.free_count - self.idle_count

    @property
    def idle_count(self) -> int:
        """Pages that nobody has and that may be found again."""
        return len(self._idle) + len(self._idle_pinned) + len(self._awaited)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the first keys that are all there. They are nobody's until `use`."""
        found: list[int] = []
        for key in keys:
            page = self._found.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def used_count_after(self, leaving: Iterable[Sequence[int]], found: Collection[int]) -> int:
        """Pages that sequences would have if those with these block tables let go of theirs, and one had these."""
        counts = Counter(page for table in leaving for page in table)
        freed = {page for page, count in counts.items() if self._users.get(page, 1) == count}
        return self.used_count - len(freed.difference(found)) + sum(page not in self._users for page in found)

    def use(self, pages: Iterable[int]) -> None:
        """Have pages that were found."""
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
            self._idle.pop(page, None)
            self._idle_pinned.discard(page)
            self._awaited.pop(page, None)

    def reach(self, count: int, used_count: int) -> bool:
        """Have the slab let so many pages be used, if all that nobody has by then are forgotten; whether it does.

        Pages that are not free lie where it lets pages be used already: only what is missing beside them is asked for.

        Args:
            count: How many.
            used_count: Pages that sequences have by then.
        """
        return self._pages.reach(count - (self._pages.count - self._pages.free_count - used_count))

    def take(self, count: int, *, after: int = 0, room: int = 0, growing: Collection[range] = ()) -> list[int] | None:
        """As `Pages.take`; idle pages go for it, as many as it takes, and none at all if that would not help."""
        if not self.reach(count, self.used_count):
            return None
        while (taken := self._pages.take(count, after=after, room=room, growing=growing)) is None:
            if not self._forget_some():
                return None
        return taken

    def keep(self, key: bytes, page: int) -> None:
        """Have a page found from now on, which is whole. If there is one with that key already, that one is found."""
        if key not in self._found:
            self._found[key] = page
            self._keys[page] = key
            self._users[page] = 1

    def release(self, pages: Sequence[int], *, awaited: bool = False) -> None:
        """Let go of pages: what has a key stays for whoever finds it, the rest is free.

        Args:
            pages: In the order of their sequence.
            awaited: Whether the sequence comes back.
        """
        free: list[int] = []
        self._left_count += 1
        for page in reversed(pages):
            if page not in self._keys:
                free.append(page)
            elif self._users[page] > 1:
                self._users[page] -= 1
            else:
                del self._users[page]
                self._leave(page, awaited=awaited)
        self._pages.give(free)

    def pin(self, tenant: str, session: str, pages: Sequence[int], end_time: float) -> None:
        """Have a session keep these pages, in place of those it had; of too many the first.

        Sessions that begin alike share pages, so their number is bounded as well: by that of the pages they may have.

        Args:
            tenant: Whose session.
            session: Which.
            pages: As `find` gave them.
            end_time: Until when, on the clock of `expire`; no earlier than those before.
        """
        self._unpin((tenant, session))
        pinned_max = int(_PINNED_SHARE * self._pages.count)
        kept = tuple(pages)[:pinned_max]
        if not kept:
            return
        while len(self._pins) >= pinned_max or (self._pins and len(self._pinned.keys() | kept) > pinned_max):
            self._unpin(next(iter(self._pins)))
        self._pins[tenant, session] = _Pin(kept, end_time)
        self._pinned.update(kept)
        for page in kept:
            if page not in self._users:
                self._idle.pop(page, None)
                self._awaited.pop(page, None)
                self._idle_pinned.add(page)

    def expire(self, now: float) -> None:
        """Let go of the pins that have ended."""
        while self._pins and next(iter(self._pins.values())).end_time <= now:
            self._unpin(next(iter(self._pins)))

    def clear(self) -> None:
        """Forget everything that nobody has."""
        while self._forget_some():
            pass

    def _unpin(self, name: tuple[str, str]) -> None:
        pin = self._pins.pop(name, None)
        self._left_count += 1
        for page in pin.pages if pin is not None else ():
            self._pinned[page] -= 1
            if not self._pinned[page]:
                del self._pinned[page]
                if page in self._idle_pinned:
                    self._idle_pinned.remove(page)
                    self._leave(page, awaited=False)

    def _leave(self, page: int, *, awaited: bool) -> None:
        """Nobody has a page any more."""
        if page in self._pinned:
            self._idle_pinned.add(page)
        elif awaited:
            self._awaited[page] = None
        else:
            self._idle[page] = self._left_count

    def _forget_some(self) -> bool:
        """Free what goes first, or let a session go; False if there is nothing."""
        if self._idle:
            left = next(iter(self._idle.values()))
            together: list[int] = []
            for page, when in self._idle.items():
                if when != left:
                    break
                together.append(page)
            self._forget(together)
        elif self._pins:
            self._unpin(next(iter(self._pins)))
        elif self._awaited:
            self._forget([next(iter(self._awaited))])
        else:
            return False
        return True

    def _shed(self, first: int) -> None:
        """Free idle pages from one on."""
        for name in [name for name, pin in self._pins.items() if max(pin.pages) >= first]:
            self._unpin(name)
        self._forget([page for page in (*self._idle, *self._awaited) if page >= first])

    def _forget(self, pages: list[int]) -> None:
        for page in pages:
            del self._found[self._keys.pop(page)]
            self._idle.pop(page, None)
            self._awaited.pop(page, None)
        self._pages.give(pages)
