"""The whole engine over a tiny base, somebody who watches its every pass, and random experts for it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.identity import digest_of
from hocket.packages.expert.reader import decode
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.engine import Engine
from services.expert_worker.engine.folding import fold
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.pages import SCRATCH_PAGES, KvPool, Pages
from services.expert_worker.engine.sampling import Sampling, noise
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.engine.sequence import Delta, Finished, Started, TextRequest
from tests.adapters import arena_of
from tests.bases import HIDDEN, LAYERS, VOCABULARY
from tests.experts import expert_package, module_path
from tests.passes import ids_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from torch import Tensor

    from services.expert_worker.engine.answer import Answer
    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.constraints import Matcher
    from services.expert_worker.engine.expert import AdapterExpert, Mixture
    from services.expert_worker.engine.part import Part

NAME: Final = "tiny"
"""Of the base that random experts say they are for: its folder's."""
TOKEN_COUNT: Final = 367
"""Ids of the tiny base that have a token; those after them are never chosen."""
SECONDS: Final = 30.0
HEAD: Final = "lm_head"
_ROUNDING: Final = 1e-5
_SHAPES: Final = {  # (in, out), of `tests.bases.tiny_base`
    "q_proj": (HIDDEN, 64),
    "k_proj": (HIDDEN, 32),
    "v_proj": (HIDDEN, 32),
    "o_proj": (64, HIDDEN),
    "gate_proj": (HIDDEN, 96),
    "up_proj": (HIDDEN, 96),
    "down_proj": (96, HIDDEN),
    HEAD: (HIDDEN, VOCABULARY),
}


def prompt_ids(count: int, seed: int = 0) -> list[int]:
    """Tokens of a prompt."""
    return [token_id % TOKEN_COUNT for token_id in ids_of(count, seed)]


def random_package(
    kind: str = "lora",
    modules: Sequence[str] = ("q_proj", "v_proj", "down_proj"),
    *,
    rank: int = 4,
    seed: int = 0,
    name: str = "expert-x",
    version: str = "1.0.0",
) -> bytes:
    """A package for the tiny base: lora, rslora, dora, ia3 (`down_proj` feeds forward) or soft_prompt (`rank` rows).

    What it adds is of the size of the base's own numbers, so that it changes answers and does not drown them.
    """
    random = np.random.default_rng(seed)

    def numbers(*shape: int, around: float = 0.0, spread: float = 0.15) -> Any:
        return (around + spread * random.standard_normal(shape)).astype(np.float32)

    tensors: dict[str, Any] = {}
    paths = [(m, module_path(layer, m)) for m in modules if m != HEAD for layer in range(LAYERS)]
    paths += [(HEAD, f"base_model.model.{HEAD}")] if HEAD in modules else []
    if kind == "soft_prompt":
        paths, tensors = [], {"prompt_embeddings": numbers(rank, HIDDEN)}
    for module, path in paths:
        inputs, outputs = _SHAPES[module]
        if kind == "ia3":
            shape = (1, inputs) if module == "down_proj" else (outputs, 1)
            tensors[f"{path}.ia3_l"] = numbers(*shape, around=1.0, spread=0.4)
            continue
        tensors[f"{path}.lora_A.weight"] = numbers(rank, inputs)
        tensors[f"{path}.lora_B.weight"] = numbers(outputs, rank)
        if kind == "dora":
            tensors[f"{path}.lora_magnitude_vector"] = np.abs(numbers(outputs, around=1.2, spread=0.3))
    config: dict[str, Any] = {} if kind == "soft_prompt" else {"target_modules": list(modules)}
    if kind == "ia3":
        config["feedforward_modules"] = ["down_proj"]
    elif kind == "rslora":
        config["use_rslora"] = True
    return expert_package(
        name,
        version,
        "lora" if kind == "rslora" else kind,
        rank=rank,
        base=NAME,
        modules=tuple(modules),
        tensors=tensors,
        config=config,
    )


def expert_of(package: bytes, base: Base, *, int8: bool = False) -> AdapterExpert:
    """What a worker makes of a package."""
    facts, adapter = decode(package, digest_of(package))
    folded = fold(adapter, facts, base, int8=int8)
    return folded.build(folded.flat.clone())


