from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from hocket.cli import infer, output
from hocket.client import Answer, blocking
from hocket.errors import HocketError, Reason
from hocket.v1 import text_pb2
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2 import RouteRequest, Routing
from services.aggregator.lineup import Lineup
from services.aggregator.question import ExpertError
from tests import fakes
from tests.fakes import HIGH, LOW, MIXTURE, ScriptedRegistry, ScriptedRouter, serving

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("router_address")

ROWS = ("--row", "0.5,1.5", "--row", "2,-1")


def test_json_is_one_event_a_line(hocket: Any, router: ScriptedRouter) -> None:
    outcome = hocket("predict", "digits", *ROWS, "--partials", "--json")
    plan, partial, answer = outcome.lines

    assert outcome.code == 0
    assert [event["event"] for event in outcome.lines] == ["plan", "partial", "answer"]
    assert plan["request_id"] == answer["request_id"] == "request-1"
    assert plan["plan"]["digest"] == MIXTURE
    assert [expert["expert"] for expert in plan["plan"]["experts"]] == [LOW, HIGH]
    assert (partial["sequence"], partial["coverage"]) == (1, [0.75, 0.75])
    assert partial["lower_bound"] == [[0.0, 0.0]] * 2
    assert partial["upper_bound"] == answer["value"] == [[0.1, 0.9]] * 2
    assert answer["labels"] == ["0", "1"]
    assert answer["contributions"][1]["reason"] == "NO_REPLICA"
    assert answer["finish"]["reason"] == "FINISH_REASON_COMPLETE"
    assert list(router.requests[-1].input.shape) == [2, 2]


def test_partials_come_only_if_asked_for(hocket: Any) -> None:
    assert [event["event"] for event in hocket("predict", "digits", *ROWS, "--json").lines] == ["plan", "answer"]


def test_options_reach_the_request(hocket: Any, router: ScriptedRouter) -> None:
    hocket(
        "predict", "digits", *ROWS, "--top-k", 1, "--renormalise", "--min-coverage", 0.5, "--straggler-timeout", 0.25,
        "--json",
    )  # fmt: skip
    [request] = router.requests

    assert (request.top_k, request.min_coverage, request.on_missing) == (1, 0.5, 2)
    assert request.straggler_timeout.ToMilliseconds() == 250


def test_people_get_the_experts_and_a_table_of_labels(hocket: Any) -> None:
    outcome = hocket("predict", "digits", *ROWS)

    assert outcome.code == 0
    for text in ("acme/low@1.0.0", "acme/high@1.0.0", "arrived", "failed: NO_REPLICA", "3.2 ms", "0.750", "worker-a"):
        assert text in outcome.out
    assert "UNSIGNED_EXPERT" in outcome.out
    assert "pending" not in outcome.out
    assert "request-1" in outcome.err
    table = outcome.out.splitlines()
    assert [line.split() for line in table if line.strip().startswith(("row", "0 ", "1 "))] == [
        ["row", "answer", "0", "1", "coverage"],
        ["0", "1", "0.1", "0.9", "1.000"],
        ["1", "1", "0.1", "0.9", "1.000"],
    ]


def test_a_terminal_follows_the_answer_live(router_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "console", lambda: Console(file=screen, force_terminal=True, width=120))
    board = infer._Board()
    assert board.is_live
    with blocking.connect(router_address) as client, board:
        for event in client.predict("digits", [0.5, 1.5], partials=True):
            board.show(event)

    assert "pending" in screen.getvalue()
    assert "arrived" in screen.getvalue()
    assert isinstance(board.answer, Answer)


def test_more_rows_than_fit_are_counted(hocket: Any) -> None:
    rows = [text for number in range(25) for text in ("--row", f"{number},0")]
    assert "... and 5 more rows" in hocket("predict", "digits", *rows).out
    assert "... and 5 more rows" in hocket("route", "digits", *rows).out


def test_a_refusal_is_a_reason_and_advice(hocket: Any, router: ScriptedRouter) -> None:
    router.refusal = HocketError(Reason.QUEUE_FULL, "this server is busy", retry_after_seconds=0.5)

    outcome = hocket("predict", "digits", *ROWS, "--json")
    assert outcome.code == 2
    assert outcome.document == {"error": {"reason": "QUEUE_FULL", "message": "this server is busy"}}
    outcome = hocket("predict", "digits", *ROWS)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "QUEUE_FULL this server is busy" in outcome.err
    assert "0.5 s" in outcome.err


