"""The rules gate: what speaks for an expert, what for the base, and what comes of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from hocket.v1.router_pb2 import EvidenceKind
from hocket.v1.text_pb2 import Conversation, DecisionReason, Message, TextInput
from services.router import choosing
from services.router.choosing import Bounds, by_rules
from services.router.prompt_features import PATTERNS, STRONG, WEAK, features, gate_text, words
from services.router.rules import (
    BASE,
    CAPABILITY,
    COMMON,
    EVERYDAY,
    EXCLUDE,
    GENERIC,
    HINT,
    IDF_MIN,
    KEYWORD_CHARS_MAX,
    KEYWORDS_MAX,
    PRIORITY,
    RulesGate,
)
from tests.routing import asking_for, gate_of, published, recorded

if TYPE_CHECKING:
    from hocket.v1.package_pb2 import Package

FULL_WIDTH = {character: character + 0xFEE0 for character in range(0x21, 0x7F)}
"""ASCII as Chinese and Japanese keyboards write it, too."""
GATE = DecisionReason.DECISION_REASON_GATE
GENERAL = DecisionReason.DECISION_REASON_BASE_GENERIC
UNSURE = DecisionReason.DECISION_REASON_BASE_LOW_CONFIDENCE
NOTHING = DecisionReason.DECISION_REASON_BASE_NO_MATCH


def score(text: str, *packages: Package) -> float:
    """The first expert's score."""
    return float(gate_of(*packages).read(text).scores[0])


def decided(text: str, *packages: Package, **bounds: Any) -> tuple[list[str], DecisionReason.ValueType]:
    choice = by_rules(gate_of(*packages), text, Bounds(**bounds))
    return [expert.package.adapter.name for expert, _ in choice.chosen], choice.reason


