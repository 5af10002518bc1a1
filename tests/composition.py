"""What composing experts has to come to on any device: the same checks for a CPU and for CUDA.

Each holds a device against a CPU, in float32 or wider; what it computes there in another dtype may differ by a
tolerance, as a share of the largest number or of the norm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from hocket.errors import HocketError, Reason
from services.expert_worker.engine.folding import fold
from services.expert_worker.engine.mixing import Method, Mixer
from services.expert_worker.engine.pages import default_page_positions
from services.expert_worker.engine.products import expand_into, read_as_they_are, shrink
from services.expert_worker.engine.sampling import Choice, Sampling, SamplingRow, choose
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.loader import Prepared, place, prepare
from services.expert_worker.parameters import move
from tests.adapters import (
    HEAD,
    KINDS,
    SHAPES,
    Known,
    ToyBase,
    arena_of,
    assert_close,
    dense,
    tensors_for,
    toy_package,
)
from tests.engines import asking, prompt_ids, random_package, whole_engine
from tests.passes import Passes, ids_of, part
from tests.recordings import Twins
from tests.worker_numerics import opened as opened_package

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import AdapterExpert, Mixture
    from services.expert_worker.engine.graphs import Record
    from tests.engines import Told

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Most that what is computed in a dtype may differ. Roundings of bfloat16, one in 256, add up over the layers."""
LOGPROB_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Most that logarithms of probabilities may."""
METHODS: Final = (*Method, None)
_CPU: Final = torch.device("cpu")
_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TOKENS: Final = 16


# --- mixing and folding, on a toy


def toy_base(device: torch.device, dtype: torch.dtype) -> ToyBase:
    """A toy on a device."""
    base = ToyBase(dtype)
    base.causal_lm.to(device)
    return base


def toy_expert(
    base: ToyBase, device: torch.device, kind: str, modules: Sequence[str], *, rank: int, seed: int
) -> Known:
    """An expert folded against the weights on the device, and placed there as a worker does."""
    tensors = tensors_for(kind, modules, rank=rank, seed=seed)
    facts, adapter = toy_package(kind, modules, rank=rank, seed=seed, tensors=tensors)
    folded = fold(adapter, facts, base)
    (expert,) = place(Prepared(facts.digest, (folded.flat,), lambda moved: (folded.build(moved[0]),)), device)
    return Known(expert, kind, 2.0 * rank, tensors)  # type: ignore[arg-type]  # an adapter's


def assert_batches_compose(device: torch.device, dtype: torch.dtype, method: Method | None) -> None:
    """Requests with up to ten experts of every kind are those of a base into which theirs have been merged."""
    base = toy_base(device, dtype)
    places: list[list[str]] = [list(SHAPES), ["block.0.up", HEAD], ["block.1.down"]]
    experts = [
        toy_expert(
            base,
            device,
            KINDS[n % 4],
            [module for module in places[n % 3] if KINDS[n % 4] != "ia3" or module != HEAD],
            rank=n % 9 + 1,
            seed=n,
        )
        for n in range(12)
    ]
    mixer = Mixer(base.causal_lm, base.projections, arena_of(base, 200), method=method)
    for seed in range(3):
        random = np.random.default_rng(seed)
        requests = []
        for _ in range(8):
            chosen = random.choice(len(experts), int(random.integers(0, 11)), replace=False)
            mixture = [(experts[n], float(random.uniform(-0.3, 0.6))) for n in chosen]
            requests.append((int(random.integers(1, 20)), mixture))
        counts = [count for count, _ in requests]
        x = torch.randn(sum(counts), 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
        want = torch.cat(
            [dense(base, xs, known) for xs, (_, known) in zip(torch.split(x, counts), requests, strict=True)]
        )
        kept = np.cumsum(counts) - 1
        for rows in (None, kept):
            mixer.begin([(count, tuple((k.expert, w) for k, w in mixture)) for count, mixture in requests], rows)
            there = None if rows is None else torch.from_numpy(rows).to(device)
            found = base.causal_lm(x.to(device)[None], there)[0]
            mixer.end()
            assert found.device == device
            assert_close(found.cpu(), want if rows is None else want[rows], TOLERANCE[dtype])


def assert_folds(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    """An expert folded against weights on a device is that of the same weights on the host, DoRA's lengths included."""
    modules = list(SHAPES)
    here = toy_expert(toy_base(_CPU, dtype), _CPU, kind, modules, rank=5, seed=3).expert
    there = toy_expert(toy_base(device, dtype), device, kind, modules, rank=5, seed=3).expert
    assert {*there.pieces} == {*here.pieces} == {*modules}
    for name, piece in here.pieces.items():
        for part_name in ("u", "o", "a", "b"):
            wanted, found = getattr(piece, part_name), getattr(there.pieces[name], part_name)
            assert (wanted is None) == (found is None)
            if wanted is not None:
                assert found.device == device
                assert found.dtype == wanted.dtype
                torch.testing.assert_close(found.cpu(), wanted, rtol=TOLERANCE[wanted.dtype], atol=1e-6)


# --- adapters of packages, over a whole base


