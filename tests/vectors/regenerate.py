"""Write the golden packages of this folder again.

    python tests/vectors/regenerate.py [FIXTURES]

`hocket/` is made from the builders of the tests. With the path of the full fixture folder (`apr/` inside it), the
selection in `reference-0.11.0/` is copied afresh too. A change that alters a committed file changes the format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

# The line above makes these importable when this is run as a script.
from hocket.packages.apr.quantization import quantized_model  # noqa: E402
from hocket.packages.model import QuantKind  # noqa: E402
from tests import builders  # noqa: E402

SELECTION = (
    "linear.plain",
    "linear.plain.signed",
    "linear.zstd",
    "linear.zstd.password.signed",
    "ridge.zstd.signed",
    "lasso.zstd.signed",
    "elastic.zstd",
    "logistic.plain.signed",
    "tree.zstd",
    "tree_regressor.zstd.signed",
    "forest.zstd.signed",
    "kmeans.plain.signed",
    "moe_top2_cold.zstd.signed",
    "moe_top3_hot.zstd",
    "moe_top0.plain",
    "moe_ridge.save_apr",
    "gbm.zstd",
    "nb.zstd.signed",
    "knn.plain",
    "knn_manhattan_weighted.zstd.signed",
    "svm.plain",
    "quant_matrix100_q8_0",
    "quant_one_q4_0",
    "meta_licensed",
    "meta_zstd_max",
    "edge_compression_4",
    "edge_compression_lz4",
    "edge_crc",
    "edge_flags_encrypted_only",
    "edge_flags_streaming_native_quantized_card",
    "edge_magic",
    "edge_major_0",
    "edge_major_2",
    "edge_metadata_garbage",
    "edge_metadata_too_long",
    "edge_minor_9",
    "edge_option_tag_2",
    "edge_password_metadata_edit",
    "edge_reserved_nonzero",
    "edge_signed_embedded_key",
    "edge_signed_sig_edit",
    "edge_trailing_bytes",
    "edge_uncompressed_at_limit",
    "edge_uncompressed_over_limit",
    "edge_unknown_type",
)


def own_files() -> dict[str, bytes]:
    """What our writer makes: every layout stored, and one file with everything a writer adds."""
    files = {
        f"{layout}.apr": builders.apr_bytes(model, compression="none") for layout, model in builders.models().items()
    }
    for layout, kind in (("MixtureOfExperts", QuantKind.Q8_0), ("DenseNetwork", QuantKind.Q4_0)):
        model = quantized_model(builders.models()[layout], kind)
        files[f"{layout}.{kind}.apr"] = builders.apr_bytes(model, compression="none")
    files["labelled.signed.apr"] = builders.apr_bytes(
        builders.logistic(),
        name="setosa",
        labels=[None, "setosa"],
        compression="none",
        signing=builders.signer(),
    )
    return files


def write_peft_output(folder: Path) -> None:
    """A LoRA for a random base of two layers, as PEFT saves one after training."""
    import torch  # noqa: PLC0415 - of the training extra, as the rest here
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "head_dim": 8,
    }
    base = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    modules = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(folder))
    (folder / "README.md").unlink()


def main() -> None:
    """Write `hocket/` and `peft-lora/`, and `reference-0.11.0/` if the fixtures are named."""
    write_peft_output(HERE / "peft-lora")
    for name, data in own_files().items():
        (HERE / "hocket" / name).write_bytes(data)
    if len(sys.argv) > 1:
        source = Path(sys.argv[1]) / "apr" / "reference-0.11.0"
        manifest = json.loads((source / "manifest.json").read_bytes())
        chosen = {f"{name}.apr" for name in SELECTION}
        manifest["files"] = [entry for entry in manifest["files"] if entry["file"] in chosen]
        target = HERE / "reference-0.11.0"
        for name in chosen:
            (target / name).write_bytes((source / name).read_bytes())
        (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
