"""What docs/operations.md says about processes by hand runs as it stands, with other folders and free ports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.clusters import ROOT, free_port

BLOCKS = re.findall(r"<!-- run -->\n```sh\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)


@pytest.mark.long
def test_the_four_processes_run_by_hand_as_written(tmp_path: Path) -> None:
    (text,) = BLOCKS
    router = free_port()
    changes = {"50051": router, "51051": router + 1000, **{str(port): free_port() for port in range(50052, 50056)}}
    for written, chosen in changes.items():
        text = text.replace(written, str(chosen))
    text = text.replace("/srv/hocket", str(tmp_path / "srv")).replace("~/.config", str(tmp_path / "config"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "HOCKET_ROUTER": f"127.0.0.1:{router}",
        "HOCKET_REGISTRY": f"127.0.0.1:{changes['50052']}",
    }
    told = "for job in $(jobs -p); do wait $job; echo ended with $?; done\n"
    script = "set -eu\n" + text.replace("\nwait\n", f"\n{told}")
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, log = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever a failure has left
    assert process.returncode == 0, f"{output[-2000:]}\n{log[-3000:]}"
    assert output.count("ended with 0") == 5
    assert 'grpc_method="Predict"' in output
