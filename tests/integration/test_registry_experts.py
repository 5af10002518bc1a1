"""Adapter experts in the registry, as its callers meet them: inside one process and over a socket."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.rpc.status import from_rpc_error
from hocket.v1 import package_pb2, registry_pb2
from hocket.v1.package_pb2 import TrustState
from hocket.v1.registry_pb2_grpc import RegistryServiceStub
from services.registry import composing
from tests.experts import archived, expert_files, expert_package, signed_upstream
from tests.registries import Running, fixed, labelled, numbers, running
from tests.signing import ACME_ID, ACME_SEED, STRANGER_SEED, ZETA_SEED, envelope_of, trusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

VERSION_1 = Path(__file__).parents[1] / "unit" / "registry" / "version_1.sql"


@pytest.fixture(params=["local", "socket"])
async def registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path, request.param, trust_poll_seconds=0.1) as registry:
        yield registry


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path, trust_poll_seconds=0.1) as registry:
        yield registry


def constraints(*requires: str, **changes: Any) -> dict[str, Any]:
    """A manifest's constraints, as `manifest=` takes them."""
    own = {"max_chain": 10, "load_order": 6, "incompatible_with": [], "requires": list(requires)}
    return {"constraints": {**own, **changes}}


def expert(name: str, version: str = "1.0.0", *requires: str, **options: Any) -> bytes:
    """A package of that name, which requires others."""
    manifest = {**constraints(*requires), **options.pop("manifest", {})}
    return expert_package(name, version, manifest=manifest, **options)


def signed(data: bytes, name: str, seed: bytes = ACME_SEED, **changes: Any) -> bytes:
    return envelope_of(data, seed, name, **{"format": "expert", **changes})


async def publish(registry: Running, data: bytes, name: str, seed: bytes = ACME_SEED) -> str:
    return str((await registry.client().publish(data, signed(data, name, seed))).package.digest)


async def refusal_of(call: Awaitable[Any]) -> HocketError:
    with pytest.raises(HocketError) as caught:
        await call
    return caught.value


async def listed(registry: Running, **filters: str) -> list[str]:
    return [package.releases[0].name async for package in registry.client().list_packages(**filters)]


async def until(registry: Running, digest: str, check: Callable[[package_pb2.Package], bool]) -> package_pb2.Package:
    async with asyncio.timeout(5):
        while not check(package := await registry.client().get_package(digest)):  # noqa: ASYNC110 - asked, not told
            await asyncio.sleep(0.02)
        return package