# Words.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nodes, queries & c++ in C#", ["node", "query", "c++", "in", "c#"]),
        ("GROUP_BY; class bus this gas", ["group", "by", "class", "bus", "this", "gas"]),
        ("Regexes, indexes, matches, boxes", ["regex", "index", "match", "box"]),
        ("classes, addresses, movies, cookies, ties", ["class", "address", "movie", "cookie", "tie"]),
        ("the news, caches, vertices, databases", ["the", "news", "cache", "vertex", "database"]),
        ("\uff33\uff54\uff52\uff41\u00dfe \ufb01nd", ["strasse", "find"]),
        ("東京 is big", ["東", "京", "is", "big"]),
        ("", []),
    ],
)
def test_words_are_normalised(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_the_last_words_of_the_user_decide() -> None:
    turns = [("system", "sql"), ("user", "first"), ("assistant", "sql"), ("user", "last"), ("tool", "sql")]
    said = Conversation(messages=[Message(role=role, content=content) for role, content in turns])
    assert gate_text(TextInput(conversation=said)) == "last"
    assert gate_text(TextInput(conversation=Conversation(messages=said.messages[:1]))) == ""
    assert gate_text(TextInput(prompt="p")) == "p"
    assert gate_text(TextInput(raw="r")) == "r"


def test_of_a_long_text_beginning_and_end_are_looked_at() -> None:
    long = "begin " + "é" * 20_000 + " end"
    seen = gate_text(TextInput(prompt=long))
    assert (seen[:6], seen[-4:]) == ("begin ", " end")
    assert len(seen.encode()) <= 2 * 4096 + 1
    assert gate_text(TextInput(prompt="x" * 8192)) == "x" * 8192


# What speaks for an expert.


def test_keywords_are_whole_words_and_phrases_weigh_more() -> None:
    expert = asking_for(1, "sql", "sql", "graph path")
    assert score("mysqlish", expert) == 0.0
    assert score("some SQL", expert) == 1.0
    assert score("sql sql sql", expert) == 1.0
    assert score("path graph", expert) == 0.0
    assert score("a graph path here", expert) == 1.5


def test_what_others_say_as_well_takes_no_request_to_the_base() -> None:
    one, other = asking_for(1, "a", "graph", "vertex"), asking_for(2, "b", "graph")
    reading = gate_of(one, other).read("graph")
    assert reading.scores.tolist() == [1.0, 1.0]
    assert reading.ranks.tolist() == pytest.approx([0.5**0.5] * 2)
    crowd = [asking_for(number, f"e{number}", "graph") for number in range(40)]
    assert decided("graph", *crowd) == (["e0"], GATE)
    assert decided("graph vertex", *crowd, asking_for(50, "own", "graph", "vertex")) == (["own"], GATE)
    assert gate_of(*crowd).read("graph").ranks.tolist() == [IDF_MIN] * 40


def test_everyday_english_weighs_half_and_the_commonest_words_little_and_once() -> None:
    assert score("a table", asking_for(1, "x", "table")) == EVERYDAY
    assert score("a kitchen table", asking_for(1, "x", "kitchen table")) == 1.5 * EVERYDAY
    assert score("find", asking_for(1, "x", "find")) == COMMON
    common = asking_for(1, "x", "of the", "can you", "for me", capabilities=["format:text", "task:help"])
    told = "Can you help me with the text of the king, a story for me about the king of the hill"
    assert score(told, common) == COMMON
    assert decided(told, common)[0] == []


def test_values_of_capabilities_are_words_if_they_are_long_enough() -> None:
    expert = asking_for(1, "x", capabilities=["language:en", "tech:kafka", "feature:graph_path", "plain"])
    assert score("en", expert) == 0.0
    assert score("kafka", expert) == CAPABILITY
    assert score("graph path", expert) == CAPABILITY
    assert score("plain", expert) == CAPABILITY
    assert score("quantum differential entropy", expert) == 0.0


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("SELECT name\nFROM users", "SQL statement"),
        ("select a, b from t", "SQL statement"),
        ("insert into t values (1)", "SQL statement"),
        ("UPDATE t SET a = 1", "SQL statement"),
        ("CREATE TABLE t (a int)", "SQL statement"),
        ("Table users (id, name)", "table schema"),
        ("users(id integer, name text)", "table schema"),
        ("MATCH (n) RETURN n", "graph pattern"),
        ("(a:Person)-[:KNOWS]->(b)", "graph pattern"),
        ('fix {"a": 1', "JSON"),
        ("<b>bold</b>", "markup"),
        (r"what does \d+ match", "regular expression"),
        ("def f(x):", "Python"),
        ("error[E0502]: no", "Rust"),
        ("let x: string = y", "TypeScript"),
        ("grep -r x", "shell"),
        ("5 km", "quantity"),
        ("$5", "quantity"),
        ("Table users (name, born)", "table schema"),
        ("users(id, name), who is the oldest", "table schema"),
        ("columns: name, age, city", "table schema"),
        ("Graph (Person {name})-[:KNOWS]->(Person)", "graph pattern"),
        ("(a)-->(b)", "graph pattern"),
        ("extract the year from this: it was 1999", "fields asked for"),
        ("give me name, age and city of this text", "fields asked for"),
        ("three digits followed by a dash", "strings described"),
        ("words ending in a vowel", "strings described"),
        ("3 km, how much in metres?", "conversion"),
        ("how many minutes are there in 4 hours", "conversion"),
        ("5 books at 4 euros each", "sum of money"),
        ("ten days after 12 June", "date reckoned"),
        ("It is Friday. Which day is it in 3 days?", "date reckoned"),
        ("did the guest like it?", "opinion asked for"),
        ("What is this text about?", "subject asked for"),
        ("sport, weather or food?", "labels to choose from"),
        ("la hundo dormas", "Esperanto"),
        ("3.5 m", "quantity"),
    ],
)
def test_syntax_is_recognised(text: str, pattern: str) -> None:
    found = features(text).patterns
    assert pattern in {each.name for each in found}
    assert found == [each for each in PATTERNS if each.expression.search(text)]
    assert features(text.translate(FULL_WIDTH)).patterns == found


