"""What is going to be trained: a manifest, what the command line says in place of it, and defaults, in this order.

Where a default is upstream's, it is that of its last trainer (learning rate 5e-5, dropout 0.1, a tenth of the steps to
warm up, a checkpoint every 250 steps).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hocket.base_folder import base_digest, base_name
from hocket.bases import normalised_name
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages.adapter import AdapterKind
from hocket.packages.expert.manifest import parse_manifest
from hocket.packages.expert.reader import decode
from hocket.packages.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hocket.packages.adapter import Adapter
    from hocket.packages.expert.manifest import Manifest, ManifestAdapter

SCHEDULERS: Final = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS: Final = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "adafactor", "sgd")
_KINDS: Final = {
    "lora": AdapterKind.LORA,
    "dora": AdapterKind.DORA,
    "ia3": AdapterKind.IA3,
    "soft_prompt": AdapterKind.SOFT_PROMPT,
    "prompt_tuning": AdapterKind.SOFT_PROMPT,
}
_STANDARD_SCALINGS: Final = {"standard", "default", "dora"}
_RANK_SCALING: Final = "rsqrt"
_RANK: Final = 16
_DROPOUT: Final = 0.1
_TOKENS: Final = 32
_BESIDE_WEIGHT: Final = 0.5
_IA3_FEEDFORWARD: Final = ("up_proj", "down_proj", "gate_proj")
_INT4: Final = "int4"
_MOST: Final = 1e9
"""No setting is larger, and none infinite."""


class Precision(StrEnum):
    """What the forward pass computes in; what is trained stays float32."""

    AUTO = "auto"
    """float32 on a CPU, bfloat16 on a CUDA device."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Device(StrEnum):
    """Where to train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Keep(StrEnum):
    """Which weights come out."""

    BEST = "best"
    FINAL = "final"


class PromptStart(StrEnum):
    """What the vectors of a soft prompt are before training."""

    RANDOM = "random"
    TEXT = "text"
    VOCAB_SAMPLE = "vocab_sample"


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The adapter to train.

    Attributes:
        kind: What it does.
        target_modules: Last parts of the names of the projections it adapts; empty for a soft prompt.
        feedforward_modules: Of those, which IA3 scales at their input.
        rank: Of a LoRA or DoRA; 0 for others.
        alpha: Numerator of its scale.
        use_rslora: Whether the scale is alpha / sqrt(rank), and not alpha / rank.
        dropout: On what its low-rank branch reads, while training.
        tokens: Rows of a soft prompt; 0 for others.
        start: What these are at first.
        start_text: Whose embeddings they are at first, for `PromptStart.TEXT`: cut, or repeated, to fit.
    """

    kind: AdapterKind
    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()
    rank: int = 0
    alpha: int = 0
    use_rslora: bool = False
    dropout: float = 0.0
    tokens: int = 0
    start: PromptStart = PromptStart.RANDOM
    start_text: str = ""


