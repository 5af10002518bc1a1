"""Long contexts, begun far from the beginning: what came before is random, the same here and in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from services.expert_worker.engine.int8 import dequantise, quantise
from services.expert_worker.engine.scheduler import EngineLimits
from tests.bases import tiny_base
from tests.engines import asking, opened, prompt_ids, whole_engine
from tests.passes import Passes, ids_of, oracle, part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.expert_worker.engine.base import Base

PAGE = 256
ROWS = 6
NATIVE = 32_768
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "as it is": ("qwen3", {}, {}),
    "window": ("mistral", {"sliding_window": 100}, {}),
    "two types of layers": (
        "gemma3_text",
        {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]},
        {},
    ),
    "linear-128k": ("qwen3", {}, {"rope_type": "linear", "factor": 4.0}),
    "yarn-128k": (
        "qwen3",
        {},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE},
    ),
    "llama3-128k": (
        "llama",
        {},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": NATIVE,
        },
    ),
    "ntk-256k": ("qwen3", {}, {"rope_theta": 10000.0 * 8 ** (16 / 14)}),
}
"""A kind of base, its sizes, and what transformers is told of its positions."""
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Of those with a long past: positions are alike in every layer and head, and memory is what takes the time."""
PLACES = {"as it is": (3, 32_750), "window": (32_750,), "two types of layers": (32_750,), "ntk-256k": (262_112,)}
"""Where to begin; elsewhere it is shortly before 128k."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def past(base: Base, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values of every layer, each `[count, heads, head_dim]`."""
    random = np.random.default_rng(count)
    shape = count, base.kv_shape.heads, base.kv_shape.head_dim

    def numbers() -> torch.Tensor:
        return torch.from_numpy(4 * random.random(shape, np.float32) - 2)

    return [(numbers(), numbers()) for _ in range(base.kv_shape.layers)]


def through_the_engine(base: Base, before: Any, start: int, ids: list[int], kv_dtype: Any = None) -> torch.Tensor:
    """Logits after the last of these tokens, in two passes."""
    count = -(-(start + len(ids)) // PAGE)
    passes = Passes(base, PAGE, 2 + count, kv_dtype=kv_dtype)
    pages = passes.take(count * PAGE)
    slots = torch.arange(pages[0] * PAGE, pages[0] * PAGE + start)
    for layer, (keys, values) in enumerate(before):
        passes.pool.write(layer, slots, keys, values)
    passes.run([part(start, ids[:2], pages)])
    return passes.run([part(start + 2, ids[2:], pages)])[0]


def through_transformers(model: Any, before: Any, start: int, ids: list[int]) -> torch.Tensor:
    from transformers import DynamicCache  # noqa: PLC0415 - seconds

    cache = DynamicCache()
    for layer, pair in enumerate(before):
        cache.update(*(each.transpose(0, 1)[None] for each in pair), layer)
    with torch.no_grad():
        answer = model(
            torch.tensor([ids]),
            position_ids=torch.arange(start, start + len(ids))[None],
            past_key_values=cache,
            logits_to_keep=1,
        )
    logits: torch.Tensor = answer.logits[0, -1]
    return logits


@pytest.mark.parametrize("case", CASES)
def test_logits_at_far_positions_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    kind, sizes, rope = CASES[case]
    if rope:
        sizes = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    folder = tiny_base(tmp_path / "tiny", kind, max_position_embeddings=NATIVE, **sizes)
    base = opened(folder, rope=case if rope else "auto")
    told = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope}} if rope else {}
    model = oracle(folder, **told)
    for start in PLACES.get(case, (131_040,)):
        before, ids = past(base, start), ids_of(ROWS)
        found = through_the_engine(base, before, start, ids)
        torch.testing.assert_close(found, through_transformers(model, before, start, ids), atol=2e-4, rtol=0)


def test_positions_are_exact_where_half_precision_would_round_them(tmp_path: Path) -> None:
    base = opened(tiny_base(tmp_path / "tiny"), dtype=torch.bfloat16, rope="yarn-256k")
    rotary: Any = base.causal_lm.get_submodule("model.rotary_emb")
    positions = torch.tensor([[131_041, 262_000, 262_001]])
    cosines, sines = rotary(torch.zeros(1), positions)
    angles = positions[0, :, None].double() * torch.cat([rotary.inv_freq, rotary.inv_freq]).double()
    rounding = 2**-24 * 262_144  # of a product in float32
    torch.testing.assert_close(cosines[0].double() / rotary.attention_scaling, angles.cos(), atol=rounding, rtol=0)
    torch.testing.assert_close(sines[0].double() / rotary.attention_scaling, angles.sin(), atol=rounding, rtol=0)
    assert (rotary.inv_freq.dtype, cosines[0, 1].eq(cosines[0, 2]).all()) == (torch.float32, False)


@pytest.mark.parametrize("case", ["as it is", "two types of layers"])
def test_in_int8_a_long_past_counts_as_it_is_rounded(case: str, tmp_path: Path) -> None:
    kind, sizes, _ = CASES[case]
    folder = tiny_base(tmp_path / "tiny", kind, max_position_embeddings=NATIVE, **sizes)
    base, start, ids = opened(folder), 4_000, ids_of(ROWS)
    before = past(base, start)
    found = through_the_engine(base, before, start, ids, torch.int8)
    rounded = [(dequantise(*quantise(keys)), dequantise(*quantise(values))) for keys, values in before]
    wanted = through_transformers(oracle(folder), rounded, start, ids)
    whole = through_the_engine(base, before, start, ids)
    assert (found - wanted).norm() / wanted.norm() < 0.01  # which leaves the new rows, that are rounded here alone
    assert (found - whole).norm() / whole.norm() < 0.02
    assert not torch.equal(found, whole)


async def test_in_int8_an_answer_is_the_same_in_any_company_and_in_any_chunks(tmp_path: Path) -> None:
    base = opened(tiny_base(tmp_path / "tiny"))
    requests = [asking(prompt_ids(count, count)) for count in (45, 5, 20)]
    answers = []
    for step_tokens in (64, 7):
        limits = EngineLimits(step_tokens=step_tokens, sequences_max=4, queue_max=9)
        async with whole_engine(base, limits=limits, kv_dtype=torch.int8) as lab:
            answers.append([told.ids for told in await lab.ask_all(requests)])
            answers.append([(await lab.ask(request)).ids for request in requests])
    assert all(each == answers[0] for each in answers)
