from __future__ import annotations

import io

import pytest
from rich.console import Console

from hocket.cli import output


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**40, "1024.0 GiB")]
)
def test_sizes_are_for_people(size_bytes: int, text: str) -> None:
    assert output.size(size_bytes) == text


@pytest.mark.parametrize(("share", "text"), [(0, "    "), (1, "████"), (0.5, "██  "), (0.53, "██▏ "), (7, "████")])
def test_a_bar_fills_with_the_share(share: float, text: str) -> None:
    assert output.bar(share, width=4) == text


def test_without_unicode_a_bar_is_made_of_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))

    assert output.bar(0.5, width=4) == "##  "


def test_in_a_narrow_terminal_only_the_columns_that_may_wrap_do() -> None:
    screen = io.StringIO()
    grid = output.table(("name", "answers~"), [("acme/a-long-name@1.0.0", "yes, no, perhaps")])
    Console(file=screen, width=32).print(grid)

    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert lines[0].split() == ["name", "answers"]
    assert lines[1].startswith("acme/a-long-name@1.0.0  yes,")
    assert len(lines) > 2


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        ("sha256:" + "ab" * 32, "sha256:abababababab"),
        ("sha256:" + "ab" * 32 + "#12", "sha256:abababababab#12"),
        ("cd" * 32, "cdcdcdcdcdcd"),
    ],
)
def test_identities_are_shortened_to_what_people_compare(identity: str, text: str) -> None:
    assert output.short(identity) == text


def test_what_to_run_next_is_written_as_a_shell_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    output.next_steps(("hocket", "sign", "my iris.apr", "--version", 1), ("hocket", "publish", "x.apr"))

    assert capsys.readouterr().out == "Next: hocket sign 'my iris.apr' --version 1\n      hocket publish x.apr\n"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert output.plain("a\x1b[31m\nb\x9b").plain == "a\\x1b[31m\\nb\\x9b"


def test_empty_cells_are_dashes_and_truths_are_words(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("name", "size>"), [("x", None), (True, ""), (False, 3)], "nothing")

    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "size"],
        ["x", "-"],
        ["yes", "-"],
        ["no", "3"],
    ]
