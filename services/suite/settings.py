"""The settings of a suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.aggregator.settings import AggregatorSettings
    from services.expert_worker.settings import WorkerSettings
    from services.registry.settings import RegistrySettings
    from services.router.settings import RouterSettings


@dataclass(frozen=True, slots=True)
class SuiteSettings:
    """The settings of all four; the addresses they find each other by are the suite's own."""

    router: RouterSettings
    aggregator: AggregatorSettings
    registry: RegistrySettings
    worker: WorkerSettings
