"""Running experts on workers, by address."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.errors import HocketError, Reason
from hocket.rpc.convert import tensor_to_matrix_unchecked
from hocket.rpc.handlers import hand_down

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import numpy as np
    from numpy.typing import NDArray

    from hocket.rpc.channel import Channels
    from hocket.v1.tensor_pb2 import Tensor
    from hocket.v1.text_pb2 import TextEvent, TextJob

KEPT_MAX: Final = 1024
"""Workers whose channels are kept: plans name their addresses, and workers come and go."""


@dataclass(slots=True)
class _Worker:
    client: ExpertWorkerClient
    calls: int = 0


class Workers:
    """Opens a channel to each worker at first use; of too many, the one used longest ago is forgotten.

    Args:
        channels: Where channels come from.
        kept_max: Workers to keep; more only while calls run on all of them.
    """

    def __init__(self, channels: Channels, kept_max: int = KEPT_MAX) -> None:
        self._channels = channels
        self._kept_max = kept_max
        self._workers: OrderedDict[str, _Worker] = OrderedDict()

    def is_away(self, address: str) -> bool:
        """Whether the worker there is known to be out of reach just now."""
        worker = self._workers.get(address)
        return worker is not None and worker.client.is_away()

    async def run_tensor(
        self, address: str, expert: str, tensor: Tensor, deadline: float, loads: dict[str, bytes]
    ) -> NDArray[np.float32]:
        """What an expert answers on the worker there.

        Args:
            address: Of the worker.
            expert: Its name.
            tensor: FP32 `[n, F]`.
            deadline: By when the answer is used, in `time.monotonic()` seconds.
            loads: Takes the worker's report of its load, by address.

        Raises:
            HocketError: As the worker refuses; `BAD_ANSWER` if its answer is no tensor, `UNREACHABLE` also for an
                address inside another process.
        """
        worker = self._at(address)
        worker.calls += 1
        try:
            await self._make_room()
            seconds = hand_down(deadline - time.monotonic())
            response, load = await worker.client.run_tensor(expert, tensor, seconds)
        finally:
            worker.calls -= 1
        if load is not None:
            loads[address] = load
        try:
            return tensor_to_matrix_unchecked(response.output, "output")
        except HocketError as error:
            raise HocketError(Reason.BAD_ANSWER, f"the expert's answer is malformed: {error.message}") from error

    async def run_text(
        self, address: str, job: TextJob, deadline: float, loads: dict[str, bytes]
    ) -> AsyncGenerator[TextEvent, None]:
        """What the worker there answers to a text job, event by event. Closing the generator cancels the call.

        Args:
            address: Of the worker.
            job: What to compute.
            deadline: By when the answer is used, in `time.monotonic()` seconds.
            loads: Takes the worker's report of its load, by address.

        Raises:
            HocketError: As the worker refuses; `UNREACHABLE` also for an address inside another process.
        """
        worker = self._at(address)
        worker.calls += 1
        try:
            await self._make_room()
            seconds = hand_down(deadline - time.monotonic())
            on_load = partial(loads.__setitem__, address)
            async with aclosing(worker.client.run_text(job, seconds, on_load)) as events:
                async for event in events:
                    yield event
        finally:
            worker.calls -= 1

    def _at(self, address: str) -> _Worker:
        worker = self._workers.get(address)
        if worker is None:
            return self._open(address)
        self._workers.move_to_end(address)
        return worker

    def _open(self, address: str) -> _Worker:
        try:
            channel = self._channels.get(address)
        except KeyError:
            raise HocketError(Reason.UNREACHABLE, "the plan names a worker of another process") from None
        worker = self._workers[address] = _Worker(ExpertWorkerClient(channel))
        return worker

    async def _make_room(self) -> None:
        if len(self._workers) <= self._kept_max:
            return
        oldest = next((address for address, worker in self._workers.items() if not worker.calls), None)
        if oldest is not None:
            del self._workers[oldest]
            await self._channels.forget(oldest)
