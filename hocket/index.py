"""Indexes of experts: git repositories that say where experts are.

An index is a repository with a file `index.json` at its root:

    {
      "version": "1.0",
      "updated_at": "2026-01-31T12:00:00Z",
      "experts_count": 1,
      "experts": [
        {"name": "expert-sql", "repository": "https://git.example.org/acme/expert-sql", "latest": "0.3.0"}
      ]
    }

`name` and `repository` count; the rest is for people and for other tools, and so are files such as
`experts/<name>.json` beside it, which are not read: there is one place that says where an expert is. An index decides
nothing but that. Which versions there are is asked of the repository, and whose they are of their releases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError, Reason
from hocket.git import check_address
from hocket.packages import strict_json

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_FILE: Final = "index.json"
"""Where an index lies in its repository."""

INDEX_BYTES_MAX: Final = 4 * 2**20
"""Largest index that is read: some 20,000 experts."""

_DEPTH_MAX: Final = 8
_VERSION: Final = "1.0"
_PREFIX: Final = "expert-"


@dataclass(frozen=True, slots=True)
class Index:
    """What an index says.

    Attributes:
        where: The index itself, for people.
        repositories: Where each expert is, by its name, as written: not checked yet.
        is_local: Whether the index lies in a folder of this computer, and so may name others.
    """

    where: str
    repositories: Mapping[str, str]
    is_local: bool = False

    def repository_of(self, name: str) -> tuple[str, str] | None:
        """The full name and the checked address of an expert; None if it is not listed.

        Args:
            name: As listed, or without the `expert-` that many names begin with.

        Raises:
            HocketError: `BAD_REQUEST` if the address is none that data may name.
        """
        full = next((full for full in (name, f"{_PREFIX}{name}") if full in self.repositories), None)
        if full is None:
            return None
        written = self.repositories[full].removeprefix("git+")
        try:
            return full, check_address(written, local=self.is_local and written.startswith(("/", "file://")))
        except HocketError as error:
            raise HocketError(
                error.reason, f"{self.where} lists {full} at an address that cannot be used: {error.message}"
            ) from error


def parse_index(data: bytes, where: str, *, is_local: bool = False) -> Index:
    """Read `index.json`.

    Args:
        data: The file.
        where: Which index it is, for people.
        is_local: Whether it lies in a folder of this computer.

    Raises:
        HocketError: `BAD_JSON` if it is not an index, `TOO_LARGE`, or `UNSUPPORTED_VERSION`.
    """
    document = strict_json.loads(data, what=INDEX_FILE, bytes_max=INDEX_BYTES_MAX, depth_max=_DEPTH_MAX)
    if not isinstance(document, dict) or not isinstance(document.get("experts"), list):
        raise _bad("it has no list of experts")
    if document.get("version") != _VERSION:
        raise HocketError(
            Reason.UNSUPPORTED_VERSION,
            f"{INDEX_FILE} has version {json.dumps(document.get('version'))[:40]}, not {json.dumps(_VERSION)}",
        )
    repositories: dict[str, str] = {}
    for entry in document["experts"]:
        name, repository = _text(entry, "name"), _text(entry, "repository")
        if name in repositories:
            raise _bad(f"{name[:80]!r} is listed twice")
        repositories[name] = repository
    return Index(where, repositories, is_local)


def _text(entry: Any, key: str) -> str:  # noqa: ANN401 - a JSON value
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value:
        raise _bad(f"an expert has no {key}")
    return value


def _bad(problem: str) -> HocketError:
    return HocketError(Reason.BAD_JSON, f"{INDEX_FILE} is not an index of experts: {problem}")
