from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.client import Answer, Partial, Planned, Routing, TextDelta, TextFinish, TextPlanned, TextStart, blocking
from hocket.client.blocking import RouterClient, connect, connect_registry
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.mixtures import FixedGate, MixtureRecord, MixtureRef
from hocket.v1 import text_pb2
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.fakes import LOW, MIXTURE, ScriptedRegistry, ScriptedRouter, serving
from tests.signing import envelope_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
ROW = [0.5, 1.5]


@pytest.fixture
def scripted() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def address(scripted: ScriptedRouter) -> Iterator[str]:
    with serving(add_RouterServiceServicer_to_server, scripted) as server:
        yield server.address


@pytest.fixture
def router(address: str) -> Iterator[RouterClient]:
    with connect(address) as client:
        yield client


@pytest.fixture
def scripted_registry() -> ScriptedRegistry:
    return ScriptedRegistry()


@pytest.fixture
def registry_address(scripted_registry: ScriptedRegistry) -> Iterator[str]:
    with serving(add_RegistryServiceServicer_to_server, scripted_registry) as running:
        yield running.address


def test_a_prediction_is_a_plan_partials_and_an_answer(router: RouterClient) -> None:
    planned, partial, answer = router.predict("digits", [ROW, ROW], partials=True)

    assert isinstance(planned, Planned)
    assert planned.plan.digest == MIXTURE
    assert isinstance(partial, Partial)
    assert partial.coverage.tolist() == [0.75, 0.75]
    assert isinstance(answer, Answer)
    assert answer.value.tolist() == np.array([[0.1, 0.9]] * 2, np.float32).tolist()
    assert answer.best_labels() == ["1", "1"]


def test_an_answer_comes_alone(router: RouterClient, scripted: ScriptedRouter) -> None:
    answer = router.answer(
        "digits", ROW, top_k=1, min_coverage=0.5, straggler_timeout_seconds=0.25, on_missing="renormalise"
    )

    assert answer.coverage.tolist() == [1.0]
    [request] = scripted.requests
    assert (request.top_k, request.min_coverage, request.partials) == (1, 0.5, False)
    assert request.straggler_timeout.ToMilliseconds() == 250


def test_a_text_is_a_plan_a_start_deltas_and_a_finish(router: RouterClient, scripted: ScriptedRouter) -> None:
    planned, start, *deltas, finish = router.generate("hi", experts={"sql": 0.7}, base="qwen", max_tokens=9)

    assert isinstance(planned, TextPlanned)
    assert isinstance(start, TextStart)
    assert [delta.text for delta in deltas if isinstance(delta, TextDelta)] == ["Sure:", "", " one, two."]
    assert isinstance(finish, TextFinish)
    [request] = scripted.requests
    assert (request.base, request.sampling.max_tokens, request.experts[0].weight) == ("qwen", 9, 0.7)


def test_a_whole_text_comes_at_once(router: RouterClient, scripted: ScriptedRouter) -> None:
    answer = router.answer_text(
        messages=[{"role": "user", "content": "hi"}],
        timeout_seconds=50.0,
        temperature=0.5,
        session="s",
        tenant="t",
        priority=9,
    )

    assert answer.text == "Sure: one, two."
    [request] = scripted.requests
    assert request.input.conversation.messages[0].content == "hi"
    assert (request.session, request.tenant, request.priority) == ("s", "t", 9)
    [left] = scripted.seconds_left
    assert left == pytest.approx(50.0, abs=5)


def test_leaving_a_text_early_cancels_the_call(router: RouterClient, scripted: ScriptedRouter) -> None:
    scripted.stall = True
    for event in router.generate("hi"):
        if isinstance(event, TextDelta):
            break

    assert scripted.cancelled.wait(5)


def test_a_decision_a_list_and_a_description(router: RouterClient) -> None:
    assert router.route("digits", ROW).rows[0].candidates[0].expert == LOW
    assert [mixture.name for mixture in router.list_mixtures()] == ["digits", "fruit"]
    assert router.get_mixture("digits").labels == ["0", "1"]


def test_a_decision_about_a_text(router: RouterClient, scripted: ScriptedRouter) -> None:
    decision = router.route_text("hi", routing=Routing(allow=["low"], expert_count_max=2))
    assert decision.candidates[0].name == "acme/low@1.0.0"
    assert scripted.requests[-1].routing.expert_count_max == 2
    router.answer_text("hi", routing=Routing("base"))
    assert scripted.requests[-1].routing.policy == text_pb2.POLICY_BASE


def test_a_refusal_arrives_as_the_server_raised_it(router: RouterClient, scripted: ScriptedRouter) -> None:
    scripted.refusal = HocketError(Reason.QUEUE_FULL, "busy", retry_after_seconds=0.5)

    with pytest.raises(HocketError, match="busy") as refused:
        next(router.predict("digits", ROW))

    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_after_seconds == 0.5


def test_leaving_a_prediction_early_cancels_the_call(router: RouterClient, scripted: ScriptedRouter) -> None:
    scripted.stall = True
    events = router.predict("digits", ROW, partials=True)
    assert isinstance(next(events), Planned)
    assert isinstance(next(events), Partial)

    events.close()

    assert scripted.cancelled.wait(5)


def test_a_forgotten_prediction_is_cancelled_too(router: RouterClient, scripted: ScriptedRouter) -> None:
    scripted.stall = True
    for event in router.predict("digits", ROW, partials=True):
        if isinstance(event, Partial):
            break

    assert scripted.cancelled.wait(5)


def test_a_client_serves_several_threads_at_once(router: RouterClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda rows: router.answer("digits", [ROW] * rows), range(1, 21)))

    assert [len(answer.value) for answer in answers] == list(range(1, 21))


