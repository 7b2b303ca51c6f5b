"""What a fidelity makes of a prompt's cache, as engines would have it: one PromptStore offloads, another one restores.

Two of them, for a store does not put back what it was given at a loss. What the daemon answers is written down, so that
nothing falls back in silence.
"""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache

from kvcached_client import Block, Client, DaemonError, Fidelity, FidelityKind, Limits
from kvcached_client._proto import kvcached_pb2 as pb

from .policy import Held
from .road import Engine, Wish, name_of
from .store import PromptStore

_NAMESPACE = "kvcached/eval"
_LIMITS = Limits(match_seconds=30.0, put_seconds=600.0, get_seconds=600.0)  # nobody waits for an answer
RECOMPUTE = 128  # tokens at the end of a prompt whose prefix is not exact, as in `Policy`


@dataclass(slots=True)
class Tally:
    """What came of prompts that went through the daemon.

    n_asked: blocks that would be restored if all came at the fidelity asked for; n_as_asked: that were, and came so.
    came_as: blocks restored, by what they are. active_bytes: of restored caches in the engine, what is computed behind
    them not among it. stored_bytes: on disk, with records and page rounding, of all blocks put.
    """

    prompt_tokens: int = 0
    restored_tokens: int = 0
    n_asked: int = 0
    n_as_asked: int = 0
    came_as: Counter[str] = field(default_factory=Counter)
    source_bytes: int = 0
    stored_bytes: int = 0
    active_bytes: float = 0.0

    @property
    def compression(self) -> float | None:
        """None if nothing was stored."""
        return self.source_bytes / self.stored_bytes if self.stored_bytes else None

    @property
    def active_bytes_per_token(self) -> float | None:
        """Of restored tokens; None if there are none."""
        return self.active_bytes / self.restored_tokens if self.restored_tokens else None


class Passage:
    """A fidelity of a model, in a namespace that nobody else uses. tally: of all prompts since it was last set.

    Raises:
        ValueError: the model cannot go on from compacted blocks, which are wished for.
    """

    def __init__(self, engine: Engine, wish: Wish, target: str | None) -> None:
        if wish.compacts:
            engine.check_compaction()
        self.wish, self.tally = wish, Tally()
        self._engine, self._policy = engine, wish.policy(RECOMPUTE)
        self._can_cut = can_trim_prompt_cache(engine.make_cache()) and not engine.spec.needs_boundary
        namespace = f"{_NAMESPACE}/{uuid.uuid4().hex}"
        self._client = _Witness(engine.spec, namespace=namespace, target=target, limits=_LIMITS)
        self._out, self._back = (
            PromptStore(engine.model, self._client, make_cache=engine.make_cache, policy=self._policy, name="eval")
            for _ in range(2)
        )

    def through(self, token_ids: Sequence[int], cache: list[Any]) -> list[Any]:
        """A cache of these tokens: what the daemon gives back of them, and the rest computed behind it.

        cache: that holds exactly these; it may be the one that is returned, where there is no full block.

        Raises:
            DaemonError: the daemon did not take the blocks.
        """
        hashes = self._client.chain(token_ids)
        self.tally.prompt_tokens += len(token_ids)
        if not hashes:
            return cache
        self._client.results, self._client.came = [], []
        try:
            self._offload(token_ids, cache)
            restored, n_tokens = self._back.restore([*token_ids, token_ids[-1]])  # as if a question came behind
        finally:
            self._client.delete(hashes)
        self._count(len(token_ids), len(hashes), n_tokens, restored)
        for _ in self._engine.prefill(token_ids[n_tokens:], restored):
            pass
        return restored

    def close(self) -> None:
        self._out.close()
        self._back.close()
        self._client.close()

    def __enter__(self) -> "Passage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _offload(self, token_ids: Sequence[int], cache: list[Any]) -> None:
        self._out.offload(token_ids, cache)
        if not self._out.flush(_LIMITS.put_seconds):
            raise DaemonError("DEADLINE_EXCEEDED", f"blocks stored as {self.wish.name} were not answered for")
        for result in self._client.results:
            if result.code != "OK":
                raise DaemonError(result.code, f"a block was not stored as {self.wish.name}: {result.message}")

    def _count(self, n_prompt: int, n_blocks: int, n_tokens: int, restored: Sequence[Any]) -> None:
        size = self._engine.spec.block_size
        compacted = self.wish.kind == FidelityKind.COMPACTED
        held = [Held(self.wish.kind, boundary=True, compacted=compacted)] * n_blocks
        used = self._client.came[: -(-n_tokens // size)]
        self.tally.n_asked += self._policy.usable(held, n_prompt + 1, self._engine.spec, self._can_cut)[0]
        self.tally.n_as_asked += sum(map(self.wish.is_met_by, used))
        self.tally.came_as.update(map(name_of, used))
        self.tally.restored_tokens += n_tokens
        self.tally.source_bytes += sum(result.source_bytes for result in self._client.results)
        self.tally.stored_bytes += sum(result.stored_bytes for result in self._client.results)
        if used:  # less what was cut off the last block
            n_bytes = sum(entry.nbytes for entry in restored)
            self.tally.active_bytes += n_bytes * n_tokens / (len(used) * size)


class _Witness(Client):
    """A client that remembers what the daemon answered. results: of puts; came: fidelities of blocks that it got."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.results: list[pb.PutResult] = []
        self.came: list[Fidelity] = []

    def put(self, blocks: Sequence[Block], **kwargs: Any) -> list[pb.PutResult]:
        results = super().put(blocks, **kwargs)
        self.results += results
        return results

    def get_longest_prefix(self, hashes: Sequence[bytes], **kwargs: Any) -> Iterator[Block]:
        for block in super().get_longest_prefix(hashes, **kwargs):
            self.came.append(block.fidelity)
            yield block
