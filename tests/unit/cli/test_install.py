"""`hocket install` and `hocket update`, with the real git and a registry that checks everything."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hocket import installing
from hocket.cli import install, progress
from hocket.client import blocking
from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, digest_of
from hocket.installing import Step
from hocket.rpc.handlers import Tokens
from hocket.trust_folder import TrustFolder
from tests.builders import apr_bytes
from tests.experts import expert_package
from tests.registries import running
from tests.repositories import bare, commit, repository
from tests.signing import ACME_SEED, STRANGER_SEED, ZETA_SEED, envelope_of, trusted

if TYPE_CHECKING:
    from collections.abc import Iterator

HTTPS = "https://git.example.org"


@pytest.fixture(autouse=True)
def trust(home: Path, monkeypatch: pytest.MonkeyPatch) -> TrustFolder:
    """The trust folder of a person who trusts acme and zeta, and has not configured git."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    folder = TrustFolder(home / ".local/share/hocket/trust")
    folder.add_key(trusted())
    folder.add_key(trusted(ZETA_SEED, "zeta"))
    return folder


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A registry that trusts the same two, which commands find by themselves. Parameters are its settings."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # loops that share grpc's queue (grpc/grpc#25364)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = running(tmp_path / "registry", over="socket", **getattr(request, "param", {}))
    address = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result().address
    monkeypatch.setenv("HOCKET_REGISTRY", address)
    yield
    asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return repository(tmp_path / "tree")


def there() -> set[str]:
    """The releases in the registry."""
    with blocking.connect_registry(os.environ["HOCKET_REGISTRY"]) as client:
        return {
            f"{release.publisher}/{release.name}@{release.version}"
            for package in client.list_packages()
            for release in package.releases
        }


def expert(
    name: str = "acme/expert-sql@1.0.0", requires: tuple[str, ...] = (), *, path: str = "", **options: Any
) -> dict[str, bytes]:
    """A released expert as two files of a repository; keys `seed` and `manifest`, and those of `expert_package`."""
    publisher, _, rest = name.partition("/")
    own, _, version = rest.partition("@")
    seed = options.pop("seed", {"acme": ACME_SEED, "zeta": ZETA_SEED}[publisher])
    constraints = {"max_chain": 10, "load_order": 5, "incompatible_with": [], "requires": list(requires)}
    manifest = {"constraints": constraints, **options.pop("manifest", {})}
    data = expert_package(own, version, manifest=manifest, **options)
    path = path or f"{own}.expert"
    return {path: data, f"{path}.release.json": envelope_of(data, seed, name, format="expert")}


def index_of(folder: Path, **experts: str) -> Path:
    """An index repository; names are written with `_` for `-`."""
    listed = [{"name": name.replace("_", "-"), "repository": address} for name, address in experts.items()]
    if not folder.exists():
        repository(folder)
    commit(folder, {"index.json": json.dumps({"version": "1.0", "experts": listed}).encode()})
    return folder


def mirrored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **folders: Path) -> None:
    """Have git find folders under addresses of another computer, as a person's own configuration may."""
    lines = [f'[url "{folder}"]\n\tinsteadOf = {HTTPS}/{name}\n' for name, folder in folders.items()]
    (tmp_path / "gitconfig").write_text("".join(lines))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))


def states(outcome: Any) -> list[tuple[str, str]]:
    assert outcome.code == 0, outcome.out + outcome.err
    return [(line["name"], line["state"]) for line in outcome.lines]


def refusal(outcome: Any) -> tuple[str, str]:
    assert outcome.code == 2, outcome.out
    error = outcome.lines[-1]["error"]
    return error["reason"], error["message"]


# From files and repositories


def test_a_file_is_installed_with_the_release_beside_it(hocket: Any, tmp_path: Path) -> None:
    for name, data in expert().items():
        (tmp_path / name).write_bytes(data)
    outcome = hocket("install", tmp_path / "expert-sql.expert")

    assert outcome.code == 0
    assert outcome.out.startswith("acme/expert-sql@1.0.0 published\n  why     it was asked for\n  from    ")
    assert states(hocket("install", tmp_path / "expert-sql.expert", "--json")) == [("acme/expert-sql@1.0.0", "present")]
    assert there() == {"acme/expert-sql@1.0.0"}


def test_the_newest_version_of_a_repository_is_installed(hocket: Any, tree: Path) -> None:
    commit(tree, expert("acme/expert-sql@1.0.0"), tag="v1.0.0")
    commit(tree, expert("acme/expert-sql@1.1.0"), tag="v1.1.0")
    before = set(Path.cwd().iterdir())

    for form in ("git+file://{}@>=1.0.0", "{}@*#main"):
        planned = hocket("install", form.format(tree), "--dry-run", "--json")
        assert states(planned) == [("acme/expert-sql@1.1.0", "planned")]
    [line] = hocket("install", tree, "--json").lines
    assert (line["name"], line["state"], line["why"]) == ("acme/expert-sql@1.1.0", "published", ["it was asked for"])
    assert line["source"] == f"{tree} at v1.1.0, expert-sql.expert"
    assert there() == {"acme/expert-sql@1.1.0"}
    assert set(Path.cwd().iterdir()) == before