@pytest.mark.parametrize(
    "text",
    [
        "select the best wine from the list",
        "the table is set",
        "a match (of football)",
        "he said: yes",
        "update me on this",
        "call f(a, b)",
        "we are 5 people and 3 mice",
        "import duties rise",
        "(reason: Family matters)",
        "a table at Luigi (the one downtown)",
        "=INDEX(A:A, MATCH(B1, C:C, 0))",
        'println!("{}", name)',
        "as shown in [2-5]",
        "a train goes from Ulm to Bonn in hours",
        "He said that it's fine (they don't mind)",
        "start with a smile and end with a laugh",
        "two letters arrived today",
        "la mano de Dios",
    ],
)
def test_prose_is_no_syntax(text: str) -> None:
    assert features(text).patterns == []


def test_a_price_in_passing_is_a_weak_sign() -> None:
    expert = asking_for(1, "m", capabilities=["task:conversion"], hint="task=conversion")
    assert [found.name for found in features("I paid $5 for lunch today").patterns] == ["quantity"]
    assert score("I paid $5 for lunch today", expert) == WEAK
    assert score("$5 in dollars, 3 km in miles", expert) == WEAK + STRONG + HINT


def test_syntax_and_fenced_code_speak_for_capabilities() -> None:
    sql = asking_for(1, "sql", capabilities=["query:sql", "database:sql"])
    other = asking_for(2, "other", "nothing")
    assert score("SELECT a FROM t", sql) == 2.0
    assert score("```sql\nx\n```", sql) == pytest.approx(2.0 + CAPABILITY)
    assert score("```ts\nx\n```", asking_for(1, "t", capabilities=["language:typescript"])) == 2.0
    assert decided("SELECT a FROM t", sql, other) == (["sql"], GATE)


def test_groups_of_words_speak_for_tasks() -> None:
    expert = asking_for(1, "x", capabilities=["task:translation"])
    assert score("translate and convert this", expert) == CAPABILITY
    assert score("please translate", asking_for(1, "y", capabilities=["task:poetry"])) == 0.0


def test_a_hint_is_a_feature_among_others() -> None:
    expert = asking_for(1, "x", "volcano", hint="query=sql AND NOT length>100")
    assert score("volcano", expert) == 1.0
    assert score("sql", expert) == HINT
    assert score("volcano sql", expert) == 1.0 + HINT
    assert score("volcano sql" + " " * 100, expert) == 1.0
    assert score("SELECT a FROM t", asking_for(1, "x", "banana", hint="query=sql")) == HINT
    assert score("```sql\na\n```", asking_for(1, "x", "banana", hint="language=sql")) == HINT
    assert score("neo4j", asking_for(1, "x", "banana", hint="tech=neo4j")) == HINT


def test_a_hint_counts_only_where_something_of_what_it_asks_for_is_found() -> None:
    for hint in ("NOT query=sql", "NOT zzz=1", "length>1", "task=the", "domain=home"):
        assert score("the volcano is my home", asking_for(1, "x", "volcano", hint=hint)) == 1.0, hint
    assert score("volcano", asking_for(1, "x", "banana", hint="NOT (NOT domain=volcano)")) == HINT


def test_a_hint_that_nobody_understands_is_ignored_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    odd = asking_for(1, "x", "volcano", hint="query~sql")
    gate = gate_of(odd)
    assert float(gate.read("volcano").scores[0]) == 1.0
    RulesGate(gate.experts, {terms.package.digest: terms for terms in gate.terms})
    assert capsys.readouterr().out.count("router_hint not understood") == 1


def test_exclude_keywords_take_away_and_priority_rescues_nothing() -> None:
    expert = asking_for(1, "x", "sql", exclude=["novel", "what is"], priority=0.5)
    assert score("sql", expert) == 0.5
    assert score("sql novel", expert) == 1.0 - EXCLUDE
    assert score("novel", expert) == -EXCLUDE
    assert score("sql and what is more", expert) == 0.5
    assert decided("sql novel", expert) == ([], NOTHING)


