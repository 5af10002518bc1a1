"""What packages are found by, and what a request for them means.

Words are folded: compatibility forms become one (NFKC), case is dropped, whatever cannot be printed is a space. A word
is found wherever it occurs, within another one as well; capabilities are compared as a whole. Of what a package says
about itself a beginning is kept: name, tags and capabilities first, then its description, then its labels.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

from hocket.bases import normalised_name
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.v1.package_pb2 import AdapterFacts
from services.registry.store import Query, SearchRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.struct_pb2 import Struct

    from hocket.v1.package_pb2 import ModelFacts
    from hocket.v1.registry_pb2 import ListPackagesRequest

FILTER_CHARS_MAX: Final = 512
"""Longest filter of a list."""
WORDS_MAX: Final = 16
"""Most words to look for at once."""
TEXT_CHARS_MAX: Final = 4096
"""Of one package, what words are looked for in: every search reads it."""


def search_row(digest: str, facts: ModelFacts | AdapterFacts, metadata: Struct) -> SearchRow:
    """What a package is found by.

    Args:
        digest: The package.
        facts: What it holds.
        metadata: Its metadata. An `.apr` file says there what it is for: `description` and `tags`.
    """
    if isinstance(facts, AdapterFacts):
        capabilities = tuple(dict.fromkeys(map(_folded, facts.capabilities)))
        base_name = normalised_name(facts.base.name) or None
        text = _text((facts.name, *facts.tags, *capabilities, facts.description))
        return SearchRow(digest, facts.name, facts.version, base_name, facts.base.digest or None, text, capabilities)
    labels = (column.label for column in facts.columns if column.HasField("label"))
    return SearchRow(digest, None, None, None, None, _text((facts.name, *_described(metadata), *labels)), ())


def read_query(request: ListPackagesRequest) -> Query:
    """Which packages a request wants.

    Raises:
        HocketError: `BAD_REQUEST` for a filter that is too long, or of too many words.
    """
    for field in ("publisher", "capability", "base", "text"):
        if len(getattr(request, field)) > FILTER_CHARS_MAX:
            raise HocketError(
                Reason.BAD_REQUEST, f"{field} has at most {FILTER_CHARS_MAX} characters: shorten it", field=field
            )
    words = tuple(dict.fromkeys(_folded(request.text).split()))
    if len(words) > WORDS_MAX:
        raise HocketError(
            Reason.BAD_REQUEST, f"text has {len(words)} words, more than {WORDS_MAX}: leave some out", field="text"
        )
    capability = _folded(request.capability)
    if request.capability and not capability:
        raise HocketError(Reason.BAD_REQUEST, f"{request.capability!r} is no capability", field="capability")
    by_digest = is_digest(request.base)
    base_name = "" if by_digest else normalised_name(request.base)
    if request.base and not (by_digest or base_name):
        raise HocketError(Reason.BAD_REQUEST, f"{request.base!r} is neither a digest nor a name", field="base")
    return Query(
        publisher=request.publisher,
        capability=capability,
        base_name=base_name,
        base_digest=request.base if by_digest else "",
        words=words,
    )


def _described(metadata: Struct) -> Iterator[str]:
    """The tags and the description in the metadata of an `.apr` file, where they are text."""
    for key in ("tags", "description"):
        if key in metadata.fields:
            value = metadata.fields[key]
            for item in (value, *value.list_value.values):
                if item.HasField("string_value"):
                    yield item.string_value


def _text(said: Iterable[str]) -> str:
    return _folded(" ".join(said)[:TEXT_CHARS_MAX])[:TEXT_CHARS_MAX]


def _folded(text: str) -> str:
    visible = "".join(char if char.isprintable() else " " for char in unicodedata.normalize("NFKC", text).casefold())
    return " ".join(visible.split())
