"""What packages are found by: folded words, capabilities, bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from hocket.v1.package_pb2 import AdapterFacts, BaseModel, ModelFacts, OutputColumn
from hocket.v1.registry_pb2 import ListPackagesRequest
from services.registry.searching import FILTER_CHARS_MAX, TEXT_CHARS_MAX, WORDS_MAX, read_query, search_row
from services.registry.store import PackageRow, Query, ReleaseRow, SearchRow, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BASE = "sha256:" + "b" * 64


def digest(index: int) -> str:
    return f"sha256:{index:064x}"


def adapter(**changes: Any) -> AdapterFacts:
    fields = {
        "name": "expert-sql",
        "version": "1.0.0",
        "description": "Turns questions into SQL.",
        "base": BaseModel(name=r"F:\models\Qwen3-0.6B", digest=BASE),
        "capabilities": ["task:Text2SQL", "language:en", "Language:EN"],
        "tags": ["PostgreSQL"],
        **changes,
    }
    return AdapterFacts(**fields)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "registry.db")
    store.open()
    yield store
    store.close()


def keep(store: Store, row: SearchRow, release: str = "") -> None:
    package = PackageRow(
        digest=row.digest,
        size_bytes=3,
        format="expert",
        facts=b"",
        embedded_key_id=None,
        embedded_trusted=False,
        state="ACTIVE",
        by_policy=False,
        publish_time_us=7,
        proof_time_us=7,
        revision=0,
    )
    with store.begin() as tx:
        tx.insert_package(package, b"")
        tx.update_package(row.digest)
        tx.insert_search(row)
        if release:
            tx.insert_release(ReleaseRow("acme", release, "1.0.0", "k", row.digest, b"", "ACTIVE", 7))


def found(store: Store, **filters: Any) -> list[str]:
    with store.begin() as tx:
        return [row.digest for row in tx.packages_after("", read_query(ListPackagesRequest(**filters)), 99)]


def refused_field(**filters: Any) -> str | None:
    with pytest.raises(HocketError) as caught:
        read_query(ListPackagesRequest(**filters))
    assert caught.value.reason is Reason.BAD_REQUEST
    return caught.value.field


class TestRows:
    def test_an_adapter_is_found_by_what_its_manifest_says(self) -> None:
        row = search_row(digest(1), adapter(), Struct())

        assert row.expert_version == "1.0.0"
        assert (row.expert_name, row.base_name, row.base_digest) == ("expert-sql", "qwen3-0.6b", BASE)
        assert row.capabilities == ("task:text2sql", "language:en")
        assert row.text == "expert-sql postgresql task:text2sql language:en turns questions into sql."

    def test_a_base_without_a_digest_is_known_by_name_alone(self) -> None:
        row = search_row(digest(1), adapter(base=BaseModel(name="Qwen/Qwen3-0.6B")), Struct())

        assert (row.base_name, row.base_digest) == ("qwen3-0.6b", None)

    def test_an_apr_file_is_found_by_name_description_tags_and_labels(self) -> None:
        columns = [OutputColumn(label="Setosa"), OutputColumn(dropped=True), OutputColumn()]
        metadata = Struct()
        metadata.update({"description": "Flowers of Fisher", "tags": ["botany", 7], "license": "unfindable"})

        row = search_row(digest(1), ModelFacts(name="iris", columns=columns), metadata)

        assert row == SearchRow(digest(1), None, None, None, None, "iris botany flowers of fisher setosa", ())

    @pytest.mark.parametrize("description", [7, None, ["a"], {"b": "c"}])
    def test_metadata_of_any_kind_is_passed_over(self, description: Any) -> None:
        metadata = Struct()
        metadata.update({"description": description})

        assert set(search_row(digest(1), ModelFacts(name="iris"), metadata).text.split()) <= {"iris", "a"}

    def test_of_a_long_description_the_beginning_counts_and_nothing_else_is_lost_for_it(self) -> None:
        row = search_row(digest(1), adapter(description="begin " + "\ufdfa" * TEXT_CHARS_MAX + " end"), Struct())

        assert len(row.text) == TEXT_CHARS_MAX
        assert all(word in row.text for word in ("expert-sql", "postgresql", "language:en", "begin"))
        assert "end" not in row.text
        just = adapter(name="n", description="x" * (TEXT_CHARS_MAX - 6) + " end", tags=[], capabilities=[])
        assert search_row(digest(1), just, Struct()).text.endswith("x end")


class TestQueries:
    def test_filters_are_folded_as_what_they_are_compared_with(self) -> None:
        request = ListPackagesRequest(
            publisher="acme",
            capability=" Task:TEXT2SQL",
            base="x/Qwen3-0.6B/",
            text="  Stra\u00dfe \uff33\uff31\uff2c sql ",
        )

        assert read_query(request) == Query("acme", "task:text2sql", "qwen3-0.6b", "", ("strasse", "sql"))

    def test_a_base_is_a_digest_or_a_name(self) -> None:
        assert read_query(ListPackagesRequest(base=BASE)) == Query(base_digest=BASE)
        assert refused_field(base="/") == "base"

    @pytest.mark.parametrize("blank", [" ", "\0", "\n\t"])
    def test_a_capability_of_nothing_is_no_filter_but_a_mistake(self, blank: str) -> None:
        assert refused_field(capability=blank) == "capability"
        assert read_query(ListPackagesRequest(text=blank)) == Query()

    @pytest.mark.parametrize("field", ["publisher", "capability", "base", "text"])
    def test_filters_have_a_greatest_length(self, field: str) -> None:
        filters: Any = {field: "x" * FILTER_CHARS_MAX}
        read_query(ListPackagesRequest(**filters))

        assert refused_field(**{field: "x" * (FILTER_CHARS_MAX + 1)}) == field

    def test_so_many_words_and_no_more(self) -> None:
        words = " ".join(map(str, range(WORDS_MAX)))

        assert len(read_query(ListPackagesRequest(text=f"{words} {words}")).words) == WORDS_MAX
        assert refused_field(text=f"{words} more") == "text"

    @settings(max_examples=50, deadline=None)
    @given(text=st.text(max_size=60))
    def test_every_text_is_a_query_or_refused(self, text: str) -> None:
        try:
            query = read_query(ListPackagesRequest(text=text, base=text, capability=text))
        except HocketError as error:
            assert error.reason is Reason.BAD_REQUEST  # noqa: PT017 - the only refusal there is
        else:
            assert all(word.isprintable() for word in query.words)


class TestFinding:
    def test_every_filter_narrows(self, store: Store) -> None:
        keep(store, search_row(digest(1), adapter(), Struct()), "expert-sql")
        keep(store, search_row(digest(2), adapter(name="expert-x", base=BaseModel(name="llama")), Struct()))
        keep(store, search_row(digest(3), ModelFacts(name="iris"), Struct()), "flowers")

        assert found(store) == [digest(1), digest(2), digest(3)]
        assert found(store, publisher="acme") == [digest(1), digest(3)]
        assert found(store, capability="TASK:text2sql") == [digest(1), digest(2)]
        assert found(store, capability="task") == []
        assert found(store, base="Qwen/Qwen3-0.6b") == [digest(1)]
        assert found(store, base=BASE) == [digest(1)]
        assert found(store, base="sha256:" + "c" * 64) == []
        assert found(store, capability="language:en", base="LLaMA", publisher="acme") == []

    def test_all_words_must_occur_anywhere_in_what_it_says_or_is_called(self, store: Store) -> None:
        keep(store, search_row(digest(1), adapter(), Struct()), "expert-sql")
        keep(store, search_row(digest(2), ModelFacts(name="iris"), Struct()), "flowers")

        assert found(store, text="postgres") == [digest(1)]
        assert found(store, text="QUESTIONS expert-sql") == [digest(1)]
        assert found(store, text="questions iris") == []
        assert found(store, text="flower IRIS") == [digest(2)]
        assert found(store, text="acme") == [digest(1), digest(2)]
        assert found(store, text="ACME iris") == [digest(2)]
        with store.begin() as tx:
            tx.insert_release(ReleaseRow("zeta", "petals", "1.0.0", "k", digest(2), b"", "ACTIVE", 7))
        assert found(store, text="zeta") == found(store, text="petal acme") == [digest(2)]
        assert found(store, text="nobody") == []

    @pytest.mark.parametrize("wildcard", ["%", "_", "/", "\\", "100%", "a_c"])
    def test_a_wildcard_means_itself(self, store: Store, wildcard: str) -> None:
        keep(store, search_row(digest(1), adapter(description=f"before{wildcard}after"), Struct()))
        keep(store, search_row(digest(2), adapter(description="abc 100x", tags=[], capabilities=[]), Struct()))

        assert found(store, text=wildcard) == [digest(1)]

    def test_what_cannot_be_printed_neither_hides_nor_finds(self, store: Store) -> None:
        keep(store, search_row(digest(1), adapter(description="seen\0hidden"), Struct()))

        assert found(store, text="hidden") == [digest(1)]
        assert found(store, text="hid\0nowhere") == []
        assert found(store, text="\0") == [digest(1)]  # no words: everything
