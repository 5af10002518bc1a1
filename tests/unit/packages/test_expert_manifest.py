from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.packages.adapter import Decoding, Routing
from hocket.packages.expert.manifest import (
    Manifest,
    ManifestAdapter,
    ManifestBase,
    ManifestSoftPrompt,
    normalised_keyword,
    parse_manifest,
)
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.requirements import Constraints
from tests.manifests import ABSENT, V1, V2, changed, encoded, genuine

EXPERTS = ["elastic", "json", "neo4j", "sql", "tools", "typescript"]


def read(document: Any, *, upstream: bool = False) -> Manifest:
    return parse_manifest(encoded(document), upstream=upstream)


def refused(document: Any, *, upstream: bool = False, **limits: int) -> HocketError:
    with pytest.raises(HocketError) as error:
        parse_manifest(encoded(document), upstream=upstream, limits=replace(DEFAULT_LIMITS, **limits))
    return error.value


# What is read.


def test_schema_2_is_read_whole() -> None:
    manifest = read(V2)

    base = BaseModel("F:/models/Qwen3-0.6B", f"sha256:{'cd' * 32}", "ab" * 32, "int4", "qwen3")
    adapter = ManifestAdapter(
        type="dora",
        target_modules=("q_proj", "v_proj"),
        r=12,
        alpha=24,
        scaling="dora",
        use_dora=True,
        path="adapter_model.safetensors",
        size_bytes=1024,
        sha256="ef" * 32,
    )
    assert manifest == Manifest(
        document=V2,
        name="expert-sql",
        version="1.2.0",
        schema_version="2.0",
        description="Consultas curtas, sem explicação",
        bases=(ManifestBase(base, (adapter,)),),
        soft_prompts=(ManifestSoftPrompt("style", "soft_prompts/style.safetensors", 4),),
        capabilities=("database:sql", "task:text2sql"),
        constraints=Constraints(7, 6, ("expert-json@>=0.4.0",), ("expert-nosql",)),
        decoding=Decoding(0.7, 0.8, 20, 0.0, 64, (";", "\n\n"), use_grammar=True, grammar_type="sql"),
        author="acme",
        homepage="https://example.org/expert-sql",
        repository_url="https://example.org/expert-sql.git",
        tags=("sql",),
        routing=Routing(("sql", "group by"), ("explain",), "database=sql", 0.85),
        grammar_file="grammar.gbnf",
        license="Apache-2.0",
        integrity={"publisher": "acme", "signature_algorithm": "ed25519", "files": {}},
    )
    assert read(V2, upstream=True) == manifest


def test_schema_1_says_the_same_in_another_form() -> None:
    one, two = read(V1), read(V2)

    assert one.schema_version == "1.0"
    assert replace(one, document={}, schema_version="") == replace(two, document={}, schema_version="")
    assert read(changed(V1, "schema_version", ABSENT)).schema_version == "1.0"


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_genuine_manifest_is_read_by_both_modes(name: str, upstream: bool) -> None:  # noqa: FBT001 - a parameter
    data = (genuine() / f"expert-{name}" / "manifest.json").read_bytes()

    manifest = parse_manifest(data, upstream=upstream)

    assert manifest.name == f"expert-{name}"
    assert manifest.bases[0].base.name == "F:/Node/hivellm/expert/models/Qwen3-0.6B"
    assert manifest.bases[0].base.weights_sha256 is None
    assert manifest.bases[0].adapters[0].type == "dora"
    assert manifest.bases[0].adapters[0].size_bytes is None
    assert json.dumps(manifest.document) == json.dumps(json.loads(data))
    absent = ("routing is missing: the expert is never chosen by itself",)
    assert manifest.warnings == (absent if name == "typescript" else ())


@pytest.mark.parametrize("name", EXPERTS)
def test_what_upstream_makes_of_a_genuine_manifest_means_the_same(name: str) -> None:
    folder = genuine()
    ours = parse_manifest((folder / f"expert-{name}" / "manifest.json").read_bytes())
    data = (folder / "upstream-built" / "normalised-manifests" / f"expert-{name}.json").read_bytes()

    theirs = parse_manifest(data, upstream=True)

    # Upstream drops what it does not know.
    known = replace(ours.decoding, min_p=None, max_new_tokens=None)
    assert replace(theirs, document={}) == replace(ours, document={}, decoding=known)


