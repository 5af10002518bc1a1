"""Packages: files that hold experts, and what makes their bytes trusted.

A tour. Everything here takes bytes and values and gives values back; nothing touches a disk or a network.

To serve a package, open it. The digest, the releases and the embedded signature are checked before any content is
decoded, and the result says which proofs held:

    package = open_package(data, releases=[envelope], trust=roots, now=datetime.now(UTC))
    package.facts, package.model, package.provenance.proofs

The magic bytes say which of two formats it is. An `.apr` file holds tensor experts: `facts` are `ModelFacts` and
`model` is one of `hocket.packages.model`. An `.expert` file holds an adapter for a base language model: `facts` are
`AdapterFacts` and `model` is an `Adapter`, both of `hocket.packages.adapter`. Its manifest has a name and a version,
which every release of it repeats (`check_release_name`).

`TrustRoots` are the trusted keys (`hocket.trust_folder` reads them from a folder), `Policy` is what the operator
accepts beyond proof, `Revocations` are the keys withdrawn since. Any of them may change while a package is resident:
`evaluate` then judges it again without opening it, and judges mixtures too.

An encrypted `.apr` package needs a credential, which is a password or a recipient's key; mode is decided by its type:

    open_package(data, releases=[envelope], trust=roots, now=now, credentials={"acme/iris": Password("...")})

Who has none, as a registry, opens it as far as that goes: `describe_package` gives the facts that it declares.

To show a package without believing it, `inspect_package`. To publish one, bind a name to its bytes and sign that:

    release = Release(ReleaseName("acme", "iris", "1.0.0"), Subject.of(Purpose.PACKAGE, data, "apr"))
    envelope = sign_release(release, seed)

Keys are made by `generate_seed` and spelled by `hocket.identity`; `hocket.keyring` keeps them in files. The formats
have modules of their own: `hocket.packages.apr` and `hocket.packages.expert`.

What authors do with `.apr` packages is in modules that nothing which serves imports: `from_sklearn` makes models of
estimators, `answering` says what a model answers, `gate_training` trains the gate of a mixture on that, `rewriting`
encrypts, compresses, quantises and puts in cards.
"""

from __future__ import annotations

from hocket.identity import ReleaseName
from hocket.packages.apr.encryption import Credential, Password, Recipient, RecipientKey
from hocket.packages.keys import generate_seed, public_key_of
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.opening import (
    NO_CREDENTIALS,
    Credentials,
    DescribedPackage,
    EmbeddedFacts,
    Inspection,
    Package,
    PackageFacts,
    Provenance,
    ReleaseFacts,
    check_release_name,
    describe_package,
    evaluate,
    inspect_package,
    open_package,
)
from hocket.packages.release import (
    ClaimedRelease,
    Purpose,
    Release,
    Subject,
    read_release,
    sign_release,
    verify_release,
)
from hocket.packages.trust import Policy, Proof, Revocations, TrustedKey, TrustRoots

__all__ = [
    "DEFAULT_LIMITS",
    "NO_CREDENTIALS",
    "ClaimedRelease",
    "Credential",
    "Credentials",
    "DescribedPackage",
    "EmbeddedFacts",
    "Inspection",
    "Limits",
    "Package",
    "PackageFacts",
    "Password",
    "Policy",
    "Proof",
    "Provenance",
    "Purpose",
    "Recipient",
    "RecipientKey",
    "Release",
    "ReleaseFacts",
    "ReleaseName",
    "Revocations",
    "Subject",
    "TrustRoots",
    "TrustedKey",
    "check_release_name",
    "describe_package",
    "evaluate",
    "generate_seed",
    "inspect_package",
    "open_package",
    "public_key_of",
    "read_release",
    "sign_release",
    "verify_release",
]
