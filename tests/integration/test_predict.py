"""Signed experts answer as one weighted mixture: the same contract in one process and over four sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration

from hocket.client.router import Answer, Partial, Planned
from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of
from hocket.mixtures import FixedGate, MixtureRecord, MixtureRef, SoftmaxGate, gate_tensor
from hocket.packages import apr
from hocket.packages import model as m
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.status import from_rpc_error
from hocket.v1 import plan_pb2, router_pb2, router_pb2_grpc
from hocket.v1.tensor_pb2 import Tensor
from tests.builders import chain, floats, forest, grow
from tests.deployments import Deployment, deployed
from tests.experts import expert_package
from tests.signing import envelope_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = floats([1, 2], [-3, 0.5], [0, 0], [10, -10])


@pytest.fixture(scope="module", params=["one process", "four servers"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    return tmp_path_factory.mktemp(kind.replace(" ", "-"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(kind: str, folder: Path) -> AsyncIterator[Deployment]:
    async with deployed(kind, folder, router={"in_flight_max": 16}) as deployment:
        yield deployment


def linear(*weights: float, intercept: float = 0.0) -> bytes:
    return apr.write(m.LinearRegression(floats(*weights), intercept), created_at="0")


def line(*weights: float, intercept: float = 0.0) -> Any:
    return ROWS @ floats(*weights) + np.float32(intercept)


def classifier(*labels: str | None, threshold: float = 0.0) -> bytes:
    """Says the second label where the first feature is above the threshold."""
    tree = grow((0, threshold, (0, 1), (1, 1)))
    return apr.write(m.DecisionTreeClassifier(tree), labels=list(labels), created_at="0")


A, B, C = linear(1, 1), linear(2, 0, intercept=1), linear(0, -3)


def ids(*packages: bytes) -> tuple[ExpertId, ...]:
    return tuple(ExpertId(digest_of(data)) for data in packages)


def fixed(name: str, *packages: bytes, weights: tuple[float, ...] | None = None, **changes: Any) -> MixtureRecord:
    gate = FixedGate(weights or (1.0,) * len(packages))
    return MixtureRecord(name, ids(*packages), gate, changes.pop("top_k", len(packages)), **changes)


async def published(suite: Deployment, *packages: bytes) -> None:
    for data in packages:
        await suite.publish(data)


async def refusal(suite: Deployment, *args: Any, **options: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        await suite.router.answer(*args, **options)
    return caught.value


async def test_a_lone_expert_answers_under_each_of_its_addresses(suite: Deployment) -> None:
    digest = await suite.publish(A, "acme/sum@1.0.0")
    for model in ("acme/sum@1.0.0", digest, f"{digest}#0"):
        answer = await suite.router.answer(model, ROWS)
        np.testing.assert_allclose(answer.value[:, 0], line(1, 1))
        assert answer.plan.mode == plan_pb2.MODE_PASS
        assert answer.contributions[0].expert == digest
        assert answer.contributions[0].state == plan_pb2.CONTRIBUTION_STATE_ARRIVED
        assert answer.finish.reason == plan_pb2.FINISH_REASON_COMPLETE


async def test_a_fixed_mixture_is_the_weighted_mean(suite: Deployment) -> None:
    await published(suite, A, B)
    await suite.put(fixed("fixed", A, B, weights=(1, 3)))
    answer = await suite.router.answer("fixed", ROWS)
    np.testing.assert_allclose(answer.value[:, 0], 0.25 * line(1, 1) + 0.75 * line(2, 0, intercept=1), rtol=1e-6)
    assert answer.coverage.tolist() == [1.0] * 4
    assert [list(c.weights) for c in answer.contributions] in ([[0.25] * 4, [0.75] * 4], [[0.75] * 4, [0.25] * 4])


async def test_gating_is_per_row_and_only_chosen_experts_run(suite: Deployment) -> None:
    await published(suite, A, B)
    weights = floats([100, -100], [0, 0])
    gate = SoftmaxGate(2, 2, digest_of(gate_tensor(weights)))
    await suite.put(MixtureRecord("gated", ids(A, B), gate, 1), gate_tensor(weights))
    answer = await suite.router.answer("gated", ROWS)
    first = ROWS[:, 0] >= 0  # ties, in the third row, go to the earlier member
    np.testing.assert_allclose(answer.value[:, 0], np.where(first, line(1, 1), line(2, 0, intercept=1)))
    rows = {c.expert: list(c.rows) for c in answer.contributions}
    assert rows == {digest_of(A): [0, 2, 3], digest_of(B): [1]}


async def test_a_request_may_override_top_k(suite: Deployment) -> None:
    await published(suite, A, B, C)
    await suite.put(fixed("topk", A, B, C, weights=(3, 2, 1), top_k=1))
    assert len((await suite.router.answer("topk", ROWS)).contributions) == 1
    assert len((await suite.router.answer("topk", ROWS, top_k=2)).contributions) == 2


async def test_members_are_aligned_by_label(suite: Deployment) -> None:
    low, high, rest = classifier("0", "1"), classifier("2", "1", threshold=5), classifier(None, "2", threshold=-1)
    await published(suite, low, high, rest)
    await suite.put(fixed("labelled", low, high, rest, labels=("0", "1", "2", "3")))
    answer = await suite.router.answer("labelled", floats([1, 0]))
    assert answer.labels == ("0", "1", "2", "3")
    np.testing.assert_allclose(answer.value, [[0, 1 / 3, 2 / 3, 0]], rtol=1e-6)
    assert answer.best_labels() == ["2"]


async def test_nested_mixtures_multiply_and_normalise_once(suite: Deployment) -> None:
    await published(suite, A, B, C)
    inner = await suite.put(fixed("inner", A, B, weights=(0.7, 0.3)))
    other = await suite.put(fixed("other", B, C, weights=(0.5, 0.5), top_k=1))
    outer = MixtureRecord("outer", (MixtureRef(inner), MixtureRef(other)), FixedGate((0.6, 0.4)), 2)
    await suite.put(outer)
    answer = await suite.router.answer("outer", ROWS)
    a, b = 0.6 * 0.7, 0.6 * 0.3 + 0.4 * 0.5
    expected = (a * line(1, 1) + b * line(2, 0, intercept=1)) / (a + b)
    np.testing.assert_allclose(answer.value[:, 0], expected, rtol=1e-5)
    assert {c.expert for c in answer.contributions} == {digest_of(A), digest_of(B)}


async def test_the_plan_comes_first_partials_replace_each_other_and_one_final_ends(suite: Deployment) -> None:
    trees = [classifier("0", "1", threshold=value) for value in (-2.0, 0.5, 3.0)]
    await published(suite, *trees)
    await suite.put(fixed("progress", *trees))
    events = [event async for event in suite.router.predict("progress", ROWS, partials=True)]
    assert isinstance(events[0], Planned)
    assert isinstance(events[-1], Answer)
    partials = events[1:-1]
    assert [partial.sequence for partial in partials if isinstance(partial, Partial)] == [*range(1, len(partials) + 1)]
    for partial in partials:
        assert isinstance(partial, Partial)
        assert partial.lower is not None
        assert partial.upper is not None
        assert ((partial.lower <= events[-1].value) & (events[-1].value <= partial.upper)).all()
        assert (partial.coverage < 1).all()


async def test_route_explains_without_running(suite: Deployment) -> None:
    await published(suite, A, B, C)
    await suite.put(fixed("explained", A, B, C, weights=(1, 2, 5), top_k=2))
    decision = await suite.router.route("explained", ROWS[:1])
    ranked = decision.rows[0].candidates
    assert [candidate.expert for candidate in ranked] == [digest_of(C), digest_of(B), digest_of(A)]
    assert [round(candidate.gate_weight, 6) for candidate in ranked] == [0.625, 0.25, 0.125]
    assert [candidate.chosen for candidate in ranked] == [True, True, False]
    assert sum(candidate.weight for candidate in ranked) == pytest.approx(1.0)
    assert decision.plan.experts[0].replicas[0].worker


async def test_a_model_is_described_with_members_labels_and_signers(suite: Deployment) -> None:
    tree = classifier("no", "yes")
    await suite.publish(tree, "acme/yes@1.0.0")
    await suite.put(fixed("described", tree))
    described = await suite.router.get_mixture("described")
    assert (described.gate, described.top_k, list(described.labels)) == ("fixed", 1, ["no", "yes"])
    assert (described.output_range.lower, described.output_range.upper) == (0.0, 1.0)
    assert described.release.publisher == "acme"
    release = described.members[0].package.releases[0]
    assert (release.publisher, release.name, release.version) == ("acme", "yes", "1.0.0")
    assert "described" in [summary.name async for summary in suite.router.list_mixtures()]


async def test_lists_come_in_pages(suite: Deployment) -> None:
    await published(suite, A, B)
    stub: Any = router_pb2_grpc.RouterServiceStub(suite.channel)
    names: list[str] = []
    token = ""
    while True:
        page = await stub.ListMixtures(router_pb2.ListMixturesRequest(page_size=1, page_token=token), timeout=5)
        names += [summary.name for summary in page.mixtures]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(set(names)) == [summary.name async for summary in suite.router.list_mixtures()]
    for bad in (router_pb2.ListMixturesRequest(page_size=-1), router_pb2.ListMixturesRequest(page_token="elsewhere")):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.ListMixtures(bad, timeout=5)
        assert from_rpc_error(caught.value).reason is Reason.BAD_REQUEST


BAD_REQUESTS = [
    ("width", {"input": matrix_to_tensor(np.zeros((1, 3), np.float32))}, Reason.BAD_TENSOR),
    ("nan", {"input": matrix_to_tensor(floats([np.nan, 1]))}, Reason.BAD_TENSOR),
    ("infinity", {"input": matrix_to_tensor(floats([np.inf, 1]))}, Reason.BAD_TENSOR),
    ("empty", {"input": Tensor(datatype="FP32", shape=[0, 2])}, Reason.BAD_TENSOR),
    ("empty tensor", {"input": Tensor()}, Reason.BAD_TENSOR),
    ("no tensor", {"input": None}, Reason.BAD_REQUEST),
    ("no model", {"model": ""}, Reason.BAD_REQUEST),
    ("1025 rows", {"input": matrix_to_tensor(np.zeros((1025, 2), np.float32))}, Reason.BAD_TENSOR),
    ("half the bytes", {"input": Tensor(datatype="FP32", shape=[2, 2], contents=bytes(8))}, Reason.BAD_TENSOR),
    ("unknown model", {"model": "nobody"}, Reason.UNKNOWN_MODEL),
    ("unknown digest", {"model": "sha256:" + "0" * 64}, Reason.UNKNOWN_MODEL),
    ("unknown member", {"model": f"{digest_of(A)}#7"}, Reason.UNKNOWN_MODEL),
    ("model as a path", {"model": "../../etc/passwd"}, Reason.UNKNOWN_MODEL),
    ("bad member", {"model": "x#y"}, Reason.UNKNOWN_MODEL),
    ("long model", {"model": "#" * 100_000}, Reason.UNKNOWN_MODEL),
    ("endless patience", {"straggler_timeout": Duration(seconds=2**62)}, Reason.BAD_REQUEST),
    ("no patience", {"straggler_timeout": Duration()}, Reason.BAD_REQUEST),
    ("top_k 0", {"top_k": 0}, Reason.TOP_K_OUT_OF_RANGE),
    ("top_k 3 of 2", {"top_k": 3}, Reason.TOP_K_OUT_OF_RANGE),
    ("min_coverage", {"min_coverage": 1.5}, Reason.BAD_REQUEST),
    ("min_coverage nan", {"min_coverage": float("nan")}, Reason.BAD_REQUEST),
    ("on_missing", {"on_missing": 9}, Reason.BAD_REQUEST),
]


@pytest.mark.parametrize(("change", "reason"), [row[1:] for row in BAD_REQUESTS], ids=[row[0] for row in BAD_REQUESTS])
async def test_a_bad_request_gets_its_status_and_the_process_lives(
    suite: Deployment, change: dict[str, Any], reason: Reason
) -> None:
    await published(suite, A, B)
    await suite.put(fixed("two", A, B))
    stub: Any = router_pb2_grpc.RouterServiceStub(suite.channel)
    good: Any = {"model": "two", "input": matrix_to_tensor(ROWS), "top_k": 2, "min_coverage": 1.0}
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stub.Predict(router_pb2.PredictRequest(**{**good, **change}), timeout=5):
            pass
    assert from_rpc_error(caught.value).reason is reason
    assert [event async for event in stub.Predict(router_pb2.PredictRequest(**good), timeout=5)][-1].HasField("final")


async def test_the_largest_batch_is_answered(suite: Deployment) -> None:
    wide = apr.write(m.LinearRegression(np.ones(2048, np.float32), 0.0), created_at="0")
    digest = await suite.publish(wide)
    rows = np.ones((1024, 2048), np.float32)
    assert (await suite.router.answer(digest, rows)).value.ravel().tolist() == [2048.0] * 1024


async def test_a_yanked_member_counts_as_missing_and_a_yanked_expert_is_refused(suite: Deployment) -> None:
    kept, withdrawn = linear(5, 5), linear(7, 7)
    await published(suite, kept, withdrawn)
    await suite.put(fixed("half", kept, withdrawn))
    assert (await suite.router.answer("half", ROWS)).coverage.min() == 1.0
    await suite.registry.yank(digest_of(withdrawn), "found to be wrong")
    await _until(suite, digest_of(withdrawn), Reason.YANKED)
    failed = await refusal(suite, "half", ROWS)
    assert (failed.reason, failed.metadata["expert_reason"]) == (Reason.COVERAGE, "YANKED")
    assert failed.metadata["expert"] == digest_of(withdrawn)
    assert f"expert {failed.metadata['name']} ({digest_of(withdrawn)}) is missing" in failed.message
    assert failed.metadata["name"].startswith("acme/")
    answer = await suite.router.answer("half", ROWS, on_missing="renormalise")
    np.testing.assert_allclose(answer.value[:, 0], line(5, 5))
    assert answer.coverage.tolist() == [0.5] * 4
    assert answer.finish.reason == plan_pb2.FINISH_REASON_PARTIAL
    assert "MISSING_EXPERT" in answer.finish.degradations
    states = {c.expert: (c.state, c.reason, list(c.weights)) for c in answer.contributions}
    assert states[digest_of(withdrawn)] == (plan_pb2.CONTRIBUTION_STATE_FAILED, "YANKED", [0.0] * 4)
    assert states[digest_of(kept)][2] == [1.0] * 4
    assert (await refusal(suite, "half", ROWS, on_missing="renormalise", min_coverage=0.6)).reason is Reason.COVERAGE


async def _until(suite: Deployment, model: str, reason: Reason) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                await suite.router.answer(model, ROWS)
            except HocketError as error:
                if error.reason is reason:
                    return
            await asyncio.sleep(0.01)


async def test_an_adapter_expert_answers_no_rows_and_is_not_listed(suite: Deployment) -> None:
    data = expert_package("expert-sql", "1.0.0")
    digest, name = digest_of(data), "acme/expert-sql@1.0.0"
    await suite.registry.publish(data, envelope_of(data, name=name, format="expert"))
    await _until(suite, digest, Reason.NOT_SERVABLE)

    for address in (digest, name):
        with pytest.raises(HocketError, match="answers text") as refused:
            await suite.router.answer(address, ROWS)
        assert refused.value.reason is Reason.NOT_SERVABLE
        with pytest.raises(HocketError, match="answers text"):
            await suite.router.route(address, ROWS)
        with pytest.raises(HocketError, match="answers text"):
            await suite.router.get_mixture(address)
    assert digest not in {mixture.digest async for mixture in suite.router.list_mixtures()}


async def test_many_requests_at_once_each_get_their_own_answer(suite: Deployment) -> None:
    await published(suite, A, B)
    await suite.put(fixed("crowd", A, B))

    async def one(number: float) -> float:
        rows = floats([number, number])
        return float((await suite.router.answer("crowd", rows)).value[0, 0])

    numbers = [float(number) for number in range(12)]
    assert await asyncio.gather(*map(one, numbers)) == [0.5 * 2 * n + 0.5 * (2 * n + 1) for n in numbers]


async def test_a_cancelled_request_leaves_nothing_behind(suite: Deployment) -> None:
    await published(suite, A)
    events = suite.router.predict(digest_of(A), ROWS)
    assert isinstance(await anext(events), Planned)
    await events.aclose()
    for _ in range(20):
        await suite.router.answer(digest_of(A), ROWS)


async def test_an_answer_does_not_depend_on_batch_mates(suite: Deployment) -> None:
    random = np.random.default_rng(3)
    trees = tuple(m.DecisionTreeClassifier(grow((0, float(random.normal()), (0, 1), (1, 1)))) for _ in range(9))
    data = apr.write(forest(*[tree.tree for tree in trees]), created_at="0")
    await published(suite, data, A)
    rows = random.standard_normal((64, 2)).astype(np.float32)
    for digest in (digest_of(data), digest_of(A)):
        together = (await suite.router.answer(digest, rows)).value
        alone = await asyncio.gather(*(suite.router.answer(digest, row) for row in rows[:8]))
        assert [answer.value.tobytes() for answer in alone] == [row.tobytes() for row in together[:8]]


async def test_an_expert_that_answers_infinity_is_excluded_and_flagged(suite: Deployment) -> None:
    huge = linear(3e38, 3e38)
    await published(suite, A, huge)
    await suite.put(fixed("overflows", A, huge))
    rows = floats([10, 10])
    assert (await refusal(suite, digest_of(huge), rows)).reason is Reason.BAD_ANSWER
    failed = await refusal(suite, "overflows", rows)
    assert (failed.reason, failed.metadata["expert_reason"]) == (Reason.COVERAGE, "BAD_ANSWER")
    answer = await suite.router.answer("overflows", rows, on_missing="renormalise")
    assert answer.value.tolist() == [[20.0]]
    excluded = next(c for c in answer.contributions if c.expert == digest_of(huge))
    assert excluded.state == plan_pb2.CONTRIBUTION_STATE_EXCLUDED
    assert (await suite.router.answer("overflows", floats([0, 0]))).coverage.min() == 1.0  # a request fails only itself


def slow(trees: int) -> bytes:
    """An expert that takes about 4 ms per tree for a thousand rows."""
    members = tuple(m.DecisionTreeRegressor(chain(1000)) for _ in range(trees))
    return apr.write(m.RandomForestRegressor(members, trees), created_at="0")


MANY_ROWS = np.zeros((1024, 2), np.float32)


async def test_a_full_expert_hands_over_only_where_the_mixture_says_so(suite: Deployment) -> None:
    busy, rows = slow(12), MANY_ROWS
    await published(suite, A, busy)
    await suite.put(fixed("roomy", busy, A, weights=(9, 1), top_k=1))
    await suite.put(fixed("tight", busy, A, weights=(9, 1), top_k=1, capacity_factor=1.0))
    running = [asyncio.create_task(suite.router.answer("tight", rows)) for _ in range(6)]  # ceil(1 * 1 * 12 / 2)
    async with asyncio.timeout(5):
        while not (decision := await suite.router.route("tight", ROWS)).plan.overflowed:  # noqa: ASYNC110 - in a server
            await asyncio.sleep(0.005)
    assert list(decision.plan.overflowed) == [digest_of(busy)]
    assert [expert.expert for expert in decision.plan.experts] == [digest_of(A)]
    assert [e.expert for e in (await suite.router.route("roomy", ROWS)).plan.experts] == [digest_of(busy)]
    answer = await suite.router.answer("tight", ROWS)
    np.testing.assert_allclose(answer.value[:, 0], line(1, 1))
    assert "CAPACITY_OVERFLOW" in answer.finish.degradations
    await asyncio.gather(*running)
    assert not (await suite.router.route("tight", ROWS)).plan.overflowed


async def test_one_more_request_than_the_router_may_run_is_shed_with_a_pause(suite: Deployment) -> None:
    digest, other = await suite.publish(slow(13)), await suite.publish(slow(14))
    running = [asyncio.create_task(suite.router.answer(busy, MANY_ROWS)) for busy in (digest, other) for _ in range(8)]
    await asyncio.sleep(0.1)
    failed = await refusal(suite, digest, ROWS)
    assert (failed.reason, failed.retry_after_seconds) == (Reason.QUEUE_FULL, 0.1)
    await asyncio.gather(*running)
    assert (await suite.router.answer(digest, ROWS)).coverage.min() == 1.0


async def test_a_late_expert_counts_as_missing_or_fails_the_call(suite: Deployment) -> None:
    busy, rows = slow(100), MANY_ROWS
    await published(suite, A, busy)
    await suite.put(fixed("late", A, busy))
    failed = await refusal(suite, "late", rows, straggler_timeout_seconds=0.1)
    assert (failed.reason, failed.metadata["expert_reason"]) == (Reason.COVERAGE, "STRAGGLER")
    await suite.router.answer(digest_of(busy), ROWS)  # the pass that nobody waits for is over
    answer = await suite.router.answer("late", rows, straggler_timeout_seconds=0.1, on_missing="renormalise")
    states = {contribution.expert: contribution.state for contribution in answer.contributions}
    assert states[digest_of(busy)] == plan_pb2.CONTRIBUTION_STATE_TIMED_OUT
    assert answer.coverage.tolist() == [0.5] * 1024


async def test_partials_arrive_while_experts_finish(suite: Deployment) -> None:
    busy, rows = slow(60), MANY_ROWS
    await published(suite, A, busy)
    await suite.put(fixed("slowly", A, busy, weights=(1, 3)))
    await suite.router.answer(digest_of(A), ROWS)  # resident, so that it is the first of the two on a busy machine too
    kinds = [type(event) async for event in suite.router.predict("slowly", rows, partials=True)]
    assert kinds == [Planned, Partial, Answer]


async def test_an_explanation_too_long_to_send_is_refused_with_advice(suite: Deployment) -> None:
    many = [linear(float(number), 1) for number in range(3, 68)]
    await published(suite, *many)
    await suite.put(fixed("wide", *many))
    rows = np.zeros((1024, 2), np.float32)
    with pytest.raises(HocketError, match="at most 1008 rows"):
        await suite.router.route("wide", rows)
    assert len((await suite.router.route("wide", rows[:1008])).rows) == 1008
    assert (await suite.router.answer("wide", rows)).coverage.min() == 1.0


async def test_a_mixture_answers_to_its_release_too(suite: Deployment) -> None:
    await published(suite, A)
    await suite.put(fixed("released", A))
    assert (await suite.router.answer("acme/released@1", ROWS)).coverage.min() == 1.0
