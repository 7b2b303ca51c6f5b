"""What it takes to compact a model's blocks, as part of its bundle: who keeps how many tokens, and how they are coded.

Heads that keep every token are coded side by side, as in `planes`; every other head by itself, at its own positions.
Which are which depends on the ratio, so that bases and tables are made for a few *anchors*; between them only the
budgets of the other heads vary. A ratio takes the anchor above it, whose whole heads are whole for it too.

    compaction.fractions f32[n]  .curves f32[layers heads n]          error of each head at fractions of kept tokens
              .queries f16[layers query_heads n dim]                  reservoir, without rotary positions
              .output_metric f32[layers heads dim dim]
              .{anchor}.{side}.{plane}.*                              a basis
              .{anchor}.{side}.{plane}.predictor f16[known features]  if its rows are predicted from others
              .{anchor}.{profile}.{side}.{plane}.*                    its tables
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float32

from kvcached.block import Fidelity, ModelSpec
from kvcached.codec import budgets, planes
from kvcached.codec.budgets import Budgets
from kvcached.codec.klt import Basis
from kvcached.codec.tables import (
    SIDES,
    PlaneCoder,
    Profile,
    Tensors,
    basis_tensors,
    plane_coder,
    profile_numbers,
    profile_tensors,
    read_basis,
    read_profile,
    read_tensor,
)

COMPACTED_PROFILES = ("x8", "x16")
ANCHORS = (2, 4, 8)  # ratios
_AT = "compaction"
_MAX_FRACTIONS, _MAX_QUERIES = 64, 4096

Predictor = Float32[np.ndarray, "_n_known _n_features"]


@dataclass(frozen=True, slots=True, eq=False)
class HeadPlane:
    """What codes the rows of one head, or of several that keep every token: heads are counted over all layers.

    leader: the plane, of heads that keep every token, from whose rows at the same tokens, keys beside values, this
    one's are predicted; values from this one's keys besides, with a leader or without. What is coded is what the
    prediction misses, everything where there is no predictor.
    """

    heads: tuple[int, ...]
    keys: PlaneCoder
    values: PlaneCoder
    leader: int | None = None
    predictors: Mapping[str, Predictor] = field(default_factory=dict)  # by side


@dataclass(frozen=True, slots=True, eq=False)
class Compactor:
    """Compaction to one ratio on top of one profile, ready for use.

    budgets: tokens of each head of a block. queries: of the reservoir, without rotary positions. bound: relative error
    of the output beyond which a block is not compacted.
    """

    spec: ModelSpec
    fidelity: Fidelity
    budgets: Budgets
    planes: tuple[HeadPlane, ...]
    dead_zone: float
    centroid: float
    queries: Float32[np.ndarray, "n_layers n_query_heads n_queries key_dim"]
    output_metric: Float32[np.ndarray, "n_layers n_kv_heads value_dim value_dim"]
    bound: float


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """How blocks compacted to about one ratio are coded. bounds: by profile, see Compactor."""

    heads: tuple[tuple[int, ...], ...]  # of each plane
    keys: tuple[Basis, ...]
    values: tuple[Basis, ...]
    profiles: Mapping[str, Profile]
    bounds: Mapping[str, float]
    leaders: tuple[int | None, ...]  # of each plane
    predictors: Mapping[tuple[str, int], Predictor] = field(default_factory=dict)  # by side and plane

    def predictors_of(self, plane: int) -> dict[str, Predictor]:
        """By side."""
        return {side: self.predictors[side, plane] for side in SIDES if (side, plane) in self.predictors}


@dataclass(frozen=True, slots=True, eq=False)
class Compaction:
    """Everything that a bundle knows of compaction. anchors: by ratio."""

    fractions: Float32[np.ndarray, " n_fractions"]
    curves: Float32[np.ndarray, "n_layers n_kv_heads n_fractions"]
    queries: Float32[np.ndarray, "n_layers n_query_heads n_queries key_dim"]
    output_metric: Float32[np.ndarray, "n_layers n_kv_heads value_dim value_dim"]
    anchors: Mapping[int, Anchor]

    def compactor(self, spec: ModelSpec, fidelity: Fidelity) -> Compactor:
        """Raises KeyError for a profile that is not there, ValueError if blocks have too few tokens for the ratio."""
        anchor = self.anchors[min(a for a in self.anchors if a >= fidelity.am_ratio - 1e-6)]
        profile = anchor.profiles[fidelity.profile]
        whole = np.zeros(self.curves.shape[:2], bool)
        whole.reshape(-1)[[head for plane in anchor.heads if len(plane) > 1 for head in plane]] = True
        bases = (anchor.keys, anchor.values, profile.keys, profile.values)
        sides = zip(anchor.heads, *bases, anchor.leaders, strict=True)
        return Compactor(
            spec=spec,
            fidelity=fidelity,
            budgets=solve_budgets(self.curves, self.fractions, spec.block_size, fidelity.am_ratio, whole),
            planes=tuple(
                HeadPlane(heads, plane_coder(k, kt), plane_coder(v, vt), leader, anchor.predictors_of(i))
                for i, (heads, k, v, kt, vt, leader) in enumerate(sides)
            ),
            dead_zone=profile.dead_zone,
            centroid=profile.centroid,
            queries=self.queries,
            output_metric=self.output_metric,
            bound=anchor.bounds[fidelity.profile],
        )

    def described(self) -> dict[str, Any]:
        """What stands in JSON."""
        return {
            "anchors": {
                str(ratio): {
                    "heads": [list(heads) for heads in anchor.heads],
                    "leaders": list(anchor.leaders),
                    "profiles": {
                        name: profile_numbers(profile) | {"bound": float(anchor.bounds[name])}
                        for name, profile in anchor.profiles.items()
                    },
                }
                for ratio, anchor in self.anchors.items()
            }
        }

    def tensors(self) -> Tensors:
        """Inverse, with `described`: `read`."""
        found: Tensors = {f"{_AT}.{name}": getattr(self, name) for name in ("fractions", "curves", "output_metric")}
        found[f"{_AT}.queries"] = self.queries.astype(np.float16)
        for ratio, anchor in self.anchors.items():
            for side in SIDES:
                for plane, basis in enumerate(getattr(anchor, side)):
                    found |= basis_tensors(f"{_AT}.{ratio}.{side}.{plane}", basis)
            for (side, plane), predictor in anchor.predictors.items():
                found[f"{_AT}.{ratio}.{side}.{plane}.predictor"] = predictor.astype(np.float16)
            for name, profile in anchor.profiles.items():
                found |= profile_tensors(f"{_AT}.{ratio}.{name}", profile)
        return found

    @classmethod
    def read(cls, content: Mapping[str, Any], tensors: Tensors, spec: ModelSpec) -> "Compaction":
        """Of a file. Raises ValueError, KeyError or TypeError for what is none."""
        n_layers, n_kv_heads, _, key_dim = spec.dense_shapes()["keys"]
        value_dim = spec.dense_shapes()["values"][-1]
        n_query_heads = spec.dense_layers[0].n_query_heads or n_kv_heads
        n_fractions, of_queries = tensors[f"{_AT}.fractions"].size, tensors[f"{_AT}.queries"].shape
        n_queries = of_queries[2] if len(of_queries) == 4 else 0
        if not (1 <= n_fractions <= _MAX_FRACTIONS and 1 <= n_queries <= _MAX_QUERIES):
            raise ValueError(f"compaction has {n_fractions} fractions and {n_queries} queries")
        heads = (n_layers, n_kv_heads)
        found = cls(
            fractions=read_tensor(tensors, f"{_AT}.fractions", np.float32, n_fractions),
            curves=read_tensor(tensors, f"{_AT}.curves", np.float32, *heads, n_fractions),
            queries=read_tensor(
                tensors, f"{_AT}.queries", np.float16, n_layers, n_query_heads, n_queries, key_dim
            ).astype(np.float32),
            output_metric=read_tensor(tensors, f"{_AT}.output_metric", np.float32, *heads, value_dim, value_dim),
            anchors={
                ratio: _read_anchor(content["anchors"][str(ratio)], tensors, f"{_AT}.{ratio}", spec)
                for ratio in ANCHORS
                if str(ratio) in content["anchors"]
            },
        )
        if len(found.anchors) != len(content["anchors"]) or max(found.anchors, default=0) != ANCHORS[-1]:
            raise ValueError(f"compaction has anchors {sorted(content['anchors'])[:4]!s}")
        budgets.check(found.curves, found.fractions)
        return found


def solve_budgets(
    curves: Float32[np.ndarray, "n_layers n_kv_heads n_fractions"],
    fractions: Float32[np.ndarray, " n_fractions"],
    n_tokens: int,
    am_ratio: float,
    whole: np.ndarray | None = None,
) -> Budgets:
    """Tokens of each head of a block at a ratio. Raises ValueError if the block has too few."""
    n_heads = curves.shape[0] * curves.shape[1]
    total = round(n_heads * n_tokens / am_ratio)
    return budgets.solve(
        curves.astype(np.float64), fractions.astype(np.float64), n_tokens, total, planes.N_SINKS, whole
    )


def _read_anchor(content: Mapping[str, Any], tensors: Tensors, at: str, spec: ModelSpec) -> Anchor:
    n_layers, n_kv_heads = spec.dense_shapes()["keys"][:2]
    heads = tuple(tuple(map(int, plane)) for plane in content["heads"])
    if sorted(head for plane in heads for head in plane) != list(range(n_layers * n_kv_heads)) or not all(heads):
        raise ValueError(f"{at} has planes that are not all {n_layers * n_kv_heads} heads, each once")
    bases = {
        side: tuple(
            read_basis(tensors, f"{at}.{side}.{i}", len(plane) * spec.dense_shapes()[side][-1])
            for i, plane in enumerate(heads)
        )
        for side in SIDES
    }
    ranks = {side: [len(basis.variances) for basis in bases[side]] for side in SIDES}
    described = content["profiles"]
    if not described or set(described) - set(COMPACTED_PROFILES):
        raise ValueError(f"{at} has profiles {sorted(described)[:4]!s}")
    profiles = {
        name: read_profile(tensors, f"{at}.{name}", described[name], ranks)
        for name in COMPACTED_PROFILES
        if name in described
    }
    bounds = {name: float(described[name]["bound"]) for name in profiles}
    if not all(0 <= bound < np.inf for bound in bounds.values()):
        raise ValueError(f"{at} has bounds {bounds}")
    leaders = _read_leaders(content["leaders"], heads, at)
    return Anchor(
        heads, bases["keys"], bases["values"], profiles, bounds, leaders, _read_predictors(tensors, at, bases, leaders)
    )


def _read_leaders(leaders: Any, heads: Sequence[tuple[int, ...]], at: str) -> tuple[int | None, ...]:
    """Leaders have none themselves, so that they can be decoded first, and all tokens, so that every row finds its."""
    lead = [i for i, plane in enumerate(heads) if len(plane) > 1 and leaders[i] is None]
    if len(leaders) != len(heads) or not all(leader is None or leader in lead for leader in leaders):
        raise ValueError(f"{at} must have a leader, or none, for {len(heads)} planes: one of {lead}, got {leaders!s}")
    return tuple(leader if leader is None else int(leader) for leader in leaders)


def _read_predictors(
    tensors: Tensors, at: str, bases: Mapping[str, Sequence[Basis]], leaders: Sequence[int | None]
) -> dict[tuple[str, int], Predictor]:
    """Those that there are: no plane need have one."""
    widths = {side: [len(basis.mean) for basis in bases[side]] for side in SIDES}
    found = {}
    for side, (i, leader) in product(SIDES, enumerate(leaders)):
        n_known = 0 if leader is None else widths["keys"][leader] + widths["values"][leader]
        n_known += widths["keys"][i] if side == "values" else 0
        name = f"{at}.{side}.{i}.predictor"
        if name in tensors and n_known:
            found[side, i] = read_tensor(tensors, name, np.float16, n_known, widths[side][i]).astype(np.float32)
    return found
