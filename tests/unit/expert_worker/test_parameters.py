"""Parameters become what computes on the device they are moved to: quantised blocks, and weights in half precision."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hocket.errors import HocketError, Reason
from hocket.packages import model as m
from hocket.packages.apr import quantization
from hocket.packages.apr.quantization import dequantize, dequantized_model, part_of, quantize, quantized_model
from hocket.packages.model import QuantKind
from services.expert_worker.app import WorkerApp
from services.expert_worker.compute import stack
from services.expert_worker.layout import lay_out
from services.expert_worker.loader import prepare
from services.expert_worker.parameters import Blocks, move, parameter, weights_type
from services.expert_worker.settings import WorkerSettings
from tests.builders import QUANTIZABLE, apr_bytes, dense, floats, linear, mixture, models
from tests.worker_numerics import answer, assert_meets_the_oracle, lone, on_device, opened, tensor_experts

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, array_shapes(max_dims=3, max_side=12), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(QuantKind),
)
def test_blocks_become_the_values_that_they_stand_for(values: Any, kind: QuantKind) -> None:
    quantized = quantize(values, kind)
    blocks = parameter(quantized)

    (tensor,) = move((blocks,), CPU)

    assert isinstance(blocks, Blocks)
    assert blocks.nbytes == tensor.untyped_storage().nbytes() == 4 * values.size
    np.testing.assert_array_equal(tensor.numpy(), dequantize(quantized))


@pytest.mark.parametrize("kind", QuantKind)
def test_many_blocks_become_values_part_by_part(kind: QuantKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.expert_worker.parameters._BLOCKS_AT_ONCE", 3)
    quantized = quantize(np.random.default_rng(0).normal(size=(9, 41)).astype(np.float32), kind)

    (tensor,) = move((parameter(quantized, torch.float64),), CPU)

    np.testing.assert_array_equal(tensor.numpy(), dequantize(quantized).astype(np.float64))


@pytest.mark.parametrize("kind", QuantKind)
@pytest.mark.parametrize("layout", QUANTIZABLE)
def test_a_quantised_model_serves_as_what_its_blocks_stand_for(layout: str, kind: QuantKind) -> None:
    model = quantized_model(models()[layout], kind)
    rows = np.random.default_rng(3).normal(size=(40, 2)).astype(np.float32)

    given = [answer(expert, rows) for expert in on_device(model)]

    plain: Any = dequantized_model(model)
    for one, other in zip(given, on_device(plain), strict=True):
        assert one.tobytes() == answer(other, rows).tobytes()
    for expert in plain.experts if layout == "MixtureOfExperts" else (plain,):
        assert_meets_the_oracle(expert, rows)


@pytest.mark.parametrize("kind", QuantKind)
@pytest.mark.parametrize("layout", QUANTIZABLE)
def test_the_facts_say_what_a_quantised_model_takes_when_it_computes(layout: str, kind: QuantKind) -> None:
    package = opened(apr_bytes(quantized_model(models()[layout], kind)))
    prepared = prepare(package)

    held = sum(tensor.untyped_storage().nbytes() for tensor in move(prepared.tensors, CPU))

    assert package.facts.parameter_bytes == prepared.size_bytes == held
    plain = prepare(opened(apr_bytes(models()[layout])))
    assert plain.size_bytes == prepared.size_bytes


class TestMemory:
    """What is laid out has some values in progress, and never a second copy of all."""

    ROWS = np.zeros((64, 2**14), np.float32)
    CLASSES = np.arange(64, dtype=np.uint64)

    @pytest.mark.parametrize(
        "model",
        [
            m.KMeans(64, ROWS),
            quantized_model(m.KMeans(64, ROWS), QuantKind.Q4_0),
            m.KNearestNeighbors(1, ROWS, CLASSES),
            m.GaussianNB(np.ones(64, np.float32), ROWS, ROWS + 1, CLASSES),
            quantized_model(linear(*ROWS.reshape(-1)[: 2**19].tolist()), QuantKind.Q8_0),
            dense((ROWS, np.zeros(2**14, np.float32), "identity")),
        ],
        ids=["clusters", "quantised clusters", "neighbours", "naive Bayes", "quantised weights", "layers"],
    )
    def test_laying_out_takes_little_memory_beside_the_parameters(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("layout", "parameters"):
            monkeypatch.setattr(f"services.expert_worker.{module}.VALUES_AT_ONCE", 2**15)
        tracemalloc.start()
        try:
            lay_out(model, 64, half=True)
            peak_bytes = tracemalloc.get_traced_memory()[1]  # of numpy; the parameters are torch's
        finally:
            tracemalloc.stop()

        assert peak_bytes < self.ROWS.nbytes / 2

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([None, *QuantKind]), st.data())
    def test_a_part_of_the_weights_is_that_part_of_their_values(
        self, rows: int, width: int, kind: QuantKind | None, data: st.DataObject
    ) -> None:
        values = np.random.default_rng(rows * width).normal(size=(rows, width)).astype(np.float32)
        weights = values if kind is None else quantize(values, kind)
        start = data.draw(st.integers(0, values.size))
        stop = data.draw(st.integers(start, values.size))

        assert np.array_equal(part_of(weights, start, stop), quantization.floats(weights).reshape(-1)[start:stop])

    def test_many_rows_are_laid_out_as_few_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(4)
        rows, classes = rng.normal(size=(23, 7)).astype(np.float32), np.arange(23, dtype=np.uint64)
        several: list[Any] = [
            m.KMeans(23, rows),
            quantized_model(m.KMeans(23, rows), QuantKind.Q8_0),
            m.GaussianNB(np.full(23, 1 / 23, np.float32), rows, rows**2 + 1, classes),
        ]
        whole = [move(lay_out(model, 23, half=False)[0], CPU) for model in several]
        monkeypatch.setattr("services.expert_worker.layout.VALUES_AT_ONCE", 20)

        for model, tensors in zip(several, whole, strict=True):
            for one, other in zip(tensors, move(lay_out(model, 23, half=False)[0], CPU), strict=True):
                assert torch.equal(one, other)


class TestHalf:
    """Held in float16; what is computed with the rounded weights is what is always computed."""

    def halved(self, model: Any) -> Any:
        return tensor_experts(prepare(opened(apr_bytes(model)), half=True))

    def rounded(self, array: Any) -> Any:
        return array.astype(np.float16).astype(np.float32)

    @pytest.mark.parametrize(
        "model",
        [
            m.LinearRegression(floats(0.1, -3.3), 0.7),
            m.LogisticRegression(floats(0.1, -3.3), 0.7),
            mixture(linear(0.1, 0.3), linear(-0.7, 3.1)),
            quantized_model(linear(0.1, 0.3), QuantKind.Q8_0),
        ],
    )
    def test_linear_models_answer_with_rounded_weights(self, model: Any) -> None:
        rows = np.random.default_rng(3).normal(size=(40, 2)).astype(np.float32)
        plain: Any = dequantized_model(model)
        members = plain.experts if isinstance(plain, m.MixtureOfExperts) else (plain,)

        for expert, member in zip(self.halved(model), members, strict=True):
            wanted = replace(member, coefficients=self.rounded(member.coefficients))
            assert expert.kernel.weights.dtype is torch.float16
            assert answer(expert, rows).tobytes() == answer(lone(wanted), rows).tobytes()

    def test_networks_and_margins_do_too(self) -> None:
        rows = np.random.default_rng(3).normal(size=(40, 2)).astype(np.float32)
        network, margin = dense(), m.LinearSVM(floats(0.1, -3.3), 0.7)
        layers = tuple(replace(layer, weights=self.rounded(layer.weights)) for layer in network.layers)

        (expert,) = self.halved(network)
        assert answer(expert, rows).tobytes() == answer(lone(m.DenseNetwork(layers)), rows).tobytes()
        (expert,) = self.halved(margin)
        wanted = replace(margin, weights=self.rounded(margin.weights))
        assert answer(expert, rows).tobytes() == answer(lone(wanted), rows).tobytes()

    def test_weights_take_half_the_memory(self) -> None:
        model = linear(*np.arange(100.0).tolist())

        assert prepare(opened(apr_bytes(model))).size_bytes == 408
        assert prepare(opened(apr_bytes(model)), half=True).size_bytes == 208
        assert prepare(opened(apr_bytes(quantized_model(model, QuantKind.Q4_0))), half=True).size_bytes == 208

    @pytest.mark.parametrize("layout", ["KMeans", "KNearestNeighbors", "GaussianNB", "RandomForestRegressor"])
    def test_what_decides_on_single_steps_of_a_value_is_left_alone(self, layout: str) -> None:
        package = opened(apr_bytes(models()[layout]))

        assert prepare(package, half=True).size_bytes == package.facts.parameter_bytes

    @pytest.mark.parametrize(("largest", "dtype"), [(65504, "16"), (65536, "32"), (2.0**-14, "16"), (6e-5, "32")])
    def test_weights_that_float16_cannot_hold_stay_float32(self, largest: float, dtype: str) -> None:
        chosen = weights_type(floats(0, -largest), half=True)

        assert str(chosen) == f"torch.float{dtype}"
        assert weights_type(floats(1), half=False) is torch.float32

    def test_experts_of_one_precision_share_a_pass_and_others_do_not(self) -> None:
        (half,), plain = self.halved(linear()), lone(linear())
        (other,) = self.halved(linear(5, 6))

        assert half.family == other.family != plain.family
        rows = floats([1, 2], [3, 4], [5, 6])
        together = stack([half.kernel, other.kernel], [1, 2])(torch.from_numpy(rows)).numpy()
        apart = np.concatenate([answer(half, rows[:1]), answer(other, rows[1:])])
        assert together.tobytes() == apart.tobytes()


def test_half_precision_needs_a_cuda_device(tmp_path: Path) -> None:
    settings = WorkerSettings(data_dir=tmp_path, trust_dir=tmp_path, device="cpu", half=True)
    nobody: Any = None

    with pytest.raises(HocketError, match=r"worker\.half is for CUDA devices") as refusal:
        WorkerApp(settings, nobody, "local:worker")

    assert refusal.value.reason is Reason.BAD_REQUEST


def test_nothing_of_a_package_s_memory_is_kept() -> None:
    package: Any = opened(apr_bytes(quantized_model(linear(), QuantKind.Q8_0)))
    (expert,) = tensor_experts(prepare(package))

    del package
    assert answer(expert, [[1, 1]]).shape == (1, 1)
