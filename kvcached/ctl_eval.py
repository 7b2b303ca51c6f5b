"""kvcachedctl eval: what a model still can do on caches that went through the daemon, beside the model as it is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from kvcached.ctl_engines import TakesMany, check_text, engine_called, shown_progress
from kvcached.ctl_output import asks_daemon, console, explains_failure
from kvcached.errors import KvcachedError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.connection import Connection
from kvcached_client.protocol import check_am_ratio

MADE = ("perplexity", "needle", "multikey", "tracking")
PUBLISHED = ("gsm8k", "mmlu", "litm")
HARNESS = "lm-eval"
_DEFAULT_FIDELITIES = "exact,x8"
_MIN_TOKENS = 16


def _tasks(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    names = _listed(value)
    for name in names:
        prefix, _, rest = name.partition(":")
        if name not in (*MADE, *PUBLISHED) and not (prefix == HARNESS and rest):
            known = ", ".join((*MADE, *PUBLISHED))
            raise click.BadParameter(f"tasks are {known} and {HARNESS}:NAME, got {name!r}")
    return names


def _fidelities(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    from kvcached.codec.bundle import PROFILES  # slow to import
    from kvcached.encoding import COMPACTED

    known = ("exact", *PROFILES, *COMPACTED)
    names = _listed(value)
    for name in names:
        if name not in known:
            raise click.BadParameter(f"fidelities are {', '.join(known)}, got {name!r}")
    return names


def _listed(value: str) -> list[str]:
    """Names with commas between, each once."""
    names = [name.strip() for name in value.split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise click.BadParameter(f"names with commas between expected, each once, got {value!r}")
    return names


def _am_ratio(_context: click.Context, _option: click.Parameter, value: str | None) -> float:
    try:
        return 0.0 if value is None else check_am_ratio(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _data(_context: click.Context, _option: click.Parameter, values: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if name not in (*PUBLISHED, HARNESS) or not equals or not path or name in found:
            known = ", ".join((*PUBLISHED, HARNESS))
            raise click.BadParameter(f"TASK=PATH expected, each task once, of {known}; got {value!r}")
        found[name] = Path(path)
    return found


@click.command("eval", cls=TakesMany, help=__doc__.partition(":")[2].strip().capitalize())
@click.argument("model")
@click.option(
    "--tasks",
    callback=_tasks,
    default=",".join(MADE),
    show_default=True,
    help=f"also {', '.join(PUBLISHED)}, {HARNESS}:NAME",
)
@click.option(
    "--fidelity",
    "fidelities",
    callback=_fidelities,
    default=_DEFAULT_FIDELITIES,
    show_default=True,
    help="with commas between",
)
@click.option(
    "--am-ratio", callback=_am_ratio, help="of compacted fidelities, 1 to 8; by default as the daemon's settings say"
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE...",
    help="text in UTF-8 that was not calibrated on; without it, a small corpus that comes with the adapter",
)
@click.option("--data", multiple=True, callback=_data, metavar="TASK=PATH...", help="where the file of a task is")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="questions of a task, or texts")
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(_MIN_TOKENS),
    default=1024,
    show_default=True,
    help="of a prompt that is made of text",
)
@click.option(
    "--shots", "n_shots", type=click.IntRange(0), help="examples before a question; by default 8 (gsm8k) and 5 (mmlu)"
)
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), default=0, help="the same one gives the same questions")
@click.option("--engine", help="the adapter that runs the model, if several are installed")
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="write the figures here too")
@click.pass_obj
@asks_daemon
@explains_failure
def evaluate(connection: Connection, model: str, engine: str | None, output: Path | None, **choice: Any) -> None:
    _check(choice, output)
    found = engine_called(engine)
    if not hasattr(found, "run_tasks"):
        raise KvcachedError("the engine that is installed runs no tasks: a newer one is needed")
    connection.call("Status", pb.StatusRequest())
    with shown_progress() as report:
        rows = found.run_tasks(model, target=connection.target, progress=report, **choice)
    if output:
        about = {name: str(value) if name == "am_ratio" else value for name, value in choice.items()}
        output.write_text(json.dumps({"model": model, "asked": about, "rows": rows}, indent=2, default=str) + "\n")
    console().print(_table(rows))
    for warning in _warnings(rows):
        click.echo(warning, err=True)


def _check(choice: Mapping[str, Any], output: Path | None) -> None:
    """Raises KvcachedError for files that are not there, before a model is loaded."""
    for path in choice["texts"]:
        check_text(path)
    for name in choice["tasks"]:
        if name in PUBLISHED and name not in choice["data"]:
            raise KvcachedError(f"{name} is read from a file, and none was given: --data {name}=PATH")
    for name, path in choice["data"].items():
        if not path.exists():
            raise KvcachedError(f"the file of {name} is not there: {path}")
    if output and not output.parent.is_dir():
        raise KvcachedError(f"{output} cannot be written: there is no directory {output.parent}")


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("task", "fidelity", box=None, padding=(0, 1, 0, 0))
    for name in ("result (95 %)", "against vanilla", "KL", "n", "blocks as asked", "compression", "active bytes/token"):
        table.add_column(name, overflow="fold")
    for row in rows:
        stored = row["n_asked"] or row["prompt_tokens"]
        table.add_row(
            Text(row["task"]),
            Text(row["fidelity"]),
            f"{row['metric']} {_figure(row, '', '.3g' if row['metric'] == 'perplexity' else '.3f')}",
            _against(row),
            "" if row["kl"] is None else f"{row['kl']:.2g}",
            f"{row['n']:,}",
            f"{row['n_as_asked']} of {row['n_asked']}" if stored else "",
            _or_dash(row["compression"], ".1f", "x") if stored else "",
            _or_dash(row["active_bytes_per_token"], ",.0f") if stored else "",
        )
    return table


def _against(row: Mapping[str, Any]) -> str:
    if row["delta"] is None:
        return ""
    is_percent = row["metric"] == "perplexity"
    return _figure(row, "delta", "+.2f" if is_percent else "+.3f", "%" if is_percent else "")


def _figure(row: Mapping[str, Any], name: str, form: str, unit: str = "") -> str:
    low, high = (row[f"{name}_{bound}" if name else bound] for bound in ("low", "high"))
    bounds = "" if low is None else f" ({low:{form}}..{high:{form}})"
    return f"{row[name or 'value']:{form}}{unit}{bounds}"


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a row does not measure although it looks so."""
    found = []
    for row in rows:
        about = f"{row['task']}, {row['fidelity']}:"
        came = ", ".join(f"{n} as {name}" for name, n in sorted(row["came_as"].items()))
        if row["n_as_asked"] < row["n_asked"]:
            asked = f"{row['n_as_asked']} of {row['n_asked']} blocks came back as asked"
            found.append(
                f"{about} {asked}{f' ({came})' if came else ''}; the rest was computed or came at another fidelity"
            )
        elif row["prompt_tokens"] and not row["n_asked"]:
            found.append(f"{about} nothing was restored, all of its prompts are too short; see --shots and --tokens")
    return found
