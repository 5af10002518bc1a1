"""One compose project for all of these tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.compose.engine import engine
from tests.compose.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Built, up and healthy; nothing of it is left when the session ends."""
    with engine() as environment:
        stack = Stack.in_folder(tmp_path_factory.mktemp("compose"), environment)
        try:
            stack.up()
            yield stack
        finally:
            stack.down()
            assert not any(stack.left().values()), stack.left()
