"""What a request leaves open about its sampling is filled in: from the heaviest expert, else from the base.

The bounds are those of the contract (`hocket.v1.Sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hocket.packages.adapter import Decoding

_STOPS_MAX: Final = 16
_STOP_CHARACTERS_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Requested:
    """What a request says about its sampling; None where it says nothing.

    Attributes:
        temperature: As in `Sampling`.
        top_k: As in `Sampling`.
        top_p: As in `Sampling`.
        min_p: As in `Sampling`.
        repetition_penalty: As in `Sampling`.
        presence_penalty: As in `Sampling`.
        frequency_penalty: As in `Sampling`.
        max_tokens: Most tokens of the answer.
        stop: Texts that end it.
        top_logprobs: As in `Sampling`.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What a number may be: from `least` (or above it, if `open`) to `most`."""

    least: float
    most: float
    open: bool = False

    def hold(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.open and value == self.least)

    def __str__(self) -> str:
        return f"{'above' if self.open else 'at least'} {self.least:g} and at most {self.most:.10g}"


_UINT32_MAX: Final = 2**32 - 1
_BOUNDS: Final[Mapping[str, _Bounds]] = {
    "temperature": _Bounds(0, 100),
    "top_k": _Bounds(0, _UINT32_MAX),
    "top_p": _Bounds(0, 1, open=True),
    "min_p": _Bounds(0, 1),
    "repetition_penalty": _Bounds(0, 100, open=True),
    "presence_penalty": _Bounds(-100, 100),
    "frequency_penalty": _Bounds(-100, 100),
    "max_tokens": _Bounds(1, _UINT32_MAX),
    "top_logprobs": _Bounds(0, 20),
}
_DEFAULTS: Final[Mapping[str, float]] = {
    **dict.fromkeys(_BOUNDS, 0.0),
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_tokens": 512,
}


def complete(
    requested: Requested, expert: Decoding | None, base: Decoding | None, seed: int
) -> tuple[Sampling, int, tuple[str, ...]]:
    """Fill in what a request leaves open: from the heaviest expert, else from the base, else the contract's default.

    What expert or base wish beyond the contract's bounds is read as not said.

    Args:
        requested: The request's own.
        expert: The heaviest expert's wishes; None without experts.
        base: The base's.
        seed: The plan's.

    Returns:
        How tokens are chosen; most tokens of the answer, at least 1, whether the context has room for them or not;
        texts that end it, each once: the request's, then the expert's, then the base's.

    Raises:
        HocketError: BAD_REQUEST with the field (`sampling.top_p`) of what is out of bounds.
    """
    said = {name: value for name in _BOUNDS if (value := getattr(requested, name)) is not None}
    for name, value in said.items():
        if not _BOUNDS[name].hold(value):
            raise HocketError(
                Reason.BAD_REQUEST,
                f"{name} is {value:.10g}: give a number {_BOUNDS[name]}, or leave it out",
                field=f"sampling.{name}",
            )
    _check_stops(requested.stop)
    values = {**_DEFAULTS, **_wishes(base), **_wishes(expert), **said}
    max_tokens = int(values.pop("max_tokens"))
    sampling = Sampling(
        seed=seed, top_k=int(values.pop("top_k")), top_logprobs=int(values.pop("top_logprobs")), **values
    )
    stops = dict.fromkeys([*requested.stop, *_stops(expert), *_stops(base)])
    return sampling, max_tokens, tuple(stops)


def _wishes(decoding: Decoding | None) -> dict[str, float]:
    """What a package or a base says of sampling, within bounds."""
    if decoding is None:
        return {}
    wished = {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "min_p": decoding.min_p,
        "max_tokens": decoding.max_new_tokens,
    }
    return {name: value for name, value in wished.items() if value is not None and _BOUNDS[name].hold(value)}


def _stops(decoding: Decoding | None) -> Sequence[str]:
    """The stop texts of a package or a base, as many and as long as a request could give."""
    stops = () if decoding is None else decoding.stop_sequences
    return [stop for stop in stops if 0 < len(stop) <= _STOP_CHARACTERS_MAX][:_STOPS_MAX]


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > _STOPS_MAX:
        raise HocketError(
            Reason.BAD_REQUEST, f"{len(stops)} stop texts: give at most {_STOPS_MAX}", field="sampling.stop"
        )
    for index, stop in enumerate(stops):
        if not 0 < len(stop) <= _STOP_CHARACTERS_MAX:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"a stop text of {len(stop)} characters: give 1 to {_STOP_CHARACTERS_MAX}",
                field=f"sampling.stop[{index}]",
            )
