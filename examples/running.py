"""A suite of one's own: a process on free ports with its data in a given folder."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from hocket.vendored import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

_READY_SECONDS_MAX: Final = 60.0
_STOP_SECONDS_MAX: Final = 15.0


_INTERRUPTED: Final = 130

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run an example; Ctrl-C ends it, and its suite, with one line."""
    try:
        return asyncio.run(coroutine)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Running:
    """Where a running suite listens."""

    router: str
    registry: str


@asynccontextmanager
async def suite(folder: Path, *settings: str) -> AsyncIterator[Running]:
    """Run `hocket-suite` until the block ends; enter the block when a request would be served.

    Args:
        folder: For its data, logs and trust folder (`trust/`).
        settings: Further settings, `table.key=value`.

    Raises:
        RuntimeError: It did not become ready; its log is in `suite.log`.
    """
    router, registry = _free_ports(2)
    choices = [
        f"router.port={router}",
        f"registry.port={registry}",
        *(f"{table}.data_dir={folder}" for table in ("router", "registry", "worker")),
        *(f"{table}.trust_dir={folder / 'trust'}" for table in ("registry", "worker")),
        *settings,
    ]
    command = [sys.executable, "-m", "services.suite", *(part for choice in choices for part in ("--set", choice))]
    with (folder / "suite.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)  # noqa: S603, ASYNC220 - our own program, started once
        try:
            await _ready(process, f"127.0.0.1:{router}", folder)
            yield Running(f"127.0.0.1:{router}", f"127.0.0.1:{registry}")
        finally:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, _STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _ready(process: subprocess.Popen[bytes], address: str, folder: Path) -> None:
    request = health_pb2.HealthCheckRequest(service="hocket.v1.RouterService")
    loop = asyncio.get_running_loop()
    end = loop.time() + _READY_SECONDS_MAX
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while loop.time() < end and process.poll() is None:
            try:
                answer = await health.Check(request, timeout=1.0)
            except grpc.aio.AioRpcError:
                answer = None
            if answer is not None and answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(0.05)
    raise RuntimeError(f"the suite did not become ready:\n{(folder / 'suite.log').read_text()[-2000:]}")


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, with the metrics ports above them."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, socket.socket() as above:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            try:
                above.bind(("127.0.0.1", port + 1000))
            except (OSError, OverflowError):
                continue
            if port not in found:
                found.append(port)
    return found
