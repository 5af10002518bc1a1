"""The live view of the registry: an immutable snapshot, swapped whole.

Requests read `Directory.snapshot` once and never wait for the registry. A task follows the registry's feed, fetches
mixture bodies, checks each against its digest, and swaps in the next snapshot when a view is complete. While the
registry is unreachable the last snapshot stays; a copy on disk outlives the process.
"""

from __future__ import annotations

import asyncio
import difflib
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of, is_digest
from hocket.mixtures import MixtureRef, SoftmaxGate, parse_mixture, read_gate
from hocket.rpc.channel import LOCAL
from hocket.telemetry import metrics
from hocket.v1.registry_pb2 import Synced, WatchResponse
from services.router.bases import RecentBases, announced
from services.router.experts import Experts, index
from services.router.gating import fixed_gate, softmax_gate
from services.router.model import REFUSALS, Body, Model, listed_name, lone_model, mixture_model, release_name
from services.router.placement import Base, Worker
from services.router.rules import RulesGate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

    from hocket.client.registry import FetchedMixture, RegistryClient
    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.package_pb2 import Package
    from hocket.v1.registry_pb2 import WorkerState
    from services.router.kept import Kept

Fetch: TypeAlias = "Callable[[str], Awaitable[FetchedMixture]]"
"""Where a mixture's body comes from: the registry, or the copy on disk."""

