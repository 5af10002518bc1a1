"""A base to train on, and a folder to do it in, for the tests of training in several folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.trainings import Workshop, workshop

if TYPE_CHECKING:
    from pathlib import Path


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
