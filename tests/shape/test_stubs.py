"""The committed stubs are what the contracts generate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_stubs_are_current(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "proto" / "generate.sh", tmp_path]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    generated = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT): path.read_bytes()
        for folder in ("v1", "vendored")
        for path in (ROOT / "hocket" / folder).glob("*_pb2*")
    }
    assert generated.keys() == committed.keys()
    assert [str(name) for name in generated if generated[name] != committed[name]] == [], "run `make proto`"
