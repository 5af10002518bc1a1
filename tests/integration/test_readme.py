"""What the README shows is run as it stands: every block marked `<!-- run -->`, one after the other."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.running import suite
from tests.grpcurl import BUF, write_grpcurl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BEFORE = re.findall(r"<!-- before -->\n```sh\n(.*?)```", README, re.DOTALL)
"""What is run before the suite is started."""
BLOCKS = re.findall(r"<!-- run -->\n```sh\n(.*?)```", README, re.DOTALL)


@pytest.mark.skipif(not BUF.exists(), reason="buf is not installed: run `make check` once")
async def test_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    assert (len(BEFORE), len(BLOCKS)) == (1, 9)
    write_grpcurl(tmp_path / "bin")
    data = tmp_path / "share" / "hocket"
    data.mkdir(parents=True)
    await asyncio.to_thread(_run, tmp_path, BEFORE, "", "")
    async with suite(data) as running:
        output = await asyncio.to_thread(_run, tmp_path, BLOCKS, running.router, running.registry)
    for expected in (
        "RouterService",  # grpcurl list
        '"fixed"',
        '"finish"',
        "SERVING",
        "acme/linear@1.0.0",
        "setosa",
        "acme/expert-tiny@1.0.0",
        "The capital of Japan is Tokyo.",
        "180 minutes",
        "ADAPTER_MIX",
        "refused, as it should be",
    ):
        assert expected in output, f"{expected} is missing in:\n{output}"


def _run(folder: Path, blocks: list[str], router: str, registry: str) -> str:
    text = "set -eux\n" + "\n".join(blocks).replace(". .venv/bin/activate\n", "")
    for written, actual in (
        ("127.0.0.1:50051", router),
        ("127.0.0.1:50052", registry),
        ("/tmp/", f"{folder}/"),  # noqa: S108 - the README's words
        ("~/.config", str(folder / "config")),
        ("~/.local/share", str(folder / "share")),
    ):
        text = text.replace(written, actual)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_DATA_HOME": str(folder / "share"),
        "HOCKET_ROUTER": router,
        "HOCKET_REGISTRY": registry,
    }
    done = subprocess.run(
        ["bash", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr
