"""Whether what an extra brings is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_installed(names: Iterable[str], *, what: str, extra: str) -> None:
    """Check that modules are there, before what needs them is imported.

    Args:
        names: Of the modules.
        what: What needs them, for people.
        extra: What brings them.

    Raises:
        HocketError: `BAD_REQUEST` if some are missing, with how to install them.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise HocketError(
            Reason.BAD_REQUEST,
            f"{what} needs {', '.join(missing)} as well: pip install -e '.[{extra}]' in a clone of Hocket",
        )
