"""Blocks to CODED frames and back: what is lost is bounded by the steps, and all else comes back bit for bit."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec.frames import BLOCK_ID, PLENTY, allocating_at_most, seeds, special_floats
from codec.recipes import HALVES, NONE, PARTIAL, SMALL, Coding, Recipe, Text, model, recipes
from golden.coded import symbols_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_dtypes import finfo
from reference.coded_reader import read_coded
from support import same_tensors

from kvcached import codec
from kvcached.block import FidelityKind, KVBlock, ModelSpec, RopeSpec
from kvcached.codec import container, entropy, klt, planes, quantize
from kvcached.codec.bundle import Bundle, Coder
from kvcached.errors import CorruptFrameError, UnsupportedFrameError, UnsupportedRopeError
from kvcached_client.spec import DENSE_DTYPES
from kvcached_client.tensors import DTYPES

BUNDLE = SMALL.bundle()
X8, X32 = BUNDLE.coder("x8"), BUNDLE.coder("x32")
SIDES = ("keys", "values")
first_positions = st.integers(0, 6) | st.integers(0, 2**31 - 40)


def round_trip(block: KVBlock, coder: Coder) -> KVBlock:
    return codec.decode(BLOCK_ID, codec.encode(BLOCK_ID, block, coder=coder), block.nbytes, coder)


def texts(recipe: Recipe, n_tokens: int, first_position: int, seed: int) -> Text:
    return Text(recipe.spec, n_tokens, first_position, seed, opaque=seed % 2 == 0)


# ---- what comes back


@settings(max_examples=60)
@given(recipes(), st.integers(1, 20), first_positions, seeds)
@example(SMALL, 3, 0, 0)
def test_symbols_survive_exactly_and_the_second_reader_finds_them(
    recipe: Recipe, n_tokens: int, first_position: int, seed: int
) -> None:
    block, bundle = texts(recipe, n_tokens, first_position, seed).block(), recipe.bundle()
    coder, split = bundle.coder("x8"), planes.split(block, recipe.spec, recipe.layers_per_group)
    frame = codec.encode(BLOCK_ID, block, coder=coder)
    first, second = symbols_of(frame, bundle), read_coded(frame, bundle.pack())["symbols"]
    for side in SIDES:
        for group, (rows, plane) in enumerate(zip(getattr(split, side), getattr(coder, side), strict=True)):
            coefficients = klt.project(rows, plane.basis)
            expected = quantize.quantize(coefficients, plane.tables.steps, coder.dead_zone)
            assert np.array_equal(first[f"{side}.{group}"], expected)
            assert np.array_equal(second[f"{side}.{group}"], expected)


@settings(max_examples=60)
@given(recipes(), st.integers(1, 20), first_positions, seeds)
def test_what_is_decoded_is_what_the_document_says_within_its_tolerance(
    recipe: Recipe, n_tokens: int, first_position: int, seed: int
) -> None:
    block, bundle = texts(recipe, n_tokens, first_position, seed).block(), recipe.bundle()
    frame = codec.encode(BLOCK_ID, block, coder=bundle.coder("x8"))
    decoded = codec.decode(BLOCK_ID, frame, block.nbytes, bundle.coder("x8")).to_tensors()
    second = read_coded(frame, bundle.pack())
    for side in SIDES:
        distance = np.abs(decoded[side].astype(np.float64) - second["exact"][side])
        assert (distance <= second["tolerance"][side]).all()


def largest_errors(bundle: Bundle, side: str) -> np.ndarray:
    """Of each number of a row, without rotation: what steps, dead zone and centroid allow, through the basis."""
    profile = bundle.profiles["x8"]
    bounds = []
    for basis, tables in zip(getattr(bundle, side), getattr(profile, side), strict=True):
        steps = (1 - profile.dead_zone + profile.centroid) * tables.steps.astype(np.float64)
        bounds.append(steps @ np.abs(basis.inverse).astype(np.float64))
    return np.concatenate(bounds)


@settings(max_examples=60)
@given(recipes(), st.integers(5, 20), first_positions, seeds)
def test_the_error_is_bounded_by_the_steps(recipe: Recipe, n_tokens: int, first_position: int, seed: int) -> None:
    """Each head's vector is as far from what its kept coefficients make as their rounding allows: rotation is none."""
    block, bundle = texts(recipe, n_tokens, first_position, seed).block(), recipe.bundle()
    coder, split = bundle.coder("x8"), planes.split(block, recipe.spec, recipe.layers_per_group)
    unrounded = {
        side: tuple(
            klt.reconstruct(klt.project(rows, plane.basis), plane.basis)
            for rows, plane in zip(getattr(split, side), getattr(coder, side), strict=True)
        )
        for side in SIDES
    }
    expected = planes.merge(replace(split, **unrounded), recipe.spec, {}).to_tensors()
    found = round_trip(block, coder).to_tensors()
    sinks = split.sink_keys.shape[2]
    for side in SIDES:
        exact, limits = expected[side][:, :, sinks:].astype(np.float64), finfo(expected[side].dtype)
        n_layers, heads, _, dim = exact.shape
        allowed = largest_errors(bundle, side).reshape(n_layers, heads, 1, dim)
        lengths = np.linalg.norm(exact, axis=-1) + np.linalg.norm(allowed, axis=-1)
        rounding = (2**-17 + float(limits.eps)) * (lengths + 1) + dim * float(limits.smallest_subnormal)
        errors = np.linalg.norm(found[side][:, :, sinks:].astype(np.float64) - exact, axis=-1)
        assert (errors <= np.linalg.norm(allowed, axis=-1) + rounding).all()


