from __future__ import annotations

import hashlib
import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.sampling import Choice, Sampling, SamplingRow, choose, noise

LOGITS = [1.0, 3.0, -2.0, 3.0, 0.5, -math.inf]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def chosen(
    logits: list[float], sampling: Sampling, prompt: tuple[int, ...] = (), answer: tuple[int, ...] = ()
) -> Choice:
    (choice,) = choose(torch.tensor([logits]), [SamplingRow(sampling, prompt, answer)])
    assert isinstance(choice, Choice)
    return choice


def draws(logits: list[float], sampling: dict[str, Any], count: int = 4000) -> list[int]:
    """What so many seeds draw."""
    batch = torch.tensor([logits]).expand(count, -1)
    choices = choose(batch, [SamplingRow(Sampling(**sampling, seed=seed), [0]) for seed in range(count)])
    assert all(isinstance(choice, Choice) for choice in choices)
    return [choice.token_id for choice in choices if isinstance(choice, Choice)]


def test_temperature_0_takes_the_most_probable_token_and_of_equals_the_lowest_id() -> None:
    choice = chosen(LOGITS, Sampling(temperature=0.0, top_k=3, top_p=0.2, min_p=0.9))
    assert choice.token_id == 1
    assert choice.logprob == pytest.approx(float(torch.tensor(LOGITS).log_softmax(-1)[1]))


def test_logprobs_are_those_before_penalties_temperature_and_truncation() -> None:
    sampling = Sampling(temperature=3.0, top_k=1, repetition_penalty=50.0, presence_penalty=9.0, top_logprobs=4)
    choice = chosen(LOGITS, sampling, prompt=(1,), answer=(3,))
    expected = torch.tensor(LOGITS).log_softmax(-1).tolist()
    assert choice.token_id == 0
    assert choice.logprob == pytest.approx(expected[0])
    assert [token_id for token_id, _ in choice.top] == [1, 3, 0, 4]
    assert [logprob for _, logprob in choice.top] == pytest.approx([expected[token_id] for token_id in (1, 3, 0, 4)])


def test_tokens_of_probability_0_are_not_among_the_most_probable() -> None:
    assert [token_id for token_id, _ in chosen(LOGITS, Sampling(0.0, top_logprobs=20)).top] == [1, 3, 0, 4, 2]


def test_of_equally_probable_tokens_those_with_the_lowest_ids_are_reported() -> None:
    assert [token_id for token_id, _ in chosen([0.0] * 9, Sampling(0.0, top_logprobs=3)).top] == [0, 1, 2]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_of_many_seeds_have_the_distribution_that_is_asked_for(sampling: dict[str, float]) -> None:
    logits = [0.2, 1.7, -0.3, 0.9, -1.1, 0.0, 1.1, -0.6]
    weights = [math.exp(value / sampling["temperature"]) for value in logits]
    ranked = sorted(range(len(weights)), key=lambda token_id: -weights[token_id])
    ranked = ranked[: int(sampling.get("top_k", 8))]
    total, before, kept = sum(weights[token_id] for token_id in ranked), 0.0, []
    for token_id in ranked:
        if before < sampling.get("top_p", 1.0) * total and weights[token_id] >= sampling.get("min_p", 0) * max(weights):
            kept.append(token_id)
        before += weights[token_id]
    counts = Counter(draws(logits, sampling))
    assert set(counts) == set(kept)
    mass = sum(weights[token_id] for token_id in kept)
    expected = [4000 * weights[token_id] / mass for token_id in kept]
    assert stats.chisquare([counts[token_id] for token_id in kept], expected).pvalue > 0.01


def test_a_large_vocabulary_is_truncated_as_a_small_one() -> None:
    size = 5000
    flat = torch.zeros(2, size)
    flat[1, 4321] = 12.0
    rows = [
        SamplingRow(Sampling(1.0, top_p=top_p, top_k=top_k, seed=5), [0]) for top_k, top_p in [(0, 0.5), (2000, 0.9)]
    ]
    first, second = choose(flat, rows)
    assert isinstance(first, Choice)
    assert isinstance(second, Choice)
    assert first.token_id == math.floor(noise(5, 1) * size * 0.5)
    assert second.token_id == 4321


def test_noise_is_a_documented_function_of_seed_and_position() -> None:
    digest = hashlib.blake2b(bytes([7, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]), digest_size=8).digest()
    assert noise(7, 258) == (int.from_bytes(digest, "little") >> 11) / 2**53
    assert noise(2**64 - 1, 0) != noise(0, 0)


