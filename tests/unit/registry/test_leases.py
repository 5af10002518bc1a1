from __future__ import annotations

from typing import Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.v1.registry_pb2 import Residency, WorkerState
from services.registry.leases import Leases

DIGEST = "sha256:" + "0" * 64


def worker(name: str = "a", **changes: Any) -> WorkerState:
    return WorkerState(**{"worker": name, "address": "127.0.0.1:50054", "device": "cpu", "formats": ["apr"], **changes})


@pytest.fixture
def leases() -> Leases:
    return Leases(lease_seconds=10, workers_max=2)


def refusal_of(leases: Leases, state: WorkerState) -> Reason:
    with pytest.raises(HocketError) as caught:
        leases.renew(state, 0)
    return caught.value.reason


def test_a_worker_is_listed_until_its_lease_ends(leases: Leases) -> None:
    assert leases.renew(worker(), 0)

    assert leases.expire(9.9) == ()
    assert leases.live() == {"a": worker()}
    assert leases.expire(10) == ("a",)
    assert leases.live() == {}


def test_every_word_starts_the_lease_anew(leases: Leases) -> None:
    leases.renew(worker(), 0)
    leases.renew(worker(), 9)

    assert leases.expire(18.9) == ()
    assert leases.expire(19) == ("a",)


def test_saying_the_same_again_is_no_news(leases: Leases) -> None:
    leases.renew(worker(), 0)
    told = leases.live()["a"]

    assert not leases.renew(worker(), 1)
    assert leases.live()["a"] is told
    assert leases.renew(worker(draining=True), 2)
    assert leases.live()["a"].draining


def test_one_worker_too_many_is_told_to_come_back(leases: Leases) -> None:
    leases.renew(worker("a"), 0)
    leases.renew(worker("b"), 0)

    with pytest.raises(HocketError) as caught:
        leases.renew(worker("c"), 0)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_seconds
    leases.expire(10)
    assert leases.renew(worker("c"), 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"worker": ""},
        {"worker": "../a"},
        {"address": ""},
        {"address": "a" * 257},
        {"device": ""},
        {"formats": ["apr"] * 17},
        {"formats": ["a" * 257]},
        {"residency": [Residency(digest="sha256:0")]},
        {"residency": [Residency(digest=DIGEST)] * (2**16 + 1)},
        {"unlocks": ["acme/iris"] * (2**12 + 1)},
        {"unlocks": ["a" * 257]},
    ],
)
def test_a_state_that_cannot_be_true_is_refused(leases: Leases, changes: dict[str, Any]) -> None:
    assert refusal_of(leases, worker(**changes)) is Reason.BAD_REQUEST
    assert leases.live() == {}


def test_what_is_at_the_limits_is_taken(leases: Leases) -> None:
    assert leases.renew(worker(address="a" * 256, formats=["a" * 256] * 16, residency=[Residency(digest=DIGEST)]), 0)