def test_a_decision_is_explained_row_by_row(hocket: Any) -> None:
    out = hocket("route", "digits", *ROWS, "--top-k", 1).out

    for text in ("registry revision 7", "acme/low@1.0.0", "0.7500", "chosen", "1.0000", "0.2500"):
        assert text in out
    assert "acme/high@1.0.0 is full" in out
    assert "acme/high@1.0.0 cannot run: YANKED" in out


def test_a_decision_as_json_is_the_message(hocket: Any, router: ScriptedRouter) -> None:
    document = hocket("route", "digits", *ROWS, "--json").document

    assert document["plan"]["digest"] == MIXTURE
    assert document["rows"][1]["candidates"][0] == {
        "expert": LOW, "gate_weight": 0.75, "weight": 1.0, "chosen": True,
    }  # fmt: skip
    assert len(router.requests) == 1


def test_an_unknown_model_is_refused(hocket: Any) -> None:
    outcome = hocket("predict", "none", *ROWS)

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("UNKNOWN_MODEL")


def test_a_port_of_another_service_is_recognised(hocket: Any, router_address: str) -> None:
    with serving(add_RegistryServiceServicer_to_server, ScriptedRegistry()) as registry:
        outcome = hocket("predict", "digits", *ROWS, "--router", registry.address)
    assert outcome.code == 2
    assert "does not serve hocket.v1.RouterService: is it the registry's port?" in outcome.err

    outcome = hocket("list", "--registry", router_address)
    assert "does not serve hocket.v1.RegistryService: is it the router's port?" in outcome.err


def test_a_suite_that_does_not_run_is_said_so(hocket: Any) -> None:
    outcome = hocket("predict", "digits", *ROWS, "--router", "127.0.0.1:1", "--json")

    assert outcome.document == {
        "error": {
            "reason": "UNREACHABLE",
            "message": "nobody answers at 127.0.0.1:1: start a suite with `hocket up`, or give --router HOST:PORT",
        }
    }


def test_what_a_service_cannot_reach_is_left_as_it_says(hocket: Any, router: ScriptedRouter) -> None:
    router.refusal = HocketError(Reason.UNREACHABLE, "no aggregator", grpc_status="UNAVAILABLE")

    assert "UNREACHABLE no aggregator" in hocket("predict", "digits", *ROWS).err


def test_an_incomplete_answer_names_the_option_that_takes_it_and_not_the_field(
    hocket: Any, router: ScriptedRouter
) -> None:
    line = Lineup(["low"], [], (1, 1), None, insist=True, min_coverage=0.0, pass_through=False)
    with pytest.raises(HocketError) as caught:
        line.take({0: ExpertError(HocketError(Reason.YANKED, "it is gone"), 1, 0.0)})
    router.refusal = caught.value

    message = hocket("predict", "digits", *ROWS, "--json").document["error"]["message"]
    assert message == (
        "expert low is missing: it is gone (YANKED); ask with --renormalise to accept an answer without it"
    )

    router.refusal = HocketError(Reason.COVERAGE, "a row has coverage 0.2")
    message = hocket("predict", "digits", *ROWS, "--renormalise", "--json").document["error"]["message"]
    assert message == "a row has coverage 0.2 (--min-coverage says how much has to be there)"


def test_a_decision_about_a_text_is_explained(hocket: Any, router: ScriptedRouter) -> None:
    outcome = hocket("route", "list all names")
    for text in (
        "Qwen3-0.6B (base)", "acme/low@1.0.0", "chosen", "0.875", "keyword 'list all' +1.50", "exclude 'list' -2.00",
        "an expert answers (confidence 0.88, an expert needs 0.6)", "... and 8 more",
    ):  # fmt: skip
        assert text in outcome.out, text
    [request] = router.requests
    assert request == RouteRequest(text=text_pb2.TextInput(prompt="list all names"))


