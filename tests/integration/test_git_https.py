"""Repositories over real HTTPS: git's own server program behind a socket of ours."""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.git import check_address, opened
from tests import certificates
from tests.repositories import bare, commit, repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = base64.b64encode(b"me:hunter2").decode()


class _Handler(BaseHTTPRequestHandler):
    """Hands requests to `git http-backend`; below `/private/` only to those who know the password."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        if path.startswith("/moved/"):
            self._send(302, {"Location": f"{self.server.elsewhere}/info/refs?{query}"}, b"")  # type: ignore[attr-defined]
        elif path.startswith("/private/") and self.headers.get("Authorization") != f"Basic {PASSWORD}":
            self._send(401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")
        else:
            self._send(*self._backend(path.removeprefix("/private"), query, body))

    def _backend(self, path: str, query: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.server.root),  # type: ignore[attr-defined]
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        return int(headers.pop("Status", "200")[:3]), headers, content

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """An HTTPS server on loopback with one repository, `x.git`; the person knows its authority."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = certificates.make(tmp_path / "certificates", "router")
    monkeypatch.setenv("GIT_SSL_CAINFO", str(folder / "ca.pem"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (tmp_path / "gitconfig").write_text("")
    tree = repository(tmp_path / "tree")
    commit(tree, {"a.txt": b"one"}, tag="v1.0.0")
    bare(tmp_path / "served" / "x.git", tree)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "router.pem", folder / "router.key")
    with serving(tmp_path / "served", context) as server:
        yield server


@contextmanager
def serving(root: Path, context: ssl.SSLContext | None) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root = root  # type: ignore[attr-defined]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def address(server: ThreadingHTTPServer, path: str) -> str:
    return check_address(f"https://localhost:{server.server_port}/{path}")


def contents(where: str) -> dict[str, bytes]:
    with opened(where, timeout_seconds=20) as source:
        files = source.files(source.refs()["refs/tags/v1.0.0"])
        return dict(zip([file.path for file in files], source.read(files), strict=True))


def test_a_repository_is_read_over_https(host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert contents(address(host, "x.git")) == {"a.txt": b"one"}
    with pytest.raises(HocketError, match="not found"):
        contents(address(host, "y.git"))

    monkeypatch.delenv("GIT_SSL_CAINFO")  # an authority that nobody knows
    monkeypatch.setenv("GIT_SSL_NO_VERIFY", "1")  # is not passed on
    with pytest.raises(HocketError, match="certificate"):
        contents(address(host, "x.git"))


def test_credentials_come_from_the_persons_helpers_and_nobody_is_asked(
    host: ThreadingHTTPServer, tmp_path: Path
) -> None:
    where = address(host, "private/x.git")
    with pytest.raises(HocketError, match="set up a credential helper") as caught:
        contents(where)
    assert caught.value.reason is Reason.UNREACHABLE

    helper = "!f() { echo username=me; echo password=hunter2; }; f"
    (tmp_path / "gitconfig").write_text(f'[credential]\n\thelper = "{helper}"\n')
    assert contents(where) == {"a.txt": b"one"}


def test_credentials_in_an_address_work_and_are_not_printed(host: ThreadingHTTPServer) -> None:
    where = address(host, "private/x.git")

    assert contents(where.replace("localhost", "me:hunter2@localhost")) == {"a.txt": b"one"}
    with pytest.raises(HocketError) as caught:
        contents(where.replace("localhost", "me:hunter3@localhost"))
    assert "hunter3" not in caught.value.message


def test_a_server_can_send_git_to_another_address_of_https_only(host: ThreadingHTTPServer, tmp_path: Path) -> None:
    moved = address(host, "moved")
    host.elsewhere = address(host, "x.git")  # type: ignore[attr-defined]
    assert contents(moved) == {"a.txt": b"one"}

    with serving(tmp_path / "served", None) as plain:
        for elsewhere in (f"http://127.0.0.1:{plain.server_port}/x.git", f"file://{tmp_path}/served/x.git"):
            host.elsewhere = elsewhere  # type: ignore[attr-defined]
            with pytest.raises(HocketError, match="UNREACHABLE"):
                contents(moved)
