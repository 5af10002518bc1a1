"""What holds for every manifest."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.errors import HocketError, Reason
from hocket.packages.expert.manifest import normalised_keyword, parse_manifest
from hocket.packages.expert.strict import problems
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.strict_json import loads
from tests.manifests import FILES, V1, V2, changed

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
words = st.text("abcxyz0123456789-_:.", min_size=1, max_size=12)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


REASONS = {
    Reason.BAD_MANIFEST,
    Reason.BAD_FILE_NAME,
    Reason.TOO_LARGE,
    *(reason for reason in Reason if reason.startswith("MANIFEST_")),
}


def paths(value: Any, path: str = "") -> list[str]:
    """The path of every value inside a document."""
    if isinstance(value, dict):
        members = [(f"{path}.{key}" if path else key, inner) for key, inner in value.items()]
    elif isinstance(value, list):
        members = [(f"{path}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        members = []
    return [found for inner_path, inner in members for found in (inner_path, *paths(inner, inner_path))]


adapters = st.fixed_dictionaries(
    {"type": st.sampled_from(["lora", "dora", "ia3"]), "target_modules": st.lists(words, max_size=3)},
    optional={
        "r": st.none() | st.integers(0, 2**32 - 1),
        "alpha": st.integers(0, 2**32 - 1),
        "use_dora": st.booleans(),
        "path": words.filter(lambda word: not word.startswith(".") and ":" not in word and not word.endswith(".")),
        "size_bytes": st.integers(0, 2**64 - 1),
        "sha256": st.just("") | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        "_comment": texts,
    },
)
bases = st.fixed_dictionaries(
    {"name": words, "adapters": st.lists(adapters, min_size=1, max_size=2)},
    optional={"prompt_template": words, "quantization": st.none() | words},
)
manifests = st.fixed_dictionaries(
    {
        "name": words,
        "version": words,
        "schema_version": st.just("2.0"),
        "description": texts,
        "base_models": st.lists(bases, min_size=1, max_size=2),
        "capabilities": st.lists(words, max_size=3),
    },
    optional={
        "tags": st.lists(words, max_size=3),
        "author": st.none() | texts,
        "constraints": st.fixed_dictionaries(
            {"load_order": st.integers(0, 2**32 - 1), "requires": st.lists(words), "incompatible_with": st.just([])}
        ),
        "routing": st.fixed_dictionaries(
            {"keywords": st.lists(texts, max_size=5)}, optional={"priority": st.floats(-1, 2), "router_hint": texts}
        ),
        "limitations": values,
        "_comment": values,
    },
)


@given(values)
@settings(max_examples=100, deadline=None)
def test_any_json_document_is_read_or_refused(document: Any) -> None:
    try:
        manifest = parse_manifest(json.dumps(document).encode())
    except HocketError:
        return
    assert manifest.document == document


@given(st.sampled_from([V1, V2]), st.data(), values, st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_whole_manifest_with_any_value_in_any_place_is_read_or_refused(
    whole: dict[str, Any],
    data: st.DataObject,
    value: Any,
    upstream: bool,  # noqa: FBT001 - a parameter
) -> None:
    document = changed(whole, data.draw(st.sampled_from(paths(whole))), value)

    refusal = None
    try:
        manifest = parse_manifest(json.dumps(document).encode(), upstream=upstream)
    except HocketError as error:
        refusal = error
    if refusal is not None:
        assert refusal.reason in REASONS
        assert refusal.field
        return
    assert json.dumps(manifest.document) == json.dumps(document)
    problems(manifest, FILES)


@given(st.binary(max_size=64))
@settings(deadline=None)
def test_any_bytes_are_one_document_or_refused(data: bytes) -> None:
    try:
        value = loads(data, what="x", bytes_max=64, depth_max=8)
    except HocketError:
        return
    assert json.loads(data) == value


@given(values)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_back(value: Any) -> None:
    for ascii_only in (True, False):
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert loads(data, what="x", bytes_max=2**20, depth_max=64) == value


@given(manifests)
@settings(max_examples=100, deadline=None)
def test_a_valid_manifest_is_read_as_it_was_meant(document: dict[str, Any]) -> None:
    data = json.dumps(document).encode()
    manifest = parse_manifest(data)

    assert json.dumps(manifest.document) == json.dumps(document)
    assert (manifest.name, manifest.version, manifest.description) == tuple(
        document[key] for key in ("name", "version", "description")
    )
    assert list(manifest.capabilities) == document["capabilities"]
    assert list(manifest.tags) == document.get("tags", [])
    assert [base.base.name for base in manifest.bases] == [base["name"] for base in document["base_models"]]
    for base, stated in zip(manifest.bases, document["base_models"], strict=True):
        for adapter, said in zip(base.adapters, stated["adapters"], strict=True):
            assert (adapter.type, list(adapter.target_modules)) == (said["type"], said["target_modules"])
            assert (adapter.r, adapter.alpha) == (said.get("r"), said.get("alpha"))
            assert adapter.path == said.get("path")
            assert adapter.size_bytes == (said.get("size_bytes") or None)
            assert adapter.sha256 == (said.get("sha256") or None)
    constraints = document.get("constraints", {"load_order": 10, "requires": []})
    assert manifest.constraints.load_order == constraints["load_order"]
    assert list(manifest.constraints.requires) == constraints["requires"]
    assert (manifest.routing is None) == ("routing" not in document)
    assert parse_manifest(json.dumps(manifest.document).encode()) == manifest


@given(manifests, words, values)
@settings(max_examples=50, deadline=None)
def test_unknown_keys_survive_and_change_nothing(document: dict[str, Any], key: str, value: Any) -> None:
    key = f"x-{key}"
    wider = {key: value, **document, "base_models": [{**base, key: value} for base in document["base_models"]]}

    one, other = (parse_manifest(json.dumps(each).encode()) for each in (document, wider))
    assert (one.bases, one.constraints, one.routing, one.warnings) == (
        other.bases,
        other.constraints,
        other.routing,
        other.warnings,
    )
    assert next(iter(other.document)) == key
    assert other.document["base_models"][0][key] == value


@given(st.lists(texts, max_size=8), st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=100, deadline=None)
def test_routing_is_always_normal(keywords: list[str], priority: float) -> None:
    document = changed(V2, "routing", {"keywords": keywords, "exclude_keywords": keywords, "priority": priority})
    routing = parse_manifest(json.dumps(document).encode()).routing

    assert routing is not None
    assert routing.priority is not None
    assert 0 <= routing.priority <= 1
    assert len(set(routing.keywords)) == len(routing.keywords) <= DEFAULT_LIMITS.keywords
    assert routing.keywords == routing.exclude_keywords
    assert all(0 < len(keyword) <= DEFAULT_LIMITS.tag_chars for keyword in routing.keywords)


@given(st.text())
@settings(deadline=None)
def test_normalising_a_keyword_twice_is_the_same_as_once(text: str) -> None:
    once = normalised_keyword(text)

    assert normalised_keyword(once) == once
