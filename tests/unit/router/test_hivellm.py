"""The scores of the format's own routers, against what those tools have recorded."""

from __future__ import annotations

import pytest

from hocket.v1.package_pb2 import AdapterFacts
from hocket.v1.text_pb2 import DecisionReason
from services.router import hivellm
from services.router.choosing import Bounds, by_hivellm
from tests.routing import PUBLISHED, asking_for, gate_of, published, recorded

SCORES = "upstream-built/routing-scores.json"
CASES = "upstream-fixtures/routing_cases.json"


def facts() -> dict[str, AdapterFacts]:
    return {f"expert-{name}": package.adapter for name, package in zip(PUBLISHED, published(), strict=True)}


@pytest.mark.parametrize(
    ("text", "value"),
    [("sql", 7624981255247683917), ("database", 15518517633859019393), ("query:sql", 2303175726054792975)],
)
def test_texts_hash_as_in_rust(text: str, value: int) -> None:
    assert hivellm.siphash13(text) == value


def test_the_chat_router_chooses_as_recorded() -> None:
    gate = gate_of(*published())  # by digest, which is the order of the recording
    rows = recorded(SCORES)
    assert len(rows) == 35
    for row in rows:
        choice = by_hivellm(gate, row["prompt"], Bounds())
        chosen = [expert.package.adapter.name for expert, _ in choice.chosen]
        assert chosen == ([row["chat_selected"]] if row["chat_selected"] else []), row["prompt"]


def test_the_keyword_router_scores_as_recorded() -> None:
    for row in recorded(SCORES):
        scores = {name: hivellm.keyword_score(row["prompt"], each) for name, each in facts().items()}
        assert {name: score for name, score in scores.items() if score} == {
            each["expert"]: each["score"] for each in row["keyword"]
        }


def test_the_embedding_router_scores_as_recorded() -> None:
    for row in recorded(SCORES):
        told = {each["expert"]: each["score"] for each in row["embedding"]}
        for name, each in facts().items():
            assert hivellm.embedding_score(row["prompt"], each) == pytest.approx(told.get(name, 0.0), abs=1e-7)


def test_general_questions_are_those_of_the_recorded_cases() -> None:
    told = [case for case in recorded(CASES) if "generic" in case]
    assert told
    for case in told:
        assert bool(hivellm.general_question(case["prompt"])) is case["generic"]


def test_evidence_adds_up_and_the_reason_is_said() -> None:
    expert = asking_for(1, "sql", "sql", exclude=["novel"], priority=0.5, capabilities=["query:sql", "plain"])
    evidence = hivellm.chat_evidence("SQL for a novel", expert.adapter)
    assert [each.contribution for each in evidence] == [1.0, -2.0, 0.5, 0.5]
    gate = gate_of(expert)
    reasons = {text: by_hivellm(gate, text, Bounds()).reason for text in ("sql", "poem", "find out why sql")}
    assert reasons == {
        "sql": DecisionReason.DECISION_REASON_GATE,
        "poem": DecisionReason.DECISION_REASON_BASE_NO_MATCH,
        "find out why sql": DecisionReason.DECISION_REASON_BASE_GENERIC,
    }


def test_an_expert_without_keywords_scores_nothing_and_a_text_without_words_neither() -> None:
    empty = AdapterFacts()
    assert hivellm.keyword_score("sql", empty) == hivellm.embedding_score("sql", empty) == 0.0
    assert hivellm.embedding_score("", asking_for(1, "sql", "sql").adapter) == 0.0