def test_clients_share_one_loop_that_ends_with_the_last_of_them(address: str, registry_address: str) -> None:
    def loops() -> int:
        return sum(thread.name == "hocket-client" for thread in threading.enumerate())

    with connect(address) as router:
        with connect_registry(registry_address) as registry:
            assert loops() == 1
            assert list(registry.list_packages()) == []
        assert router.get_mixture("digits").top_k == 2
    assert loops() == 0


def test_a_closed_client_says_so(address: str) -> None:
    with connect(address) as router:
        started = router.list_mixtures()
        next(started)

    with pytest.raises(HocketError, match="closed") as refused:
        router.get_mixture("digits")
    assert refused.value.reason is Reason.UNREACHABLE
    with pytest.raises(HocketError, match="closed"):
        next(started)


def test_closing_a_client_ends_what_other_threads_wait_for(address: str, scripted: ScriptedRouter) -> None:
    scripted.stall = True
    reasons: list[Reason] = []

    def ask(client: RouterClient) -> None:
        try:
            client.answer("digits", ROW)
        except HocketError as error:
            reasons.append(error.reason)

    with connect(address) as router:
        thread = threading.Thread(target=ask, args=(router,))
        thread.start()
        while not scripted.requests:
            threading.Event().wait(0.005)
    thread.join(5)

    assert reasons == [Reason.UNREACHABLE]
    assert scripted.cancelled.wait(5)


def test_an_interrupt_ends_the_call(
    router: RouterClient, scripted: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.stall = True
    result = Future.result

    def interrupted(*_arguments: object) -> None:
        monkeypatch.setattr(Future, "result", result)
        while not scripted.requests:
            threading.Event().wait(0.005)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        router.answer("digits", ROW)

    assert scripted.cancelled.wait(5)


def test_an_interrupt_just_when_a_step_has_begun_ends_the_call(
    router: RouterClient, scripted: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the hand-over to the loop and the wait for it."""
    scripted.stall = True
    events = router.generate("hi")
    while not isinstance(next(events), TextDelta):
        pass
    hand_over = asyncio.run_coroutine_threadsafe

    def interrupted(*arguments: Any) -> None:
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", hand_over)
        hand_over(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(events)

    assert scripted.cancelled.wait(5)


def test_every_verb_of_the_registry(registry_address: str, scripted_registry: ScriptedRegistry) -> None:
    data = bytes(range(256)) * 4096
    moved: list[tuple[int, int]] = []
    record = MixtureRecord("both", (MixtureRef(MIXTURE),), FixedGate((1.0,)), 1)
    with connect_registry(registry_address, token="a token") as registry:
        response = registry.publish(data, envelope_of(data), on_progress=lambda *sizes: moved.append(sizes))
        assert response.created
        assert moved[-1] == (len(data), len(data))
        assert not registry.publish(data, envelope_of(data)).created
        assert registry.get_package("acme/iris@1.0.0").digest == digest_of(data)
        assert [package.digest for package in registry.list_packages(publisher="acme")] == [digest_of(data)]
        filters = {"publisher": "acme", "capability": "task:text2sql", "base": "Qwen3-0.6B", "text": "sql"}
        assert list(registry.list_packages(**filters)) != []
        assert {name: getattr(scripted_registry.lists[-1], name) for name in filters} == filters
        assert registry.download(digest_of(data))[1] == data
        feed = registry.watch()
        assert [next(feed).WhichOneof("event") for _ in range(2)] == ["package", "synced"]
        feed.close()
        assert registry.yank(digest_of(data), "old").state
        assert registry.revoke_key("ab" * 32).withdrawn_digests == [LOW]
        assert registry.put_mixture(record.body()).digest == record.digest
        assert registry.fetch_mixture("both").body == record.body()
        assert registry.delete_mixture("both") == 12
        with pytest.raises(HocketError) as refused:
            registry.fetch_mixture("both")
    assert refused.value.reason is Reason.UNKNOWN_MIXTURE


def test_nobody_at_the_address_is_unreachable() -> None:
    with connect("127.0.0.1:1") as router, pytest.raises(HocketError) as refused:
        router.get_mixture("digits")
    assert refused.value.reason is Reason.UNREACHABLE


LEFT_OPEN = """
import atexit, os, sys
from hocket.client import blocking
def ask():
    with blocking.connect(sys.argv[1]) as router:
        yield from router.generate("hi")
client = blocking.connect(sys.argv[1])
"""


@pytest.mark.parametrize(
    "code",
    [
        "print(client.__enter__().answer_text('hi').text)",
        "events = client.__enter__().generate('hi'); next(events)",
        "events = ask(); next(events)",
        "sys.modules['kept'] = events = ask(); next(events)",
        # as what is opened while the interpreter ends
        "atexit.unregister(blocking._loop_thread.close_all); events = ask(); next(events)",
        # the loop does not run in the child
        "client.__enter__().get_mixture('digits'); os.fork() or sys.exit(); assert os.wait()[1] == 0",
        "with client as router: print(router.answer_text('hi').text)",
    ],
)
def test_what_is_left_open_does_not_hold_up_the_end_of_a_program(address: str, code: str) -> None:
    command = [sys.executable, "-c", LEFT_OPEN + code, address]
    quiet = {**os.environ, "GRPC_VERBOSITY": "NONE"}  # grpc remarks on a fork
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False, timeout=30)

    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_harmless_complaint_of_a_shared_queue_is_dropped() -> None:
    reported: list[object] = []
    loop = SimpleNamespace(default_exception_handler=reported.append)

    blocking._report(loop, {"exception": BlockingIOError()})  # type: ignore[arg-type]  # all it needs of a loop
    assert reported == []
    blocking._report(loop, {"exception": ValueError()})  # type: ignore[arg-type]  # the same
    assert len(reported) == 1
