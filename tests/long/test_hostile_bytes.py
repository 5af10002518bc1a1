"""Every flipped bit and every truncation of a package, sent to a real registry: refused by name, or harmless."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Situation
from hocket.identity import digest_of
from hocket.packages import apr
from tests.builders import apr_bytes, linear, same, sealed, signer
from tests.registries import process_in, trust_in
from tests.signing import ACME_SEED, envelope_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hocket.client.registry import RegistryClient

pytestmark = pytest.mark.long

UPLOADS_AT_ONCE = 12
UPLOAD_SECONDS_MAX = 5.0
RESERVED = range(22, 32)
"""Bytes of the header that are written as zero and ignored."""

PLAIN = apr_bytes(linear(), compression="none")
SQUEEZED = apr_bytes(linear())
SIGNED = apr_bytes(linear(), signing=signer(ACME_SEED))


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each file that differs in one bit, with the place of its byte."""
    for place in range(len(data)):
        for bit in range(8):
            yield place, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def resealed(data: bytes) -> bytes:
    """The file with its checksum set right again."""
    return sealed(data[:-4])


class Sender:
    """Sends files to one registry, and judges what comes back."""

    def __init__(self, client: RegistryClient) -> None:
        self._client = client
        self._gate = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self.outcomes: Counter[str] = Counter()
        self.slowest_seconds = 0.0
        self.number = 0

    async def send(self, data: bytes, *, under_release: bool) -> bool:
        """Whether it was accepted; a refusal must be a documented one, that blames the bytes or the proof."""
        self.number += 1
        release = envelope_of(data, name=f"acme/n@{self.number}") if under_release else b""
        async with self._gate:
            begin = time.perf_counter()
            try:
                response = await asyncio.wait_for(self._client.publish(data, release), UPLOAD_SECONDS_MAX)
            except HocketError as error:
                assert error.situation in {Situation.MALFORMED, Situation.REFUSED}, error  # noqa: PT017 - it may also succeed
                self.outcomes[error.reason] += 1
                return False
            finally:
                self.slowest_seconds = max(self.slowest_seconds, time.perf_counter() - begin)
        assert response.created
        self.outcomes["accepted"] += 1
        return True

    async def send_all(self, files: Iterator[tuple[int, bytes]], *, under_release: bool) -> list[tuple[int, bytes]]:
        """Those that were accepted."""
        listed = list(files)
        accepted = await asyncio.gather(*[self.send(data, under_release=under_release) for _, data in listed])
        return [file for file, taken in zip(listed, accepted, strict=True) if taken]


def meaning(data: bytes) -> Any:
    """The model in a file."""
    _, model = apr.decode(apr.split(data), digest_of(data))
    return model


async def test_no_flipped_bit_and_no_truncation_gets_through_or_stops_the_registry(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    trust_in(tmp_path)
    async with process_in(tmp_path) as (process, client):
        sender = Sender(client)
        # As it is: the checksum finds every one, whether an envelope or the file itself vouches for the bytes.
        for data, under_release in ((PLAIN, True), (SQUEEZED, True), (SIGNED, False), (SIGNED, True)):
            assert await sender.send_all(flips(data), under_release=under_release) == []
        # With the checksum set right, the embedded signature finds it: it covers reserved bytes too.
        for under_release in (False, True):
            body = ((place, resealed(data)) for place, data in flips(SIGNED) if place < len(SIGNED) - 4)
            assert await sender.send_all(body, under_release=under_release) == []
        # Without a signature inside, whatever the publisher has signed as a whole is read as it stands, or refused.
        for data in (PLAIN, SQUEEZED):
            body = ((place, resealed(flipped)) for place, flipped in flips(data) if place < len(data) - 4)
            for place, taken in await sender.send_all(body, under_release=True):
                assert place not in RESERVED or same(meaning(taken), meaning(data))
        for data, under_release in ((PLAIN, True), (SQUEEZED, True), (SIGNED, False), (SIGNED, True)):
            cuts = ((size, data[:size]) for size in range(len(data)))
            assert await sender.send_all(cuts, under_release=under_release) == []
            cuts = ((size, sealed(data[:size])) for size in range(len(data) - 4))
            assert await sender.send_all(cuts, under_release=under_release) == []

        assert process.returncode is None
        fresh = apr_bytes(linear(3, 4))
        assert (await client.publish(fresh, envelope_of(fresh, name="acme/afterwards@1"))).created
        assert (await client.download((await client.get_package("acme/afterwards@1")).digest))[1] == fresh
        record_property("files", sender.number)
        record_property("slowest_seconds", round(sender.slowest_seconds, 3))
        record_property("outcomes", str(dict(sender.outcomes)))
