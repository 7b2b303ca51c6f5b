"""Pictures of results, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from measuring import Row

QUALITY = Path(__file__).resolve().parent.parent / "docs/quality.png"
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