def _setting(default: Any, help_text: str, *keys: str, least: float | None = None, most: float = _MOST) -> Any:  # noqa: ANN401
    """A field of `Settings`: what `--help` says of it, the keys of `training.config` that state it, its bounds."""
    metadata = {"help": help_text, "keys": keys, "least": least, "most": most}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. Every field is an option of the command, and most are keys of a manifest's `training.config`."""

    epochs: float = _setting(3.0, "Passes over the data; may be a fraction.", "epochs", "num_epochs", least=1e-6)
    max_steps: int = _setting(0, "Steps to end after, whatever the epochs; 0: none.", "max_steps", least=0)
    learning_rate: float = _setting(5e-5, "At its highest.", "learning_rate", least=1e-12, most=100)
    batch_size: int = _setting(8, "Rows of a pass.", "batch_size", least=1)
    gradient_accumulation_steps: int = _setting(1, "Passes of a step.", "gradient_accumulation_steps", least=1)
    warmup_ratio: float = _setting(0.1, "Share of all steps to warm up.", "warmup_ratio", least=0, most=0.99)
    warmup_steps: int = _setting(0, "Steps to warm up; 0: by the ratio.", "warmup_steps", least=0)
    lr_scheduler: str = _setting("cosine", f"One of {', '.join(SCHEDULERS)}.", "lr_scheduler")
    scheduler_cycles: int = _setting(0, "Restarts of cosine_with_restarts; 0: one cycle.", least=0)
    weight_decay: float = _setting(0.0, "Of AdamW.", "weight_decay", least=0, most=10)
    max_grad_norm: float = _setting(1.0, "Gradients are scaled down to it; 0: never.", "max_grad_norm", least=0)
    optimizer: str = _setting("adamw_torch_fused", f"One of {', '.join(OPTIMIZERS)}.", "optim")
    seed: int = _setting(42, "Of weights, order and dropout.", "seed", least=0, most=2**32 - 1)
    max_length: int = _setting(1024, "Most tokens of an example, its end included.", "max_seq_length", least=8)
    packing: bool = _setting(False, "Put short examples together into rows of the greatest length.", "packing")  # noqa: FBT003
    group_by_length: bool = _setting(False, "Put examples of like length into a batch.", "group_by_length")  # noqa: FBT003
    gradient_checkpointing: bool = _setting(False, "Less memory for a third more time.", "gradient_checkpointing")  # noqa: FBT003
    precision: Precision = _setting(  # noqa: RUF009 - as the others, which ruff takes for constants
        Precision.AUTO, "auto (float32 on a CPU, else bfloat16), or one of these, or float16 (CUDA)."
    )
    qlora: bool = _setting(False, "Keep the base in 4 bits (NF4, quantised twice) while training.", "qlora")  # noqa: FBT003
    eval_steps: int = _setting(0, "Steps between evaluations; 0: as checkpoints.", "eval_steps", least=0)
    save_steps: int = _setting(250, "Steps between checkpoints.", "save_steps", least=1)
    save_total_limit: int = _setting(
        2, "Checkpoints on disk at most, the best among them.", "save_total_limit", least=1
    )
    logging_steps: int = _setting(10, "Steps between points of the loss curve.", "logging_steps", least=1)
    keep: Keep = _setting(Keep.BEST, "best (by evaluation loss, where there is evaluation data) or final.", "keep")  # noqa: RUF009 - as above


