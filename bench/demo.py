"""The main job on real input: an engine's evicted cache survives kill -9 of everything, and comes back.

One engine prefills a document and hands its cache to the daemon; both are killed with SIGKILL; new ones start, restore,
and continue. The continuation must be the one of an engine that never evicted. `make demo`, `make demo JSON=path`.

`make demo FIDELITY=x8` calibrates the model first and stores blocks at a loss, which is then measured: predictions of
the document's own next tokens against those on the exact cache.
"""

import argparse
import atexit
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcached_client import Connection
from kvcached_client._proto import kvcached_pb2 as pb

BLOCK_TOKENS = 256
RECOMPUTED_TOKENS = 128  # on top of a prefix that is not exact
ENGINE = Path(__file__).with_name("engine.py")
console = Console(highlight=False)


def start_daemon(
    directory: Path, *flags: str, program: Sequence[str] = ("-m", "kvcached")
) -> tuple["subprocess.Popen[bytes]", str]:
    """A daemon that answers, and its address. program: what Python is to run."""
    socket = directory / "run/kvcached.sock"
    command = [sys.executable, *program, "--store-path", str(directory / "store"), "--log-level", "warning"]
    command += ["--http-port", "0", *flags]
    process = subprocess.Popen([*command, "--socket-path", str(socket)])
    atexit.register(process.kill)  # whatever goes wrong, nothing is left behind
    with Connection(f"unix:{socket}") as connection:
        for _ in range(600):
            if connection.is_serving():
                return process, f"unix:{socket}"
            if process.poll() is not None:
                break
            time.sleep(0.05)
    raise SystemExit("the daemon did not start")


def start_engine(role: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ENGINE), role, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def report_of(engine: "subprocess.Popen[str]") -> dict[str, Any]:
    """The line an engine prints."""
    assert engine.stdout
    line = engine.stdout.readline()
    if not line:
        raise SystemExit(f"the engine ended with exit code {engine.wait()}")
    report: dict[str, Any] = json.loads(line)
    return report


def finish(engine: "subprocess.Popen[str]") -> dict[str, Any]:
    report = report_of(engine)
    engine.communicate()
    return report


def status(target: str) -> pb.StatusResponse:
    with Connection(target) as connection:
        response: pb.StatusResponse = connection.call("Status", pb.StatusRequest())
        return response


def run(directory: Path, n_tokens: int, fidelity: str) -> dict[str, Any]:
    """The story, step by step; returns what it measured. fidelity: empty for exact."""
    size = ["--tokens", str(n_tokens)]
    if fidelity:
        size += ["--fidelity", fidelity, "--exact-file", str(directory / "exact.npy")]
    console.print("1. an engine that never evicts prefills and continues")
    plain = finish(start_engine("plain", *size))

    console.print("2. another one prefills and hands its cache to a daemon")
    daemon, target = start_daemon(directory)
    if fidelity:
        console.print("   first the model is calibrated, which takes a minute or two")
        finish(start_engine("calibrate", target, "--fidelity", fidelity))
    engine = start_engine("offload", target, *size)
    offloaded = report_of(engine)
    stored = status(target).store
    console.print(f"   {offloaded['acknowledged_blocks']} blocks acknowledged")

    console.print("3. kill -9, both of them")
    for process in (daemon, engine):
        process.kill()
        process.wait()

    console.print("4. a new daemon and a new engine restore and continue")
    daemon, target = start_daemon(directory)
    restored = finish(start_engine("restore", target, *size))
    hit_tokens = int(status(target).counters["lookup_hit_tokens_total"])
    daemon.terminate()
    if daemon.wait() != 0:
        raise SystemExit(f"the daemon ended with exit code {daemon.returncode}")
    result = {
        "tokens": n_tokens,
        "source_bytes": stored.source_bytes,
        "stored_bytes": stored.stored_bytes,
        "prefill_seconds": plain["prefill_seconds"],
        "restore_seconds": restored["restore_seconds"],
        "first_token_seconds": restored["first_token_seconds"],
        "restored_tokens": restored["restored_tokens"],
        "computed_tokens": restored["computed_tokens"],
        "daemon_hit_tokens": hit_tokens,
        "identical": restored["generated"] == plain["generated"],
        "continuation": restored["text"],
    }
    if fidelity:
        result |= {name: restored[name] for name in ("fidelities", "kl", "perplexity_delta", "measured_tokens")}
        result["fidelity"] = fidelity
    return result


def problems(result: dict[str, Any]) -> list[str]:
    """Why the story did not go as it must."""
    found, limit = [], BLOCK_TOKENS
    if "fidelity" in result:
        limit += RECOMPUTED_TOKENS
        if (fidelities := result["fidelities"]) != [result["fidelity"]]:
            found.append(f"blocks were to be restored as {result['fidelity']}, and are {', '.join(fidelities)}")
    elif not result["identical"]:
        found.append("the continuation is not the one of an engine that never evicted")
    if result["computed_tokens"] > limit:
        found.append(f"{result['computed_tokens']} tokens were computed again, more than {limit}")
    return found


def print_table(result: dict[str, Any]) -> None:
    table = Table(show_header=False)
    rows = {
        "tokens": f"{result['tokens']:,}",
        "source bytes": f"{result['source_bytes']:,}",
        "stored bytes": f"{result['stored_bytes']:,}",
        "compression": f"{result['source_bytes'] / result['stored_bytes']:.2f}x, {result.get('fidelity', 'lossless')}",
        "prefill time": f"{result['prefill_seconds']:.2f} s to the first token",
        "restore time": f"{result['restore_seconds']:.2f} s, {result['first_token_seconds']:.2f} s to the first token",
        "tokens restored": f"{result['restored_tokens']:,} (the daemon counted {result['daemon_hit_tokens']:,})",
        "tokens computed": f"{result['computed_tokens']:,} of the prompt",
        "continuation": repr(result["continuation"][:60]),
        "continuation identical": "yes" if result["identical"] else "no",
    }
    if "fidelity" in result:
        rows["loss"] = (
            f"KL {result['kl']:.2g} nats a token, perplexity {result['perplexity_delta']:+.2f} %, "
            f"over the document's next {result['measured_tokens']} tokens"
        )
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1700, help="length of the document")
    parser.add_argument("--fidelity", default="", help="store blocks as this profile, calibrated first")
    parser.add_argument("--json", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvd") as directory:
        result = run(Path(directory), arguments.tokens, arguments.fidelity)
    print_table(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if found := problems(result):
        raise SystemExit(f"failed: {'; '.join(found)}")


if __name__ == "__main__":
    main()