def test_the_dependency_of_expert_tools_is_read() -> None:
    manifest = parse_manifest((genuine() / "expert-tools" / "manifest.json").read_bytes())

    assert manifest.constraints == Constraints(load_order=7, max_chain=6, requires=("expert-json",))


@pytest.mark.parametrize("name", ["manifest_v1.json", "manifest_v2.json"])
@pytest.mark.parametrize("upstream", [False, True])
def test_upstreams_own_fixtures_are_read_by_both_modes(name: str, upstream: bool) -> None:  # noqa: FBT001 - a parameter
    manifest = parse_manifest((genuine() / "upstream-fixtures" / name).read_bytes(), upstream=upstream)

    assert {base.base.weights_sha256 for base in manifest.bases} == {None}
    assert manifest.bases[0].adapters[0].path is not None
    assert manifest.warnings[0].endswith("sha256 is not 64 hex digits, and read as not stated")


def test_upstreams_complete_example_is_refused_by_its_own_rules_and_read_by_ours() -> None:
    data = (genuine() / "upstream-fixtures" / "example-expert-complete.json").read_bytes()

    with pytest.raises(HocketError) as error:
        parse_manifest(data, upstream=True)
    assert error.value.reason is Reason.BAD_MANIFEST
    assert error.value.field == "evaluation.test_set_size"
    warnings = parse_manifest(data).warnings
    assert "evaluation.test_set_size is missing: upstream's tools refuse such a manifest" in warnings
    assert "base_models[0].sha256 is not 64 hex digits, and read as not stated" in warnings
    assert len(warnings) == 6


# The contradictions, each beside its twin.

_TWICE = {"name": "Qwen3-0.6B"}
CONTRADICTIONS: list[tuple[Reason, dict[str, Any], str, Any, Any]] = [
    (Reason.MANIFEST_NAME, V2, "name", "", "x"),
    (Reason.MANIFEST_VERSION, V2, "version", "", "x"),
    (Reason.MANIFEST_TWO_BASES, V2, "base_model", _TWICE, None),
    (Reason.MANIFEST_TWO_BASES, V1, "base_models", [], None),
    (Reason.MANIFEST_NO_BASE, V1, "base_model", ABSENT, _TWICE),
    (Reason.MANIFEST_NO_ADAPTERS, V1, "adapters", [], V1["adapters"]),
    (Reason.MANIFEST_NO_ADAPTERS, V1, "adapters", ABSENT, V1["adapters"]),
    (Reason.MANIFEST_NO_BASES, V2, "base_models", [], V2["base_models"]),
    (Reason.MANIFEST_NO_BASES, V2, "base_models", ABSENT, V2["base_models"]),
    (Reason.MANIFEST_BASE_NAME, V2, "base_models[0].name", "", "x"),
    (Reason.MANIFEST_BASE_NAME, V2, "base_models[0].name", ABSENT, "x"),
    (Reason.MANIFEST_BASE_NAME, V1, "base_model.name", ABSENT, ""),
    (Reason.MANIFEST_NO_BASE_ADAPTERS, V2, "base_models[0].adapters", [], V1["adapters"]),
    (Reason.MANIFEST_NO_BASE_ADAPTERS, V2, "base_models[0].adapters", None, V1["adapters"]),
    (Reason.MANIFEST_EPOCHS, V2, "training.config.epochs", 0, 0.1),
    (Reason.MANIFEST_EPOCHS, V2, "training.config.epochs", -1.5, 3),
    (Reason.MANIFEST_LEARNING_RATE, V2, "training.config.learning_rate", 0, 1e-9),
    (Reason.MANIFEST_RANK, V2, "training.config.rank", 0, 1),
    (Reason.MANIFEST_NO_RANK, V2, "training.config.rank", ABSENT, 1),
    (Reason.MANIFEST_TARGET_MODULES, V2, "training.config.target_modules", [], ["q_proj"]),
]


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(("reason", "whole", "path", "wrong", "right"), CONTRADICTIONS)
def test_a_contradiction_has_its_own_reason_in_both_modes(
    reason: Reason,
    whole: dict[str, Any],
    path: str,
    wrong: Any,
    right: Any,
    upstream: bool,  # noqa: FBT001 - a parameter
) -> None:
    error = refused(changed(whole, path, wrong), upstream=upstream)

    assert error.reason is reason
    assert error.field == {"base_model": "base_models"}.get(path, path) or reason is Reason.MANIFEST_NO_BASE
    assert read(changed(whole, path, right), upstream=upstream).bases


