"""Text jobs and workers that answer them by a script, for tests of what lies between."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from hocket.errors import HocketError, Reason
from hocket.rpc.handlers import LOAD_KEY, Handlers, add_trailing
from hocket.v1 import expert_worker_pb2, expert_worker_pb2_grpc, plan_pb2, text_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BASE = "sha256:" + "b" * 64
OTHER_BASE = "sha256:" + "c" * 64
EXPERTS = tuple(f"sha256:{digit * 64}" for digit in "12")

Step: TypeAlias = "text_pb2.TextEvent | float | Reason | HocketError | grpc.StatusCode"
"""What a scripted worker does: says an event, sleeps so many seconds, refuses, or ends as only a transport does."""


def start(worker: str = "w0") -> text_pb2.TextEvent:
    return text_pb2.TextEvent(start=text_pb2.TextStart(worker=worker, prompt_token_count=4))


def delta(text: str, tokens: int = 1) -> text_pb2.TextEvent:
    chosen = [text_pb2.Token(id=7, logprob=-0.5)] * tokens
    return text_pb2.TextEvent(delta=text_pb2.TextDelta(text=text, tokens=chosen, contributions=[1.0]))


def finish() -> text_pb2.TextEvent:
    return text_pb2.TextEvent(finish=text_pb2.TextFinish(reason=text_pb2.TEXT_FINISH_REASON_END))


def answer(worker: str = "w0") -> list[Step]:
    return [start(worker), delta("one"), delta(" two", tokens=2), finish()]


def job(addresses: dict[str, str], *, base: str = BASE, experts: int = 1) -> text_pb2.TextJob:
    """A job for the workers of these names and addresses, in their order."""
    plan = text_pb2.TextPlan(
        mode=plan_pb2.MODE_ADAPTER_MIX if experts > 1 else plan_pb2.MODE_PASS,
        base=base,
        experts=[text_pb2.TextExpert(digest=digest, weight=0.5) for digest in EXPERTS[:experts]],
        replicas=[plan_pb2.Replica(worker=name, address=address) for name, address in addresses.items()],
        seed=1,
    )
    return text_pb2.TextJob(plan=plan, input=text_pb2.TextInput(prompt="hello"))


@dataclass
class TextWorker(expert_worker_pb2_grpc.ExpertWorkerServiceServicer):
    """Plays its script for every job, and reports a load when it has come to its end.

    Attributes:
        script: What it does.
        jobs: What it was asked.
        running: Calls that run now.
        sent: Events it has said, one that nobody has taken yet included.
    """

    script: list[Step] = field(default_factory=answer)
    jobs: list[text_pb2.TextJob] = field(default_factory=list)
    running: int = 0
    sent: int = 0
    load: expert_worker_pb2.WorkerLoad = field(default_factory=lambda: expert_worker_pb2.WorkerLoad(worker="w0"))

    async def RunText(self, request: Any, context: Any) -> AsyncIterator[expert_worker_pb2.RunTextResponse]:
        self.jobs.append(request.job)
        self.running += 1
        try:
            for step in self.script:
                if isinstance(step, text_pb2.TextEvent):
                    self.sent += 1
                    yield expert_worker_pb2.RunTextResponse(event=step)
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, grpc.StatusCode):
                    await context.abort(step, "stream removed")
                else:
                    raise HocketError(step, "no") if isinstance(step, Reason) else step
            add_trailing(context, LOAD_KEY, self.load.SerializeToString())
        finally:
            self.running -= 1

    def handlers(self) -> Handlers:
        """What a server or a local channel serves."""
        handlers = Handlers()
        handlers.add(expert_worker_pb2_grpc.add_ExpertWorkerServiceServicer_to_server, self)
        return handlers
