"""Reading git repositories through the `git` program: names, listings and single files, never a checkout.

What is fetched lies in a temporary bare repository that is gone when the context ends. Addresses, object ids and
listings come from strangers, so git is given nothing that could be more than it looks: addresses of three protocols
alone, object ids instead of names, and `--end-of-options` before either. git runs in a session of its own without a
terminal, in an environment from which every `GIT_` variable is taken that could make it read, run or write something
else. The person's own configuration stays, because credential helpers, proxies and mirrors live there; hooks, templates
and the configuration of whatever folder the command runs in have no effect. A repository in a folder has a
configuration of its own, which git kept from running only since the versions of May 2024: older ones read no folders.
Why the program and not a library: `docs/adr/0009-git.md`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Final, NoReturn
from urllib.parse import unquote, urlsplit

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

TIMEOUT_SECONDS: Final = 300.0
"""How long one run of git may take unless the caller says otherwise."""

FETCHED_BYTES_MAX: Final = 4 * 2**30
"""Most bytes a repository may take in the temporary folder."""

LISTING_BYTES_MAX: Final = 32 * 2**20
"""Most bytes of a listing of references or files: some 200,000 of them."""

UNSPEAKABLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""What no address and no name of a folder has here: control characters, and bytes that are not UTF-8."""

_ADDRESS_CHARS: Final = 4096
_LOOK_SECONDS: Final = 0.005
_SAID_CHARS: Final = 600

_HOST: Final = r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[[0-9A-Fa-f:.]{2,64}\])"
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
_REMOTE: Final = re.compile(rf"(?:[^\s/@-][^\s/@]*@)?{_HOST}(?::[0-9]{{1,5}})?/\S*[^\s/]\S*")
_SSH: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]*@{_HOST}:[^\s:-]\S*")  # user@host:path
_HELPER: Final = re.compile(r"[A-Za-z0-9+.-]*::")
_SECRETS: Final = re.compile(
    r"((?<!ssh)://)[^/]*@"  # user and password
    r"|(ssh://)[^/@]*:[^/]*@"  # of ssh the user alone is no secret
    r"|(://)[^/@:\[]+:(?![0-9]*/)[^@]*@"  # a password with a slash in it, which is no address
    r"|^[^\s/@:]+:[^\s/@]+@",  # user:password@host:path, which is none either
    re.IGNORECASE,
)

_OBJECT_ID: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REF: Final = re.compile(r"((?:[0-9a-f]{40})|(?:[0-9a-f]{64}))\t(HEAD|refs/(?:heads|tags)/\S+)")
_FILE: Final = re.compile(rb"100(?:644|755) blob ([0-9a-f]+) +([0-9]+)\t(.+)", re.DOTALL)
_OWNERSHIP: Final = re.compile(r"dubious ownership in repository at '(.+)'")
_FORMATS: Final = {40: "sha1", 64: "sha256"}

_GIT_VERSION: Final = re.compile(rb"git version ([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?")
_PATCHED: Final = {39: 4, 40: 2, 41: 1, 42: 2, 43: 4, 44: 1, 45: 1}
"""The first release of each series of git 2 with the fixes for CVE-2024-32004 and CVE-2024-32465: before them, reading
a folder that somebody else has made up could run what its configuration says."""

_KEPT: Final = frozenset(
    {
        "GIT_ASKPASS",
        "GIT_CONFIG_GLOBAL",
        "GIT_CONFIG_NOSYSTEM",
        "GIT_CONFIG_SYSTEM",
        "GIT_SSH",
        "GIT_SSH_COMMAND",
        "GIT_SSH_VARIANT",
        "GIT_SSL_CAINFO",
        "GIT_SSL_CAPATH",
        "GIT_SSL_CERT",
        "GIT_SSL_KEY",
    }
)
"""How a person reaches repositories. No other variable of git's is passed on."""

