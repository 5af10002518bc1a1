from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from hocket import git as git_module
from hocket.errors import HocketError, Reason
from hocket.git import File, check_address, opened, shown
from tests.repositories import bare, commit, git, repository

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person without a configuration of git, in a home of their own."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with two commits, tagged v1.0.0 and, annotated, v1.1.0."""
    folder = repository(tmp_path / "tree")
    commit(folder, {"a.txt": b"one"}, tag="v1.0.0")
    commit(folder, {"a.txt": b"two", "more/b.bin": bytes(range(256)) * 9})
    git(folder, "tag", "--annotate", "--message", "x", "v1.1.0")
    return folder


def contents(address: str, ref: str = "HEAD", **options: Any) -> dict[str, bytes]:
    with opened(check_address(address), **options) as source:
        files = source.files(source.refs()[ref])
        return dict(zip([file.path for file in files], source.read(files), strict=True))


def refusal(address: str, **options: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        contents(address, **options)
    return caught.value


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# What is read


def test_references_and_files_of_a_work_tree_are_read(tree: Path) -> None:
    with opened(check_address(str(tree))) as source:
        refs = source.refs()
        assert set(refs) == {"HEAD", "refs/heads/main", "refs/tags/v1.0.0", "refs/tags/v1.1.0"}
        files = source.files(refs["refs/tags/v1.1.0"])
        assert [(file.path, file.size_bytes) for file in files] == [("a.txt", 3), ("more/b.bin", 2304)]
        assert source.read(files[::-1]) == (bytes(range(256)) * 9, b"two")
        assert source.read(()) == ()
    assert contents(str(tree), "refs/tags/v1.0.0") == {"a.txt": b"one"}


def test_a_bare_repository_is_read_by_path_and_by_url(tree: Path, tmp_path: Path) -> None:
    folder = bare(tmp_path / "with space.git", tree)

    assert contents(str(folder)) == contents(str(tree))
    assert contents(f"file://{tmp_path}/with%20space.git") == contents(str(tree))


def test_a_shallow_repository_and_one_of_sha256_are_read(tree: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{tree}", "shallow")
    assert contents(str(tmp_path / "shallow")) == contents(str(tree))

    other = repository(tmp_path / "other", "--object-format=sha256")
    commit(other, {"a.txt": b"one"})
    assert len(git(other, "rev-parse", "HEAD")) == 64
    assert contents(str(other)) == {"a.txt": b"one"}


def test_an_empty_repository_has_no_references(tmp_path: Path) -> None:
    with opened(check_address(str(repository(tmp_path / "empty")))) as source:
        assert source.refs() == {}


def test_only_one_commit_is_fetched_and_nothing_stays(tree: Path) -> None:
    with opened(check_address(str(tree))) as source:
        newest = source.refs()["HEAD"]
        source.files(newest)
        folder = source._folder
        assert git(folder / "sha1", "rev-list", newest) == newest
        assert not list(folder.rglob("a.txt"))
    assert not folder.exists()


def test_ssh_is_spoken_through_the_command_that_the_person_has_set(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = script(tmp_path / "ssh", f'echo "$@" >> {tmp_path}/called; shift $(($# - 1)); exec sh -c "$1"')
    monkeypatch.setenv("GIT_SSH_COMMAND", command)
    monkeypatch.setenv("GIT_SSH_VARIANT", "simple")

    assert contents(f"ssh://git@example.org{tree}") == contents(str(tree))
    assert contents(f"git@example.org:{tree}") == contents(str(tree))
    assert f"git@example.org git-upload-pack '{tree}'" in (tmp_path / "called").read_text()


def test_the_persons_own_configuration_holds(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = tmp_path / "gitconfig"
    mirror.write_text(f'[url "{tree.parent}/"]\n\tinsteadOf = https://example.org/\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(mirror))

    assert contents("https://example.org/tree") == contents(str(tree))


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/acme/experts.git",
        "https://user:secret@example.org:8443/acme/experts",
        "HTTPS://example.org/x",
        "ssh://git@example.org:2222/~acme/x.git",
        "ssh://[2001:db8::1]/x",
        "git@example.org:acme/x.git",
    ],
)
def test_addresses_of_other_computers_stay_what_they_are(address: str) -> None:
    assert check_address(address, local=False) == address.replace("HTTPS", "https")


def test_folders_become_absolute_paths(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    monkeypatch.setenv("HOME", str(tree.parent))

    for text in (str(tree), "./tree", "tree", "~/tree", f"file://{tree}", f"file://localhost{tree}"):
        assert check_address(text) == str(tree)
        with pytest.raises(HocketError, match="BAD_REQUEST"):
            check_address(text, local=False)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "not the address"),
        ("  ", "not the address"),
        ("--upload-pack=touch pwned", "not the address"),
        ("-oProxyCommand=touch pwned", "not the address"),
        ("https://example.org/x\n--upload-pack=y", "not the address"),
        ("https://example.org/" + "x" * 5000, "not the address"),
        ("ext::sh -c 'touch pwned'", "another program"),
        ("fd::7/x", "another program"),
        ("::x", "another program"),
        ("http://example.org/x", "not encrypted"),
        ("git://example.org/x", "not by git://"),
        ("ftp://example.org/x", "not by ftp://"),
        ("ext://example.org/x", "not by ext://"),
        ("ssh://-oProxyCommand=touch%20pwned/x", "of the form ssh://host/path"),
        ("ssh://-o@example.org/x", "of the form ssh://host/path"),
        ("https://example.org", "of the form https://host/path"),
        ("https://example.org/", "of the form https://host/path"),
        ("https://example.org/a b", "of the form https://host/path"),
        ("https://user:pass/word@example.org/x", "of the form https://host/path"),
        ("git@-oProxyCommand=x:y", "of the form user@host:path"),
        ("-git@example.org:y", "not the address"),
        ("git@example.org:-y", "of the form user@host:path"),
        ("git@example.org::y", "of the form user@host:path"),
        ("example.org:y", "of the form user@host:path"),
        ("file://example.org/x", "of the form file:///path"),
        ("file:relative", "of the form user@host:path"),
        ("file:///%00", "of the form file:///path"),
        ("/nowhere/at/all", "there is no folder"),
    ],
)
def test_what_is_no_address_of_a_repository_is_refused(address: str, why: str) -> None:
    with pytest.raises(HocketError, match=why) as caught:
        check_address(address)
    assert caught.value.reason is Reason.BAD_REQUEST
    assert "pass/word" not in caught.value.message


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("https://user:s3cret@example.org/x", "https://example.org/x"),
        ("HTTPS://user:s3cret@example.org/x", "HTTPS://example.org/x"),
        ("Https://s3cret@example.org/x#", "Https://example.org/x#"),
        ("https://user:s3c\x01\nret@example.org/x", "https://example.org/x"),
        ("https://user:my s3cret@example.org/x", "https://example.org/x"),
        ("https://user:s3/cret@example.org/x", "https://example.org/x"),
        ("git+https://user:s3cret@example.org/x@1.0.0", "git+https://example.org/x@1.0.0"),
        ("ssh://user:s3cret@example.org/x", "ssh://example.org/x"),
        ("SSH://user:s3cret@example.org/x", "SSH://example.org/x"),
        ("ftp://user:s3cret@example.org/x", "ftp://example.org/x"),
        ("user:s3cret@example.org:x", "example.org:x"),
        ("unable to access 'https://user:s3cret@example.org/x/'", "unable to access 'https://example.org/x/'"),
    ],
)
def test_credentials_of_any_spelling_are_not_printed(written: str, printed: str) -> None:
    assert shown(written) == printed
    try:
        check_address(written)
    except HocketError as error:
        said = error.message
    else:
        said = ""
    assert "cret" not in said


