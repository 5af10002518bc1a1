"""The floors: `python -m benchmarks.bare MODEL.npz` serves an echo and a bare mixture on one free port.

`/bare/Echo` answers the bytes it got. `/bare/Unary` is the same mathematics as the suite's mixture with nothing around
it: parse, gate, four dot products, weighted sum, one message. `/bare/Stream` answers the same two messages as Predict.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import uvloop

from hocket.rpc.convert import matrix_to_tensor
from hocket.v1 import plan_pb2, router_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray


class Mixture:
    """Four linear experts behind a softmax gate, in numpy.

    Args:
        gate: float64 `[F, E]`.
        experts: float64 `[F, E]`.
        biases: float64 `[E]`.
    """

    def __init__(self, gate: NDArray[np.float64], experts: NDArray[np.float64], biases: NDArray[np.float64]) -> None:
        self._gate, self._experts, self._biases = gate, experts, biases

    def __call__(self, request: router_pb2.PredictRequest) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Gate weights, float64 `[N, E]`, and the answer, float32 `[N, 1]`."""
        rows = np.frombuffer(request.input.contents, dtype="<f4").reshape(tuple(request.input.shape))
        logits = rows @ self._gate
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        outputs = rows @ self._experts + self._biases
        return weights, (weights * outputs).sum(axis=1, keepdims=True).astype(np.float32)


async def serve(mixture: Mixture) -> None:
    """Serve until killed; prints the port first."""

    async def echo(request: bytes, _context: Any) -> bytes:  # noqa: ANN401 - grpc's context
        return request

    async def unary(request: bytes, _context: Any) -> bytes:  # noqa: ANN401 - grpc's context
        _, value = mixture(router_pb2.PredictRequest.FromString(request))
        response = router_pb2.PredictResponse()
        response.final.combination.value.CopyFrom(matrix_to_tensor(value))
        return response.SerializeToString()

    async def stream(request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        weights, value = mixture(router_pb2.PredictRequest.FromString(request))
        response = router_pb2.PredictResponse()
        for place, weight in enumerate(weights.T.tolist()):
            response.plan.experts.add(expert=str(place), rows=range(len(weight)), weights=weight)
        yield response.SerializeToString()
        response = router_pb2.PredictResponse()
        response.final.combination.value.CopyFrom(matrix_to_tensor(value))
        response.final.finish.reason = plan_pb2.FINISH_REASON_COMPLETE
        yield response.SerializeToString()

    server = grpc.aio.server()
    methods: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    saved = np.load(sys.argv[1])
    uvloop.run(serve(Mixture(saved["gate"], saved["experts"], saved["biases"])))
