"""The engine of a worker that has a base: opened, with its memory divided, and described. Imports transformers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import torch

from hocket.errors import HocketError, Reason
from hocket.rpc.convert import duration
from hocket.telemetry import metrics
from hocket.v1.expert_worker_pb2 import (
    EXPERT_STATE_HOST,
    EXPERT_STATE_RESIDENT,
    EXPERT_STATE_UPLOADING,
)
from hocket.v1.expert_worker_pb2 import TextEngine as TextEngineMessage
from hocket.v1.package_pb2 import BaseModel as BaseModelMessage
from services.expert_worker.device import available_bytes, budget_bytes, compute_threads, shares
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.base import Serving, open_base
from services.expert_worker.engine.engine import Engine
from services.expert_worker.engine.graphs import Graphs, can_be_recorded, cuda_recorder
from services.expert_worker.engine.layout import RowLayout
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.pages import SCRATCH_PAGES, KvPool, Pages, default_page_positions
from services.expert_worker.engine.runner import Runner
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.engine.slab import ALIGNMENT_BYTES, Slab

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import Gauge

    from hocket.known_bases import KnownBase
    from hocket.v1.expert_worker_pb2 import ExpertState
    from services.expert_worker.device import Shares
    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.engine import EngineState
    from services.expert_worker.settings import WorkerSettings

_log: Final = structlog.get_logger("worker")
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PAGES_MIN: Final = 4
"""Fewer hold no conversation; a base whose context is shorter than that needs as many as it has."""
_GAUGES: Final[tuple[tuple[Gauge, Callable[[EngineState], float]], ...]] = (
    (metrics.TEXT_RUNNING, lambda state: state.running_count),
    (metrics.TEXT_PREEMPTED, lambda state: state.counts.preempted_count),
    (metrics.TEXT_WAITING, lambda state: state.waiting_count),
    (metrics.TEXT_WAITING_SECONDS, lambda state: state.waiting_seconds),
    (metrics.KV_PAGES_USED, lambda state: state.counts.used_page_count),
    (metrics.KV_PAGES_CACHED, lambda state: state.counts.cached_page_count),
    (metrics.KV_PAGES, lambda state: state.page_count),
)
_ARENA_ROWS: Final = 64 + 8
"""Every arena has room for one expert of rank 64, with its factors and with what rounding rows up takes."""


@dataclass(frozen=True, slots=True, eq=False)
class TextEngine:
    """A base, and what computes texts with it.

    Args:
        base: The language model.
        engine: Its thread; not started yet.
        arena: Where running experts lie.
        pool: Where keys and values lie.
        experts_bytes: What experts on the device may take.
        context_length: Most positions of a text: those of the base, or of all KV pages if they are fewer.
        adapters: What experts' A and B are held as.
    """

    base: Base
    engine: Engine
    arena: Arena
    pool: KvPool
    experts_bytes: int
    context_length: int
    adapters: str

    def observe(self) -> None:
        """Have the metrics tell how busy it is whenever they are read, as long as it lives."""
        engine = weakref.ref(self.engine)
        for gauge, read in _GAUGES:
            gauge.set_function(partial(_read, engine, read))

    @property
    def base_message(self) -> BaseModelMessage:
        """Which base it is."""
        model = self.base.model
        return BaseModelMessage(name=model.name, digest=model.digest or "", weights_sha256=model.weights_sha256 or "")

    def state_of(self, digest: str) -> ExpertState.ValueType:
        """What an adapter expert in host memory is to the device."""
        if digest in self.arena.resident:
            return EXPERT_STATE_RESIDENT
        return EXPERT_STATE_UPLOADING if digest in self.arena.coming else EXPERT_STATE_HOST

    def report(self) -> TextEngineMessage:
        """What it has, and how busy it is."""
        state = self.engine.state
        return TextEngineMessage(
            base=self.base_message,
            vocabulary_sha256=self.base.vocabulary_sha256,
            variant=self.base.variant,
            dtype=_name(self.base.dtype),
            quantisation=self.base.quantisation,
            rope=self.base.rope,
            kv_dtype=_name(self.pool.stored_as),
            adapters=self.adapters,
            context_length=self.context_length,
            base_bytes=self.base.size_bytes,
            kv_used_page_count=state.counts.used_page_count,
            kv_page_count=state.page_count,
            kv_page_positions=self.pool.page_positions,
            arena_used_bytes=self.arena.used_bytes,
            arena_budget_bytes=self.arena.slab.size_bytes + self.arena.size_bytes,
            running_count=state.running_count,
            waiting_count=state.waiting_count,
            tokens_per_second=state.tokens_per_second,
            kv_cached_page_count=state.counts.cached_page_count,
            prefix_hit_token_count=state.counts.prefix_hit_count,
            prefix_miss_token_count=state.counts.prefix_miss_count,
            preemption_count=state.counts.preemption_count,
            waiting_longest=duration(state.waiting_seconds),
            preempted_count=state.counts.preempted_count,
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
    base = _base(known, _serving(settings), device)
    layout = RowLayout(base.projections, base.dtype)
    page_positions = default_page_positions(device)
    adapters = "int8" if settings.adapters == "int8" else _name(layout.dtype)
    kv_dtype = torch.int8 if settings.kv_dtype == "int8" else base.dtype
    page_bytes = page_positions * base.kv_shape.position_bytes(kv_dtype)
    pages_per_text = -(-base.context_length // page_positions)
    free_bytes = budget_bytes(device, settings.workers_on_machine, base.size_bytes)
    share = shares(
        free_bytes,
        (SCRATCH_PAGES + settings.sequences_max * pages_per_text) * page_bytes,
        experts_bytes=settings.budget_bytes,
        slab_bytes=settings.slab_bytes,
        adapters_elsewhere=device.type == "cuda",
    )
    _check_shares(share, layout, (SCRATCH_PAGES + min(_PAGES_MIN, pages_per_text)) * page_bytes, device)
    slab, arena = _memory(layout, share.slab_bytes, page_bytes // base.kv_shape.layers, device)
    context_length = min(base.context_length, (slab.page_count - SCRATCH_PAGES) * page_positions)
    pool = KvPool(
        base.kv_shape,
        page_count=slab.page_count,
        page_positions=page_positions,
        dtype=base.dtype,
        device=device,
        stored_as=kv_dtype,
        slab=slab,
    )
    pages = Pages(slab.page_count, slab)
    mixer = Mixer(base.causal_lm, base.projections, arena)
    graphs = None
    if settings.cuda_graphs and can_be_recorded(pool):
        graphs = Graphs(base, pool, mixer, rows_max=settings.sequences_max, record=cuda_recorder(device))
    engine = Engine(
        Runner(base, pool, mixer, graphs),
        pages,
        page_positions=page_positions,
        context_length=context_length,
        room=arena,
        tokenizer=base.tokenizer,
        variant=f"{base.variant} {_name(kv_dtype)}",
        limits=EngineLimits(
            settings.step_tokens,
            settings.sequences_max,
            settings.text_queue_max,
            ageing_seconds=settings.ageing_seconds,
            session_seconds=settings.session_seconds,
            threads=compute_threads(settings.compute_threads, settings.workers_on_machine),
        ),
    )
    _log.info(
        "base opened",
        base=base.model.name,
        digest=base.model.digest,
        variant=base.variant,
        dtype=_name(base.dtype),
        quantisation=base.quantisation,
        rope=base.rope,
        base_bytes=base.size_bytes,
        adapters=adapters,
        budget_bytes=share.experts_bytes,
        slab_bytes=slab.size_bytes,
        kv_dtype=_name(kv_dtype),
        kv_page_count=engine.state.page_count,
        kv_page_positions=page_positions,
        context_length=context_length,
    )
    return TextEngine(base, engine, arena, pool, share.experts_bytes, context_length, adapters)


def _check_shares(share: Shares, layout: RowLayout, pages_bytes_min: int, device: torch.device) -> None:
    """Return if every share is enough to work with, and all together are there."""
    rank_bytes = layout.layer_count * layout.row_bytes + layout.outside_row_bytes
    rows_bytes_min = _ARENA_ROWS * rank_bytes + layout.layer_count * ALIGNMENT_BYTES
    for setting, size_bytes, least_bytes, what in (
        ("slab_bytes", share.slab_bytes, pages_bytes_min + rows_bytes_min, "texts and running experts"),
        ("budget_bytes", share.experts_bytes, rank_bytes, "experts in memory"),
    ):
        if size_bytes < least_bytes:
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"{size_bytes} bytes for {what} are too few for this base, which needs {least_bytes}: raise "
                f"worker.{setting}, or use a device with more memory, or a smaller base",
            )
    if share.slab_bytes + share.experts_bytes > (left_bytes := available_bytes(device)):
        raise HocketError(
            Reason.DEVICE_MEMORY,
            f"worker.budget_bytes ({share.experts_bytes}) and slab_bytes ({share.slab_bytes}) are more than the "
            f"{left_bytes} bytes that {device} has left beside the base: set them lower, or use a device with more "
            "memory",
        )


def _read(engine: weakref.ref[Engine], read: Callable[[EngineState], float]) -> float:
    """A number of an engine's state; 0 once it is gone."""
    living = engine()
    return 0.0 if living is None else read(living.state)


