"""Hocket as one side of a comparison: the mixture published, spread over its workers, and asked for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np

from benchmarks.mixture import EXPERTS, NAME, Mixture, check, row
from examples.publishing import Publisher, known, softmax_mixture
from examples.running import suite
from hocket.client import connect, connect_registry
from hocket.client.expert_worker import ExpertWorkerClient
from hocket.packages import apr
from hocket.packages import model as m
from hocket.rpc.convert import matrix_to_tensor
from hocket.v1 import router_pb2

if TYPE_CHECKING:
    from contextlib import AsyncExitStack
    from pathlib import Path

    from examples.running import Running
    from hocket.client import RouterClient
    from hocket.v1 import plan_pb2

PREDICT: Final = "/hocket.v1.RouterService/Predict"
WORKERS: Final = 2
"""Of a split suite."""
_SPREAD_SECONDS_MAX: Final = 30.0


def predict_request(**options: Any) -> bytes:  # noqa: ANN401 - of PredictRequest
    """The request that is measured, in Hocket's contract."""
    return router_pb2.PredictRequest(model=NAME, input=matrix_to_tensor(row()), **options).SerializeToString()


async def start(stack: AsyncExitStack, folder: Path, *settings: str, split: bool = False) -> Running:
    """A suite that serves the mixture until the stack is left.

    Args:
        stack: Ends it.
        folder: For its data; made here.
        settings: `table.key=value`.
        split: Whether each service is a process, with two workers that hold half of the experts each.
    """
    await asyncio.to_thread(folder.mkdir)
    publisher = Publisher.trusted_in(folder, "bench")
    running = await stack.enter_async_context(suite(folder, *settings, workers=WORKERS if split else 0))
    mixture = Mixture.random()
    async with connect(running.router) as router, connect_registry(running.registry) as registry:
        digests = []
        for place in range(EXPERTS):
            model = m.LinearRegression(mixture.experts[:, place].astype(np.float32), float(mixture.biases[place]))
            data = apr.write(model, created_at=str(place))
            digests.append(await publisher.publish(registry, data, f"e{place}"))
        record, gate = softmax_mixture(NAME, digests, mixture.gate.astype(np.float32), top_k=EXPERTS)
        await publisher.put(registry, record, gate)
        await known(router, NAME)
        if split:
            async with asyncio.timeout(_SPREAD_SECONDS_MAX):
                await _spread(router)
    return running


async def _spread(router: RouterClient) -> None:
    """Load the experts in turn on the workers, so that every call has to do with both."""
    while len((plan := await _plan(router)).experts[0].replicas) < WORKERS:  # noqa: ASYNC110 - the news is elsewhere
        await asyncio.sleep(0.05)
    workers = sorted(plan.experts[0].replicas, key=lambda replica: replica.worker)
    homes = {planned.expert: workers[place % WORKERS] for place, planned in enumerate(plan.experts)}
    for expert, home in homes.items():
        async with grpc.aio.insecure_channel(home.address) as channel:
            async for _ in ExpertWorkerClient(channel).load(expert):
                pass
    names = {expert: home.worker for expert, home in homes.items()}
    while {planned.expert: planned.replicas[0].worker for planned in (await _plan(router)).experts} != names:  # noqa: ASYNC110 - the same
        await asyncio.sleep(0.05)


async def _plan(router: RouterClient) -> plan_pb2.Plan:
    return (await router.route(NAME, row())).plan


async def first_answer(channel: grpc.aio.Channel, method: str = PREDICT) -> tuple[bytes, bytes]:
    """The plan and the final message of one call, whose value has proved right."""
    stub: Any = channel.unary_stream(method)
    plan, final = [message async for message in stub(predict_request(), timeout=30)]
    check(method, router_pb2.PredictResponse.FromString(final).final.combination.value.contents)
    return plan, final