def test_noise_is_uniform_over_seeds_and_over_positions() -> None:
    for numbers in ([noise(seed, 3) for seed in range(3000)], [noise(3, position) for position in range(3000)]):
        assert all(0 <= number < 1 for number in numbers)
        assert stats.kstest(numbers, "uniform").pvalue > 0.01


def test_the_highest_noise_there_is_still_draws_a_token_that_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.expert_worker.engine.sampling.noise", lambda _seed, _position: 1 - 2.0**-53)
    assert chosen([0.0, 0.1, 0.3, -math.inf, -math.inf], Sampling(1.0)).token_id == 2


def test_whoever_goes_on_with_an_answer_draws_what_would_have_been_drawn() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(1.0, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, seed=11)
    here = SamplingRow(sampling, [4, 5, 6])
    answer: list[int] = []
    for step in range(80):
        there = SamplingRow(sampling, [4, 5, 6], answer)
        assert there.position == here.position == 3 + step
        (ours,), (theirs,) = choose(logits, [here]), choose(logits, [there])
        assert ours == theirs
        assert isinstance(ours, Choice)
        answer.append(ours.token_id)
        here.append(ours.token_id)
    assert len(set(answer)) > 20


def test_presence_and_frequency_count_the_answer_alone_and_repetition_the_prompt_too() -> None:
    assert chosen([2.0, 1.0], Sampling(0.0, presence_penalty=5.0, frequency_penalty=5.0), prompt=(0,)).token_id == 0
    assert chosen([2.0, 1.0], Sampling(0.0, presence_penalty=5.0), answer=(0,)).token_id == 1
    assert chosen([2.0, 1.0], Sampling(0.0, frequency_penalty=0.6), answer=(0,)).token_id == 0
    assert chosen([2.0, 1.0], Sampling(0.0, frequency_penalty=0.6), answer=(0, 0)).token_id == 1
    assert chosen([2.0, 1.0], Sampling(0.0, repetition_penalty=3.0), prompt=(0,)).token_id == 1
    assert chosen([-1.0, -2.0], Sampling(0.0, repetition_penalty=3.0), prompt=(0,)).token_id == 1


@pytest.mark.parametrize("factor", [5e-324, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 100.0])
def test_extreme_settings_still_choose_a_token(factor: float, temperature: float) -> None:
    sampling = Sampling(temperature, repetition_penalty=factor, presence_penalty=-100.0, top_p=5e-324)
    choice = chosen([1e38, -1e38, 0.0, -math.inf], sampling, prompt=(0, 1, 2, 3), answer=(3,))
    assert choice.token_id in {0, 1, 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_holds_nan_or_infinity_fails_alone(bad: float) -> None:
    rows = [
        SamplingRow(Sampling(temperature, top_k=2, top_p=0.5, top_logprobs=1), []) for temperature in (0.0, 1.0)
    ] * 2
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 4)
    logits[1, 0] = logits[2, 2] = bad
    choices = choose(logits, rows)
    assert [type(choice) for choice in choices] == [Choice, HocketError, HocketError, Choice]
    assert all(choice.reason is Reason.BAD_ANSWER for choice in choices if isinstance(choice, HocketError))


def test_a_row_in_which_everything_is_masked_fails() -> None:
    (choice,) = choose(torch.full((1, 3), -math.inf), [SamplingRow(Sampling(), [])])
    assert isinstance(choice, HocketError)
    assert choice.reason is Reason.BAD_ANSWER


def test_ids_without_a_token_are_never_chosen_and_have_no_probability() -> None:
    logits = torch.tensor([[0.0, 0.0, 50.0, math.nan]])
    (choice,) = choose(logits, [SamplingRow(Sampling(0.0, top_logprobs=4), [])], 2)
    assert isinstance(choice, Choice)
    assert choice.token_id == 0
    assert choice.logprob == pytest.approx(math.log(0.5))
    assert [token_id for token_id, _ in choice.top] == [0, 1]


def test_no_rows_give_no_choices() -> None:
    assert choose(torch.empty(0, 7), []) == []


def test_more_rows_than_are_drawn_at_once_are_drawn() -> None:
    assert len(set(draws([0.0] * 100, {"temperature": 1.0}, 100))) > 50
