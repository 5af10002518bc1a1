"""What a log line says, for machines and for people."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from hocket.telemetry.context import request_id
from hocket.telemetry.logs import configure_logs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    token = request_id.set("")
    yield
    request_id.reset(token)
    structlog.reset_defaults()


@pytest.fixture
def entries(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_line_of_json_with_level_and_time(entries: Callable[[], list[dict[str, Any]]]) -> None:
    configure_logs(json=True)
    structlog.get_logger("rpc").warning("refused", reason="YANKED", message="two\nlines")
    [entry] = entries()
    assert (entry["event"], entry["level"], entry["reason"]) == ("refused", "warning", "YANKED")
    assert entry["message"] == "two\nlines"
    assert entry["timestamp"].endswith("Z")
    assert "request_id" not in entry


def test_an_event_within_a_request_carries_its_id_unless_it_names_one(
    entries: Callable[[], list[dict[str, Any]]],
) -> None:
    configure_logs(json=True)
    request_id.set("abc-1")
    log = structlog.get_logger()
    log.info("ours")
    log.info("another's", request_id="xyz-2")
    assert [entry["request_id"] for entry in entries()] == ["abc-1", "xyz-2"]


@pytest.mark.parametrize(("level", "written"), [("debug", 3), ("info", 2), ("WARNING", 1), ("critical", 0)])
def test_less_severe_events_than_asked_for_are_left_out(
    entries: Callable[[], list[dict[str, Any]]], level: str, written: int
) -> None:
    configure_logs(level, json=True)
    log = structlog.get_logger()
    log.debug("a")
    log.info("b")
    log.error("c")
    assert [entry["event"] for entry in entries()] == ["a", "b", "c"][3 - written :]


def test_a_bug_brings_its_traceback_on_the_same_line(entries: Callable[[], list[dict[str, Any]]]) -> None:
    configure_logs(json=True)
    try:
        raise KeyError("missing")  # noqa: TRY301 - a traceback to log
    except KeyError as error:
        structlog.get_logger().error("bug", exc_info=error)
    [entry] = entries()
    assert "KeyError: 'missing'" in entry["exception"]


def test_people_get_text_with_a_plain_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(json=False)
    request_id.set("abc-1")
    try:
        raise KeyError("missing")  # noqa: TRY301 - a traceback to log
    except KeyError as error:
        structlog.get_logger().error("bug", exc_info=error)
    text = capsys.readouterr().err
    assert "bug" in text
    assert "abc-1" in text
    assert "KeyError: 'missing'" in text
    assert not text.startswith("{")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_decides_when_nobody_else_does(
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,  # noqa: FBT001 - a table column
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs()
    structlog.get_logger().info("hello")
    assert "hello" in stream.getvalue()
    assert stream.getvalue().startswith("{") is not terminal
