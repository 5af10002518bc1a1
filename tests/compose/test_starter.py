"""The starter kit in containers: the README's block `<!-- compose -->` is run as it stands."""

from __future__ import annotations

import asyncio
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.clusters import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.compose.stack import Stack

pytestmark = pytest.mark.compose

WORKERS = ("worker-1", "worker-2")
BLOCKS = re.findall(r"<!-- compose -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def with_kit(trusted: Stack) -> Iterator[Stack]:
    """The containers beside the kit, as in a clone; without its base again for whoever comes after."""
    shutil.copytree(ROOT / "starter", trusted.folder / "starter")
    yield trusted
    trusted.hocket("base", "remove", "hocket-starter", "--data", trusted.folder)
    trusted.compose("restart", *WORKERS)
    asyncio.run(trusted.healthy(*WORKERS))


def test_an_expert_of_the_kit_answers_out_of_a_container(with_kit: Stack) -> None:
    (block,) = BLOCKS
    output = with_kit.shell(block)
    assert "180 minutes" in output
