"""The arithmetic, the memory and the compute thread of a worker on a CUDA device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hocket.errors import HocketError, Reason
from hocket.packages import model as m
from hocket.packages.apr.quantization import dequantized_model, quantized_model
from hocket.packages.model import QuantKind
from services.expert_worker.batching import Batcher
from services.expert_worker.device import budget_bytes, choose_device
from services.expert_worker.journal import Journal
from services.expert_worker.loader import Prepared, place, prepare
from tests.builders import QUANTIZABLE, apr_bytes, dense, linear, models
from tests.worker_numerics import (
    APPROXIMATE,
    RECORDED_MIN,
    answer,
    assert_meets_the_oracle,
    assert_meets_the_record,
    on_device,
    opened,
    random_models,
    recorded,
    tensor_experts,
)

DEVICE = "cuda:0"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("layout", models())
def test_every_layout_answers_like_the_reference(layout: str) -> None:
    rows = np.random.default_rng(3).normal(size=(64, 2)).astype(np.float32) * 3
    assert_meets_the_oracle(models()[layout], rows, DEVICE)


@pytest.mark.parametrize("width", [1, 5, 33, 784])
def test_random_models_answer_like_the_reference(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = rng.normal(size=(50, width)).astype(np.float32)
    for model in random_models(rng, width):
        assert_meets_the_oracle(model, rows, DEVICE)


def test_recorded_answers_of_the_reference_are_met() -> None:
    assert sum(assert_meets_the_record(entry, DEVICE) for entry in recorded()) >= RECORDED_MIN


def test_near_ties_of_clusters_fall_as_in_the_reference() -> None:
    rng = np.random.default_rng(5)
    grid = np.array([0.0, 1.0, 1.0 + 2.0**-23, 1e-3, -1.0, 3.0, 1e-30], np.float32)
    for _ in range(20):
        centroids, rows = rng.choice(grid, (6, 4)), rng.choice(grid, (30, 4))
        assert_meets_the_oracle(m.KMeans(6, centroids), rows, DEVICE)


def test_batch_mates_move_what_is_a_sum_by_one_step_at_most_and_nothing_else() -> None:
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(64, 300)).astype(np.float32)
    for model in random_models(rng, 300):
        for expert in on_device(model, DEVICE):
            together = answer(expert, rows, DEVICE)
            alone = np.concatenate([answer(expert, row[None], DEVICE) for row in rows])
            if isinstance(model, (*APPROXIMATE, m.MixtureOfExperts)) or getattr(model, "weighted", False):
                assert (np.abs(together - alone) <= np.spacing(np.maximum(np.abs(together), np.abs(alone)))).all()
            else:
                assert np.array_equal(together, alone)


def test_the_device_and_the_host_agree() -> None:
    rng = np.random.default_rng(9)
    rows = rng.normal(size=(100, 40)).astype(np.float32)
    for model in random_models(rng, 40):
        for there, here in zip(on_device(model, DEVICE), on_device(model), strict=True):
            assert np.allclose(answer(there, rows, DEVICE), answer(here, rows), rtol=3e-7, atol=0)


def test_parameters_take_the_device_memory_they_are_accounted_for() -> None:
    model = m.KMeans(512, np.zeros((512, 1024), np.float32))
    prepared = prepare(opened(apr_bytes(model)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    experts = place(prepared, torch.device(DEVICE))
    taken = torch.cuda.memory_allocated(DEVICE) - before
    assert prepared.size_bytes <= taken <= prepared.size_bytes + 512 * len(prepared.tensors)
    del experts
    assert torch.cuda.memory_allocated(DEVICE) == before


@pytest.mark.parametrize("kind", QuantKind)
@pytest.mark.parametrize("layout", QUANTIZABLE)
def test_quantised_models_become_values_on_the_device(layout: str, kind: QuantKind) -> None:
    model = quantized_model(models()[layout], kind)
    rows = np.random.default_rng(3).normal(size=(64, 2)).astype(np.float32)
    plain: Any = dequantized_model(model)

    given = [answer(expert, rows, DEVICE) for expert in on_device(model, DEVICE)]

    wanted = [answer(expert, rows, DEVICE) for expert in on_device(plain, DEVICE)]
    assert [one.tobytes() for one in given] == [other.tobytes() for other in wanted]
    for expert in plain.experts if layout == "MixtureOfExperts" else (plain,):
        assert_meets_the_oracle(expert, rows, DEVICE)


@pytest.mark.parametrize("half", [False, True])
def test_quantised_and_halved_parameters_take_what_they_are_accounted_for(half: bool) -> None:  # noqa: FBT001 - a case
    weights = np.random.default_rng(0).normal(size=(1024, 2048)).astype(np.float32)
    model = quantized_model(dense((weights, weights[0], "relu")), QuantKind.Q4_0)
    prepared = prepare(opened(apr_bytes(model)), half=half)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    (expert,) = tensor_experts(prepared, DEVICE)
    taken = torch.cuda.memory_allocated(DEVICE) - before
    assert prepared.size_bytes == (2 if half else 4) * weights.size + 4 * 2048
    assert prepared.size_bytes <= taken <= prepared.size_bytes + 1024
    del expert


def test_halved_weights_answer_as_rounded_ones() -> None:
    rows = np.random.default_rng(3).normal(size=(40, 3)).astype(np.float32)
    weights = np.random.default_rng(4).normal(size=(3, 5)).astype(np.float32)
    rounded = weights.astype(np.float16).astype(np.float32)
    for make in (lambda values: linear(*values[:, 0].tolist()), lambda values: dense((values, weights[0], "softmax"))):
        (given,) = tensor_experts(prepare(opened(apr_bytes(make(weights))), half=True), DEVICE)
        (wanted,) = on_device(make(rounded), DEVICE)
        np.testing.assert_allclose(answer(given, rows, DEVICE), answer(wanted, rows, DEVICE), rtol=3e-7)


def test_a_device_without_room_is_a_refusal_that_passes() -> None:
    free, _ = torch.cuda.mem_get_info(DEVICE)
    sparse = torch.empty(1, dtype=torch.uint8).expand(2 * free)

    class Unpinned:
        """A tensor larger than the device, which nobody has to hold on the host."""

        nbytes = 2 * free

        def pin_memory(self) -> Unpinned:
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
            return torch.empty(sparse.shape, dtype=torch.uint8, device=device) if non_blocking else sparse

    too_large: Any = Prepared("sha256:0", (Unpinned(),), lambda _moved: ())  # type: ignore[arg-type]  # a stand-in
    with pytest.raises(HocketError) as refusal:
        place(too_large, torch.device(DEVICE))
    assert refusal.value.reason is Reason.DEVICE_MEMORY
    assert refusal.value.retry_after_seconds
    assert on_device(models()["Ridge"], DEVICE)


def test_the_device_is_found_and_has_a_budget() -> None:
    device = choose_device("auto")
    assert str(device) == DEVICE
    free, total = torch.cuda.mem_get_info(device)
    assert 0 < budget_bytes(device) < free <= total


async def test_concurrent_requests_share_passes_on_the_device() -> None:
    rng = np.random.default_rng(11)
    experts = [expert for model in random_models(rng, 16) for expert in on_device(model, DEVICE)]
    asked = [(experts[n % len(experts)], rng.normal(size=(1 + n % 4, 16)).astype(np.float32)) for n in range(200)]
    batcher = Batcher(torch.device(DEVICE), 1, 1000, Journal(Path("kept in memory")))
    batcher.start()
    futures = [batcher.submit(expert, rows, lambda: None) for expert, rows in asked]
    answers = await asyncio.gather(*futures)
    await batcher.stop()
    for (expert, rows), given in zip(asked, answers, strict=True):
        assert np.allclose(given.output, answer(expert, rows, DEVICE), rtol=3e-7, atol=1e-7)
