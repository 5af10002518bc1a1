from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.int8 import dequantise, quantise
from services.expert_worker.engine.pages import KvPool, KvShape
from tests.passes import part
from tests.recordings import as_on_cuda

if TYPE_CHECKING:
    from torch import Tensor

    from services.expert_worker.engine.part import Part

HEADS, KV_HEADS, DIM = 6, 2, 8
SHAPE = KvShape(layers=2, heads=KV_HEADS, head_dim=DIM)
LAYER: Any = SimpleNamespace(layer_idx=1)


def new_pool(page_positions: int = 4, page_count: int = 20, stored_as: torch.dtype | None = None) -> KvPool:
    return KvPool(
        SHAPE,
        page_count=page_count,
        page_positions=page_positions,
        dtype=torch.float32,
        device=torch.device("cpu"),
        stored_as=stored_as,
    )


def numbers(row_count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, row_count, DIM, generator=random) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]  # three


def attended(pool: KvPool, parts: list[Part], rows: tuple[Tensor, Tensor, Tensor], **more: Any) -> Tensor:
    from services.expert_worker.engine.attention import Step, attend  # noqa: PLC0415 - imports transformers

    answer, weights = attend(LAYER, *rows, None, step=Step(pool, parts), scaling=0.3, **more)
    assert weights is None
    return answer


def by_hand(rows: tuple[Tensor, Tensor, Tensor], window: int | None = None) -> Tensor:
    query, key, value = (each[0] for each in rows)
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 0) for each in (key, value))
    count = query.shape[1]
    sees = torch.ones(count, count, dtype=torch.bool).tril()
    if window is not None:
        sees &= torch.ones(count, count, dtype=torch.bool).triu(1 - window)
    scores = (0.3 * query @ key.mT).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)[None]


@pytest.mark.parametrize("window", [None, 1, 3, 4, 100])
@pytest.mark.parametrize("pages", [[2, 3, 4], [9, 1, 5], [4, 5, 3]])
@pytest.mark.parametrize("chunk", [1, 5, 11])
def test_each_row_sees_what_stands_before_it_within_the_window(
    window: int | None, pages: list[int], chunk: int
) -> None:
    rows, pool = numbers(11), new_pool()
    found = []
    for start in range(0, 11, chunk):
        piece: Any = tuple(each[:, :, start : start + chunk] for each in rows)
        found.append(attended(pool, [part(start, [0] * piece[0].shape[2], pages)], piece, sliding_window=window))
    torch.testing.assert_close(torch.cat(found, dim=1), by_hand(rows, window), atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pages", [[2, 3, 4], [9, 1, 5]])
@pytest.mark.parametrize("chunk", [1, 5, 11])
def test_in_int8_each_row_sees_keys_and_values_as_they_are_rounded(
    window: int | None, pages: list[int], chunk: int
) -> None:
    rows, pool = numbers(11), new_pool(stored_as=torch.int8)
    found = []
    for start in range(0, 11, chunk):
        piece: Any = tuple(each[:, :, start : start + chunk] for each in rows)
        found.append(attended(pool, [part(start, [0] * piece[0].shape[2], pages)], piece, sliding_window=window))
    rounded = rows[0], dequantise(*quantise(rows[1])), dequantise(*quantise(rows[2]))
    torch.testing.assert_close(torch.cat(found, dim=1), by_hand(rounded, window), atol=1e-6, rtol=0)


def test_sequences_in_one_pass_do_not_see_each_other() -> None:
    rows = [numbers(7, seed=1), numbers(3, seed=2)]
    packed: Any = tuple(torch.cat(each, dim=2) for each in zip(*rows, strict=True))
    found = attended(new_pool(), [part(0, [0] * 7, [3, 4]), part(0, [0] * 3, [1])], packed)
    torch.testing.assert_close(found, torch.cat([by_hand(each) for each in rows], dim=1), atol=1e-6, rtol=0)


def test_other_layers_and_other_pages_are_left_alone() -> None:
    pool = new_pool()
    attended(pool, [part(2, [0] * 3, [5, 7])], numbers(3))
    assert not any(tensor.any() for tensor in pool.read(0, None))
    assert pool.read(1, None)[0].flatten(0, 1).any(-1).any(-1).nonzero().flatten().tolist() == [22, 23, 28]


@pytest.mark.parametrize(
    ("wanted", "word"),
    [({"softcap": 30.0}, "softcap"), ({"s_aux": 1.0}, "s_aux"), ({"dropout": 0.1}, "dropout")],
)
def test_what_attention_is_not_done_here_is_refused(wanted: dict[str, Any], word: str) -> None:
    pool, parts = new_pool(), [part(0, [0], [1])]
    with pytest.raises(HocketError, match=word) as refusal:
        attended(pool, parts, numbers(1), **wanted)
    assert refusal.value.reason is Reason.NOT_SERVABLE
    attended(pool, parts, numbers(1), **dict.fromkeys(wanted, 0.0 if word == "dropout" else None))


def test_attention_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LAYER, "is_causal", True, raising=False)
    attended(new_pool(), [part(0, [0], [1])], numbers(1))
    monkeypatch.setattr(LAYER, "is_causal", False)
    with pytest.raises(HocketError, match="look ahead"):
        attended(new_pool(), [part(0, [0], [1])], numbers(1))


@pytest.mark.parametrize("stored_as", [None, torch.int8])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_told_the_same_as_the_loop_does(
    monkeypatch: pytest.MonkeyPatch, window: int | None, stored_as: torch.dtype | None
) -> None:
    parts = [part(0, [0] * 9, [5, 2, 9]), part(0, [0] * 2, [1])]
    later = [part(9, [0], [5, 2, 9]), part(2, [0] * 5, [1, 7])]
    first, second = numbers(11, seed=4), numbers(6, seed=5)
    pool = new_pool(stored_as=stored_as)
    wanted = [attended(pool, parts, first, sliding_window=window), attended(pool, later, second, sliding_window=window)]
    as_on_cuda(monkeypatch)
    pool = new_pool(stored_as=stored_as)
    found = [attended(pool, parts, first, sliding_window=window), attended(pool, later, second, sliding_window=window)]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_there_is_no_kernel_on_a_cpu() -> None:
    from services.expert_worker.engine.attention import Step  # noqa: PLC0415 - imports transformers

    assert Step(new_pool(page_positions=256, page_count=2), [part(0, [0], [1])]).kernel is None
