"""How many tokens each head keeps: the least summed error for a total, from measured curves. Pure.

A head's curve is its error at some fractions of kept tokens. Few heads lose much when tokens go, many lose nothing, so
equal budgets waste most of the room (Attention Matching, arXiv 2602.16284, where budgets come from a search by swaps;
here they are solved for, and any total is met exactly).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int32, Int64

Curves = Float64[np.ndarray, "n_layers n_kv_heads n_fractions"]
Budgets = Int32[np.ndarray, "n_layers n_kv_heads"]


def solve(
    curves: Curves, fractions: Float64[np.ndarray, " n_fractions"], n_tokens: int, total: int, least: int
) -> Budgets:
    """Tokens for each head, `least` to `n_tokens`, `total` together, with the least error that the curves promise.

    Curves count as what a mixture of budgets would reach, their lower convex hull: on that, the steepest descents first
    are optimal. fractions ascend and end with 1. A head with a flat curve gets `least`.

    Raises:
        ValueError: the total cannot be met, curves are negative or not finite, or fractions are none.
    """
    n_heads = curves.shape[0] * curves.shape[1]
    if not n_heads * least <= total <= n_heads * n_tokens:
        raise ValueError(f"{n_heads} heads of {least} to {n_tokens} tokens cannot have {total} together")
    if not (np.isfinite(curves).all() and (curves >= 0).all()):
        raise ValueError("curves of error must be finite and not negative")
    if not ((np.diff(fractions) > 0).all() and fractions[0] > 0 and fractions[-1] == 1):
        raise ValueError(f"fractions must ascend from above 0 to 1, got {fractions.tolist()}")
    counts = np.unique(np.append(np.rint(fractions * n_tokens).clip(least), least).astype(np.int64))
    heads = np.minimum.accumulate(curves.reshape(n_heads, -1), axis=1)
    descents = [
        (steepness, head, size)
        for head, curve in enumerate(heads)
        for steepness, size in _descents(counts, np.interp(counts / n_tokens, fractions, curve))
    ]
    budgets, left = np.full(n_heads, least), total - n_heads * least
    for _, head, size in sorted(descents, key=lambda descent: -descent[0]):
        taken = min(size, left)
        budgets[head] += taken
        left -= taken
    return budgets.reshape(curves.shape[:2]).astype(np.int32)


def _descents(counts: Int64[np.ndarray, " n"], errors: Float64[np.ndarray, " n"]) -> Iterator[tuple[float, int]]:
    """Error that each further token takes off, and for how many tokens: less and less, along the lower hull."""
    at = 0
    while at < len(counts) - 1:
        sizes = counts[at + 1 :] - counts[at]
        steepness = (errors[at] - errors[at + 1 :]) / sizes
        step = int(np.argmax(steepness))
        yield float(steepness[step]), int(sizes[step])
        at += step + 1
