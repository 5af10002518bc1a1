from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hocket import known_bases
from hocket.base_folder import base_digest
from hocket.errors import HocketError, Reason
from hocket.known_bases import KnownBase
from tests.bases import hollow_base

DIGEST = "sha256:" + "ab" * 32


def text_of(name: str = "tiny", path: str = "/models/tiny", digest: str = DIGEST) -> str:
    return f'name = "{name}"\npath = "{path}"\ndigest = "{digest}"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "bases"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return hollow_base(tmp_path / "Tiny-0.1B")


class TestAdding:
    def test_a_base_is_known_by_its_folder_s_name_and_digest(self, folder: Path, base: Path) -> None:
        added = known_bases.add(folder, base)

        assert added == KnownBase("tiny-0.1b", base, base_digest(base))
        assert known_bases.read(folder).bases == (added,)
        assert (folder / "tiny-0.1b.toml").stat().st_mode & 0o777 == 0o644
        assert [path.name for path in folder.iterdir()] == ["tiny-0.1b.toml"]

    def test_a_model_of_the_hub_s_cache_is_called_by_its_id(self, folder: Path, tmp_path: Path) -> None:
        base = hollow_base(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de2")

        assert known_bases.add(folder, base).name == "qwen3-0.6b"

    def test_a_relative_path_is_kept_absolute(self, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(base.parent)

        assert known_bases.add(folder, Path(base.name)).path == base

    @pytest.mark.parametrize("name", ["with space", 'quo"te', "tab\there", "back\\slash", "é東🎉", "del\x7f"])
    def test_every_path_reads_back(self, folder: Path, tmp_path: Path, name: str) -> None:
        base = hollow_base(tmp_path / name)
        if name == "del\x7f":  # TOML has no place for it
            with pytest.raises(HocketError, match="plainer path"):
                known_bases.add(folder, base, name="x")
        else:
            assert known_bases.read(folder).find("") is None
            assert known_bases.add(folder, base, name="x") == known_bases.read(folder).find("x")

    def test_a_path_that_is_no_text_is_refused(self, folder: Path, tmp_path: Path) -> None:
        base = hollow_base(tmp_path / os.fsdecode(b"\xff"))

        with pytest.raises(HocketError, match="plainer path"):
            known_bases.add(folder, base, name="x")
        assert known_bases.read(folder).bases == ()

    def test_progress_is_told(self, folder: Path, base: Path) -> None:
        told: list[tuple[int, int]] = []
        known_bases.add(folder, base, on_progress=lambda done, total: told.append((done, total)))

        size = sum(path.stat().st_size for path in base.iterdir())
        assert told[-1] == (size, size)

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
    def test_a_folder_that_is_no_base_is_refused(self, folder: Path, base: Path, missing: str) -> None:
        (base / missing).unlink()

        with pytest.raises(HocketError, match="is no base model") as refusal:
            known_bases.add(folder, base)
        assert refusal.value.reason is Reason.BAD_REQUEST

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("config.json", b"{", "config.json in .* cannot be read"),
            ("config.json", b"[]", "names no model_type"),
            ("model.safetensors", b"x", "model.safetensors in .* is damaged"),
            ("tokenizer.json", None, "has no tokenizer.json"),
        ],
    )
    def test_what_no_worker_could_open_is_refused(
        self, folder: Path, base: Path, name: str, content: bytes | None, says: str
    ) -> None:
        sound = (base / name).read_bytes()
        (base / name).unlink()
        if content is not None:
            (base / name).write_bytes(content)
        with pytest.raises(HocketError, match=says) as refusal:
            known_bases.add(folder, base)
        assert refusal.value.reason is Reason.BAD_REQUEST
        (base / name).write_bytes(sound)
        known_bases.add(folder, base)

    def test_what_is_no_folder_is_refused(self, folder: Path, base: Path) -> None:
        (base.parent / "loop").symlink_to("loop")
        for path in (base / "config.json", base / "none", base.parent / "loop"):
            with pytest.raises(HocketError, match="is no folder"):
                known_bases.add(folder, path)

    @pytest.mark.parametrize("name", ["Tiny", "a/b", "../x", "", "sha256:12"])
    def test_a_name_that_cannot_be_one_is_refused(self, folder: Path, base: Path, name: str) -> None:
        with pytest.raises(HocketError, match="not a valid name of a base"):
            known_bases.add(folder, base, name=name)
        assert not folder.exists()

    def test_a_folder_with_no_fit_name_needs_one(self, folder: Path, tmp_path: Path) -> None:
        base = hollow_base(tmp_path / "my model")

        with pytest.raises(HocketError, match="--name"):
            known_bases.add(folder, base)
        assert known_bases.add(folder, base, name="my-model").name == "my-model"

    def test_a_name_stays_with_its_base_unless_it_is_replaced(self, folder: Path, base: Path, tmp_path: Path) -> None:
        known = known_bases.add(folder, base, name="x")
        other = hollow_base(tmp_path / "other", b"xyz")

        with pytest.raises(HocketError) as refusal:
            known_bases.add(folder, other, name="x")
        assert refusal.value.reason is Reason.NAME_TAKEN
        assert known_bases.read(folder).bases == (known,)
        assert known_bases.add(folder, other, name="x", replace=True).path == other
        assert known_bases.read(folder).bases == (KnownBase("x", other, base_digest(other)),)

    def test_a_base_that_has_moved_is_added_again(self, folder: Path, base: Path, tmp_path: Path) -> None:
        known_bases.add(folder, base, name="x")
        base.rename(tmp_path / "moved")

        assert known_bases.add(folder, tmp_path / "moved", name="x").path == tmp_path / "moved"

    def test_a_damaged_file_is_not_written_over_by_accident(self, folder: Path, base: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "x.toml").write_text("name =")

        with pytest.raises(HocketError, match=r"not TOML.*--replace mends it"):
            known_bases.add(folder, base, name="x")
        assert known_bases.add(folder, base, name="x", replace=True).path == base

    def test_of_two_that_take_a_name_at_once_one_gets_it(
        self, folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both have found it free: the other one is named while this one hashes."""
        other = hollow_base(tmp_path / "other", b"xyz")
        add, write = known_bases.add, known_bases._write

        def overtaken(*arguments: Any, **options: Any) -> bool:
            monkeypatch.setattr(known_bases, "_write", write)
            add(folder, other, name="x")
            return write(*arguments, **options)

        monkeypatch.setattr(known_bases, "_write", overtaken)
        with pytest.raises(HocketError) as refusal:
            known_bases.add(folder, base, name="x")
        assert refusal.value.reason is Reason.NAME_TAKEN
        assert known_bases.read(folder).bases == (KnownBase("x", other, base_digest(other)),)
        assert [path.name for path in folder.iterdir()] == ["x.toml"]

    def test_what_is_no_file_is_not_written_over_by_accident(self, folder: Path, base: Path, tmp_path: Path) -> None:
        folder.mkdir(parents=True)
        (tmp_path / "precious").write_text("precious")
        (folder / "x.toml").symlink_to(tmp_path / "nowhere")
        (folder / "y.toml").symlink_to(tmp_path / "precious")
        (folder / "z.toml").mkdir()

        for name in "xyz":
            with pytest.raises(HocketError, match="--replace mends it"):
                known_bases.add(folder, base, name=name)
        known_bases.add(folder, base, name="x", replace=True)
        known_bases.add(folder, base, name="y", replace=True)
        with pytest.raises(HocketError, match="cannot be written"):
            known_bases.add(folder, base, name="z", replace=True)
        assert sorted(path.name for path in folder.iterdir()) == ["x.toml", "y.toml", "z.toml"]
        assert (tmp_path / "precious").read_text() == "precious"
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize(("at", "taken"), [("/models/tiny", True), ("/models\0/tiny", False), ("models", False)])
    def test_where_workers_find_it_is_a_path(self, folder: Path, base: Path, at: str, *, taken: bool) -> None:
        if taken:
            assert known_bases.add(folder, base, at=Path(at)).path == Path(at)
        else:
            with pytest.raises(HocketError, match=r"plainer path|no absolute path"):
                known_bases.add(folder, base, at=Path(at))
            assert known_bases.read(folder).bases == ()

    def test_a_folder_that_cannot_be_written_is_said_so(self, folder: Path, base: Path) -> None:
        folder.parent.mkdir()
        folder.write_bytes(b"")

        with pytest.raises(HocketError, match="cannot be written") as refusal:
            known_bases.add(folder, base)
        assert refusal.value.reason is Reason.BAD_REQUEST


class TestReading:
    def test_without_a_folder_no_base_is_known(self, folder: Path) -> None:
        assert known_bases.read(folder) == known_bases.KnownBases(folder)

    def test_other_files_are_ignored(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in ("README.md", ".tiny.toml.new", ".tiny.toml", "tiny.toml.bak"):
            (folder / name).write_text("x")

        assert known_bases.read(folder) == known_bases.KnownBases(folder)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"name =",
            b"\xff",
            text_of("other").encode(),
            text_of(path="models/tiny").encode(),
            text_of(digest="sha256:12").encode(),
            text_of().encode() + b'more = "x"\n',
            text_of().encode().replace(b"name", b"nome"),
            text_of().encode().replace(b'"tiny"', b"3"),
            text_of().encode() + b"#" * 65536,
        ],
    )
    def test_a_bad_file_is_left_out_and_reported(self, folder: Path, content: bytes) -> None:
        folder.mkdir(parents=True)
        (folder / "good.toml").write_text(text_of("good"))
        (folder / "tiny.toml").write_bytes(content)
        known = known_bases.read(folder)

        assert [base.name for base in known.bases] == ["good"]
        assert [problem.reason for problem in known.problems] == [Reason.BAD_REQUEST]
        (folder / "tiny.toml").write_text(text_of())
        assert [base.name for base in known_bases.read(folder).bases] == ["good", "tiny"]

    def test_a_misnamed_file_is_left_out(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "Tiny.toml").write_text(text_of("Tiny"))

        assert known_bases.read(folder).bases == ()
        assert "not a valid name" in known_bases.read(folder).problems[0].message

    def test_what_is_not_a_file_is_left_out_without_waiting_for_it(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        os.mkfifo(folder / "pipe.toml")
        (folder / "folder.toml").mkdir()
        (folder / "gone.toml").symlink_to("nowhere")

        assert len(known_bases.read(folder).problems) == 3

    def test_a_file_in_place_of_the_folder_is_reported(self, folder: Path) -> None:
        folder.parent.mkdir()
        folder.write_bytes(b"")
        known = known_bases.read(folder)

        assert (known.bases, len(known.problems)) == ((), 1)


class TestFinding:
    @pytest.fixture
    def known(self, folder: Path) -> known_bases.KnownBases:
        bases = (KnownBase("qwen3-0.6b", Path("/a"), DIGEST), KnownBase("tiny", Path("/b"), "sha256:" + "cd" * 32))
        return known_bases.KnownBases(folder, bases)

    @pytest.mark.parametrize("wanted", ["qwen3-0.6b", "Qwen3-0.6B", "Qwen/Qwen3-0.6B", DIGEST])
    def test_a_base_is_found_by_name_or_digest(self, known: known_bases.KnownBases, wanted: str) -> None:
        assert known.find(wanted) is known.bases[0]

    @pytest.mark.parametrize("wanted", ["qwen3", DIGEST[:-1], "sha256:" + "00" * 32])
    def test_an_unknown_one_is_refused_with_those_there_are(self, known: known_bases.KnownBases, wanted: str) -> None:
        with pytest.raises(HocketError, match=r"there are qwen3-0\.6b, tiny") as refusal:
            known.find(wanted)
        assert refusal.value.reason is Reason.UNKNOWN_BASE

    def test_the_only_one_needs_no_name(self, known: known_bases.KnownBases, folder: Path) -> None:
        with pytest.raises(HocketError, match=r"qwen3-0\.6b, tiny") as refusal:
            known.find("")
        assert refusal.value.reason is Reason.BAD_REQUEST
        assert known_bases.KnownBases(folder, known.bases[:1]).find("") is known.bases[0]

    def test_without_any_there_is_none(self, folder: Path) -> None:
        assert known_bases.KnownBases(folder).find("") is None
        with pytest.raises(HocketError, match="there is none yet"):
            known_bases.KnownBases(folder).find("tiny")


class TestRemoving:
    def test_a_base_is_removed_by_name_or_digest(self, folder: Path, base: Path) -> None:
        for wanted in ("tiny-0.1b", base_digest(base)):
            known = known_bases.add(folder, base)
            assert known_bases.remove(folder, wanted) == known
            assert known_bases.read(folder).bases == ()
        assert base.is_dir()

    @pytest.mark.parametrize(("name", "reason"), [("other", Reason.UNKNOWN_BASE), ("", Reason.BAD_REQUEST)])
    def test_what_is_not_there_is_refused(self, folder: Path, base: Path, name: str, reason: Reason) -> None:
        known_bases.add(folder, base)

        with pytest.raises(HocketError) as refusal:
            known_bases.remove(folder, name)
        assert refusal.value.reason is reason
        assert len(known_bases.read(folder).bases) == 1

    def test_a_file_that_cannot_be_removed_is_said_so(
        self, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known_bases.add(folder, base)

        def refuse(_path: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(HocketError, match="cannot be removed"):
            known_bases.remove(folder, "tiny-0.1b")
