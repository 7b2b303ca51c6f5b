"""What compaction costs on the reference model: `make bench-quality`, `make bench-quality QUICK=1`.

Rows are fidelities as they are stored and restored. The prefix's last block is computed anew in all of them, for a
compacted prefix is only cut between blocks. Writes bench/results/quality.json; a quick run has fewer documents and
probes, and writes quality.quick.json.
"""

import os

if "OMP_NUM_THREADS" not in os.environ:  # documents run side by side
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compacted_under_test import Compacted, Kept, active_bytes, every_nth, matching, without_bias
from loss import HeldOut, Interval, Loss, interval, resampled
from ours import Ours, calibration
from reference_model import ReferenceModel
from retrieval import Probes
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from under_test import SOURCE_BITS, Codec, Course, keep

from kvcached import codec
from kvcached.block import KVBlock
from kvcached.codec.bundle import PROFILES, Bundle

RESULTS = Path(__file__).resolve().parent / "results"
QUICK, FULL = {"n_documents": 6, "n_probes": 400}, {"n_documents": 24, "n_probes": 2000}
LAYERS_PER_GROUP = 6
RATIOS, ON = (2, 4, 8), ("x8", "x16")
ALONE = (
    16.0,
    24.0,
    32.0,
    44.0,
    56.0,
    72.0,
    96.0,
    128.0,
    160.0,
)  # compressions of coding alone, to hold compaction against
COURSE = Course(n_recomputed=256)


console = Console(width=160)


class Fidelities:
    """Everything that is measured, of one bundle."""

    def __init__(self, model: ReferenceModel) -> None:
        calibrated = calibration(model, LAYERS_PER_GROUP, compacts=True)
        self.bundle: Bundle = calibrated.fit(PROFILES)
        self.rows: dict[str, Codec] = {"exact": keep, **{n: Ours(self.bundle.coder(n)) for n in PROFILES}}
        for profile in ON:
            for ratio in RATIOS:
                compactor = self.bundle.compactor(profile, float(ratio))
                self.rows[f"compacted-{ratio}x on {profile}"] = Compacted(compactor)
        four = self.bundle.compactor("x16", 4.0)
        equal = np.full_like(four.budgets, four.spec.block_size // 4)
        self.uncoded: dict[str, Codec] = {
            "matching": Kept(matching(four)),
            "uniform": Kept(every_nth(4)),
            "equal_budgets": Kept(matching(four, equal)),
            "no_bias": Kept(without_bias(matching(four))),
        }
        self.alone = Ours.family(calibrated, ALONE)

    def active_bytes_per_token(self, name: str, blocks: Sequence[KVBlock]) -> float:
        """Of restored tokens, as an engine holds them."""
        codec_of_row = self.rows[name]
        held = list(blocks)
        if isinstance(codec_of_row, Compacted):
            held = [codec.compact(block, codec_of_row.compactor).block for block in blocks]
        return sum(map(active_bytes, held)) / sum(block.n_source_tokens for block in blocks)


def measure(held_out: HeldOut, probes: Probes, found: Fidelities) -> tuple[list[dict[str, Any]], dict[str, Loss]]:
    """Rows of the table, and the losses of everything else by name."""
    blocks = [KVBlock.dense({"keys": k, "values": v}, k.shape[2], at) for k, v, at in held_out.blocks(12)]
    others: dict[str, Codec] = {**found.uncoded, **{f"alone {i}": one for i, one in enumerate(found.alone)}}
    losses: dict[str, Loss] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(found.rows) + len(others))
        rows = []
        for name, one in found.rows.items():
            progress.update(task, description=name)
            losses[name] = held_out.loss(one)
            rows.append(_row(name, losses[name], probes, one, found.active_bytes_per_token(name, blocks)))
            progress.advance(task)
        for name, one in others.items():
            progress.update(task, description=name)
            losses[name] = held_out.loss(one)
            progress.advance(task)
    return rows, losses


def _row(name: str, loss: Loss, probes: Probes, one: Codec, active: float) -> dict[str, Any]:
    mean, worst = loss.attention_error()
    found = probes.retrieval(one)
    figures = {
        "perplexity_delta": loss.perplexity_delta(),
        "kl": loss.mean_kl(),
        "retrieval": found.accuracy(),
        "retrieval_delta": found.delta(),
        "attention_error_mean": mean,
        "attention_error_worst": worst,
    }
    n_tokens = loss.n_values / _values_per_token(probes.model)
    return {
        "fidelity": name,
        "compression": SOURCE_BITS * loss.n_values / loss.bits,
        **{figure: measured.value for figure, measured in figures.items()},
        "bytes_per_token": loss.bits / 8 / n_tokens,
        "active_bytes_per_token": active,
        "intervals": {figure: (measured.low, measured.high) for figure, measured in figures.items()},
    }


