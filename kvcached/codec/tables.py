"""What a bundle is made of, and its tensors: bases of planes, and the tables with which a profile codes them.

    {at}.mean f32[f]  .variances f32[r]  .forward f16[f r]  .inverse f16[r f]     a basis
    {at}.steps f32[r]  .scales u8[r]                                             its tables in one profile

Numbers from a file are checked here: what does not add up raises ValueError or KeyError, which whoever reads the file
makes an error of the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from kvcached.codec.klt import Basis

SIDES = ("keys", "values")
_MAX_STEP, _N_SCALES = 2.0**96, 64

Tensors = dict[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """How a profile codes each component of a plane: its step (0: not at all), and the scale index of its table."""

    steps: Float32[np.ndarray, " n_components"]
    scales: UInt8[np.ndarray, " n_components"]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """One trade of bytes for loss: tables for the planes of every group of layers, and how coefficients are rounded."""

    target_compression: float
    dead_zone: float
    centroid: float
    keys: tuple[Tables, ...]
    values: tuple[Tables, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PlaneCoder:
    """What codes one plane: the components that a profile keeps, and nothing of the others."""

    basis: Basis
    tables: Tables
    n_features: int


def plane_coder(basis: Basis, tables: Tables) -> PlaneCoder:
    """Without the components that are not coded."""
    kept = tables.steps > 0
    if kept.all():
        return PlaneCoder(basis, tables, len(basis.mean))
    part = Basis(
        basis.mean,
        np.ascontiguousarray(basis.forward[:, kept]),
        np.ascontiguousarray(basis.inverse[kept]),
        basis.variances[kept],
    )
    return PlaneCoder(part, Tables(tables.steps[kept], tables.scales[kept]), len(basis.mean))


def storable(basis: Basis) -> Basis:
    """A basis as a bundle keeps it, its matrices rounded to float16: steps and tables are chosen for this one.

    Raises:
        ValueError: it holds numbers that are not finite, or that float16 does not hold.
    """
    with np.errstate(over="ignore"):
        forward, inverse = (matrix.astype(np.float16).astype(np.float32) for matrix in (basis.forward, basis.inverse))
    if not all(np.isfinite(numbers).all() for numbers in (basis.mean, forward, inverse, basis.variances)):
        raise ValueError("a basis must be of finite numbers, its matrices of such that float16 can hold")
    return Basis(basis.mean, forward, inverse, basis.variances)


def basis_tensors(at: str, basis: Basis) -> Tensors:
    """Inverse: `read_basis`."""
    halves = {f"{at}.{name}": getattr(basis, name).astype(np.float16) for name in ("forward", "inverse")}
    return {f"{at}.mean": basis.mean, f"{at}.variances": basis.variances, **halves}


def profile_tensors(at: str, profile: Profile) -> Tensors:
    """Inverse, with the numbers: `read_profile`."""
    planes = ((side, plane, tables) for side in SIDES for plane, tables in enumerate(getattr(profile, side)))
    return {
        f"{at}.{side}.{plane}.{name}": getattr(tables, name)
        for side, plane, tables in planes
        for name in ("steps", "scales")
    }


def profile_numbers(profile: Profile) -> dict[str, float]:
    """What of a profile stands in JSON."""
    return {name: float(getattr(profile, name)) for name in ("target_compression", "dead_zone", "centroid")}


def read_basis(tensors: Tensors, at: str, n_features: int) -> Basis:
    rank = len(tensors[f"{at}.variances"])
    if not 1 <= rank <= n_features:
        raise ValueError(f"{at} must have 1 to {n_features} components, got {rank}")
    variances = read_tensor(tensors, f"{at}.variances", np.float32, rank)
    if variances.min() < 0:
        raise ValueError(f"{at} has a variance below 0")
    return Basis(
        read_tensor(tensors, f"{at}.mean", np.float32, n_features),
        read_tensor(tensors, f"{at}.forward", np.float16, n_features, rank).astype(np.float32),
        read_tensor(tensors, f"{at}.inverse", np.float16, rank, n_features).astype(np.float32),
        variances,
    )


def read_profile(tensors: Tensors, at: str, content: Mapping[str, Any], ranks: Mapping[str, Sequence[int]]) -> Profile:
    """The profile of JSON and tensors; ranks: of the planes of each side."""
    target, dead_zone, centroid = (float(content[key]) for key in ("target_compression", "dead_zone", "centroid"))
    if not (1 <= target <= 1e6 and 0 <= dead_zone <= 0.5 and 0 <= centroid <= 0.5):
        raise ValueError(f"{at} has a target of {target}, a dead zone of {dead_zone}, a centroid of {centroid}")
    keys, values = (
        tuple(_read_tables(tensors, f"{at}.{side}.{plane}", rank) for plane, rank in enumerate(ranks[side]))
        for side in SIDES
    )
    return Profile(target, dead_zone, centroid, keys, values)


def _read_tables(tensors: Tensors, at: str, rank: int) -> Tables:
    steps = read_tensor(tensors, f"{at}.steps", np.float32, rank)
    scales = read_tensor(tensors, f"{at}.scales", np.uint8, rank)
    if not ((steps >= 0) & (steps <= _MAX_STEP)).all() or scales.max(initial=0) >= _N_SCALES:
        raise ValueError(f"{at} has a step that is none, or a scale index of {_N_SCALES} or more")
    return Tables(steps, scales)


def read_tensor(tensors: Tensors, name: str, dtype: type, *shape: int) -> Any:
    array = tensors[name]
    if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite {np.dtype(dtype).name} {shape}, got {array.dtype.name} {array.shape}")
    return array
