"""A real router and real aggregators over scripted workers: inside one process, or each behind a port of its own."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from hocket.client.aggregator import AggregatorClient
from hocket.client.router import RouterClient
from hocket.identity import ExpertId
from hocket.mixtures import FixedGate, MixtureRecord
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.v1 import expert_worker_pb2, expert_worker_pb2_grpc, mixture_pb2, package_pb2, router_pb2_grpc
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from services.router.aggregators import Aggregators
from services.router.directory import Snapshot
from services.router.gating import fixed_gate
from services.router.model import Body, Model, lone_model, mixture_model
from services.router.placement import Loads, Worker
from services.router.service import RouterServicer
from services.router.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hocket.errors import HocketError

ACTIVE = package_pb2.TRUST_STATE_ACTIVE


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


@dataclass
class ScriptedWorker(expert_worker_pb2_grpc.ExpertWorkerServiceServicer):
    """Answers the expert's number in every row.

    Attributes:
        hanging: Experts it never answers.
        refusal: What it refuses everything with.
        executions: Calls it has begun.
        running: Calls that run now.
    """

    hanging: set[str] = field(default_factory=set)
    refusal: HocketError | None = None
    executions: int = 0
    running: int = 0

    async def RunTensor(self, request: Any, context: Any) -> expert_worker_pb2.RunTensorResponse:
        del context
        self.executions += 1
        self.running += 1
        try:
            if self.refusal is not None:
                raise self.refusal
            if request.expert in self.hanging:
                await asyncio.Event().wait()
            number = int(request.expert.removeprefix("sha256:"), 16)
            output = np.full((request.input.shape[0], 1), number, np.float32)
            return expert_worker_pb2.RunTensorResponse(output=matrix_to_tensor(output))
        finally:
            self.running -= 1


@dataclass
class Node:
    """One service.

    Attributes:
        address: Where it is.
        handlers: What it serves.
    """

    address: str
    handlers: Handlers
    server: Server | None

    @property
    def running(self) -> int:
        return self.handlers.in_flight

    async def stop(self) -> None:
        """Gone: a port that is closed. Only over sockets."""
        assert self.server is not None
        await self.server.drain(0)


@dataclass
class Hops:
    """Router, aggregators and workers, and a client of the router.

    Attributes:
        scripts: What the workers do, by name.
    """

    client: RouterClient
    channels: Channels
    router: Node
    aggregators: list[Node]
    workers: dict[str, Node]
    scripts: dict[str, ScriptedWorker]

    @property
    def running(self) -> int:
        """Calls that run anywhere."""
        nodes = (self.router, *self.aggregators, *self.workers.values())
        return sum(node.running for node in nodes) + sum(script.running for script in self.scripts.values())


def models() -> dict[str, Model]:
    """The experts `one` and `two`, and their mean, `both`."""
    packages = {}
    for number in (1, 2):
        facts = package_pb2.ModelFacts(
            feature_count=2, expert_count=1, parameter_bytes=10, columns=[package_pb2.OutputColumn()]
        )
        packages[digest(number)] = package_pb2.Package(digest=digest(number), state=ACTIVE, model=facts, format="apr")
    gate = FixedGate((1.0, 1.0))
    record = MixtureRecord("both", tuple(ExpertId(name) for name in packages), gate, 2)
    message = mixture_pb2.Mixture(name="both", digest=record.digest, state=ACTIVE)
    return {
        "one": lone_model(packages[digest(1)], 0, "one"),
        "two": lone_model(packages[digest(2)], 0, "two"),
        "both": mixture_model(message, {record.digest: Body(record, fixed_gate(gate))}, {}, packages),
    }


@asynccontextmanager
async def hops(kind: str, *, workers: int = 2, aggregators: int = 1, **changes: dict[str, Any]) -> AsyncIterator[Hops]:
    """Everything runs; every worker can run every expert, and `worker-0` comes first in every plan.

    Args:
        kind: `one process` or `sockets`.
        workers: How many.
        aggregators: How many.
        changes: Settings by table.
    """
    async with AsyncExitStack() as stack:
        local: dict[str, Handlers] = {}
        channels = Channels(local)
        stack.push_async_callback(channels.close)

        async def serve(name: str, handlers: Handlers) -> Node:
            local[name] = handlers
            if kind == "one process":
                return Node(f"local:{name}", handlers, None)
            server = Server(handlers, Address("127.0.0.1", 0))
            await server.start()
            stack.push_async_callback(server.drain, 0)
            return Node(str(server.address), handlers, server)

        scripts = {f"worker-{place}": ScriptedWorker() for place in range(workers)}
        nodes = {}
        for name, script in scripts.items():
            handlers = Handlers()
            handlers.add(expert_worker_pb2_grpc.add_ExpertWorkerServiceServicer_to_server, script)
            nodes[name] = await serve(name, handlers)
        combining = [
            await serve(
                f"aggregator-{place}",
                AggregatorApp(AggregatorSettings(**changes.get("aggregator", {})), channels).handlers,
            )
            for place in range(aggregators)
        ]
        settings = RouterSettings(**changes.get("router", {}))
        known = tuple(
            Worker(name, node.address, frozenset({"apr"}), 100, frozenset({digest(1), digest(2)}), draining=False)
            for name, node in nodes.items()
        )
        snapshot = Snapshot(1, {}, models(), {}, {}, known)
        loads = Loads()
        for place, name in enumerate(nodes):
            loads.by_worker[name] = 1000 * place  # two choices prefer the first
        routing = Handlers(in_flight_max=settings.in_flight_max)
        clients = Aggregators(
            [AggregatorClient(channels.get(node.address)) for node in combining], settings.patience_seconds
        )
        servicer = RouterServicer(settings, SimpleNamespace(snapshot=snapshot), loads, clients)  # type: ignore[arg-type]  # only the snapshot is read
        routing.add(router_pb2_grpc.add_RouterServiceServicer_to_server, servicer)
        router = await serve("router", routing)
        client = RouterClient(channels.get(router.address))
        yield Hops(client, channels, router, combining, nodes, scripts)
