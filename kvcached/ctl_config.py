"""kvcachedctl config: the settings of the running daemon."""

import json
from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text

from kvcached.ctl_output import as_dict, asks_daemon, console, explains_failure
from kvcached.errors import KvcachedError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.connection import Connection


@click.group(invoke_without_command=True, help="The settings of the running daemon, and which may change now.")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.pass_context
def config(context: click.Context, as_json: bool) -> None:
    if context.invoked_subcommand is None:
        _list(context.obj, as_json)


@asks_daemon
def _list(connection: Connection, as_json: bool) -> None:
    settings = _settings(connection)
    if as_json:
        click.echo(json.dumps([as_dict(setting) for setting in settings], indent=2))
        return
    table = Table("setting", "value", "changes", "meaning", box=None, padding=(0, 1, 0, 0))
    for setting in settings:
        changes = "live" if setting.live else "at a restart"
        table.add_row(setting.name, Text(setting.value), changes, Text(setting.description))
    console().print(table)


@config.command(help="Prints one setting.")
@click.argument("name")
@click.pass_obj
@asks_daemon
@explains_failure
def get(connection: Connection, name: str) -> None:
    settings = _settings(connection)
    found = [setting.value for setting in settings if setting.name == name]
    if not found:
        raise KvcachedError(f"no setting {name!r}; settings are {', '.join(setting.name for setting in settings)}")
    click.echo(found[0])


@config.command(
    "set",
    help="Changes a setting of the running daemon; the configuration file stays as it is.",
    context_settings={"ignore_unknown_options": True},  # a value may begin with a dash
)
@click.argument("name")
@click.argument("value", type=click.UNPROCESSED)
@click.pass_obj
@asks_daemon
def set_one(connection: Connection, name: str, value: str) -> None:
    response = connection.call("SetConfig", pb.SetConfigRequest(values={name: value}))
    for setting in response.settings:
        click.echo(f"{setting.name} = {setting.value}")
    if not response.settings:
        click.echo(f"{name} was {value} already")


def _settings(connection: Connection) -> Sequence[pb.Setting]:
    response: pb.GetConfigResponse = connection.call("GetConfig", pb.GetConfigRequest())
    return response.settings
