"""Tokens are chosen as transformers' processors would have them chosen, whoever else is in the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.expert_worker.engine.sampling import Choice, Sampling, SamplingRow, _penalised, _weights, choose

# quarters, so that equals are common
LOGITS = st.lists(st.integers(-20, 20).map(lambda quarters: quarters / 4), min_size=2, max_size=24)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 7, 4_000_000_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.93, 0.51, 0.07, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.37, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.9, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -1.1]),
    seed=st.integers(0, 2**64 - 1),
    top_logprobs=st.sampled_from([0, 2, 20]),
)
IDS = st.lists(st.integers(0, 1), max_size=6)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def expected(logits: torch.Tensor, sampling: Sampling, ids: list[int]) -> torch.Tensor:
    """Probabilities as transformers has them, from penalised logits."""
    from transformers import (  # noqa: PLC0415 - seconds
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores = logits.double()
    for warper in warpers:
        scores = warper(torch.tensor([ids]), scores)
    return scores.softmax(-1)


@settings(max_examples=80, deadline=None)
@given(LOGITS, SAMPLINGS, IDS, IDS)
def test_what_remains_of_the_probabilities_is_what_transformers_leaves(
    values: list[float], sampling: Sampling, prompt: list[int], answer: list[int]
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor  # noqa: PLC0415 - seconds

    logits = torch.tensor([values])
    penalised = _penalised(logits, [SamplingRow(sampling, prompt, answer)])

    theirs = logits.clone()
    if prompt or answer:
        theirs = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(torch.tensor([prompt + answer]), logits)
    for token_id in set(answer):
        count = answer.count(token_id)
        theirs[0, token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
    torch.testing.assert_close(penalised, theirs)

    assume(sampling.temperature > 0)
    weights = _weights(penalised, [sampling])
    ours = weights / weights.sum(-1, keepdim=True)
    probabilities = expected(penalised, sampling, prompt + answer)
    # which of equals stay at the limit of top_p is ours to say, how many is not
    torch.testing.assert_close(ours.sort(-1).values, probabilities.sort(-1).values, rtol=1e-9, atol=1e-12)
    assert weights.amax() == 1.0


@settings(max_examples=50, deadline=None)
@given(LOGITS, st.sampled_from([0.07, 0.51, 0.93]))
def test_of_equals_at_the_limit_of_top_p_the_lowest_ids_stay(values: list[float], top_p: float) -> None:
    logits = torch.tensor([values])
    kept = _weights(logits, [Sampling(top_p=top_p)])[0] > 0
    least = min(value for value, stays in zip(values, kept, strict=True) if stays)
    equals = [bool(stays) for value, stays in zip(values, kept, strict=True) if value == least]
    assert equals == sorted(equals, reverse=True)
    assert all(stays == (value > least) for value, stays in zip(values, kept, strict=True) if value != least)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SAMPLINGS, IDS, IDS), min_size=1, max_size=5), st.data())
def test_a_choice_does_not_depend_on_who_else_is_in_the_batch(
    wanted: list[tuple[Sampling, list[int], list[int]]], data: st.DataObject
) -> None:
    values = data.draw(
        st.lists(
            st.lists(st.floats(-30, 30, width=32), min_size=9, max_size=9), min_size=len(wanted), max_size=len(wanted)
        )
    )
    logits = torch.tensor(values, dtype=torch.float32)
    before = logits.clone()
    rows = [SamplingRow(*each) for each in wanted]
    together = choose(logits, rows, 8)
    for index, row in enumerate(rows):
        (alone,) = choose(logits[index : index + 1], [row], 8)
        assert together[index] == alone
        assert isinstance(alone, Choice)
        assert alone.token_id < 8
        assert alone.logprob == pytest.approx(float(logits[index, :8].log_softmax(-1)[alone.token_id]), abs=1e-5)
        assert len(alone.top) == min(row.sampling.top_logprobs, 8)
    assert torch.equal(logits, before)


@settings(max_examples=80, deadline=None)
@given(LOGITS, st.sets(st.integers(0, 23), max_size=23), SAMPLINGS, IDS, IDS)
def test_what_is_masked_is_never_chosen(
    values: list[float], masked: set[int], sampling: Sampling, prompt: list[int], answer: list[int]
) -> None:
    masked = {token_id for token_id in masked if token_id < len(values)}
    assume(len(masked) < len(values))
    logits = torch.tensor([[-math.inf if token_id in masked else value for token_id, value in enumerate(values)]])
    for seed in range(4):
        (choice,) = choose(logits, [SamplingRow(Sampling(1.5, seed=seed), [0])])
        assert isinstance(choice, Choice)
        assert choice.token_id not in masked
    (choice,) = choose(logits, [SamplingRow(sampling, prompt, answer)])
    assert isinstance(choice, Choice)
    assert choice.token_id not in masked
    assert not masked.intersection(token_id for token_id, _ in choice.top)
