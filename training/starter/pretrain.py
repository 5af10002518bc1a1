"""Train the starter base from nothing: `python -m training.starter.pretrain`.

A Qwen3 of about five million parameters, with tied embeddings, so that everything that serves Qwen3 serves it. Each step reads a
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
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from training.starter.corpus import texts
from training.starter.tokenizer import CONTEXT, SPECIALS, VOCABULARY, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

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
"""The base's size: a quarter of its weights are attention, two thirds the MLPs, the rest words."""
SEED: Final = 6
STEPS: Final = 2_000
ROWS: Final = 12
"""Texts of CONTEXT tokens in a step."""
RATE: Final = 0.02
"""Peak learning rate of the matrices (Muon); embeddings and norms take a fraction of it (AdamW)."""
_ADAM_SHARE: Final = 0.15
_WARM_UP: Final = 100
_TOKENIZER_TEXTS: Final = 40_000
_KEEP_EVERY: Final = 200


def batch(tokenizer: Tokenizer, step: int) -> torch.Tensor:
    """The tokens of a step: int64 [ROWS, CONTEXT], documents one after the other."""
    needed = ROWS * CONTEXT
    ids: list[int] = []
    for text in texts(Random(f"{SEED}:{step}")):  # noqa: S311  # reproducible, not secret
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(ROWS, CONTEXT)
    raise AssertionError  # texts never end


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate at a step: a linear warm-up, level, then a linear fall to zero over the last 40 %."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    return min(1.0, (steps - step) / (0.4 * steps))


def pretrain(folder: Path, work: Path, *, steps: int = STEPS) -> None:
    """Train, and write a Hugging Face folder of bfloat16 weights.

    Args:
        folder: Where the base is written.
        work: Where a stopped run goes on from.
        steps: Of ROWS x CONTEXT tokens each.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, islice(texts(Random(SEED)), _TOKENIZER_TEXTS))  # noqa: S311  # reproducible, not secret
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    optimizers = _optimizers(model)
    begin, kept = 0, work / "base.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        begin = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, each in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(each)
    with (work / "base-losses.jsonl").open("a") as log, _bar() as progress:
        task = progress.add_task("base", total=steps, completed=begin, loss=math.nan, speed=0)
        for step in range(begin, steps):
            started = time.perf_counter()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate_at(step, steps)
            ids = batch(tokenizer, step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            speed = ids.numel() / (time.perf_counter() - started)
            log.write(json.dumps({"step": step, "loss": round(loss.item(), 4), "tokens_per_second": round(speed)}) + "\n")
            log.flush()
            progress.update(task, advance=1, loss=loss.item(), speed=speed)
            if (step + 1) % _KEEP_EVERY == 0 and step + 1 < steps:
                _keep(kept, step + 1, model, optimizers)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    kept.unlink(missing_ok=True)


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) needs about two thirds of the tokens here.
    """
    matrices = [each for name, each in model.named_parameters() if each.ndim == 2 and "embed" not in name]  # noqa: PLR2004
    others = [each for name, each in model.named_parameters() if each.ndim != 2 or "embed" in name]  # noqa: PLR2004
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=RATE * _ADAM_SHARE, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def _keep(path: Path, step: int, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write a checkpoint whole, or not at all."""
    parts = {"step": step, "model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers]}
    torch.save(parts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )


def main() -> None:
    """Train the base into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("starter/base"))
    parser.add_argument("--work", type=Path, default=Path("build/starter"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    pretrain(arguments.folder, arguments.work, steps=arguments.steps)


if __name__ == "__main__":
    main()
