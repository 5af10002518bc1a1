"""The engine's attention on a CUDA device: the kernel of half precision, and PyTorch's attention in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.bases import tiny_base
from tests.passes import KINDS, Passes, ids_of, oracle, part

if TYPE_CHECKING:
    from pathlib import Path

    from services.expert_worker.engine.base import Base

DEVICE = torch.device("cuda:0")
ROWS = 300
"""More than a page of the kernel has positions."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Most that logits may differ from those in float32, as a share of their norm."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def opened(folder: Path, dtype: torch.dtype | None = None, **serving: Any) -> Base:
    from services.expert_worker.engine.base import Serving, open_base  # noqa: PLC0415 - imports transformers

    return open_base(folder, expected_digest=None, device=DEVICE, serving=Serving(dtype, **serving))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_at_every_chunk_size(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = tiny_base(tmp_path, kind, **KINDS[kind])
    ids = ids_of(ROWS)
    with torch.no_grad():
        wanted = oracle(folder).to(DEVICE)(torch.tensor([ids], device=DEVICE)).logits[0]
    passes = Passes(opened(folder, dtype), page_positions=256)
    for chunk in (1, 16, ROWS):
        after = [*range(chunk - 1, ROWS - 1, chunk), ROWS - 1]
        error = (passes.logits(ids, chunk, scattered=True) - wanted[after]).norm() / wanted[after].norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sequence_does_not_depend_on_its_batch_mates(tmp_path: Path, dtype: torch.dtype) -> None:
    passes = Passes(opened(tiny_base(tmp_path, "gemma3_text", **KINDS["gemma3_text"]), dtype), page_positions=256)
    sequences = [ids_of(count, count) for count in (290, 3, 70)]
    pages = [passes.take(len(ids), scattered=True) for ids in sequences]
    passes.run([part(0, ids[:-2], table, sampled=False) for ids, table in zip(sequences, pages, strict=True)])
    decoded = [
        passes.run([part(len(ids) - rest, [ids[-rest]], table) for ids, table in zip(sequences, pages, strict=True)])
        for rest in (2, 1)
    ]
    for index, ids in enumerate(sequences):
        alone = passes.logits(ids, len(ids))[0]
        assert (decoded[1][index] - alone).norm() < TOLERANCE[dtype] * alone.norm()


@pytest.mark.parametrize(("dtype", "has_kernel"), [(torch.bfloat16, True), (torch.float32, False)])
def test_half_precision_has_a_kernel_of_its_own(
    tmp_path: Path, dtype: torch.dtype, *, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.expert_worker.engine.attention import _Kernel  # noqa: PLC0415 - imports transformers

    passes = Passes(opened(tiny_base(tmp_path), dtype), page_positions=256)
    calls: list[int] = []
    inner = _Kernel.__call__

    def counted(kernel: _Kernel, layer: int, *rest: Any) -> torch.Tensor:
        calls.append(layer)
        return inner(kernel, layer, *rest)

    monkeypatch.setattr(_Kernel, "__call__", counted)
    passes.logits(ids_of(5), 5)
    assert calls == ([0, 1] if has_kernel else [])


def test_weights_are_computed_with_as_they_are_stored(tmp_path: Path) -> None:
    assert opened(tiny_base(tmp_path)).dtype == torch.float32


INT8_TOLERANCE = 0.05
"""Most that logits may differ where keys and values are rounded to int8, beside what half precision does."""


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_keys_and_values_in_int8_move_logits_little(tmp_path: Path, dtype: torch.dtype) -> None:
    base, ids = opened(tiny_base(tmp_path), dtype), ids_of(ROWS)
    whole = Passes(base, page_positions=256).logits(ids, ROWS)
    for chunk in (16, ROWS):
        found = Passes(base, page_positions=256, kv_dtype=torch.int8).logits(ids, chunk, scattered=True)[-1]
        assert (found - whole[-1]).norm() < (INT8_TOLERANCE + TOLERANCE[dtype]) * whole[-1].norm()


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantised_base_is_that_of_transformers(tmp_path: Path, how: str) -> None:
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 - seconds

    folder, ids = tiny_base(tmp_path, intermediate_size=128), ids_of(ROWS)
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if how == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    config = BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]  # theirs
    theirs = oracle(folder, quantization_config=config, device_map={"": DEVICE}, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids], device=DEVICE)).logits[0, -1].float()
    found = Passes(opened(folder, torch.bfloat16, quantisation=how), page_positions=256).logits(ids, ROWS)[-1]
    assert (found - wanted).norm() < TOLERANCE[torch.bfloat16] * wanted.norm()
