"""What a profile costs: measured on what comes back, and on nothing else."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_models import build, save

from kvcached_client import Block, DaemonError, Fidelity, FidelityKind, chain_hashes
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import fresh_cache, model_spec
from kvcached_mlx.loss import Course, measure, n_tokens_to_compute
from kvcached_mlx.road import Engine, Wish
from kvcached_mlx.texts import Window

BLOCK = 16
COURSE = Course(prefix=4 * BLOCK, continued=80, recomputed=20)
RNG = np.random.default_rng(5)
WINDOWS = [Window(d, 0, [int(t) for t in RNG.integers(0, 64, COURSE.length)]) for d in (3, 3, 7)]
BUNDLE = b"b" * 32


class Memory:
    """A daemon that keeps blocks as `change` makes them."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray] = lambda a: a) -> None:
        self._change = change
        self.held: dict[bytes, Block] = {}
        self.stored_as: list[tuple[str, bytes]] = []
        self.fidelity = FidelityKind.CODED

    def chain(self, token_ids: Sequence[int]) -> list[bytes]:
        return chain_hashes(token_ids, BLOCK)

    def delete(self, hashes: Sequence[bytes]) -> None:
        for block_hash in hashes:
            self.held.pop(block_hash, None)

    def put(self, blocks: Sequence[Block], *, store_as: str, store_as_bundle: bytes) -> list[pb.PutResult]:
        self.stored_as.append((store_as, store_as_bundle))
        for block in blocks:
            tensors = {name: self._change(array) for name, array in block.tensors.items()}
            fidelity = Fidelity(self.fidelity, store_as, bundle_id=store_as_bundle)
            self.held[block.block_hash] = replace(block, tensors=tensors, fidelity=fidelity)
        return [pb.PutResult(code="OK", source_bytes=800, stored_bytes=100) for _ in blocks]

    def get(self, hashes: Sequence[bytes], *, floor: FidelityKind) -> Iterator[Block | None]:
        assert floor == FidelityKind.CODED
        return (self.held.get(block_hash) for block_hash in hashes)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    model, config = build("llama", dtype=mx.float32)
    for layer in model.layers:  # or all predictions are alike, whatever the cache
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * 8
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    return Engine(model, None, spec, lambda: fresh_cache(model))


