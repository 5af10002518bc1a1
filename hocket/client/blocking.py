"""The clients of `hocket.client` without asyncio: for scripts, notebooks and threaded programs.

    with connect("127.0.0.1:50051") as router:
        answer = router.answer("digits", rows)
        for event in router.predict("digits", rows, partials=True):
            ...
        for event in router.generate("list all names", experts={"sql": 0.7, "json": 0.3}):
            ...

Iterators are ordinary generators; leaving one early cancels its call. A client may be used from several threads at
once. All clients of a process share one event loop, in a thread that lives as long as one of them is open: grpc's
asyncio works best with a single loop per process. What is still open when the interpreter ends is closed then.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hocket import client
from hocket.client import REGISTRY_ADDRESS, ROUTER_ADDRESS
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from typing import Literal, Self, Unpack

    from numpy.typing import ArrayLike

    from hocket.client import (
        Answer,
        Constraint,
        FetchedMixture,
        Partial,
        Planned,
        Routing,
        TextAnswer,
        TextDelta,
        TextFinish,
        TextPlanned,
        TextStart,
    )
    from hocket.client.registry import Progress
    from hocket.client.router import TextOptions, WeightedExperts
    from hocket.v1 import registry_pb2, router_pb2
    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.package_pb2 import Package

T = TypeVar("T")

_END: Final[Any] = object()


@contextmanager
def connect(
    address: str = ROUTER_ADDRESS,
    *,
    timeout_seconds: float = 30.0,
    ca_file: Path | str | None = None,
    certificate_file: Path | str | None = None,
    key_file: Path | str | None = None,
) -> Iterator[RouterClient]:
    """A blocking client of routers; arguments as in `hocket.client.connect`."""
    router = client.connect(
        address,
        timeout_seconds=timeout_seconds,
        ca_file=ca_file,
        certificate_file=certificate_file,
        key_file=key_file,
    )
    with _Session() as session:
        yield RouterClient(session, session.enter(router))


@contextmanager
def connect_registry(
    address: str = REGISTRY_ADDRESS,
    token: str | None = None,
    *,
    timeout_seconds: float = 30.0,
    ca_file: Path | str | None = None,
    certificate_file: Path | str | None = None,
    key_file: Path | str | None = None,
) -> Iterator[RegistryClient]:
    """A blocking client of the registry at `address`; arguments as in `hocket.client.connect_registry`."""
    registry = client.connect_registry(
        address,
        token,
        timeout_seconds=timeout_seconds,
        ca_file=ca_file,
        certificate_file=certificate_file,
        key_file=key_file,
    )
    with _Session() as session:
        yield RegistryClient(session, session.enter(registry))


class RouterClient:
    """`hocket.client.RouterClient`, blocking. Made by `connect`."""

    def __init__(self, session: _Session, router: client.RouterClient) -> None:
        self._session = session
        self._router = router

    def predict(
        self,
        model: str,
        rows: ArrayLike,
        *,
        top_k: int | None = None,
        partials: bool = False,
        min_coverage: float | None = None,
        straggler_timeout_seconds: float | None = None,
        on_missing: Literal["fail", "renormalise"] = "fail",
    ) -> Generator[Planned | Partial | Answer, None, None]:
        """The events of one prediction: the plan, partials if asked for, then the answer."""
        events = self._router.predict(
            model,
            rows,
            top_k=top_k,
            partials=partials,
            min_coverage=min_coverage,
            straggler_timeout_seconds=straggler_timeout_seconds,
            on_missing=on_missing,
        )
        return self._session.iterate(events)

    def answer(
        self,
        model: str,
        rows: ArrayLike,
        *,
        top_k: int | None = None,
        min_coverage: float | None = None,
        straggler_timeout_seconds: float | None = None,
        on_missing: Literal["fail", "renormalise"] = "fail",
    ) -> Answer:
        """The answer alone."""
        answer = self._router.answer(
            model,
            rows,
            top_k=top_k,
            min_coverage=min_coverage,
            straggler_timeout_seconds=straggler_timeout_seconds,
            on_missing=on_missing,
        )
        return self._session.run(answer)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        raw: str | None = None,
        experts: WeightedExperts = (),
        routing: Routing | None = None,
        constraint: Constraint | None = None,
        base: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TextOptions],
    ) -> Generator[TextPlanned | TextStart | TextDelta | TextFinish, None, None]:
        """The events of one answer in text: the plan, a start, what is added as it is made, then the finish."""
        events = self._router.generate(
            prompt,
            messages=messages,
            raw=raw,
            experts=experts,
            routing=routing,
            constraint=constraint,
            base=base,
            timeout_seconds=timeout_seconds,
            **options,
        )
        return self._session.iterate(events)

    def answer_text(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        raw: str | None = None,
        experts: WeightedExperts = (),
        routing: Routing | None = None,
        constraint: Constraint | None = None,
        base: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TextOptions],
    ) -> TextAnswer:
        """The whole answer in text."""
        answer = self._router.answer_text(
            prompt,
            messages=messages,
            raw=raw,
            experts=experts,
            routing=routing,
            constraint=constraint,
            base=base,
            timeout_seconds=timeout_seconds,
            **options,
        )
        return self._session.run(answer)

    def route(self, model: str, rows: ArrayLike, *, top_k: int | None = None) -> router_pb2.RouteResponse:
        """What `predict` would do now, with every score; nothing runs."""
        return self._session.run(self._router.route(model, rows, top_k=top_k))

    def route_text(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        raw: str | None = None,
        experts: WeightedExperts = (),
        routing: Routing | None = None,
        base: str = "",
    ) -> router_pb2.TextDecision:
        """What `generate` would do now, with every score; nothing runs."""
        decision = self._router.route_text(
            prompt, messages=messages, raw=raw, experts=experts, routing=routing, base=base
        )
        return self._session.run(decision)

    def list_mixtures(self) -> Generator[router_pb2.MixtureSummary, None, None]:
        """Every model the router knows, by name."""
        return self._session.iterate(self._router.list_mixtures())

    def get_mixture(self, model: str) -> router_pb2.GetMixtureResponse:
        """One model: members, labels, signers."""
        return self._session.run(self._router.get_mixture(model))


class RegistryClient:
    """`hocket.client.RegistryClient`, blocking. Made by `connect_registry`.

    `on_progress` functions are called from the thread of the event loop, and must not block it.
    """

    def __init__(self, session: _Session, registry: client.RegistryClient) -> None:
        self._session = session
        self._registry = registry

    def publish(
        self, data: bytes | memoryview, release: bytes = b"", *, on_progress: Progress | None = None
    ) -> registry_pb2.PublishPackageResponse:
        """Upload a package."""
        return self._session.run(self._registry.publish(data, release, on_progress=on_progress))

    def get_package(self, package: str) -> Package:
        """Describe one package, with its metadata."""
        return self._session.run(self._registry.get_package(package))

    def list_packages(
        self, *, publisher: str = "", capability: str = "", base: str = "", text: str = ""
    ) -> Generator[Package, None, None]:
        """Packages by digest, without metadata: all, or those that every filter given is true of."""
        packages = self._registry.list_packages(publisher=publisher, capability=capability, base=base, text=text)
        return self._session.iterate(packages)

    def download(
        self, digest: str, *, on_progress: Progress | None = None
    ) -> tuple[registry_pb2.DownloadHeader, bytes]:
        """Fetch a package, with every release of it; its bytes are compared with the digest."""
        return self._session.run(self._registry.download(digest, on_progress=on_progress))

    def yank(self, digest: str, explanation: str = "") -> Package:
        """Withdraw a digest for good."""
        return self._session.run(self._registry.yank(digest, explanation))

    def revoke_key(self, key: str, explanation: str = "") -> registry_pb2.RevokeKeyResponse:
        """Withdraw everything that rests on a key, for good."""
        return self._session.run(self._registry.revoke_key(key, explanation))

    def put_mixture(
        self,
        body: bytes,
        release: bytes = b"",
        gate: bytes | memoryview = b"",
        *,
        etag: str = "",
        on_progress: Progress | None = None,
    ) -> Mixture:
        """Store a mixture under its name."""
        return self._session.run(self._registry.put_mixture(body, release, gate, etag=etag, on_progress=on_progress))

    def fetch_mixture(self, mixture: str) -> FetchedMixture:
        """Fetch a mixture's body, release and gate tensor, unchecked."""
        return self._session.run(self._registry.fetch_mixture(mixture))

    def delete_mixture(self, name: str, etag: str = "") -> int:
        """Free a mixture's name, and return the revision of the deletion."""
        return self._session.run(self._registry.delete_mixture(name, etag))

    def watch(self, after_revision: int = 0) -> Generator[registry_pb2.WatchResponse, None, None]:
        """The feed: what has changed after a revision, a `synced` mark, then every change, until it breaks."""
        return self._session.iterate(self._registry.watch(after_revision))


