"""Real servers for tests, and what one asks them over HTTP. Nothing here asserts."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from support import HELD_OUT, REFERENCE_MODEL

COUNTING_SERVER = Path(__file__).with_name("counting_server.py")


def text(path: str, n_characters: int) -> str:
    """The beginning of a text that the model never saw."""
    texts = map(json.loads, HELD_OUT.read_text().splitlines())
    found: str = next(item["text"] for item in texts if item["path"].endswith(path))
    return found[:n_characters]


class ServerProcess:
    """mlx_lm.server ("plain") or ours ("offloading"), in its own process; counts what it computes."""

    def __init__(self, directory: Path, kind: str, *flags: str, model: Path = REFERENCE_MODEL) -> None:
        directory.mkdir(exist_ok=True)
        self.kind, self.model, self.flags = kind, model, flags
        self.log, self._calls = directory / "server.log", directory / "calls"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self, timeout: float = 120.0) -> "ServerProcess":
        """Starts the process, and waits until it has loaded its model and answers."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._calls.write_text("")
        command = [sys.executable, str(COUNTING_SERVER), str(self._calls), self.kind]
        command += ["--model", str(self.model), "--port", str(self.port), "--prefill-step-size", "256", *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.1)
        self.complete("a", max_tokens=1)  # waits for the model
        self._calls.write_text("")
        return self

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def complete(self, prompt: str, max_tokens: int = 16, **fields: Any) -> str:
        """What the model says after a prompt, greedily."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **fields}
        answer: str = self.post("/v1/completions", body)["choices"][0]["text"]
        return answer

    def post(self, path: str, body: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def computed(self) -> int:
        """Prompt tokens that the model was fed since the last time: all but the last of each, which is fed alone."""
        sizes = [int(line) for line in self._calls.read_text().split()]
        self._calls.write_text("")
        return sum(size for size in sizes if size > 1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=120)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=60)
