"""Bundle files that lie: one of two answers, which a second reader shares, and no memory for what they claim."""

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from codec.recipes import (
    SMALL,
    canonical,
    content_of,
    file_of,
    measured,
    sealed,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.bundle_reader import read_bundle
from reference.frame_reader import Corrupt, Unsupported
from safetensors.numpy import load

from kvcached.codec.bundle import Bundle
from kvcached.errors import CorruptBundleError, UnsupportedBundleError

REFUSED = (CorruptBundleError, UnsupportedBundleError)
BUNDLE = SMALL.bundle().with_measured({"x8": measured()})
FILE = BUNDLE.pack()
TENSORS = load(FILE)
HEADER_END = 8 + int.from_bytes(FILE[:8], "little")
FAIR = 8 * len(FILE)  # bytes that reading it may take, whatever it says

Content = dict[str, Any]


def content() -> Content:
    """The JSON of the small bundle without its checksum, which `sealed` adds."""
    found = content_of(FILE)
    del found["checksum"]
    return found


def taken_or_refused(file: bytes) -> Bundle | None:
    """Any error but the two fails the test, and so does an answer that the second reader does not share."""
    try:
        bundle = Bundle.unpack(file)
    except REFUSED:
        with pytest.raises((Corrupt, Unsupported)):
            read_bundle(file)
        return None
    assert read_bundle(file)["id"] == bundle.bundle_id
    return bundle


def assert_corrupt(file: bytes, match: str | None = None) -> None:
    with pytest.raises(CorruptBundleError, match=match):
        Bundle.unpack(file)
    assert taken_or_refused(file) is None


# ---- bytes that lie


@settings(max_examples=300)
@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_a_file_with_any_byte_changed_is_refused_or_the_same_bundle(at: int, change: int) -> None:
    damaged = FILE[:at] + bytes([FILE[at] ^ change]) + FILE[at + 1 :]
    bundle = taken_or_refused(damaged)
    assert bundle is None or bundle.pack() == FILE


def test_a_file_with_any_byte_of_its_header_changed_is_refused_unless_it_was_padding() -> None:
    padding = len(FILE[8:HEADER_END]) - len(FILE[8:HEADER_END].rstrip())
    for at in range(HEADER_END - padding):
        with pytest.raises(REFUSED):
            Bundle.unpack(FILE[:at] + bytes([FILE[at] ^ 1]) + FILE[at + 1 :])


@settings(max_examples=100)
@given(st.integers(0, len(FILE) - 1))
@example(0)
@example(7)
@example(8)
@example(HEADER_END)
@example(len(FILE) - 1)
def test_a_file_that_was_cut_or_grew_is_corrupt(length: int) -> None:
    assert_corrupt(FILE[:length])
    assert_corrupt(FILE + FILE[: length + 1])


@given(st.binary(max_size=200))
def test_random_bytes_are_no_bundle(data: bytes) -> None:
    assert taken_or_refused(data) is None


leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=9)
any_json = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner))


@given(any_json)
def test_any_json_is_no_bundle(anything: Any) -> None:
    for header in (anything, {"__metadata__": anything}, {"__metadata__": {"kvcached": canonical(anything).decode()}}):
        assert taken_or_refused(file_of(header)) is None


def path_of(path: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in path.split("/")]


def changed(path: str, value: Any) -> Content:
    """The content with another value at a path; a function makes it of what was there."""
    found = content()
    *way, last = path_of(path)
    place = found
    for part in way:
        place = place[part]  # type: ignore[index]
    place[last] = value  # type: ignore[index]
    return found


def without(path: str) -> Content:
    found = content()
    *way, last = path_of(path)
    place = found
    for part in way:
        place = place[part]  # type: ignore[index]
    del place[last]  # type: ignore[arg-type]
    return found


NEVER = [None, True, "", "1", [], {}, [["kl", 1.0]], -1, 1 << 64, 10**400, 0.5, -0.0, 1e308, "NaN", "Infinity"]
PLACES = [
    *("model", "model/layers", "model/layers/0", "model/layers/0/key_dim", "model/layers/0/rope", "model/block_size"),
    *("model/layers/0/rope/dims", "model/layers/0/rope/theta", "model/layers/0/n_kv_heads", "model/fingerprint"),
    *("model/fingerprint/weights", "model/kv_dtype", "layers_per_group", "profiles", "profiles/x8"),
    *("profiles/x8/target_compression", "profiles/x8/dead_zone", "profiles/x8/centroid", "measured", "measured/x8"),
]


@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("path", PLACES)
def test_a_value_of_the_wrong_type_or_size_is_refused(path: str, value: Any) -> None:
    if changed(path, value) == content() or (path, value) in LEGITIMATE:
        return
    file = sealed(changed(path, value), TENSORS)
    assert taken_or_refused(file) is None


