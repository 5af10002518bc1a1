"""The registry's feed, as far as it concerns a worker: what was withdrawn, and what has a new release."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError, Reason
from hocket.v1.package_pb2 import TRUST_STATE_YANKED
from services.expert_worker.revocations import Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from hocket.client.registry import RegistryClient
    from hocket.v1.registry_pb2 import WatchResponse
    from services.expert_worker.authority import Authority
    from services.expert_worker.revocations import RevocationFile

_log: Final = structlog.get_logger("worker")


class Feed:
    """Follows one registry and tells the authority what was withdrawn, on disk too.

    Args:
        registry: Whose feed.
        authority: Who has to know.
        file: Where it is kept.
        on_package: Told the digest of every package that has changed and is not withdrawn.
    """

    def __init__(
        self,
        registry: RegistryClient,
        authority: Authority,
        file: RevocationFile,
        on_package: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._authority = authority
        self._file = file
        self._on_package = on_package
        self._revision = 0
        self._epoch = ""
        self._saved = authority.standing.withdrawn

    async def follow(self) -> None:
        """Follow the feed until it breaks; called again, go on from there.

        Raises:
            HocketError: Why it broke.
        """
        synced = False
        try:
            async with aclosing(self._registry.watch(self._revision)) as events:
                async for event in events:
                    if event.epoch != self._epoch:
                        self._epoch, behind = event.epoch, self._revision
                        if behind:  # another life of the registry may have another history: hear everything again
                            self._revision = 0
                            return
                    self._apply(event)
                    synced = synced or event.WhichOneof("event") == "synced"
                    if synced:  # and not for each line of the opening state
                        self._revision = event.revision
                        await self._save()
        except HocketError as error:
            if error.reason is Reason.REVISION_UNKNOWN:
                self._revision = 0
            raise

    def _apply(self, event: WatchResponse) -> None:
        match event.WhichOneof("event"):
            case "package" if event.package.state == TRUST_STATE_YANKED:
                self._authority.withdraw(Withdrawn(digests=frozenset({event.package.digest})))
            case "package":
                self._on_package(event.package.digest)
            case "revocation":
                self._authority.withdraw(Withdrawn(keys=frozenset({event.revocation.key_id})))
            case _:  # mixtures and workers are the router's business
                pass

    async def _save(self) -> None:
        withdrawn = self._authority.standing.withdrawn
        if withdrawn != self._saved:
            try:
                await asyncio.to_thread(self._file.write, withdrawn)
                self._saved = withdrawn
            except OSError as error:
                _log.error("revocations not kept: a restart would rely on the registry", error=str(error))