class TestPublishing:
    async def test_an_adapter_is_published_described_and_downloaded(self, registry: Running) -> None:
        data = expert("expert-sql", kind="dora")
        client = registry.client()

        response = await client.publish(data, signed(data, "acme/expert-sql@1.0.0"))

        assert response.created
        assert not response.package.adapter.HasField("metadata")
        package = await client.get_package("acme/expert-sql@1.0.0")
        assert (package.digest, package.format, package.WhichOneof("contents")) == (
            digest_of(data),
            "expert",
            "adapter",
        )
        assert package.state == TrustState.TRUST_STATE_ACTIVE
        adapter = package.adapter
        assert (adapter.name, adapter.version, adapter.kind) == (
            "expert-sql",
            "1.0.0",
            package_pb2.ADAPTER_KIND_DORA,
        )
        assert adapter.base.name == "Qwen/Qwen3-0.6B"
        assert list(adapter.routing.keywords) == ["sql", "query"]
        assert adapter.upstream_signature.outcome == package_pb2.UPSTREAM_OUTCOME_UNSIGNED
        assert MessageToDict(adapter.metadata)["training"]["config"]["method"] == "sft"
        header, downloaded = await client.download(package.digest)
        assert (downloaded, list(header.releases)) == (data, [signed(data, "acme/expert-sql@1.0.0")])
        assert not header.package.adapter.HasField("metadata")

    async def test_publishing_again_changes_nothing_even_when_what_it_requires_has_gone(self, local: Running) -> None:
        needs, tools = expert("expert-json"), expert("expert-tools", "1.0.0", "expert-json")
        needed = await publish(local, needs, "acme/expert-json@1.0.0")
        await publish(local, tools, "acme/expert-tools@1.0.0")
        await local.client().yank(needed)
        before = len(await local.seen())

        again = await local.client().publish(tools, signed(tools, "acme/expert-tools@1.0.0"))

        assert not again.created
        assert len(await local.seen()) == before

    @pytest.mark.parametrize(
        ("release", "reason"),
        [
            (b"", Reason.UNSIGNED),
            (signed(expert("expert-sql"), "acme/expert-sql@1.0.0", STRANGER_SEED), Reason.SIGNER_NOT_TRUSTED),
            (signed(expert("expert-sql"), "zeta/expert-sql@1.0.0"), Reason.NAME_NOT_ALLOWED),
            (signed(expert("expert-sql"), "acme/expert-sql@1.0.0", format="apr"), Reason.BAD_RELEASE),
            (signed(expert("expert-sql"), "acme/expert-mysql@1.0.0"), Reason.NAME_MISMATCH),
            (signed(expert("expert-sql"), "acme/expert-sql@1.0"), Reason.NAME_MISMATCH),
        ],
    )
    async def test_a_release_must_be_trusted_and_name_what_the_manifest_names(
        self, local: Running, release: bytes, reason: Reason
    ) -> None:
        data = expert("expert-sql")

        assert (await refusal_of(local.client().publish(data, release))).reason is reason
        assert await listed(local) == []
        assert await publish(local, data, "acme/expert-sql@1.0.0")

    async def test_what_upstream_s_tools_have_signed_still_needs_a_release(self, local: Running) -> None:
        data = archived(signed_upstream(expert_files()))

        assert (await refusal_of(local.client().publish(data))).reason is Reason.UNSIGNED
        response = await local.client().publish(data, signed(data, "acme/expert-sql@1.0.0"))
        signature = response.package.adapter.upstream_signature
        assert (signature.outcome, signature.publisher) == (package_pb2.UPSTREAM_OUTCOME_VALID, "expert-cli")

    async def test_an_adapter_that_cannot_serve_is_not_taken(self, local: Running) -> None:
        data = expert_package(
            manifest={"soft_prompts": [{"name": "style", "path": "style.pt", "tokens": 3}]},
            files={"style.pt": b"\x80\x04pickled"},
        )

        refused = await refusal_of(local.client().publish(data, signed(data, "acme/expert-sql@1.0.0")))

        assert refused.reason is Reason.NOT_SERVABLE

    async def test_proof_comes_before_content(self, local: Running) -> None:
        damaged = expert("expert-sql")[:-20]

        assert (await refusal_of(local.client().publish(damaged))).reason is Reason.UNSIGNED
        refused = await refusal_of(local.client().publish(damaged, signed(damaged, "acme/expert-sql@1.0.0")))
        assert refused.reason is Reason.BAD_ARCHIVE

    async def test_unsigned_adapters_are_admitted_by_policy_alone_and_route_nothing(self, tmp_path: Path) -> None:
        data = expert("expert-sql")
        async with running(tmp_path, allow_unsigned=True, trust_poll_seconds=0.1) as registry:
            for release in (b"", signed(data, "acme/expert-sql@1.0.0", STRANGER_SEED)):
                package = (await registry.client().publish(data, release)).package
                assert package.unsigned_by_policy
                assert not package.adapter.HasField("routing")
                assert list(package.releases) == []
            released = (await registry.client().publish(data, signed(data, "acme/expert-sql@1.0.0"))).package
            assert released.adapter.HasField("routing")
            told = [item.package for item in await registry.seen() if item.HasField("package")]
            assert told == [released]
            registry.trust.remove_key(ACME_ID)
            by_policy = await until(registry, released.digest, lambda package: package.unsigned_by_policy)
            assert not by_policy.adapter.HasField("routing")


