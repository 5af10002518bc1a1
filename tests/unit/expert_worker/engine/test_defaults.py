from __future__ import annotations

import math

import pytest

from hocket.errors import HocketError, Reason
from hocket.packages.adapter import Decoding
from services.expert_worker.engine.defaults import Requested, complete
from services.expert_worker.engine.sampling import Sampling


def refusal(requested: Requested) -> tuple[Reason, str | None]:
    with pytest.raises(HocketError) as caught:
        complete(requested, None, None, 0)
    return caught.value.reason, caught.value.field


def test_what_nobody_says_is_the_contract_s_default() -> None:
    assert complete(Requested(), None, None, 9) == (Sampling(0.0, seed=9), 512, ())


def test_the_request_comes_before_the_expert_and_the_expert_before_the_base() -> None:
    expert = Decoding(temperature=0.2, top_p=0.5, max_new_tokens=64, stop_sequences=("E", "R"))
    base = Decoding(temperature=0.6, top_p=0.7, top_k=20, min_p=0.1, max_new_tokens=2048, stop_sequences=("B",))
    requested = Requested(temperature=0.0, stop=("R",), repetition_penalty=1.1, top_logprobs=2, frequency_penalty=-1.0)
    assert complete(requested, expert, base, 1) == (
        Sampling(0.0, 20, 0.5, 0.1, 1.1, 0.0, -1.0, 1, 2),
        64,
        ("R", "E", "B"),
    )
    assert complete(Requested(top_k=0, max_tokens=3), expert, base, 1)[:2] == (
        Sampling(0.2, 0, 0.5, 0.1, seed=1),
        3,
    )
    assert complete(Requested(), None, base, 1)[:2] == (Sampling(0.6, 20, 0.7, 0.1, seed=1), 2048)


def test_what_a_package_says_beyond_the_bounds_is_read_as_not_said() -> None:
    wild = Decoding(
        temperature=math.nan, top_p=0.0, top_k=-1, min_p=2.0, max_new_tokens=0, stop_sequences=("", "x" * 257, "ok")
    )
    assert complete(Requested(), wild, wild, 0) == (Sampling(0.0), 512, ("ok",))


@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("temperature", [-0.1, 100.1, math.nan, math.inf], [0, 100]),
        ("top_k", [-1, 2**32], [0, 2**32 - 1]),
        ("top_p", [0.0, 1.01, -1.0, math.nan], [1e-9, 1.0]),
        ("min_p", [-0.01, 1.01], [0.0, 1.0]),
        ("repetition_penalty", [0.0, 100.5], [1e-9, 100.0]),
        ("presence_penalty", [-100.5, 100.5], [-100.0, 100.0]),
        ("frequency_penalty", [-100.5, 100.5, math.nan], [-100.0, 100.0]),
        ("max_tokens", [0, 2**32], [1, 2**32 - 1]),
        ("top_logprobs", [-1, 21], [0, 20]),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_its_field(name: str, refused: list[float], accepted: list[float]) -> None:
    for value in refused:
        assert refusal(Requested(**{name: value})) == (Reason.BAD_REQUEST, f"sampling.{name}")  # type: ignore[arg-type]  # any of them
    for value in accepted:
        complete(Requested(**{name: value}), None, None, 0)  # type: ignore[arg-type]  # any of them


def test_stop_texts_are_counted_and_measured() -> None:
    assert refusal(Requested(stop=("a",) * 17)) == (Reason.BAD_REQUEST, "sampling.stop")
    assert refusal(Requested(stop=("a", "b" * 257))) == (Reason.BAD_REQUEST, "sampling.stop[1]")
    assert refusal(Requested(stop=("",))) == (Reason.BAD_REQUEST, "sampling.stop[0]")
    stops = tuple(chr(65 + index) * 256 for index in range(16))
    assert complete(Requested(stop=stops), None, None, 0)[2] == stops
