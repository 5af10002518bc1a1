"""The engine of a worker that has a base: opened, with its memory divided, and described. Imports transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.telemetry import metrics
from hocket.v1.expert_worker_pb2 import TextEngine as TextEngineMessage
from hocket.v1.package_pb2 import BaseModel as BaseModelMessage
from services.expert_worker.device import available_bytes, budget_bytes, compute_threads, shares
from services.expert_worker.engine.base import open_base
from services.expert_worker.engine.engine import Engine
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.pages import SCRATCH_PAGES, KvPool, Pages, default_page_positions
from services.expert_worker.engine.runner import Runner
from services.expert_worker.engine.scheduler import EngineLimits

if TYPE_CHECKING:
    from hocket.known_bases import KnownBase
    from services.expert_worker.device import Shares
    from services.expert_worker.engine.base import Base
    from services.expert_worker.settings import WorkerSettings

_log: Final = structlog.get_logger("worker")
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PAGES_MIN: Final = 4
"""Fewer hold no conversation; a base whose context is shorter than that needs as many as it has."""
_ARENA_ROWS: Final = 64 + 8
"""Every arena has room for one expert of rank 64, with its factors and with what rounding rows up takes."""


@dataclass(frozen=True, slots=True, eq=False)
class TextEngine:
    """A base, and what computes texts with it.

    Args:
        base: The language model.
        engine: Its thread; not started yet.
        mixer: Where running experts lie.
        pool: Where keys and values lie.
        experts_bytes: What experts in memory may take.
        context_length: Most positions of a text: those of the base, or of all KV pages if they are fewer.
    """

    base: Base
    engine: Engine
    mixer: Mixer
    pool: KvPool
    experts_bytes: int
    context_length: int

    def observe(self) -> None:
        """Put into the metrics how busy it is. In the event loop: it has its state from there."""
        state = self.engine.state
        metrics.TEXT_RUNNING.set(state.running_count)
        metrics.TEXT_WAITING.set(state.waiting_count)
        metrics.KV_PAGES_USED.set(state.used_page_count)
        metrics.KV_PAGES.set(state.page_count)

    @property
    def base_message(self) -> BaseModelMessage:
        """Which base it is."""
        model = self.base.model
        return BaseModelMessage(name=model.name, digest=model.digest or "", weights_sha256=model.weights_sha256 or "")

    def report(self) -> TextEngineMessage:
        """What it has, and how busy it is."""
        state = self.engine.state
        return TextEngineMessage(
            base=self.base_message,
            vocabulary_sha256=self.base.vocabulary_sha256,
            dtype=str(self.base.dtype).removeprefix("torch."),
            context_length=self.context_length,
            base_bytes=self.base.size_bytes,
            kv_used_page_count=state.used_page_count,
            kv_page_count=state.page_count,
            kv_page_positions=self.pool.page_positions,
            arena_used_bytes=self.mixer.used_bytes,
            arena_budget_bytes=self.mixer.budget_bytes,
            running_count=state.running_count,
            waiting_count=state.waiting_count,
            tokens_per_second=state.tokens_per_second,
        )


def open_text_engine(known: KnownBase, settings: WorkerSettings, device: torch.device) -> TextEngine:
    """Hash, check and load a base, and set the engine up around it. Blocks, for as long as reading the weights takes.

    Args:
        known: The base that the operator trusts.
        settings: What the operator chose.
        device: Where to compute.

    Raises:
        HocketError: The refusals of `open_base`; `DEVICE_MEMORY` if what is left, or was chosen, is too little to work,
            or more than there is.
    """
    base = _base(known, _DTYPES.get(settings.base_dtype), device)
    page_positions = default_page_positions(device)
    page_bytes = page_positions * base.kv_shape.position_bytes(base.dtype)
    pages_per_text = -(-base.context_length // page_positions)
    free_bytes = budget_bytes(device, settings.workers_on_machine, base.size_bytes)
    share = shares(
        free_bytes,
        (SCRATCH_PAGES + settings.sequences_max * pages_per_text) * page_bytes,
        experts_bytes=settings.budget_bytes,
        arena_bytes=settings.arena_bytes,
        kv_bytes=settings.kv_bytes,
    )
    pages_min = SCRATCH_PAGES + min(_PAGES_MIN, pages_per_text)
    _check_shares(share, base, pages_min * page_bytes, device)
    page_count = share.kv_bytes // page_bytes
    context_length = min(base.context_length, (page_count - SCRATCH_PAGES) * page_positions)
    pool = KvPool(base.kv_shape, page_count=page_count, page_positions=page_positions, dtype=base.dtype, device=device)
    mixer = _mixer(base, share.arena_bytes, device)
    pages = Pages(page_count)
    engine = Engine(
        Runner(base, pool, mixer),
        pages,
        page_positions=page_positions,
        context_length=context_length,
        fits=mixer.fits,
        tokenizer=base.tokenizer,
        limits=EngineLimits(
            settings.step_tokens,
            settings.sequences_max,
            settings.text_queue_max,
            threads=compute_threads(settings.compute_threads, settings.workers_on_machine),
        ),
    )
    _log.info(
        "base opened",
        base=base.model.name,
        digest=base.model.digest,
        dtype=str(base.dtype).removeprefix("torch."),
        base_bytes=base.size_bytes,
        experts_bytes=share.experts_bytes,
        arena_bytes=share.arena_bytes,
        kv_bytes=pool.size_bytes,
        context_length=context_length,
    )
    return TextEngine(base, engine, mixer, pool, share.experts_bytes, context_length)


def _check_shares(share: Shares, base: Base, kv_bytes_min: int, device: torch.device) -> None:
    """Return if every share is enough to work with, and all together are there."""
    # Of one rank in every projection; experts on a float16 base are float32.
    widths = sum(linear.in_features + linear.out_features for linear in base.projections.values())
    rank_bytes = widths * (torch.float32 if base.dtype is torch.float16 else base.dtype).itemsize
    for setting, size_bytes, least_bytes, what in (
        ("kv_bytes", share.kv_bytes, kv_bytes_min, "keys and values of texts"),
        ("arena_bytes", share.arena_bytes, _ARENA_ROWS * rank_bytes, "running experts"),
        ("budget_bytes", share.experts_bytes, rank_bytes, "experts in memory"),
    ):
        if size_bytes < least_bytes:
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{size_bytes} bytes for {what} are too few for this base, which needs {least_bytes}: raise "
                f"worker.{setting}, or use a device with more memory, or a smaller base",
            )
    total_bytes = share.kv_bytes + share.arena_bytes + share.experts_bytes
    if total_bytes > (left_bytes := available_bytes(device)):
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"worker.budget_bytes ({share.experts_bytes}), kv_bytes ({share.kv_bytes}) and arena_bytes "
            f"({share.arena_bytes}) are more than the {left_bytes} bytes that {device} has left beside the base: set "
            "them lower, or use a device with more memory",
        )


def _base(known: KnownBase, dtype: torch.dtype | None, device: torch.device) -> Base:
    """The base, under the name that the operator has given it."""
    try:
        base = open_base(known.path, expected_digest=known.digest, device=device, dtype=dtype)
    except HocketError as error:
        if error.reason is not Reason.BASE_MISMATCH:
            raise
        raise error.restated(
            f"the base {known.name} in {known.path} has changed since it was added; if that was meant, run "
            f"`hocket base add {known.path} --name {known.name} --replace`, else bring its files back"
        ) from error
    return replace(base, model=replace(base.model, name=known.name))


def _mixer(base: Base, arena_bytes: int, device: torch.device) -> Mixer:
    try:
        return Mixer(base.causal_lm, base.projections, arena_bytes)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"{device} has no room for {arena_bytes} bytes in which experts compute: set worker.arena_bytes lower",
        ) from error