_log: Final = structlog.get_logger("router")
_BACKOFF_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
_EPOCH_GRACE_SECONDS: Final = 15.0
"""How long workers known from a registry's former life stay listed, while its feed is heard, until they announce
themselves again."""
_REGISTRY_SECONDS: Final = 3.0
"""How long a router that starts waits for its registry before what it knew earlier counts."""
_SWAP_SECONDS: Final = 0.01
"""How long changes are gathered before the next snapshot: a revoked key may change thousands of packages."""
_MEND_SECONDS: Final = 1.0
"""Pause between attempts to fetch what a mixture lacks."""
_KEEP_SECONDS: Final = 1.0
"""Least time between two copies on disk."""
_ADDRESS_LENGTH_MAX: Final = 256
_SUGGESTED_MAX: Final = 3
_SUGGESTED_FROM: Final = 100
"""Names compared with an unknown one, at most: a typing error deserves help, a hostile request no work."""


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
        experts: Adapter experts. They answer text, so none of them is a model.
        gone_bases: Bases that workers served a while ago and none does now, each with the `time.monotonic()` second
            until which it is known.
        gates: By digest of each base that live workers serve, the gate over the experts that ride on it.
        gateless: Digests by all addresses of encrypted packages that hold several experts: nobody but a worker can read
            their gate, so none is a model, and its experts are.
    """

    revision: int
    listed: Mapping[str, Model]
    addresses: Mapping[str, Model]
    withdrawn: Mapping[str, Reason]
    packages: Mapping[str, Package]
    workers: tuple[Worker, ...]
    experts: Experts = field(default_factory=Experts)
    gone_bases: tuple[tuple[Base, float], ...] = ()
    gates: Mapping[str, RulesGate] = field(default_factory=dict)
    gateless: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, address: str) -> Model:
        """The model behind a mixture name, `publisher/name@version`, a digest or `digest#ordinal`.

        Raises:
            HocketError: `UNKNOWN_MODEL`, `NOT_SERVABLE` for an adapter expert, or the reason for which this address is
                withdrawn.
        """
        if reason := self.withdrawn.get(address):
            raise HocketError(reason, f"the release {address} is withdrawn ({reason})", model=address)
        if (digest := self.gateless.get(address)) is not None:
            raise HocketError(
                Reason.ENCRYPTED,
                f"the gate of {address} is encrypted with its experts: put a mixture of {digest}#0, #1, ... with a "
                "gate of its own, and ask that",
                model=address,
            )
        model = self.addresses.get(address) or self._member(address)
        if model is None and address.partition("#")[0] in self.experts.by_address:
            raise HocketError(
                Reason.NOT_SERVABLE,
                f"{address[:_ADDRESS_LENGTH_MAX]} is an adapter expert: it answers text, on a base language model, and "
                "no rows of numbers",
                field="model",
            )
        if model is None:
            raise HocketError(
                Reason.UNKNOWN_MODEL,
                f"there is no model {address[:_ADDRESS_LENGTH_MAX]!r}; {self._advice(address)}",
                field="model",
            )
        return model

    def _member(self, address: str) -> Model | None:
        digest, mark, ordinal = address[:_ADDRESS_LENGTH_MAX].partition("#")
        package = self.packages.get(digest) if mark else None
        if package is None or not ordinal.isdecimal() or int(ordinal) >= package.model.expert_count:
            return None
        expert = ExpertId(digest, int(ordinal))
        return lone_model(package, expert.ordinal, str(expert))

    def _advice(self, address: str) -> str:
        if len(address) <= _ADDRESS_LENGTH_MAX and not is_digest(address):
            ends = (f"/{address}", f"/{address}@")
            called = (name for name in self.listed if name.endswith(ends[0]) or ends[1] in name)
            if short := [*islice(called, _SUGGESTED_MAX)]:
                return f"did you mean {' or '.join(map(repr, short))}?"
            alike = (name for name in self.listed if name[:1] == address[:1])
            if close := difflib.get_close_matches(address, [*islice(alike, _SUGGESTED_FROM)], n=1):
                return f"did you mean {close[0]!r}?"
        return "`hocket list` shows the packages, `hocket mixtures list` all that answers rows"


@dataclass(slots=True)
class _View:
    """What one reading of the feed has told so far."""

    packages: dict[str, Package] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    bodies: dict[str, Body] = field(default_factory=dict)
    fetched: dict[str, FetchedMixture] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)

    def forget_bodies(self) -> None:
        """Keep what a mixture still leads to."""
        needed = {mixture.digest for mixture in self.mixtures.values()}
        for digest in tuple(needed & self.bodies.keys()):
            needed.update(_nested(self.bodies[digest]))
        self.lacking &= self.mixtures.keys()
        for held in (self.bodies, self.fetched, self.states):
            for digest in held.keys() - needed:
                del held[digest]

    def copy(self) -> _View:
        """What does not change while the feed is read on, for a thread to index."""
        return _View(
            packages=dict(self.packages),
            mixtures=dict(self.mixtures),
            bodies=dict(self.bodies),
            states=dict(self.states),
        )

    def _mixture_models(self) -> Iterator[tuple[Mixture, Model]]:
        for mixture in self.mixtures.values():
            try:
                yield mixture, mixture_model(mixture, self.bodies, self.states, self.packages)
            except KeyError as missing:
                _log.warning("mixture lacks a part", mixture=mixture.name, missing=str(missing))

    def index(self) -> tuple[dict[str, Model], dict[str, Model], dict[str, Reason]]:
        """Every model by its listed name and by all its addresses, and the addresses that are withdrawn."""
        listed: dict[str, Model] = {}
        addresses: dict[str, Model] = {}
        withdrawn: dict[str, Reason] = {}
        of_package: dict[str, Model] = {}
        for mixture, model in self._mixture_models():
            listed[mixture.name] = addresses[mixture.name] = addresses[mixture.digest] = model
            if mixture.HasField("release"):
                addresses[release_name(mixture.release)] = model
            if mixture.package_digest:
                of_package[mixture.package_digest] = model
        for digest, package in self.packages.items():
            if digest in of_package:
                model = of_package[digest]
            elif package.HasField("adapter") or package.model.expert_count > 1:
                continue  # answers no rows; or its own mixture follows in the feed, or its gate is encrypted
            else:
                name = listed_name(package)
                try:
                    model = listed[name] = lone_model(package, 0, name)
                except KeyError as missing:
                    _log.warning("package lacks a part", digest=digest, missing=str(missing))
                    continue
            addresses[digest] = model
            for release in package.releases:
                name = release_name(release)
                addresses[name] = model
                if release.state in REFUSALS and model.state not in REFUSALS:
                    withdrawn[name] = REFUSALS[release.state]
        return listed, addresses, withdrawn


class Directory:
    """Follows one registry's feed.

    Args:
        registry: The registry.
        kept: The copy on disk; None to keep none.
    """

    def __init__(self, registry: RegistryClient, kept: Kept | None = None) -> None:
        self._registry = registry
        self._kept = kept
        self._view = _View()
        self._workers: dict[str, WorkerState] = {}
        self._unconfirmed: set[str] = set()
        self._recent_bases = RecentBases()
        self._revision = 0
        self._resume_after = 0
        self._epoch = ""
        self._snapshot: Snapshot | None = None
        self._changed = asyncio.Event()
        self._unkept = asyncio.Event()
        self._failures = 0
        self._grace: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._swapping = asyncio.Lock()
        self._models_due = False
        self._is_told_of_a_worker = False

    @property
    def snapshot(self) -> Snapshot:
        """The current snapshot.

        Raises:
            HocketError: `NOT_READY` until the feed, or the copy on disk, has been read once.
        """
        if self._snapshot is None:
            raise HocketError(
                Reason.NOT_READY, "this router has not heard from its registry yet", retry_after_seconds=0.5
            )
        return self._snapshot

    async def wait_for_worker(self) -> None:
        """Return when the registry, in its present life, has told of a worker.

        While the registry is away, a worker that the copy on disk tells of will do after a few seconds: it is all there
        is to know.
        """
        try:
            async with asyncio.timeout(_REGISTRY_SECONDS):
                await self._until(lambda: self._is_told_of_a_worker)
        except TimeoutError:
            await self._until(lambda: self._is_told_of_a_worker or bool(not self._epoch and self.snapshot.workers))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while self._snapshot is None or not condition():
            self._changed.clear()
            await self._changed.wait()

    async def follow(self) -> None:
        """Follow the feed for ever, reconnecting with growing pauses; the copy on disk serves until it speaks."""
        beside = [asyncio.create_task(self._mend()), asyncio.create_task(self._swap_when_due())]
        try:
            await self._follow()
        finally:
            for task in beside:
                task.cancel()

    async def _follow(self) -> None:
        recalled = self._kept is None
        told = ""
        while True:
            try:
                if not recalled and self._kept is not None:
                    recalled = True
                    await self._recall(self._kept)
                try:
                    if await self._read_feed():
                        continue
                finally:
                    if self._grace is not None:  # nobody is gone because the registry is
                        self._grace.cancel()
            except HocketError as error:
                if error.reason is Reason.REVISION_UNKNOWN:  # the registry was restored from a backup: begin anew
                    self._resume_after = 0
                if not (self._epoch or self._failures):
                    _log.info("waiting for the registry", reason=error.reason, message=error.message)
                elif self._epoch and (error.reason != told or not self._failures):
                    _log.warning("registry feed broke", reason=error.reason, message=error.message)
                told = error.reason
            except Exception:  # noqa: BLE001 - a frozen snapshot would miss revocations: whatever it was, try again
                _log.exception("registry feed not understood")
            await asyncio.sleep(_BACKOFF_SECONDS[min(self._failures, len(_BACKOFF_SECONDS) - 1)])
            self._failures += 1

    async def keep(self) -> None:
        """Write each new snapshot's sources to disk, not more often than every second."""
        if self._kept is None:
            return
        while True:
            await self._unkept.wait()
            self._unkept.clear()
            await asyncio.to_thread(self._kept.write, [*self._events()], [*self._view.fetched.values()])
            await asyncio.sleep(_KEEP_SECONDS)

    async def _read_feed(self) -> bool:
        """Read one stream until it ends; True if another one from the beginning is due at once."""
        view = self._view if self._resume_after else self._fresh_view()
        told: set[str] = set()
        synced = False
        async with aclosing(self._registry.watch(self._resume_after)) as feed:
            async for event in feed:
                if event.epoch != self._epoch and self._resume_after:
                    self._resume_after = 0  # another life of the registry: its history need not be the one we know
                    return True
                kind = event.WhichOneof("event")
                match kind:
                    case "worker":
                        told.add(event.worker.worker)
                        self._workers[event.worker.worker] = event.worker
                        self._unconfirmed.discard(event.worker.worker)
                    case "worker_gone":
                        self._workers.pop(event.worker_gone, None)
                    case "synced":
                        self._failures = 0
                        self._view, synced = view, True
                        self._revision = self._resume_after = event.revision
                        self._confirm_workers(event.epoch, told)
                        self._models_due = True
                        await self._swap()
                        continue
                    case _:
                        await self._take(view, event, self._registry.fetch_mixture)
                        if synced:
                            # One change of the registry may be several items; a break between them repeats it.
                            self._revision, self._resume_after = event.revision, event.revision - 1
                if synced:
                    self._note_change(models=kind in {"package", "mixture"})
        return False

    def _fresh_view(self) -> _View:
        """A view to read the feed into from its beginning; bodies are known by digest and stay."""
        return _View(bodies=dict(self._view.bodies), fetched=dict(self._view.fetched))

    async def _recall(self, kept: Kept) -> None:
        """Serve from the copy on disk. What it says is checked as if the registry had said it."""
        events, fetched = await asyncio.to_thread(kept.read)
        view = _View()

        async def fetch(digest: str) -> FetchedMixture:
            if digest not in fetched:
                raise HocketError(Reason.UNKNOWN_MIXTURE, "this mixture is not on disk")
            return fetched[digest]

        for event in events:
            if event.HasField("worker"):
                if not event.worker.address.startswith(LOCAL):  # a worker inside a process that has ended
                    self._workers[event.worker.worker] = event.worker
            elif not event.HasField("synced"):
                await self._take(view, event, fetch)
        if events:
            self._view = view
            self._models_due = True
            await self._swap()  # the revision stays 0: the feed will be read from its beginning

    async def _take(self, view: _View, event: WatchResponse, fetch: Fetch) -> None:
        """Take one durable item in. What a mixture lacks is fetched later: nothing holds up what comes after it."""
        if event.HasField("package"):
            view.packages[event.package.digest] = event.package
        elif event.HasField("mixture") and event.mixture.deleted:
            view.mixtures.pop(event.mixture.name, None)
        elif event.HasField("mixture"):
            mixture = event.mixture
            view.mixtures[mixture.name] = mixture
            view.states[mixture.digest] = mixture.state
            await self._complete(view, mixture, fetch)
        # Revocations reach the router as the states of what they withdraw.

    async def _complete(self, view: _View, mixture: Mixture, fetch: Fetch) -> bool:
        """Fetch what a mixture needs; whether that worked, and is what the name still stands for."""
        try:
            await _bring(view, mixture.digest, fetch)
        except HocketError as error:
            view.lacking.add(mixture.name)
            _log.error("mixture not usable", mixture=mixture.name, reason=error.reason, message=error.message)
            return False
        current = view.mixtures.get(mixture.name)
        if current is not None and current.digest != mixture.digest:
            return False  # a newer version came meanwhile: what that one lacks is not known here
        view.lacking.discard(mixture.name)
        return True

    async def _mend(self) -> None:
        """Try again, for ever, to fetch what mixtures lack."""
        while True:
            await asyncio.sleep(_MEND_SECONDS)
            view = self._view
            for name in tuple(view.lacking):
                mixture = view.mixtures.get(name)
                if mixture is None:
                    view.lacking.discard(name)
                    continue
                try:
                    if await self._complete(view, mixture, self._registry.fetch_mixture):
                        self._note_change(models=True)
                except Exception:  # noqa: BLE001 - one that nobody understands must not keep the others from theirs
                    _log.exception("mixture not understood", mixture=name)

    def _confirm_workers(self, epoch: str, told: set[str]) -> None:
        """Who was not told of in the opening state is gone; after a restart of the registry, only after a while."""
        untold = self._workers.keys() - told
        if epoch == self._epoch:
            for worker in untold - self._unconfirmed:
                del self._workers[worker]
        else:
            self._epoch = epoch
            self._unconfirmed = set(untold)
        if self._unconfirmed:
            self._grace = asyncio.get_running_loop().call_later(_EPOCH_GRACE_SECONDS, self._drop_unconfirmed)

    def _drop_unconfirmed(self) -> None:
        for worker in self._unconfirmed:
            self._workers.pop(worker, None)
        self._unconfirmed.clear()
        self._note_change(models=False)

    def _note_change(self, *, models: bool) -> None:
        """Have the next snapshot made, soon; `models` if something other than workers has changed."""
        self._models_due |= models
        self._due.set()

    async def _swap_when_due(self) -> None:
        """Swap, for ever, once for all that arrives in a moment."""
        while True:
            await self._due.wait()
            await asyncio.sleep(_SWAP_SECONDS)
            self._due.clear()
            try:
                await self._swap()
            except Exception:  # noqa: BLE001 - a frozen snapshot would miss revocations: whatever it was, try again
                _log.exception("view of the registry not understood")
                self._note_change(models=True)
                await asyncio.sleep(_MEND_SECONDS)

    async def _swap(self) -> None:
        """Make a snapshot of what is known now, and swap it in when it is whole.

        What takes time, models and gates, is made in a thread, while the snapshot before keeps serving.
        """
        async with self._swapping:
            await self._swap_alone()

    async def _swap_alone(self) -> None:
        before, revision = self._snapshot, self._revision
        workers = tuple(map(_worker, self._workers.values()))
        gone_bases = self._recent_bases.note(workers)
        is_told_of_a_worker = bool(self._epoch and self._workers.keys() - self._unconfirmed)
        if before is None or self._models_due:
            self._models_due = False
            self._view.forget_bodies()
            made = await asyncio.to_thread(_index, self._view.copy(), workers, before)
            if self._kept is None:
                self._view.fetched.clear()  # only the copy on disk needs them
        elif announced(workers) != announced(before.workers):
            made = replace(before, gates=await asyncio.to_thread(build_gates, before.experts, workers, before.gates))
        else:
            made = before
        self._snapshot = replace(made, revision=revision, workers=workers, gone_bases=gone_bases)
        self._is_told_of_a_worker = is_told_of_a_worker
        metrics.SNAPSHOT_REVISION.labels("router").set(revision)
        self._changed.set()
        self._unkept.set()

    def _events(self) -> Iterator[WatchResponse]:
        """The feed that would lead to the current view."""
        yield from (WatchResponse(package=package) for package in self._view.packages.values())
        yield from (WatchResponse(mixture=mixture) for mixture in self._view.mixtures.values())
        yield from (WatchResponse(worker=worker) for worker in self._workers.values())
        yield WatchResponse(revision=self._revision, epoch=self._epoch, synced=Synced())


