from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.packages.adapter import AdapterConfig, AdapterKind
from hocket.packages.expert.archive import read_archive
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.writer import draft_manifest, gather, pretty, write_archive

if TYPE_CHECKING:
    from collections.abc import Mapping

LORA = AdapterConfig(AdapterKind.LORA, rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
QWEN = BaseModel("Qwen3-0.6B", digest=f"sha256:{'1' * 64}")
WEIGHTS = b"weights"
FILES = {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": b"{}"}


def draft(**changes: Any) -> dict[str, Any]:
    return {**draft_manifest(LORA, QWEN, name="expert-sql", version="1.0.0"), **changes}


def packed(document: Mapping[str, Any], files: Mapping[str, bytes] = FILES, **options: Any) -> dict[str, bytes]:
    return gather(pretty(document), dict(files).get, files, **options)


def manifest_of(files: Mapping[str, bytes]) -> Any:
    return json.loads(files["manifest.json"])


def with_bases(*names: str) -> dict[str, Any]:
    [base] = draft()["base_models"]
    return draft(base_models=[{**base, "name": name} for name in names])


def refusal_of(call: Any, *arguments: Any, **options: Any) -> HocketError:
    with pytest.raises(HocketError) as refusal:
        call(*arguments, **options)
    return refusal.value


class TestDraft:
    @pytest.mark.parametrize("kind", AdapterKind)
    def test_a_draft_is_a_manifest_that_is_read(self, kind: AdapterKind) -> None:
        rank = 4 if kind in {AdapterKind.LORA, AdapterKind.DORA} else 0
        config = AdapterConfig(kind, rank=rank, alpha=8.0, target_modules=("q_proj",), feedforward_modules=())
        read = parse_manifest(pretty(draft_manifest(config, QWEN, name="expert-x", version="0.1.0")))

        [base] = read.bases
        assert (read.name, read.version, read.schema_version) == ("expert-x", "0.1.0", "2.0")
        assert base.base == QWEN
        assert base.adapters[0].type == kind
        assert base.adapters[0].r == (rank or None)

    def test_it_says_what_kind_of_scale_the_adapter_was_trained_with(self) -> None:
        rslora = AdapterConfig(AdapterKind.LORA, rank=4, alpha=8.5, use_rslora=True)
        [base] = draft_manifest(rslora, QWEN, name="expert-x", version="1.0.0")["base_models"]
        [adapter] = base["adapters"]
        assert adapter["scaling"] == "rsqrt"
        assert "alpha" not in adapter  # a manifest holds whole ones only

    @pytest.mark.parametrize("alpha", [-2.0, 0.5, 1e300])
    def test_an_alpha_that_manifests_cannot_hold_is_left_to_the_configuration(self, alpha: float) -> None:
        document = draft_manifest(replace(LORA, alpha=alpha), QWEN, name="expert-x", version="1.0.0")
        assert parse_manifest(pretty(document)).bases[0].adapters[0].alpha is None

    def test_modules_are_listed_by_their_last_parts(self) -> None:
        paths = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(300))
        document = draft_manifest(replace(LORA, target_modules=paths), QWEN, name="expert-x", version="1.0.0")
        assert parse_manifest(pretty(document)).bases[0].adapters[0].target_modules == ("q_proj",)

    @pytest.mark.parametrize("told", [{"name": "Expert SQL"}, {"version": "1/0"}])
    def test_a_name_no_release_can_have_is_refused(self, told: dict[str, str]) -> None:
        refusal = refusal_of(draft_manifest, LORA, QWEN, **{"name": "expert-sql", "version": "1.0.0", **told})
        assert refusal.reason is Reason.BAD_REQUEST


class TestGather:
    def test_size_and_hash_of_the_weights_are_filled_in(self) -> None:
        [base] = manifest_of(packed(draft()))["base_models"]
        [adapter] = base["adapters"]
        assert adapter["size_bytes"] == len(WEIGHTS)
        assert adapter["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()

    def test_what_the_manifest_says_that_we_do_not_know_is_kept_in_its_place(self) -> None:
        document = draft(quality_metrics={"benchmark_score": 9.0}, _comment="Grüße, 世界")
        [document["base_models"][0]["adapters"][0]["checkpoint_step"]] = [2000]
        written = manifest_of(packed(document))
        assert list(written) == list(document)
        assert written["_comment"] == "Grüße, 世界"
        assert written["base_models"][0]["adapters"][0]["checkpoint_step"] == 2000

    def test_a_manifest_of_the_first_version_is_filled_in_as_well(self) -> None:
        document = draft(schema_version="1.0", base_model={"name": "Qwen3-0.6B"})
        document["adapters"] = document.pop("base_models")[0]["adapters"]
        written = manifest_of(packed(document, base=QWEN))
        assert written["base_model"]["hocket_base"] == QWEN.digest
        assert written["adapters"][0]["size_bytes"] == len(WEIGHTS)

    def test_a_signature_of_what_was_packed_before_is_dropped(self) -> None:
        integrity = {"publisher": "x", "signature_algorithm": "ed25519", "files": {}}
        assert manifest_of(packed(draft(integrity=integrity)))["integrity"] is None

    def test_what_belongs_to_a_package_is_taken_and_nothing_else(self) -> None:
        taken = {"README.md": b"r", "LICENSE.txt": b"l", "tokenizer.model": b"t", "grammar.gbnf": b"g"}
        left = {"training_args.bin": b"pickle", "optimizer.pt": b"o", "trainer_state.json": b"s"}
        assert packed(draft(), {**FILES, **taken, **left}).keys() == {"manifest.json", *FILES, *taken}

    def test_files_the_manifest_names_are_taken_where_it_says(self) -> None:
        document = draft(
            soft_prompts=[{"name": "style", "path": "soft_prompts/style.safetensors", "tokens": 4}],
            training={**_training(), "decoding": {"grammar_file": "sql.gbnf"}},
        )
        document["base_models"][0]["adapters"][0]["path"] = "weights/sql.safetensors"
        named = {"soft_prompts/style.safetensors": b"s", "sql.gbnf": b"g", "weights/sql.safetensors": b"w"}
        assert packed(document, {"adapter_config.json": b"{}", **named}).keys() >= named.keys()

        for missing in ("soft_prompts/style.safetensors", "sql.gbnf"):
            files = {name: content for name, content in {**FILES, **named}.items() if name != missing}
            refusal = refusal_of(packed, document, files)
            assert refusal.reason is Reason.BAD_PACKAGE
            assert missing in refusal.message

    def test_a_package_without_weights_is_refused(self) -> None:
        refusal = refusal_of(packed, draft(), {"adapter_config.json": b"{}"})
        assert refusal.reason is Reason.BAD_PACKAGE
        assert packed(draft(), {"weights.safetensors": b"w"})["weights.safetensors"] == b"w"
        assert "a pickle" in refusal_of(packed, draft(), {"adapter_model.bin": b"w"}).message

    def test_a_base_that_the_manifest_is_not_for_is_refused_even_if_it_names_one_alone(self) -> None:
        other = BaseModel("Llama-9", digest=f"sha256:{'2' * 64}")
        refusal = refusal_of(packed, draft(), base=other)
        assert refusal.reason is Reason.BAD_REQUEST
        assert "is for Qwen3-0.6B" in refusal.message
        assert str(other.digest) in refusal.message
        assert packed(draft(), base=BaseModel("Qwen/qwen3-0.6b"))

    def test_adapters_of_the_first_schema_do_not_stay_in_the_second(self) -> None:
        assert "adapters" not in manifest_of(packed(draft(adapters=[{"type": "lora", "target_modules": []}])))

    @pytest.mark.parametrize("chosen", ["models/Llama-3", "llama-3", "LLAMA-3"])
    def test_one_of_several_bases_is_chosen_by_its_name_or_the_last_part_of_it(self, chosen: str) -> None:
        written = manifest_of(packed(with_bases("Qwen3-0.6B", "models/Llama-3"), base=BaseModel(chosen)))
        assert [base["name"] for base in written["base_models"]] == ["models/Llama-3"]

    @pytest.mark.parametrize("chosen", [None, BaseModel("Mistral")])
    def test_of_several_bases_one_must_be_told_that_is_there(self, chosen: BaseModel | None) -> None:
        refusal = refusal_of(packed, with_bases("Qwen3-0.6B", "Llama-3"), base=chosen)
        assert refusal.reason is Reason.BAD_REQUEST
        assert "Qwen3-0.6B, Llama-3" in refusal.message

    def test_a_package_holds_one_adapter(self) -> None:
        document = draft()
        document["base_models"][0]["adapters"] *= 2
        assert refusal_of(packed, document).reason is Reason.BAD_MANIFEST

    def test_tests_are_packed_when_asked_for(self) -> None:
        files = {**FILES, "tests/a.json": b"a"}
        assert "tests/a.json" not in packed(draft(), files)
        assert packed(draft(), files, tests=["tests/a.json"])["tests/a.json"] == b"a"


class TestArchive:
    CONTENT: ClassVar = {"z.txt": b"z" * 1000, "manifest.json": b"{}", "a/b.json": b"", "ü.md": b"text"}

    @pytest.mark.parametrize("compression", ["gzip", "zstd"])
    def test_what_is_written_is_read(self, compression: str) -> None:
        archive = read_archive(write_archive(self.CONTENT, compression=compression))
        assert archive.compression == compression
        assert dict(archive.files) == self.CONTENT

    @pytest.mark.parametrize("compression", ["gzip", "zstd"])
    def test_the_same_files_give_the_same_bytes_in_whatever_order(self, compression: str) -> None:
        backwards = dict(reversed(self.CONTENT.items()))
        assert write_archive(self.CONTENT, compression=compression) == write_archive(backwards, compression=compression)

    def test_any_tar_reads_it_manifest_first_and_nothing_in_it_tells_who_packed_it_or_when(self) -> None:
        data = write_archive(self.CONTENT)
        assert data[4:8] == bytes(4)  # gzip's time
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
            members = tar.getmembers()
        assert [member.name for member in members] == ["manifest.json", "a/b.json", "z.txt", "ü.md"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}

    def test_a_name_no_reader_would_take_is_not_written(self) -> None:
        assert refusal_of(write_archive, {"../x": b""}).reason is Reason.BAD_FILE_NAME

    def test_another_compression_is_refused(self) -> None:
        assert refusal_of(write_archive, {}, compression="lz4").reason is Reason.BAD_REQUEST

    def test_progress_is_told_up_to_the_last_byte(self) -> None:
        told: list[tuple[int, int]] = []
        write_archive({"a": bytes(2**20)}, on_progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (2**20, 2**20)
        assert len(told) > 3


def _training() -> dict[str, Any]:
    return {
        "dataset": {},
        "config": {
            "method": "sft",
            "adapter_type": "lora",
            "rank": 4,
            "target_modules": ["q_proj"],
            "epochs": 1,
            "learning_rate": 1e-4,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "lr_scheduler": "linear",
        },
    }
