"""The NumPy forward is mlx-lm's model, on any cache it is given."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from reference_model import BOS, DATA, REFERENCE_MODEL, Cache, ReferenceModel, log_softmax, windows

pytestmark = pytest.mark.slow  # runs the reference model, or fits to much data

MODEL = ReferenceModel()
N_TOKENS = 300


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return windows("heldout", 3, N_TOKENS)[1]


def test_logits_keys_and_values_are_those_of_mlx_in_float32(text: np.ndarray) -> None:
    model, _ = load(str(REFERENCE_MODEL))
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    logits = np.array(model(mx.array(text[None]), cache=cache))[0]
    trace = MODEL.run(text)
    assert np.abs(trace.logits - logits).max() < 2e-3
    for layer, held in enumerate(cache):
        keys, values = (np.array(array)[0, :, :N_TOKENS] for array in (held.keys, held.values))
        assert np.abs(trace.added.keys[layer] - keys).max() < 2e-3
        assert np.abs(trace.added.values[layer] - values).max() < 2e-3


def test_predictions_are_those_of_mlx_as_it_runs(text: np.ndarray) -> None:
    model, _ = load(str(REFERENCE_MODEL))
    p = log_softmax(np.array(model(mx.array(text[None])).astype(mx.float32))[0])
    q = log_softmax(MODEL.run(text).logits)
    assert (np.exp(p) * (p - q)).sum(-1).mean() < 1e-4


@given(st.integers(1, N_TOKENS - 1))
@settings(max_examples=10)
def test_tokens_on_a_given_cache_are_predicted_as_in_one_run(n_cached: int) -> None:
    text = windows("heldout", 3, N_TOKENS)[1]
    whole = MODEL.run(text)
    rest = MODEL.run(text[n_cached:], whole.added.first(n_cached))
    assert np.abs(rest.logits - whole.logits[n_cached:]).max() < 2e-3
    assert np.abs(rest.attention - whole.attention[:, n_cached:]).max() < 2e-3


def test_no_token_sees_what_comes_after_it(text: np.ndarray) -> None:
    changed = text.copy()
    changed[200:] = 7
    assert np.abs(MODEL.run(changed).logits[:200] - MODEL.run(text).logits[:200]).max() < 1e-3


def test_the_keys_of_the_cache_matter(text: np.ndarray) -> None:
    cache = MODEL.run(text[:200]).added
    cache.keys[:, :, 100:150] = 0
    assert np.abs(MODEL.run(text[200:], cache).logits - MODEL.run(text).logits[200:]).max() > 0.1


def test_attention_is_the_mix_of_values_through_the_output_projection(text: np.ndarray) -> None:
    trace = MODEL.run(text)
    layer, at = 2, 150
    heads = []
    for head, query in enumerate(trace.queries[layer, :, at]):
        kv_head = head // (MODEL.n_query_heads // MODEL.n_kv_heads)
        scores = trace.added.keys[layer, kv_head, : at + 1] @ query / np.sqrt(MODEL.head_dim)
        weights = np.exp(scores - scores.max())
        heads.append(weights @ trace.added.values[layer, kv_head, : at + 1] / weights.sum())
    attended = MODEL.output_projection(layer) @ np.concatenate(heads)
    assert np.abs(attended - trace.attention[layer, at]).max() < 1e-3


@given(st.integers(0, 2000), st.integers(0, 2**32 - 1))
def test_undoing_positions_is_the_inverse_of_applying_them(first: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((2, 5, MODEL.head_dim)).astype(np.float32)
    positions = first + np.arange(5)
    back = MODEL.rotate(MODEL.rotate(rows, positions), -positions)
    assert np.abs(back - rows).max() < 1e-5


def test_windows_begin_with_bos_and_share_no_stretch_of_the_text() -> None:
    found = windows("heldout", 24, 2049)
    assert {int(window[0]) for window in found} == {BOS}
    assert {len(window) for window in found} == {2049}
    assert len({window[1:].tobytes() for window in found}) == 24


def test_no_text_is_both_calibration_and_held_out() -> None:
    calibration, held_out = (
        [json.loads(line)["text"] for line in (DATA / f"text/{part}.jsonl").read_text().splitlines()]
        for part in ("calibration", "heldout")
    )
    seen = "\n".join(calibration)
    for text in held_out:
        assert text[len(text) // 2 :][:200] not in seen


def test_more_windows_than_there_is_text_are_refused() -> None:
    with pytest.raises(ValueError, match="24 windows"):
        windows("heldout", 25, 2049)


def test_a_bias_of_log_r_is_r_copies_of_each_token_through_the_whole_model() -> None:
    token_ids = windows("heldout", 1, 96)[0]
    prefix = MODEL.run(token_ids[:64]).added
    copies = np.random.default_rng(0).integers(1, 4, 64)
    copied = Cache(prefix.keys.repeat(copies, 2), prefix.values.repeat(copies, 2))
    bias = np.broadcast_to(np.log(copies).astype(np.float32), prefix.keys.shape[:3])
    biased = Cache(prefix.keys, prefix.values, bias.copy())
    # Both at the same positions: the tokens after a compacted prefix stand where they would without it.
    expected = MODEL.run(token_ids[64:], copied, first_position=64).logits
    found = MODEL.run(token_ids[64:], biased).logits
    np.testing.assert_allclose(log_softmax(found), log_softmax(expected), atol=1e-5)
    assert np.abs(found - MODEL.run(token_ids[64:], prefix).logits).max() > 0.01


def test_a_token_with_a_bias_of_minus_infinity_is_not_there() -> None:
    token_ids = windows("heldout", 1, 96)[0]
    prefix = MODEL.run(token_ids[:64]).added
    bias = np.zeros(prefix.keys.shape[:3], np.float32)
    bias[:, :, 10:20] = -np.inf
    rest = np.r_[:10, 20:64]
    without = Cache(prefix.keys[:, :, rest], prefix.values[:, :, rest])
    expected = MODEL.run(token_ids[64:], without, first_position=64).logits
    found = MODEL.run(token_ids[64:], Cache(prefix.keys, prefix.values, bias)).logits
    np.testing.assert_allclose(log_softmax(found), log_softmax(expected), atol=1e-5)
