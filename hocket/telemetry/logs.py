"""structlog, set up once per process."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog

from hocket.telemetry.context import request_id

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger


def _add_request_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if current := request_id.get():
        event.setdefault("request_id", current)
    return event


def configure_logs(level: str = "info", *, json: bool | None = None) -> None:
    """Send structured events to standard error.

    Args:
        level: Least severity that is written: `debug` adds a line per successful call.
        json: One JSON object per line, or coloured text for people. None decides by whether standard error
            is a terminal.
    """
    as_json = not sys.stderr.isatty() if json is None else json
    structlog.configure(
        processors=[
            _add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if as_json else []),
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
