"""An `.expert` file turned into facts and an adapter. Everything is parsed here, so trust comes first.

`adapter_config.json` says what the tensors were trained with, and decides wherever the manifest says otherwise. What
is damaged or contradicts itself is refused. What is whole, but beyond this suite, is read as far as it can be, and
`AdapterFacts.not_servable` says what its author can do about it.

Nothing in a package is executed, and nothing is unpickled: `training_args.bin` is never looked at, soft prompts are
read as safetensors alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hocket.errors import HocketError, Reason
from hocket.packages.adapter import Adapter, AdapterConfig, AdapterFacts, AdapterKind, SoftPrompt
from hocket.packages.expert.archive import read_archive
from hocket.packages.expert.config import read_config, unsupported, unsupported_type
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.names import CONFIG, GRAMMAR, MANIFEST, PICKLED_WEIGHTS, SIGNATURE, WEIGHTS
from hocket.packages.expert.signature import verify_upstream
from hocket.packages.expert.tensors import PROMPT, Findings, as_peft_names, check_tensors, projections_of
from hocket.packages.expert.weights import read_tensors
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.model import Section

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from hocket.packages.adapter import RawTensor
    from hocket.packages.expert.archive import Archive
    from hocket.packages.expert.manifest import Manifest, ManifestAdapter, ManifestSoftPrompt

_SAFETENSORS: Final = ".safetensors"
_MATRIX: Final = 2
_KINDS: Final = {
    "lora": AdapterKind.LORA,
    "dora": AdapterKind.DORA,
    "ia3": AdapterKind.IA3,
    "soft_prompt": AdapterKind.SOFT_PROMPT,
    "prompt_tuning": AdapterKind.SOFT_PROMPT,
}
"""What manifests call the kinds."""


def decode(data: bytes | memoryview, digest: str, limits: Limits = DEFAULT_LIMITS) -> tuple[AdapterFacts, Adapter]:
    """Read a package.

    An adapter that is well formed but cannot be served is decoded all the same; `not_servable` then says why.

    Args:
        data: The whole file.
        digest: Of it, `sha256:<hex>`.
        limits: Bounds on everything read.

    Raises:
        HocketError: The refusals of `read_archive` and `parse_manifest`; `BAD_PACKAGE` if manifest or weights are
            missing; `BAD_CHECKSUM` for weights other than the manifest says; `BAD_JSON`, `BAD_WEIGHTS`,
            `UNSUPPORTED_TYPE` for a kind of adapter without a name here; `BAD_ADAPTER` for parts that do not belong
            together, soft prompts and grammar included; `TOO_LARGE`.
    """
    return decode_archive(read_archive(data, limits), digest, len(data), limits)


def decode_archive(
    archive: Archive, digest: str, size_bytes: int, limits: Limits = DEFAULT_LIMITS
) -> tuple[AdapterFacts, Adapter]:
    """Read a package whose archive has been read; otherwise as `decode`.

    Args:
        archive: What is inside.
        digest: Of the whole file, `sha256:<hex>`.
        size_bytes: Of the whole file.
        limits: Bounds on everything read.
    """
    files = archive.files
    if MANIFEST not in files:
        raise HocketError(
            Reason.BAD_PACKAGE, f"the archive has no {MANIFEST} at its root: pack the expert with `hocket expert pack`"
        )
    manifest = parse_manifest(files[MANIFEST], limits=limits)
    contents = _Contents(files, manifest, limits)
    weights = contents.weights()
    prompts = contents.soft_prompts(weights)
    grammar = contents.grammar()
    taken = {MANIFEST, CONFIG, SIGNATURE, weights.name, *prompts.names, *grammar.names}
    adapter = Adapter(
        config=weights.config,
        tensors={} if weights.config.kind is AdapterKind.SOFT_PROMPT else weights.tensors,
        soft_prompts=prompts.read,
        decoding=manifest.decoding,
        grammar=grammar.text,
        files={name: content for name, content in files.items() if name not in taken},
    )
    facts = AdapterFacts(
        digest=digest,
        size_bytes=size_bytes,
        format_version=manifest.schema_version,
        compression=archive.compression,
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        kind=weights.config.kind,
        base=manifest.bases[0].base,
        capabilities=manifest.capabilities,
        tags=manifest.tags,
        constraints=manifest.constraints,
        signature=verify_upstream(files, manifest.integrity),
        metadata=manifest.document,
        sections=tuple(_sections(files)),
        rank=weights.findings.rank,
        target_modules=weights.findings.projections,
        routing=manifest.routing,
        soft_prompt_tokens=prompts.tokens,
        has_grammar=adapter.grammar is not None,
        uses_grammar=adapter.grammar is not None and adapter.decoding.use_grammar,
        license=manifest.license,
        parameter_bytes=sum(map(_size_bytes, adapter.tensors.values()))
        + sum(_size_bytes(prompt.embeddings) for prompt in adapter.soft_prompts),
        warnings=(*manifest.warnings, *weights.warnings, *grammar.warnings),
        not_servable=_several(manifest) or weights.findings.not_servable or prompts.not_servable,
    )
    return facts, adapter


@dataclass(frozen=True, slots=True)
class _Weights:
    """The adapter's file, and what it was trained with."""

    name: str
    tensors: Mapping[str, RawTensor]
    config: AdapterConfig
    findings: Findings
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The soft prompts that can be read, and the files that all of them lie in."""

    read: tuple[SoftPrompt, ...]
    names: frozenset[str]
    tokens: int
    not_servable: str | None


@dataclass(frozen=True, slots=True)
class _Grammar:
    """The grammar, and the file it lies in, if there is one."""

    text: str | None = None
    names: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Contents:
    """The files of a package, and its manifest to find them by."""

    files: Mapping[str, bytes]
    manifest: Manifest
    limits: Limits

    def weights(self) -> _Weights:
        """The tensors, compared with the configuration they were trained with."""
        stated = self.manifest.bases[0].adapters[0]
        name = self._weights_name(stated)
        data = self.files[name]
        if stated.sha256 is not None and (actual := hashlib.sha256(data).hexdigest()) != stated.sha256:
            raise HocketError(
                Reason.BAD_CHECKSUM,
                f"{name} is not the file that the manifest names: its SHA-256 is {actual}, not {stated.sha256}; "
                "pack the expert again",
            )
        tensors = as_peft_names(read_tensors(data, self.limits, what=name))
        if CONFIG not in self.files:
            config = _config_of(stated)
            findings = Findings(
                config.rank,
                projections_of(config.target_modules, self.limits),
                f"{CONFIG} is missing, which says what the weights were trained with: "
                "copy it from the training output, and pack again",
            )
            return _Weights(name, tensors, config, findings, ())
        config = read_config(self.files[CONFIG], self.limits)
        if (why := unsupported(self.files[CONFIG], self.limits)) is None:
            findings = check_tensors(config, tensors, self.limits)
        else:
            findings = Findings(config.rank, projections_of(config.target_modules, self.limits), why)
        return _Weights(name, tensors, config, findings, tuple(_disagreements(stated, config, findings, len(data))))

    def soft_prompts(self, weights: _Weights) -> _Prompts:
        """Those that the manifest lists, and before them the adapter itself if it is one and is not listed."""
        read: list[SoftPrompt] = []
        names: set[str] = set()
        tokens = 0
        not_servable = None
        for stated in self.manifest.soft_prompts:
            name = self._soft_prompt_name(stated)
            if name in names:
                raise _bad(f"the manifest lists the soft prompt {name!a} twice")
            names.add(name)
            if name.endswith(_SAFETENSORS):
                read.append(self._soft_prompt(stated, name))
                tokens += read[-1].embeddings.shape[0]
            else:
                tokens += stated.tokens or 0
                not_servable = not_servable or (
                    f"the soft prompt {name!a} is not a {_SAFETENSORS} file, and nothing else is read: convert it "
                    "(`python -m training.soft_prompt IN OUT`), name the new file in the manifest, and pack again"
                )
            self._check_tokens(tokens)
        own = weights.tensors.get(PROMPT)
        if weights.config.kind is AdapterKind.SOFT_PROMPT and own is not None and weights.name not in names:
            if len(own.shape) != _MATRIX:
                raise _bad(f"{PROMPT} in {weights.name} is not a matrix [tokens, hidden]")
            read.insert(0, SoftPrompt(self.manifest.name, own))
            tokens += own.shape[0]
            self._check_tokens(tokens)
        if len(widths := {prompt.embeddings.shape[1] for prompt in read}) > 1:
            raise _bad(f"its soft prompts are for different hidden sizes: {sorted(widths)}")
        return _Prompts(tuple(read), frozenset(names), tokens, not_servable)

    def grammar(self) -> _Grammar:
        """The grammar that the manifest names, or the one at its usual place."""
        stated = self.manifest.grammar_file
        own = None if stated is None else stated.rpartition("/")[2]  # where upstream's packager puts it
        name = next((name for name in _places(stated, own, GRAMMAR) if name in self.files), None)
        if name is None:
            if stated is None and not self.manifest.decoding.use_grammar:
                return _Grammar()
            return _Grammar(warnings=(f"answers shall follow a grammar, but {stated or GRAMMAR} is not inside",))
        data = self.files[name]
        if len(data) > self.limits.grammar_bytes:
            raise HocketError(
                Reason.TOO_LARGE,
                f"{name} has {len(data)} bytes, more than the limit of {self.limits.grammar_bytes} for a grammar",
            )
        try:
            return _Grammar(data.decode(), (name,))
        except UnicodeDecodeError as error:
            raise _bad(f"the grammar {name} is not text in UTF-8") from error

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self.limits.soft_prompt_tokens:
            raise HocketError(
                Reason.TOO_LARGE,
                f"the soft prompts have {tokens} tokens, more than the limit of {self.limits.soft_prompt_tokens}",
            )

    def _weights_name(self, stated: ManifestAdapter) -> str:
        for name in _places(stated.path, *WEIGHTS):
            if name in self.files:
                return name
        raise no_weights(self.files)

    def _soft_prompt_name(self, stated: ManifestSoftPrompt) -> str:
        """Upstream's packager moves soft prompts to the root, but leaves their paths in the manifest as they were."""
        for name in _places(stated.path, stated.path.rpartition("/")[2]):
            if name in self.files:
                return name
        raise _bad(f"the soft prompt {stated.path} is not in the package")

    def _soft_prompt(self, stated: ManifestSoftPrompt, name: str) -> SoftPrompt:
        tensors = list(read_tensors(self.files[name], self.limits, what=name).values())
        if len(tensors) != 1 or len(tensors[0].shape) != _MATRIX:
            raise _bad(f"the soft prompt {name} does not hold exactly one tensor of the shape [tokens, hidden]")
        rows = tensors[0].shape[0]
        if stated.tokens not in (None, rows):
            raise _bad(f"the soft prompt {name} has {rows} tokens, the manifest says {stated.tokens}")
        return SoftPrompt(stated.name, tensors[0])


