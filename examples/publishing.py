"""What both examples do with a model: sign it, trust the signer, publish it, and gate it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, ReleaseName, digest_of
from hocket.keyring import create_key, load_key
from hocket.mixtures import FixedGate, MixtureRecord, SoftmaxGate, gate_tensor
from hocket.packages import Purpose, Release, Subject, TrustedKey, public_key_of, sign_release
from hocket.trust_folder import TrustFolder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hocket.client import RegistryClient, RouterClient


@dataclass(frozen=True, slots=True)
class Publisher:
    """Someone who signs, and whom this suite trusts.

    Args:
        name: As in the trust folder.
        seed: The private key.
    """

    name: str
    seed: bytes

    @classmethod
    def trusted_in(cls, folder: Path, name: str) -> Publisher:
        """Make a key in `folder/keys` and trust it in `folder/trust`: `hocket keygen` and `hocket trust add`."""
        path = folder / "keys" / f"{name}.key"
        create_key(path)
        seed = load_key(path)
        TrustFolder(folder / "trust").add_key(TrustedKey(public_key_of(seed), name))
        return cls(name, seed)

    def release(self, data: bytes, name: str, version: str = "1.0.0", package_format: str = "apr") -> bytes:
        """The signed statement that binds a name to a package: `hocket sign`."""
        subject = Subject.of(Purpose.PACKAGE, data, package_format)
        return sign_release(Release(ReleaseName(self.name, name, version), subject), self.seed)

    async def publish(self, registry: RegistryClient, data: bytes, name: str, version: str = "1.0.0") -> str:
        """Sign an `.apr` package under a name and hand it to the registry: `hocket sign` and `hocket publish`.

        Returns:
            The package's digest.
        """
        await registry.publish(data, self.release(data, name, version))
        return digest_of(data)

    async def put(self, registry: RegistryClient, record: MixtureRecord, gate: bytes = b"", version: str = "1") -> None:
        """Sign a mixture and hand it to the registry: `hocket mixtures put`."""
        body = record.body()
        release = Release(ReleaseName(self.name, record.name, version), Subject.of(Purpose.MIXTURE, body, "mixture"))
        await registry.put_mixture(body, sign_release(release, self.seed), gate)


async def known(router: RouterClient, *models: str) -> None:
    """Wait until the router's feed has brought these models: publishing and routing are not one transaction.

    Raises:
        TimeoutError: It has not within ten seconds.
    """
    async with asyncio.timeout(10):
        for model in models:
            while not await _is_known(router, model):  # noqa: ASYNC110 - the news is in another process
                await asyncio.sleep(0.02)


async def _is_known(router: RouterClient, model: str) -> bool:
    try:
        await router.get_mixture(model)
    except HocketError as error:
        if error.reason is Reason.UNKNOWN_MODEL:
            return False
        raise
    return True


def softmax_mixture(
    name: str,
    digests: Sequence[str],
    weights: NDArray[np.float32],
    *,
    top_k: int,
    bias: NDArray[np.float64] | None = None,
    labels: tuple[str, ...] | None = None,
) -> tuple[MixtureRecord, bytes]:
    """A mixture with a trained gate, and the gate's tensor.

    Args:
        name: What clients address.
        digests: The experts, in the order of the gate's columns.
        weights: float32 `[F, E]`.
        top_k: Experts per row.
        bias: float64 `[E]`.
        labels: Ordered classes of the answer; None takes them from the experts.
    """
    tensor = gate_tensor(weights)
    gate = SoftmaxGate(
        features=weights.shape[0],
        experts=weights.shape[1],
        weights=digest_of(tensor),
        bias=None if bias is None else tuple(bias.tolist()),
    )
    return MixtureRecord(name, tuple(map(ExpertId, digests)), gate, top_k, labels), tensor


def uniform_mixture(name: str, digests: Sequence[str], labels: tuple[str, ...] | None = None) -> MixtureRecord:
    """A mixture that weighs all its experts alike, always."""
    members = tuple(map(ExpertId, digests))
    return MixtureRecord(name, members, FixedGate((1,) * len(members)), len(members), labels)
