"""Composed experts on a CUDA device, from the package to the text: the checks that the CPU passes as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import composition
from tests.adapters import KINDS
from tests.bases import tiny_base
from tests.passes import KINDS as BASES

if TYPE_CHECKING:
    from pathlib import Path

    from services.expert_worker.engine.mixing import Method

DEVICE = torch.device("cuda:0")
DTYPES = composition.TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bases") / "tiny", "qwen2")  # it has biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", composition.METHODS)
def test_batches_of_every_kind_of_expert_compose(dtype: torch.dtype, method: Method | None) -> None:
    composition.assert_batches_compose(DEVICE, dtype, method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_folded_against_the_weights_of_the_device(dtype: torch.dtype, kind: str) -> None:
    composition.assert_folds(DEVICE, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_placed_as_they_were_prepared(folder: Path, dtype: torch.dtype) -> None:
    composition.assert_places(folder, DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_composed_experts(folder: Path, dtype: torch.dtype) -> None:
    composition.assert_logits_compose(folder, DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma3_text"])
def test_recorded_steps(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    from services.expert_worker.engine.graphs import cuda_recorder  # noqa: PLC0415 - imports transformers

    base = tiny_base(tmp_path / "tiny", kind, **BASES[kind])
    composition.assert_recorded_steps(base, DEVICE, dtype, cuda_recorder(DEVICE))


def test_recordings_that_go_take_nothing_from_those_that_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.expert_worker.engine import graphs  # noqa: PLC0415 - imports transformers

    monkeypatch.setattr(graphs, "KNOWN_MAX", 3)
    for _ in range(20):  # as many streams as torch has in its pool, and more recordings
        composition.assert_recorded_steps(folder, DEVICE, torch.bfloat16, graphs.cuda_recorder(DEVICE))


def test_a_step_that_cannot_be_recorded_leaves_the_device_as_it_was() -> None:
    from services.expert_worker.engine.graphs import cuda_recorder  # noqa: PLC0415 - imports transformers

    record = cuda_recorder(DEVICE)
    numbers = torch.ones(3, device=DEVICE)
    before = torch.cuda.current_stream(DEVICE)
    with pytest.raises(RuntimeError):
        record(lambda: numbers.mul_(numbers.sum().item()))
    assert torch.cuda.current_stream(DEVICE) == before
    play = record(lambda: numbers.add_(1))
    numbers.zero_()
    play()
    play()
    assert numbers.tolist() == [2, 2, 2]


async def test_the_whole_engine_with_recorded_steps(folder: Path) -> None:
    from services.expert_worker.engine.graphs import cuda_recorder  # noqa: PLC0415 - imports transformers

    await composition.assert_engine_answers(folder, DEVICE, torch.bfloat16, cuda_recorder(DEVICE))


def test_nothing_before_the_logits_waits_for_the_device(folder: Path) -> None:
    from services.expert_worker.engine.graphs import cuda_recorder  # noqa: PLC0415 - imports transformers

    composition.assert_steps_do_not_wait(folder, DEVICE, torch.bfloat16, cuda_recorder(DEVICE))


def test_products_with_rows_of_experts() -> None:
    composition.assert_products(DEVICE)


def test_tokens_are_chosen_alike() -> None:
    composition.assert_chooses(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
async def test_the_whole_engine_with_several_mixtures(folder: Path, dtype: torch.dtype) -> None:
    await composition.assert_engine_answers(folder, DEVICE, dtype)
