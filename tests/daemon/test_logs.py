"""Logs: one line per event, with the caller's request id, rotated, and never with tokens in them."""

import json
from pathlib import Path

import pytest
from support import DaemonProcess, chain, hashes_of, put_all, tiny_spec

from kvcached.config import Config
from kvcached.errors import InvalidRequestError
from kvcached.logs import configure
from kvcached_client import Connection
from kvcached_client._proto import kvcached_pb2 as pb

SECRET_TOKENS = [987_654_321 + n for n in range(16)]


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(daemon: DaemonProcess, tmp_path: Path) -> Path:
    path = tmp_path / "logs/kvcached.log"
    daemon.restart("--log-file", str(path), "--log-json", "true", "--log-level", "debug")
    return path


def test_a_request_id_goes_from_the_client_into_the_daemons_log(daemon: DaemonProcess, log: Path) -> None:
    with daemon.client(tiny_spec()) as client:
        blocks = chain(client, SECRET_TOKENS)
        client.put(blocks, request_id="put-7")
        client.put(chain(client, range(8))[1:], request_id="refused-7")
        client.match([*hashes_of(blocks), bytes(32)], request_id="match-7")
        list(client.get([*hashes_of(blocks[:2]), b"\7" * 32], request_id="get-7"))
    daemon.stop()
    told = {(e["event"], e.get("request_id")): e for e in events(log)}
    assert told["put", "put-7"]["stored"] == 4
    assert told["put", "refused-7"]["refused"] == 1
    assert "is not held" in str(told["block refused", "refused-7"]["reason"])
    assert (told["match", "match-7"]["asked"], told["match", "match-7"]["held"]) == (5, 4)
    assert (told["get", "get-7"]["sent"], told["get", "get-7"]["missed"]) == (2, 1)
    daemon.start()


def test_tokens_are_never_logged_not_even_of_what_is_refused(daemon: DaemonProcess, log: Path) -> None:
    with daemon.client(tiny_spec()) as client:
        blocks = put_all(client, chain(client, SECRET_TOKENS))
        client.match(hashes_of(blocks))
        wrong = chain(client, SECRET_TOKENS)
        client.put([wrong[0], type(wrong[1])(**{**fields(wrong[1]), "token_ids": SECRET_TOKENS[:4]})])
        client.put([type(wrong[0])(**{**fields(wrong[0]), "token_ids": SECRET_TOKENS[:3]})])
    daemon.stop()
    text = log.read_text()
    assert "block refused" in text
    for token in SECRET_TOKENS:
        assert str(token) not in text
        assert f"{token:x}" not in text
    daemon.start()


def fields(block: object) -> dict[str, object]:
    return {name: getattr(block, name) for name in block.__slots__}  # type: ignore[attr-defined]


def test_a_request_id_cannot_forge_lines(daemon: DaemonProcess, log: Path) -> None:
    with daemon.client(tiny_spec()) as client, Connection(daemon.target) as connection:
        client.match([bytes(32)])  # registers the model
        request = pb.MatchRequest(model_id=client.model_id, request_id='x\n{"event": "stopped"}' + "y" * 200)
        connection.call("Match", request)
    daemon.stop()
    (told,) = [e for e in events(log) if str(e.get("request_id")).startswith("x")]
    assert told["request_id"] == ('x{"event": "stopped"}' + "y" * 200)[:63]
    daemon.start()


def test_a_full_log_is_rotated_and_old_ones_go(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "logs/kvcached.log"
    daemon.restart("--log-file", str(path), "--log-file-bytes", "4096", "--log-file-count", "2")
    with daemon.client(tiny_spec()) as client:
        for n in range(150):
            client.match([bytes([n]) * 32])
    daemon.stop()
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["kvcached.log", "kvcached.log.1", "kvcached.log.2"]
    assert all(file.stat().st_size <= 4096 for file in path.parent.iterdir())
    assert "stopped" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    daemon.start()


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"log_file .*file/kvcached.log cannot be written"):
        configure(Config(log_file=str(tmp_path / "file/kvcached.log")))
