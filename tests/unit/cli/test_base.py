from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hocket.base_folder import base_digest
from tests.bases import hollow_base

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return hollow_base(tmp_path / "models" / "Tiny-0.1B")


def test_a_base_is_added_listed_and_removed(hocket: Any, home: Path, base: Path) -> None:
    added = hocket("base", "add", base, "--json")
    described = {"name": "tiny-0.1b", "digest": base_digest(base), "path": str(base)}

    assert (added.code, added.document) == (0, described)
    assert (home / ".local" / "share" / "hocket" / "bases" / "tiny-0.1b.toml").exists()
    assert hocket("base", "list", "--json").document == {"bases": [{**described, "state": "present"}]}
    assert hocket("base", "remove", "tiny-0.1b", "--json").document == described
    assert hocket("base", "list", "--json").document == {"bases": []}


def test_the_same_for_people(hocket: Any, tmp_path: Path, base: Path) -> None:
    data = ("--data", tmp_path / "data")
    assert "No base yet: `hocket base add PATH`" in hocket("base", "list", *data).out
    added = hocket("base", "add", base, *data).out
    assert base_digest(base) in added
    assert added.endswith(f"Next: hocket up --data {tmp_path / 'data'}\n      hocket generate 'YOUR PROMPT'\n")
    assert "--base other" in hocket("base", "add", base, "--name", "other", *data).out
    listed = hocket("base", "list", *data).out.splitlines()
    assert [line.split() for line in listed] == [
        ["name", "digest", "state", "folder"],
        ["other", base_digest(base)[:19], "present", str(base)],
        ["tiny-0.1b", base_digest(base)[:19], "present", str(base)],
    ]
    assert "tiny-0.1b may no longer be served" in hocket("base", "remove", "Tiny-0.1B", *data).out
    assert hocket("base", "list").out.startswith("No base yet")


def test_a_check_reads_the_folder_again(hocket: Any, base: Path) -> None:
    hocket("base", "add", base)
    unchanged = hocket("base", "list", "--check", "--json")
    assert (unchanged.code, unchanged.document["bases"][0]["state"]) == (0, "unchanged")

    (base / "model.safetensors").write_bytes(b"tampered")
    assert hocket("base", "list", "--json").document["bases"][0]["state"] == "present"
    changed = hocket("base", "list", "--check")
    assert (changed.code, "changed" in changed.out) == (2, True)

    (base / "config.json").unlink()
    changed = hocket("base", "list", "--check", "--json")
    assert (changed.code, changed.document["bases"][0]["state"]) == (2, "changed")
    assert "is no base model" in changed.err

    base.rename(base.with_name("gone"))
    assert hocket("base", "list", "--json").document["bases"][0]["state"] == "missing"
    assert hocket("base", "list", "--check").code == 2


def test_a_name_goes_to_another_base_only_when_told(hocket: Any, base: Path) -> None:
    hocket("base", "add", base, "--name", "x")
    (base / "config.json").write_bytes(b'{"model_type": "other"}')

    refused = hocket("base", "add", base, "--name", "x", "--json")
    assert (refused.code, refused.document["error"]["reason"]) == (2, "NAME_TAKEN")
    assert "--replace" in refused.document["error"]["message"]
    assert hocket("base", "add", base, "--name", "x", "--replace", "--json").document["digest"] == base_digest(base)


def test_a_base_is_told_to_be_where_containers_find_it(hocket: Any, home: Path, base: Path) -> None:
    added = hocket("base", "add", base, "--at", "/models/Tiny-0.1B", "--json")

    assert (added.document["path"], added.document["digest"]) == ("/models/Tiny-0.1B", base_digest(base))
    assert 'path = "/models/Tiny-0.1B"' in (home / ".local/share/hocket/bases/tiny-0.1b.toml").read_text()
    assert hocket("base", "list", "--json").document["bases"][0]["state"] == "missing"  # it is, here
    assert hocket("base", "add", base, "--at", "/models/Tiny-0.1B").out.endswith("have to be started again.\n")


def test_where_containers_find_it_does_not_depend_on_where_we_are(hocket: Any, base: Path) -> None:
    refused = hocket("base", "add", base, "--at", "models/Tiny-0.1B", "--json")

    assert (refused.code, refused.document["error"]["reason"]) == (2, "BAD_REQUEST")
    assert "models/Tiny-0.1B is no absolute path" in refused.document["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("add", "nowhere"), "BAD_REQUEST"),
        (("add", "."), "BAD_REQUEST"),
        (("remove", "nobody"), "UNKNOWN_BASE"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    hocket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = hocket("base", *arguments, "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, reason)


def test_a_file_that_had_to_be_left_out_is_named(hocket: Any, tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "x.toml").write_text("name =")
    outcome = hocket("base", "list", "--data", tmp_path, "--json")

    assert outcome.document == {"bases": []}
    assert "warning: " in outcome.err
    assert "x.toml is not TOML" in outcome.err


@pytest.mark.parametrize("wanted", ["tiny", "sha256:" + "ab" * 32])
def test_up_tells_the_worker_which_base(hocket: Any, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _program, arguments: commands.append(arguments))
    hocket("up", "--base", wanted, "--data", "d")

    settings = {"router.data_dir=d", "registry.data_dir=d", "worker.data_dir=d", "worker.bases_dir=d/bases"}
    assert set(commands[0][6:]) == {"--set", f"worker.base={wanted}", *settings}
