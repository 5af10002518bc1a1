from __future__ import annotations

import asyncio
import weakref
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from hocket.errors import HocketError, Reason
from hocket.packages import Proof
from hocket.trust_folder import TrustFolder
from hocket.v1.expert_worker_pb2 import (
    EXPERT_STATE_EVICTING,
    EXPERT_STATE_FAILED,
    EXPERT_STATE_VERIFYING,
    LOAD_STATE_FETCHING,
    LOAD_STATE_PLACING,
    LOAD_STATE_READY,
)
from services.expert_worker.budget import Budget
from services.expert_worker.parameters import move
from services.expert_worker.revocations import Withdrawn
from tests.shelves import LATER, SOON, A, B, C, D, Shelf, counted, refused, signed, until_loaded
from tests.signing import ACME_ID, ACME_SEED, NOW, trusted
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from pathlib import Path

    from hocket.packages.adapter import AdapterFacts
    from services.expert_worker.authority import Standing
    from services.expert_worker.loader import Prepared, Served
    from services.expert_worker.supply import Report, Supplied


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


class TestLoading:
    async def test_a_package_is_loaded_at_first_use_and_found_after(self, shelf: Shelf) -> None:
        package = await shelf.use(A)
        assert (package.digest, package.size_bytes, package.in_use_count) == (A, 40, 1)
        assert await shelf.use(A) is package
        assert package.in_use_count == 2
        assert shelf.brought == [A]
        assert shelf.residency.used_bytes == 40
        assert shelf.changes == 1

    async def test_however_many_ask_it_is_loaded_once(self, shelf: Shelf) -> None:
        packages = await asyncio.gather(*(shelf.use(A) for _ in range(20)))
        assert len({id(package) for package in packages}) == 1
        assert packages[0].in_use_count == 20
        assert shelf.brought == [A]

    async def test_a_load_that_takes_too_long_is_a_timeout_and_goes_on(self, shelf: Shelf) -> None:
        shelf.hold = asyncio.Event()
        assert (await refused(shelf.use(A, SOON))).reason is Reason.EXPERT_LOADING
        shelf.hold.set()
        package = await shelf.use(A)
        assert package.in_use_count == 1
        assert shelf.brought == [A]

    async def test_a_waiter_that_is_cancelled_leaves_no_trace(self, shelf: Shelf) -> None:
        shelf.hold = asyncio.Event()
        gone, stays = asyncio.create_task(shelf.use(A)), asyncio.create_task(shelf.use(A))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        shelf.hold.set()
        assert (await stays).in_use_count == 1

    async def test_a_waiter_that_is_cancelled_as_the_load_ends_leaves_no_trace(self, shelf: Shelf) -> None:
        shelf.hold = asyncio.Event()
        gone = asyncio.create_task(shelf.use(A))
        await asyncio.sleep(0)
        shelf.hold.set()
        await shelf.changed.wait()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert shelf.residency.packages[0].in_use_count == 0

    async def test_all_who_wait_learn_why_it_failed(self, shelf: Shelf) -> None:
        shelf.failures[A] = HocketError(Reason.UNREACHABLE, "no")
        failures = await asyncio.gather(*(refused(shelf.use(A)) for _ in range(3)))
        assert {failure.reason for failure in failures} == {Reason.UNREACHABLE}
        del shelf.failures[A]
        assert (await shelf.use(A)).digest == A

    async def test_a_bug_in_one_load_is_no_obstacle_to_the_next(self, shelf: Shelf) -> None:
        shelf.failures[A] = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError):
            await shelf.use(A)
        del shelf.failures[A]
        assert (await shelf.use(A)).digest == A

    async def test_a_refusal_is_repeated_for_a_while_without_another_look(self, shelf: Shelf) -> None:
        shelf.failures[A] = HocketError(Reason.UNSIGNED, "no")
        for _ in range(3):
            assert (await refused(shelf.use(A))).reason is Reason.UNSIGNED
        assert shelf.brought == [A]

    async def test_a_change_of_trust_or_a_new_release_is_worth_another_look(self, shelf: Shelf) -> None:
        shelf.failures[A] = HocketError(Reason.UNSIGNED, "no")
        await refused(shelf.use(A))
        shelf.authority.withdraw(Withdrawn(keys=frozenset({"0" * 64})))
        await refused(shelf.use(A))
        shelf.residency.forget_refusal(A)
        await refused(shelf.use(A))
        assert shelf.brought == [A] * 3

    async def test_too_many_loads_at_once_refuse_the_next(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, loading_max=1, hold=asyncio.Event())
        loading = asyncio.create_task(shelf.use(A))
        await asyncio.sleep(0)
        refusal = await refused(shelf.use(B))
        assert refusal.reason is Reason.QUEUE_FULL
        assert refusal.retry_after_seconds
        shelf.hold.set()  # type: ignore[union-attr]  # set above
        await loading
        await shelf.load(B)

    async def test_outcomes_are_counted(self, shelf: Shelf) -> None:
        loaded, failed = (counted("hocket_expert_loads_total", outcome=outcome) for outcome in ("OK", "BAD_MAGIC"))
        shelf.failures[B] = HocketError(Reason.BAD_MAGIC, "no")
        await shelf.load(A)
        await refused(shelf.use(B))
        assert counted("hocket_expert_loads_total", outcome="OK") == loaded + 1
        assert counted("hocket_expert_loads_total", outcome="BAD_MAGIC") == failed + 1


