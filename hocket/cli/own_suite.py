"""A suite of a command's own: a process on free ports of this machine that ends with the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

from hocket.cli import base, output, serve
from hocket.client import blocking
from hocket.client.calls import GRPC_STATUS
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

HAS_ENDED: Final = "suite_has_ended"
"""In a refusal's metadata: no further call can succeed."""
_STOP_SECONDS_MAX: Final = 15.0
_LAST_SECONDS: Final = 1.0
"""How long a process may take to end after its connections."""
_TLS: Final = "HOCKET_TLS__"
_LOCKED: Final = "does another registry use this folder"
_REFUSAL: Final = "hocket: "
"""How the line begins by which a program of ours says why it does not go on."""
_ERRORS: Final = frozenset({"error", "critical"})
_DETAILS: Final = ("problem", "error", "message", "exception")
"""Where entries of the log say what the matter is."""


@contextmanager
def own_router(
    *, device: str | None, data: Path | None, wanted: str, shown: bool
) -> Iterator[tuple[blocking.RouterClient, Callable[[], AbstractContextManager[None]]]]:
    """A connection to the router of a suite that lives until the block ends, and what explains failures of its calls.

    Args:
        device: Where it computes; None for what its settings say.
        data: Its data; None for this person's suite's.
        wanted: Its base, by name or digest; empty for the only one.
        shown: Whether people are told that it starts.

    Raises:
        HocketError: `NO_BASE` if no base has been added, `BAD_REQUEST` and `UNKNOWN_BASE` as
            `hocket.known_bases.KnownBases.find`, `NOT_READY` if the suite does not start. Explained, a call fails with
            `NOT_READY` if the suite has ended, and `HAS_ENDED` in the metadata.
    """
    known = base.read(data)
    chosen = known.find(wanted)
    if chosen is None:
        where = "" if data is None else f" --data {data}"
        raise HocketError(Reason.NO_BASE, f"no base model may be served yet: `hocket base add PATH{where}` adds one")
    serve.check_installed("transformers")
    settings = {
        **serve.data_settings(data),
        "router.host": "127.0.0.1",
        "router.port": 0,
        "router.drain_notice_seconds": 0,  # nobody to notice
        "registry.host": "127.0.0.1",
        "registry.port": 0,
        "registry.drain_notice_seconds": 0,
        "worker.bases_dir": known.folder,
        "worker.device": device,
        "worker.base": chosen.digest,
    }
    # -P: a folder that happens to be called services, where the command is given, is not ours.
    command = [sys.executable, "-P", "-m", "services.suite", "--supervised", "--no-metrics", "--log-format", "json"]
    for assignment in serve.assignments(settings):
        command += ["--set", assignment]
    # A session of its own: Ctrl-C in a terminal is for this command, which ends the suite.
    with subprocess.Popen(  # noqa: S603 - our own program
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith(_TLS)},
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        log = _Log(process)
        try:
            seen = shown and sys.stderr.isatty()
            with output.console(stderr=True).status(f"starting {chosen.name}") if seen else nullcontext():
                address = log.ready()
            # What it logs must not fill the pipe.
            Thread(target=log.read, daemon=True).start()
            with blocking.connect(address) as client:
                yield client, log.told
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS_MAX)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()


class _Log:
    """What a suite logs, of which is kept why it may have ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None  # noqa: S101 - for the type checker: a pipe was asked for
        self._process = process
        self._lines = process.stderr
        self._ended = Event()
        self._refusal = ""
        self._error = ""

    def ready(self) -> str:
        """The router's address, as soon as the suite says that a request would be served.

        Raises:
            HocketError: `NOT_READY` if it ends instead.
        """
        for line in self._lines:
            entry = self._take(line)
            if entry.get("event") == "ready" and "router" in entry:
                return str(entry["router"])
        self._ended.set()
        raise self._failure("did not start")

    def read(self) -> None:
        """Read on to the end."""
        for line in self._lines:
            self._take(line)
        self._ended.set()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say of a call to a suite that has ended why it has."""
        try:
            yield
        except HocketError as error:
            if GRPC_STATUS in error.metadata:  # no service has refused
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LAST_SECONDS)
            if self._process.poll() is None:
                raise
            raise self._failure("has ended") from error

    def _take(self, line: str) -> dict[str, Any]:
        """What a line says, if it is an entry of the log."""
        if line.startswith(_REFUSAL):
            self._refusal = line.removeprefix(_REFUSAL).strip()
        try:
            entry = json.loads(line)
        except ValueError:
            return {}
        if not isinstance(entry, dict):
            return {}
        if entry.get("level") in _ERRORS:
            details = [str(entry[key]).strip().splitlines()[-1] for key in _DETAILS if entry.get(key)]
            self._error = ": ".join([str(entry.get("event")), *details])
        return entry

    def _failure(self, what: str) -> HocketError:
        self._ended.wait(_LAST_SECONDS)
        why = self._refusal or self._status() + (f", after the error {self._error!r}" if self._error else "")
        if _LOCKED in why:
            why += " (a suite that runs with this data answers without --device and --data)"
        elif not self._refusal:
            why += ": `hocket up` shows all that it logs"
        return HocketError(Reason.NOT_READY, f"the suite of this command {what}: {why}", suite_has_ended="true")

    def _status(self) -> str:
        try:
            status = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return "it has stopped logging"
        if status >= 0:
            return f"exit status {status}"
        number = signal.Signals(-status)
        return f"killed by {number.name}{' (out of memory?)' if number is signal.SIGKILL else ''}"
