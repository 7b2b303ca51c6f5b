"""Bundles that compact, with a few things wrong: taken or refused by both readers, and what they claim costs little."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from codec.compacting_recipes import CompactingRecipe, compacting_model
from codec.frames import allocating_at_most
from codec.recipes import LINEAR, content_of, sealed
from codec.test_bad_bundles import taken_or_refused
from codec.test_bundle_fuzz import spoil, wrong_tensor
from safetensors.numpy import load

from kvcached.codec.bundle import Bundle
from kvcached.errors import CorruptBundleError, UnsupportedBundleError

SPEC = compacting_model([LINEAR], n_heads=5, n_query_heads=5, n_tokens=40, value_dim=2)
FILE = CompactingRecipe(SPEC, {8: [(3, 1), (0, 4)]}, steep=(1,), seed=3, rank=0.2).bundle().pack()
TENSORS = load(FILE)
PREDICTORS = [name for name in sorted(TENSORS) if name.endswith(".predictor")]


def mutated(seed: int) -> bytes:
    """A bundle file with one or two things wrong, most in what is said of compaction. The same for ever for a seed."""
    rng = np.random.default_rng(seed)
    found, tensors = content_of(FILE), dict(TENSORS)
    del found["checksum"]
    of_compaction = [name for name in sorted(tensors) if name.startswith("compaction.")]
    of_none = [name for name in of_compaction if name.count(".") == 1]  # of no plane
    for _ in range(rng.integers(1, 3)):
        if rng.random() < 0.2:
            other_leaders(rng, found)
        elif rng.random() < 0.4:
            spoil(rng, found["compaction"] if rng.random() < 0.8 and found.get("compaction") else found)
        else:
            name = str(rng.choice([of_none, of_compaction, PREDICTORS][rng.integers(3)]))
            if tensors.get(name, np.zeros(0)).size and (wrong := wrong_tensor(rng, tensors.pop(name))) is not None:
                tensors[name] = wrong
    return sealed(found, tensors)


def other_leaders(rng: np.random.Generator, found: dict[str, Any]) -> None:
    """One plane has another leader, which may be right: most planes have no predictors, or as many numbers known."""
    with suppress(KeyError, TypeError, AttributeError, IndexError):  # it is spoilt already
        leaders = found["compaction"]["anchors"]["8"]["leaders"]
        leaders[rng.integers(len(leaders))] = [None, *range(-1, len(leaders) + 1)][rng.integers(len(leaders) + 3)]


def assert_lawful(seed: int) -> bool:
    """Whether the file of a seed is taken, by both readers or none."""
    file = mutated(seed)
    taken = taken_or_refused(file) is not None  # first, so that what is only loaded once does not count
    with allocating_at_most(8 * len(FILE) + (1 << 18)), suppress(CorruptBundleError, UnsupportedBundleError):
        Bundle.unpack(file)
    return taken


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # in the test, of other dtypes
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_compacting_bundles_with_a_few_things_wrong_are_taken_or_refused_by_both_readers_and_cost_little() -> None:
    taken = sum(assert_lawful(seed) for seed in range(300))
    assert 15 < taken < 285  # both happen: the changes are neither too small nor too coarse


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_many_compacting_bundles_with_a_few_things_wrong_are_taken_or_refused_by_both_readers() -> None:
    for seed in range(300, 1500):
        assert_lawful(seed)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (1, 4, 24), (1, 4, 0, 8), (1, 4, 4097, 8)])
def test_queries_of_any_shape_are_taken_or_refused(shape: tuple[int, ...]) -> None:
    content = content_of(FILE)
    del content["checksum"]
    file = sealed(content, {**TENSORS, "compaction.queries": np.zeros(shape, np.float16)})
    assert taken_or_refused(file) is None
