"""Our server and mlx-lm's own over HTTP, with a real daemon: the same answers, most of the prompts not computed.

Both compute prompts in chunks of a block, so that what follows a restored prefix is computed as without a restore.
"""

import http.client
import json
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_servers import ServerProcess, text
from support import REFERENCE_MODEL, DaemonProcess, wait_until

pytestmark = pytest.mark.slow  # every test starts servers that load a model

EVICTING = ("--prompt-cache-size", "1")
BLOCK = 256
# A little more than full blocks, so that next to nothing is left to compute of what was restored.
FIRST, N_FIRST = text("wal-configuration.html", 1800), 532  # tokens
SECOND, N_SECOND = text("timeit.rst.txt", 1950), 797
LONG, N_LONG = text("class-based-views/generic-display.html", 4700), 1608
GO_ON, N_GO_ON = " The rest of it:", 6
Offloading = Callable[..., ServerProcess]
NOT_COUNTED = 2  # of a prompt computed as a whole: its BOS is cached since the start, its last token is fed alone


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """What a user has without us."""
    server = ServerProcess(tmp_path_factory.mktemp("plain"), "plain", *EVICTING).start()
    yield server
    server.stop()


@pytest.fixture
def offloading() -> Iterator[Offloading]:
    """Starts servers of ours; whatever becomes of a test, none of them is left behind."""
    started: list[ServerProcess] = []

    def start(directory: Path, target: str, *flags: str, model: Path = REFERENCE_MODEL) -> ServerProcess:
        server = ServerProcess(directory, "offloading", "--target", target, *EVICTING, *flags, model=model)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.kill()


def turns(server: ServerProcess) -> tuple[list[str], int]:
    """The second turn of two conversations: the answers, and the prompt tokens that were computed."""
    server.computed()
    return [server.complete(FIRST + GO_ON), server.complete(SECOND + GO_ON)], server.computed()


