"""Whatever honest writers put into an archive is read back; whatever else it holds, only a `HocketError` comes out."""

from __future__ import annotations

import contextlib
import io
import tarfile
import unicodedata
import zipfile

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError
from hocket.packages.expert.archive import read_archive, safe_name
from tests import archives

CHARACTERS = st.characters(exclude_categories=["C", "Z"], exclude_characters='/\\:<>"|?*') | st.just(" ")
PARTS = st.text(CHARACTERS, min_size=1, max_size=20).map(
    lambda part: unicodedata.normalize("NFC", part).strip(". ") or "a"
)
# normal form C can triple a text: 4 parts of 20 characters stay below the limit
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
CONTENTS = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=8), st.integers(0, 30_000)),
)
HONEST = [archives.gzipped(archives.tar_bytes()), archives.zstd(archives.tar_bytes(), told=True), archives.zip_bytes()]


def together(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those files whose names go with the names before them."""
    taken: dict[str, tuple[str, bool]] = {}
    kept = {}
    for name, content in files.items():
        parts = name.split("/")
        places = [("/".join(parts[:depth]), depth == len(parts)) for depth in range(1, len(parts) + 1)]
        folded = [unicodedata.normalize("NFC", place.casefold()) for place, _ in places]
        if all(taken.get(key, place) == place for key, place in zip(folded, places, strict=True)):
            taken.update(zip(folded, places, strict=True))
            kept[name] = content
    return kept


PACKAGES = st.dictionaries(NAMES, CONTENTS, min_size=1, max_size=5).map(together)


@settings(max_examples=30, deadline=None)
@given(PACKAGES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.integers(0, 9))
def test_what_python_s_tarfile_writes_is_read_as_it_reads_it(files: dict[str, bytes], form: int, level: int) -> None:
    try:
        tar = archives.tar_bytes(files, form)
    except ValueError:  # a name too long for ustar
        tar = archives.tar_bytes(files)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        expected = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]  # all are files
    assert expected == files

    stream = zstandard.ZstdCompressor(level=1 + level * 2, write_checksum=bool(level % 2)).compressobj()
    streamed = stream.compress(tar[:700]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    streamed += stream.compress(tar[700:]) + stream.flush()
    for data in (archives.gzipped(tar, level), archives.zstd(tar, told=bool(level % 2)), streamed):
        assert list(read_archive(data).files.items()) == list(files.items())


@settings(max_examples=30, deadline=None)
@given(PACKAGES, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_what_python_s_zipfile_writes_is_read_as_it_reads_it(files: dict[str, bytes], method: int) -> None:
    data = archives.zip_bytes(files, method)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files

    assert list(read_archive(data).files.items()) == list(files.items())


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Some bytes replaced."""
    altered = bytearray(data)
    for place, value in changes:
        altered[place % len(altered)] = value
    return bytes(altered)


CHANGES = st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(CHANGES)
def test_a_changed_tar_is_read_or_refused_by_name(changes: list[tuple[int, int]]) -> None:
    tar = changed(archives.tar_bytes(), changes)

    for data in (archives.gzipped(tar, 1), archives.zstd(tar)):
        with contextlib.suppress(HocketError):
            assert all(safe_name(name) == name for name in read_archive(data).files)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(HONEST), CHANGES)
def test_a_changed_archive_is_read_or_refused_by_name(data: bytes, changes: list[tuple[int, int]]) -> None:
    with contextlib.suppress(HocketError):
        assert all(safe_name(name) == name for name in read_archive(changed(data, changes)).files)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab./\\:?\n\u0301é\u202eA ", max_size=20))
def test_a_safe_name_is_one_plain_part_after_another(text: str) -> None:
    try:
        name = safe_name(text)
    except HocketError:
        return

    assert text in {name, f"./{name}"}
    assert name == unicodedata.normalize("NFC", name)
    assert safe_name(name) == name
    for part in name.split("/"):
        assert part
        assert part[-1] not in ". "
        assert not set("\\:?\n\u202e") & set(part)