@dataclass(frozen=True, slots=True, eq=False)
class StartPackage:
    """An adapter that a training goes on from.

    Attributes:
        digest: Of its package.
        adapter: Of the kind, rank and scale of the one in training.
    """

    digest: str
    adapter: Adapter


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """An adapter that another one learns to be mixed with.

    Attributes:
        digest: Of its package.
        adapter: A LoRA.
        weight: Its weight in the mixture; the adapter in training has the rest of 1.
    """

    digest: str
    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that a training needs to know.

    Attributes:
        manifest: As its author wrote it.
        base_place: Which of its bases is trained on.
        base: Folder of that base.
        base_digest: Of its files.
        data: Dataset to learn, JSON lines.
        eval_data: Dataset to measure the loss on; None for none.
        out: Folder that everything is written to.
        adapter: What is trained.
        settings: How.
        device: Where.
        resume: Whether to go on from the last checkpoint in `out`.
        start_package: The adapter whose weights are the first ones; None to begin anew.
        beside: The adapter that it learns to be mixed with; None for none.
    """

    manifest: Manifest
    base_place: int
    base: Path
    base_digest: str
    data: Path
    eval_data: Path | None
    out: Path
    adapter: AdapterPlan
    settings: Settings
    device: Device = Device.AUTO
    resume: bool = False
    start_package: StartPackage | None = None
    beside: Beside | None = None

    @property
    def prompt_template(self) -> str | None:
        """What prompts are put into, as the worker will; None for the base's chat template."""
        return self.manifest.bases[self.base_place].base.prompt_template

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a manifest asks for, and does not get; for people."""
        found = []
        if _config(self.manifest).get("use_unsloth"):
            found.append("training.config.use_unsloth is set aside: training is that of PEFT and TRL")
        if self.manifest.soft_prompts and self.adapter.kind is not AdapterKind.SOFT_PROMPT:
            found.append("soft_prompts[] are not trained with another adapter: make a manifest for them alone")
        if self.eval_data is None and self.settings.keep is Keep.BEST:
            found.append("without evaluation data (--eval-data) the final weights are kept")
        return tuple(found)


def plan_training(  # noqa: PLR0913 - the command's own options, by name
    manifest: Path,
    *,
    base: Path,
    out: Path,
    data: Path | None = None,
    eval_data: Path | None = None,
    device: Device = Device.AUTO,
    resume: bool = False,
    start_package: Path | None = None,
    beside: Path | None = None,
    beside_weight: float | None = None,
    settings: Mapping[str, object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Read a manifest, and decide what to train and how.

    Args:
        manifest: `manifest.json`, schema 1.0 or 2.0.
        base: Folder of the base model.
        out: Folder for the results.
        data: Dataset; None for the manifest's `training.dataset.path`, relative to the manifest.
        eval_data: Evaluation set; None for the manifest's `training.dataset.validation_path` if that file is there and
            `data` is None.
        device: Where to train.
        resume: Whether to go on from the last checkpoint in `out`.
        start_package: The package (`.expert`) of an adapter of the same kind, rank, scale and targets on the same base,
            to go on from; None to begin anew.
        beside: The package (`.expert`) of a LoRA on the same base that this one shall be mixed with; None for none.
        beside_weight: The weight of that one, between 0 and 1; None for a half.
        settings: By names of fields of `Settings`: they win over the manifest.
        on_progress: Told the bytes of the base hashed so far, and all of them.

    Raises:
        HocketError: The refusals of `parse_manifest`; `BAD_MANIFEST` with the field for a value that cannot be trained
            with; `UNSUPPORTED_TYPE` for another kind of adapter; `BAD_REQUEST` for what the caller says, or cannot be
            read; `BASE_MISMATCH` if the manifest, or a package, is for other bases; `BAD_WEIGHTS` with the field for a
            package to start from that is another adapter than the manifest's; `NOT_SERVABLE` for packages that cannot
            be served, and the refusals of `hocket.packages.expert.decode`.
    """
    parsed = parse_manifest(_read(manifest, DEFAULT_LIMITS.manifest_bytes))
    digest = base_digest(base, on_progress)
    place = _base_place(parsed, base, digest)
    dataset = _dataset(parsed)
    if data is None:
        if not isinstance(dataset.get("path"), str):
            raise HocketError(Reason.BAD_REQUEST, "the manifest names no training.dataset.path: give --data FILE")
        data = manifest.parent / dataset["path"]
        stated = dataset.get("validation_path")
        if eval_data is None and isinstance(stated, str) and (manifest.parent / stated).is_file():
            eval_data = manifest.parent / stated
    chosen = _settings(parsed, place, settings or {})
    adapter = _adapter(parsed, place)
    if chosen.packing and adapter.kind is AdapterKind.SOFT_PROMPT:
        raise HocketError(
            Reason.BAD_REQUEST,
            "a soft prompt stands before every example, so that these cannot be packed: --no-packing",
        )
    if beside is None and beside_weight is not None:
        raise HocketError(
            Reason.BAD_REQUEST, "--beside-weight is the weight of another expert: give --beside EXPERT too"
        )
    first = None if start_package is None else _start_package(start_package, adapter, digest)
    neighbour = None if beside is None else _beside(beside, beside_weight, adapter, digest)
    return Plan(parsed, place, base, digest, data, eval_data, out, adapter, chosen, device, resume, first, neighbour)


def _adapter_of(path: Path, base: str) -> tuple[str, Adapter]:
    """Digest and content of a package for a base. Learnt with, and never served: nobody needs to have signed it."""
    data = _read(path, DEFAULT_LIMITS.package_bytes)
    facts, adapter = decode(data, digest_of(data))
    if facts.base.digest != base:
        raise HocketError(
            Reason.BASE_MISMATCH, f"{path} is for the base {facts.base.digest or facts.base.name}, and this is {base}"
        )
    if facts.not_servable is not None:
        raise HocketError(
            Reason.NOT_SERVABLE, f"{path} cannot be served, and so not be trained with: {facts.not_servable}"
        )
    return facts.digest, adapter


