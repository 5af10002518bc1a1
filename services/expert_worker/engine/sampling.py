"""How the next token is chosen from logits.

Everything is a function of a row's own logits, of its `Sampling`, of the tokens before it, and of one number: the
noise, which is a function of (seed, position). Nothing depends on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.transfer import there

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.expert_worker.engine.constraints import Matcher

_ROWS_MAX: Final = 32
"""Rows that are drawn together: each takes a few float64 numbers per token of the vocabulary."""
_CANDIDATES: Final = 1024
"""Most probable tokens among which the limit of top_p is looked for before all are sorted."""


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

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    Attributes:
        token_id: Its id.
        logprob: Natural logarithm of its probability before penalties, temperature and truncation.
        top: The most probable tokens with theirs, best first, of equals the lowest id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SamplingRow:
    """What the choice of a sequence's next token depends on, besides its logits.

    Args:
        sampling: How its tokens are chosen.
        prompt_ids: The prompt, without rows of soft prompts.
        answer_ids: What has been answered already, here or by another worker.
        matcher: How far the answer has come in what it must be, before `answer_ids`; None if it may be anything.
    """

    __slots__ = ("_counts", "_ids", "_slots", "matcher", "position", "sampling")

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self.position = len(prompt_ids)
        """Place of the next token among those of prompt and answer, rows of soft prompts not counted. With the seed it
        decides the noise, so that whoever goes on with prompt and answer draws what would have been drawn here."""
        self._slots: dict[int, int] = {}
        self._ids = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        if sampling.penalises:
            self._ids = np.unique(np.asarray(prompt_ids, np.int64))
            self._counts = np.zeros(len(self._ids), np.int64)
            self._slots = {token_id: slot for slot, token_id in enumerate(self._ids.tolist())}
        for token_id in answer_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """The next token of the answer has been chosen."""
        self.position += 1
        if self.matcher is not None:
            self.matcher.advance(token_id)
        if not self.sampling.penalises:
            return
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            more = max(64, slot)
            self._ids = np.append(self._ids, np.zeros(more, np.int64))
            self._counts = np.append(self._counts, np.zeros(more, np.int64))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def past(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The tokens of prompt and answer, each once, and how often each is in the answer; empty unless penalised."""
        count = len(self._slots)
        return self._ids[:count], self._counts[:count]

    @property
    def noise(self) -> float:
        """What decides the next draw; see `noise`."""
        return noise(self.sampling.seed, self.position)


def noise(seed: int, position: int) -> float:
    """A number in [0, 1), uniform, independent for every other seed or position.

    The first 53 bits of BLAKE2b's 8-byte digest, as a little-endian number, of seed and position, each 8 bytes
    little-endian.
    """
    counter = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def choose(
    logits: torch.Tensor, rows: Sequence[SamplingRow], token_count: int | None = None
) -> list[Choice | HocketError]:
    """The next token of each row. The rows are not appended to.

    Tokens that would break a row's constraint do not count. Then penalties, temperature, top_k, top_p and min_p apply
    in this order, as transformers' processors of these names do; where equals stand at the limit of top_p, those with
    the lowest ids stay. Then a token is drawn by the inverse of the cumulative distribution over ascending ids, in
    float64.

    Args:
        logits: `[n, vocabulary]`, float32, on any device; -inf for tokens that must not be chosen. Not changed.
        rows: `n` of them.
        token_count: Ids that have a token. The rows after those, which pad an embedding, are never chosen and have no
            probability. None for all.

    Returns:
        For each row its choice, or why there is none: BAD_ANSWER if its logits hold a NaN or +inf, or of what may come
        nothing but -inf; as `Matcher.allowed`.
    """
    logits = logits[:, :token_count]
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    constrained, failures = _constrained(logits, rows)
    penalised = _penalised(constrained, rows)
    chosen = penalised.argmax(-1)  # of equals the first
    for begin in range(0, len(drawn), _ROWS_MAX):
        some = drawn[begin : begin + _ROWS_MAX]
        where = there(np.array(some), logits.device)
        draws = _draw(penalised.index_select(0, where), [rows[index] for index in some])
        chosen.index_copy_(0, where, draws)

    mass = logits.logsumexp(-1)
    logprobs = logits.gather(-1, chosen[:, None])[:, 0] - mass
    # one transfer; ids are exact in float64, and a NaN or +inf anywhere in a row is its largest value
    best = logits.amax(-1).double()
    best_allowed = best if constrained is logits else constrained.amax(-1).double()
    found = torch.stack([chosen.double(), logprobs.double(), best, best_allowed], -1).tolist()
    choices: list[Choice | HocketError] = []
    for index, (row, (token_id, logprob, *largest)) in enumerate(zip(rows, found, strict=True)):
        count = row.sampling.top_logprobs
        if index in failures:
            choices.append(failures[index])
        elif all(map(math.isfinite, largest)):
            choices.append(Choice(int(token_id), logprob, _top(logits[index], mass[index], count) if count else ()))
        else:
            choices.append(
                HocketError(
                    Reason.BAD_ANSWER,
                    "the composed model's logits hold NaN or infinity: use smaller weights, or leave out the expert at "
                    "fault",
                )
            )
    return choices


