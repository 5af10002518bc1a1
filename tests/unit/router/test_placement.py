"""Which worker runs an expert, or a text."""

from __future__ import annotations

from collections import Counter

import pytest

from services.router import placement as module
from services.router.placement import BUSY_COUNT, REPLICAS_MAX, Base, Loads, Worker, place, place_text


def worker(name: str, *, holds: str = "", draining: bool = False, budget: int = 100, formats: str = "apr") -> Worker:
    return Worker(name, f"{name}:1", frozenset({formats}), budget, frozenset({holds} - {""}), draining)


def names(digest: str, workers: list[Worker], loads: Loads | None = None) -> list[str]:
    return [found.name for found in place(digest, 10, "apr", workers, loads or Loads())]


def test_residents_come_before_those_who_would_have_to_load() -> None:
    assert names("d", [worker("a"), worker("b", holds="d"), worker("c")])[0] == "b"


def test_the_less_busy_of_two_residents_comes_first() -> None:
    loads = Loads()
    loads.by_worker["a"] = 5
    for _ in range(20):
        assert names("d", [worker("a", holds="d"), worker("b", holds="d")], loads) == ["b", "a"]


def test_a_workers_own_report_counts_when_it_is_more() -> None:
    loads = Loads()
    loads.note("a", 9)
    assert names("d", [worker("a", holds="d"), worker("b", holds="d")], loads)[0] == "b"


def test_an_old_report_counts_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads()
    loads.note("a", 9)
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.0)
    assert loads.of_worker("a") == 0


@pytest.mark.parametrize(
    "unfit",
    [worker("x", draining=True), worker("x", budget=9), worker("x", formats="expert")],
    ids=["draining", "too small", "other format"],
)
def test_a_worker_that_cannot_run_it_is_not_listed(unfit: Worker) -> None:
    assert names("d", [unfit, worker("a")]) == ["a"]


def test_nobody_is_listed_when_nobody_can() -> None:
    assert names("d", []) == []


def test_a_plan_lists_three_at_most() -> None:
    assert len(names("d", [worker(str(place), holds="d") for place in range(9)])) == REPLICAS_MAX


def test_routers_agree_on_the_home_of_a_package_nobody_holds() -> None:
    workers = [worker(name) for name in "abcdef"]
    homes = Counter(names(f"d{place}", workers)[0] for place in range(300))
    assert all(names(f"d{place}", workers)[0] == names(f"d{place}", workers[::-1])[0] for place in range(50))
    assert len(homes) == 6
    assert max(homes.values()) < 100
    moved = sum(names(f"d{place}", workers)[0] != names(f"d{place}", workers[:-1])[0] for place in range(300))
    assert moved == homes["f"]  # only what lived on the lost worker moves


def loads_of(**counts: int) -> Loads:
    return Loads(by_worker=counts)


