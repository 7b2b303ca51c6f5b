"""What our profiles and other codecs cost, on the reference model: `make bench-codec`, `make bench-codec QUICK=1`.

Rows of the table are codecs at one setting each. Sweeps are families of codecs at many rates, against which our
profiles are held at equal next-token KL. Writes bench/results/codec.json and the plot of docs/quality.md; a quick run
has fewer documents and probes, and writes codec.quick.json.
"""

import os

if "OMP_NUM_THREADS" not in os.environ:  # documents run side by side, and speeds are those of one core
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import argparse
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import compaction_cost
import gemm_ratio
import plots
from baselines import Affine, Pr418, lossless
from measuring import Bench, Row, bytes_at_equal_kl, int_family, paper_family, pr418_family
from ours import Ours, calibration, entropy_overhead
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from under_test import Codec, Half, keep

from kvcached.block import KVBlock
from kvcached.codec.bundle import PROFILES

RESULTS = Path(__file__).resolve().parent / "results"
QUICK, FULL = {"n_documents": 6, "n_probes": 500}, {"n_documents": 24, "n_probes": 2000}
LAYERS_PER_GROUP = 6
TABLE_COMPRESSION = 16.0  # of rows that stand for a whole family
OUR_SWEEP = (4.0, 8.0, 11.0, 16.0, 24.0, 32.0, 48.0)
LESSER_SWEEP = (3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0)
COMPACTED_BLOCKS = 24  # on which compaction is timed
HELD_AGAINST = ("x8", "x16", "x32")

console = Console(width=180)


class Codecs:
    """Everything that is measured, all of it calibrated on the same text."""

    def __init__(self, bench: Bench) -> None:
        model = bench.model
        weighted = calibration(model, LAYERS_PER_GROUP, compacts=True)
        self.bundle = weighted.fit(PROFILES)
        self.profiles = {name: Ours(self.bundle.coder(name)) for name in PROFILES}
        unweighted = calibration(model, LAYERS_PER_GROUP, weighted=False)
        one_layer = calibration(model, 1)
        with ThreadPoolExecutor(2) as pool:
            families = pool.map(Ours.family, (weighted, unweighted, one_layer), (OUR_SWEEP, LESSER_SWEEP, LESSER_SWEEP))
        ours, without_metric, by_layer = families
        at_table = LESSER_SWEEP.index(TABLE_COMPRESSION)
        self.sweeps: dict[str, list[Codec]] = {
            "ours": [*ours],
            "unweighted": [*without_metric],
            "one_layer": [*by_layer],
            "paper": list(paper_family(bench.calibration, LAYERS_PER_GROUP)),
            "pr418": list(pr418_family(bench.calibration)),
            "int4": list(int_family()),
        }
        self.rows: dict[str, Codec] = {
            "exact": keep,
            **self.profiles,
            "paper": paper_family(bench.calibration, LAYERS_PER_GROUP, [TABLE_COMPRESSION])[0],
            "pr418": Pr418(bench.calibration),
            "unweighted": without_metric[at_table],
            "one_layer": by_layer[at_table],
            "int4": Affine(4),
            "int8": Affine(8),
            "lossless-zstd": lossless,
        }


def measure(bench: Bench, codecs: Codecs) -> tuple[list[Row], dict[str, list[Row]]]:
    """All rows, and all sweeps without probes."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("codecs", total=len(codecs.rows) + sum(map(len, codecs.sweeps.values())))

        def measured(name: str, codec: Codec, *, probe: bool) -> Row:
            progress.update(task, description=name)
            row = bench.measure(name, codec, probe=probe)
            progress.advance(task)
            return row

        rows = [measured(name, codec, probe=True) for name, codec in codecs.rows.items()]
        sweeps = {
            family: [measured(f"{family} {i}", codec, probe=False) for i, codec in enumerate(members)]
            for family, members in codecs.sweeps.items()
        }
    return rows, sweeps


def at_equal_kl(
    rows: Iterable[Row], sweeps: Mapping[str, list[Row]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, tuple[float, float]]]]:
    """Our bytes over those of each family at our profile's KL, and their intervals, where a sweep reaches it."""
    ratios: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for row in (row for row in rows if row.name in HELD_AGAINST):
        ratios[row.name], intervals[row.name] = {}, {}
        for family, measured in sweeps.items():
            if family == "ours":
                continue
            try:
                found = bytes_at_equal_kl(row, measured)
            except ValueError as error:
                console.print(f"{row.name} against {family}: {error}")
                continue
            ratios[row.name][family] = round(found.value, 4)
            intervals[row.name][family] = (round(found.low, 4), round(found.high, 4))
    return ratios, intervals


