"""The floors: `python -m benchmarks.bare MIXTURE.npz` serves an echo and a bare mixture on one free port.

`/bare/Echo` answers the bytes it got. `/bare/Unary` is the same mathematics as the suite's mixture with nothing around
it: parse, gate, four dot products, weighted sum, one message. `/bare/Stream` answers the same two messages as Predict.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import uvloop

from benchmarks.mixture import Mixture
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Handlers
from hocket.rpc.program import freeze
from hocket.rpc.server import Address, Server
from hocket.v1 import plan_pb2, router_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

    from hocket.v1.tensor_pb2 import Tensor


def rows_of(tensor: Tensor) -> NDArray[np.float32]:
    """The rows in a tensor, unchecked."""
    return np.frombuffer(tensor.contents, dtype="<f4").reshape(tuple(tensor.shape))


def methods(mixture: Mixture) -> dict[str, Any]:
    """The handlers."""

    async def echo(request: bytes, _context: Any) -> bytes:  # noqa: ANN401 - grpc's context
        return request

    async def unary(request: bytes, _context: Any) -> bytes:  # noqa: ANN401 - grpc's context
        rows = rows_of(router_pb2.PredictRequest.FromString(request).input)
        response = router_pb2.PredictResponse()
        response.final.combination.value.CopyFrom(matrix_to_tensor(mixture.answer(rows)))
        return response.SerializeToString()

    async def stream(request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - grpc's context
        rows = rows_of(router_pb2.PredictRequest.FromString(request).input)
        weights = mixture.weigh(rows)
        response = router_pb2.PredictResponse()
        for place, weight in enumerate(weights.T.tolist()):
            response.plan.experts.add(expert=str(place), rows=range(len(weight)), weights=weight)
        yield response.SerializeToString()
        value = mixture.mix(weights, rows @ mixture.experts + mixture.biases)
        response = router_pb2.PredictResponse()
        response.final.combination.value.CopyFrom(matrix_to_tensor(value))
        response.final.finish.reason = plan_pb2.FINISH_REASON_COMPLETE
        yield response.SerializeToString()

    return {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }


async def serve(handlers_of_bare: dict[str, Any]) -> None:
    """Serve methods of a service `bare` until killed; prints the address first.

    The server and its options are the suite's own; what it wraps around a handler is not there.
    """
    handlers = Handlers()
    handlers.services["bare"] = handlers_of_bare  # not `add`, which would wrap them
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    freeze()
    print(server.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(methods(Mixture.read(Path(sys.argv[1])))))
