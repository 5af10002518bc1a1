"""A suite of real processes that tests may kill, stop and start again, and traffic that checks every answer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from hocket.client import RegistryClient, connect, connect_registry
from hocket.errors import HocketError
from hocket.vendored import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from numpy.typing import NDArray

    from hocket.client import Answer, RouterClient

ROOT = Path(__file__).parents[1]
MODULES = {"router": "router", "aggregator": "aggregator", "registry": "registry", "worker": "expert_worker"}
SERVICES = {
    "router": "hocket.v1.RouterService",
    "aggregator": "hocket.v1.AggregatorService",
    "registry": "hocket.v1.RegistryService",
    "worker": "hocket.v1.ExpertWorkerService",
}
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
CALLS_PER_SECOND_MIN = 20
"""A fault that meets less traffic than that proves nothing."""


def free_port() -> int:
    """A port that is free, and has a free one for metrics 1000 above."""
    while True:
        with socket.socket() as probe, socket.socket() as above:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port + 1000))
                return port


@dataclass
class Member:
    """One process of a cluster.

    Attributes:
        name: `worker-1`.
        service: `worker`.
        port: Where it listens, in every life.
        settings: `key=value` of its own table.
        process: Its current life.
    """

    name: str
    service: str
    port: int
    settings: dict[str, Any]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        chosen = {"port": self.port, **self.settings}
        arguments = [part for key, value in chosen.items() for part in ("--set", f"{self.service}.{key}={value}")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{MODULES[self.service]}", *arguments],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a power failure would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    async def end(self) -> int:
        """Ask it to end, and return its exit status."""
        process = self.process
        assert process is not None
        process.terminate()
        return await asyncio.to_thread(process.wait, STOP_SECONDS_MAX)

    async def ready(self) -> None:
        """Return when it says that it would serve."""
        request = health_pb2.HealthCheckRequest(service=SERVICES[self.service])
        end = time.monotonic() + START_SECONDS_MAX
        async with grpc.aio.insecure_channel(
            self.address, options=(("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100))
        ) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < end:
                assert self.process is not None
                assert self.process.poll() is None, f"{self.name} has ended:\n{self.log.read_text()[-2000:]}"
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await health.Check(request, timeout=1.0)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(0.03)
        raise AssertionError(f"{self.name} did not become ready:\n{self.log.read_text()[-2000:]}")

    async def metrics(self) -> dict[str, float]:
        """What `/metrics` says now, by series."""

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port + 1000}/metrics", timeout=5) as response:
                return str(response.read().decode())

        lines = (await asyncio.to_thread(scrape)).splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    async def restart(self) -> None:
        self.start()
        await self.ready()


@dataclass
class Cluster:
    """One registry, and any number of routers, aggregators and workers, all of them processes."""

    folder: Path
    members: dict[str, Member] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, *, routers: int = 1, aggregators: int = 1, workers: int = 1, **more: Any) -> Cluster:
        """A cluster that is not started yet.

        Args:
            folder: For data and logs; `trust/` in it is the trust folder.
            routers: How many.
            aggregators: How many.
            workers: How many.
            **more: Further settings by service: `worker={"budget_bytes": 10}`.
        """
        cluster = cls(folder)
        trust = folder / "trust"
        registry = cluster._add(
            "registry", "registry", {"data_dir": folder / "registry", "trust_dir": trust, "trust_poll_seconds": 0.2}
        )
        for number in range(1, workers + 1):
            name = f"worker-{number}"
            settings = {"registry": registry.address, "name": name, "data_dir": folder / name, "trust_dir": trust}
            cluster._add(name, "worker", {**settings, "device": "cpu", "compute_threads": 1, **more.get("worker", {})})
        asked = [
            cluster._add(f"aggregator-{number}", "aggregator", more.get("aggregator", {})).address
            for number in range(1, aggregators + 1)
        ]
        for number in range(1, routers + 1):
            name = f"router-{number}"
            settings = {"registry": registry.address, "aggregators": ",".join(asked), "data_dir": folder / name}
            cluster._add(name, "router", {**settings, **more.get("router", {})})
        return cluster

    def _add(self, name: str, service: str, settings: dict[str, Any]) -> Member:
        taken = {member.port for member in self.members.values()}
        port = free_port()
        while port in taken:
            port = free_port()
        self.members[name] = Member(name, service, port, settings, self.folder / f"{name}.log")
        return self.members[name]

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def of_service(self, service: str) -> list[Member]:
        return [member for member in self.members.values() if member.service == service]

    def start(self) -> None:
        for member in self.members.values():
            member.start()

    async def ready(self) -> None:
        await asyncio.gather(*(member.ready() for member in self.members.values()))

    async def mend(self) -> None:
        """Start again what does not run, and have everything go on that was stopped."""
        for member in self.members.values():
            if member.process is None or member.process.poll() is not None:
                member.start()
            else:
                member.send(signal.SIGCONT)
        await self.ready()

    def stop(self) -> None:
        """End what still runs."""
        for member in self.members.values():
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait()

    @property
    def routers(self) -> str:
        """All routers as one target, for a client that takes turns."""
        return "ipv4:" + ",".join(member.address for member in self.of_service("router"))

    @asynccontextmanager
    async def client(self, timeout_seconds: float = 10.0) -> AsyncIterator[RouterClient]:
        async with connect(self.routers, timeout_seconds=timeout_seconds) as client:
            yield client

    @asynccontextmanager
    async def registry(self, timeout_seconds: float = 5.0) -> AsyncIterator[RegistryClient]:
        async with connect_registry(self["registry"].address, timeout_seconds=timeout_seconds) as client:
            yield client


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the traffic: when, and what became of it."""

    begin: float
    seconds: float
    answer: Answer | None
    error: HocketError | None


