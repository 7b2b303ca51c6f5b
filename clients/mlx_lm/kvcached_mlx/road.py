"""The road that losses are measured by: blocks of a prefix into a running daemon at some fidelity, and back to a cache.

What PromptStore does for an engine, without its silence and with a bundle that need not be the current one: where
PromptStore falls back to computing, this raises.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm

from kvcached_client import Block, Client, Connection, DaemonError, Fidelity, FidelityKind, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb

from . import attention, blocks, queries
from .compacted import cut
from .fingerprint import fresh_cache, model_directory, model_spec
from .policy import AFTER_COMPACTION, Policy
from .tree import UnsupportedCacheError

EXACT = "exact"
_SAME_RATIO = 1e-3  # ratios travel in single precision
_CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A loaded model with all that it takes to run it on text."""

    model: Any
    tokenizer: Any
    spec: ModelSpec
    make_cache: Callable[[], list[Any]]

    def prefill(self, token_ids: Sequence[int], cache: list[Any]) -> Iterator[Any]:
        """Logits [n, vocabulary] of each chunk of a block's size, not evaluated."""
        for start in range(0, len(token_ids), self.spec.block_size):
            logits = self.model(mx.array([list(token_ids[start : start + self.spec.block_size])]), cache=cache)
            mx.eval([entry.state for entry in cache])
            yield logits[0]

    def check_compaction(self) -> None:
        """Lets the model go on from compacted blocks, and sample queries for them from now on.

        Raises ValueError for a model that cannot.
        """
        if reason := attention.supports(self.model, self.spec, self.make_cache):
            raise ValueError(f"{self.spec.name} cannot go on from compacted blocks: {reason}")
        attention.install(self.model, sampling=True)


def load(model: str) -> Engine:
    """A model of mlx-lm, loaded."""
    loaded, tokenizer, *_ = mlx_lm.load(model)
    return Engine(loaded, tokenizer, model_spec(loaded, model_directory(model)), lambda: fresh_cache(loaded))


def bundle_of(connection: Connection, model_id: bytes) -> pb.BundleStatus | None:
    """The bundle that new blocks of a model are coded with; None if there is none. Raises DaemonError."""
    bundles = connection.call("ListBundles", pb.ListBundlesRequest(), _CALL_SECONDS).bundles
    return next((bundle for bundle in bundles if bundle.model_id == model_id and bundle.current), None)


@dataclass(frozen=True, slots=True)
class Wish:
    """How blocks are to be stored, and must come back: "exact", a profile, or "compacted-" with one.

    am_ratio: of a compacted one, tokens before over tokens after; 0: as the daemon's settings say; 1: none is dropped.
    """

    name: str
    am_ratio: float = 0.0

    @property
    def kind(self) -> FidelityKind:
        if self.name == EXACT:
            return FidelityKind.EXACT
        return FidelityKind.COMPACTED if self.compacts and self.am_ratio != 1 else FidelityKind.CODED

    @property
    def compacts(self) -> bool:
        return self.name.startswith(AFTER_COMPACTION)

    @property
    def profile(self) -> str:
        """Empty for an exact one."""
        return "" if self.name == EXACT else self.name.removeprefix(AFTER_COMPACTION)

    def policy(self, recompute: int) -> Policy:
        floor = FidelityKind.COMPACTED if self.compacts else self.kind
        am_ratio = self.am_ratio if self.compacts else 0.0
        return Policy(floor=floor, recompute=recompute, store_as=self.name, am_ratio=am_ratio)

    def is_met_by(self, found: Fidelity) -> bool:
        """Whether that is the fidelity of a block that came back, no better and no worse."""
        if (found.kind, found.profile) != (self.kind, self.profile):
            return False
        any_ratio = self.kind != FidelityKind.COMPACTED or not self.am_ratio
        return any_ratio or abs(found.am_ratio - self.am_ratio) < _SAME_RATIO


