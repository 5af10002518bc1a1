"""A worker's text engine starts with memory that it can work with, or says which setting to change."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client import REGISTRY

from hocket import known_bases
from hocket.errors import HocketError, Reason
from services.expert_worker import device as devices
from services.expert_worker.settings import WorkerSettings
from tests.bases import tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from hocket.known_bases import KnownBase
    from services.expert_worker.text_engine import TextEngine

CPU = torch.device("cpu")
PAGE_BYTES = 16 * 512
"""Of the tiny base: 16 positions of 2 layers with 2 heads of 16 float32, keys and values."""
ROW_BYTES = 4 * (2 * (2 * 128 + 2 * 96 + 3 * 160) + 64 + 384)
"""Of one rank in all its projections."""
ROWS_BYTES = 72 * ROW_BYTES + 2 * 64
"""For one expert of rank 64, and what rounding takes in each layer."""
SMALL = {"slab_bytes": 5 * PAGE_BYTES + ROWS_BYTES, "budget_bytes": ROW_BYTES}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownBase:
    folder = tmp_path_factory.mktemp("bases")
    return known_bases.add(folder / "known", tiny_base(folder / "tiny"))


def opened(known: KnownBase, **memory: Any) -> TextEngine:
    from services.expert_worker.text_engine import open_text_engine  # noqa: PLC0415 - imports transformers

    folders = {"data_dir": known.path, "trust_dir": known.path}
    return open_text_engine(known, WorkerSettings(**{**folders, **memory}), CPU)


def refused(known: KnownBase, **memory: Any) -> str:
    with pytest.raises(HocketError) as refusal:
        opened(known, **memory)
    assert refusal.value.reason is Reason.DEVICE_MEMORY
    return refusal.value.message


@pytest.mark.parametrize("setting", SMALL)
def test_a_share_that_is_too_small_to_work_with_is_refused_by_its_name(setting: str, known: KnownBase) -> None:
    message = refused(known, **{**SMALL, setting: SMALL[setting] - 1})
    assert f"needs {SMALL[setting]}: raise worker.{setting}" in message
    opened(known, **SMALL)


def test_a_base_with_a_short_context_needs_as_few_pages_as_it_has(tmp_path: Path) -> None:
    short = known_bases.add(tmp_path / "known", tiny_base(tmp_path / "short", max_position_embeddings=24))
    text = opened(short, **{**SMALL, "slab_bytes": 3 * PAGE_BYTES + ROWS_BYTES})
    assert text.context_length == 24
    assert "slab_bytes" in refused(short, **{**SMALL, "slab_bytes": 3 * PAGE_BYTES + ROWS_BYTES - 1})


def test_memory_of_the_least_size_has_room_for_an_expert_of_rank_64_beside_four_pages(known: KnownBase) -> None:
    from tests.engines import expert_of, random_package  # noqa: PLC0415 - imports the engine

    text = opened(known, **SMALL)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    assert text.arena.fits([expert_of(random_package("dora", projections, rank=64), text.base)], 5)
    assert not text.arena.fits([expert_of(random_package("dora", projections, rank=73), text.base)])


def test_a_device_without_free_memory_is_refused(known: KnownBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_host_bytes", lambda: 100)
    assert "worker.slab_bytes" in refused(known)


def test_more_than_the_device_has_left_is_refused(known: KnownBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_host_bytes", lambda: sum(SMALL.values()))
    opened(known, **SMALL)
    message = refused(known, **{**SMALL, "budget_bytes": ROW_BYTES + 1})
    assert all(f"{setting} (" in message for setting in SMALL)


def test_what_is_divided_by_the_worker_itself_is_there(known: KnownBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_host_bytes", lambda: 2**26)
    opened(known)


@pytest.mark.parametrize("max_length", [64, 2048, 100_000])
def test_the_context_is_as_long_as_the_pages_allow(max_length: int, tmp_path: Path) -> None:
    long = known_bases.add(tmp_path / "known", tiny_base(tmp_path / "long", max_position_embeddings=max_length))
    text = opened(long, **SMALL)
    pages = text.report().kv_page_count
    assert pages == text.arena.slab.page_count - 1
    assert text.context_length == text.report().context_length == min(max_length, 16 * pages)


async def test_an_answer_is_no_longer_than_the_pages_allow(tmp_path: Path) -> None:
    from services.expert_worker.engine.sequence import FinishReason  # noqa: PLC0415 - imports the engine
    from tests.engines import Told, asking, prompt_ids  # noqa: PLC0415 - as above

    long = known_bases.add(tmp_path / "known", tiny_base(tmp_path / "long", max_position_embeddings=100_000))
    text = opened(long, **SMALL)
    text.engine.start()
    try:
        told = Told()
        request = asking(prompt_ids(text.context_length - 4), max_tokens=100)
        async for event in text.engine.submit(request, lambda: None):
            told.take(event)
    finally:
        await text.engine.stop()
    assert told.finish is not None
    assert told.finish.reason is FinishReason.LENGTH
    assert len(told.ids) in {4, 5}  # the last token need not be kept


@pytest.mark.parametrize(("adapters", "held_as"), [("auto", "float32"), ("int8", "int8")])
def test_it_tells_what_experts_are_held_as(adapters: str, held_as: str, known: KnownBase) -> None:
    assert opened(known, **SMALL, adapters=adapters).report().adapters == held_as


async def test_the_metrics_tell_how_long_a_text_waits_whenever_they_are_read(
    known: KnownBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engines import asking  # noqa: PLC0415 - imports the engine

    text = opened(known, **SMALL)
    compute, gate = text.engine._passes.compute, threading.Event()

    def blocked(plan: Any) -> Any:
        gate.wait(30)
        return compute(plan)

    async def scraped(name: str) -> float:
        value = await asyncio.to_thread(REGISTRY.get_sample_value, f"hocket_text_{name}")  # as the metrics' thread does
        assert value is not None
        return value

    monkeypatch.setattr(text.engine._passes, "compute", blocked)
    text.engine.start()
    text.observe()
    try:
        answer = text.engine.submit(asking([5, 6], max_tokens=2), lambda: None)
        assert (await scraped("waiting"), await scraped("running"), await scraped("preempted")) == (1, 0, 0)
        before = await scraped("waiting_seconds")
        await asyncio.sleep(0.05)
        assert await scraped("waiting_seconds") >= before + 0.05
        gate.set()
        async for _ in answer:
            pass
        assert (await scraped("waiting"), await scraped("waiting_seconds"), await scraped("running")) == (0, 0, 0)
    finally:
        gate.set()
        await text.engine.stop()
