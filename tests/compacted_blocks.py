"""Blocks as a daemon gives them back compacted, made here without one. Nothing here asserts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvcached.block import KVBlock
from kvcached.codec.compaction import compact
from kvcached_client import Block, Client, Fidelity, FidelityKind, Match, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb


def compacted(spec: ModelSpec, block: Block, ratio: float = 4.0, queries: np.ndarray | None = None) -> Block:
    """A dense block with about 1 / ratio of its tokens, unequally many in each head.

    queries: float32 [n_dense_layers, n_query_heads, n, key_dim]; random ones if there are none.
    """
    rng = np.random.default_rng(block.index)
    n_layers, n_kv_heads, size, key_dim = spec.dense_shapes()["keys"]
    share = np.exp(rng.uniform(-0.8, 0.8, (n_layers, n_kv_heads)))
    budgets = np.clip(np.rint(share / share.mean() * size / ratio), 5, size).astype(np.int32)
    if queries is None:
        queries = rng.standard_normal((n_layers, spec.dense_layers[0].n_query_heads, 32, key_dim), np.float32)
    small = compact(KVBlock.dense(block.tensors, size, block.first_position), spec, budgets, queries)
    return replace(block, tensors=small.to_tensors(), fidelity=Fidelity(FidelityKind.COMPACTED, "x8", ratio))


def n_rows(blocks: list[Block]) -> int:
    """Rows of all layers and heads that some blocks hold, dense or compacted."""
    return sum(int(np.prod(block.tensors["keys"].shape[:-1])) for block in blocks)


class Compacting(Client):
    """A client to which a daemon's exact blocks come as if that had compacted some: to whoever accepts them."""

    which: Callable[[int], bool] = staticmethod(lambda _index: True)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[tuple[str, bool]] = []
        self.wished: list[tuple[str, float]] = []
        self.n_queries: list[int] = []

    def match(self, hashes: Sequence[bytes], *, accepts_compacted: bool = False, **kwargs: Any) -> Match:
        if not kwargs.get("before_put"):
            self.asked.append(("match", accepts_compacted))
        found = super().match(hashes, accepts_compacted=accepts_compacted, **kwargs)
        for index, block in enumerate(found.blocks if accepts_compacted else ()):
            if self.which(index):
                block.fidelity.kind = pb.FIDELITY_KIND_COMPACTED
        return found

    def get(self, hashes: Sequence[bytes], *, accepts_compacted: bool = False, **kwargs: Any) -> Iterator[Block | None]:
        self.asked.append(("get", accepts_compacted))
        for block in super().get(hashes, accepts_compacted=accepts_compacted, **kwargs):
            small = block and accepts_compacted and self.which(block.index)
            yield compacted(self.spec, block) if block and small else block

    def put(
        self, blocks: Sequence[Block], *, store_as: str = "", am_ratio: float = 0.0, **kwargs: Any
    ) -> list[pb.PutResult]:
        self.wished.append((store_as, am_ratio))
        tensors = [dict(block.tensors) for block in blocks]
        self.n_queries += [of_block.pop("queries").shape[2] if "queries" in of_block else 0 for of_block in tensors]
        return super().put([replace(b, tensors=t) for b, t in zip(blocks, tensors, strict=True)], **kwargs)