class TestLoadingAhead:
    async def test_progress_ends_with_ready(self, shelf: Shelf) -> None:
        shelf.hold, shelf.hold_placing = asyncio.Event(), asyncio.Event()
        steps = []
        async for step in shelf.residency.load(A):
            steps.append((step.state, step.done_bytes, step.total_bytes))
            if (step.state, step.done_bytes) == (LOAD_STATE_FETCHING, 1):
                shelf.hold.set()
            elif step.state == LOAD_STATE_PLACING:
                shelf.hold_placing.set()
        assert steps == [
            (LOAD_STATE_FETCHING, 0, 0),
            (LOAD_STATE_FETCHING, 1, 2),
            (LOAD_STATE_PLACING, 0, 40),
            (LOAD_STATE_READY, 40, 40),
        ]
        assert [step.state async for step in shelf.residency.load(A)] == [LOAD_STATE_READY]

    async def test_leaving_the_stream_does_not_stop_the_load(self, shelf: Shelf) -> None:
        shelf.hold = asyncio.Event()
        stream = shelf.residency.load(A)
        await anext(stream)
        await stream.aclose()
        shelf.hold.set()
        assert (await shelf.use(A)).in_use_count == 1
        assert shelf.brought == [A]

    async def test_a_failure_ends_the_stream(self, shelf: Shelf) -> None:
        shelf.failures[A] = HocketError(Reason.UNKNOWN_PACKAGE, "no")

        async def follow() -> None:
            async for _ in shelf.residency.load(A):
                pass

        assert (await refused(follow())).reason is Reason.UNKNOWN_PACKAGE


