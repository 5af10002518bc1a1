"""An engine without a model: a runner whose logits are a hash of what it can read of a sequence's past."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from hocket.packages.adapter import Decoding
from hocket.requirements import Constraints
from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.engine import Engine
from services.expert_worker.engine.expert import AdapterExpert
from services.expert_worker.engine.pages import Pages
from services.expert_worker.engine.sampling import Choice, Sampling, choose
from services.expert_worker.engine.scheduler import EngineLimits
from services.expert_worker.engine.sequence import Delta, Finished, FinishReason, Sequence, Started, TextRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable

    from services.expert_worker.engine.answer import Answer
    from services.expert_worker.engine.expert import Mixture
    from services.expert_worker.engine.part import Part
    from services.expert_worker.engine.sequence import Event

VOCABULARY: Final = 29
PAGE_POSITIONS: Final = 4
CONTEXT: Final = 64
EOS: Final = 0
TIMEOUT_SECONDS: Final = 10.0


def expert(name: str, *, size_bytes: int = 1, prompt: list[float] | None = None) -> AdapterExpert:
    """An expert that does nothing; its soft prompt has rows of one number each."""
    rows = None if prompt is None else torch.tensor(prompt)[:, None]
    return AdapterExpert(name, {}, rows, None, Decoding(), Constraints(), size_bytes)


def asking(
    token_ids: Iterable[int], *, mixture: Mixture = (), max_tokens: int = 5, stops: Iterable[str] = (), **sampling: Any
) -> TextRequest:
    return TextRequest(
        tuple(token_ids),
        mixture,
        Sampling(**{"temperature": 0.0, **sampling}),
        tuple(stops),
        max_tokens,
        frozenset({EOS}),
    )


class Letters:
    """A tokenizer: each token is a letter; 0 says that the answer has ended."""

    def __init__(self) -> None:
        letters = {chr(ord("`") + token_id): token_id for token_id in range(1, VOCABULARY)}
        self._vocabulary = {"<end>": EOS, **letters}
        self.backend_tokenizer = Tokenizer(WordLevel(self._vocabulary, unk_token="<end>"))
        self.backend_tokenizer.decoder = Fuse()
        self.added_tokens_decoder = {EOS: AddedToken("<end>", special=True)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


LETTERS: Any = Letters()


@dataclass(eq=False)
class ScriptedRunner:
    """Keeps what each row says of its sequence in a page, as a model keeps keys and values, and reads it from there.

    Its script runs in the middle of each pass, when rows are half written, and may fail.
    """

    script: Callable[[list[Part]], object] = len
    page_positions: int = PAGE_POSITIONS
    passes: list[list[Part]] = field(default_factory=list)
    _rows: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)

    def run(self, parts: list[Part]) -> torch.Tensor:
        self.passes.append(list(parts))
        for part in parts:
            self._write(part, range(part.row_count // 2))
        self.script(parts)
        for part in parts:
            self._write(part, range(part.row_count))
        sampled = [_logits(self._past(part)) for part in parts if part.sampled]
        return torch.stack(sampled) if sampled else torch.empty(0, VOCABULARY)

    def _write(self, part: Part, places: range) -> None:
        soft = [] if part.embeddings is None else part.embeddings[:, 0].tolist()
        contents = [*map(float, soft), *part.token_ids]
        weights = sorted((expert.digest, weight) for expert, weight in part.mixture)
        for place in places:
            position = part.start + place
            self._rows[self._slot(part, position)] = position, repr((contents[place], weights))

    def _past(self, part: Part) -> list[str]:
        end = part.start + part.row_count
        rows = [self._rows[self._slot(part, position)] for position in range(end)]
        assert [position for position, _ in rows] == list(range(end)), "somebody else has written there"
        return [content for _, content in rows]

    def _slot(self, part: Part, position: int) -> tuple[int, int]:
        return part.pages[position // self.page_positions], position % self.page_positions


def _logits(past: list[str]) -> torch.Tensor:
    seed = int.from_bytes(sha256(repr(past).encode()).digest()[:7])
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def alone(request: TextRequest, *, context_length: int = CONTEXT) -> tuple[str, list[int], FinishReason, str]:
    """What a request is answered, token by token and without an engine: text, tokens, why it ended, the stop text."""
    runner = ScriptedRunner(page_positions=context_length)
    sequence = Sequence(request, Detokenizer(LETTERS, request.stops), context_length, context_length, 0.0)
    sequence.pages = [1]
    text, reason = "", None
    while reason is None:
        logits = runner.run([sequence.part(sequence.rows_left)])
        sequence.computed_count += sequence.rows_left
        choice = choose(logits, [sequence.row])[0]
        assert isinstance(choice, Choice)
        more, reason = sequence.append(choice.token_id, 0.0)
        text += more
    return text, sequence.answer_ids, reason, sequence.finished(reason).stop


async def read(answer: Answer) -> list[Event]:
    """An answer to its end."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return [event async for event in answer]


def told(events: list[Event]) -> tuple[str, list[int], FinishReason, str]:
    """What `alone` tells, of the events of a whole answer."""
    started, *deltas, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    text, token_ids = "", list[int]()
    for delta in deltas:
        assert isinstance(delta, Delta)
        text += delta.text
        token_ids += [choice.token_id for choice in delta.choices]
    assert finished.token_count == len(token_ids)
    return text, token_ids, finished.reason, finished.stop


class Gate:
    """A script that holds the engine's thread in each pass until it may go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.leave = threading.Semaphore(0)
        self._open = False

    def __call__(self, _parts: list[Part]) -> None:
        self.entered.release()
        assert self._open or self.leave.acquire(timeout=TIMEOUT_SECONDS)

    async def arrival(self) -> None:
        """Until the thread is in its next pass."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=TIMEOUT_SECONDS)

    def open(self) -> None:
        """Hold it no more."""
        self._open = True
        self.leave.release()


class Clock:
    """Tells the time that it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Everywhere:
    """Experts that are always where they compute."""

    def __init__(self, fits: Callable[[Collection[AdapterExpert]], bool]) -> None:
        self.arrived: Callable[[], None] = lambda: None
        self.coming: frozenset[str] = frozenset()
        self._fits = fits

    def fits(self, experts: Collection[AdapterExpert], page_count: int = 0) -> bool:
        del page_count
        return self._fits(experts)

    def hold(self, experts: Collection[AdapterExpert], soon: Collection[AdapterExpert] = ()) -> None:
        """See `Room`."""

    def bring(self, expert: AdapterExpert, *, ahead: bool = False) -> bool:
        """See `Room`."""
        del expert, ahead
        return True


LIMITS: Final = EngineLimits(step_tokens=8, sequences_max=4, queue_max=100)


@asynccontextmanager
async def running_engine(
    runner: Any,
    *,
    page_count: int = 64,
    limits: EngineLimits = LIMITS,
    fits: Callable[[Collection[AdapterExpert]], bool] = lambda _experts: True,
    **options: Any,
) -> AsyncIterator[Engine]:
    pages = Pages(page_count + 1)
    engine = Engine(
        runner,
        pages,
        page_positions=PAGE_POSITIONS,
        context_length=CONTEXT,
        room=Everywhere(fits),
        tokenizer=LETTERS,
        limits=limits,
        **options,
    )
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
