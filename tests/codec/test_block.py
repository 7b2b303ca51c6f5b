"""Blocks as packed rows: the same as named tensors while they are dense, and known for what they are when not."""

from dataclasses import replace

import numpy as np
import pytest
from codec.frames import DENSE_DTYPES, Wire, arrays, filled, wires
from hypothesis import given
from support import dense_tensors, same_tensors, tiny_spec

from kvcached import codec
from kvcached.block import BlockId, KVBlock
from kvcached_client.tensors import DTYPES


def small_block(first_position: int = 8) -> KVBlock:
    """2 layers, 2 heads, 4 tokens, 8 dims."""
    return KVBlock.dense(dense_tensors(tiny_spec(), seed=0), 4, first_position)


@given(wires())
def test_to_tensors_is_the_inverse_of_dense(wire: Wire) -> None:
    block = wire.block()
    assert block.is_dense
    assert same_tensors(block.to_tensors(), dict(wire.tensors))
    assert (block.n_source_tokens, block.first_position) == (wire.n_tokens, wire.first_position)


@given(wires())
def test_nbytes_counts_every_tensor_and_nothing_else(wire: Wire) -> None:
    assert wire.block().nbytes == sum(array.nbytes for array in wire.tensors.values())


@pytest.mark.parametrize("name", DENSE_DTYPES)
def test_rows_are_ordered_by_layer_then_head_then_token(name: str) -> None:
    keys = filled(DTYPES[name], (3, 2, 4, 5), seed=1)
    values = filled(DTYPES[name], (3, 2, 4, 7), seed=2)
    block = KVBlock.dense({"keys": keys, "values": values}, n_tokens=4, first_position=100)
    assert block.keys.shape == (24, 5)
    assert block.values.shape == (24, 7)
    for layer, head, token in np.ndindex(3, 2, 4):
        row = (layer * 2 + head) * 4 + token
        assert block.keys[row].tobytes() == keys[layer, head, token].tobytes()
        assert block.values[row].tobytes() == values[layer, head, token].tobytes()
        assert block.positions[row] == 100 + token
    assert block.lengths.tolist() == [[4, 4]] * 3


def test_contiguous_tensors_are_not_copied() -> None:
    tensors = dense_tensors(tiny_spec(), seed=0)
    block = KVBlock.dense(tensors, 4, 0)
    assert np.shares_memory(block.keys, tensors["keys"])
    assert np.shares_memory(block.to_tensors()["values"], tensors["values"])


def test_tensors_that_are_not_contiguous_keep_their_order() -> None:
    keys = filled(DTYPES["float16"], (5, 4, 2, 3), seed=3).T
    block = KVBlock.dense({"keys": keys, "values": keys[..., ::-1]}, n_tokens=4, first_position=0)
    assert same_tensors(block.to_tensors(), {"keys": keys, "values": keys[..., ::-1]})


def test_a_block_without_dense_layers_holds_its_opaque_tensors_alone() -> None:
    state = filled(DTYPES["int8"], (2, 3), seed=4)
    block = KVBlock.dense({"state": state}, n_tokens=4, first_position=12)
    assert block.is_dense
    assert block.keys.size == block.values.size == block.positions.size == block.lengths.size == 0
    assert same_tensors(block.to_tensors(), {"state": state})
    assert block.nbytes == 6


def test_a_block_without_dense_layers_takes_no_memory_for_its_tokens() -> None:
    assert KVBlock.dense({}, n_tokens=4096, first_position=0).positions.nbytes == 0


def test_a_block_ends_at_the_last_position_that_int32_can_name() -> None:
    block = small_block(first_position=2**31 - 4)
    assert block.is_dense
    assert block.positions.max() == 2**31 - 1
    assert block.positions.min() == 2**31 - 4


def test_a_block_with_a_bias_is_not_dense() -> None:
    block = small_block()
    for value in (1.0, -1e-30, np.nan):
        bias = block.bias.copy()
        bias[-1] = value
        assert not replace(block, bias=bias).is_dense


def test_a_block_with_a_moved_position_is_not_dense() -> None:
    block = small_block()
    for row in (0, 7, 15):
        positions = block.positions.copy()
        positions[row] += 1
        assert not replace(block, positions=positions).is_dense
    assert not replace(block, first_position=9).is_dense


def test_a_block_whose_tokens_changed_places_is_not_dense() -> None:
    block = small_block()
    positions = block.positions.copy()
    positions[:2] = positions[1::-1]
    assert not replace(block, positions=positions).is_dense


def shortened() -> KVBlock:
    """The last head of the last layer has lost its last token."""
    block = small_block()
    lengths = block.lengths.copy()
    lengths[-1, -1] = 3
    return replace(
        block,
        keys=block.keys[:-1],
        values=block.values[:-1],
        positions=block.positions[:-1],
        bias=block.bias[:-1],
        lengths=lengths,
    )


def test_a_block_with_a_shorter_head_is_not_dense() -> None:
    block = shortened()
    assert not block.is_dense
    assert block.nbytes == 2 * 15 * 8 * 2


def test_a_block_whose_heads_share_their_rows_otherwise_is_not_dense() -> None:
    assert not replace(small_block(), lengths=np.array([[3, 5], [4, 4]], np.int32)).is_dense


def test_a_block_that_stands_for_more_tokens_than_it_has_rows_is_not_dense() -> None:
    assert not replace(small_block(), n_source_tokens=5).is_dense


def test_a_block_that_is_not_dense_has_its_rows_as_tensors() -> None:
    block = shortened()
    found = block.to_tensors()
    assert list(found) == ["keys", "values", "lengths", "positions", "bias"]
    assert all(found[name] is getattr(block, name) for name in found)


def test_a_block_that_is_not_dense_has_no_exact_frame() -> None:
    with pytest.raises(ValueError, match="compacted"):
        codec.encode(BlockId(bytes(32), "", bytes(32)), shortened())


@given(arrays())
def test_opaque_tensors_are_handed_through_untouched(array: np.ndarray) -> None:
    tensors = {**dense_tensors(tiny_spec(), seed=5), "state/0": array}
    block = KVBlock.dense(tensors, 4, 0)
    assert block.to_tensors()["state/0"] is array
    assert block.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_block_id_is_written_short() -> None:
    assert str(BlockId(bytes(32), "who", b"\xab" * 32)) == f"{'ab' * 8} of model {'00' * 8}"
