"""What a training leaves: adapter, configuration, manifest, curve. With these `hocket expert pack` makes a package.

    adapter_model.safetensors   adapter_config.json   manifest.json   loss.jsonl   loss.png   checkpoints/

The manifest is its author's, with what is known now: digest of the base, hash and size of the weights, the settings
that were used, and what came of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from peft import get_peft_model_state_dict
from safetensors.torch import save

from hocket.base_folder import base_name
from hocket.datasets.rows import file_digest
from hocket.errors import HocketError, Reason
from hocket.files import write_whole
from hocket.packages.adapter import AdapterKind
from hocket.packages.expert.names import CONFIG, MANIFEST, WEIGHTS
from hocket.packages.expert.writer import pretty
from training.model import ADAPTER
from training.plan import Precision, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from peft import PeftModel

    from training.plan import Plan
    from training.train import Outcome

CURVE: Final = "loss.jsonl"
PICTURE: Final = "loss.png"
_IDENTITY: Final = "plan.json"
_LIBRARIES: Final = ("torch", "transformers", "peft", "trl")
_NO_RANK: Final = (AdapterKind.IA3, AdapterKind.SOFT_PROMPT)


def write_all(plan: Plan, outcome: Outcome, model: PeftModel, curve: Sequence[Mapping[str, float]]) -> None:
    """Write everything but the checkpoints, the manifest last.

    Args:
        plan: What was wanted.
        outcome: What came of it.
        model: With the weights that are kept.
        curve: What the trainer logged.

    Raises:
        HocketError: `BAD_REQUEST` if the folder cannot be written.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    config = model.peft_config[ADAPTER]
    config.inference_mode = True
    config.base_model_name_or_path = base_name(plan.base)  # and not the folder of this machine
    points = [_point(each) for each in curve if "loss" in each or "eval_loss" in each]
    try:
        write_whole(plan.out / WEIGHTS[0], weights)
        write_whole(plan.out / CONFIG, pretty({key: _plain(value) for key, value in sorted(config.to_dict().items())}))
        write_whole(plan.out / CURVE, b"".join(json.dumps(point).encode() + b"\n" for point in points))
        _draw(plan.out / PICTURE, points, plan.manifest.name)
        write_whole(plan.out / MANIFEST, pretty(_manifest(plan, outcome, weights)))
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot write {error.filename or plan.out}: {error.strerror}") from error


def write_identity(folder: Path, identity: Mapping[str, Any], *, compare: bool) -> None:
    """Note what checkpoints belong to.

    Args:
        folder: Of the checkpoints.
        identity: What decides about the weights.
        compare: Whether there are checkpoints, which must be of the same.

    Raises:
        HocketError: `BAD_REQUEST` if they are of something else, with what differs.
        OSError: The folder cannot be read or written.
    """
    path = folder / _IDENTITY
    wanted = json.loads(json.dumps(identity))
    if compare:
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise HocketError(
                Reason.BAD_REQUEST, f"{path} does not say what the checkpoints belong to: train into another folder"
            ) from error
        if changed := sorted(_flat(found) ^ _flat(wanted)):
            names = ", ".join(dict.fromkeys(name for name, _ in changed))
            raise HocketError(
                Reason.BAD_REQUEST,
                f"the checkpoints in {folder} are of another training ({names} differ): give another folder",
            )
    write_whole(path, pretty(wanted))