@pytest.mark.parametrize(("reason", "whole", "path", "wrong", "right"), CONTRADICTIONS)
def test_so_it_is_for_a_genuine_manifest_changed_in_one_place(
    reason: Reason, whole: dict[str, Any], path: str, wrong: Any, right: Any
) -> None:
    file = "upstream-fixtures/manifest_v1.json" if whole is V1 else "expert-sql/manifest.json"
    document = json.loads((genuine() / file).read_bytes())

    assert refused(changed(document, path, wrong)).reason is reason
    assert read(changed(document, path, right)).bases


def test_every_contradiction_that_upstream_names_is_tested() -> None:
    named = {reason for reason in Reason if reason.startswith("MANIFEST_")}

    assert {reason for reason, *_ in CONTRADICTIONS} == named
    assert len(named) == 13


def test_an_ia3_has_no_rank() -> None:
    unranked = changed(V2, "training.config.rank", ABSENT)

    assert read(changed(unranked, "training.config.adapter_type", "ia3")).name == "expert-sql"
    assert refused(changed(unranked, "training.config.adapter_type", "lora")).reason is Reason.MANIFEST_NO_RANK


def test_a_manifest_that_forgot_its_schema_version_is_told() -> None:
    error = refused(changed(V2, "schema_version", ABSENT))

    assert error.reason is Reason.MANIFEST_NO_BASE
    assert "schema_version 2.0" in error.message


# Types and bounds.


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("name", 5),
        ("version", ["1.0.0"]),
        ("schema_version", 2.0),
        ("description", {}),
        ("author", False),
        ("repository", "https://example.org"),
        ("repository.url", 1),
        ("base_models", {}),
        ("base_models[0]", "Qwen3"),
        ("base_models[0].sha256", 0),
        ("base_models[0].hocket_base", "Qwen3"),
        ("base_models[0].rope_scaling", 8),
        ("base_models[0].adapters", "lora"),
        ("base_models[0].adapters[0]", []),
        ("base_models[0].adapters[0].type", ABSENT),
        ("base_models[0].adapters[0].target_modules", "q_proj"),
        ("base_models[0].adapters[0].target_modules[1]", None),
        ("base_models[0].adapters[0].feedforward_modules", "up_proj"),
        ("base_models[0].adapters[0].r", 12.0),
        ("base_models[0].adapters[0].r", -1),
        ("base_models[0].adapters[0].alpha", 2**32),
        ("base_models[0].adapters[0].size_bytes", "1024"),
        ("base_models[0].adapters[0].use_dora", 1),
        ("base_models[0].adapters[0].dropout", "0.1"),
        ("soft_prompts", {}),
        ("soft_prompts[0].name", ABSENT),
        ("soft_prompts[0].path", ABSENT),
        ("soft_prompts[0].path", ""),
        ("soft_prompts[0].tokens", -1),
        ("capabilities", "task:text2sql"),
        ("capabilities", ABSENT),
        ("capabilities[0]", 1),
        ("description", ABSENT),
        ("routing", []),
        ("routing.keywords", "sql"),
        ("routing.keywords[0]", None),
        ("routing.priority", "high"),
        ("routing.priority", True),
        ("constraints.load_order", -1),
        ("constraints.load_order", 1.5),
        ("constraints.max_chain", 2**32),
        ("constraints.requires", "expert-json"),
        ("perf.supported_batch_sizes[0]", "1"),
        ("perf.vram_mb_overhead", 0.5),
        ("runtime.candle_compatible", "yes"),
        ("training.config.epochs", "3"),
        ("training.config.rank", 1.0),
        ("training.decoding.top_k", 0.5),
        ("training.decoding.temperature", "0.7"),
        ("training.decoding.use_grammar", "true"),
        ("training.decoding.stop_sequences", ";"),
        ("training.decoding.grammar_file", []),
        ("evaluation.test_set_size", -1),
        ("integrity", "none"),
        ("integrity.files", []),
        ("license", ["MIT"]),
        ("tags", {"sql": True}),
    ],
)
def test_a_wrong_type_is_refused_with_its_path(path: str, wrong: Any, upstream: bool) -> None:  # noqa: FBT001
    error = refused(changed(V2, path, wrong), upstream=upstream)

    assert error.reason is Reason.BAD_MANIFEST
    assert error.field == path
    assert error.message.startswith(path)


