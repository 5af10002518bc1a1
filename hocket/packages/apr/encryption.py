"""Encrypted payload blocks: AES-256-GCM, under a key made from a password or agreed with a recipient.

    password    salt 16                             nonce 12  ciphertext  tag 16
    recipient   sender's ephemeral key 32  hint 8   nonce 12  ciphertext  tag 16

From a password the key is Argon2id (version 1.3, 19456 KiB, 2 passes, 1 lane, 32 bytes) of its UTF-8 bytes and the
salt. For a recipient it is HKDF-SHA256 (no salt, info `apr-v1-encrypt`) of the X25519 secret that the ephemeral key and
the recipient's have in common; the hint is the first 8 bytes of the recipient's public key, for choosing a key, no
check. Nothing is bound to the ciphertext: whoever needs header and metadata authenticated signs the file.

Nothing in a file says which of the two it is. The type of the credential decides, and nothing is tried.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from dataclasses import dataclass
from typing import Final, TypeAlias

import nacl.exceptions
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.pwhash import argon2id

from hocket.errors import HocketError, Reason

X25519_KEY_BYTES: Final = 32
"""Size of a private key, and of a public one."""
HINT_BYTES: Final = 8
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
DERIVATIONS_MAX: Final = 2
"""Keys made from passwords at once in one process: each takes 19 MiB and some 20 ms of a core; others wait."""

_SALT_BYTES: Final = 16
_KEY_BYTES: Final = 32
_ARGON2_PASSES: Final = 2
_ARGON2_MEMORY_BYTES: Final = 19456 * 1024
_RETRY_SECONDS: Final = 1.0
_HKDF_INFO: Final = b"apr-v1-encrypt"
_PASSWORD_NONCE_OFFSET: Final = _SALT_BYTES
_RECIPIENT_NONCE_OFFSET: Final = X25519_KEY_BYTES + HINT_BYTES
_RECIPIENT: Final = re.compile(r"x25519:[0-9a-f]{64}")
_deriving: Final = threading.BoundedSemaphore(DERIVATIONS_MAX)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Password:
    """A password: opens what was encrypted with it, and encrypts. Its repr shows nothing of it.

    Args:
        text: Used as its UTF-8 bytes, as it is. May be empty, which keeps no secret.

    Raises:
        HocketError: `BAD_REQUEST` if it is no Unicode text (a lone surrogate).
    """

    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise HocketError(Reason.BAD_REQUEST, "the password is not Unicode text: it has no UTF-8 form") from None


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whom a payload is encrypted for: an X25519 public key, spelled `x25519:<64 hex>`.

    Args:
        public_key: 32 bytes.

    Raises:
        HocketError: `BAD_REQUEST` if it has another size.
    """

    public_key: bytes

    def __post_init__(self) -> None:
        _check_size(self.public_key, "public")

    def __str__(self) -> str:
        return f"x25519:{self.public_key.hex()}"

    @classmethod
    def parse(cls, text: str) -> Recipient:
        """The recipient that is spelled `x25519:<64 hex>`.

        Raises:
            HocketError: `BAD_REQUEST` if the text is not spelled so.
        """
        if _RECIPIENT.fullmatch(text) is None:
            raise HocketError(
                Reason.BAD_REQUEST, f"{text[:80]!r} is not a recipient's public key (x25519:<64 hex digits>)"
            )
        return cls(bytes.fromhex(text.removeprefix("x25519:")))

    @property
    def hint(self) -> bytes:
        """By what a file says whom it is for."""
        return self.public_key[:HINT_BYTES]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class RecipientKey:
    """A recipient's X25519 private key: opens what was encrypted for it. Its repr shows nothing of it.

    Args:
        private_key: 32 bytes.

    Raises:
        HocketError: `BAD_REQUEST` if it has another size.
    """

    private_key: bytes

    def __post_init__(self) -> None:
        _check_size(self.private_key, "private")

    @property
    def recipient(self) -> Recipient:
        """Whom others encrypt for."""
        private = X25519PrivateKey.from_private_bytes(self.private_key)
        return Recipient(private.public_key().public_bytes_raw())


Credential: TypeAlias = Password | RecipientKey
"""What opens an encrypted payload."""

Target: TypeAlias = Password | Recipient
"""What a payload is encrypted with, or for."""


def hint_of(block: memoryview) -> bytes:
    """The 8 bytes that say whom a block is for, if it is for a recipient; of a password's block they mean nothing."""
    return bytes(block[X25519_KEY_BYTES:_RECIPIENT_NONCE_OFFSET])


def overhead_bytes(of: Password | Recipient | RecipientKey) -> int:
    """How much longer a block is than what is encrypted in it: 44 bytes with a password, 68 for a recipient."""
    return _nonce_offset(of) + NONCE_BYTES + TAG_BYTES