def _config_of(stated: ManifestAdapter) -> AdapterConfig:
    """What can be shown of an adapter whose configuration is missing."""
    kind = _kind_of(stated)
    if kind is None:
        raise unsupported_type(stated.type)
    return AdapterConfig(
        kind, rank=stated.r or 0, alpha=float(stated.alpha or 0), target_modules=tuple(sorted(stated.target_modules))
    )


def _kind_of(stated: ManifestAdapter) -> AdapterKind | None:
    kind = _KINDS.get(stated.type.lower())
    return AdapterKind.DORA if kind is AdapterKind.LORA and stated.use_dora else kind


def _disagreements(
    stated: ManifestAdapter, config: AdapterConfig, findings: Findings, size_bytes: int
) -> Iterator[str]:
    """What the manifest says otherwise than `adapter_config.json`, which decides."""
    if _kind_of(stated) is not config.kind:
        yield _otherwise("type", stated.type, config.kind)
    if config.rank and stated.r not in (None, config.rank):
        yield _otherwise("r", stated.r, config.rank)
    if config.rank and stated.alpha not in (None, config.alpha):
        yield _otherwise("alpha", stated.alpha, f"{config.alpha:g}")
    if config.rank and stated.scaling is not None and (stated.scaling == "rsqrt") is not config.use_rslora:
        yield _otherwise("scaling", stated.scaling, f"use_rslora {str(config.use_rslora).lower()}")
    if config.feedforward_modules and stated.feedforward_modules:
        read = sorted({name.rpartition(".")[2] for name in config.feedforward_modules})
        told = sorted({name.rpartition(".")[2] for name in stated.feedforward_modules})
        if read != told:
            yield _otherwise("feedforward_modules", ", ".join(told), ", ".join(read))
    for name in findings.unmatched:
        yield f"{CONFIG} names {name} in target_modules, and no tensor adapts it"
    named = sorted({name.rpartition(".")[2] for name in stated.target_modules})
    if findings.projections and named != list(findings.projections):
        yield _otherwise("target_modules", ", ".join(named) or "none", ", ".join(findings.projections))
    if stated.size_bytes not in (None, size_bytes):
        yield f"the manifest says that the weights have {stated.size_bytes} bytes; they have {size_bytes}"


