"""The checks that `make test-gpu` makes of a CUDA device, made of the CPU: they are right, and so is it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import composition
from tests.adapters import KINDS
from tests.bases import tiny_base
from tests.recordings import as_on_cuda, on_tape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.expert_worker.engine.mixing import Method

DEVICE = torch.device("cpu")
DTYPES = composition.TOLERANCE


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_steps(folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    composition.assert_recorded_steps(folder, DEVICE, dtype, on_tape)


async def test_the_whole_engine_with_recorded_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    await composition.assert_engine_answers(folder, DEVICE, torch.float32, on_tape)


def test_products_with_rows_of_experts() -> None:
    composition.assert_products(DEVICE)


def test_tokens_are_chosen_alike() -> None:
    composition.assert_chooses(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
async def test_the_whole_engine_with_several_mixtures(folder: Path, dtype: torch.dtype) -> None:
    await composition.assert_engine_answers(folder, DEVICE, dtype)


def test_a_device_that_computes_otherwise_does_not_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks are for: an update that comes to a hundredth too much is seen."""
    from services.expert_worker.engine.projection import Update  # noqa: PLC0415 - beside its only use

    inner = Update.shrunk

    def too_much(update: Update, x: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        return 1.01 * inner(update, x, stack)

    wanted = composition.composed_logits(folder, DEVICE, torch.float32)
    monkeypatch.setattr(Update, "shrunk", too_much)
    with pytest.raises(AssertionError):
        composition.assert_batches_compose(DEVICE, torch.float32, None)
    found = composition.composed_logits(folder, DEVICE, torch.float32)
    assert float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) > 2e-5
