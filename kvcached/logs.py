"""Logging: one line per event, for people or as JSON, on stderr or into files that are rotated here.

launchd rotates nothing, so a daemon under it is given a file; systemd's journal takes stderr. Tokens and prompts are
never among the fields of an event. What libraries log comes in the same form.
"""

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog

from kvcached.config import Config
from kvcached.errors import InvalidRequestError


def configure(config: Config) -> None:
    """Sets up logging for the process. Raises InvalidRequestError if the log file cannot be written."""
    handler = _handler(config)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.log_level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    people = structlog.dev.ConsoleRenderer(colors=False)
    processors: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer() if config.log_json else people,
    ]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=processors))
    logging.raiseExceptions = False  # a full disk must not fill stderr with what could not be logged
    logging.basicConfig(handlers=[handler], level=config.log_level.upper(), force=True)


def _handler(config: Config) -> logging.Handler:
    if not config.log_file:
        return logging.StreamHandler(sys.stderr)
    path = Path(config.log_file)
    try:
        path = path.expanduser()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return logging.handlers.RotatingFileHandler(
            path, maxBytes=config.log_file_bytes, backupCount=config.log_file_count, encoding="utf-8"
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidRequestError(f"log_file {path} cannot be written: {error}") from None
