"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is sampled, every default filled in. Bounds are those of the contract (`hocket.v1.Sampling`).

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token, of equals the one with the lowest id.
        top_k: Only so many most probable tokens count; 0 for all.
        top_p: Only the most probable tokens count whose probabilities sum to this.
        min_p: Only tokens count that have this share of the best one's probability.
        repetition_penalty: Divides positive logits of tokens in prompt or answer, and multiplies negative ones.
        presence_penalty: Subtracted from the logits of tokens in the answer.
        frequency_penalty: Subtracted from the logits of tokens in the answer, once for each time they are.
        seed: What draws are made from, 0 to 2^64 - 1.
        top_logprobs: How many of the most probable tokens to report.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    Attributes:
        token_id: Its id.
        logprob: Natural logarithm of its probability before penalties, temperature and truncation.
        top: The most probable tokens with theirs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
