from __future__ import annotations

from typing import Any

import pytest

from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.strict import Problem, problems
from tests.manifests import ABSENT, FILES, V1, V2, changed, encoded, genuine


def found(document: dict[str, Any], files: set[str] = FILES) -> list[Problem]:
    return problems(parse_manifest(encoded(document)), files)


def test_a_whole_manifest_has_no_problems() -> None:
    assert found(V1) == found(V2) == []


@pytest.mark.parametrize("name", ["elastic", "json", "neo4j", "sql", "tools"])
def test_a_genuine_manifest_has_no_problems(name: str) -> None:
    data = (genuine() / f"expert-{name}" / "manifest.json").read_bytes()

    assert problems(parse_manifest(data), FILES) == []


def test_the_soft_prompt_of_expert_typescript_must_be_there_and_be_converted() -> None:
    data = (genuine() / "expert-typescript" / "manifest.json").read_bytes()

    missing, unsafe = problems(parse_manifest(data), FILES)
    assert missing.path == unsafe.path == "soft_prompts[0].path"
    assert "not in the package" in missing.message
    assert "convert it to safetensors" in unsafe.message


RULES: list[tuple[str, Any, Any]] = [
    ("name", "sql", "expert-sql-2"),
    ("name", "expert-SQL", "expert-x"),
    ("version", "2025-11-27", "1.0.0-rc.1"),
    ("version", "1.0", "1.0.0"),
    ("version", "1.0.0 beta", "1.0.0"),
    ("description", "", "x"),
    ("author", ABSENT, "x"),
    ("homepage", "example.org", "https://example.org"),
    ("repository.type", "svn", "git"),
    ("repository.url", "git@example.org:x", "ssh://git@example.org/x"),
    ("license", ABSENT, "MIT"),
    ("license", "do what you want", "Apache-2.0 WITH LLVM-exception"),
    ("license", "MIT OR", "(MIT OR Apache-2.0) AND CC-BY-4.0"),
    ("capabilities", [], ["x"]),
    ("perf", ABSENT, V2["perf"]),
    ("perf.latency_ms_overhead", ABSENT, 0),
    ("perf.latency_ms_overhead", -1, 0.5),
    ("perf.supported_batch_sizes", [], [1]),
    ("perf.supported_batch_sizes", [0], [1]),
    ("quality_metrics", ABSENT, {}),
    ("quality_metrics.benchmark_score", 11, 10),
    ("quality_metrics.benchmark_score", "good", 0),
    ("quality_metrics.win_rate_vs_base", 1.5, 1),
    ("quality_metrics.test_date", "12.11.2025", "2025-11-12"),
    ("routing.keywords", [], ["sql"]),
    ("routing.keywords", ABSENT, ["sql"]),
    ("routing.priority", 1.1, 1),
    ("constraints", ABSENT, V2["constraints"]),
    ("constraints.load_order", ABSENT, 0),
    ("constraints.max_chain", 0, 1),
    ("constraints.requires[0]", "expert-json@^1.0", "acme/expert-json@>=1.0.0"),
    ("constraints.incompatible_with[0]", "Expert JSON", "expert-json<=0.9.0"),
    ("dependencies", [{"name": "expert-json", "version": "latest!"}], [{"name": "expert-json"}]),
    ("base_models[0].sha256", "abc123...", ""),
    ("base_models[0].quantization", "int2", "int8"),
    ("base_models[0].prompt_template", "mistral", "chatml"),
    ("base_models[0].rope_scaling", {"type": "long"}, {"type": "yarn"}),
    ("base_models[0].rope_scaling", {"factor": 0.5}, {"factor": 1}),
    ("base_models[0].adapters[0].type", "vera", "lora"),
    ("base_models[0].adapters[0].target_modules", [], ["q_proj"]),
    ("base_models[0].adapters[0].target_modules", ["wq"], ["lm_head"]),
    ("base_models[0].adapters[0].r", ABSENT, 1),
    ("base_models[0].adapters[0].r", 257, 256),
    ("base_models[0].adapters[0].alpha", ABSENT, 1),
    ("base_models[0].adapters[0].alpha", 0, 1),
    ("base_models[0].adapters[0].dropout", 1.1, 0),
    ("base_models[0].adapters[0].scaling", "half", "rsqrt"),
    ("base_models[0].adapters[0].sha256", "AB" * 32, "ab" * 32),
    ("base_models[0].adapters[0].feedforward_modules", ["up_proj"], []),
    ("soft_prompts[0].tokens", 0, 512),
    ("soft_prompts[0].tokens", 513, 1),
    ("soft_prompts[0].tokens", ABSENT, 1),
    ("soft_prompts[0].init_method", "guess", "text"),
    ("soft_prompts[0].path", "style.safetensors", "elsewhere/grammar.gbnf.safetensors"),
    ("runtime.attention_kernel", "eager", "vanilla"),
    ("training", ABSENT, V2["training"]),
    ("training.dataset", ABSENT, {}),
    ("training.config.batch_size", ABSENT, 1),
    ("training.config.method", "ppo", "dpo"),
    ("training.config.lr_scheduler", "step", "linear"),
    ("training.packaging_checkpoint", "last", "checkpoint-1000"),
    ("training.decoding.temperature", 2.1, 2),
    ("training.decoding.top_k", 0, 1),
    ("training.decoding.grammar_type", "xml", "tool-call"),
    ("training.decoding.grammar_file", "sql.gbnf", "grammar.gbnf"),
    ("limitations", [{"pattern": "x"}], [{"pattern": "x", "description": "y"}]),
    ("limitations", [5], ["text"]),
    ("limitations", [{"pattern": "x", "description": "y", "severity": 1}], []),
]


