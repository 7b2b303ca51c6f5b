"""Compaction under test is the daemon's own, and what it is held against is what it says."""

import numpy as np
import pytest
from bundles import low_rank_tensors
from compacted_under_test import Compacted, Kept, active_bytes, every_nth, matching, without_bias
from compacting import make_compacting
from compaction_quality import kl_over_alone, kl_ratio
from loss import Loss
from support import tiny_spec

from kvcached import codec
from kvcached.block import BlockId, KVBlock

SPEC = tiny_spec(block_size=64)
TENSORS = {side: array.astype(np.float16) for side, array in low_rank_tensors(SPEC, 1).items()}
BLOCK = KVBlock.dense(TENSORS, 64, 64)
COMPACTOR = make_compacting(SPEC).compactor("x8", 4.0)
WAY = matching(COMPACTOR)


def loss(kl: float, bits: float) -> Loss:
    """Of three documents that lose alike."""
    nothing = np.zeros((3, 1))
    kls = np.full((3, 4), kl) * [[0.5], [1.0], [1.5]]
    return Loss(kls, kls, kls, nothing, nothing, nothing, bits, 1, bits, 1)


def test_every_byte_of_a_compacted_frame_counts_and_what_is_dropped_is_hidden() -> None:
    coded = Compacted(COMPACTOR)(TENSORS["keys"], TENSORS["values"], 64)
    small = codec.compact(BLOCK, COMPACTOR).block
    assert coded.bits == 8 * len(codec.encode(BlockId(bytes(32), "", bytes(32)), small, coder=COMPACTOR))
    assert coded.bias is not None
    np.testing.assert_array_equal(np.isfinite(coded.bias).sum(axis=2), small.lengths)
    assert not coded.keys[~np.isfinite(coded.bias)].any()


def test_every_fourth_token_is_that_of_all_heads_as_it_is() -> None:
    small = every_nth(4)(BLOCK)
    assert (small.lengths == 16).all()
    np.testing.assert_array_equal(small.positions[:16], np.arange(64, 128, 4))
    np.testing.assert_array_equal(small.values[:16], TENSORS["values"][0, 0, ::4])
    assert not small.bias.any()


def test_equal_budgets_are_equal_and_unequal_ones_are_as_many_together() -> None:
    equal = matching(COMPACTOR, np.full_like(COMPACTOR.budgets, 16))(BLOCK)
    assert (equal.lengths == 16).all()
    assert len(np.unique(WAY(BLOCK).lengths)) > 1
    assert len(WAY(BLOCK).bias) == len(equal.bias)


def test_rows_without_their_bias_are_the_same_rows() -> None:
    bare, small = without_bias(WAY)(BLOCK), WAY(BLOCK)
    assert small.bias.any()
    assert not bare.bias.any()
    np.testing.assert_array_equal(bare.keys, small.keys)


def test_what_is_kept_is_counted_as_the_engine_holds_it() -> None:
    small = WAY(BLOCK)
    row = 2 * (TENSORS["keys"].shape[-1] + TENSORS["values"].shape[-1])
    assert active_bytes(BLOCK) == BLOCK.lengths.size * 64 * row
    assert active_bytes(small) == len(small.bias) * (row + 2)  # and a bias
    assert Kept(WAY)(TENSORS["keys"], TENSORS["values"], 64).bits == 8 * active_bytes(small)


def test_losses_are_compared_at_the_same_bytes() -> None:
    alone = [loss(0.01, 100), loss(0.001, 1000)]
    assert kl_over_alone(loss(0.02, 100), alone).value == pytest.approx(2)
    between = kl_over_alone(loss(0.01, 10**2.5), alone)  # there coding alone loses 10 ** -2.5
    assert between.value == pytest.approx(10**0.5)
    assert between.low == pytest.approx(between.high)
    with pytest.raises(ValueError, match="99 bits, the sweep goes from 100 to 1000"):
        kl_over_alone(loss(0.02, 99), alone)


def test_a_ratio_of_losses_is_that_of_their_means() -> None:
    found = kl_ratio(loss(0.03, 1), loss(0.01, 1))
    assert found == pytest.approx((3, 3, 3))
