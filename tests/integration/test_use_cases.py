"""The three use cases, against a suite with a starter kit: a random one, and the real one when it is there."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from examples.starter.kit import Kit
from examples.starter.serving import serving
from examples.use_cases.asking import plain
from examples.use_cases.query import rows, schema
from examples.use_cases.translate import question
from hocket.errors import HocketError
from tests.starter_kits import random_kit

if TYPE_CHECKING:
    from examples.running import Running

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "use_cases"
FILMS = DATA / "films.db"
ASKED = "For all films with rating over 7, give the title."
TOPICS = {
    "01-cup.txt": "sport",
    "02-harbour.txt": "travel",
    "03-storm.txt": "weather",
    "04-supper.txt": "food",
    "05-budget.txt": "money",
    "06-ward.txt": "health",
    "07-race.txt": "sport",
    "08-bakery.txt": "food",
}
TRANSLATIONS = [
    "La strigo aŭdas la lupojn.",
    "La bakisto lavas la tasojn.",
    "La vulpo trovas la kulerojn.",
    "La patrino vidas la ĉevalon.",
    "La malgranda hundo amas la gaston.",
]


async def use(running: Running | str, program: str, *arguments: object) -> tuple[int, str, str]:
    address = running if isinstance(running, str) else running.router
    command = [sys.executable, "-m", f"examples.use_cases.{program}", *map(str, arguments), "--router", address]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def lines(printed: str) -> list[Any]:
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.long
async def test_all_three_tell_what_was_answered_and_by_whom(tmp_path: Path) -> None:
    async with serving(Kit(random_kit(tmp_path / "kit")), tmp_path / "suite") as (running, _):
        sorting, translating, asking = await asyncio.gather(
            use(running, "classify", DATA / "letters", "--json"),
            use(running, "translate", DATA / "sentences.txt", "--nature", 0.7, "--json"),
            use(running, "query", FILMS, ASKED, "--json"),
        )

    assert (sorting[0], sorting[2]) == (0, "")
    found = lines(sorting[1])
    assert [Path(each["file"]).name for each in found] == [*TOPICS]
    for each in found:
        assert 0 < each["probability"] <= max(each["labels"].values()) <= 1
        assert sum(each["labels"].values()) <= 1 + 1e-9
        assert each["experts"] == {"hocket/expert-topics@1.0.0": 1.0}
    assert (translating[0], translating[2]) == (0, "")
    found = lines(translating[1])
    assert [each["line"] for each in found] == [1, 2, 3, 4, 6]
    assert found[0]["source"] == "The owl hears the wolves."
    assert found[0]["experts"] == {
        "hocket/expert-esperanto-nature@1.0.0": 0.7,
        "hocket/expert-esperanto-home@1.0.0": 0.5,
    }
    assert (asking[0], asking[1]) == (1, "")
    assert asking[2].startswith("SQLite refuses "), "random weights write no SQL"


@pytest.mark.long
async def test_the_kit_sorts_translates_and_asks(tmp_path: Path) -> None:
    kit = Kit(ROOT / "starter")
    try:
        kit.check()
    except HocketError as error:
        pytest.skip(error.message)
    async with serving(kit, tmp_path) as (running, _):
        _, sorting, _ = await use(running, "classify", DATA / "letters", "--json")
        _, table, _ = await use(running, "classify", DATA / "letters")
        _, translating, _ = await use(running, "translate", DATA / "sentences.txt")
        _, asking, _ = await use(running, "query", FILMS, ASKED)

    labels = {Path(each["file"]).name: each["label"] for each in lines(sorting)}
    assert sum(labels[name] == topic for name, topic in TOPICS.items()) >= len(TOPICS) - 2, labels
    assert table.startswith("01-cup.txt")
    made = translating.splitlines()
    assert made.pop(4) == ""
    assert sum(line in TRANSLATIONS for line in made) >= len(TRANSLATIONS) - 2, made
    assert asking.splitlines()[1:] == ["  title", "  The Red Lamp", "  The Lost Key", "  A Long Night"]


async def test_without_a_suite_they_say_how_to_get_one() -> None:
    code, printed, error = await use("127.0.0.1:9", "query", FILMS, ASKED)

    assert (code, printed) == (1, "")
    assert error.startswith("UNREACHABLE: ")
    assert "docs/starter.md" in error


class TestAskingADatabase:
    def test_the_expert_is_told_tables_and_columns(self) -> None:
        assert schema(FILMS) == "Table films (title text, country text, year integer, rating integer)"

    def test_rows_come_with_the_names_of_their_columns(self) -> None:
        assert rows(FILMS, "SELECT title, year FROM films WHERE rating > 8") == (
            ["title", "year"],
            [("The Lost Key", 1991)],
        )
        assert len(rows(FILMS, "SELECT 1 FROM films a, films b, films c")[1]) == 100
        assert rows(FILMS, "") == ([], [])

    @pytest.mark.parametrize(
        "statement",
        [
            "DELETE FROM films",
            "DROP TABLE films",
            "ATTACH '/etc/passwd' AS other",
            "PRAGMA query_only = 0",
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n",
            "SELECT zeroblob(2000000)",
            "SELECT 1; SELECT 2",
            "nonsense",
        ],
    )
    def test_what_does_more_than_read_a_little_is_refused(self, statement: str) -> None:
        before = FILMS.read_bytes()
        with pytest.raises((sqlite3.Error, sqlite3.Warning)):
            rows(FILMS, statement)
        assert FILMS.read_bytes() == before


def test_a_sentence_is_asked_as_the_experts_have_learnt_it() -> None:
    assert question("The owl sees the cup.\n", "esperanto") == "Translate into Esperanto: the owl sees the cup."
    assert question("La strigo vidas la tason.", "english") == "Translate into English: La strigo vidas la tason."


def test_what_would_move_a_cursor_is_not_printed() -> None:
    assert plain("a\x1b[2Jb\n c\r") == "a [2Jb c"
