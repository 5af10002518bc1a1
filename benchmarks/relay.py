"""The bare side of `benchmarks.split`: a suite's hops, messages and sums as processes, with nothing around them.

`python -m benchmarks.relay ROLE FOLDER [ADDRESS ...]` serves one role on a free port and prints its address.

The same three hops, bytes handed on as they are:
    entry NEXT          client's stream: the plan at once, then what NEXT sends
    middle LEAF         stream: the answer of LEAF, made as long as Hocket's
    leaf                the whole mixture in one call

The same three hops with Hocket's fan-out, messages parsed and built as its contract has them:
    router AGGREGATOR   client's stream: gate and plan, then what AGGREGATOR sends
    aggregator WORKER.. stream: the plan's experts asked at once, and their weighted sum
    worker              one expert in one call

Two hops:
    fanout WORKER ...   client's stream: gate and plan, the experts asked at once, their weighted sum

FOLDER holds `mixture.npz`, and in `plan.bin` and `final.bin` the two messages with which Hocket answered the very
request that is measured: what is sent here is as long as what is sent there. Channels, server and their options are
Hocket's own; its handlers are not around these.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np
import uvloop

from benchmarks.bare import rows_of, serve
from benchmarks.mixture import Mixture
from hocket.rpc.channel import Channels
from hocket.rpc.convert import matrix_to_tensor
from hocket.v1 import aggregator_pb2, expert_worker_pb2, plan_pb2, router_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from hocket.v1.tensor_pb2 import Tensor

_COMBINE: Final = "/bare/Combine"
_RUN: Final = "/bare/Run"
_TIMEOUT_SECONDS: Final = 30


class Bare:
    """All roles; a process serves one of them.

    Args:
        folder: Of the mixture and the two messages.
        addresses: Of the next hop.
    """

    def __init__(self, folder: Path, addresses: Sequence[str]) -> None:
        self._mixture = Mixture.read(folder / "mixture.npz")
        self._plan_bytes = (folder / "plan.bin").read_bytes()
        self._plan = router_pb2.PredictResponse.FromString(self._plan_bytes)
        self._final = router_pb2.PredictResponse.FromString((folder / "final.bin").read_bytes()).final
        # The same places of the experts as in Hocket's plan: which of its columns, and which of the workers.
        hosts = sorted({planned.replicas[0].worker for planned in self._plan.plan.experts})
        channels = [Channels().get(address) for address in addresses]
        self._combine: list[Any] = [channel.unary_stream(_COMBINE) for channel in channels]
        self._run: list[Any] = [channel.unary_unary(_RUN) for channel in channels]
        self._hosts = [hosts.index(planned.replicas[0].worker) for planned in self._plan.plan.experts]
        columns = zip(np.ascontiguousarray(self._mixture.experts.T), self._mixture.biases.tolist(), strict=True)
        self._experts = dict(zip((planned.expert for planned in self._plan.plan.experts), columns, strict=True))
        without_value = router_pb2.PredictResponse(final=self._final)
        without_value.final.combination.ClearField("value")
        self._answer_bytes = without_value.SerializeToString()

    def methods(self, role: str) -> dict[str, Any]:
        """The handlers of one role."""
        streams = {
            "entry": ("Predict", self.enter),
            "middle": ("Combine", self.pass_on),
            "router": ("Predict", self.route),
            "aggregator": ("Combine", self.aggregate),
            "fanout": ("Predict", self.fan_out),
        }
        if role in streams:
            name, handler = streams[role]
            return {name: grpc.unary_stream_rpc_method_handler(handler)}
        return {"Run": grpc.unary_unary_rpc_method_handler({"leaf": self.answer, "worker": self.run}[role])}

    async def enter(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        """First relay."""
        yield self._plan_bytes
        async for event in self._combine[0](self._plan_bytes + request, timeout=_TIMEOUT_SECONDS):
            yield event

    async def pass_on(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        """Second relay."""
        answer = await self._run[0](request[len(self._plan_bytes) :], timeout=_TIMEOUT_SECONDS)
        yield self._answer_bytes + answer  # one message after the other is both merged

    async def answer(self, request: bytes, _context: Any) -> bytes:  # noqa: ANN401 - grpc's context
        """The whole mixture."""
        value = self._mixture.answer(rows_of(router_pb2.PredictRequest.FromString(request).input))
        response = router_pb2.PredictResponse()
        response.final.combination.value.CopyFrom(matrix_to_tensor(value))
        return response.SerializeToString()

    async def route(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        """Decide, and relay the aggregator's events."""
        predict = router_pb2.PredictRequest.FromString(request)
        response = self._decide(predict)
        yield response.SerializeToString()
        combine = aggregator_pb2.CombineRequest(plan=response.plan, input=predict.input)
        async for event in self._combine[0](combine.SerializeToString(), timeout=_TIMEOUT_SECONDS):
            final = aggregator_pb2.CombineResponse.FromString(event).final
            yield router_pb2.PredictResponse(request_id=self._plan.request_id, final=final).SerializeToString()

    async def aggregate(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        """Ask the experts and sum."""
        combine = aggregator_pb2.CombineRequest.FromString(request)
        final = await self._ask(combine.plan, combine.input)
        yield aggregator_pb2.CombineResponse(final=final).SerializeToString()

    async def fan_out(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        """Decide, ask the experts and sum."""
        predict = router_pb2.PredictRequest.FromString(request)
        response = self._decide(predict)
        yield response.SerializeToString()
        final = await self._ask(response.plan, predict.input)
        yield router_pb2.PredictResponse(request_id=self._plan.request_id, final=final).SerializeToString()

    async def run(self, request: bytes, _context: Any) -> bytes:  # noqa: ANN401 - grpc's context
        """One expert."""
        message = expert_worker_pb2.RunTensorRequest.FromString(request)
        weights, bias = self._experts[message.expert]
        output = (rows_of(message.input) @ weights + bias)[:, None]
        response = expert_worker_pb2.RunTensorResponse(output=matrix_to_tensor(output.astype(np.float32)))
        response.wait.nanos = response.compute.nanos = 100_000
        return response.SerializeToString()

    def _decide(self, request: router_pb2.PredictRequest) -> router_pb2.PredictResponse:
        response = router_pb2.PredictResponse()
        response.CopyFrom(self._plan)
        weights = self._mixture.weigh(rows_of(request.input))
        for planned, column in zip(response.plan.experts, weights.T.tolist(), strict=True):
            planned.weights[:] = column
        return response

    async def _ask(self, plan: plan_pb2.Plan, tensor: Tensor) -> plan_pb2.Prediction:
        runs = []
        for planned, host in zip(plan.experts, self._hosts, strict=True):
            request = expert_worker_pb2.RunTensorRequest(expert=planned.expert, input=tensor)
            runs.append(self._run[host](request.SerializeToString(), timeout=_TIMEOUT_SECONDS))
        answers = map(expert_worker_pb2.RunTensorResponse.FromString, await asyncio.gather(*runs))
        outputs = np.concatenate([rows_of(answer.output) for answer in answers], axis=1)
        weights = np.array([planned.weights for planned in plan.experts]).T
        final = plan_pb2.Prediction()
        final.CopyFrom(self._final)
        final.combination.value.CopyFrom(matrix_to_tensor(self._mixture.mix(weights, outputs.astype(float))))
        return final


async def _main(role: str, folder: Path, addresses: Sequence[str]) -> None:
    await serve(Bare(folder, addresses).methods(role))


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
