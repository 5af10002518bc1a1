"""Compiling constraints in a process that can be killed: a call into a library that does not return cannot be ended.

    python -m tests.compiling

Reads constraints, a line each, and says what became of each, in a line as well.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hocket.errors import HocketError
from services.expert_worker.engine.constraints import Constraint, ConstraintKind, Constraints
from tests.grammars import bits

if TYPE_CHECKING:
    from typing import Self

EOS: Final = 2
_SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOKEN_COUNT: Final = 60_000
_LETTERS: Final = 'etaoinshrdlcumwfgypbvk0123456789ETAOINSHRD_-.,:;(){}[]<>="/\\*+ĠĊ'


@dataclass(frozen=True)
class Outcome:
    """What became of a constraint.

    Attributes:
        reason: Why it was refused, or its answer went no further; empty if neither.
        compile_seconds: Until it was compiled or refused.
        step_seconds: The longest that one token of an answer took to find what may come next.
        killed: Whether it took so long that nobody waited for it.
    """

    reason: str = ""
    compile_seconds: float = 0.0
    step_seconds: float = 0.0
    killed: bool = False


@dataclass
class Compiler:
    """A process that compiles; another one if that has to be killed.

    Args:
        seconds_max: After which it is.
    """

    seconds_max: float
    _process: subprocess.Popen[str] | None = None
    _lines: queue.Queue[str] = field(default_factory=queue.Queue)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def compile(self, constraint: Constraint, *, seed: int, count: int) -> Outcome:
        """Compile a constraint, and answer so many tokens by chance."""
        process = self._process or self._start()
        job = {"kind": constraint.kind, "text": constraint.text, "seed": seed, "count": count}
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        try:
            line = self._lines.get(timeout=self.seconds_max)
        except queue.Empty:
            self._kill()
            return Outcome(killed=True, compile_seconds=self.seconds_max)
        assert line, "the process is gone"
        return Outcome(**json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.compiling"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        assert self._lines.get(timeout=60) == "ready\n"
        return self._process

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


class _Tokenizer:
    """What constraints want of a tokenizer: byte-level, with as many tokens as a real one."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - for the process alone

        words = itertools.chain.from_iterable(itertools.product(_LETTERS, repeat=count) for count in (2, 3))
        names = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, words)]
        self.backend_tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names[:_TOKEN_COUNT])}, []))
        self.backend_tokenizer.add_special_tokens([*_SPECIALS])
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend_tokenizer.decoder = decoders.ByteLevel()

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab())


async def _compile(constraints: Constraints, constraint: Constraint, seed: int, count: int) -> Outcome:
    begin = time.perf_counter()
    longest = 0.0
    try:
        matcher = await constraints.matcher(constraint)
    except HocketError as error:
        return Outcome(error.reason, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    dice = random.Random(seed)
    for _ in range(count):
        begin = time.perf_counter()
        try:
            allowed = bits(matcher.allowed())
        except HocketError as error:
            return Outcome(error.reason, seconds, max(longest, time.perf_counter() - begin))
        token_id = dice.choice(allowed)
        matcher.advance(token_id)
        longest = max(longest, time.perf_counter() - begin)
        if token_id == EOS:
            break
    return Outcome("", seconds, longest)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _main() -> None:
    tokenizer: Any = _Tokenizer()
    constraints = Constraints(tokenizer, frozenset({EOS}))
    await constraints.matcher(Constraint(ConstraintKind.GBNF, 'root ::= "a"'))  # the first one takes its tokens
    _say("ready")
    for line in sys.stdin:
        job = json.loads(line)
        outcome = await _compile(
            constraints, Constraint(ConstraintKind(job["kind"]), job["text"]), job["seed"], job["count"]
        )
        _say(json.dumps(asdict(outcome)))
    constraints.stop()


if __name__ == "__main__":
    asyncio.run(_main())