def _start_package(path: Path, adapter: AdapterPlan, base: str) -> StartPackage:
    """An adapter that computes as the planned one does. Its tensors are compared when they are put in."""
    package, given = _adapter_of(path, base)
    config = given.config
    compared: dict[str, tuple[object, object]] = {
        "kind": (config.kind, adapter.kind),
        "rank": (config.rank, adapter.rank),
        "alpha": (config.alpha, adapter.alpha),
        "use_rslora": (config.use_rslora, adapter.use_rslora),
        "rank_pattern": (dict(config.rank_pattern), {}),
        "alpha_pattern": (dict(config.alpha_pattern), {}),
        "bias": (config.bias, "none"),
        "lora_bias": (config.lora_bias, False),
        "soft_prompts": (len(given.soft_prompts), int(adapter.kind is AdapterKind.SOFT_PROMPT)),
    }
    for name, (has, wanted) in compared.items():
        if has != wanted:
            raise HocketError(
                Reason.BAD_WEIGHTS,
                f"{path} cannot be started from: its {name} is {has!s:.100}, and what is trained has {wanted}",
                field=name,
            )
    return StartPackage(package, given)


def _beside(path: Path, stated_weight: float | None, adapter: AdapterPlan, base: str) -> Beside:
    weight = _BESIDE_WEIGHT if stated_weight is None else stated_weight
    if not 0 < weight < 1:
        raise HocketError(Reason.BAD_REQUEST, f"--beside-weight is {weight:g}: it must be above 0 and below 1")
    package, neighbour = _adapter_of(path, base)
    if (adapter.kind, neighbour.config.kind) != (AdapterKind.LORA, AdapterKind.LORA):
        raise HocketError(
            Reason.UNSUPPORTED_TYPE,
            f"an adapter of kind {adapter.kind} is not trained beside one of kind {neighbour.config.kind}: both must "
            "be LoRA, whose parts of a mixture are a sum",
        )
    config = neighbour.config
    if (
        config.rank_pattern
        or config.alpha_pattern
        or config.bias != "none"
        or config.lora_bias
        or neighbour.soft_prompts
    ):
        raise HocketError(
            Reason.UNSUPPORTED_TYPE,
            f"{path} has ranks of single modules, biases or a soft prompt: beside a plain LoRA alone is trained",
        )
    return Beside(package, neighbour, weight)


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot read {path}: {error.strerror}") from error


def _base_place(manifest: Manifest, folder: Path, digest: str) -> int:
    """Which of a manifest's bases a folder is: by its digest, else by its name, else the only one."""
    bases = [entry.base for entry in manifest.bases]
    found = [place for place, base in enumerate(bases) if base.digest == digest]
    if not found:
        name = normalised_name(base_name(folder))
        open_places = [place for place, base in enumerate(bases) if base.digest is None]
        found = [place for place in open_places if normalised_name(bases[place].name) == name]
        if not found and len(bases) == 1:
            found = open_places
    if len(found) != 1:
        known = ", ".join(f"{base.name} ({base.digest or 'by name'})" for base in bases)
        raise HocketError(
            Reason.BASE_MISMATCH,
            f"the manifest is for {known}, and {folder} is {digest}: give that base, or change the manifest's",
            digest=digest,
        )
    return found[0]


def _dataset(manifest: Manifest) -> Mapping[str, Any]:
    return (manifest.document.get("training") or {}).get("dataset") or {}


def _config(manifest: Manifest) -> Mapping[str, Any]:
    return (manifest.document.get("training") or {}).get("config") or {}


def _settings(manifest: Manifest, place: int, told: Mapping[str, object]) -> Settings:
    """What is told wins over the manifest, which wins over defaults."""
    config = _config(manifest)
    if (method := config.get("method")) not in {None, "sft"}:
        raise _bad("method", f"is {method!r:.40}; supervised fine-tuning (sft) is what there is")
    chosen = _stated(config)
    if manifest.bases[place].base.quantization == _INT4:
        chosen.setdefault("qlora", True)
    chosen |= {name: _checked(name, value, None) for name, value in told.items()}
    if "warmup_ratio" in told and "warmup_steps" not in told:
        chosen["warmup_steps"] = 0
    made = Settings(**chosen)  # type: ignore[arg-type]  # each is checked above
    if made.save_steps % (made.eval_steps or made.save_steps):
        raise HocketError(
            Reason.BAD_REQUEST,
            f"checkpoints every {made.save_steps} steps, and evaluations every {made.eval_steps}: the best checkpoint "
            "is not known then; let the second number divide the first (--save-steps, --eval-steps)",
        )
    return made


