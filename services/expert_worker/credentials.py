"""What opens encrypted packages on this worker: secret files that its own settings name, and nothing else.

No request, argument or registry brings a credential, and none leaves the process: a worker announces for which packages
it has one, by name and digest alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - settings are built from their types
from typing import TYPE_CHECKING

from hocket.credential_files import CREDENTIALS_MAX, read_password, read_recipient_key
from hocket.errors import HocketError
from hocket.identity import check_name, is_digest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from hocket.packages import Credential


@dataclass(frozen=True, slots=True)
class CredentialFile:
    """One entry of `[worker.credentials]`: exactly one of these files.

    Args:
        password_file: Secret file with a password, one line of UTF-8.
        key_file: Secret file with a recipient's X25519 private key, 32 raw bytes or 64 hexadecimal digits.
    """

    password_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.password_file is None) == (self.key_file is None):
            raise ValueError("give either password_file or key_file")

    def read(self) -> Credential:
        """The credential in it.

        Raises:
            HocketError: `BAD_KEY_FILE` if the file holds none, or is open to others.
        """
        if self.password_file is not None:
            return read_password(self.password_file)
        assert self.key_file is not None  # noqa: S101 - one of the two is there
        return read_recipient_key(self.key_file)


def check_addresses(addresses: Collection[str]) -> None:
    """Return if credentials can be for these: digests, or `publisher/name`, as many as a worker may announce.

    Raises:
        ValueError: They cannot.
    """
    if len(addresses) > CREDENTIALS_MAX:
        raise ValueError(
            f"credentials are for at most {CREDENTIALS_MAX} packages, not {len(addresses)}: "
            "one for a publisher/name opens all its versions"
        )
    for address in addresses:
        _check_address(address)


def _check_address(address: str) -> None:
    publisher, _, name = address.partition("/")
    try:
        if not is_digest(address):
            check_name(publisher, "publisher")
            check_name(name)
    except HocketError as error:
        raise ValueError(
            f"credentials are for packages, by publisher/name or sha256:<64 hex digits>, not {address[:80]!r}"
        ) from error


def read_all(files: Mapping[str, CredentialFile]) -> dict[str, Credential]:
    """All credentials, by digest or `publisher/name`.

    Raises:
        HocketError: `BAD_KEY_FILE` for the first file that holds none, or is open to others.
    """
    return {address: file.read() for address, file in files.items()}
