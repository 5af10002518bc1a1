from __future__ import annotations

from pathlib import Path

import pytest

from hocket.paths import bases_folder, data_folder, trust_folder

HOME = Path("/home/ada")


@pytest.mark.parametrize("environ", [{}, {"XDG_DATA_HOME": ""}, {"XDG_DATA_HOME": "relative"}])
def test_data_is_at_home(environ: dict[str, str]) -> None:
    assert data_folder(environ, HOME) == HOME / ".local" / "share" / "hocket"


def test_data_is_where_xdg_says() -> None:
    assert data_folder({"XDG_DATA_HOME": "/data"}, HOME) == Path("/data/hocket")


def test_trust_is_part_of_the_data() -> None:
    assert trust_folder({}, HOME) == HOME / ".local" / "share" / "hocket" / "trust"


def test_bases_are_part_of_the_data() -> None:
    assert bases_folder({"XDG_DATA_HOME": "/data"}, HOME) == Path("/data/hocket/bases")