def test_a_manifest_is_one_object() -> None:
    documents: list[Any] = [[], "expert", None, 1]
    for document in documents:
        assert refused(document).reason is Reason.BAD_MANIFEST
    with pytest.raises(HocketError) as error:
        parse_manifest(encoded(V2)[:-2])
    assert error.value.reason is Reason.BAD_JSON
    with pytest.raises(HocketError) as error:
        parse_manifest(encoded(V2).replace(b'"tags"', b'"name"'))
    assert error.value.reason is Reason.BAD_JSON


@pytest.mark.parametrize("key", ["name", "version"])
def test_name_and_version_are_any_text_that_can_be_printed(key: str) -> None:
    for text in ("expert sql", "Ärger/1 @x", "x" * 128):
        assert getattr(read(changed(V2, key, text)), key) == text
    for text in ("a\nb", "a\x00", "\x1b[31m", "\u202ecod", "\u200b"):
        error = refused(changed(V2, key, text))
        assert (error.reason, error.field) == (Reason.BAD_MANIFEST, key)
    assert refused(changed(V2, key, "x" * 129)).reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    "path",
    [
        "capabilities",
        "tags",
        "constraints.requires",
        "constraints.incompatible_with",
        "training.decoding.stop_sequences",
        "base_models[0].adapters[0].target_modules",
    ],
)
def test_lists_and_their_texts_are_bounded(path: str) -> None:
    many = changed(V2, path, [f"tag{n}" for n in range(8)])

    error = refused(many, capabilities=7)
    assert (error.reason, error.field) == (Reason.TOO_LARGE, path)
    parse_manifest(encoded(many), limits=replace(DEFAULT_LIMITS, capabilities=8))
    error = refused(changed(V2, path, ["x" * 129]))
    assert (error.reason, error.field) == (Reason.TOO_LARGE, f"{path}[0]")
    read(changed(V2, path, ["x" * 128]))


def test_the_items_of_all_lists_together_are_bounded() -> None:
    base = {"name": "x", "adapters": [{"type": "", "target_modules": []}] * 256}

    error = refused(changed(V2, "base_models", [base] * 16))
    assert (error.reason, error.field) == (Reason.TOO_LARGE, "base_models[15].adapters")
    assert len(read(changed(V2, "base_models", [base] * 15)).bases) == 15


def test_the_whole_file_is_bounded() -> None:
    assert refused(V2, manifest_bytes=len(encoded(V2)) - 1).reason is Reason.TOO_LARGE
    assert refused(changed(V2, "_comment", [[[[]]]]), metadata_depth=4).reason is Reason.TOO_LARGE
    assert refused(changed(V2, "description", "x" * 65), metadata_string_chars=64).reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("base_models[0].adapters[0].path", "path"),
        ("soft_prompts[0].path", "path"),
        ("training.decoding.grammar_file", "grammar_file"),
    ],
)
def test_no_path_leads_outside_the_package(path: str, field: str) -> None:
    for wrong in ("/etc/passwd", "../x", "a/../../x", "a//x", "C:/x", "a\\x", "a\x00", "x/", "-".join(["x"] * 200)):
        error = refused(changed(V2, path, wrong))
        assert (error.reason, error.field) == (Reason.BAD_FILE_NAME, path)
        assert field in error.message
    read(changed(V2, path, "weights/a..b/-x.safetensors"))


# What the default mode fills in, and upstream's rules refuse.


@pytest.mark.parametrize(
    "path",
    [
        "constraints",
        "constraints.load_order",
        "constraints.requires",
        "constraints.incompatible_with",
        "training",
        "training.dataset",
        "training.config",
        "training.config.method",
        "training.config.adapter_type",
        "training.config.epochs",
        "training.config.warmup_steps",
        "training.config.target_modules",
        "routing.keywords",
        "soft_prompts[0].tokens",
        "repository.type",
        "perf.supported_batch_sizes",
        "evaluation.test_set_size",
        "evaluation.metrics",
        "integrity.files",
    ],
)
@pytest.mark.parametrize("absent", [ABSENT, None])
def test_what_upstream_insists_on_is_filled_in_with_a_warning(path: str, absent: Any) -> None:
    document = changed(V2, path, absent)

    assert any(warning.startswith(f"{path} is missing") for warning in read(document).warnings)
    error = refused(document, upstream=True)
    assert (error.reason, error.field) == (Reason.BAD_MANIFEST, path)