def _index(view: _View, workers: Iterable[Worker], before: Snapshot | None) -> Snapshot:
    """Models, experts and gates of a view, as a snapshot without the rest.

    Args:
        view: Nobody else's.
        workers: Live ones.
        before: What of it is the same is used again.
    """
    listed, addresses, withdrawn = view.index()
    experts = index(view.packages.values(), before.experts.terms if before else {})
    gates = build_gates(experts, workers, before.gates if before else {})
    gateless = {
        address: digest
        for digest, package in view.packages.items()
        if package.model.encrypted and package.model.expert_count > 1
        for address in (digest, *map(release_name, package.releases))
    }
    return Snapshot(0, listed, addresses, withdrawn, view.packages, (), experts, gates=gates, gateless=gateless)


def build_gates(experts: Experts, workers: Iterable[Worker], before: Mapping[str, RulesGate]) -> dict[str, RulesGate]:
    """A gate for each base that workers serve, by digest.

    Args:
        experts: All there are.
        workers: Live ones.
        before: The gates until now: one over the same experts stays.
    """
    gates = {}
    for digest, base in announced(workers).items():
        riding, known = tuple(experts.riding_on(base)), before.get(digest)
        gates[digest] = known if known is not None and known.experts == riding else RulesGate(riding, experts.terms)
    return gates


