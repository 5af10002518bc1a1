"""One compose project for all of these tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from examples.publishing import Publisher
from hocket.client import connect_registry
from hocket.errors import HocketError, Reason
from hocket.keyring import load_key
from hocket.settings import read_token
from tests.builders import apr_bytes, linear
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


@pytest.fixture(scope="session")
def trusted(stack: Stack) -> Stack:
    """The same, where what the key of `stack` signs for acme is admitted by now."""
    stack.hocket("keygen")
    stack.hocket("trust", "add", "acme", "--key", stack.key, "--trust", stack.folder / "trust")
    asyncio.run(_until_trusted(stack))
    return stack


async def _until_trusted(stack: Stack) -> None:
    """Return when the registry has read the trust folder again."""
    publisher = Publisher("acme", load_key(stack.key))
    async with asyncio.timeout(10), connect_registry(stack.registry, read_token(stack.admin_token_file)) as registry:
        while True:
            try:
                await publisher.publish(registry, apr_bytes(linear(0.0)), "probe")
            except HocketError as error:
                if error.reason is not Reason.SIGNER_NOT_TRUSTED:
                    raise
                await asyncio.sleep(0.2)
            else:
                return