@pytest.mark.parametrize(
    "address",
    [
        "ssh://git@example.org:22/x@>=1.0.0",
        "git@example.org:x.git@1.0.0#main",
        "https://example.org:8443/x@1.0.0",
        "https://[::1]:8443/x@1.0.0",
        "/home/me@work/x",
        "./x@1.0.0",
    ],
)
def test_what_is_no_secret_is_printed_as_it_is(address: str) -> None:
    assert shown(address) == address


def test_credentials_are_not_printed_when_a_repository_cannot_be_read() -> None:
    secret = "https://user:hunter2@127.0.0.1:1/x"

    assert shown(secret) == "https://127.0.0.1:1/x"
    error = refusal(secret)
    assert error.reason is Reason.UNREACHABLE
    assert "hunter2" not in error.message
    assert "user" not in error.message


# Nothing that is read can become more than data


@pytest.mark.parametrize(
    "address",
    ["--upload-pack=touch pwned", "ext::sh -c touch% pwned", "file:///x --upload-pack=touch", "-u touch pwned"],
)
def test_an_address_that_slipped_through_would_still_be_no_option_and_no_command(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check_address` is left out here: what git is given is safe by itself."""
    monkeypatch.chdir(tmp_path)
    with opened(address) as source, pytest.raises(HocketError, match="UNREACHABLE"):
        source.refs()
    assert not list(tmp_path.rglob("pwned"))


def test_a_tag_with_the_name_of_an_option_is_a_tag(tree: Path, tmp_path: Path) -> None:
    for name in ("--output=pwned", "-x", "--upload-pack=touch${IFS}pwned"):
        git(tree, "update-ref", f"refs/tags/{name}", "HEAD")

    assert contents(str(tree), "refs/tags/--output=pwned") == contents(str(tree))
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("object_id", ["--output=x", "HEAD", "", "a" * 39, "a" * 41, "A" * 40, "refs/heads/main"])
def test_only_object_ids_are_looked_up(tree: Path, object_id: str) -> None:
    with opened(check_address(str(tree))) as source:
        with pytest.raises(HocketError, match="not the id of a git object"):
            source.files(object_id)
        with pytest.raises(HocketError, match="not the id of a git object"):
            source.read([File("x", object_id, 1)])


def test_links_and_submodules_are_no_files(tree: Path, tmp_path: Path) -> None:
    (tree / "link.expert").symlink_to("/etc/passwd")
    module = "160000," + git(tree, "rev-parse", "HEAD") + ",module.expert"
    git(tree, "update-index", "--add", "--cacheinfo", module)
    (tree / ".gitmodules").write_text(
        f'[submodule "module.expert"]\n\tpath = module.expert\n\turl = ext::touch {tmp_path}/pwned\n'
    )
    git(tree, "add", ".gitmodules", "link.expert")
    git(tree, "commit", "--quiet", "--message", "links")

    assert set(contents(str(tree))) == {".gitmodules", "a.txt", "more/b.bin"}
    assert not (tmp_path / "pwned").exists()


def test_names_of_files_may_be_anything(tree: Path) -> None:
    names = ["new\nline.expert", "tab\there", "--output=x", 'quote".expert', "ünï"]
    commit(tree, {name: name.encode() for name in names})
    with open(os.fsencode(tree) + b"/not-\xff-utf8", "wb") as file:  # noqa: PTH123 - a name in bytes
        file.write(b"x")
    commit(tree)

    read = contents(str(tree))
    assert {name: read[name] for name in names} == {name: name.encode() for name in names}
    assert read["not-\\xff-utf8"] == b"x"


def test_nothing_of_a_repositorys_own_configuration_runs(tree: Path, tmp_path: Path) -> None:
    pwned = script(tmp_path / "pwn", f"touch {tmp_path}/pwned; cat")
    (tree / ".git" / "hooks").mkdir()
    for hook in ("post-checkout", "reference-transaction", "pre-auto-gc", "proc-receive", "update"):
        script(tree / ".git" / "hooks" / hook, f"touch {tmp_path}/pwned")
    for key in (
        "core.fsmonitor",
        "core.sshCommand",
        "core.gitProxy",
        "core.alternateRefsCommand",
        "core.pager",
        "credential.helper",
        "diff.external",
        "filter.x.smudge",
        "filter.lfs.process",
        "gpg.program",
        "uploadpack.packObjectsHook",
        "remote.origin.uploadpack",
    ):
        git(tree, "config", key, pwned)
    git(tree, "config", "core.hooksPath", str(tree / ".git" / "hooks"))
    git(tree, "config", "remote.origin.url", f"ext::{pwned}")
    git(tree, "config", "remote.origin.promisor", "true")
    git(tree, "config", "extensions.partialClone", "origin")
    git(tree, "config", "core.repositoryFormatVersion", "1")
    (tree / ".gitattributes").write_text("* filter=x\n*.bin filter=lfs\n")

    assert contents(str(tree))["a.txt"] == b"two"
    assert not (tmp_path / "pwned").exists()


def test_a_repository_that_lacks_an_object_does_not_have_it_fetched_from_elsewhere(tree: Path, tmp_path: Path) -> None:
    git(tree, "config", "remote.origin.url", f"ext::touch {tmp_path}/pwned")
    git(tree, "config", "remote.origin.promisor", "true")
    git(tree, "config", "protocol.ext.allow", "always")
    blob = git(tree, "rev-parse", "HEAD:a.txt")
    (tree / ".git" / "objects" / blob[:2] / blob[2:]).unlink()

    assert refusal(str(tree)).reason is Reason.UNREACHABLE
    assert not (tmp_path / "pwned").exists()


def test_the_folder_and_the_environment_of_the_command_have_no_effect(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = repository(tmp_path / "here")
    git(here, "config", f"url.{tmp_path}/nowhere.insteadOf", str(tree))
    template = tmp_path / "template" / "hooks"
    template.mkdir(parents=True)
    script(template / "reference-transaction", f"touch {tmp_path}/pwned")
    monkeypatch.chdir(here)
    for name, value in {
        "GIT_DIR": here / ".git",
        "GIT_OBJECT_DIRECTORY": tmp_path / "objects",
        "GIT_TEMPLATE_DIR": template.parent,
        "GIT_TRACE": tmp_path / "trace",
        "GIT_CONFIG_COUNT": 1,
        "GIT_CONFIG_KEY_0": f"url.{tmp_path}/nowhere.insteadOf",
        "GIT_CONFIG_VALUE_0": tree,
        "GIT_ALLOW_PROTOCOL": "ext",
    }.items():
        monkeypatch.setenv(name, str(value))

    assert contents(str(tree))["a.txt"] == b"two"
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "objects").exists()


def test_a_folder_of_another_user_is_not_read_and_it_is_said_what_to_do(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(git_module._SET, "GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own
    error = refusal(str(tree))

    assert error.reason is Reason.BAD_REQUEST
    assert "belongs to another user" in error.message
    assert f"git config --global --add safe.directory {tree}" in error.message


def test_git_is_handed_nothing_that_could_be_more_than_data(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second lines of defence, which nothing else would miss."""
    runs: list[tuple[list[str], dict[str, str]]] = []
    real = subprocess.Popen

    def noted(command: list[str], **options: Any) -> Any:
        runs.append((command[1:], options.get("env") or {}))
        assert "shell" not in options
        return real(command, **options)

    monkeypatch.setenv("GIT_EXEC_PATH", "/nowhere")
    monkeypatch.setenv("GIT_CONFIG_PARAMETERS", "'core.pager=touch pwned'")
    monkeypatch.setenv("GIT_SSL_NO_VERIFY", "1")
    monkeypatch.setattr(subprocess, "Popen", noted)
    assert contents(str(tree))["a.txt"] == b"two"
    runs = [(command, environment) for command, environment in runs if command != ["version"]]

    assert [command[8] for command, _ in runs] == ["init", "ls-remote", "fetch", "ls-tree", "cat-file"]
    for command, environment in runs:
        assert command[:8:2] == ["-c"] * 4
        assert {"core.hooksPath=/dev/null", "gc.auto=0", "maintenance.auto=false"} < set(command[1:8:2])
        assert {name: value for name, value in environment.items() if name.startswith("GIT_")} == {
            "GIT_ALLOW_PROTOCOL": "file:https:ssh",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_DIR": environment["GIT_DIR"],
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_TERMINAL_PROMPT": "0",
        }
        assert not environment["GIT_DIR"].startswith(str(tree))
        data = [word for word in command if word.startswith("/") or git_module._OBJECT_ID.fullmatch(word)]
        assert command[9:] == ["--batch"] or not data or command[-len(data) - 1 :] == ["--end-of-options", *data]
    assert [command[-2] for command, _ in runs[1:4]] == ["--end-of-options", str(tree), "--end-of-options"]


@pytest.mark.parametrize(
    ("version", "is_read"),
    [
        ("2.29.0", False),
        ("2.39.3", False),
        ("2.39.4", True),
        ("2.39.5 (Apple Git-154)", True),
        ("2.44.0.windows.1", False),
        ("2.45.0", False),
        ("2.45.1", True),
        ("2.46.GIT", True),
        ("3.0.0", True),
        ("unknown", False),
    ],
)
def test_whether_a_git_has_the_fixes_that_folders_need_is_told_by_its_version(
    version: str, *, is_read: bool, tmp_path: Path
) -> None:
    old = script(tmp_path / "git", f'echo "git version {version}"')

    if is_read:
        git_module._check_version(old)
    else:
        with pytest.raises(HocketError, match="CVE-2024-32004"):
            git_module._check_version(old)


def test_a_git_that_would_run_what_a_folder_says_reads_none(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("git")
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "git", f'[ "$1" = version ] && echo "git version 2.39.3" || exec {real} "$@"')
    mirror = tmp_path / "gitconfig"
    mirror.write_text(f'[url "{tree.parent}/"]\n\tinsteadOf = https://example.org/\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(mirror))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    with opened("https://example.org/tree") as source:
        assert source.refs()
    error = refusal(str(tree))
    assert error.reason is Reason.BAD_REQUEST
    assert "update git to 2.45.1 or newer, or give the repository's https:// or ssh:// address" in error.message


def test_a_git_that_cannot_be_started_has_no_version(tmp_path: Path) -> None:
    assert git_module._version(str(tmp_path)) == (0, 0, 0)


# Bounds


def test_a_folder_without_a_repository_and_a_server_that_is_not_there_are_said_so(tmp_path: Path) -> None:
    error = refusal(str(tmp_path))
    assert error.reason is Reason.UNREACHABLE
    assert "is that the address of a repository?" in error.message
    assert "git says: fatal: " in error.message
    assert refusal("https://127.0.0.1:1/x").reason is Reason.UNREACHABLE


def test_without_git_it_is_said_what_is_missing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    assert "git is not installed" in refusal(str(tree)).message


def test_a_repository_beyond_its_bound_is_refused(tree: Path) -> None:
    commit(tree, {"big.bin": os.urandom(200_000)})

    assert refusal(str(tree), bytes_max=100_000).reason is Reason.TOO_LARGE
    assert len(contents(str(tree), bytes_max=1_000_000)) == 3


def test_folders_of_folders_of_folders_are_not_listed_for_ever(tree: Path) -> None:
    """Ten folders of ten equal folders each, nine deep: a thousand million files in a few kilobytes."""
    folder = git(tree, "write-tree")
    for _ in range(9):
        folder = git(tree, "mktree", stdin="".join(f"040000 tree {folder}\t{number}\n" for number in range(10)))
    git(tree, "update-ref", "refs/heads/bomb", git(tree, "commit-tree", folder, "-m", "bomb"))

    with opened(check_address(str(tree))) as source, pytest.raises(HocketError, match="too large"):
        source.files(source.refs()["refs/heads/bomb"])


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that never answers, and where it notes its process and that of a child."""
    pids = tmp_path / "pids"
    command = script(tmp_path / "ssh", f"sleep 60 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait")
    monkeypatch.setenv("GIT_SSH_COMMAND", command)
    return pids


def gone(pids: Path) -> bool:
    """Whether the processes end within two seconds."""
    for _ in range(200):
        if not any(_runs(pid) for pid in pids.read_text().split()):
            return True
        time.sleep(0.01)
    return False


def _runs(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_git_that_hangs_is_ended_with_all_its_children(hanging: Path) -> None:
    error = refusal("ssh://example.org/x", timeout_seconds=0.5)

    assert error.reason is Reason.DEADLINE
    assert gone(hanging)


def test_an_interrupted_command_leaves_nothing_running(hanging: Path) -> None:
    def interrupt() -> None:
        while not hanging.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with opened("ssh://example.org/x", timeout_seconds=20) as source:
        folder = source._folder
        with pytest.raises(KeyboardInterrupt):
            source.refs()
    assert gone(hanging)
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing_behind(
    number: signal.Signals, hanging: Path, tmp_path: Path
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("whoever runs these tests has this signal ignored, as nohup does, and so it stays for children")
    program = "from hocket.git import opened\nwith opened('ssh://example.org/x') as source: source.refs()"
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(folder)})
    while not hanging.exists():
        time.sleep(0.01)
    assert list(folder.iterdir())
    process.send_signal(number)

    assert process.wait(timeout=10) == 128 + number
    assert gone(hanging)
    assert not list(folder.iterdir())


def test_signals_are_taken_only_while_a_repository_is_open_and_only_from_nobody(tree: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with opened(str(tree)):
            taken = signal.getsignal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with opened(str(tree)):
                assert signal.getsignal(signal.SIGTERM) is taken
            assert signal.getsignal(signal.SIGTERM) is taken
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_repository_is_read_in_another_thread_as_well(tree: Path) -> None:
    read = []
    thread = threading.Thread(target=lambda: read.append(contents(str(tree))["a.txt"]))
    thread.start()
    thread.join()
    assert read == [b"two"]


def test_an_object_that_is_not_what_was_listed_is_refused(tree: Path) -> None:
    with opened(check_address(str(tree))) as source:
        [first, *_] = source.files(source.refs()["HEAD"])
        with pytest.raises(HocketError, match="did not hand over"):
            source.read([File("x", first.object_id, first.size_bytes + 1)])
