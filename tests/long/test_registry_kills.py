"""A registry that is killed again and again, in the middle of whatever it does, keeps what it acknowledged."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Situation
from hocket.identity import digest_of
from hocket.v1.package_pb2 import TrustState
from tests.registries import fixed, mixture_release, numbers, process_in, running, trust_in
from tests.signing import envelope_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hocket.client.registry import RegistryClient

pytestmark = pytest.mark.long

ROUNDS = 200
CHANGES_PER_ROUND = 24


@dataclass
class Acknowledged:
    """What the registry has said is on disk.

    Attributes:
        packages: Bytes by digest.
        doomed: Digests that are to be withdrawn.
        yanked: Those that were.
        mixtures: Bodies by name.
        keys: Key ids revoked.
        revision: The latest one seen.
    """

    packages: dict[str, bytes] = field(default_factory=dict)
    doomed: set[str] = field(default_factory=set)
    yanked: set[str] = field(default_factory=set)
    mixtures: dict[str, bytes] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    revision: int = 0
    count: int = 0

    async def change(self, client: RegistryClient, number: int, dice: random.Random) -> None:
        """One change of some kind; it is noted here only when the registry has answered."""
        choice = dice.random()
        if choice < 0.1:
            key_id = f"{number:064x}"
            await client.revoke_key(key_id)
            self.keys.add(key_id)
        elif choice < 0.25 and self.packages.keys() - self.doomed:
            member = dice.choice(sorted(self.packages.keys() - self.doomed))
            record = fixed(f"m{number}", f"{member}")
            mixture = await client.put_mixture(record.body(), mixture_release(record))
            self.mixtures[record.name] = record.body()
            self.revision = max(self.revision, mixture.revision)
        else:
            data = numbers(number, features=dice.choice([2, 2, 2, 4000]))
            if choice > 0.9:
                self.doomed.add(digest_of(data))
            await client.publish(data, envelope_of(data, name=f"acme/n@{number}"))
            self.packages[digest_of(data)] = data
            if choice > 0.9:
                await client.yank(digest_of(data))
                self.yanked.add(digest_of(data))
        self.count += 1

    async def check(self, client: RegistryClient, digests: set[str], mixtures: set[str]) -> None:
        """Everything is still there; of these digests and mixtures every byte."""
        states = {package.digest: package.state async for package in client.list_packages()}
        assert self.packages.keys() <= states.keys()
        assert {states[digest] for digest in self.yanked} <= {TrustState.TRUST_STATE_YANKED}
        for digest in digests:
            assert (await client.download(digest))[1] == self.packages[digest]
        for name in mixtures:
            assert (await client.fetch_mixture(name)).body == self.mixtures[name]


async def test_two_hundred_kills_lose_nothing_that_was_acknowledged(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    trust_in(tmp_path)
    dice = random.Random(7)
    known = Acknowledged()
    interrupted = 0
    for number in range(ROUNDS):
        before, mixtures_before = set(known.packages), set(known.mixtures)
        async with process_in(tmp_path) as (process, client):
            await known.check(client, set(), set())
            changes = [
                asyncio.create_task(known.change(client, number * CHANGES_PER_ROUND + step, dice))
                for step in range(CHANGES_PER_ROUND)
            ]
            end = known.count + dice.randrange(CHANGES_PER_ROUND - 2)
            async with asyncio.timeout(20):
                while known.count < end:  # noqa: ASYNC110 - the changes count themselves
                    await asyncio.sleep(0)
                await asyncio.sleep(dice.random() * 0.004)
            process.send_signal(signal.SIGKILL)
            for outcome in await asyncio.gather(*changes, return_exceptions=True):
                if outcome is not None:
                    _broken_off(outcome)
                    interrupted += 1
        async with running(tmp_path) as registry:  # what lies on disk now, read by another process
            await known.check(
                registry.client(), known.packages.keys() - before, known.mixtures.keys() - mixtures_before
            )

    async with running(tmp_path) as registry:
        await known.check(registry.client(), set(known.packages), set(known.mixtures))
        feed = await registry.seen()
        assert known.keys <= {item.revocation.key_id for item in feed}
        assert feed[-1].revision >= known.revision
        assert list((tmp_path / "data" / "blobs" / "incoming").iterdir()) == []
    assert interrupted > ROUNDS
    record_property("acknowledged", known.count)
    record_property("interrupted", interrupted)


def _broken_off(outcome: Any) -> None:
    """A change that was not acknowledged ended because nobody was there any more."""
    assert isinstance(outcome, HocketError), outcome
    assert outcome.situation is Situation.UNAVAILABLE, outcome