def _flat(tree: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Every value with its own name."""
    pairs: set[tuple[str, str]] = set()
    for name, value in tree.items():
        pairs |= _flat(value) if isinstance(value, dict) else {(name, json.dumps(value))}
    return pairs


def _point(logged: Mapping[str, float]) -> dict[str, float]:
    kept = (
        "step",
        "epoch",
        "loss",
        "eval_loss",
        "learning_rate",
        "grad_norm",
        "mean_token_accuracy",
        "eval_mean_token_accuracy",
    )
    return {key: logged[key] for key in kept if key in logged}


def _plain(value: Any) -> Any:  # noqa: ANN401 - a JSON value
    """As JSON has it; sets in one order."""
    return sorted(value) if isinstance(value, set) else value


def _draw(path: Path, points: Sequence[Mapping[str, float]], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - it takes a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        found = [(point["step"], point[key]) for point in points if key in point]
        if found:
            axes.plot(*zip(*found, strict=True), style, label=label, markersize=4)
    axes.set(title=title, xlabel="step", ylabel="loss per token")
    axes.grid(alpha=0.3)
    if points:
        axes.legend()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _manifest(plan: Plan, outcome: Outcome, weights: bytes) -> dict[str, Any]:
    """The author's, filled in. Keys that are not ours stay as they are."""
    document = dict(plan.manifest.document)
    facts = {"size_bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    if document.get("base_models"):
        entry = document["base_models"][plan.base_place]
        adapter = _adapter(plan, entry["adapters"][0]) | facts
        document["base_models"] = [{**entry, "hocket_base": plan.base_digest, "adapters": [adapter]}]
        document.pop("adapters", None)
    else:
        document["base_model"] = {**document["base_model"], "hocket_base": plan.base_digest}
        document["adapters"] = [_adapter(plan, document["adapters"][0]) | facts]
    if plan.adapter.kind is AdapterKind.SOFT_PROMPT:
        declared = [
            {**each, "path": WEIGHTS[0], "tokens": plan.adapter.tokens}
            for each in (document.get("soft_prompts") or [])[:1]
        ]
        document["soft_prompts"] = declared
    training = dict(document.get("training") or {})
    training["dataset"] = _dataset(plan, outcome, training.get("dataset") or {})
    training["config"] = _kept_config(training.get("config") or {}) | _config(plan, outcome)
    training["metadata"] = {**(training.get("metadata") or {}), **_metadata(plan, outcome)}
    training["packaging_checkpoint"] = outcome.kept
    document["training"] = training
    evaluation = dict(document.get("evaluation") or {})
    metrics = {"steps": outcome.steps, "train_loss": outcome.train_loss, "eval_loss": outcome.eval_loss}
    evaluation["test_set_size"] = evaluation.get("test_set_size") or outcome.eval_examples
    evaluation["metrics"] = {
        **(evaluation.get("metrics") or {}),
        **{name: value for name, value in metrics.items() if value is not None},
    }
    document["evaluation"] = evaluation
    document["integrity"] = None  # what was signed before is something else
    return document


def _adapter(plan: Plan, stated: Mapping[str, Any]) -> dict[str, Any]:
    """As declared, with the numbers that were left to defaults; without a path, since the weights lie at the root."""
    adapter = plan.adapter
    kept = {key: value for key, value in stated.items() if key != "path"}
    if adapter.kind is AdapterKind.IA3:
        return kept | {
            "target_modules": list(adapter.target_modules),
            "feedforward_modules": list(adapter.feedforward_modules),
        }
    if adapter.kind is AdapterKind.SOFT_PROMPT:
        return kept
    return kept | {
        "target_modules": list(adapter.target_modules),
        "r": adapter.rank,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "use_dora": adapter.kind is AdapterKind.DORA,
        "scaling": "rsqrt" if adapter.use_rslora else stated.get("scaling") or "standard",
    }


def _dataset(plan: Plan, outcome: Outcome, stated: Mapping[str, Any]) -> dict[str, Any]:
    """A path of this machine is nobody else's business: of a file that the manifest does not name, the name is kept."""
    named = stated.get("path")
    same = isinstance(named, str) and named.rpartition("/")[2] == plan.data.name
    return {
        **stated,
        "path": named if same else plan.data.name,
        "format": "jsonl",
        "sha256": file_digest(plan.data).removeprefix("sha256:"),
        "examples": outcome.examples,
    }


def _kept_config(stated: Mapping[str, Any]) -> dict[str, Any]:
    """What the author says besides settings. A setting has one name in what comes out, of several that it may have."""
    settings = {key for each in fields(Settings) for key in each.metadata["keys"]} | {"lr_scheduler_kwargs"}
    return {key: value for key, value in stated.items() if key not in settings}


def _config(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The settings that were used, by upstream's names where it has any."""
    settings, adapter = plan.settings, plan.adapter
    used: dict[str, Any] = {
        each.metadata["keys"][0]: getattr(settings, each.name) for each in fields(Settings) if each.metadata["keys"]
    }
    used |= {
        "method": "sft",
        "eval_steps": settings.eval_steps or settings.save_steps,
        "bf16": outcome.precision == Precision.BFLOAT16,
        "fp16": outcome.precision == Precision.FLOAT16,
    }
    if settings.scheduler_cycles:
        used["lr_scheduler_kwargs"] = {"num_cycles": settings.scheduler_cycles}
    if adapter.kind is AdapterKind.SOFT_PROMPT:
        start = {"num_virtual_tokens": adapter.tokens, "init_method": str(adapter.start)}
        return used | start | ({"init_text": adapter.start_text} if adapter.start_text else {})
    used |= {"adapter_type": str(adapter.kind), "target_modules": list(adapter.target_modules)}
    if adapter.kind not in _NO_RANK:
        used |= {"rank": adapter.rank, "alpha": adapter.alpha, "dropout": adapter.dropout}
    return used


def _metadata(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    known: dict[str, Any] = {
        "trained_on": datetime.now(UTC).strftime("%Y-%m-%d"),
        "base_model_version": plan.base_digest,
        "training_time_hours": round(outcome.seconds / 3600, 4),
        "gpu": outcome.device,
        "precision": outcome.precision,
        "quantized_base": "nf4" if plan.settings.qlora else None,
        "tokens": outcome.tokens,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    if plan.start_package is not None:
        known["start"] = plan.start_package.digest
    if plan.beside is not None:
        known["beside"] = {"digest": plan.beside.digest, "weight": plan.beside.weight}
    return known
