"""kvcachedctl: the operator's tool. Talks to the daemon; never opens the store itself.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 no daemon.
"""

import json
import sys
import time

import click
from rich.table import Table
from rich.text import Text

from kvcached import __version__, autostart, ctl_bundles, ctl_config, ctl_eval
from kvcached.ctl_output import (
    FAILED,
    NO_DAEMON,
    as_dict,
    asks_daemon,
    console,
    explains_failure,
    percent,
    ratio,
    size,
)
from kvcached.errors import KvcachedError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.connection import Connection
from kvcached_client.paths import default_socket

_CHECK_SECONDS = 3600.0
_START_SECONDS = 15.0


@click.group(help="Shows and steers a running kvcached daemon.")
@click.version_option(__version__)
@click.option(
    "--target",
    envvar="KVCACHED_TARGET",
    default=lambda: f"unix:{default_socket()}",
    show_default="the default socket",
    help="where the daemon listens: unix:PATH or HOST:PORT",
)
@click.pass_context
def main(context: click.Context, target: str) -> None:
    try:
        context.obj = context.with_resource(Connection(target))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@main.command(help="What the daemon holds and does.")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.pass_obj
@asks_daemon
def status(connection: Connection, as_json: bool) -> None:
    response = connection.call("Status", pb.StatusRequest())
    if as_json:
        click.echo(json.dumps(as_dict(response), indent=2))
    else:
        _print_status(response)


@main.command(help="Verifies the store's invariants. Exit code 1 if any is broken.")
@click.option("--frames", is_flag=True, help="decode every block too (reads the whole store)")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.pass_obj
@asks_daemon
def check(connection: Connection, frames: bool, as_json: bool) -> None:
    response = connection.call("Check", pb.CheckRequest(frames=frames), timeout=_CHECK_SECONDS)
    if as_json:
        click.echo(json.dumps(as_dict(response), indent=2))
    else:
        for problem in response.problems:
            click.echo(problem)
        decoded = f", {response.n_frames_decoded} frames decoded" if frames else ""
        click.echo(f"{len(response.problems)} problems in {response.n_blocks} blocks{decoded}")
    sys.exit(FAILED if response.problems else 0)


for command in (ctl_bundles.bundles, ctl_bundles.calibrate, ctl_bundles.bench, ctl_config.config, ctl_eval.evaluate):
    main.add_command(command)


@main.group(help="The daemon as a service that starts at login: launchd on a Mac, systemd on Linux.")
def service() -> None:
    pass


@service.command(help="Installs and starts it. Its settings are those of the configuration file.")
@explains_failure
def install() -> None:
    found, connection = _service()
    if not found.path.exists() and connection.is_serving():
        raise KvcachedError(f"a daemon that is not this service answers on {connection.target}: stop it first")
    done = "installed" if autostart.install(found) else "installed already, written and started anew"
    click.echo(f"{done}: {found.path}")
    _await_daemon(found, connection)


@service.command(help="Stops and removes it. The cache stays on disk.")
@explains_failure
def uninstall() -> None:
    found, _ = _service()
    click.echo(f"{'uninstalled' if autostart.uninstall(found) else 'not installed, nothing to do'}: {found.path}")


@service.command(help="Starts it.")
@explains_failure
def start() -> None:
    found, connection = _service(installed=True)
    found.start()
    _await_daemon(found, connection)


@service.command(help="Stops it, until the next login or `start`.")
@explains_failure
def stop() -> None:
    _service(installed=True)[0].stop()
    click.echo("stopped")


@service.command("print", help="Prints what `install` would write.")
@explains_failure
def print_service() -> None:
    click.echo(_service()[0].text(), nl=False)


def _service(installed: bool = False) -> tuple[autostart.Agent | autostart.Unit, Connection]:
    """The service of this user as it would be installed now, and how to reach its daemon."""
    from kvcached.config import load  # slow to import

    config = load({}, {})  # the environment of this shell is not the service's
    found = autostart.of_this_user((sys.executable, "-m", "kvcached"), config.drain_seconds)
    if installed and not found.path.exists():
        raise KvcachedError(f"not installed, there is no {found.path}: run kvcachedctl service install")
    return found, Connection(f"unix:{config.socket_path}")