class _Session:
    """What one client has running on the shared loop. Leaving it ends all of that."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser may run while this thread holds it
        self._is_open = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._streams: set[AsyncGenerator[Any, None]] = set()
        self._exits = AsyncExitStack()

    def __enter__(self) -> Self:
        self._loop = _loop_thread.acquire(self)
        self._is_open = True
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs; what is closed stays so."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
        try:
            if _loop_thread.is_running:
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        finally:
            _loop_thread.release(self)

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter a context on the loop, and leave it with this session."""
        return self.run(self._exits.enter_async_context(context))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine.

        Raises:
            HocketError: What it raises; `UNREACHABLE` if the client is closed, before or meanwhile.
        """
        future = self._start(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise _closed() from None
        except BaseException:  # such as KeyboardInterrupt: the call ends, too
            future.cancel()
            raise

    def iterate(self, stream: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """The items of a stream. Leaving the generator early closes the stream."""
        steps: list[asyncio.Task[Any] | None] = []

        async def step() -> T:
            steps[:] = [asyncio.current_task()]
            self._streams.add(stream)
            return await anext(stream, _END)

        async def close() -> None:
            self._streams.discard(stream)
            for running in steps:  # an interrupt may come before there is anything that it could cancel
                if running is not None and not running.done():
                    running.cancel()
                    await asyncio.wait([running])
            await stream.aclose()

        try:
            while (item := self.run(step())) is not _END:
                yield item
        finally:
            # Not awaited: the collector may finalise a forgotten generator in any thread, the loop's own included.
            with suppress(HocketError):
                self._start(close())

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if not self._is_open:
                coroutine.close()
                raise _closed()
            # Whatever is handed over under the lock reaches the loop before `_end` does.
            return asyncio.run_coroutine_threadsafe(self._tracked(coroutine), self._loop)

    async def _tracked(self, coroutine: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: coroutines run in tasks
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)

    async def _end(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()
        await self._exits.aclose()


class _LoopThread:
    """The event loop of all blocking clients, in a thread that runs while somebody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: set[_Session] = set()

    @property
    def is_running(self) -> bool:
        """Whether waiting for the thread can end: it stands still while the interpreter ends, and in a forked child."""
        return self._thread.is_alive() and not sys.is_finalizing()

    def acquire(self, session: _Session) -> asyncio.AbstractEventLoop:
        with self._lock:
            if not self._sessions:
                self._loop = asyncio.new_event_loop()
                self._loop.set_exception_handler(_report)
                self._thread = threading.Thread(target=self._loop.run_forever, name="hocket-client", daemon=True)
                self._thread.start()
            self._sessions.add(session)
            return self._loop

    def release(self, session: _Session) -> None:
        with self._lock:
            self._sessions.discard(session)
            if not self._sessions and self.is_running:
                asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def close_all(self) -> None:
        """Close what nobody has closed: later on, finalisers would wait for a thread that does not run any more."""
        for session in tuple(self._sessions):
            session.close()


async def _end_tasks() -> None:
    """End what calls have left behind on the loop, such as the close of a stream that nobody waited for."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_loop_thread: Final = _LoopThread()
atexit.register(_loop_thread.close_all)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what asyncio reports, but not that another loop was faster.

    All loops that use grpc are woken for an event of any of them, and those that find nothing complain
    (https://github.com/grpc/grpc/issues/25364).
    """
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def _closed() -> HocketError:
    return HocketError(Reason.UNREACHABLE, "this client is closed: connect again")
