"""Probes ask for what lies in the stored prefix; the model can answer them, and cannot without the prefix."""

import random

import numpy as np
import pytest
from reference_model import BOS, ReferenceModel, windows
from retrieval import Probes, Retrieval, table_context
from under_test import Coded, Course, Half, keep

pytestmark = pytest.mark.slow  # runs the reference model, or fits to much data

MODEL = ReferenceModel()


@pytest.fixture(scope="module")
def probes() -> Probes:
    return Probes(MODEL, 90)


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_stands_once_among_the_stored_rows(seed: int) -> None:
    course = Course()
    text = windows("heldout", 1, course.n_prefix)[0]
    context = table_context(random.Random(seed), text, course)
    assert context.token_ids[0] == BOS
    assert len(context.token_ids) <= course.n_tokens
    assert len(context.answers) > 30
    stored = context.token_ids[: course.n_prefix - course.n_recomputed].tolist()
    for where in context.answers:
        assert where.start > course.n_prefix
        asked = context.token_ids[where.start - 4 : where.stop].tolist()  # with the end of the name before it
        places = [i for i in range(len(stored)) if stored[i : i + 3] == asked[-3:]]
        assert places, "the value was told before"


def test_there_are_as_many_probes_as_were_wanted(probes: Probes) -> None:
    assert probes.n_probes >= 90
    assert sum(map(len, probes.exact)) == probes.n_probes


def test_the_model_answers_most_probes_but_not_all(probes: Probes) -> None:
    accuracy = probes.retrieval(keep).accuracy()
    assert 0.6 < accuracy.value < 0.98
    assert accuracy.low <= accuracy.value <= accuracy.high


def test_the_exact_cache_is_no_point_worse_than_itself(probes: Probes) -> None:
    assert probes.retrieval(keep).delta() == (0, 0, 0)


def test_without_the_prefix_nothing_is_found(probes: Probes) -> None:
    def forget(keys: Half, values: Half, first_position: int) -> Coded:  # noqa: ARG001
        return Coded(0 * keys, 0 * values, 1, 1, 1)

    found = probes.retrieval(forget)
    assert found.accuracy().value < 0.05
    assert found.delta().high < -0.5


def test_deltas_are_parts_of_all_probes_and_paired() -> None:
    exact = [np.array([True] * 9 + [False])] * 4
    right = [np.array([True] * 8 + [False] * 2)] * 4
    delta = Retrieval(right, exact).delta()
    assert delta == pytest.approx((-0.1, -0.1, -0.1))
