"""Names in the contracts can be spoken in the languages that clients are written in."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

PROTO = Path(__file__).parents[2] / "proto" / "hocket" / "v1"
FIELD = re.compile(r"^\s*(?:repeated |optional )?[\w.<>, ]+ (\w+) = \d+;", re.MULTILINE)
# protoc for C++ gives an underscore to older keywords, and leaves these as they are.
CPP = {"char8_t", "concept", "consteval", "constinit", "co_await", "co_return", "co_yield", "requires"}


def test_no_field_is_a_keyword() -> None:
    names = {name for path in PROTO.glob("*.proto") for name in FIELD.findall(path.read_text())}
    assert {"digest", "requirements", "publish_time"} <= names
    assert names & (CPP | set(keyword.kwlist)) == set()
