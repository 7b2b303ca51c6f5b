"""Settings: one validator each, whatever the door, and messages that say what to do."""

from pathlib import Path
from typing import Any

import pytest
from support import DaemonProcess, chain, tiny_spec

from kvcached.config import Config, is_live, load
from kvcached.errors import InvalidRequestError, PreconditionError
from kvcached_client import Connection, DaemonError
from kvcached_client._proto import kvcached_pb2 as pb


def test_the_later_door_wins(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('quota_bytes = "1GiB"\nworkers = 3\nzstd_level = 2\n')
    environment = {"KVCACHED_WORKERS": "4", "KVCACHED_ZSTD_LEVEL": "5", "HOME": "/nowhere"}
    config = load({"zstd_level": "7"}, environment, file)
    assert (config.quota_bytes, config.workers, config.zstd_level) == (1 << 30, 4, 7)
    assert config.queue_bytes == Config().queue_bytes


def test_a_namespace_has_the_fidelity_of_its_own_or_that_of_all() -> None:
    config = Config().updated({"fidelity": "exact", "namespace_fidelity": " a=x8,b=c=x16, =auto,,"})
    found = {namespace: config.fidelity_of(namespace) for namespace in ("a", "b=c", "", "b", "A")}
    assert found == {"a": "x8", "b=c": "x16", "": "auto", "b": "exact", "A": "exact"}


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvcached.config.default_file", lambda: tmp_path / "absent.toml")
    assert load({}, {}) == Config()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("quota_bytes", "1MB", "greater than or equal to 1048576"),
        ("quota_bytes", "much", "could not parse value and unit from byte string"),
        ("free_floor_bytes", "-1", "free_floor_bytes"),
        ("max_block_bytes", "0", "greater than or equal to 1048576"),
        ("queue_bytes", "10", "greater than or equal to 1048576"),
        ("drain_seconds", "301", "less than or equal to 300"),
        ("drain_seconds", "nan", "drain_seconds"),
        ("workers", "0", "greater than or equal to 1"),
        ("workers", "257", "less than or equal to 256"),
        ("workers", "two", "valid integer"),
        ("device", "tpu", "'auto', 'cpu' or 'gpu'"),
        ("zstd_level", "20", "less than or equal to 19"),
        ("quota_bytes", "65TiB", "less than or equal to 70368744177664"),
        ("quota_bytes", "99999999999999999999", "quota_bytes"),
        ("idle_seconds", "0", "greater than or equal to 1"),
        ("store_path", "", "a path must not be empty"),
        ("fidelity", "x64", "'auto', 'exact', 'near-lossless', 'x8', 'x16', 'x32', 'compacted-x8' or 'compacted-x16'"),
        ("namespace_fidelity", "chat", "NAMESPACE=FIDELITY, each once, expected"),
        ("namespace_fidelity", "chat=x64", "got 'chat=x64'"),
        ("namespace_fidelity", "chat=x8, chat=exact", "got 'chat=exact'"),
        ("namespace_am_ratio", "chat", "NAMESPACE=RATIO, each once, expected"),
        ("namespace_am_ratio", "chat=2, chat=4", "got 'chat=4'"),
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("log_json", "perhaps", "valid boolean"),
    ],
)
def test_a_bad_value_is_refused_at_every_door_with_its_name_and_origin(
    name: str, value: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'{name} = "{value}"\n')
    doors: list[tuple[str, Any]] = [
        ("flag", lambda: load({name: value}, {}, empty(tmp_path))),
        ("environment", lambda: load({}, {f"KVCACHED_{name.upper()}": value}, empty(tmp_path))),
        (str(file), lambda: load({}, {}, file)),
        ("SetConfig", lambda: Config().updated({name: value})),
    ]
    for origin, door in doors:
        with pytest.raises(InvalidRequestError) as caught:
            door()
        assert f"{name} ({origin})" in str(caught.value)
        assert expected in str(caught.value)
        assert value in str(caught.value)


def empty(directory: Path) -> Path:
    path = directory / "empty.toml"
    path.write_text("")
    return path