def test_a_range_chooses_an_older_version_from_a_bare_repository(hocket: Any, tree: Path, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.2.0", "2.0.0"):
        commit(tree, expert(f"acme/expert-sql@{version}", path="out/x.expert"), tag=f"v{version}")
    source = bare(tmp_path / "bare.git", tree)

    assert states(hocket("install", f"{source}@<2.0.0", "--json")) == [("acme/expert-sql@1.2.0", "published")]
    assert refusal(hocket("install", f"{source}@>2.0.0", "--json"))[0] == "UNKNOWN_PACKAGE"


def test_an_apr_model_is_installed_as_well(hocket: Any, tree: Path) -> None:
    data = apr_bytes()
    commit(tree, {"iris.apr": data, "iris.apr.release.json": envelope_of(data, name="acme/iris@1.0.0")}, tag="v1.0.0")

    assert states(hocket("install", tree, "--dry-run", "--json")) == [("acme/iris@1.0.0", "planned")]
    assert states(hocket("install", tree, "--json")) == [("acme/iris@1.0.0", "published")]
    assert states(hocket("install", tree, "--json")) == [("acme/iris@1.0.0", "present")]


def test_of_several_experts_those_named_are_installed(hocket: Any, tree: Path) -> None:
    commit(tree, {**expert("acme/expert-sql@1.0.0"), **expert("acme/expert-json@2.0.0"), **expert("zeta/x@1.0.0")})

    reason, message = refusal(hocket("install", tree, "--json"))
    assert reason == "BAD_REQUEST"
    assert "acme/expert-json, acme/expert-sql, zeta/x: choose one with --name" in message
    hocket("install", tree, "--name", "expert-sql", "--name", "zeta/x")
    assert there() == {"acme/expert-sql@1.0.0", "zeta/x@1.0.0"}
    assert refusal(hocket("install", "sql.expert", "--name", "x", "--json"))[0] == "BAD_REQUEST"


def test_a_file_that_is_not_there_is_named_once(hocket: Any) -> None:
    assert refusal(hocket("install", "nothing.expert", "--json"))[1].count("nothing.expert") == 1
    two = refusal(hocket("install", "nothing.expert", "none.expert", "--json"))[1]
    assert two == "cannot read nothing.expert: No such file or directory (nothing was published)"


def test_what_is_told_fits_a_narrow_terminal(hocket: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    commit(tree, {**expert("acme/expert-tools@1.0.0", ("expert-json",)), **expert("acme/expert-json@1.0.0")})
    outcome = hocket("install", "expert-tools.expert", "expert-json.expert", "--dry-run")

    assert "why     acme/expert-tools@1.0.0 requires acme/expert-json" in outcome.out
    assert max(map(len, outcome.out.splitlines())) < 80


def test_what_was_asked_for_is_published_and_no_other_build_of_it(hocket: Any, tmp_path: Path) -> None:
    """A bare version stands for every build of it; here the file is meant."""
    for build, rank in (("+b", 2), ("", 4), ("+c", 3)):
        name = f"acme/expert-x@1.0.0{build}"
        for path, data in expert(name, path=f"x{build}.expert", rank=rank).items():
            (tmp_path / path).write_bytes(data)
        outcome = hocket("install", tmp_path / f"x{build}.expert", "--json")
        assert states(outcome) == [(name, "published")]
        assert outcome.lines[0]["digest"] == digest_of((tmp_path / f"x{build}.expert").read_bytes())
    assert there() == {"acme/expert-x@1.0.0+b", "acme/expert-x@1.0.0", "acme/expert-x@1.0.0+c"}


@pytest.mark.parametrize("registry", [{"allow_unsigned": True}], indirect=True)
def test_files_of_one_name_that_nobody_has_signed_are_different_files(hocket: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{rank}.expert" for rank in (1, 2, 3, 4)]
    for rank, path in enumerate(paths, start=1):
        path.write_bytes(expert_package("expert-x", "1.0.0", rank=rank))
    digests = {digest_of(path.read_bytes()) for path in paths}
    assert len(digests) == 4

    outcome = hocket("install", *paths[:3], "--allow-unsigned", "--json")
    assert states(outcome) == [("expert-x@1.0.0", "published_unsigned")] * 3
    outcome = hocket("install", paths[3], "--allow-unsigned", "--json")
    assert states(outcome) == [("expert-x@1.0.0", "published_unsigned")]
    assert outcome.document["digest"] == digest_of(paths[3].read_bytes())
    assert len(hocket("list", "--json").document["packages"]) == 4
    for options in ((), ("--no-deps",)):
        outcome = hocket("install", *paths, "--allow-unsigned", "--dry-run", "--json", *options)
        assert {line["digest"] for line in outcome.lines} == digests


def test_of_a_repository_whose_tags_number_another_expert_the_older_one_is_installed(
    hocket: Any, tree: Path, tmp_path: Path
) -> None:
    commit(tree, {**expert("acme/expert-ma@5.0.0"), **expert("acme/expert-mb@0.3.0")}, tag="v5.0.0")
    index = index_of(tmp_path / "index", expert_mb=str(tree))
    wanted = [("acme/expert-mb@0.3.0", "planned")]

    assert states(hocket("install", f"{tree}@<1.0.0", "--name", "expert-mb", "--dry-run", "--json")) == wanted
    assert states(hocket("install", f"{tree}@0.3.0", "--dry-run", "--json")) == wanted
    assert states(hocket("install", "expert-mb@0.3.0", "--index", index, "--dry-run", "--json")) == wanted


def test_passwords_are_not_printed(hocket: Any, tmp_path: Path) -> None:
    (tmp_path / "gitconfig").write_text("")
    for address in ("HTTPS://user:s3cret@127.0.0.1:1/x", "ssh://user:s3cret@-/x", "Https://user:s3/cret@[::1]:1/x"):
        for arguments in ((address,), (address, tmp_path / "x.expert"), ("sql", "--index", address)):
            outcome = hocket("install", *arguments, "--json", "--timeout", 5)
            assert outcome.code == 2
            assert "cret" not in outcome.out + outcome.err


def test_nothing_is_published_in_a_dry_run(hocket: Any, tree: Path) -> None:
    commit(tree, expert())
    outcome = hocket("install", tree, "--dry-run")

    assert "acme/expert-sql@1.0.0 would be published\n" in outcome.out
    assert "Nothing was published" in outcome.out
    assert there() == set()


# Trust


def test_what_nobody_has_signed_is_refused_with_advice(hocket: Any, tree: Path) -> None:
    files = expert()
    commit(tree, {"expert-sql.expert": files["expert-sql.expert"]})

    reason, message = refusal(hocket("install", tree, "--json"))
    assert reason == "UNSIGNED"
    assert "--allow-unsigned" in message
    reason, message = refusal(hocket("install", tree, "--allow-unsigned", "--json"))
    assert reason == "UNSIGNED"
    assert "the registry refuses it" in message
    assert there() == set()


@pytest.mark.parametrize("registry", [{"allow_unsigned": True}], indirect=True)
def test_what_nobody_has_signed_is_installed_where_both_sides_allow_it(hocket: Any, tree: Path, tmp_path: Path) -> None:
    commit(tree, {"expert-sql.expert": expert()["expert-sql.expert"]})
    (tmp_path / "plain.apr").write_bytes(apr_bytes())

    allowed = ("install", tree, tmp_path / "plain.apr", "--allow-unsigned")
    assert refusal(hocket(*allowed[:-1], "--json"))[0] == "UNSIGNED"
    outcome = hocket(*allowed)
    assert "expert-sql@1.0.0 published (UNSIGNED: only the registry's policy admits it)" in outcome.out
    assert "sha256:" in outcome.out
    assert hocket("update", "--json").lines == []


def test_what_a_stranger_has_signed_or_somebody_has_altered_is_refused(hocket: Any, tree: Path) -> None:
    commit(tree, expert(seed=STRANGER_SEED))
    assert refusal(hocket("install", tree, "--json"))[0] == "SIGNER_NOT_TRUSTED"

    files = expert()
    commit(tree, {**files, "expert-sql.expert": expert("acme/expert-sql@1.0.1")["expert-sql.expert"]})
    assert refusal(hocket("install", tree, "--json"))[0] == "DIGEST_MISMATCH"

    commit(tree, files)
    assert states(hocket("install", tree, "--json")) == [("acme/expert-sql@1.0.0", "published")]


def test_a_release_under_another_name_than_the_manifests_is_refused(hocket: Any, tree: Path) -> None:
    files = expert()
    wrong = envelope_of(files["expert-sql.expert"], name="acme/expert-json@1.0.0", format="expert")
    commit(tree, {**files, "expert-sql.expert.release.json": wrong})

    assert refusal(hocket("install", tree, "--json"))[0] == "NAME_MISMATCH"


def test_what_could_never_answer_is_refused_beforehand(hocket: Any, tree: Path) -> None:
    prompt = [{"name": "style", "path": "style.pt", "tokens": 3}]
    commit(tree, expert(manifest={"soft_prompts": prompt}, files={"style.pt": b"a pickle"}))

    reason, message = refusal(hocket("install", tree, "--dry-run", "--json"))
    assert (reason, "it cannot answer" in message) == ("NOT_SERVABLE", True)


def test_a_version_that_the_registry_has_with_other_bytes_is_refused_beforehand(hocket: Any, tree: Path) -> None:
    commit(tree, expert())
    hocket("install", tree)
    commit(tree, expert(rank=4))

    reason, message = refusal(hocket("install", tree, "--dry-run", "--json"))
    assert reason == "VERSION_TAKEN"
    assert "release a new version" in message


def test_what_the_registry_has_withdrawn_is_refused_beforehand(hocket: Any, tree: Path) -> None:
    commit(tree, expert())
    hocket("install", tree)
    hocket("yank", "acme/expert-sql@1.0.0", "--yes")

    assert refusal(hocket("install", tree, "--dry-run", "--json"))[0] == "YANKED"


# What experts require


def test_what_an_expert_requires_comes_from_the_same_commit_first(hocket: Any, tree: Path) -> None:
    commit(
        tree,
        {
            **expert("acme/expert-tools@1.0.0", ("expert-json@>=1.0.0,<2.0.0",)),
            **expert("acme/expert-json@1.4.0", ("zeta/expert-text",)),
            **expert("acme/expert-json@2.0.0", path="new/expert-json.expert"),
            **expert("zeta/expert-text@0.1.0"),
        },
    )
    outcome = hocket("install", tree, "--name", "expert-tools", "--json")

    assert states(outcome) == [
        ("zeta/expert-text@0.1.0", "published"),
        ("acme/expert-json@1.4.0", "published"),
        ("acme/expert-tools@1.0.0", "published"),
    ]
    assert outcome.lines[1]["why"] == ["acme/expert-tools@1.0.0 requires acme/expert-json@>=1.0.0,<2.0.0"]


def test_what_is_required_and_there_already_is_not_looked_for(hocket: Any, tree: Path) -> None:
    commit(tree, expert("acme/expert-json@1.0.0"))
    hocket("install", tree)
    commit(tree, {**expert("acme/expert-tools@1.0.0", ("expert-json",)), **expert("acme/expert-json@1.5.0")})

    assert states(hocket("install", tree, "--name", "expert-tools", "--json")) == [
        ("acme/expert-json@1.0.0", "present"),
        ("acme/expert-tools@1.0.0", "published"),
    ]


def test_what_is_required_may_be_installed_together_or_come_from_the_index(
    hocket: Any, tmp_path: Path, tree: Path
) -> None:
    tools = repository(tmp_path / "tools")
    commit(tools, expert("acme/expert-tools@1.0.0", ("expert-json@<2.0.0",)), tag="v1.0.0")
    for version in ("1.0.0", "2.0.0"):
        commit(tree, expert(f"acme/expert-json@{version}"), tag=f"v{version}")
    wanted = [("acme/expert-json@1.0.0", "planned"), ("acme/expert-tools@1.0.0", "planned")]

    assert states(hocket("install", tools, f"{tree}@1.0.0", "--dry-run", "--json")) == wanted
    index = index_of(tmp_path / "index", expert_json=str(tree))
    assert states(hocket("install", tools, "--index", index, "--dry-run", "--json")) == wanted
    assert states(hocket("install", tools, "--index", f"file://{index}#main", "--dry-run", "--json")) == wanted
    index_of(index, expert_json=str(tmp_path))
    assert refusal(hocket("install", tools, "--index", index, "--json"))[0] == "UNREACHABLE"
    index_of(index, expert_text=str(tree))
    assert refusal(hocket("install", tools, "--index", index, "--json"))[0] == "REQUIREMENT_MISSING"
    assert there() == set()


def test_a_required_version_that_was_withdrawn_or_whose_name_is_taken_is_passed_over(
    hocket: Any, tree: Path, tmp_path: Path
) -> None:
    for version in ("1.1.0", "1.2.0"):
        commit(tree, expert(f"acme/expert-json@{version}"), tag=f"v{version}")
        hocket("install", tree)
    hocket("yank", "acme/expert-json@1.1.0", "--yes")
    hocket("yank", "acme/expert-json@1.2.0", "--yes")
    taken = expert("acme/expert-json@1.2.0", rank=4)
    commit(tree, {**taken, **expert("acme/expert-json@1.1.0", path="old/1.1.0.expert")}, tag="v1.3.0")
    tools = repository(tmp_path / "tools")
    needs = expert("acme/expert-tools@1.0.0", ("expert-json",))
    commit(tools, needs, tag="v1.0.0")
    command = ("install", tools, "--index", index_of(tmp_path / "index", expert_json=str(tree)), "--dry-run", "--json")

    reason, message = refusal(hocket(*command))
    assert reason == "VERSION_TAKEN"
    assert "without it" in message
    assert "acme/expert-tools@1.0.0 requires acme/expert-json" in message
    commit(tree, expert("acme/expert-json@1.0.0", path="old/1.0.0.expert"), tag="v1.4.0")
    wanted = [("acme/expert-json@1.0.0", "planned"), ("acme/expert-tools@1.0.0", "planned")]
    assert states(hocket(*command)) == wanted
    commit(tree, needs)
    assert states(hocket("install", f"{tree}#main", "--name", "expert-tools", "--dry-run", "--json")) == wanted


def test_a_required_version_that_does_not_go_together_gives_way_to_an_older_one(
    hocket: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = {"max_chain": 10, "load_order": 5, "incompatible_with": ["expert-tools"], "requires": []}
    commit(
        tree,
        {
            **expert("acme/expert-tools@1.0.0", ("expert-json",)),
            **expert("acme/expert-json@1.0.0", path="1.0.0.expert"),
            **expert("acme/expert-json@1.1.0", path="1.1.0.expert"),
            **expert("acme/expert-json@2.0.0", path="2.0.0.expert", manifest={"constraints": apart}),
            **expert("acme/expert-json@0.9.0", path="0.9.0.expert", seed=STRANGER_SEED),
        },
    )
    command = ("install", tree, "--name", "expert-tools", "--json")

    assert states(hocket(*command, "--dry-run")) == [
        ("acme/expert-json@1.1.0", "planned"),
        ("acme/expert-tools@1.0.0", "planned"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(installing, "FETCHED_MAX", 1)  # then older ones are not looked into
        assert refusal(hocket(*command))[0] == "EXPERTS_INCOMPATIBLE"
    for version in ("1.0.0", "1.1.0"):
        (tree / f"{version}.expert").unlink()
    commit(tree)
    assert refusal(hocket(*command))[0] == "EXPERTS_INCOMPATIBLE"
    assert there() == set()


def test_another_publishers_expert_of_the_name_is_not_what_is_required(hocket: Any, tree: Path) -> None:
    commit(tree, {**expert("acme/expert-tools@1.0.0", ("expert-json",)), **expert("zeta/expert-json@9.0.0")})

    reason, message = refusal(hocket("install", tree, "--name", "expert-tools", "--json"))
    assert reason == "REQUIREMENT_MISSING"
    assert "acme/expert-json" in message
    assert there() == set()


def test_requirements_that_do_not_come_out_leave_everything_as_it_was(hocket: Any, tree: Path) -> None:
    needs: dict[str, tuple[str, ...]] = {
        **{name: (after,) for name, after in zip("abcdefghijk", "bcdefghijkl", strict=True)},
        "l": (),
        "circle": ("square",),
        "square": ("circle",),
        "new": ("l@>=2.0.0",),
        "odd": ("l @@",),
    }
    commit(tree, {path: data for name in needs for path, data in expert(f"acme/{name}@1.0.0", needs[name]).items()})

    for name, reason in {
        "a": "TOO_MANY_EXPERTS",
        "circle": "REQUIREMENT_CYCLE",
        "new": "REQUIREMENT_MISSING",
        "odd": "BAD_REQUEST",
    }.items():
        assert refusal(hocket("install", tree, "--name", name, "--json"))[0] == reason
    assert there() == set()


def test_requirements_that_lead_to_ever_more_packages_are_not_followed_for_ever(
    hocket: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "FETCHED_MAX", 2)
    chain = {"acme/a@1.0.0": ("b",), "acme/b@1.0.0": ("c",), "acme/c@1.0.0": ("d",), "acme/d@1.0.0": ()}
    commit(tree, {path: data for name, needs in chain.items() for path, data in expert(name, needs).items()})

    assert "lead to more than 2 packages" in refusal(hocket("install", tree, "--name", "a", "--json"))[1]
    assert len(hocket("install", tree, "--name", "b", "--dry-run", "--json").lines) == 3


def test_a_requirement_that_is_not_signed_well_leaves_everything_as_it_was(hocket: Any, tree: Path) -> None:
    commit(
        tree,
        {**expert("acme/expert-tools@1.0.0", ("expert-json",)), **expert("acme/expert-json@1.0.0", seed=STRANGER_SEED)},
    )

    assert refusal(hocket("install", tree, "--name", "expert-tools", "--json"))[0] == "SIGNER_NOT_TRUSTED"
    assert there() == set()


def test_requirements_may_be_left_to_somebody_else(hocket: Any, tree: Path) -> None:
    commit(tree, {**expert("acme/expert-tools@1.0.0", ("expert-json",)), **expert("acme/expert-json@1.0.0")})
    alone = ("install", tree, "--name", "expert-tools", "--no-deps", "--json")

    assert states(hocket(*alone, "--dry-run")) == [("acme/expert-tools@1.0.0", "planned")]
    reason, message = refusal(hocket(*alone))
    assert reason == "REQUIREMENT_MISSING"
    assert "the registry refuses it" in message
    hocket("install", tree, "--name", "expert-json")
    assert states(hocket(*alone)) == [("acme/expert-tools@1.0.0", "published")]


def test_of_several_sources_it_is_said_which_one_is_to_blame(hocket: Any, tree: Path, tmp_path: Path) -> None:
    commit(tree, expert())
    outcome = hocket("install", tree, tmp_path / "missing.expert", "--json")

    assert "nothing was published" in refusal(outcome)[1]
    assert outcome.document["error"]["file"] == str(tmp_path / "missing.expert")
    assert there() == set()


@pytest.mark.parametrize(
    "registry", [{"tokens": Tokens("a" * 32, "b" * 32, frozenset({"Publish"}), frozenset())}], indirect=True
)
def test_without_the_token_no_file_is_to_blame(hocket: Any, tree: Path, tmp_path: Path) -> None:
    commit(tree, expert())
    outcome = hocket("install", tree, "--json")
    assert refusal(outcome) == (
        "TOKEN_REQUIRED",
        "the registry wants its admin's token for this: give --token-file FILE",
    )
    assert "file" not in outcome.document["error"]

    (tmp_path / "token").write_text("b" * 32)
    (tmp_path / "token").chmod(0o600)
    assert refusal(hocket("install", tree, "--token-file", tmp_path / "token", "--json"))[0] == "TOKEN_NOT_ALLOWED"
    (tmp_path / "token").write_text("a" * 32)
    assert states(hocket("install", tree, "--token-file", tmp_path / "token", "--json"))[0][1] == "published"


def test_a_refusal_by_the_registry_says_what_was_published_before(hocket: Any, tree: Path, trust: TrustFolder) -> None:
    trust.add_key(trusted(STRANGER_SEED, "stranger"))
    data = expert_package("expert-x", "1.0.0")
    strange = envelope_of(data, STRANGER_SEED, "stranger/expert-x@1.0.0", format="expert")
    commit(tree, {**expert(), "x.expert": data, "x.expert.release.json": strange})

    outcome = hocket("install", tree, "--name", "expert-sql", "--name", "expert-x", "--json")
    assert outcome.lines[0]["state"] == "published"
    reason, message = refusal(outcome)
    assert reason == "SIGNER_NOT_TRUSTED"
    assert "already published: acme/expert-sql@1.0.0" in message


# Indexes


def test_a_name_is_looked_up_in_the_index(
    hocket: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tree, expert("acme/expert-sql@0.3.0"), tag="v0.3.0")
    index = index_of(tmp_path / "index", expert_sql=f"git+{HTTPS}/sql", expert_json=f"{HTTPS}/json")
    mirrored(monkeypatch, tmp_path, sql=tree, index=index)
    monkeypatch.setenv("HOCKET_INDEX", f"{HTTPS}/index")

    assert states(hocket("install", "sql@>=0.3.0", "--json")) == [("acme/expert-sql@0.3.0", "published")]
    reason, message = refusal(hocket("install", "neo4j", "--json"))
    assert (reason, "lists no neo4j" in message) == ("UNKNOWN_PACKAGE", True)
    reason, message = refusal(hocket("install", index, "--json"))
    assert (reason, "choose one of expert-sql, expert-json" in message) == ("BAD_REQUEST", True)
    assert "give --index URL" in refusal(hocket("install", "sql", "--index", "", "--json"))[1]
    assert refusal(hocket("install", "sql", "--index", "experts", "--json"))[0] == "BAD_REQUEST"


def test_an_expert_of_another_name_at_that_address_is_not_what_was_meant(
    hocket: Any, tree: Path, tmp_path: Path
) -> None:
    commit(tree, expert("acme/expert-json@1.0.0"))
    index = index_of(tmp_path / "index", expert_sql=str(tree))

    assert refusal(hocket("install", "expert-sql", "--index", index, "--json"))[0] == "UNKNOWN_PACKAGE"
    index_of(index, expert_json=str(tree))
    assert states(hocket("install", "expert-json", "--index", index, "--json"))[0][1] == "published"


def test_whose_expert_is_meant_can_be_said(hocket: Any, tree: Path, tmp_path: Path) -> None:
    commit(tree, {**expert("acme/expert-sql@1.0.0"), **expert("zeta/expert-sql@2.0.0", path="zeta.expert")})
    install = ("install", "--index", index_of(tmp_path / "index", expert_sql=str(tree)), "--dry-run", "--json")

    assert "acme/expert-sql, zeta/expert-sql: choose one with --name" in refusal(hocket(*install, "sql"))[1]
    acme = [("acme/expert-sql@1.0.0", "planned")]
    assert states(hocket(*install, "acme/sql")) == states(hocket(*install, "acme/expert-sql@<2.0.0")) == acme
    assert states(hocket(*install, "sql", "--name", "acme/expert-sql")) == acme
    assert states(hocket(*install, "zeta/sql", "--name", "expert-sql")) == [("zeta/expert-sql@2.0.0", "planned")]
    assert refusal(hocket(*install, "nobody/sql"))[0] == "UNKNOWN_PACKAGE"
    for name in ("zeta/expert-sql", "expert-json"):
        assert f"--name {name} does not go with acme/sql" in refusal(hocket(*install, "acme/sql", "--name", name))[1]


def test_a_name_that_the_registry_knows_as_somebody_elses_has_to_be_chosen(
    hocket: Any, tree: Path, tmp_path: Path
) -> None:
    """Both publishers are trusted; an index must not lead from one to the other."""
    commit(tree, expert("acme/expert-sql@1.0.0"))
    hocket("install", tree)
    commit(tree, expert("zeta/expert-sql@2.0.0"))
    install = ("install", "--index", index_of(tmp_path / "index", expert_sql=str(tree)), "--json")

    reason, message = refusal(hocket(*install, "sql"))
    assert reason == "BAD_REQUEST"
    assert f"the registry has acme/expert-sql, and {tree} at HEAD, expert-sql.expert is zeta/expert-sql" in message
    assert "--name zeta/expert-sql, or --name acme/expert-sql for the other" in message
    assert refusal(hocket(*install, "sql", "--name", "acme/expert-sql"))[0] == "UNKNOWN_PACKAGE"
    assert there() == {"acme/expert-sql@1.0.0"}
    assert states(hocket(*install, "sql", "--name", "zeta/expert-sql"))[0] == ("zeta/expert-sql@2.0.0", "published")
    assert states(hocket(*install, "sql"))[0] == ("zeta/expert-sql@2.0.0", "present")


def test_what_nobody_has_signed_does_not_take_a_publishers_name(hocket: Any, tree: Path, tmp_path: Path) -> None:
    commit(tree, expert("acme/expert-sql@1.0.0"))
    hocket("install", tree)
    commit(tree, expert("zeta/expert-sql@2.0.0", seed=STRANGER_SEED))
    index = index_of(tmp_path / "index", expert_sql=str(tree))

    message = refusal(hocket("install", "sql", "--index", index, "--allow-unsigned", "--json"))[1]
    assert "is one of expert-sql that nobody has signed: choose with --name acme/expert-sql" in message


def test_an_index_cannot_have_git_run_or_read_something_else(
    hocket: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tree, expert())
    monkeypatch.chdir(tmp_path)
    bad = {
        "a": "--upload-pack=touch pwned",
        "b": "ext::touch pwned",
        "c": "../tree",
    }
    index = index_of(tmp_path / "index", **bad, expert_sql=f"file://{tree}")

    for name in bad:
        reason, message = refusal(hocket("install", name, "--index", index, "--json"))
        assert reason == "BAD_REQUEST"
        assert f"lists {name} at an address that cannot be used" in message
    assert states(hocket("install", "sql", "--index", index, "--json")) == [("acme/expert-sql@1.0.0", "published")]
    assert not list(tmp_path.rglob("pwned"))


def test_a_source_cannot_have_git_run_something_else(
    hocket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("--upload-pack=touch pwned", "git+ext::touch pwned"):
        assert hocket("install", "--", source).code == 2
        assert hocket("install", "expert-sql", f"--index={source}").code == 2
    assert not list(tmp_path.rglob("pwned"))


# Updates


def home_at(url: str) -> dict[str, Any]:
    return {"manifest": {"repository": {"type": "git", "url": url}}}


def test_experts_are_updated_from_the_repositories_that_their_manifests_name(
    hocket: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(monkeypatch, tmp_path, sql=tree)
    where = home_at(f"{HTTPS}/sql")
    commit(tree, expert("acme/expert-sql@1.0.0", **where), tag="v1.0.0")
    hocket("install", tree)
    assert "is the newest" in hocket("update").out

    commit(tree, expert("acme/expert-sql@1.1.0", **where), tag="v1.1.0")
    [planned] = hocket("update", "--dry-run", "--json").lines
    assert (planned["before"], planned["after"], planned["state"]) == ("1.0.0", "1.1.0", "planned")
    assert there() == {"acme/expert-sql@1.0.0"}
    outcome = hocket("update", "sql")
    assert "updated" in outcome.out
    assert "Older versions stay" in outcome.out
    assert there() == {"acme/expert-sql@1.0.0", "acme/expert-sql@1.1.0"}


def test_experts_are_updated_from_the_index_with_what_they_then_require(
    hocket: Any, tree: Path, tmp_path: Path
) -> None:
    commit(tree, expert("acme/expert-sql@1.0.0"), tag="v1.0.0")
    hocket("install", tree)
    commit(
        tree,
        {**expert("acme/expert-sql@1.1.0", ("expert-json",)), **expert("acme/expert-json@0.1.0")},
        tag="v1.1.0",
    )
    index = index_of(tmp_path / "index", expert_sql=str(tree))

    [line] = hocket("update", "--index", index, "--json").lines
    assert line["state"] == "updated"
    assert [package["name"] for package in line["packages"]] == ["acme/expert-json@0.1.0", "acme/expert-sql@1.1.0"]
    assert len(there()) == 3


def test_a_newer_version_that_was_withdrawn_is_not_installed_again(hocket: Any, tree: Path, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        commit(tree, expert(f"acme/expert-sql@{version}"))
        hocket("install", tree)
    hocket("yank", "acme/expert-sql@1.1.0", "--yes")
    index = index_of(tmp_path / "index", expert_sql=str(tree))

    outcome = hocket("update", "--index", index, "--json")
    assert (outcome.code, outcome.document["state"]) == (0, "withdrawn")
    assert refusal(hocket("update", "--index", tree, "--json"))[0] == "UNKNOWN_PACKAGE"


def test_an_update_passes_over_a_version_that_was_withdrawn(hocket: Any, tree: Path, tmp_path: Path) -> None:
    for version in ("1.0.0", "1.2.0"):
        commit(tree, expert(f"acme/expert-sql@{version}"))
        hocket("install", tree)
    hocket("yank", "acme/expert-sql@1.2.0", "--yes")
    commit(tree, expert("acme/expert-sql@1.1.0", path="1.1.0.expert"))

    outcome = hocket("update", "--index", index_of(tmp_path / "index", expert_sql=str(tree)), "--json")
    assert (outcome.document["state"], outcome.document["after"]) == ("updated", "1.1.0")


def test_an_index_that_is_asked_for_beats_what_a_manifest_says(
    hocket: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address in a published file cannot be changed any more."""
    mirrored(monkeypatch, tmp_path, gone=tmp_path)
    commit(tree, {**expert("acme/a@1.0.0", **home_at(f"{HTTPS}/gone")), **expert("acme/b@1.0.0")})
    hocket("install", tree, "--name", "a", "--name", "b")
    commit(tree, {**expert("acme/a@1.1.0", **home_at(f"{HTTPS}/gone")), **expert("acme/b@1.1.0")})
    index = index_of(tmp_path / "index", a=str(tree), b=str(tree))
    monkeypatch.setenv("HOCKET_INDEX", str(index))

    def outcomes(*options: object) -> list[str]:
        return [line["state"] for line in hocket("update", "--dry-run", "--json", *options).lines]

    assert outcomes() == ["refused", "planned"]
    assert outcomes("--index", index) == ["planned", "planned"]
    index_of(index, b=str(tree))
    assert outcomes("--index", index) == ["refused", "planned"]


def test_experts_without_a_home_are_told_once_how_to_get_one(hocket: Any, tree: Path) -> None:
    commit(tree, {**expert("acme/a@1.0.0"), **expert("acme/b@1.0.0")})
    hocket("install", tree, "--name", "a", "--name", "b")

    said = hocket("update").out
    assert said.count("no home is known") == 2
    assert said.count("`repository.url` in its manifest, or what an index says") == 1
    assert "does not remember" in said


def test_one_repository_at_a_time_is_on_disk_and_no_package_stays_in_memory(
    hocket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: repository(tmp_path / name) for name in ("a", "b", "c")}
    for version in ("1.0.0", "1.1.0"):
        for name, folder in folders.items():
            commit(folder, expert(f"acme/{name}@{version}"))
            if version == "1.0.0":
                hocket("install", folder)
    index = index_of(tmp_path / "index", **{name: str(folder) for name, folder in folders.items()})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen: list[int] = []
    real = install._change

    def noted(*arguments: Any) -> Any:
        change = real(*arguments)
        seen.append(len(list(temporary.iterdir())))
        return change

    def told(changes: Any, **_options: Any) -> None:
        assert [change.state for change in changes] == ["planned"] * 3
        assert all(step.package is None for change in changes for step in change.steps)

    monkeypatch.setattr(install, "_change", noted)
    monkeypatch.setattr(install, "_print_changes", told)
    assert hocket("update", "--index", index, "--dry-run").code == 0
    assert seen == [1, 1, 1]


def test_another_publishers_newer_version_is_no_update(hocket: Any, tree: Path, tmp_path: Path) -> None:
    commit(tree, expert("acme/expert-sql@1.0.0"))
    hocket("install", tree)
    commit(tree, expert("zeta/expert-sql@2.0.0"))
    index = index_of(tmp_path / "index", expert_sql=str(tree))

    assert hocket("update", "--index", index, "--json").document["state"] == "newest"


def test_an_expert_that_cannot_be_updated_does_not_keep_others_from_it(
    hocket: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    homes = {
        "a": "--upload-pack=touch pwned",
        "b": "ext::touch pwned",
        "c": f"file://{tree}",
        "d": "ssh://-oProxyCommand=touch%20pwned/x",
        "e": "",
        "f": f"{HTTPS}/tree",
    }
    mirrored(monkeypatch, tmp_path, tree=tree)
    for version in ("1.0.0", "1.1.0"):
        files = [expert(f"acme/{name}@{version}", **home_at(url)) for name, url in homes.items()]
        files += [expert(f"acme/dated@2025-11-2{version[2]}", **home_at(f"{HTTPS}/tree"))]
        commit(tree, {path: data for each in files for path, data in each.items()})
        if version == "1.0.0":
            assert hocket("install", tree, *[f"--name={name}" for name in (*homes, "dated")]).code == 0

    outcome = hocket("update", "--json")
    assert outcome.code == 2
    assert {line["expert"]: line.get("error", {}).get("reason", line["state"]) for line in outcome.lines} == {
        **{f"acme/{name}": "BAD_REQUEST" for name in "abcd"},
        "acme/dated": "BAD_REQUEST",
        "acme/e": "no_repository",
        "acme/f": "updated",
    }
    assert "its manifest names a repository that cannot be used" in outcome.out
    assert not list(tmp_path.rglob("pwned"))
    assert "BAD_REQUEST: " in hocket("update").out


def test_an_update_that_the_registry_refuses_is_said_so(
    hocket: Any, tree: Path, tmp_path: Path, trust: TrustFolder
) -> None:
    commit(tree, expert())
    hocket("install", tree)
    other = b"\x09" * 32
    trust.add_key(trusted(other, "acme"))
    commit(tree, expert("acme/expert-sql@1.1.0", seed=other))
    index = index_of(tmp_path / "index", expert_sql=str(tree))

    [line] = hocket("update", "--index", index, "--json").lines
    assert (line["state"], line["error"]["reason"]) == ("refused", "SIGNER_NOT_TRUSTED")


def test_there_may_be_nothing_to_update(hocket: Any) -> None:
    assert "No adapter experts here" in hocket("update").out
    assert refusal(hocket("update", "sql", "--json"))[0] == "UNKNOWN_PACKAGE"


def test_a_registry_that_is_not_there_is_said_so(hocket: Any, tree: Path) -> None:
    commit(tree, expert())

    for verb in (("install", tree), ("update",)):
        assert refusal(hocket(*verb, "--registry", "127.0.0.1:1", "--json"))[0] == "UNREACHABLE"


class _Gone:
    """A client of a registry that has gone away."""

    def __getattr__(self, _name: str) -> Any:
        def call(*_arguments: Any, **_options: Any) -> Any:
            raise HocketError(Reason.UNREACHABLE, "gone", grpc_status="UNAVAILABLE")

        return call


def test_a_registry_that_goes_away_meanwhile_is_to_blame_and_not_the_package() -> None:
    gone: Any = _Gone()
    name = ReleaseName("acme", "expert-sql", "1.0.0")
    package: Any = SimpleNamespace(data=b"", release=b"", where="x")
    step = Step("x", "y", (), package)

    for act in (
        lambda: list(install._published(gone, [step], [], shown=False)),
        lambda: install._home(gone, name, "y", None, index_first=False),
        lambda: install._carried_out(gone, install._Change(name, "planned", (step,)), [], shown=False),
    ):
        with pytest.raises(HocketError, match="UNREACHABLE: gone"):
            act()


@pytest.mark.parametrize("verb", ["install", "update"])
def test_where_the_connection_breaks_it_is_said_what_was_published_before(
    verb: str, hocket: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tree, {**expert("acme/a@1.0.0"), **expert("acme/b@1.0.0")})
    both = ("install", tree, "--name", "a", "--name", "b")
    if verb == "update":
        hocket(*both)
        commit(tree, {**expert("acme/a@1.1.0"), **expert("acme/b@1.1.0")})
    index = index_of(tmp_path / "index", a=str(tree), b=str(tree))
    calls: list[Any] = []
    real = blocking.RegistryClient.publish

    def breaking(client: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise HocketError(Reason.UNREACHABLE, "reset by peer", grpc_status="UNAVAILABLE")
        return real(client, *arguments, **options)

    monkeypatch.setattr(blocking.RegistryClient, "publish", breaking)
    command = both if verb == "install" else ("update", "--index", index)
    reason, message = refusal(hocket(*command, "--json"))
    assert reason == "UNREACHABLE"
    version = "1.0.0" if verb == "install" else "1.1.0"
    assert message.endswith(
        f"the connection to the registry broke: reset by peer (already published: acme/a@{version})"
    )


def test_at_a_terminal_something_moves_while_git_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.spinner("x", shown=True):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.spinner("[x]\x1b", shown=True):
        pass
    assert "[x]\\x1b" in capsys.readouterr().err
