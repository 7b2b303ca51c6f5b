"""Blocks as planes and back: values and sinks bit for bit, keys to rounding, wherever in a text the block lies."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from codec.frames import DENSE_DTYPES
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import finfo
from support import same_tensors

from kvcached.block import Fingerprint, KVBlock, LayerKind, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec import planes, rope
from kvcached.errors import UnsupportedRopeError
from kvcached_client.tensors import DTYPES

ROPES = [
    RopeSpec(),
    RopeSpec(8, 1e4),
    RopeSpec(6, 5e5, interleaved=True),
    RopeSpec(8, 1e6, scaling_json='{"factor":4.0,"type":"yarn"}'),
]
STATE = LayerSpec(kind=LayerKind.STATE, opaque=True)


def model(ropes: list[RopeSpec], kv_dtype: str = "float16", n_heads: int = 2, value_dim: int = 6) -> ModelSpec:
    """Dense layers with these rotary positions, keys of 8 dims; an opaque layer in their midst."""
    dense = [LayerSpec(n_kv_heads=n_heads, key_dim=8, value_dim=value_dim, rope=kind) for kind in ropes]
    return ModelSpec(Fingerprint(weights="w"), kv_dtype, 16, (dense[0], STATE, *dense[1:]))


@dataclass(frozen=True)
class Text:
    """A piece of a text and its model. The block itself is built in the test, as in codec.frames."""

    spec: ModelSpec
    n_tokens: int
    first_position: int
    seed: int = 0
    scale: float = 1.0

    def block(self) -> KVBlock:
        rng = np.random.default_rng(self.seed)
        tensors = {}
        for name, shape in self.spec.dense_shapes().items():
            normal = rng.standard_normal((*shape[:2], self.n_tokens, shape[3])) * self.scale
            tensors[name] = normal.astype(DTYPES[self.spec.kv_dtype])
        state = np.arange(3, dtype=np.int8)
        return KVBlock.dense({**tensors, "state": state}, self.n_tokens, self.first_position)


specs = st.builds(
    model,
    st.lists(st.sampled_from(ROPES), min_size=1, max_size=5),
    st.sampled_from(DENSE_DTYPES),
    st.integers(1, 3),
    st.integers(1, 9),
)
first_positions = st.integers(0, 6) | st.integers(0, 2**31 - 16)
texts = st.builds(
    Text, specs, st.integers(1, 12), first_positions, st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1.0, 1e3])
)


@given(texts, st.integers(1, 6))
def test_merge_is_the_inverse_of_split(text: Text, layers_per_group: int) -> None:
    """Keys err by float32 rounding, relative to the row, and half a unit of the KV dtype; all else by nothing."""
    block, sinks = text.block(), max(min(4 - text.first_position, text.n_tokens), 0)
    merged = planes.merge(planes.split(block, text.spec, layers_per_group), text.spec, block.opaque)
    assert merged.is_dense
    assert (merged.first_position, merged.n_source_tokens) == (block.first_position, block.n_source_tokens)
    before, after = block.to_tensors(), merged.to_tensors()
    keys_before, keys_after = before.pop("keys"), after.pop("keys")
    assert same_tensors(after, before)
    assert keys_after.dtype == keys_before.dtype
    assert keys_after[:, :, :sinks].tobytes() == keys_before[:, :, :sinks].tobytes()
    exact, limits = keys_before.astype(np.float64), finfo(keys_before.dtype)
    lengths = np.linalg.norm(exact, axis=-1, keepdims=True)
    tolerance = 2**-20 * lengths + float(limits.eps) / 2 * np.abs(exact) + float(limits.smallest_subnormal)
    assert (np.abs(keys_after.astype(np.float64) - exact) <= tolerance).all()


@given(texts)
def test_planes_do_not_depend_on_how_layers_are_grouped(text: Text) -> None:
    block = text.block()
    one, n_layers = planes.split(block, text.spec, 6), len(text.spec.dense_layers)
    assert len(one.keys) == len(one.values) == 1
    for layers_per_group in range(1, n_layers + 1):
        several = planes.split(block, text.spec, layers_per_group)
        widths = [plane.shape[1] // (one.keys[0].shape[1] // n_layers) for plane in several.keys]
        n_full, rest = divmod(n_layers, layers_per_group)
        assert widths == [layers_per_group] * n_full + [rest] * (rest > 0)
        assert np.array_equal(np.concatenate(several.keys, axis=1), one.keys[0])
        assert np.array_equal(np.concatenate(several.values, axis=1), one.values[0])


def test_a_row_is_a_token_and_a_feature_a_dim_of_a_head_of_a_layer() -> None:
    text = Text(model([ROPES[1], ROPES[0], ROPES[2]]), n_tokens=5, first_position=100)
    block = text.block()
    tensors = block.to_tensors()
    found = planes.split(block, text.spec, 2)
    assert [plane.shape for plane in found.keys] == [(5, 2 * 2 * 8), (5, 2 * 8)]
    assert [plane.shape for plane in found.values] == [(5, 2 * 2 * 6), (5, 2 * 6)]
    for layer, head, token in np.ndindex(3, 2, 5):
        start, group = (layer % 2) * 2 + head, layer // 2
        value = tensors["values"][layer, head, token].astype(np.float32)
        assert np.array_equal(found.values[group][token, start * 6 : start * 6 + 6], value)
        key, position = tensors["keys"][layer, head, token].astype(np.float32), np.array([100 + token], np.int32)
        turned_back = rope.remove(key[None], position, text.spec.dense_layers[layer].rope)[0]
        assert np.array_equal(found.keys[group][token, start * 8 : start * 8 + 8], turned_back)


def test_a_key_that_was_the_same_everywhere_before_its_rotation_is_so_in_the_planes() -> None:
    text = Text(model([ROPES[1]], "float32"), n_tokens=9, first_position=5000)
    block = text.block()
    plain = np.broadcast_to(np.arange(1, 9, dtype=np.float32), (18, 8)).copy()
    keys = rope.apply(plain, block.positions, ROPES[1])
    found = planes.split(replace(block, keys=keys), text.spec, 1)
    np.testing.assert_allclose(found.keys[0], np.tile(np.arange(1, 9), (9, 2)), rtol=2e-6)


@pytest.mark.parametrize(
    ("first_position", "n_tokens", "n_sinks"),
    [(0, 9, 4), (3, 9, 1), (4, 9, 0), (0, 3, 3), (2, 1, 1), (0, 4, 4), (9, 4, 0)],
)
def test_only_the_first_four_tokens_of_a_text_are_sinks(first_position: int, n_tokens: int, n_sinks: int) -> None:
    text = Text(model(ROPES), n_tokens, first_position)
    block = text.block()
    found, tensors = planes.split(block, text.spec, 3), block.to_tensors()
    assert planes.n_sinks(first_position, n_tokens) == n_sinks
    assert found.sink_keys.tobytes() == tensors["keys"][:, :, :n_sinks].tobytes()
    assert found.sink_values.tobytes() == tensors["values"][:, :, :n_sinks].tobytes()
    assert {plane.shape[0] for plane in (*found.keys, *found.values)} == {n_tokens - n_sinks}


@pytest.mark.parametrize("name", DENSE_DTYPES)
def test_sinks_keep_bits_that_no_arithmetic_keeps(name: str) -> None:
    text = Text(model(ROPES, name), n_tokens=6, first_position=0)
    block = text.block()
    for rows in (block.keys, block.values):
        for sink, odd in enumerate([np.nan, np.inf, -0.0, float(finfo(rows.dtype).smallest_subnormal)]):
            rows[sink] = odd
    merged = planes.merge(planes.split(block, text.spec, 2), text.spec, {})
    for rows, merged_rows in ((block.keys, merged.keys), (block.values, merged.values)):
        assert merged_rows[:4].tobytes() == rows[:4].tobytes()


@pytest.mark.parametrize("name", DENSE_DTYPES)
def test_what_coding_pushed_beyond_the_largest_number_becomes_that_number(name: str) -> None:
    text = Text(model([ROPES[1]], name), n_tokens=6, first_position=8)
    found = planes.split(text.block(), text.spec, 1)
    largest = float(np.finfo(np.float32).max)
    beyond = replace(
        found,
        keys=tuple(np.full_like(p, largest) for p in found.keys),
        values=(np.full_like(found.values[0], -largest),),
    )
    merged = planes.merge(beyond, text.spec, {})
    limit = float(finfo(DTYPES[name]).max)
    assert (merged.values.astype(np.float64) == -limit).all()
    assert (np.abs(merged.keys.astype(np.float64)) <= limit).all()
    assert (merged.keys.astype(np.float64) == limit).any()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", DENSE_DTYPES)
def test_numbers_that_are_not_finite_have_no_planes(name: str, odd: float) -> None:
    text = Text(model(ROPES, name), n_tokens=6, first_position=0)
    for which in ("keys", "values"):
        block = text.block()
        getattr(block, which)[5] = odd
        with pytest.raises(ValueError, match="not finite"):
            planes.split(block, text.spec, 2)


def test_keys_so_large_that_their_rotation_overflows_have_no_planes() -> None:
    text = Text(model([ROPES[1]], "float32"), n_tokens=6, first_position=8)
    block = text.block()
    block.keys[:] = np.finfo(np.float32).max
    with pytest.raises(ValueError, match="not finite"):
        planes.split(block, text.spec, 1)


def test_a_compacted_block_has_no_planes_yet() -> None:
    text = Text(model(ROPES), n_tokens=6, first_position=8)
    block = text.block()
    positions = block.positions.copy()
    positions[0] += 1
    for compacted in (replace(block, positions=positions), replace(block, bias=block.bias + np.float32(1))):
        with pytest.raises(ValueError, match="compacted"):
            planes.split(compacted, text.spec, 1)


def test_a_block_without_dense_layers_has_no_planes() -> None:
    text = Text(model(ROPES), n_tokens=6, first_position=8)
    with pytest.raises(ValueError, match="opaque"):
        planes.split(KVBlock.dense({"state": np.zeros(3, np.int8)}, 6, 8), text.spec, 1)


@pytest.mark.parametrize("layers_per_group", [0, -1])
def test_a_group_has_at_least_one_layer(layers_per_group: int) -> None:
    text = Text(model(ROPES), n_tokens=6, first_position=8)
    with pytest.raises(ValueError, match="layers_per_group"):
        planes.split(text.block(), text.spec, layers_per_group)


OTHERS = {
    "layers": model(ROPES[:3]),
    "heads": model(ROPES, n_heads=1),
    "value_dim": model(ROPES, value_dim=8),
    "dtype": model(ROPES, "bfloat16"),
    "no dense layers": ModelSpec(Fingerprint(weights="w"), "opaque", 16, (STATE,)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_block_of_another_model_is_refused_both_ways(other: str) -> None:
    text = Text(model(ROPES), n_tokens=6, first_position=2)
    block = text.block()
    with pytest.raises(ValueError, match="expected the model's"):
        planes.split(block, OTHERS[other], 2)
    with pytest.raises(ValueError, match="expected the model's"):
        planes.merge(planes.split(block, text.spec, 2), OTHERS[other], {})


def test_planes_that_are_not_those_of_the_model_are_refused() -> None:
    text = Text(model(ROPES), n_tokens=6, first_position=2)
    found = planes.split(text.block(), text.spec, 2)
    for wrong in (
        replace(found, keys=found.keys[:1]),
        replace(found, keys=(), values=()),
        replace(found, values=()),
        replace(found, values=(*found.values[:1], found.values[1][:, 1:])),
        replace(found, first_position=1),
        replace(found, first_position=9),
    ):
        with pytest.raises(ValueError, match=r"expected planes|reshape|sinks"):
            planes.merge(wrong, text.spec, {})


def test_rotary_positions_that_cannot_be_undone_are_an_error_not_a_guess() -> None:
    text = Text(model([*ROPES, RopeSpec(8, 1e4, scaling_json='{"type":"dynamic","factor":2.0}')]), 6, 8)
    with pytest.raises(UnsupportedRopeError, match="dynamic"):
        planes.split(text.block(), text.spec, 2)