class TestRequirements:
    async def test_what_an_expert_requires_must_be_here_in_a_version_that_will_do(self, local: Running) -> None:
        tools = expert("expert-tools", "1.0.0", "expert-json@>=0.4.0")

        missing = await refusal_of(publish(local, tools, "acme/expert-tools@1.0.0"))
        await publish(local, expert("expert-json", "0.3.9"), "acme/expert-json@0.3.9")
        too_old = await refusal_of(publish(local, tools, "acme/expert-tools@1.0.0"))
        await publish(local, expert("expert-json", "0.4.1"), "acme/expert-json@0.4.1")

        assert (missing.reason, too_old.reason) == (Reason.REQUIREMENT_MISSING, Reason.REQUIREMENT_MISSING)
        assert "expert-json" in missing.message
        assert "0.3.9" in too_old.message
        assert await publish(local, tools, "acme/expert-tools@1.0.0") == digest_of(tools)

    async def test_a_bare_name_means_the_publisher_s_own(self, local: Running) -> None:
        await publish(local, expert("expert-json"), "zeta/expert-json@1.0.0", ZETA_SEED)
        bare, full = expert("expert-a", "1.0.0", "expert-json"), expert("expert-b", "1.0.0", "zeta/expert-json")

        refused = await refusal_of(publish(local, bare, "acme/expert-a@1.0.0"))

        assert refused.reason is Reason.REQUIREMENT_MISSING
        assert await publish(local, full, "acme/expert-b@1.0.0")
        assert await publish(local, bare, "zeta/expert-a@1.0.0", ZETA_SEED)

    async def test_what_is_withdrawn_satisfies_nobody(self, local: Running) -> None:
        digest = await publish(local, expert("expert-json"), "acme/expert-json@1.0.0")
        await local.client().yank(digest)

        tools = publish(local, expert("expert-tools", "1.0.0", "expert-json"), "acme/expert-tools@1.0.0")

        assert (await refusal_of(tools)).reason is Reason.REQUIREMENT_MISSING

    async def test_a_circle_is_refused_and_named(self, local: Running) -> None:
        await publish(local, expert("expert-a"), "acme/expert-a@1.0.0")
        await publish(local, expert("expert-b", "1.0.0", "expert-a"), "acme/expert-b@1.0.0")
        await publish(local, expert("expert-c", "1.0.0", "expert-b"), "acme/expert-c@1.0.0")

        refused = await refusal_of(publish(local, expert("expert-a", "2.0.0", "expert-c"), "acme/expert-a@2.0.0"))

        assert refused.reason is Reason.REQUIREMENT_CYCLE
        assert all(name in refused.message for name in ("expert-a", "expert-b", "expert-c"))
        assert await listed(local, text="expert-a") == ["expert-a"]

    async def test_experts_that_do_not_go_together_cannot_be_required_together(self, local: Running) -> None:
        rival = expert("expert-b", manifest=constraints(incompatible_with=["expert-a"]))
        await publish(local, expert("expert-a"), "acme/expert-a@1.0.0")
        await publish(local, rival, "acme/expert-b@1.0.0")

        both = publish(local, expert("expert-c", "1.0.0", "expert-a", "expert-b"), "acme/expert-c@1.0.0")

        assert (await refusal_of(both)).reason is Reason.EXPERTS_INCOMPATIBLE

    async def test_what_is_required_rides_on_the_same_base(self, local: Running) -> None:
        await publish(local, expert("expert-json", base="meta/Llama-3.2-1B"), "acme/expert-json@1.0.0")

        tools = publish(local, expert("expert-tools", "1.0.0", "expert-json"), "acme/expert-tools@1.0.0")

        assert (await refusal_of(tools)).reason is Reason.BASE_MISMATCH

    async def test_more_than_ten_experts_do_not_go_together(self, local: Running) -> None:
        names = [f"expert-{letter}" for letter in "abcdefghij"]
        for name in names:
            await publish(local, expert(name), f"acme/{name}@1.0.0")

        eleven = publish(local, expert("expert-all", "1.0.0", *names), "acme/expert-all@1.0.0")
        ten = publish(local, expert("expert-most", "1.0.0", *names[1:]), "acme/expert-most@1.0.0")

        assert (await refusal_of(eleven)).reason is Reason.TOO_MANY_EXPERTS
        assert await ten

    async def test_requirements_that_lead_to_too_many_names_are_refused(
        self, local: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await publish(local, expert("expert-a"), "acme/expert-a@1.0.0")
        await publish(local, expert("expert-b", "1.0.0", "expert-a"), "acme/expert-b@1.0.0")
        further = expert("expert-c", "1.0.0", "expert-b")
        work = 3 * 32 + 2 * 3  # three are read, two of them listed and compared
        monkeypatch.setattr(composing, "WORK_MAX", work - 1)

        refused = await refusal_of(publish(local, further, "acme/expert-c@1.0.0"))

        assert refused.reason is Reason.RESOLUTION_TOO_HARD
        monkeypatch.setattr(composing, "WORK_MAX", work)
        assert await publish(local, further, "acme/expert-c@1.0.0")

    async def test_of_many_versions_the_newest_that_will_do_are_looked_at_and_old_ones_are_found(
        self, local: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every version after 1.0.0 requires what is not here, so that only looking far enough back finds it."""
        monkeypatch.setattr(composing, "VERSIONS_MAX", 2)
        parts = {version: expert("expert-x", version) for version in ("1.0.0", "2.0.0", "10.0.0")}
        for version, part in parts.items():
            await publish(local, part, f"acme/expert-x@{version}")
            needs = f"expert-x@{version}"
            await publish(local, expert("expert-json", version, needs), f"acme/expert-json@{version}")
        for version in ("2.0.0", "10.0.0"):
            await local.client().yank(digest_of(parts[version]))

        any_version = publish(local, expert("expert-a", "1.0.0", "expert-json"), "acme/expert-a@1.0.0")
        old = expert("expert-b", "1.0.0", "expert-json@<10.0.0")

        refused = await refusal_of(any_version)
        assert refused.reason is Reason.REQUIREMENT_MISSING
        assert "expert-x" in refused.message
        assert await publish(local, old, "acme/expert-b@1.0.0")
        assert await publish(local, expert("expert-c", "1.0.0", "expert-json@1.0.0"), "acme/expert-c@1.0.0")

    @pytest.mark.parametrize("pattern", ["expert-json@", "no spaces please", "expert-json@=>1", "/expert-json"])
    async def test_a_requirement_that_means_nothing_is_refused(self, local: Running, pattern: str) -> None:
        refused = await refusal_of(publish(local, expert("expert-a", "1.0.0", pattern), "acme/expert-a@1.0.0"))

        assert refused.reason is Reason.BAD_REQUEST

    async def test_a_second_publisher_s_release_is_judged_by_what_that_publisher_has(self, local: Running) -> None:
        await publish(local, expert("expert-json"), "acme/expert-json@1.0.0")
        tools = expert("expert-tools", "1.0.0", "expert-json")
        await publish(local, tools, "acme/expert-tools@1.0.0")

        refused = await refusal_of(publish(local, tools, "zeta/expert-tools@1.0.0", ZETA_SEED))

        assert refused.reason is Reason.REQUIREMENT_MISSING
        package = await local.client().get_package("acme/expert-tools@1.0.0")
        assert [release.publisher for release in package.releases] == ["acme"]

    async def test_unsigned_experts_are_a_publisher_of_their_own(self, tmp_path: Path) -> None:
        tools = expert("expert-tools", "1.0.0", "expert-json")
        async with running(tmp_path, allow_unsigned=True) as registry:
            await publish(registry, expert("expert-json"), "acme/expert-json@1.0.0")
            assert (await refusal_of(registry.client().publish(tools))).reason is Reason.REQUIREMENT_MISSING
            await registry.client().publish(expert("expert-json", "0.9.0"))
            assert (await registry.client().publish(tools)).created


class TestFinding:
    async def test_lists_are_narrowed_by_every_filter(self, registry: Running) -> None:
        sql = expert("expert-sql", manifest={"description": "Fragen werden zu SQL, gem\u00e4\u00df Norm"})
        llama = expert(
            "expert-cypher", base="meta/Llama-3.2-1B", manifest={"capabilities": ["task:text2cypher"], "tags": []}
        )
        await publish(registry, sql, "acme/expert-sql@1.0.0")
        await publish(registry, llama, "zeta/expert-cypher@1.0.0", ZETA_SEED)
        await registry.publish(labelled("Setosa", "Virginica"), "acme/iris@1.0.0")

        assert sorted(await listed(registry)) == ["expert-cypher", "expert-sql", "iris"]
        assert sorted(await listed(registry, publisher="acme")) == ["expert-sql", "iris"]
        assert await listed(registry, capability="Task:Text2SQL") == ["expert-sql"]
        assert await listed(registry, base=r"C:\models\llama-3.2-1b") == ["expert-cypher"]
        assert await listed(registry, text="GEM\u00c4SS fragen") == ["expert-sql"]
        assert await listed(registry, text="setosa") == ["iris"]
        assert await listed(registry, text="sql", publisher="zeta") == []
        assert await listed(registry, text="100%") == []

    async def test_a_page_token_belongs_to_its_filters(self, registry: Running) -> None:
        for index in range(3):
            await publish(registry, expert("expert-sql", f"1.0.{index}"), f"acme/expert-sql@1.0.{index}")
        stub = RegistryServiceStub(registry.channels.get(registry.address))
        wanted = {"publisher": "acme", "capability": "language:en", "base": "qwen3-0.6b", "text": "sql"}

        async def page(token: str = "", **filters: str) -> Any:
            request = registry_pb2.ListPackagesRequest(page_size=2, page_token=token, **filters)
            try:
                return await stub.ListPackages(request, timeout=5)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None

        first = await page(**wanted)
        second = await page(first.next_page_token, **wanted)
        assert [len(first.packages), len(second.packages)] == [2, 1]
        assert second.next_page_token == ""
        for changed in wanted:
            refused = await refusal_of(page(first.next_page_token, **{**wanted, changed: "other"}))
            assert (refused.reason, refused.field) == (Reason.BAD_REQUEST, "page_token")
        assert (await refusal_of(page(text="x" * 513))).field == "text"

    @pytest.mark.parametrize("last", ["\ud800", "", "sha256:1", 7, None])
    async def test_a_page_token_that_names_no_digest_is_refused(self, registry: Running, last: object) -> None:
        stub = RegistryServiceStub(registry.channels.get(registry.address))
        for index in range(2):
            await publish(registry, expert("expert-sql", f"1.0.{index}"), f"acme/expert-sql@1.0.{index}")
        first = await stub.ListPackages(registry_pb2.ListPackagesRequest(page_size=1), timeout=5)
        listed, _ = json.loads(base64.urlsafe_b64decode(first.next_page_token))
        forged = base64.urlsafe_b64encode(json.dumps([listed, last]).encode()).decode()

        with pytest.raises(grpc.RpcError) as caught:
            await stub.ListPackages(registry_pb2.ListPackagesRequest(page_token=forged), timeout=5)

        assert from_rpc_error(caught.value).reason is Reason.BAD_REQUEST


class TestWithdrawing:
    async def test_yanked_and_revoked_adapters_say_so_and_restarts_do_not_change_that(self, tmp_path: Path) -> None:
        async with running(tmp_path, "socket") as registry:
            yanked = await publish(registry, expert("expert-a"), "acme/expert-a@1.0.0")
            revoked = await publish(registry, expert("expert-b"), "acme/expert-b@1.0.0")
            kept = await publish(registry, expert("expert-c"), "zeta/expert-c@1.0.0", ZETA_SEED)
            assert (await registry.client().yank(yanked, "wrong")).adapter.name == "expert-a"
            assert list((await registry.client().revoke_key(ACME_ID)).withdrawn_digests) == [revoked]
        async with running(tmp_path, "socket") as registry:
            packages = {package.digest: package async for package in registry.client().list_packages()}
            assert {digest: package.state for digest, package in packages.items()} == {
                yanked: TrustState.TRUST_STATE_YANKED,
                revoked: TrustState.TRUST_STATE_KEY_REVOKED,
                kept: TrustState.TRUST_STATE_ACTIVE,
            }
            assert {digest for digest, package in packages.items() if package.adapter.HasField("routing")} == {kept}
            assert sorted(await listed(registry, text="expert")) == ["expert-a", "expert-b", "expert-c"]
            refused = await refusal_of(publish(registry, expert("expert-a"), "zeta/expert-a@1.0.0", ZETA_SEED))
            assert refused.reason is Reason.YANKED

    async def test_hints_go_with_the_last_trusted_release_and_come_back_with_one(self, local: Running) -> None:
        digest = await publish(local, expert("expert-a"), "acme/expert-a@1.0.0")
        local.trust.remove_key(ACME_ID)
        untrusted = await until(local, digest, lambda package: package.state == TrustState.TRUST_STATE_UNTRUSTED)
        assert not untrusted.adapter.HasField("routing")
        local.trust.add_key(trusted())
        active = await until(local, digest, lambda package: package.state == TrustState.TRUST_STATE_ACTIVE)
        assert active.adapter.HasField("routing")


async def test_a_mixture_of_adapters_is_refused_with_words(local: Running) -> None:
    adapter = expert("expert-a")
    await publish(local, adapter, "acme/expert-a@1.0.0")
    await local.publish(numbers(), "acme/n@1")

    for members in ((adapter,), (numbers(), adapter)):
        refused = await refusal_of(local.put(fixed("mixed", *members)))
        assert (refused.reason, "tensor experts" in refused.message) == (Reason.MEMBERS_NOT_ALIGNED, True)
    assert await local.put(fixed("mixed", numbers()))


def version_1(path: Path) -> None:
    """Move what is in a database into one of version 1, which knew no search."""
    new = path.rename(path.with_name("new.db"))
    database = sqlite3.connect(path)
    database.executescript(VERSION_1.read_text())
    database.execute("ATTACH ? AS new", [str(new)])
    for (table,) in database.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall():
        database.execute(f"INSERT INTO main.{table} SELECT * FROM new.{table}")  # noqa: S608 - ours
    database.commit()
    database.close()


async def test_a_database_from_before_adapters_is_searched_after_opening_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as registry:
        for index in range(70):
            await registry.publish(labelled(f"low{index}", "high", weight=index + 1.0), f"acme/n{index}@1")
        revision = (await registry.seen())[-1].revision
    version_1(tmp_path / "data" / "registry.db")
    assert "search_filling" not in capsys.readouterr().out

    async with running(tmp_path) as registry:
        said = capsys.readouterr().out
        assert [
            len(re.findall(rf"{event} +package_count=70", said)) for event in ("search_filling", "search_filled")
        ] == [
            1,
            1,
        ]
        assert len(await listed(registry, text="high")) == 70
        assert await listed(registry, text="LOW33") == ["n33"]
        assert (await registry.seen())[-1].revision == revision
        await publish(registry, expert("expert-a"), "acme/expert-a@1.0.0")
        assert await listed(registry, capability="language:en") == ["expert-a"]