@given(recipes(), st.integers(1, 12), st.integers(0, 6), seeds)
def test_sinks_and_opaque_tensors_come_back_bit_for_bit(
    recipe: Recipe, n_tokens: int, first_position: int, seed: int
) -> None:
    block, sinks = Text(recipe.spec, n_tokens, first_position, seed, opaque=True).block(), max(4 - first_position, 0)
    decoded = round_trip(block, recipe.bundle().coder("x8"))
    assert same_tensors(dict(decoded.opaque), dict(block.opaque))
    for side in SIDES:
        before, after = block.to_tensors()[side], decoded.to_tensors()[side]
        assert after[:, :, :sinks].tobytes() == before[:, :, :sinks].tobytes()
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert (decoded.first_position, decoded.n_source_tokens) == (first_position, n_tokens)
    assert decoded.is_dense


@pytest.mark.parametrize("name", DENSE_DTYPES)
def test_sinks_may_be_any_bits(name: str) -> None:
    recipe = replace(SMALL, spec=model((HALVES, PARTIAL), name))
    block = Text(recipe.spec, 12, 0).block()
    odd = np.resize(special_floats(DTYPES[name]), 8)
    tensors = block.to_tensors()
    tensors["keys"][:, :, :4], tensors["values"][:, :, :4] = odd, odd[:6]
    decoded = round_trip(block, recipe.bundle().coder("x8")).to_tensors()
    assert decoded["keys"][:, :, :4].tobytes() == tensors["keys"][:, :, :4].tobytes()
    assert decoded["values"][:, :, :4].tobytes() == tensors["values"][:, :, :4].tobytes()


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4])
def test_a_block_of_sinks_alone_comes_back_bit_for_bit(n_tokens: int) -> None:
    block = Text(SMALL.spec, n_tokens, 0, opaque=True).block()
    assert same_tensors(round_trip(block, X32).to_tensors(), block.to_tensors())


def test_a_profile_that_keeps_nothing_leaves_the_mean() -> None:
    recipe = replace(SMALL, spec=model((NONE, NONE), "float32"), profiles={"x32": Coding(dropped=1.0)})
    bundle = recipe.bundle()
    block = Text(recipe.spec, 9, 0).block()
    decoded = round_trip(block, bundle.coder("x32")).to_tensors()
    for side in SIDES:
        means = np.stack([basis.mean.reshape(2, 1, -1) for basis in getattr(bundle, side)])
        assert np.array_equal(decoded[side][:, :, 4:], np.broadcast_to(means, decoded[side][:, :, 4:].shape))


def test_a_centroid_moves_what_is_decoded_towards_the_mean_and_changes_no_symbol() -> None:
    block = Text(SMALL.spec, 40).block()
    frames, errors = [], []
    for centroid in (0.0, 0.5):
        coder = replace(X32, centroid=centroid)
        frames.append(codec.encode(BLOCK_ID, block, coder=coder))
        decoded = codec.decode(BLOCK_ID, frames[-1], PLENTY, coder).to_tensors()["values"].astype(np.float64)
        means = np.stack([basis.mean.reshape(2, 1, -1) for basis in BUNDLE.values])
        errors.append(float(np.square(decoded - means).sum()))
    assert frames[0] == frames[1]
    assert errors[1] < errors[0]


