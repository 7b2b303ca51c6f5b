"""Rotary positions as mlx-lm has them, and off again: at any position, in any layout, under any scaling."""

import json
from dataclasses import dataclass, replace
from math import cos, sin
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import SuScaledRoPE, initialize_rope
from mlx_models import build, prefill, save

from kvcached.block import RopeSpec
from kvcached.codec import rope
from kvcached.errors import UnsupportedRopeError
from kvcached_mlx import fresh_cache, model_spec


@dataclass(frozen=True)
class Model:
    """What a model's config.json says, and the width of its heads."""

    dim: int
    dims: int
    theta: float
    scaling: dict[str, Any] | None = None
    interleaved: bool = False
    max_positions: int = 131072

    @property
    def spec(self) -> RopeSpec:
        return RopeSpec(self.dims, self.theta, self.interleaved, json.dumps(self.scaling) if self.scaling else "")


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
DEEPSEEK = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
LONG = {
    "long_factor": np.geomspace(1.08, 64.0, 48).tolist(),
    "short_factor": np.linspace(1.0, 2.9, 48).tolist(),
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
}
MODELS = {
    "Qwen3": Model(128, 128, 1e6),
    "Command R, interleaved": Model(128, 128, 8e6, interleaved=True),
    "GLM-4, interleaved, half of the dims": Model(128, 64, 1e4, interleaved=True),
    "StableLM, a quarter of the dims": Model(80, 20, 1e4),
    "default said aloud": Model(64, 64, 1e4, {"rope_type": "default"}),
    "DeepSeek Coder, linear": Model(128, 128, 1e5, {"factor": 4.0, "type": "linear"}),
    "linear, interleaved": Model(64, 32, 1e4, {"factor": 2.5, "rope_type": "linear"}, interleaved=True),
    "Llama 3.1": Model(128, 128, 5e5, LLAMA3),
    "Llama 3.2": Model(64, 64, 5e5, {**LLAMA3, "factor": 32.0}),
    "llama3, interleaved": Model(128, 128, 5e5, LLAMA3, interleaved=True),
    "llama3, all but the factor left out": Model(128, 128, 5e5, {"factor": 8.0, "rope_type": "llama3"}),
    "Qwen2.5, yarn": Model(
        128, 128, 1e6, {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}, max_positions=32768
    ),
    "gpt-oss, yarn": Model(
        64, 64, 1.5e5, {**DEEPSEEK, "factor": 32.0, "truncate": False, "type": None, "rope_type": "yarn"}
    ),
    "DeepSeek V2, yarn": Model(64, 64, 1e4, {**DEEPSEEK, "mscale": 0.707, "mscale_all_dim": 0.707}, interleaved=True),
    "yarn, two factors that differ": Model(64, 64, 1e4, {**DEEPSEEK, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn, all but the factor left out": Model(128, 96, 1e4, {"factor": 16.0, "type": "yarn"}),
    "yarn that shrinks": Model(128, 128, 1e4, {"factor": 0.5, "type": "yarn"}),
    "yarn, a ramp of no width": Model(
        8, 8, 1e4, {"factor": 2.0, "original_max_position_embeddings": 6, "type": "yarn"}
    ),
    "yarn, a ramp beyond the last pair": Model(
        64, 64, 1e4, {"factor": 4.0, "original_max_position_embeddings": 131072, "type": "yarn"}
    ),
    "Phi-3, longrope": Model(96, 96, 1e4, {**LONG, "type": "longrope"}),
    "Phi-4-mini, longrope, three quarters of the dims": Model(128, 96, 1e4, {**LONG, "rope_type": "longrope"}),
    "longrope shorter than the original": Model(
        96, 96, 1e4, {**LONG, "max_position_embeddings": 2048, "type": "longrope"}, max_positions=2048
    ),
    "Phi-3, su": Model(96, 96, 1e4, {**LONG, "type": "su"}),
    "Phi-3.5-MoE, su with its own factor": Model(96, 96, 1e4, {**LONG, "long_mscale": 1.2433, "type": "su"}),
}


def of_mlx_lm(model: Model) -> Any:
    """mlx-lm's own module for a model. What it calls su is built by its models, not by its function."""
    scaling = model.scaling
    if not scaling or scaling.get("type") != "su":
        return initialize_rope(model.dims, model.theta, model.interleaved, scaling, model.max_positions)
    names = ("max_position_embeddings", "original_max_position_embeddings", "short_factor", "long_factor")
    return SuScaledRoPE(
        model.dims, model.theta, **{n: scaling[n] for n in names}, long_mscale=scaling.get("long_mscale")
    )


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def pairs_of(model: RopeSpec) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the first and second features of each pair."""
    half = np.arange(model.dims // 2)
    return (2 * half, 2 * half + 1) if model.interleaved else (half, half + len(half))


def radii(x: np.ndarray, model: RopeSpec) -> np.ndarray:
    """For each feature the length of its pair: what rounding is measured by. Zero for features without rotation."""
    first, second = pairs_of(model)
    lengths = np.zeros_like(x)
    lengths[..., first] = lengths[..., second] = np.hypot(x[..., first], x[..., second])
    return lengths


@pytest.mark.parametrize("offset", [0, 1, 4090, 100_000])
@pytest.mark.parametrize("name", MODELS)
def test_rotation_is_that_of_mlx_lm(name: str, offset: int) -> None:
    """mlx-lm has angles in float32: it errs by up to 1e-6 of the unscaled angle, and we are held to that alone."""
    model = MODELS[name]
    x = normal(1, 2, 12, model.dim)
    with mx.stream(mx.cpu):
        theirs = np.array(of_mlx_lm(model)(mx.array(x), offset=offset))
    positions = np.arange(offset, offset + 12, dtype=np.int32)
    ours = rope.apply(x, positions, model.spec)
    first, second = pairs_of(model.spec)
    angles = np.zeros((12, model.dim))
    angles[:, first] = angles[:, second] = positions[:, None] * model.theta ** (-2 * np.arange(len(first)) / model.dims)
    tolerance = radii(x, model.spec) * (2e-6 + 1e-6 * angles)
    assert (np.abs(ours - theirs) <= tolerance).all()


LLAMAS = {
    "plain": {},
    "interleaved": {"rope_traditional": True},
    "linear": {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}},
}


@pytest.mark.parametrize("name", LLAMAS)
def test_in_the_first_layer_of_a_model_a_token_has_one_key_at_all_positions(name: str, tmp_path: Path) -> None:
    """From its configuration through its ModelSpec: the rotation that is removed is the one that the model made."""
    model, config = build("llama", mx.float32, {"rope_theta": 500.0, **LLAMAS[name]})
    spec = model_spec(model, save(model, config, tmp_path)).layers[0].rope
    cache = fresh_cache(model)
    with mx.stream(mx.cpu):
        prefill(model, cache, [9] * 100)
    rotated = np.array(cache[0].state[0])[0, :, :100]  # the buffer may be longer
    positions = np.arange(100, dtype=np.int32)
    plain, length = rope.remove(rotated, positions, spec), np.linalg.norm(rotated, axis=-1).max()
    assert np.abs(np.ptp(rotated, axis=1)).max() > 0.5 * length
    assert np.abs(np.ptp(plain, axis=1)).max() < 1e-4 * length


@st.composite
def rotations(draw: st.DrawFn) -> tuple[RopeSpec, np.ndarray, np.ndarray]:
    """Any layout and scaling, rows of any size, scattered positions."""
    model = draw(st.sampled_from(list(MODELS.values())))
    spec = replace(model.spec, interleaved=draw(st.booleans()))
    if "long_factor" not in spec.scaling_json:  # a list as long as the pairs are many
        spec = replace(spec, dims=2 * draw(st.integers(0, model.dim // 2)), theta=draw(st.floats(2.0, 1e8)))
    positions = draw(st.lists(st.integers(0, 2**31 - 1), max_size=5))
    heads = draw(st.lists(st.integers(0, 2), max_size=2))
    scale = np.float32(2.0 ** draw(st.integers(-20, 20)))
    return spec, np.array(positions, np.int32), normal(*heads, len(positions), model.dim) * scale


@given(rotations())
def test_apply_is_the_inverse_of_remove_and_remove_of_apply(
    rotation: tuple[RopeSpec, np.ndarray, np.ndarray],
) -> None:
    spec, positions, x = rotation
    tolerance = 2**-20 * radii(x, spec)
    assert (np.abs(rope.apply(rope.remove(x, positions, spec), positions, spec) - x) <= tolerance).all()
    assert (np.abs(rope.remove(rope.apply(x, positions, spec), positions, spec) - x) <= tolerance).all()


@given(rotations(), st.randoms(use_true_random=False))
def test_a_row_turns_by_its_own_position_whatever_rows_are_beside_it(
    rotation: tuple[RopeSpec, np.ndarray, np.ndarray], random: Any
) -> None:
    spec, positions, x = rotation
    order = random.sample(range(len(positions)), k=len(positions))
    shuffled = rope.apply(x[..., order, :], positions[order], spec)
    assert np.array_equal(shuffled, rope.apply(x, positions, spec)[..., order, :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_beyond_the_rotary_ones_and_the_argument_stay_as_they_are(interleaved: bool) -> None:
    spec, x, positions = RopeSpec(8, 1e4, interleaved), normal(3, 12), np.array([7, 900, 3], np.int32)
    before = x.copy()
    for turned in (rope.apply(x, positions, spec), rope.remove(x, positions, spec)):
        assert np.array_equal(turned[:, 8:], x[:, 8:])
        assert (turned[:, :8] != x[:, :8]).all()
    assert np.array_equal(x, before)


def test_without_rotary_dims_nothing_turns() -> None:
    x, positions = normal(2, 3, 5), np.array([7, 900, 3], np.int32)
    for turned in (rope.apply(x, positions, RopeSpec()), rope.remove(x, positions, RopeSpec())):
        assert np.array_equal(turned, x)
        assert not np.shares_memory(turned, x)


@pytest.mark.parametrize("position", [0, 1, 1_000_003, 2**31 - 1])
def test_angles_are_right_at_any_position(position: int) -> None:
    x, positions = np.array([[3.0, 4.0]], np.float32), np.array([position], np.int32)
    c, s = cos(position), sin(position)
    expected = [[3 * c - 4 * s, 4 * c + 3 * s]]
    np.testing.assert_allclose(rope.apply(x, positions, RopeSpec(2, 1e4)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("factor", "expected"), [(4.0, 1.1386294), (1.0, 1.0)])
def test_yarn_lengthens_keys_and_remove_shortens_them(factor: float, expected: float) -> None:
    spec = RopeSpec(64, 1e6, False, json.dumps({"type": "yarn", "factor": factor}))
    x, positions = normal(3, 64), np.array([5, 0, 77], np.int32)
    ratio = radii(rope.apply(x, positions, spec), spec) / radii(x, spec)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    np.testing.assert_allclose(radii(rope.remove(x, positions, spec), spec) / radii(x, spec), 1 / expected, rtol=1e-6)


def test_what_is_added_for_length_by_longrope_is_that_of_its_paper() -> None:
    spec = MODELS["Phi-3, longrope"].spec
    x, positions = normal(3, 96), np.array([5, 0, 77], np.int32)
    expected = np.sqrt(1 + np.log(131072 / 4096) / np.log(4096))  # 1.19
    ratio = radii(rope.apply(x, positions, spec), spec) / radii(x, spec)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


WRONG = {
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "mrope": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "proportional": {"rope_type": "proportional"},
    "a kind that is a list": {"type": ["linear"], "factor": 2.0},
    "linear without factor": {"type": "linear"},
    "linear by zero": {"type": "linear", "factor": 0},
    "linear by infinity": {"type": "linear", "factor": float("inf")},
    "linear by nearly nothing": {"type": "linear", "factor": 5e-324},
    "linear by far too little": {"type": "linear", "factor": 1e-9},
    "linear by text": {"type": "linear", "factor": "2"},
    "linear by truth": {"type": "linear", "factor": True},
    "llama3 without factor": {"type": "llama3"},
    "llama3 without a ramp": {**LLAMA3, "low_freq_factor": 4.0},
    "yarn without factor": {"type": "yarn"},
    "yarn of no waves": {"type": "yarn", "factor": 4.0, "beta_fast": 0},
    "yarn with a negative length": {"type": "yarn", "factor": 4.0, "mscale": -100},
    "yarn with no length": {"type": "yarn", "factor": 2.0, "mscale": -1 / (0.1 * np.log(2.0))},
    "longrope without factors": {**LONG, "type": "longrope", "long_factor": None},
    "longrope with too few factors": {**LONG, "type": "longrope", "long_factor": [1.0] * 47},
    "longrope with a factor of zero": {**LONG, "type": "longrope", "long_factor": [1.0] * 47 + [0.0]},
    "longrope without its length": {**LONG, "type": "longrope", "max_position_embeddings": None},
    "longrope without its original length": {**LONG, "type": "su", "original_max_position_embeddings": None},
    "longrope from one": {**LONG, "type": "su", "original_max_position_embeddings": 1},
}


def refused(spec: RopeSpec) -> str:
    """The message with which both directions refuse rows of 96 features."""
    x, positions = normal(2, 96), np.array([3, 4], np.int32)
    with pytest.raises(UnsupportedRopeError) as removed:
        rope.remove(x, positions, spec)
    with pytest.raises(UnsupportedRopeError) as applied:
        rope.apply(x, positions, spec)
    assert str(removed.value) == str(applied.value)
    return str(applied.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_scaling_that_is_unknown_or_makes_no_sense_is_refused(name: str) -> None:
    assert "rotary scaling" in refused(RopeSpec(96, 1e4, False, json.dumps(WRONG[name])))


@pytest.mark.parametrize("text", ["{", "[]", "3", '"linear"', "null", "[" * 100_000])
def test_a_scaling_that_is_no_json_object_is_refused(text: str) -> None:
    assert "JSON" in refused(RopeSpec(96, 1e4, False, text))


@pytest.mark.parametrize("dims", [-2, 3, 98])
def test_rotary_dims_that_do_not_fit_the_rows_are_refused(dims: int) -> None:
    assert f"at most the 96 of a row, got {dims}" in refused(RopeSpec(dims, 1e4))


@pytest.mark.parametrize("theta", [0.0, 1.0, -1e4, float("inf"), float("nan")])
def test_a_missing_theta_is_refused_not_guessed(theta: float) -> None:
    assert "theta" in refused(RopeSpec(96, theta))