class TestBudget:
    async def test_what_was_used_longest_ago_makes_room(self, shelf: Shelf) -> None:
        before = counted("hocket_expert_evictions_total")
        await shelf.load(A, B, A, C)
        assert shelf.resident == [C, A]
        assert shelf.residency.used_bytes == 80
        assert counted("hocket_expert_evictions_total") == before + 1

    async def test_what_is_in_use_stays(self, shelf: Shelf) -> None:
        await shelf.use(A)
        await shelf.load(B, C)
        assert shelf.resident == [C, A]

    async def test_a_full_budget_makes_requests_wait_for_room(self, shelf: Shelf) -> None:
        first, second = await shelf.use(A), await shelf.use(B)
        waiting = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON)
        assert not waiting.done()
        shelf.residency.release(second)
        assert (await waiting).digest == C
        assert shelf.resident == [C, A]
        assert first.in_use_count == 1

    async def test_waiting_for_room_ends_at_the_deadline(self, shelf: Shelf) -> None:
        await shelf.use(A)
        await shelf.use(B)
        assert (await refused(shelf.use(C, SOON))).reason is Reason.EXPERT_LOADING
        assert shelf.resident == [B, A]

    async def test_a_request_waits_for_room_until_its_own_deadline(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, placing_seconds=SOON)
        held = [await shelf.use(A), await shelf.use(B)]
        waiting = asyncio.create_task(shelf.use(C, LATER))
        await asyncio.sleep(5 * SOON)
        shelf.residency.release(held[0])
        assert (await waiting).digest == C

    async def test_who_waits_longest_gets_room_first_however_long_that_takes(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, placing_seconds=SOON)
        held = [await shelf.use(A), await shelf.use(B)]
        first = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON / 2)
        second = asyncio.create_task(shelf.use(D))
        await asyncio.sleep(4 * SOON)
        shelf.residency.release(held[0])
        assert (await first).digest == C
        assert not second.done()
        second.cancel()

    async def test_a_load_that_no_request_waits_for_gives_up(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, placing_seconds=SOON)
        await shelf.use(A)
        held = await shelf.use(B)
        assert (await refused(shelf.use(C, 3 * SOON))).reason is Reason.EXPERT_LOADING
        async with asyncio.timeout(LATER):
            with pytest.raises(HocketError) as refusal:
                _ = [step async for step in shelf.residency.load(C)]
        assert refusal.value.reason is Reason.EXPERT_LOADING
        assert shelf.residency.digests == {A, B}
        shelf.residency.release(held)
        await shelf.load(C)

    async def test_loads_of_one_size_get_room_in_the_order_they_asked(self, shelf: Shelf) -> None:
        held = [await shelf.use(A), await shelf.use(B)]
        first, second = asyncio.create_task(shelf.use(C)), asyncio.create_task(shelf.use(D))
        await asyncio.sleep(SOON)
        shelf.residency.release(held[0])
        assert (await first).digest == C
        assert not second.done()
        shelf.residency.release(held[1])
        assert (await second).digest == D

    async def test_a_load_too_large_for_now_holds_up_nobody_else(self, shelf: Shelf) -> None:
        shelf.sizes.update({C: 90, D: 30})
        await shelf.use(A)
        large = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON)
        assert (await shelf.use(D)).digest == D
        assert not large.done()
        large.cancel()

    async def test_what_waits_for_memory_does_not_take_it(self, shelf: Shelf) -> None:
        tensors: list[weakref.ref[torch.Tensor]] = []
        held = [await shelf.use(A), await shelf.use(B)]
        bring = shelf.residency._bring

        async def note(*arguments: Any) -> Supplied:
            supplied = await bring(*arguments)
            tensors.extend(map(weakref.ref, move(supplied.prepared.tensors, torch.device("cpu"))))
            return supplied

        shelf.residency._bring = note
        waiting = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON)
        assert [reference() for reference in tensors] == [None]
        shelf.residency.release(held[0])
        assert (await waiting).size_bytes == 40
        assert shelf.brought == [A, B, C, C]

    async def test_a_load_that_cannot_be_repeated_gives_its_room_back(self, shelf: Shelf) -> None:
        held = [await shelf.use(A), await shelf.use(B)]
        waiting = asyncio.create_task(refused(shelf.use(C)))
        await asyncio.sleep(SOON)
        shelf.failures[C] = HocketError(Reason.UNREACHABLE, "no")
        shelf.residency.release(held[0])
        assert (await waiting).reason is Reason.UNREACHABLE
        assert (shelf.resident, shelf.residency.used_bytes) == ([B], 40)

    async def test_nothing_idle_is_dropped_in_vain(self, shelf: Shelf) -> None:
        shelf.sizes[C] = 90
        await shelf.load(A)
        await shelf.use(B)
        assert (await refused(shelf.use(C, SOON))).reason is Reason.EXPERT_LOADING
        assert shelf.resident == [B, A]

    async def test_a_package_larger_than_the_whole_budget_is_refused_at_once(self, shelf: Shelf) -> None:
        shelf.sizes.update({A: 101, B: 100})
        refusal = await refused(shelf.use(A))
        assert refusal.reason is Reason.DEVICE_MEMORY
        assert "budget_bytes" in refusal.message
        assert (await refused(shelf.use(A))).reason is Reason.DEVICE_MEMORY
        assert shelf.brought == [A]
        await shelf.load(B)

    async def test_a_load_that_fails_on_the_device_gives_its_room_back(self, shelf: Shelf) -> None:
        async def fail(_prepared: Prepared) -> tuple[Served, ...]:
            raise HocketError(Reason.DEVICE_MEMORY, "no", retry_after_seconds=1.0)

        shelf.residency._place = fail
        assert (await refused(shelf.use(A))).reason is Reason.DEVICE_MEMORY
        assert shelf.residency.used_bytes == 0
        shelf.residency._place = shelf.place
        await shelf.load(A)  # a passing shortage is not remembered


