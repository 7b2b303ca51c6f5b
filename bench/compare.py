"""Measures the codecs that ours is compared with, and prints a table: bench/compare.py [--quick] [--json PATH]."""

import argparse
import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from baselines import Affine, Pr418, lossless
from calibration import calibrate
from measuring import Bench, Row, bytes_at_equal_kl, int_family, measure, paper_family, pr418_family
from ours import Tables
from paper_codec import PaperTables
from rich.console import Console
from rich.table import Table
from under_test import Codec, keep

QUICK = {"n_documents": 6, "n_probes": 500}
LAYERS_PER_GROUP = 6
OUR_STEPS = {"8x": 1.1, "16x": 3.0, "32x": 6.5}
SWEPT_STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.5, 5.0, 7.0, 10.0, 14.0)

console = Console(width=180)


def named(bench: Bench) -> tuple[dict[str, Codec], dict[str, list[Codec]]]:
    """The codecs of the table, and the rate sweeps of three of them."""
    calibration = calibrate(bench.model)
    paper = PaperTables(calibration, LAYERS_PER_GROUP)
    ours, one_layer = Tables(calibration, LAYERS_PER_GROUP), Tables(calibration, 1)
    rows: dict[str, Codec] = {
        "exact": keep,
        "lossless-zstd": lossless,
        **{f"ours {ratio}": ours.codec(step) for ratio, step in OUR_STEPS.items()},
        **{f"one layer {ratio}": one_layer.codec(step) for ratio, step in OUR_STEPS.items()},
        "int8": Affine(8),
        "int4": Affine(4),
        "int2": Affine(2),
        "paper 8x": paper.codec(8),
        "paper": paper.codec(16),
        "paper 32x": paper.codec(32),
        "pr418": Pr418(calibration),
        "pr418 without window": Pr418(calibration, window=0),
    }
    sweeps: dict[str, list[Codec]] = {
        "int4": list(int_family()),
        "paper": list(paper_family(calibration, LAYERS_PER_GROUP)),
        "pr418": list(pr418_family(calibration)),
        "one layer": [one_layer.codec(step) for step in SWEPT_STEPS],
    }
    return rows, sweeps


def at_equal_kl(rows: Iterable[Row], sweeps: dict[str, list[Row]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """Our bytes over those of each family, with their interval, wherever its sweep reaches our KL."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for row in (row for row in rows if row.name.startswith("ours")):
        found[row.name] = {}
        for family, measured in sweeps.items():
            with contextlib.suppress(ValueError):  # outside the sweep
                found[row.name][family] = tuple(round(x, 3) for x in bytes_at_equal_kl(row, measured))
    return found


def show(title: str, rows: Iterable[Row]) -> None:
    table = Table(
        "codec", "bits/value", "x", "x, paper's", "KL", "perplexity %", "retrieval", "points", "attention", title=title
    )
    for row in rows:
        found = ["", ""]
        if row.retrieval is not None:
            found = [f"{row.retrieval:.3f}", f"{row.retrieval_delta:+.1f} {_bounds(row, 'retrieval_delta', '+.1f')}"]
        table.add_row(
            row.name,
            f"{row.bits_per_value:.2f}",
            f"{row.compression:.1f}",
            f"{row.compression_paper_counting:.1f}",
            f"{row.kl:.5f} {_bounds(row, 'kl', '.5f')}",
            f"{row.perplexity_delta:+.2f} {_bounds(row, 'perplexity_delta', '+.2f')}",
            *found,
            f"{row.attention_error_mean:.3f} / {row.attention_error_worst:.3f}",
        )
    console.print(table)


def _bounds(row: Row, figure: str, form: str) -> str:
    low, high = row.intervals[figure]
    return f"({low:{form}}..{high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer documents and probes")
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    start = time.perf_counter()
    bench = Bench(**QUICK) if arguments.quick else Bench()
    codecs, families = named(bench)
    console.print(f"exact runs and calibration: {time.perf_counter() - start:.0f} s")
    rows = [measure(name, codec, bench) for name, codec in codecs.items()]
    show(f"{bench.probes.n_probes} probes", rows)
    sweeps = {
        family: [measure(f"{family} {i}", codec, bench, probe=False) for i, codec in enumerate(members)]
        for family, members in families.items()
    }
    for family, measured in sweeps.items():
        show(f"sweep of {family}", measured)
    equal = at_equal_kl(rows, sweeps)
    for name, ratios in equal.items():
        console.print(f"{name}, bytes over theirs at its KL: {ratios}")
    console.print(f"all of it: {time.perf_counter() - start:.0f} s")
    if arguments.json:
        report = {
            "command": f"bench/compare.py{' --quick' * arguments.quick}",
            "bytes_at_equal_kl": equal,
            "rows": [row.as_json() for row in rows],
            "sweeps": {family: [row.as_json() for row in measured] for family, measured in sweeps.items()},
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
