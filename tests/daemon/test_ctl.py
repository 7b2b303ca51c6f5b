"""kvcachedctl as its users run it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import DaemonProcess, chain, damage_frame, tiny_spec

from kvcached_client._proto import kvcached_pb2 as pb

CTL = Path(sys.executable).with_name("kvcachedctl")


def ctl(daemon: DaemonProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(CTL), "--target", daemon.target, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def filled(daemon: DaemonProcess) -> DaemonProcess:
    with daemon.client(tiny_spec()) as client:
        blocks = chain(client, list(range(12)))
        assert [result.code for result in client.put(blocks)] == ["OK"] * 3
        assert client.match([*client.chain(list(range(12))), bytes(32)]).n_tokens == 12
    return daemon


def test_status_shows_what_is_held(filled: DaemonProcess) -> None:
    result = ctl(filled, "status")
    assert result.returncode == 0, result.stderr
    for expected in ("3 (12 tokens)", "75.0% (12 of 16 tokens", "tiny", "EXACT", "64.0 MiB", str(filled.store)):
        assert expected in " ".join(result.stdout.split()) or expected in result.stdout.replace("\n", "")


def test_status_as_json_has_the_fields_of_the_protocol(filled: DaemonProcess) -> None:
    result = ctl(filled, "status", "--json")
    status = json.loads(result.stdout)
    assert status["store"]["n_blocks"] == 3
    assert status["store"]["source_bytes"] == 3 * 2 * 2 * 2 * 4 * 8 * 2
    assert status["store"]["quota_bytes"] == 64 << 20
    assert status["counters"]["lookup_hit_tokens_total"] == 12
    (model,) = status["models"]
    assert model["model_id"] == tiny_spec().model_id.hex()
    assert model["spec"]["fingerprint"]["weights"] == "w0"
    assert model["fidelities"][0]["kind"] == "FIDELITY_KIND_EXACT"
    assert status["uptime_seconds"] > 0


def test_status_names_the_device_that_is_used(daemon: DaemonProcess) -> None:
    daemon.restart("--device", "cpu")
    assert daemon.status().pool.device == "cpu"
    assert "workers, cpu" in " ".join(ctl(daemon, "status").stdout.split())


@pytest.mark.skipif(sys.platform == "darwin", reason="there may be a GPU that mlx can use")
def test_a_daemon_that_is_told_to_use_a_gpu_that_is_not_there_says_so_and_serves(daemon: DaemonProcess) -> None:
    daemon.restart("--device", "gpu")
    assert daemon.status().pool.device == "cpu"
    assert "there is no GPU that mlx can use" in daemon.log.read_text()


def test_check_passes_on_a_sound_store(filled: DaemonProcess) -> None:
    result = ctl(filled, "check", "--frames")
    assert (result.returncode, result.stdout) == (0, "0 problems in 3 blocks, 3 frames decoded\n")
    assert json.loads(ctl(filled, "check", "--json").stdout) == {"problems": [], "n_blocks": 3, "n_frames_decoded": 0}


def test_check_fails_on_a_damaged_frame_and_names_it(filled: DaemonProcess) -> None:
    filled.stop()
    with filled.client(tiny_spec()) as client:
        damaged = client.chain(list(range(12)))[1]
    damage_frame(filled, damaged)
    filled.start()
    result = ctl(filled, "check", "--frames")
    assert result.returncode == 1
    assert damaged.hex()[:16] in result.stdout
    assert "1 problems in 3 blocks" in result.stdout


def test_exit_codes_tell_usage_from_absence(daemon: DaemonProcess) -> None:
    assert ctl(daemon, "nonsense").returncode == 2
    assert ctl(daemon, "status", "--nonsense").returncode == 2
    too_long = ctl(daemon, "--target", f"unix:/{'x' * 200}", "status")
    assert (too_long.returncode, "has 201 bytes, at most" in too_long.stderr) == (2, True)
    daemon.stop()
    for command in ("status", "check"):
        result = ctl(daemon, command)
        assert result.returncode == 3
        assert f"no daemon answers on {daemon.target}" in result.stderr
        assert result.stdout == ""


def test_help_and_version_need_no_daemon() -> None:
    for flag in ("--help", "--version"):
        result = subprocess.run([str(CTL), flag], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0
        assert result.stdout


@pytest.mark.parametrize("name", ["[/foo]", "[red]x", "a\\["])
def test_names_are_shown_as_they_are(daemon: DaemonProcess, name: str) -> None:
    daemon.call("RegisterModel", pb.RegisterModelRequest(spec=replace(tiny_spec(), name=name).to_proto()))
    result = ctl(daemon, "status")
    assert result.returncode == 0
    assert name in result.stdout