def test_of_too_many_and_too_long_keywords_the_first_and_short_ones_count() -> None:
    many = asking_for(1, "x", *(f"k{number}" for number in range(KEYWORDS_MAX + 1)))
    assert score(f"k{KEYWORDS_MAX - 1}", many) == 1.0
    assert score(f"k{KEYWORDS_MAX}", many) == 0.0
    assert score("a" * KEYWORD_CHARS_MAX, asking_for(1, "x", "a" * KEYWORD_CHARS_MAX)) == 1.0
    assert score("a" * (KEYWORD_CHARS_MAX + 1), asking_for(1, "x", "a" * (KEYWORD_CHARS_MAX + 1))) == 0.0
    assert score("?! a", asking_for(1, "x", "?!", " ", "")) == 0.0
    assert score("a b c d e f g h i", asking_for(1, "x", "a b c d e f g h i")) == 0.0


def test_an_odd_priority_is_cut() -> None:
    assert score("sql", asking_for(1, "x", "sql", priority=float("nan"))) == 0.0
    assert score("sql", asking_for(1, "x", "sql", priority=9.0)) == 1.0
    assert score("sql", asking_for(1, "x", "sql", priority=-1.0)) == 0.0
    assert score("sql", asking_for(1, "x", "sql", priority=None)) == PRIORITY


# What speaks for the base.


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("What is SQL?", "what is"),
        ("Hello. Please, what's SQL", "what s"),
        ("Good day.\nTell me about databases", "tell me about"),
        ("Explain how Neo4j works", "explain"),
        ("How to connect to a database?", "how to"),
        ("explain SELECT a FROM t", "explain"),
        ("Show top 10 products by revenue", ""),
        ("Find products whose name contains why", ""),
        ("explained whatever", ""),
        ("What is 3 km in miles?", ""),
        ("What is 'dog' in Esperanto?", ""),
        ("Hey there, what is SQL?", "what is"),
        ("Quick question: what is SQL?", "what is"),
        ("Whats SQL?", "whats"),
        ("In a database, what is a join?", "what is"),
        ("I wonder what a SQL join is", "i wonder what"),
        ("Can you tell me what JSON is?", "can you tell me what"),
        ("I read about databases. What is SQL?", "what is"),
        ("Write me a poem about a graph", "write"),
        ("Show me the advantages of SQL", "show"),
        ("Who invented Esperanto?", "who"),
        ("Is SQL hard to learn?", "is"),
        ("Translate to Esperanto:\nWhere is the cat?", ""),
        ("Translate into Esperanto. Why does the dog sleep?", ""),
        ("Extract name and age as JSON: Bob is 5. Why he left nobody knows.", ""),
        ("Is this review positive or negative?\nWhat is wrong with this phone? It dies daily.", ""),
        ("What is this text about? The goalkeeper saved two penalties.", ""),
        ('did the guest like it? "Lovely room, awful breakfast"', ""),
        ("Define a SQL table for users", ""),
        ("DESCRIBE the columns of table users(id, name)", ""),
        ("What is the date ten days after 12 June?", ""),
        ("Which SQL query returns all users?", ""),
        ("Table users(id, name). What is the name of the oldest?", ""),
        ("My notes end here. How do you say dog in French?", ""),
        ("How do you say dog in French?", ""),
        ("What is the SQL query that lists users?", ""),
        ("What are the names in table t(a int, b text)?", ""),
    ],
)
def test_general_questions_are_known_by_how_they_begin(text: str, form: str) -> None:
    assert features(text).generic_form == form


@pytest.mark.parametrize(
    "text",
    [
        "What is SQL?",
        "Explain what JSON is",
        "Explain how Neo4j works",
        "What is the difference between SQL and a graph database?",
        "What is a relational database table and a SQL query?",
        "How to connect to a database?",
    ],
)
def test_general_questions_about_a_topic_stay_with_the_base(text: str) -> None:
    assert decided(text, *published()) == ([], GENERAL)


