"""What stands on rows that were restored at a loss is known, wherever a cache was cut and went on."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_client import ROOT, Block, Fidelity, FidelityKind, chain_hashes
from kvcached_mlx.lineage import Lineage

SIZE = 16
EXACT, CODED, COMPACTED = FidelityKind.EXACT, FidelityKind.CODED, FidelityKind.COMPACTED
TOKENS = list(range(100, 100 + 5 * SIZE))


def restored(tokens: list[int], kinds: list[FidelityKind], lineages: list[FidelityKind] | None = None) -> list[Block]:
    hashes = chain_hashes(tokens, SIZE)
    return [
        Block(h, parent, i, (), {}, i * SIZE, fidelity=Fidelity(kind), lineage=lineage)
        for i, (h, parent, kind, lineage) in enumerate(
            zip(hashes, [ROOT, *hashes], kinds, lineages or [EXACT] * len(kinds), strict=False)
        )
    ]


def of(lineage: Lineage, tokens: list[int]) -> list[FidelityKind]:
    return lineage.of(tokens, chain_hashes(tokens, SIZE))


def test_what_was_restored_exactly_stays_exact() -> None:
    lineage = Lineage(SIZE)
    lineage.restored(TOKENS, restored(TOKENS, [EXACT] * 3), 3 * SIZE)
    assert of(lineage, TOKENS) == [EXACT] * 5
    assert not any(map(lineage.was_given, chain_hashes(TOKENS, SIZE)))


def test_blocks_after_a_lossy_one_and_those_that_hold_recomputed_rows_share_its_fidelity() -> None:
    lineage = Lineage(SIZE)
    lineage.restored(TOKENS, restored(TOKENS, [EXACT, EXACT, CODED, CODED]), 3 * SIZE + 5)
    assert of(lineage, TOKENS) == [EXACT, EXACT, CODED, CODED, CODED]
    assert [lineage.was_given(h) for h in chain_hashes(TOKENS, SIZE)] == [False, False, True, False, False]


def test_a_lineage_counts_as_a_fidelity_does_and_the_lowest_one_wins() -> None:
    lineage = Lineage(SIZE)
    lineage.restored(TOKENS, restored(TOKENS, [EXACT, CODED, EXACT], [EXACT, EXACT, COMPACTED]), 3 * SIZE)
    assert of(lineage, TOKENS) == [EXACT, CODED, COMPACTED, COMPACTED, COMPACTED]


@given(st.integers(1, 5 * SIZE - 1), st.integers(0, 3), st.integers(0, 3 * SIZE))
def test_a_cache_that_is_cut_anywhere_and_goes_on_otherwise_is_exact_where_its_rows_are(
    n_common: int, n_exact: int, n_more: int
) -> None:
    """Rows of the first n_exact blocks and at positions 0 to 3 are exact; of the rest nothing is."""
    lineage = Lineage(SIZE)
    kinds = [EXACT] * n_exact + [CODED] * (5 - n_exact)
    lineage.restored(TOKENS, restored(TOKENS, kinds), 5 * SIZE)
    other = TOKENS[:n_common] + list(range(1000, 1000 + n_more + SIZE))
    first_lossy = max(n_exact * SIZE, 4)
    for i, kind in enumerate(of(lineage, other)):
        holds_lossy_rows = first_lossy < min(n_common, (i + 1) * SIZE)
        assert kind == (CODED if holds_lossy_rows else EXACT)


def test_another_prompt_is_none_of_its_business() -> None:
    lineage = Lineage(SIZE)
    lineage.restored(TOKENS, restored(TOKENS, [CODED] * 5), 5 * SIZE)
    other = TOKENS[:4] + [t + 1 for t in TOKENS[4:]]
    assert of(lineage, other) == [EXACT] * 5


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_blocks_shorter_than_the_sinks_are_lossy_too(size: int) -> None:
    lineage = Lineage(size)
    hashes = chain_hashes(TOKENS[:20], size)
    blocks = [
        Block(own, parent, i, (), {}, i * size, fidelity=Fidelity(CODED))
        for i, (parent, own) in enumerate(itertools.pairwise([ROOT, *hashes]))
    ]
    lineage.restored(TOKENS, blocks, 20)
    assert lineage.of(TOKENS[:20], hashes) == [CODED] * len(hashes)


def test_the_oldest_blocks_are_forgotten() -> None:
    lineage = Lineage(SIZE, max_blocks=3)
    lineage.restored(TOKENS, restored(TOKENS, [CODED] * 5), 5 * SIZE)
    assert [lineage.was_given(h) for h in chain_hashes(TOKENS, SIZE)] == [False, False, True, True, True]
