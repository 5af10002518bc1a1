"""MLServer with the mixture as one model, computed in numpy; runs in `.venv-mlserver`.

`python -m benchmarks.peers.mlserver_mixture MIXTURE.npz REQUEST WORKERS HTTP_PORT GRPC_PORT METRICS_PORT` writes
REQUEST, a message of MLServer's own contract, and prints its gRPC address. WORKERS is the size of its pool of inference
processes; with 0 it computes in the process that serves.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.grpc import dataplane_pb2
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.mixture import FEATURES, NAME, Mixture, row
from benchmarks.peers import own_output


class MixtureModel(MLModel):
    """Gate, four dot products and weighted sum."""

    async def load(self) -> bool:
        """Read the mixture."""
        self._mixture = Mixture.read(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The answer to the rows of the first input."""
        value = self._mixture.answer(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("value", value)])


def _request() -> bytes:
    rows = dataplane_pb2.ModelInferRequest.InferInputTensor(name="rows", datatype="FP32", shape=[1, FEATURES])
    request = dataplane_pb2.ModelInferRequest(
        model_name=NAME, inputs=[rows], raw_input_contents=[row().astype("<f4").tobytes()]
    )
    return bytes(request.SerializeToString())


def main(mixture: str, request: str, workers: str, *ports: str) -> None:
    """Serve until killed."""
    ours = own_output()
    Path(request).write_bytes(_request())
    http, grpc, metrics = map(int, ports)
    settings = Settings(
        host="127.0.0.1",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        parallel_workers=int(workers),
        debug=False,
    )
    model = ModelSettings(
        name=NAME,
        implementation="benchmarks.peers.mlserver_mixture.MixtureModel",
        parameters=ModelParameters(uri=mixture),
    )
    ours.write(f"127.0.0.1:{grpc}\n")
    uvloop.install()
    asyncio.run(_serve(settings, model))


async def _serve(settings: Settings, model: ModelSettings) -> None:
    await MLServer(settings).start([model])  # its pool wants a running loop when it is made


if __name__ == "__main__":
    main(*sys.argv[1:])
