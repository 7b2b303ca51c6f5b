"""The compaction that is timed is the daemon's own; how long it takes is for the bench to say."""

import compaction_cost
import pytest
from bundles import low_rank_tensors
from compacting import make_compacting
from support import tiny_spec

from kvcached.block import KVBlock


@pytest.mark.slow  # compacts a large block
def test_shares_and_speeds_are_of_blocks_that_were_compacted_to_a_quarter() -> None:
    spec = tiny_spec(block_size=64)
    blocks = [KVBlock.dense(low_rank_tensors(spec, seed), 64, 64) for seed in (1, 2)]
    found = compaction_cost.measure(make_compacting(spec), blocks)
    assert found["n_blocks"] == 2
    assert 0 < found["share_of_pool"] < 1
    assert min(found["compact_mb_s"], found["encode_mb_s"], found["over_coding_alone"]) > 0
    assert found["shape_7b"]["am_ratio"] == pytest.approx(4, rel=0.15)
    assert found["shape_7b"]["mb_s"] > 0
