from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.trainings import Workshop, workshop

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    workshop(folder, folder)
    return folder


@pytest.fixture
def shop(tiny: Path, tmp_path: Path) -> Workshop:
    return Workshop(tiny, tmp_path)
