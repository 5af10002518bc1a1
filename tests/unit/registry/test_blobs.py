from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from services.registry.blobs import CHUNK_BYTES, Blobs, Draft
from services.registry.disk import StorageError

DATA = os.urandom(2 * CHUNK_BYTES + 17)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    blobs = Blobs(tmp_path / "blobs")
    blobs.open()
    return blobs


def written(blobs: Blobs, data: bytes = DATA) -> Draft:
    draft = blobs.draft()
    for start in range(0, len(data), CHUNK_BYTES):
        draft.write(data[start : start + CHUNK_BYTES])
    return draft


def kept(blobs: Blobs, data: bytes = DATA) -> str:
    draft = written(blobs, data)
    digest = draft.finish()
    draft.commit()
    draft.discard()
    return digest


def read_all(blobs: Blobs, digest: str, size_bytes: int, offset: int = 0) -> bytes:
    with closing(blobs.reader()) as reader:
        reader.open(digest, size_bytes, offset)
        return b"".join(iter(reader.read, b""))


def refusal_of(blobs: Blobs, digest: str, size_bytes: int, offset: int = 0) -> Reason:
    with pytest.raises(HocketError) as caught:
        read_all(blobs, digest, size_bytes, offset)
    return caught.value.reason


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_blob_is_named_by_its_digest(blobs: Blobs, tmp_path: Path) -> None:
    digest = kept(blobs)

    name = digest.removeprefix("sha256:")
    assert digest == digest_of(DATA)
    assert files_in(tmp_path) == [f"blobs/sha256/{name[:2]}/{name}"]
    assert read_all(blobs, digest, len(DATA)) == DATA


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(DATA) - 1, len(DATA)])
def test_a_blob_is_read_from_any_offset(blobs: Blobs, offset: int) -> None:
    assert read_all(blobs, kept(blobs), len(DATA), offset) == DATA[offset:]


def test_a_draft_can_be_read_before_it_has_a_name(blobs: Blobs) -> None:
    draft = written(blobs)
    draft.finish()

    assert draft.read() == DATA
    assert draft.size_bytes == len(DATA)


def test_a_discarded_draft_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    written(blobs).discard()
    blobs.draft().discard()

    assert files_in(tmp_path) == []


def test_a_draft_may_stay_empty(blobs: Blobs) -> None:
    assert read_all(blobs, kept(blobs, b""), 0) == b""


def test_a_reader_that_is_not_open_says_so(blobs: Blobs) -> None:
    with pytest.raises(ValueError, match="not open"):
        blobs.reader().read()


def test_drafts_of_a_process_that_died_are_removed_and_blobs_stay(blobs: Blobs, tmp_path: Path) -> None:
    digest = kept(blobs)
    draft = written(blobs)

    again = Blobs(tmp_path / "blobs")
    again.open()
    draft.discard()

    assert len(files_in(tmp_path)) == 1
    assert read_all(again, digest, len(DATA)) == DATA


@pytest.mark.parametrize("offset", [0, CHUNK_BYTES + 1, len(DATA)])
def test_a_changed_byte_is_found_even_before_the_offset(blobs: Blobs, offset: int) -> None:
    digest = kept(blobs)
    path = blobs.path(digest)
    path.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:])

    assert refusal_of(blobs, digest, len(DATA), offset) is Reason.BLOB_CORRUPT


def test_a_blob_that_is_shorter_or_missing_is_corrupt(blobs: Blobs) -> None:
    digest = kept(blobs)
    blobs.path(digest).write_bytes(DATA[:-1])

    assert refusal_of(blobs, digest, len(DATA)) is Reason.BLOB_CORRUPT
    blobs.remove(digest)
    blobs.remove(digest)
    assert refusal_of(blobs, digest, len(DATA)) is Reason.BLOB_CORRUPT


def test_the_same_bytes_again_heal_a_damaged_blob(blobs: Blobs) -> None:
    digest = kept(blobs)
    blobs.path(digest).write_bytes(b"damaged")
    assert not blobs.is_whole(digest)

    kept(blobs)

    assert blobs.is_whole(digest)
    assert not blobs.is_whole("sha256:" + "0" * 64)
    assert read_all(blobs, digest, len(DATA)) == DATA


def test_a_full_disk_is_a_refusal(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = written(blobs)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HocketError) as caught:
        draft.finish()
    assert caught.value.reason is Reason.CAPACITY
    draft.discard()


def test_a_sync_that_fails_is_the_end(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = written(blobs)

    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        draft.finish()
    draft.discard()


def test_what_a_blob_rests_on_is_synced_before_its_name(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is the promise: contents, then the name, then the folder of the name."""
    steps: list[str] = []
    sync, rename = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name[:8]}")
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(path, target)

    draft = written(blobs)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    digest = draft.finish()
    draft.commit()

    prefix = digest.removeprefix("sha256:")[:2]
    assert steps == [f"sync {draft._path.name[:8]}", "sync sha256", "rename", f"sync {prefix}"]
