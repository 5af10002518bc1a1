"""What was withdrawn, kept on disk: a restart without a registry must not bring it back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from services.expert_worker.cache import write_durably

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What no longer counts, whatever the trust folder says. It only ever grows.

    Args:
        keys: Ids of revoked keys.
        digests: Yanked packages.
    """

    keys: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()

    def __or__(self, other: Withdrawn) -> Withdrawn:
        return Withdrawn(self.keys | other.keys, self.digests | other.digests)


class RevocationFile:
    """`revocations.json`. Its methods block: call them from a thread.

    Args:
        path: The file; its folder is made at need.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Withdrawn:
        """What was written last; nothing if there is no file.

        Raises:
            HocketError: `BAD_TRUST_FILE` if the file cannot be believed: serving on would bring back what was
                withdrawn.
        """
        try:
            document = json.loads(self._path.read_bytes())
            keys = _names(document["keys"], lambda text: _KEY_ID.fullmatch(text) is not None)
            return Withdrawn(keys, _names(document["digests"], is_digest))
        except FileNotFoundError:
            return Withdrawn()
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise HocketError(
                Reason.BAD_TRUST_FILE,
                f"{self._path} does not say what was withdrawn ({error}): restore it, or remove it and make sure that "
                "the registry is reachable, which then tells everything again",
            ) from error

    def write(self, withdrawn: Withdrawn) -> None:
        """Keep it.

        Raises:
            OSError: It could not be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        document = {"digests": sorted(withdrawn.digests), "keys": sorted(withdrawn.keys)}
        write_durably(self._path, json.dumps(document, indent=1).encode())


def _names(values: object, is_name: Callable[[str], bool]) -> frozenset[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) and is_name(value) for value in values):
        raise ValueError("an entry is misspelled")
    return frozenset(values)
