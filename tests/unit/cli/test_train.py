"""`hocket train` hands over to the training script."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from hocket.cli import train
from hocket.cli.main import app

if TYPE_CHECKING:
    import pytest


def test_the_script_is_started_with_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append((path, command)))
    CliRunner().invoke(app, ["train", "manifest.json", "--base", "b", "--json", "--help"])
    assert started == [
        (sys.executable, [sys.executable, "-P", "-m", "training", "manifest.json", "--base", "b", "--json", "--help"])
    ]


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "trl" else name)
    result = CliRunner().invoke(app, ["train", "manifest.json"])
    assert result.exit_code == 2
    assert "training needs trl as well" in result.stderr
    assert "[training]" in result.stderr