def test_who_ties_for_an_answer_is_told_and_how_to_have_them_all(
    hocket: Any, router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    del router
    share = 0.5

    def decision(request: RouteRequest) -> Any:
        found = text_decision(request)
        found.thresholds.share_min = 0.5
        found.candidates[1].probability = share * found.candidates[0].probability
        return found

    text_decision = fakes._text_decision
    monkeypatch.setattr(fakes, "_text_decision", decision)
    told = "undecided between acme/low@1.0.0 0.875 and acme/high@1.0.0 0.438: --max-experts 2 lets them answer together"
    assert told in hocket("route", "list all names").out
    assert "undecided" not in hocket("route", "list all names", "--max-experts", 2).out, "they do not go together"
    share = 0.49
    assert "undecided" not in hocket("route", "list all names").out


def test_what_is_said_about_a_choice_reaches_the_request(hocket: Any, router: ScriptedRouter) -> None:
    outcome = hocket(
        "route", "-", "--policy", "hivellm", "--allow", "a", "--allow", "b", "--deny", "c", "--max-experts", 4,
        "--base", "qwen", stdin="hi\n",
    )  # fmt: skip
    [request] = router.requests
    assert request == RouteRequest(
        text=text_pb2.TextInput(prompt="hi"),
        base="qwen",
        routing=Routing(policy=text_pb2.POLICY_HIVELLM, allow=["a", "b"], deny=["c"], expert_count_max=4),
    )
    assert "keyword router 0.5000, embedding router 0.2500" in outcome.out


def test_a_decision_about_a_text_as_json_is_the_message(hocket: Any) -> None:
    document = hocket("route", "list all names", "--json").document
    assert document["plan"]["reason"] == "DECISION_REASON_GATE"
    assert document["candidates"][0]["evidence"] == [
        {"kind": "EVIDENCE_KIND_KEYWORD", "text": "list all", "contribution": 1.5}
    ]


def test_a_batch_is_a_line_for_every_line(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("first\r\nsecond ü\n\nlast".encode())
    outcome = hocket("route", "--batch", path)
    assert outcome.code == 0
    assert [line["prompt"] for line in outcome.lines] == ["first", "second ü", "", "last"]
    assert {line["decision"]["plan"]["reason"] for line in outcome.lines} == {"DECISION_REASON_GATE"}
    assert hocket("route", "--batch", "-", stdin="one\n").document["prompt"] == "one"


def test_a_batch_goes_on_after_a_refusal_and_says_so(hocket: Any, router: ScriptedRouter) -> None:
    router.refusal = HocketError(Reason.QUEUE_FULL, "busy")
    outcome = hocket("route", "--batch", "-", stdin="one\ntwo\n")
    assert outcome.code == 2
    assert outcome.lines == [
        {"prompt": prompt, "error": {"reason": "QUEUE_FULL", "message": "busy"}} for prompt in ("one", "two")
    ]


def test_a_batch_goes_on_after_a_line_that_is_no_text(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    longest = b"x" * 2**20
    path.write_bytes(b"\n".join([b"\xff", longest + b"x", longest * 3, longest + b"\r", b"last"]))
    outcome = hocket("route", "--batch", path)
    assert outcome.code == 2
    refused = [(line["prompt"], line["error"]) for line in outcome.lines[:3]]
    assert refused == [
        (None, {"reason": "BAD_REQUEST", "message": "line 1 is not text in UTF-8"}),
        (None, {"reason": "TOO_LARGE", "message": "line 2 is longer than 1048576 bytes"}),
        (None, {"reason": "TOO_LARGE", "message": "line 3 is longer than 1048576 bytes"}),
    ]
    assert [(len(line["prompt"]), "decision" in line) for line in outcome.lines[3:]] == [(2**20, True), (4, True)]


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (HocketError(Reason.NO_REPLICA, "nobody"), "NO_REPLICA nobody"),
        (HocketError(Reason.UNKNOWN_BASE, "no such base", field="base"), "UNKNOWN_BASE --base: no such base"),
        (HocketError(Reason.UNKNOWN_EXPERT, "no sql", field="routing.deny[1]"), "UNKNOWN_EXPERT --deny: no sql"),
    ],
)
def test_a_batch_ends_at_what_every_line_would_be_refused_for(
    hocket: Any, router: ScriptedRouter, refusal: HocketError, told: str
) -> None:
    router.refusal = refusal
    outcome = hocket("route", "--batch", "-", stdin="one\ntwo\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(told)


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (("digits", *ROWS, "--policy", "rules"), "", "--policy is for a text"),
        (("digits", *ROWS, "--batch", "-"), "", "--batch is for a text"),
        (ROWS, "", "name the model"),
        (("text", "--batch", "-"), "", "leave out the argument"),
        (("--batch", "nowhere.txt"), "", "nowhere.txt cannot be read"),
        (("",), "", "the prompt is empty"),
    ],
)
def test_what_cannot_be_decided_about_is_refused(
    hocket: Any, arguments: tuple[str, ...], stdin: str | bytes, told: str
) -> None:
    outcome = hocket("route", *arguments, stdin=stdin)
    assert outcome.code == 2
    assert told in outcome.err