@pytest.mark.parametrize(("path", "wrong", "right"), RULES)
def test_each_rule_has_a_problem_with_its_path_and_a_twin_without(path: str, wrong: Any, right: Any) -> None:
    files = {*FILES, "elsewhere/grammar.gbnf.safetensors"}

    mend = found(changed(V2, path, wrong), files)
    assert mend
    assert all(problem.path.startswith(path.removesuffix("[0]")) for problem in mend)
    assert all(problem.message for problem in mend)
    assert found(changed(V2, path, right), files) == []


def test_an_ia3_has_neither_rank_nor_alpha() -> None:
    path = "base_models[0].adapters[0]"
    document = changed(V2, f"{path}.type", "ia3")

    assert [problem.path for problem in found(document)] == [f"{path}.r", f"{path}.alpha"]
    for key in ("r", "alpha"):
        document = changed(document, f"{path}.{key}", ABSENT)
    assert found(changed(document, f"{path}.feedforward_modules", ["down_proj"])) == []


def test_schema_1_is_looked_at_as_well() -> None:
    assert [problem.path for problem in found(changed(V1, "adapters[0].r", ABSENT))] == ["adapters[0].r"]
    assert [problem.path for problem in found(changed(V1, "base_model.quantization", "x"))] == [
        "base_model.quantization"
    ]
    assert [problem.path for problem in found(changed(V1, "schema_version", "3.0"))] == ["schema_version"]


def test_what_the_manifest_names_must_be_in_the_package() -> None:
    def paths(*absent: str) -> list[str]:
        return [problem.path for problem in found(V2, FILES - {*absent})]

    assert paths("adapter_model.safetensors") == [""]
    assert paths("adapter_config.json") == [""]
    assert paths("grammar.gbnf") == ["training.decoding.grammar_file"]
    assert paths("soft_prompts/style.safetensors") == ["soft_prompts[0].path"]
    assert found(V2, FILES - {"soft_prompts/style.safetensors"} | {"style.safetensors"}) == []
    unnamed = changed(V2, "training.decoding.grammar_file", ABSENT)
    assert found(unnamed) == []
    assert [problem.path for problem in found(unnamed, FILES - {"grammar.gbnf"})] == ["training.decoding.use_grammar"]