def _await_daemon(found: autostart.Agent | autostart.Unit, connection: Connection) -> None:
    """Waits until the daemon answers; exit code 3 if it does not."""
    deadline = time.monotonic() + _START_SECONDS
    while not connection.is_serving():
        if time.monotonic() > deadline:
            click.echo(f"no daemon answers on {connection.target} yet; its log: {found.log_hint}", err=True)
            sys.exit(NO_DAEMON)
        time.sleep(0.1)
    click.echo(f"it answers on {connection.target}")


def _print_status(response: pb.StatusResponse) -> None:
    store, pool, counters = response.store, response.pool, response.counters
    asked, hit = counters["lookup_tokens_total"], counters["lookup_hit_tokens_total"]
    summary = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "daemon": f"kvcached {response.version}, pid {response.pid}, up {response.uptime_seconds:,.0f} s",
        "socket": response.socket_path,
        "store": store.path,
        "blocks": f"{store.n_blocks:,} ({store.n_tokens:,} tokens)",
        "bytes": f"{size(store.source_bytes)} in {size(store.stored_bytes)} on disk, "
        f"compression {ratio(store.source_bytes, store.stored_bytes)}",
        "quota": f"{size(store.used_bytes)} of {size(store.quota_bytes)} used, "
        f"file {size(store.file_bytes)}, {size(store.free_disk_bytes)} free on disk",
        "hit rate": f"{percent(hit, asked)} ({hit:,.0f} of {asked:,.0f} tokens since start)",
        "disk": f"{size(int(counters['put_stored_bytes_total']))} stored since start, "
        f"{sum(n for name, n in counters.items() if name.startswith('evicted_blocks')):,.0f} blocks evicted",
        "queue": f"{pool.n_jobs} jobs, {size(pool.put_bytes)} in and {size(pool.get_bytes)} out "
        f"of {size(pool.limit_bytes)} each, {pool.n_workers} workers, {pool.device}",
        "metrics": f"{response.web_address}/metrics" if response.web_address else response.web_problem or "off",
    }
    for name, value in [*rows.items(), *(("moved aside", moved) for moved in store.set_aside)]:
        summary.add_row(f"[bold]{name}[/]", Text(value))
    screen = console()
    screen.print(summary)
    if response.models:
        screen.print(_model_table(response))
    if response.engines:
        screen.print(_engine_table(response))


def _model_table(response: pb.StatusResponse) -> Table:
    table = Table("model", "id", "fidelity", "blocks", "tokens", "source", "stored", "compression")
    for model in response.models:
        for kept in model.fidelities or [pb.FidelityStatus()]:
            table.add_row(
                Text(model.spec.name),
                model.model_id.hex()[:12],
                pb.FidelityKind.Name(kept.kind).removeprefix("FIDELITY_KIND_") if kept.kind else "-",
                f"{kept.n_blocks:,}",
                f"{kept.n_tokens:,}",
                size(kept.source_bytes),
                size(kept.stored_bytes),
                ratio(kept.source_bytes, kept.stored_bytes),
            )
    return table


def _engine_table(response: pb.StatusResponse) -> Table:
    """Engines as they described themselves; what they neither had nor restored of a prompt, they computed."""
    table = Table(
        "engine", "namespace", "prompt tokens", "in memory", "restored", "computed", "fetched where new", "heard"
    )
    for engine in response.engines:
        prefill, restore = engine.prefill_tokens_per_second, engine.restore_tokens_per_second
        table.add_row(
            Text(f"{engine.name} ({engine.pid})"),
            Text(engine.namespace or "-"),
            f"{engine.prompt_tokens:,}",
            f"{engine.local_tokens:,}",
            f"{engine.restored_tokens:,}",
            f"{engine.prompt_tokens - engine.local_tokens - engine.restored_tokens:,}",
            f"over {prefill / restore:.1%} of it" if prefill and restore else "not measured",
            f"{engine.seconds_since_announced:,.0f} s ago",
        )
    return table