class TestCatalogue:
    """Many more packages than fit: those asked for often stay."""

    @pytest.mark.parametrize(("exponent", "least", "most"), [(2.0, 0.95, 1.0), (1.1, 0.5, 0.9)])
    async def test_of_1000_packages_the_100_that_fit_are_those_asked_for(
        self, tmp_path: Path, exponent: float, least: float, most: float
    ) -> None:
        shelf = Shelf(tmp_path, budget_bytes=100 * 40)
        digests = [f"sha256:{number:064x}" for number in range(1000)]
        weights = np.arange(1, 1001, dtype=np.float64) ** -exponent
        trace = np.random.default_rng(0).choice(1000, size=4000, p=weights / weights.sum())
        for number in range(1000):
            await shelf.load(digests[number])
        assert shelf.resident == digests[:-101:-1]
        for number in trace[:2000]:
            await shelf.load(digests[number])
        loads = counted("hocket_expert_loads_total", outcome="OK")
        for number in trace[2000:]:
            await shelf.load(digests[number])
        hit_rate = 1 - (counted("hocket_expert_loads_total", outcome="OK") - loads) / 2000
        assert least < hit_rate < most
        assert len(shelf.resident) == 100
        assert shelf.residency.used_bytes == 4000


class TestLeaving:
    async def test_an_idle_package_leaves_at_once(self, shelf: Shelf) -> None:
        await shelf.load(A)
        assert shelf.residency.drop(A) == 0
        assert (shelf.resident, shelf.residency.used_bytes) == ([], 0)
        assert shelf.residency.drop(A) is None

    async def test_a_package_in_use_leaves_with_its_last_request(self, shelf: Shelf) -> None:
        package = await shelf.use(A)
        await shelf.use(A)
        assert shelf.residency.drop(A) == 2
        assert (shelf.resident, shelf.residency.used_bytes) == ([], 40)
        shelf.residency.release(package)
        assert shelf.residency.used_bytes == 40
        shelf.residency.release(package)
        assert shelf.residency.used_bytes == 0

    async def test_a_package_can_come_back_while_it_leaves(self, shelf: Shelf) -> None:
        leaving = await shelf.use(A)
        shelf.residency.drop(A)
        fresh = await shelf.use(A)
        assert fresh is not leaving
        assert shelf.residency.used_bytes == 80
        shelf.residency.release(leaving)
        assert (shelf.resident, shelf.residency.used_bytes) == ([A], 40)

    async def test_stopping_ends_what_is_on_its_way(self, shelf: Shelf) -> None:
        shelf.hold = asyncio.Event()
        waiting = asyncio.create_task(shelf.use(A))
        await asyncio.sleep(0)
        await shelf.residency.stop()
        assert (await refused(waiting)).reason is Reason.DRAINING

    async def test_all_who_wait_for_a_load_that_stops_are_told_so(self, shelf: Shelf) -> None:
        await shelf.use(A)
        await shelf.use(B)

        async def follow() -> None:
            async for _ in shelf.residency.load(C):
                pass

        for_room = [asyncio.create_task(refused(shelf.use(C))), asyncio.create_task(refused(follow()))]
        await asyncio.sleep(SOON)
        shelf.hold = asyncio.Event()
        just_begun = asyncio.create_task(refused(shelf.use(D)))
        await asyncio.sleep(0)  # it has begun a load, whose first step is still to come
        await shelf.residency.stop()
        told = await asyncio.gather(*for_room, just_begun)
        assert {refusal.reason for refusal in told} == {Reason.DRAINING}
        assert shelf.residency.used_bytes == 80

    async def test_nothing_is_loaded_after_the_stop(self, shelf: Shelf) -> None:
        await shelf.load(A)
        await shelf.residency.stop()
        assert (await refused(shelf.use(B))).reason is Reason.DRAINING
        assert (await shelf.use(A)).digest == A


