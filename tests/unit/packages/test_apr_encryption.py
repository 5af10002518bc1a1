"""Encrypted payloads: the reference's vectors, both modes, and every way in which a credential does not fit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import nacl.exceptions
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.pwhash import argon2id

from hocket.errors import HocketError, Reason
from hocket.packages import Password, Recipient, RecipientKey
from hocket.packages.apr import encryption
from hocket.packages.apr.encryption import DERIVATIONS_MAX, hint_of, overhead_bytes, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWORD = Password("correct horse battery staple")
KEY = RecipientKey(b"\x09" * 32)
OTHER_KEY = RecipientKey(b"\x0a" * 32)
PAYLOAD = b"some compressed bytes"

# From the reference: a password's key with nonce 0, and what two X25519 keys agree on.
PASSWORD_BLOCK = bytes(range(16)) + bytes(12) + bytes.fromhex("c9f6ee731b1d6fea1fc592682e6d8dc1ecfd82")
PUBLIC_KEY = "57db4b359f23ae5e146e4e2512056704722506348c150c14753d0c933d04d421"
EPHEMERAL = bytes.fromhex("50a61409b1ddd0325e9b16b700e719e9772c07000b1bd7786e907c653d20495d")
AGREED = bytes.fromhex("4347a7221b9673f81e2c9c1d5bf4306d2c4ac7eff52f07ef2549a293329d1393")
SMALL_ORDER = (bytes(32), b"\x01" + bytes(31), (2**255 - 20).to_bytes(32, "little"))


def block_for(public_key: bytes, ephemeral: bytes = EPHEMERAL) -> bytes:
    nonce = b"\x05" * 12
    return ephemeral + public_key[:8] + nonce + AESGCM(AGREED).encrypt(nonce, PAYLOAD, None)


def refusal(block: bytes, credential: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        unseal(memoryview(block), credential)
    return caught.value


def flipped(block: bytes, offset: int) -> bytes:
    return block[:offset] + bytes([block[offset] ^ 1]) + block[offset + 1 :]


class TestVectors:
    def test_a_password_opens_what_the_reference_has_encrypted_with_it(self) -> None:
        assert unseal(memoryview(PASSWORD_BLOCK), Password("hunter2")) == b"abc"

    def test_a_recipient_has_the_references_public_key(self) -> None:
        assert KEY.recipient.public_key.hex() == PUBLIC_KEY
        assert str(KEY.recipient) == f"x25519:{PUBLIC_KEY}"

    def test_a_recipient_opens_what_the_references_keys_agree_on(self) -> None:
        assert unseal(memoryview(block_for(KEY.recipient.public_key)), KEY) == PAYLOAD


@pytest.mark.parametrize(("to", "credential"), [(PASSWORD, PASSWORD), (KEY.recipient, KEY)], ids=["password", "key"])
class TestBothModes:
    def test_what_was_sealed_is_unsealed(self, to: Any, credential: Any) -> None:
        for payload in (b"", b"x", PAYLOAD):
            block = seal(payload, to)
            assert len(block) == len(payload) + overhead_bytes(to)
            assert unseal(memoryview(block), credential) == payload

    def test_nothing_repeats(self, to: Any, credential: Any) -> None:
        del credential
        one, other = seal(PAYLOAD, to), seal(PAYLOAD, to)
        assert one[:16] != other[:16]
        assert one[-30:] != other[-30:]

    def test_altered_bytes_look_like_a_wrong_credential(self, to: Any, credential: Any) -> None:
        block = seal(PAYLOAD, to)
        wrong = Password("another") if to is PASSWORD else None
        places = [0, len(block) - len(PAYLOAD) - 20, len(block) - 20, len(block) - 1]
        refusals = [refusal(flipped(block, place), credential) for place in places]
        if wrong is not None:
            refusals.append(refusal(block, wrong))
        assert {(error.reason, error.message) for error in refusals} == {
            (Reason.DECRYPTION_FAILED, refusals[0].message)
        }

    def test_a_block_cut_short_is_refused(self, to: Any, credential: Any) -> None:
        block = seal(b"", to)
        assert refusal(block[:-1], credential).reason is Reason.BAD_LENGTH
        assert refusal(b"", credential).reason is Reason.BAD_LENGTH
        assert unseal(memoryview(block), credential) == b""
        assert refusal(seal(PAYLOAD, to)[:-1], credential).reason is Reason.DECRYPTION_FAILED


@pytest.mark.parametrize(
    ("block", "credential"),
    [(PASSWORD_BLOCK, PASSWORD), (block_for(KEY.recipient.public_key, SMALL_ORDER[0]), KEY)],
    ids=["another password", "a secret that everybody knows"],
)
def test_a_refusal_without_its_traceback_keeps_nothing_of_the_block(block: bytes, credential: Any) -> None:
    error = refusal(block, credential).with_traceback(None)

    assert error.reason is Reason.DECRYPTION_FAILED
    assert (error.__context__, error.__cause__) == (None, None)


class TestRecipients:
    def test_another_key_than_the_one_named_is_refused_before_any_cryptography(self) -> None:
        block = seal(PAYLOAD, KEY.recipient)
        assert hint_of(memoryview(block)) == KEY.recipient.hint == bytes.fromhex(PUBLIC_KEY[:16])
        error = refusal(block, OTHER_KEY)
        assert error.reason is Reason.WRONG_RECIPIENT
        assert PUBLIC_KEY[:16] in error.message
        assert refusal(flipped(block, 32), KEY).reason is Reason.WRONG_RECIPIENT

    def test_a_password_does_not_open_what_is_for_a_recipient_nor_a_key_what_has_a_password(self) -> None:
        assert refusal(seal(PAYLOAD, KEY.recipient), PASSWORD).reason is Reason.DECRYPTION_FAILED
        assert refusal(seal(bytes(50), PASSWORD), KEY).reason is Reason.WRONG_RECIPIENT

    def test_the_hint_is_no_check(self) -> None:
        block = seal(PAYLOAD, KEY.recipient)
        pretending = block[:32] + OTHER_KEY.recipient.hint + block[40:]
        assert refusal(pretending, OTHER_KEY).reason is Reason.DECRYPTION_FAILED

    @pytest.mark.parametrize("point", SMALL_ORDER, ids=["zero", "one", "minus one"])
    def test_a_secret_that_everybody_knows_is_none(self, point: bytes) -> None:
        assert refusal(block_for(KEY.recipient.public_key, point), KEY).reason is Reason.DECRYPTION_FAILED
        with pytest.raises(HocketError) as caught:
            seal(PAYLOAD, Recipient(point))
        assert caught.value.reason is Reason.BAD_REQUEST

    def test_a_recipient_is_spelled_and_read_alike(self) -> None:
        assert Recipient.parse(str(KEY.recipient)) == KEY.recipient

    @pytest.mark.parametrize(
        "text", ["", PUBLIC_KEY, f"ed25519:{PUBLIC_KEY}", f"x25519:{PUBLIC_KEY[2:]}", f"x25519:{PUBLIC_KEY.upper()}"]
    )
    def test_what_is_not_spelled_as_a_recipient_is_refused(self, text: str) -> None:
        with pytest.raises(HocketError) as caught:
            Recipient.parse(text)
        assert caught.value.reason is Reason.BAD_REQUEST

    @pytest.mark.parametrize("kind", [Recipient, RecipientKey])
    @pytest.mark.parametrize("size_bytes", [0, 31, 33, 64])
    def test_a_key_of_another_size_is_refused(self, kind: Any, size_bytes: int) -> None:
        with pytest.raises(HocketError) as caught:
            kind(bytes(size_bytes))
        assert caught.value.reason is Reason.BAD_REQUEST


class TestPasswords:
    def test_an_empty_password_is_one(self) -> None:
        assert unseal(memoryview(seal(PAYLOAD, Password(""))), Password("")) == PAYLOAD

    def test_a_password_is_taken_as_it_is_written(self) -> None:
        composed, decomposed = Password("caf\u00e9"), Password("cafe\u0301")
        block = seal(PAYLOAD, composed)
        assert unseal(memoryview(block), composed) == PAYLOAD
        assert refusal(block, decomposed).reason is Reason.DECRYPTION_FAILED

    def test_what_is_not_unicode_text_is_refused(self) -> None:
        with pytest.raises(HocketError) as caught:
            Password("\ud800")
        assert caught.value.reason is Reason.BAD_REQUEST
        assert "ud800" not in caught.value.message

    @pytest.mark.parametrize("failure", [MemoryError, nacl.exceptions.RuntimeError])
    def test_no_room_to_make_a_key_is_a_refusal_that_passes(
        self, failure: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(argon2id, "kdf", Mock(side_effect=failure))
            error = refusal(PASSWORD_BLOCK, Password("hunter2"))
            with pytest.raises(HocketError) as sealing:
                seal(PAYLOAD, PASSWORD)
        assert error.reason is sealing.value.reason is Reason.DEVICE_MEMORY
        assert error.retry_after_seconds
        assert error.__context__ is None, "whose frames would keep the password"
        assert unseal(memoryview(PASSWORD_BLOCK), Password("hunter2")) == b"abc"

    def test_few_keys_are_derived_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        running, most = 0, 0
        lock, go_on = threading.Lock(), threading.Event()

        @contextmanager
        def counted() -> Iterator[None]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            go_on.wait(0.05)
            yield
            with lock:
                running -= 1

        def kdf(*arguments: Any, **more: Any) -> bytes:
            with counted():
                return argon2id.kdf(*arguments, **more)

        monkeypatch.setattr(encryption, "argon2id", type("Counted", (), {"kdf": staticmethod(kdf)}))
        with ThreadPoolExecutor(6) as pool:
            opened = list(pool.map(lambda _: unseal(memoryview(PASSWORD_BLOCK), Password("hunter2")), range(6)))
        assert opened == [b"abc"] * 6
        assert most == DERIVATIONS_MAX


@pytest.mark.parametrize("secret", [PASSWORD, KEY], ids=["password", "key"])
def test_a_credential_shows_nothing_of_itself(secret: Any) -> None:
    for shown in (repr(secret), str(secret), f"{secret}", repr([secret]), repr({"a": secret})):
        for told in ("horse", "0909", "\\t\\t", "\t"):
            assert told not in shown


@settings(max_examples=50)
@given(block=st.binary(max_size=200))
def test_whatever_the_block_is_a_key_opens_it_or_refuses(block: bytes) -> None:
    error = refusal(block, KEY)
    assert error.reason in {Reason.BAD_LENGTH, Reason.WRONG_RECIPIENT, Reason.DECRYPTION_FAILED}


@settings(max_examples=50)
@given(block=st.binary(min_size=68, max_size=200))
def test_a_block_that_names_the_key_and_is_not_for_it_fails_to_decrypt(block: bytes) -> None:
    named = block[:32] + KEY.recipient.hint + block[40:]
    assert refusal(named, KEY).reason is Reason.DECRYPTION_FAILED
