"""Asks a Hocket router: ask.py ROUTER MODEL ROW..., where a row is numbers like 0.5,-1,2.

ROUTER is host:port, dns:///name:port, or ipv4:HOST:PORT,HOST:PORT. HOCKET_CA_FILE turns TLS on.
"""

from __future__ import annotations

import asyncio
import os
import sys

from hocket.client import Answer, Partial, Planned, connect, connect_health
from hocket.errors import HocketError
from hocket.v1.plan_pb2 import FinishReason


async def ask(address: str, model: str, rows: list[list[float]]) -> None:
    """Print whether the router serves, what it serves, and the events of one prediction."""
    ca_file = os.environ.get("HOCKET_CA_FILE")
    async with connect_health(address, ca_file=ca_file) as health:
        print(f"health: {await health.check('hocket.v1.RouterService')}")
    async with connect(address, ca_file=ca_file, timeout_seconds=10) as router:  # every call has this deadline
        async for mixture in router.list_mixtures():
            print(f"model: {mixture.name}, experts: {mixture.expert_count}")
        async for event in router.predict(model, rows, partials=True):
            match event:
                case Planned(plan=plan):
                    if plan.labels:
                        print(f"labels: {', '.join(plan.labels)}")
                    for expert in plan.experts:
                        print(f"plan: {expert.expert} rows {list(expert.rows)} weights {list(expert.weights)}")
                case Partial(sequence=sequence, value=value, coverage=coverage):
                    print(f"partial {sequence}: {value.tolist()} coverage {coverage.tolist()}")
                case Answer(value=value, coverage=coverage, finish=finish):
                    print(f"final: {value.tolist()} coverage {coverage.tolist()} {FinishReason.Name(finish.reason)}")


def main(address: str, model: str, *texts: str) -> None:
    """Ask, or say in one line why not."""
    try:
        asyncio.run(ask(address, model, [[float(number) for number in text.split(",")] for text in texts]))
    except HocketError as error:
        sys.exit(f"{error.reason}: {error.message}")  # branch on the reason, never on the message


if __name__ == "__main__":
    if len(sys.argv) < 4:  # noqa: PLR2004 - the program and its three arguments
        sys.exit("ask.py ROUTER MODEL ROW...")
    main(*sys.argv[1:])
