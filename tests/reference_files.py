"""The reference's files, as their manifest says to open them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hocket.packages import Password, RecipientKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.packages import Credential


def credential_of(entry: Mapping[str, Any]) -> Credential | None:
    """What a file of the manifest is to be opened with; None for nothing."""
    how = entry["open_with"]
    if "password" in how:
        return Password(how["password"])
    if "secret_key" in how:
        return RecipientKey(bytes.fromhex(how["secret_key"]))
    return None
