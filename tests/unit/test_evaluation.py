"""Scores, their intervals, and runs over a dataset."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.datasets import read_rows
from hocket.errors import HocketError, Reason
from hocket.evaluation import (
    Compatibility,
    Metric,
    Question,
    Reply,
    SqlLimits,
    answer_all,
    compare,
    drop_interval,
    exact_match,
    execution_match,
    f1,
    json_match,
    questions,
    run_query,
    running,
    wilson_interval,
)
from hocket.evaluation.scores import ANSWER_CHARACTERS_MAX, check_schema, unfenced
from hocket.evaluation.sql import is_ordered

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = "CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (2, 'z'); CREATE VIEW v AS SELECT a FROM t;"
COUNTING = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


def endless(select: str, *, into: str = "") -> str:
    """A query over numbers without end."""
    return f"{into}{COUNTING} {select}"


HOSTILE = st.text(alphabet=st.characters(codec=None), max_size=80) | st.sampled_from(
    ["\0", "\ud800", "[" * 5000, "{" * 5000, "```", "```\n```\n```", '{"a": NaN}', "9" * 5000, "SELECT (" * 3000]
)


class TestTexts:
    @pytest.mark.parametrize(
        ("answer", "reference", "right"),
        [
            (" two\n words ", "two words", True),
            ("e\u0301", "\u00e9", True),
            ("Two words", "two words", False),
            ("two words.", "two words", False),
            ("", "two", False),
            ("x" * (ANSWER_CHARACTERS_MAX + 1), "x" * (ANSWER_CHARACTERS_MAX + 1), False),
            ("x" * ANSWER_CHARACTERS_MAX, "x" * ANSWER_CHARACTERS_MAX, True),
        ],
    )
    def test_only_white_space_makes_no_difference(self, answer: str, reference: str, right: bool) -> None:  # noqa: FBT001
        assert exact_match(answer, reference) is right

    @pytest.mark.parametrize(
        ("answer", "reference", "score"),
        [
            ("The cat sat.", "a cat sat", 1.0),
            ("the cat", "cat sat", 2 / 3),
            ("cat cat cat", "cat", 1 / 2),
            ("dog", "cat", 0.0),
            ("the", "a", 1.0),
            ("the", "cat", 0.0),
            ("x" * (ANSWER_CHARACTERS_MAX + 1), "x" * (ANSWER_CHARACTERS_MAX + 1), 0.0),
        ],
    )
    def test_f1_is_squad_s(self, answer: str, reference: str, score: float) -> None:
        assert f1(answer, reference) == pytest.approx(score)

    def test_the_only_fenced_block_is_the_answer(self) -> None:
        assert unfenced("Sure:\n```sql\nSELECT 1\n```\nDone.") == "SELECT 1\n"
        assert unfenced("SELECT 1") == "SELECT 1"
        assert unfenced("```a\n1\n``` or ```b\n2\n```").startswith("```")


class TestJson:
    @pytest.mark.parametrize(
        ("answer", "reference", "parses", "keys", "values"),
        [
            ('{"b": [1, 2.0], "a": null}', '{"a": null, "b": [1.0, 2]}', True, True, True),
            ('```json\n{"a": 1}\n```', '{"a": 1}', True, True, True),
            ('{"a": 2}', '{"a": 1}', True, True, False),
            ('{"a": true}', '{"a": 1}', True, True, False),
            ('{"a": [2, 1]}', '{"a": [1, 2]}', True, True, False),
            ('{"a": [{"b": 1}]}', '{"a": [{"c": 1}]}', True, False, False),
            ('{"a": 1, "a": 1}', '{"a": 1}', False, False, False),
            ("{", "{}", False, False, False),
        ],
    )
    def test_json_is_compared_by_what_it_means(
        self,
        answer: str,
        reference: str,
        parses: bool,  # noqa: FBT001
        keys: bool,  # noqa: FBT001
        values: bool,  # noqa: FBT001
    ) -> None:
        found = json_match(answer, reference)
        assert (found.parses, found.keys, found.values, found.conforms) == (parses, keys, values, parses)
        assert found.right is values

    @pytest.mark.parametrize(
        ("schema", "fits", "unfit"),
        [
            ({"type": "integer"}, "1", "1.5"),
            ({"type": "number"}, "1.5", "true"),
            ({"type": ["string", "null"]}, "null", "1"),
            ({"type": "array", "items": {"type": "string"}}, '["a"]', "[1]"),
            ({"type": "object", "required": ["a"]}, '{"a": 1}', '{"b": 1}'),
            ({"properties": {"a": {"type": "boolean"}}}, '{"b": 1}', '{"a": 1}'),
            ({"properties": {"a": {}}, "additionalProperties": False}, '{"a": 1}', '{"a": 1, "b": 1}'),
            ({"enum": [1, "x"], "title": "t"}, '"x"', "true"),
        ],
    )
    def test_an_answer_has_to_fit_the_schema(self, schema: dict[str, Any], fits: str, unfit: str) -> None:
        assert json_match(fits, fits, schema).right
        assert not json_match(unfit, unfit, schema).right
        assert json_match(unfit, unfit, schema).values

    @pytest.mark.parametrize(
        "schema",
        [
            {"pattern": "x"},
            {"type": "text"},
            {"type": [1]},
            {"items": []},
            {"properties": {"a": 1}},
            [],
            {"required": "a"},
        ],
    )
    def test_a_schema_that_says_more_than_is_checked_is_refused(self, schema: Any) -> None:
        with pytest.raises(HocketError) as refused:
            check_schema(schema)
        assert refused.value.reason is Reason.BAD_DATASET

    def test_a_reference_is_json(self) -> None:
        with pytest.raises(HocketError, match="the reference is no JSON"):
            json_match("{}", "{")


class TestSql:
    def test_a_query_finds_rows(self) -> None:
        assert run_query(SCRIPT, "SELECT a, count(*) FROM v GROUP BY 1;") == [(1, 1), (2, 2)]

    @pytest.mark.parametrize(
        ("answer", "reference", "right"),
        [
            ("SELECT b FROM t ORDER BY b DESC", "SELECT b FROM t", True),
            ("SELECT b FROM t ORDER BY b DESC", "SELECT b FROM t ORDER BY b", False),
            ("SELECT b FROM t", "SELECT b FROM (SELECT b FROM t ORDER BY b DESC)", True),
            ("SELECT DISTINCT a FROM t", "SELECT a FROM t", False),
            ("SELECT a AS x, b FROM t", "SELECT a, b FROM t", True),
            ("SELECT b, a FROM t", "SELECT a, b FROM t", False),
            ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
            ("SELECT 2", "SELECT 2.0", True),
            ("SELECT '2'", "SELECT 2", False),
            ("```sql\nSELECT 1;\n```", "SELECT 1", True),
            ("", "SELECT a FROM t WHERE 0", False),
            ("-- none", "SELECT a FROM t WHERE 0", False),
            ("SELECT nothing", "SELECT a FROM t WHERE 0", False),
        ],
    )
    def test_an_answer_is_right_if_it_finds_the_same(self, answer: str, reference: str, right: bool) -> None:  # noqa: FBT001
        assert execution_match(answer, reference, SCRIPT) is right

    @pytest.mark.parametrize(
        ("query", "ordered"),
        [
            ("SELECT a FROM t order  by a", True),
            ("SELECT 'order by', \"order by\", [order by], `order by` FROM t -- order by\n /* order by */", False),
            ("SELECT row_number() OVER (PARTITION BY (a) ORDER BY (b)) FROM t", False),
            ("SELECT (((1))) FROM t ORDER BY 1", True),
        ],
    )
    def test_only_an_order_of_the_whole_counts(self, query: str, ordered: bool) -> None:  # noqa: FBT001
        assert is_ordered(query) is ordered

    @pytest.mark.parametrize(
        "query",
        [
            "ATTACH '/tmp/other.db' AS other",
            "PRAGMA table_info(t)",
            "DELETE FROM t",
            "INSERT INTO t VALUES (1, 2)",
            "CREATE TEMP TABLE x(a)",
            "VACUUM INTO '/tmp/other.db'",
            "SELECT load_extension('x')",
            "SELECT 1; SELECT 2",
            "SELECT zeroblob(1000000)",
            endless("SELECT x FROM c"),
            endless("SELECT max(x) FROM c"),
            "SELECT 1 WHERE '" + "x" * 20_000 + "' = ''",
            "SELECT '" + "a" * 90 + "' LIKE '" + "%a" * 40 + "'",
            "SELECT cast(x'ff' AS text)",
            "SELECT " + "(" * 200 + "1" + ")" * 200,
            "SELECT '\0'",
            "SELECT '\ud800'",
        ],
    )
    def test_a_query_reads_and_no_more(self, query: str) -> None:
        with pytest.raises(HocketError) as refused:
            run_query(SCRIPT, query, SqlLimits(steps=100_000))
        assert refused.value.reason in {Reason.BAD_REQUEST, Reason.TOO_LARGE}

    def test_a_query_ends_in_time(self) -> None:
        slow = endless("SELECT sum(instr(printf('%.*c', 8000, 'a'), printf('%.*c', 4000, 'a') || x)) FROM c")
        started = time.monotonic()
        with pytest.raises(HocketError, match="interrupted"):
            run_query(SCRIPT, slow, SqlLimits(steps=10**9, seconds=0.2))
        assert time.monotonic() - started < 10

    def test_a_result_is_bounded(self) -> None:
        limits = SqlLimits(rows=3, result_bytes=24)
        assert len(run_query(SCRIPT, "SELECT a FROM t", limits)) == 3
        for query in ("SELECT 1 FROM t UNION ALL SELECT 2", "SELECT a, a FROM t"):
            with pytest.raises(HocketError) as refused:
                run_query(SCRIPT, query, limits)
            assert refused.value.reason is Reason.TOO_LARGE

    @pytest.mark.parametrize(
        "script",
        [
            "CREATE TABLE t(",
            "ATTACH '/tmp/other.db' AS other",
            "PRAGMA writable_schema = 1",
            "CREATE TABLE t(a); CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END",
            "CREATE VIRTUAL TABLE t USING fts5(a)",
            endless("SELECT x FROM c", into="CREATE TABLE t AS "),
            "CREATE TABLE t(a); -- " + "x" * 2**20,
            "CREATE TABLE t AS SELECT zeroblob(1000000)",
            "\0",
        ],
    )
    def test_a_script_makes_tables_and_no_more(self, script: str) -> None:
        with pytest.raises(HocketError) as refused:
            run_query(script, "SELECT 1", SqlLimits(steps=100_000))
        assert refused.value.reason is Reason.BAD_DATASET

    def test_a_database_is_bounded(self) -> None:
        script = endless("SELECT randomblob(4000) FROM c LIMIT 100", into="CREATE TABLE t AS ")
        run_query(script, "SELECT 1")
        with pytest.raises(HocketError, match="full"):
            run_query(script, "SELECT 1", SqlLimits(database_bytes=2**18))

    def test_a_reference_has_to_run(self) -> None:
        with pytest.raises(HocketError, match="the reference does not run") as refused:
            execution_match("SELECT 1", "SELECT nothing", SCRIPT)
        assert refused.value.reason is Reason.BAD_DATASET


@settings(deadline=None, max_examples=60)
@given(HOSTILE)
def test_no_answer_makes_a_score_fail(answer: str) -> None:
    assert not exact_match(answer, "the reference")
    assert f1(answer, "the reference") < 1
    assert not json_match(answer, '{"the": "reference"}', {"type": "object"}).right
    assert not execution_match(answer, "SELECT 'the reference'", SCRIPT)


class TestIntervals:
    def test_wilson_s_interval_is_the_published_one(self) -> None:
        # R. G. Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        for right, count, low, high in (
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ):
            assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)

    def test_without_answers_nothing_is_known(self) -> None:
        assert wilson_interval(0, 0) == (0, 1)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.floats(0, count), st.just(count))))
    def test_a_score_lies_in_its_interval(self, measured: tuple[float, int]) -> None:
        right, count = measured
        low, high = wilson_interval(right, count)
        assert 0 <= low <= right / count + 1e-9
        assert right / count - 1e-9 <= high <= 1

    def test_a_drop_is_that_of_agresti_and_min(self) -> None:
        # 20 pairs: 6 get worse, 2 better. With half a pair more of each: (6.5 - 2.5) / 22.
        before, after = [1.0] * 6 + [0.0] * 2 + [1.0] * 12, [0.0] * 6 + [1.0] * 2 + [1.0] * 12
        middle, half = 4 / 22, 1.959964 * ((9 - 16 / 22) ** 0.5) / 22
        assert drop_interval(before, after) == pytest.approx((middle - half, middle + half), abs=1e-6)

    @pytest.mark.parametrize(
        ("worse", "same", "verdict"),
        [
            (0, 100, Compatibility.COMPATIBLE),
            (0, 10, Compatibility.UNCLEAR),
            (5, 95, Compatibility.UNCLEAR),
            (30, 70, Compatibility.INCOMPATIBLE),
        ],
    )
    def test_a_pair_is_judged_by_the_whole_interval(self, worse: int, same: int, verdict: Compatibility) -> None:
        count = worse + same
        change = compare("a", "b", [1.0] * count, [0.0] * worse + [1.0] * same, 0.05)
        assert (change.verdict, change.alone, change.together) == (verdict, 1, same / count)


def asked(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[Question]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(questions(read_rows(path), **options))


class TestQuestions:
    def test_each_row_decides_how_it_is_scored(self, tmp_path: Path) -> None:
        found = asked(
            tmp_path,
            {"prompt": "p", "completion": "yes", "kind": "word", "expert": "w"},
            {"prompt": "p", "completion": '{"a": 1}'},
            {"prompt": "p", "completion": "[a-z]"},
            {"prompt": "p", "completion": "1", "schema": {"type": "integer"}},
            {"prompt": "p", "completion": "SELECT a FROM t", "sqlite": SCRIPT},
        )
        assert [each.metric for each in found] == [Metric.EXACT, Metric.JSON, Metric.EXACT, Metric.JSON, Metric.SQL]
        assert [each.score(each.reference) for each in found] == [1] * 5
        assert [each.score("no") for each in found] == [0] * 5
        assert (found[0].turns, found[0].expert) == (({"role": "user", "content": "p"},), "w")

    def test_one_may_decide_for_all(self, tmp_path: Path) -> None:
        [found] = asked(tmp_path, {"prompt": "p", "completion": "x b", "kind": 3}, metric="f1", by="kind")
        assert (found.metric, found.stratum, found.score("b c")) == (Metric.F1, "3", 0.5)

    @pytest.mark.parametrize(
        ("row", "options", "what"),
        [
            ({"text": "x"}, {}, "plain text asks nothing"),
            ({"prompt": "p", "completion": "c"}, {"metric": "bleu"}, "no metric"),
            ({"prompt": "p", "completion": "c"}, {"metric": "sql"}, "it is missing"),
            ({"prompt": "p", "completion": "c"}, {"metric": "json"}, "line 1: the reference is no JSON"),
            ({"prompt": "p", "completion": "c"}, {"by": "kind"}, "line 1 has no 'kind'"),
            ({"prompt": "p", "completion": "c", "sqlite": 1}, {}, "are texts"),
            ({"prompt": "p", "completion": "SELECT x", "sqlite": SCRIPT}, {}, "line 1: the reference cannot be run"),
            ({"prompt": "p", "completion": "1", "schema": {"minimum": 1}}, {}, "'minimum' cannot be checked"),
            (
                {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
                {},
                "the turn before the answer",
            ),
        ],
    )
    def test_what_cannot_be_scored_is_refused_before_anybody_is_asked(
        self, tmp_path: Path, row: dict[str, Any], options: dict[str, Any], what: str
    ) -> None:
        with pytest.raises(HocketError, match=what):
            asked(tmp_path, row, **options)


class TestRunning:
    @pytest.fixture
    def many(self, tmp_path: Path) -> list[Question]:
        return asked(tmp_path, *({"prompt": str(number), "completion": str(number % 2)} for number in range(30)))

    def test_questions_are_asked_together_and_answered_in_order(self, many: list[Question]) -> None:
        together = threading.Barrier(4)

        def ask(question: Question) -> Reply:
            if question.line <= 4:
                together.wait(10)
            return Reply("1", ("x",))

        found = list(answer_all(many, ask, concurrency=4))
        assert [each.question for each in found] == many
        assert [each.score for each in found] == [0, 1] * 15
        assert all(each.reply.experts == ("x",) and each.seconds >= 0 for each in found)

    def test_who_is_busy_is_asked_again(self, many: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(running, "_PAUSE_SECONDS", 0)
        refusals = [HocketError(Reason.QUEUE_FULL, "busy", retry_after_seconds=0.001)] * 3

        def ask(_: Question) -> Reply:
            if refusals:
                raise refusals.pop()
            return Reply("1")

        assert len(list(answer_all(many[:1], ask))) == 1
        assert refusals == []

    @pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.UNKNOWN_EXPERT])
    def test_a_refusal_ends_it(self, many: list[Question], reason: Reason, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(running, "_PAUSE_SECONDS", 0)
        calls: list[int] = []

        def ask(question: Question) -> Reply:
            calls.append(question.line)
            raise HocketError(reason, "no")

        with pytest.raises(HocketError) as refused:
            list(answer_all(many, ask, concurrency=1))
        assert refused.value.reason is reason
        assert len(calls) < 3 * 6
