"""`hocket generate --device`: one command, from a folder with a base to an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bases import tiny_base

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def test_one_command_answers_by_a_base_and_leaves_nothing_running(tmp_path: Path) -> None:
    tiny_base(tmp_path / "Tiny")
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "xdg")}

    def hocket(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hocket.cli.main", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done

    hocket("base", "add", str(tmp_path / "Tiny"))
    asked = ("--device", "cpu", "--max-tokens", "8", "--temperature", "0")
    first = hocket("generate", "list all names", *asked)
    again = hocket("chat", "--base", "tiny", *asked, stdin="list all names\n")  # the data are free again

    assert first.stdout == again.stdout != "\n"
    assert first.stderr == again.stderr == ""
