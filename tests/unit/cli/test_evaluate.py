"""`hocket evaluate`: scores of whoever answers. The scripted router answers "Sure: one, two." to everything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.v1 import text_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fakes import ScriptedRouter

pytestmark = pytest.mark.usefixtures("router_address")

RIGHT = "Sure: one, two."


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(answer: str, **more: Any) -> dict[str, Any]:
    return {"prompt": "list two", "completion": answer, **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three of four are right."""
    rows = [row(RIGHT, kind="a"), row(RIGHT, kind="a"), row("no", kind="b"), row(RIGHT, kind="b")]
    return write(tmp_path / "rows.jsonl", *rows)


def test_scores_are_shown_with_their_intervals(hocket: Any, file: Path) -> None:
    outcome = hocket("evaluate", file, "--experts", "sql:0.7,json:0.3", "--routed", "--base-only", "--by", "kind")
    assert outcome.code == 0
    for what in ("sql:0.7,json:0.3", "routed", "base alone", "75.0%", "30.1% - 95.4%", "by kind", "50.0%", "routed to"):
        assert what in outcome.out


def test_a_program_gets_a_line_for_each_of_those_who_answer(hocket: Any, file: Path, router: ScriptedRouter) -> None:
    outcome = hocket("evaluate", file, "--experts", "sql", "--base-only", "--by", "kind", "--limit", "3", "--json")
    sql, base = outcome.lines
    assert (sql["who"], sql["rows"], sql["score"], sql["metrics"]) == ("sql", 3, pytest.approx(2 / 3), {"exact": 3})
    assert (sql["low"], sql["high"]) == (pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4))
    assert (sql["by"]["a"]["score"], sql["by"]["b"]["score"]) == (1, 0)
    assert base["who"] == "base alone"
    assert [[each.expert for each in request.experts] for request in router.requests] == [["sql"]] * 3 + [[]] * 3
    assert all(request.sampling.temperature == 0 for request in router.requests)
    assert {request.routing.policy for request in router.requests[3:]} == {text_pb2.POLICY_BASE}


def test_every_answer_is_written(hocket: Any, file: Path, tmp_path: Path) -> None:
    assert hocket("evaluate", file, "--routed", "--out", tmp_path / "answers.jsonl", "--max-tokens", "9").code == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["score"] for answer in answers] == [1, 1, 0, 1]
    assert (answers[2]["who"], answers[2]["line"], answers[2]["answer"]) == ("routed", 3, RIGHT)


def test_a_prompt_is_asked_as_a_prompt_and_a_conversation_as_one(
    hocket: Any, tmp_path: Path, router: ScriptedRouter
) -> None:
    turns = [{"role": "user", "content": "list two"}, {"role": "assistant", "content": RIGHT}]
    prompts = write(tmp_path / "prompts.jsonl", row(RIGHT))
    conversations = write(tmp_path / "conversations.jsonl", {"messages": turns})
    assert hocket("evaluate", prompts, conversations, "--base-only", "--concurrency", "1").code == 0
    first, second = (request.input for request in router.requests)
    assert (first.WhichOneof("content"), first.prompt) == ("prompt", "list two")
    assert second.WhichOneof("content") == "conversation"
    assert [(each.role, each.content) for each in second.conversation.messages] == [("user", "list two")]


def test_pairs_are_judged_on_each_expert_s_own_questions(hocket: Any, tmp_path: Path, router: ScriptedRouter) -> None:
    rows = write(tmp_path / "rows.jsonl", *[row(RIGHT, expert="a")] * 50, row("no", expert="other"))
    own = write(tmp_path / "b.jsonl", *[row("no")] * 2, row(RIGHT))
    outcome = hocket("evaluate", rows, f"b={own}", "--pairs", "a:0.7,b", "--json")
    first, second = outcome.lines
    assert (first["expert"], first["partner"], first["count"], first["alone"], first["together"]) == (
        "a",
        "b",
        50,
        1,
        1,
    )
    assert (first["verdict"], second["verdict"], second["count"]) == ("compatible", "unclear", 3)
    assert len(router.requests) == 50 + 3 + 50 + 3
    assert [(each.expert, each.weight) for each in router.requests[-1].experts] == [("b", 0.0), ("a", 0.7)]
    shown = hocket("evaluate", rows, f"b={own}", "--pairs", "a,b").out
    assert "compatible" in shown
    assert "unclear" in shown
    assert "On average +0.0%" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--pairs", "a,b", "--routed"),
        ("--pairs", "a"),
        ("--pairs", "a,b"),
        ("--experts", ""),
        ("--experts", "a", "--experts", "a"),
        ("--routed", "--metric", "bleu"),
        ("--routed", "--router", "x", "--device", "cpu"),
    ],
)
def test_what_contradicts_itself_is_refused(hocket: Any, file: Path, arguments: tuple[str, ...]) -> None:
    outcome = hocket("evaluate", file, *arguments, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


def test_a_row_that_cannot_be_scored_is_named(hocket: Any, tmp_path: Path, router: ScriptedRouter) -> None:
    bad = write(tmp_path / "bad.jsonl", row("x"), row("SELECT x", sqlite="CREATE TABLE t(a)"))
    refused = hocket("evaluate", bad, "--routed", "--json").document["error"]
    assert (refused["reason"], refused["file"]) == ("BAD_DATASET", str(bad))
    assert refused["message"].startswith("bad.jsonl, line 2: the reference cannot be run")
    assert "No such file" in hocket("evaluate", tmp_path / "none", "--routed").err
    assert router.requests == []


def test_a_refusal_leaves_no_file(hocket: Any, file: Path, tmp_path: Path, router: ScriptedRouter) -> None:
    router.refusal = HocketError(Reason.UNKNOWN_EXPERT, "no such expert", field="experts[0]")
    outcome = hocket("evaluate", file, "--experts", "x", "--out", tmp_path / "answers.jsonl", "--json")
    assert outcome.document["error"]["reason"] == "UNKNOWN_EXPERT"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_bar_is_shown_at_a_terminal(hocket: Any, file: Path, at_terminal: Callable[..., None]) -> None:
    at_terminal("<stderr>")
    assert "routed" in hocket("evaluate", file, "--routed").err
