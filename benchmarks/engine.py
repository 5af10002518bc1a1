"""The text engine beside transformers and PEFT: tokens per second, first token, the price of experts, loading them.

Both sides compute the same prompts on the same random weights in the same process, one after the other, with as many
threads. `--shape qwen3-0.6b` has the sizes of that model; `small` shows what does not shrink with the model.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import statistics
import tempfile
import time
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import transformers
import zstandard
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.report import command_line, record
from examples.text.random_base import write_base
from hocket.bases import BaseModel
from hocket.packages import Policy, TrustRoots, open_package
from hocket.packages.adapter import Adapter, AdapterConfig, AdapterFacts, AdapterKind
from hocket.packages.expert.writer import draft_manifest, gather, pretty, write_archive
from services.expert_worker.device import compute_threads
from services.expert_worker.engine.arena import Arena
from services.expert_worker.engine.base import open_base
from services.expert_worker.engine.engine import Engine
from services.expert_worker.engine.folding import fold
from services.expert_worker.engine.layout import RowLayout
from services.expert_worker.engine.mixing import Mixer
from services.expert_worker.engine.pages import KvPool, Pages, default_page_positions
from services.expert_worker.engine.runner import NoMixer, Runner
from services.expert_worker.engine.sampling import Sampling
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.engine.sequence import Delta, TextRequest
from services.expert_worker.engine.slab import ALIGNMENT_BYTES, Slab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from services.expert_worker.engine.base import Base
    from services.expert_worker.engine.expert import AdapterExpert, Mixture

_RANK: Final = 16
_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "small": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
_UNPACK: Final[dict[str, Callable[[bytes], Callable[[], bytes]]]] = {
    "gzip": lambda data: partial(zlib.decompress, zlib.compress(data)),
    "zstd": lambda data: partial(zstandard.ZstdDecompressor().decompress, zstandard.ZstdCompressor().compress(data)),
}
"""The decompression alone of what an archive holds."""
_DISTINCT: Final = 32
_COMPOSED: Final = 10
_MIXED: Final = 16


@dataclass(frozen=True, slots=True)
class _Work:
    """What every side does.

    Args:
        prompts: Token ids, all of one length.
        new_tokens: Of each answer.
    """

    prompts: list[list[int]]
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return len(self.prompts) * self.new_tokens


def _work(count: int, prompt_tokens: int, new_tokens: int, vocabulary: int) -> _Work:
    random = np.random.default_rng(count)
    return _Work(random.integers(3, vocabulary - 300, (count, prompt_tokens)).tolist(), new_tokens)


def _adapter_files(base: Base, folder: Path, seed: int) -> dict[str, bytes]:
    """A LoRA for every projection, as PEFT writes it, in the base's own name and digest."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, linear in base.projections.items():
        if name.rpartition(".")[2] in _TARGETS:
            shapes = {"A": (_RANK, linear.in_features), "B": (linear.out_features, _RANK)}
            for part, shape in shapes.items():
                tensor = random.standard_normal(shape, np.float32) * 0.02
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": _RANK, "bias": "none",
        "target_modules": list(_TARGETS), "base_model_name_or_path": base.model.name,
    }  # fmt: skip
    found = {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
    facts = AdapterConfig(AdapterKind.LORA, rank=_RANK, alpha=_RANK, target_modules=_TARGETS)
    manifest = draft_manifest(
        facts, BaseModel(base.model.name, base.model.digest), name=f"expert-{seed}", version="1.0.0"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return gather(pretty(manifest), found.get, found)


def _opened(data: bytes) -> tuple[Adapter, AdapterFacts]:
    package = open_package(data, trust=TrustRoots(), policy=Policy(allow_unsigned=True), now=datetime.now(UTC))
    if not isinstance(package.model, Adapter) or not isinstance(package.facts, AdapterFacts):
        raise TypeError("not an adapter")
    return package.model, package.facts


def _load(data: bytes, base: Base) -> AdapterExpert:
    """Everything between the bytes of a package and an expert in host memory."""
    folded = fold(*_opened(data), base)
    return folded.build(folded.flat if base.device.type == "cpu" else folded.flat.pin_memory())


@dataclass(frozen=True, slots=True)
class _Experts:
    """Where experts lie, and what composes them."""

    arena: Arena
    mixer: Mixer


def _experts(base: Base, count: int) -> _Experts:
    """Room for so many experts of the benchmark's rank; pages are elsewhere."""
    layout = RowLayout(base.projections, base.dtype)
    layer_bytes = count * _RANK * layout.row_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    slab = Slab(layout.layer_count, layer_bytes, page_bytes=0, row_bytes=layout.row_bytes, device=base.device)
    arena = Arena(layout, slab, outside_rows=_RANK, device=base.device)
    return _Experts(arena, Mixer(base.causal_lm, base.projections, arena))


@asynccontextmanager
async def _engine(base: Base, experts: _Experts, threads: int, *, bare: bool = False) -> AsyncIterator[Engine]:
    positions = default_page_positions(base.device)
    page_count = 1 + 40 * 1024 // positions
    pool = KvPool(base.kv_shape, page_count=page_count, page_positions=positions, dtype=base.dtype, device=base.device)
    engine = Engine(
        Runner(base, pool, NoMixer() if bare else experts.mixer),
        Pages(page_count),
        page_positions=positions,
        context_length=base.context_length,
        room=experts.arena,
        tokenizer=base.tokenizer,
        limits=EngineLimits(step_tokens=512, sequences_max=64, queue_max=256, threads=threads),
    )
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@dataclass(frozen=True, slots=True)
class _Figures:
    """Of one run.

    Args:
        seconds: All of it.
        first_seconds: Until the first token of the first answer.
    """

    seconds: float
    first_seconds: float


async def _answer(engine: Engine, work: _Work, mixtures: Sequence[Mixture]) -> _Figures:
    """All prompts at once; each has its own mixture."""
    begin = time.perf_counter()
    first = [0.0] * len(work.prompts)

    async def one(place: int) -> None:
        request = TextRequest(
            tuple(work.prompts[place]), mixtures[place], Sampling(temperature=0.0), (), work.new_tokens, frozenset()
        )
        count = 0
        async for event in engine.submit(request, lambda: None):
            if isinstance(event, Delta):
                first[place] = first[place] or time.perf_counter() - begin
                count += len(event.choices)
        if count != work.new_tokens:
            raise RuntimeError("an answer is too short")

    await asyncio.gather(*(one(place) for place in range(len(work.prompts))))
    return _Figures(time.perf_counter() - begin, min(first))


def _greedy(**settings: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, **settings)  # type: ignore[no-untyped-call]  # theirs


def _generate(model: Any, work: _Work, prompts: Sequence[Sequence[int]], **more: Any) -> None:
    ids = torch.tensor(prompts, device=model.device)
    config = _greedy(max_new_tokens=work.new_tokens, min_new_tokens=work.new_tokens, pad_token_id=0)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **more)
    if out.shape[1] != len(prompts[0]) + work.new_tokens:
        raise RuntimeError("an answer is too short")


def _generate_batch(model: Any, work: _Work) -> None:
    """Continuous batching as transformers does it."""
    page = 64
    pages = 8 + len(work.prompts) * (1 + (len(work.prompts[0]) + work.new_tokens) // page)
    found = model.generate_batch(
        inputs=work.prompts,
        generation_config=_greedy(max_new_tokens=work.new_tokens, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=512),
    )
    if sum(len(one.generated_tokens) for one in found.values()) != work.tokens:
        raise RuntimeError("an answer is too short")


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    gc.collect()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class _Table:
    """Rows of one shape: each side's median over the rounds, and how it compares with the first of its work."""

    def __init__(self, shape: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._shape = shape

    def add(self, what: str, side: str, tokens: int, seconds: float, first_seconds: float, beside: float) -> None:
        """Add a line; `beside` is the seconds that it is compared with."""
        self.rows.append(
            {
                "shape": self._shape, "work": what, "side": side, "tokens/s": tokens / seconds,
                "first token ms": 1e3 * first_seconds, "seconds": seconds, "x its reference": seconds / beside,
            }
        )  # fmt: skip


async def _serving(
    shape: str, base: Base, room: _Experts, experts: list[AdapterExpert], work: _Work, rounds: int
) -> list[dict[str, Any]]:
    """Engine against engine: what experts cost."""
    sizes: dict[str, list[Mixture]] = {
        "base alone": [()] * len(work.prompts),
        "1 expert for all": [((experts[0], 1.0),)] * len(work.prompts),
        f"{_COMPOSED} experts composed": [tuple((one, 0.1) for one in experts[:_COMPOSED])] * len(work.prompts),
        f"{_DISTINCT} experts, one each": [((experts[n % _DISTINCT], 1.0),) for n in range(len(work.prompts))],
        "a mixture of 1 to 4 each": [
            tuple((experts[(n * 3 + k) % _DISTINCT], 0.5) for k in range(1 + n % 4)) for n in range(len(work.prompts))
        ],
    }
    found: dict[str, list[_Figures]] = {name: [] for name in sizes}
    async with _engine(base, room, torch.get_num_threads()) as engine:
        for _ in range(rounds + 1):  # the first round warms
            for name, mixtures in sizes.items():
                found[name].append(await _answer(engine, work, mixtures))
    table = _Table(shape)
    middle = {name: statistics.median(one.seconds for one in each[1:]) for name, each in found.items()}
    for name, each in found.items():
        first = statistics.median(one.first_seconds for one in each[1:])
        table.add(name, "Hocket", work.tokens, middle[name], first, middle["base alone"])
    return table.rows


async def _beside_transformers(
    shape: str,
    base: Base,
    room: _Experts,
    model: Any,
    works: dict[str, _Work],
    rounds: int,
) -> list[dict[str, Any]]:
    """Base-only traffic, by an engine that cannot compose, by one that can but need not, and by transformers."""
    table = _Table(shape)
    plain = {"transformers generate_batch": lambda work: _generate_batch(model, work)}
    plain["transformers generate"] = lambda work: _generate(model, work, work.prompts)
    for what, work in works.items():
        times: dict[str, list[_Figures]] = {}
        async with _engine(base, room, torch.get_num_threads(), bare=True) as engine:
            for turn in range(rounds + 1):
                found = {"Hocket": await _answer(engine, work, [()] * len(work.prompts))}
                for side, run in plain.items():
                    seconds = await asyncio.to_thread(_timed, partial(run, work), base.device)
                    found[side] = _Figures(seconds, seconds if work.new_tokens == 1 else float("nan"))
                if turn:
                    for side, figures in found.items():
                        times.setdefault(side, []).append(figures)
        reference = statistics.median(one.seconds for one in times["transformers generate_batch"])
        for side, each in times.items():
            seconds = statistics.median(one.seconds for one in each)
            first = statistics.median(one.first_seconds for one in each)
            table.add(what, side, work.tokens, seconds, first, reference)
    return table.rows


async def _beside_peft(
    shape: str, base: Base, room: _Experts, experts: list[AdapterExpert], folders: list[Path], work: _Work,
    model: Any, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A batch in which everybody has an adapter of their own."""
    config = LoraConfig(
        r=_RANK, lora_alpha=_RANK, target_modules=list(_TARGETS), task_type="CAUSAL_LM", inference_mode=True
    )
    peft: Any = get_peft_model(model, config, adapter_name="first")
    names = [f"e{place}" for place in range(len(work.prompts))]
    for name, folder in zip(names, folders, strict=False):
        peft.load_adapter(str(folder), adapter_name=name)
    peft.eval()

    def one_by_one() -> None:
        for name, prompt in zip(names, work.prompts, strict=True):
            peft.set_adapter(name)
            _generate(peft, work, [prompt])

    def mixed() -> None:
        _generate(peft, work, work.prompts, adapter_names=names)

    mine: list[_Figures] = []
    theirs: dict[str, list[float]] = {"PEFT, one after the other": [], "PEFT, mixed batch": []}
    mixtures: list[Mixture] = [((experts[place], 1.0),) for place in range(len(work.prompts))]
    async with _engine(base, room, torch.get_num_threads()) as engine:
        for turn in range(rounds + 1):
            figures = await _answer(engine, work, mixtures)
            if turn:
                mine.append(figures)
            for side, run in zip(theirs, (one_by_one, mixed), strict=True):
                if turn or side.endswith("batch"):
                    theirs[side].append(await asyncio.to_thread(_timed, run, base.device))
    theirs["PEFT, mixed batch"] = theirs["PEFT, mixed batch"][1:]
    table = _Table(shape)
    what = f"{len(work.prompts)} adapters, one each"
    reference = statistics.median(theirs["PEFT, mixed batch"])
    table.add(
        what, "Hocket", work.tokens, statistics.median(one.seconds for one in mine),
        statistics.median(one.first_seconds for one in mine), reference,
    )  # fmt: skip
    for side, seconds in theirs.items():
        table.add(what, side, work.tokens, statistics.median(seconds), float("nan"), reference)
    return table.rows


def _loading(shape: str, base: Base, room: _Experts, files: dict[str, bytes], rounds: int) -> list[dict[str, Any]]:
    """From the bytes of a package to an expert that computes, beside what hashing, inflating and copying alone take."""
    rows: list[dict[str, Any]] = []
    joined = b"".join(files.values())
    for compression, unpack in _UNPACK.items():
        data = write_archive(files, compression=compression)
        cold: dict[str, Callable[[], object]] = {
            "hash and inflate (floor)": partial(_hash_and_inflate, data, unpack(joined)),
            "cold: hash, open, fold, place": partial(_load, data, base),
        }
        rows += _steps(shape, compression, len(joined), cold, rounds, base.device)
    folded = fold(*_opened(write_archive(files)), base)
    flat = folded.flat if base.device.type == "cpu" else folded.flat.pin_memory()
    expert, there = folded.build(flat), torch.empty_like(flat, device=base.device)
    for _ in range(room.arena.slab.row_count // _RANK):  # memory that was never written to takes longer
        room.arena.bring_now([_another(expert)])
    hot: dict[str, Callable[[], object]] = {
        "copy of its tensors (floor)": lambda: there.copy_(flat),
        "hot: from host memory into the arena": lambda: room.arena.bring_now([_another(expert)]),
    }
    return rows + _steps(shape, "-", flat.nbytes, hot, rounds, base.device)


def _another(expert: AdapterExpert) -> AdapterExpert:
    """The same under a digest of its own: one that has not computed lately."""
    return replace(expert, digest=f"{time.perf_counter()}")


async def _swapping(
    shape: str, base: Base, room: _Experts, expert: AdapterExpert, seconds: float
) -> list[dict[str, Any]]:
    """How much longer the steps of a running answer take while experts are copied in one after the other."""
    gaps: dict[str, list[float]] = {"alone": [], "beside uploads": []}
    swaps = 0
    async with _engine(base, room, torch.get_num_threads()) as engine:
        for what, found in gaps.items():
            request = TextRequest((1, 2, 3), (), Sampling(temperature=0.0), (), 10**6, frozenset())
            answer = engine.submit(request, lambda: None)
            begin = last = time.perf_counter()
            swap: asyncio.Task[None] | None = None
            async for _ in answer:
                now = time.perf_counter()
                found.append(now - last)
                last = now
                if what != "alone" and (swap is None or swap.done()):
                    swaps += swap is not None
                    swap = asyncio.create_task(_once(engine, _another(expert)))
                if now - begin > seconds:
                    await answer.aclose()
            if swap is not None:
                await swap
    rows: list[dict[str, Any]] = []
    for what, of in (("a step", statistics.median), ("the slowest step", max)):
        alone, beside = (of(each[3:]) for each in gaps.values())
        rows.append(
            {
                "shape": shape, "archive": "-", "step": f"{what} beside {swaps} swaps, and alone (floor)",
                "MB": expert.size_bytes / 1e6, "ms": 1e3 * beside, "x its floor": beside / alone,
            }
        )  # fmt: skip
    return rows


async def _once(engine: Engine, expert: AdapterExpert) -> None:
    """One token by an expert that has to come first."""
    request = TextRequest((1, 2, 3), ((expert, 1.0),), Sampling(temperature=0.0), (), 1, frozenset())
    async for _ in engine.submit(request, lambda: None):
        pass


def _crowded(shape: str, base: Base, data: bytes, size: int, rounds: int) -> list[dict[str, Any]]:
    """A cold load beside 1, 50 and 500 experts that are in memory: it looks at none of them."""
    rows: list[dict[str, Any]] = []
    experts: list[AdapterExpert] = []
    fewest_seconds = 0.0
    for count in (1, 50, 500):
        while len(experts) < count:
            experts.append(_another(_load(data, base)))
        seconds = statistics.median(_timed(partial(_load, data, base), base.device) for _ in range(rounds))
        fewest_seconds = fewest_seconds or seconds
        rows.append(
            {
                "shape": shape, "archive": "zstd", "step": f"cold, beside {count} in memory", "MB": size / 1e6,
                "ms": 1e3 * seconds, "x its floor": seconds / fewest_seconds,
            }
        )  # fmt: skip
    return rows


def _steps(
    shape: str, archive: str, size: int, steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Each step, beside the first of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(_timed(step, device))
    middle = {name: statistics.median(each[1:]) for name, each in times.items()}
    floor = next(iter(middle.values()))
    return [
        {
            "shape": shape, "archive": archive, "step": name, "MB": size / 1e6, "ms": 1e3 * seconds,
            "x its floor": seconds / floor,
        }
        for name, seconds in middle.items()
    ]  # fmt: skip


def _hash_and_inflate(data: bytes, unpack: Callable[[], bytes]) -> None:
    hashlib.sha256(data).digest()
    unpack()


async def _all_loading(
    shape: str, base: Base, room: _Experts, files: dict[str, bytes], rounds: int
) -> list[dict[str, Any]]:
    rows = _loading(shape, base, room, files, rounds)
    data = write_archive(files, compression="zstd")
    rows += await _swapping(shape, base, room, _load(data, base), seconds=3.0)
    if shape == "small":  # of the other, 500 take more memory than most machines have
        rows += _crowded(shape, base, data, sum(map(len, files.values())), rounds)
    return rows


async def _measure(
    shape: str, device: torch.device, folder: Path, rounds: int, *, loading_alone: bool
) -> tuple[list[Any], list[Any]]:
    sizes = _SHAPES[shape]
    quick = shape == "small" or device.type == "cuda"
    prompt_tokens, new_tokens, long_prompt_tokens = (32, 64, 512) if quick else (16, 8, 256)
    path = write_base(folder / f"base-{shape}", sizes)
    base = open_base(path, expected_digest=None, device=device)
    if loading_alone:
        files = _adapter_files(base, folder / "expert", 0)
        return [], await _all_loading(shape, base, _experts(base, 6), files, max(3, rounds))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=base.dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    vocabulary = sizes["vocab_size"]
    some = _work(_MIXED, prompt_tokens, new_tokens, vocabulary)
    room = _experts(base, _DISTINCT + _COMPOSED)
    rows = await _beside_transformers(
        shape,
        base,
        room,
        model,
        {
            f"{_MIXED} answers of {new_tokens} tokens": some,
            f"first token after {long_prompt_tokens}": _work(1, long_prompt_tokens, 1, vocabulary),
        },
        rounds,
    )
    every = [_adapter_files(base, folder / f"expert-{seed}", seed) for seed in range(_DISTINCT)]
    experts = [_load(write_archive(one), base) for one in every]
    folders = [folder / f"expert-{seed}" for seed in range(_DISTINCT)]
    rows += await _serving(shape, base, room, experts, _work(_DISTINCT, prompt_tokens, new_tokens, vocabulary), rounds)
    rows += await _beside_peft(shape, base, room, experts, folders, some, model, rounds)
    return rows, await _all_loading(shape, base, room, every[0], max(3, rounds))


async def main() -> None:
    """Measure; `--no-save` only prints."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", choices=("all", *_SHAPES), default="all")
    parser.add_argument("--threads", type=int, default=compute_threads(0), help="threads of each side on a CPU")
    parser.add_argument("--loading-alone", action="store_true", help="measure the loading of experts alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    device = torch.device("cuda:0" if arguments.device == "cuda" else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {arguments.threads} threads"
    notes = {
        "device": name,
        "reference": "of base-only work generate_batch, of experts the same engine with the base alone, of one adapter "
        "each PEFT's mixed batch; below 1 is faster",
    }
    suffix = "-gpu" if device.type == "cuda" else ""
    for shape in _SHAPES if arguments.shape == "all" else (arguments.shape,):
        rounds = arguments.rounds if shape == "small" or device.type == "cuda" else 1
        with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
            speed, loading = await _measure(shape, device, Path(folder), rounds, loading_alone=arguments.loading_alone)
        if speed:
            record(f"engine-{shape}{suffix}", speed, notes, save=not arguments.no_save)
        record(f"engine-loading-{shape}{suffix}", loading, {"device": name}, save=not arguments.no_save)
        gc.collect()


if __name__ == "__main__":
    asyncio.run(main())
