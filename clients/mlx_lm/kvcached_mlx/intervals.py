"""95 % intervals by the bootstrap, the same resamples for whatever is compared, so that differences are paired."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

N_RESAMPLES, LEVEL = 1000, 0.95


class Interval(NamedTuple):
    """A figure and the bounds of its interval at `LEVEL`."""

    value: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, figures: Sequence[float] | np.ndarray) -> "Interval":
        """Of figures that are drawn one by one."""
        return cls.of_ratio(figures, np.ones(len(figures)))

    @classmethod
    def of_ratio(cls, sums: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> "Interval":
        """Of a mean over groups that are drawn as a whole: a sum and a count of each."""
        above, below = np.asarray(sums, float), np.asarray(counts, float)
        chosen = np.random.default_rng(0).integers(0, len(above), (N_RESAMPLES, len(above)))
        low, high = np.quantile(above[chosen].sum(1) / below[chosen].sum(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(above.sum() / below.sum()), float(low), float(high))
