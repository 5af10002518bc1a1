"""Everything but the expert worker serves where torch is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.modules["torch"] = None
import asyncio, json, pathlib
from hocket.telemetry.logs import configure_logs
from tests.without_torch import serve_and_ask
configure_logs("warning")
print(json.dumps(asyncio.run(serve_and_ask(pathlib.Path(sys.argv[1]), [[1, 2], [-3, 0.5]]))))
"""


def test_signed_experts_are_published_mixed_and_asked_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "acme/one@1": [[0.5], [-6.0]],
        "acme/two@1": [[6.5], [2.0]],
        "both": [[3.5], [-2.0]],
    }
