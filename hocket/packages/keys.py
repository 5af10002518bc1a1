"""Ed25519 keys and signatures, by libsodium (PyNaCl) alone.

One implementation verifies everything, because implementations differ at the edges: libsodium refuses small-order
and non-canonical public keys and signatures whose scalar is not reduced, others accept some of them.

A private key is its 32-byte seed, a public key its 32-byte encoding, a signature 64 bytes (RFC 8032, pure
Ed25519).
"""

from __future__ import annotations

import secrets
from typing import Final

from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

from hocket.errors import HocketError, Reason

SEED_SIZE_BYTES: Final = 32
PUBLIC_KEY_SIZE_BYTES: Final = 32
SIGNATURE_SIZE_BYTES: Final = 64


def generate_seed() -> bytes:
    """A new private key: 32 bytes from the operating system's generator."""
    return secrets.token_bytes(SEED_SIZE_BYTES)


def public_key_of(seed: bytes) -> bytes:
    """The raw public key of a private key.

    Raises:
        HocketError: `BAD_REQUEST` if the seed is not 32 bytes.
    """
    return bytes(_signing_key(seed).verify_key)


def sign(seed: bytes, message: bytes) -> bytes:
    """The 64-byte signature of a message; the same every time for the same seed and message.

    Raises:
        HocketError: `BAD_REQUEST` if the seed is not 32 bytes.
    """
    return _signing_key(seed).sign(message).signature


def verify(public_key: bytes, message: bytes | memoryview, signature: bytes) -> None:
    """Return if `signature` is one of `message` by `public_key`.

    PyNaCl copies: this takes about four times the memory of the message while it runs.

    Raises:
        HocketError: `SIGNATURE_INVALID` otherwise, whatever is wrong: sizes, key encoding or the equation.
    """
    try:
        VerifyKey(public_key).verify(bytes(message), signature)
    except CryptoError as error:
        raise HocketError(
            Reason.SIGNATURE_INVALID,
            "the signature does not match: these bytes are not what the holder of the key signed",
        ) from error


def is_public_key(public_key: bytes) -> bool:
    """Whether the bytes encode a key that can verify anything: canonical and of full order."""
    return len(public_key) == PUBLIC_KEY_SIZE_BYTES and crypto_core_ed25519_is_valid_point(public_key)


def _signing_key(seed: bytes) -> SigningKey:
    if len(seed) != SEED_SIZE_BYTES:
        raise HocketError(Reason.BAD_REQUEST, f"a private key is {SEED_SIZE_BYTES} raw bytes, not {len(seed)}")
    return SigningKey(seed)
