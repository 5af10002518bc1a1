"""From an address and rows to a plan: what is refused, and what the plan says about what is missing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId
from hocket.mixtures import FixedGate, MixtureRecord
from hocket.rpc.convert import matrix_to_tensor
from hocket.v1 import plan_pb2
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import ModelFacts, OutputColumn, OutputRange, Package, TrustState
from hocket.v1.tensor_pb2 import Tensor
from services.router import session
from services.router.directory import Snapshot
from services.router.gating import fixed_gate
from services.router.model import Body, Model, lone_model, mixture_model
from services.router.placement import Loads, Worker
from services.router.session import Decision, decide, work

ACTIVE = TrustState.TRUST_STATE_ACTIVE
WITHDRAWN = {
    TrustState.TRUST_STATE_YANKED: Reason.YANKED,
    TrustState.TRUST_STATE_KEY_REVOKED: Reason.KEY_REVOKED,
    TrustState.TRUST_STATE_UNTRUSTED: Reason.SIGNER_NOT_TRUSTED,
}
WORKER = Worker("w", "local:w", frozenset({"apr"}), 1000, frozenset(), draining=False)
ROWS = np.ones((3, 2), np.float32)


def package(
    number: int, *, state: Any = ACTIVE, labels: str = "", within: tuple[float, float] | None = None
) -> Package:
    facts = ModelFacts(
        feature_count=2,
        expert_count=1,
        parameter_bytes=100,
        columns=[OutputColumn(label=label) for label in labels] or [OutputColumn()],
        output_range=None if within is None else OutputRange(lower=within[0], upper=within[1]),
    )
    return Package(digest=f"sha256:{number:064x}", state=state, model=facts, format="apr")


def mixed(*packages: Package, weights: tuple[float, ...] = (), state: Any = ACTIVE, **changes: Any) -> Model:
    gate = FixedGate(weights or (1.0,) * len(packages))
    members = tuple(ExpertId(package.digest) for package in packages)
    record = MixtureRecord("mixed", members, gate, changes.pop("top_k", len(packages)), **changes)
    message = Mixture(name="mixed", digest=record.digest, state=state)
    return mixture_model(
        message, {record.digest: Body(record, fixed_gate(gate))}, {}, {package.digest: package for package in packages}
    )


def decided(
    model: Model,
    rows: Any = ROWS,
    *,
    top_k: int | None = None,
    workers: tuple[Worker, ...] = (WORKER,),
    running: dict[str, int] | None = None,
) -> Decision:
    snapshot = Snapshot(7, {}, {"m": model}, {}, {}, workers)
    return decide(snapshot, Loads(by_expert=running or {}), 10, "m", matrix_to_tensor(rows), top_k)


def refusal(*args: Any, **options: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        decided(*args, **options)
    return caught.value


LOW, HIGH = package(1), package(2)


def test_a_plan_names_model_revision_experts_and_replicas() -> None:
    plan = decided(mixed(LOW, HIGH, weights=(1, 3))).plan
    assert (plan.mode, plan.model, plan.revision, plan.row_count) == (plan_pb2.MODE_VECTOR, "m", 7, 3)
    assert [(e.expert, list(e.weights)) for e in plan.experts] == [(LOW.digest, [0.25] * 3), (HIGH.digest, [0.75] * 3)]
    assert [[replica.address for replica in e.replicas] for e in plan.experts] == [["local:w"]] * 2
    assert not plan.overflowed


def test_a_plan_says_which_replicas_hold_the_expert() -> None:
    workers = tuple(
        Worker(name, f"local:{name}", frozenset({"apr"}), 100, frozenset(resident), draining=False)
        for name, resident in (("a", {HIGH.digest}), ("b", {LOW.digest, HIGH.digest}))
    )
    low, high = decided(mixed(LOW, HIGH), workers=workers).plan.experts
    assert [(replica.worker, replica.resident) for replica in low.replicas] == [("b", True), ("a", False)]
    assert {(replica.worker, replica.resident) for replica in high.replicas} == {("a", True), ("b", True)}


class TestEncryptedPackages:
    """A worker without the credential would refuse, so it is not asked."""

    PACKAGE = package(1)
    PACKAGE.model.encrypted = True
    PACKAGE.releases.add(publisher="acme", name="iris", version="1.0.0", state=ACTIVE)

    @staticmethod
    def worker(name: str, *unlocks: str, holds: str = "", draining: bool = False) -> Worker:
        resident = frozenset({holds} - {""})
        formats = frozenset({"apr"})
        return Worker(name, f"local:{name}", formats, 1000, resident, draining, unlocks=frozenset(unlocks))

    def planned(self, *workers: Worker, of: Package = PACKAGE) -> tuple[list[str], str]:
        (expert,) = decided(lone_model(of, 0, "m"), workers=workers).plan.experts
        return [replica.worker for replica in expert.replicas], expert.unavailable_reason

    def test_only_workers_that_have_a_credential_are_asked(self) -> None:
        others = [self.worker(f"o{number}", "acme/other") for number in range(9)]
        assert self.planned(*others, self.worker("a", "acme/iris")) == (["a"], "")
        assert self.planned(*others, self.worker("a", self.PACKAGE.digest)) == (["a"], "")
        assert self.planned(*others, self.worker("a", holds=self.PACKAGE.digest)) == (["a"], "")

    def test_a_name_that_is_withdrawn_opens_nothing(self) -> None:
        withdrawn = Package()
        withdrawn.CopyFrom(self.PACKAGE)
        withdrawn.releases[0].state = TrustState.TRUST_STATE_KEY_REVOKED
        assert self.planned(self.worker("a", "acme/iris"), of=withdrawn) == ([], Reason.ENCRYPTED)

    def test_the_reason_says_whether_anybody_has_a_credential(self) -> None:
        assert self.planned(self.worker("a", "acme/other")) == ([], Reason.ENCRYPTED)
        assert self.planned(self.worker("a", "acme/iris", draining=True)) == ([], Reason.NO_REPLICA)
        assert self.planned() == ([], Reason.NO_REPLICA)

    def test_what_is_in_the_clear_goes_to_anybody(self) -> None:
        assert self.planned(self.worker("a"), of=LOW) == (["a"], "")


def test_a_lone_expert_passes_through() -> None:
    assert decided(lone_model(LOW, 0, "m")).plan.mode == plan_pb2.MODE_PASS


@pytest.mark.parametrize(("state", "reason"), WITHDRAWN.items())
def test_a_withdrawn_model_is_refused_and_says_which(state: Any, reason: Reason) -> None:
    for model in (mixed(LOW, HIGH, state=state), lone_model(package(1, state=state), 0, "m")):
        refused = refusal(model)
        assert (refused.reason, refused.metadata["model"]) == (reason, model.name)


@pytest.mark.parametrize("width", [1, 3])
def test_rows_of_another_width_are_refused(width: int) -> None:
    refused = refusal(mixed(LOW, HIGH), np.ones((1, width), np.float32))
    assert (refused.reason, refused.field) == (Reason.BAD_TENSOR, "input.shape[1]")


def test_a_model_that_only_knows_what_it_reads_takes_wider_rows() -> None:
    vague = package(1)
    vague.model.feature_count, vague.model.feature_count_min = 0, 3
    assert refusal(lone_model(vague, 0, "m")).reason is Reason.BAD_TENSOR
    for width in (3, 9):
        assert decided(lone_model(vague, 0, "m"), np.ones((1, width), np.float32)).plan.row_count == 1


def test_top_k_counts_members() -> None:
    model = mixed(LOW, HIGH, weights=(1, 3), top_k=1)
    assert [expert.expert for expert in decided(model).plan.experts] == [HIGH.digest]
    assert len(decided(model, top_k=2).plan.experts) == 2
    for top_k in (0, 3):
        refused = refusal(model, top_k=top_k)
        assert (refused.reason, refused.field) == (Reason.TOP_K_OUT_OF_RANGE, "top_k")


@pytest.mark.parametrize(("state", "reason"), WITHDRAWN.items())
def test_a_withdrawn_member_is_planned_without_replicas_and_says_why(state: Any, reason: Reason) -> None:
    decision = decided(mixed(LOW, package(2, state=state)))
    low, high = decision.plan.experts
    assert (low.unavailable_reason, high.unavailable_reason) == ("", reason)
    assert (len(low.replicas), len(high.replicas)) == (1, 0)
    assert list(high.weights) == [0.5] * 3  # its weight is not given to others here: that is the caller's choice
    assert decision.placed == [(LOW.digest, "w"), (HIGH.digest, None)]


@pytest.mark.parametrize(
    "workers",
    [
        (),
        (Worker("w", "local:w", frozenset({"other"}), 1000, frozenset(), draining=False),),
        (Worker("w", "local:w", frozenset({"apr"}), 1000, frozenset({LOW.digest}), draining=True),),
    ],
)
def test_an_expert_that_no_worker_can_run_is_planned_and_says_so(workers: tuple[Worker, ...]) -> None:
    [planned] = decided(lone_model(LOW, 0, "m"), workers=workers).plan.experts
    assert (planned.unavailable_reason, list(planned.replicas)) == (Reason.NO_REPLICA, [])


def test_the_output_range_holds_the_ranges_of_those_who_answer() -> None:
    model = mixed(package(1, within=(-1, 2)), package(2, within=(0, 5)), package(3), weights=(3, 2, 1), top_k=2)
    plan = decided(model).plan
    assert (plan.output_range.lower, plan.output_range.upper) == (-1.0, 5.0)
    assert not decided(model, top_k=3).plan.HasField("output_range")  # one that may answer anything


def test_labels_that_a_member_lacks_widen_its_range_by_zero() -> None:
    narrow = package(1, labels="ab", within=(0.25, 0.75))
    plan = decided(mixed(narrow, labels=("a", "b", "c"))).plan
    assert (plan.output_range.lower, plan.output_range.upper) == (0.0, 0.75)
    assert (list(plan.labels), list(plan.experts[0].columns)) == (["a", "b", "c"], [0, 1])


def test_full_experts_are_listed_when_others_answer_for_them() -> None:
    model = mixed(LOW, HIGH, weights=(3, 1), top_k=1, capacity_factor=1.0)
    decision = decided(model, running={LOW.digest: 5})  # ceil(1.0 * 1 * 10 / 2)
    assert list(decision.plan.overflowed) == [LOW.digest]
    assert [expert.expert for expert in decision.plan.experts] == [HIGH.digest]
    assert decision.degradations == ["CAPACITY_OVERFLOW"]
    assert not decided(model, running={LOW.digest: 4}).plan.overflowed
    assert refusal(model, running={LOW.digest: 5, HIGH.digest: 5}).reason is Reason.CAPACITY


def test_what_only_the_policy_admits_is_flagged_when_it_is_chosen() -> None:
    unsigned = package(2)
    unsigned.unsigned_by_policy = True
    model = mixed(LOW, unsigned, weights=(3, 1), top_k=1)
    assert decided(model).degradations == []
    assert decided(model, top_k=2).degradations == ["UNSIGNED_EXPERT"]


@pytest.mark.parametrize("slice_size", [1, 2, 1000])
def test_a_decision_made_in_slices_is_the_same(monkeypatch: pytest.MonkeyPatch, slice_size: int) -> None:
    model = mixed(*(package(number) for number in range(1, 6)), weights=(5, 4, 3, 2, 1), top_k=3, capacity_factor=1.0)
    running = {package(1).digest: 9}
    whole = decided(model, running=running)
    monkeypatch.setattr(session, "_SLICE_WORK", slice_size * session._SORTING * 5)
    monkeypatch.setattr(session, "_SLICE_VALUES", slice_size * len(ROWS))
    sliced = decided(model, running=running)
    assert (sliced.plan, sliced.placed, sliced.degradations) == (whole.plan, whole.placed, whole.degradations)
    np.testing.assert_array_equal(sliced.selection.weights, whole.selection.weights)


def test_a_decision_that_nobody_waits_for_ends_with_the_slice_it_is_in() -> None:
    given_up = threading.Event()
    snapshot = Snapshot(7, {}, {"m": lone_model(LOW, 0, "m")}, {}, {}, (WORKER,))
    asked = (snapshot, Loads(), 10, "m", matrix_to_tensor(ROWS), None, given_up)
    assert decide(*asked).plan.row_count == 3
    given_up.set()
    with pytest.raises(asyncio.CancelledError):
        decide(*asked)


def test_the_work_of_a_decision_grows_with_rows_features_and_experts() -> None:
    model = lone_model(LOW, 0, "m")
    both = mixed(LOW, HIGH)
    narrow, wide, long = (matrix_to_tensor(np.ones(shape, np.float32)) for shape in ((1, 2), (1, 1000), (1000, 2)))
    assert work(narrow, model) < work(wide, model) < work(long, model) < work(long, both)
    for hostile in (Tensor(), Tensor(shape=[-1]), Tensor(shape=[2**62, 1])):
        assert 0 <= work(hostile, both) <= work(matrix_to_tensor(np.ones((1024, 1), np.float32)), both)
