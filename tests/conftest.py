"""What tests of several folders share: Ctrl-C that works, a base to train on, and a folder to do it in."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import structlog

from tests.trainings import Workshop, workshop

if TYPE_CHECKING:
    from pathlib import Path

# A shell's background job ignores it, and with it every program that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Out of the box it shows the variables of every frame, which takes seconds where these are tensors.
structlog.configure(
    processors=[structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)],
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, made once."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    workshop(folder, folder)
    return folder


@pytest.fixture
def shop(tiny: Path, tmp_path: Path) -> Workshop:
    """A training of that base in a folder of its own."""
    return Workshop(tiny, tmp_path)
