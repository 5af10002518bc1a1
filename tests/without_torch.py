"""A registry, a router and an aggregator that serve in a process where torch cannot be imported."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from hocket.client.registry import RegistryClient
from hocket.client.router import RouterClient
from hocket.identity import digest_of
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor, tensor_to_matrix
from hocket.rpc.handlers import Handlers, Tokens
from hocket.v1 import expert_worker_pb2, registry_pb2
from hocket.v1.expert_worker_pb2_grpc import ExpertWorkerServiceServicer, add_ExpertWorkerServiceServicer_to_server
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from services.registry.app import RegistryApp
from services.router.app import RouterApp
from services.router.settings import RouterSettings
from tests.builders import apr_bytes, linear
from tests.registries import fixed, mixture_release, settings_in, trust_in
from tests.signing import envelope_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

WEIGHTS = {"acme/one@1": (2.0, -1.0), "acme/two@1": (0.0, 3.0)}
INTERCEPT = 0.5
PACKAGES = {name: apr_bytes(linear(*weights, intercept=INTERCEPT)) for name, weights in WEIGHTS.items()}


class NumpyWorker(ExpertWorkerServiceServicer):
    """Runs the two linear experts."""

    async def RunTensor(
        self, request: expert_worker_pb2.RunTensorRequest, context: Any
    ) -> expert_worker_pb2.RunTensorResponse:
        del context
        [name] = [name for name, data in PACKAGES.items() if digest_of(data) == request.expert]
        answer = tensor_to_matrix(request.input) @ np.array(WEIGHTS[name], np.float32)[:, None] + np.float32(INTERCEPT)
        return expert_worker_pb2.RunTensorResponse(output=matrix_to_tensor(answer))


async def serve_and_ask(folder: Path, rows: list[list[float]]) -> dict[str, Any]:
    """Publish two signed experts and a signed mixture of both, announce a worker, and ask for each of the three.

    Args:
        folder: For the registry's data and trust.
        rows: What to ask.

    Returns:
        The values by name.
    """
    trust_in(folder)
    local: dict[str, Handlers] = {}
    channels = Channels(local)
    registry = RegistryApp(settings_in(folder), Tokens())
    local["registry"], local["worker"] = registry.handlers, Handlers()
    local["worker"].add(add_ExpertWorkerServiceServicer_to_server, NumpyWorker())
    aggregator = AggregatorApp(AggregatorSettings(), channels)
    local["aggregator"] = aggregator.handlers
    router = RouterApp(RouterSettings(registry="local:registry", aggregators=("local:aggregator",)), channels)
    local["router"] = router.handlers
    apps: list[Any] = [registry, aggregator, router]
    for app in apps:
        await app.start()
    client = RegistryClient(channels.get("local:registry"))
    lease = asyncio.create_task(_hold(client))
    for name, data in PACKAGES.items():
        await client.publish(data, envelope_of(data, name=name))
    record = fixed("both", *PACKAGES.values())
    await client.put_mixture(record.body(), mixture_release(record))
    asking = RouterClient(channels.get("local:router"))
    async with asyncio.timeout(10):
        await router.directory.wait_for_worker()
        while "both" not in [summary.name async for summary in asking.list_mixtures()]:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    values = {name: (await asking.answer(name, rows)).value.tolist() for name in (*PACKAGES, "both")}
    lease.cancel()
    await asyncio.gather(lease, return_exceptions=True)
    await channels.close()
    for app in reversed(apps):
        await app.stop()
    return values


async def _hold(registry: RegistryClient) -> None:
    """Announce the worker, and stay."""

    async def states() -> AsyncIterator[registry_pb2.WorkerState]:
        yield registry_pb2.WorkerState(
            worker="numpy", address="local:worker", device="cpu", formats=["apr"], budget_bytes=2**20
        )
        await asyncio.Event().wait()

    async for _ in registry.announce(states()):
        pass
