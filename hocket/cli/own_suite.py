"""A suite of a command's own: a process on free ports of this machine that ends with the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import IO, TYPE_CHECKING, Final

from hocket.cli import base, output, serve
from hocket.client import blocking
from hocket.client.calls import GRPC_STATUS
from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import typer

_STOP_SECONDS_MAX: Final = 15.0
_LAST_SECONDS: Final = 1.0
"""How long a process may take to end after its connections."""
_ON_COMMAND_LINE: Final = "COMMANDLINE"
_TLS: Final = "HOCKET_TLS__"
_LOCKED: Final = "does another registry use this folder"


def wants_own(context: typer.Context, device: str | None, data: Path | None) -> bool:
    """Whether the options ask for a suite of the command's own.

    Raises:
        HocketError: `BAD_REQUEST` if they name a router as well.
    """
    if device is None and data is None:
        return False
    source = context.get_parameter_source("router")
    if source is not None and source.name == _ON_COMMAND_LINE:
        raise HocketError(
            Reason.BAD_REQUEST, "--device and --data start a suite of this command's own: leave out --router, or them"
        )
    return True


@contextmanager
def own_router(*, device: str | None, data: Path | None, wanted: str, shown: bool) -> Iterator[blocking.RouterClient]:
    """A connection to the router of a suite that lives until the block ends.

    Args:
        device: Where it computes; None for what its settings say.
        data: Its data; None for this person's suite's.
        wanted: Its base, by name or digest; empty for the only one.
        shown: Whether people are told that it starts.

    Raises:
        HocketError: `NO_BASE` if no base has been added, `BAD_REQUEST` and `UNKNOWN_BASE` as
            `hocket.known_bases.KnownBases.find`, `NOT_READY` if the suite does not start, or ends before the block.
    """
    known = base.read(data)
    chosen = known.find(wanted)
    if chosen is None:
        raise HocketError(Reason.NO_BASE, "no base model may be served yet: `hocket base add PATH` adds one")
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
    command = [sys.executable, "-P", "-m", "services.suite", "--supervised", "--log-format", "json"]
    for assignment in serve.assignments(settings):
        command += ["--set", assignment]
    # A session of its own: Ctrl-C in a terminal is for this command, which ends the suite by closing its input.
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
        last: deque[str] = deque(maxlen=1)
        try:
            seen = shown and sys.stderr.isatty()
            with output.console(stderr=True).status(f"starting {chosen.name}") if seen else nullcontext():
                address = _ready(_pipe(process.stderr), last)
            # What it logs must not fill the pipe.
            reading = Thread(target=last.extend, args=(process.stderr,), daemon=True)
            reading.start()
            with blocking.connect(address) as client, _told(process, reading, last):
                yield client
        finally:
            _pipe(process.stdin).close()
            try:
                process.wait(_STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _told(process: subprocess.Popen[str], reading: Thread, last: deque[str]) -> Iterator[None]:
    """Say of a call to a suite that has ended why it has."""
    try:
        yield
    except HocketError as error:
        if GRPC_STATUS not in error.metadata:  # a service has refused
            raise
        try:
            process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            raise error from None
        reading.join()
        raise _ended("has ended", last) from error


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 - for the type checker: it was asked for
    return pipe


def _ready(log: IO[str], last: deque[str]) -> str:
    """The router's address, as soon as the suite says that a request would be served."""
    for line in log:
        if line.strip():
            last.append(line)
        if '"ready"' not in line:
            continue
        entry = json.loads(line)
        if entry.get("event") == "ready" and "router" in entry:
            return str(entry["router"])
    raise _ended("did not start", last)


def _ended(what: str, last: deque[str]) -> HocketError:
    said = (last[0] if last else "it said nothing").strip().removeprefix("hocket: ")
    advice = " (a suite that runs with this data answers without --device and --data)" if _LOCKED in said else ""
    return HocketError(Reason.NOT_READY, f"the suite of this command {what}: {said}{advice}")
