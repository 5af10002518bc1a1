from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hocket.cli import answer
from hocket.errors import HocketError, Reason
from hocket.v1 import router_pb2, text_pb2
from tests.fakes import ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


pytestmark = pytest.mark.usefixtures("router_address")

ROOT = Path(__file__).parents[3]
ANSWER = "Sure: one, two."
REFUSALS = {
    "refused": HocketError(Reason.QUEUE_FULL, "this server is busy"),
    "too long": HocketError(Reason.TOO_LARGE, "the prompt has no room"),
}


class Router(ScriptedRouter):
    """Refuses some turns, and knows no expert `sqll` and no base `nowhere`.

    Attributes:
        checked: What was asked about who would answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[router_pb2.RouteRequest] = []

    async def Route(self, request: router_pb2.RouteRequest, context: Any) -> router_pb2.RouteResponse:
        del context
        self.checked.append(request)
        if any(each.expert == "sqll" for each in request.experts):
            raise HocketError(Reason.UNKNOWN_EXPERT, "there is no expert 'sqll'", field="experts[0].expert")
        if request.base == "nowhere":
            raise HocketError(Reason.UNKNOWN_BASE, "no worker has the base 'nowhere'", field="base")
        return router_pb2.RouteResponse()

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        self.refusal = REFUSALS.get(turns(request)[-1][1])
        async for response in super().Generate(request, context):
            yield response


def turns(request: router_pb2.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.input.conversation.messages]


@pytest.fixture
def router() -> Router:
    return Router()


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first delta that is shown brings a Ctrl-C with it; it is the only one."""
    write = answer._write

    def write_once(text: str) -> None:
        monkeypatch.setattr(answer, "_write", write)
        write(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(answer, "_write", write_once)


class TestScripting:
    def test_every_line_is_a_turn_and_answers_alone_are_printed(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", stdin="first\n\n  \nsecond")

        assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n" * 2)
        assert [turns(request) for request in router.requests] == [
            [("user", "first")],
            [("user", "first"), ("assistant", ANSWER), ("user", "second")],
        ]

    def test_the_turns_of_a_conversation_are_a_session_of_their_own(self, hocket: Any, router: Router) -> None:
        hocket("chat", stdin="first\nsecond")
        hocket("chat", stdin="third")

        first, second, third = (request.session for request in router.requests)
        assert first == second != third != ""

    def test_every_turn_is_what_the_options_say(self, hocket: Any, router: Router, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"type": "string"}')
        options = ("--session", "s", "--priority", 0, "--tenant", "t", "--timeout", 100)
        hocket("chat", *options, "--json-schema", tmp_path / "a.json", stdin="first\nsecond")
        hocket("chat", "--no-grammar", stdin="third")

        first, second, third = router.requests
        for request in (first, second):
            assert (request.session, request.HasField("priority"), request.priority) == ("s", True, 0)
            assert request.tenant == "t"
            assert request.constraint == text_pb2.Constraint(json_schema='{"type": "string"}')
        assert third.constraint.WhichOneof("kind") == "none"
        assert (third.HasField("priority"), third.tenant) == (False, "")

    def test_what_is_said_cannot_be_a_schema_as_well(self, hocket: Any, router: Router) -> None:
        told = hocket("chat", "--json-schema", "-", stdin="first").err
        assert "what is said comes through standard input: give --json-schema a file" in told
        assert router.requests == []

    def test_a_backslash_continues_a_line(self, hocket: Any, router: Router) -> None:
        hocket("chat", stdin="one\\\ntwo\\\n\\\nfour\nnext\\\n")

        assert [turns(request)[-1][1] for request in router.requests] == ["one\ntwo\n\nfour", "next"]

    def test_a_refused_turn_is_forgotten_and_the_rest_goes_on(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", stdin="first\nrefused\n/nonsense\nsecond\n")

        assert (outcome.code, outcome.out) == (2, f"{ANSWER}\n" * 2)
        assert "QUEUE_FULL this server is busy" in outcome.err
        assert "BAD_REQUEST no command /nonsense: /help lists them" in outcome.err
        assert turns(router.requests[-1]) == [("user", "first"), ("assistant", ANSWER), ("user", "second")]

    def test_json_is_one_event_a_line(self, hocket: Any) -> None:
        outcome = hocket("chat", "--json", stdin="first\nrefused\n")

        events = ["plan", "start", "delta", "delta", "delta", "finish", None]
        assert [line.get("event") for line in outcome.lines] == events
        assert outcome.lines[-1] == {"error": {"reason": "QUEUE_FULL", "message": "this server is busy"}}

    def test_a_conversation_that_has_no_room_can_be_forgotten(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", stdin="too long\nfirst\ntoo long\n/reset\nsecond\n" + "x" * (2**20 + 1))

        assert outcome.err.count("(/reset forgets what was said)") == 1
        assert "what was said is larger than 1 MiB" in outcome.err
        assert turns(router.requests[-1]) == [("user", "second")]

    def test_a_router_that_is_not_there_is_said_so(self, hocket: Any) -> None:
        outcome = hocket("chat", "--router", "127.0.0.1:1", stdin="first\n")

        assert outcome.code == 2
        assert "start a suite with `hocket up`" in outcome.err

    def test_what_is_no_text_is_refused_and_the_rest_goes_on(self, hocket: Any, router: Router) -> None:
        said = [b"\xff", b"/base \xff", b"/system \xff", b"/save \xff", "\u00e9".encode()]
        outcome = hocket("chat", stdin=b"\n".join(said))

        assert (outcome.code, outcome.out) == (2, f"{ANSWER}\n")
        assert outcome.err.count("not text in UTF-8") == 4
        [request] = router.requests
        assert (request.base, turns(request)) == ("", [("user", "\u00e9")])

    def test_what_cannot_be_a_file_is_refused_and_the_rest_goes_on(self, hocket: Any, router: Router) -> None:
        names = ["~nosuchuser/x", "a\0b", "n" * 5000, "n/" * 5000]
        outcome = hocket("chat", stdin="".join(f"/save {name}\n" for name in names) + "first\n")

        assert (outcome.code, outcome.out) == (2, f"{ANSWER}\n")
        assert [outcome.err.count(told) for told in ("cannot be a file", "cannot write a\\x00b")] == [3, 1]
        assert len(router.requests) == 1

    @pytest.mark.usefixtures("interrupted")
    def test_an_interrupt_ends_it(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", stdin="first\nsecond\n")

        assert (outcome.code, outcome.out) == (130, "Sure:\n")
        assert len(router.requests) == 1


def test_options_hold_for_every_turn(hocket: Any, router: Router) -> None:
    hocket(
        "chat", "--experts", "sql:0.7,json", "--base", "b", "--system", "be short", "--temperature", 0.5, "--stop", ";",
        stdin="first\nsecond\n",
    )  # fmt: skip

    for request in router.requests:
        assert [each.expert for each in request.experts] == ["sql", "json"]
        assert (request.base, request.sampling.temperature, request.sampling.stop) == ("b", 0.5, [";"])
        assert turns(request)[0] == ("system", "be short")


class TestCommands:
    @pytest.fixture(autouse=True)
    def _terminal(self, at_terminal: Callable[..., None]) -> None:
        at_terminal("<stdin>", "<stdout>")

    def test_experts_base_and_system_can_be_changed_on_the_way(self, hocket: Any, router: Router) -> None:
        said = [
            "/experts sql:0.5,json", "/base qwen3-0.6b", "/system be short", "first", "/experts", "/base", "/system",
            "/experts -", "/base -", "/system -", "second", "/experts", "/base", "/system",
        ]  # fmt: skip
        outcome = hocket("chat", stdin="\n".join(said))
        first, second = router.requests

        assert [(each.expert, each.weight) for each in first.experts] == [("sql", 0.5), ("json", 0.0)]
        assert (first.base, turns(first)[0]) == ("qwen3-0.6b", ("system", "be short"))
        assert (list(second.experts), second.base, turns(second)[0]) == ([], "", ("user", "first"))
        assert second.routing.policy == text_pb2.POLICY_BASE
        told = [line for line in outcome.err.splitlines() if line.split(":")[0] in {"experts", "base", "system"}]
        here = ["experts: sql:0.5,json", "base: qwen3-0.6b", "system: be short"]
        gone = ["experts: none, the base alone", "base: the one that the experts ride on", "system: nothing"]
        assert told == [*here, *here, *gone, *gone]

    def test_the_router_chooses_until_somebody_else_does(self, hocket: Any, router: Router) -> None:
        said = "/experts\nfirst\n/experts -\nsecond\n/experts auto\nthird\n"
        outcome = hocket("chat", "--max-experts", 2, "--deny", "sql", stdin=said)
        mixing = router_pb2.Routing(policy=text_pb2.POLICY_RULES, deny=["sql"], expert_count_max=2)
        alone = router_pb2.Routing(policy=text_pb2.POLICY_BASE, expert_count_max=1)
        assert [request.routing for request in router.requests] == [mixing, alone, mixing]
        assert outcome.err.count("experts: chosen by the router for every turn") == 2

    def test_who_began_with_the_base_may_have_the_router_choose(self, hocket: Any, router: Router) -> None:
        hocket("chat", "--base-only", stdin="first\n/experts auto\nsecond\n")
        first, second = router.requests
        assert first.routing.policy == text_pb2.POLICY_BASE
        assert not second.HasField("routing")

    def test_a_command_that_cannot_be_meant_changes_nothing(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", "--experts", "sql", stdin="/experts sql:much\nfirst\n")

        assert outcome.code == 0
        assert "is a number from -100 to 100" in outcome.err
        assert [each.expert for each in router.requests[0].experts] == ["sql"]

    def test_who_is_not_there_is_refused_before_a_turn_is_lost(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", "--experts", "sql", "--base", "b", stdin="/experts sqll\n/base nowhere\nfirst\n")

        assert "UNKNOWN_EXPERT --experts: there is no expert 'sqll'" in outcome.err
        assert "UNKNOWN_BASE --base: no worker has the base 'nowhere'" in outcome.err
        [request] = router.requests
        assert ([each.expert for each in request.experts], request.base) == (["sql"], "b")
        assert [check.HasField("input") for check in router.checked] == [False, False]

    def test_two_slashes_begin_a_text_with_one(self, hocket: Any, router: Router) -> None:
        hocket("chat", stdin="//etc/passwd\n")

        assert turns(router.requests[0]) == [("user", "/etc/passwd")]

    def test_what_was_said_is_saved(self, hocket: Any, home: Path) -> None:
        (home / "other.json").write_text("precious")
        said = "first\n/save ~/talk.json\nsecond\n/save ~/talk.json\n/save ~/other.json\n/save\n/save /nowhere/x\n"
        outcome = hocket("chat", "--experts", "sql:0.5", "--system", "é", stdin=said)

        messages = [
            ("system", "é"),
            ("user", "first"),
            ("assistant", ANSWER),
            ("user", "second"),
            ("assistant", ANSWER),
        ]
        assert json.loads((home / "talk.json").read_text()) == {
            "experts": "sql:0.5",
            "base": "",
            "messages": [{"role": role, "content": content} for role, content in messages],
        }
        assert (home / "other.json").read_text() == "precious"
        for told in ("other.json is there already", "say where: /save FILE", "cannot write /nowhere/x"):
            assert told in outcome.err

    def test_debug_is_turned_on_and_off(self, hocket: Any) -> None:
        outcome = hocket("chat", stdin="/debug\nfirst\n/debug\nsecond\n")

        assert outcome.err.count("finish: END") == 1
        assert outcome.err.index("debug: on") < outcome.err.index("finish: END") < outcome.err.index("debug: off")

    def test_help_lists_every_command(self, hocket: Any) -> None:
        outcome = hocket("chat", stdin="/help\n")

        for name in ("/experts", "/base", "/system", "/reset", "/save", "/debug", "/quit"):
            assert f"\n{name}" in outcome.err

    def test_quit_ends_it(self, hocket: Any, router: Router) -> None:
        assert hocket("chat", stdin="/quit\nfirst\n").code == 0
        assert router.requests == []

    @pytest.mark.usefixtures("interrupted")
    def test_an_interrupt_ends_the_answer_alone(self, hocket: Any, router: Router) -> None:
        outcome = hocket("chat", stdin="first\nsecond\n")

        assert outcome.code == 0
        assert turns(router.requests[1]) == [("user", "first"), ("assistant", "Sure:"), ("user", "second")]


def test_a_person_at_a_terminal_talks(router_address: str, router: Router) -> None:
    """As a program on a terminal: prompts, Ctrl-C in an answer, Ctrl-D at the end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hocket.cli.main", "chat", "--router", router_address]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""

        def wait_for(text: bytes) -> None:
            nonlocal seen
            deadline = time.monotonic() + 20
            while text not in seen and time.monotonic() < deadline:
                seen += os.read(ours, 4096)
            assert text in seen
            seen = seen.partition(text)[2]

        try:
            wait_for(b"Ctrl-D ends")
            wait_for(b"> ")
            router.stall = True
            os.write(ours, b"first\n")
            wait_for(b"Sure:")
            process.send_signal(signal.SIGINT)
            wait_for(b"> ")
            assert router.cancelled.wait(5)
            router.stall = False
            os.write(ours, b"second\n")
            wait_for(ANSWER.encode())
            wait_for(b"50 tokens/s")
            wait_for(b"> ")
            os.write(ours, b"\x04")
            assert process.wait(20) == 0
        finally:
            process.kill()
    os.close(ours)
    assert turns(router.requests[1]) == [("user", "first"), ("assistant", "Sure:"), ("user", "second")]
