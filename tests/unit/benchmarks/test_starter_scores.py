from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.starter import Score, overall, questions, tables, write_into
from training.starter.corpus import TASKS
from training.starter.task import Split

ROOT = Path(__file__).parents[3]


def test_questions_questions_are_the_same_each_time_and_never_those_of_training() -> None:
    task = TASKS["regex"]
    asked = questions(task, 50)
    assert [each.prompt for each in asked] == [each.prompt for each in questions(task, 50)]
    random = Random(1)
    trained = {task.example(random, Split.TRAIN).prompt for _ in range(2_000)}
    assert not trained & {each.prompt for each in asked}


def test_a_score_is_shown_with_its_interval() -> None:
    assert str(Score(90, 100)) == "90.0% (82.6%-94.5%)"
    assert str(Score(36, 3600)) == "1.0% (0.7%-1.4%)"
    assert Score(90, 100).json() == {"share": 0.9, "low": 0.8256, "high": 0.9448}


def test_all_tasks_together_are_counted_by_questions() -> None:
    rows: list[dict[str, Any]] = [
        {"task": "a", "routed": Score(1, 2)},
        {"task": "b", "routed": Score(4, 4)},
    ]
    assert overall(rows)["routed"] == Score(5, 6)


def test_a_table_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scores -->\nold\n<!-- end of scores -->\nafter\n")
    found = tables([{"task": name, "routed": None} for name in ("a", "all", "general")], [])
    write_into(page, found)
    head = "| task | routed |\n|---|---|\n"
    expected = (
        f"before\n<!-- scores -->\n{head}| a | - |\n| all | - |\n| general | - |\n\n<!-- end of scores -->\nafter\n"
    )
    assert page.read_text() == expected
    page.write_text(page.read_text().replace("<!-- scores -->", "<!-- scores in short -->"))
    write_into(page, found)
    assert page.read_text() == expected.replace("| a | - |\n", "").replace("<!-- scores", "<!-- scores in short")


def test_a_page_without_both_markers_is_left_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scores -->\nold\n")
    with pytest.raises(ValueError, match="has no place"):
        write_into(page, {"<!-- scores -->": "new"})
    assert page.read_text() == "before\n<!-- scores -->\nold\n"


def test_the_readme_shows_what_was_measured_last() -> None:
    [*_, latest] = sorted((ROOT / "benchmarks" / "results").glob("starter-*.json"))
    document = json.loads(latest.read_text())
    whole = document["rows"]
    mixture = next(place for place, row in enumerate(whole) if "experts" in row)
    for page, rows in (("README.md", [*whole[mixture - 2 : mixture], whole[-2]]), ("docs/starter.md", whole)):
        text = (ROOT / page).read_text()
        for row in rows:
            for value in row.values():
                if isinstance(value, dict):
                    assert f"{value['share']:.1%} ({value['low']:.1%}-{value['high']:.1%})" in text, (page, row)