@dataclass
class Traffic:
    """Callers that ask one model again and again, and hold every answer against the same expected bits."""

    expected: NDArray[np.float32]
    calls: list[Call] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def failed(self) -> list[HocketError]:
        return [call.error for call in self.calls if call.error is not None]

    def since(self, begin: float) -> list[Call]:
        """Calls that ended after a moment on the clock of `time.monotonic`."""
        return [call for call in self.calls if call.begin + call.seconds >= begin]

    async def fault(self) -> float:
        """The moment of a fault, as soon as there is enough traffic; without it, the run is void."""
        await self._wait(lambda: len(self._well_since(time.monotonic() - 1.0)) >= CALLS_PER_SECOND_MIN)
        return time.monotonic()

    async def count(self, more: int) -> None:
        """Return when that many more calls have ended well."""
        end = len(self._well_since(0.0)) + more
        await self._wait(lambda: len(self._well_since(0.0)) >= end)

    async def until(self, condition: Callable[[Answer], bool], seconds: float = 30.0) -> None:
        """Return when an answer that begins from now on meets a condition."""
        begin = time.monotonic()
        await self._wait(
            lambda: any(c.begin > begin and c.answer is not None and condition(c.answer) for c in self.calls[-100:]),
            seconds,
        )

    def _well_since(self, begin: float) -> list[Call]:
        return [call for call in self.since(begin) if call.error is None]

    async def _wait(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Return when a condition holds; a caller that got other bits than expected fails the wait."""
        async with asyncio.timeout(seconds):
            while not condition():
                for task in self.tasks:
                    if task.done():
                        await task
                await asyncio.sleep(0.02)

    async def _ask(self, client: RouterClient, model: str, rows: Any, pause_seconds: float) -> None:
        while True:
            begin = time.monotonic()
            answer, error = None, None
            try:
                answer = await client.answer(model, rows)
            except HocketError as refusal:
                error = refusal
            else:
                np.testing.assert_array_equal(answer.value, self.expected)
            self.calls.append(Call(begin, time.monotonic() - begin, answer, error))
            await asyncio.sleep(pause_seconds)


@asynccontextmanager
async def traffic(
    clients: Iterable[RouterClient],
    model: str,
    rows: Any,
    expected: NDArray[np.float32],
    *,
    callers: int = 4,
    pause_seconds: float = 0.06,  # some 60 calls per second: enough for a fault, and the cores are free for restarts
) -> AsyncIterator[Traffic]:
    """Ask for as long as the block lasts; the block begins when there is enough traffic for a fault."""
    running = Traffic(expected)
    pool = [*clients]
    running.tasks = [
        asyncio.create_task(running._ask(pool[number % len(pool)], model, rows, pause_seconds))
        for number in range(callers)
    ]
    try:
        await running.count(2 * CALLS_PER_SECOND_MIN)
        yield running
        for task in running.tasks:
            assert not task.done(), task.exception()
    finally:
        for task in running.tasks:
            task.cancel()
        await asyncio.gather(*running.tasks, return_exceptions=True)
