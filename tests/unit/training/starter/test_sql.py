from __future__ import annotations

import re
import sqlite3
import time
from random import Random

import pytest

from hocket.evaluation import run_query
from training.starter import sql
from training.starter.drawing import is_held_out
from training.starter.task import Example, Split

SINGERS = Example(
    "Table singers (name text, age integer, city text)\nHow many singers with city Rome are there?",
    "SELECT COUNT(*) FROM singers WHERE city = 'Rome'",
    "count-where",
    {
        "script": "CREATE TABLE singers (name text, age integer, city text);"
        "INSERT INTO singers VALUES ('Ana', 30, 'Rome'), ('Tom', 41, 'Oslo'), ('Mia', 29, 'Rome');"
    },
)


def drawn(split: Split, count: int = 300) -> list[Example]:
    random = Random(7)
    return [sql.example(random, split) for _ in range(count)]


def test_a_count_with_a_filter_is_asked_of_the_rows() -> None:
    assert run_query(SINGERS.facts["script"], SINGERS.answer) == [(2,)]
    assert sql.is_right(SINGERS, "  select count(name) from singers where 'Rome' = city;\n")
    assert not sql.is_right(SINGERS, "SELECT COUNT(*) FROM singers WHERE city = 'Oslo'")
    assert not sql.is_right(SINGERS, "SELECT COUNT(*) FROM singers")


@pytest.mark.parametrize("split", Split)
def test_every_answer_is_right_and_gives_rows(split: Split) -> None:
    for example in drawn(split):
        assert sql.is_right(example, example.answer), example
        assert run_query(example.facts["script"], example.answer) or " AND " in example.answer, example


@pytest.mark.parametrize("split", Split)
def test_prompts_and_answers_are_short_single_ascii_statements(split: Split) -> None:
    for example in drawn(split):
        assert len(example.prompt) + len(example.answer) <= 420
        assert len(example.answer) <= 160
        assert (example.prompt + example.answer).isascii()
        assert "\n" not in example.answer
        assert not example.answer.endswith(";")


def test_every_form_is_drawn() -> None:
    assert {example.kind for example in drawn(Split.TRAIN)} == {form.kind for form in sql.FORMS}


def test_the_same_seed_draws_the_same_example() -> None:
    assert drawn(Split.TEST, 5) == drawn(Split.TEST, 5)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" > ", " >= "),
        (" >= ", " > "),
        (" < ", " <= "),
        (" <= ", " < "),
        (" AND ", " OR "),
        (" DESC ", " ASC "),
        (" ASC ", " DESC "),
        ("DISTINCT ", ""),
        ("MAX(", "MIN("),
        ("AVG(", "SUM("),
        (", COUNT(*)", ""),
        ("COUNT(*)", "*"),
        ("LIMIT ", "LIMIT 1"),
        (" = '", " <> '"),
        (".id", ".id + 1"),
    ],
)
def test_a_statement_with_one_part_changed_gives_other_rows(right: str, wrong: str) -> None:
    changed = [(example, example.answer.replace(right, wrong, 1)) for example in drawn(Split.TRAIN, 600)]
    changed = [(example, answer) for example, answer in changed if answer != example.answer]
    assert changed
    for example, answer in changed:
        assert not sql.is_right(example, answer), (example.prompt, answer)


def test_a_statement_without_its_last_condition_is_wrong() -> None:
    for example in drawn(Split.TEST):
        if example.kind in {"both", "equal", "compare", "count-where"}:
            assert not sql.is_right(
                example, example.answer.rpartition(" AND " if " AND " in example.answer else " WHERE ")[0]
            )


def test_another_literal_is_wrong() -> None:
    for example in drawn(Split.TEST):
        if example.kind == "equal":
            assert not sql.is_right(example, example.answer[:-1] + "x'")


def test_rows_are_compared_in_order_only_where_the_right_statement_orders() -> None:
    ordered = Example("", "SELECT age FROM singers ORDER BY age DESC LIMIT 2", "top", SINGERS.facts)
    assert sql.is_right(ordered, "SELECT age FROM singers WHERE age > 29 ORDER BY age DESC")
    assert not sql.is_right(ordered, "SELECT age FROM singers WHERE age > 29 ORDER BY age")
    unordered = Example("", "SELECT age FROM singers", "column", SINGERS.facts)
    assert sql.is_right(unordered, "SELECT age FROM singers ORDER BY age DESC")


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "no statement",
        "SELECT",
        "SELECT 2; SELECT 2",
        "DELETE FROM singers",
        "DROP TABLE singers",
        "INSERT INTO singers VALUES ('Eva', 1, 'Rome') RETURNING 2",
        "ATTACH DATABASE '/tmp/other.db' AS other",
        "PRAGMA page_count",
        "VACUUM INTO '/tmp/copy.db'",
        "SELECT load_extension('x')",
        "SELECT length(randomblob(1000000000))",
        "SELECT 2 FROM pragma_table_info('singers')",
        ENDLESS,
        "SELECT 2 FROM " + ", ".join(f"singers s{place}" for place in range(40)),  # noqa: S608 - hostile on purpose
        "SELECT COUNT(*) FROM " + ", ".join(f"singers s{place}" for place in range(40)),  # noqa: S608 - hostile on purpose
        "SELECT 2, 2, 2" + ", 2" * 400,
        "SELECT " + "(" * 900,
        "SELECT '\0'",
        "SELECT '\ud800'",
        "SELECT CAST(X'ff' AS TEXT)",
        "SELECT abs(-9223372036854775807 - 1)",
        "SELECT ?",
    ],
)
def test_a_hostile_answer_is_wrong_soon(answer: str) -> None:
    started = time.perf_counter()
    assert not sql.is_right(SINGERS, answer)
    assert time.perf_counter() - started < 10  # the sandbox stops a statement after two seconds of its own


def test_no_wording_is_in_both_splits() -> None:
    for form in sql.FORMS:
        assert len(set(form.train)) >= 8
        assert len(set(form.test)) >= 3
    assert not {wording for form in sql.FORMS for wording in form.train} & {
        wording for form in sql.FORMS for wording in form.test
    }
    assert not set(sql.HINTS[Split.TRAIN]) & set(sql.HINTS[Split.TEST])


def literals(split: Split) -> set[str]:
    """Tables, columns and values of a split's answers, but for the `id` that linked tables of both have."""
    words = re.findall(r"[A-Za-z_]+", " ".join(example.answer for example in drawn(split, 600)))
    return {word for word in words if not word.isupper() and word != "id"}


def test_no_table_column_or_value_is_in_both_splits() -> None:
    assert not literals(Split.TRAIN) & literals(Split.TEST)


@pytest.mark.parametrize("split", Split)
def test_numbers_are_those_of_the_split(split: Split) -> None:
    for example in drawn(split):
        numbers = [int(word) for word in example.answer.split() if word.isdigit() and not example.answer.endswith(" 1")]
        assert all(is_held_out(number) == (split is Split.TEST) for number in numbers)


def test_a_document_holds_a_schema_and_statements_that_run_on_it() -> None:
    random = Random(3)
    for _ in range(300):
        text = sql.document(random)
        assert 60 <= len(text) <= 400
        assert "?" not in text
        with sqlite3.connect(":memory:") as connection:
            for line in text.splitlines():
                connection.execute(f"CREATE {line}" if line.startswith("Table ") else line)
        connection.close()


def test_the_task_is_named_after_its_language() -> None:
    assert sql.TASK.name == "sql"