def _serving(settings: WorkerSettings) -> Serving:
    return Serving(_DTYPES.get(settings.base_dtype), settings.base_quantisation, settings.rope, settings.context_length)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _base(known: KnownBase, serving: Serving, device: torch.device) -> Base:
    """The base, under the name that the operator has given it."""
    try:
        base = open_base(known.path, expected_digest=known.digest, device=device, serving=serving)
    except HocketError as error:
        if error.reason is not Reason.BASE_MISMATCH:
            raise
        raise error.restated(
            f"the base {known.name} in {known.path} has changed since it was added; if that was meant, run "
            f"`hocket base add {known.path} --name {known.name} --replace`, else bring its files back"
        ) from error
    return replace(base, model=replace(base.model, name=known.name))


def _memory(layout: RowLayout, slab_bytes: int, page_bytes: int, device: torch.device) -> tuple[Slab, Arena]:
    """The slab and the arena in it; what lies outside the layers is taken off first."""
    left_bytes = slab_bytes - _ARENA_ROWS * layout.outside_row_bytes
    layer_bytes = left_bytes // layout.layer_count // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    slab = Slab(layout.layer_count, layer_bytes, page_bytes=page_bytes, row_bytes=layout.row_bytes, device=device)
    return slab, Arena(layout, slab, outside_rows=_ARENA_ROWS, device=device)
