"""Softmax attention of queries over one head's keys, with an additive bias; how much of it there is, and errors of it.

Everything is float32 in and out, and logits are shifted by their largest before they are exponentiated, so that no
mass overflows. What a query gets from a prefix is the sum of what it gets from the prefix's blocks, weighted by their
masses: that is why mass is kept apart from output, and why blocks can be compacted one by one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

Queries = Float32[np.ndarray, "n_queries key_dim"]
Keys = Float32[np.ndarray, "n_keys key_dim"]
Values = Float32[np.ndarray, "n_keys value_dim"]
Bias = Float32[np.ndarray, " n_keys"]
Logits = Float64[np.ndarray, "n_queries n_keys"]

_FURTHEST = 80.0  # nats: its exponential, and the square of that, can be held


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What queries read: the output, and the logarithm of the mass, log sum_j exp(logit_j + bias_j)."""

    output: Float64[np.ndarray, "n_queries value_dim"]
    log_mass: Float64[np.ndarray, " n_queries"]


def logits(queries: Queries, keys: Keys, scale: float, soft_cap: float = 0.0) -> Logits:
    """q·k times the scale; soft_cap: bounds them by its tanh, 0 for none."""
    found = queries.astype(np.float64) @ keys.astype(np.float64).T * scale
    return soft_cap * np.tanh(found / soft_cap) if soft_cap else found


def weights(of: Logits) -> tuple[Logits, Float64[np.ndarray, " n_queries"]]:
    """Softmax of each row, and the logarithm of what it was divided by."""
    largest = of.max(axis=1, keepdims=True)
    mass = np.exp(of - largest)
    total = mass.sum(axis=1, keepdims=True)
    return mass / total, (np.log(total) + largest)[:, 0]


def read(of: Logits, values: Values, bias: Bias | None = None) -> Read:
    """What queries with these logits read of the values."""
    found, log_mass = weights(of if bias is None else of + bias)
    return Read(found @ values.astype(np.float64), log_mass)


def mass_error(read: Read, exact: Read) -> float:
    """Root mean square, over queries, of the relative error of the mass; that is e^80 at most."""
    grown = np.minimum(read.log_mass - exact.log_mass, _FURTHEST)
    return float(np.sqrt(np.square(np.expm1(grown)).mean()))


def output_error(read: Read, exact: Read, output_metric: Float64[np.ndarray, "value_dim value_dim"]) -> float:
    """Mean over queries of the squared error of the output, through the metric of the output projection (W^T W)."""
    apart = read.output - exact.output
    return float(np.einsum("qi,ij,qj->q", apart, output_metric, apart).mean())