def _values_per_token(model: ReferenceModel) -> int:
    return 2 * model.n_layers * model.n_kv_heads * model.head_dim


def kl_ratio(ours: Loss, theirs: Loss) -> Interval:
    """Of mean KL; paired, documents resampled."""
    return interval(ours.kl.mean() / theirs.kl.mean(), resampled(ours.kl) / resampled(theirs.kl))


def kl_over_alone(ours: Loss, alone: Sequence[Loss]) -> Interval:
    """Our KL over that of coding alone at the same bytes: log KL is interpolated against log bits.

    Raises ValueError where coding alone was not measured at so many bytes.
    """
    sweep = sorted(alone, key=lambda loss: loss.bits)
    bits = np.log([loss.bits for loss in sweep])
    if not bits[0] <= np.log(ours.bits) <= bits[-1]:
        raise ValueError(f"{ours.bits:.0f} bits, the sweep goes from {sweep[0].bits:.0f} to {sweep[-1].bits:.0f}")

    def at_our_bits(kl: np.ndarray) -> float:
        return float(np.exp(np.interp(np.log(ours.bits), bits, np.log(np.maximum(kl, 1e-12)))))

    again = np.stack([resampled(loss.kl) for loss in sweep], axis=1)
    ratios = resampled(ours.kl) / np.array([at_our_bits(kl) for kl in again])
    return interval(ours.kl.mean() / at_our_bits(np.array([loss.kl.mean() for loss in sweep])), ratios)


def report(quick: bool) -> dict[str, Any]:
    size = QUICK if quick else FULL
    model = ReferenceModel()
    found = Fidelities(model)
    held_out, probes = HeldOut(model, size["n_documents"], COURSE), Probes(model, size["n_probes"], COURSE)
    rows, losses = measure(held_out, probes, found)
    matched = losses["matching"]
    ratios = {f"am_over_{name}_4x": kl_ratio(matched, losses[name]) for name in ("uniform", "equal_budgets", "no_bias")}
    alone = [losses[f"alone {i}"] for i in range(len(found.alone))]
    over_alone = {name: kl_over_alone(losses[name], alone) for name in found.rows if name.startswith("compacted")}
    at_50x = {row["fidelity"]: row for row in rows if row["compression"] >= 50 and "-4x" in row["fidelity"]}
    ratios["compacted_50x_over_coding_alone"] = over_alone[next(iter(at_50x))]
    return {
        "command": f"make bench-quality{' QUICK=1' * quick}",
        "model": "tests/data/model/qwen3-5m",
        "n_documents": size["n_documents"],
        "n_probes": probes.n_probes,
        "units": "perplexity_delta, retrieval and attention errors are parts of 1; kl is in nats a token",
        "rows": rows,
        **{name: measured.value for name, measured in ratios.items()},
        "intervals": {name: (measured.low, measured.high) for name, measured in ratios.items()},
        "compacted_50x": next(iter(at_50x)),
        "over_coding_alone": {name: measured.value for name, measured in over_alone.items()},
        "uncoded_4x_kl": {name: float(losses[name].kl.mean()) for name in found.uncoded},
        "alone": [
            {"compression": SOURCE_BITS * loss.n_values / loss.bits, "kl": float(loss.kl.mean())} for loss in alone
        ],
    }


def show(content: Mapping[str, Any]) -> None:
    table = Table("fidelity", "x", "KL", "perplexity %", "retrieval, points", "bytes / token", "active bytes / token")
    for row in content["rows"]:
        low, high = row["intervals"]["perplexity_delta"]
        table.add_row(
            row["fidelity"],
            f"{row['compression']:.1f}",
            f"{row['kl']:.2e}",
            f"{100 * row['perplexity_delta']:+.2f} ({100 * low:+.2f}..{100 * high:+.2f})",
            f"{100 * row['retrieval_delta']:+.2f}",
            f"{row['bytes_per_token']:.0f}",
            f"{row['active_bytes_per_token']:.0f}",
        )
    console.print(table)
    for name, bounds in content["intervals"].items():
        console.print(f"{name}: {content[name]:.3f} ({bounds[0]:.3f}..{bounds[1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer documents and probes")
    quick = parser.parse_args().quick
    content = report(quick)
    show(content)
    target = RESULTS / ("quality.quick.json" if quick else "quality.json")
    target.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"written: {target.name}")


if __name__ == "__main__":
    main()