def noisy(array: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(array.size).standard_normal(array.shape).astype(array.dtype)
    return array + array.dtype.type(0.5 * array.std()) * noise


def run(engine: Engine, memory: Any, profiles: Sequence[str] = ("x8",)) -> dict[str, pb.Measured]:
    losses = measure(engine, memory, BUNDLE, list(map(Wish, profiles)), WINDOWS, COURSE)
    return {name: loss.measured() for name, loss in zip(profiles, losses, strict=True)}


def test_what_comes_back_as_it_was_costs_nothing(engine: Engine) -> None:
    measured = run(engine, memory := Memory())["x8"]
    assert [measured.kl, measured.kl_low, measured.kl_high] == [0, 0, 0]
    assert measured.perplexity_delta == measured.perplexity_delta_low == measured.perplexity_delta_high == 0
    assert (measured.n_tokens, measured.n_documents) == (3 * 80, 2)
    assert measured.compression == 8
    assert measured.bits_per_value == 8 * 100 / (2 * 4 * 2 * BLOCK * 16)
    assert measured.engine.startswith("mlx-lm 0.3")
    assert memory.stored_as == [("x8", BUNDLE)] * 3
    assert not memory.held


def test_loss_is_that_of_the_next_tokens_after_the_prefix(engine: Engine) -> None:
    """Against a plain reckoning: the damaged cache made by hand, one token fed at a time."""
    memory = Memory(noisy)
    measured = run(engine, memory)["x8"]
    kl, surprise = [], []
    for window in WINDOWS:
        exact, found = (_next_tokens(engine, window.token_ids, change) for change in (lambda a: a, noisy))
        kl.append((np.exp(exact) * (exact - found)).sum(-1))
        at = np.arange(80), window.token_ids[COURSE.prefix + 1 :]
        surprise.append(exact[at] - found[at])
    assert measured.kl == pytest.approx(_of_stretches(kl), rel=1e-3)
    assert measured.perplexity_delta == pytest.approx(100 * np.expm1(_of_stretches(surprise)), rel=1e-2)
    assert 0 < measured.kl_low < measured.kl < measured.kl_high
    assert measured.perplexity_delta_low < measured.perplexity_delta < measured.perplexity_delta_high


def _next_tokens(engine: Engine, token_ids: list[int], change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Logarithms of probabilities after each position from the end of the prefix on."""
    cache = fresh_cache(engine.model)
    engine.model(mx.array([token_ids[: COURSE.prefix]]), cache=cache)
    for start in range(0, COURSE.prefix, BLOCK):
        for name in ("keys", "values"):  # all layers of a block at once, as they are stored
            arrays = [getattr(entry, name)[0, :, start : start + BLOCK] for entry in cache]
            changed = change(np.stack([np.array(array) for array in arrays]))
            for entry, array in zip(cache, changed, strict=True):
                getattr(entry, name)[0, :, start : start + BLOCK] = mx.array(array)
    for entry in cache:
        entry.trim(COURSE.recomputed)
    fed = token_ids[COURSE.prefix - COURSE.recomputed : -1]
    rows = [np.array(engine.model(mx.array([[token]]), cache=cache))[0, 0] for token in fed]
    logits = np.stack(rows[-80:]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _of_stretches(figures: list[np.ndarray]) -> float:
    return float(np.mean([part.mean() for figure in figures for part in (figure[:64], figure[64:])]))


def test_more_damage_costs_more(engine: Engine) -> None:
    def rough(array: np.ndarray) -> np.ndarray:
        return noisy(noisy(noisy(array)))

    assert run(engine, Memory(rough))["x8"].kl > 2 * run(engine, Memory(noisy))["x8"].kl


def test_the_same_run_gives_the_same_figures(engine: Engine) -> None:
    assert run(engine, Memory(noisy)) == run(engine, Memory(noisy))


def test_blocks_do_not_stay_behind_whatever_goes_wrong(engine: Engine) -> None:
    memory = Memory()
    memory.fidelity = FidelityKind.EXACT
    with pytest.raises(DaemonError, match="no block was stored as x8"):
        run(engine, memory)
    assert not memory.held

    class Forgetful(Memory):
        def get(self, hashes: Sequence[bytes], *, floor: FidelityKind) -> Iterator[Block | None]:
            return iter([None, *list(super().get(hashes, floor=floor))[1:]])

    with pytest.raises(DaemonError, match="of 4 blocks stored as x8, 3 came back"):
        run(engine, forgetful := Forgetful())
    assert not forgetful.held


def test_a_model_with_state_is_measured_from_the_block_that_has_it(tmp_path: Path) -> None:
    model, config = build("gemma3_text")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    engine = Engine(model, None, spec, lambda: fresh_cache(model))
    measured = run(engine, Memory())["x8"]
    assert (measured.kl, measured.n_tokens) == (0, 3 * 80)


def test_a_refused_block_is_an_error_that_says_why(engine: Engine) -> None:
    class Full(Memory):
        def put(self, blocks: Sequence[Block], **_: Any) -> list[pb.PutResult]:
            return [pb.PutResult(code="RESOURCE_EXHAUSTED", message="the disk is full") for _ in blocks]

    with pytest.raises(DaemonError, match="RESOURCE_EXHAUSTED: a block was not stored as x8: the disk is full"):
        run(engine, Full())


def test_what_is_to_be_computed_is_known_beforehand(engine: Engine) -> None:
    told: list[int] = []
    measure(engine, Memory(), BUNDLE, [Wish("x8"), Wish("x16")], WINDOWS, COURSE, told.append)
    assert sum(told) == n_tokens_to_compute(COURSE, len(WINDOWS), 2)
