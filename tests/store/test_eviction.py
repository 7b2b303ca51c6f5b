"""The rule of eviction, as properties."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvcached.eviction import Candidate, choose


@st.composite
def forests(draw: st.DrawFn) -> list[Candidate]:
    """Candidates with random parents, sizes and pins, in a random order of recency."""
    n = draw(st.integers(0, 12))
    parents = [draw(st.integers(-1, i - 1)) for i in range(n)]
    candidates = [
        Candidate(
            key=bytes([i]),
            parent_key=b"" if parents[i] < 0 else bytes([parents[i]]),
            n_bytes=draw(st.integers(1, 9)),
            n_children=parents.count(i),
            pinned=draw(st.booleans()) and draw(st.booleans()),
        )
        for i in range(n)
    ]
    return draw(st.permutations(candidates))


def ancestors(candidate: Candidate, forest: list[Candidate]) -> list[Candidate]:
    by_key = {c.key: c for c in forest}
    found, key = [], candidate.parent_key
    while key:
        found.append(by_key[key])
        key = by_key[key].parent_key
    return found


@given(forests(), st.integers(0, 60))
def test_no_block_leaves_before_its_descendants(forest: list[Candidate], n_bytes: int) -> None:
    victims = [v.key for v in choose(forest, n_bytes)]
    for candidate in forest:
        if candidate.parent_key in victims:
            assert candidate.key in victims
            assert victims.index(candidate.key) < victims.index(candidate.parent_key)


@given(forests(), st.integers(0, 60))
def test_a_pinned_block_and_its_ancestors_stay(forest: list[Candidate], n_bytes: int) -> None:
    victims = {v.key for v in choose(forest, n_bytes)}
    for candidate in forest:
        if candidate.pinned:
            assert not victims & {c.key for c in [candidate, *ancestors(candidate, forest)]}


@given(forests(), st.integers(0, 60))
def test_enough_is_freed_unless_everything_that_may_leave_has_left(forest: list[Candidate], n_bytes: int) -> None:
    victims = choose(forest, n_bytes)
    held_back = {c.key for p in forest if p.pinned for c in [p, *ancestors(p, forest)]}
    if sum(v.n_bytes for v in victims) < n_bytes:
        assert {v.key for v in victims} == {c.key for c in forest} - held_back


@given(forests(), st.integers(1, 60))
def test_nothing_leaves_needlessly(forest: list[Candidate], n_bytes: int) -> None:
    victims = choose(forest, n_bytes)
    assert sum(v.n_bytes for v in victims[:-1]) < n_bytes


@given(forests())
def test_protected_blocks_stay(forest: list[Candidate]) -> None:
    unpinned = [replace(c, pinned=False) for c in forest]
    for candidate in unpinned:
        left = {c.key for c in unpinned} - {v.key for v in choose(unpinned, 10**6, {candidate.key})}
        assert left == {c.key for c in [candidate, *ancestors(candidate, unpinned)]}


def test_among_leaves_the_least_recently_used_goes_first() -> None:
    old, new = (Candidate(key, b"", 5, 0, False) for key in (b"a", b"b"))
    assert choose([old, new], 1) == [old]


def test_a_parent_older_than_its_child_goes_right_after_it() -> None:
    parent = Candidate(b"p", b"", 5, 1, False)
    child = Candidate(b"c", b"p", 5, 0, False)
    other = Candidate(b"o", b"", 5, 0, False)
    assert choose([parent, child, other], 10) == [child, parent]