def prepared(package: bytes, base: Base) -> Prepared:
    """A package as a worker prepares it."""
    return prepare(opened_package(package), base)


def placed(package: bytes, base: Base) -> AdapterExpert:
    """A package as a worker loads it."""
    (expert,) = place(prepared(package, base), base.device)
    return expert  # type: ignore[return-value]  # an adapter's


def packages() -> list[bytes]:
    """Experts of every kind."""
    kinds = ("lora", "dora", "ia3", "rslora")
    made = [
        random_package(kind, _PROJECTIONS[n:] if kind == "ia3" else (*_PROJECTIONS, "lm_head"), rank=4 + n, seed=n)
        for n, kind in enumerate(kinds)
    ]
    return [*made, random_package("soft_prompt", rank=3, seed=9)]


def mixtures(experts: Sequence[AdapterExpert]) -> list[Mixture]:
    """For requests of one batch: none, each kind alone, some together, all of them."""
    alone = [((expert, 1.0),) for expert in experts]
    return [(), *alone, ((experts[0], 0.6), (experts[1], 0.4)), tuple((expert, 0.3) for expert in experts)]


def opened(folder: Path, device: torch.device, dtype: torch.dtype) -> Base:
    """The base in a folder, on a device."""
    from services.expert_worker.engine.base import Serving, open_base  # noqa: PLC0415 - imports transformers

    return open_base(folder, expected_digest=None, device=device, serving=Serving(dtype=dtype))


