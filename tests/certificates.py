"""Certificates for tests, made by `deploy/certificates.sh`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hocket.rpc.tls import Tls, TlsSettings

SCRIPT = Path(__file__).parents[1] / "deploy" / "certificates.sh"


def make(folder: Path, *names: str, days: int = 90) -> Path:
    """An authority in a folder, with a certificate for each name; again for new certificates of the same authority."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(
        [SCRIPT, folder, *names], check=True, capture_output=True, timeout=30, env={**os.environ, "DAYS": str(days)}
    )
    return folder


def files(folder: Path, name: str | None = "router", *, ca: Path | None = None) -> dict[str, Any]:
    """The names of a folder's files, as clients and the settings of services take them.

    Args:
        folder: Of an authority.
        name: Whose certificate; None for none.
        ca: The folder of the authority to believe, if it is another one.
    """
    own = {} if name is None else {"certificate_file": folder / f"{name}.pem", "key_file": folder / f"{name}.key"}
    return {"ca_file": (ca or folder) / "ca.pem", **own}


def tls(folder: Path, name: str | None = "router", *, ca: Path | None = None, mutual: tuple[str, ...] = ()) -> Tls:
    """What a process has that is set up with those files."""
    return Tls(TlsSettings(**files(folder, name, ca=ca), mutual=mutual))


def replace(folder: Path, source: Path, *names: str) -> None:
    """Put files of another folder in the place of those of the same names, each at once, as programs that renew do."""
    for name in names:
        new = Path(shutil.copy(source / name, folder / f"{name}.new"))
        new.replace(folder / name)
