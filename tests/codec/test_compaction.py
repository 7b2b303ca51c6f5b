"""Attention Matching on heads whose best answer is known, on real ones of the reference model, and on bad input."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_model import ReferenceModel, windows

from kvcached.block import Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec import attention, compaction, planes

N_TOKENS, N_LAYERS, N_KV_HEADS, N_QUERY_HEADS, DIM = 16, 2, 2, 4, 8
LAYER = LayerSpec(n_query_heads=N_QUERY_HEADS, n_kv_heads=N_KV_HEADS, key_dim=DIM, value_dim=DIM, rope=RopeSpec(DIM))
SPEC = ModelSpec(Fingerprint(weights="w"), "float16", N_TOKENS, (LAYER,) * N_LAYERS)


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def a_block(first_position: int = 256) -> KVBlock:
    shape = (N_LAYERS, N_KV_HEADS, N_TOKENS, DIM)
    tensors = {"keys": some(*shape, seed=1).astype(np.float16), "values": some(*shape, seed=2).astype(np.float16)}
    return KVBlock.dense(tensors, N_TOKENS, first_position)


def some_queries(n: int = 40) -> np.ndarray:
    return some(N_LAYERS, N_QUERY_HEADS, n, DIM, seed=3)


def budgets(*of_heads: int) -> np.ndarray:
    return np.resize(of_heads, (N_LAYERS, N_KV_HEADS)).astype(np.int32)


class Head:
    """One head compacted, as `pick` and `fit` do it."""

    def __init__(self, of: np.ndarray, values: np.ndarray, n_kept: int, n_sinks: int = 0) -> None:
        self.kept = compaction.select(of, n_kept, n_sinks)
        self.bias = compaction.fit_bias(of, of[:, self.kept], n_sinks)
        biased, own = of[:, self.kept] + self.bias, values[self.kept]
        self.values = compaction.fit_values(of, values, biased, own, n_sinks)


def test_keys_that_come_four_times_are_kept_once_with_a_bias_of_log_4() -> None:
    keys, values, queries = some(8, 16).repeat(4, 0), some(8, 4, seed=1).repeat(4, 0), some(200, 16, seed=2)
    of, kept = attention.logits(queries, keys, 0.25), np.arange(0, 32, 4)
    bias = compaction.fit_bias(of, of[:, kept])
    np.testing.assert_allclose(bias, np.log(4), atol=0.1)  # the pull towards no bias is in it
    np.testing.assert_allclose(
        compaction.fit_values(of, values, of[:, kept] + bias, values[kept]), values[kept], atol=0.02
    )


def test_the_mass_of_what_goes_is_added_to_what_stays() -> None:
    of = attention.logits(some(200, 8), some(32, 8, seed=1), 0.3)
    kept = compaction.select(of, 8, 0)
    exact, values = attention.read(of, np.zeros((32, 1), np.float32)), np.zeros((8, 1), np.float32)
    with_bias = attention.read(of[:, kept], values, compaction.fit_bias(of, of[:, kept]))
    without = attention.read(of[:, kept], values)
    assert attention.mass_error(with_bias, exact) < 0.5 * attention.mass_error(without, exact)


def test_the_keys_that_are_looked_at_stay_and_so_do_sinks() -> None:
    of = np.zeros((5, 10))
    of[:, 7], of[2, 4] = 6.0, 9.0  # looked at by all; by one
    np.testing.assert_array_equal(compaction.select(of, 2, 0), [4, 7])
    np.testing.assert_array_equal(compaction.select(of, 4, 2), [0, 1, 4, 7])


@given(st.integers(1, N_TOKENS), st.integers(1, 60), st.floats(1e-3, 30), st.integers(0, 9))
def test_whatever_the_queries_a_compacted_head_is_finite_bounded_and_its_tokens_are_in_order(
    n_kept: int, n_queries: int, size: float, seed: int
) -> None:
    keys, values = some(N_TOKENS, DIM, seed=seed), some(N_TOKENS, DIM, seed=seed + 1)
    queries = np.float32(size) * some(n_queries, DIM, seed=seed + 2)
    head = Head(attention.logits(queries, keys, 1.0), values, n_kept)
    assert len(head.kept) == len(head.bias) == len(head.values) == n_kept
    assert (np.diff(head.kept) > 0).all()
    assert np.abs(head.bias).max() <= compaction.MAX_BIAS + 1e-6
    assert np.isfinite(head.values).all()


def test_queries_that_are_all_equal_or_fewer_than_what_is_kept_still_lower_the_error() -> None:
    keys, values = some(32, 8), some(32, 8, seed=1)
    for queries in (some(1, 8, seed=2).repeat(50, 0), some(3, 8, seed=2)):
        of = attention.logits(queries, keys, 0.5)
        head = Head(of, values, 8)
        exact = attention.read(of, values)
        fitted = attention.read(of[:, head.kept], head.values, head.bias)
        picked = attention.read(of[:, head.kept], values[head.kept])
        assert attention.output_error(fitted, exact, np.eye(8)) < 0.2 * attention.output_error(picked, exact, np.eye(8))


def test_a_head_that_queries_do_not_look_at_keeps_values_of_its_own_size() -> None:
    keys = np.concatenate([np.full((1, 8), 50, np.float32), some(31, 8)])  # all mass is on one key
    of = attention.logits(np.ones((20, 8), np.float32), keys, 1.0)
    head = Head(of, values := some(32, 8, seed=1), 4)
    assert np.abs(head.values).max() <= np.abs(values).max() + 1e-3


def test_a_fit_of_values_that_grow_beyond_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "VALUE_RIDGE", 1e-14)
    alike = some(1, 8) + np.float32(1e-5) * some(8, 8, seed=1)  # queries cannot tell apart what is kept
    of = attention.logits(some(64, 8, seed=2), np.concatenate([alike, some(8, 8, seed=4)]), 1.0)
    values = some(16, 8, seed=3)
    with pytest.raises(ValueError, match="fitted values grow"):
        compaction.fit_values(of, values, of[:, :8], values[:8])


def test_a_block_that_keeps_all_is_the_block() -> None:
    block = a_block()
    same = compaction.compact(block, SPEC, budgets(N_TOKENS), some_queries())
    assert same.is_dense
    np.testing.assert_array_equal(same.keys, block.keys)
    np.testing.assert_array_equal(same.values, block.values)


def test_a_compacted_block_is_packed_and_keeps_keys_and_positions_of_its_tokens() -> None:
    block, kept = a_block(), budgets(3, N_TOKENS, 5, 1)
    small = compaction.compact(block, SPEC, kept, some_queries())
    np.testing.assert_array_equal(small.lengths, kept)
    assert small.n_source_tokens == N_TOKENS
    assert not small.is_dense
    assert len(small.keys) == len(small.values) == len(small.positions) == len(small.bias) == kept.sum()
    heads = np.repeat(np.arange(kept.size), kept.reshape(-1))
    np.testing.assert_array_equal(small.keys, block.keys[heads * N_TOKENS + small.positions - block.first_position])


def test_sinks_are_kept_as_they_are_by_every_head_of_the_first_block() -> None:
    block, sinks = a_block(0), np.arange(planes.N_SINKS)
    small = compaction.compact(block, SPEC, budgets(6), some_queries())
    for head, rows in enumerate(compaction.rows_of_heads(small)):
        kept = np.arange(rows.start, rows.stop)[: planes.N_SINKS]
        np.testing.assert_array_equal(small.positions[kept], sinks)
        np.testing.assert_array_equal(small.bias[kept], 0)
        np.testing.assert_array_equal(small.values[kept], block.values[head * N_TOKENS + sinks])


def test_biases_are_such_as_frames_keep() -> None:
    small = compaction.compact(a_block(), SPEC, budgets(3, 5), some_queries())
    steps = small.bias / compaction.BIAS_STEP
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert np.abs(steps).max() <= 48
    assert small.bias.any()


def test_fits_make_up_for_what_coding_changed_in_the_keys() -> None:
    block, queries = a_block(), some_queries(200)
    picked = compaction.pick(block, SPEC, budgets(6), queries)
    seen = picked.keys.astype(np.float32) * np.float32(0.8)
    metric = np.broadcast_to(np.eye(DIM, dtype=np.float32), (N_LAYERS, N_KV_HEADS, DIM, DIM))
    told, untold = (
        replace(compaction.fit(picked, block, SPEC, queries, keys), keys=seen.astype(np.float16))
        for keys in (seen, picked.keys.astype(np.float32))
    )
    mass, output = compaction.errors(told, block, SPEC, queries, metric)
    other_mass, other_output = compaction.errors(untold, block, SPEC, queries, metric)
    assert mass < other_mass
    assert output < other_output


def test_the_whole_block_has_no_error() -> None:
    block = a_block()
    metric = np.broadcast_to(np.eye(DIM, dtype=np.float32), (N_LAYERS, N_KV_HEADS, DIM, DIM))
    assert compaction.errors(block, block, SPEC, some_queries(), metric) == (0, 0)


def test_a_kv_head_is_fitted_to_the_queries_of_all_its_query_heads() -> None:
    block, queries, kept = a_block(), some_queries(), budgets(4)
    other = queries.copy()
    other[:, 3] *= 4  # read the second KV head
    a, b = (compaction.compact(block, SPEC, kept, each) for each in (queries, other))
    of_first = np.tile(np.repeat([True, False], 4), N_LAYERS)
    np.testing.assert_array_equal(a.values[of_first], b.values[of_first])
    assert (a.values[~of_first] != b.values[~of_first]).any()


def test_on_real_heads_matching_beats_picking_on_queries_that_it_has_not_seen() -> None:
    model = ReferenceModel()
    trace = model.run(windows("heldout", 1, 768)[0])
    n, n_kept = 256, 64
    matched = picked = 0.0
    for layer, head in np.ndindex(model.n_layers, model.n_kv_heads):
        keys, values = (rows[layer, head, n : 2 * n] for rows in (trace.added.keys, trace.added.values))
        queries = trace.queries[layer, 2 * head : 2 * head + 2, 2 * n :]
        of, unseen = (
            attention.logits(part.reshape(-1, model.head_dim), keys, model.head_dim**-0.5)
            for part in (queries[:, ::2], queries[:, 1::2])
        )
        fitted, exact = Head(of, values, n_kept), attention.read(unseen, values)
        every_fourth = np.arange(0, n, n // n_kept)
        metric = np.eye(model.head_dim)
        found = attention.read(unseen[:, fitted.kept], fitted.values, fitted.bias)
        matched += attention.output_error(found, exact, metric)
        picked += attention.output_error(attention.read(unseen[:, every_fourth], values[every_fourth]), exact, metric)
    assert matched < 0.5 * picked


Bad = Callable[[], tuple[KVBlock, np.ndarray, np.ndarray]]


def _with(numbers: np.ndarray, value: float) -> np.ndarray:
    changed = numbers.copy()
    changed.flat[-1] = value
    return changed


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (lambda: (a_block(), budgets(4), some_queries()[:, :3]), r"queries are of shape \(2, 4, n > 0, 8\), got"),
        (lambda: (a_block(), budgets(4), some_queries(0)), r"got \(2, 4, 0, 8\)"),
        (lambda: (a_block(), budgets(4), _with(some_queries(), np.nan)), "queries to compact must be finite"),
        (lambda: (a_block(), budgets(4), _with(some_queries(), np.inf)), "queries to compact must be finite"),
        (lambda: (a_block(), budgets(0), some_queries()), "budgets are 1 to 16 tokens, got 0 to 0"),
        (lambda: (a_block(), budgets(17, 4), some_queries()), "budgets are 1 to 16 tokens, got 4 to 17"),
        (lambda: (a_block(0), budgets(3), some_queries()), "budgets are 4 to 16 tokens, got 3 to 3"),
        (lambda: (a_block(), budgets(4)[:1], some_queries()), r"budgets of \(1, 2\)"),
        (
            lambda: (replace(a_block(), values=_with(a_block().values, np.inf)), budgets(4), some_queries()),
            "values to compact must be finite",
        ),
        (
            lambda: (compaction.compact(a_block(), SPEC, budgets(4), some_queries()), budgets(4), some_queries()),
            "this one is compacted or opaque",
        ),
    ],
)
def test_what_cannot_be_compacted_is_refused_with_what_was_expected(bad: Bad, expected: str) -> None:
    block, kept, queries = bad()
    with pytest.raises(ValueError, match=expected):
        compaction.compact(block, SPEC, kept, queries)
