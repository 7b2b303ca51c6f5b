"""What a bundle says of leaders and predictors: one thing wrong, and both readers refuse it for that alone."""

from typing import Any

import numpy as np
import pytest
from codec.recipes import content_of, sealed
from codec.test_bad_bundles import assert_corrupt, taken_or_refused
from golden.compacted import LED, LED_PAIR, RECIPES, UNLED, anchor, with_leader, with_predictor
from safetensors.numpy import load

FILE = RECIPES["bundle-compacting-float32"].bundle().pack()
TENSORS = load(FILE)
LEADER = 1


def content() -> dict[str, Any]:
    """The JSON of the bundle without its checksum, which `sealed` adds."""
    found = content_of(FILE)
    del found["checksum"]
    return found


def with_leaders(leaders: object) -> bytes:
    found = content()
    anchor(found, 2)["leaders"] = leaders
    return sealed(found, TENSORS)


def test_the_tests_start_from_a_bundle_whose_planes_lead_and_are_led() -> None:
    found = anchor(content(), 2)
    leaders = found["leaders"]
    assert len(leaders) == 10
    assert (leaders[LEADER], leaders[LED], leaders[LED_PAIR], leaders[UNLED]) == (None, LEADER, LEADER, None)
    assert [len(found["heads"][plane]) for plane in (LEADER, LED_PAIR, LED, UNLED)] == [2, 2, 1, 1]
    assert {f"compaction.2.{side}.{LED}.predictor" for side in ("keys", "values")} <= TENSORS.keys()
    assert f"compaction.2.keys.{UNLED}.predictor" not in TENSORS


@pytest.mark.parametrize("leader", [LEADER, None])
@pytest.mark.parametrize("plane", [LED, LED_PAIR, UNLED])
def test_a_plane_may_have_a_leader_or_none_where_it_has_no_predictor(plane: int, leader: int | None) -> None:
    assert taken_or_refused(with_leader(plane, leader)(content(), TENSORS)) is not None


@pytest.mark.parametrize("leader", [LED_PAIR, LED, UNLED, 10, 1 << 40, -1, -9, True, 1.0, 1.5, "1", "", [1], {}])
@pytest.mark.parametrize("plane", [LED, LED_PAIR, UNLED])
def test_a_leader_that_is_led_or_of_one_head_or_no_plane_is_corrupt(plane: int, leader: object) -> None:
    match = "JSON is not canonical" if leader == LEADER else "must have a leader, or none, for 10 planes"
    assert_corrupt(with_leader(plane, leader)(content(), TENSORS), match)


def test_a_leader_that_gets_a_leader_is_corrupt() -> None:
    others = [None] * 10
    for leaders in ([LED_PAIR if i == LEADER else LEADER for i in range(10)], [*others[:1], LEADER, *others[2:]]):
        bare = {name: array for name, array in TENSORS.items() if not name.endswith(".predictor")}
        found = content()
        anchor(found, 2)["leaders"] = leaders
        assert_corrupt(sealed(found, bare), "must have a leader, or none, for 10 planes")


@pytest.mark.parametrize("leaders", [None, True, 1, "", "0123456789", {}, [], [None] * 9, [None] * 11, [[None] * 10]])
def test_leaders_that_are_no_list_with_an_entry_for_each_plane_are_corrupt(leaders: object) -> None:
    assert_corrupt(with_leaders(leaders))


def test_a_bundle_without_leaders_is_corrupt() -> None:
    found = content()
    del anchor(found, 2)["leaders"]
    assert_corrupt(sealed(found, TENSORS), "lacks 'leaders'")


PREDICTED = [name for name in sorted(TENSORS) if name.endswith(".predictor")]


@pytest.mark.parametrize("name", PREDICTED)
def test_a_plane_may_go_without_the_predictor_that_it_has(name: str) -> None:
    assert taken_or_refused(sealed(content(), {n: array for n, array in TENSORS.items() if n != name})) is not None


@pytest.mark.parametrize("name", PREDICTED)
@pytest.mark.parametrize("wrong", ["dtype", "longer", "shorter", "wider", "empty", "flat", "deep"])
def test_a_predictor_of_another_dtype_or_shape_is_corrupt(name: str, wrong: str) -> None:
    array = TENSORS[name]
    others = {
        "dtype": array.astype(np.float32),
        "longer": np.concatenate([array, array[:1]]),
        "shorter": array[:-1],
        "wider": np.concatenate([array, array[:, :1]], axis=1),
        "empty": array[:0],
        "flat": array.reshape(-1),
        "deep": array[None],
    }
    assert_corrupt(sealed(content(), {**TENSORS, name: others[wrong]}), f"{name} must be finite float16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, -1])
def test_a_predictor_that_is_not_finite_is_corrupt(at: int, bad: float) -> None:
    array = TENSORS[PREDICTED[0]].copy()
    array.flat[at] = bad
    assert_corrupt(sealed(content(), {**TENSORS, PREDICTED[0]: array}), "must be finite float16")


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1, 4), (14, 4)])
def test_a_predictor_of_keys_without_a_leader_has_nothing_to_predict_from_and_is_corrupt(
    shape: tuple[int, ...],
) -> None:
    for side_plane in (f"keys.{UNLED}", f"keys.{LEADER}"):
        file = with_predictor(side_plane, lambda _: np.zeros(shape, np.float16))(content(), TENSORS)
        assert_corrupt(file, "tensors that no bundle has")


@pytest.mark.parametrize("name", ["2.keys.10", "2.values.-1", "4.values.0", "2.x8.keys.4", "2.queries.4"])
def test_a_predictor_of_no_plane_is_corrupt(name: str) -> None:
    wrong = {f"compaction.{name}.predictor": TENSORS[f"compaction.2.keys.{LED}.predictor"]}
    assert_corrupt(sealed(content(), TENSORS | wrong), "tensors that no bundle has")
