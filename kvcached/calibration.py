"""From a model's caches on some text to its bundle: what is accumulated on the way, and how it is fitted. Pure.

    fit text     moments of the planes' rows; with queries, how much errors matter (sensitivity.py): bases and metrics
                 and what compaction takes (matching.py, anchors.py)
    tune text    a bounded sample of rows, which fitting never sees: steps and tables of each profile (steps.py)

Nothing else is kept. The same blocks in the same order give the same bundle. Which text belongs to which part is the
caller's business; text on which a bundle is measured must be in neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int32

from kvcached import anchors, sensitivity, steps
from kvcached.block import KVBlock, ModelSpec
from kvcached.codec import klt, planes, rope
from kvcached.codec.bundle import Bundle, group_widths
from kvcached.codec.compactor import COMPACTED_PROFILES, Compaction
from kvcached.codec.tables import SIDES, Profile, Tables, storable
from kvcached.errors import InvalidRequestError
from kvcached.matching import FRACTIONS, BudgetsBy, Matching
from kvcached_client.tensors import DTYPES

Part = Literal["fit", "tune"]
Queries = Float32[np.ndarray, "n_layers n_query_heads n_queries key_dim"]
OutputMetric = Float32[np.ndarray, "n_layers n_kv_heads value_dim value_dim"]
HeadWeights = Float32[np.ndarray, "_n_layers _n_kv_heads"]

MAX_LAYERS_PER_GROUP = 8
MAX_TUNE_ROWS, _MAX_TUNE_BYTES = 4096, 128 << 20
MIN_TUNE_ROWS = 256
MIN_ROWS_PER_FEATURE = 2  # with fewer a basis fits the text and not the model
N_RECOMPUTED = 128  # tokens of a restored prefix that the adapter computes anew
RIDGE = 0.1  # of the mean weight, added to all: no direction is worth nothing
_FRAME_BYTES = 1024  # header, records and checksums of a frame, at most
_SINKS = planes.N_SINKS / 1024  # of all tokens, in texts as short as worth storing


class Calibration:
    """Statistics of a model's caches, and the bundle that follows from them. Not safe for concurrent calls.

    compaction_problem: why a bundle has nothing on compaction, if it has nothing.
    """

    compaction_problem = "the model showed no queries"

    def __init__(
        self, spec: ModelSpec, layers_per_group: int | None = None, seed: int = 0, n_recomputed: int = N_RECOMPUTED
    ) -> None:
        """Of a model with dense layers; layers_per_group by default at most 8, in groups as equal as can be.

        Raises:
            InvalidRequestError: the model has no dense layers, or the groups make no sense.
            UnsupportedRopeError: the rotary positions of a layer cannot be removed.
        """
        n_layers = len(spec.dense_layers)
        if not n_layers:
            raise InvalidRequestError("a model is calibrated by its dense layers, this one has none")
        if layers_per_group is not None and not 1 <= layers_per_group <= n_layers:
            raise InvalidRequestError(f"layers_per_group must be 1 to {n_layers}, got {layers_per_group}")
        for layer in spec.dense_layers:
            rope.remove(np.zeros((1, layer.key_dim), np.float32), np.zeros(1, np.int32), layer.rope)
        n_groups = -(-n_layers // MAX_LAYERS_PER_GROUP)
        self.spec = spec
        self.layers_per_group = layers_per_group or -(-n_layers // n_groups)
        self._n_recomputed = n_recomputed
        self._moments: dict[str, list[klt.Moments]] = {
            side: [_no_moments(width) for width in self._widths(side)] for side in SIDES
        }
        self._sample = _Reservoir({side: sum(self._widths(side)) for side in SIDES}, np.random.default_rng([seed, 0]))
        self._rng = np.random.default_rng([seed, 1])
        _, n_kv_heads, _, key_dim = spec.dense_shapes()["keys"]
        self._output_metric: Float64[np.ndarray, "n_layers n_kv_heads value_dim value_dim"] | None = None
        self._key_metric = np.zeros((n_layers, n_kv_heads, key_dim, key_dim))
        self._value_weight = np.zeros((n_layers, n_kv_heads))
        self._head_weights: Float32[np.ndarray, "n_layers n_kv_heads"] | None = None
        self._matching = Matching(spec, seed, n_recomputed)

    @property
    def n_rows(self) -> dict[Part, int]:
        """How many tokens each part has had, sinks apart."""
        return {"fit": self._moments["keys"][0].n_rows, "tune": self._sample.n_seen}

    def set_output_metric(self, metric: OutputMetric, head_weights: HeadWeights | None = None) -> None:
        """W^T W of the output projection, summed over the query heads of each KV head; due before the first queries.

        head_weights: what a squared error in what each head adds was measured to cost; for the budgets of compaction.

        Raises InvalidRequestError for other shapes, numbers that are not finite, or none that is not 0.
        """
        n_layers, n_kv_heads, _, value_dim = self.spec.dense_shapes()["values"]
        expected = (n_layers, n_kv_heads, value_dim, value_dim)
        if metric.shape != expected or not np.isfinite(metric).all() or not metric.any():
            raise InvalidRequestError(
                f"an output metric is finite, not all zero and of shape {expected}, got shape {metric.shape}"
            )
        if head_weights is not None and not (
            head_weights.shape == expected[:2] and np.isfinite(head_weights).all() and (head_weights > 0).all()
        ):
            raise InvalidRequestError(f"head weights are {expected[:2]} finite numbers above 0")
        self._output_metric, self._head_weights = metric.astype(np.float64), head_weights

    def add(
        self,
        block: KVBlock,
        part: Part,
        queries: Queries | None = None,
        query_positions: Int32[np.ndarray, " n_queries"] | None = None,
    ) -> None:
        """Takes a run of tokens into account, of any length: for queries to count, a whole text from its first token.

        queries: rotary positions applied; they read what the block holds, up to their own positions. Of fit text only.
        Without any, errors in all features weigh alike.

        Raises:
            InvalidRequestError: the block is not of this model or not finite, the part is none, or queries do not fit.
        """
        try:
            split = planes.split(block, self.spec, self.layers_per_group)
        except ValueError as error:
            raise InvalidRequestError(f"a block to calibrate on: {error}") from None
        sides = {"keys": split.keys, "values": split.values}
        if part == "tune":
            self._sample.add({side: np.concatenate(rows, axis=1) for side, rows in sides.items()})
            return
        if part != "fit":
            raise InvalidRequestError(f"a part of the text is fit or tune, got {part!r}")
        if queries is not None or query_positions is not None:
            self._add_queries(block, queries, query_positions)
        for side, groups in sides.items():
            added = [klt.Moments.of(rows) for rows in groups]
            self._moments[side] = [old + new for old, new in zip(self._moments[side], added, strict=True)]

    def fit(self, profiles: Mapping[str, float], budgets: BudgetsBy = "curves") -> Bundle:
        """The bundle. profiles: compression by name, which is reached on tune text with every stored byte counted.

        budgets: by what compaction shares tokens between heads. A model that showed no queries is not compacted.

        Raises:
            InvalidRequestError: there is too little text, or a compression that cannot be reached.
        """
        self._check_enough()
        weights = {side: self._weights(side) for side in SIDES}
        bases = {
            side: [
                storable(klt.fit(moments, len(moments.total), weight.metric))
                for moments, weight in zip(self._moments[side], weights[side], strict=True)
            ]
            for side in SIDES
        }
        samples = {
            side: [
                steps.Sample(klt.project(rows, basis), weight.scale)
                for rows, basis, weight in zip(self._sample_rows(side), bases[side], weights[side], strict=True)
            ]
            for side in SIDES
        }
        found = {name: self._choose(samples, name, compression) for name, compression in profiles.items()}
        bundle = _without_unused(self.spec, self.layers_per_group, bases, found)
        return replace(bundle, compaction=self._compaction(profiles, weights, budgets))

    def _compaction(
        self, profiles: Mapping[str, float], weights: Mapping[str, list["_Weight"]], by: BudgetsBy
    ) -> Compaction | None:
        targets = {name: float(profiles[name]) for name in COMPACTED_PROFILES if name in profiles}
        blocks, reservoir, metric = self._matching.blocks, self._matching.reservoir, self._output_metric
        self.compaction_problem = self._matching.problem or self.compaction_problem
        if not targets or not blocks or reservoir is None or metric is None:
            return None
        with np.errstate(over="ignore"):
            halves = reservoir.astype(np.float16)
        if not np.isfinite(halves).all():
            self.compaction_problem = "queries are larger than float16 can hold"
            return None
        sides = {
            side: anchors.GroupStatistics(
                self._moments[side], [w.metric for w in weights[side]], [w.scale for w in weights[side]]
            )
            for side in SIDES
        }
        outline = Compaction(
            np.array(FRACTIONS, np.float32),
            self._matching.curves(by, self._head_weights),
            halves.astype(np.float32),
            metric.astype(np.float32),
            {},
        )
        fitting = anchors.Fitting(self.spec, self.layers_per_group, blocks, sides)
        try:
            return anchors.fit(outline, fitting, targets)
        except anchors.NoCompactionError as error:  # it is coded all the same
            self.compaction_problem = str(error)
            return None

    def _widths(self, side: str) -> list[int]:
        return group_widths(self.spec, self.layers_per_group, side)

    def _add_queries(
        self,
        block: KVBlock,
        queries: Queries | None,
        positions: Int32[np.ndarray, " n_queries"] | None,
    ) -> None:
        if self._output_metric is None:
            raise InvalidRequestError("queries need the output metric, which was not set before them")
        layers, (n_layers, n_kv_heads, _, key_dim) = self.spec.dense_layers, self.spec.dense_shapes()["keys"]
        n_query_heads = layers[0].n_query_heads
        if queries is None or positions is None or queries.shape != (n_layers, n_query_heads, len(positions), key_dim):
            shape = None if queries is None else queries.shape
            raise InvalidRequestError(
                f"queries are of shape ({n_layers}, {n_query_heads}, n, {key_dim}) with n positions, got {shape}"
            )
        last = block.first_position + block.n_source_tokens - 1
        if ((positions < block.first_position) | (positions > last)).any() or not np.isfinite(queries).all():
            raise InvalidRequestError(f"queries are finite, at positions {block.first_position} to {last} of the block")
        tensors = block.to_tensors()
        per_kv_head = n_query_heads // n_kv_heads
        self._matching.add(block, queries, positions, self._output_metric / per_kv_head)
        for index, layer in enumerate(layers):
            text = sensitivity.Text(
                tensors["keys"][index].astype(np.float32),
                tensors["values"][index].astype(np.float32),
                block.first_position,
                planes.n_sinks(block.first_position, block.n_source_tokens),
                self._n_recomputed,
            )
            for head in range(n_kv_heads):
                group = queries[index, head * per_kv_head : (head + 1) * per_kv_head]
                one = self._output_metric[index, head] / per_kv_head
                metric, weight = sensitivity.of_head(text, head, group, positions, layer, one, self._rng)
                self._key_metric[index, head] += metric
                self._value_weight[index, head] += weight

    def _check_enough(self) -> None:
        widest = max(max(self._widths(side)) for side in SIDES)
        needed: dict[Part, int] = {"fit": MIN_ROWS_PER_FEATURE * widest, "tune": MIN_TUNE_ROWS}
        if short := [f"{part} {self.n_rows[part]} of {n}" for part, n in needed.items() if self.n_rows[part] < n]:
            raise InvalidRequestError(f"too little text to calibrate on, in tokens: {', '.join(short)}")
        if self._output_metric is not None and not self._value_weight.any():
            raise InvalidRequestError(
                f"no query read a token at least {self._n_recomputed} before it: give longer texts, or queries"
            )

    def _weights(self, side: str) -> list["_Weight"]:
        if self._output_metric is None:
            return [_alike(moments) for moments in self._moments[side]]
        heads = self._key_metric
        if side == "values":
            per_kv_head = self.spec.dense_layers[0].n_query_heads // heads.shape[1]
            heads = self._output_metric * (self._value_weight / per_kv_head)[:, :, None, None]
        starts = range(0, len(heads), self.layers_per_group)
        # A group that nothing reads still weighs a little, as part of all of them.
        mean = float(np.trace(heads, axis1=2, axis2=3).mean() / heads.shape[-1])
        return [_of_heads(heads[start : start + self.layers_per_group], mean) for start in starts]

    def _sample_rows(self, side: str) -> Sequence[planes.Plane]:
        ends = np.cumsum(self._widths(side))[:-1]
        return np.split(self._sample.rows[side], ends, axis=1)

    def _choose(self, samples: Mapping[str, list[steps.Sample]], name: str, compression: float) -> "_Found":
        if not 1 <= compression <= 1e6:  # catches NaN too
            raise InvalidRequestError(f"profile {name} must reach a compression of 1 to 1e6, got {compression}")
        block_size, bits = self.spec.block_size, 8 * DTYPES[self.spec.kv_dtype].itemsize
        n_values = block_size * sum(sum(self._widths(side)) for side in SIDES)
        budget = bits / compression - bits * _SINKS - 8 * _FRAME_BYTES / n_values
        try:
            choice = steps.choose([sample for side in SIDES for sample in samples[side]], budget, block_size)
        except ValueError as error:
            raise InvalidRequestError(f"profile {name} cannot reach a compression of {compression}: {error}") from None
        return _Found(float(compression), choice)


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A metric with a mean weight of 1, and what it was divided by."""

    metric: Float64[np.ndarray, "n_features n_features"]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    compression: float
    choice: steps.Choice

    def tables(self, planes_of_side: slice, kept: Sequence[np.ndarray]) -> tuple[Tables, ...]:
        both = zip(self.choice.steps[planes_of_side], self.choice.scales[planes_of_side], kept, strict=True)
        return tuple(Tables(plane_steps[keep], scales[keep]) for plane_steps, scales, keep in both)


