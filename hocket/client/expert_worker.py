"""The expert worker's caller: run an expert, and decide what is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from hocket.client.calls import call_metadata, is_away, refusals
from hocket.rpc.handlers import LOAD_KEY
from hocket.rpc.status import from_rpc_error
from hocket.v1 import expert_worker_pb2
from hocket.v1.expert_worker_pb2_grpc import ExpertWorkerServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from hocket.v1.expert_worker_pb2_grpc import ExpertWorkerServiceAsyncStub
    from hocket.v1.tensor_pb2 import Tensor
    from hocket.v1.text_pb2 import TextEvent, TextJob


class ExpertWorkerClient:
    """Calls one expert worker. Every method raises what the worker refused as `HocketError`.

    Args:
        channel: To the worker; stays the caller's to close.
        token: The admin token, needed by `load` and `unload` where the worker asks for one.
        timeout_seconds: Deadline of the calls that name none; loading has none.
    """

    def __init__(self, channel: grpc.aio.Channel, *, token: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._stub: ExpertWorkerServiceAsyncStub = ExpertWorkerServiceStub(channel)
        self._channel = channel
        self._token = token
        self._timeout_seconds = timeout_seconds

    def is_away(self) -> bool:
        """Whether the worker is known to be out of reach just now."""
        return is_away(self._channel)

    async def run_tensor(
        self,
        expert: str,
        input: Tensor,  # noqa: A002 - the contract's own name
        timeout_seconds: float,
    ) -> tuple[expert_worker_pb2.RunTensorResponse, bytes | None]:
        """Run one expert on a batch of rows.

        Args:
            expert: `sha256:<64 hex>[#ordinal]`.
            input: FP32 `[n, F]`.
            timeout_seconds: Deadline, loading included.

        Returns:
            The answer, and a serialized WorkerLoad for whoever places the next request, if the worker sent one.
        """
        request = expert_worker_pb2.RunTensorRequest(expert=expert, input=input)
        call = self._stub.RunTensor(request, timeout=timeout_seconds, metadata=call_metadata(self._token))
        try:
            response = await call
        except grpc.RpcError as error:  # `refusals()` costs as much as the rest of this method
            raise from_rpc_error(error) from None
        for key, value in await call.trailing_metadata() or ():
            if key == LOAD_KEY and isinstance(value, bytes):
                return response, value
        return response, None

    async def run_text(
        self, job: TextJob, timeout_seconds: float, on_load: Callable[[bytes], None]
    ) -> AsyncGenerator[TextEvent, None]:
        """Answer a text: a start, deltas, then a finish.

        An event is read when it is asked for, so a slow reader holds back the worker. Closing the generator early
        cancels the call.

        Args:
            job: The plan, what is read and how tokens are chosen.
            timeout_seconds: Deadline, loading included.
            on_load: Given a serialized WorkerLoad, if the worker sent one, when the call has ended well.
        """
        request = expert_worker_pb2.RunTextRequest(job=job)
        call = self._stub.RunText(request, timeout=timeout_seconds, metadata=call_metadata(self._token))
        try:
            async for response in call:
                yield response.event
            for key, value in await call.trailing_metadata() or ():
                if key == LOAD_KEY and isinstance(value, bytes):
                    on_load(value)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None  # it is passed on, where what `refusals()` adds would mislead
        finally:
            call.cancel()

    async def load(self, digest: str) -> AsyncGenerator[expert_worker_pb2.LoadExpertResponse, None]:
        """Load a package ahead of use. The last item says READY; leaving earlier does not stop the load.

        Args:
            digest: `sha256:<64 hex>`.
        """
        request = expert_worker_pb2.LoadExpertRequest(digest=digest)
        call = self._stub.LoadExpert(request, metadata=call_metadata(self._token))
        try:
            with refusals():
                async for step in call:
                    yield step
        finally:
            call.cancel()

    async def unload(self, digest: str) -> int:
        """Drop a package from memory, and return how many requests still run on it.

        Args:
            digest: `sha256:<64 hex>`.
        """
        request = expert_worker_pb2.UnloadExpertRequest(digest=digest)
        with refusals():
            response = await self._stub.UnloadExpert(
                request, timeout=self._timeout_seconds, metadata=call_metadata(self._token)
            )
        return response.in_use_count

    async def list_experts(self) -> expert_worker_pb2.ListExpertsResponse:
        """What the worker has in memory."""
        with refusals():
            return await self._stub.ListExperts(
                expert_worker_pb2.ListExpertsRequest(),
                timeout=self._timeout_seconds,
                metadata=call_metadata(self._token),
            )
