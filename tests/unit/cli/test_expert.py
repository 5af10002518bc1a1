"""`hocket expert`: what an author runs between training and signing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save

from hocket.base_folder import base_digest
from hocket.packages.expert.archive import read_archive

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "models/Tiny_1.5",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
}


def weights(scale: float = 1.0) -> bytes:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = np.full((2, 8), scale, np.float32), np.full((8, 2), scale, np.float32)
    return save({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What training left: no manifest."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(weights())
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def authored(trained: Path, hocket: Any) -> Path:
    """The same with a manifest."""
    assert hocket("expert", "new", trained, "--name", "expert-sql", "--capability", "task:text2sql").code == 0
    return trained


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-base"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestNew:
    def test_a_manifest_is_made_of_what_training_left(self, hocket: Any, trained: Path) -> None:
        outcome = hocket("expert", "new", trained, "--name", "expert-sql", "--json")
        manifest = json.loads((trained / "manifest.json").read_text())

        assert outcome.document == {"path": str(trained / "manifest.json"), "manifest": manifest}
        assert (manifest["name"], manifest["version"]) == ("expert-sql", "0.1.0")
        [entry] = manifest["base_models"]
        assert entry["name"] == "models/Tiny_1.5"
        assert entry["adapters"][0]["r"] == 2

    def test_before_training_it_holds_what_shall_be_trained(self, hocket: Any, tmp_path: Path, base: Path) -> None:
        folder = tmp_path / "new" / "expert-x"
        outcome = hocket(
            "expert", "new", folder, "--name", "expert-x", "--base", base, "--kind", "dora", "--rank", "8", "--json"
        )
        [entry] = outcome.document["manifest"]["base_models"]
        assert (entry["name"], entry["hocket_base"]) == ("tiny-base", base_digest(base))
        assert (entry["adapters"][0]["type"], entry["adapters"][0]["r"], entry["adapters"][0]["alpha"]) == (
            "dora",
            8,
            16,
        )

    def test_a_manifest_that_is_there_is_not_written_over(self, hocket: Any, authored: Path) -> None:
        before = (authored / "manifest.json").read_bytes()
        outcome = hocket("expert", "new", authored, "--name", "expert-other", "--json")
        assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")
        assert (authored / "manifest.json").read_bytes() == before

    def test_an_expert_for_no_base_is_refused(self, hocket: Any, tmp_path: Path) -> None:
        outcome = hocket("expert", "new", tmp_path / "x", "--name", "expert-x", "--json")
        assert outcome.document["error"]["reason"] == "BAD_REQUEST"
        assert not (tmp_path / "x").exists()


class TestPack:
    def test_a_training_output_is_packed_by_one_command(
        self, hocket: Any, trained: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(trained.parent)
        outcome = hocket(
            "expert", "pack", "out", "--name", "expert-sql", "--version", "1.0.0", "--base", base, "--json"
        )
        made = outcome.document

        assert outcome.code == 0
        assert made["path"] == "expert-sql-tiny-base.v1.0.0.expert"
        files = read_archive((trained.parent / made["path"]).read_bytes()).files
        assert files.keys() == {"manifest.json", "adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(files["manifest.json"])["base_models"][0]["hocket_base"] == base_digest(base)

    def test_the_same_folder_gives_the_same_bytes(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            assert hocket("expert", "pack", authored, "--out", tmp_path / name).code == 0
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert hocket("expert", "pack", authored, "--out", tmp_path / "c", "--zstd").code == 0
        assert read_archive((tmp_path / "c").read_bytes()).files == read_archive((tmp_path / "a").read_bytes()).files

    def test_what_is_not_packed_is_named(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        assert "not packed: training_args.bin" in hocket("expert", "pack", authored, "-o", tmp_path / "x").err

    def test_the_adapter_may_lie_in_another_folder(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        final = authored / "weights" / "final"
        final.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (authored / name).rename(final / name)
        packed = tmp_path / "x.expert"
        assert hocket("expert", "pack", authored, "-o", packed).code == 2
        assert not packed.exists()
        assert hocket("expert", "pack", authored, "-o", packed, "--weights", final).code == 0

    def test_tests_come_along_when_asked_for(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        (authored / "tests").mkdir()
        (authored / "tests" / "cases.json").write_text("{}")
        packed = tmp_path / "x.expert"
        assert hocket("expert", "pack", authored, "-o", packed, "--include-tests").code == 0
        assert "tests/cases.json" in read_archive(packed.read_bytes()).files

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ((), "give --name and --version"),
            (("--name", "expert-sql"), "give --name and --version"),
            (("--name", "Expert", "--version", "1.0.0"), "not a valid name"),
            (("--name", "expert-sql", "--version", "1 0"), "not a valid version"),
            (("--name", "expert-sql", "--version", "1.0.0", "--weights", "nowhere"), "is no folder"),
        ],
    )
    def test_what_is_not_told_well_is_refused(
        self, hocket: Any, trained: Path, arguments: tuple[str, ...], says: str
    ) -> None:
        outcome = hocket("expert", "pack", trained, *arguments, "--json")
        assert outcome.code == 2
        assert says in outcome.document["error"]["message"]

    def test_what_the_manifest_says_is_not_told_again(self, hocket: Any, authored: Path) -> None:
        outcome = hocket("expert", "pack", authored, "--version", "2.0.0", "--json")
        assert "leave out --version" in outcome.document["error"]["message"]

    def test_a_folder_that_training_never_saw_is_refused(self, hocket: Any, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        outcome = hocket("expert", "pack", tmp_path / "empty", "--json")
        assert "hocket expert new" in outcome.document["error"]["message"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": ""},
            {"soft_prompts": [{"name": "s", "path": "s.pt", "tokens": 2}]},
            {"base_models": []},
            {"name": "../../escaped"},
            {"version": "1/../2"},
            {"constraints": {"requires": ["../x y"]}},
            {"constraints": {"requires": ["expert-sql"]}},
            {"constraints": {"incompatible_with": ["a@not a range"]}},
        ],
        ids=["no name", "a pickle", "no base", "a path", "no version", "no requirement", "itself", "no range"],
    )
    def test_pack_refuses_what_validate_finds_wrong(
        self, hocket: Any, authored: Path, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        (authored / "s.pt").write_bytes(b"a pickle")
        packed = tmp_path / "x.expert"
        assert hocket("expert", "validate", authored).code == 0
        edit(authored, **changes)
        assert hocket("expert", "validate", authored).code == 2
        assert hocket("expert", "pack", authored, "-o", packed).code == 2
        assert not packed.exists()


class TestGrammars:
    def test_one_that_no_answer_could_follow_is_not_packed(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        packed = tmp_path / "x.expert"
        edit(authored, training={"decoding": {"use_grammar": True}})
        for grammar, why in (
            ("root ::= nothere", "there is no rule 'nothere'"),
            ("root ::= root", "no text could ever"),
        ):
            (authored / "grammar.gbnf").write_text(grammar)
            outcome = hocket("expert", "validate", authored, "--json")
            assert outcome.code == 2
            [problem] = outcome.document["errors"]
            assert problem["path"] == "training.decoding.use_grammar"
            assert f"the grammar cannot be used: {why}" in problem["message"]
            refused = hocket("expert", "pack", authored, "-o", packed)
            assert (refused.code, packed.exists()) == (2, False)
            assert why in refused.err
        (authored / "grammar.gbnf").write_text("root ::= [a-z]+")
        assert hocket("expert", "pack", authored, "-o", packed).code == 0
        assert hocket("expert", "validate", packed).code == 0

    def test_one_that_answers_do_not_follow_is_a_warning(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        (authored / "grammar.gbnf").write_text("root ::= nothere")
        outcome = hocket("expert", "pack", authored, "-o", tmp_path / "x.expert")
        assert outcome.code == 0
        assert (
            "warning: the grammar cannot be used: there is no rule 'nothere'; answers do not follow it" in outcome.err
        )


class TestValidate:
    def test_a_package_that_a_registry_would_take_is_valid(self, hocket: Any, authored: Path, tmp_path: Path) -> None:
        packed = tmp_path / "x.expert"
        assert hocket("expert", "pack", authored, "-o", packed).code == 0
        outcome = hocket("expert", "validate", packed, "--json")
        assert outcome.code == 0
        assert outcome.document["valid"] is True
        assert outcome.document["errors"] == []

    def test_strict_names_everything_that_others_ask_for(self, hocket: Any, authored: Path) -> None:
        edit(authored, capabilities=[], license=None)
        outcome = hocket("expert", "validate", authored, "--strict", "--json")
        assert outcome.code == 2
        assert outcome.document["valid"] is False
        assert outcome.document["errors"]
        assert hocket("expert", "validate", authored).code == 0

    def test_weights_that_are_not_those_of_the_configuration_are_refused(self, hocket: Any, authored: Path) -> None:
        (authored / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": 3}))
        outcome = hocket("expert", "validate", authored)
        assert outcome.code == 2
        assert "lora_A" in outcome.err

    def test_a_file_that_is_no_package_is_refused(self, hocket: Any, tmp_path: Path) -> None:
        path = tmp_path / "x.expert"
        path.write_bytes(b"text")
        outcome = hocket("expert", "validate", path, "--json")
        assert (outcome.code, outcome.document["valid"]) == (2, False)


def test_a_new_manifest_goes_on_to_training_or_to_what_peft_has_written(hocket: Any, tmp_path: Path) -> None:
    out = hocket("expert", "new", tmp_path / "desk", "--name", "expert-desk", "--base", "Qwen3-0.6B").out

    assert f"hocket train {tmp_path}/desk --base BASE_FOLDER --out {tmp_path}/desk/out\n" in out
    assert f"hocket expert pack {tmp_path}/desk/out\n" in out
    assert "save_pretrained" in out
    assert f"hocket expert pack {tmp_path}/desk\n" in out


@pytest.mark.parametrize(
    ("written", "meant"), [(("expert", "show"), "hocket experts show"), (("experts", "pack"), "hocket expert pack")]
)
def test_a_verb_of_the_other_group_is_named(hocket: Any, written: tuple[str, str], meant: str) -> None:
    outcome = hocket(*written, "sql")

    assert outcome.code == 2
    assert f"Did you mean `{meant}`?" in " ".join(outcome.err.split())
    assert "Did you mean" not in hocket(written[0], "nonsense").err