class _Adapter:
    """Stands for one, as far as memory goes."""


class TestLingering:
    """What has left memory and is still held somewhere: an engine's thread, the frame of an exception."""

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> Shelf:
        shelf = Shelf(tmp_path)
        bring = shelf.residency._bring

        async def adapters(digest: str, standing: Standing, report: Report) -> Supplied:
            supplied = await bring(digest, standing, report)
            facts, made = cast("AdapterFacts", object()), cast("Served", _Adapter)
            prepared = replace(supplied.prepared, facts=facts, assemble=lambda _moved: (made(),))  # type: ignore[operator]  # it makes one
            return replace(supplied, prepared=prepared)

        shelf.residency._bring = adapters
        return shelf

    async def test_its_bytes_are_not_given_to_others_before_it_has_gone(self, shelf: Shelf) -> None:
        package = await shelf.use(A)
        held = [package.experts[0]]
        shelf.residency.release(package)
        await shelf.load(B)
        waiting = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON)
        assert not waiting.done()
        assert (shelf.resident, shelf.residency.used_bytes) == ([B], 80), "and nothing else leaves instead"
        held.clear()
        assert (await waiting).digest == C
        assert (shelf.resident, shelf.residency.used_bytes) == ([C, B], 80)

    async def test_a_package_that_somebody_still_knows_holds_no_memory(self, shelf: Shelf) -> None:
        package = await shelf.use(A)
        shelf.residency.release(package)
        shelf.residency.drop(A)
        assert package.experts == ()
        assert shelf.residency.used_bytes == 0