_SET: Final = {
    "GIT_ALLOW_PROTOCOL": "file:https:ssh",  # beats every configuration, and holds for redirections as well
    "GIT_NO_LAZY_FETCH": "1",  # a partial clone would fetch from wherever it says
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",  # `_ADVICE` reads English
}
_OPTIONS: Final = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "gc.auto=0"),  # nothing is left running
    *("-c", "maintenance.auto=false"),
    *("-c", "fetch.unpackLimit=1"),  # one pack, however few objects
)
_ADVICE: Final = (
    ("Host key verification failed", "connect to that host once with `ssh`, so that its key is known"),
    ("Permission denied (publickey", "ssh has no key for it: load one with `ssh-add`"),
    ("terminal prompts disabled", "it asks for credentials: set up a credential helper (`git help credentials`)"),
    ("Authentication failed", "the credentials that git has for it are not accepted"),
    ("does not appear to be a git repository", "is that the address of a repository?"),
    ("dumb http transport does not support shallow", "its server has to speak git's own protocol"),
)


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of a commit. Links and submodules are none.

    Attributes:
        path: Its name; bytes that are not UTF-8 are written as escapes.
        object_id: Of its content.
        size_bytes: Of its content.
    """

    path: str
    object_id: str
    size_bytes: int


def check_address(text: str, *, local: bool = True) -> str:
    """The address of a repository as git may be given it.

    `https://`, `ssh://` and `user@host:path` stay what they are; `file://` and paths become an absolute path.

    Args:
        text: As somebody wrote it, without a range of versions or a reference.
        local: Whether folders on this computer may be meant; data from elsewhere must not name them.

    Raises:
        HocketError: `BAD_REQUEST` for anything else, and for what git could take for an option or a command.
    """
    if not text.strip() or len(text) > _ADDRESS_CHARS or text.startswith("-") or UNSPEAKABLE.search(text):
        raise _bad(f"{shown(text)[:80]!r} is not the address of a git repository")
    if _HELPER.match(text):
        raise _bad(f"{shown(text)!r} would have git run another program: give an https:// or ssh:// address")
    if match := _URL.fullmatch(text):
        scheme, rest = match[1].lower(), match[2]
        if scheme == "file":
            return _local(_path_of(text), text, allowed=local)
        if scheme == "http":
            raise _bad("http:// is not encrypted, and anyone on the way could answer: give an https:// address")
        if scheme not in {"https", "ssh"}:
            raise _bad(f"repositories are reached by https://, ssh:// or file://, not by {scheme[:20]}://")
        if _REMOTE.fullmatch(rest) is None:  # not shown: there may be a password in it
            raise _bad(f"this is not an address of the form {scheme}://host/path")
        return f"{scheme}://{rest}"
    if ":" in text.partition("/")[0]:
        if _SSH.fullmatch(text) is None:
            raise _bad(f"{shown(text)!r} is not an address of the form user@host:path; a folder begins with ./")
        return text
    return _local(os.path.expanduser(text), text, allowed=local)  # noqa: PTH111 - which raises nothing


def shown(address: str) -> str:
    """An address, or a line of text that contains some, as it may be printed.

    User names and passwords are left out, but for the user of ssh, and so are control characters.
    """
    return UNSPEAKABLE.sub("?", _SECRETS.sub(r"\1\2\3", address))


@contextmanager
def opened(
    address: str, *, timeout_seconds: float = TIMEOUT_SECONDS, bytes_max: int = FETCHED_BYTES_MAX
) -> Iterator[Repository]:
    """A repository to read from; what is fetched of it is gone afterwards.

    Args:
        address: What `check_address` returned.
        timeout_seconds: How long one run of git may take.
        bytes_max: Most bytes to take to disk.
    """
    with _ended_in_order(), TemporaryDirectory(prefix="hocket-git-", ignore_cleanup_errors=True) as folder:
        yield Repository(address, Path(folder), timeout_seconds, bytes_max)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have the signals that end a process end it as Ctrl-C does: git in its own session would not hear of them.

    Signals that somebody handles or ignores (`nohup`) are left to them.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # the status that a shell gives a process ended by a signal


class Repository:
    """A repository somewhere, and what has been fetched of it. Made by `opened`.

    Every method raises `HocketError`: `UNREACHABLE` with git's own words when it cannot be read, `BAD_REQUEST` when git
    is not installed, too old for folders, or the folder belongs to somebody else, `DEADLINE`, and `TOO_LARGE`.

    Attributes:
        address: Where it is.
    """

    def __init__(self, address: str, folder: Path, timeout_seconds: float, bytes_max: int) -> None:
        self.address = address
        self._folder = folder
        self._timeout_seconds = timeout_seconds
        self._bytes_max = bytes_max
        self._fetched: set[str] = set()

    def refs(self) -> Mapping[str, str]:
        """Object ids of `HEAD`, `refs/heads/...` and `refs/tags/...`; of an annotated tag, that of the tag."""
        with self._git("sha1", "ls-remote", "--quiet", "--end-of-options", self.address) as out:
            lines = out.read().decode(errors="replace").split("\n")
        found = (match for line in lines if (match := _REF.fullmatch(line)))
        return {match[2]: match[1] for match in found if not match[2].endswith("^{}")}

    def files(self, object_id: str) -> tuple[File, ...]:
        """Every regular file of a commit, by name; fetches the commit if need be.

        Args:
            object_id: One of `refs`.
        """
        object_format = _FORMATS[len(_checked(object_id))]
        if object_id not in self._fetched:
            options = ("--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--end-of-options")
            with self._git(object_format, "fetch", *options, self.address, object_id):
                self._fetched.add(object_id)
        listing = ("ls-tree", "-r", "-z", "-l", "--full-tree", "--end-of-options", object_id)
        with self._git(object_format, *listing) as out:
            matches = (_FILE.fullmatch(entry) for entry in out.read().split(b"\0"))
            return tuple(
                File(match[3].decode(errors="backslashreplace"), match[1].decode(), int(match[2]))
                for match in matches
                if match
            )

    def read(self, files: Sequence[File]) -> tuple[bytes, ...]:
        """The contents of files that `files` has listed, in their order. The caller bounds their sizes."""
        if not files:
            return ()
        wanted = "".join(f"{_checked(file.object_id)}\n" for file in files).encode()
        bytes_max = sum(file.size_bytes + 2 * _SAID_CHARS for file in files)
        object_format = _FORMATS[len(files[0].object_id)]
        with self._git(object_format, "cat-file", "--batch", stdin=wanted, output_bytes_max=bytes_max) as out:
            return tuple(self._content(out, file) for file in files)

    def _content(self, out: IO[bytes], file: File) -> bytes:
        """The next answer of `cat-file --batch`: a line with id, type and size, the bytes, a line feed."""
        if out.readline().split() != [file.object_id.encode(), b"blob", b"%d" % file.size_bytes]:
            raise HocketError(Reason.UNREACHABLE, f"{shown(self.address)} did not hand over {file.path!r}")
        data = out.read(file.size_bytes)
        out.read(1)
        return data

    @contextmanager
    def _git(
        self, object_format: str, *arguments: str, stdin: bytes = b"", output_bytes_max: int = LISTING_BYTES_MAX
    ) -> Iterator[IO[bytes]]:
        """Run git in the temporary repository of this object format, and read what it has printed.

        Output goes through files: nobody has to read along, and one look at the folder measures everything.
        """
        git_dir = self._folder / object_format
        if not git_dir.exists():
            if self.address.startswith("/"):
                _check_version(_git())
            self._run(git_dir, "init", "--quiet", "--bare", "--template=", f"--object-format={object_format}")
        self._run(git_dir, *arguments, stdin=stdin, output_bytes_max=output_bytes_max)
        with (self._folder / "output").open("rb") as out:
            yield out

    def _run(
        self, git_dir: Path, *arguments: str, stdin: bytes = b"", output_bytes_max: int = LISTING_BYTES_MAX
    ) -> None:
        given, output, errors = (self._folder / name for name in ("input", "output", "errors"))
        given.write_bytes(stdin)
        with given.open("rb") as source, output.open("wb") as out, errors.open("wb") as said:
            process = subprocess.Popen(  # noqa: S603 - a list, checked above; no shell
                [_git(), *_OPTIONS, *arguments],
                stdin=source,
                stdout=out,
                stderr=said,
                cwd=self._folder,
                env=_environment(git_dir),
                start_new_session=True,  # one group to end, and no terminal to ask at
            )
            try:
                self._wait(process, output, output_bytes_max)
            finally:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode:
            raise self._failure(errors.read_bytes()[-4 * _SAID_CHARS :].decode(errors="replace"))

    def _wait(self, process: subprocess.Popen[bytes], output: Path, output_bytes_max: int) -> None:
        """Wait for the end of git, its time, or its room."""
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            ended = process.poll() is not None
            if output.stat().st_size > output_bytes_max or _size_bytes(self._folder) > self._bytes_max:
                raise HocketError(
                    Reason.TOO_LARGE,
                    f"{shown(self.address)} is too large to install from: fetch the package by other means, "
                    "and install the file",
                )
            if ended:
                return
            if time.monotonic() > deadline:
                raise HocketError(
                    Reason.DEADLINE,
                    f"{shown(self.address)} was not read within {self._timeout_seconds:g} s: give it more (--timeout)",
                )
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)

    def _failure(self, said: str) -> HocketError:
        if owned := _OWNERSHIP.search(said):
            return _bad(
                f"{self.address} belongs to another user, and git does not read it. If you trust its owner: "
                f"git config --global --add safe.directory {shlex.quote(owned[1])}",
            )
        words = "; ".join(shown(line.strip()) for line in said.splitlines() if line.strip())[:_SAID_CHARS]
        advice = next((f" ({advice})" for sign, advice in _ADVICE if sign in said), "")
        return HocketError(Reason.UNREACHABLE, f"cannot read {shown(self.address)}{advice}; git says: {words}")


def _git() -> str:
    git = shutil.which("git")
    if git is None:
        raise _bad("git is not installed: repositories are read with it (https://git-scm.com)")
    return git


def _check_version(git: str) -> None:
    """Pass if this git may read a folder that somebody else has made up."""
    major, minor, patch = _version(git)
    is_patched = major == 2 and minor in _PATCHED and patch >= _PATCHED[minor]  # noqa: PLR2004 - git 2
    if not is_patched and (major, minor) <= (2, max(_PATCHED)):
        raise _bad(
            f"git {major}.{minor}.{patch} may run what the configuration of a repository in a folder says "
            f"(CVE-2024-32004, CVE-2024-32465): update git to 2.{max(_PATCHED)}.{_PATCHED[max(_PATCHED)]} or newer, "
            "or give the repository's https:// or ssh:// address"
        )


@cache
def _version(git: str) -> tuple[int, int, int]:
    """The version of a git program; zeros if it does not tell."""
    try:
        done = subprocess.run(  # noqa: S603 - a program's own path
            [git, "version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0, 0
    match = _GIT_VERSION.match(done.stdout)
    return (0, 0, 0) if match is None else (int(match[1]), int(match[2]), int(match[3] or 0))


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/") or UNSPEAKABLE.search(path):
        raise _bad(f"{shown(url)[:80]!r} is not an address of the form file:///path")
    return path


def _local(path: str, text: str, *, allowed: bool) -> str:
    if not allowed:
        raise _bad(f"{shown(text)[:80]!r} is a folder of this computer: only an https:// or ssh address may stand here")
    if not os.path.isdir(path):  # noqa: PTH112 - which raises nothing
        raise _bad(f"there is no folder {shown(text)[:200]}")
    return os.path.abspath(path)  # noqa: PTH100 - without a look at links


def _checked(object_id: str) -> str:
    if _OBJECT_ID.fullmatch(object_id) is None:
        raise _bad(f"{object_id[:80]!r} is not the id of a git object")
    return object_id


def _environment(git_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _KEPT}
    return {**kept, **_SET, "GIT_DIR": str(git_dir)}


def _size_bytes(folder: Path) -> int:
    """What the files of a folder take; those that go away meanwhile take nothing."""
    total = 0
    waiting = [os.fspath(folder)]
    while waiting:  # not `os.walk`, which warns of an open folder where a signal interrupts it
        place = waiting.pop()
        with suppress(OSError):
            for name in os.listdir(place):  # noqa: PTH208 - many times a second
                path = f"{place}/{name}"
                with suppress(OSError):
                    found = os.lstat(path)
                    total += found.st_size
                    if stat.S_ISDIR(found.st_mode):
                        waiting.append(path)
    return total


def _bad(message: str) -> HocketError:
    return HocketError(Reason.BAD_REQUEST, message)