def asking(
    token_ids: Sequence[int],
    mixture: Mixture = (),
    *,
    max_tokens: int = 12,
    stops: Sequence[str] = (),
    eos_ids: frozenset[int] = frozenset(),
    matcher: Matcher | None = None,
    **sampling: Any,
) -> TextRequest:
    """A request; greedy unless it says otherwise."""
    chosen = Sampling(**{"temperature": 0.0, **sampling})
    return TextRequest(tuple(token_ids), mixture, chosen, tuple(stops), max_tokens, eos_ids, matcher)


@dataclass
class Told:
    """What an answer has told so far.

    Attributes:
        ids: Its tokens.
        logprobs: Of each.
        tops: The most probable tokens at each place, as far as they were asked for.
        text: All of it.
        finish: How it ended; None for one that has not.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list, repr=False)
    text: str = ""
    finish: Finished | None = None

    def take(self, event: Started | Delta | Finished) -> None:
        if isinstance(event, Delta):
            self.text += event.text
            self.ids += [choice.token_id for choice in event.choices]
            self.logprobs += [choice.logprob for choice in event.choices]
            self.tops += [choice.top for choice in event.choices]
        elif isinstance(event, Finished):
            self.finish = event


def first_difference(request: TextRequest, ids: Sequence[int], alone: Told) -> int | None:
    """The first token of an answer that is not the one of the same request alone; None if there is none.

    Where rounding alone decides on a token, both are right, and what comes after them cannot be compared. Requests are
    greedy or have a top_k below 20, with `top_logprobs` 20 and no penalties, so that what is drawn from is known.
    """
    for place, (mine, wanted) in enumerate(zip(ids, alone.ids, strict=False)):
        if mine != wanted:
            position = len(request.token_ids) + place
            return None if _is_undecided(alone.tops[place], request.sampling, position) else place
    return None


def _is_undecided(top: Sequence[tuple[int, float]], sampling: Sampling, position: int) -> bool:
    """Whether the draw, or what takes part in it, lies within rounding of another outcome."""
    count = sampling.top_k if sampling.temperature else 1
    logprobs = [logprob for _, logprob in top]
    if logprobs[count - 1] - logprobs[count] < _ROUNDING:
        return True
    if not sampling.temperature:
        return False
    weights = np.exp(np.array([logprob for _, logprob in sorted(top[:count])]) / sampling.temperature)
    borders = weights.cumsum() / weights.sum()
    return bool(np.abs(borders - noise(sampling.seed, position)).min() < _ROUNDING)


class WatchedArena(Arena):
    """Remembers which experts were copied into it, in order."""

    copied: list[str]

    def _copy_in(self, expert: AdapterExpert, seat: Any) -> None:
        self.copied.append(expert.digest)
        super()._copy_in(expert, seat)


@dataclass
class Watch:
    """Computes passes, and holds each against what the engine promises.

    What is wrong is remembered: raised in the engine's thread, it would only end a request.

    Attributes:
        passes: Rows of each part of each pass.
        wrong: What was.
    """

    runner: Any
    arena: WatchedArena
    page_count: int
    page_positions: int
    limits: EngineLimits
    passes: list[list[int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def run(self, parts: list[Part]) -> Tensor:
        rows = [part.row_count for part in parts]
        self.passes.append(rows)
        pages = [page for part in parts for page in part.pages]
        written = [
            part.pages[position // self.page_positions]
            for part in parts
            for position in {*range(part.start, part.start + part.row_count, self.page_positions)}
            | {part.start + part.row_count - 1}
        ]
        self._expect("rows of a step", sum(rows) <= self.limits.step_tokens and min(rows) > 0)
        self._expect("sequences of a step", len(parts) <= self.limits.sequences_max)
        self._expect("pages that nobody else reads", all(pages.count(page) == 1 for page in written))
        self._expect("pages that exist", {*pages} <= {*range(SCRATCH_PAGES, SCRATCH_PAGES + self.page_count)})
        for part in parts:
            room = len(part.pages) * self.page_positions
            self._expect("rows within their pages", part.start + part.row_count <= room)
        logits: Tensor = self.runner.run(parts)
        arena = self.arena
        self._expect("the arena's budget", 0 <= arena.used_bytes <= arena.slab.size_bytes + arena.size_bytes)
        return logits

    def _expect(self, what: str, holds: bool) -> None:  # noqa: FBT001 - it is all that there is to say
        if not holds:
            self.wrong.append(f"pass {len(self.passes)}: {what}")


@dataclass
class Lab:
    """A running engine and what it is made of."""

    base: Base
    engine: Engine
    pages: Pages
    arena: WatchedArena
    watch: Watch
    held: int = 0
    """Requests whose experts the engine has not let go of."""

    def submit(self, request: TextRequest) -> Answer:
        answer = self.engine.submit(request, self._done)
        self.held += 1
        return answer

    def _done(self) -> None:
        self.held -= 1

    async def ask(self, request: TextRequest) -> Told:
        """An answer to its end."""
        told = Told()
        async with asyncio.timeout(SECONDS):
            async for event in self.submit(request):
                told.take(event)
        return told

    async def ask_all(self, requests: Sequence[TextRequest]) -> list[Told]:
        """Answers to requests that are there at the same time."""
        return await asyncio.gather(*(self.ask(request) for request in requests))

    async def idle(self) -> None:
        """Return when nothing is held any more; fail if something stays, or anything has been wrong."""
        async with asyncio.timeout(SECONDS):
            while self.held:  # noqa: ASYNC110 - it happens in another thread
                await asyncio.sleep(0.001)
        state = self.engine.state
        assert (state.running_count, state.waiting_count, state.counts.used_page_count) == (0, 0, 0)
        assert self.pages.free_count + state.counts.cached_page_count == self.pages.count
        assert self.watch.wrong == []


LIMITS: Final = EngineLimits(step_tokens=64, sequences_max=16, queue_max=100)


@asynccontextmanager
async def whole_engine(
    base: Base,
    *,
    page_positions: int = 16,
    page_count: int = 512,
    arena_rows: int = 256,
    shared: bool = False,
    limits: EngineLimits = LIMITS,
    kv_dtype: Any = None,
    record: Any = None,
    **mixing: Any,
) -> AsyncIterator[Lab]:
    """An engine over a base, that no other engine may use meanwhile. Nothing may be left when the block ends well.

    Pages and rows of the arena are apart, or `shared`: one memory for both that is as large. `record` records steps.
    """
    from services.expert_worker.engine.graphs import Graphs  # noqa: PLC0415 - imports transformers
    from services.expert_worker.engine.runner import Runner  # noqa: PLC0415 - imports transformers

    page_bytes = page_positions * base.kv_shape.position_bytes(kv_dtype or base.dtype) // base.kv_shape.layers
    arena = arena_of(
        base,
        arena_rows,
        kind=WatchedArena,
        pages_bytes=(SCRATCH_PAGES + page_count) * page_bytes if shared else 0,
        page_bytes=page_bytes if shared else 0,
    )
    assert isinstance(arena, WatchedArena)
    slab = arena.slab if shared else None
    page_count = page_count if slab is None else slab.page_count - SCRATCH_PAGES
    arena.copied = []
    mixer = Mixer(base.causal_lm, base.projections, arena, **mixing)
    pool = KvPool(
        base.kv_shape,
        page_count=SCRATCH_PAGES + page_count,
        page_positions=page_positions,
        dtype=base.dtype,
        device=base.device,
        stored_as=kv_dtype,
        slab=slab,
    )
    pages = Pages(SCRATCH_PAGES + page_count, slab)
    graphs = record and Graphs(base, pool, mixer, rows_max=limits.sequences_max, record=record, compute_first=1)
    watch = Watch(Runner(base, pool, mixer, graphs), arena, page_count, page_positions, limits)
    engine = Engine(
        watch,
        pages,
        page_positions=page_positions,
        context_length=base.context_length,
        room=arena,
        tokenizer=base.tokenizer,
        limits=limits,
    )
    lab = Lab(base, engine, pages, arena, watch)
    engine.start()
    try:
        yield lab
        await lab.idle()
    finally:
        await engine.stop()
        arena.close()
        for name, linear in base.projections.items():  # as they were: another mixer may come
            parent, _, child = name.rpartition(".")
            setattr(base.causal_lm.get_submodule(parent), child, linear)


def opened(folder: Any, **serving: Any) -> Base:
    """The base in a folder, on the CPU."""
    import torch  # noqa: PLC0415 - beside its only use

    from services.expert_worker.engine.base import Serving, open_base  # noqa: PLC0415 - imports transformers

    return open_base(folder, expected_digest=None, device=torch.device("cpu"), serving=Serving(**serving))