class TestTrust:
    @pytest.fixture
    async def trusting(self, shelf: Shelf) -> Shelf:
        """A is signed by acme, B by nobody."""
        TrustFolder(shelf.folder).add_key(trusted(ACME_SEED))
        await shelf.authority.read_folder()
        shelf.evidence[A] = signed(A)
        await shelf.load(A, B)
        return shelf

    async def test_proofs_are_kept_with_the_package(self, trusting: Shelf) -> None:
        b, a = trusting.residency.packages
        assert [proof.kind for proof in a.proofs] == ["release"]
        assert (a.unsigned_by_policy, b.unsigned_by_policy) == (False, True)

    async def test_a_yanked_package_leaves(self, trusting: Shelf) -> None:
        trusting.authority.withdraw(Withdrawn(digests=frozenset({B})))
        await trusting.residency.judge_again()
        assert trusting.resident == [A]
        assert (await refused(trusting.use(B))).reason is Reason.YANKED

    async def test_a_package_of_a_revoked_key_leaves_once_it_is_idle(self, trusting: Shelf) -> None:
        package = await trusting.use(A)
        trusting.authority.withdraw(Withdrawn(keys=frozenset({ACME_ID})))
        await trusting.residency.judge_again()
        assert trusting.resident == [B]
        assert trusting.residency.used_bytes == 80
        assert (await refused(trusting.use(A))).reason is Reason.KEY_REVOKED
        trusting.residency.release(package)
        assert trusting.residency.used_bytes == 40

    async def test_proofs_are_renewed_when_trust_changes(self, trusting: Shelf) -> None:
        TrustFolder(trusting.folder).remove_key(ACME_ID)
        await trusting.authority.read_folder()
        await trusting.residency.judge_again()
        assert trusting.residency.packages[1].proofs == (Proof("policy"),)

    async def test_a_window_counts_as_of_the_load(self, shelf: Shelf) -> None:
        for digest, time in ((A, NOW - timedelta(seconds=1)), (B, NOW)):
            shelf.evidence[digest] = signed(digest, time)
        TrustFolder(shelf.folder).add_key(trusted(ACME_SEED))
        await shelf.authority.read_folder()
        await shelf.load(A, B)
        TrustFolder(shelf.folder).remove_key(ACME_ID)
        TrustFolder(shelf.folder).add_key(trusted(ACME_SEED, not_after=NOW))  # long over by the clock
        await shelf.authority.read_folder()
        await shelf.residency.judge_again()
        assert shelf.resident == [A]

    async def test_a_change_during_the_judgement_is_judged_too(self, trusting: Shelf) -> None:
        judging = asyncio.create_task(trusting.residency.judge_again())
        await asyncio.sleep(0)
        trusting.authority.withdraw(Withdrawn(digests=frozenset({A})))
        await judging
        assert trusting.resident == [B]

    async def test_a_package_dropped_during_the_judgement_stays_dropped(self, trusting: Shelf) -> None:
        trusting.authority.withdraw(Withdrawn(digests=frozenset({A})))
        judging = asyncio.create_task(trusting.residency.judge_again())
        await asyncio.sleep(0)
        assert trusting.residency.drop(A) == 0
        await judging
        assert trusting.residency.used_bytes == 40

    async def test_a_package_withdrawn_on_its_way_does_not_arrive(self, shelf: Shelf) -> None:
        shelf.hold_placing = asyncio.Event()
        loading = asyncio.create_task(shelf.use(A))
        await asyncio.sleep(SOON)
        shelf.authority.withdraw(Withdrawn(digests=frozenset({A})))
        shelf.hold_placing.set()
        assert (await refused(loading)).reason is Reason.YANKED
        assert (shelf.resident, shelf.residency.used_bytes) == ([], 0)

    async def test_a_change_that_does_not_concern_a_package_on_its_way_lets_it_arrive(self, shelf: Shelf) -> None:
        shelf.hold_placing = asyncio.Event()
        loading = asyncio.create_task(shelf.use(A))
        await asyncio.sleep(SOON)
        shelf.authority.withdraw(Withdrawn(digests=frozenset({B})))
        shelf.hold_placing.set()
        assert (await loading).digest == A