# Another value, and a good one: another bundle of the same tensors.
LEGITIMATE = [
    *(("profiles/x8/dead_zone", 0.5), ("profiles/x8/centroid", 0.5), ("model/fingerprint/weights", "1")),
    *(("profiles/x8/dead_zone", -0.0), ("profiles/x8/centroid", -0.0), ("model/layers/0/rope/theta", 1e308)),
    *(("model/fingerprint/weights", text) for text in ("NaN", "Infinity")),
    *(("measured", {}), ("measured/x8", {})),
]


@pytest.mark.parametrize(("path", "value"), LEGITIMATE, ids=str)
def test_a_good_value_in_its_place_is_taken(path: str, value: Any) -> None:
    assert taken_or_refused(sealed(changed(path, value), TENSORS)) is not None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
@pytest.mark.parametrize(
    "path", ["layers_per_group", "profiles/x8/dead_zone", "measured/x8/kl", "model/layers/0/rope/theta"]
)
def test_a_number_that_json_should_not_have_is_refused(path: str, number: str) -> None:
    text = canonical(changed(path, "HERE") | {"checksum": "0" * 64}).decode().replace('"HERE"', number)
    assert_corrupt(sealed(content(), TENSORS, text))


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000, "[" * 900 + "]" * 900])
@pytest.mark.parametrize("path", [*PLACES, "format", "measured/x8/kl"])
def test_deep_nesting_is_corrupt(path: str, deep: str) -> None:
    text = canonical(changed(path, "HERE") | {"checksum": "0" * 64}).decode().replace('"HERE"', deep)
    assert_corrupt(sealed(content(), TENSORS, text))
    assert_corrupt(file_of(deep.encode()))
    assert_corrupt(file_of(f'{{"__metadata__":{deep}}}'.encode()))


@pytest.mark.parametrize(
    "path", ["model", "layers_per_group", "profiles", "measured", "profiles/x8/centroid", "model/kv_dtype"]
)
def test_a_missing_field_is_corrupt(path: str) -> None:
    assert_corrupt(sealed(without(path), TENSORS))


def test_a_file_without_format_or_checksum_is_corrupt() -> None:
    assert_corrupt(sealed(without("format"), TENSORS))
    assert_corrupt(sealed(content(), TENSORS, canonical(content()).decode()))


@pytest.mark.parametrize("path", ["extra", "model/extra", "model/layers/0/extra", "profiles/x8/extra", "measured/x8/e"])
def test_a_field_too_many_is_corrupt(path: str) -> None:
    assert_corrupt(sealed(changed(path, 1), TENSORS))


@pytest.mark.parametrize("path", ["model/layers/0/window", "model/fingerprint/adapter", "measured/x8/kl_low"])
def test_a_field_at_its_default_is_left_out(path: str) -> None:
    default: Any = "" if path.endswith("adapter") else 0
    assert_corrupt(sealed(changed(path, default), TENSORS))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"layers_per_group":1', '"layers_per_group":1,"layers_per_group":1'),
        ('"layers_per_group":1', '"layers_per_group": 1'),
        ('"layers_per_group":1', '"layers_per_group":1.0'),
        ('"theta":10000.0', '"theta":10000'),
        ('"theta":10000.0', '"theta":1e4'),
        ('"name":"small"', '"name":"sm\\u0061ll"'),
        ('"n_tokens":1000', '"n_tokens":"1000"'),
        ('"n_tokens":1000', '"nTokens":1000'),
        ('"kind":1', '"kind":"LAYER_KIND_ATTENTION"'),
    ],
)
def test_json_that_means_the_same_written_in_another_way_is_corrupt(before: str, after: str) -> None:
    text = canonical(content_of(FILE)).decode()
    assert before in text
    assert_corrupt(sealed(content(), TENSORS, text.replace(before, after, 1)), "canonical|kind")


def test_another_metadata_key_is_corrupt() -> None:
    header = json.loads(FILE[8:HEADER_END])
    header["__metadata__"]["other"] = "x"
    assert_corrupt(file_of(header, FILE[HEADER_END:]))


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_a_missing_tensor_is_corrupt(name: str) -> None:
    assert_corrupt(sealed(content(), {n: array for n, array in TENSORS.items() if n != name}))


@pytest.mark.parametrize("name", ["extra", "keys.2.mean", "x16.keys.0.steps", "keys.0.", ""])
def test_a_tensor_too_many_is_corrupt(name: str) -> None:
    assert_corrupt(sealed(content(), {**TENSORS, name: np.zeros(1, np.float32)}), "tensors that no bundle has")


