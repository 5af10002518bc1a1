from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hocket import sources
from hocket.errors import HocketError, Reason
from hocket.git import check_address, opened
from hocket.packages import Limits
from hocket.packages.release import ENVELOPE_SIZE_BYTES_MAX
from hocket.sources import InRepository, Named, PackageFile, find, parse_source, read_index, repositories, search
from hocket.versions import Range
from tests.repositories import commit, git, repository
from tests.signing import envelope_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hocket.git import Repository

HTTPS = "https://git.example.org/acme/experts"


def package(name: str, path: str = "") -> dict[str, bytes]:
    """A package file, which nobody opens here, and its release as `publisher/name@version`."""
    data = f"package {name}".encode()
    path = path or f"{name.replace('/', '-')}.expert"
    return {path: data, f"{path}.release.json": envelope_of(data, name=name, format="expert")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return repository(tmp_path / "tree")


_open: list[Callable[[str], Repository]] = []


@pytest.fixture(autouse=True)
def _open_once() -> Iterator[None]:
    """Repositories stay open until the end of a test, which saves the time to fetch the same again."""
    with repositories() as get:
        _open[:] = [get]
        yield


def found(folder: Path, wanted: str = "*", **options: Any) -> str:
    """The release that is chosen in a repository, after a look at what would be loaded."""
    _, offer = find(_open[0](check_address(str(folder))), Range.parse(wanted), **options)
    assert offer.load() == f"package {offer.claim}".encode()
    return str(offer.claim)


def refusal(folder: Path, wanted: str = "*", **options: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        found(folder, wanted, **options)
    return caught.value


# What people write


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("sql.expert", PackageFile(Path("sql.expert"))),
        ("./a b/iris.apr", PackageFile(Path("a b/iris.apr"))),
        (HTTPS, InRepository(HTTPS)),
        (f"git+{HTTPS}", InRepository(HTTPS)),
        (f"{HTTPS}@>=1.0.0,<2.0.0", InRepository(HTTPS, Range.parse(">=1.0.0,<2.0.0"))),
        (f"{HTTPS}@1.0.0#main", InRepository(HTTPS, Range.parse("1.0.0"), "main")),
        (f"{HTTPS}#feature/x@y", InRepository(HTTPS, Range(), "feature/x@y")),
        ("https://me@git.example.org/x", InRepository("https://me@git.example.org/x")),
        ("https://me@git.example.org/x@*", InRepository("https://me@git.example.org/x")),
        ("git@example.org:x.git", InRepository("git@example.org:x.git")),
        ("git@example.org:x.git@1.0.0", InRepository("git@example.org:x.git", Range.parse("1.0.0"))),
        ("git+ssh://git@example.org/x@<2.0.0", InRepository("ssh://git@example.org/x", Range.parse("<2.0.0"))),
        ("sql", Named("sql")),
        ("expert-sql@>=0.3.0", Named("expert-sql", Range.parse(">=0.3.0"))),
        ("acme/expert-sql", Named("expert-sql", publisher="acme")),
        ("acme/expert-sql@>=0.3.0", Named("expert-sql", Range.parse(">=0.3.0"), "acme")),
    ],
)
def test_a_source_is_a_file_a_repository_or_a_name(text: str, source: Any) -> None:
    assert parse_source(text) == source