class TestTurns:
    """Whoever waits longest goes first, once it has waited long enough. Budget 100, patience SOON."""

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> Shelf:
        return Shelf(tmp_path, sizes={C: 90, D: 20}, patience_seconds=SOON)

    async def test_a_large_one_gets_room_although_others_are_always_in_use(self, shelf: Shelf) -> None:
        async def stay_hot(digest: str) -> None:
            held = await shelf.use(digest)
            while True:
                await asyncio.sleep(SOON / 5)
                after = asyncio.create_task(shelf.use(digest))
                await asyncio.wait([after], timeout=SOON / 5)
                shelf.residency.release(held)
                held = await after

        hot = [asyncio.create_task(stay_hot(digest)) for digest in (A, A, B, B, D)]
        await asyncio.sleep(SOON)
        assert (await shelf.use(C, LATER / 2)).digest == C
        for task in hot:
            task.cancel()

    async def test_who_comes_later_passes_for_a_while_and_then_waits(self, shelf: Shelf) -> None:
        held = await shelf.use(A)
        large = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON / 5)
        shelf.residency.release(await shelf.use(D))
        await asyncio.sleep(2 * SOON)
        assert A not in shelf.resident, "it leaves"
        later = [asyncio.create_task(shelf.use(digest)) for digest in (D, A)]
        await asyncio.sleep(2 * SOON)
        assert not any(task.done() for task in later)
        assert shelf.residency.used_bytes == 40, "what is in use is still there"
        shelf.residency.release(held)
        shelf.residency.release(await large)
        assert [(await task).digest for task in later] == [D, A]

    @pytest.mark.parametrize("how", ["cancelled", "late"])
    @in_virtual_time
    async def test_who_leaves_while_it_has_the_turn_lets_the_next_go_on_at_once(self, tmp_path: Path, how: str) -> None:
        shelf, loop = Shelf(tmp_path, sizes={C: 90, D: 20}), asyncio.get_running_loop()
        await shelf.use(A)
        large = asyncio.create_task(shelf.use(C, 60.0 if how == "cancelled" else 4.75))
        await asyncio.sleep(2.1)
        small = asyncio.create_task(shelf.use(D))
        await asyncio.sleep(2.65)
        assert not small.done()
        large.cancel()
        assert (await small).digest == D
        assert loop.time() == pytest.approx(4.75)

    async def test_a_load_that_no_request_waits_for_has_no_turn(self, shelf: Shelf) -> None:
        await shelf.use(A)

        async def follow() -> None:
            async for _ in shelf.residency.load(C):
                pass

        following = asyncio.create_task(follow())
        await asyncio.sleep(3 * SOON)
        assert (await shelf.use(D)).digest == D
        assert shelf.resident == [D, A]
        following.cancel()

    async def test_one_that_can_never_fit_beside_what_is_pinned_is_refused_at_once(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, sizes={B: 61, C: 60, D: 20}, pinned=(A,))
        await shelf.load(A)
        assert (await refused(shelf.use(B))).reason is Reason.DEVICE_MEMORY
        assert (await refused(shelf.use_all(C, D))).reason is Reason.DEVICE_MEMORY
        await shelf.load(C)
        await shelf.use_all(A, C)


