"""How much may be lost, and what follows from it: what of a held prefix is used, and what is put again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvcached_client import Block, FidelityKind, Match, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb


@dataclass(frozen=True, slots=True)
class Policy:
    """What an engine accepts and asks for.

    floor: the lowest fidelity that is restored. recompute: of a prompt whose prefix is restored at a loss, so many
    tokens at its end are left to compute. store_as: "exact" or a profile; empty: as the daemon's settings say.
    min_tokens: shorter prefixes are not restored.
    """

    floor: FidelityKind = FidelityKind.CODED
    recompute: int = 128
    store_as: str = ""
    min_tokens: int = 0

    def usable(self, held: Sequence["Held"], n_prompt: int, spec: ModelSpec, can_cut: bool) -> tuple[int, int]:
        """How many blocks of a held prefix to make a cache of, and how many of their tokens to keep.

        n_prompt: tokens of the whole prompt. can_cut: whether a cache can be cut within a block.
        """
        size = spec.block_size
        n_exact = next((i for i, block in enumerate(held) if block.worth < FidelityKind.EXACT), len(held))
        n_exact = _with_state(held[:n_exact], spec)
        n_tokens = max(min(len(held) * size, n_prompt - self.recompute), 0)
        if not can_cut:
            n_tokens = _with_state(held[: n_tokens // size], spec) * size
        if n_exact * size >= n_tokens:
            return n_exact, n_exact * size
        return -(-n_tokens // size), n_tokens

    def held(self, match: Match, lineages: Sequence[FidelityKind]) -> set[bytes]:
        """The blocks of a match that are no worse than what would be put; lineages: of that, block by block."""
        least = FidelityKind.EXACT if self.store_as == "exact" else FidelityKind.COMPACTED
        return {
            block_hash
            for block_hash, block, lineage in zip(match.hashes, match.blocks, lineages, strict=False)
            if _kind(block.lineage) >= lineage and _kind(block.fidelity.kind) >= least
        }


class Held(NamedTuple):
    """What counts of a block that is held: what it is worth, and whether it has the state of all layers."""

    worth: int
    boundary: bool


def held_of(block: pb.HeldBlock | Block) -> Held:
    """Of a block that was matched or fetched."""
    return Held(min(_kind(block.fidelity.kind), _kind(block.lineage)), block.boundary)


def _with_state(held: Sequence[Held], spec: ModelSpec) -> int:
    """How many leading blocks a cache can be made of: all, or up to the last one with the state of all layers."""
    if not spec.needs_boundary:
        return len(held)
    return max((i + 1 for i, block in enumerate(held) if block.boundary), default=0)


def _kind(value: int) -> int:
    """A number from the wire, one of a later version included: unspecified means EXACT."""
    return value or FidelityKind.EXACT