def composed_logits(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Logits of a batch with every mixture, on the host: of prompts in two chunks, and of a token after that."""
    base = opened(folder, device, dtype)
    experts = [placed(each, base) for each in packages()]
    passes = Passes(
        base, default_page_positions(device), mixer=Mixer(base.causal_lm, base.projections, arena_of(base, 200))
    )
    some = [mixture for mixture in mixtures(experts) if all(expert.prompt is None for expert, _ in mixture)]
    soft = experts[-1]
    assert soft.prompt is not None
    tables = [passes.take(40) for _ in range(len(some) + 1)]
    found = []
    for start, count in ((0, 9), (9, 20), (29, 1)):
        parts = [
            part(start, ids_of(40, n)[start : start + count], tables[n], mixture=mixture)
            for n, mixture in enumerate(some)
        ]
        rows = len(soft.prompt)
        more: dict[str, Any] = {"mixture": ((soft, 1.0), (experts[0], 0.5))}
        if start == 0:
            more["embeddings"] = soft.prompt
        parts.append(part(start + (rows if start else 0), ids_of(40)[start : start + count], tables[-1], **more))
        found.append(passes.run(parts).cpu())
    return torch.cat(found)


def assert_logits_compose(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Logits of composed experts are those of a CPU in float32."""
    wanted = composed_logits(folder, _CPU, torch.float32)
    found = composed_logits(folder, device, dtype)
    assert float((found - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


def assert_recorded_steps(folder: Path, device: torch.device, dtype: torch.dtype, record: Record) -> None:
    """Steps that are recorded and played are those that are computed as they come, while experts come and go."""
    base = opened(folder, device, dtype)
    experts = [placed(each, base) for each in packages()[:-1]]
    twins = Twins(
        base,
        arena=arena_of(base, 64),
        record=record,
        tolerance=TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]),
        page_positions=default_page_positions(device),
    )
    mixed: list[Mixture] = [(), *[((expert, 1.0),) for expert in experts], tuple((expert, 0.3) for expert in experts)]
    for number, mixture in enumerate(mixed):
        twins.prompt(number, mixture)
    for at in (20, 21):
        for count in (1, 2, 3, len(mixed)):
            twins.step(*((number, at, mixture) for number, mixture in enumerate(mixed[:count])))
            twins.step(*((number, at, mixed[count - number - 1]) for number in range(count)))
    twins.close()


def assert_steps_do_not_wait(folder: Path, device: torch.device, dtype: torch.dtype, record: Record) -> None:
    """Prompts and steps, recorded and not, are computed on CUDA without waiting for it."""
    base = opened(folder, device, dtype)
    *experts, soft = (placed(each, base) for each in packages())
    mixture: Mixture = tuple((expert, 0.5) for expert in experts)
    arena = arena_of(base, 64)
    twins = Twins(base, arena=arena, record=record, page_positions=default_page_positions(device))
    tables = [twins.passes.take(40) for _ in range(2)]
    assert soft.prompt is not None
    rows = len(soft.prompt)
    prompts = [
        part(0, ids_of(20), tables[0], mixture=mixture),
        part(0, ids_of(20 - rows), tables[1], mixture=((soft, 1.0), *mixture), embeddings=soft.prompt),
    ]
    steps = [part(20, ids_of(1), table, mixture=mixture) for table in tables]
    for run, parts in ((twins.passes.run, prompts), (twins.passes.run, steps), (twins.recorded, steps)):
        run(parts)  # experts come, steps are recorded, libraries set themselves up
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    twins.close()


def assert_places(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """What a worker has placed is what it has prepared, byte by byte; adapter experts wait in host memory."""
    base = opened(folder, device, dtype)
    for package in packages():
        ready = prepared(package, base)
        (flat,) = move(ready.tensors, torch.device("cpu"))
        (there,) = place(Prepared(ready.digest, ready.tensors, tuple), device)  # type: ignore[arg-type]  # the tensors
        assert isinstance(there, torch.Tensor)
        assert there.device == device
        assert torch.equal(there.cpu(), flat)
        expert = placed(package, base)
        assert expert.size_bytes == ready.size_bytes == flat.nbytes
        tensors = [tensor for piece in expert.pieces.values() for tensor in (piece.u, piece.o, piece.a, piece.b)]
        every = [tensor for tensor in (*tensors, expert.prompt) if tensor is not None]
        assert {tensor.device for tensor in every} == {_CPU}
        assert all(tensor.is_pinned() == (device.type == "cuda") for tensor in every)


# --- sampling


def assert_chooses(device: torch.device) -> None:
    """Tokens chosen on a device are those chosen on the host: greedy, drawn, with limits and penalties."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0, "top_logprobs": 5},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8, "top_logprobs": 3},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0.0, "presence_penalty": 2.0, "frequency_penalty": 0.5},
    ]
    rows = [
        SamplingRow(Sampling(**each, seed=seed), prompt_ids(9), prompt_ids(seed, 3))
        for seed in range(1, 12)
        for each in settings
    ]
    logits = 3 * torch.randn(len(rows), 900, generator=torch.Generator().manual_seed(1))
    logits[:, 5] = logits[:, 7] = logits.amax(-1)  # of equals the lowest id
    here, there = choose(logits, rows, 880), choose(logits.to(device), rows, 880)
    for wanted, found in zip(here, there, strict=True):
        assert isinstance(wanted, Choice)
        assert isinstance(found, Choice)
        assert found.token_id == wanted.token_id
        assert math.isclose(found.logprob, wanted.logprob, abs_tol=1e-5)
        assert [token_id for token_id, _ in found.top] == [token_id for token_id, _ in wanted.top]
    logits[3, 3], logits[4, 4] = math.nan, math.inf
    for index, found in enumerate(choose(logits.to(device), rows, 880)):
        assert isinstance(found, HocketError) == (index in {3, 4})
        assert not isinstance(found, HocketError) or found.reason is Reason.BAD_ANSWER


def assert_products(device: torch.device) -> None:
    """Products with rows of experts, in bfloat16, are those of their numbers, but for how the last one is rounded."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(5, 64, generator=random).bfloat16()
    middle = torch.randn(5, 24, generator=random).bfloat16()  # nothing is lost of it where it is rounded
    rows = torch.randn(3, 24, 128, generator=random).bfloat16()
    stack = rows[:, :, 32:96].to(device)
    found = shrink(x.to(device), stack).cpu().double()
    torch.testing.assert_close(found, x.double() @ stack.cpu().double().mT, rtol=1e-5, atol=1e-5)
    y = torch.randn(5, 128, generator=random)
    wanted = y + middle.double() @ rows[0].double()
    sums = y.clone().to(device)
    expand_into(sums, middle.float().to(device), rows[0].to(device))
    torch.testing.assert_close(sums.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    if read_as_they_are(stack):
        sums = y.bfloat16().to(device)
        expand_into(sums, middle.to(device), rows[0].to(device))
        torch.testing.assert_close(sums.cpu().double(), wanted, rtol=2**-7, atol=2**-7)


# --- the whole engine


async def answers(folder: Path, device: torch.device, dtype: torch.dtype, record: Record | None = None) -> list[Told]:
    """Of requests with every mixture, in one batch and in chunks, half of them drawn."""
    base = opened(folder, device, dtype)
    experts = [placed(package, base) for package in packages()]
    requests = [
        asking(prompt_ids(5 + 5 * n, n), mixture, max_tokens=_TOKENS, temperature=n % 2 * 0.8, seed=n)
        for n, mixture in enumerate(mixtures(experts))
    ]
    limits = EngineLimits(step_tokens=40, sequences_max=16, queue_max=100)
    positions = default_page_positions(device)
    async with whole_engine(base, page_positions=positions, page_count=32, limits=limits, record=record) as lab:
        await lab.ask(requests[-1])  # which brings every expert
        told = await lab.ask_all(requests)
        assert max(map(len, lab.watch.passes)) == len(requests)
    return told


async def assert_engine_answers(
    folder: Path, device: torch.device, dtype: torch.dtype, record: Record | None = None
) -> None:
    """A device's texts are a CPU's: token by token in float32, and as probable at first in others."""
    wanted, found = await answers(folder, _CPU, torch.float32), await answers(folder, device, dtype, record)
    for there, here in zip(found, wanted, strict=True):
        assert len(there.ids) == _TOKENS
        assert there.finish is not None
        if dtype is torch.float32:
            assert there.ids == here.ids
            np.testing.assert_allclose(there.logprobs, here.logprobs, atol=LOGPROB_TOLERANCE[dtype])
    greedy = slice(None, None, 2)
    np.testing.assert_allclose(
        [told.logprobs[0] for told in found[greedy]],
        [told.logprobs[0] for told in wanted[greedy]],
        atol=LOGPROB_TOLERANCE[dtype],
    )