def name_of(found: Fidelity) -> str:
    """As settings have it."""
    if found.kind == FidelityKind.EXACT:
        return EXACT
    return f"{AFTER_COMPACTION}{found.profile}" if found.kind == FidelityKind.COMPACTED else found.profile


@dataclass(frozen=True, slots=True, eq=False)
class Trip:
    """The blocks of one prefix as they came back, and what the daemon answered when they were put."""

    blocks: list[Block]
    results: list[pb.PutResult]

    @property
    def source_bytes(self) -> int:
        return sum(result.source_bytes for result in self.results)

    @property
    def stored_bytes(self) -> int:
        """On disk, with records and page rounding."""
        return sum(result.stored_bytes for result in self.results)


def prefix_blocks(engine: Engine, client: Client, token_ids: Sequence[int], cache: list[Any]) -> list[Block]:
    """Computes a prefix, and takes its full blocks, with reference queries where they were sampled.

    cache: an empty one, which then holds the prefix.
    """
    for _ in engine.prefill(token_ids, cache):
        pass
    taken = blocks.to_blocks(engine.spec, token_ids, client.chain(token_ids), cache)
    return queries.with_queries(engine.spec, cache, taken)


def through_daemon(client: Client, prefix: Sequence[Block], wish: Wish, bundle_id: bytes) -> Trip:
    """The blocks as a fidelity gives them back; they do not stay in the daemon.

    client: in a namespace that nobody else uses. bundle_id: that they are coded with.

    Raises:
        DaemonError: the daemon refused a block, did not give it back, or kept all of them at other fidelities.
    """
    hashes = [block.block_hash for block in prefix]
    client.delete(hashes)  # of somebody who was killed
    try:
        results = client.put(prefix, **_put_fields(wish, bundle_id))
        for result in results:
            if result.code != "OK":
                raise DaemonError(result.code, f"a block was not stored as {wish.name}: {result.message}")
        accepted: dict[str, Any] = {"accepts_compacted": True} if wish.compacts else {}
        floor = wish.policy(recompute=0).floor
        found = [block for block in client.get(hashes, floor=floor, **accepted) if block]
        if len(found) != len(hashes):
            came = f"of {len(hashes)} blocks stored as {wish.name}, {len(found)} came back"
            raise DaemonError("NOT_FOUND", came)
        _check(found, wish, bundle_id)
        return Trip(found, results)
    finally:
        client.delete(hashes)


def _put_fields(wish: Wish, bundle_id: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = {"store_as": wish.name}
    if wish.name != EXACT:
        fields["store_as_bundle"] = bundle_id
    if wish.compacts and wish.am_ratio:
        fields["am_ratio"] = wish.am_ratio
    return fields


def _check(found: Sequence[Block], wish: Wish, bundle_id: bytes) -> None:
    """A block that cannot be coded is stored exactly; if that became of all, nothing would be measured."""
    fits = [
        wish.is_met_by(block.fidelity) and (wish.name == EXACT or block.fidelity.bundle_id == bundle_id)
        for block in found
    ]
    if not any(fits):
        kinds = sorted({name_of(block.fidelity) for block in found})
        message = f"no block was stored as {wish.name}: {len(found)} came as {', '.join(kinds)}"
        raise DaemonError("FAILED_PRECONDITION", message)


def cache_of(engine: Engine, prefix: Sequence[Block], n_tokens: int) -> list[Any]:
    """A cache of the first tokens of some blocks; of compacted ones, whole blocks only.

    Raises:
        UnsupportedCacheError: they do not make a cache of this model.
    """
    cache, size = engine.make_cache(), engine.spec.block_size
    if n_blocks := -(-n_tokens // size):
        blocks.from_blocks(engine.spec, prefix[:n_blocks], cache)
        if not cut(cache, n_blocks * size - n_tokens):
            raise UnsupportedCacheError("the cache that they make cannot be cut")
    return cache
