"""How compacted blocks are coded, fitted to a few blocks that were compacted: planes, bases, steps and tables. Pure.

Bases come from the moments of all tokens, which `calibration` has anyway: those of the heads of a plane are a part of
those of their group of layers. Where `prediction` helps, a basis is that of what it leaves. Steps and tables come from
the rows that compaction leaves. A row that stands for many tokens is read more, so that an error in it weighs more: by
how much is measured as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Float64

from kvcached import codec, prediction, steps
from kvcached.block import Fidelity, FidelityKind, KVBlock, ModelSpec
from kvcached.codec import attention, compacted, compaction, klt, planes
from kvcached.codec.compaction import BlockQueries, Budgets
from kvcached.codec.compactor import ANCHORS, Anchor, Compaction, Compactor, HeadPlane, solve_budgets
from kvcached.codec.tables import SIDES, PlaneCoder, Profile, Tables, storable
from kvcached.errors import CorruptFrameError
from kvcached.prediction import PlaneSample
from kvcached_client.tensors import DTYPES

WHOLE = 7 / 8  # of its tokens: a head whose budget is above that keeps all
BOUND = 2.0  # times the largest error of any block of the calibration
_FRAME_BYTES = 768  # header, records, checksums and the beginnings of streams
_BIAS_BITS = 6  # of a row that has one


class NoCompactionError(Exception):
    """A model whose blocks cannot be compacted; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupStatistics:
    """Of the planes of one side, group by group: moments, and the metric in which errors weigh, with its scale."""

    moments: Sequence[klt.Moments]
    metrics: Sequence[Float64[np.ndarray, "_n _n"]]
    scales: Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class Fitting:
    """What anchors are fitted to. blocks: dense. sides: by name."""

    spec: ModelSpec
    layers_per_group: int
    blocks: Sequence[KVBlock]
    sides: Mapping[str, GroupStatistics]


def fit(outline: Compaction, fitting: Fitting, targets: Mapping[str, float]) -> Compaction:
    """The outline, which has no anchors yet, with anchors. targets: compression of each profile without compaction.

    Raises NoCompactionError if blocks are too short to compact or cannot be, or no steps reach a profile's compression.
    """
    if fitting.spec.block_size < ANCHORS[-1] * planes.N_SINKS:
        raise NoCompactionError(f"blocks of {fitting.spec.block_size} tokens are too short")
    try:
        anchors = {ratio: _anchor(outline, fitting, ratio, targets) for ratio in ANCHORS}
        unbounded = replace(outline, anchors=anchors)
        return replace(outline, anchors={ratio: _bounded(unbounded, fitting, ratio) for ratio in ANCHORS})
    except (ValueError, CorruptFrameError, RuntimeError) as error:  # the last is scipy's, of a fit that does not end
        raise NoCompactionError(str(error)) from None


def _anchor(outline: Compaction, fitting: Fitting, ratio: int, targets: Mapping[str, float]) -> Anchor:
    spec = fitting.spec
    first = solve_budgets(outline.curves, outline.fractions, spec.block_size, float(ratio))
    heads = _planes(first, fitting)
    together = np.zeros(first.shape, bool)
    together.reshape(-1)[[head for plane in heads if len(plane) > 1 for head in plane]] = True
    budgets = solve_budgets(outline.curves, outline.fractions, spec.block_size, float(ratio), together)
    coder = _draft(outline, spec, budgets, heads, fitting)
    samples, leaders = _samples(coder, fitting), _leaders(heads, fitting)
    bits = {name: _bits_per_value(float(target * ratio), budgets, spec) for name, target in targets.items()}
    coarse = steps.choose([one.sample for side in SIDES for one in samples[side]], min(bits.values()), None)
    found = prediction.fit(samples, coarse, leaders, spec.block_size)
    profiles = {
        name: _profile(steps.choose([one.sample for one in found.values()], bits[name], None), target, len(heads))
        for name, target in targets.items()
    }
    return Anchor(
        heads=heads,
        keys=tuple(one.basis for (side, _), one in found.items() if side == "keys"),
        values=tuple(one.basis for (side, _), one in found.items() if side == "values"),
        profiles=profiles,
        bounds=dict.fromkeys(targets, float("inf")),
        leaders=leaders,
        predictors={place: one.predictor for place, one in found.items() if one.predictor is not None},
    )


