"""Where the daemon is looked for, and what can be no address of one."""

from pathlib import Path

import pytest
from support import tiny_spec

from kvcached_client import Client, Connection
from kvcached_client.paths import MAX_SOCKET_PATH_BYTES, check_target, default_socket, default_target

LONGEST = "/" + (MAX_SOCKET_PATH_BYTES - 1) * "x"


@pytest.mark.parametrize(
    "target",
    [f"unix:{LONGEST}", f"unix://{LONGEST}", "unix:relative.sock", f"dns:///{LONGEST}", f"{LONGEST}:1", "127.0.0.1:80"],
)
def test_a_target_that_can_be_one_is_left_alone(target: str) -> None:
    assert check_target(target) == target


@pytest.mark.parametrize("target", [f"unix:{LONGEST}x", f"unix://{LONGEST}x", f"unix:{LONGEST[:-1]}é"])
def test_a_socket_path_that_is_too_long_is_refused_at_once_with_the_limit(target: str) -> None:
    message = f"has {MAX_SOCKET_PATH_BYTES + 1} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible"
    with pytest.raises(ValueError, match=message):
        Connection(target)
    with pytest.raises(ValueError, match=message):
        Client(tiny_spec(), target=target)


def test_the_longest_path_that_is_allowed_can_be_connected_to_as_far_as_the_path_goes() -> None:
    with Connection(f"unix:{LONGEST}") as connection:
        assert not connection.is_serving()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KVCACHED_SOCKET_PATH": "/named/k.sock", "XDG_RUNTIME_DIR": "/run/user/7"}, "/named/k.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/kvcached/kvcached.sock"),
        ({}, "/home/someone/.cache/kvcached/run/kvcached.sock"),
    ],
    ids=["named", "of the session", "at home"],
)
def test_the_default_socket_is_the_users_own(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KVCACHED_SOCKET_PATH", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    assert default_socket() == Path(expected)
    assert default_target() == f"unix:{expected}"


def test_on_a_mac_the_default_socket_is_in_the_users_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCACHED_SOCKET_PATH", raising=False)
    monkeypatch.setenv("HOME", "/Users/someone")
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_socket() == Path("/Users/someone/Library/Caches/kvcached/run/kvcached.sock")
