"""The ratio of compaction: from 1 to 8 at every door, and everywhere refused in the same words."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from bundles import low_rank_chain
from support import DaemonProcess, data_of, header_of, put_parts, tiny_spec

from kvcached.config import Config, load
from kvcached.errors import InvalidRequestError
from kvcached_client import Client, DaemonError
from kvcached_client._proto import kvcached_pb2 as pb

BAD = ("0", "-1", "0.5", "8.01", "nan", "inf", "four")
NUMBERS = BAD[:-1]
CTL = Path(sys.executable).with_name("kvcachedctl")
_serial = count()


def words(came: object) -> str:
    return f"am_ratio must be a number from 1 to 8, got {came!r}"


def ctl(daemon: DaemonProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(CTL), "--target", daemon.target, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def start(directory: Path, *flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A daemon that should not come up."""
    command = [sys.executable, "-m", "kvcached", "--store-path", str(directory / "store"), "--http-port", "0", *flags]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KVCACHED_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**clean, **environment})


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client of a model of its own, known to the daemon."""
    with shared_daemon.client(tiny_spec(weights=f"ratio {next(_serial)}", block_size=16)) as client:
        client.match([])
        yield client
    values = {"fidelity": "auto", "am_ratio": "4", "namespace_am_ratio": ""}
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values=values))


def setting(daemon: DaemonProcess, name: str) -> str:
    settings = daemon.call("GetConfig", pb.GetConfigRequest()).settings
    return next(setting.value for setting in settings if setting.name == name)


# ---- settings


@pytest.mark.parametrize("value", BAD)
def test_a_setting_that_is_no_ratio_is_refused_in_the_same_words_at_every_door(value: str, tmp_path: Path) -> None:
    file, empty = tmp_path / "config.toml", tmp_path / "empty.toml"
    file.write_text(f'am_ratio = "{value}"\n')
    empty.write_text("")
    doors: dict[str, Callable[[], Config]] = {
        "flag": lambda: load({"am_ratio": value}, {}, empty),
        "environment": lambda: load({}, {"KVCACHED_AM_RATIO": value}, empty),
        str(file): lambda: load({}, {}, file),
        "SetConfig": lambda: Config().updated({"am_ratio": value}),
    }
    for origin, door in doors.items():
        with pytest.raises(InvalidRequestError) as caught:
            door()
        assert str(caught.value) == f"am_ratio ({origin}): {words(value)}"


@pytest.mark.parametrize(
    ("written", "came"),
    [("0", 0), ("-1", -1), ("0.5", 0.5), ("8.01", 8.01), ("nan", float("nan")), ("inf", float("inf")), ("true", True)],
)
def test_a_number_in_the_file_that_is_no_ratio_is_refused_in_the_same_words(
    written: str, came: object, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"am_ratio = {written}\n")
    with pytest.raises(InvalidRequestError) as caught:
        load({}, {}, file)
    assert str(caught.value) == f"am_ratio ({file}): {words(came)}"


def test_a_daemon_with_a_ratio_that_is_none_does_not_start_and_says_why(run_dir: Path) -> None:
    file = run_dir / "config.toml"
    file.write_text("am_ratio = 8.01\n")
    for result, expected in (
        (start(run_dir, "--am-ratio", "-1"), f"am_ratio (flag): {words('-1')}"),
        (start(run_dir, KVCACHED_AM_RATIO="four"), f"am_ratio (environment): {words('four')}"),
        (start(run_dir, "--config", str(file)), f"am_ratio ({file}): {words(8.01)}"),
    ):
        assert result.returncode == 2
        assert expected in result.stderr


def test_ratios_at_the_ends_of_the_range_are_taken_at_every_door(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("am_ratio = 8\n")
    assert load({}, {}, file).am_ratio == 8
    assert load({}, {"KVCACHED_AM_RATIO": "1"}, file).am_ratio == 1
    assert load({"am_ratio": "2.5"}, {"KVCACHED_AM_RATIO": "1"}, file).am_ratio == 2.5


def test_a_namespace_has_the_ratio_of_its_own_or_that_of_all() -> None:
    config = Config().updated({"am_ratio": "3", "namespace_am_ratio": " a=2,b=c=8, =1.5,,"})
    found = {namespace: config.am_ratio_of(namespace) for namespace in ("a", "b=c", "", "b")}
    assert found == {"a": 2, "b=c": 8, "": 1.5, "b": 3}


@pytest.mark.parametrize("value", BAD)
def test_a_ratio_of_a_namespace_is_refused_in_the_same_words(value: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Config().updated({"namespace_am_ratio": f"good=2,bad={value}"})
    assert f"namespace_am_ratio (SetConfig): {words(value)}" in str(caught.value)


# ---- the running daemon


@pytest.mark.parametrize("value", BAD)
@pytest.mark.usefixtures("client")
def test_a_running_daemon_refuses_what_is_no_ratio_and_keeps_the_one_that_it_has(
    shared_daemon: DaemonProcess, value: str
) -> None:
    with pytest.raises(DaemonError) as caught:
        shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"am_ratio": value}))
    assert str(caught.value) == f"INVALID_ARGUMENT: am_ratio (SetConfig): {words(value)}"
    result = ctl(shared_daemon, "config", "set", "am_ratio", value)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.endswith(f"refused: INVALID_ARGUMENT: am_ratio (SetConfig): {words(value)}\n")
    assert setting(shared_daemon, "am_ratio") == "4.0"


@pytest.mark.usefixtures("client")
def test_the_ratio_is_shown_and_changed_while_the_daemon_runs(shared_daemon: DaemonProcess) -> None:
    assert ctl(shared_daemon, "config", "get", "am_ratio").stdout == "4.0\n"
    assert ctl(shared_daemon, "config", "set", "am_ratio", "2.5").stdout == "am_ratio = 2.5\n"
    assert ctl(shared_daemon, "config", "get", "am_ratio").stdout == "2.5\n"
    assert ctl(shared_daemon, "config", "set", "am_ratio", "2.5").stdout == "am_ratio was 2.5 already\n"
    listed = ctl(shared_daemon, "config").stdout
    assert [line.split()[:3] for line in listed.splitlines() if line.startswith("am_ratio")] == [
        ["am_ratio", "2.5", "live"]
    ]


@pytest.mark.usefixtures("client")
def test_a_compacted_fidelity_is_set_as_any_other(shared_daemon: DaemonProcess) -> None:
    for name in ("compacted-x8", "compacted-x16"):
        assert ctl(shared_daemon, "config", "set", "fidelity", name).stdout == f"fidelity = {name}\n"
    result = ctl(shared_daemon, "config", "set", "fidelity", "compacted-x32")
    assert result.returncode == 1
    assert "'compacted-x8' or 'compacted-x16', got 'compacted-x32'" in result.stderr


def test_settings_that_are_none_or_need_a_restart_are_one_line(shared_daemon: DaemonProcess) -> None:
    for arguments, expected in (
        (["get", "ratio"], "no setting 'ratio'; settings are store_path, "),
        (["set", "ratio", "4"], "settings are store_path, "),
        (["set", "workers", "2"], "workers can only be changed by a restart"),
    ):
        result = ctl(shared_daemon, "config", *arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert expected in result.stderr
    assert ctl(shared_daemon, "config", "set", "am_ratio").returncode == 2


# ---- a put


def put_with(client: Client, **fields: Any) -> pb.PutResult:
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    header = header_of(client, block)
    header.MergeFrom(pb.Header(**fields))
    (result,) = put_parts(client._connection.target, [header, *data_of(block)])
    return result


@pytest.mark.parametrize("value", NUMBERS[1:])
def test_a_put_with_a_ratio_that_is_none_is_refused_in_the_same_words(client: Client, value: str) -> None:
    result = put_with(client, store_as="compacted-x8", am_ratio=float(value))
    assert (result.code, result.message) == ("INVALID_ARGUMENT", words(float(value)))


def test_a_put_without_a_ratio_or_with_one_in_range_is_taken(client: Client) -> None:
    for ratio in (0, 1, 1.0001, 8):
        assert put_with(client, store_as="compacted-x8", am_ratio=ratio).code == "OK"


@pytest.mark.parametrize("name", ["", "exact", "x8"])
def test_a_ratio_goes_with_a_fidelity_that_compacts(client: Client, name: str) -> None:
    result = put_with(client, store_as=name, am_ratio=4)
    assert result.code == "INVALID_ARGUMENT"
    assert result.message == f"am_ratio goes with compacted-x8 or compacted-x16 in store_as, got {name!r} and 4"


@pytest.mark.parametrize("value", [0, -1, 0.5, 8.01, float("nan"), float("inf"), "four", True, 8.0000001])
def test_the_client_refuses_to_put_with_a_ratio_that_is_none(client: Client, value: Any) -> None:
    with pytest.raises(ValueError, match="am_ratio must be") as caught:
        client.put([], store_as="compacted-x8", am_ratio=value)
    assert str(caught.value) == words(value)


def test_the_client_sends_the_ratio_that_it_was_given(client: Client) -> None:
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    assert [r.code for r in client.put([block], store_as="compacted-x8", am_ratio=8.0)] == ["OK"]
    (result,) = client.put([block], store_as="x8", am_ratio=2.0)
    assert result.message.endswith("got 'x8' and 2")
