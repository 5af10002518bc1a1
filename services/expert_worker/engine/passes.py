"""Passes that fail: what they cost, and whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from services.expert_worker.engine.part import Part
from services.expert_worker.engine.sampling import choose

if TYPE_CHECKING:
    from services.expert_worker.engine.sampling import Choice
    from services.expert_worker.engine.scheduler import Scheduler, Share

_log: Final = structlog.get_logger("worker")
_RETRY_SECONDS: Final = 0.5
_PROBE: Final = Part(start=0, embeddings=None, token_ids=(0,), pages=(0,), mixture=(), sampled=True)
"""One token for the base alone, into the scratch page: a device that fails at this is of no use to anybody."""
Result: TypeAlias = "tuple[Share, Choice | Exception | None]"
"""What has been computed, and the next token of the answer if it was the last before it; or why there is none."""


class RunnerLike(Protocol):
    """Who computes a step."""

    def run(self, parts: list[Part]) -> torch.Tensor:
        """Logits, float32 `[sampled parts, vocabulary]`, in the order of the parts."""


class DeviceError(Exception):
    """The device does not compute any more."""


class Passes:
    """Computes steps.

    Args:
        runner: Computes a pass.
        scheduler: Is told when there is no memory for one.
        token_count: Tokens that may be chosen.
    """

    def __init__(self, runner: RunnerLike, scheduler: Scheduler, token_count: int) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._token_count = token_count

    def compute(self, shares: list[Share]) -> list[Result]:
        """One pass for all of them; if it fails, each alone, so that only the guilty one's answer ends.

        If it fails for memory nothing is computed, and the next step is smaller: down to one row of one answer, which
        ends if there is no memory even for that.

        A pass may be repeated: it writes keys and values of the same rows to the same places before it reads them, and
        does not touch those of earlier rows. Rows count as computed, and tokens as chosen, only when it has succeeded.

        Raises:
            DeviceError: The device does not even compute the simplest pass.
        """
        try:
            return self._pass(shares)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to one of them
            without_memory = is_exhausted(error)
            _log.warning(
                "a step has failed",
                sequence_count=len(shares),
                exhausted=without_memory,
                exc_info=not without_memory,
            )
            failure = bare(error)
        row_count = sum(share.row_count for share in shares)
        if without_memory:
            if row_count > 1:
                self._scheduler.narrow(row_count)
                return []
            self._scheduler.widen()
            failure = exhausted()
        else:
            self._probe()
            if len(shares) > 1:
                return [result for share in shares for result in self.compute([share])]
        return [(shares[0], failure)]

    def _pass(self, shares: list[Share]) -> list[Result]:
        parts = [share.sequence.part(share.row_count) for share in shares]
        metrics.EXECUTIONS.inc()
        logits = self._runner.run(parts)
        metrics.BATCH_ROWS.observe(sum(share.row_count for share in shares))
        rows = [share.sequence.row for share, part in zip(shares, parts, strict=True) if part.sampled]
        choices = iter(choose(logits, rows, self._token_count) if rows else ())
        return [(share, next(choices) if part.sampled else None) for share, part in zip(shares, parts, strict=True)]

    def _probe(self) -> None:
        """Return if the device still works."""
        try:
            self._runner.run([_PROBE])
        except Exception as error:
            raise DeviceError from error


def exhausted() -> HocketError:
    """The refusal for one that the device has no memory for."""
    return HocketError(
        Reason.DEVICE_MEMORY,
        "the device has no memory left for this text: try another worker, or again later",
        retry_after_seconds=_RETRY_SECONDS,
    )


def is_exhausted(error: Exception) -> bool:
    """Whether a pass has failed for memory. torch has a type of error for a GPU's, and none for a CPU's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def bare(error: Exception) -> Exception:
    """An error without what led to it, which would keep tensors and experts in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