@pytest.mark.parametrize("name", sorted(name for name in TENSORS if name.startswith(("keys.0", "x8.keys.0"))))
@pytest.mark.parametrize("wrong", ["dtype", "longer", "empty", "turned", "flat"])
def test_a_tensor_of_another_dtype_or_shape_is_corrupt(name: str, wrong: str) -> None:
    array = TENSORS[name]
    others = {
        "dtype": array.astype(np.float64),
        "longer": np.concatenate([array, array[:1]]),
        "empty": array[:0],
        "turned": array.reshape(array.shape[::-1]) if array.ndim == 2 and len(set(array.shape)) > 1 else array[:, None],
        "flat": array.reshape(1, -1),
    }
    assert_corrupt(sealed(content(), {**TENSORS, name: others[wrong]}))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "BOOL", "C64", "X9", ""])
def test_a_dtype_that_no_bundle_has_is_corrupt(dtype: str) -> None:
    header = json.loads(FILE[8:HEADER_END])
    header["keys.0.mean"]["dtype"] = dtype
    assert_corrupt(file_of(header, FILE[HEADER_END:]))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, bad) for name in ("mean", "forward", "inverse", "variances") for bad in (np.nan, np.inf, -np.inf)),
        *(("steps", bad) for bad in (np.nan, np.inf, -1.0, -1e-45, 2.0**97)),
        *(("scales", bad) for bad in (64, 255)),
        ("variances", -1.0),
    ],
)
def test_a_tensor_with_a_number_that_it_cannot_have_is_corrupt(name: str, bad: float) -> None:
    full = f"keys.0.{name}" if name not in ("steps", "scales") else f"x8.keys.0.{name}"
    array = TENSORS[full].copy()
    array.flat[-1] = bad
    assert_corrupt(sealed(content(), {**TENSORS, full: array}))


@pytest.mark.parametrize("step", [0.0, 1e-45, 2.0**96])
def test_the_smallest_and_the_largest_step_are_taken(step: float) -> None:
    array = TENSORS["x8.keys.0.steps"].copy()
    array[:] = step
    assert taken_or_refused(sealed(content(), {**TENSORS, "x8.keys.0.steps": array})) is not None


def test_a_model_without_dense_layers_has_no_bundle() -> None:
    found = content()
    for layer in found["model"]["layers"]:
        layer["opaque"] = True
    assert_corrupt(sealed(found, TENSORS), "no dense layers")


@pytest.mark.parametrize("per_group", [0, 3, 1 << 40])
def test_groups_that_the_model_does_not_have_are_corrupt(per_group: int) -> None:
    assert_corrupt(sealed(changed("layers_per_group", per_group), TENSORS), "layers_per_group")


@pytest.mark.parametrize("name", ["x9", "exact", "", "x8\0", "keys"])
def test_a_profile_of_another_name_is_corrupt(name: str) -> None:
    tensors = TENSORS | {f"{name}{n[2:]}": array for n, array in TENSORS.items() if n.startswith("x8.")}
    assert_corrupt(sealed(changed(f"profiles/{name}", content()["profiles"]["x8"]), tensors))


@pytest.mark.parametrize("found", ["kvcached bundle 3", "", "x" * 100_000])
def test_another_format_is_unsupported(found: str) -> None:
    with pytest.raises(UnsupportedBundleError) as caught:
        Bundle.unpack(sealed(changed("format", found), TENSORS))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "rope",
    [
        {"dims": 8, "theta": 1e4, "scaling_json": '{"type":"of tomorrow"}'},
        {"dims": 8, "theta": 1e4, "scaling_json": "no json"},
        {"dims": 8, "theta": 1e4, "scaling_json": "[" * 100_000},
        *({"dims": dims, "theta": 1e4} for dims in (7, 10)),
        {"dims": 8},
    ],
    ids=lambda rope: str(rope)[:50],
)
def test_rotary_positions_that_nobody_can_remove_are_unsupported(rope: dict[str, Any]) -> None:
    file = sealed(changed("model/layers/0/rope", rope), TENSORS)
    with pytest.raises(UnsupportedBundleError):
        Bundle.unpack(file)
    assert taken_or_refused(file) is None


def test_a_message_quotes_little_of_a_hostile_file() -> None:
    for path in ("model/kv_dtype", "profiles/" + "x" * 100_000, "checksum"):
        with pytest.raises(CorruptBundleError) as caught:
            Bundle.unpack(sealed(changed(path, "y" * 100_000), TENSORS))
        assert len(str(caught.value)) < 500


def test_the_tests_start_from_a_file_that_is_taken() -> None:
    """Sealing the content and tensors of the small bundle, unchanged, gives its very file."""
    assert sealed(deepcopy(content()), TENSORS) == FILE
