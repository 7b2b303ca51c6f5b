"""Speed, everything side by side in one run: restores, roads, puts, Match, many clients, workers, start, memory.

`make bench-performance` writes bench/results/performance.json and docs/performance.png; with QUICK=1, within five
minutes, performance.quick.json: fewer rounds, and Match among 10^5 blocks at most. What is measured, and against what:
docs/performance.md, and the parts (perf_*.py).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import perf_clients
import perf_engine
import perf_match
import perf_restore
import perf_roads
import perf_shapes
import perf_soak
from first_light import machine
from perf_base import FULL, QUICK, Scale, console, in_process
from plots import PERFORMANCE, performance
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
POOL = Path(__file__).with_name("perf_pool.py")
WANTED: dict[str, tuple[str, float]] = {
    "shm_over_inband": (">=", 4),
    "shm_over_memcpy": (">=", 0.5),
    "restore_over_codec": (">=", 0.6),
    "two_workers_over_one": (">=", 1.8),
    "restore_over_prefill": (">=", 100),
    "exact_restore_over_load_prompt_cache": ("<=", 3),
    "put_cost_share": ("<=", 0.05),
    "decode_speed_with_offload": (">=", 0.97),
    "match_1e6_over_1e3": ("<=", 3),
    "rss_growth": ("<=", 0.05),
    "fairness": ("<=", 2),
}
KEYS = (*WANTED, "p99_get_seconds", "command")
Part = Callable[[Scale, Path], dict[str, Any]]
PARTS: dict[str, Part] = {
    "pool": lambda scale, _: in_process(POOL, str(scale.pool_rounds)),
    "restore": perf_restore.measure,
    "engine": perf_engine.measure,
    "roads": perf_roads.measure,
    "shapes": perf_shapes.measure,
    "match": perf_match.measure,
    "clients": perf_clients.measure,
    "soak": perf_soak.measure,
}


def measure(scale: Scale, parts: dict[str, Part]) -> dict[str, Any]:
    """What each part found, by its name, and how long it took."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        console.print(f"[bold]{name}")
        with tempfile.TemporaryDirectory(prefix="kvp") as directory:
            start = time.perf_counter()
            Path(directory, "x").mkdir()
            found[name] = part(scale, Path(directory) / "x")
            found[name]["part_seconds"] = time.perf_counter() - start
    return found


def report(found: dict[str, Any], command: str, is_quick: bool) -> dict[str, Any]:
    """The ratios that were promised, first; then all that they were made of."""
    flat = {key: value for part in found.values() for key, value in part.items() if key in KEYS}
    return {
        **{key: command if key == "command" else flat.get(key) for key in KEYS},
        "quick": is_quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **{name: {k: v for k, v in part.items() if k not in KEYS} for name, part in found.items()},
    }


def is_met(key: str, value: float | None) -> bool | None:
    """Whether a ratio is as wanted; None if it was not measured, or nothing is wanted of it."""
    if value is None or key not in WANTED:
        return None
    sign, bound = WANTED[key]
    return value >= bound if sign == ">=" else value <= bound


def print_report(result: dict[str, Any]) -> None:
    table = Table("ratio", "measured", "wanted", "")
    for key in KEYS[:-1]:
        value, wanted = result[key], WANTED.get(key)
        met = {True: "met", False: "missed", None: ""}[is_met(key, value)]
        table.add_row(
            key, "-" if value is None else f"{value:.4g}", f"{wanted[0]} {wanted[1]:g}" if wanted else "", met
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts, printed and not written")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    found = measure(scale, {name: PARTS[name] for name in arguments.only or PARTS})
    command = "make bench-performance" + (" QUICK=1" if arguments.quick else "")
    result = report(found, command, arguments.quick)
    print_report(result)
    if arguments.only:
        print(json.dumps(found, indent=2))
        return
    name = "performance.quick" if arguments.quick else "performance"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    performance(result, RESULTS / f"{name}.png" if arguments.quick else PERFORMANCE)


if __name__ == "__main__":
    main()