def test_a_new_worker_takes_over_from_a_busy_one() -> None:
    workers = [worker("old", holds="d"), worker("new")]
    assert names("d", workers, loads_of(old=BUSY_COUNT - 1)) == ["old", "new"]
    assert names("d", workers, loads_of(old=BUSY_COUNT)) == ["new", "old"]
    assert names("d", workers, loads_of(old=BUSY_COUNT, new=BUSY_COUNT // 2)) == ["old", "new"]


def test_where_one_of_those_that_hold_it_is_idle_nobody_else_has_to_load() -> None:
    workers = [worker("a", holds="d"), worker("b", holds="d"), worker("new")]
    assert names("d", workers, loads_of(a=BUSY_COUNT)) == ["b", "a", "new"]


def test_two_choices_keep_replicas_level() -> None:
    workers = [worker(str(place), holds="d") for place in range(10)]
    loads = Loads()
    for _ in range(1000):
        loads.reserve([("d", names("d", workers, loads)[0])])
    counts = [loads.of_worker(str(place)) for place in range(10)]
    assert max(counts) - min(counts) <= 8


def test_a_released_load_leaves_nothing_behind() -> None:
    loads = Loads()
    placed = [("d", "a"), ("e", None)]
    loads.reserve(placed)
    assert (loads.of_worker("a"), loads.by_expert) == (1, {"d": 1, "e": 1})
    loads.release(placed)
    assert (loads.by_worker, loads.by_expert) == ({}, {})


QWEN, GEMMA = Base("qwen", "sha256:q"), Base("gemma", "sha256:g")
SET = frozenset({"d", "e"})


def able(name: str, *holds: str, base: Base | None = QWEN, draining: bool = False, formats: str = "expert") -> Worker:
    return Worker(name, f"{name}:1", frozenset({formats}), 100, frozenset(holds), draining, base)


def order(
    workers: list[Worker], loads: Loads | None = None, digests: frozenset[str] = SET, size: int = 20
) -> list[str]:
    return [found.name for found in place_text(digests, size, QWEN.digest, workers, loads or Loads())]


def test_who_holds_the_whole_set_comes_first_and_then_who_holds_most_of_it() -> None:
    workers = [able("none", "x"), able("some", "d"), able("all", "d", "e", "x")]
    assert order(workers) == ["all", "some", "none"]


def test_the_less_busy_of_two_that_hold_the_set_comes_first() -> None:
    workers = [able("a", "d", "e"), able("b", "d", "e"), able("c", "d")]
    for _ in range(20):
        assert order(workers, loads_of(a=5)) == ["b", "a", "c"]


@pytest.mark.parametrize(
    "unfit",
    [able("x", draining=True), able("x", formats="apr"), able("x", base=GEMMA), able("x", base=None)],
    ids=["draining", "other format", "other base", "no base"],
)
def test_a_worker_that_cannot_compute_the_text_is_not_listed(unfit: Worker) -> None:
    assert order([unfit, able("a")]) == ["a"]


def test_a_set_needs_room_for_all_of_it() -> None:
    assert order([able("a")], size=100) == ["a"]
    assert order([able("a")], size=101) == []


def test_the_same_set_goes_to_the_same_worker_in_every_router() -> None:
    workers = [able(name) for name in "abcdef"]
    sets = [frozenset({f"d{place}", f"e{place}"}) for place in range(300)]
    homes = Counter(order(workers, digests=digests)[0] for digests in sets)
    assert len(homes) == 6
    assert max(homes.values()) < 100
    for digests in sets[:50]:
        assert order(workers[::-1], digests=frozenset(sorted(digests)[::-1])) == order(workers, digests=digests)


def test_texts_for_the_base_alone_are_spread_by_load() -> None:
    workers = [able(str(place)) for place in range(10)]
    loads = Loads()
    for _ in range(1000):
        loads.reserve([(QWEN.digest, order(workers, loads, frozenset(), 0)[0])])
    counts = [loads.of_worker(str(place)) for place in range(10)]
    assert max(counts) - min(counts) <= 8


def test_an_idle_worker_takes_a_set_over_from_a_busy_one() -> None:
    workers = [able("old", "d", "e"), able("new")]
    assert order(workers, loads_of(old=BUSY_COUNT - 1)) == ["old", "new"]
    assert order(workers, loads_of(old=BUSY_COUNT)) == ["new", "old"]


def in_session(
    session: str, workers: list[Worker], loads: Loads | None = None, digests: frozenset[str] = SET
) -> list[str]:
    return [found.name for found in place_text(digests, 20, QWEN.digest, workers, loads or Loads(), session)]


def test_the_turns_of_a_session_go_to_the_same_of_those_that_hold_the_set() -> None:
    workers = [able(name, "d", "e") for name in "abcdef"] + [able("none"), able("some", "d")]
    sessions = [f"session {place}" for place in range(300)]
    homes = {session: in_session(session, workers) for session in sessions}
    assert max(Counter(names[0] for names in homes.values()).values()) < 100
    assert all(len(names) == REPLICAS_MAX and {*names} <= {*"abcdef"} for names in homes.values())
    for session in sessions[:50]:
        assert in_session(session, workers[::-1], loads_of(a=5, b=2)) == homes[session]


def test_a_worker_that_is_lost_moves_its_own_sessions_alone() -> None:
    workers = [able(name) for name in "abcdef"]
    sessions = [f"session {place}" for place in range(100)]
    for session in sessions:
        before = in_session(session, workers, digests=frozenset())
        after = in_session(session, [each for each in workers if each.name != "a"], digests=frozenset())
        assert after[0] == (before[1] if before[0] == "a" else before[0])


@pytest.mark.parametrize("digests", [frozenset(), SET], ids=["base alone", "set"])
def test_while_the_home_of_a_session_is_busy_the_next_that_holds_the_set_takes_it(digests: frozenset[str]) -> None:
    workers = [able(name, "d", "e") for name in "abc"]
    home, second, third = in_session("s", workers, digests=digests)
    assert in_session("s", workers, loads_of(**{home: BUSY_COUNT - 1}), digests)[0] == home
    assert in_session("s", workers, loads_of(**{home: BUSY_COUNT}), digests) == [second, third, home]
    every = loads_of(**dict.fromkeys("abc", BUSY_COUNT))
    assert in_session("s", workers, every, digests) == [home, second, third]


def test_a_busy_worker_gives_a_session_away_as_well() -> None:
    workers = [able("old", "d", "e"), able("new")]
    assert in_session("s", workers, loads_of(old=BUSY_COUNT - 1)) == ["old", "new"]
    assert in_session("s", workers, loads_of(old=BUSY_COUNT)) == ["new", "old"]
