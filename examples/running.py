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
_METRICS_OFFSET: Final = 1000


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
    """Where a running suite listens, and its process: with several of them, the one that supervises them."""

    router: str
    registry: str
    pid: int


@asynccontextmanager
async def suite(folder: Path, *settings: str, workers: int = 0) -> AsyncIterator[Running]:
    """Run `hocket-suite` until the block ends; enter the block when a request would be served.

    Args:
        folder: For its data, logs and trust folder (`trust/`).
        settings: Further settings, `table.key=value`.
        workers: How many expert workers; each service is then a process of its own. 0 for all in one process.

    Raises:
        RuntimeError: It did not become ready; its log is in `suite.log`.
    """
    router, registry, aggregator, worker = free_ports(4, spare=workers)
    choices = [
        f"router.port={router}",
        f"registry.port={registry}",
        f"aggregator.port={aggregator}",
        f"worker.port={worker}",
        *(f"{table}.drain_notice_seconds=0" for table in ("router", "registry")),  # nobody to notice
        *(f"{table}.data_dir={folder}" for table in ("router", "registry", "worker")),
        *(f"{table}.trust_dir={folder / 'trust'}" for table in ("registry", "worker")),
        f"worker.bases_dir={folder / 'bases'}",
        *settings,
    ]
    command = [sys.executable, "-m", "services.suite", *(part for choice in choices for part in ("--set", choice))]
    if workers:
        command += ["--split", "--workers", str(workers)]
    with (folder / "suite.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)  # noqa: S603, ASYNC220 - our own program, started once
        try:
            await _ready(process, f"127.0.0.1:{router}", folder)
            yield Running(f"127.0.0.1:{router}", f"127.0.0.1:{registry}", process.pid)
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


def free_ports(count: int, spare: int = 0) -> list[int]:
    """Neighbouring ports that were free a moment ago, with the metrics ports above them.

    Args:
        count: How many.
        spare: How many more behind the last one must be free as well.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        ports = range(first, first + count + spare)
        if all(_is_free(port) and _is_free(port + _METRICS_OFFSET) for port in ports):
            return [*ports[:count]]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True
