from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hocket.identity import digest_of, key_text
from hocket.packages import public_key_of, read_release
from tests.experts import archived, expert_files, expert_package, signed_upstream, soft_prompt
from tests.signing import ACME_ID, ACME_SEED, envelope_of, release_path

if TYPE_CHECKING:
    from pathlib import Path

ACME_KEY = key_text(public_key_of(ACME_SEED))
INSPECT_KEYS = {
    "format", "digest", "size", "version", "compression", "upstream_signature", "release", "adapter", "metadata",
    "sections",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "sql.expert"
    path.write_bytes(expert_package(kind="dora"))
    return path


def release(path: Path, name: str = "acme/expert-sql@1.0.0") -> None:
    release_path(path).write_bytes(envelope_of(path.read_bytes(), name=name, format="expert"))


def test_inspect_prints_one_object(hocket: Any, package: Path) -> None:
    data = package.read_bytes()
    outcome = hocket("inspect", package, "--json")
    shown = outcome.document

    assert outcome.code == 0
    assert shown.keys() == INSPECT_KEYS
    assert (shown["format"], shown["version"], shown["size"]) == ("expert", "2.0", len(data))
    assert (shown["digest"], shown["compression"]) == (digest_of(data), "gzip")
    assert shown["upstream_signature"] == {
        "outcome": "unsigned", "key_id": None, "publisher": None, "created_at": None, "explanation": None,
    }  # fmt: skip
    assert shown["release"] is None
    assert shown["adapter"] == {
        "name": "expert-sql",
        "version": "1.0.0",
        "description": "The test expert expert-sql",
        "license": "Apache-2.0",
        "kind": "dora",
        "base": {
            "name": "Qwen/Qwen3-0.6B", "digest": None, "weights_sha256": None, "quantization": "int4",
            "prompt_template": None,
        },
        "rank": 2,
        "target_modules": ["down_proj", "q_proj"],
        "soft_prompt_tokens": 0,
        "has_grammar": False,
        "uses_grammar": False,
        "grammar_problem": None,
        "capabilities": ["task:text2sql", "language:en"],
        "tags": ["sql"],
        "routing": {
            "keywords": ["sql", "query"], "exclude_keywords": ["cypher"], "router_hint": None, "priority": 0.75,
        },
        "constraints": {"load_order": 6, "max_chain": 10, "requires": [], "incompatible_with": []},
        "parameter_bytes": 704,
        "not_servable": None,
        "warnings": [],
    }  # fmt: skip
    assert shown["metadata"]["name"] == "expert-sql"
    assert [section["name"] for section in shown["sections"]] == list(expert_files())


def test_inspect_prints_a_card_for_people(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "sql.expert"
    style = {"name": "style", "path": "style.safetensors", "tokens": 3}
    base = {"name": r"F:\models\Qwen3-0.6B", "hocket_base": f"sha256:{'ab' * 32}"}
    adapters = [{"type": "lora", "target_modules": ["q_proj", "down_proj"], "r": 4}]
    path.write_bytes(
        expert_package(
            manifest={
                "soft_prompts": [style],
                "base_models": [{**base, "adapters": adapters}],
                "routing": {"keywords": [f"word{number}" for number in range(12)], "priority": 0.5},
                "constraints": {"load_order": 1, "requires": ["expert-json@>=1"], "incompatible_with": ["expert-xml"]},
            },
            files={"style.safetensors": soft_prompt(), "grammar.gbnf": b"root ::= [a-z]"},
        )
    )
    card = hocket("inspect", path).out

    for text in (
        "expert-sql 1.0.0",
        "LoRA of rank 2 on down_proj, q_proj",
        f"Qwen3-0.6B, exactly sha256:{'ab' * 32}",
        "3 tokens",
        "grammar      inside, not used: the manifest does not say use_grammar",
        "task:text2sql, language:en",
        "word7 and 4 more (priority 0.5)",
        "expert-json@>=1",
        "expert-xml",
        "none of upstream's tools inside",
        "`hocket sign`",
        "Apache-2.0",
        "the manifest says r 4; adapter_config.json says 2",
        "style.safetensors",
        "14 B",
    ):
        assert text in card, text


@pytest.mark.parametrize(
    ("decoding", "worth"), [({"use_grammar": True}, "every answer is refused"), ({"use_grammar": False}, "not used")]
)
def test_a_grammar_that_no_answer_could_follow_is_said_so(
    hocket: Any, tmp_path: Path, decoding: dict[str, bool], worth: str
) -> None:
    path = tmp_path / "sql.expert"
    manifest = {"training": {"decoding": decoding}}
    path.write_bytes(expert_package(manifest=manifest, files={"grammar.gbnf": b"root ::= nothere"}))
    problem = "the grammar cannot be used: there is no rule 'nothere'"

    assert f"grammar      INSIDE, AND BROKEN: {problem} ({worth})" in hocket("inspect", path).out
    assert hocket("inspect", path, "--json").document["adapter"]["grammar_problem"] == problem


def test_an_expert_that_is_never_chosen_by_itself_says_so(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "quiet.expert"
    path.write_bytes(expert_package(kind="soft_prompt", manifest={"routing": None, "tags": None}))
    card = hocket("inspect", path).out

    assert "nothing by itself" in card
    assert "adapter      soft prompt\n" in card
    assert "by name: the package does not say which weights exactly" in card


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "covers every file, by key"),
        ({"LICENSE": b"x"}, "IS NOT VALID, by key"),
        ({"manifest.json": expert_files(manifest={"integrity": {}})["manifest.json"]}, "IS NOT VALID"),
    ],
)
def test_the_card_says_what_upstream_s_signature_is_worth(
    hocket: Any, tmp_path: Path, change: dict[str, bytes], text: str
) -> None:
    path = tmp_path / "signed.expert"
    path.write_bytes(archived({**signed_upstream(expert_files()), **change}))
    outcome = hocket("inspect", path)

    assert text in outcome.out
    assert "shown, never decisive" in outcome.out


