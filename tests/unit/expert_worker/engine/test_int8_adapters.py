"""Experts whose A and B are held as int8: how far they move, and that everything else stays."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from services.expert_worker.engine.folding import fold
from services.expert_worker.engine.int8 import dequantise
from services.expert_worker.engine.mixing import Mixer
from tests.adapters import KINDS, ToyBase, arena_of, toy_package

if TYPE_CHECKING:
    from services.expert_worker.engine.expert import AdapterExpert


def both(kind: str, base: ToyBase, **options: Any) -> tuple[AdapterExpert, AdapterExpert]:
    """An expert as it is, and as int8."""
    facts, adapter = toy_package(kind, **options)
    made = [fold(adapter, facts, base, int8=int8) for int8 in (False, True)]
    whole, small = (each.build(each.flat) for each in made)
    return whole, small


def as_floats(expert: AdapterExpert) -> AdapterExpert:
    """The expert whose rows are what those in int8 stand for."""
    pieces = {}
    for name, piece in expert.pieces.items():
        if piece.a is None or piece.b is None or piece.a_scales is None or piece.b_scales is None:
            pieces[name] = piece
            continue
        a, b = dequantise(piece.a, piece.a_scales), dequantise(piece.b, piece.b_scales)
        pieces[name] = dataclasses.replace(piece, a=a, b=b, a_scales=None, b_scales=None)
    return dataclasses.replace(expert, digest="sha256:11", pieces=pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_moves_by_a_254th_of_its_largest_number_at_most_and_nothing_else_moves(
    kind: str, dtype: torch.dtype
) -> None:
    whole, small = both(kind, ToyBase(dtype))
    for name, piece in small.pieces.items():
        of = whole.pieces[name]
        for numbers, scales, rows in ((piece.a, piece.a_scales, of.a), (piece.b, piece.b_scales, of.b)):
            assert (numbers is None, scales is None) == (rows is None, rows is None)
            if numbers is not None and scales is not None and rows is not None:
                assert (numbers.dtype, scales.dtype) == (torch.int8, torch.float32)
                lost = (dequantise(numbers, scales) - rows.float()).abs()
                assert (lost <= rows.float().abs().amax(-1, keepdim=True) * (1 + 1e-5) / 254).all()
        for kept, wanted in ((piece.u, of.u), (piece.o, of.o), (piece.c, of.c)):
            assert (kept is None) == (wanted is None)
            assert kept is None or wanted is None or torch.equal(kept, wanted)
        assert (piece.rank, piece.gates_bias) == (of.rank, of.gates_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_its_rounded_rows_say(kind: str) -> None:
    base = ToyBase()
    whole, small = both(kind, base)
    mixer = Mixer(base.causal_lm, base.projections, arena_of(base, 64))
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    answers = []
    for expert in (small, as_floats(small), dataclasses.replace(whole, digest="sha256:22")):
        mixer.begin([(4, ((expert, 0.8),))])
        answers.append(base.causal_lm(x[None])[0])
        mixer.end()
    assert torch.equal(answers[0], answers[1])
    assert (answers[0] - answers[2]).norm() / answers[2].norm() < 0.1  # these are large beside their base
    assert torch.equal(answers[0], answers[2]) == (kind == "ia3")


def test_it_takes_a_quarter_of_float32() -> None:
    whole, small = both("lora", ToyBase(), rank=16)
    assert small.size_bytes < 0.4 * whole.size_bytes  # rows of this base are short, and each has its scale
