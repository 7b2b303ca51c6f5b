"""Which step each group of components gets: the least distortion under a budget in bits per value. Pure.

Exact dynamic programming over measured (rate, distortion) points, one of which is chosen for each group (KVTC, arXiv
2511.01815, section 3.3, there over quantiser types). Rates are counted in whole units, rounded up, so that what is
spent never exceeds the budget; within that the result is optimal. Nothing here knows how many tokens there are.
"""

import numpy as np
from jaxtyping import Float64, Int64

UNIT = 2.0**-14  # bits per value: the grain in which rates are counted
Points = Float64[np.ndarray, "n_groups n_points"]


def allocate(rates: Points, distortions: Points, budget: float, unit: float = UNIT) -> Int64[np.ndarray, " n_groups"]:
    """The point chosen for each group.

    rates: what each point adds to the mean over all values, in bits per value. distortions: what it adds, in any unit
    that is common to all. budget: in bits per value.

    Raises:
        ValueError: a rate or distortion is negative or not finite, or the budget does not allow the cheapest points.
    """
    if not (np.isfinite(rates).all() and np.isfinite(distortions).all() and (rates >= 0).all()):
        raise ValueError("rates and distortions must be finite, and rates not negative")
    costs = np.ceil(rates / unit - 1e-6).astype(np.int64)
    n_units = int(budget / unit + 1e-6)
    cheapest = int(costs.min(axis=1, initial=np.iinfo(np.int64).max).sum()) if len(costs) else 0
    if cheapest > n_units:
        raise ValueError(f"a budget of {budget} bits per value is below the {cheapest * unit} of the cheapest points")
    # No group can use more than its dearest point, and no sum of them is worth more room.
    n_units = min(n_units, int(costs.max(axis=1, initial=0).sum()))
    least, choices = np.zeros(n_units + 1), []
    for group_costs, group_distortions in zip(costs, distortions, strict=True):
        least, choice = _add_group(least, group_costs, group_distortions)
        choices.append(choice)
    return _read_back(choices, costs, int(np.argmin(least)))


def _add_group(least: np.ndarray, costs: np.ndarray, distortions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """least[u]: the least distortion that u units buy, before this group and after it; and which point does so."""
    options = np.full((len(costs), len(least)), np.inf)
    for point, (cost, distortion) in enumerate(zip(costs, distortions, strict=True)):
        if cost < len(least):
            options[point, cost:] = least[: len(least) - cost] + distortion
    choice = options.argmin(axis=0)
    return np.take_along_axis(options, choice[None], axis=0)[0], choice.astype(np.uint8)


def _read_back(choices: list[np.ndarray], costs: np.ndarray, units: int) -> Int64[np.ndarray, " n_groups"]:
    """From the last group to the first: what was chosen on the way to `units`."""
    chosen = np.zeros(len(choices), np.int64)
    for group in range(len(choices) - 1, -1, -1):
        chosen[group] = choices[group][units]
        units -= int(costs[group, chosen[group]])
    return chosen
