"""How many tokens each head keeps: the least summed error for a total, from measured curves. Pure.

A head's curve is its error at some fractions of kept tokens. Few heads lose much when tokens go, many lose nothing, so
equal budgets waste most of the room (Attention Matching, arXiv 2602.16284, where budgets come from a search by swaps;
here they are solved for, and any total is met exactly).
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int32

Curves = Float64[np.ndarray, "n_layers n_kv_heads n_fractions"]
Budgets = Int32[np.ndarray, "n_layers n_kv_heads"]


def solve(
    curves: Curves,
    fractions: Float64[np.ndarray, " n_fractions"],
    n_tokens: int,
    total: int,
    least: int,
    whole: Bool[np.ndarray, "n_layers n_kv_heads"] | None = None,
) -> Budgets:
    """Tokens for each head, `least` to `n_tokens`, `total` together, with the least error that the curves promise.

    Curves count as what a mixture of budgets would reach, their lower convex hull: on that, the steepest descents first
    are optimal, and heads with equal ones share evenly. fractions ascend and end with 1. A head with a flat curve gets
    `least`. whole: heads that keep all tokens in any case.

    Raises:
        ValueError: the total cannot be met, curves are negative or not finite, or fractions are none.
    """
    check(curves, fractions)
    floors = np.full(curves.shape[:2], least)
    if whole is not None:
        floors[whole] = n_tokens
    if not (least <= n_tokens and floors.sum() <= total <= floors.size * n_tokens):
        raise ValueError(f"{floors.size} heads of {least} to {n_tokens} tokens cannot have {total} together")
    gains = np.stack([_gains(curve, fractions, n_tokens, least) for curve in curves.reshape(floors.size, -1)])
    gains[np.arange(n_tokens) < floors.reshape(-1, 1)] = np.inf  # those that are taken first
    by_gain = np.lexsort((np.broadcast_to(np.arange(n_tokens), gains.shape).ravel(), -gains.ravel()))
    taken = np.bincount(by_gain[:total] // n_tokens, minlength=floors.size)
    return taken.reshape(floors.shape).astype(np.int32)


def check(
    curves: Float[np.ndarray, "n_layers n_kv_heads n_fractions"], fractions: Float[np.ndarray, " n_fractions"]
) -> None:
    """Raises ValueError unless budgets can be solved from them."""
    if not (np.isfinite(curves).all() and (curves >= 0).all()):
        raise ValueError("curves of error must be finite and not negative")
    if not ((np.diff(fractions) > 0).all() and fractions[0] > 0 and fractions[-1] == 1):
        raise ValueError(f"fractions must ascend from above 0 to 1, got {fractions.tolist()}")


def _gains(
    curve: Float64[np.ndarray, " n_fractions"],
    fractions: Float64[np.ndarray, " n_fractions"],
    n_tokens: int,
    least: int,
) -> Float64[np.ndarray, " n_tokens"]:
    """What each token after the `least` takes off the error: less and less, along the lower hull of the curve."""
    counts = np.unique(np.append(np.rint(fractions * n_tokens).clip(least), least).astype(np.int64))
    errors = np.interp(counts / n_tokens, fractions, np.minimum.accumulate(curve))
    gains, at = np.full(n_tokens, np.inf), 0
    while at < len(counts) - 1:
        steepness = (errors[at] - errors[at + 1 :]) / (counts[at + 1 :] - counts[at])
        step = at + 1 + int(np.argmax(steepness))
        gains[counts[at] : counts[step]] = steepness[step - at - 1]
        at = step
    return gains
