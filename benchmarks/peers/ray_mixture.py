"""Ray Serve with the mixture as a composition: a router deployment that calls four expert deployments by handle.

Runs in `.venv-ray`. `python -m benchmarks.peers.ray_mixture MIXTURE.npz FOLDER HTTP_PORT GRPC_PORT` keeps Ray's
sessions in FOLDER and prints a gRPC address when it serves: the proxy's, or the router deployment's own where
`RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT` says that it has one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from benchmarks.mixture import EXPERTS, NAME, Mixture
from benchmarks.peers import own_output

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from ray.serve.handle import DeploymentHandle

_IN_FLIGHT_MAX = 256
_CORES = 0.1
"""What Ray reserves for a replica: little, so that five fit on any machine. It limits nobody."""


class Expert:
    """One expert.

    Args:
        path: Of the mixture.
        place: Its column.
    """

    def __init__(self, path: str, place: int) -> None:
        mixture = Mixture.read(Path(path))
        self._weights = np.ascontiguousarray(mixture.experts[:, [place]])
        self._bias = float(mixture.biases[place])

    async def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Its output, float64 `[N, 1]`."""
        output: NDArray[np.float64] = rows @ self._weights + self._bias
        return output


class Router:
    """Gate, fan-out and weighted sum.

    Args:
        path: Of the mixture.
        experts: Handles, in the order of its columns.
    """

    def __init__(self, path: str, *experts: DeploymentHandle) -> None:
        self._mixture = Mixture.read(Path(path))
        self._experts = experts

    async def Predict(self, request: BytesValue) -> BytesValue:  # noqa: N802 - the contract's name
        """The value for one row."""
        rows = np.frombuffer(request.value, dtype="<f4")[None]
        weights = self._mixture.weigh(rows)
        outputs: list[Any] = await asyncio.gather(*(expert.remote(rows) for expert in self._experts))
        return BytesValue(value=self._mixture.mix(weights, np.concatenate(outputs, axis=1)).tobytes())


def main(mixture: str, folder: str, http_port: str, grpc_port: str) -> None:
    """Serve until killed."""
    ours = own_output()
    ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20, _temp_dir=folder)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=int(http_port)),
        grpc_options=gRPCOptions(
            port=int(grpc_port), grpc_servicer_functions=["benchmarks.peers.ray_contract.add_mixture_to_server"]
        ),
    )
    deployment = serve.deployment(max_ongoing_requests=_IN_FLIGHT_MAX, ray_actor_options={"num_cpus": _CORES})
    experts = [deployment(Expert).options(name=f"Expert{place}").bind(mixture, place) for place in range(EXPERTS)]
    serve.run(deployment(Router).bind(mixture, *experts), name=NAME)
    direct = os.environ.get("RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT")
    ours.write(f"127.0.0.1:{direct or grpc_port}\n")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
