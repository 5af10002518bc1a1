"""A base that is served otherwise than its folder says: longer, in fewer bits, with keys and values in int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hocket.client.expert_worker import ExpertWorkerClient
from hocket.errors import HocketError, Reason
from hocket.rpc.local import LocalChannel
from hocket.v1 import text_pb2
from tests.bases import CONTEXT, tiny_base
from tests.deployments import deployed
from tests.engines import NAME, random_package

if TYPE_CHECKING:
    from pathlib import Path

OTHERWISE = {
    "base_quantisation": "int8",
    "rope": "yarn-1k",
    "kv_dtype": "int8",
    "adapters": "int8",
}


async def asked(folder: Path, base: Path, **worker: Any) -> tuple[Any, Any, Any, list[str]]:
    """What a worker says that it has, how much its expert takes, how an answer began, and the texts of two of them."""
    async with deployed("one process", folder, base=base, worker=worker) as deployment:
        assert deployment.app is not None
        digest = await deployment.publish(random_package("dora", rank=16), "acme/expert-x@1.0.0")
        start, texts = None, ["", ""]
        for index, prompt in enumerate(["select name", "a " * 300]):
            async for event in deployment.router.generate(
                prompt=prompt, experts={digest: 1.0}, max_tokens=8, timeout_seconds=30.0, temperature=0.0
            ):
                if isinstance(event, text_pb2.TextStart):
                    start = event
                if isinstance(event, text_pb2.TextDelta):
                    texts[index] += event.text
        listed = await ExpertWorkerClient(LocalChannel(deployment.app.handlers)).list_experts()
        return listed.engine, listed.experts[0].size_bytes, start, texts


async def test_a_worker_serves_its_base_as_its_settings_say_and_tells_it(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / NAME)
    engine, size_bytes, start, texts = await asked(tmp_path / "plain", base, context_length=CONTEXT)
    assert (engine.quantisation, engine.rope, engine.kv_dtype) == ("none", "default", "float32")
    assert engine.context_length == CONTEXT
    assert start.variant == engine.variant != ""
    otherwise, small_bytes, start, small_texts = await asked(tmp_path / "otherwise", base, **OTHERWISE)
    assert (otherwise.quantisation, otherwise.rope, otherwise.kv_dtype) == ("int8", "yarn", "int8")
    assert (otherwise.dtype, otherwise.context_length) == ("float32", 1024)
    assert 3 < otherwise.kv_page_count / engine.kv_page_count < 3.3  # 16 numbers of 4 bytes, or of 1 with a scale
    assert otherwise.base_bytes < engine.base_bytes
    assert small_bytes < 0.4 * size_bytes
    assert otherwise.base == engine.base
    assert start.variant == otherwise.variant != engine.variant
    assert all(texts)
    assert all(small_texts)


async def test_a_context_longer_than_the_base_s_needs_positions_that_reach_so_far(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / NAME)
    with pytest.raises(HocketError, match=r"worker\.rope") as refusal:
        await asked(tmp_path / "long", base, context_length=CONTEXT + 1)
    assert refusal.value.reason is Reason.NOT_SERVABLE
