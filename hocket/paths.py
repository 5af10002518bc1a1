"""Where Hocket keeps its things at home: the XDG data directory.

Images keep them in `/var/lib/hocket` instead, by configuration. Private keys are in the configuration directory
(`hocket.keyring`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def data_folder(environ: Mapping[str, str], home: Path) -> Path:
    """The data of a suite: `$XDG_DATA_HOME/hocket`, by default `~/.local/share/hocket`.

    Args:
        environ: The environment. A relative XDG_DATA_HOME is ignored, as its specification demands.
        home: The person's home directory.
    """
    data = Path(environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else home / ".local" / "share") / "hocket"


def trust_folder(environ: Mapping[str, str], home: Path) -> Path:
    """The trust folder of a suite: `trust` in the data folder. Arguments as there."""
    return data_folder(environ, home) / "trust"


def bases_folder(environ: Mapping[str, str], home: Path) -> Path:
    """Where a suite looks for the bases it may trust: `bases` in the data folder. Arguments as there."""
    return data_folder(environ, home) / "bases"