def _stated(config: Mapping[str, Any]) -> dict[str, object]:
    """What a manifest's `training.config` states, by fields of `Settings`."""
    chosen: dict[str, object] = {}
    scheduler = config.get("lr_scheduler_kwargs") or {}
    if not isinstance(scheduler, dict):
        raise _bad("lr_scheduler_kwargs", f"is {scheduler!r:.40}; it must be an object")
    if (cycles := scheduler.get("num_cycles")) is not None:
        chosen["scheduler_cycles"] = _checked("scheduler_cycles", cycles, "training.config.lr_scheduler_kwargs")
    precisions = [
        precision for key, precision in (("bf16", Precision.BFLOAT16), ("fp16", Precision.FLOAT16)) if config.get(key)
    ]
    if precisions:
        chosen["precision"] = precisions[0]
    elif config.get("bf16") is False:
        chosen["precision"] = Precision.FLOAT32
    for each in fields(Settings):
        for key in each.metadata["keys"]:
            value = config.get(key)
            if key == "gradient_checkpointing" and value == "full":  # as one published manifest has it
                value = True
            if value is not None:
                chosen[each.name] = _checked(each.name, value, f"training.config.{key}")
    return chosen


def _checked(name: str, value: object, path: str | None) -> object:
    """A value of a setting in its own type, if it has it and lies within the bounds."""
    [declared] = [each for each in fields(Settings) if each.name == name]
    kind: Any = type(declared.default)
    metadata = declared.metadata
    choices = {"lr_scheduler": SCHEDULERS, "optimizer": OPTIMIZERS}.get(name)
    if issubclass(kind, StrEnum):
        choices = tuple(kind)
    problem = None
    if choices is not None:
        problem = None if value in choices else f"must be one of {', '.join(choices)}"
    elif kind is bool or isinstance(value, bool):
        problem = None if kind is type(value) else "must be true or false" if kind is bool else "must be a number"
    elif not isinstance(value, int if kind is int else int | float):
        problem = f"must be a {'whole ' if kind is int else ''}number"
    elif not metadata["least"] <= value <= metadata["most"]:
        problem = f"must be at least {metadata['least']:g} and at most {metadata['most']:g}"
    if problem is None:
        return kind(value)
    where = path or f"--{name.replace('_', '-')}"
    raise HocketError(
        Reason.BAD_REQUEST if path is None else Reason.BAD_MANIFEST,
        f"{where} is {value!r:.40}: it {problem}",
        field=where,
    )


def _adapter(manifest: Manifest, place: int) -> AdapterPlan:
    """The adapter of a base, as manifests declare it. What `adapters[]` leaves out is looked for in the config."""
    adapters = manifest.bases[place].adapters
    if len(adapters) > 1:
        raise HocketError(
            Reason.BAD_MANIFEST, "a package holds one adapter: make a manifest for each", field="adapters"
        )
    [stated] = adapters
    kind = _KINDS.get(stated.type)
    if kind is None:
        raise HocketError(
            Reason.UNSUPPORTED_TYPE,
            f"adapters of type {stated.type!r:.40} are not trained here: lora, dora, ia3 and soft_prompt are",
            field="adapters[0].type",
        )
    config = _config(manifest)
    if kind is AdapterKind.SOFT_PROMPT:
        return _soft_prompt(manifest, config)
    modules = stated.target_modules or tuple(config.get("target_modules") or ())
    if not modules:
        raise HocketError(
            Reason.MANIFEST_TARGET_MODULES, "adapters[0].target_modules is empty: name the modules to train"
        )
    if kind is AdapterKind.IA3:
        forward = stated.feedforward_modules or tuple(name for name in modules if name in _IA3_FEEDFORWARD)
        if strange := set(forward) - set(modules):
            raise HocketError(
                Reason.BAD_MANIFEST,
                f"adapters[0].feedforward_modules has {min(strange)!r:.40}, which target_modules has not",
                field="adapters[0].feedforward_modules",
            )
        return AdapterPlan(kind, modules, forward)
    return _low_rank(kind, stated, modules, config, _stated_dropout(manifest, place, config))


