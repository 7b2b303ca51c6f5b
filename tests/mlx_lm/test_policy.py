"""What of a held prefix is used, and what is put again."""

from dataclasses import replace

import pytest
from support import tiny_spec

from kvcached_client import FidelityKind, LayerKind, Match, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import Policy
from kvcached_mlx.policy import Held, held_of

EXACT, CODED, COMPACTED = FidelityKind.EXACT, FidelityKind.CODED, FidelityKind.COMPACTED
SPEC = tiny_spec(block_size=256)


def with_state(spec: ModelSpec) -> ModelSpec:
    state = replace(spec.layers[0], kind=LayerKind.STATE, opaque=True)
    return replace(spec, layers=(*spec.layers, state))


def usable(held: str, n_prompt: int, **kwargs: bool) -> tuple[int, int]:
    """e: exact, c: coded, a: compacted, b: exactly kept behind that; in capitals with the state of all layers."""
    worth = {"e": EXACT, "c": CODED, "a": COMPACTED, "b": COMPACTED}
    blocks = [Held(worth[letter.lower()], letter.isupper(), letter in "aA") for letter in held]
    spec = with_state(SPEC) if kwargs.get("has_state") else SPEC
    return Policy(recompute=128).usable(blocks, n_prompt, spec, can_cut=not kwargs.get("has_state"))


@pytest.mark.parametrize(
    ("held", "n_prompt", "expected"),
    [
        ("", 1000, (0, 0)),
        ("eeee", 1025, (4, 1024)),  # exact: one token is left
        ("cccc", 2000, (4, 1024)),  # far from the end
        ("cccc", 1025, (4, 897)),  # 128 are left
        ("cccc", 1152, (4, 1024)),
        ("cccc", 1030, (4, 902)),
        ("eeec", 1030, (4, 902)),
        ("eeec", 880, (3, 768)),  # no row of the last one would be left, or fewer than of the exact ones
        ("eeec", 1025, (4, 897)),
        ("ccce", 1025, (4, 897)),  # exact bytes on a lossy prefix
        ("c", 257, (1, 129)),
        ("c", 128, (0, 0)),
        ("c", 100, (0, 0)),
    ],
)
def test_at_the_end_of_a_prompt_on_a_lossy_prefix_tokens_are_left_to_compute(
    held: str, n_prompt: int, expected: tuple[int, int]
) -> None:
    assert usable(held, n_prompt) == expected


@pytest.mark.parametrize(
    ("held", "n_prompt", "expected"),
    [
        ("eeeE", 1025, (4, 1024)),
        ("eeEe", 1025, (3, 768)),
        ("ccCC", 1025, (3, 768)),  # whole blocks are left out, for state cannot be cut
        ("ccCC", 1152, (4, 1024)),
        ("cccC", 1025, (0, 0)),
        ("eEcC", 1025, (2, 512)),
        ("eEcC", 1152, (4, 1024)),
    ],
)
def test_a_model_with_state_goes_on_where_it_was_kept(held: str, n_prompt: int, expected: tuple[int, int]) -> None:
    assert usable(held, n_prompt, has_state=True) == expected


@pytest.mark.parametrize(
    ("held", "n_prompt", "expected"),
    [
        ("aaaa", 2000, (4, 1024)),
        ("aaaa", 1152, (4, 1024)),
        ("aaaa", 1151, (3, 768)),  # a compacted block is used whole or not at all
        ("aabb", 1151, (3, 768)),  # and so is what is behind it
        ("ccca", 1151, (3, 768)),
        ("ccca", 800, (3, 672)),  # it would not be used anyway
        ("eeea", 1151, (3, 768)),
        ("eaaa", 500, (1, 256)),
        ("a", 383, (0, 0)),
    ],
)
def test_a_prefix_with_compacted_blocks_is_cut_by_whole_blocks(
    held: str, n_prompt: int, expected: tuple[int, int]
) -> None:
    assert usable(held, n_prompt) == expected


def test_a_model_with_state_goes_on_from_a_compacted_block_that_has_it() -> None:
    assert usable("aAaA", 1152, has_state=True) == (4, 1024)
    assert usable("aAaA", 1151, has_state=True) == (2, 512)