def _otherwise(key: str, stated: object, true: object) -> str:
    return f"the manifest says {key} {stated}; {CONFIG} says {true}, and decides"


def _several(manifest: Manifest) -> str | None:
    """Why it is not clear what the weights belong to; None if it is."""
    if len(manifest.bases) > 1:
        return f"it names {len(manifest.bases)} base models, and one set of weights: pack one package per base"
    if len(manifest.bases[0].adapters) > 1:
        return f"it names {len(manifest.bases[0].adapters)} adapters for its base: pack one package per adapter"
    return None


def _places(*names: str | None) -> Iterator[str]:
    return (name for name in names if name is not None)


def _sections(files: Mapping[str, bytes]) -> Iterator[Section]:
    offset = 0
    for name, content in files.items():
        yield Section(name, offset, len(content))
        offset += len(content)


def _size_bytes(tensor: RawTensor) -> int:
    return len(tensor.data)


def no_weights(names: Collection[str]) -> HocketError:
    """The refusal of an expert without weights that are read.

    Args:
        names: Of the files that are there.
    """
    pickled = next((name for name in PICKLED_WEIGHTS if name in names), None)
    hint = (
        f"put {WEIGHTS[0]} in, as PEFT's save_pretrained writes it"
        if pickled is None
        else f"{pickled} is a pickle, which is never loaded: load the adapter with PEFT and save it again, "
        f"which writes {WEIGHTS[0]}"
    )
    return HocketError(Reason.BAD_PACKAGE, f"there are no weights: {hint}")


def _bad(why: str) -> HocketError:
    return HocketError(Reason.BAD_ADAPTER, f"the expert cannot be used: {why}")