def test_conversations_that_evict_each_other_come_back_after_a_restart_of_everything(
    plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    expected = [plain.complete(FIRST), plain.complete(SECOND)]
    expected_later, n_plain = turns(plain)
    server = offloading(run_dir, daemon.target)
    assert [server.complete(FIRST), server.complete(SECOND)] == expected
    assert server.stop() == 0  # what was not evicted yet is offloaded now
    daemon.restart()
    server.start()
    answers, n_computed = turns(server)
    assert answers == expected_later
    assert n_plain > N_FIRST + N_SECOND
    assert n_computed <= 0.2 * n_plain
    (engine,) = daemon.status().engines
    assert engine.restored_tokens == (N_FIRST // BLOCK + N_SECOND // BLOCK) * BLOCK
    assert engine.name.startswith("mlx_lm.server 0.3")
    assert engine.prefill_tokens_per_second > 0 < engine.restore_tokens_per_second
    assert server.stop() == 0
    log = server.log.read_text()
    assert "a prefix is fetched where more than" in log  # the break-even rule
    assert "Traceback" not in log


def test_a_second_server_computes_at_most_a_block_of_what_the_first_one_stored(
    offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    first, second = (offloading(run_dir / name, daemon.target, "--offload-turns") for name in "ab")
    expected, n_first = first.complete(LONG), first.computed()
    assert n_first == N_LONG - NOT_COUNTED
    assert wait_until(lambda: daemon.status().store.n_tokens >= n_first // BLOCK * BLOCK)
    assert second.complete(LONG) == expected
    assert second.computed() <= BLOCK
    assert sorted(engine.pid for engine in daemon.status().engines) == sorted(
        server.process.pid for server in (first, second) if server.process
    )
    first.stop()
    second.stop()


def test_tenants_do_not_see_each_others_prefixes(offloading: Offloading, daemon: DaemonProcess, run_dir: Path) -> None:
    owner = offloading(run_dir / "a", daemon.target, "--offload-turns", "--namespace", "owner")
    owner.complete(FIRST)
    owner.stop()
    stranger = offloading(run_dir / "b", daemon.target, "--namespace", "stranger")
    stranger.complete(FIRST)
    assert stranger.computed() == N_FIRST - NOT_COUNTED
    stranger.stop()


def test_without_a_daemon_the_server_serves_and_with_one_that_comes_later_it_offloads(
    plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    daemon.stop()
    server = offloading(run_dir, daemon.target)
    expected = [plain.complete(FIRST), plain.complete(SECOND)]
    assert [server.complete(FIRST), server.complete(SECOND)] == expected
    daemon.start()

    def offloaded() -> bool:
        """Each answer evicts, and so offloads, the one before; the circuit breaker lets it through after a pause."""
        return [server.complete(FIRST), server.complete(SECOND)] == expected and daemon.status().store.n_blocks > 0

    assert wait_until(offloaded, timeout=60)
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


class Cutter:
    """Between a server and a daemon: kills the daemon when so many bytes of its answers have passed."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon, self.kill_after = daemon, 1 << 60
        self.killed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            there = socket.socket(socket.AF_UNIX)
            try:
                there.connect(str(self._daemon.socket))
            except OSError:
                caller.close()
                there.close()
                continue
            threading.Thread(target=self._pass, args=(caller, there, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(there, caller, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_answer:
                    self.kill_after -= len(data)
                    if self.kill_after < 0 and not self.killed.is_set():
                        self._daemon.kill()
                        self.killed.set()
                sink.sendall(data)
        except OSError:
            pass
        sink.close()


def test_a_daemon_killed_in_mid_restore_costs_time_only(
    plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    expected = plain.complete(SECOND + GO_ON)
    cutter = Cutter(daemon)
    server = offloading(run_dir, cutter.target)
    server.complete(SECOND)
    server.complete(FIRST)  # evicts the other
    assert wait_until(lambda: daemon.status().store.n_blocks >= N_SECOND // BLOCK)
    server.computed()
    cutter.kill_after = 1 << 20  # of three blocks of about 786 KB
    assert server.complete(SECOND + GO_ON) == expected
    assert cutter.killed.is_set()
    # Blocks that came whole are used; at the least the last one did not.
    assert BLOCK < server.computed() < N_SECOND + N_GO_ON
    daemon.start()
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_daemon_that_hangs_for_a_minute_costs_time_only(
    plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    expected = [plain.complete(FIRST), plain.complete(SECOND)]
    server = offloading(run_dir, daemon.target)
    server.complete(FIRST)
    server.complete(SECOND)
    assert wait_until(lambda: daemon.status().store.n_blocks > 0)
    assert daemon.process
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert [server.complete(FIRST), server.complete(SECOND)] == expected
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    server.computed()

    def restored() -> bool:
        """Whether a turn was served from the daemon again: it asks again after a pause."""
        assert [server.complete(FIRST), server.complete(SECOND)] == expected
        return server.computed() <= N_FIRST + N_SECOND - 2 * BLOCK

    assert wait_until(restored, timeout=120)
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are set by prlimit, which is Linux's")
def test_a_disk_that_is_full_costs_time_only(
    plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    expected = [plain.complete(FIRST), plain.complete(SECOND)]
    server = offloading(run_dir, daemon.target)
    assert daemon.process
    size = (daemon.store / "db/data.mdb").stat().st_size
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for _ in range(2):
        assert [server.complete(FIRST), server.complete(SECOND)] == expected
    counted = 'refused_blocks_total{code="RESOURCE_EXHAUSTED"}'
    assert wait_until(lambda: daemon.status().counters[counted] > 0)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    server.complete(FIRST)
    assert wait_until(lambda: daemon.status().store.n_blocks > 0)
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_model_whose_files_changed_in_place_is_another_model(
    offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    model = run_dir / "model"
    shutil.copytree(REFERENCE_MODEL, model)
    server = offloading(run_dir, daemon.target, "--offload-turns", model=model)
    before = server.complete(FIRST)
    server.stop()
    weights = mx.load(str(model / "model.safetensors"))
    (name,) = (name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    weights[name] = weights[name] * -1
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    changed = ServerProcess(run_dir / "plain", "plain", model=model).start()
    expected = changed.complete(FIRST)
    changed.stop()
    assert expected != before
    server.start()
    assert server.complete(FIRST) == expected
    assert server.computed() == N_FIRST - NOT_COUNTED
    assert len(daemon.status().models) == 2
    server.stop()


@pytest.mark.parametrize("prompt", ["", "a"])
def test_prompts_of_next_to_nothing_are_answered_as_ever(
    prompt: str, plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    server = offloading(run_dir, daemon.target)
    assert [server.complete(prompt) for _ in range(3)] == [plain.complete(prompt) for _ in range(3)]
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_stream_is_the_answer_in_pieces(
    plain: ServerProcess, offloading: Offloading, daemon: DaemonProcess, run_dir: Path
) -> None:
    """Most clients stream: a restore must not disturb that."""
    expected = plain.complete(FIRST)
    server = offloading(run_dir, daemon.target, "--offload-turns")
    server.complete(FIRST)
    server.complete(SECOND)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {"prompt": FIRST, "max_tokens": 16, "temperature": 0.0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    lines = connection.getresponse().read().decode().splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"]) == expected
    server.stop()