def test_an_unknown_setting_is_refused_and_told_which_there_are(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("quota = 3\n")
    with pytest.raises(InvalidRequestError, match=r"quota \(.*config.toml\).*settings are store_path, .*quota_bytes"):
        load({}, {}, file)


def test_an_unknown_variable_of_ours_is_refused_and_those_of_others_are_left_alone(tmp_path: Path) -> None:
    assert load({}, {"KVCACHED_TARGET": "unix:/x", "OTHER": "1"}, empty(tmp_path)) == Config()
    with pytest.raises(InvalidRequestError, match=r"quota \(environment\).*settings are store_path"):
        load({}, {"KVCACHED_QUOTA": "1GiB"}, empty(tmp_path))


def test_paths_of_ones_home_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load({"store_path": "~/store"}, {"KVCACHED_SOCKET_PATH": "~/s/kvcached.sock"}, empty(tmp_path))
    assert (config.store_path, config.socket_path) == (tmp_path / "store", tmp_path / "s/kvcached.sock")


@pytest.mark.parametrize("content", [b"quota_bytes = = 3", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"config.toml cannot be read"):
        load({}, {}, file)
    with pytest.raises(InvalidRequestError, match=r"absent.toml cannot be read"):
        load({}, {}, tmp_path / "absent.toml")


def test_settings_that_need_a_restart_say_so() -> None:
    for name, value in Config().items():
        if is_live(name):
            assert Config().updated({name: value}) == Config()
        else:
            with pytest.raises(PreconditionError, match=f"{name} can only be changed by a restart"):
                Config().updated({name: value})


def set_config(daemon: DaemonProcess, **values: str) -> pb.SetConfigResponse:
    with Connection(daemon.target) as connection:
        response: pb.SetConfigResponse = connection.call("SetConfig", pb.SetConfigRequest(values=values))
        return response


def get_config(daemon: DaemonProcess) -> dict[str, str]:
    with Connection(daemon.target) as connection:
        settings = connection.call("GetConfig", pb.GetConfigRequest()).settings
    return {setting.name: setting.value for setting in settings}


def test_all_settings_are_shown_with_what_they_are(daemon: DaemonProcess) -> None:
    with Connection(daemon.target) as connection:
        settings = connection.call("GetConfig", pb.GetConfigRequest()).settings
    assert [setting.name for setting in settings] == list(Config.model_fields)
    assert all(setting.description for setting in settings)
    assert {s.name for s in settings if s.live} == {n for n in Config.model_fields if is_live(n)}


def test_a_live_change_says_what_changed_and_holds(daemon: DaemonProcess) -> None:
    changed = set_config(daemon, zstd_level="3", queue_bytes="32MiB", free_floor_bytes=str(2 << 30)).settings
    assert {s.name: s.value for s in changed} == {"zstd_level": "3", "queue_bytes": str(32 << 20)}
    assert get_config(daemon)["zstd_level"] == "3"
    assert daemon.status().pool.limit_bytes == 32 << 20


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"zstd_level": "3", "workers": "2"}, "FAILED_PRECONDITION", "workers can only be changed by a restart"),
        ({"zstd_level": "99", "queue_bytes": "32MiB"}, "INVALID_ARGUMENT", "zstd_level"),
        ({"zstd": "3", "queue_bytes": "32MiB"}, "INVALID_ARGUMENT", "zstd_level"),
        ({"quota_bytes": "1TiB", "zstd_level": "3"}, "FAILED_PRECONDITION", "needs a restart"),
    ],
)
def test_changes_are_made_all_or_none(daemon: DaemonProcess, values: dict[str, str], code: str, message: str) -> None:
    before = get_config(daemon)
    with pytest.raises(DaemonError, match=message) as caught:
        set_config(daemon, **values)
    assert caught.value.code == code
    assert get_config(daemon) == before


def test_a_lower_quota_evicts_at_once(daemon: DaemonProcess) -> None:
    spec = tiny_spec(n_layers=8, block_size=1024)
    with daemon.client(spec) as client:
        for prompt in range(8):
            assert client.put(chain(client, [prompt] * 1024))[0].code == "OK"
    set_config(daemon, quota_bytes="1MiB")
    status = daemon.status()
    assert 0 < status.store.n_blocks < 8
    assert status.store.used_bytes <= status.store.quota_bytes == 1 << 20
    assert status.counters['evicted_blocks_total{reason="quota"}'] == 8 - status.store.n_blocks
