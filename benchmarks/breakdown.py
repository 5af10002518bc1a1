"""Where the time of one prediction in one process goes: each part by itself, without sockets, in one event loop.

The parts nest: a line includes the lines it names. What a socket adds is the difference to `benchmarks.serving`.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import uvloop

from benchmarks.report import command_line, record
from examples.publishing import Publisher, known, softmax_mixture
from hocket.client.registry import RegistryClient
from hocket.client.router import RouterClient
from hocket.packages import apr
from hocket.packages import model as m
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor, tensor_to_matrix
from hocket.rpc.handlers import Handlers, Tokens
from hocket.telemetry.logs import configure_logs
from hocket.v1 import (
    aggregator_pb2,
    aggregator_pb2_grpc,
    expert_worker_pb2,
    expert_worker_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from services.expert_worker.app import WorkerApp
from services.expert_worker.settings import WorkerSettings
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings
from services.router.app import RouterApp
from services.router.placement import Loads
from services.router.selection import Load, select
from services.router.session import decide
from services.router.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FEATURES: Final = 768
EXPERTS: Final = 4
_ROUNDS: Final = 7
_REPEATS: Final = 300


class Nothing(expert_worker_pb2_grpc.ExpertWorkerServiceServicer):
    """A servicer that answers at once: what a local hop costs."""

    async def RunTensor(self, request: Any, context: Any) -> expert_worker_pb2.RunTensorResponse:  # noqa: ANN401, N802 - the contract's name, grpc's types
        """Answer nothing."""
        del request, context
        return expert_worker_pb2.RunTensorResponse()


def timed(function: Callable[[], object]) -> float:
    """Microseconds of one call: the median over rounds."""
    rounds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            function()
        rounds.append((time.perf_counter() - begin) / _REPEATS * 1e6)
    return statistics.median(rounds)


async def timed_async(function: Callable[[], Awaitable[object]]) -> float:
    """The same for a coroutine function."""
    rounds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            await function()
        rounds.append((time.perf_counter() - begin) / _REPEATS * 1e6)
    return statistics.median(rounds)


async def thread_hop() -> float:
    """The floor of computing in a thread: there and back, with nothing done."""
    loop = asyncio.get_running_loop()
    jobs: queue.SimpleQueue[asyncio.Future[None] | None] = queue.SimpleQueue()

    def work() -> None:
        while (future := jobs.get()) is not None:
            loop.call_soon_threadsafe(future.set_result, None)

    thread = threading.Thread(target=work)
    thread.start()

    async def hop() -> None:
        future: asyncio.Future[None] = loop.create_future()
        jobs.put(future)
        await future

    microseconds = await timed_async(hop)
    jobs.put(None)
    await asyncio.to_thread(thread.join)
    return microseconds


async def run(folder: Path, *, save: bool) -> None:
    """The whole benchmark."""
    local: dict[str, Handlers] = {}
    channels = Channels(local)
    common: dict[str, Any] = {"data_dir": folder, "trust_dir": folder / "trust"}
    publisher = Publisher.trusted_in(folder, "bench")
    registry_app = RegistryApp(RegistrySettings(**common), Tokens())
    local["registry"] = registry_app.handlers
    worker_app = WorkerApp(WorkerSettings(**common, registry="local:registry"), channels, "local:worker")
    local["worker"] = worker_app.handlers
    aggregator_app = AggregatorApp(AggregatorSettings(), channels)
    local["aggregator"] = aggregator_app.handlers
    settings = RouterSettings(registry="local:registry", aggregators=("local:aggregator",))
    router_app = RouterApp(settings, channels)
    local["router"] = router_app.handlers
    local["nothing"] = Handlers()
    local["nothing"].add(expert_worker_pb2_grpc.add_ExpertWorkerServiceServicer_to_server, Nothing())
    apps: list[Any] = [registry_app, worker_app, aggregator_app, router_app]
    for app in apps:
        await app.start()
    await router_app.directory.wait_for_worker()

    random = np.random.default_rng(0)
    registry, router = RegistryClient(channels.get("local:registry")), RouterClient(channels.get("local:router"))
    digests = []
    for place in range(EXPERTS):
        weights = random.standard_normal(FEATURES).astype(np.float32)
        data = apr.write(m.LinearRegression(weights, 1.0), created_at=str(place))
        digests.append(await publisher.publish(registry, data, f"e{place}"))
    gate_weights = (random.standard_normal((FEATURES, EXPERTS)) * 0.02).astype(np.float32)
    mixture, gate = softmax_mixture("bench", digests, gate_weights, top_k=EXPERTS)
    await publisher.put(registry, mixture, gate)
    await known(router, "bench")
    tensor = matrix_to_tensor(random.standard_normal((1, FEATURES)).astype(np.float32))
    await _measure(router_app, channels, tensor, digests, save=save)
    for app in reversed(apps):
        await app.stop()
    await channels.close()


async def _measure(router_app: RouterApp, channels: Channels, tensor: Any, digests: list[str], *, save: bool) -> None:  # noqa: ANN401 - a message
    snapshot, loads = router_app.directory.snapshot, Loads()
    model = snapshot.resolve("bench")
    rows = tensor_to_matrix(tensor)
    idle = Load(lambda _: 0, 256)
    plan = decide(snapshot, loads, 256, "bench", tensor, None).plan
    nothing: Any = expert_worker_pb2_grpc.ExpertWorkerServiceStub(channels.get("local:nothing"))
    worker: Any = expert_worker_pb2_grpc.ExpertWorkerServiceStub(channels.get("local:worker"))
    aggregator: Any = aggregator_pb2_grpc.AggregatorServiceStub(channels.get("local:aggregator"))
    router: Any = router_pb2_grpc.RouterServiceStub(channels.get("local:router"))
    runs = [expert_worker_pb2.RunTensorRequest(expert=digest, input=tensor) for digest in digests]
    combine = aggregator_pb2.CombineRequest(plan=plan, input=tensor)
    predict = router_pb2.PredictRequest(model="bench", input=tensor)

    async def drain(call: Any) -> None:  # noqa: ANN401 - a call
        async for _ in call:
            pass

    gc.collect()
    gc.freeze()
    parts = {
        "gate and top-k": timed(lambda: select(model.top, rows, EXPERTS, idle)),
        "decision: gate and top-k, placement, plan": timed(lambda: decide(snapshot, loads, 256, "bench", tensor, None)),
        "a thread hop, nothing done (floor)": await thread_hop(),
        "a local unary call, nothing done (floor)": await timed_async(lambda: nothing.RunTensor(runs[0], timeout=30)),
        "RunTensor, one expert: call, thread hop, compute": await timed_async(
            lambda: worker.RunTensor(runs[0], timeout=30)
        ),
        "RunTensor, four experts at once": await timed_async(
            lambda: asyncio.gather(*(worker.RunTensor(run, timeout=30) for run in runs))
        ),
        "Combine: four RunTensor, line-up, sum, messages": await timed_async(
            lambda: drain(aggregator.Combine(combine, timeout=30))
        ),
        "Predict: decision, plan message, Combine": await timed_async(
            lambda: drain(router.Predict(predict, timeout=30))
        ),
    }
    rows_ = [{"part of one prediction": name, "us": microseconds} for name, microseconds in parts.items()]
    notes = {"mixture": f"{EXPERTS} linear experts, {FEATURES} features, one row; one call at a time, no sockets"}
    record("breakdown", rows_, notes, save=save)


def main() -> None:
    """Measure; `--no-save` only prints."""
    arguments = command_line(__doc__).parse_args()
    configure_logs("warning")
    with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
        uvloop.run(run(Path(folder), save=not arguments.no_save))


if __name__ == "__main__":
    main()
