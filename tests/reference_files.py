"""The files of the reference: where they are, how to open them, and what came of it there and comes of it here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hocket.errors import Reason
from hocket.packages import Password, RecipientKey
from hocket.packages.model import MixtureOfExperts
from tests import apr_oracle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.packages import Credential

VECTORS = Path(__file__).parent / "vectors"
FIXTURES = os.environ.get("HOCKET_FIXTURES")
FOLDER = Path(FIXTURES) / "apr" / "reference-0.11.0" if FIXTURES else VECTORS / "reference-0.11.0"
MANIFEST = json.loads((FOLDER / "manifest.json").read_bytes())
ENTRIES: dict[str, dict[str, Any]] = {entry["file"]: entry for entry in MANIFEST["files"]}

# docs/packages.md lists the same.
DAMAGE = {
    "edge_compression_4.apr": Reason.UNSUPPORTED_COMPRESSION,
    "edge_compression_lz4.apr": Reason.BAD_LENGTH,
    "edge_crc.apr": Reason.BAD_CHECKSUM,
    "edge_flags_encrypted_only.apr": Reason.ENCRYPTED,
    "edge_magic.apr": Reason.BAD_MAGIC,
    "edge_major_0.apr": Reason.UNSUPPORTED_VERSION,
    "edge_major_2.apr": Reason.UNSUPPORTED_VERSION,
    "edge_metadata_garbage.apr": Reason.BAD_METADATA,
    "edge_metadata_too_long.apr": Reason.BAD_LENGTH,
    "edge_option_tag_2.apr": Reason.BAD_PAYLOAD,
    "edge_password_metadata_edit.apr": Reason.BAD_METADATA,
    "edge_password_tag_edit.apr": Reason.DECRYPTION_FAILED,
    "edge_password_wrong.apr": Reason.DECRYPTION_FAILED,
    "edge_trailing_bytes.apr": Reason.BAD_LENGTH,
    "edge_uncompressed_at_limit.apr": Reason.BAD_LENGTH,
    "edge_uncompressed_over_limit.apr": Reason.TOO_LARGE,
    "edge_unknown_type.apr": Reason.UNSUPPORTED_TYPE,
    "edge_x25519_on_password_file.apr": Reason.WRONG_RECIPIENT,
    "edge_x25519_other_key.apr": Reason.WRONG_RECIPIENT,
}
ODD = {  # in bytes that a reader has no use for
    "edge_flags_streaming_native_quantized_card.apr",
    "edge_minor_9.apr",
    "edge_reserved_nonzero.apr",
    "edge_signed_sig_edit.apr",
}


def read(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def outcome(entry: dict[str, Any]) -> Reason | None:
    """Why we refuse this file, None if we decode it."""
    if entry["file"].startswith("edge_"):
        return DAMAGE.get(entry["file"])
    return None


def credential_of(entry: Mapping[str, Any]) -> Credential | None:
    """What a file of the manifest is to be opened with; None for nothing."""
    how = entry["open_with"]
    if "password" in how:
        return Password(how["password"])
    if "secret_key" in how:
        return RecipientKey(bytes.fromhex(how["secret_key"]))
    return None


def assert_as_recorded(entry: dict[str, Any], model: Any, answers: Any) -> None:
    rows = np.array(entry["inputs"], np.float32)
    if "predictions" in entry:
        wanted = np.array(entry["predictions"], np.float32)
        if entry["layout"] == "DecisionTreeRegressor":
            np.testing.assert_array_equal(answers[:, 0], wanted)
        else:
            assert (np.abs(answers[:, 0] - wanted) <= apr_oracle.tolerance(model, rows)).all()
    if "classes" in entry or "clusters" in entry:
        np.testing.assert_array_equal(
            answers.argmax(axis=1) if entry["layout"] != "LogisticRegression" else answers[:, 1] >= 0.5,
            entry.get("classes") or entry["clusters"],
        )
    if entry["layout"] == "LogisticRegression":
        np.testing.assert_allclose(answers[:, 1], entry["probabilities"], rtol=1e-6)
    if "class_probabilities" in entry:
        np.testing.assert_allclose(answers, entry["class_probabilities"], rtol=0, atol=1e-6)
    if entry["layout"] == "RandomForestClassifier":
        np.testing.assert_array_equal(answers.ravel(), entry["probabilities"])
    if isinstance(model, MixtureOfExperts):
        gates = [apr_oracle.gate_weights(model.gate, row) for row in rows]
        np.testing.assert_allclose(gates, entry["gate_weights"], rtol=1e-6)
        outputs = np.hstack([apr_oracle.predict(expert, rows) for expert in model.experts])
        np.testing.assert_array_equal(outputs, np.array(entry["expert_outputs"], np.float32))