def test_what_an_expert_says_cannot_write_to_the_terminal(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.expert"
    path.write_bytes(expert_package(manifest={"description": "\x1b[2Jgone", "license": "\x07"}))
    outcome = hocket("inspect", path)
    assert "\x1b" not in outcome.out
    assert "\x07" not in outcome.out


def test_inspect_shows_the_release_beside_the_file(hocket: Any, package: Path) -> None:
    hocket("trust", "add", "acme", "--key", ACME_KEY)
    release(package)
    expected = {"publisher": "acme", "name": "expert-sql", "version": "1.0.0", "key_id": ACME_ID}
    shown = hocket("inspect", package, "--json").document["release"]
    assert shown == {**expected, "trusted": True, "refused": None}

    release(package, "acme/expert-sql@3.0.0")
    shown = hocket("inspect", package, "--json").document["release"]
    assert shown == {**expected, "version": "3.0.0", "trusted": False, "refused": "NAME_MISMATCH"}


def test_verify_says_which_proofs_hold(hocket: Any, package: Path) -> None:
    release(package)
    outcome = hocket("verify", package, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "SIGNER_NOT_TRUSTED")

    hocket("trust", "add", "acme", "--key", ACME_KEY)
    assert hocket("verify", package, "--json").document == {
        "digest": digest_of(package.read_bytes()),
        "proofs": [{"kind": "release", "key_id": ACME_ID, "publisher": "acme", "release": "acme/expert-sql@1.0.0"}],
    }


def test_verify_refuses_a_release_under_another_name(hocket: Any, package: Path) -> None:
    hocket("trust", "add", "acme", "--key", ACME_KEY)
    release(package, "acme/expert-mysql@1.0.0")
    outcome = hocket("verify", package, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "NAME_MISMATCH")


def test_verify_refuses_what_is_genuine_but_cannot_serve(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.expert"
    path.write_bytes(expert_package(config={"init_lora_weights": "pissa"}))
    outcome = hocket("verify", path, "--allow-unsigned", "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "NOT_SERVABLE")
    path.write_bytes(expert_package())
    assert hocket("verify", path, "--allow-unsigned").code == 0


def test_sign_takes_name_and_version_from_the_manifest(hocket: Any, package: Path, key: Path) -> None:
    outcome = hocket("sign", package, "--publisher", "acme", "--key", key, "--json")

    assert outcome.code == 0
    assert outcome.document["release"] == "acme/expert-sql@1.0.0"
    claimed = read_release(release_path(package).read_bytes()).release
    assert (str(claimed.name), claimed.subject.format) == ("acme/expert-sql@1.0.0", "expert")
    hocket("trust", "add", "acme", "--key", ACME_KEY)
    assert hocket("verify", package).code == 0


@pytest.mark.parametrize("options", [("--name", "expert-sql"), ("--version", "1.0.0")])
def test_sign_may_repeat_them(hocket: Any, package: Path, key: Path, options: tuple[str, str]) -> None:
    assert hocket("sign", package, "--publisher", "acme", *options, "--key", key).code == 0


@pytest.mark.parametrize("options", [("--name", "expert-mysql"), ("--version", "1.0.1")])
def test_sign_refuses_others(hocket: Any, package: Path, key: Path, options: tuple[str, str]) -> None:
    outcome = hocket("sign", package, "--publisher", "acme", *options, "--key", key, "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "NAME_MISMATCH")
    assert not release_path(package).exists()


def test_sign_refuses_a_manifest_whose_name_could_not_be_addressed(hocket: Any, package: Path, key: Path) -> None:
    package.write_bytes(expert_package("../Expert"))
    outcome = hocket("sign", package, "--publisher", "acme", "--key", key, "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


def test_sign_warns_of_what_cannot_serve(hocket: Any, package: Path, key: Path) -> None:
    package.write_bytes(expert_package(files={"adapter_config.json": None}))
    outcome = hocket("sign", package, "--publisher", "acme", "--key", key)

    assert outcome.code == 0
    assert "copy it from the training output" in outcome.err