def test_the_shortest_manifest_of_the_documents_is_read() -> None:
    adapter = {"type": "lora", "target_modules": ["q_proj"], "r": 8}
    base = {"name": "Qwen3-0.6B", "adapters": [adapter]}
    manifest = read(
        {
            "name": "sql",
            "version": "1",
            "schema_version": "2.0",
            "description": "",
            "capabilities": [],
            "base_models": [base],
        }
    )

    assert manifest.constraints == Constraints(load_order=10)
    assert manifest.decoding == Decoding()
    assert manifest.routing is None
    assert manifest.bases[0].adapters == (ManifestAdapter("lora", ("q_proj",), r=8),)
    assert len(manifest.warnings) == 3


def test_upstream_wants_numbers_for_metrics() -> None:
    for metrics in ({"exact": "good"}, {"exact": None}, {"exact": True}, ["exact"]):
        document = changed(V2, "evaluation.metrics", metrics)
        assert read(document).warnings == ()
        assert refused(document, upstream=True).field == "evaluation.metrics"


def test_a_rope_object_lacks_nothing_for_upstream() -> None:
    rope = {
        "type": "yarn",
        "factor": 8.0,
        "max_position_embeddings": 32768,
        "original_max_position_embeddings": 8192,
        "fine_grained": True,
    }
    document = changed(V2, "base_models[0].rope_scaling", rope)

    read(document, upstream=True)
    path = "base_models[0].rope_scaling.factor"
    assert refused(changed(document, path, ABSENT), upstream=True).field == path
    assert refused(changed(document, path, "8")).field == path


def test_null_is_the_same_as_absent() -> None:
    optional = ["author", "homepage", "repository", "routing", "perf", "runtime", "evaluation", "integrity", "license"]
    nulls, absent = V2, V2
    for key in [*optional, "tags", "soft_prompts"]:
        nulls, absent = changed(nulls, key, None), changed(absent, key, ABSENT)

    assert replace(read(nulls), document={}) == replace(read(absent), document={})
    assert read(nulls).document["author"] is None
    assert "author" not in read(absent).document


def test_empty_texts_of_what_is_optional_are_absent() -> None:
    document = V2
    for path in (
        "base_models[0].sha256",
        "base_models[0].hocket_base",
        "base_models[0].prompt_template",
        "base_models[0].adapters[0].sha256",
        "base_models[0].adapters[0].path",
        "training.decoding.grammar_file",
        "license",
    ):
        document = changed(document, path, "")
    manifest = read(changed(document, "base_models[0].adapters[0].size_bytes", 0))

    assert manifest.warnings == ()
    assert manifest.bases[0].base == BaseModel("F:/models/Qwen3-0.6B", quantization="int4")
    adapter = manifest.bases[0].adapters[0]
    assert (adapter.sha256, adapter.path, adapter.size_bytes) == (None, None, None)
    assert (manifest.license, manifest.grammar_file) == (None, None)


def test_unknown_keys_and_comments_are_kept_in_order() -> None:
    document = {"_first": "why", **V2, "zzz": {"b": [1, None], "a": 2}}
    document = changed(document, "base_models[0].adapters[0]._comment", "Checkpoint-1000")

    assert json.dumps(read(document).document) == json.dumps(document)


def test_a_hash_is_read_in_each_of_its_spellings() -> None:
    for text in ("AB" * 32, "ab" * 32, f"sha256:{'ab' * 32}"):
        assert read(changed(V2, "base_models[0].sha256", text)).bases[0].base.weights_sha256 == "ab" * 32
    manifest = read(changed(V2, "base_models[0].sha256", "abc123..."))
    assert manifest.bases[0].base.weights_sha256 is None
    assert manifest.warnings == ("base_models[0].sha256 is not 64 hex digits, and read as not stated",)


def test_another_schema_version_is_read_as_the_first_with_a_warning() -> None:
    manifest = read(changed(V1, "schema_version", "3.1"))

    assert manifest.schema_version == "1.0"
    assert manifest.warnings == ("schema_version '3.1' is not known, and read as 1.0",)


