"""The scores of the format's own routers, against what those tools have recorded."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hocket.v1.package_pb2 import AdapterFacts
from hocket.v1.text_pb2 import DecisionReason
from services.router import hivellm
from services.router.choosing import Bounds, by_hivellm
from services.router.hivellm import Said
from tests.routing import PUBLISHED, asking_for, gate_of, published, recorded

SCORES = "upstream-built/routing-scores.json"
CASES = "upstream-fixtures/routing_cases.json"


def facts() -> dict[str, AdapterFacts]:
    """Of those that say when they want to be asked: nobody else is scored."""
    named = zip(PUBLISHED, published(), strict=True)
    return {f"expert-{name}": package.adapter for name, package in named if package.adapter.HasField("routing")}


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
        scores = {name: hivellm.keyword_score(Said(row["prompt"]), each) for name, each in facts().items()}
        assert {name: score for name, score in scores.items() if score} == {
            each["expert"]: each["score"] for each in row["keyword"]
        }


def test_the_embedding_router_scores_as_recorded() -> None:
    for row in recorded(SCORES):
        told = {each["expert"]: each["score"] for each in row["embedding"]}
        for name, each in facts().items():
            assert hivellm.embedding_score(Said(row["prompt"]), each) == pytest.approx(told.get(name, 0.0), abs=1e-7)


def test_general_questions_are_those_of_the_recorded_cases() -> None:
    told = [case for case in recorded(CASES) if "generic" in case]
    assert told
    for case in told:
        assert bool(hivellm.general_question(Said(case["prompt"]))) is case["generic"]


def test_evidence_adds_up_and_the_reason_is_said() -> None:
    expert = asking_for(1, "sql", "sql", exclude=["novel"], priority=0.5, capabilities=["query:sql", "plain"])
    evidence = hivellm.chat_evidence(Said("SQL for a novel"), expert.adapter)
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
    assert hivellm.keyword_score(Said("sql"), empty) == hivellm.embedding_score(Said("sql"), empty) == 0.0
    assert hivellm.embedding_score(Said(""), asking_for(1, "sql", "sql").adapter) == 0.0


def test_a_priority_that_is_not_stated_multiplies_nothing() -> None:
    stated, silent = asking_for(1, "sql", "sql", priority=0.5), asking_for(2, "sql", "sql", priority=None)
    said = Said("some sql")
    assert [
        sum(each.contribution for each in hivellm.chat_evidence(said, each.adapter)) for each in (stated, silent)
    ] == [
        0.5,
        1.0,
    ]
    assert hivellm.keyword_score(said, silent.adapter) == 2 * hivellm.keyword_score(said, stated.adapter) == 1.0
    assert hivellm.embedding_score(said, silent.adapter) == 2 * hivellm.embedding_score(said, stated.adapter)


@given(text=st.text("abcİ "), part=st.text("abci\u0307 ", max_size=6))
def test_what_is_in_a_text_is_found_in_it(text: str, part: str) -> None:
    assert Said(text).has(part) is (part in text.lower())


def test_a_long_text_takes_no_long() -> None:
    words = " ".join(f"w{number}" for number in range(1600))[:8192]
    facts = asking_for(1, "sql", *(f"{number}" * 8 for number in range(64))).adapter
    for text in (words, "x" * 8192, "a " * 4096):
        begin, said = time.thread_time(), Said(text)
        for _ in range(32):
            hivellm.chat_evidence(said, facts)
            hivellm.embedding_score(said, facts)
        assert time.thread_time() - begin < 5
