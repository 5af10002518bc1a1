from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from hocket.errors import HocketError, Reason
from hocket.identity import key_text
from hocket.packages.keys import public_key_of
from hocket.packages.trust import TRUST_FILE_SIZE_BYTES_MAX
from hocket.trust_folder import TrustFolder
from tests.signing import ACME_ID, ACME_SEED, NOW, STRANGER_ID, STRANGER_SEED, ZETA_ID, ZETA_SEED, trusted


def text_of(seed: bytes = ACME_SEED) -> str:
    return f'[[keys]]\nkey = "{key_text(public_key_of(seed))}"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trust"
    path.mkdir()
    (path / "acme.toml").write_text(text_of())
    (path / "zeta.toml").write_text(text_of(ZETA_SEED))
    return path


@pytest.fixture
def folder(path: Path) -> TrustFolder:
    return TrustFolder(path)


def trusted_publishers(folder: TrustFolder) -> set[str]:
    with capture_logs() as logs:
        publishers = {key.publisher for key in folder.read().keys.values()}
    assert [entry["problem"] for entry in logs] == [problem.message for problem in folder.problems]
    assert {problem.reason for problem in folder.problems} <= {Reason.BAD_TRUST_FILE}
    return publishers


class TestReading:
    def test_each_file_states_the_keys_of_the_publisher_it_is_named_after(self, folder: TrustFolder) -> None:
        assert folder.read().keys == {ACME_ID: trusted(), ZETA_ID: trusted(ZETA_SEED, "zeta")}
        assert folder.problems == ()

    def test_without_a_folder_nobody_is_trusted(self, tmp_path: Path) -> None:
        folder = TrustFolder(tmp_path / "none")
        assert folder.read().keys == {}
        assert folder.problems == ()

    def test_other_files_are_ignored(self, folder: TrustFolder, path: Path) -> None:
        for name in ("README.md", "acme.toml.bak", ".hidden.toml", "toml", ".acme.toml.new"):
            (path / name).write_text("not a trust file")
        (path / "subfolder").mkdir()
        assert trusted_publishers(folder) == {"acme", "zeta"}
        assert folder.problems == ()

    def test_files_linked_from_elsewhere_are_read(self, folder: TrustFolder, path: Path) -> None:
        (path / "..data").mkdir()
        (path / "acme.toml").rename(path / "..data" / "acme.toml")
        (path / "acme.toml").symlink_to(Path("..data") / "acme.toml")
        assert trusted_publishers(folder) == {"acme", "zeta"}
        assert folder.problems == ()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[[keys",
            text_of() + "colour = 1",
            text_of() + "#" * TRUST_FILE_SIZE_BYTES_MAX,
            text_of() + "# \udcff",
        ],
    )
    def test_a_bad_file_takes_only_its_own_publisher_away(self, folder: TrustFolder, path: Path, text: str) -> None:
        (path / "acme.toml").write_text(text, errors="surrogateescape")
        assert trusted_publishers(folder) == {"zeta"}
        assert len(folder.problems) == 1

    def test_a_misnamed_file_is_left_out(self, folder: TrustFolder, path: Path) -> None:
        (path / "acme.toml").rename(path / "Acme Inc.toml")
        assert trusted_publishers(folder) == {"zeta"}
        assert len(folder.problems) == 1

    def test_a_loop_of_links_is_left_out(self, folder: TrustFolder, path: Path) -> None:
        (path / "acme.toml").unlink()
        (path / "acme.toml").symlink_to("acme.toml")
        assert trusted_publishers(folder) == {"zeta"}
        assert len(folder.problems) == 1

    def test_what_is_not_a_file_is_left_out_without_waiting_for_it(self, folder: TrustFolder, path: Path) -> None:
        os.mkfifo(path / "pipe.toml")
        (path / "folder.toml").mkdir()
        assert trusted_publishers(folder) == {"acme", "zeta"}
        assert len(folder.problems) == 2

    def test_reading_a_folder_in_place_of_a_file_leaks_no_descriptor(self, folder: TrustFolder, path: Path) -> None:
        (path / "folder.toml").mkdir()
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
        for _ in range(5):
            trusted_publishers(folder)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - names are enough

    def test_a_key_in_two_files_speaks_for_neither(self, folder: TrustFolder, path: Path) -> None:
        (path / "evil.toml").write_text(text_of())
        assert trusted_publishers(folder) == {"zeta"}
        assert [problem.message.split(" list ")[0] for problem in folder.problems] == ["acme and evil"]

    def test_a_file_in_place_of_the_folder_trusts_nobody(self, tmp_path: Path) -> None:
        (tmp_path / "trust").touch()
        folder = TrustFolder(tmp_path / "trust")
        assert trusted_publishers(folder) == set()
        assert len(folder.problems) == 1
        assert not folder.changed()

    def test_a_mended_file_counts_again(self, folder: TrustFolder, path: Path) -> None:
        (path / "acme.toml").write_text("[[keys")
        assert trusted_publishers(folder) == {"zeta"}
        (path / "acme.toml").write_text(text_of())
        assert trusted_publishers(folder) == {"acme", "zeta"}
        assert folder.problems == ()