@pytest.mark.parametrize("text", ["hello", "Write me a poem about autumn", "quantum physics differential equations"])
def test_where_nothing_speaks_for_an_expert_the_base_answers(text: str) -> None:
    assert decided(text, *published()) == ([], NOTHING)


def test_a_word_of_everyday_english_alone_is_not_enough() -> None:
    assert decided("Find actors", *published()) == ([], UNSURE)


def test_prompts_of_the_formats_own_tests_go_where_they_should() -> None:
    by_name = {package.adapter.name: package for package in published()}
    for case in recorded("upstream-fixtures/routing_cases.json"):
        if "experts_loaded" in case:
            loaded = [by_name[f"expert-{name}"] for name in case["experts_loaded"]]
            chosen, _ = decided(case["prompt"], *loaded)
            assert bool(chosen) is (case["expected"] == "expert"), case


def test_the_evidence_of_everybody_adds_up_to_their_scores() -> None:
    gate = gate_of(*published(), asking_for(90, "novel", "sql", exclude=["database"]))
    for row in recorded("upstream-built/routing-scores.json"):
        choice = by_rules(gate, row["prompt"], Bounds())
        for candidate in choice.candidates:
            told = candidate.evidence()
            assert all(each.contribution for each in told)
            assert sum(each.contribution for each in told) == pytest.approx(candidate.score, abs=1e-9)
        general = any(each.kind == EvidenceKind.EVIDENCE_KIND_GENERIC for each in choice.base_evidence)
        assert sum(each.contribution for each in choice.base_evidence) == BASE + GENERIC * general
        shares = [choice.base_probability, *(candidate.probability for candidate in choice.candidates)]
        assert sum(shares) == pytest.approx(1.0)


# Who may be chosen, and how several go together.

A, B, C = (asking_for(number, name, "graph", parameter_bytes=100) for number, name in enumerate("abc"))
TEXT = "graph"


def test_of_equals_the_lower_digest_answers() -> None:
    assert decided("graph path", *(asking_for(n, f"e{n}", "graph", "path") for n in (3, 1, 2))) == (["e1"], GATE)


def test_more_than_six_alike_are_mixed_where_that_many_are_allowed() -> None:
    alike = [asking_for(number, f"e{number}", "graph") for number in range(9)]
    choice = by_rules(gate_of(*alike), TEXT, Bounds(count_max=8))
    assert [weight for _, weight in choice.chosen] == pytest.approx([1 / 8] * 8)


def test_several_are_composed_where_the_gate_is_undecided_and_the_caller_allows_it() -> None:
    assert decided(TEXT, A, B)[0] == ["a"]
    choice = by_rules(gate_of(A, B), TEXT, Bounds(count_max=3))
    assert [(expert.package.adapter.name, weight) for expert, weight in choice.chosen] == [("a", 0.5), ("b", 0.5)]
    clear = asking_for(7, "clear", "graph", "vertex")
    assert decided("graph vertex", A, clear, count_max=3)[0] == ["clear"]


def test_a_mixture_holds_to_what_its_members_say() -> None:
    def pair(**constraints: Any) -> list[str]:
        other = asking_for(8, "other", "graph", parameter_bytes=100)
        for name, value in constraints.items():
            if isinstance(value, list):
                getattr(other.adapter.constraints, name).extend(value)
            else:
                setattr(other.adapter.constraints, name, value)
        return decided(TEXT, A, other, count_max=3)[0]

    assert pair() == ["a", "other"]
    assert pair(max_chain=2) == ["a", "other"]
    assert pair(max_chain=1) == ["a"]
    for pattern in ("a", "a@1.0.0", "acme/a@>=1.0.0", "what >< ever"):
        assert pair(incompatible_with=[pattern]) == ["a"], pattern
    for pattern in ("b", "a@2.0.0", "zeta/a"):
        assert pair(incompatible_with=[pattern]) == ["a", "other"], pattern
    assert decided(TEXT, A, B, count_max=3, size_bytes_max=199)[0] == ["a"]


