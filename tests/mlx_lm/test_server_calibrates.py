"""A server that calibrates its model before it serves, over HTTP and with a real daemon. The model is a tiny one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlx_models import build, save
from mlx_servers import ServerProcess, text
from support import REFERENCE_MODEL, DaemonProcess, wait_until

from kvcached_client._proto import kvcached_pb2 as pb

pytestmark = pytest.mark.slow  # every test starts servers that load a model

PROMPT = text("wal-configuration.html", 1800)  # two blocks and some more
FLAGS = ("--offload-turns", "--calibrate", "--calibrate-tokens", "3000")
Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and the words of the reference model."""
    directory = tmp_path_factory.mktemp("tiny")
    built, config = build("llama", overrides={"vocab_size": 2048, "tie_word_embeddings": True})
    save(built, config, directory)
    for file in REFERENCE_MODEL.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def start(model: Path, daemon: DaemonProcess, run_dir: Path) -> Iterator[Start]:
    started: list[ServerProcess] = []

    def start(*flags: str) -> ServerProcess:
        server = ServerProcess(run_dir, "offloading", "--target", daemon.target, *flags, model=model)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.kill()


def test_a_server_calibrates_once_and_stores_at_a_loss_that_it_told(start: Start, daemon: DaemonProcess) -> None:
    server = start(*FLAGS)
    (model,) = daemon.status().models
    assert model.bundle_id
    log = server.log.read_text()
    assert "calibrating on 3000 tokens, before serving" in log
    assert "calibration, measure: " in log
    for profile in ("near-lossless", "x8", "x16", "x32"):
        assert f"bundle {model.bundle_id.hex()[:12]}, {profile}: " in log
    expected = server.complete(PROMPT)
    assert wait_until(lambda: daemon.status().store.n_blocks == 2)
    (held,) = (status for status in daemon.status().models[0].fidelities if status.n_blocks)
    assert held.kind == pb.FIDELITY_KIND_CODED
    assert server.stop() == 0
    server.start()
    assert server.log.read_text().count("calibrating on") == 1
    assert len(server.complete(PROMPT)) == len(expected)
    (engine,) = [engine for engine in daemon.status().engines if engine.restored_tokens]
    assert 0 < engine.restored_tokens <= 532 - 128
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_calibration_that_fails_is_told_and_the_model_served_exactly(
    start: Start, daemon: DaemonProcess, run_dir: Path
) -> None:
    short = run_dir / "short.txt"
    short.write_text("a few words")
    server = start(*FLAGS, "--calibrate-text", str(short))
    assert "not calibrated, prompt caches are kept exactly: " in server.log.read_text()
    assert "tokens of text are needed" in server.log.read_text()
    server.complete(PROMPT)
    assert wait_until(lambda: daemon.status().store.n_blocks == 2)
    assert not daemon.status().models[0].bundle_id
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_without_a_daemon_nothing_is_calibrated_and_everything_served(start: Start, daemon: DaemonProcess) -> None:
    daemon.stop()
    server = start(*FLAGS)
    assert "not calibrated, prompt caches are kept exactly: UNAVAILABLE" in server.log.read_text()
    server.complete(PROMPT)
    assert server.stop() == 0
    daemon.start()
