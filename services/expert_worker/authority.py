"""Who counts now: the trust folder, the operator's policy, and what was withdrawn since.

A `Standing` is one immutable view of all that; requests and loads decide by the view they hold, and whoever kept a
verdict compares views to see whether it is still current.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.packages import (
    NO_CREDENTIALS,
    Credentials,
    Package,
    Policy,
    Proof,
    Purpose,
    Subject,
    TrustRoots,
    evaluate,
    open_package,
)
from services.expert_worker.revocations import Withdrawn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.trust_folder import TrustFolder

POLL_SECONDS: Final = 2.0
"""How often the trust folder is looked at."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that decides whether a package may serve, apart from its content.

    Args:
        subject: The bytes, as measured here.
        releases: DSSE envelopes about them.
        embedded_key_id: The key whose signature inside the file was verified; None if there is none.
        time: When the package was opened, with its zone: the windows of keys are compared with it from then on.
    """

    subject: Subject
    releases: tuple[bytes, ...]
    embedded_key_id: str | None
    time: datetime


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """What counts at one time. Compared by identity.

    Args:
        roots: Trusted keys.
        policy: What the operator accepts beyond proof.
        withdrawn: What was revoked and yanked.
        credentials: What opens encrypted packages.
    """

    roots: TrustRoots = field(default_factory=TrustRoots)
    policy: Policy = field(default_factory=Policy)
    withdrawn: Withdrawn = field(default_factory=Withdrawn)
    credentials: Credentials = field(default_factory=lambda: NO_CREDENTIALS, repr=False)

    def check(self, digest: str) -> None:
        """Return unless a package is withdrawn whoever signed it.

        Raises:
            HocketError: `YANKED`.
        """
        if digest in self.withdrawn.digests:
            raise HocketError(Reason.YANKED, f"{digest} was withdrawn: use another version", digest=digest)

    def open(self, digest: str, data: bytes | memoryview, releases: Sequence[bytes]) -> tuple[Package, Evidence]:
        """Open a package that may serve now. Hashes, verifies, decrypts and decodes: call it from a thread.

        Raises:
            HocketError: `YANKED`, and the refusals of `hocket.packages.open_package`.
        """
        self.check(digest)
        now = datetime.now(UTC)
        package = open_package(
            data,
            releases=releases,
            trust=self.roots,
            policy=self.policy,
            revoked=self.withdrawn.keys,
            now=now,
            digest=digest,
            credentials=self.credentials,
        )
        subject = Subject(Purpose.PACKAGE, digest, len(data), package.facts.format)
        return package, Evidence(subject, tuple(releases), package.provenance.embedded.key_id, now)

    def judge(self, evidence: Evidence) -> tuple[Proof, ...]:
        """Judge again a package that was opened before, as of then. Verifies signatures: call it from a thread.

        That a key's time runs out withdraws nothing from memory, that it leaves the trust folder or is revoked does.

        Raises:
            HocketError: `YANKED`, and the refusals of `hocket.packages.evaluate`.
        """
        self.check(evidence.subject.digest)
        return evaluate(
            evidence.subject,
            evidence.releases,
            evidence.embedded_key_id,
            trust=self.roots,
            policy=self.policy,
            revoked=self.withdrawn.keys,
            now=evidence.time,
        )


class Authority:
    """Keeps the current standing.

    Args:
        folder: The trust folder.
        policy: What the operator accepts beyond proof.
        credentials: What opens encrypted packages.

    Attributes:
        standing: The current view, replaced whole.
        changed: Set whenever it was replaced; whoever waits for it clears it.
    """

    def __init__(self, folder: TrustFolder, policy: Policy, credentials: Credentials = NO_CREDENTIALS) -> None:
        self._folder = folder
        self.standing = Standing(policy=policy, credentials=credentials)
        self.changed = asyncio.Event()

    def withdraw(self, withdrawn: Withdrawn) -> bool:
        """Let this count no longer. Whether it is news."""
        together = self.standing.withdrawn | withdrawn
        if together == self.standing.withdrawn:
            return False
        self._replace(replace(self.standing, withdrawn=together))
        return True

    async def read_folder(self) -> None:
        """Take the trust folder as it is now."""
        roots = await asyncio.to_thread(self._folder.read)
        self._replace(replace(self.standing, roots=roots))

    async def follow_folder(self) -> None:
        """Take the trust folder again whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if await asyncio.to_thread(self._folder.changed):
                await self.read_folder()

    def _replace(self, standing: Standing) -> None:
        self.standing = standing
        self.changed.set()