class TestPinsAndHints:
    async def test_what_is_pinned_never_makes_room(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, pinned=(A,))
        await shelf.load(A, B, C)
        assert shelf.resident == [C, A]
        refusal = await refused(shelf.use_all(B, C, D, seconds=SOON))
        assert refusal.reason is Reason.DEVICE_MEMORY

    async def test_what_was_in_use_for_long_counts_as_used_until_then_and_makes_nothing_newer_leave_first(
        self, tmp_path: Path
    ) -> None:
        shelf = Shelf(tmp_path)
        long = await shelf.use(A)
        others = [f"sha256:{number:064x}" for number in range(20)]
        await shelf.load(*others)
        shelf.residency.release(long)
        await shelf.load(B)
        assert shelf.resident == [B, A]
        await shelf.load(C, D)
        assert shelf.resident == [D, C]

    async def test_a_hint_that_found_no_room_is_not_read_again_until_there_is_some(self, shelf: Shelf) -> None:
        await shelf.load(A, B)
        for _ in range(3):
            shelf.residency.prefetch([C])
            await until_loaded(shelf)
        assert shelf.brought == [A, B, C]
        shelf.residency.drop(A)
        shelf.residency.prefetch([C])
        await until_loaded(shelf)
        assert shelf.resident == [C, B]

    async def test_hints_are_loaded_while_there_is_room_and_push_nothing_out(self, shelf: Shelf) -> None:
        await shelf.load(A)
        shelf.residency.prefetch([A, B])
        await until_loaded(shelf)
        assert shelf.resident == [B, A]
        shelf.residency.prefetch([C])
        await until_loaded(shelf)
        assert shelf.resident == [B, A]
        await shelf.load(C)
        assert shelf.resident == [C, B]

    async def test_only_a_few_hints_are_followed_at_once_and_a_request_takes_over(self, shelf: Shelf) -> None:
        shelf.hold = asyncio.Event()
        shelf.residency.prefetch([A, B, C])
        assert shelf.residency.digests == {A, B}
        waiting = asyncio.create_task(shelf.use(A))
        await asyncio.sleep(0)
        shelf.residency.prefetch([A])
        shelf.hold.set()
        assert (await waiting).digest == A

    async def test_nothing_is_loaded_ahead_while_somebody_waits_for_room(self, shelf: Shelf) -> None:
        shelf.sizes.update({C: 80, D: 20})
        await shelf.use(A)
        shelf.hold = asyncio.Event()
        shelf.residency.prefetch([D])
        await asyncio.sleep(0)
        hold, shelf.hold = shelf.hold, None
        waiting = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(SOON)
        shelf.residency.prefetch([B])
        assert shelf.residency.digests == {A, C, D}
        hold.set()  # it has been read, and there is room
        await asyncio.sleep(SOON)
        assert shelf.residency.digests == {A, C}
        assert shelf.residency.used_bytes == 40
        waiting.cancel()

    async def test_what_arrives_and_is_wanted_by_nobody_makes_room_at_once(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, sizes={C: 60}, hold_placing=asyncio.Event(), patience_seconds=2 * LATER)
        shelf.residency.prefetch([A, B])
        await asyncio.sleep(SOON)
        assert shelf.residency.used_bytes == 80
        waiting = asyncio.create_task(shelf.use(C, LATER / 2))
        await asyncio.sleep(SOON)
        shelf.hold_placing.set()  # type: ignore[union-attr]  # set above
        assert (await waiting).digest == C

    async def test_hints_take_no_place_among_the_loads_that_are_asked_for(self, tmp_path: Path) -> None:
        shelf = Shelf(tmp_path, loading_max=1, hold=asyncio.Event())
        shelf.residency.prefetch([A, B])
        assert shelf.residency.digests == {A}
        waiting = asyncio.create_task(shelf.use(C))
        await asyncio.sleep(0)
        shelf.hold.set()  # type: ignore[union-attr]  # set above
        assert (await waiting).digest == C

    async def test_a_hint_that_fails_fails_nobody(self, shelf: Shelf) -> None:
        shelf.failures[A] = HocketError(Reason.BAD_ADAPTER, "scripted")
        shelf.residency.prefetch([A])
        await until_loaded(shelf)
        shelf.residency.prefetch([A])
        assert shelf.brought == [A]
        (absent,) = shelf.residency.absent
        assert (absent.digest, absent.state, absent.reason) == (A, EXPERT_STATE_FAILED, Reason.BAD_ADAPTER)

    async def test_it_says_what_comes_and_what_goes(self, shelf: Shelf) -> None:
        package = await shelf.use(A)
        shelf.residency.drop(A)
        shelf.hold = asyncio.Event()
        shelf.residency.prefetch([B])
        assert {each.digest: each.state for each in shelf.residency.absent} == {
            A: EXPERT_STATE_EVICTING,
            B: EXPERT_STATE_VERIFYING,
        }
        shelf.hold.set()
        shelf.residency.release(package)
        await until_loaded(shelf)
        assert shelf.residency.absent == []

    async def test_host_memory_has_a_budget_of_its_own_where_it_is_another(self, shelf: Shelf) -> None:
        shelf.residency.divide(Budget(100), Budget(50))
        assert (shelf.residency.budget_bytes, shelf.residency.device.total_bytes) == (150, 100)
        await shelf.load(A, B)
        assert (shelf.residency.device.used_bytes, shelf.residency.host.used_bytes) == (80, 0)
