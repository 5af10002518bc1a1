from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Limits
from hocket.packages.adapter import Adapter, AdapterFacts, AdapterKind, Outcome, Routing
from hocket.packages.expert import decode
from hocket.requirements import Constraints
from tests.experts import (
    HIDDEN,
    adapter_config,
    adapter_tensors,
    archived,
    expert_files,
    expert_manifest,
    expert_package,
    signed_upstream,
    soft_prompt,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FIXTURES = Path(os.environ.get("HOCKET_FIXTURES", "/nowhere")) / "expert" / "upstream-built"
STYLE = {"name": "style", "path": "soft_prompts/style.safetensors", "tokens": 3}


def read(data: bytes, limits: Limits | None = None) -> tuple[AdapterFacts, Adapter]:
    return decode(data, digest_of(data), limits or Limits())


def facts_of(kind: str = "lora", **options: Any) -> AdapterFacts:
    return read(expert_package(kind=kind, **options))[0]


def adapter_of(kind: str = "lora", **options: Any) -> Adapter:
    return read(expert_package(kind=kind, **options))[1]


def reason_of(limits: Limits | None = None, **options: Any) -> Reason:
    with pytest.raises(HocketError) as refusal:
        read(expert_package(**options), limits)
    return refusal.value.reason


def base_with(**adapter: Any) -> dict[str, Any]:
    """`base_models` of a manifest whose one adapter says something else."""
    base = expert_manifest()["base_models"][0]
    return {"base_models": [{**base, "adapters": [{**base["adapters"][0], **adapter}]}]}


class TestFacts:
    def test_a_package_is_described(self) -> None:
        data = expert_package("expert-sql", "1.2.0", "dora", rank=4)
        facts, adapter = read(data)

        assert (facts.format, facts.format_version, facts.compression) == ("expert", "2.0", "gzip")
        assert (facts.digest, facts.size_bytes) == (digest_of(data), len(data))
        assert (facts.name, facts.version, facts.license) == ("expert-sql", "1.2.0", "Apache-2.0")
        assert (facts.kind, facts.rank, facts.target_modules) == (AdapterKind.DORA, 4, ("down_proj", "q_proj"))
        assert facts.base == BaseModel("Qwen/Qwen3-0.6B", quantization="int4")
        assert facts.capabilities == ("task:text2sql", "language:en")
        assert facts.tags == ("sql",)
        assert facts.routing == Routing(("sql", "query"), ("cypher",), priority=0.75)
        assert facts.constraints == Constraints(load_order=6, max_chain=10)
        assert facts.signature.outcome is Outcome.UNSIGNED
        assert facts.metadata["training"]["config"]["adapter_type"] == "dora"
        assert facts.parameter_bytes == sum(len(tensor.data) for tensor in adapter.tensors.values())
        assert (facts.soft_prompt_tokens, facts.has_grammar) == (0, False)
        assert (facts.warnings, facts.not_servable) == ((), None)

    @pytest.mark.parametrize("compression", ["gzip", "zstd", "zip"])
    def test_every_container_holds_the_same(self, compression: str) -> None:
        facts, adapter = read(expert_package(compression=compression))
        assert facts.compression == compression
        assert adapter.tensors.keys() == adapter_tensors().keys()

    def test_sections_are_the_files_one_after_the_other(self) -> None:
        files = expert_files()
        sections = facts_of().sections
        assert {section.name: section.size for section in sections} == {name: len(files[name]) for name in files}
        assert [section.offset for section in sections[1:]] == [s.offset + s.size for s in sections[:-1]]

    def test_the_signature_of_upstream_s_tools_is_shown_and_decides_nothing(self) -> None:
        signed = signed_upstream(expert_files())
        assert read(archived(signed))[0].signature.outcome is Outcome.VALID
        assert read(archived({**signed, "evil.bin": b"x"}))[0].signature.outcome is Outcome.INVALID

    def test_a_manifest_of_schema_1_is_read(self) -> None:
        manifest = expert_manifest()
        base = manifest.pop("base_models")[0]
        manifest |= {"schema_version": "1.0", "adapters": base.pop("adapters"), "base_model": base}
        files = {**expert_files(), "manifest.json": json.dumps(manifest).encode()}
        facts, _ = read(archived(files))
        assert (facts.format_version, facts.kind, facts.not_servable) == ("1.0", AdapterKind.LORA, None)


class TestAdapter:
    @pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
    def test_tensors_are_those_that_were_saved(self, kind: str) -> None:
        adapter = adapter_of(kind)
        saved = adapter_tensors(kind)
        assert {name: bytes(tensor.data) for name, tensor in adapter.tensors.items()} == {
            name: values.tobytes() for name, values in saved.items()
        }
        assert adapter.config.kind == kind

    def test_other_files_are_kept_as_they_are(self) -> None:
        others = {"README.md": b"hi", "tests/cases.json": b"[]", "tokenizer.json": b"{}"}
        adapter = adapter_of(files={**others, "signature.sig": b"x", "grammar.gbnf": b"root ::= [a-z]"})
        assert adapter.files == others

    @pytest.mark.parametrize("name", ["weights.safetensors", "w/qwen.safetensors"])
    def test_weights_may_lie_elsewhere(self, name: str) -> None:
        weights = expert_files()["adapter_model.safetensors"]
        stated = {"path": name} if "/" in name else {}
        facts = facts_of(manifest=base_with(**stated), files={"adapter_model.safetensors": None, name: weights})
        assert facts.not_servable is None

    def test_the_manifest_s_own_path_comes_first(self) -> None:
        files = {"mine.safetensors": expert_files(rank=3)["adapter_model.safetensors"]}
        package = expert_package(
            manifest=base_with(path="mine.safetensors"), config=adapter_config(rank=3), files=files
        )
        assert read(package)[0].rank == 3

    @pytest.mark.parametrize("missing", ["manifest.json", "adapter_model.safetensors"])
    def test_without_manifest_or_weights_there_is_no_package(self, missing: str) -> None:
        assert reason_of(files={missing: None}) is Reason.BAD_PACKAGE
        assert reason_of(files={missing: None, "adapter_model.bin": b"x"}) is Reason.BAD_PACKAGE

    def test_weights_are_those_that_the_manifest_names(self) -> None:
        true = digest_of(expert_files()["adapter_model.safetensors"]).removeprefix("sha256:")
        assert facts_of(manifest=base_with(sha256=true)).warnings == ()
        assert facts_of(manifest=base_with(sha256="")).warnings == ()
        assert reason_of(manifest=base_with(sha256="0" * 64)) is Reason.BAD_CHECKSUM

    def test_broken_weights_are_refused(self) -> None:
        assert reason_of(files={"adapter_model.safetensors": b"x" * 64}) is Reason.BAD_WEIGHTS

    def test_an_adapter_without_tensors_is_refused(self) -> None:
        assert reason_of(tensors={}) is Reason.BAD_ADAPTER


class TestConfiguration:
    def test_it_decides_where_the_manifest_says_otherwise(self) -> None:
        manifest = base_with(type="ia3", r=16, alpha=64, scaling="rsqrt", target_modules=["k_proj"], size_bytes=1)
        facts, adapter = read(expert_package(kind="dora", manifest=manifest))
        assert (facts.kind, facts.rank, adapter.config.alpha) == (AdapterKind.DORA, 2, 4.0)
        for words in (
            "type ia3; adapter_config.json says dora",
            "r 16; adapter_config.json says 2",
            "alpha 64; adapter_config.json says 4",
            "scaling rsqrt",
            "target_modules k_proj; adapter_config.json says down_proj, q_proj",
            "have 1 bytes",
        ):
            assert any(words in warning for warning in facts.warnings), words

    def test_what_is_not_stated_disagrees_with_nothing(self) -> None:
        assert facts_of(manifest=base_with(r=None, alpha=None, size_bytes=0)).warnings == ()

    @pytest.mark.parametrize(
        ("stated", "kind"),
        [
            ({"type": "lora"}, AdapterKind.LORA),
            ({"type": "lora", "use_dora": True}, AdapterKind.DORA),
            ({"type": "DoRA"}, AdapterKind.DORA),
            ({"type": "ia3"}, AdapterKind.IA3),
        ],
    )
    def test_without_it_nobody_knows_what_the_weights_mean(self, stated: dict[str, Any], kind: AdapterKind) -> None:
        facts, adapter = read(expert_package(manifest=base_with(**stated), files={"adapter_config.json": None}))
        assert "copy it from the training output" in (facts.not_servable or "")
        assert (facts.kind, facts.rank, adapter.config.alpha) == (kind, 2, 4.0)

    def test_nor_what_to_call_them(self) -> None:
        package: dict[str, Any] = {"manifest": base_with(type="lokr")}
        assert facts_of(**package).not_servable is None
        assert reason_of(**package, files={"adapter_config.json": None}) is Reason.UNSUPPORTED_TYPE

    @pytest.mark.parametrize(
        "config", [{"modules_to_save": ["lm_head"]}, {"rank_pattern": {".*_proj": 2}}, {"use_qalora": True}]
    )
    def test_what_the_suite_cannot_do_is_read_but_cannot_serve(self, config: dict[str, Any]) -> None:
        facts = facts_of(config=config)
        assert facts.not_servable is not None
        assert (facts.kind, facts.rank) == (AdapterKind.LORA, 2)

    def test_modules_without_tensors_are_a_warning(self) -> None:
        facts = facts_of(config={"target_modules": ["q_proj", "down_proj", "query_key_value"]})
        assert facts.not_servable is None
        assert any("query_key_value" in warning for warning in facts.warnings)

    def test_weights_that_are_a_pickle_are_refused_with_advice(self) -> None:
        files = {"adapter_model.safetensors": None, "adapter_model.bin": b"\x80\x04"}
        with pytest.raises(HocketError, match="a pickle, which is never loaded") as refusal:
            read(expert_package(files=files))
        assert refusal.value.reason is Reason.BAD_PACKAGE

    def test_what_contradicts_the_tensors_is_refused(self) -> None:
        assert reason_of(config={"r": 4}) is Reason.BAD_ADAPTER

    def test_one_set_of_weights_belongs_to_one_base(self) -> None:
        base = expert_manifest()["base_models"][0]
        facts = facts_of(manifest={"base_models": [base, {**base, "name": "Qwen/Qwen3-1.7B"}]})
        assert "pack one package per base" in (facts.not_servable or "")

    def test_and_to_one_adapter(self) -> None:
        base = expert_manifest()["base_models"][0]
        facts = facts_of(manifest={"base_models": [{**base, "adapters": base["adapters"] * 2}]})
        assert "pack one package per adapter" in (facts.not_servable or "")


class TestSoftPrompts:
    def test_one_beside_an_adapter(self) -> None:
        facts, adapter = read(expert_package(manifest={"soft_prompts": [STYLE]}, files={STYLE["path"]: soft_prompt()}))
        [prompt] = adapter.soft_prompts
        assert (prompt.name, prompt.embeddings.shape) == ("style", (3, HIDDEN))
        assert facts.soft_prompt_tokens == 3
        assert facts.parameter_bytes == facts_of().parameter_bytes + 3 * HIDDEN * 4
        assert facts.not_servable is None

    def test_each_is_listed_once(self) -> None:
        other = {**STYLE, "name": "other"}
        files = {STYLE["path"]: soft_prompt()}
        assert reason_of(manifest={"soft_prompts": [STYLE, other]}, files=files) is Reason.BAD_ADAPTER
        other["path"] = "soft_prompts/other.safetensors"
        files[other["path"]] = soft_prompt()
        assert facts_of(manifest={"soft_prompts": [STYLE, other]}, files=files).soft_prompt_tokens == 6

    @pytest.mark.parametrize("shape", [(), (2,), (2, HIDDEN, 1)])
    def test_one_that_is_no_matrix_is_refused_whatever_else_is_the_matter(self, shape: tuple[int, ...]) -> None:
        other = {"prompt_embeddings": np.ones(shape, np.float32)}
        package: dict[str, Any] = {"kind": "soft_prompt", "config": {"num_transformer_submodules": 2}}
        assert "decoder" in (facts_of(**package).not_servable or "")
        assert reason_of(**package, tensors=other) is Reason.BAD_ADAPTER

    def test_upstream_s_packager_moves_it_to_the_root(self) -> None:
        prompts = adapter_of(
            manifest={"soft_prompts": [STYLE]}, files={"style.safetensors": soft_prompt()}
        ).soft_prompts
        assert [prompt.name for prompt in prompts] == ["style"]

    def test_an_expert_may_be_a_soft_prompt_alone(self) -> None:
        facts, adapter = read(expert_package(kind="soft_prompt", rank=4))
        assert (facts.kind, facts.soft_prompt_tokens, facts.rank) == (AdapterKind.SOFT_PROMPT, 4, 0)
        assert adapter.tensors == {}
        assert [(prompt.name, prompt.embeddings.shape) for prompt in adapter.soft_prompts] == [
            ("expert-sql", (4, HIDDEN))
        ]
        assert facts.parameter_bytes == 4 * HIDDEN * 4

    def test_which_the_manifest_may_name(self) -> None:
        stated = [{"name": "style", "path": "adapter_model.safetensors", "tokens": 4}]
        prompts = adapter_of("soft_prompt", rank=4, manifest={"soft_prompts": stated}).soft_prompts
        assert [prompt.name for prompt in prompts] == ["style"]

    @pytest.mark.parametrize(
        ("content", "stated"),
        [
            (None, {}),
            (soft_prompt(tokens=4), {}),
            (save({"a": np.ones((3, 8), np.float32), "b": np.ones((3, 8), np.float32)}), {}),
            (save({"a": np.ones(3, np.float32)}), {}),
        ],
    )
    def test_one_that_is_missing_or_another_is_refused(self, content: bytes | None, stated: dict[str, Any]) -> None:
        manifest = {"soft_prompts": [{**STYLE, **stated}]}
        assert reason_of(manifest=manifest, files={"style.safetensors": content}) is Reason.BAD_ADAPTER

    def test_all_are_made_for_one_base(self) -> None:
        manifest = {"soft_prompts": [STYLE, {**STYLE, "path": "other.safetensors"}]}
        same = {"style.safetensors": soft_prompt(), "other.safetensors": soft_prompt()}
        assert facts_of(manifest=manifest, files=same).soft_prompt_tokens == 6
        other = {**same, "other.safetensors": soft_prompt(hidden=16)}
        assert reason_of(manifest=manifest, files=other) is Reason.BAD_ADAPTER

    def test_their_tokens_together_are_bounded(self) -> None:
        package: dict[str, Any] = {"manifest": {"soft_prompts": [STYLE]}, "files": {"style.safetensors": soft_prompt()}}
        read(expert_package(**package), Limits(soft_prompt_tokens=3))
        assert reason_of(Limits(soft_prompt_tokens=2), **package) is Reason.TOO_LARGE

    @pytest.mark.parametrize("suffix", ["pt", "bin", "txt"])
    def test_another_form_is_never_read_and_says_what_to_do(self, suffix: str) -> None:
        stated = {**STYLE, "path": f"soft_prompts/style.{suffix}"}
        facts, adapter = read(
            expert_package(manifest={"soft_prompts": [stated]}, files={f"style.{suffix}": b"\x80\x04"})
        )
        assert adapter.soft_prompts == ()
        assert facts.soft_prompt_tokens == 3
        assert f"the soft prompt 'style.{suffix}'" in (facts.not_servable or "")
        assert "python -m training.soft_prompt IN OUT" in (facts.not_servable or "")


class TestGrammar:
    def test_it_is_text_at_the_root(self) -> None:
        facts, adapter = read(expert_package(files={"grammar.gbnf": "root ::= [ä]".encode()}))
        assert (adapter.grammar, facts.has_grammar) == ("root ::= [ä]", True)

    @pytest.mark.parametrize(("use", "inside"), [(True, True), (True, False), (False, True), (None, True)])
    def test_it_is_used_where_the_manifest_says_so(self, use: bool | None, inside: bool) -> None:  # noqa: FBT001
        decoding = {} if use is None else {"use_grammar": use}
        files = {"grammar.gbnf": b"root ::= [a-z]"} if inside else {}
        facts = facts_of(manifest={"training": {"decoding": decoding}}, files=files)
        assert (facts.has_grammar, facts.uses_grammar) == (inside, bool(use) and inside)

    def test_the_manifest_may_name_another(self) -> None:
        manifest = {"training": {"decoding": {"grammar_file": "sql.gbnf"}}}
        files = {"grammar.gbnf": b"general", "sql.gbnf": b"special"}
        assert adapter_of(manifest=manifest, files=files).grammar == "special"
        assert adapter_of(manifest=manifest, files={"grammar.gbnf": b"general"}).grammar == "general"

    def test_upstream_s_packager_moves_it_to_the_root(self) -> None:
        manifest = {"training": {"decoding": {"grammar_file": "grammars/sql.gbnf"}}}
        files = {"grammar.gbnf": b"general", "sql.gbnf": b"special"}
        assert adapter_of(manifest=manifest, files=files).grammar == "special"

    def test_one_that_is_promised_but_missing_is_worth_a_warning(self) -> None:
        manifest = {"training": {"decoding": {"use_grammar": True}}}
        assert any("grammar.gbnf is not inside" in warning for warning in facts_of(manifest=manifest).warnings)

    def test_one_that_is_no_text_is_refused(self) -> None:
        assert reason_of(files={"grammar.gbnf": b"root ::= \xff"}) is Reason.BAD_ADAPTER

    def test_its_size_is_bounded(self) -> None:
        package: dict[str, Any] = {"files": {"grammar.gbnf": b"x" * 100}}
        read(expert_package(**package), Limits(grammar_bytes=100))
        assert reason_of(Limits(grammar_bytes=99), **package) is Reason.TOO_LARGE


class Malice:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


LOADED: list[str] = []
"""What the unpickler was asked to find while `watched`."""
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "pickle.find_class":
        LOADED.append(".".join(map(str, arguments)))


sys.addaudithook(_hook)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    global _watching  # noqa: PLW0603 - an audit hook cannot be removed
    LOADED.clear()
    _watching = True
    yield LOADED
    _watching = False


@pytest.mark.parametrize(
    "place", ["training_args.bin", "soft_prompts/style.pt", "style.bin", "adapter_model.bin", "optimizer.pt"]
)
def test_a_pickle_inside_is_never_executed(place: str, tmp_path: Path, watched: list[str]) -> None:
    trace = tmp_path / "executed"
    malice = pickle.dumps(Malice(trace))
    soft_prompts = [{"name": "style", "path": place, "tokens": 3}] if "style" in place else []
    read(expert_package(manifest={"soft_prompts": soft_prompts}, files={place: malice}))
    assert watched == []
    assert not trace.exists()

    pickle.loads(malice)  # noqa: S301 - its twin: it would have shown
    assert watched != []
    assert trace.exists()


@pytest.mark.parametrize("place", ["adapter_model.safetensors", "style.safetensors", "manifest.json"])
def test_nor_is_one_under_another_name(place: str, tmp_path: Path, watched: list[str]) -> None:
    manifest = {"soft_prompts": [STYLE]}
    files = {"style.safetensors": soft_prompt(), place: pickle.dumps(Malice(tmp_path / "executed"))}
    assert reason_of(manifest=manifest, files=files) in {Reason.BAD_WEIGHTS, Reason.BAD_JSON}
    assert watched == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not FIXTURES.exists(), reason="set HOCKET_FIXTURES to the folder of genuine files")
class TestFilesOfUpstreamsTools:
    @pytest.mark.parametrize("folder", ["unsigned", "signed"])
    def test_all_are_read(self, folder: str) -> None:
        found = {}
        for path in sorted((FIXTURES / folder).glob("*.expert")):
            facts, _ = read(path.read_bytes())
            found[f"{facts.name}@{facts.version}"] = (facts.kind, facts.rank, facts.not_servable is None)
        assert found == {
            "expert-ia3@0.1.0": (AdapterKind.IA3, 0, True),
            "expert-neo4j@0.2.3": (AdapterKind.DORA, 16, True),
            "expert-sql@0.3.0": (AdapterKind.DORA, 12, True),
            "expert-tools@0.1.0": (AdapterKind.DORA, 16, True),
            "expert-v1lora@1.0.0": (AdapterKind.LORA, 16, False),  # its soft prompt is a .pt file
        }
