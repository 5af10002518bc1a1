"""The starter kit as files: a base, experts with their releases, and whose signatures count.

`hocket-starter/` is a model in a Hugging Face folder, `experts/` has `.expert` files with their releases beside them,
and `trust/` the publisher's public key.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hocket import known_bases
from hocket.errors import HocketError, Reason
from hocket.packages import open_package
from hocket.packages.adapter import AdapterFacts
from hocket.packages.release import RELEASE_SUFFIX
from hocket.trust_folder import TrustFolder

if TYPE_CHECKING:
    from pathlib import Path

    from hocket.packages.trust import Proof

BASE: Final = "hocket-starter"
"""What the base is called, as its folder is."""


@dataclass(frozen=True, slots=True)
class Verified:
    """An expert that somebody trusted vouches for.

    Args:
        data: Its package.
        release: The signed statement beside it.
        facts: What is known about the package.
        proof: Who vouches for it.
    """

    data: bytes
    release: bytes
    facts: AdapterFacts
    proof: Proof


@dataclass(frozen=True, slots=True)
class Kit:
    """A starter kit.

    Args:
        folder: Where it lies.
    """

    folder: Path

    def check(self) -> None:
        """Pass if everything is there.

        Raises:
            HocketError: `BAD_REQUEST` with what is missing.
        """
        for pattern in (f"{BASE}/*.safetensors", "experts/*.expert", "trust/*.toml"):
            if not any(self.folder.glob(pattern)):
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"no starter kit in {self.folder}: {pattern} is missing; `make starter` makes one",
                )

    def prepare(self, data: Path) -> None:
        """Have a suite that will keep its data in a folder trust the base and the kit's publisher.

        Raises:
            HocketError: As `hocket.known_bases.add`.
        """
        known_bases.add(data / "bases", self.folder / BASE)
        shutil.copytree(self.folder / "trust", data / "trust", dirs_exist_ok=True)

    def experts(self) -> list[Path]:
        """The package files, by name."""
        return sorted((self.folder / "experts").glob("*.expert"))

    def verified(self, path: Path) -> Verified:
        """Read a package file, and open it as a registry does.

        Raises:
            HocketError: The refusals of `open_package`.
        """
        data = path.read_bytes()
        release = path.with_name(path.name + RELEASE_SUFFIX).read_bytes()
        trust = TrustFolder(self.folder / "trust").read()
        package = open_package(data, releases=[release], trust=trust, now=datetime.now(UTC))
        if not isinstance(package.facts, AdapterFacts):
            raise HocketError(Reason.BAD_REQUEST, f"{path} is no adapter expert")
        return Verified(data, release, package.facts, package.provenance.proofs[0])
