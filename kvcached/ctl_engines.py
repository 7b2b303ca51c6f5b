"""Engine adapters, which run models for kvcachedctl. Found through the entry-point group `kvcached.engines`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvcached.errors import KvcachedError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import CHUNK_BYTES

ENGINES = "kvcached.engines"
Report = Callable[[str, int, int], None]  # what is being done, so much, of so much


class Engine(Protocol):
    """What an engine adapter offers. What users cause is a ValueError, an OSError or a DaemonError.

    texts: none for a corpus of the adapter's. profiles: none for all.
    """

    def calibrate(  # noqa: PLR0913 - all that a user can choose
        self,
        model: str,
        *,
        target: str,
        texts: Sequence[Path],
        n_tokens: int,
        profiles: Sequence[str],
        layers_per_group: int,
        seed: int,
        budgets: str,
        progress: Report,
    ) -> pb.BundleStatus:
        """Calibrates a model, measures its profiles on text of their own, and attaches that to the bundle."""

    def evaluate(
        self, model: str, *, target: str, texts: Sequence[Path], profiles: Sequence[str], progress: Report
    ) -> dict[str, pb.Measured]:
        """What the profiles of the model's bundle lose on these texts."""

    def run_tasks(  # noqa: PLR0913 - all that a user can choose
        self,
        model: str,
        *,
        target: str,
        tasks: Sequence[str],
        fidelities: Sequence[str],
        am_ratio: float,
        texts: Sequence[Path],
        data: Mapping[str, Path],
        limit: int,
        n_tokens: int,
        n_shots: int | None,
        seed: int,
        progress: Report,
    ) -> list[dict[str, Any]]:
        """What the model does at tasks as it is, and on what each fidelity makes of its cache; row by row.

        A row has: task, fidelity ("vanilla": no cache), metric, value, low, high, delta, delta_low, delta_high, kl, n,
        prompt_tokens, restored_tokens, n_asked, n_as_asked, came_as, compression, active_bytes_per_token.
        """


class TakesMany(click.Command):
    """A command whose repeatable options take several values at once too, so that `--text *.md` works."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        many, n_values = "", 0
        for arg in args:
            if arg.startswith("-"):
                many, n_values = (arg if arg in repeatable else ""), 0
            elif many:
                n_values += 1
                if n_values > 1:
                    spread.append(many)
            spread.append(arg)
        return super().parse_args(context, spread)


def check_text(path: Path) -> None:
    """Raises KvcachedError unless a file can be read and has text in it. What is too short is the engine's to say."""
    is_empty = True
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(CHUNK_BYTES):
                if "\0" in piece:
                    raise KvcachedError(f"{path} is not text: it has zero bytes")
                is_empty = is_empty and piece.isspace()
    except OSError as error:
        raise KvcachedError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise KvcachedError(f"{path} is not text in UTF-8: {error.reason}") from None
    if is_empty:
        raise KvcachedError(f"{path} is empty: text was expected")


def engine_called(name: str | None) -> Engine:
    """The adapter of that name, or the only one that is installed. Raises KvcachedError."""
    found = {entry.name: entry for entry in entry_points(group=ENGINES)}
    if not found:
        raise KvcachedError("no engine is installed that could run a model: pip install kvcached-mlx")
    if name is None and len(found) > 1:
        raise KvcachedError(f"several engines are installed, choose one with --engine: {', '.join(sorted(found))}")
    name = name or next(iter(found))
    if name not in found:
        raise KvcachedError(f"no engine {name!r} is installed, there is {', '.join(sorted(found))}")
    try:
        engine: Engine = found[name].load()
    except (ImportError, AttributeError, OSError) as error:  # not made for this machine
        raise KvcachedError(f"the engine {name!r} cannot be loaded: {error}") from None
    return engine


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Shows what an engine reports on stderr: bars on a terminal, else a line for each thing that it does."""
    screen = Console(stderr=True)
    if not screen.is_terminal:
        told: set[str] = set()

        def tell(what: str, _done: int, _total: int) -> None:
            if what not in told:
                told.add(what)
                click.echo(f"{what} ..", err=True)

        yield tell
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen) as bars:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield draw