def seal(payload: bytes, to: Target) -> bytes:
    """Encrypt a payload, under a fresh salt or ephemeral key and a fresh nonce.

    With a password this derives a key: call it from a thread where an event loop runs.

    Args:
        payload: As it would be stored in the clear: compressed.
        to: A password, or a recipient.

    Raises:
        HocketError: `BAD_REQUEST` for a recipient whose key no secret can be agreed with (one of small order);
            `DEVICE_MEMORY` if there is no room to make a key of a password.
    """
    nonce = os.urandom(NONCE_BYTES)
    if isinstance(to, Password):
        salt = os.urandom(_SALT_BYTES)
        return salt + nonce + AESGCM(_derived_key(to, salt)).encrypt(nonce, payload, None)
    ephemeral = X25519PrivateKey.generate()
    try:
        key = _agreed_key(ephemeral, to.public_key)
    except ValueError:
        raise HocketError(
            Reason.BAD_REQUEST, f"nothing can be encrypted for {to}: it is not the public key of a private one"
        ) from None
    start = ephemeral.public_key().public_bytes_raw() + to.hint + nonce
    return start + AESGCM(key).encrypt(nonce, payload, None)


def unseal(block: memoryview, credential: Credential) -> bytes:
    """Decrypt a payload block; nothing of it is given back before its tag has been checked.

    With a password this derives a key, at most `DERIVATIONS_MAX` at once: call it from a thread where an event loop
    runs.

    Args:
        block: As stored.
        credential: Its type says how the block is read.

    Raises:
        HocketError: `BAD_LENGTH` if the block is too short to be one; `WRONG_RECIPIENT` if its hint names another key;
            `DECRYPTION_FAILED` if credential and block do not fit, be it a wrong password or key, or altered bytes:
            these cannot be told apart; `DEVICE_MEMORY` if there is no room to make a key of a password.
    """
    if len(block) < overhead_bytes(credential):
        how = "with a password" if isinstance(credential, Password) else "for a recipient"
        raise HocketError(
            Reason.BAD_LENGTH,
            f"the payload has {len(block)} bytes, encryption {how} adds {overhead_bytes(credential)} alone",
        )
    if isinstance(credential, Password):
        key = _derived_key(credential, bytes(block[:_SALT_BYTES]))
    else:
        if hint_of(block) != credential.recipient.hint:
            raise HocketError(
                Reason.WRONG_RECIPIENT,
                "the package is not encrypted for this key: the one that it names begins with "
                f"x25519:{hint_of(block).hex()}, or it is encrypted with a password",
            )
        key = b""
        with contextlib.suppress(ValueError):  # an ephemeral key of small order: everybody would know the secret
            private = X25519PrivateKey.from_private_bytes(credential.private_key)
            key = _agreed_key(private, bytes(block[:X25519_KEY_BYTES]))
    offset = _nonce_offset(credential)
    nonce = bytes(block[offset : offset + NONCE_BYTES])
    if key:
        with contextlib.suppress(InvalidTag):
            return AESGCM(key).decrypt(nonce, block[offset + NONCE_BYTES :], None)
    # Not while the other error is handled: it would be this one's context, and keep the block in memory.
    raise HocketError(
        Reason.DECRYPTION_FAILED,
        "the payload cannot be decrypted: the password or key is not the one it was encrypted with, or it was altered",
    )


def _nonce_offset(of: Password | Recipient | RecipientKey) -> int:
    return _PASSWORD_NONCE_OFFSET if isinstance(of, Password) else _RECIPIENT_NONCE_OFFSET


def _derived_key(password: Password, salt: bytes) -> bytes:
    """The key that a password makes with a salt.

    Raises:
        HocketError: `DEVICE_MEMORY` if there is no room to make it.
    """
    with _deriving, contextlib.suppress(MemoryError, nacl.exceptions.RuntimeError):  # the library has no other failure
        return argon2id.kdf(
            _KEY_BYTES, password.text.encode(), salt, opslimit=_ARGON2_PASSES, memlimit=_ARGON2_MEMORY_BYTES
        )
    raise HocketError(
        Reason.DEVICE_MEMORY,
        f"making a key of a password takes {_ARGON2_MEMORY_BYTES >> 20} MiB, which this machine does not have left: "
        "try again, or see what else runs here",
        retry_after_seconds=_RETRY_SECONDS,
    )


def _agreed_key(private: X25519PrivateKey, public_key: bytes) -> bytes:
    """The key that two parties agree on.

    Raises:
        ValueError: The public key is of small order.
    """
    secret = private.exchange(X25519PublicKey.from_public_bytes(public_key))
    return HKDF(SHA256(), _KEY_BYTES, salt=None, info=_HKDF_INFO).derive(secret)


def _check_size(key: bytes, what: str) -> None:
    if len(key) != X25519_KEY_BYTES:
        raise HocketError(Reason.BAD_REQUEST, f"an X25519 {what} key is {X25519_KEY_BYTES} raw bytes, not {len(key)}")
