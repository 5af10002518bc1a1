from __future__ import annotations

import hashlib

import pytest
from nacl.bindings import crypto_core_ed25519_scalar_add, crypto_scalarmult_ed25519_base_noclamp

from hocket.errors import HocketError, Reason
from hocket.packages.keys import generate_seed, is_public_key, public_key_of, sign, verify

# RFC 8032, section 7.1, test 2
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC_KEY = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
MESSAGE = b"\x72"
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)

GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493

WEAK_KEYS = {
    "the identity": b"\x01" + bytes(31),
    "order two": b"\xec" + b"\xff" * 30 + b"\x7f",
    "order four": bytes(32),
    "order eight": bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    "the identity, not canonical": b"\xee" + b"\xff" * 30 + b"\x7f",
    "order four, not canonical": b"\xed" + b"\xff" * 30 + b"\x7f",
}
# y = p + 3 spells the point whose canonical y is 3
NON_CANONICAL = b"\xf0" + b"\xff" * 30 + b"\x7f"


def forge(public_key: bytes, message: bytes) -> bytes:
    """A signature that satisfies s B = R + h A under a weak key A, made without any private key.

    R = s B, with s chosen such that h, reduced or not, is a multiple of eight: then h A vanishes.
    """
    for number in range(1, 1000):
        scalar = number.to_bytes(32, "little")
        commitment = crypto_scalarmult_ed25519_base_noclamp(scalar)
        challenge = int.from_bytes(hashlib.sha512(commitment + public_key + message).digest(), "little")
        if challenge % 8 == 0 and challenge % GROUP_ORDER % 8 == 0:
            return commitment + scalar
    raise AssertionError


def refuse(public_key: bytes, message: bytes, signature: bytes) -> None:
    with pytest.raises(HocketError) as refusal:
        verify(public_key, message, signature)
    assert refusal.value.reason is Reason.SIGNATURE_INVALID


def test_keys_and_signatures_are_those_of_rfc_8032() -> None:
    assert public_key_of(SEED) == PUBLIC_KEY
    assert sign(SEED, MESSAGE) == SIGNATURE
    verify(PUBLIC_KEY, MESSAGE, SIGNATURE)


def test_a_view_of_the_message_verifies_like_the_message() -> None:
    verify(PUBLIC_KEY, memoryview(b"x" + MESSAGE)[1:], SIGNATURE)


def test_a_signature_of_another_message_is_refused() -> None:
    refuse(PUBLIC_KEY, b"\x73", SIGNATURE)


def test_a_signature_by_another_key_is_refused() -> None:
    refuse(public_key_of(b"\x01" * 32), MESSAGE, SIGNATURE)


@pytest.mark.parametrize("size_bytes", [0, 31, 33, 64])
def test_a_public_key_of_another_size_is_refused(size_bytes: int) -> None:
    refuse((PUBLIC_KEY * 2)[:size_bytes], MESSAGE, SIGNATURE)


@pytest.mark.parametrize("size_bytes", [0, 63, 65, 128])
def test_a_signature_of_another_size_is_refused(size_bytes: int) -> None:
    refuse(PUBLIC_KEY, MESSAGE, (SIGNATURE * 2)[:size_bytes])


def test_a_signature_moved_into_the_message_is_refused() -> None:
    refuse(PUBLIC_KEY, SIGNATURE + MESSAGE, b"")


@pytest.mark.parametrize("public_key", WEAK_KEYS.values(), ids=WEAK_KEYS)
def test_a_weak_key_verifies_nothing_not_even_what_satisfies_the_equation(public_key: bytes) -> None:
    refuse(public_key, MESSAGE, forge(public_key, MESSAGE))
    assert not is_public_key(public_key)


def test_a_second_spelling_of_a_signature_is_refused() -> None:
    scalar = int.from_bytes(SIGNATURE[32:], "little") + GROUP_ORDER
    malleated = SIGNATURE[:32] + scalar.to_bytes(32, "little")
    assert crypto_core_ed25519_scalar_add(malleated[32:], bytes(32)) == SIGNATURE[32:]
    refuse(PUBLIC_KEY, MESSAGE, malleated)


def test_a_genuine_key_is_a_public_key() -> None:
    assert is_public_key(PUBLIC_KEY)
    assert not is_public_key(PUBLIC_KEY[:31])
    assert not is_public_key(NON_CANONICAL)


def test_seeds_are_thirty_two_bytes_and_never_the_same() -> None:
    seeds = {generate_seed() for _ in range(8)}
    assert len(seeds) == 8
    assert {len(seed) for seed in seeds} == {32}


@pytest.mark.parametrize("seed", [b"", SEED[:31], SEED + b"\x00", hashlib.sha512(SEED).digest()])
def test_a_private_key_of_another_size_is_refused(seed: bytes) -> None:
    for use in (public_key_of, lambda seed: sign(seed, MESSAGE)):
        with pytest.raises(HocketError) as refusal:
            use(seed)
        assert refusal.value.reason is Reason.BAD_REQUEST
