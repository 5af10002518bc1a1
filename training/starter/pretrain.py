"""Train the starter base from nothing: `python -m training.starter.pretrain`.

A Qwen3 of about five million parameters, with tied embeddings: whatever serves Qwen3 serves it. Each step reads a
batch that is a function of the seed and the step's number, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from training.starter.corpus import texts
from training.starter.tokenizer import CONTEXT, VOCABULARY, write_tokenizer

SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The base's size: 5.2 million parameters, of which a quarter attend, two thirds are the MLPs, and the rest words."""
SEED: Final = 6
STEPS: Final = 1_500
ROWS: Final = 12
"""Rows of CONTEXT tokens in a step."""
RATE: Final = 0.02
"""Peak learning rate of the matrices (Muon)."""
_ADAM_SHARE: Final = 0.15
"""Of that rate, what embeddings and norms learn by (AdamW)."""
_WARM_UP_STEPS: Final = 100
_FALL_SHARE: Final = 0.4
_GRADIENT_NORM_MAX: Final = 1.0
_TOKENIZER_TEXTS: Final = 40_000
_KEEP_EVERY_STEPS: Final = 200
_MATRIX: Final = 2


def batch(tokenizer: Tokenizer, step: int) -> torch.Tensor:
    """The tokens of a step: int64 [ROWS, CONTEXT], documents one after the other."""
    ids: list[int] = []
    documents = texts(Random(f"{SEED}:{step}"))  # noqa: S311  # reproducible, not secret
    while len(ids) < ROWS * CONTEXT:
        ids += tokenizer.encode(next(documents), add_special_tokens=False).ids
    return torch.tensor(ids[: ROWS * CONTEXT]).view(ROWS, CONTEXT)


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate at a step: a linear warm-up, level, then a linear fall to zero."""
    if step < _WARM_UP_STEPS:
        return (step + 1) / _WARM_UP_STEPS
    return min(1.0, (steps - step) / (_FALL_SHARE * steps))


class Training:
    """A model in training, from the seed or from where an earlier run was stopped.

    Args:
        kept: The checkpoint, written whole or not at all.
    """

    def __init__(self, kept: Path) -> None:
        torch.manual_seed(SEED)
        self.model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        self.step = 0
        self._kept = kept
        self._optimizers = _optimizers(self.model)
        if kept.exists():
            state = torch.load(kept, weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            for optimizer, each in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(each)

    def learn(self, ids: torch.Tensor, rate: float) -> float:
        """Take one step on tokens [rows, tokens], at a share of the peak rates.

        Returns:
            The loss: nats per token.
        """
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _GRADIENT_NORM_MAX)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def keep(self) -> None:
        """Write a checkpoint."""
        states = [each.state_dict() for each in self._optimizers]
        part = self._kept.with_suffix(".part")
        torch.save({"step": self.step, "model": self.model.state_dict(), "optimizers": states}, part)
        part.replace(self._kept)


def pretrain(folder: Path, work: Path, *, steps: int = STEPS) -> None:
    """Train, and write a Hugging Face folder of bfloat16 weights.

    Args:
        folder: Where the base is written.
        work: Where a stopped run goes on from, and where losses are kept.
        steps: Of ROWS x CONTEXT tokens each.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, islice(texts(Random(SEED)), _TOKENIZER_TEXTS))  # noqa: S311  # reproducible, not secret
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    kept = work / "base.pt"
    training = Training(kept)
    with (work / "base-losses.jsonl").open("a") as log, _bar() as progress:
        task = progress.add_task("base", total=steps, completed=training.step, loss=math.nan, speed=0)
        for step in range(training.step, steps):
            begin = time.perf_counter()
            loss = training.learn(batch(tokenizer, step), rate_at(step, steps))
            speed = round(ROWS * CONTEXT / (time.perf_counter() - begin))
            log.write(json.dumps({"step": step, "loss": round(loss, 4), "tokens_per_second": speed}) + "\n")
            progress.update(task, advance=1, loss=loss, speed=speed)
            if training.step % _KEEP_EVERY_STEPS == 0:
                log.flush()
                training.keep()
    model = training.model.bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)  # type: ignore[no-untyped-call]  # theirs
    model.save_pretrained(folder)
    kept.unlink(missing_ok=True)


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    Muon is of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    inner = {name for name, each in model.named_parameters() if each.ndim == _MATRIX and "embed" not in name}
    matrices = [each for name, each in model.named_parameters() if name in inner]
    others = [each for name, each in model.named_parameters() if name not in inner]
    optimizers = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.05),
        torch.optim.AdamW(others, lr=RATE * _ADAM_SHARE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,} tokens/s"),
        TimeRemainingColumn(),
    )


def main() -> None:
    """Train the base into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("starter/hocket-starter"))
    parser.add_argument("--work", type=Path, default=Path("build/starter"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    pretrain(arguments.folder, arguments.work, steps=arguments.steps)


if __name__ == "__main__":
    main()
