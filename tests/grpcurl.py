"""A grpcurl for documents that use one: it is not to be had everywhere the tests run.

buf's curl speaks the same protocol and takes the same JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

BUF: Final = Path(__file__).parents[1] / ".tools" / "buf"

_GRPCURL: Final = f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[2:]  # after -plaintext
data = []
if arguments[0] == "-d":
    data, arguments = ["-d", arguments[1]], arguments[2:]
address, method = arguments
common = ["{BUF}", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
if method == "list":
    sys.exit(subprocess.run([*common, "--list-services", f"http://{{address}}"]).returncode)
sys.exit(subprocess.run([*common, *(data or ["-d", "{{}}"]), f"http://{{address}}/{{method}}"]).returncode)
"""


def write_grpcurl(folder: Path) -> None:
    """Write the program into a folder."""
    folder.mkdir(exist_ok=True)
    program = folder / "grpcurl"
    program.write_text(_GRPCURL)
    program.chmod(0o755)