def test_without_compaction_a_policy_asks_for_the_profile_alone() -> None:
    asked = Policy(floor=COMPACTED, recompute=5, store_as="compacted-x16", am_ratio=2.5, min_tokens=7)
    assert (asked.accepts_compacted, asked.compacts) == (True, True)
    left = asked.without_compaction()
    assert left == Policy(floor=CODED, recompute=5, store_as="x16", min_tokens=7)
    assert (left.accepts_compacted, left.compacts) == (False, False)
    assert Policy(floor=EXACT, store_as="exact").without_compaction() == Policy(floor=EXACT, store_as="exact")


def test_nothing_need_be_left_to_compute() -> None:
    assert Policy(recompute=0).usable([Held(CODED, False)] * 4, 1025, SPEC, can_cut=True) == (4, 1024)


@pytest.mark.parametrize(
    ("store_as", "fidelity", "lineage", "ours", "is_held"),
    [
        ("", EXACT, EXACT, EXACT, True),
        ("", CODED, EXACT, EXACT, True),  # it would be coded again
        ("exact", CODED, EXACT, EXACT, False),
        ("exact", EXACT, EXACT, EXACT, True),
        ("", CODED, CODED, EXACT, False),  # ours was computed on an exact prefix
        ("", EXACT, CODED, EXACT, False),
        ("", CODED, CODED, CODED, True),
        ("x8", CODED, EXACT, CODED, True),
        ("x8", COMPACTED, EXACT, EXACT, False),
        ("", COMPACTED, EXACT, EXACT, False),  # it could never be given back
        ("", COMPACTED, CODED, CODED, False),
        ("exact", CODED, CODED, CODED, False),
    ],
)
def test_a_block_is_held_if_it_is_no_worse_than_what_would_be_put(
    store_as: str, fidelity: FidelityKind, lineage: FidelityKind, ours: FidelityKind, is_held: bool
) -> None:
    assert held(Policy(store_as=store_as), fidelity, lineage, ours) == is_held


@pytest.mark.parametrize(
    ("store_as", "fidelity", "lineage", "ours", "is_held"),
    [
        ("compacted-x8", COMPACTED, EXACT, EXACT, True),
        ("compacted-x8", COMPACTED, COMPACTED, EXACT, False),
        ("compacted-x8", CODED, EXACT, EXACT, True),
        ("", COMPACTED, EXACT, EXACT, True),
        ("x8", COMPACTED, EXACT, EXACT, False),
    ],
)
def test_whoever_takes_compacted_blocks_leaves_those_that_are_held(
    store_as: str, fidelity: FidelityKind, lineage: FidelityKind, ours: FidelityKind, is_held: bool
) -> None:
    assert held(Policy(floor=COMPACTED, store_as=store_as), fidelity, lineage, ours) == is_held


def held(policy: Policy, fidelity: FidelityKind, lineage: FidelityKind, ours: FidelityKind) -> bool:
    """Whether a block need not be put. ours: the lineage of what would be put."""
    block = pb.HeldBlock(fidelity=pb.Fidelity(kind=int(fidelity)), lineage=int(lineage))
    found = policy.held(Match((b"hash",), (block,)), [ours, ours])
    assert found in (set(), {b"hash"})
    return bool(found)


def test_only_what_takes_compacted_blocks_has_some_made() -> None:
    assert [Policy(floor=floor).least_stored for floor in (EXACT, CODED, COMPACTED)] == [CODED, CODED, COMPACTED]


@pytest.mark.parametrize("am_ratio", [-1.0, 0.5, 8.01, float("nan"), float("inf")])
def test_a_policy_with_a_ratio_that_is_none_is_refused_when_it_is_made(am_ratio: float) -> None:
    with pytest.raises(ValueError, match="am_ratio must be a number from 1 to 8"):
        Policy(floor=COMPACTED, store_as="compacted-x8", am_ratio=am_ratio)


def test_what_the_wire_leaves_unsaid_is_exact_and_a_kind_of_a_later_version_is_ranked_by_its_number() -> None:
    assert held_of(pb.HeldBlock(boundary=True)) == Held(EXACT, True)
    compacted = pb.HeldBlock(fidelity=pb.Fidelity(kind=pb.FIDELITY_KIND_COMPACTED))
    assert held_of(compacted) == Held(COMPACTED, False, True)
    later = pb.HeldBlock.FromString(b"\x10\x63")  # lineage 99
    assert held_of(later).worth == EXACT
