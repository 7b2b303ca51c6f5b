"""A daemon that holds decoded blocks in memory, for perf_roads.py: a get costs it a copy, and then the road alone.

Everything else is the daemon that is shipped: checks, queues, slots, streams.
"""

import numpy as np

from kvcached.block import Allocate, BlockId, Fidelity, KVBlock, fresh
from kvcached.cache import Cache
from kvcached.daemon import main
from kvcached_client._proto import kvcached_pb2 as pb

_decoded: dict[BlockId, KVBlock] = {}


def copied(cache: Cache, block_id: BlockId, allocate: Allocate = fresh) -> tuple[pb.Entry, KVBlock] | None:
    """In place of Cache._decode: the tensors of a block, copied to where they are to lie."""
    entry = cache.store.entry(block_id)
    if entry is None:
        return None
    if block_id not in _decoded:
        stored = cache.store.frame(block_id)
        assert stored
        pipeline = cache._pipeline(cache.model(block_id.model_id))
        fidelity = Fidelity.from_proto(entry.fidelity)
        _decoded[block_id] = pipeline.decode(block_id, stored[1], entry.source_bytes, fidelity)
    tensors = _decoded[block_id].to_tensors()
    places = {name: allocate(name, array.shape, array.dtype) for name, array in tensors.items()}
    for name, array in tensors.items():
        np.copyto(places[name], array)
    return entry, KVBlock.dense(places, entry.n_tokens, entry.first_position)


if __name__ == "__main__":
    Cache._decode = copied  # type: ignore[method-assign]
    main()