class _Reservoir:
    """Rows, each as likely to be kept as any other: those with the smallest of random numbers."""

    def __init__(self, widths: Mapping[str, int], rng: np.random.Generator) -> None:
        self._rng = rng
        self._limit = max(MIN_TUNE_ROWS, min(MAX_TUNE_ROWS, _MAX_TUNE_BYTES // (4 * sum(widths.values()))))
        self._ranks = np.zeros(0)
        self.rows = {side: np.zeros((0, width), np.float32) for side, width in widths.items()}
        self.n_seen = 0

    def add(self, rows: Mapping[str, planes.Plane]) -> None:
        n_rows = len(next(iter(rows.values())))
        self.n_seen += n_rows
        ranks = np.concatenate([self._ranks, self._rng.random(n_rows)])
        kept = np.argsort(ranks, kind="stable")[: self._limit]
        self._ranks = ranks[kept]
        self.rows = {side: np.concatenate([self.rows[side], new])[kept] for side, new in rows.items()}


def _no_moments(n_features: int) -> klt.Moments:
    return klt.Moments(0, np.zeros(n_features), np.zeros((n_features, n_features)))


def _alike(moments: klt.Moments) -> _Weight:
    """Without a metric: errors weigh relative to how much the plane's numbers vary."""
    n_features = len(moments.total)
    variance = float(np.trace(moments.covariance)) / n_features
    return _Weight(np.eye(n_features), 1 / variance if variance > 0 else 1.0)


def _of_heads(heads: Float64[np.ndarray, "n_layers n_kv_heads dim dim"], mean_of_all: float) -> _Weight:
    """Heads side by side, in proportion; errors in one leave the others alone."""
    dim = heads.shape[-1]
    metrics = heads.reshape(-1, dim, dim)
    n_features = len(metrics) * dim
    mean = max(float(np.trace(metrics, axis1=1, axis2=2).sum()) / n_features, 1e-3 * mean_of_all, 1e-30)
    metric = RIDGE * np.eye(n_features)
    for index, one in enumerate(metrics):
        at = slice(index * dim, (index + 1) * dim)
        metric[at, at] += one / mean
    scale = float(np.trace(metric)) / n_features
    return _Weight(metric / scale, mean * scale)


def _without_unused(
    spec: ModelSpec, layers_per_group: int, bases: Mapping[str, list[klt.Basis]], found: Mapping[str, _Found]
) -> Bundle:
    """The bundle, without components that no profile codes."""
    sides, kept, at = {}, {}, {}
    first = 0
    for side in SIDES:
        at[side] = slice(first, first + len(bases[side]))
        first = at[side].stop
        coded = [np.any([one.choice.steps[i] > 0 for one in found.values()], axis=0) for i in range(first)[at[side]]]
        for plane in coded:
            plane[0] = True  # a basis has at least one
        kept[side] = coded
        sides[side] = tuple(
            klt.Basis(b.mean, np.ascontiguousarray(b.forward[:, keep]), b.inverse[keep], b.variances[keep])
            for b, keep in zip(bases[side], coded, strict=True)
        )
    profiles = {
        name: Profile(
            one.compression,
            steps.DEAD_ZONE,
            steps.CENTROID,
            one.tables(at["keys"], kept["keys"]),
            one.tables(at["values"], kept["values"]),
        )
        for name, one in found.items()
    }
    return Bundle(spec, layers_per_group, sides["keys"], sides["values"], profiles)
