"""What a user of mlx_lm.server gains: conversations that evict each other come back after a restart of everything.

Two conversations, and room for the prompt cache of one. Each begins; server and daemon are stopped and started; then
both go on in turns, on mlx_lm.server and on ours side by side. Time to the first token of a stream; prompt tokens are
counted where the model is called. `make bench` writes bench/results/server.json.
"""

import argparse
import atexit
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import start_daemon
from engine import DATA, REFERENCE_MODEL
from rich.console import Console
from rich.table import Table

from kvcached_mlx import DEFAULT_BLOCK_SIZE

COUNTING_SERVER = DATA.parent.parent / "counting_server.py"
CONVERSATIONS = {"class-based-views/generic-display.html": 4700, "library/cmd.rst.txt": 5000}  # text, characters of it
GO_ON = "\n\nThe rest of it:"
ANSWER_TOKENS = 16
N_ROUNDS = 3
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server streamed. seconds: until the first token came."""

    text: str
    seconds: float
    prompt_tokens: int


class Server:
    """mlx_lm.server ("plain") or ours ("offloading") in a process of its own, with room for one prompt cache."""

    def __init__(self, kind: str, directory: Path, *flags: str) -> None:
        self._kind, self._flags = kind, flags
        self._log, self._calls = directory / f"{kind}.log", directory / f"{kind}.calls"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def start(self) -> None:
        """Starts the process, and waits until it has loaded its model."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [sys.executable, str(COUNTING_SERVER), str(self._calls), self._kind, "--port", str(self._port)]
        command += ["--model", str(REFERENCE_MODEL), "--prompt-cache-size", "1"]
        command += ["--prefill-step-size", str(DEFAULT_BLOCK_SIZE), *self._flags]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        atexit.register(self._process.kill)
        for _ in range(600):
            try:
                self.ask("a", 1)
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                return
        raise SystemExit(f"the server did not start:\n{self._log.read_text()}")

    def ask(self, prompt: str, max_tokens: int = ANSWER_TOKENS) -> Answer:
        """A greedy completion, streamed."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        text, seconds, usage = "", 0.0, {}
        start = time.perf_counter()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    seconds = seconds or time.perf_counter() - start
                    piece = json.loads(line.removeprefix(b"data: "))
                    text += "".join(choice["text"] for choice in piece["choices"])
                    usage = piece.get("usage") or usage
        finally:
            connection.close()
        return Answer(text, seconds, usage["prompt_tokens"])

    def computed(self) -> int:
        """Prompt tokens that the model was fed since the last time: all but the last of each, which is fed alone."""
        sizes = [int(line) for line in self._calls.read_text().split()]
        self._calls.write_text("")
        return sum(size for size in sizes if size > 1)

    def stop(self) -> None:
        """SIGTERM, as service managers stop it."""
        assert self._process
        self._process.terminate()
        self._process.wait(timeout=120)  # whatever the exit code: mlx_lm.server alone may abort when all is done


def documents() -> list[str]:
    """Beginnings of texts that the model never saw."""
    texts = [json.loads(line) for line in (DATA / "text/heldout.jsonl").open()]
    return [
        next(item["text"] for item in texts if item["path"].endswith(path))[:n_characters]
        for path, n_characters in CONVERSATIONS.items()
    ]


def run(directory: Path) -> dict[str, Any]:
    """The story, step by step; returns what it measured."""
    console.print("1. two conversations begin, on mlx_lm.server and on ours")
    daemon, target = start_daemon(directory)
    plain, ours = Server("plain", directory), Server("offloading", directory, "--target", target)
    begun = []
    for server in (plain, ours):
        server.start()
        begun.append([server.ask(document).text for document in documents()])

    console.print("2. servers and daemon are stopped, and started again")
    for server in (plain, ours):
        server.stop()
    daemon.terminate()
    daemon.wait()
    daemon, _ = start_daemon(directory)
    for server in (plain, ours):
        server.start()
        server.computed()

    console.print("3. both conversations go on in turns")
    prompts = [document + answer + GO_ON for document, answer in zip(documents(), begun[0], strict=True)]
    turns: dict[Server, list[Answer]] = {plain: [], ours: []}
    for prompt in N_ROUNDS * prompts:
        for server, answers in turns.items():
            answers.append(server.ask(prompt))
    same = begun[0] == begun[1] and all(a.text == b.text for a, b in zip(turns[plain], turns[ours], strict=True))
    result = report(turns[plain], plain.computed(), turns[ours], ours.computed()) | {"answers_equal": same}
    for process in (plain, ours):
        process.stop()
    daemon.terminate()
    daemon.wait()
    return result


def report(plain: list[Answer], plain_computed: int, ours: list[Answer], ours_computed: int) -> dict[str, Any]:
    seconds = [[answer.seconds for answer in answers] for answers in (plain, ours)]
    (plain_seconds, ours_seconds) = [
        {"median": statistics.median(each), "min": min(each), "max": max(each)} for each in seconds
    ]
    return {
        "command": "make bench",
        "turns": len(plain),
        "prompt_tokens": sum(answer.prompt_tokens for answer in plain),
        "plain": {"first_token_seconds": plain_seconds, "computed_tokens": plain_computed},
        "offloading": {"first_token_seconds": ours_seconds, "computed_tokens": ours_computed},
        "computed_tokens_ratio": ours_computed / plain_computed,
        "first_token_ratio": ours_seconds["median"] / plain_seconds["median"],
    }


def print_report(result: dict[str, Any]) -> None:
    table = Table(f"{result['turns']} turns", "mlx_lm.server", "with kvcached", "ratio")
    plain, ours = result["plain"], result["offloading"]
    seconds = [f"{kind['first_token_seconds']['median']:.2f} s" for kind in (plain, ours)]
    table.add_row("to the first token, median", *seconds, f"{result['first_token_ratio']:.3f}")
    computed = [f"{kind['computed_tokens']:,}" for kind in (plain, ours)]
    table.add_row(
        f"computed of {result['prompt_tokens']:,} tokens", *computed, f"{result['computed_tokens_ratio']:.3f}"
    )
    table.add_row("answers equal", "", "yes" if result["answers_equal"] else "no", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvs") as directory:
        result = run(Path(directory))
    print_report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if not result["answers_equal"]:
        raise SystemExit("failed: the answers are not those of mlx_lm.server")


if __name__ == "__main__":
    main()
