"""The text engine beside transformers and PEFT: tokens per second, and the first token.

Both sides compute the same prompts on the same random weights in the same process, one after the other, with as many
threads and in the same dtype.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.answers import Text, answer_all, first_seconds_of, seconds_of
from benchmarks.rig import RANK, STEP_TOKENS, TARGETS, arena_for, experts_of, measure_shapes, running

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.rig import Measured, Rig, Row
    from services.expert_worker.engine.arena import Arena
    from services.expert_worker.engine.engine import Engine
    from services.expert_worker.engine.expert import AdapterExpert

_BATCH: Final = 16
_PAGE_POSITIONS: Final = 64
"""Of transformers' own pages."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        prompt_tokens: Of each answer of a batch.
        new_tokens: Of each answer of a batch.
        long_tokens: Of the prompt whose first token is waited for.
    """

    prompt_tokens: int
    new_tokens: int
    long_tokens: int


def _greedy(**settings: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, **settings)  # type: ignore[no-untyped-call]  # theirs


def _generate(model: Any, texts: Sequence[Text], **more: Any) -> None:
    """All of them in one padded batch; they are equally long."""
    ids = torch.tensor([text.token_ids for text in texts], device=model.device)
    new_tokens = texts[0].new_tokens
    config = _greedy(max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **more)
    if out.shape[1] != ids.shape[1] + new_tokens:
        raise RuntimeError("an answer is too short")


def _generate_batch(model: Any, texts: Sequence[Text]) -> None:
    """Continuous batching as transformers does it."""
    longest = len(texts[0].token_ids) + texts[0].new_tokens
    pages = 8 + len(texts) * (1 + longest // _PAGE_POSITIONS)
    found = model.generate_batch(
        inputs=[list(text.token_ids) for text in texts],
        generation_config=_greedy(max_new_tokens=texts[0].new_tokens, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=_PAGE_POSITIONS, num_blocks=pages, max_batch_tokens=STEP_TOKENS
        ),
    )
    if any(len(one.generated_tokens) != texts[0].new_tokens for one in found.values()):
        raise RuntimeError("an answer is too short")


async def _beside(
    rig: Rig, engine: Engine, work: str, texts: Callable[[], list[Text]], others: Mapping[str, Callable[..., None]]
) -> list[Row]:
    """Rows of one piece of work, by the engine and by others in turns; the last of these is what all compare with.

    Args:
        rig: Where.
        engine: Hocket's.
        work: What it is called.
        texts: New ones for each round: nothing is found again.
        others: What computes them, by name.
    """
    times: dict[str, list[float]] = {side: [] for side in ("Hocket", *others)}
    firsts: list[float] = []
    tokens = 0
    for _ in range(rig.rounds + 1):  # the first round warms
        asked = texts()
        tokens = sum(text.new_tokens for text in asked)
        answered = await answer_all(engine, asked)
        times["Hocket"].append(seconds_of(answered))
        firsts.append(first_seconds_of(answered))
        for side, run in others.items():
            times[side].append(await asyncio.to_thread(rig.seconds, partial(run, asked)))
    middle = {side: statistics.median(each[1:]) for side, each in times.items()}
    reference = list(others)[-1]
    return [
        {
            "work": work, "side": side, "tokens/s": tokens / seconds,
            "first token ms": 1e3 * statistics.median(firsts[1:]) if side == "Hocket" else float("nan"),
            "seconds": seconds, "x the last of these": seconds / middle[reference],
        }
        for side, seconds in middle.items()
    ]  # fmt: skip


async def _beside_transformers(rig: Rig, model: Any, plan: Plan) -> list[Row]:
    """The base alone, by an engine that knows of no experts."""
    sides = {
        "transformers generate": partial(_generate, model),
        "transformers generate_batch": partial(_generate_batch, model),
    }
    positions = 2 * (_BATCH * (plan.prompt_tokens + plan.new_tokens + rig.page_positions) + plan.long_tokens)
    async with running(rig.base, None, threads=rig.threads, positions=positions) as engine:
        rows = await _beside(
            rig,
            engine,
            f"{_BATCH} answers of {plan.new_tokens} tokens",
            lambda: [Text(rig.prompt(plan.prompt_tokens), (), plan.new_tokens) for _ in range(_BATCH)],
            sides,
        )
        return rows + await _beside(
            rig,
            engine,
            f"first token after {plan.long_tokens}",
            lambda: [Text(rig.prompt(plan.long_tokens), (), 1)],
            sides,
        )


async def _beside_peft(rig: Rig, model: Any, arena: Arena, experts: Sequence[AdapterExpert], plan: Plan) -> list[Row]:
    """A batch in which everybody has an adapter of their own."""
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM", inference_mode=True
    )
    peft: Any = get_peft_model(model, config, adapter_name="first")
    names = [f"e{place}" for place in range(len(experts))]
    for place, name in enumerate(names):
        peft.load_adapter(str(rig.folder / f"expert-{place}"), adapter_name=name, torch_device=str(rig.device))
    peft.to(rig.base.dtype).eval()  # adapters too, which PEFT keeps in float32 otherwise

    def one_by_one(texts: Sequence[Text]) -> None:
        for name, text in zip(names, texts, strict=True):
            peft.set_adapter(name)
            _generate(peft, [text])

    positions = 2 * len(experts) * (plan.prompt_tokens + plan.new_tokens + rig.page_positions)
    async with running(rig.base, arena, threads=rig.threads, positions=positions) as engine:
        return await _beside(
            rig,
            engine,
            f"{len(experts)} adapters, one each",
            lambda: [Text(rig.prompt(plan.prompt_tokens), ((expert, 1.0),), plan.new_tokens) for expert in experts],
            {
                "PEFT, one after the other": one_by_one,
                "PEFT, mixed batch": lambda texts: _generate(peft, texts, adapter_names=names),
            },
        )


def plan_of(rig: Rig) -> Plan:
    """What there is time for."""
    if rig.is_quick:
        return Plan(prompt_tokens=32, new_tokens=64, long_tokens=512)
    return Plan(prompt_tokens=16, new_tokens=8, long_tokens=256)


async def measure(rig: Rig, plan: Plan | None = None) -> Measured:
    """One shape."""
    plan = plan or plan_of(rig)
    path = rig.folder / f"base-{rig.shape}"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=rig.base.dtype, attn_implementation="sdpa")
    model = model.to(rig.device).eval()
    rows = await _beside_transformers(rig, model, plan)
    experts = experts_of(rig, _BATCH)
    rows += await _beside_peft(rig, model, arena_for(rig.base, _BATCH), experts, plan)
    by_work: dict[str, dict[str, float]] = {}
    for row in rows:
        by_work.setdefault(row["work"], {})[row["side"]] = row["seconds"]
    batch, _, adapters = by_work.values()
    return rows, {
        "base alone": f"{batch['transformers generate_batch'] / batch['Hocket']:.2f} x the tokens per second of "
        "generate_batch; budget: at least 1 (GPU)",
        "adapters": f"{adapters['PEFT, mixed batch'] / adapters['Hocket']:.2f} x those of PEFT's mixed batch; "
        "budget: at least 4 (GPU)",
    }


if __name__ == "__main__":
    asyncio.run(measure_shapes(__doc__, "engine", measure))
