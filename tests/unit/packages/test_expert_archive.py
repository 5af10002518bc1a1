from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import zstandard

from hocket.errors import HocketError, Reason
from hocket.packages.expert.archive import is_expert, read_archive, safe_name
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from tests import archives
from tests.archives import END, FILES, FOLDER, GNU, LONG_NAME, PAX_GLOBAL, ZipEntry, member, pax, tar_of, zip_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ATTACKS = {attack.name: attack for attack in archives.attacks()}


def reason(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Reason | None:
    try:
        read_archive(data, limits)
    except HocketError as refusal:
        return refusal.reason
    return None


def files(data: bytes) -> dict[str, bytes]:
    return dict(read_archive(data).files)


# What is read.


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_however_it_was_written_and_compressed(form: int) -> None:
    tar = archives.tar_bytes(FILES, form)

    assert read_archive(archives.gzipped(tar)).compression == "gzip"
    assert files(archives.gzipped(tar)) == FILES
    assert read_archive(archives.zstd(tar)).compression == "zstd"
    assert files(archives.zstd(tar)) == files(archives.zstd(tar, told=True)) == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_stored_or_deflated(method: int) -> None:
    assert read_archive(archives.zip_bytes(FILES, method)).compression == "zip"
    assert files(archives.zip_bytes(FILES, method)) == FILES


def test_files_come_in_the_archives_order_and_cannot_be_changed() -> None:
    read = read_archive(archives.expert_bytes()).files

    assert list(read) == list(FILES)
    with pytest.raises(TypeError, match="does not support item assignment"):
        cast("dict[str, bytes]", read)["manifest.json"] = b""


def test_a_view_is_read_like_bytes() -> None:
    data = archives.expert_bytes()

    assert read_archive(memoryview(bytearray(data))).files == FILES


def test_a_file_that_is_there_twice_with_the_same_bytes_is_listed_once() -> None:
    assert files(tar_of(member(b"a", b"1"), member(b"b"), member(b"a", b"1"))) == {"a": b"1", "b": b""}


def test_folders_are_ignored_the_root_among_them() -> None:
    folders = [member(name, b"", FOLDER) for name in (b"./", b"./f/", b"f/g")]

    assert files(tar_of(*folders, member(b"./f/g/a", b"1"))) == {"f/g/a": b"1"}
    assert files(zip_of(ZipEntry(b"f/", b"", 0, mode=0o040755), ZipEntry(b"f/a"))) == {"f/a": b"content"}


def test_a_mac_s_shadow_files_are_plain_files() -> None:
    assert list(files(tar_of(member(b"._manifest.json", b"\0\5\x16\7"), member(b"manifest.json")))) == [
        "._manifest.json",
        "manifest.json",
    ]


def test_an_old_type_byte_of_zero_is_a_plain_file() -> None:
    assert files(tar_of(member(b"a", b"1", b"\0", magic=GNU))) == {"a": b"1"}


def test_numbers_are_read_in_every_spelling_of_writers() -> None:
    for size in (
        b"00000000001\0",
        b"000000000001",
        b"0000000001 \0",
        b"          1 ",
        b"1" + bytes(11),
        b"\x80" + bytes(10) + b"\1",
    ):
        assert files(tar_of(archives.header(b"a", size=size), b"1" + bytes(511))) == {"a": b"1"}


def test_the_name_that_counts_is_the_one_an_extended_header_gives() -> None:
    inner = member(b"../ignored", b"1")

    assert files(tar_of(pax(path=b"n" * 200, mtime=b"1.5"), inner)) == {"n" * 200: b"1"}
    assert files(tar_of(member(b"././@LongLink", b"n" * 200 + b"\0", LONG_NAME, magic=GNU), inner)) == {"n" * 200: b"1"}
    assert files(tar_of(pax(mtime=b"1.5"), member(b"a", prefix=b"folder"))) == {"folder/a": b""}
    assert files(tar_of(member(b"a", magic=GNU, prefix=b"1234"))) == {"a": b""}


def test_what_a_name_overrides_ends_with_its_member() -> None:
    assert list(files(tar_of(pax(path=b"b"), member(b"a"), member(b"c")))) == ["b", "c"]


def test_records_of_other_writers_are_harmless() -> None:
    bsdtar = {
        "atime": b"1.5",
        "ctime": b"1.5",
        "LIBARCHIVE.creationtime": b"1.5",
        "LIBARCHIVE.xattr.com.apple.provenance": b"\0\xff\n=",
        "SCHILY.dev": b"1",
        "SCHILY.ino": b"1",
        "SCHILY.nlink": b"1",
        "SCHILY.fflags": b"nodump",
        "SCHILY.acl.access": b"user::rw-",
        "SCHILY.xattr.user.note": b"1",
        "RHT.security.selinux": b"u:r:t",
        "gname": "größe".encode(),
        "size": b"1",
    }

    assert files(tar_of(pax(PAX_GLOBAL, comment=b"0" * 40), pax(**bsdtar), member(b"a", b"1"))) == {"a": b"1"}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs a tar command")
@pytest.mark.parametrize("form", ["ustar", "oldgnu", "gnu", "posix"])
def test_what_the_tar_command_writes_is_read(form: str, tmp_path: Path) -> None:
    contents = {"manifest.json": b"{}", "f/" + "n" * 90 + "/größe.bin": b"2" * 1000, "f/a": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    command = ["tar", f"--format={form}", "-C", str(tmp_path), "-cz", "."]
    assert files(subprocess.run(command, check=True, capture_output=True).stdout) == contents


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs a zip command")
@pytest.mark.parametrize("target", ["folder.zip", "-"])
def test_what_the_zip_command_writes_is_read(target: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "f").mkdir(parents=True)
    (tmp_path / "in" / "f" / "a").write_bytes(bytes(1000))
    (tmp_path / "in" / "manifest.json").write_bytes(b"{}")

    written = subprocess.run(["zip", "-qr", target, "."], cwd=tmp_path / "in", check=True, capture_output=True).stdout
    data = written if target == "-" else (tmp_path / "in" / target).read_bytes()
    assert files(data) == {"f/a": bytes(1000), "manifest.json": b"{}"}


class Pipe(io.RawIOBase):
    """A file that cannot seek."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


def test_a_zip_written_to_a_pipe_has_its_sizes_after_each_file_and_is_read() -> None:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)

    assert b"PK\x07\x08" in pipe.data
    assert files(pipe.data) == FILES


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x1f\x8b\x08", True),
        (b"\x28\xb5\x2f\xfd", True),
        (b"PK\x03\x04", True),
        (b"HLLMEXP\0", True),
        (memoryview(b"PK\x03\x04"), True),
        (b"HLLMEXP", False),
        (b"PK\x05\x06", False),
        (b"APRN", False),
        (b"\x1f", False),
        (b"", False),
    ],
)
def test_a_package_is_told_by_its_first_bytes(data: bytes, expected: bool) -> None:  # noqa: FBT001 - a parameter of the table
    assert is_expert(data) is expected


# Genuine files.


def built(kind: str) -> list[Path]:
    root = os.environ.get("HOCKET_FIXTURES")
    if root is None:
        pytest.skip("set HOCKET_FIXTURES to the folder of genuine files")
    found = sorted((Path(root) / "expert" / "upstream-built" / kind).glob("*.expert"))
    assert found
    return found


def as_tarfile_reads(path: Path) -> Mapping[str, bytes]:
    with tarfile.open(path) as archive:
        return {info.name: cast("Any", archive.extractfile(info)).read() for info in archive}


@pytest.mark.parametrize("kind", ["unsigned", "signed"])
def test_genuine_packages_are_read(kind: str) -> None:
    for path in built(kind):
        assert files(path.read_bytes()) == as_tarfile_reads(path)


def test_of_tampered_packages_those_that_are_bad_archives_are_refused() -> None:
    refused = {
        "absolute-path": Reason.BAD_FILE_NAME,
        "path-traversal": Reason.BAD_FILE_NAME,
        "symlink-entry": Reason.BAD_FILE_TYPE,
        "truncated-gzip": Reason.BAD_ARCHIVE,
        "duplicate-manifest-entry": Reason.DUPLICATE_FILE,
    }

    for path in built("tampered"):
        assert reason(path.read_bytes()) == refused.pop(path.stem, None), path.stem
    assert not refused


# What is refused.


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_archive_is_refused_beside_a_twin_that_is_read(name: str) -> None:
    attack = ATTACKS[name]

    assert reason(attack.refused()) is attack.reason
    assert reason(attack.accepted()) is None


@pytest.mark.parametrize("name", ["zstd bomb", "zeros after the end", "a file above the ratio", "a gigabyte claimed"])
def test_a_bomb_takes_little_memory(name: str) -> None:
    """Of every attack, and with a limit on time: `tests/long/test_hostile_experts.py`."""
    data = ATTACKS[name].refused()
    cost = archives.cost(lambda: read_archive(data))

    assert cost.peak_bytes < archives.REFUSAL_BYTES_MAX


def test_every_truncation_is_refused() -> None:
    for data in (archives.expert_bytes(), archives.zstd(archives.tar_bytes()), archives.zip_bytes()):
        assert {reason(data[:size]) for size in range(4, len(data), 3)} == {Reason.BAD_ARCHIVE}


NINE = {f"f{number}": b"12345678" for number in range(9)}
ZEROS = {"a.safetensors": bytes(4096)}
EMPTY = {"a": b""}
DEEP = {"a/b/c": b""}
LONG = archives.gzipped(pax(path=b"n" * 100) + member(b"a") + END)


@pytest.mark.parametrize(
    ("limit", "least", "data"),
    [
        ("package_bytes", len(archives.expert_bytes()), archives.expert_bytes()),
        ("archive_bytes", 72, archives.expert_bytes(NINE)),
        ("archive_bytes", 72, archives.zip_bytes(NINE)),
        ("archive_files", 9, archives.expert_bytes(NINE)),
        ("archive_files", 9, archives.zip_bytes(NINE)),
        ("archive_text_bytes", 8, archives.expert_bytes(NINE)),
        ("archive_text_bytes", 8, archives.zip_bytes(NINE)),
        ("archive_text_bytes", 0, archives.expert_bytes(ZEROS)),
        ("archive_end_bytes", 8704, archives.expert_bytes(EMPTY)),
        ("archive_end_bytes", 8704, archives.zstd(archives.tar_bytes(EMPTY))),
        ("archive_ratio_free_bytes", 4096, archives.zip_bytes(ZEROS)),
        ("archive_ratio_free_bytes", 10240, archives.expert_bytes(ZEROS)),
        ("archive_ratio_free_bytes", 10240, archives.zstd(archives.tar_bytes(ZEROS))),
        ("file_name_chars", 100, LONG),
        ("file_name_depth", 3, archives.expert_bytes(DEEP)),
        ("pax_bytes", 110, LONG),
        ("zstd_window_bytes", 1024, archives.zstd(archives.tar_bytes(ZEROS))),
    ],
)
def test_a_limit_admits_its_value_and_nothing_beyond(limit: str, least: int, data: bytes) -> None:
    limits = replace(DEFAULT_LIMITS, archive_ratio=0) if limit == "archive_ratio_free_bytes" else DEFAULT_LIMITS
    if limit == "zstd_window_bytes":
        least = zstandard.get_frame_parameters(data).window_size

    assert reason(data, replace(limits, **{limit: least})) is None
    if least:
        expected = Reason.BAD_FILE_NAME if limit.startswith("file_name") else Reason.TOO_LARGE
        assert reason(data, replace(limits, **{limit: least - 1})) is expected


def test_the_ratio_is_that_of_what_came_out_so_far() -> None:
    limits = replace(DEFAULT_LIMITS, archive_ratio_free_bytes=0)
    for data in (archives.gzipped(archives.tar_bytes(ZEROS)), archives.zip_bytes(ZEROS)):
        assert reason(data, replace(limits, archive_ratio=1000)) is None
        assert reason(data, replace(limits, archive_ratio=2)) is Reason.TOO_LARGE


def test_what_comes_out_has_a_maximum_that_headers_and_the_end_count_in() -> None:
    limits = replace(DEFAULT_LIMITS, archive_bytes=7, archive_files=2, archive_end_bytes=0)
    small, large = (tar_of(pax(comment=bytes(size)), member(b"a", b"content")) for size in (4000, 8000))

    assert reason(small, limits) is None
    assert reason(large, limits) is Reason.TOO_LARGE
    assert reason(large, replace(limits, archive_files=3)) is None
    assert reason(large, replace(limits, archive_bytes=7000)) is None
    assert reason(large, replace(limits, archive_end_bytes=7000)) is None


def test_weights_that_are_half_zeros_are_far_from_the_ratio() -> None:
    """As those of a LoRA that has not been trained, with a B wider than its A."""
    noise = random.Random(0)
    weights = b"".join(noise.randbytes(2**16) + bytes(3 * 2**16) for _ in range(8))
    limits = replace(DEFAULT_LIMITS, archive_ratio_free_bytes=0)

    assert reason(tar_of(member(b"a.safetensors", weights)), limits) is None


def test_a_refusal_shows_no_more_of_a_name_than_fits() -> None:
    with pytest.raises(HocketError) as refusal:
        read_archive(tar_of(pax(path="ß".encode() * 30000), member(b"a")))

    assert len(str(refusal.value)) < 1000
    assert refusal.value.metadata["file"].isascii()


def test_a_name_is_checked_by_itself_too() -> None:
    assert safe_name("./soft_prompts/style.safetensors") == "soft_prompts/style.safetensors"
    assert safe_name("größe") == "größe"
    with pytest.raises(HocketError, match="has a part that is empty") as refusal:
        safe_name("soft_prompts/../../x")
    assert refusal.value.reason is Reason.BAD_FILE_NAME


def test_zstandard_s_own_stream_goes_on_to_the_next_frame_though_told_not_to() -> None:
    """Why a frame is walked block by block. When this fails, the library can do it."""
    two = archives.zstd(b"one") + archives.zstd(b"two")

    with zstandard.ZstdDecompressor().stream_reader(two, read_across_frames=False) as reader:
        assert reader.read(100) + reader.read(100) == b"onetwo"


def test_what_python_s_own_readers_let_pass_is_why_there_are_ours() -> None:
    """The examples of docs/adr/0008-archives.md."""
    damaged = member(b"a", b"1") + member(b"b", chksum=b"000001\0 ") + member(b"c") + END
    with tarfile.open(fileobj=io.BytesIO(damaged)) as archive:
        assert archive.getnames() == ["a"]

    for attack, size in (("PAX size overrides", 1024), ("PAX sparse file", 10**12)):
        with tarfile.open(fileobj=io.BytesIO(ATTACKS[attack].refused())) as archive:
            assert [info.size for info in archive] == [size]
    for attack in ("gzip checksum", "two gzip members", "gzip, then zip"):
        with tarfile.open(fileobj=io.BytesIO(ATTACKS[attack].refused())) as archive:
            assert archive.getnames() == ["a"]
    for attack in (
        "zip headers disagree: size",
        "zip headers disagree: method",
        "zip with a prefix",
        "zip inside gzip",
    ):
        with zipfile.ZipFile(io.BytesIO(ATTACKS[attack].refused())) as zipped:
            assert zipped.read("a")
