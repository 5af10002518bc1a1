"""The cache and the file of revocations."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from services.expert_worker.cache import CachedPackage, PackageCache, write_durably
from services.expert_worker.revocations import RevocationFile, Withdrawn

if TYPE_CHECKING:
    from pathlib import Path

DATA = b"some package"
DIGEST = digest_of(DATA)
RELEASES = (b"one \xff release", b"another")
SIZE_BYTES_MAX = 10 * 8192
"""Ten small entries: of two files, which take a block of 4096 bytes each."""


@pytest.fixture
def cache(tmp_path: Path) -> PackageCache:
    return PackageCache(tmp_path / "cache", SIZE_BYTES_MAX)


def path_of(tmp_path: Path, suffix: str = "") -> Path:
    name = DIGEST.removeprefix("sha256:")
    return tmp_path / "cache" / "sha256" / name[:2] / (name + suffix)


class TestCache:
    def test_what_was_written_is_read(self, cache: PackageCache, tmp_path: Path) -> None:
        assert cache.read(DIGEST) is None
        cache.write(DIGEST, DATA, RELEASES)
        assert cache.read(DIGEST) == CachedPackage(DATA, RELEASES)
        assert path_of(tmp_path).read_bytes() == DATA

    def test_writing_again_replaces_the_releases(self, cache: PackageCache) -> None:
        cache.write(DIGEST, DATA, RELEASES)
        cache.write(DIGEST, DATA, ())
        assert cache.read(DIGEST) == CachedPackage(DATA, ())

    def test_what_was_dropped_is_gone(self, cache: PackageCache) -> None:
        cache.write(DIGEST, DATA, RELEASES)
        cache.drop(DIGEST)
        cache.drop(DIGEST)
        assert cache.read(DIGEST) is None

    def test_bytes_without_their_releases_are_no_entry(self, cache: PackageCache, tmp_path: Path) -> None:
        cache.write(DIGEST, DATA, RELEASES)
        path_of(tmp_path, ".releases").unlink()
        assert cache.read(DIGEST) is None

    @pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'["?"]', b"[" * 100_000, b"\xff"])
    def test_releases_that_cannot_be_read_are_no_entry(
        self, cache: PackageCache, tmp_path: Path, content: bytes
    ) -> None:
        cache.write(DIGEST, DATA, RELEASES)
        path_of(tmp_path, ".releases").write_bytes(content)
        assert cache.read(DIGEST) is None
        path_of(tmp_path, ".releases").write_text(json.dumps([base64.b64encode(b"x").decode()]))
        assert cache.read(DIGEST) == CachedPackage(DATA, (b"x",))

    def test_files_too_large_to_be_ours_are_no_entry(
        self, cache: PackageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.write(DIGEST, DATA, RELEASES)
        with monkeypatch.context() as patch:
            patch.setattr("services.expert_worker.cache._RELEASES_BYTES_MAX", 10)
            assert cache.read(DIGEST) is None
        assert cache.read(DIGEST) is not None
        os.truncate(path_of(tmp_path), 2 * 2**30)  # sparse: nothing is allocated
        assert cache.read(DIGEST) is None

    def test_a_cache_that_cannot_be_written_is_no_failure(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        cache = PackageCache(tmp_path / "cache", SIZE_BYTES_MAX)
        cache.write(DIGEST, DATA, RELEASES)
        assert cache.read(DIGEST) is None

    def test_writes_that_never_finished_are_tidied_away(self, cache: PackageCache, tmp_path: Path) -> None:
        cache.tidy()
        cache.write(DIGEST, DATA, RELEASES)
        draft = path_of(tmp_path).with_name("tmp123.draft")
        draft.write_bytes(b"half")
        cache.tidy()
        assert not draft.exists()
        assert cache.read(DIGEST) is not None


class TestCacheSize:
    """Entries are written in the order of their names, one second apart."""

    @staticmethod
    def fill(cache: PackageCache, folder: Path, *names: int, in_use: frozenset[str] = frozenset()) -> None:
        for name in names:
            digest = digest_of(b"%d" % name)
            cache.write(digest, b"%d" % name, (), in_use)
            TestCacheSize.used(folder, name, 1000 + name)

    @staticmethod
    def used(folder: Path, name: int, time: float) -> None:
        for path in (folder / "cache").glob(f"sha256/??/{digest_of(b'%d' % name).removeprefix('sha256:')}*"):
            os.utime(path, (time, time))

    @staticmethod
    def held(cache: PackageCache, names: range) -> list[int]:
        return [name for name in names if cache.read(digest_of(b"%d" % name)) is not None]

    def test_what_fits_stays(self, cache: PackageCache, tmp_path: Path) -> None:
        self.fill(cache, tmp_path, *range(10))
        assert self.held(cache, range(10)) == [*range(10)]

    def test_what_was_used_longest_ago_makes_room_with_some_to_spare(self, cache: PackageCache, tmp_path: Path) -> None:
        self.fill(cache, tmp_path, *range(11))
        assert self.held(cache, range(11)) == [*range(2, 11)]
        assert len(list((tmp_path / "cache").glob("sha256/??/*"))) == 18  # their releases went along

    def test_reading_is_use(self, cache: PackageCache, tmp_path: Path) -> None:
        self.fill(cache, tmp_path, *range(10))
        assert self.held(cache, range(1)) == [0]
        self.fill(cache, tmp_path, 10)
        assert self.held(cache, range(11)) == [0, *range(3, 11)]

    def test_what_is_in_use_stays_even_beyond_the_limit(self, cache: PackageCache, tmp_path: Path) -> None:
        in_use = frozenset(digest_of(b"%d" % name) for name in range(12))
        self.fill(cache, tmp_path, *range(12), in_use=in_use)
        assert self.held(cache, range(12)) == [*range(12)]
        self.fill(cache, tmp_path, 12, in_use=in_use)
        assert self.held(cache, range(13)) == [*range(12)]

    def test_writing_the_same_again_drops_nothing(self, cache: PackageCache, tmp_path: Path) -> None:
        self.fill(cache, tmp_path, *range(10))
        for _ in range(3):
            self.fill(cache, tmp_path, 9)
        assert self.held(cache, range(10)) == [*range(10)]

    def test_a_start_counts_what_is_there_and_obeys_a_lower_limit(self, cache: PackageCache, tmp_path: Path) -> None:
        self.fill(cache, tmp_path, *range(10))
        again = PackageCache(tmp_path / "cache", SIZE_BYTES_MAX)
        again.tidy()
        assert self.held(again, range(1, 10)) == [*range(1, 10)]
        for name in range(10):
            self.used(tmp_path, name, 1000 + name)
        self.fill(again, tmp_path, 10)
        assert self.held(again, range(11)) == [*range(2, 11)]
        PackageCache(tmp_path / "cache", 0).tidy()
        assert self.held(again, range(11)) == []


class TestDurableWrites:
    def test_a_failure_leaves_the_old_content_and_no_draft(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        write_durably(path, b"old")

        def fail(*_arguments: Any) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="disk full"):
                write_durably(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
        write_durably(path, b"new")
        assert path.read_bytes() == b"new"


class TestRevocations:
    WITHDRAWN = Withdrawn(frozenset({"ab" * 32}), frozenset({DIGEST}))

    def test_nothing_is_withdrawn_before_anything_was_written(self, tmp_path: Path) -> None:
        assert RevocationFile(tmp_path / "revocations.json").read() == Withdrawn()

    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        RevocationFile(tmp_path / "new" / "revocations.json").write(self.WITHDRAWN)
        assert RevocationFile(tmp_path / "new" / "revocations.json").read() == self.WITHDRAWN

    def test_withdrawals_add_up(self) -> None:
        assert Withdrawn(keys=frozenset("a")) | Withdrawn(frozenset("b"), frozenset("c")) == Withdrawn(
            frozenset("ab"), frozenset("c")
        )

    @pytest.mark.parametrize(
        "document",
        [
            "",
            "[]",
            "{}",
            '{"keys": []}',
            '{"keys": [], "digests": {}}',
            '{"keys": ["AB"], "digests": []}',
            '{"keys": [], "digests": ["ab"]}',
            '{"keys": [1], "digests": []}',
            "[" * 100_000,
        ],
    )
    def test_a_file_that_cannot_be_believed_is_refused(self, tmp_path: Path, document: str) -> None:
        path = tmp_path / "revocations.json"
        path.write_text(document)
        with pytest.raises(HocketError) as refusal:
            RevocationFile(path).read()
        assert refusal.value.reason is Reason.BAD_TRUST_FILE
        assert str(path) in refusal.value.message

    def test_a_file_that_cannot_be_opened_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(HocketError) as refusal:
            RevocationFile(tmp_path).read()
        assert refusal.value.reason is Reason.BAD_TRUST_FILE
