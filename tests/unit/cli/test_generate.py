from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hocket.cli import answer, files, serve
from hocket.cli.colours import Colours
from hocket.cli.sampling import read_experts, written
from hocket.errors import HocketError, Reason
from hocket.text_limits import CONSTRAINT_BYTES_MAX
from hocket.v1 import router_pb2, text_pb2
from tests.bases import hollow_base
from tests.fakes import BASE, HIGH, LOW, ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.usefixtures("router_address")

ROOT = Path(__file__).parents[3]
ANSWER = "Sure: one, two."
MIXED = ("--experts", "sql:0.7,json:0.3")


class Router(ScriptedRouter):
    """A router whose answers can be told.

    Attributes:
        texts: What it answers, a delta each; None for what it answers by itself.
        token: The token of every such delta.
        finish: What is merged into the finish of such an answer; None for an answer without one.
        broken: What such an answer fails with, in place of its finish.
        constraint: What its start says that the answer must be.
        plan: Who answers, in place of whom it would name by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.texts: tuple[str, ...] | None = None
        self.token = text_pb2.Token(id=1)
        self.finish: text_pb2.TextFinish | None = text_pb2.TextFinish()
        self.broken: HocketError | None = None
        self.constraint: text_pb2.AppliedConstraint | None = None
        self.plan: text_pb2.TextPlan | None = None

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        async for response in super().Generate(request, context):
            if response.HasField("plan") and self.plan is not None:
                response.plan.CopyFrom(self.plan)
            if response.HasField("start") and self.constraint is not None:
                response.start.constraint.CopyFrom(self.constraint)
            if self.texts is None or response.HasField("plan") or response.HasField("start"):
                yield response
            elif response.HasField("finish"):
                for text in self.texts:
                    delta = text_pb2.TextDelta(text=text, tokens=[self.token], contributions=[0.7, 0.3])
                    yield router_pb2.GenerateResponse(delta=delta)
                if self.broken is not None:
                    raise self.broken
                if self.finish is not None:
                    response.finish.MergeFrom(self.finish)
                    yield response


@pytest.fixture
def router() -> Router:
    return Router()


class TestScripting:
    def test_the_answer_alone_is_printed(self, hocket: Any) -> None:
        outcome = hocket("generate", "list two", *MIXED)

        assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n")
        assert outcome.err.startswith("Note: BASE_BY_NAME, an expert says for which base it is by name alone")

    def test_the_prompt_comes_through_a_pipe(self, hocket: Any, router: Router) -> None:
        for arguments, stdin in (((), "two\nlines\n"), (("-",), "two\nlines\r\n"), (("two\nlines",), "ignored")):
            assert hocket("generate", *arguments, stdin=stdin).out == f"{ANSWER}\n"
        assert [request.input.prompt for request in router.requests] == ["two\nlines"] * 3

    def test_a_program_gets_every_character(self, hocket: Any, router: Router) -> None:
        router.texts = ("\x1b[31m", "red\r", "\x00é東\n")

        assert hocket("generate", "x").out == "\x1b[31mred\r\x00é東\n\n"

    def test_an_empty_answer_is_an_empty_line(self, hocket: Any, router: Router) -> None:
        router.texts = ()

        assert hocket("generate", "x").out == "\n"

    def test_a_stream_that_breaks_is_refused_after_what_came(self, hocket: Any, router: Router) -> None:
        router.texts, router.broken = ("half",), HocketError(Reason.STREAM_BROKEN, "the worker went away")
        outcome = hocket("generate", "x")

        assert (outcome.code, outcome.out) == (2, "half\n")
        assert outcome.err == "STREAM_BROKEN the worker went away\n"

    def test_a_stream_without_a_finish_is_no_answer(self, hocket: Any, router: Router) -> None:
        router.texts, router.finish = ("half",), None
        outcome = hocket("generate", "x", "--json")

        assert (outcome.code, outcome.lines[-1]["error"]["reason"]) == (2, "INTERNAL")

    def test_of_a_constraint_it_is_told_if_the_answer_is_a_beginning(self, hocket: Any, router: Router) -> None:
        router.texts = ("{",)
        router.finish = text_pb2.TextFinish(
            reason=text_pb2.TEXT_FINISH_REASON_LENGTH, usage=text_pb2.Usage(completion_token_count=5)
        )
        assert "before it was whole" not in hocket("generate", "x", "--max-tokens", 5).err

        router.constraint = text_pb2.AppliedConstraint(kind=text_pb2.CONSTRAINT_KIND_JSON_SCHEMA)
        told = "Note: the answer ended after 5 tokens, before it was whole: "
        assert f"{told}raise --max-tokens (5 was the limit)" in hocket("generate", "x", "--max-tokens", 5).err
        assert f"{told}the base's context has no room for more" in hocket("generate", "x", "--max-tokens", 6).err

        router.finish.reason = text_pb2.TEXT_FINISH_REASON_END
        assert "before it was whole" not in hocket("generate", "x", "--max-tokens", 5).err

    @pytest.mark.parametrize(
        ("arguments", "reason", "instead"),
        [
            (("--experts", "sql"), text_pb2.DECISION_REASON_EXPLICIT, "leave it out of --experts"),
            ((), text_pb2.DECISION_REASON_GATE, "with --deny acme/sql@1.0.0"),
        ],
    )
    def test_an_experts_broken_grammar_is_refused_in_words_of_the_command(
        self, hocket: Any, router: Router, arguments: tuple[str, ...], reason: Any, instead: str
    ) -> None:
        router.texts = ()
        router.plan = text_pb2.TextPlan(
            reason=reason, experts=[text_pb2.TextExpert(digest=LOW, name="acme/sql@1.0.0", weight=1)]
        )
        router.broken = HocketError(
            Reason.BAD_GRAMMAR,
            f"the grammar cannot be used: there is no rule 'x'; it is of the expert {LOW}: ask with the constraint "
            "`none`, or leave the expert out",
            digest=LOW,
        )
        assert hocket("generate", "x", *arguments).err == (
            "BAD_GRAMMAR the grammar cannot be used: there is no rule 'x'; it is of the expert acme/sql@1.0.0: ask "
            f"with --no-grammar, or {instead}\n"
        )


def test_json_is_one_event_a_line(hocket: Any) -> None:
    outcome = hocket("generate", "list two", *MIXED, "--debug", "--json")
    plan, start, *deltas, finish = outcome.lines

    assert (outcome.code, outcome.err) == (0, "")
    assert [event["event"] for event in outcome.lines] == ["plan", "start", "delta", "delta", "delta", "finish"]
    assert plan["request_id"] == "request-1"
    assert plan["plan"]["base"] == BASE
    assert [(each["digest"], each["weight"]) for each in plan["plan"]["experts"]] == [(LOW, 0.7), (HIGH, 0.3)]
    assert start["start"]["prompt_template"] == "qwen3"
    assert "".join(delta["delta"]["text"] for delta in deltas) == ANSWER
    assert deltas[0]["delta"]["tokens"] == [{"id": 7, "logprob": -0.25, "top": []}]
    assert deltas[0]["delta"]["contributions"] == [0.7, 0.3]
    assert finish["finish"]["reason"] == "TEXT_FINISH_REASON_END"


def test_options_reach_the_request(hocket: Any, router: Router) -> None:
    hocket(
        "generate", "hi", "--experts", f"sql, acme/json@1.2.0:-0.5,{LOW}:2,{HIGH}", "--base", "qwen3-0.6b",
        "--system", "be short", "--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.05,
        "--max-tokens", 100, "--seed", 2**64 - 1, "--stop", ";", "--stop", "\n\n", "--repetition-penalty", 1.1,
        "--presence-penalty", -1, "--frequency-penalty", 0.5, "--logprobs", 3, "--json",
        "--session", "s", "--priority", 0, "--tenant", "t",
    )  # fmt: skip
    [request] = router.requests

    assert [(turn.role, turn.content) for turn in request.input.conversation.messages] == [
        ("system", "be short"),
        ("user", "hi"),
    ]
    assert request.base == "qwen3-0.6b"
    assert (request.session, request.HasField("priority"), request.priority, request.tenant) == ("s", True, 0, "t")
    chosen = [(each.expert, each.weight if each.HasField("weight") else None) for each in request.experts]
    assert chosen == [("sql", None), ("acme/json@1.2.0", -0.5), (LOW, 2.0), (HIGH, None)]
    assert request.sampling == text_pb2.Sampling(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, max_tokens=100, seed=2**64 - 1, stop=[";", "\n\n"],
        repetition_penalty=1.1, presence_penalty=-1, frequency_penalty=0.5, top_logprobs=3,
    )  # fmt: skip


def test_what_is_not_said_is_left_to_the_server(hocket: Any, router: Router) -> None:
    hocket("generate", "hi")
    [request] = router.requests

    assert request == router_pb2.GenerateRequest(input=text_pb2.TextInput(prompt="hi"), sampling=text_pb2.Sampling())


def test_how_experts_are_chosen_is_sent(hocket: Any, router: Router) -> None:
    hocket("generate", "hi", "--max-experts", 3)
    hocket("generate", "hi", "--base-only")
    hocket("generate", "hi", "--policy", "hivellm", "--allow", "a", "--allow", "b", "--deny", "c")
    mixing, alone, listed = router.requests
    assert mixing.routing == router_pb2.Routing(policy=text_pb2.POLICY_RULES, expert_count_max=3)
    assert alone.routing == router_pb2.Routing(policy=text_pb2.POLICY_BASE, expert_count_max=1)
    assert listed.routing == router_pb2.Routing(
        policy=text_pb2.POLICY_HIVELLM, allow=["a", "b"], deny=["c"], expert_count_max=1
    )


def test_what_the_answer_must_be_is_read_from_files(hocket: Any, router: Router, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"type": "string"}')
    (tmp_path / "a.gbnf").write_text('root ::= "ä"')
    hocket("generate", "hi", "--json-schema", tmp_path / "a.json")
    hocket("generate", "hi", "--grammar", tmp_path / "a.gbnf")
    hocket("generate", "hi", "--no-grammar")
    schema, grammar, none = (request.constraint for request in router.requests)
    assert schema == text_pb2.Constraint(json_schema='{"type": "string"}')
    assert grammar == text_pb2.Constraint(gbnf='root ::= "ä"')
    assert none.WhichOneof("kind") == "none"


def test_what_the_answer_must_be_may_come_through_a_pipe(hocket: Any, router: Router) -> None:
    hocket("generate", "hi", "--json-schema", "-", stdin="true")
    hocket("generate", "hi", "--grammar", "-", stdin='root ::= "ä"')
    assert [each.constraint for each in router.requests] == [
        text_pb2.Constraint(json_schema="true"),
        text_pb2.Constraint(gbnf='root ::= "ä"'),
    ]
    assert hocket("generate", "hi", "--grammar", "-", stdin="a" * CONSTRAINT_BYTES_MAX).code == 0
    too_large = hocket("generate", "hi", "--grammar", "-", stdin="a" * (CONSTRAINT_BYTES_MAX + 1))
    assert "TOO_LARGE standard input is larger than 64.0 KiB" in too_large.err
    assert "standard input is not text" in hocket("generate", "hi", "--grammar", "-", stdin=b"\xff").err


@pytest.mark.parametrize("prompt", [(), ("-",)])
def test_the_prompt_and_what_it_must_be_cannot_both_come_through_a_pipe(
    hocket: Any, router: Router, prompt: tuple[str, ...]
) -> None:
    told = hocket("generate", *prompt, "--json-schema", "-", stdin="true").err
    assert "the prompt comes through standard input: give --json-schema a file" in told
    assert router.requests == []


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--json-schema", '{"type": "string"}'),
        ("--json-schema", ' {"enum": ["' + "x" * 300 + '"]}'),
        ("--grammar", "root ::= [a-z]"),
    ],
)
def test_text_in_place_of_the_file_it_belongs_into_gets_a_hint(
    hocket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, text: str
) -> None:
    told = hocket("generate", "hi", flag, text).err
    assert f"{flag} names a file: write that into one, or pipe it and say {flag} -" in told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "{a::=b}").write_text("true")
    assert hocket("generate", "hi", flag, "{a::=b}").code == 0
    assert "cannot read nowhere" in hocket("generate", "hi", flag, "nowhere").err


def test_an_answer_has_the_time_that_is_said(hocket: Any, router: Router) -> None:
    assert hocket("generate", "hi", "--timeout", 100).code == 0
    assert (
        "--timeout cannot be inf: give a number of seconds above 0" in hocket("generate", "hi", "--timeout", "inf").err
    )
    router.stall = True
    late = hocket("generate", "hi", "--timeout", 1)
    assert (late.code, late.err) == (
        2, "DEADLINE the answer was not whole in time: --timeout SECONDS gives it longer\n",
    )  # fmt: skip


def test_a_file_that_is_no_text_constrains_nothing(hocket: Any, router: Router, tmp_path: Path) -> None:
    (tmp_path / "a.gbnf").write_bytes(b"\xff")
    assert "not text in UTF-8" in hocket("generate", "hi", "--grammar", tmp_path / "a.gbnf").err
    (tmp_path / "a.gbnf").write_bytes(b"a" * (CONSTRAINT_BYTES_MAX + 1))
    assert hocket("generate", "hi", "--grammar", tmp_path / "a.gbnf").code == 2
    assert router.requests == []
    (tmp_path / "a.gbnf").write_bytes(b"a" * CONSTRAINT_BYTES_MAX)
    assert hocket("generate", "hi", "--grammar", tmp_path / "a.gbnf").code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--json-schema", __file__, "--no-grammar"),
        ("--experts", "sql", "--base-only"),
        ("--experts", "sql", "--max-experts", 2),
        ("--experts", "sql", "--policy", "rules"),
        ("--base-only", "--max-experts", 2),
        ("--base-only", "--allow", "sql"),
    ],
)
def test_options_that_leave_each_other_nothing_to_say_are_refused(hocket: Any, options: tuple[object, ...]) -> None:
    outcome = hocket("generate", "hi", *options)
    assert outcome.code == 2
    assert "leave out one of them" in outcome.err


def test_raw_text_is_sent_as_it_is(hocket: Any, router: Router) -> None:
    hocket("generate", "--raw", stdin="<|im_start|>user\n")
    hocket("generate", "--raw", "<|im_start|>")

    assert [request.input.raw for request in router.requests] == ["<|im_start|>user\n", "<|im_start|>"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (("",), "", "the prompt is empty"),
        ((), "\n", "the prompt is empty"),
        ((), b"\xff", "not text in UTF-8"),
        ((), "x" * (2**20 + 1), "larger than 1 MiB"),
        (("hi", "--raw", "--system", "x"), "", "--raw is read as it is"),
        (("hi", "--seed", 2**64), "", "--seed cannot be"),
        (("hi", "--base", "\udcff"), "", "--base cannot be '\\udcff': give a text in UTF-8"),
        (("hi", "--experts", "\udcff"), "", "--experts are names, or names with weights"),
        (("hi", "--system", "\udcff"), "", "the input is text"),
        (("\udcff",), "", "the input is text"),
        (("hi", "--top-k", -1), "", "--top-k"),
        (("hi", "--session", "s" * 129), "", "--session has 129 characters"),
        (("hi", "--tenant", "t" * 65), "", "--tenant has 65 characters"),
        (("hi", "--priority", 10), "", "--priority"),
        (("hi", "--timeout", 0), "", "--timeout"),
        (("hi", "--experts", "sql:0.7,sql"), "", "'sql' is named twice"),
        (("hi", "--device", "cpu", "--router", "127.0.0.1:1"), "", "leave out --router"),
        (("hi", "--device", "cpu"), "", "`hocket base add PATH`"),
        (("hi", "--data", "nowhere", "--base", "x"), "", "there is none yet"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    hocket: Any, router: Router, arguments: tuple[object, ...], stdin: str | bytes, told: str
) -> None:
    outcome = hocket("generate", *arguments, "--json", stdin=stdin)

    assert outcome.code == 2
    assert told in outcome.document["error"]["message"]
    assert router.requests == []


def test_the_largest_prompt_is_taken(hocket: Any, router: Router) -> None:
    assert hocket("generate", stdin="x" * 2**20).code == 0
    assert len(router.requests[0].input.prompt) == 2**20


def test_what_asks_for_more_to_show_needs_something_that_shows_it(hocket: Any, router: Router) -> None:
    assert "add one of them" in hocket("generate", "hi", "--logprobs", 3).err
    assert hocket("generate", "hi", "--logprobs", 3, "--debug").code == 0
    assert router.requests[0].sampling.top_logprobs == 3


def test_without_standard_input_a_prompt_is_asked_for(hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "sys", SimpleNamespace(stdin=None))
    for command in ("generate", "chat"):
        outcome = hocket(command)
        assert outcome.code == 2
        assert "standard input is closed" in outcome.err
    assert hocket("generate", "hi").out == f"{ANSWER}\n"


@pytest.mark.parametrize(
    ("field", "message", "told"),
    [
        ("base", "no live worker has it", "--base: no live worker has it"),
        ("experts[0].weight", "it is too much", "--experts: it is too much"),
        ("sampling.top_p", "sampling.top_p must be 0 to 1", "--top-p must be 0 to 1"),
        ("sampling.top_logprobs", "top_logprobs must be 0 to 20", "--logprobs must be 0 to 20"),
        ("constraint.json_schema", "it is none", "--json-schema: it is none"),
        ("constraint.gbnf", "it is none", "--grammar: it is none"),
        ("input", "it is too long", "it is too long"),
        (None, "it is busy", "it is busy"),
    ],
)
def test_a_refusal_names_options(hocket: Any, router: Router, field: str | None, message: str, told: str) -> None:
    router.refusal = HocketError(Reason.BAD_REQUEST, message, field=field)

    assert hocket("generate", "x", "--json").document["error"] == {"reason": "BAD_REQUEST", "message": told}


def test_a_program_reads_utf_8_whatever_the_locale(router_address: str, router: Router) -> None:
    router.texts = ("é東🎉",)
    done = subprocess.run(
        [sys.executable, "-m", "hocket.cli.main", "generate", "x", "--router", router_address],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True,
    )  # fmt: skip

    assert done.stdout.decode() == "é東🎉\n"


def test_a_refusal_is_a_reason_and_advice(hocket: Any, router: Router) -> None:
    router.refusal = HocketError(Reason.UNKNOWN_BASE, "no live worker has that base")
    outcome = hocket("generate", "x", "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "UNKNOWN_BASE")

    outcome = hocket("generate", "x", "--router", "127.0.0.1:1")
    assert (outcome.code, outcome.out) == (2, "")
    assert "start a suite with `hocket up`" in outcome.err


class TestAtATerminal:
    @pytest.fixture(autouse=True)
    def _terminal(self, at_terminal: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        at_terminal("<stdin>", "<stdout>")
        monkeypatch.setenv("TERM", "dumb")  # one without colours

    def test_a_line_tells_who_answered_and_how_fast(self, hocket: Any) -> None:
        outcome = hocket("generate", "list two", *MIXED)

        assert outcome.out == f"{ANSWER}\n"
        assert outcome.err.splitlines() == [
            "acme/sql@1.0.0 0.7, acme/json@1.0.0 0.3, 3 tokens, 50 tokens/s, first after 0.023 s",
            "Note: BASE_BY_NAME, an expert says for which base it is by name alone (pack it with --base FOLDER)",
        ]

    def test_without_experts_it_is_the_base(self, hocket: Any) -> None:
        assert hocket("generate", "list two").err.startswith("Qwen3-0.6B, 3 tokens")

    def test_text_has_the_colour_of_the_experts_that_made_it(
        self, hocket: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLORTERM", "truecolor")
        mixture = Colours().style({LOW: 0.7, HIGH: 0.3})
        assert mixture.color is not None
        red, green, blue = mixture.color.get_truecolor()

        assert f"\x1b[38;2;{red};{green};{blue}mSure:\x1b[0m" in hocket("generate", "list two", *MIXED).out
        assert "\x1b[" not in hocket("generate", "list two").out, "the base has the terminal's own colour"

    def test_no_color_is_respected(self, hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")

        assert hocket("generate", "list two", *MIXED).out == f"{ANSWER}\n"

    def test_an_answer_that_was_cut_off_says_so(self, hocket: Any, router: Router) -> None:
        usage = text_pb2.Usage(completion_token_count=1)
        router.texts = ("and",)
        router.finish = text_pb2.TextFinish(reason=text_pb2.TEXT_FINISH_REASON_LENGTH, usage=usage)
        told = hocket("generate", "x", "--max-tokens", 1).err

        assert "1 token (cut off), " in told
        assert "Note: the answer ended after 1 token, before it was whole: raise --max-tokens (1 was the limit)" in told

    def test_control_characters_of_a_model_are_escaped(self, hocket: Any, router: Router) -> None:
        router.texts = ("\x1b]0;title\x07", "a\tb\n", "é東🎉\x9b")

        assert hocket("generate", "x").out == "\\x1b]0;title\\x07a\tb\né東🎉\\x9b\n"

    def test_without_a_prompt_one_is_asked_for(self, hocket: Any) -> None:
        outcome = hocket("generate")

        assert outcome.code == 2
        assert "give a prompt as an argument" in outcome.err

    def test_a_prompt_may_be_typed(self, hocket: Any, router: Router) -> None:
        assert "end with Ctrl-D" in hocket("generate", "-", stdin="typed\n").err
        assert router.requests[0].input.prompt == "typed"


def test_debug_shows_everything_on_standard_error(hocket: Any, router: Router) -> None:
    router.texts = ("one;",)
    router.token = text_pb2.Token(id=9, logprob=-0.5, top=[text_pb2.TokenLogprob(id=9, logprob=-0.5)])
    router.finish = text_pb2.TextFinish(reason=text_pb2.TEXT_FINISH_REASON_STOP, stop=";")
    outcome = hocket("generate", "list two", *MIXED, "--debug", "--logprobs", 1)

    assert outcome.out == "one;\n"
    lines = [line.strip() for line in outcome.err.splitlines()]
    assert lines[:5] == [
        f"plan: ADAPTER_MIX on base Qwen3-0.6B ({BASE})",
        "the experts were named",
        f"0.7 of acme/sql@1.0.0 {LOW}",
        f"0.3 of acme/json@1.0.0 {HIGH}",
        "worker worker-a at 127.0.0.1:50054, holds every expert",
    ]
    assert lines[5] == "seed 42, registry revision 7, request id request-1"
    assert lines[6] == "start: worker-a, 12 tokens of prompt after 4 of soft prompts, template qwen3, waited 3.0 ms"
    assert lines[7] == "temperature 0.0, top_p 1.0, seed 42, max_tokens 512, top_logprobs 1"
    assert lines[8].split() == ["text", "token", "ids", "logprobs", "most", "probable", "weights"]
    assert lines[9].split() == ["'one;'", "9", "-0.500", "9:-0.500", "0.7", "0.3"]
    assert lines[10] == "finish: STOP at ';', 12 tokens of prompt, 3 of answer"
    assert lines[11] == "route 0.2 ms, wait 3.0 ms, prefill 20.0 ms, decode 40.0 ms"
    assert lines[12].startswith("prefill 600.0 tokens per second, decode 50.0; 4 steps, from token to token 20.0 ms")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (text_pb2.AppliedConstraint(kind=text_pb2.CONSTRAINT_KIND_JSON_SCHEMA), "constraint: a JSON schema, as asked"),
        (
            text_pb2.AppliedConstraint(kind=text_pb2.CONSTRAINT_KIND_GBNF, expert=LOW),
            "constraint: a grammar, of the expert acme/sql@1.0.0 (--no-grammar leaves it out)",
        ),
    ],
)
def test_debug_tells_what_the_answer_had_to_be(
    hocket: Any, router: Router, given: text_pb2.AppliedConstraint, told: str
) -> None:
    router.constraint = given
    assert told in [line.strip() for line in hocket("generate", "hi", *MIXED, "--debug").err.splitlines()]


class TestExperts:
    names = st.from_regex(r"[a-z][a-z0-9-]{0,10}(/[a-z]{1,5}@1\.0)?", fullmatch=True)
    digests = st.integers(0, 2**256 - 1).map(lambda number: f"sha256:{number:064x}")
    weights = st.none() | st.floats(-100, 100)

    @given(st.lists(st.tuples(names | digests, weights), unique_by=lambda each: each[0], max_size=10))
    def test_every_list_reads_back(self, chosen: list[tuple[str, float | None]]) -> None:
        text = " , ".join(name if weight is None else f"{name}:{weight!r}" for name, weight in chosen)
        expected = [name if weight is None else (name, weight) for name, weight in chosen]

        assert read_experts(text) == expected
        assert [name for name, _ in map(_pair, read_experts(written(read_experts(text))))] == [n for n, _ in chosen]

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("sql:", "is a number from -100 to 100"),
            ("sql:much", "is a number from -100 to 100"),
            ("sql:nan", "is a number from -100 to 100"),
            ("sql:inf", "is a number from -100 to 100"),
            ("sql:100.1", "is a number from -100 to 100"),
            (":0.5", "has no name"),
            ("sql,,json", "a name is missing"),
            ("sql,", "a name is missing"),
            ("sql:1,sql:1", "named twice"),
            (LOW[:-1], "64 hex digits"),
            (f"{LOW}:x", "is a number"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, text: str, told: str) -> None:
        with pytest.raises(HocketError, match=told) as refusal:
            read_experts(text)
        assert (refusal.value.reason, refusal.value.field) == (Reason.BAD_REQUEST, "experts")

    def test_the_last_values_that_may_be_are_taken(self) -> None:
        assert read_experts("a:100,b:-100,c:0") == [("a", 100.0), ("b", -100.0), ("c", 0.0)]
        assert read_experts(f"{LOW}") == [LOW]
        assert read_experts(f"{LOW}:1") == [(LOW, 1.0)]
        assert read_experts("") == read_experts(" ") == []


class TestOwnSuite:
    """`python -m services.suite` is a script here that says it is ready, and where the scripted router is."""

    @pytest.fixture(autouse=True)
    def _suite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router_address: str) -> None:
        (tmp_path / "services" / "suite").mkdir(parents=True)
        (tmp_path / "services" / "__init__.py").touch()
        (tmp_path / "services" / "suite" / "__main__.py").write_text(
            "import json, os, signal, sys\n"
            "def end(*_): sys.exit(open('ended', 'w').close())\n"
            "signal.signal(signal.SIGTERM, end)\n"
            "open('arguments', 'w').write(json.dumps(sys.argv[1:]))\n"
            "if os.path.exists('refuse'): sys.exit(open('refuse').read())\n"
            "sys.stderr.write('a warning that is no JSON\\n')\n"
            "if os.path.exists('slow'): open('starting', 'w').close(); sys.stdin.read()\n"
            "if os.path.exists('log'): sys.stderr.write(open('log').read())\n"
            "if os.path.exists('killed'): os.kill(os.getpid(), signal.SIGKILL)\n"
            f"sys.stderr.write(json.dumps({{'event': 'ready', 'router': {router_address!r}}}) + '\\n')\n"
            "sys.stderr.flush()\n"
            "if os.path.exists('die'): sys.exit('hocket: the device is gone')\n"
            "sys.stdin.read()\n"
            "end()\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(serve, "find_spec", lambda name: name)
        hollow_base(tmp_path / "tiny")

    def test_one_command_starts_what_it_asks_and_ends_it(self, hocket: Any, tmp_path: Path, router: Router) -> None:
        added = hocket("base", "add", "tiny", "--data", "d", "--json").document
        outcome = hocket("generate", "x", "--device", "cpu", "--data", "d", "--base", "tiny")

        assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n")
        assert router.requests[0].base == ""
        assert (tmp_path / "ended").exists()
        arguments = json.loads((tmp_path / "arguments").read_text())
        assert arguments[:4] == ["--supervised", "--no-metrics", "--log-format", "json"]
        assert {
            "router.host=127.0.0.1", "router.port=0", "registry.host=127.0.0.1", "registry.port=0",
            "worker.device=cpu", f"worker.base={added['digest']}", "worker.data_dir=d", "worker.bases_dir=d/bases",
        } <= set(arguments)  # fmt: skip

    def test_a_suite_that_does_not_start_says_why(self, hocket: Any, tmp_path: Path) -> None:
        hocket("base", "add", "tiny")
        (tmp_path / "refuse").write_text("hocket: cannot open x: does another registry use this folder?")
        outcome = hocket("generate", "x", "--device", "cpu", "--json")

        assert outcome.document["error"]["reason"] == "NOT_READY"
        assert outcome.document["error"]["message"] == (
            "the suite of this command did not start: cannot open x: does another registry use this folder? "
            "(a suite that runs with this data answers without --device and --data)"
        )
        (tmp_path / "refuse").write_text("a traceback")
        assert hocket("generate", "x", "--device", "cpu").err == (
            "NOT_READY the suite of this command did not start: exit status 1: `hocket up` shows all that it logs\n"
        )

    def test_only_an_error_is_a_reason_to_end(self, hocket: Any, tmp_path: Path) -> None:
        hocket("base", "add", "tiny")
        (tmp_path / "killed").touch()
        logged = '{"level": "error", "event": "step failed", "exception": "Traceback\\n  x\\nOutOfMemoryError: cuda"}\n'
        for log, told in (
            ("", "killed by SIGKILL (out of memory?): `hocket up`"),
            ('{"level": "info", "event": "opening the base"}\n[]\n', "killed by SIGKILL (out of memory?): `hocket up`"),
            (logged, "(out of memory?), after the error 'step failed: OutOfMemoryError: cuda': `hocket up`"),
            (logged + "hocket: the disk is full\n", "did not start: the disk is full\n"),
        ):
            (tmp_path / "log").write_text(log)
            assert told in hocket("generate", "x", "--device", "cpu").err

    def test_a_chat_whose_suite_is_gone_ends_and_says_why(self, hocket: Any, tmp_path: Path, router: Router) -> None:
        hocket("base", "add", "tiny")
        router.refusal = HocketError(Reason.UNREACHABLE, "connection lost", grpc_status="UNAVAILABLE")
        outcome = hocket("chat", "--device", "cpu", stdin="one\ntwo\n")
        assert outcome.err == "UNREACHABLE connection lost\n" * 2

        (tmp_path / "die").touch()
        outcome = hocket("chat", "--device", "cpu", stdin="one\ntwo\n")
        assert outcome.err == "NOT_READY the suite of this command has ended: the device is gone\n"
        assert outcome.code == 2

    def test_ctrl_c_while_it_starts_ends_it_at_once(self, tmp_path: Path, hocket: Any) -> None:
        hocket("base", "add", "tiny")
        (tmp_path / "slow").touch()
        program = "import importlib.util; importlib.util.find_spec = lambda name: name\n"
        program += "from hocket.cli.main import main; main()"
        command = [sys.executable, "-c", program, "generate", "x", "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 20
            while not (tmp_path / "starting").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=5)

        assert (process.returncode, (tmp_path / "ended").exists()) == (130, True)
        assert "Traceback" not in err

    def test_a_suite_that_ends_too_soon_says_why(self, hocket: Any, tmp_path: Path, router: Router) -> None:
        hocket("base", "add", "tiny")
        (tmp_path / "die").touch()
        router.refusal = HocketError(Reason.UNREACHABLE, "connection lost", grpc_status="UNAVAILABLE")
        outcome = hocket("generate", "x", "--device", "cpu")

        assert outcome.err == "NOT_READY the suite of this command has ended: the device is gone\n"
        (tmp_path / "die").unlink()
        assert hocket("generate", "x", "--device", "cpu").err == "UNREACHABLE connection lost\n"

    def test_what_has_to_be_installed_is_said(self, hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hocket("base", "add", "tiny")
        monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "transformers" else name)

        assert "needs transformers as well" in hocket("generate", "x", "--device", "cpu").err


def test_ctrl_c_ends_the_call_and_keeps_what_came(router: Router, router_address: str) -> None:
    router.stall = True
    command = [sys.executable, "-m", "hocket.cli.main", "generate", "x", "--router", router_address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == "Sure:"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out) == (130, "\n")
    assert "Traceback" not in err
    assert router.cancelled.wait(5)


def test_only_what_is_text_is_shown() -> None:
    assert answer._visible("a\x1bb\rc\u202ed\n") == "a\\x1bb\\rc\\u202ed\n"


def _pair(expert: tuple[str, float] | str) -> tuple[str, float | None]:
    return (expert, None) if isinstance(expert, str) else expert