def _planes(budgets: Budgets, fitting: Fitting) -> tuple[tuple[int, ...], ...]:
    """Heads that keep (nearly) all tokens, together by groups of layers; each other head alone."""
    n_kv_heads, n_tokens = budgets.shape[1], fitting.spec.block_size
    room = int(budgets.sum()) - budgets.size * planes.N_SINKS
    most = np.argsort(-budgets.reshape(-1), kind="stable")[: room // (n_tokens - planes.N_SINKS)]
    whole = sorted(head for head in most.tolist() if budgets.flat[head] >= WHOLE * n_tokens)
    groups: dict[int, list[int]] = {}
    for head in whole:
        groups.setdefault(head // n_kv_heads // fitting.layers_per_group, []).append(head)
    alone = (head for head in range(budgets.size) if head not in set(whole))
    return tuple(sorted([*map(tuple, groups.values()), *((head,) for head in alone)]))


def _basis(plane: tuple[int, ...], fitting: Fitting, side: str) -> klt.Basis:
    """From the part of a group's statistics that is the plane's."""
    group, features = _features(plane, fitting, side)
    statistics = fitting.sides[side]
    whole, square = statistics.moments[group], np.ix_(features, features)
    part = klt.Moments(whole.n_rows, whole.total[features], whole.outer[square])
    return storable(klt.fit(part, len(features), statistics.metrics[group][square]))


def _features(plane: tuple[int, ...], fitting: Fitting, side: str) -> tuple[int, np.ndarray]:
    """The group of layers of a plane's heads, and where among its features theirs are."""
    _, n_kv_heads, _, dim = fitting.spec.dense_shapes()[side]
    per_group = fitting.layers_per_group * n_kv_heads
    first = np.array([head % per_group for head in plane]) * dim
    return plane[0] // per_group, (first[:, None] + np.arange(dim)).reshape(-1)


def _draft(
    outline: Compaction, spec: ModelSpec, budgets: Budgets, heads: Sequence[tuple[int, ...]], fitting: Fitting
) -> Compactor:
    """A compactor without tables, to compact the sample with."""
    nothing = Tables(np.zeros(0, np.float32), np.zeros(0, np.uint8))
    bases = {side: [_basis(plane, fitting, side) for plane in heads] for side in SIDES}
    coders = {side: [PlaneCoder(basis, nothing, len(basis.mean)) for basis in bases[side]] for side in SIDES}
    return Compactor(
        spec=spec,
        fidelity=Fidelity(FidelityKind.COMPACTED),
        budgets=budgets,
        planes=tuple(HeadPlane(*each) for each in zip(heads, coders["keys"], coders["values"], strict=True)),
        dead_zone=steps.DEAD_ZONE,
        centroid=steps.CENTROID,
        queries=outline.queries,
        output_metric=outline.output_metric,
        bound=float("inf"),
    )


class _Found:
    """Rows of one plane, block after block: of all tokens and of those that compaction leaves."""

    def __init__(self) -> None:
        self.every: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
        self.kept: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
        self.tokens: list[np.ndarray] = []


def _samples(coder: Compactor, fitting: Fitting) -> dict[str, list[PlaneSample]]:
    """By side, plane by plane."""
    found = [_Found() for _ in coder.planes]
    read = np.zeros((2, coder.budgets.size))
    for n, block in enumerate(fitting.blocks):
        queries = codec.reservoir(block, coder)
        small = compaction.compact(block, coder.spec, coder.budgets, queries)
        read += _read(block, small, coder, queries)
        every, kept = _rows_of_planes(block, coder), _rows_of_planes(small, coder)
        rows_of_heads = list(compaction.rows_of_heads(small))
        for i, plane in enumerate(coder.planes):
            for side in SIDES:
                found[i].every[side].append(every[side][i])
                found[i].kept[side].append(kept[side][i])
            positions = small.positions[rows_of_heads[plane.heads[0]]]
            found[i].tokens.append(positions - block.first_position + n * block.n_source_tokens)
    return {
        side: [_sample(*each, side, read, fitting) for each in zip(coder.planes, found, strict=True)] for side in SIDES
    }


def _rows_of_planes(block: KVBlock, coder: Compactor) -> dict[str, list[np.ndarray]]:
    """By side, plane by plane, heads side by side."""
    plain, of_heads = compacted.plain_rows(block, coder), list(compaction.rows_of_heads(block))
    return {
        side: [np.concatenate([plain[side][of_heads[h]] for h in plane.heads], axis=1) for plane in coder.planes]
        for side in SIDES
    }


def _sample(plane: HeadPlane, found: _Found, side: str, read: np.ndarray, fitting: Fitting) -> PlaneSample:
    group, features = _features(plane.heads, fitting, side)
    before, after = read[:, list(plane.heads)].sum(axis=1)
    return PlaneSample(
        every=np.concatenate(found.every[side]),
        kept=np.concatenate(found.kept[side]),
        tokens=np.concatenate(found.tokens).astype(np.int64),
        basis=getattr(plane, side).basis,
        metric=fitting.sides[side].metrics[group][np.ix_(features, features)],
        weight=fitting.sides[side].scales[group] * float(after / before),
    )


def _leaders(heads: Sequence[tuple[int, ...]], fitting: Fitting) -> tuple[int | None, ...]:
    """For each plane of one head that of heads which keep all tokens in its group of layers, if there is one."""
    per_group = fitting.layers_per_group * fitting.spec.dense_shapes()["keys"][1]
    whole = {plane[0] // per_group: i for i, plane in enumerate(heads) if len(plane) > 1}
    return tuple(whole.get(plane[0] // per_group) if len(plane) == 1 else None for plane in heads)


def _read(block: KVBlock, small: KVBlock, coder: Compactor, queries: BlockQueries) -> Float32[np.ndarray, "2 n_heads"]:
    """Mean squared attention weight of each head's rows, before compaction and after."""
    found = np.zeros((2, coder.budgets.size), np.float32)
    for column, one in enumerate((block, small)):
        for head, rows in enumerate(compaction.rows_of_heads(one)):
            logits = compaction.logits(coder.spec, queries, one.keys[rows].astype(np.float32), head) + one.bias[rows]
            found[column, head] = np.square(attention.weights(logits)[0]).mean()
    return found


def _bits_per_value(compression: float, budgets: Budgets, spec: ModelSpec) -> float:
    """What a kept value may take so that a whole frame is so much smaller than its block."""
    shapes = spec.dense_shapes()
    dims, n_tokens = shapes["keys"][-1] + shapes["values"][-1], spec.block_size
    source_bits = 8 * DTYPES[spec.kv_dtype].itemsize * budgets.size * n_tokens * dims
    n_biased = int(budgets[budgets < n_tokens].sum())
    aside = 8 * _FRAME_BYTES + budgets.size * n_tokens + _BIAS_BITS * n_biased
    return (source_bits / compression - aside) / (int(budgets.sum()) * dims)


def _profile(choice: steps.Choice, target: float, n_planes: int) -> Profile:
    tables = [Tables(*each) for each in zip(choice.steps, choice.scales, strict=True)]
    return Profile(target, steps.DEAD_ZONE, steps.CENTROID, tuple(tables[:n_planes]), tuple(tables[n_planes:]))


def _bounded(unbounded: Compaction, fitting: Fitting, ratio: int) -> Anchor:
    """The anchor with the errors that blocks may have, going by those of the sample."""
    anchor = unbounded.anchors[ratio]
    bounds = {}
    for name in anchor.profiles:
        coder = unbounded.compactor(fitting.spec, Fidelity(FidelityKind.COMPACTED, name, float(ratio)))
        bounds[name] = BOUND * max(codec.compact(block, coder).output_error for block in fitting.blocks)
    return replace(anchor, bounds=bounds)