def test_the_documents_form_of_dependencies_means_the_same_as_requires() -> None:
    dependencies = [
        {"name": "expert-json", "version": ">=1.0.0"},
        {"name": "expert-xml"},
        {"name": "expert-csv", "optional": True},
    ]

    requires = read(changed(V2, "dependencies", dependencies)).constraints.requires
    assert requires == ("expert-json@>=0.4.0", "expert-json@>=1.0.0", "expert-xml")


def test_length_is_another_word_for_tokens() -> None:
    prompt = {"name": "style", "path": "style.safetensors", "length": 48}

    assert read(changed(V2, "soft_prompts[0]", prompt)).soft_prompts[0].tokens == 48
    assert read(changed(V2, "soft_prompts[0]", {**prompt, "tokens": 4})).soft_prompts[0].tokens == 4


# Routing and decoding.


def test_keywords_are_normalised_and_each_is_there_once() -> None:
    keywords = ["SQL", " sql ", "Größe", "Größe", "", "  ", "group by", "İ"]

    routing = read(changed(V2, "routing.keywords", keywords)).routing
    assert routing is not None
    assert routing.keywords == ("sql", "größe", "group by", normalised_keyword("İ"))


def test_keywords_beyond_the_bounds_are_dropped_with_a_warning() -> None:
    limits = replace(DEFAULT_LIMITS, keywords=3, tag_chars=20)
    whole = changed(changed(V2, "training.decoding.grammar_file", "g"), "base_models[0].adapters[0].path", "w")
    document = changed(whole, "routing.keywords", ["a", "x" * 21, "b", "x" * 20, "c"])
    document = changed(document, "soft_prompts[0].path", "s")

    manifest = parse_manifest(encoded(changed(document, "capabilities", [])), limits=limits)
    assert manifest.routing is not None
    assert manifest.routing.keywords == ("a", "b", "x" * 20)
    assert manifest.warnings == (
        "routing.keywords[1] has more than 20 characters, and is dropped",
        "routing.keywords has 5 items; those after 4 are dropped",
    )


@pytest.mark.parametrize(
    ("stated", "read_as"), [(0, 0.0), (1, 1.0), (0.5, 0.5), (-0.1, 0.0), (1.5, 1.0), (2**63, 1.0), (None, None)]
)
def test_a_priority_is_between_0_and_1(stated: Any, read_as: float) -> None:
    manifest = read(changed(V2, "routing.priority", stated))

    assert manifest.routing is not None
    assert manifest.routing.priority == read_as
    assert len(manifest.warnings) == (stated is not None and stated != read_as)


def test_a_priority_that_is_no_number_never_arrives() -> None:
    with pytest.raises(HocketError) as error:
        parse_manifest(encoded(changed(V2, "routing.priority", float("nan"))))
    assert error.value.reason is Reason.BAD_JSON


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("temperature", 2.1, 2),
        ("temperature", -0.1, 0),
        ("top_p", 1.1, 1),
        ("min_p", -1, 0),
        ("top_k", 0, 1),
        ("max_new_tokens", 0, 1),
    ],
)
def test_sampling_out_of_range_is_read_as_not_stated(key: str, wrong: float, right: float) -> None:
    manifest = read(changed(V2, f"training.decoding.{key}", wrong), upstream=True)

    assert getattr(manifest.decoding, key) is None
    assert manifest.warnings[0].startswith(f"training.decoding.{key} ")
    assert getattr(read(changed(V2, f"training.decoding.{key}", right)).decoding, key) == right


def test_an_empty_stop_sequence_would_stop_at_once_and_is_dropped() -> None:
    assert read(changed(V2, "training.decoding.stop_sequences", ["", "}"])).decoding.stop_sequences == ("}",)


def test_no_chain_at_all_is_read_as_not_stated() -> None:
    manifest = read(changed(V2, "constraints.max_chain", 0))

    assert manifest.constraints.max_chain is None
    assert manifest.warnings == ("constraints.max_chain is 0, and read as not stated",)


def test_warnings_are_counted_beyond_a_bound() -> None:
    adapters = [{"type": "lora", "target_modules": [], "sha256": "?"}] * 100

    warnings = read(changed(V2, "base_models[0].adapters", adapters)).warnings
    assert len(warnings) == 65
    assert warnings[-1] == "... and 36 more warnings"
