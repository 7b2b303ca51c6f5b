"""How much may be lost, and what follows from it: what of a held prefix is used, and what is put again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvcached_client import Block, FidelityKind, Match, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import check_am_ratio

AFTER_COMPACTION = "compacted-"  # what the names of such profiles begin with


@dataclass(frozen=True, slots=True)
class Policy:
    """What an engine accepts and asks for.

    floor: the lowest fidelity that is restored. recompute: of a prompt whose prefix is restored at a loss, so many
    tokens at its end are left to compute. store_as: "exact", a profile, or a profile after compaction ("compacted-x8");
    empty: as the daemon's settings say. am_ratio: of the last, tokens before over tokens after; 0: as the daemon's
    settings say. min_tokens: shorter prefixes are not restored.

    Raises ValueError for an am_ratio that is none.
    """

    floor: FidelityKind = FidelityKind.CODED
    recompute: int = 128
    store_as: str = ""
    am_ratio: float = 0.0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.am_ratio:
            check_am_ratio(self.am_ratio)

    @property
    def accepts_compacted(self) -> bool:
        return self.floor == FidelityKind.COMPACTED

    @property
    def compacts(self) -> bool:
        return self.store_as.startswith(AFTER_COMPACTION)

    @property
    def least_stored(self) -> FidelityKind:
        """Below it the daemon must not store what is put, whatever its settings: it could not be restored."""
        return FidelityKind.COMPACTED if self.accepts_compacted or self.compacts else FidelityKind.CODED

    def without_compaction(self) -> "Policy":
        """The same for an engine that cannot go on from compacted blocks: profiles alone."""
        floor = max(self.floor, FidelityKind.CODED)
        return replace(self, floor=floor, store_as=self.store_as.removeprefix(AFTER_COMPACTION), am_ratio=0.0)

    def usable(self, held: Sequence["Held"], n_prompt: int, spec: ModelSpec, can_cut: bool) -> tuple[int, int]:
        """How many blocks of a held prefix to make a cache of, and how many of their tokens to keep.

        n_prompt: tokens of the whole prompt. can_cut: whether a cache can be cut within a block, of those that are not
        compacted.
        """
        size = spec.block_size
        n_exact = next((i for i, block in enumerate(held) if block.worth < FidelityKind.EXACT), len(held))
        n_exact = _with_state(held[:n_exact], spec)
        n_tokens = max(min(len(held) * size, n_prompt - self.recompute), 0)
        if not can_cut or any(block.compacted for block in held[: -(-n_tokens // size)]):
            n_tokens = _with_state(held[: n_tokens // size], spec) * size
        if n_exact * size >= n_tokens:
            return n_exact, n_exact * size
        return -(-n_tokens // size), n_tokens

    def held(self, match: Match, lineages: Sequence[FidelityKind]) -> set[bytes]:
        """The blocks of a match that are no worse than what would be put; lineages: of that, block by block."""
        least = self.least_stored
        if self.store_as == "exact":
            least = FidelityKind.EXACT
        elif self.store_as and not self.compacts:
            least = FidelityKind.CODED
        return {
            block_hash
            for block_hash, block, lineage in zip(match.hashes, match.blocks, lineages, strict=False)
            if _kind(block.lineage) >= lineage and _kind(block.fidelity.kind) >= least
        }


class Held(NamedTuple):
    """What counts of a block that is held: its worth, whether it has the state of all layers, and lacks tokens."""

    worth: int
    boundary: bool
    compacted: bool = False


def held_of(block: pb.HeldBlock | Block) -> Held:
    """Of a block that was matched or fetched."""
    kind = _kind(block.fidelity.kind)
    return Held(min(kind, _kind(block.lineage)), block.boundary, kind == FidelityKind.COMPACTED)


def _with_state(held: Sequence[Held], spec: ModelSpec) -> int:
    """How many leading blocks a cache can be made of: all, or up to the last one with the state of all layers."""
    if not spec.needs_boundary:
        return len(held)
    return max((i + 1 for i, block in enumerate(held) if block.boundary), default=0)


def _kind(value: int) -> int:
    """A number from the wire, one of a later version included: unspecified means EXACT."""
    return value or FidelityKind.EXACT
