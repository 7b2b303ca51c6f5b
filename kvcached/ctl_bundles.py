"""kvcachedctl bundles, calibrate and bench: what transform coding needs, and what it costs."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from kvcached.ctl_engines import Engine, TakesMany, check_text, engine_called, shown_progress
from kvcached.ctl_output import as_dict, asks_daemon, console, explains_failure, size
from kvcached.errors import KvcachedError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.connection import Connection, DaemonError
from kvcached_client.protocol import CHUNK_BYTES

_INSTALL_SECONDS, _REMOVE_SECONDS = 300.0, 3600.0
_ID_CHARACTERS = 12
_DEFAULT_TOKENS = 32768


# ---- bundles


@click.group(invoke_without_command=True, help="The bundles that are installed, and what was measured to be lost.")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.pass_context
def bundles(context: click.Context, as_json: bool) -> None:
    if context.invoked_subcommand is None:
        _list(context.obj, as_json)


@asks_daemon
def _list(connection: Connection, as_json: bool) -> None:
    response = connection.call("ListBundles", pb.ListBundlesRequest())
    if as_json:
        click.echo(json.dumps(as_dict(response), indent=2))
    elif response.bundles:
        _show(response.bundles)
    else:
        click.echo("no bundle is installed, all blocks are stored exactly; `kvcachedctl calibrate MODEL` makes one")


@bundles.command(help="Installs a bundle from a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
@asks_daemon
@explains_failure
def install(connection: Connection, file: Path) -> None:
    with file.open("rb") as content:
        response = connection.install_bundle(_pieces(content.read, file.stat().st_size), _INSTALL_SECONDS)
    _show([response.bundle])


def _pieces(read: Callable[[int], bytes], n_bytes: int) -> Iterator[pb.InstallBundleRequest]:
    yield pb.InstallBundleRequest(total_bytes=n_bytes)
    while piece := read(CHUNK_BYTES):
        yield pb.InstallBundleRequest(data=piece)


@bundles.command(help="Removes a bundle. Its id may be cut short.")
@click.argument("bundle_id", metavar="ID")
@click.option("--with-blocks", is_flag=True, help="and the blocks that cannot be read without it")
@click.pass_obj
@asks_daemon
@explains_failure
def remove(connection: Connection, bundle_id: str, with_blocks: bool) -> None:
    found = _the_one(connection.call("ListBundles", pb.ListBundlesRequest()).bundles, bundle_id)
    request = pb.RemoveBundleRequest(bundle_id=found.bundle_id, with_blocks=with_blocks)
    try:
        response = connection.call("RemoveBundle", request, timeout=_REMOVE_SECONDS)
    except DaemonError as error:
        if error.code == "FAILED_PRECONDITION" and not with_blocks:
            raise KvcachedError(f"{error.message}\nWith --with-blocks they are deleted too.") from None
        raise
    blocks = f", and {response.n_deleted:,} blocks with it" if response.n_deleted else ""
    click.echo(f"removed: {found.bundle_id.hex()}{blocks}")


def _the_one(installed: Sequence[pb.BundleStatus], bundle_id: str) -> pb.BundleStatus:
    """The bundle whose id begins so. Raises KvcachedError unless there is exactly one."""
    found = [bundle for bundle in installed if bundle_id and bundle.bundle_id.hex().startswith(bundle_id.lower())]
    if not found:
        raise KvcachedError(f"no bundle's id begins with {bundle_id!r}: `kvcachedctl bundles` lists them")
    if len(found) > 1:
        ids = ", ".join(bundle.bundle_id.hex() for bundle in found)
        raise KvcachedError(f"the ids of {len(found)} bundles begin with {bundle_id!r}: {ids}")
    return found[0]


# ---- calibrate, bench


def _measures(command: Callable[..., None]) -> Callable[..., None]:
    """What `calibrate` and `bench` have in common: what they are asked, and how they fail."""
    for decorate in (
        explains_failure,
        asks_daemon,
        click.pass_obj,
        click.option("--engine", help="the adapter that runs the model, if several are installed"),
        click.option("--profiles", multiple=True, metavar="NAME...", help="only these: x8, x16, .."),
        click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), metavar="FILE...", help=_TEXT),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


_TEXT = "text to use, in UTF-8; without it, a small corpus that comes with the adapter"


@click.command(cls=TakesMany, help="Calibrates a model: fits a bundle to text, measures what it loses, installs it.")
@_measures
@click.option("--tokens", "n_tokens", type=click.IntRange(1), default=_DEFAULT_TOKENS, show_default=True, help="to fit")
@click.option("--layers-per-group", type=click.IntRange(0), default=0, help="layers that share a basis; 0: as usual")
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), default=0, help="the same one gives the same bundle")
@click.option(
    "--budgets",
    type=click.Choice(["curves", "entropy", "uniform"]),
    default="curves",
    show_default=True,
    help="how compaction shares tokens between heads: by measured errors, by entropy of attention, or evenly",
)
def calibrate(
    connection: Connection,
    model: str,
    texts: Sequence[Path],
    profiles: Sequence[str],
    engine: str | None,
    **choice: Any,
) -> None:
    found = _ready(connection, texts, profiles, engine)
    with shown_progress() as report:
        bundle = found.calibrate(
            model, target=connection.target, texts=texts, profiles=_known(profiles), progress=report, **choice
        )
    _show([bundle])


@click.command(cls=TakesMany, help="Measures what the bundle of a model loses, through the daemon, on your text.")
@_measures
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="write the figures here too")
def bench(
    connection: Connection,
    model: str,
    texts: Sequence[Path],
    profiles: Sequence[str],
    engine: str | None,
    output: Path | None,
) -> None:
    found = _ready(connection, texts, profiles, engine)
    if output and not output.parent.is_dir():
        raise KvcachedError(f"{output} cannot be written: there is no directory {output.parent}")
    with shown_progress() as report:
        measured = found.evaluate(
            model, target=connection.target, texts=texts, profiles=_known(profiles), progress=report
        )
    if output:
        figures = {name: _measured_figures(m) for name, m in measured.items()}
        output.write_text(json.dumps({"model": model, "profiles": figures}, indent=2) + "\n")
    table = _table("compression")
    for name, m in measured.items():
        table.add_row(Text(name), *_shown(m))
    console().print(table)


def _ready(connection: Connection, texts: Sequence[Path], profiles: Sequence[str], engine: str | None) -> Engine:
    """The engine, once all is in order that can be looked at before a model is loaded."""
    _known(profiles)
    for path in texts:
        check_text(path)
    found = engine_called(engine)
    connection.call("Status", pb.StatusRequest())
    return found


def _known(profiles: Sequence[str]) -> list[str]:
    """The profiles asked for, the best first. Raises KvcachedError for one that does not exist."""
    from kvcached.codec.bundle import PROFILES  # slow to import

    if unknown := [name for name in profiles if name not in PROFILES]:
        raise KvcachedError(f"profiles are {', '.join(PROFILES)}, got {', '.join(unknown)}")
    return [name for name in PROFILES if name in profiles]


# ---- tables


def _measured_figures(measured: pb.Measured) -> dict[str, Any]:
    """As JSON, without the attention errors that nobody measured."""
    unmeasured = set() if measured.attention_error_mean else {"attention_error_mean", "attention_error_worst"}
    return {name: value for name, value in as_dict(measured).items() if name not in unmeasured}


def _show(listed: Sequence[pb.BundleStatus]) -> None:
    """For each bundle a line, and a table of its profiles."""
    screen = console()
    for bundle in listed:
        name = bundle.model_name if bundle.model_id else f"{bundle.model_name} (not registered)"
        current = ", current" if bundle.current else ""
        compacts = ", compacts" if bundle.compacts else ""
        about = f"{name}: {size(bundle.bytes)}, {bundle.n_blocks:,} blocks in use{compacts}{current}"
        screen.print(Text.assemble((bundle.bundle_id.hex()[:_ID_CHARACTERS], "bold"), "  ", about))
        table = _table("compression (target)")
        for profile in bundle.profiles:
            measured = profile.measured if profile.HasField("measured") else None
            table.add_row(Text(profile.name), *_shown(measured, f" ({profile.target_compression:g}x)"))
        screen.print(table)


def _table(compression: str) -> Table:
    """Of what profiles were measured to lose; fits a terminal of 80 columns."""
    table = Table("profile", box=None, padding=(0, 1, 0, 0))
    for name in (compression, "bits per value", "KL (95 %)", "perplexity (95 %)", "attention (worst)", "tokens"):
        table.add_column(name, overflow="fold")
    return table


def _shown(measured: pb.Measured | None, target: str = "") -> list[str]:
    if measured is None:
        return [f"-{target}", "", "not measured"]
    m = measured
    return [
        f"{m.compression:.1f}x{target}",
        f"{m.bits_per_value:.2f}",
        f"{m.kl:.2g} ({m.kl_low:.2g}..{m.kl_high:.2g})",
        f"{m.perplexity_delta:+.2f}% ({m.perplexity_delta_low:+.2f}..{m.perplexity_delta_high:+.2f})",
        f"{m.attention_error_mean:.2g} ({m.attention_error_worst:.2g})" if m.attention_error_mean else "-",
        f"{m.n_tokens:,}",
    ]
