"""What compaction takes, made up for small models: bases that change nothing, fine steps. Nothing here asserts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from kvcached.block import ModelSpec
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import ANCHORS, COMPACTED_PROFILES, Anchor, Compaction, Predictor
from kvcached.codec.klt import Basis
from kvcached.codec.tables import SIDES, Profile, Tables

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
WHOLE = (0, 1)


def make_compaction(
    spec: ModelSpec, seed: int = 0, *, step: float = 1 / 256, bound: float = 1e6, whole: Sequence[int] = WHOLE
) -> Compaction:
    """Of a model with 16 heads or more. bound: relative error of the output that a block may have.

    whole: heads that keep all tokens, and are coded side by side, up to a ratio of 4.
    """
    n_layers, n_kv_heads, _, key_dim = spec.dense_shapes()["keys"]
    value_dim, n_heads = spec.dense_shapes()["values"][-1], n_layers * n_kv_heads
    rng = np.random.default_rng(seed)
    fractions = np.array(FRACTIONS, np.float32)
    curves = np.outer(rng.uniform(0.5, 1, n_heads), 1 - fractions)
    curves[list(whole)] *= 1000
    queries = rng.standard_normal((n_layers, spec.dense_layers[0].n_query_heads or n_kv_heads, 24, key_dim))
    metric = np.broadcast_to(np.eye(value_dim, dtype=np.float32), (n_layers, n_kv_heads, value_dim, value_dim))
    return Compaction(
        fractions,
        curves.reshape(n_layers, n_kv_heads, -1).astype(np.float32),
        queries.astype(np.float16).astype(np.float32),
        metric.copy(),
        {ratio: _anchor(spec, n_heads, step, bound, whole if ratio <= 4 else ()) for ratio in ANCHORS},
    )


def with_compaction(bundle: Bundle, **how: float) -> Bundle:
    """The bundle, which now compacts: another one."""
    return replace(bundle, compaction=make_compaction(bundle.spec, **how))


def _anchor(spec: ModelSpec, n_heads: int, step: float, bound: float, whole: Sequence[int]) -> Anchor:
    alone = [(head,) for head in range(n_heads) if head not in whole]
    heads = (tuple(whole), *alone) if whole else tuple(alone)
    dims = {side: shape[-1] for side, shape in spec.dense_shapes().items()}
    bases = {side: tuple(_unchanged(len(plane) * dims[side]) for plane in heads) for side in SIDES}
    profiles = {}
    for coarser, name in enumerate(COMPACTED_PROFILES, 1):
        tables = {side: tuple(_tables(len(basis.mean), step * coarser) for basis in bases[side]) for side in SIDES}
        profiles[name] = Profile(11.0 * coarser, 0.5, 0.0, tables["keys"], tables["values"])
    leaders = tuple(0 if whole and len(plane) == 1 else None for plane in heads)
    predictors = make_predictors(np.random.default_rng(0), heads, leaders, dims)
    return Anchor(heads, bases["keys"], bases["values"], profiles, dict.fromkeys(profiles, bound), leaders, predictors)


def make_predictors(
    rng: np.random.Generator,
    heads: Sequence[tuple[int, ...]],
    leaders: Sequence[int | None],
    dims: Mapping[str, int],
    share: float = 1.0,
) -> dict[tuple[str, int], Predictor]:
    """Of small numbers, for a share of the planes that can have one; values without a leader from keys alone."""
    found = {}
    for side, (i, leader) in product(SIDES, enumerate(leaders)):
        n_known = 0 if leader is None else len(heads[leader]) * sum(dims.values())
        n_known += len(heads[i]) * dims["keys"] if side == "values" else 0
        if n_known and rng.random() < share:
            matrix = rng.uniform(-0.3, 0.3, (n_known, len(heads[i]) * dims[side]))
            found[side, i] = matrix.astype(np.float16).astype(np.float32)
    return found


def _unchanged(n: int) -> Basis:
    return Basis(
        np.zeros(n, np.float32), np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32), np.ones(n, np.float32)
    )


def _tables(n: int, step: float) -> Tables:
    return Tables(np.full(n, step, np.float32), np.full(n, 54, np.uint8))
