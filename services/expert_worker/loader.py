"""A verified package becomes tensors, first in host memory, then on the device: a model's own, or an adapter's, folded.

How the tensors of an adapter come about is `engine/folding.py`; here they are one flat buffer that moves as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from hocket.errors import HocketError, Reason
from hocket.packages.adapter import Adapter, AdapterFacts
from hocket.rpc.convert import VALUES_MAX
from services.expert_worker.engine.folding import fold
from services.expert_worker.journal import raw_digest
from services.expert_worker.layout import family_of, lay_out
from services.expert_worker.page_locked import CudaLocker, in_pages, page_locked
from services.expert_worker.parameters import move

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from hocket.packages import Package
    from services.expert_worker.compute import Kernel
    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.folding import Foldable
    from services.expert_worker.page_locked import Locker
    from services.expert_worker.parameters import Parameter

_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One expert on a device, and the inputs it takes.

    Args:
        kernel: Its arithmetic.
        width: Columns of its input.
        wider: Whether more columns than that are fine: the package does not say how many there are, only which are
            read.
        columns: Columns of its answer.
        work_per_row: Elementary operations that one row takes, roughly.
        family: Experts of the same family and input width can share a pass: a kind of kernel that `stack` takes, or
            this expert's own kernel.
        package: The raw digest of its package, for the journal.
    """

    kernel: Kernel
    width: int
    wider: bool
    columns: int
    work_per_row: int
    family: object
    package: bytes

    def check(self, rows: NDArray[np.float32]) -> None:
        """Return if these rows can be answered.

        Raises:
            HocketError: `BAD_TENSOR` for another width, or rows whose answer would be too large for a message.
        """
        count, width = rows.shape
        if width != self.width and not (self.wider and width > self.width):
            least = "at least " if self.wider else ""
            raise HocketError(
                Reason.BAD_TENSOR,
                f"input has {width} columns, this expert takes {least}{self.width}",
                field="input.shape",
            )
        if count * self.columns > VALUES_MAX:
            raise HocketError(
                Reason.BAD_TENSOR,
                f"{count} rows of {self.columns} columns each are too large an answer: "
                f"send at most {VALUES_MAX // self.columns} rows at once",
                field="input.shape",
            )


Served: TypeAlias = "Expert | AdapterExpert"
"""What a package holds: tensor experts, which answer rows, or one adapter expert, which takes part in texts."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The experts of a package in host memory, ready to move.

    Args:
        digest: Of the package.
        tensors: Every parameter; nothing else takes device memory. Quantised blocks become values there.
        assemble: From the same tensors, moved: the experts by ordinal.
        facts: What an adapter expert says about itself, for composing it; None for tensor experts.
        in_pages: Whether each tensor will have memory pages of its own.
    """

    digest: str
    tensors: tuple[Parameter, ...]
    assemble: Callable[[Sequence[Tensor]], tuple[Served, ...]]
    facts: AdapterFacts | None = None
    in_pages: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes the experts will take where they wait for requests."""
        return sum(in_pages(tensor.nbytes) if self.in_pages else tensor.nbytes for tensor in self.tensors)


def prepare(
    package: Package,
    base: Foldable | None = None,
    *,
    half: bool = False,
    int8_adapters: bool = False,
    page_locked_adapters: bool = False,
) -> Prepared:
    """Lay out a package's experts for computing. The result shares no memory with the package.

    Args:
        package: Verified.
        base: What adapter experts ride on here; None if nothing.
        half: Whether linear models and dense networks hold their weights in float16. Everything else is as it is, and
            what is computed with them too.
        int8_adapters: Whether adapter experts hold their A and B as int8.
        page_locked_adapters: Whether adapter experts will wait in page-locked host memory, as `place` has them beside a
            CUDA device: in whole pages.

    Raises:
        HocketError: `NOT_SERVABLE` if the package says that it cannot answer, or is an adapter expert and there is no
            base; the refusals of `fold`.
    """
    facts, model = package.facts, package.model
    if facts.not_servable is not None:
        raise HocketError(Reason.NOT_SERVABLE, f"{facts.digest} cannot serve: {facts.not_servable}")
    if isinstance(facts, AdapterFacts) or isinstance(model, Adapter):
        assert isinstance(facts, AdapterFacts)  # noqa: S101 - both are, or neither
        assert isinstance(model, Adapter)  # noqa: S101 - both are, or neither
        return _prepare_adapter(facts, model, base, int8=int8_adapters, in_pages=page_locked_adapters)
    tensors, kernels = lay_out(model, facts.output_columns, half=half)
    wider, raw = facts.n_features is None, raw_digest(facts.digest)
    width = facts.n_features_min if facts.n_features is None else facts.n_features

    def assemble(moved: Sequence[Tensor]) -> tuple[Expert, ...]:
        return tuple(
            Expert(kernel, width, wider, facts.output_columns, kernel.work_per_row, family_of(kernel), raw)
            for kernel in kernels(moved)
        )

    return Prepared(facts.digest, tensors, assemble)


def _prepare_adapter(
    facts: AdapterFacts, adapter: Adapter, base: Foldable | None, *, int8: bool, in_pages: bool
) -> Prepared:
    if base is None:
        raise HocketError(
            Reason.NOT_SERVABLE,
            f"{facts.digest} is an adapter expert: it answers text, on a base language model, and this worker has none "
            "(`hocket base add`, then worker.base)",
        )
    folded = fold(adapter, facts, base, int8=int8)
    return Prepared(facts.digest, (folded.flat,), lambda moved: (folded.build(moved[0]),), facts, in_pages)


def place(prepared: Prepared, device: torch.device) -> tuple[Served, ...]:
    """Put prepared experts where they wait for requests; returns when they are there.

    Tensor experts wait on the device. Adapter experts wait in host memory, which is page-locked if the device is
    another: so they are copied from there while the device computes.

    Raises:
        HocketError: `DEVICE_MEMORY` if there is less memory left than the budget says.
    """
    if device.type == "cpu":
        return prepared.assemble(move(prepared.tensors, device))
    if prepared.facts is not None:
        return prepared.assemble(_page_locked(prepared, CudaLocker(device)))
    # Its event, not the stream: what the engine starts after the copy is not waited for. The thread sleeps meanwhile.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's
    try:
        moved = move(prepared.tensors, device)
        torch.cuda.current_stream(device).record_event(copied).synchronize()
    except torch.OutOfMemoryError as error:
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"{device} has no room for {prepared.size_bytes} bytes although the budget has: "
            "set worker.budget_bytes lower, or see what else runs there",
            retry_after_seconds=_RETRY_SECONDS,
        ) from error
    return prepared.assemble(moved)


def _page_locked(prepared: Prepared, locker: Locker) -> list[Tensor]:
    try:
        return [page_locked(tensor, locker) for tensor in move(prepared.tensors, torch.device("cpu"))]
    except OSError as error:
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"the host can lock no {prepared.size_bytes} bytes more of its memory: set worker.host_bytes lower",
            retry_after_seconds=_RETRY_SECONDS,
        ) from error
