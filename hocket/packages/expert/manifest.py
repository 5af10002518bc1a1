"""The manifest of an `.expert` package, schema 1.0 or 2.0.

Two ways to read one. By default nothing is refused that still makes sense: what upstream's own tools would miss is
filled in, with a warning, because published documents lack it. With `upstream=True` whatever upstream's parser
refuses is refused here. Both refuse, each with a reason of its own, the contradictions that upstream names.

Only values that mean something to a server become fields; everything else, unknown keys and comments included, stays
in `Manifest.document` in its own order. `null` is the same as absent everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hocket.bases import BaseModel
from hocket.errors import HocketError, Reason
from hocket.identity import is_digest
from hocket.packages import strict_json
from hocket.packages.adapter import Decoding, Routing
from hocket.packages.expert.archive import safe_name
from hocket.packages.expert.shapes import LOAD_ORDER_DEFAULT, check_shapes
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.requirements import Constraints

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_WARNINGS_MAX: Final = 64
_SHA256: Final = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")


_RANKLESS: Final = ("ia3", "soft_prompt", "prompt_tuning")
"""Kinds without a rank. Upstream has a name for the first alone."""


@dataclass(frozen=True, slots=True)
class ManifestAdapter:
    """What a manifest says about the adapter of one base. `adapter_config.json` decides where they differ.

    Attributes:
        type: As written: `lora`, `dora`, `ia3`, ...
        target_modules: Names of the adapted projections.
        feedforward_modules: Of those, which IA3 scales at their input.
        r: Rank; None when not stated.
        alpha: Numerator of the scale; None when not stated.
        scaling: As written: `standard`, `dora`, `rsqrt`, ...
        use_dora: Whether a `lora` is a DoRA.
        path: Of the weights inside the package; None leaves it to convention.
        size_bytes: Of the weights; None when not stated.
        sha256: Hex SHA-256 of the weights; None when not stated.
    """

    type: str
    target_modules: tuple[str, ...]
    feedforward_modules: tuple[str, ...] = ()
    r: int | None = None
    alpha: int | None = None
    scaling: str | None = None
    use_dora: bool = False
    path: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ManifestBase:
    """A base model, and the adapters made for it; at least one."""

    base: BaseModel
    adapters: tuple[ManifestAdapter, ...]


@dataclass(frozen=True, slots=True)
class ManifestSoftPrompt:
    """A soft prompt.

    Attributes:
        name: Of the prompt.
        path: Of its file inside the package; upstream's packager leaves only the last part of it true.
        tokens: Its rows; None when not stated.
    """

    name: str
    path: str
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was read.

    Attributes:
        document: The whole of it, unknown keys kept, in its own order.
        name: Not empty, printable; whether it suits a release is checked elsewhere.
        version: The same.
        schema_version: `1.0` or `2.0`.
        description: For people; may be empty.
        bases: At least one; exactly one in schema 1.0.
        soft_prompts: In order.
        capabilities: Tags such as `task:text2sql`, as written.
        constraints: How the expert goes together with others.
        decoding: How it wants to be sampled.
        author: As written.
        homepage: As written.
        repository_url: As written.
        tags: As written.
        routing: Normalised and capped; None for an expert that is never chosen by itself.
        grammar_file: Name of the grammar inside the package; None leaves it to convention.
        license: As written.
        integrity: What upstream's signer left, as written.
        warnings: What a person should know.
    """

    document: Mapping[str, Any]
    name: str
    version: str
    schema_version: str
    description: str
    bases: tuple[ManifestBase, ...]
    soft_prompts: tuple[ManifestSoftPrompt, ...]
    capabilities: tuple[str, ...]
    constraints: Constraints
    decoding: Decoding
    author: str | None = None
    homepage: str | None = None
    repository_url: str | None = None
    tags: tuple[str, ...] = ()
    routing: Routing | None = None
    grammar_file: str | None = None
    license: str | None = None
    integrity: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def parse_manifest(data: bytes, *, upstream: bool = False, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Read `manifest.json`.

    Args:
        data: The file.
        upstream: Whether to refuse everything that upstream's parser refuses, instead of filling it in.
        limits: Bounds; `manifest_bytes`, `metadata_depth`, and those on texts and lists.

    Raises:
        HocketError: `BAD_JSON` if it is not one unambiguous JSON document; `TOO_LARGE` beyond a bound; `BAD_MANIFEST`
            for a wrong type, a due key that is absent or text that no person could read; `BAD_FILE_NAME` for a path
            that could lead outside the package; a `MANIFEST_*` reason for each contradiction. `field` is the path
            of the offending value.
    """
    document = strict_json.loads(
        data, what="manifest.json", bytes_max=limits.manifest_bytes, depth_max=limits.metadata_depth
    )
    if not isinstance(document, dict):
        raise HocketError(Reason.BAD_MANIFEST, "manifest.json must hold an object, beginning with {")
    return _Reader(document, upstream, limits).manifest()


class _Reader:
    """One pass over one document, gathering warnings."""

    def __init__(self, document: dict[str, Any], upstream: bool, limits: Limits) -> None:  # noqa: FBT001 - private
        self._document = document
        self._limits = limits
        self._warnings = check_shapes(document, upstream=upstream, limits=limits)

    def manifest(self) -> Manifest:
        schema_version = self._schema_version()
        name = self._identity("name", Reason.MANIFEST_NAME)
        version = self._identity("version", Reason.MANIFEST_VERSION)
        bases = self._bases_2() if schema_version == "2.0" else self._bases_1()
        self._check_training()
        training = _object(self._document, "training")
        return Manifest(
            document=self._document,
            name=name,
            version=version,
            schema_version=schema_version,
            description=self._document["description"],
            bases=bases,
            soft_prompts=tuple(self._soft_prompts()),
            capabilities=_texts(self._document, "capabilities"),
            constraints=self._constraints(),
            decoding=self._decoding(_object(training, "decoding")),
            author=_text(self._document, "author"),
            homepage=_text(self._document, "homepage"),
            repository_url=_text(_object(self._document, "repository"), "url"),
            tags=_texts(self._document, "tags"),
            routing=self._routing(),
            grammar_file=self._file(_object(training, "decoding"), "grammar_file", "training.decoding"),
            license=_text(self._document, "license"),
            integrity=self._document.get("integrity"),
            warnings=self._capped_warnings(),
        )

    def _capped_warnings(self) -> tuple[str, ...]:
        more = len(self._warnings) - _WARNINGS_MAX
        return (*self._warnings[:_WARNINGS_MAX], *([f"... and {more} more warnings"] if more > 0 else []))

    # Contradictions.

    def _identity(self, key: str, reason: Reason) -> str:
        text: str = self._document.get(key) or ""
        if not text:
            raise HocketError(reason, f"{key} is missing or empty; every manifest needs one", field=key)
        if not text.isprintable():
            raise _bad(key, "has characters that cannot be printed; use visible ones")
        return text

    def _schema_version(self) -> str:
        stated = self._document.get("schema_version", "1.0")
        if stated == "2.0":
            return "2.0"
        if stated not in {"1.0", None}:
            self._warnings.append(f"schema_version {stated[:32]!r} is not known, and read as 1.0")
        return "1.0"

    def _check_training(self) -> None:
        config = _object(_object(self._document, "training"), "config")
        path = "training.config"
        for key, reason in (("epochs", Reason.MANIFEST_EPOCHS), ("learning_rate", Reason.MANIFEST_LEARNING_RATE)):
            if (value := config.get(key)) is not None and value <= 0:
                raise HocketError(reason, f"{path}.{key} is {value}; it must be above 0", field=f"{path}.{key}")
        rank = config.get("rank")
        if rank == 0:
            raise HocketError(Reason.MANIFEST_RANK, f"{path}.rank must be above 0", field=f"{path}.rank")
        kind = config.get("adapter_type")
        if rank is None and kind is not None and kind not in _RANKLESS:
            message = f"{path}.rank is missing; only an ia3 or a soft prompt has none, and this is {kind[:32]!r}"
            raise HocketError(Reason.MANIFEST_NO_RANK, message, field=f"{path}.rank")
        if config.get("target_modules") == []:
            message = f"{path}.target_modules is empty; name the modules that were trained"
            raise HocketError(Reason.MANIFEST_TARGET_MODULES, message, field=f"{path}.target_modules")

    # Bases and adapters.

    def _bases_1(self) -> tuple[ManifestBase, ...]:
        self._check_one_form()
        base = self._document.get("base_model")
        if base is None:
            hint = "; base_models belongs to schema_version 2.0" if "base_models" in self._document else ""
            message = f"base_model is missing: say which model the adapter was trained for{hint}"
            raise HocketError(Reason.MANIFEST_NO_BASE, message, field="base_model")
        if base.get("name") is None:
            raise HocketError(Reason.MANIFEST_BASE_NAME, "base_model.name is missing", field="base_model.name")
        adapters = self._document.get("adapters")
        if not adapters:
            message = "adapters is missing or empty: an expert has at least one"
            raise HocketError(Reason.MANIFEST_NO_ADAPTERS, message, field="adapters")
        return (ManifestBase(self._base(base, "base_model"), tuple(self._adapters(adapters, "adapters"))),)

    def _bases_2(self) -> tuple[ManifestBase, ...]:
        self._check_one_form()
        bases = self._document.get("base_models")
        if not bases:
            message = "base_models is missing or empty: say which models the adapters were trained for"
            raise HocketError(Reason.MANIFEST_NO_BASES, message, field="base_models")
        return tuple(self._base_2(base, f"base_models[{index}]") for index, base in enumerate(bases))

    def _base_2(self, base: Mapping[str, Any], path: str) -> ManifestBase:
        if not base.get("name"):
            message = f"{path}.name is missing or empty"
            raise HocketError(Reason.MANIFEST_BASE_NAME, message, field=f"{path}.name")
        adapters = base.get("adapters")
        if not adapters:
            message = f"{path}.adapters is missing or empty: name the adapters made for this model"
            raise HocketError(Reason.MANIFEST_NO_BASE_ADAPTERS, message, field=f"{path}.adapters")
        return ManifestBase(self._base(base, path), tuple(self._adapters(adapters, f"{path}.adapters")))

    def _check_one_form(self) -> None:
        if self._document.get("base_model") is not None and self._document.get("base_models") is not None:
            message = "base_model and base_models are both there; keep the one that schema_version asks for"
            raise HocketError(Reason.MANIFEST_TWO_BASES, message, field="base_models")

    def _base(self, base: Mapping[str, Any], path: str) -> BaseModel:
        digest = _text(base, "hocket_base")
        if digest is not None and not is_digest(digest):
            raise _bad(
                f"{path}.hocket_base", "must be sha256:<64 hex digits>, as `hocket expert new --base FOLDER` writes it"
            )
        return BaseModel(
            name=base["name"],
            digest=digest,
            weights_sha256=self._sha256(base, path),
            quantization=_text(base, "quantization"),
            prompt_template=_text(base, "prompt_template"),
        )

    def _adapters(self, adapters: Sequence[Mapping[str, Any]], path: str) -> Iterator[ManifestAdapter]:
        for index, adapter in enumerate(adapters):
            yield ManifestAdapter(
                type=adapter["type"],
                target_modules=_texts(adapter, "target_modules"),
                feedforward_modules=_texts(adapter, "feedforward_modules"),
                r=adapter.get("r"),
                alpha=adapter.get("alpha"),
                scaling=_text(adapter, "scaling"),
                use_dora=adapter.get("use_dora") or False,
                path=self._file(adapter, "path", f"{path}[{index}]"),
                size_bytes=adapter.get("size_bytes") or None,
                sha256=self._sha256(adapter, f"{path}[{index}]"),
            )

    def _soft_prompts(self) -> Iterator[ManifestSoftPrompt]:
        for index, prompt in enumerate(_list(self._document, "soft_prompts")):
            path = self._file(prompt, "path", f"soft_prompts[{index}]")
            if path is None:
                raise _bad(f"soft_prompts[{index}].path", "is empty; name the file of the prompt")
            yield ManifestSoftPrompt(prompt["name"], path, _first(prompt, "tokens", "length"))

    def _file(self, owner: Mapping[str, Any], key: str, path: str) -> str | None:
        text = _text(owner, key)
        try:
            return None if text is None else safe_name(text, self._limits)
        except HocketError as error:
            raise HocketError(error.reason, f"{path}.{key}: {error.message}", field=f"{path}.{key}") from error

    def _sha256(self, owner: Mapping[str, Any], path: str) -> str | None:
        text = _text(owner, "sha256")
        if text is None:
            return None
        match = _SHA256.fullmatch(text)
        if match is None:
            self._warnings.append(f"{path}.sha256 is not 64 hex digits, and read as not stated")
            return None
        return match[1].lower()

    # Behaviour.

    def _routing(self) -> Routing | None:
        routing = self._document.get("routing")
        if routing is None:
            self._warnings.append("routing is missing: the expert is never chosen by itself")
            return None
        priority = stated = routing.get("priority")
        if stated is not None:
            priority = min(max(float(stated), 0.0), 1.0)
            if priority != stated:
                self._warnings.append(f"routing.priority {stated:g} is not between 0 and 1, and read as {priority:g}")
        return Routing(
            keywords=self._keywords(routing, "keywords"),
            exclude_keywords=self._keywords(routing, "exclude_keywords"),
            router_hint=_text(routing, "router_hint"),
            priority=priority,
        )

    def _keywords(self, routing: Mapping[str, Any], key: str) -> tuple[str, ...]:
        stated = _list(routing, key)
        kept: dict[str, None] = {}
        for position, keyword in enumerate(map(normalised_keyword, stated)):
            if len(kept) == self._limits.keywords:
                self._warnings.append(f"routing.{key} has {len(stated)} items; those after {position} are dropped")
                break
            if len(keyword) > self._limits.tag_chars:
                self._warnings.append(
                    f"routing.{key}[{position}] has more than {self._limits.tag_chars} characters, and is dropped"
                )
            elif keyword:
                kept[keyword] = None
        return tuple(kept)

    def _constraints(self) -> Constraints:
        stated = _object(self._document, "constraints")
        max_chain = stated.get("max_chain")
        if max_chain == 0:
            self._warnings.append("constraints.max_chain is 0, and read as not stated")
        return Constraints(
            load_order=_first(stated, "load_order", default=LOAD_ORDER_DEFAULT),
            max_chain=max_chain or None,
            requires=(*_texts(stated, "requires"), *self._dependencies()),
            incompatible_with=_texts(stated, "incompatible_with"),
        )

    def _dependencies(self) -> Iterator[str]:
        """The other form that documents give to `constraints.requires`."""
        for each in _list(self._document, "dependencies"):
            if not each.get("optional"):
                yield f"{each['name']}@{version}" if (version := _text(each, "version")) else each["name"]

    def _decoding(self, stated: Mapping[str, Any]) -> Decoding:
        return Decoding(
            temperature=self._within(stated, "temperature", 0.0, 2.0),
            top_p=self._within(stated, "top_p", 0.0, 1.0),
            top_k=self._count(stated, "top_k"),
            min_p=self._within(stated, "min_p", 0.0, 1.0),
            max_new_tokens=self._count(stated, "max_new_tokens"),
            stop_sequences=tuple(filter(None, _list(stated, "stop_sequences"))),
            use_grammar=stated.get("use_grammar") or False,
            grammar_type=_text(stated, "grammar_type"),
        )

    def _within(self, stated: Mapping[str, Any], key: str, least: float, most: float) -> float | None:
        value = stated.get(key)
        if value is None:
            return None
        if not least <= value <= most:
            self._warnings.append(
                f"training.decoding.{key} {value:g} is not between {least:g} and {most:g}, and read as not stated"
            )
            return None
        return float(value)

    def _count(self, stated: Mapping[str, Any], key: str) -> int | None:
        value: int | None = stated.get(key)
        if value == 0:
            self._warnings.append(f"training.decoding.{key} is 0, and read as not stated")
        return value or None


def normalised_keyword(text: str) -> str:
    """A keyword as routers compare it: lower case, NFC, no white space around it."""
    return unicodedata.normalize("NFC", text.lower()).strip()


def _object(owner: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value: Mapping[str, Any] = owner.get(key) or {}
    return value


def _list(owner: Mapping[str, Any], key: str) -> list[Any]:
    value: list[Any] = owner.get(key) or []
    return value


def _texts(owner: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_list(owner, key))


def _text(owner: Mapping[str, Any], key: str) -> str | None:
    """An optional text; empty means absent."""
    return owner.get(key) or None


def _first(owner: Mapping[str, Any], *keys: str, default: Any = None) -> Any:  # noqa: ANN401 - a JSON value
    return next((value for key in keys if (value := owner.get(key)) is not None), default)


def _bad(path: str, problem: str) -> HocketError:
    return HocketError(Reason.BAD_MANIFEST, f"{path} {problem}", field=path)
