"""`hocket train` hands over to the training script."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_script_is_started_with_the_same_arguments(hocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append((path, command)))
    hocket("train", "manifest.json", "--base", "b", "--json", "--help")
    assert started == [
        (sys.executable, [sys.executable, "-P", "-m", "training", "manifest.json", "--base", "b", "--json", "--help"])
    ]


def without(*names: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The script where modules are not installed."""
    script = (
        f"import runpy, sys; from importlib import util; found = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name in {names!r} else found(name, *rest)\n"
        f"sys.modules.update(dict.fromkeys({names!r}))\n"
        f"sys.argv = ['hocket train', *{arguments!r}]\n"
        f"runpy.run_module('training', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_without_the_extra_it_says_what_to_install_and_explains_itself(tmp_path: Path) -> None:
    given = ["manifest.json", "--base", str(tmp_path), "--out", str(tmp_path / "out")]
    refused = without("torch", "trl", arguments=given)
    assert refused.returncode == 2, refused.stderr
    assert "training needs torch, trl as well: pip install -e '.[training]' in a clone" in refused.stderr
    explained = without("torch", "trl", arguments=["--help"])
    assert explained.returncode == 0
    assert "--learning-rate" in explained.stdout
