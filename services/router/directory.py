"""The live view of the registry: an immutable snapshot, swapped whole.

Requests read `Directory.snapshot` once and never wait for the registry. A task follows the registry's feed, fetches
mixture bodies, checks each against its digest, and swaps in the next snapshot. While the registry is unreachable
the last snapshot stays.
"""

from __future__ import annotations

import asyncio
import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import MixtureRef, SoftmaxGate, parse_mixture, read_gate
from hocket.telemetry import metrics
from services.router.model import REFUSALS, Body, Model, lone_model, mixture_model
from services.router.placement import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.client.registry import RegistryClient
    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.package_pb2 import Package
    from hocket.v1.registry_pb2 import WatchResponse, WorkerState

_log: Final = structlog.get_logger("router")
_BACKOFF_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
_EPOCH_GRACE_SECONDS: Final = 15.0
"""How long workers known from a registry's former life stay listed until they announce themselves again."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything routing needs, as of one revision.

    Args:
        revision: Registry revision.
        listed: Models by the name they are listed under.
        addresses: Models by everything they answer to: names, releases and digests.
        withdrawn: Why an address whose model still serves may not be used: its own release is withdrawn.
        packages: Packages by digest.
        workers: Live workers.
    """

    revision: int
    listed: Mapping[str, Model]
    addresses: Mapping[str, Model]
    withdrawn: Mapping[str, Reason]
    packages: Mapping[str, Package]
    workers: tuple[Worker, ...]

    def resolve(self, address: str) -> Model:
        """The model behind a mixture name, `publisher/name@version`, a digest or `digest#ordinal`.

        Raises:
            HocketError: `UNKNOWN_MODEL`, or the reason for which this address is withdrawn.
        """
        if reason := self.withdrawn.get(address):
            raise HocketError(reason, f"the release {address} is withdrawn ({reason})", model=address)
        model = self.addresses.get(address)
        if model is None and "#" in address:
            model = self._member(ExpertId.parse(address))
        if model is None:
            close = difflib.get_close_matches(address, self.listed, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "`hocket mixtures list` shows what there is"
            raise HocketError(
                Reason.UNKNOWN_MODEL,
                f"there is no model {address[:200]!r}; {advice}",
                field="model",
                model=address[:200],
            )
        return model

    def _member(self, expert: ExpertId) -> Model | None:
        package = self.packages.get(expert.digest)
        if package is None or expert.ordinal >= package.model.expert_count:
            return None
        return lone_model(package, expert.ordinal, str(expert))


class Directory:
    """Follows one registry's feed.

    Args:
        registry: The registry.
    """

    def __init__(self, registry: RegistryClient) -> None:
        self._registry = registry
        self._packages: dict[str, Package] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._bodies: dict[str, Body] = {}
        self._states: dict[str, int] = {}
        self._workers: dict[str, WorkerState] = {}
        self._unconfirmed: set[str] = set()
        self._revision = 0
        self._epoch = ""
        self._snapshot: Snapshot | None = None
        self._changed = asyncio.Event()

    @property
    def snapshot(self) -> Snapshot:
        """The current snapshot.

        Raises:
            HocketError: `NOT_READY` until the feed has been read once.
        """
        if self._snapshot is None:
            raise HocketError(
                Reason.NOT_READY, "this router has not heard from its registry yet", retry_after_seconds=0.5
            )
        return self._snapshot

    async def wait_for_worker(self) -> None:
        """Return when the feed has been read once and a worker is known."""
        while self._snapshot is None or not self._snapshot.workers:
            self._changed.clear()
            await self._changed.wait()

    async def follow(self) -> None:
        """Follow the feed for ever, reconnecting with growing pauses."""
        failures = 0
        while True:
            try:
                async for event in self._registry.watch(self._revision):
                    await self._apply(event)
                    failures = 0
            except HocketError as error:
                if error.reason is Reason.REVISION_UNKNOWN:  # the registry was restored from a backup: begin anew
                    self._packages.clear()
                    self._mixtures.clear()
                    self._revision = 0
                _log.warning("registry feed broke", reason=error.reason, message=error.message)
            await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
            failures += 1

    async def _apply(self, event: WatchResponse) -> None:
        if event.epoch != self._epoch:
            self._epoch = event.epoch
            self._unconfirmed = set(self._workers)
            asyncio.get_running_loop().call_later(_EPOCH_GRACE_SECONDS, self._drop_unconfirmed, event.epoch)
        match event.WhichOneof("event"):
            case "package":
                self._packages[event.package.digest] = event.package
            case "mixture":
                await self._apply_mixture(event.mixture)
            case "worker":
                self._workers[event.worker.worker] = event.worker
                self._unconfirmed.discard(event.worker.worker)
            case "worker_gone":
                self._workers.pop(event.worker_gone, None)
            case "synced":
                self._revision = event.revision
                self._swap(models=True)
                return
            case _:  # revocations reach the router as the states of what they withdraw
                pass
        if self._snapshot is not None:
            self._revision = event.revision
            self._swap(models=event.WhichOneof("event") in {"package", "mixture"})

    async def _apply_mixture(self, mixture: Mixture) -> None:
        if mixture.deleted:
            self._mixtures.pop(mixture.name, None)
            return
        self._states[mixture.digest] = mixture.state
        try:
            await self._fetch(mixture.digest)
        except HocketError as error:
            _log.error("mixture not usable", mixture=mixture.name, reason=error.reason, message=error.message)
            return
        self._mixtures[mixture.name] = mixture

    async def _fetch(self, digest: str) -> None:
        """Fetch a body unless it is here, check it against its digest, and look at what it nests.

        A nested body may have lost its name; only the outer mixture's new revision then tells that its state changed.
        """
        if digest not in self._bodies:
            fetched = await self._registry.fetch_mixture(digest)
            if digest_of(fetched.body) != digest:
                raise HocketError(Reason.DIGEST_MISMATCH, "the registry sent another mixture than it announced")
            record = parse_mixture(fetched.body)
            weights = read_gate(record.gate, fetched.gate) if isinstance(record.gate, SoftmaxGate) else None
            self._bodies[digest] = Body(record, weights)
        for member in self._bodies[digest].record.members:
            if isinstance(member, MixtureRef):
                self._states[member.digest] = (await self._registry.fetch_mixture(member.digest)).mixture.state
                await self._fetch(member.digest)

    def _drop_unconfirmed(self, epoch: str) -> None:
        """Forget the workers that have not announced themselves to the registry's new life."""
        if epoch != self._epoch or not self._unconfirmed:
            return
        for worker in self._unconfirmed:
            self._workers.pop(worker, None)
        self._unconfirmed.clear()
        if self._snapshot is not None:
            self._swap(models=False)

    def _swap(self, *, models: bool) -> None:
        workers = tuple(
            Worker(
                name=state.worker,
                address=state.address,
                formats=frozenset(state.formats),
                budget_bytes=state.budget_bytes,
                resident=frozenset(held.digest for held in state.residency),
                draining=state.draining,
            )
            for state in self._workers.values()
        )
        if self._snapshot is None or models:
            listed, addresses, withdrawn = self._index()
            self._snapshot = Snapshot(self._revision, listed, addresses, withdrawn, dict(self._packages), workers)
        else:
            self._snapshot = replace(self._snapshot, revision=self._revision, workers=workers)
        metrics.SNAPSHOT_REVISION.labels("router").set(self._revision)
        self._changed.set()

    def _forget_bodies(self) -> None:
        """Keep the bodies that a mixture still leads to."""
        needed = {mixture.digest for mixture in self._mixtures.values()}
        for digest in tuple(needed):
            members = self._bodies[digest].record.members
            needed.update(member.digest for member in members if isinstance(member, MixtureRef))
        self._bodies = {digest: body for digest, body in self._bodies.items() if digest in needed}
        self._states = {digest: state for digest, state in self._states.items() if digest in needed}

    def _index(self) -> tuple[dict[str, Model], dict[str, Model], dict[str, Reason]]:
        """Every model by its listed name and by all its addresses."""
        self._forget_bodies()
        listed: dict[str, Model] = {}
        addresses: dict[str, Model] = {}
        withdrawn: dict[str, Reason] = {}
        of_package: dict[str, Model] = {}
        for mixture in self._mixtures.values():
            try:
                model = mixture_model(mixture, self._bodies, self._states, self._packages)
            except KeyError as missing:
                _log.warning("mixture lacks a part", mixture=mixture.name, missing=str(missing))
                continue
            listed[mixture.name] = addresses[mixture.name] = addresses[mixture.digest] = model
            if mixture.package_digest:
                of_package[mixture.package_digest] = model
        for digest, package in self._packages.items():
            if digest in of_package:
                model = of_package[digest]
            elif package.model.expert_count > 1:
                continue  # its own mixture follows in the feed
            else:
                name = _release_names(package)[0][0] if package.releases else digest
                model = listed[name] = lone_model(package, 0, name)
            addresses[digest] = model
            for name, state in _release_names(package):
                addresses[name] = model
                if state in REFUSALS and model.state not in REFUSALS:
                    withdrawn[name] = REFUSALS[state]
        return listed, addresses, withdrawn


def _release_names(package: Package) -> list[tuple[str, int]]:
    return [(f"{r.publisher}/{r.name}@{r.version}", r.state) for r in package.releases]
