"""A small signed file, changed in one bit or cut off anywhere: refused as it is, and with its checksum set right again.

Whoever changes a file on purpose computes the checksum anew, so there the signature has to find it. All of this takes
seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Policy, open_package
from hocket.packages.apr.encryption import Password, RecipientKey
from hocket.packages.apr.header import Flag
from hocket.packages.apr.quantization import quantized_model
from hocket.packages.model import QuantKind
from tests import builders
from tests.signing import ACME_SEED, roots

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = datetime(2026, 6, 1, tzinfo=UTC)
SECONDS_MAX = 60.0
CHECKSUM_BYTES = 4
SIGNATURE_BYTES = 96
FLAGS_AT = 21
HEADER_BYTES = 32
KEY = RecipientKey(b"\x09" * 32)
PASSWORD = Password("secret")

LICENSED = builders.METADATA | {
    "license": {"uuid": "u", "hash": "h", "expiry": "2031-01-31", "seats": 3, "tier": "Team"},
    "model_card": {"model_id": "m", "name": "n", "version": "1", "created_at": "t", "framework_version": "f", "x": 1.5},
}
SIGNING = builders.signer(ACME_SEED)
FILES = {
    "stored": builders.apr_bytes(compression="none", signing=SIGNING),
    "zstd": builders.apr_bytes(builders.mixture(), signing=SIGNING),
    "lz4": builders.apr_bytes(builders.mixture(), compression="lz4", signing=SIGNING),
    "with a licence and a card": builders.apr_bytes(metadata=LICENSED, signing=SIGNING),
    "quantised": builders.apr_bytes(quantized_model(builders.linear(), QuantKind.Q4_0), signing=SIGNING),
    "for a recipient": builders.apr_bytes(encryption=KEY.recipient, signing=SIGNING),
    "with a password": builders.apr_bytes(encryption=PASSWORD, signing=SIGNING),
}


def flips(data: bytes) -> Iterator[bytes]:
    """Each file that differs in one bit."""
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def resealed(data: bytes) -> bytes:
    return builders.sealed(data[:-CHECKSUM_BYTES])


def refusal(data: bytes, credential: Password | RecipientKey = KEY) -> Reason | None:
    """Why a file is refused by whoever trusts its signer, takes unsigned files besides, and has a key to any."""
    credentials = {digest_of(data): credential}
    try:
        open_package(data, trust=roots(), policy=Policy(allow_unsigned=True), now=NOW, credentials=credentials)
    except HocketError as error:
        return error.reason
    return None


FAST = ("stored", "with a licence and a card", "for a recipient")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in FILES]
)
def test_every_flipped_bit_and_every_truncation_is_refused_twice_over(name: str) -> None:
    data = FILES[name]
    begin = time.perf_counter()

    as_it_is = Counter(refusal(flipped) for flipped in flips(data))
    forged = Counter(refusal(resealed(flipped)) for flipped in list(flips(data))[: -8 * CHECKSUM_BYTES])
    cut = Counter(refusal(data[:size]) for size in range(len(data)))
    cut_and_forged = Counter(refusal(builders.sealed(data[:size])) for size in range(len(data) - CHECKSUM_BYTES))

    assert time.perf_counter() - begin < SECONDS_MAX
    assert as_it_is.total() == 8 * len(data)
    assert None not in as_it_is
    assert None not in forged
    assert None not in cut
    assert None not in cut_and_forged
    # The twin: the file as its publisher has written it.
    assert refusal(data, PASSWORD if name == "with a password" else KEY) is None
    # Under a right checksum nothing but the signature finds a change of what it covers, or of itself, where lengths
    # and ids stay such as could be.
    assert forged[Reason.SIGNATURE_INVALID] >= 8 * (len(data) - HEADER_BYTES - CHECKSUM_BYTES)


def test_a_signature_cannot_be_taken_away_from_a_file_for_those_who_require_one() -> None:
    data = FILES["stored"]
    bare = bytearray(data[: -SIGNATURE_BYTES - CHECKSUM_BYTES])
    bare[FLAGS_AT] &= ~Flag.SIGNED

    with pytest.raises(HocketError) as error:
        open_package(builders.sealed(bytes(bare)), trust=roots(), now=NOW)

    assert error.value.reason is Reason.UNSIGNED
    assert open_package(data, trust=roots(), now=NOW).provenance.embedded.trusted
