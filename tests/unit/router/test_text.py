"""From a text and names of experts to a plan: what is refused, which base is chosen, what the plan says."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.text_limits import EXPERTS_MAX, MESSAGES_MAX, TEXT_BYTES_MAX
from hocket.v1 import plan_pb2, text_pb2
from hocket.v1.package_pb2 import BaseModel, Package, TrustState
from hocket.v1.router_pb2 import ChosenExpert, GenerateRequest, Routing
from hocket.v1.text_pb2 import Conversation, Message, Sampling, TextInput
from services.router.bases import REMEMBERED_MAX, REMEMBERED_SECONDS, RecentBases
from services.router.directory import Snapshot, build_gates
from services.router.experts import index
from services.router.placement import Base, Loads, Worker
from services.router.text import NAMED_MAX, TextDecision, decide_text, explain_text
from tests.fakes import adapter_package, expert_package
from tests.routing import asking_for

ACTIVE, YANKED = TrustState.TRUST_STATE_ACTIVE, TrustState.TRUST_STATE_YANKED
WITHDRAWN = {
    TrustState.TRUST_STATE_YANKED: Reason.YANKED,
    TrustState.TRUST_STATE_KEY_REVOKED: Reason.KEY_REVOKED,
    TrustState.TRUST_STATE_UNTRUSTED: Reason.SIGNER_NOT_TRUSTED,
}


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


QWEN = Base("Qwen3-0.6B", digest(100), "ab" * 32)
OTHER_QWEN = Base("qwen3-0.6b", digest(101))
GEMMA = Base("google/gemma-3-1b-it", digest(102))


def worker(name: str = "w", base: Base | None = QWEN, **changes: Any) -> Worker:
    facts = {"formats": frozenset({"apr", "expert"}), "budget_bytes": 1000, "resident": frozenset(), "draining": False}
    return Worker(name, f"local:{name}", base=base, **{**facts, **changes})


def adapter(
    number: int, name: str, *, base: Any = QWEN, by: str = "acme", state: Any = ACTIVE, **facts: Any
) -> Package:
    stated = BaseModel(name=base.name, digest=base.digest, weights_sha256=base.weights_sha256)
    package = adapter_package(digest(number), name, base=stated, parameter_bytes=100, **facts)
    package.releases[0].publisher, package.state = by, state
    return package


SQL, JSON = adapter(1, "sql"), adapter(2, "json")


WORKER = worker()


def snapshot(*packages: Package, workers: Any = (WORKER,), models: tuple[str, ...] = ()) -> Snapshot:
    held = {package.digest: package for package in packages}
    experts = index(held.values())
    gates = build_gates(experts, workers, {})
    return Snapshot(7, {}, dict.fromkeys(models), {}, held, tuple(workers), experts, gates=gates)  # type: ignore[arg-type]  # nobody asks the models anything


def asking(*experts: str, **fields: Any) -> GenerateRequest:
    chosen = [ChosenExpert(expert=expert) for expert in experts]
    return GenerateRequest(**{"input": TextInput(prompt="list all names"), "experts": chosen, **fields})


def decided(here: Snapshot, request: GenerateRequest, loads: Loads | None = None) -> TextDecision:
    return decide_text(here, loads or Loads(), request)


def planned(here: Snapshot, *experts: str, **fields: Any) -> list[str]:
    return [expert.name for expert in decided(here, asking(*experts, **fields)).plan.experts]


def refusal(here: Snapshot, request: GenerateRequest) -> HocketError:
    with pytest.raises(HocketError) as caught:
        decided(here, request)
    return caught.value


# Which expert is meant.


@pytest.mark.parametrize("address", [SQL.digest, "acme/sql@1.0.0", "acme/sql", "sql"])
def test_an_expert_is_named_by_digest_release_publisher_or_name(address: str) -> None:
    assert planned(snapshot(SQL, JSON), address) == ["acme/sql@1.0.0"]


PREFIXED = adapter(3, "expert-sql")


@pytest.mark.parametrize("address", ["sql", "sql@1.0.0", "acme/sql", "acme/sql@1.0.0", "expert-sql@1.0.0"])
def test_the_usual_prefix_may_be_left_out(address: str) -> None:
    assert planned(snapshot(PREFIXED, JSON), address) == ["acme/expert-sql@1.0.0"]


@pytest.mark.parametrize("by", ["acme", "zeta"])
@pytest.mark.parametrize(("address", "version"), [("sql", ""), ("sql@1.0.0", "@1.0.0")])
def test_nobody_steps_into_a_name_that_leads_to_an_expert_with_the_usual_prefix(
    by: str, address: str, version: str
) -> None:
    here = snapshot(PREFIXED, adapter(1, "sql", by=by))
    refused = refusal(here, asking(address))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "experts[0].expert")
    assert f"{by}/sql{version} or acme/expert-sql{version}" in refused.message
    assert planned(here, f"{by}/{address}") == [f"{by}/sql@1.0.0"]
    assert planned(here, f"acme/expert-{address}") == ["acme/expert-sql@1.0.0"]


def test_a_version_of_a_name_is_exactly_that_one() -> None:
    here = snapshot(adapter(1, "sql"), adapter(2, "sql", version="1.1.0"))
    assert planned(here, "sql@1.0.0") == ["acme/sql@1.0.0"]
    assert refusal(here, asking("sql@")).reason is Reason.UNKNOWN_EXPERT


def test_an_expert_that_nobody_has_released_has_its_digest_for_a_name() -> None:
    package = adapter(1, "sql")
    del package.releases[:]
    assert planned(snapshot(package), package.digest) == [package.digest]
    assert refusal(snapshot(package), asking("sql")).reason is Reason.UNKNOWN_EXPERT


def test_without_a_version_the_newest_that_may_serve_is_meant() -> None:
    versions = ["1.9.0", "1.10.0", "2.0.0-rc.1", "2025-11-27"]
    held = [adapter(number, "sql", version=version) for number, version in enumerate(versions)]
    withdrawn = adapter(8, "sql", version="3.0.0", state=YANKED)
    for address in ("acme/sql", "sql"):
        assert planned(snapshot(*held, withdrawn), address) == ["acme/sql@1.10.0"]
        assert planned(snapshot(*reversed(held), withdrawn), address) == ["acme/sql@1.10.0"]
    assert planned(snapshot(*held), "acme/sql@2.0.0-rc.1") == ["acme/sql@2.0.0-rc.1"]


def test_a_pre_release_is_meant_where_there_is_nothing_else() -> None:
    held = [adapter(number, "sql", version=f"2.0.0-rc.{number}") for number in (9, 10)]
    assert planned(snapshot(*held), "sql") == ["acme/sql@2.0.0-rc.10"]


def test_a_name_that_several_publishers_have_is_refused_and_says_whose() -> None:
    here = snapshot(SQL, adapter(3, "sql", by="zeta"))
    refused = refusal(here, asking("sql"))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "experts[0].expert")
    assert "acme/sql or zeta/sql" in refused.message
    assert planned(here, "zeta/sql") == ["zeta/sql@1.0.0"]


def test_nobody_steps_into_the_name_of_a_withdrawn_expert() -> None:
    here = snapshot(adapter(1, "sql", state=YANKED), adapter(3, "sql", by="zeta"))
    assert refusal(here, asking("sql")).reason is Reason.BAD_REQUEST
    assert planned(here, "zeta/sql") == ["zeta/sql@1.0.0"]


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("acme/sql@2.0.0", "did you mean 'acme/sql@1.0.0'?"),
        ("sql@2.0.0", "did you mean 'acme/sql@1.0.0'?"),
        ("zeta/sql", "did you mean acme/sql?"),
        (SQL.digest.upper(), "lower case"),
        (f"sha256:{'A' * 64}", "lower case"),
        (f"{SQL.digest}#0", "leave out '#0'"),
        ("sq", "did you mean acme/sql?"),
        ("jsonn", "did you mean acme/json?"),
        ("acme/", "hocket search"),
        ("nothing like it", "hocket search"),
        (digest(77), "hocket search"),
        ("s" * 100_000, "hocket search"),
    ],
)
def test_an_unknown_expert_is_refused_and_told_of_a_close_one(address: str, advice: str) -> None:
    refused = refusal(snapshot(SQL, JSON), asking("json", address))
    assert (refused.reason, refused.field) == (Reason.UNKNOWN_EXPERT, "experts[1].expert")
    assert advice in refused.message
    assert len(refused.message) < 500


@pytest.mark.parametrize(("state", "reason"), WITHDRAWN.items())
@pytest.mark.parametrize("address", [SQL.digest, "acme/sql@1.0.0", "acme/sql", "sql"])
def test_a_withdrawn_expert_is_refused_by_any_name(address: str, state: Any, reason: Reason) -> None:
    refused = refusal(snapshot(adapter(1, "sql", state=state)), asking(address))
    assert (refused.reason, refused.metadata["expert"]) == (reason, "acme/sql@1.0.0")


def test_a_withdrawn_release_is_refused_while_its_bytes_serve_under_another() -> None:
    package = adapter(1, "sql")
    package.releases.add(publisher="zeta", name="sql", version="1.0.0", state=TrustState.TRUST_STATE_KEY_REVOKED)
    here = snapshot(package)
    assert refusal(here, asking("zeta/sql@1.0.0")).reason is Reason.KEY_REVOKED
    assert refusal(here, asking("zeta/sql")).reason is Reason.KEY_REVOKED
    assert planned(here, "acme/sql") == planned(here, package.digest) == ["acme/sql@1.0.0"]


def test_a_release_that_is_none_leaves_the_others_alone() -> None:
    package = adapter(1, "sql")
    package.releases.add(publisher="zeta", name="odd", version="no version", state=ACTIVE)
    here = snapshot(package)
    assert planned(here, "sql") == ["acme/sql@1.0.0"]
    assert refusal(here, asking("odd")).reason is Reason.UNKNOWN_EXPERT


@pytest.mark.parametrize("address", [digest(5), f"{digest(5)}#0", "acme/low@1.0.0", "digits"])
def test_what_answers_rows_answers_no_text(address: str) -> None:
    here = snapshot(SQL, expert_package(digest(5), "low"), models=("digits", "acme/low@1.0.0"))
    assert refusal(here, asking(address)).reason is Reason.NOT_SERVABLE
    assert planned(here, "acme/sql@1.0.0") == ["acme/sql@1.0.0"]


@pytest.mark.parametrize("again", ["sql", "acme/sql", SQL.digest])
def test_an_expert_that_is_named_twice_is_refused(again: str) -> None:
    refused = refusal(snapshot(SQL, JSON), asking("acme/sql@1.0.0", again))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "experts[1].expert")
    assert planned(snapshot(SQL, JSON), "json", again) == ["acme/json@1.0.0", "acme/sql@1.0.0"]


def test_an_expert_without_a_name_is_refused() -> None:
    refused = refusal(snapshot(SQL), asking(""))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "experts[0].expert")


def test_ten_experts_go_together_and_eleven_do_not() -> None:
    held = [adapter(number, f"e{number}") for number in range(EXPERTS_MAX + 1)]
    names = [f"acme/e{number}" for number in range(EXPERTS_MAX + 1)]
    here = snapshot(*held, workers=[worker(budget_bytes=10_000)])
    assert len(planned(here, *names[:-1])) == EXPERTS_MAX
    refused = refusal(here, asking(*names))
    assert (refused.reason, refused.field) == (Reason.TOO_MANY_EXPERTS, "experts")


@pytest.mark.parametrize("weight", [-100.0, -0.5, 0.0, 1.0, 2.5, 100.0])
def test_a_weight_is_taken_as_it_is(weight: float) -> None:
    request = asking(experts=[ChosenExpert(expert="sql", weight=weight), ChosenExpert(expert="json")])
    assert [expert.weight for expert in decided(snapshot(SQL, JSON), request).plan.experts] == [weight, 1.0]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 100.5, -100.5])
def test_a_weight_that_is_no_number_or_too_large_is_refused(weight: float) -> None:
    refused = refusal(snapshot(SQL), asking(experts=[ChosenExpert(expert="sql", weight=weight)]))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "experts[0].weight")


# What is read.


def conversation(*roles: str) -> TextInput:
    return TextInput(conversation=Conversation(messages=[Message(role=role, content="x") for role in roles]))


@pytest.mark.parametrize(
    "given",
    [
        TextInput(prompt=""),
        TextInput(raw="<|im_start|>"),
        TextInput(prompt="x" * TEXT_BYTES_MAX),
        conversation("user"),
        conversation("system", "user", "assistant", "tool"),
        conversation(*["user"] * MESSAGES_MAX),
    ],
    ids=["prompt", "raw", "one MiB", "one turn", "every role", "many turns"],
)
def test_text_is_planned_for(given: TextInput) -> None:
    decision = decided(snapshot(SQL), asking("sql", input=given))
    assert decision.job(asking("sql", input=given)).input == given


@pytest.mark.parametrize(
    ("given", "reason", "field"),
    [
        (TextInput(), Reason.BAD_REQUEST, "input"),
        (TextInput(raw="x" * (TEXT_BYTES_MAX + 1)), Reason.TOO_LARGE, "input"),
        (TextInput(prompt="é" * (TEXT_BYTES_MAX // 2) + "x"), Reason.TOO_LARGE, "input"),
        (
            TextInput(
                conversation=Conversation(
                    messages=[Message(role="user", content="x" * (TEXT_BYTES_MAX // 2 + 1)) for _ in range(2)]
                )
            ),
            Reason.TOO_LARGE,
            "input",
        ),
        (conversation(), Reason.BAD_REQUEST, "input.conversation.messages"),
        (conversation(*["user"] * (MESSAGES_MAX + 1)), Reason.BAD_REQUEST, "input.conversation.messages"),
        (conversation("god", "user"), Reason.BAD_REQUEST, "input.conversation.messages[0].role"),
        (conversation("user", "assistant"), Reason.BAD_REQUEST, "input.conversation.messages[1].role"),
        (conversation("system"), Reason.BAD_REQUEST, "input.conversation.messages[0].role"),
    ],
    ids=["nothing", "long", "long in UTF-8", "long together", "no turn", "turns", "role", "last turn", "only turn"],
)
def test_what_is_no_text_is_refused(given: TextInput, reason: Reason, field: str) -> None:
    refused = refusal(snapshot(SQL), asking("sql", input=given))
    assert (refused.reason, refused.field) == (reason, field)


# Which base.


def base_of(here: Snapshot, *experts: str, base: str = "") -> str:
    plan = decided(here, asking(*experts, base=base)).plan
    [found] = {(known.digest, known.name) for known in (QWEN, OTHER_QWEN, GEMMA) if known.digest == plan.base}
    assert found == (plan.base, plan.base_name)
    return plan.base


BOTH = (worker("a", QWEN), worker("b", GEMMA))


@pytest.mark.parametrize(
    "wanted", [QWEN.digest, "Qwen3-0.6B", "Qwen/Qwen3-0.6B", "qwen3-0.6b", "F:\\models\\Qwen3-0.6B"]
)
def test_a_base_is_named_by_digest_or_name(wanted: str) -> None:
    assert base_of(snapshot(workers=BOTH), base=wanted) == QWEN.digest


@pytest.mark.parametrize("wanted", [OTHER_QWEN.digest, "llama", "/", "s" * 10_000])
def test_a_base_that_no_live_worker_has_is_refused_and_says_which_there_are(wanted: str) -> None:
    refused = refusal(snapshot(workers=BOTH), asking(base=wanted))
    assert (refused.reason, refused.field) == (Reason.UNKNOWN_BASE, "base")
    assert "hocket base add" in refused.message
    assert QWEN.digest in refused.message
    assert len(refused.message) < 1000


def test_a_base_whose_digest_is_in_upper_case_is_told_so() -> None:
    wanted = Base("m", f"sha256:{'ab' * 32}")
    here = snapshot(workers=[worker(base=wanted)])
    refused = refusal(here, asking(base=wanted.digest.upper()))
    assert refused.reason is Reason.UNKNOWN_BASE
    assert "lower case" in refused.message
    assert decided(here, asking(base=wanted.digest)).plan.base == wanted.digest


def test_a_name_of_several_bases_is_refused_and_lists_their_digests() -> None:
    here = snapshot(workers=[worker("a", QWEN), worker("b", OTHER_QWEN)])
    refused = refusal(here, asking(base="qwen3-0.6b"))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "base")
    assert QWEN.digest in refused.message
    assert OTHER_QWEN.digest in refused.message
    assert base_of(here, base=OTHER_QWEN.digest) == OTHER_QWEN.digest


def test_without_experts_the_only_base_answers_and_of_several_one_has_to_be_named() -> None:
    assert base_of(snapshot(workers=[worker("a"), worker("b")])) == QWEN.digest
    refused = refusal(snapshot(workers=BOTH), asking())
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "base")
    assert GEMMA.digest in refused.message


@pytest.mark.parametrize(
    "workers", [[], [worker(base=None)], [worker(formats=frozenset({"apr"}))]], ids=["nobody", "no base", "no adapters"]
)
def test_where_nobody_has_a_base_the_refusal_says_how_to_add_one(workers: list[Worker]) -> None:
    for request in (asking(), asking("sql"), asking(base="qwen3-0.6b")):
        refused = refusal(snapshot(SQL, workers=workers), request)
        assert (refused.reason, refused.field) == (Reason.UNKNOWN_BASE, "base")
        assert "hocket base add" in refused.message


def test_experts_choose_the_base_that_they_ride_on() -> None:
    here = snapshot(SQL, adapter(3, "poem", base=GEMMA), workers=BOTH)
    assert base_of(here, "sql") == QWEN.digest
    assert base_of(here, "poem") == GEMMA.digest


def test_experts_that_no_base_is_right_for_are_refused() -> None:
    here = snapshot(SQL, JSON, adapter(3, "poem", base=GEMMA), workers=BOTH)
    for request in (
        asking("sql", "poem"),
        asking("poem", base=QWEN.digest),
        asking("sql", "json", base="gemma-3-1b-it"),
    ):
        refused = refusal(here, request)
        assert (refused.reason, refused.field) == (Reason.BASE_MISMATCH, "experts")
        assert "digest differs" in refused.message
    assert base_of(here, "sql", "json", base=QWEN.digest) == QWEN.digest


NAMED = Base("F:/models/Qwen3-0.6B", "")
WEIGHED = Base("anything", "", QWEN.weights_sha256)


def test_only_what_a_name_alone_says_is_flagged() -> None:
    here = snapshot(SQL, adapter(3, "named", base=NAMED), adapter(4, "weighed", base=WEIGHED))
    assert decided(here, asking("sql", "weighed")).degradations == []
    assert decided(here, asking("sql", "named")).degradations == ["BASE_BY_NAME"]


def test_a_proven_base_goes_before_one_of_the_right_name() -> None:
    here = snapshot(
        adapter(3, "named", base=NAMED),
        adapter(4, "weighed", base=Base(NAMED.name, "", QWEN.weights_sha256)),
        workers=[worker("a", OTHER_QWEN), worker("b", QWEN)],
    )
    assert base_of(here, "weighed") == QWEN.digest
    assert base_of(here, "weighed", "named") == QWEN.digest
    refused = refusal(here, asking("named"))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "base")
    assert base_of(here, "named", base=OTHER_QWEN.digest) == OTHER_QWEN.digest


# Who computes.


def test_a_plan_says_everything_about_who_answers() -> None:
    here = snapshot(SQL, JSON, workers=[worker("a"), worker("b", resident=frozenset({SQL.digest, JSON.digest}))])
    decision = decided(here, asking("json", "sql", sampling=Sampling(seed=0)))
    plan = decision.plan
    assert (plan.mode, plan.base, plan.base_name, plan.revision, plan.seed) == (
        plan_pb2.MODE_ADAPTER_MIX,
        QWEN.digest,
        QWEN.name,
        7,
        0,
    )
    assert [(expert.digest, expert.weight) for expert in plan.experts] == [(JSON.digest, 1.0), (SQL.digest, 1.0)]
    assert [(replica.worker, replica.address, replica.resident) for replica in plan.replicas] == [
        ("b", "local:b", True),
        ("a", "local:a", False),
    ]
    assert sorted(decision.placed, key=str) == sorted(
        [(QWEN.digest, "b"), (SQL.digest, None), (JSON.digest, None)], key=str
    )


def test_a_worker_that_holds_a_part_is_no_resident_replica() -> None:
    here = snapshot(SQL, JSON, workers=[worker(resident=frozenset({SQL.digest}))])
    assert [replica.resident for replica in decided(here, asking("sql")).plan.replicas] == [True]
    assert [replica.resident for replica in decided(here, asking("sql", "json")).plan.replicas] == [False]


@pytest.mark.parametrize("names", [[], ["sql"]])
def test_the_base_alone_and_a_lone_expert_pass_through(names: list[str]) -> None:
    assert decided(snapshot(SQL), asking(*names)).plan.mode == plan_pb2.MODE_PASS


def test_a_seed_that_nobody_gave_is_drawn_and_named() -> None:
    here = snapshot(SQL)
    drawn = {decided(here, asking("sql")).plan.seed for _ in range(8)}
    assert len(drawn) == 8
    assert max(drawn) < 2**53


def test_a_job_has_one_seed() -> None:
    request = asking("sql", sampling=Sampling(seed=2**64 - 1, temperature=0.5))
    job = decided(snapshot(SQL), request).job(request)
    assert (job.plan.seed, job.sampling) == (2**64 - 1, Sampling(temperature=0.5))
    assert request.sampling.seed == 2**64 - 1


def test_a_job_tells_the_worker_who_scored_next() -> None:
    decision = routed("graph")
    job = decision.job(asking())
    missed = [each.expert.package.digest for each in decision.choice.candidates if not each.weight]
    assert len(missed) == 1
    assert [*job.hints] == missed
    assert not {*job.hints} & {expert.digest for expert in job.plan.experts}
    assert not decided(snapshot(SQL, JSON), asking("sql")).job(asking("sql")).hints, "nothing was scored"


def test_what_only_the_policy_admits_is_flagged() -> None:
    unsigned = adapter(3, "loose")
    unsigned.unsigned_by_policy = True
    decision = decided(snapshot(SQL, unsigned), asking("sql", "loose"))
    decision.count()
    assert decision.degradations == ["UNSIGNED_EXPERT"]


def test_without_a_worker_that_takes_requests_a_text_is_refused_for_now() -> None:
    refused = refusal(snapshot(SQL, JSON, workers=[worker(draining=True)]), asking("sql", "json"))
    assert (refused.reason, refused.retry_after_seconds) == (Reason.NO_REPLICA, 1.0)
    assert len(planned(snapshot(SQL, JSON), "sql", "json")) == 2


def test_what_fits_no_worker_of_the_base_is_refused_for_good() -> None:
    small, other = worker("a", budget_bytes=199), worker("b", GEMMA)
    refused = refusal(snapshot(SQL, JSON, workers=[small, other]), asking("sql", "json"))
    assert (refused.reason, refused.retry_after_seconds) == (Reason.DEVICE_MEMORY, None)
    assert "200 bytes" in refused.message
    leaving = worker("c", budget_bytes=200, draining=True)
    assert refusal(snapshot(SQL, JSON, workers=[small, leaving]), asking("sql", "json")).reason is Reason.NO_REPLICA
    assert len(planned(snapshot(SQL, JSON, workers=[worker(budget_bytes=200)]), "sql", "json")) == 2


def test_adapter_experts_wait_in_host_memory_where_a_worker_has_some_of_its_own() -> None:
    roomy = worker(budget_bytes=1, host_budget_bytes=200)
    assert len(planned(snapshot(SQL, JSON, workers=[roomy]), "sql", "json")) == 2
    assert not roomy.can_load("apr", 2)
    tight = worker(budget_bytes=10_000, host_budget_bytes=199)
    assert refusal(snapshot(SQL, JSON, workers=[tight]), asking("sql", "json")).reason is Reason.DEVICE_MEMORY


# Who is chosen where nobody is named.


KEYED = [asking_for(20, "graph", "graph", parameter_bytes=100), asking_for(21, "tree", "graph", "tree")]
RIDING = Base(KEYED[0].adapter.base.name, KEYED[0].adapter.base.digest)


def routed(text: str, workers: Any = None, **routing: Any) -> TextDecision:
    here = snapshot(*KEYED, workers=workers or [worker(base=RIDING)])
    return decided(here, GenerateRequest(input=TextInput(prompt=text), routing=Routing(**routing)))


def test_the_gate_chooses_and_says_why() -> None:
    plan = routed("a tree").plan
    assert [(expert.name, expert.weight) for expert in plan.experts] == [("acme/tree@1.0.0", 1.0)]
    assert (plan.policy, plan.reason) == (text_pb2.POLICY_RULES, text_pb2.DECISION_REASON_GATE)
    nobody = routed("hello").plan
    assert (list(nobody.experts), nobody.reason) == ([], text_pb2.DECISION_REASON_BASE_NO_MATCH)
    several = routed("graph", expert_count_max=2).plan
    assert [(each.name, each.weight) for each in several.experts] == [
        ("acme/graph@1.0.0", 0.5),
        ("acme/tree@1.0.0", 0.5),
    ]
    assert several.mode == plan_pb2.MODE_ADAPTER_MIX


def test_the_base_alone_and_named_experts_are_no_choice_of_the_gate() -> None:
    alone = routed("a tree", policy=text_pb2.POLICY_BASE).plan
    assert (list(alone.experts), alone.policy, alone.reason) == (
        [], text_pb2.POLICY_BASE, text_pb2.DECISION_REASON_POLICY,
    )  # fmt: skip
    named = decided(snapshot(SQL), asking("sql")).plan
    assert (named.policy, named.reason) == (text_pb2.POLICY_UNSPECIFIED, text_pb2.DECISION_REASON_EXPLICIT)


def test_a_base_that_answers_alone_has_the_whole_weight_and_a_probability_only_by_the_rules() -> None:
    def base_of_decision(decision: TextDecision) -> Any:
        return explain_text(decision, TextInput(prompt="a tree")).base

    named = base_of_decision(decided(snapshot(SQL), asking("sql")))
    assert (named.probability, named.weight, named.chosen) == (0.0, 0.0, False)
    alone = base_of_decision(routed("a tree", policy=text_pb2.POLICY_BASE))
    assert (alone.probability, alone.weight, alone.chosen) == (0.0, 1.0, True)
    ruled = base_of_decision(routed("hello"))
    assert (ruled.probability, ruled.weight, ruled.chosen) == (1.0, 1.0, True)
    lost = base_of_decision(routed("graph tree"))
    assert 0.0 < lost.probability < 0.5
    assert (lost.weight, lost.chosen) == (0.0, False)


def test_two_experts_that_tie_are_mixed_in_halves_where_two_are_allowed() -> None:
    decision = routed("graph", expert_count_max=2)
    told = explain_text(decision, TextInput(prompt="graph")).candidates
    assert [(each.weight, each.chosen) for each in told] == [(0.5, True), (0.5, True)]
    assert told[0].probability == told[1].probability
    assert [each.weight for each in decision.plan.experts] == [0.5, 0.5]


def test_the_formats_own_policy_may_decide() -> None:
    plan = routed("find the graphical", policy=text_pb2.POLICY_HIVELLM).plan
    assert [expert.name for expert in plan.experts] == ["acme/graph@1.0.0"]
    assert plan.policy == text_pb2.POLICY_HIVELLM


def names_of(**routing: Any) -> list[str]:
    return [expert.name for expert in routed("graph", **routing).plan.experts]


def test_lists_narrow_the_choice_by_name_and_by_digest() -> None:
    assert names_of(deny=["graph"]) == names_of(allow=["acme/tree"]) == ["acme/tree@1.0.0"]
    assert names_of(deny=[KEYED[0].digest]) == names_of(deny=["acme/graph@1.0.0"]) == ["acme/tree@1.0.0"]
    assert names_of(allow=["graph"], deny=["graph"]) == []


def test_a_name_without_a_version_means_every_version() -> None:
    old = asking_for(22, "leaf", "leaf")
    new = adapter(23, "leaf", version="9.0.0", base=GEMMA, routing=old.adapter.routing)
    here = snapshot(old, new, workers=[worker(base=RIDING)])
    for routing, chosen in ((Routing(allow=["leaf"]), ["acme/leaf@1.0.0"]), (Routing(deny=["leaf"]), [])):
        request = GenerateRequest(input=TextInput(prompt="leaf"), routing=routing)
        assert [expert.name for expert in decided(here, request).plan.experts] == chosen


def test_of_one_name_the_version_that_stands_for_it_may_be_chosen_and_allowing_only_others_is_refused() -> None:
    old, new = (asking_for(number, "leaf", "leaf", version=f"{number}.0.0") for number in (22, 23))
    needy = asking_for(24, "needy", "leaf")
    needy.adapter.constraints.requirements.append("leaf")
    here = snapshot(old, new, needy, workers=[worker(base=RIDING)])

    def asked(**routing: Any) -> GenerateRequest:
        return GenerateRequest(input=TextInput(prompt="leaf"), routing=Routing(**routing))

    for allow in (["leaf@22.0.0"], [old.digest], ["needy"], [old.digest, "needy"]):
        refused = refusal(here, asked(allow=allow))
        assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "routing.allow")
        chosen = decided(here, asked(allow=[*allow, new.digest])).plan.experts
        assert [expert.digest for expert in chosen] == [new.digest]
    assert not decided(here, asked(deny=["leaf@23.0.0"])).plan.experts
    assert [each.digest for each in decided(here, asked(deny=["leaf@22.0.0"])).plan.experts] == [new.digest]


def test_what_has_no_room_on_any_worker_is_not_chosen() -> None:
    assert names_of() == ["acme/graph@1.0.0"]
    small = [worker(base=RIDING, budget_bytes=99), worker("big", base=RIDING, budget_bytes=1000, draining=True)]
    assert [each.name for each in routed("graph", small).plan.experts] == ["acme/tree@1.0.0"]


def test_a_chosen_expert_that_belongs_by_name_alone_is_flagged() -> None:
    named = asking_for(24, "named", "leaf")
    named.adapter.base.digest = ""
    here = snapshot(named, workers=[worker(base=RIDING)])
    assert decided(here, GenerateRequest(input=TextInput(prompt="leaf"))).degradations == ["BASE_BY_NAME"]
    assert decided(here, GenerateRequest(input=TextInput(prompt="hello"))).degradations == []


@pytest.mark.parametrize(
    ("routing", "reason", "field"),
    [
        (Routing(allow=["graph", "nobody"]), Reason.UNKNOWN_EXPERT, "routing.allow[1]"),
        (Routing(deny=[""]), Reason.BAD_REQUEST, "routing.deny[0]"),
        (Routing(deny=["graph"] * (NAMED_MAX + 1)), Reason.BAD_REQUEST, "routing.deny"),
        (Routing(expert_count_max=EXPERTS_MAX + 1), Reason.TOO_MANY_EXPERTS, "routing.expert_count_max"),
        (Routing(policy=text_pb2.POLICY_BASE, allow=["nobody"]), Reason.UNKNOWN_EXPERT, "routing.allow[0]"),
        (Routing(policy=99), Reason.BAD_REQUEST, "routing.policy"),  # type: ignore[arg-type]  # from another release
    ],
)
def test_routing_that_makes_no_sense_is_refused(routing: Routing, reason: Reason, field: str) -> None:
    here = snapshot(*KEYED, workers=[worker(base=RIDING)])
    refused = refusal(here, GenerateRequest(input=TextInput(prompt="graph"), routing=routing))
    assert (refused.reason, refused.field) == (reason, field)
    assert names_of(deny=["tree"] * NAMED_MAX, expert_count_max=EXPERTS_MAX) == ["acme/graph@1.0.0"]


def test_experts_beside_routing_are_refused() -> None:
    refused = refusal(snapshot(SQL), asking("sql", routing=Routing(policy=text_pb2.POLICY_RULES)))
    assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "routing")
    assert planned(snapshot(SQL), "sql", routing=Routing()) == ["acme/sql@1.0.0"]


def test_a_withdrawn_expert_is_chosen_no_more() -> None:
    gone = asking_for(25, "leaf", "leaf")
    gone.state = YANKED
    here = snapshot(gone, workers=[worker(base=RIDING)])
    assert list(decided(here, GenerateRequest(input=TextInput(prompt="leaf"))).plan.experts) == []


def test_gates_follow_bases_and_read_a_package_once() -> None:
    experts = index(KEYED)
    before = build_gates(experts, [worker(base=RIDING)], {})
    after = build_gates(experts, [worker(base=RIDING), worker("g", GEMMA)], before)
    assert before.keys() == {RIDING.digest}
    assert after[RIDING.digest] is before[RIDING.digest]
    assert after[GEMMA.digest].experts == ()
    again = index([Package.FromString(each.SerializeToString()) for each in KEYED], experts.terms)
    assert build_gates(again, [worker(base=RIDING)], before)[RIDING.digest] is before[RIDING.digest]
    assert all(again.terms[digest] is terms for digest, terms in experts.terms.items())
    changed = Package.FromString(KEYED[1].SerializeToString())
    changed.adapter.routing.keywords.append("leaf")
    others = index([KEYED[0], changed], experts.terms)
    third = build_gates(others, [worker(base=RIDING)], before)[RIDING.digest]
    assert third is not before[RIDING.digest]
    assert third.terms[0] is before[RIDING.digest].terms[0]
    assert third.terms[1] is not before[RIDING.digest].terms[1]


# A base whose workers are leaving, or have just gone.


def without(*others: Worker, gone: bool = True, seconds: float = 60.0) -> Snapshot:
    """Experts and these workers, where the one of QWEN is draining, or was there a moment ago."""
    if gone:
        known = (QWEN, time.monotonic() + seconds)
        return replace(snapshot(SQL, JSON, adapter(3, "poem", base=GEMMA), workers=others), gone_bases=(known,))
    leaving = worker("leaving", QWEN, draining=True)
    return snapshot(SQL, JSON, adapter(3, "poem", base=GEMMA), workers=[leaving, *others])


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("others", [(), (worker("b", GEMMA),)])
@pytest.mark.parametrize("request_", [asking("sql"), asking(base=QWEN.digest), asking("json", base=QWEN.name)])
def test_a_base_without_a_worker_for_the_moment_is_no_unknown_one(
    *, gone: bool, others: tuple[Worker, ...], request_: GenerateRequest
) -> None:
    refused = refusal(without(*others, gone=gone), request_)
    assert (refused.reason, refused.retry_after_seconds) == (Reason.NO_REPLICA, 1.0)
    assert decided(without(worker("back"), *others, gone=gone), request_).plan.base == QWEN.digest


@pytest.mark.parametrize("gone", [True, False])
def test_a_base_that_was_never_announced_stays_unknown(*, gone: bool) -> None:
    here = without(gone=gone)
    assert refusal(here, asking(base=GEMMA.digest)).reason is Reason.UNKNOWN_BASE
    assert refusal(here, asking("poem")).reason is Reason.BASE_MISMATCH
    assert refusal(here, asking("sql", "poem")).reason is Reason.BASE_MISMATCH


def test_a_base_that_has_been_gone_for_long_is_unknown() -> None:
    assert refusal(without(seconds=-1.0), asking("sql")).reason is Reason.UNKNOWN_BASE
    assert refusal(without(worker("b", GEMMA), seconds=-1.0), asking("sql")).reason is Reason.BASE_MISMATCH


def test_a_name_that_a_base_has_taken_over_means_the_one_that_answers() -> None:
    here = replace(snapshot(workers=[worker("b", OTHER_QWEN)]), gone_bases=((QWEN, time.monotonic() + 60.0),))
    assert base_of(here, base="qwen3-0.6b") == OTHER_QWEN.digest


def test_bases_whose_workers_have_gone_are_remembered_for_a_while_and_so_many() -> None:
    recent = RecentBases()
    assert recent.note([worker("a"), worker("b", GEMMA, draining=True)]) == ()
    [(base, until)] = recent.note([worker("a")])
    assert base == GEMMA
    assert 0 < until - time.monotonic() <= REMEMBERED_SECONDS
    assert [base for base, _ in recent.note([])] == [GEMMA, QWEN]
    assert [base for base, _ in recent.note([worker("a")])] == [GEMMA]
    many = [worker(str(number), Base("m", digest(1000 + number))) for number in range(REMEMBERED_MAX)]
    recent.note([*many, worker("a")])
    assert [base for base, _ in recent.note([worker("a")])] == [
        each.base for each in sorted(many, key=lambda w: w.name)
    ]


def test_a_base_of_which_only_draining_workers_are_left_is_not_chosen_where_another_serves() -> None:
    here = snapshot(workers=[worker("a", QWEN, draining=True), worker("b", GEMMA)])
    assert base_of(here) == GEMMA.digest


def test_whose_turn_of_what_it_is_reaches_the_worker() -> None:
    request = asking(session="s", tenant="t", priority=0)
    job = decided(snapshot(), request).job(request)
    assert (job.session, job.tenant, job.priority, job.HasField("priority")) == ("s", "t", 0, True)
    request = asking()
    assert not decided(snapshot(), request).job(request).HasField("priority")


def test_sessions_of_the_same_name_are_spread_over_workers_by_tenant() -> None:
    here = snapshot(workers=[worker(name) for name in "abcd"])
    homes = {
        tenant: decided(here, asking(session="1", tenant=tenant)).plan.replicas[0].worker
        for tenant in map(str, range(40))
    }
    assert {*homes.values()} == {*"abcd"}
    for tenant, home in homes.items():
        assert decided(here, asking(session="1", tenant=tenant)).plan.replicas[0].worker == home


@pytest.mark.parametrize(
    ("sound", "wrong", "field"),
    [
        ({"session": "s" * 128}, {"session": "s" * 129}, "session"),
        ({"tenant": "t" * 64}, {"tenant": "t" * 65}, "tenant"),
        ({"priority": 9}, {"priority": 10}, "priority"),
    ],
)
def test_what_cannot_be_queued_is_refused(sound: dict[str, Any], wrong: dict[str, Any], field: str) -> None:
    decided(snapshot(), asking(**sound))
    error = refusal(snapshot(), asking(**wrong))
    assert (error.reason, error.field) == (Reason.BAD_REQUEST, field)
