"""How kvcachedctl answers: exit codes, complaints, numbers, tables, JSON."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from google.protobuf.json_format import MessageToDict
from humanize import naturalsize
from rich.console import Console

from kvcached.errors import KvcachedError
from kvcached_client.connection import DaemonError

FAILED, NO_DAEMON = 1, 3
_WIDE = 1000  # columns; whoever reads a pipe cuts for himself


def asks_daemon(command: Callable[..., None]) -> Callable[..., None]:
    """Turns failed calls into messages and exit codes."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DaemonError as error:
            target = click.get_current_context().obj.target
            if error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                click.echo(f"no daemon answers on {target}: {error.message}", err=True)
                sys.exit(NO_DAEMON)
            click.echo(f"the daemon on {target} refused: {error}", err=True)
            sys.exit(FAILED)

    return run


def explains_failure(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what cannot be done, and why, into a message and exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (KvcachedError, OSError, ValueError) as error:
            click.echo(str(error), err=True)
            sys.exit(FAILED)

    return run


def console() -> Console:
    """For tables: as wide as the terminal, and in a pipe as wide as they are."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def as_dict(message: Any) -> dict[str, Any]:
    """Field names as in the protocol, hashes in hexadecimal, 64-bit numbers as numbers, all fields present."""
    content = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {str(name): _plain(getattr(message, name, None), value) for name, value in content.items()}


def _plain(source: Any, value: Any) -> Any:
    """protobuf's JSON writes 64-bit integers as strings and bytes in base64; people and scripts want neither."""
    if isinstance(source, bytes):
        return source.hex()
    if isinstance(source, int) and isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    if isinstance(value, dict) and hasattr(source, "DESCRIPTOR"):
        return {name: _plain(getattr(source, name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(element, item) for element, item in zip(source, value, strict=True)]
    return value


def ratio(source_bytes: int, stored_bytes: int) -> str:
    return f"{source_bytes / stored_bytes:.2f}x" if stored_bytes else "-"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def size(n_bytes: int) -> str:
    return naturalsize(n_bytes, binary=True)
