"""Whatever somebody writes: it is refused, or it is nothing that git could take for anything but an address."""

from __future__ import annotations

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError
from hocket.git import check_address
from hocket.index import parse_index
from hocket.sources import InRepository, Named, PackageFile, parse_source

SAFE = re.compile(r"https://\S+|ssh://[^\s-]\S*|[A-Za-z0-9_][A-Za-z0-9_.-]*@[A-Za-z0-9_[][^\s:/]*:[^\s:-]\S*|/.*")
PIECES = st.one_of(
    st.sampled_from(["https", "http", "ssh", "file", "ext", "git", "git+", "user", "host", "localhost", "[::1]"]),
    st.sampled_from(["://", "::", ":", "/", "//", "@", "#", "-", "--", "..", ".", "~", "%00", "*", ">=1", "1.0.0"]),
    st.sampled_from(["path.git", "x.expert", "upload-pack=x", " ", "\n", "\0", "\x1b", "\udcff", "é", "😀"]),
)
WRITTEN = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=9).map("".join))


@settings(max_examples=150, deadline=None)
@given(WRITTEN)
def test_an_address_is_refused_or_harmless(text: str) -> None:
    for local in (True, False):
        try:
            address = check_address(text, local=local)
        except HocketError:
            continue
        assert SAFE.fullmatch(address)
        assert local or not address.startswith("/")
        assert check_address(address, local=local) == address


@settings(max_examples=150, deadline=None)
@given(WRITTEN)
def test_a_source_is_refused_or_understood(text: str) -> None:
    try:
        source = parse_source(text)
    except HocketError:
        return
    match source:
        case PackageFile():
            assert text.endswith((".expert", ".apr"))
        case InRepository():
            assert SAFE.fullmatch(source.address)
        case Named():
            assert "/" not in source.name + source.publisher
            assert not source.publisher.startswith("-")
            assert not source.name.startswith("-")


@settings(max_examples=100, deadline=None)
@given(WRITTEN.filter(bool))
def test_an_index_leads_nowhere_else(text: str) -> None:
    data = json.dumps({"version": "1.0", "experts": [{"name": "x", "repository": text}]}).encode()
    try:
        found = parse_index(data, "the index").repository_of("x")
    except HocketError:
        return
    assert found is not None
    assert SAFE.fullmatch(found[1])
    assert not found[1].startswith("/")
