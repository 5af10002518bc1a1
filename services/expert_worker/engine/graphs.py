"""Steps in which every sequence gets one token, recorded once for each size and played again: CUDA graphs.

What a step computes is then one call, where it would be thousands that each take longer to start than to run. A
recording computes with the memory that it was made with. So the numbers of sequences are rounded up to powers of two,
with rows of nobody that write to the scratch page; and what differs from step to step is put into tensors that stay
where they are: tokens, positions, block tables, and the weights of experts in their window of the arena (see
`standing`). A step without experts has a recording of its own, in which there is nothing of them.

Prompts, and steps with rows of soft prompts, are computed as they come.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import numpy as np
import structlog
import torch

from services.expert_worker.engine.attention import Step, has_kernel
from services.expert_worker.engine.part import Part
from services.expert_worker.engine.standing import rounded
from services.expert_worker.engine.transfer import into

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.pages import KvPool

_log: Final = structlog.get_logger("worker")
KNOWN_MAX: Final = 64
"""Sizes that are remembered, with their recordings; the one that came longest ago goes first."""
_COMPUTE_FIRST: Final = 8
"""Recording takes as long as some dozen steps, and holds up everybody."""
_NOBODY: Final = Part(start=0, embeddings=None, token_ids=(0,), pages=(0,), mixture=(), sampled=True)

Record: TypeAlias = "Callable[[Callable[[], object]], Callable[[], None]]"
"""Makes of what computes a step what computes it again."""


class StandingMixer(Protocol):
    """What composes experts during a recorded pass."""

    def begin_standing(self, mixtures: Sequence[Mixture]) -> Hashable:
        """Make ready for a pass of one row for each mixture; answers what passes alike have in common."""

    def forget(self, likeness: Hashable) -> None:
        """Passes like that will not come again."""

    def end(self) -> None:
        """The pass is over, well or not."""


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What steps of so many rows differ in, and what comes out, where it stays.

    Attributes:
        token_ids: int64 `[1, T]`.
        positions: int64 `[1, T]`.
        step: For attention.
        logits: float32 `[T, vocabulary]`.
    """

    token_ids: Tensor
    positions: Tensor
    step: Step
    logits: Tensor

    def fill(self, parts: Sequence[Part]) -> None:
        into(self.token_ids, np.array([[part.token_ids[0] for part in parts]], np.int64))
        into(self.positions, np.array([[part.start for part in parts]], np.int64))
        self.step.renew(parts)


@dataclass(slots=True)
class _Known:
    """Steps of one size: how often they came, and what plays them, once it has been recorded."""

    count: int = 0
    recording: Callable[[], None] | None = None


class Graphs:
    """Recorded steps of a base. Not for several threads at once.

    Args:
        base: The model.
        pool: Where keys and values lie; it has to be read in place.
        mixer: Composes experts.
        rows_max: Most sequences of a recorded step.
        record: How a step is recorded.
        compute_first: How often steps of a size are computed before one is recorded.
    """

    def __init__(
        self,
        base: Base,
        pool: KvPool,
        mixer: StandingMixer,
        *,
        rows_max: int,
        record: Record,
        compute_first: int = _COMPUTE_FIRST,
    ) -> None:
        self._base = base
        self._pool = pool
        self._mixer = mixer
        self._rows_max = rows_max
        self._record: Record | None = record
        self._table_width = -(-base.context_length // pool.page_positions)
        self._inputs: dict[int, _Inputs] = {}
        self._compute_first = compute_first
        self._known: OrderedDict[tuple[int, Hashable], _Known] = OrderedDict()

    def takes(self, parts: Sequence[Part]) -> bool:
        """Whether these parts are such a step."""
        return (
            self._record is not None
            and len(parts) <= self._rows_max
            and all(part.sampled and part.embeddings is None and len(part.token_ids) == 1 for part in parts)
        )

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Compute parts that `takes` has said yes to.

        Returns:
            float32 `[parts, vocabulary]`, until the next step.
        """
        padded = [*parts, *[_NOBODY] * (rounded(len(parts)) - len(parts))]
        with torch.inference_mode():
            likeness = self._mixer.begin_standing([part.mixture for part in padded])
            try:
                inputs = self._inputs.get(len(padded)) or self._lay_out(padded)
                inputs.fill(padded)
                self._recording((len(padded), likeness), partial(self._compute, inputs))()
            finally:
                self._mixer.end()
        return inputs.logits[: len(parts)]

    def _lay_out(self, parts: Sequence[Part]) -> _Inputs:
        size, device = (1, len(parts)), self._base.device
        inputs = self._inputs[len(parts)] = _Inputs(
            token_ids=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            step=Step(self._pool, parts, self._table_width),
            logits=torch.zeros((len(parts), self._base.vocabulary_size), device=device),
        )
        return inputs

    def _recording(self, key: tuple[int, Hashable], compute: Callable[[], None]) -> Callable[[], None]:
        """What computes a step like that; `compute` itself as long as it is not worth recording, or cannot be."""
        known = self._known.setdefault(key, _Known())
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_MAX:
            self._forget_oldest()
        known.count += 1
        if known.recording is None and known.count > self._compute_first and self._record is not None:
            try:
                known.recording = self._record(compute)
            except Exception as error:  # noqa: BLE001 - models of transformers may do what a device cannot record
                _log.warning(
                    "steps cannot be recorded, and are computed as they come from now on",
                    exhausted=isinstance(error, torch.OutOfMemoryError),
                    exc_info=True,
                )
                self._record = None
                while self._known:  # and with them what recordings take
                    self._forget_oldest()
        return known.recording or compute

    def _forget_oldest(self) -> None:
        (_, likeness), _ = self._known.popitem(last=False)
        self._mixer.forget(likeness)

    def _compute(self, inputs: _Inputs) -> None:
        answer = self._base.causal_lm(
            input_ids=inputs.token_ids,
            position_ids=inputs.positions,
            use_cache=False,
            return_dict=True,
            step=inputs.step,
        )
        inputs.logits.copy_(answer.logits[0])


def can_be_recorded(pool: KvPool) -> bool:
    """Whether attention does the same for every step of a size: where it is one kernel that reads pages in place."""
    return has_kernel(pool) and pool.in_place


def cuda_recorder(device: torch.device) -> Record:
    """Records steps as CUDA graphs, which share their memory: they run one after the other."""
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        # Both its own. What matrix products work in is torch's by stream, and it frees what belongs to the stream of a
        # recording with that recording (issue 193402 of pytorch): on the stream that warms up it would lie outside the
        # recordings' memory, and others would play on with what has been freed.
        warming = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        recording = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's

    def record(compute: Callable[[], object]) -> Callable[[], None]:
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            # Once before: libraries set themselves up with the first call, which cannot be recorded.
            warming.wait_stream(current)
            with torch.cuda.stream(warming):
                compute()
            current.wait_stream(warming)
            graph = torch.cuda.CUDAGraph()
            try:
                # Of this thread's calls alone: experts are copied by another one meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=recording, capture_error_mode="thread_local"):
                    compute()
            finally:
                torch.cuda.set_stream(current)  # torch leaves the other one where a recording fails
        return graph.replay

    return record
