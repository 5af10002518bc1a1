from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from services.expert_worker.engine.int8 import dequantise, quantise

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays.arrays("float32", (3, 8), elements=FLOATS))
@settings(max_examples=60)
def test_no_number_loses_more_than_half_a_step_of_its_row(array: object) -> None:
    rows = torch.tensor(array)
    numbers, scales = quantise(rows)
    assert (numbers.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (3,))
    most = rows.abs().amax(-1, keepdim=True).double()
    lost = (dequantise(numbers, scales).double() - rows.double()).abs()
    assert (lost <= torch.where(most < 2**-119, most, most / 254 * (1 + 1e-6) + 2**-149)).all()


def test_the_largest_number_of_a_row_is_kept_and_signs_are_symmetric() -> None:
    rows = torch.tensor([[2.0, -1.0, 0.0], [-5.0, 5.0, 1e-9]])
    numbers, scales = quantise(rows)
    assert numbers.tolist() == [[127, -64, 0], [-127, 127, 0]]
    torch.testing.assert_close(dequantise(numbers, scales)[:, 0], rows[:, 0])
    assert torch.equal(quantise(-rows)[0], -numbers)


@pytest.mark.parametrize("most", [0.0, 1e-45, 2e-43, 1e-38])
def test_rows_too_small_for_a_scale_become_zeros(most: float) -> None:
    numbers, scales = quantise(torch.tensor([[most, -most]]))
    assert (numbers.tolist(), scales.tolist()) == ([[0, 0]], [0.0])
    assert quantise(torch.tensor([[1e-35, 0.0]]))[0].tolist() == [[127, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_number_that_is_not_finite_does_not_hide_it_and_spoils_no_other(bad: float) -> None:
    rows = torch.tensor([[1.0, bad, 0.5], [1.0, 0.0, 0.5]])
    back = dequantise(*quantise(rows))
    assert not back[0].isfinite().any()
    torch.testing.assert_close(back[1], rows[1], atol=1 / 254, rtol=0)


def test_a_row_depends_on_nothing_but_itself() -> None:
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    numbers, scales = quantise(rows)
    alone = [quantise(row) for row in rows]
    assert torch.equal(numbers, torch.stack([each for each, _ in alone]))
    assert torch.equal(scales, torch.stack([each for _, each in alone]))
