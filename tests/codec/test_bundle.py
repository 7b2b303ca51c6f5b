"""Bundles: what was packed comes back, each has one file and one id, and says which model it is for."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec.recipes import (
    HALVES,
    NONE,
    PARTIAL,
    SMALL,
    STATE,
    Recipe,
    measured,
    model,
    recipes,
)
from hypothesis import given, settings
from reference.bundle_reader import read_bundle
from safetensors.numpy import load

from kvcached.block import ModelSpec
from kvcached.codec.bundle import Bundle, group_widths
from kvcached.codec.klt import Basis
from kvcached.codec.tables import storable
from kvcached.errors import PreconditionError

BUNDLE = SMALL.bundle().with_measured({"x8": measured()})
FILE = BUNDLE.pack()


def tensors_of(bundle: Bundle) -> dict[str, tuple[str, bytes]]:
    return {name: (array.dtype.name, array.tobytes()) for name, array in load(bundle.pack()).items()}


# ---- what a bundle is


@settings(max_examples=40)
@given(recipes())
def test_unpack_is_the_inverse_of_pack(recipe: Recipe) -> None:
    bundle = recipe.bundle()
    file = bundle.pack()
    unpacked = Bundle.unpack(file)
    assert (unpacked.spec, unpacked.layers_per_group) == (recipe.spec, recipe.layers_per_group)
    assert unpacked.bundle_id == bundle.bundle_id == read_bundle(file)["id"]
    assert unpacked.pack() == file
    assert tensors_of(unpacked) == tensors_of(bundle)
    for name, profile in bundle.profiles.items():
        found = unpacked.profiles[name]
        numbers = ("target_compression", "dead_zone", "centroid")
        assert [getattr(found, n) for n in numbers] == [getattr(profile, n) for n in numbers]


def test_an_unpacked_bundle_has_the_very_numbers_that_storable_yields() -> None:
    for side in ("keys", "values"):
        for made, found in zip(getattr(BUNDLE, side), getattr(Bundle.unpack(FILE), side), strict=True):
            for name in ("mean", "forward", "inverse", "variances"):
                assert np.array_equal(getattr(made, name), getattr(found, name))


def test_measurements_come_back_and_change_the_file_but_not_the_id() -> None:
    plain = SMALL.bundle()
    again = BUNDLE.with_measured({"x32": measured(kl=0.5), "x8": measured(kl=0.25)})
    assert plain.bundle_id == BUNDLE.bundle_id == again.bundle_id
    assert len({plain.pack(), FILE, again.pack()}) == 3
    assert dict(Bundle.unpack(FILE).measured) == {"x8": measured()}
    assert dict(Bundle.unpack(again.pack()).measured) == {"x32": measured(kl=0.5), "x8": measured(kl=0.25)}


def test_measurements_of_a_profile_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="x16"):
        BUNDLE.with_measured({"x16": measured()})


def test_a_profile_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        BUNDLE.coder("x16")


def other_tables(bundle: Bundle, **fields: Any) -> Bundle:
    profile = bundle.profiles["x8"]
    tables = replace(profile.keys[0], **fields)
    return replace(bundle, profiles={**bundle.profiles, "x8": replace(profile, keys=(tables, *profile.keys[1:]))})


def test_the_id_tells_bundles_apart_that_differ_in_anything_but_measurements() -> None:
    tables, basis = BUNDLE.profiles["x8"].keys[0], BUNDLE.keys[0]
    with_basis = lambda **fields: replace(BUNDLE, keys=(replace(basis, **fields), *BUNDLE.keys[1:]))  # noqa: E731
    bundles = [
        BUNDLE,
        replace(BUNDLE, spec=replace(BUNDLE.spec, name="other")),
        replace(BUNDLE, profiles={"x8": BUNDLE.profiles["x8"]}),
        *(
            replace(BUNDLE, profiles={**BUNDLE.profiles, "x8": replace(BUNDLE.profiles["x8"], **fields)})
            for fields in ({"target_compression": 5.0}, {"dead_zone": 0.25}, {"centroid": 0.125})
        ),
        other_tables(BUNDLE, steps=tables.steps * 2),
        other_tables(BUNDLE, scales=tables.scales + np.uint8(1)),
        *(with_basis(**{name: getattr(basis, name) * 2}) for name in ("mean", "forward", "inverse", "variances")),
    ]
    assert len({bundle.bundle_id for bundle in bundles}) == len(bundles)


def test_the_file_is_the_same_in_every_process() -> None:
    program = "import hashlib; from codec.recipes import *"
    program += "; b = Recipe(model((HALVES, PARTIAL)), layers_per_group=1).bundle().with_measured({'x8': measured()})"
    program += "; print(hashlib.sha256(b.pack()).hexdigest())"
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert run.stdout.strip() == hashlib.sha256(FILE).hexdigest()


def test_the_order_in_memory_changes_neither_file_nor_id() -> None:
    turned = lambda basis: replace(  # noqa: E731
        basis, forward=np.asfortranarray(basis.forward), inverse=np.asfortranarray(basis.inverse)
    )
    strided = replace(BUNDLE.keys[0], mean=np.repeat(BUNDLE.keys[0].mean, 2)[::2])
    for keys in ((turned(BUNDLE.keys[0]), BUNDLE.keys[1]), (strided, BUNDLE.keys[1])):
        assert replace(BUNDLE, keys=keys).bundle_id == BUNDLE.bundle_id
        assert replace(BUNDLE, keys=keys).pack() == FILE


def test_a_theta_that_is_a_whole_number_makes_the_same_bundle() -> None:
    layers = [replace(layer, rope=replace(layer.rope, theta=int(layer.rope.theta))) for layer in BUNDLE.spec.layers]
    assert replace(BUNDLE, spec=replace(BUNDLE.spec, layers=tuple(layers))).pack() == FILE


def test_profiles_come_back_the_best_first() -> None:
    backwards = dict(reversed(BUNDLE.profiles.items()))
    assert list(Bundle.unpack(replace(BUNDLE, profiles=backwards).pack()).profiles) == ["x8", "x32"]


def test_a_coder_holds_the_components_that_its_profile_keeps_and_no_others() -> None:
    coder, tables = BUNDLE.coder("x32"), BUNDLE.profiles["x32"]
    kept = tables.keys[0].steps > 0
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(coder.keys[0].tables.steps, tables.keys[0].steps[kept])
    assert np.array_equal(coder.keys[0].tables.scales, tables.keys[0].scales[kept])
    assert np.array_equal(coder.keys[0].basis.inverse, BUNDLE.keys[0].inverse[kept])
    assert np.array_equal(coder.keys[0].basis.forward, BUNDLE.keys[0].forward[:, kept])
    assert coder.fidelity.bundle_id == BUNDLE.bundle_id


@pytest.mark.parametrize(("per_group", "widths"), [(1, [16, 16, 16]), (2, [32, 16]), (3, [48])])
def test_the_last_group_holds_the_layers_that_are_left(per_group: int, widths: list[int]) -> None:
    assert group_widths(model(), per_group, "keys") == widths
    assert group_widths(model(), per_group, "values") == [width * 6 // 8 for width in widths]


# ---- what can be stored


def basis(**fields: Any) -> Basis:
    one = np.ones((2, 2), np.float32)
    return replace(Basis(one[0], one, one, one[0]), **fields)


@pytest.mark.parametrize("name", ["mean", "forward", "inverse", "variances"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_basis_that_is_not_finite_cannot_be_stored(name: str, bad: float) -> None:
    numbers = np.array(getattr(basis(), name))
    numbers.flat[-1] = bad
    with pytest.raises(ValueError, match="finite"):
        storable(basis(**{name: numbers}))


@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_a_matrix_beyond_float16_cannot_be_stored(name: str) -> None:
    with pytest.raises(ValueError, match="float16"):
        storable(basis(**{name: np.full((2, 2), 65520, np.float32)}))
    assert getattr(storable(basis(**{name: np.full((2, 2), 65519, np.float32)})), name).max() == 65504


def test_what_is_storable_is_stored_as_it_is() -> None:
    rounded = storable(basis(forward=np.full((2, 2), 1 / 3, np.float32)))
    assert rounded.forward[0, 0] != np.float32(1 / 3)
    assert np.array_equal(storable(rounded).forward, rounded.forward)


# ---- which model it is for


def with_layers(**fields: Any) -> ModelSpec:
    return replace(BUNDLE.spec, layers=tuple(replace(layer, **fields) for layer in BUNDLE.spec.layers))


def with_fingerprint(**fields: Any) -> ModelSpec:
    return replace(BUNDLE.spec, fingerprint=replace(BUNDLE.spec.fingerprint, **fields))


OTHER_MODELS: dict[str, tuple[ModelSpec, list[str]]] = {
    "layers": (model((HALVES, PARTIAL, NONE)), ["layers: bundle 2, model 3"]),
    "no dense layers": (replace(BUNDLE.spec, layers=(STATE,)), ["layers: bundle 2, model 0"]),
    "heads": (with_layers(n_kv_heads=3), ["bundle {(2, 8, 6)}, model {(3, 8, 6)}"]),
    "key dim": (with_layers(key_dim=16), ["bundle {(2, 8, 6)}, model {(2, 16, 6)}"]),
    "value dim": (with_layers(value_dim=7), ["bundle {(2, 8, 6)}, model {(2, 8, 7)}"]),
    "dtype": (replace(BUNDLE.spec, kv_dtype="bfloat16"), ["dtype: bundle float16, model bfloat16"]),
    "theta": (
        model((HALVES, replace(PARTIAL, theta=1e6))),
        ["rotary positions: bundle RopeSpec(dims=4, theta=500000.0", "(dense layer 1)", "1000000"],
    ),
    "rope layout": (model((replace(HALVES, interleaved=True), PARTIAL)), ["(dense layer 0)", "False", "True"]),
    "rope scaling": (model((replace(HALVES, scaling_json='{"type":"yarn"}'), PARTIAL)), ["(dense layer 0)", "yarn"]),
    "weights": (with_fingerprint(weights="v"), ["weights: bundle w, model v"]),
    "adapter": (with_fingerprint(adapter="a"), ["adapter: bundle , model a"]),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_bundle_of_another_model_is_refused_and_both_sides_are_named(other: str) -> None:
    spec, expected = OTHER_MODELS[other]
    with pytest.raises(PreconditionError) as caught:
        BUNDLE.check_fits(spec)
    assert [part for part in expected if part not in str(caught.value)] == []
    assert len(str(caught.value)) < 1000


def test_a_bundle_fits_its_model_whatever_does_not_change_keys_and_values() -> None:
    BUNDLE.check_fits(BUNDLE.spec)
    BUNDLE.check_fits(replace(BUNDLE.spec, name="other", block_size=64))
    BUNDLE.check_fits(with_fingerprint(tokenizer="t", config="c"))
    BUNDLE.check_fits(replace(BUNDLE.spec, layers=(*BUNDLE.spec.layers, STATE)))


def test_a_message_quotes_little_of_a_long_spec() -> None:
    long = model((replace(HALVES, scaling_json="x" * 100_000), PARTIAL), kv_dtype="y" * 100_000)
    with pytest.raises(PreconditionError) as caught:
        BUNDLE.check_fits(long)
    assert len(str(caught.value)) < 1500
