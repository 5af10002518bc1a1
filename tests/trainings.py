"""Small trainings for tests: a tiny base, a manifest, a dataset of a rule that can be learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.bases import tiny_base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MODULES: Final = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: Final[Mapping[str, dict[str, Any]]] = {
    "lora": {"type": "lora", "target_modules": MODULES, "r": 4, "alpha": 8},
    "rslora": {"type": "lora", "target_modules": MODULES, "r": 4, "alpha": 8, "scaling": "rsqrt"},
    "dora": {"type": "dora", "target_modules": MODULES, "r": 4, "alpha": 8},
    "ia3": {"type": "ia3", "target_modules": MODULES, "feedforward_modules": ["down_proj"]},
    "soft_prompt": {"type": "soft_prompt", "target_modules": []},
}
QUICK: Final[Mapping[str, object]] = {"batch_size": 4, "max_steps": 4, "learning_rate": 0.01, "logging_steps": 1}
_COLOURS: Final = ("red", "blue", "green", "black", "white")


@dataclass(frozen=True, slots=True)
class Workshop:
    """Folders of a training.

    Attributes:
        base: The base model.
        folder: For the rest.
    """

    base: Path
    folder: Path

    def manifest(self, kind: str = "lora", **changes: Any) -> Path:
        """Write a manifest 2.0; `config` is that of the training, other changes replace keys at the top."""
        config = changes.pop("config", {})
        base = {"name": self.base.name, "adapters": [ADAPTERS[kind]], **changes.pop("base", {})}
        document = {
            "name": f"expert-{kind.replace('_', '-')}",
            "version": "1.0.0",
            "schema_version": "2.0",
            "description": "A test",
            "base_models": [base],
            "capabilities": ["task:colours"],
            "training": {"dataset": {}, "config": config},
            **changes,
        }
        path = self.folder / "manifest.json"
        path.write_text(json.dumps(document))
        return path

    def data(self, name: str = "train.jsonl", rows: Sequence[Mapping[str, Any]] | None = None) -> Path:
        """Write a dataset: 16 questions, or the rows given."""
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in (questions(16) if rows is None else rows)))
        return path

    def plan(self, kind: str = "lora", out: str = "out", *, resume: bool = False, **settings: object) -> Any:
        """A quick plan with an evaluation set."""
        from training.plan import plan_training  # noqa: PLC0415 - with what it imports

        return plan_training(
            self.manifest(kind),
            base=self.base,
            out=self.folder / out,
            data=self.data(),
            eval_data=self.data("eval.jsonl", questions(4)),
            resume=resume,
            settings={**QUICK, **settings},
        )


def questions(count: int) -> list[dict[str, str]]:
    """Rows with a prompt and a completion of several lengths."""
    return [
        {
            "prompt": f"what comes after {' '.join([_COLOURS[place % 5]] * (place % 3 + 1))}",
            "completion": _COLOURS[(place + 1) % 5],
        }
        for place in range(count)
    ]


def workshop(base: Path, folder: Path) -> Workshop:
    """A workshop with a base that is made if it is not there."""
    if not base.exists():
        tiny_base(base, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    return Workshop(base, folder)
