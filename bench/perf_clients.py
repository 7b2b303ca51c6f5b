"""One, four and sixteen clients of one daemon, each in a process of its own: latencies, and who gets how much."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from perf_base import Scale, checked, console, percentiles, running
from rich.progress import track

CLIENT = Path(__file__).with_name("perf_client.py")
N_CLIENTS = (1, 4, 16)


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """`fairness`, the most turns of a client over the median's, and `p99_get_seconds`, with the most clients."""
    found = {}
    for n in track(N_CLIENTS, "1, 4 and 16 clients", console=console):
        with running(directory / str(n), "--quota-bytes", "2GiB") as (target, _):
            found[n] = _together(target, n, scale.client_seconds)
    most = found[max(N_CLIENTS)]
    checked(not most["errors"], f"{most['errors']} calls of {max(N_CLIENTS)} clients failed")
    return {
        "fairness": most["max_over_median"],
        "p99_get_seconds": most["seconds"]["get"]["p99"],
        "clients": {str(n): each for n, each in found.items()},
    }


def _together(target: str, n: int, seconds: float) -> dict[str, Any]:
    """Some clients at once: percentiles over the calls of all, and turns of each."""
    commands = [[sys.executable, str(CLIENT), target, str(number), str(seconds)] for number in range(n)]
    processes = [subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for c in commands]
    for process in processes:
        assert process.stdout
        checked(process.stdout.readline() == "ready\n", "a client did not start")
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    reports = [json.loads(process.communicate()[0]) for process in processes]
    return summary(reports, seconds)


def summary(reports: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    turns = [len(report["seconds"]["get"]) for report in reports]
    calls = {name: np.concatenate([report["seconds"][name] for report in reports]) for name in reports[0]["seconds"]}
    return {
        "errors": sum(report["errors"] for report in reports),
        "turns_of_each": turns,
        "turns_a_second": sum(turns) / seconds,
        "max_over_median": max(turns) / max(statistics.median(turns), 1e-9),
        "median_over_min": statistics.median(turns) / max(min(turns), 1e-9),
        "seconds": {name: percentiles(each.tolist()) for name, each in calls.items()},
    }
