"""Who leaves when room is needed: least recently used first, leaves before parents. Pure; the store does it.

A block without its prefix is dead weight, so a block never leaves before its descendants. A pinned block stays, and so
do its ancestors. Candidates come in order of recency and are drawn only as far as needed.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the rule needs to know of a block. `key` and `parent_key` are the store's."""

    key: bytes
    parent_key: bytes
    n_bytes: int
    n_children: int
    pinned: bool


def choose(candidates: Iterable[Candidate], n_bytes: int, protected: Collection[bytes] = ()) -> list[Candidate]:
    """Victims that free `n_bytes` together, children before their parents; all that may leave if that is not enough.

    candidates: least recently used first. protected: keys that must stay now, such as the parent of what comes in.
    """
    victims: list[Candidate] = []
    freed = 0
    children_gone: Counter[bytes] = Counter()
    passed_over: dict[bytes, Candidate] = {}  # older than what comes now, but had children when their turn came
    for candidate in candidates:
        turn: Candidate | None = candidate
        while turn is not None and freed < n_bytes:
            if turn.pinned or turn.key in protected:
                break
            if children_gone[turn.key] < turn.n_children:
                passed_over[turn.key] = turn
                break
            victims.append(turn)
            freed += turn.n_bytes
            children_gone[turn.parent_key] += 1
            parent = passed_over.get(turn.parent_key)
            turn = parent if parent and children_gone[parent.key] == parent.n_children else None
        if freed >= n_bytes:
            break
    return victims