def test_who_may_not_be_chosen_has_no_probability() -> None:
    digest = A.digest
    assert decided(TEXT, A, B, denied=frozenset({digest})) == (["b"], GATE)
    assert decided(TEXT, A, B, allowed=frozenset({digest})) == (["a"], GATE)
    assert decided(TEXT, A, B, allowed=frozenset()) == ([], NOTHING)
    assert decided(TEXT, A, B, allowed=frozenset({digest}), denied=frozenset({digest})) == ([], NOTHING)
    assert decided(TEXT, A, B, size_bytes_max=99) == ([], NOTHING)
    assert by_rules(gate_of(A, B), TEXT, Bounds(denied=frozenset({digest}))).candidate_count == 1


def test_experts_that_require_others_or_say_nothing_are_only_named() -> None:
    needy = asking_for(1, "needy", "graph")
    needy.adapter.constraints.requirements.append("a")
    silent = asking_for(2, "silent", "graph")
    silent.adapter.ClearField("routing")
    assert gate_of(needy, silent, A).experts == gate_of(A).experts


def test_one_version_of_a_name_may_be_chosen_the_newest_that_rides_on_the_base() -> None:
    old, new = asking_for(1, "a", "graph"), asking_for(2, "a", "graph", version="1.1.0")
    early = asking_for(3, "a", "graph", version="2.0.0-rc.1")
    elsewhere = asking_for(4, "a", "graph", version="3.0.0")
    elsewhere.adapter.base.digest = f"sha256:{'c' * 64}"
    assert [expert.name for expert in gate_of(old, new, early, elsewhere).experts] == ["acme/a@1.1.0"]
    twice = asking_for(5, "b", "graph")
    twice.releases.add(publisher="zeta", name="b", version="1.0.0", state=twice.releases[0].state)
    assert [expert.name for expert in gate_of(twice).experts] == ["acme/b@1.0.0"]


@pytest.mark.parametrize(("least", "chosen"), [(0.0, ["a"]), (1.0, [])])
def test_at_the_ends_of_the_threshold_an_expert_always_or_never_answers(
    least: float, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "CONFIDENCE_MIN", least)
    assert decided("what is a graph", A)[0] == chosen


def test_more_candidates_than_are_kept_are_counted() -> None:
    many = [asking_for(number, f"e{number}", "graph", "path") for number in range(choosing.CANDIDATES_MAX + 5)]
    choice = by_rules(gate_of(*many), "graph path", Bounds(count_max=10))
    assert (len(choice.candidates), choice.candidate_count) == (choosing.CANDIDATES_MAX, len(many))


# Hostile texts and packages.


@pytest.mark.parametrize(
    "text",
    [
        "SELECT " * 1170,
        "select a, " * 800,
        "MATCH (" * 1170,
        "(a:A" * 2000,
        '{"' * 4096,
        "table " * 1365,
        "what is the " * 680,
        "a " * 4096,
        "\ufdfa" * 2700,
        "1" * 8192,
        "`" * 8192,
        "$5" * 4096,
        "-[" * 4096,
        "please " * 1170,
        "." * 8192,
        "\n" * 8192,
        "\u2026" * 2730,
        ". " * 4096,
        "1 km " * 1638,
        "in km " * 1365,
        "5 euros " * 1024,
        "one digit " * 819,
        "aaa, " * 1638,
        "one day after " * 585,
        "extract " * 1024,
        "id(" * 2730,
        "a" * 8192,
        "let x: " * 1170,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    gate = gate_of(*published(), asking_for(99, "aaa", *(("a " * n).strip() for n in range(1, 9))))
    begin = time.thread_time()
    by_rules(gate, gate_text(TextInput(prompt=text)), Bounds())
    assert time.thread_time() - begin < 2


def test_every_pattern_is_found_by_its_hints() -> None:
    assert all(pattern.hints == tuple(hint.lower() for hint in pattern.hints) for pattern in PATTERNS)


def test_a_gate_over_nobody_has_nothing_to_say() -> None:
    assert by_rules(gate_of(), "SELECT a FROM t", Bounds()).reason == NOTHING