def test_a_smaller_dead_zone_costs_fewer_bytes_and_more_error() -> None:
    block = Text(SMALL.spec, 200).block()
    sizes, errors = [], []
    for dead_zone in (0.5, 0.2):
        coder = replace(X32, dead_zone=dead_zone)
        sizes.append(len(codec.encode(BLOCK_ID, block, coder=coder)))
        rows = round_trip(block, coder).to_tensors()["values"].astype(np.float64)
        errors.append(float(np.square(rows - block.to_tensors()["values"].astype(np.float64)).sum()))
    assert sizes[1] < sizes[0]
    assert errors[1] > errors[0]


def test_smaller_steps_cost_more_bytes_and_less_error() -> None:
    block = Text(SMALL.spec, 200).block()
    sizes, errors = [], []
    for step in (0.01, 0.1, 1.0):
        coder = replace(SMALL, profiles={"x8": Coding(step, 0.0)}).bundle().coder("x8")
        sizes.append(len(codec.encode(BLOCK_ID, block, coder=coder)))
        rows = round_trip(block, coder).to_tensors()["keys"].astype(np.float64)
        errors.append(float(np.abs(rows - block.to_tensors()["keys"].astype(np.float64)).max()))
    assert sizes[0] > sizes[1] > sizes[2]
    assert errors[0] < errors[1] < errors[2]


def test_coding_is_deterministic_and_leaves_the_block_alone() -> None:
    block, copy = (Text(SMALL.spec, 20, 2, opaque=True).block() for _ in range(2))
    assert codec.encode(BLOCK_ID, block, coder=X8) == codec.encode(BLOCK_ID, block, coder=X8)
    assert same_tensors(block.to_tensors(), copy.to_tensors())


def test_the_frame_names_its_profile_and_bundle() -> None:
    frame = codec.encode(BLOCK_ID, Text(SMALL.spec).block(), coder=X8, lineage=FidelityKind.CODED)
    header = container.unpack(frame, PLENTY)[0]
    assert header.fidelity == X8.fidelity
    assert (header.fidelity.kind, header.fidelity.profile) == (FidelityKind.CODED, "x8")
    assert header.fidelity.bundle_id == BUNDLE.bundle_id
    assert header.lineage == FidelityKind.CODED


def test_the_frame_counts_the_bytes_of_its_source() -> None:
    """So that the caller's bound holds for CODED frames as for others."""
    block = Text(SMALL.spec, 20, 2, opaque=True).block()
    frame = codec.encode(BLOCK_ID, block, coder=X8)
    assert codec.decode(BLOCK_ID, frame, block.nbytes, X8).nbytes == block.nbytes
    with pytest.raises(CorruptFrameError, match="source bytes"):
        codec.decode(BLOCK_ID, frame, block.nbytes - 1, X8)


