"""What was restored at a loss, so that what is computed on top of it is never passed off as exact.

A cache may be cut, between blocks or within one, and go on in another way than it was restored for. So a block that was
restored at a loss is known by its beginning: the hash of its prefix and of its tokens up to the first one whose row is
not exact. Whatever begins so may hold that row, or stand on it. That errs on the safe side where the same tokens were
computed anew since.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvcached_client import ROOT, Block, FidelityKind, block_hash

_N_SINKS = 4  # rows at positions 0 to 3 are exact in every profile (docs/format.md)
_MAX_BLOCKS = 200_000  # that are remembered, at some 200 bytes each; the oldest are forgotten


class Lineage:
    """The blocks that one engine was given at a loss. For one thread."""

    def __init__(self, block_size: int, max_blocks: int = _MAX_BLOCKS) -> None:
        self._block_size, self._max_blocks = block_size, max_blocks
        self._beginnings: OrderedDict[bytes, FidelityKind] = OrderedDict()
        self._given: OrderedDict[bytes, FidelityKind] = OrderedDict()

    def restored(self, token_ids: Sequence[int], blocks: Sequence[Block], n_tokens: int) -> None:
        """Remembers what a cache was made of: consecutive blocks from the first one on, of which n_tokens were kept."""
        for i, block in enumerate(blocks):
            if (kind := min(block.fidelity.kind, block.lineage)) < FidelityKind.EXACT:
                self._remember(self._beginnings, self._beginning(token_ids, block.parent_hash, i), kind)
                if (i + 1) * self._block_size <= n_tokens:
                    self._remember(self._given, block.block_hash, kind)

    def was_given(self, block: bytes) -> bool:
        """Whether a block, by its hash, came whole from the daemon at a loss: it is not to be put back."""
        return block in self._given

    def of(self, token_ids: Sequence[int], hashes: Sequence[bytes]) -> list[FidelityKind]:
        """For each full block of a chain, the lowest fidelity that may be in it or in what it was computed on."""
        lowest, found = FidelityKind.EXACT, []
        for i, parent in enumerate([ROOT, *hashes[:-1]][: len(hashes)]):
            beginning = self._beginning(token_ids, parent, i)
            lowest = min(lowest, self._beginnings.get(beginning, FidelityKind.EXACT))
            found.append(lowest)
        return found

    def _beginning(self, token_ids: Sequence[int], parent: bytes, index: int) -> bytes:
        start = index * self._block_size
        stop = max(start, min(_N_SINKS, self._block_size - 1)) + 1
        return block_hash(parent, token_ids[start:stop])

    def _remember(self, among: "OrderedDict[bytes, FidelityKind]", key: bytes, kind: FidelityKind) -> None:
        among[key] = min(kind, among.pop(key, kind))
        if len(among) > self._max_blocks:
            among.popitem(last=False)
