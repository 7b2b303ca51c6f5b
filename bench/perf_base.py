"""What the parts of the performance bench share: how long, side by side, and in whose process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo import start_daemon
from gemm_ratio import ONE_THREAD
from rich.console import Console
from rich.progress import track

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. match_blocks: entries of the stores that Match is asked in, the first and last compared."""

    rounds: int
    prefills: int
    match_blocks: tuple[int, ...]
    match_rounds: int
    client_seconds: float
    soak_blocks: int
    decode_rounds: int
    starts: int
    pool_rounds: int


FULL = Scale(25, 5, (1_000, 10_000, 100_000, 1_000_000), 200, 20.0, 20_000, 9, 3, 15)
QUICK = Scale(5, 1, (1_000, 100_000), 60, 2.5, 800, 2, 1, 2)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99, p999 = np.quantile(seconds, (0.5, 0.99, 0.999)).tolist()
    return {"p50": p50, "p99": p99, "p999": p999, "n": len(seconds)}


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, what: str = "") -> dict[str, list[float]]:
    """Seconds of each function, in turn, after a round that only warms: other load weighs on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in track(range(rounds + 1), what, console=console, disable=not what):
        for name, function in functions.items():
            found = seconds_of(function)
            if turn:
                seconds[name].append(found)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Of medians."""
    return float(np.median(over) / np.median(under))


@contextmanager
def running(directory: Path, *flags: str, program: Sequence[str] = ("-m", "kvcached")) -> Iterator[tuple[str, int]]:
    """A daemon of its own: its address and pid. program: see start_daemon."""
    process, target = start_daemon(directory, *flags, program=program)
    try:
        yield target, process.pid
    finally:
        process.terminate()
        process.wait()


def in_process(script: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints as JSON, in a process of its own whose BLAS has one thread."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def checked(condition: bool, what: str) -> None:
    """Ends the run where it would measure something else."""
    if not condition:
        raise SystemExit(f"the bench cannot go on: {what}")
