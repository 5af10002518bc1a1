"""`make bench`: one 4-expert mixture, served bare and by Hocket in one process, against a bare echo.

Every server is a process of its own; the client is this one. Rounds of the servers alternate, so that a noisy
neighbour hits all of them, and the median round counts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np
import psutil
import uvloop

from benchmarks.report import record
from examples.publishing import Publisher, known, softmax_mixture
from examples.running import suite
from hocket.client import connect, connect_registry
from hocket.packages import apr
from hocket.packages import model as m
from hocket.rpc.convert import matrix_to_tensor
from hocket.v1 import router_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FEATURES: Final = 768
EXPERTS: Final = 4
_ROUNDS: Final = 5
_CALLS: Final = {1: 400, 32: 1600}
"""Calls of a round, by the number of calls in flight."""


@dataclass(frozen=True, slots=True)
class Side:
    """One server under test.

    Args:
        name: For the table.
        pid: Its process.
        call: One whole call.
    """

    name: str
    pid: int
    call: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Round:
    """One measured round."""

    p50_ms: float
    p99_ms: float
    calls_per_second: float
    cpu_ms_per_call: float


async def measure(side: Side, in_flight: int) -> Round:
    """Latency, throughput and the server's processor time over one round."""
    latencies: list[float] = []
    left = iter(range(_CALLS[in_flight]))

    async def caller() -> None:
        for _ in left:
            begin = time.perf_counter()
            await side.call()
            latencies.append(time.perf_counter() - begin)

    process = psutil.Process(side.pid)
    cpu, begin = sum(process.cpu_times()[:2]), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    seconds, cpu = time.perf_counter() - begin, sum(process.cpu_times()[:2]) - cpu
    count = len(latencies)
    return Round(
        statistics.median(latencies) * 1e3,
        float(np.quantile(latencies, 0.99)) * 1e3,
        count / seconds,
        cpu / count * 1e3,
    )


def _unary(channel: grpc.aio.Channel, method: str, request: bytes) -> Callable[[], Awaitable[None]]:
    stub: Any = channel.unary_unary(method)

    async def call() -> None:
        await stub(request, timeout=30)

    return call


def _stream(channel: grpc.aio.Channel, method: str, request: bytes) -> Callable[[], Awaitable[None]]:
    stub: Any = channel.unary_stream(method)

    async def call() -> None:
        async for _ in stub(request, timeout=30):
            pass

    return call


async def run(device: str, *, save: bool) -> None:
    """The whole benchmark."""
    random = np.random.default_rng(0)
    weights = (random.standard_normal((FEATURES, EXPERTS)) * 0.02).astype(np.float32)
    experts = random.standard_normal((FEATURES, EXPERTS)).astype(np.float32)
    biases = random.standard_normal(EXPERTS).astype(np.float32)
    request = router_pb2.PredictRequest(
        model="bench", input=matrix_to_tensor(random.standard_normal((1, FEATURES)).astype(np.float32))
    ).SerializeToString()
    with tempfile.TemporaryDirectory(prefix="hocket-bench-") as name:
        folder = Path(name)
        saved = folder / "mixture.npz"
        np.savez(saved, gate=weights.astype(float), experts=experts.astype(float), biases=biases.astype(float))
        bare = subprocess.Popen(  # noqa: ASYNC220, S603 - our own program, started once
            [sys.executable, "-m", "benchmarks.bare", str(saved)], stdout=subprocess.PIPE, text=True
        )
        publisher = Publisher.trusted_in(folder, "bench")
        try:
            async with suite(folder, f"worker.device={device}") as running:
                async with connect(running.router) as router, connect_registry(running.registry) as registry:
                    files = [
                        apr.write(m.LinearRegression(experts[:, place], float(biases[place])), created_at=str(place))
                        for place in range(EXPERTS)
                    ]
                    digests = [await publisher.publish(registry, data, f"e{place}") for place, data in enumerate(files)]
                    mixture, gate = softmax_mixture("bench", digests, weights, top_k=EXPERTS)
                    await publisher.put(registry, mixture, gate)
                    await known(router, "bench")
                assert bare.stdout is not None  # noqa: S101 - a pipe was asked for
                port = int(bare.stdout.readline())
                hocket_pid = next(child.pid for child in psutil.Process().children() if child.pid != bare.pid)
                async with (
                    grpc.aio.insecure_channel(f"127.0.0.1:{port}") as floor,
                    grpc.aio.insecure_channel(running.router) as channel,
                ):
                    sides = [
                        Side("bare echo", bare.pid, _unary(floor, "/bare/Echo", request)),
                        Side("bare mixture, one message", bare.pid, _unary(floor, "/bare/Unary", request)),
                        Side("bare mixture, plan and final", bare.pid, _stream(floor, "/bare/Stream", request)),
                        Side(
                            "Hocket, one process",
                            hocket_pid,
                            _stream(channel, "/hocket.v1.RouterService/Predict", request),
                        ),
                    ]
                    await _compare(sides, device, save=save)
        finally:
            bare.kill()
            bare.wait()


async def _compare(sides: list[Side], device: str, *, save: bool) -> None:
    for side in sides:
        await measure(side, 32)  # warm-up
    rows, medians = [], {}
    for in_flight in _CALLS:
        rounds: dict[str, list[Round]] = {side.name: [] for side in sides}
        for _ in range(_ROUNDS):
            for side in sides:
                rounds[side.name].append(await measure(side, in_flight))
        for name, measured in rounds.items():
            figures = {
                "p50 ms": statistics.median(r.p50_ms for r in measured),
                "p99 ms": statistics.median(r.p99_ms for r in measured),
                "calls/s": statistics.median(r.calls_per_second for r in measured),
                "server CPU ms/call": statistics.median(r.cpu_ms_per_call for r in measured),
            }
            medians[in_flight, name] = figures
            rows.append({"in flight": str(in_flight), "server": name, **figures})
    notes: dict[str, Any] = {"mixture": f"{EXPERTS} linear experts, {FEATURES} features, one row, device {device}"}
    for in_flight in _CALLS:
        ours = medians[in_flight, "Hocket, one process"]
        for floor in ("bare mixture, one message", "bare mixture, plan and final"):
            theirs = medians[in_flight, floor]
            notes[f"Hocket / {floor}, {in_flight} in flight"] = (
                f"p50 {ours['p50 ms'] / theirs['p50 ms']:.2f} x (budget 1.3), "
                f"CPU {ours['server CPU ms/call'] / theirs['server CPU ms/call']:.2f} x"
            )
    name = "serving" if device == "cpu" else f"serving-{device.partition(':')[0]}"
    record(name, rows, notes, save=save)


def main() -> None:
    """Measure; `--no-save` only prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the worker computes")
    parser.add_argument("--no-save", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a row of four dot products is no work for two threads
    uvloop.run(run("cuda:0" if arguments.device == "cuda" else "cpu", save=not arguments.no_save))


if __name__ == "__main__":
    main()