class TestChange:
    def test_a_folder_not_yet_read_has_changed(self, folder: TrustFolder) -> None:
        assert folder.changed()
        folder.read()
        assert not folder.changed()

    def test_each_kind_of_change_is_seen_until_it_is_read(self, folder: TrustFolder, path: Path) -> None:
        def add() -> None:
            (path / "new.toml").write_text(text_of(STRANGER_SEED))

        def edit() -> None:
            (path / "new.toml").write_text(text_of(STRANGER_SEED) + "# edited")

        def replace_with_one_of_the_same_size_and_time() -> None:
            old = (path / "new.toml").stat()
            (path / "other").write_bytes(b"#" * old.st_size)
            os.utime(path / "other", ns=(old.st_atime_ns, old.st_mtime_ns))
            (path / "other").replace(path / "new.toml")

        def remove() -> None:
            (path / "new.toml").unlink()

        def remove_everything() -> None:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()

        folder.read()
        for change in (add, edit, replace_with_one_of_the_same_size_and_time, remove, remove_everything):
            change()
            assert folder.changed(), change.__name__
            with capture_logs():
                folder.read()
            assert not folder.changed(), change.__name__

    def test_other_files_do_not_count_as_a_change(self, folder: TrustFolder, path: Path) -> None:
        folder.read()
        (path / "README.md").touch()
        assert not folder.changed()


class TestEditing:
    def test_an_added_key_is_trusted(self, tmp_path: Path) -> None:
        folder = TrustFolder(tmp_path / "new" / "trust")
        key = trusted(names=("iris",), not_before=NOW, not_after=NOW + timedelta(days=1))
        folder.add_key(key)
        assert folder.read().keys == {ACME_ID: key}

    def test_a_publisher_may_have_several_keys(self, folder: TrustFolder) -> None:
        folder.add_key(trusted(STRANGER_SEED, "acme"))
        assert folder.read().keys.keys() == {ACME_ID, ZETA_ID, STRANGER_ID}

    def test_adding_a_key_again_changes_its_terms(self, folder: TrustFolder) -> None:
        folder.add_key(trusted(names=("iris",)))
        assert folder.read().keys[ACME_ID].names == ("iris",)

    def test_a_removed_key_is_trusted_no_more(self, folder: TrustFolder, path: Path) -> None:
        folder.add_key(trusted(STRANGER_SEED, "acme"))
        assert folder.remove_key(ACME_ID) == (trusted(),)
        assert folder.read().keys.keys() == {ZETA_ID, STRANGER_ID}
        assert folder.remove_key(STRANGER_ID) == (trusted(STRANGER_SEED, "acme"),)
        assert sorted(file.name for file in path.iterdir()) == ["zeta.toml"]

    def test_removing_ends_an_ambiguity(self, folder: TrustFolder, path: Path) -> None:
        (path / "evil.toml").write_text(text_of())
        assert {key.publisher for key in folder.remove_key(ACME_ID)} == {"acme", "evil"}
        assert folder.read().keys.keys() == {ZETA_ID}

    def test_a_key_of_another_publisher_is_not_added(self, folder: TrustFolder) -> None:
        with pytest.raises(HocketError) as refusal:
            folder.add_key(trusted(publisher="zeta"))
        assert refusal.value.reason is Reason.NAME_TAKEN
        assert folder.read().keys[ACME_ID].publisher == "acme"

    @pytest.mark.parametrize("publisher", ["../escape", "a/b", "", ".acme", "A"])
    def test_only_a_name_becomes_a_file_name(self, folder: TrustFolder, path: Path, publisher: str) -> None:
        with pytest.raises(HocketError) as refusal:
            folder.add_key(trusted(STRANGER_SEED, publisher))
        assert refusal.value.reason is Reason.BAD_REQUEST
        assert len(list(path.parent.rglob("*.toml"))) == 2

    @pytest.mark.parametrize("terms", [{"names": ("Iris",)}, {"names": ()}, {"not_before": NOW, "not_after": NOW}])
    def test_terms_that_could_not_be_read_back_are_not_written(
        self, folder: TrustFolder, terms: dict[str, object]
    ) -> None:
        with pytest.raises(HocketError) as refusal:
            folder.add_key(trusted(STRANGER_SEED, "acme", **terms))
        assert refusal.value.reason is Reason.BAD_TRUST_FILE
        assert folder.read().keys.keys() == {ACME_ID, ZETA_ID}

    def test_a_bad_file_is_not_overwritten(self, folder: TrustFolder, path: Path) -> None:
        (path / "acme.toml").write_text("[[keys")
        with pytest.raises(HocketError, match="BAD_TRUST_FILE"):
            folder.add_key(trusted())
        assert (path / "acme.toml").read_text() == "[[keys"

    def test_a_bad_file_does_not_hinder_work_on_others(self, folder: TrustFolder, path: Path) -> None:
        (path / "broken.toml").write_text("[[keys")
        folder.add_key(trusted(STRANGER_SEED, "acme"))
        assert folder.remove_key(STRANGER_ID)

    def test_removing_a_stranger_is_refused(self, folder: TrustFolder) -> None:
        with pytest.raises(HocketError) as refusal:
            folder.remove_key(STRANGER_ID)
        assert refusal.value.reason is Reason.SIGNER_NOT_TRUSTED

    def test_files_are_readable_by_the_services_whoever_writes_them(self, folder: TrustFolder, path: Path) -> None:
        old = os.umask(0o077)
        try:
            folder.add_key(trusted(STRANGER_SEED, "new"))
        finally:
            os.umask(old)
        assert (path / "new.toml").stat().st_mode & 0o777 == 0o644

    def test_a_folder_that_cannot_be_written_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(HocketError) as refusal:
            TrustFolder(tmp_path / "file" / "trust").add_key(trusted())
        assert refusal.value.reason is Reason.BAD_TRUST_FILE

    def test_a_file_that_cannot_be_written_leaves_trust_as_it_was(
        self, folder: TrustFolder, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        there = sorted(path.iterdir())

        def fail(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(HocketError, match="No space left") as refusal:
            folder.add_key(trusted(names=("iris",)))
        assert refusal.value.reason is Reason.BAD_TRUST_FILE
        assert sorted(path.iterdir()) == there
        assert folder.read().keys[ACME_ID] == trusted()