async def _bring(view: _View, digest: str, fetch: Fetch) -> None:
    """Fetch a body unless it is here, check it against its digest, and look at what it nests.

    A nested body may have lost its name; only the outer mixture's new revision then tells that its state changed, so
    the states of nested mixtures are asked for each time.
    """
    if digest not in view.bodies:
        await _fetch(view, digest, fetch)
    nested = _nested(view.bodies[digest])
    for inner in nested:
        view.states.pop(inner, None)  # until it is known again, whatever leads through it does not serve
    for inner in nested:
        view.states[inner] = (await _fetch(view, inner, fetch)).mixture.state


async def _fetch(view: _View, digest: str, fetch: Fetch) -> FetchedMixture:
    fetched = await fetch(digest)
    if digest not in view.bodies:
        if digest_of(fetched.body) != digest:
            raise HocketError(Reason.DIGEST_MISMATCH, "the registry sent another mixture than it announced")
        view.bodies[digest] = await asyncio.to_thread(_body, fetched)
    view.fetched[digest] = fetched
    return fetched


def _body(fetched: FetchedMixture) -> Body:
    record = parse_mixture(fetched.body)
    if isinstance(record.gate, SoftmaxGate):
        return Body(record, softmax_gate(record.gate, read_gate(record.gate, fetched.gate)))
    return Body(record, fixed_gate(record.gate))


def _nested(body: Body) -> list[str]:
    return [member.digest for member in body.record.members if isinstance(member, MixtureRef)]


def _worker(state: WorkerState) -> Worker:
    base = state.base
    return Worker(
        name=state.worker,
        address=state.address,
        formats=frozenset(state.formats),
        budget_bytes=state.budget_bytes,
        host_budget_bytes=state.host_budget_bytes,
        resident=frozenset(held.digest for held in state.residency),
        draining=state.draining,
        base=Base(base.name, base.digest, base.weights_sha256) if base.digest else None,
        unlocks=frozenset(state.unlocks),
    )