def _low_rank(
    kind: AdapterKind,
    stated: ManifestAdapter,
    modules: tuple[str, ...],
    config: Mapping[str, Any],
    dropout: object,
) -> AdapterPlan:
    rank = stated.r or config.get("rank") or _RANK
    alpha = stated.alpha or config.get("alpha") or 2 * rank
    if not isinstance(rank, int) or not 1 <= rank <= DEFAULT_LIMITS.rank or not isinstance(alpha, int) or alpha < 1:
        raise HocketError(
            Reason.BAD_MANIFEST,
            f"adapters[0] has r {rank!r:.20} and alpha {alpha!r:.20}: whole numbers above 0, and r at most "
            f"{DEFAULT_LIMITS.rank}",
            field="adapters[0].r",
        )
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise HocketError(
            Reason.BAD_MANIFEST,
            f"dropout is {dropout!r:.20}: it must be from 0 to below 1",
            field="adapters[0].dropout",
        )
    if stated.scaling not in {None, _RANK_SCALING, *_STANDARD_SCALINGS}:
        raise HocketError(
            Reason.BAD_MANIFEST,
            f"adapters[0].scaling is {stated.scaling!r:.40}: standard (alpha / r) and rsqrt (alpha / sqrt(r)) do",
            field="adapters[0].scaling",
        )
    return AdapterPlan(
        kind=AdapterKind.DORA if stated.use_dora else kind,
        target_modules=modules,
        rank=rank,
        alpha=alpha,
        use_rslora=stated.scaling == _RANK_SCALING or bool(config.get("use_rslora")),
        dropout=float(dropout),
    )


def _stated_dropout(manifest: Manifest, place: int, config: Mapping[str, Any]) -> object:
    """`ManifestAdapter` has none: it means nothing to whoever serves."""
    document = manifest.document
    adapters = document["base_models"][place]["adapters"] if document.get("base_models") else document["adapters"]
    stated = (adapters[0].get("dropout"), config.get("dropout"))
    return next((value for value in stated if value is not None), _DROPOUT)


def _soft_prompt(manifest: Manifest, config: Mapping[str, Any]) -> AdapterPlan:
    """Rows and start: of the first of `soft_prompts[]`, as upstream's trainer has it, else of the config."""
    declared = {**config, **next(iter(manifest.document.get("soft_prompts") or ()), {})}
    tokens = next((declared[key] for key in ("tokens", "length", "num_virtual_tokens") if declared.get(key)), _TOKENS)
    text = declared.get("init_text") or ""
    start = declared.get("init_method") or (PromptStart.TEXT if text else PromptStart.RANDOM)
    most = DEFAULT_LIMITS.soft_prompt_tokens
    problem = None
    if not isinstance(tokens, int) or not 1 <= tokens <= most:
        problem = f"tokens is {tokens!r:.20}: it must be a whole number from 1 to {most}"
    elif start not in tuple(PromptStart):
        problem = f"init_method is {start!r:.40}: it must be one of {', '.join(PromptStart)}"
    elif start == PromptStart.TEXT and not (isinstance(text, str) and text.strip()):
        problem = "init_method is text, and init_text is empty: say whose embeddings to begin with"
    if problem is not None:
        raise HocketError(Reason.BAD_MANIFEST, f"soft_prompts[0].{problem}", field="soft_prompts[0]")
    return AdapterPlan(
        AdapterKind.SOFT_PROMPT, tokens=tokens, start=PromptStart(start), start_text=text if start == "text" else ""
    )


def _bad(key: str, problem: str) -> HocketError:
    path = f"training.config.{key}"
    return HocketError(Reason.BAD_MANIFEST, f"{path} {problem}", field=path)
