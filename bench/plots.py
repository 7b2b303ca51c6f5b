"""Pictures of results, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from measuring import Row

QUALITY = Path(__file__).resolve().parent.parent / "docs/quality.png"
PERFORMANCE = QUALITY.with_name("performance.png")
_NAMES = {
    "ours": "kvcached",
    "unweighted": "kvcached, no metric",
    "one_layer": "kvcached, one layer a basis",
    "paper": "KVTC paper's pipeline",
    "pr418": "oMLX PR #418",
    "int4": "mlx quantised cache",
}


def rate_against_loss(rows: Sequence[Row], sweeps: Mapping[str, Sequence[Row]], target: Path) -> None:
    """KL against bits per value, a line for each family and a mark for each of our profiles."""
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    for family, members in sweeps.items():
        drawn = sorted((row.bits_per_value, row.kl) for row in members if row.kl > 0)
        style = {"color": "black", "linewidth": 2.2, "zorder": 3} if family == "ours" else {"linewidth": 1.3}
        axes.plot(*zip(*drawn, strict=True), marker=".", label=_NAMES[family], **style)  # type: ignore[arg-type]
    for row in rows:
        if row.name in ("near-lossless", "x8", "x16", "x32"):
            low, high = row.intervals["kl"]
            error = [[max(row.kl - low, 0)], [max(high - row.kl, 0)]]
            axes.errorbar(row.bits_per_value, row.kl, error, fmt="o", color="black", capsize=3, zorder=4)
            axes.annotate(row.name, (row.bits_per_value, row.kl), (6, 6), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bits per value, every stored byte counted (16: exact)",
        ylabel="next-token KL to the exact cache, nats",
        title="What the reference model loses after a restored prefix of 1,536 tokens",
    )
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def performance(result: Mapping[str, Any], target: Path) -> None:
    """Four pictures: what a restore takes beside other ways, Match by entries, latency by clients, resident memory."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _ways(axes[0, 0], result["restore"])
    _match(axes[0, 1], result["match"]["match_seconds"])
    _latencies(axes[1, 0], result["clients"]["clients"])
    axes[1, 1].plot([n / 2**20 for n in result["soak"]["rss"]], marker=".", label="resident")
    axes[1, 1].plot([n / 2**20 for n in result["soak"]["anonymous"]], marker=".", label="of that, not of files")
    axes[1, 1].set(title="Memory of a daemon at work", xlabel="time", ylabel="MiB", ylim=(0, None))
    axes[1, 1].legend()
    for each in axes.flat:
        each.grid(which="both", alpha=0.25)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _ways(axes: Any, restore: Mapping[str, Any]) -> None:
    seconds = {"prefill": restore["prefill_seconds"], **restore["restore_seconds"]}
    medians = [each["median"] for each in seconds.values()]
    error = [[e["median"] - e["q1"] for e in seconds.values()], [e["q3"] - e["median"] for e in seconds.values()]]
    axes.barh(list(seconds), medians, xerr=error, color="C0")
    axes.set(xscale="log", xlabel="seconds", title=f"A cache of {restore['tokens']:,} tokens, reference model")
    axes.invert_yaxis()


def _match(axes: Any, seconds: Mapping[str, Any]) -> None:
    sizes = [int(n) for n in seconds]
    for name in ("median", "p99"):
        axes.plot(sizes, [1e3 * each[name] for each in seconds.values()], marker="o", label=name)
    axes.set(xscale="log", xlabel="blocks held", ylabel="ms", ylim=(0, None), title="Match of 1,000 blocks")
    axes.legend()


def _latencies(axes: Any, clients: Mapping[str, Any]) -> None:
    for i, call in enumerate(("match", "get", "put")):
        for name, style in (("p50", "-"), ("p99", "--")):
            values = [1e3 * each["seconds"][call][name] for each in clients.values()]
            axes.plot(list(clients), values, style, color=f"C{i}", marker="o", label=f"{call} {name}")
    axes.set(yscale="log", xlabel="clients", ylabel="ms", title="Calls under mixed load, blocks of 192 KiB")
    axes.legend()