# ---- what cannot be coded


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", SIDES)
def test_numbers_that_are_not_finite_cannot_be_coded(side: str, bad: float) -> None:
    block = Text(SMALL.spec).block()
    getattr(block, side)[5, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        codec.encode(BLOCK_ID, block, coder=X8)
    assert codec.encode(BLOCK_ID, block)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("magnitude", [1e12, 1e30, 3e38])
def test_numbers_too_large_for_the_steps_cannot_be_coded(name: str, magnitude: float) -> None:
    recipe = replace(SMALL, spec=model((HALVES, PARTIAL), name))
    block = Text(recipe.spec).block()
    block.values[:] = magnitude  # 3e38 is beyond float32 once it is projected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"finite|too small"):
            codec.encode(BLOCK_ID, block, coder=recipe.bundle().coder("x8"))


OTHER_MODELS = {
    "layers": model((HALVES, PARTIAL, NONE)),
    "heads": model((HALVES, PARTIAL), n_heads=3),
    "key dim": model((HALVES, PARTIAL), key_dim=10),
    "value dim": model((HALVES, PARTIAL), value_dim=8),
    "dtype": model((HALVES, PARTIAL), "bfloat16"),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_block_of_another_model_cannot_be_coded(other: str) -> None:
    with pytest.raises(ValueError, match="expected the model's"):
        codec.encode(BLOCK_ID, Text(OTHER_MODELS[other]).block(), coder=X8)


def test_a_block_without_dense_layers_cannot_be_coded() -> None:
    block = KVBlock.dense({"state": np.zeros(3, np.int8)}, 6, 8)
    with pytest.raises(ValueError, match="opaque"):
        codec.encode(BLOCK_ID, block, coder=X8)


def test_rotary_positions_that_cannot_be_removed_cannot_be_coded() -> None:
    spec = model((HALVES, RopeSpec(8, 1e4, scaling_json='{"type":"dynamic"}')))
    with pytest.raises(UnsupportedRopeError, match="dynamic"):
        codec.encode(BLOCK_ID, Text(spec).block(), coder=replace(X8, spec=spec))


@pytest.mark.parametrize("other", [None, "profile", "bundle"])
def test_a_frame_is_unsupported_without_its_own_profile_and_bundle(other: str | None) -> None:
    frame = codec.encode(BLOCK_ID, Text(SMALL.spec).block(), coder=X8)
    coders = {None: None, "profile": X32, "bundle": replace(SMALL, seed=1).bundle().coder("x8")}
    with pytest.raises(UnsupportedFrameError, match=f"'x8' of bundle {BUNDLE.bundle_id.hex()[:16]}"):
        codec.decode(BLOCK_ID, frame, PLENTY, coders[other])


def test_an_exact_frame_is_read_whatever_coder_is_given() -> None:
    block = Text(SMALL.spec).block()
    decoded = codec.decode(BLOCK_ID, codec.encode(BLOCK_ID, block), PLENTY, X8)
    assert same_tensors(decoded.to_tensors(), block.to_tensors())


# ---- the same everywhere

PROGRAM = """
import json, os
from golden import coded, generate
from codec.test_golden import CODED, bundle_of, frame_of
from kvcached.codec import rans
from kvcached.codec.bundle import Bundle
assert hasattr(rans.compiled().decode, "py_func") == (os.environ.get("NUMBA_DISABLE_JIT") != "1")
found = {n: coded.symbols_entry(coded.symbols_of(frame_of(f"coded/{n}"), Bundle.unpack(bundle_of(e))))
         for n, e in CODED.items()}
assert found == {n: e["symbols"] for n, e in CODED.items()}, found
print(len(found))
"""


@pytest.mark.parametrize(
    "environment",
    [{"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}, {"NUMBA_DISABLE_JIT": "1"}],
    ids=str,
)
def test_symbols_are_the_same_in_every_process_with_any_threads_and_without_compiler(environment: Any) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 8


def test_plain_python_and_compiled_loops_make_the_same_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Text(SMALL.spec, 20, 2).block()
    compiled = codec.encode(BLOCK_ID, block, coder=X8)
    decoded = codec.decode(BLOCK_ID, compiled, PLENTY, X8)
    monkeypatch.setattr(entropy.rans, "compiled", lambda: entropy.rans.PLAIN)
    assert codec.encode(BLOCK_ID, block, coder=X8) == compiled
    assert same_tensors(codec.decode(BLOCK_ID, compiled, PLENTY, X8).to_tensors(), decoded.to_tensors())


# ---- memory


def large() -> tuple[KVBlock, Coder]:
    """Four layers of 2 x 64 dims, 512 tokens: 1 MiB."""
    spec = model((HALVES,) * 4, key_dim=64, value_dim=64)
    spec = ModelSpec(spec.fingerprint, spec.kv_dtype, 512, spec.layers)
    bundle = Recipe(spec, 4, profiles={"x8": Coding(0.1, 0.0)}).bundle()
    return Text(spec, 512).block(), bundle.coder("x8")


def test_decoding_takes_a_small_multiple_of_the_block() -> None:
    block, coder = large()
    frame = codec.encode(BLOCK_ID, block, coder=coder)
    assert block.nbytes == 1 << 20
    codec.decode(BLOCK_ID, frame, block.nbytes, coder)
    with allocating_at_most(10 * block.nbytes):
        codec.decode(BLOCK_ID, frame, block.nbytes, coder)