def report(bench: Bench, quick: bool) -> tuple[dict[str, Any], list[Row], dict[str, list[Row]]]:
    codecs = Codecs(bench)
    rows, sweeps = measure(bench, codecs)
    ratios, intervals = at_equal_kl(rows, sweeps)
    blocks = list(bench.held_out.blocks(1 << 30))
    overheads = {name: entropy_overhead(codecs.profiles[name], blocks) for name in HELD_AGAINST}
    gemm = gemm_ratio.measure()
    content = {
        "command": f"make bench-codec{' QUICK=1' * quick}",
        "model": "tests/data/model/qwen3-5m",
        "n_documents": bench.n_documents,
        "n_probes": bench.probes.n_probes,
        "units": "perplexity_delta, retrieval and attention errors are parts of 1; kl is in nats a token",
        "rows": [row.as_json() for row in rows],
        "bytes_at_equal_kl": ratios,
        "bytes_at_equal_kl_intervals": intervals,
        "entropy_overhead": max(overheads["x8"], overheads["x16"]),
        "entropy_overheads": overheads,
        "decode_over_gemm": gemm["decode_over_gemm"],
        "encode_over_gemm": gemm["encode_over_gemm"],
        "gemm": gemm,
        "compaction": compaction_cost.measure(codecs.bundle, _dense(blocks[:COMPACTED_BLOCKS])),
        "sweeps": {family: [row.as_json() for row in measured] for family, measured in sweeps.items()},
    }
    return content, rows, sweeps


def _dense(blocks: Iterable[tuple[Half, Half, int]]) -> list[KVBlock]:
    return [KVBlock.dense({"keys": k, "values": v}, k.shape[2], at) for k, v, at in blocks]


def show(rows: Iterable[Row]) -> None:
    table = Table("codec", "bits/value", "x", "x, paper's", "KL", "perplexity %", "retrieval", "points", "attention")
    for row in rows:
        found = ["", ""]
        if row.retrieval is not None and row.retrieval_delta is not None:
            points = f"{100 * row.retrieval_delta:+.2f} {_bounds(row, 'retrieval_delta', '+.2f', 100)}"
            found = [f"{row.retrieval:.3f}", points]
        table.add_row(
            row.name,
            f"{row.bits_per_value:.2f}",
            f"{row.compression:.1f}",
            f"{row.compression_paper_counting:.1f}",
            f"{row.kl:.1e} {_bounds(row, 'kl', '.1e')}",
            f"{100 * row.perplexity_delta:+.2f} {_bounds(row, 'perplexity_delta', '+.2f', 100)}",
            *found,
            f"{row.attention_error_mean:.3f} / {row.attention_error_worst:.3f}",
        )
    console.print(table)


def _bounds(row: Row, figure: str, form: str, times: float = 1) -> str:
    low, high = row.intervals[figure]
    return f"({times * low:{form}}..{times * high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer documents and probes")
    quick = parser.parse_args().quick
    bench = Bench(**(QUICK if quick else FULL))
    content, rows, sweeps = report(bench, quick)
    show(rows)
    for name in ("bytes_at_equal_kl", "entropy_overheads", "decode_over_gemm", "encode_over_gemm", "compaction"):
        console.print(f"{name}: {content[name]}")
    target = RESULTS / ("codec.quick.json" if quick else "codec.json")
    target.write_text(json.dumps(content, indent=2) + "\n")
    picture = RESULTS / "codec.quick.png" if quick else plots.QUALITY
    plots.rate_against_loss(rows, sweeps, picture)
    console.print(f"written: {target.name}, {picture.name}")


if __name__ == "__main__":
    main()