def test_a_folder_that_exists_as_written_is_meant_as_written(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "v@1#x.expert"
    odd.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    for text in ("./v@1#x.expert", str(odd), f"git+{odd}", "~/v@1#x.expert"):
        assert parse_source(text) == InRepository(str(odd))
    for text in ("./tree", f"{tree}@*", f"file://{tree}", "git+tree", "~/tree"):
        assert parse_source(text) == InRepository(str(tree))
    assert parse_source("./tree@1.0.0#main") == InRepository(str(tree), Range.parse("1.0.0"), "main")
    assert parse_source("tree") == Named("tree")
    assert parse_source("acme/tree") == Named("tree", publisher="acme")
    (tmp_path / "acme" / "tree").mkdir(parents=True)
    assert parse_source("acme/tree") == parse_source("acme/tree@*") == InRepository(str(tmp_path / "acme" / "tree"))
    monkeypatch.chdir(tree)
    assert parse_source(".") == InRepository(str(tree))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-x",
        "--upload-pack=touch pwned",
        "git+--upload-pack=touch pwned",
        "git+-x",
        "ext::sh -c 'touch pwned'",
        "ext::sh -c touch@1.0.0",
        "http://example.org/x",
        "/nowhere/at/all",
        "./nobody/knows",
        "nobody/knows/it",
        "Nobody/knows",
        "acme/sql#main",
        "acme/x_",
        "~nobody-of-this-name/x",
        "x" * 5000 + "/y",
        "x\0/y",
        f"{HTTPS}@",
        f"{HTTPS}@latest-ish!",
        f"{HTTPS}#",
        "sql#main",
        "SQL",
        "git+sql",
        "@1.0.0",
    ],
)
def test_what_is_none_of_these_is_refused(text: str) -> None:
    with pytest.raises(HocketError, match="BAD_REQUEST"):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "HTTPS://user:s3cret@example.org/x#",
        "Https://user:s3cret@example.org/x#",
        "ssh://user:s3cret@example.org/x#",
        "https://user:s3cret@example.org/x\x01",
        "https://user:s3\x1bcret@example.org/x",
        "https://user:s3 cret@example.org/x#",
    ],
)
def test_no_refusal_prints_a_password(text: str) -> None:
    with pytest.raises(HocketError, match="example") as caught:
        parse_source(text)
    assert "cret" not in caught.value.message


# What a repository offers


def test_the_newest_tag_in_the_range_is_taken(tree: Path) -> None:
    for version in ("1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1"):
        commit(tree, package(f"acme/sql@{version}", "dist/sql.expert"), tag=f"v{version}")
    commit(tree, package("acme/sql@2.0.0-rc.2", "dist/sql.expert"))
    for name in ("v+", "v3", "version-3.0.0", "x/v3.0.0", "3.0.0", "v3.0.0;x"):
        git(tree, "tag", name)

    assert found(tree) == "acme/sql@1.10.0"
    assert found(tree, ">=1.0.0,<1.10.0") == "acme/sql@1.2.0"
    assert found(tree, ">=2.0.0-rc.0") == "acme/sql@2.0.0-rc.1"
    error = refusal(tree, ">=2.0.0")
    assert error.reason is Reason.UNKNOWN_PACKAGE
    for version in ("2.0.0-rc.2", "2.0.0-rc.1", "1.10.0"):
        assert f"acme/sql@{version}" in error.message
    assert "no released package of a version in >=2.0.0 is there" in error.message
    assert "(pre-releases have to be named)" in error.message


def test_a_reference_is_taken_at_its_word(tree: Path) -> None:
    commit(tree, package("acme/sql@1.0.0", "sql.expert"), tag="v1.0.0")
    git(tree, "branch", "feature/x")
    commit(tree, package("acme/sql@2.0.0", "sql.expert"))

    assert found(tree, ref="main") == "acme/sql@2.0.0"
    assert found(tree, ref="feature/x") == found(tree, ref="v1.0.0") == "acme/sql@1.0.0"
    error = refusal(tree, ref="none")
    assert error.reason is Reason.BAD_REQUEST
    assert "it has feature/x, main, v1.0.0" in error.message
    for ref in ("--output=x", "HEAD", "refs/heads/main", "main:main", "v1.0.0^{}"):
        assert refusal(tree, ref=ref).reason is Reason.BAD_REQUEST


def test_without_tags_of_versions_the_newest_file_at_the_head_is_taken(tree: Path) -> None:
    versions = ("1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1")
    files = [package(f"acme/sql@{version}", f"versions/{version}/x.apr") for version in versions]
    commit(tree, {key: value for each in files for key, value in each.items()}, tag="version-1")

    assert found(tree) == "acme/sql@1.10.0"
    assert found(tree, "<1.10.0") == "acme/sql@1.2.0"
    error = refusal(tree, ">=2.0.0")
    assert error.reason is Reason.UNKNOWN_PACKAGE
    assert "acme/sql@2.0.0-rc.1" in error.message


def test_an_older_tag_is_tried_where_the_newest_lacks_the_package(tree: Path) -> None:
    commit(tree, {**package("acme/sql@1.0.0", "sql.expert"), **package("acme/old@1.0.0", "old.expert")}, tag="v1.0.0")
    (tree / "old.expert").unlink()
    commit(tree, package("acme/sql@1.1.0", "sql.expert"), tag="v1.1.0")

    assert found(tree, name="old") == "acme/old@1.0.0"
    assert found(tree, name="sql") == "acme/sql@1.1.0"