def _constrained(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, dict[int, HocketError]]:
    """The logits with -inf for what constraints do not allow, themselves if there are none; and who cannot go on."""
    masks: dict[int, np.ndarray[Any, Any]] = {}
    failures: dict[int, HocketError] = {}
    for index, row in enumerate(rows):
        if row.matcher is not None:
            try:
                masks[index] = row.matcher.allowed()
            except HocketError as error:
                failures[index] = error
    if not masks:
        return logits, failures
    forbidden = np.unpackbits(~np.stack([*masks.values()]), axis=-1, count=logits.shape[-1], bitorder="little")
    where = there(np.array([*masks]), logits.device)
    rest = logits.index_select(0, where).masked_fill_(there(forbidden.view(np.bool_), logits.device), -math.inf)
    return logits.index_copy(0, where, rest), failures


def _penalised(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The logits after penalties; themselves if no row has any."""
    pasts = [(index, row.sampling, *row.past) for index, row in enumerate(rows) if row.sampling.penalises]
    if not pasts:
        return logits

    def put(arrays: list[np.ndarray[Any, Any]]) -> torch.Tensor:
        return there(np.concatenate(arrays), logits.device)

    where = put([np.full(len(ids), index) for index, _, ids, _ in pasts]), put([ids for _, _, ids, _ in pasts])
    factor = put([np.full(len(ids), sampling.repetition_penalty) for _, sampling, ids, _ in pasts])
    offset = put(
        [each.presence_penalty * (counts > 0) + each.frequency_penalty * counts for _, each, _, counts in pasts]
    )
    before = logits[where].double()
    after = torch.where(before < 0, before * factor, before / factor) - offset
    most = torch.finfo(logits.dtype).max
    # an extreme factor makes no infinity of a number, and no number of an infinity
    return logits.index_put(where, after.clamp(-most, most).where(before > -math.inf, before).to(logits.dtype))


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """One token id per row, `[m]`, of rows whose temperature is not 0."""
    weights = _weights(logits, [row.sampling for row in rows])
    sums = weights.cumsum(-1).masked_fill_(weights <= 0, -1.0)
    total = sums.amax(-1, keepdim=True)
    # below the total even when the product is rounded up to it, so that there is a token
    target = (total * _column([row.noise for row in rows], logits)).minimum(total.nextafter(torch.zeros_like(total)))
    return (sums > target).view(torch.uint8).argmax(-1)


def _weights(logits: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """What is left of the probabilities, `[m, vocabulary]`, float64, but for a factor: a row's best token has 1."""
    # in place: what allocates so much each time takes longer than what it computes
    weights = logits.double()
    weights.sub_(weights.amax(-1, keepdim=True)).div_(_column([each.temperature for each in settings], logits)).exp_()
    size = weights.shape[-1]
    if any(each.top_k for each in settings):
        counts = [min(each.top_k or size, size) for each in settings]
        last = _column([count - 1 for count in counts], logits).long()
        weights.masked_fill_(weights < _sorted(weights, max(counts)).gather(-1, last), 0.0)
    if any(each.top_p < 1 for each in settings):
        _cut_nucleus(weights, _column([each.top_p for each in settings], logits))
    if any(each.min_p for each in settings):
        weights.masked_fill_(weights < _column([each.min_p for each in settings], logits), 0.0)
    return weights


def _column(values: Sequence[float], logits: torch.Tensor) -> torch.Tensor:
    """A number for each row, `[m, 1]`, float64, where the logits are."""
    return there(np.array(values, np.float64), logits.device)[:, None]


def _sorted(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of each row, largest first."""
    if count > _CANDIDATES:
        return weights.sort(-1, descending=True).values[:, :count]
    return weights.topk(count, -1).values


def _cut_nucleus(weights: torch.Tensor, share: torch.Tensor) -> None:
    """Set to 0 what top_p leaves out: weights before which others have the whole share already.

    Args:
        weights: `[m, vocabulary]`, not negative, the best of each row above 0.
        share: `[m, 1]`, above 0; from 1 on everything stays.
    """
    size = weights.shape[-1]
    everything = share >= 1
    wanted = share * weights.sum(-1, keepdim=True)
    for count in (min(_CANDIDATES, size), size):
        ordered = _sorted(weights, count)
        sums = ordered.cumsum(-1)
        if bool(((sums[:, -1:] >= wanted) | everything).all()):
            break
    kept = sums - ordered < wanted
    least = ordered.where(kept, torch.inf).amin(-1, keepdim=True).masked_fill_(everything, 0.0)
    weights.masked_fill_(weights < least, 0.0)
    # of those that weigh exactly the least, only as many stay as have a place
    places = (kept & (ordered == least)).sum(-1, keepdim=True)
    equal = weights == least
    if bool((equal.sum(-1, keepdim=True) > places).logical_and_(~everything).any()):
        weights.masked_fill_(equal & (equal.cumsum(-1) > places) & ~everything, 0.0)


def _top(logits: torch.Tensor, mass: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable tokens of one row with their logarithms; none of probability 0."""
    least = logits.topk(min(count, len(logits))).values[-1]
    # of those as probable as the last one, the lowest ids
    ids = torch.cat([(logits > least).nonzero()[:, 0], (logits == least).nonzero()[:count, 0]])
    pairs = zip(ids.tolist(), (logits[ids] - mass).tolist(), strict=True)
    ranked = sorted((pair for pair in pairs if pair[1] > -math.inf), key=lambda pair: (-pair[1], pair[0]))
    return tuple(ranked[:count])
