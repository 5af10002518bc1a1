"""The contract of the Ray Serve application: a row in, a value out, as bytes. Runs in `.venv-ray`."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue


def add_mixture_to_server(servicer: Any, server: Any) -> None:  # noqa: ANN401 - Ray's and grpc's own
    """What grpc generates for `service Mixture { rpc Predict(BytesValue) returns (BytesValue); }`."""
    method = grpc.unary_unary_rpc_method_handler(
        servicer.Predict,
        request_deserializer=BytesValue.FromString,
        response_serializer=BytesValue.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peers.Mixture", {"Predict": method}),))
