from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.cli import publish
from hocket.cli.progress import progress_of
from hocket.errors import HocketError
from hocket.identity import digest_of
from hocket.mixtures import parse_mixture
from hocket.packages import Purpose, read_release
from hocket.v1.package_pb2 import (
    TRUST_STATE_ACTIVE,
    TRUST_STATE_KEY_REVOKED,
    TRUST_STATE_UNTRUSTED,
    TRUST_STATE_YANKED,
    Release,
)
from tests.builders import apr_bytes, linear
from tests.fakes import HIGH, LOW, ScriptedRegistry, adapter_package, expert_package
from tests.signing import ACME_ID, envelope_of

if TYPE_CHECKING:
    from pathlib import Path

SQL = "sha256:" + "3" * 64
JSON = "sha256:" + "4" * 64

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Two released packages, acme/low@1.0.0 and acme/high@1.0.0."""
    paths = []
    for name, slope in (("low", 1.0), ("high", 2.0)):
        path = tmp_path / f"{name}.apr"
        data = apr_bytes(linear(slope, slope))
        path.write_bytes(data)
        path.with_name(f"{name}.apr.release.json").write_bytes(envelope_of(data, name=f"acme/{name}@1.0.0"))
        paths.append(path)
    return paths


@pytest.fixture
def draft(tmp_path: Path, packages: list[Path]) -> Path:
    """A mixture of both packages behind a softmax gate."""
    assert packages
    np.save(tmp_path / "gate.npy", np.eye(2))
    path = tmp_path / "digits.toml"
    path.write_text(
        'name = "digits"\nlabels = ["0", "1"]\n'
        '[[members]]\nexpert = "acme/low@1.0.0"\n[[members]]\nexpert = "high.apr"\n'
        '[gate]\nkind = "softmax"\nweights = "gate.npy"\n'
    )
    return path


def test_publish_uploads_each_file_with_the_release_beside_it(
    hocket: Any, packages: list[Path], registry: ScriptedRegistry
) -> None:
    outcome = hocket("publish", *packages, "--json")

    assert outcome.code == 0
    assert [line["created"] for line in outcome.lines] == [True, True]
    assert [line["package"]["digest"] for line in outcome.lines] == [digest_of(path.read_bytes()) for path in packages]
    assert [line["file"] for line in outcome.lines] == [str(path) for path in packages]
    assert outcome.lines[0]["package"]["releases"][0]["name"] == "low"
    assert list(registry.blobs.values()) == [path.read_bytes() for path in packages]


def test_publish_says_when_it_was_already_there(hocket: Any, packages: list[Path]) -> None:
    assert "published: acme/low@1.0.0, sha256:" in hocket("publish", packages[0]).out
    assert "was already there: acme/low@1.0.0" in hocket("publish", packages[0]).out


def test_publish_says_when_it_has_healed_a_damaged_copy(
    hocket: Any, packages: list[Path], registry: ScriptedRegistry
) -> None:
    hocket("publish", packages[0])
    registry.damaged = True
    assert "was already there, and its damaged copy is replaced: acme/low" in hocket("publish", packages[0]).out


def test_publish_without_a_release_leaves_the_judgement_to_the_registry(hocket: Any, tmp_path: Path) -> None:
    path = tmp_path / "plain.apr"
    path.write_bytes(apr_bytes())
    out = hocket("publish", path).out

    assert "addressable by digest only" in out
    assert "UNSIGNED" in out


def test_the_token_is_read_from_a_file(hocket: Any, packages: list[Path], tmp_path: Path) -> None:
    token = tmp_path / "admin.token"
    token.write_text("0123456789abcdef\n")
    assert hocket("publish", packages[0], "--token-file", token).code == 0

    token.write_text("short")
    outcome = hocket("publish", packages[0], "--token-file", token, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


def test_a_registry_that_is_not_there_is_said_so(hocket: Any, packages: list[Path]) -> None:
    outcome = hocket("publish", packages[0], "--registry", "127.0.0.1:1", "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "UNREACHABLE")


def test_publish_says_which_file_failed_and_which_were_not_tried(
    hocket: Any, packages: list[Path], tmp_path: Path
) -> None:
    missing = tmp_path / "missing.apr"
    outcome = hocket("publish", packages[0], missing, packages[1], "--json")

    assert outcome.code == 2
    assert outcome.lines[0]["file"] == str(packages[0])
    error = outcome.lines[1]["error"]
    assert (error["reason"], error["file"]) == ("BAD_REQUEST", str(missing))
    assert f"not tried: {packages[1]}" in error["message"]


def test_uploads_have_a_progress_bar_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_of("x", shown=True) as on_progress:
        assert on_progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_of("x", shown=False) as on_progress:
        assert on_progress is None
    with progress_of("[x]", shown=True) as on_progress:
        assert on_progress is not None
        on_progress(1, 2)


def test_packages_are_listed(hocket: Any, registry: ScriptedRegistry) -> None:
    assert "No packages yet" in hocket("list").out
    registry.packages[LOW] = expert_package(LOW, "low", output_range={"lower": 0, "upper": 1})
    registry.packages[SQL] = adapter_package(SQL, "expert-sql")
    many = expert_package(HIGH, "high", expert_layout="Ridge")
    many.model.expert_count = 4
    del many.releases[:], many.model.columns[:]
    many.embedded_signature.key_id = "cd" * 32
    many.unsigned_by_policy = True
    registry.packages[HIGH] = many

    listed = hocket("list").out
    for text in ("acme/low@1.0.0", "LogisticRegression", "2 features", "0, 1", "active"):
        assert text in listed
    for text in ("sha256:222222222222", "4 x Ridge", "one number", "active, UNSIGNED"):
        assert text in listed
    for text in ("acme/expert-sql@1.0.0", "DoRA adapter", "text (base model Qwen3-0.6B)"):
        assert text in listed
    card = hocket("experts", "show", HIGH, "--router", "127.0.0.1:1").out
    assert "inside (cdcdcdcdcdcd, not trusted), NOBODY (policy)" in card
    outcome = hocket("list", "--publisher", "acme", "--json")
    assert [package["digest"] for package in outcome.document["packages"]] == [LOW, SQL]


def test_a_search_hands_on_words_and_filters(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[SQL] = adapter_package(SQL, "expert-sql", description="Turns questions into SQL. " * 20)
    registry.packages[LOW] = expert_package(LOW, "low")
    filters = ("--capability", "task:text2sql", "--base", "Qwen3-0.6B", "--publisher", "acme")

    out = hocket("search", "sql", "questions", *filters).out

    (asked,) = registry.lists
    assert (asked.text, asked.capability, asked.base, asked.publisher) == (
        "sql questions",
        "task:text2sql",
        "Qwen3-0.6B",
        "acme",
    )
    assert "Turns questions into SQL." in out
    assert "..." in out
    assert "0, 1" in out
    assert len(hocket("search", "--publisher", "acme", "--json").document["packages"]) == 2
    assert "Nothing found" in hocket("search", "x", "--publisher", "nobody").out
    outcome = hocket("search", "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")


def test_an_adapter_is_shown_whole(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[JSON] = adapter_package(JSON, "expert-json", version="0.4.1")
    registry.packages[SQL] = adapter_package(
        SQL,
        "expert-sql",
        "expert-json@>=0.4.0",
        "zeta/expert-x",
        rank=12,
        target_modules=["q_proj", "v_proj"],
        capabilities=["task:text2sql"],
        tags=["database"],
        routing={"keywords": ["select"], "exclude_keywords": ["cypher"]},
        has_grammar=True,
        uses_grammar=True,
        license="Apache-2.0",
        soft_prompt_tokens=48,
        upstream_signature={"outcome": "UPSTREAM_OUTCOME_WEIGHTS_ONLY", "key_id": "ef" * 32, "publisher": "hive"},
        warnings=["manifest says r 14, adapter_config.json 12"],
    )

    card = hocket("experts", "show", "acme/expert-sql@1.0.0").out

    for text in (
        SQL,
        "DoRA adapter, rank 12 on q_proj, v_proj",
        "Qwen3-0.6B (by name",
        "task:text2sql",
        "select",
        "cypher",
        "6 (lower numbers are applied first)",
        "expert-json@>=0.4.0: acme/expert-json@0.4.1",
        "zeta/expert-x: NOTHING HERE WILL DO",
        "48 tokens",
        "Apache-2.0",
        "covers every file but the manifest, by key efefefefefef, said to be hive's (shown, never decisive)",
        "manifest says r 14",
        "expert 2.0",
    ):
        assert text in card
    assert "in memory of" not in card
    shown = hocket("experts", "show", SQL, "--json").document
    assert shown["satisfied_by"] == {"expert-json@>=0.4.0": "acme/expert-json@0.4.1", "zeta/expert-x": None}
    assert shown["adapter"]["upstream_signature"]["publisher"] == "hive"


def test_an_adapter_that_says_little_is_shown_with_little(hocket: Any, registry: ScriptedRegistry) -> None:
    plain = adapter_package(
        SQL,
        "expert-sql",
        kind="ADAPTER_KIND_SOFT_PROMPT",
        base={"name": "/", "digest": JSON},
        constraints={"max_chain": 3},
        upstream_signature={"outcome": "UPSTREAM_OUTCOME_INVALID", "explanation": "a file was altered"},
    )
    del plain.releases[:]
    plain.unsigned_by_policy = True
    registry.packages[SQL] = plain

    card = hocket("experts", "show", SQL).out

    for text in (
        "sha256:333333333333 (expert-sql@1.0.0)",
        "active, UNSIGNED",
        "soft prompt",
        f"exactly {JSON}",
        "none: used only when asked for",
        "3 experts together",
        "IS NOT VALID: a file was altered",
    ):
        assert text in card
    registry.packages[SQL].adapter.ClearField("upstream_signature")
    assert re.search(r"upstream signature +none", hocket("experts", "show", SQL).out)


def test_what_is_withdrawn_is_left_out_unless_asked_for(hocket: Any, registry: ScriptedRegistry) -> None:
    for index, state in enumerate((TRUST_STATE_ACTIVE, TRUST_STATE_YANKED, TRUST_STATE_KEY_REVOKED), start=1):
        digest = f"sha256:{index:064}"
        registry.packages[digest] = adapter_package(digest, "expert-sql", version=f"{index}.0.0")
        registry.packages[digest].state = state
    registry.packages[LOW] = expert_package(LOW, "low")
    registry.packages[LOW].state = TRUST_STATE_UNTRUSTED  # trusting its key brings it back

    for verb in (("list",), ("search", "sql")):
        out = hocket(*verb).out
        assert "2 withdrawn are not shown: --all" in out
        assert [name in out for name in ("sql@1.0.0", "sql@2.0.0", "sql@3.0.0", "low@1.0.0")] == [
            True,
            False,
            False,
            True,
        ]
        every = hocket(*verb, "--all").out
        assert "not shown" not in every
        assert all(state in every for state in ("active", "yanked", "key revoked", "untrusted"))
        states = [package["state"] for package in hocket(*verb, "--json").document["packages"]]
        assert len(states) == 4
    for digest in (LOW, f"sha256:{1:064}", f"sha256:{2:064}"):
        del registry.packages[digest]
    assert hocket("list").out == "1 withdrawn is not shown: --all\n"


def test_versions_are_ordered_as_versions(hocket: Any, registry: ScriptedRegistry) -> None:
    for digest, version in ((LOW, "10.0.0"), (HIGH, "2.0.0"), (SQL, "2.0.0-rc.1")):
        registry.packages[digest] = adapter_package(digest, "expert-sql", version=version)
    registry.packages[JSON] = adapter_package(JSON, "expert-json", version="3.0.0")

    for verb in (("list",), ("search", "sql")):
        shown = re.findall(r"acme/expert-\w+@(\S+)", hocket(*verb).out)
        assert shown == ["3.0.0", "2.0.0-rc.1", "2.0.0", "10.0.0"]
    assert "it has 2.0.0-rc.1, 2.0.0, 10.0.0" in hocket("uninstall", "sql@9").err


class TestShortNames:
    def test_show_takes_the_newest_version_that_may_serve(self, hocket: Any, registry: ScriptedRegistry) -> None:
        versions = {LOW: "2.0.0", HIGH: "10.0.0", SQL: "11.0.0"}
        for digest, version in versions.items():
            registry.packages[digest] = adapter_package(digest, "expert-sql", version=version)
        registry.packages[SQL].state = TRUST_STATE_YANKED

        for written, digest in (("sql", HIGH), ("acme/expert-sql", HIGH), ("sql@2.0.0", LOW), ("sql@11.0.0", SQL)):
            assert hocket("experts", "show", written, "--json").document["digest"] == digest

    def test_yank_takes_a_name_that_only_one_package_has(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[LOW] = adapter_package(LOW, "expert-sql", version="1.0.0")
        registry.packages[HIGH] = adapter_package(HIGH, "expert-sql", version="1.1.0")

        error = hocket("yank", "sql", "--yes", "--json").document["error"]
        assert error["reason"] == "BAD_REQUEST"
        assert "acme/expert-sql@1.0.0, acme/expert-sql@1.1.0" in error["message"]
        assert "hocket uninstall" in error["message"]
        assert registry.withdrawn == {}
        assert hocket("yank", "sql@1.1.0", "--yes").code == 0
        assert list(registry.withdrawn) == [HIGH]
        registry.packages[HIGH].state = TRUST_STATE_YANKED
        assert hocket("yank", "sql", "--yes").code == 0
        assert list(registry.withdrawn) == [HIGH, LOW]

    @pytest.mark.parametrize("verb", [("uninstall", "--yes"), ("yank", "--yes"), ("experts", "show")])
    @pytest.mark.parametrize("written", ["u", "expert-u", "expert-u@1.0.0"])
    def test_an_unsigned_expert_goes_by_its_digest(
        self, hocket: Any, registry: ScriptedRegistry, verb: tuple[str, ...], written: str
    ) -> None:
        registry.packages[SQL] = adapter_package(SQL, "expert-u")
        del registry.packages[SQL].releases[:]
        registry.packages[LOW] = expert_package(LOW, "low")

        error = hocket(*verb, written, "--json").document["error"]

        assert error["reason"] == "UNKNOWN_PACKAGE"
        assert f"`hocket yank {SQL}`" in error["message"]
        assert "is not signed" not in hocket(*verb, "expert-u@9").err
        registry.packages[JSON] = adapter_package(JSON, "expert-u", version="1.1.0")
        assert "is not signed" not in hocket("experts", "show", written).err


def test_requirements_mean_a_publisher_whose_release_counts(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[JSON] = adapter_package(JSON, "expert-json")
    registry.packages[SQL] = adapter_package(SQL, "expert-sql", "expert-json")
    show = ("experts", "show", SQL, "--json")
    registry.packages[SQL].releases.insert(0, Release(publisher="aaa", name="expert-sql", version="1.0.0"))

    assert hocket(*show).document["satisfied_by"] == {"expert-json": "acme/expert-json@1.0.0"}
    registry.packages[SQL].releases[0].state = TRUST_STATE_ACTIVE
    assert hocket(*show).document["satisfied_by"] == {"expert-json": None}


class TestResolving:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [(">=2", ">=2.0.0"), (">= 1.5, <2", ">= 1.5.0, <2.0.0"), (">=1.0.0,<2", ">=1.0.0,<2.0.0")],
    )
    def test_a_range_of_short_versions_is_told_how_to_be_written(
        self, hocket: Any, registry: ScriptedRegistry, written: str, meant: str
    ) -> None:
        registry.packages[JSON] = adapter_package(JSON, "expert-json", version="2.1.0")

        error = hocket("experts", "resolve", f"json@{written}", "--json").document["error"]

        assert error["reason"] == "BAD_REQUEST"
        assert f"did you mean {meant}?" in error["message"]
        assert "did you mean" not in hocket("experts", "resolve", "json@>=x").err
        assert hocket("experts", "resolve", "json@>=2.0.0").code == 0

    def test_what_is_looked_for_is_an_expert(self, hocket: Any) -> None:
        assert "this registry has no expert 'json'" in hocket("experts", "resolve", "json").err

    def test_a_composition_is_explained_in_order(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[JSON] = adapter_package(JSON, "expert-json", version="0.4.1")
        registry.packages[SQL] = adapter_package(SQL, "expert-sql", "expert-json@>=0.4.0")

        outcome = hocket("experts", "resolve", "sql@>=1.0.0,<2.0.0")

        assert outcome.out.index("acme/expert-json@0.4.1") < outcome.out.index("acme/expert-sql@1.0.0")
        assert "acme/expert-sql@1.0.0 requires acme/expert-json" in outcome.out.replace("  ", " ")
        assert "it was asked for" in outcome.out
        assert "warning: the bases" in outcome.err
        document = hocket("experts", "resolve", "acme/expert-sql", "--json").document
        assert [(expert["publisher"], expert["name"], expert["digest"]) for expert in document["experts"]] == [
            ("acme", "expert-json", JSON),
            ("acme", "expert-sql", SQL),
        ]
        assert all(expert["why"] for expert in document["experts"])
        assert len(document["warnings"]) == 1

    def test_why_experts_do_not_go_together_is_said(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[SQL] = adapter_package(SQL, "expert-sql", "expert-json@>=0.4.0")

        outcome = hocket("experts", "resolve", "sql", "--json")

        assert (outcome.code, outcome.document["error"]["reason"]) == (2, "REQUIREMENT_MISSING")

    def test_what_may_not_serve_and_what_is_no_adapter_is_not_composed(
        self, hocket: Any, registry: ScriptedRegistry
    ) -> None:
        registry.packages[SQL] = adapter_package(SQL, "expert-sql")
        registry.packages[SQL].state = TRUST_STATE_YANKED
        registry.packages[LOW] = expert_package(LOW, "low")
        for name in ("sql", "low"):
            outcome = hocket("experts", "resolve", name, "--json")
            assert outcome.document["error"]["reason"] == "UNKNOWN_PACKAGE"

    def test_an_unsigned_expert_is_named_so_where_nobody_has_signed_that_name(
        self, hocket: Any, registry: ScriptedRegistry
    ) -> None:
        registry.packages[SQL] = adapter_package(SQL, "expert-sql")
        del registry.packages[SQL].releases[:]
        registry.packages[SQL].unsigned_by_policy = True

        assert "expert-sql@1.0.0 (unsigned)" in hocket("experts", "resolve", "sql").out
        registry.packages[JSON] = adapter_package(JSON, "expert-sql")
        assert "acme/expert-sql@1.0.0" in hocket("experts", "resolve", "sql").out


class TestUninstalling:
    def test_a_bare_name_means_all_versions_of_its_only_publisher(
        self, hocket: Any, registry: ScriptedRegistry
    ) -> None:
        registry.packages[SQL] = adapter_package(SQL, "expert-sql")
        registry.packages[JSON] = adapter_package(JSON, "expert-sql", version="1.1.0")
        registry.packages[LOW] = expert_package(LOW, "low")

        outcome = hocket("uninstall", "sql", "--yes", "--explanation", "replaced")

        assert outcome.code == 0
        assert registry.withdrawn == {SQL: "replaced", JSON: "replaced"}
        assert f"acme/expert-sql@1.0.0 is withdrawn ({SQL})" in outcome.out
        assert f"acme/expert-sql@1.1.0, {JSON}" in outcome.err

    def test_one_version_of_several_names_at_once(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[SQL] = adapter_package(SQL, "expert-sql")
        registry.packages[JSON] = adapter_package(JSON, "expert-sql", version="1.1.0")
        registry.packages[LOW] = expert_package(LOW, "low")

        lines = hocket("uninstall", "acme/expert-sql@1.1.0", "low", "--yes", "--json").lines

        assert [line["digest"] for line in lines] == [JSON, LOW]
        assert list(registry.withdrawn) == [JSON, LOW]

    def test_what_would_go_is_shown_with_those_who_would_miss_it(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[JSON] = adapter_package(JSON, "expert-json", version="0.4.1")
        registry.packages[SQL] = adapter_package(SQL, "expert-sql", "expert-json@>=0.4.0")

        outcome = hocket("uninstall", "json")

        assert (outcome.code, registry.withdrawn) == (2, {})
        assert f"acme/expert-json@0.4.1, {JSON}" in outcome.err
        assert "acme/expert-sql@1.0.0 requires expert-json@>=0.4.0" in outcome.err
        assert "add --yes" in outcome.err
        registry.packages[LOW] = adapter_package(LOW, "expert-json", version="0.4.2")
        assert "requires" not in hocket("uninstall", "json@0.4.1").err

    def test_every_name_of_the_same_bytes_is_shown(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[LOW] = expert_package(LOW, "low")
        registry.packages[LOW].releases.add(publisher="zeta", name="flower", version="2")

        assert "acme/low@1.0.0, zeta/flower@2" in hocket("uninstall", "low").err

    def test_what_is_withdrawn_already_stays_so(self, hocket: Any, registry: ScriptedRegistry) -> None:
        registry.packages[LOW] = expert_package(LOW, "low")
        registry.packages[LOW].state = TRUST_STATE_YANKED

        assert hocket("uninstall", "low").out == "low: withdrawn already\n"
        assert hocket("uninstall", "low", "--json").out == ""
        assert registry.withdrawn == {}

    @pytest.mark.parametrize(
        ("written", "reason", "words"),
        [
            ("expert-hihg@1", "UNKNOWN_PACKAGE", "did you mean acme/expert-high?"),
            ("acme/expert-hig", "UNKNOWN_PACKAGE", "did you mean acme/expert-high?"),
            ("zeta/other", "UNKNOWN_PACKAGE", "no package 'zeta/other'"),
            ("low@9", "UNKNOWN_PACKAGE", "it has 1.0.0"),
            ("high", "BAD_REQUEST", "acme/expert-high or zeta/expert-high"),
            ("", "BAD_REQUEST", "is not a name"),
            ("low@", "BAD_REQUEST", "is not a name"),
            ("/low", "BAD_REQUEST", "is not a name"),
        ],
    )
    def test_a_name_that_means_nothing_or_too_much_is_refused(
        self, hocket: Any, registry: ScriptedRegistry, written: str, reason: str, words: str
    ) -> None:
        registry.packages[LOW] = expert_package(LOW, "low")
        registry.packages[HIGH] = expert_package(HIGH, "expert-high")
        if written == "high":
            registry.packages[HIGH].releases.add(publisher="zeta", name="expert-high", version="2")

        error = hocket("uninstall", "low", written, "--yes", "--json").document["error"]

        assert error["reason"] == reason
        assert words in error["message"]
        assert registry.withdrawn == {}

    def test_a_name_is_taken_as_written_before_expert_is_put_before_it(
        self, hocket: Any, registry: ScriptedRegistry
    ) -> None:
        registry.packages[LOW] = expert_package(LOW, "sql")
        registry.packages[SQL] = adapter_package(SQL, "expert-sql")

        hocket("uninstall", "sql", "--yes")

        assert list(registry.withdrawn) == [LOW]


@pytest.mark.usefixtures("router_address")
def test_an_expert_is_shown_with_the_workers_that_hold_it(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[LOW] = expert_package(LOW, "low", output_range={"lower": 0, "upper": 1})

    card = hocket("experts", "show", "acme/low@1.0.0").out
    for text in (LOW, "worker-a", "2 features", "0 to 1", "acme/low@1.0.0"):
        assert text in card
    shown = hocket("experts", "show", LOW, "--json").document
    assert shown["resident_workers"] == ["worker-a"]
    assert shown["model"]["layout"] == "LogisticRegression"


def test_without_a_router_an_expert_is_shown_all_the_same(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[LOW] = expert_package(LOW, "low")
    nowhere = ("--router", "127.0.0.1:1")

    assert "the router cannot tell" in hocket("experts", "show", LOW, *nowhere).out
    assert hocket("experts", "show", LOW, *nowhere, "--json").document["resident_workers"] is None
    assert hocket("experts", "show", HIGH, *nowhere, "--json").document["error"]["reason"] == "UNKNOWN_PACKAGE"


def test_yank_withdraws_by_digest_or_name(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[HIGH] = expert_package(HIGH, "high")

    assert hocket("yank", LOW, "--yes", "--json").document["state"] == "TRUST_STATE_YANKED"
    assert hocket("yank", LOW, "--yes").out == f"{LOW} is withdrawn\n", "it has no name"
    assert (
        f"acme/high@1.0.0 is withdrawn ({HIGH})"
        in hocket("yank", "acme/high@1.0.0", "--yes", "--explanation", "wrong").out
    )
    assert registry.withdrawn == {LOW: "", HIGH: "wrong"}
    assert hocket("yank", "acme/none@1.0.0", "--json").document["error"]["reason"] == "UNKNOWN_PACKAGE"


def test_revoke_key_names_what_it_withdrew(hocket: Any, registry: ScriptedRegistry) -> None:
    out = hocket("revoke-key", "ab" * 32, "--yes", "--explanation", "stolen").out
    assert f"{LOW} has no other proof" in out
    assert f"hocket trust remove {'ab' * 32}" in out
    assert hocket("revoke-key", "ab" * 32, "--yes", "--json").document["withdrawn_digests"] == [LOW]
    assert list(registry.withdrawn) == ["ab" * 32]


def test_revoke_key_takes_what_is_printed_of_a_key_id(hocket: Any, registry: ScriptedRegistry, key: Path) -> None:
    registry.packages[LOW] = expert_package(LOW, "low")
    registry.packages[HIGH] = expert_package(HIGH, "high")
    registry.packages[HIGH].embedded_signature.key_id = "cd" * 32
    for written in ("ab" * 6, "cd" * 10, key):
        assert hocket("revoke-key", written, "--yes").code == 0
    assert list(registry.withdrawn) == ["ab" * 32, "cd" * 32, ACME_ID]

    outcome = hocket("revoke-key", "ef" * 6, "--yes", "--json")
    assert outcome.document["error"]["reason"] == "SIGNER_NOT_TRUSTED"
    registry.packages[HIGH].embedded_signature.key_id = "ab" * 31 + "ff"
    outcome = hocket("revoke-key", "ab" * 6, "--yes", "--json")
    assert "several key ids begin with" in outcome.document["error"]["message"]


@pytest.mark.parametrize("arguments", [("yank", LOW), ("revoke-key", "ab" * 32)])
def test_a_script_says_yes_before_anything_final(
    hocket: Any, registry: ScriptedRegistry, arguments: tuple[str, ...]
) -> None:
    for options in ((), ("--json",)):
        outcome = hocket(*arguments, *options)
        assert outcome.code == 2
        assert "add --yes" in outcome.err + outcome.out
    assert registry.withdrawn == {}


def test_a_name_that_is_nearly_right_gets_a_suggestion(hocket: Any, registry: ScriptedRegistry) -> None:
    registry.packages[HIGH] = expert_package(HIGH, "high")
    for verb in (("experts", "show"), ("yank", "--yes")):
        assert "did you mean acme/high?" in hocket(*verb, "acme/hihg@1.0.0").err
    assert "did you mean" not in hocket("experts", "show", "zeta/other@3").err


def test_nothing_of_a_publisher_is_said_so(hocket: Any) -> None:
    assert "No packages released by nobody" in hocket("list", "--publisher", "nobody").out


def test_a_person_at_a_terminal_is_asked_before_anything_final(monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []
    answers = iter([True, False])

    def confirm(question: str, **_options: Any) -> bool:
        questions.append(question)
        return next(answers)

    monkeypatch.setattr("typer.confirm", confirm)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    publish._ask("Sure?", yes=True)
    assert questions == []

    publish._ask("Sure?", yes=False)
    assert questions == ["Sure?"]
    with pytest.raises(HocketError, match="nothing was changed"):
        publish._ask("Sure?", yes=False)


def test_a_mixture_is_resolved_signed_and_put(
    hocket: Any, packages: list[Path], draft: Path, key: Path, registry: ScriptedRegistry
) -> None:
    hocket("publish", *packages)
    arguments = ("mixtures", "put", draft, "--publisher", "acme", "--version", "1.0.0", "--key", key)
    outcome = hocket(*arguments, "--json")

    assert outcome.code == 0
    header, gate = registry.mixtures["digits"]
    record = parse_mixture(header.body)
    assert outcome.document["digest"] == record.digest
    assert [str(member) for member in record.members] == [digest_of(path.read_bytes()) for path in packages]
    assert gate == np.eye(2, dtype=np.float32).tobytes()
    release = read_release(header.release).release
    assert str(release.name) == "acme/digits@1.0.0"
    assert (release.subject.purpose, release.subject.digest) == (Purpose.MIXTURE, record.digest)
    assert f"digits is {record.digest}" in hocket(*arguments).out


def test_a_mixture_is_unsigned_only_when_asked_for(
    hocket: Any, packages: list[Path], draft: Path, registry: ScriptedRegistry
) -> None:
    hocket("publish", *packages)
    outcome = hocket("mixtures", "put", draft, "--json")
    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "BAD_REQUEST")

    assert hocket("mixtures", "put", draft, "--unsigned", "--etag", LOW).code == 0
    header, _ = registry.mixtures["digits"]
    assert (header.release, header.etag) == (b"", LOW)


def test_a_mixture_of_what_is_not_there_is_refused(hocket: Any, draft: Path) -> None:
    outcome = hocket("mixtures", "put", draft, "--unsigned", "--json")

    assert (outcome.code, outcome.document["error"]["reason"]) == (2, "UNKNOWN_PACKAGE")


def test_a_mixture_is_deleted_by_name(hocket: Any, packages: list[Path], draft: Path) -> None:
    hocket("publish", *packages)
    hocket("mixtures", "put", draft, "--unsigned")

    assert hocket("mixtures", "delete", "digits", "--json").document == {"name": "digits", "revision": 12}
    assert hocket("mixtures", "delete", "digits", "--json").document["error"]["reason"] == "UNKNOWN_MIXTURE"
    hocket("mixtures", "put", draft, "--unsigned")
    assert hocket("mixtures", "delete", "digits").out == "digits is deleted\n"


@pytest.mark.usefixtures("router_address")
def test_mixtures_are_listed_and_shown(hocket: Any) -> None:
    listed = hocket("mixtures", "list").out
    assert "digits" in listed
    assert "fruit" in listed
    names = [mixture["name"] for mixture in hocket("mixtures", "list", "--json").document["mixtures"]]
    assert names == ["digits", "fruit"]

    card = hocket("mixtures", "show", "digits").out
    for text in (
        "softmax, 2 of the members it weighs answer a row",
        "1.5",
        "acme/digits@1.0.0",
        "acme/low@1.0.0",
        "worker-a",
        "0 to 1",
    ):
        assert text in card
    shown = hocket("mixtures", "show", "digits", "--json").document
    assert [member["expert"] for member in shown["members"]] == [LOW, HIGH]
    json.dumps(shown)
    assert hocket("mixtures", "show", "none", "--json").document["error"]["reason"] == "UNKNOWN_MODEL"
