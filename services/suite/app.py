"""The composition root: the same four services, the same contracts, no sockets between them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from hocket.rpc.channel import LOCAL, Channels
from hocket.rpc.server import Address, Server
from hocket.telemetry.metrics import serve_metrics
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from services.expert_worker.app import WorkerApp
from services.expert_worker.settings import WorkerSettings
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings
from services.router.app import RouterApp
from services.router.settings import RouterSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from hocket.rpc.handlers import Handlers