def fetched(folder: Path, wanted: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], str]:
    """Which commits are looked at for an expert, and what is chosen."""
    labels = []
    real = sources._commit

    def noted(repository: Repository, label: str, object_id: str) -> Any:
        labels.append(label)
        return real(repository, label, object_id)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_commit", noted)
        try:
            return labels, found(folder, wanted, **options)
        except HocketError as error:
            return labels, error.message


def test_tags_that_number_another_expert_are_no_obstacle(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ours, other in (("0.1.0", "4.0.0"), ("0.3.0", "5.0.0")):
        names = (f"acme/ma@{other}", f"acme/mb@{ours}")
        commit(tree, {path: data for name in names for path, data in package(name, f"{name[5:7]}.expert").items()})
        git(tree, "tag", f"v{other}")

    assert found(tree, "<1.0.0", name="mb") == found(tree, "0.3.0") == "acme/mb@0.3.0"
    assert found(tree, "<0.2.0") == found(tree, "0.1.0", name="acme/mb") == "acme/mb@0.1.0"
    assert found(tree, name="ma") == found(tree, ">=5.0.0", name="ma") == "acme/ma@5.0.0"
    labels, said = fetched(tree, ">=6.0.0", monkeypatch, name="mb")
    assert labels == ["v5.0.0", "v4.0.0"]  # HEAD is the same commit as v5.0.0
    assert "Looked at v5.0.0, v4.0.0: #REF" in said
    with opened(check_address(str(tree))) as source:
        every = [str(offer.claim) for _, offer in search(source, Range(), "acme/mb")]
        assert every == ["acme/mb@0.3.0", "acme/mb@0.1.0"]


def test_a_repository_whose_tags_number_what_is_wanted_is_not_searched_in_vain(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        commit(tree, package(f"acme/sql@{version}", "sql.expert"), tag=f"v{version}")
    commit(tree, {"README.md": b"more"})

    labels, said = fetched(tree, ">1.2.0", monkeypatch, name="sql")
    assert labels == ["v1.2.0", "HEAD"]
    assert "no sql of a version in >1.2.0 is there; it has acme/sql@1.2.0" in said
    commit(tree, package("acme/sql@1.3.0", "sql.expert"))
    assert fetched(tree, ">1.2.0", monkeypatch, name="sql") == (labels, "acme/sql@1.3.0")


def test_only_so_many_tags_are_tried_and_that_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TAGS_MAX", 2)
    for number in range(4):
        commit(tree, package(f"acme/sql@0.{number}.0", "sql.expert"), tag=f"v{number}.0.0")

    labels, said = fetched(tree, ">=7.0.0", monkeypatch)
    assert labels == ["v3.0.0", "v2.0.0"]
    assert "of its 4 version tags no more than 2" in said
    assert found(tree, "<0.2.0", ref="v1.0.0") == "acme/sql@0.1.0"


def test_of_several_experts_one_has_to_be_chosen(tree: Path) -> None:
    names = ("acme/sql@1.0.0", "acme/json@1.0.0", "zeta/json@2.0.0")
    commit(tree, {key: value for name in names for key, value in package(name).items()})

    error = refusal(tree)
    assert error.reason is Reason.BAD_REQUEST
    assert "acme/json, acme/sql, zeta/json: choose one with --name" in error.message
    assert found(tree, name="sql") == found(tree, name="acme/sql") == "acme/sql@1.0.0"
    assert found(tree, name="zeta/json") == "zeta/json@2.0.0"
    assert refusal(tree, name="json").reason is Reason.BAD_REQUEST
    error = refusal(tree, name="neo4j")
    assert error.reason is Reason.UNKNOWN_PACKAGE
    assert "no neo4j is there; it has acme/json@1.0.0, acme/sql@1.0.0" in error.message


def test_a_file_without_a_release_is_offered_only_where_nothing_is_released(tree: Path) -> None:
    commit(tree, {"plain.expert": b"package None"})
    with opened(check_address(str(tree))) as source:
        _, offer = find(source, Range())
    assert (offer.release, offer.claim) == (None, None)
    error = refusal(tree, name="plain")
    assert error.reason is Reason.UNKNOWN_PACKAGE
    assert "no plain is there; nobody has released plain.expert. Looked at HEAD" in error.message
    commit(tree, {"more.expert": b"package None"})
    error = refusal(tree)
    assert "several package files that nobody has released, more.expert, plain.expert" in error.message
    assert "--name" not in error.message

    commit(tree, package("acme/sql@1.0.0"))
    assert found(tree) == "acme/sql@1.0.0"


@pytest.mark.parametrize("release", [b"{}", b"x" * (ENVELOPE_SIZE_BYTES_MAX + 1)])
def test_a_release_that_cannot_be_read_is_handed_on_to_be_refused(tree: Path, release: bytes) -> None:
    commit(tree, {"plain.expert": b"package None", "plain.expert.release.json": release})

    with opened(check_address(str(tree))) as source:
        _, offer = find(source, Range())
    assert offer.release in (release, b"")
    assert offer.claim is None


def test_links_and_names_of_any_kind_are_no_way_out(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.expert").write_bytes(b"package acme/sql@9.0.0")
    (tree / "sql.expert").symlink_to(tmp_path / "secret.expert")
    (tree / "up").symlink_to(tmp_path)
    commit(tree, package("acme/new\nline@1.0.0".replace("\n", "-"), "--output=x\n.expert"))

    assert found(tree) == "acme/new-line@1.0.0"


def test_a_pointer_of_git_lfs_is_said_so(tree: Path) -> None:
    files = package("acme/sql@1.0.0", "sql.expert")
    files["sql.expert"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    commit(tree, files)

    error = refusal(tree)
    assert error.reason is Reason.BAD_PACKAGE
    assert "Git LFS" in error.message


def test_an_empty_repository_and_one_without_packages_are_said_so(tree: Path) -> None:
    assert "is empty" in refusal(tree).message
    commit(tree, {"README.md": b"hello", "sql.expert.release.json": b"{}"})
    error = refusal(tree)
    assert error.reason is Reason.UNKNOWN_PACKAGE
    assert "no released package is there. Looked at HEAD" in error.message


def test_too_many_or_too_large_packages_are_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tree, {**package("acme/sql@1.0.0"), **package("acme/sql@1.1.0")})
    assert found(tree) == "acme/sql@1.1.0"

    monkeypatch.setattr(sources, "PACKAGES_MAX", 1)
    assert refusal(tree).reason is Reason.TOO_LARGE
    monkeypatch.setattr(sources, "PACKAGES_MAX", 2)
    monkeypatch.setattr(sources, "DEFAULT_LIMITS", Limits(package_bytes=10))
    assert refusal(tree).reason is Reason.TOO_LARGE


# Indexes


def index(folder: Path, **changes: Any) -> None:
    experts = [{"name": f"expert-{number}", "repository": HTTPS} for number in range(20)]
    commit(folder, {"index.json": json.dumps({"version": "1.0", "experts": experts, **changes}).encode()})


def test_an_index_is_read_from_its_repository(tree: Path) -> None:
    index(tree)
    git(tree, "branch", "old")
    index(tree, experts=[])

    with opened(check_address(str(tree))) as source:
        assert read_index(source, "old").repository_of("7") == ("expert-7", HTTPS)
        assert read_index(source).repositories == {}
        assert read_index(source).is_local


def test_an_index_is_not_an_expert(tree: Path) -> None:
    index(tree)

    error = refusal(tree)
    assert error.reason is Reason.BAD_REQUEST
    assert "choose one of expert-0, expert-1," in error.message
    assert f"and 8 more with `hocket install NAME --index {tree}`" in error.message


def test_a_repository_without_an_index_and_one_too_large_are_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tree, {"experts/index.json": b"{}"})
    with opened(check_address(str(tree))) as source, pytest.raises(HocketError, match="no index of experts"):
        read_index(source)
    index(tree)
    monkeypatch.setattr(sources, "INDEX_BYTES_MAX", 10)
    with opened(check_address(str(tree))) as source, pytest.raises(HocketError, match="TOO_LARGE"):
        read_index(source)


def test_each_repository_is_opened_once_and_gone_at_the_end(tree: Path) -> None:
    with repositories() as get:
        assert get(str(tree)) is get(str(tree))
        folder = get(str(tree))._folder
        assert folder.exists()
    assert not folder.exists()
