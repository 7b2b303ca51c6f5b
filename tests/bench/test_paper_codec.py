"""The KVTC paper's pipeline is a fair opponent: its program is exact, and synthetic sources give the known figures."""

from collections.abc import Callable, Iterator
from itertools import product
from math import erf, sqrt

import numpy as np
import pytest
from calibration import Calibration, calibrate
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_codec import TYPES, Allocations, Group, PaperTables, code, error_table, quantise
from reference_model import ReferenceModel, windows

pytestmark = pytest.mark.slow  # runs the reference model, or fits to much data

SIZES, GRAIN = (16, 64, 256, 1024), 16


def spent(groups: list[Group]) -> int:
    return sum(group.bits for group in groups)


def decaying(n_tokens: int, n_components: int, seed: int) -> np.ndarray:
    scales = np.exp(-np.arange(n_components) / 4)
    return (np.random.default_rng(seed).standard_normal((n_tokens, n_components)) * scales).astype(np.float32)


def partitions(n: int, sizes: tuple[int, ...]) -> Iterator[list[int]]:
    """Every way to cut n components into groups."""
    if not n:
        yield []
    for size in sizes:
        if size <= n:
            yield from ([size, *rest] for rest in partitions(n - size, sizes))


@given(st.integers(0, 2**32 - 1), st.integers(0, 400))
@settings(max_examples=25)
def test_no_allocation_within_the_budget_errs_less(seed: int, budget: int) -> None:
    table = error_table(decaying(20, 6, seed), sizes=(1, 2, 4))
    errors = table.errors

    def cost(groups: list[Group]) -> float:
        return sum(errors[g.start, table.sizes.index(g.size), TYPES.index(g.type)] for g in groups)

    best = np.inf
    for cut in partitions(6, (1, 2, 4)):
        starts = np.cumsum([0, *cut[:-1]])
        for kinds in product(TYPES, repeat=len(cut)):
            groups = [Group(int(s), size, kind) for s, size, kind in zip(starts, cut, kinds, strict=True)]
            if spent(groups) <= budget:
                best = min(best, cost(groups))
    found = Allocations(table, 400).within(budget)
    assert spent(found) <= budget
    assert [g.start for g in found] == np.cumsum([0, *(g.size for g in found)])[:-1].tolist()
    assert cost(found) == pytest.approx(best)


def test_bits_vary_and_error_falls_when_the_budget_grows() -> None:
    coefficients = decaying(100, 64, seed=1)
    allocations = Allocations(error_table(coefficients), 512)
    errors = []
    for budget in (0, 48, 96, 192, 384, 512):
        groups = allocations.within(budget)
        assert spent(groups) <= budget
        errors.append(float(((code(coefficients, groups)[0] - coefficients) ** 2).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100
    assert len({group.type for group in allocations.within(192)}) > 1


@pytest.mark.parametrize(("kind", "bound"), [("int2", 1 / 6), ("int4", 1 / 30), ("fp8", 1 / 30)])
def test_codes_come_back_within_half_a_step(kind: str, bound: float) -> None:
    groups = np.random.default_rng(2).standard_normal((50, 3, 16)).astype(np.float32)
    span = groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)
    assert (np.abs(quantise(groups, kind).back - groups) / span).max() < bound * 1.01 + 1e-3


def test_the_bytes_are_those_of_codes_and_parameters() -> None:
    rows = np.random.default_rng(3).standard_normal((64, 32)).astype(np.float32)
    _, n_bytes = code(rows, [Group(0, 16, "int4"), Group(16, 16, "int2")])
    raw = 64 * (16 * 4 + 16 * 2 + 2 * 32) // 8
    assert 0.8 * raw < n_bytes <= raw
    assert code(rows, [Group(0, 32, "none")])[1] == 0


# --- shared/design/background/papers.md, 5.3: against ideal entropy-coded uniform steps ---


class Source:
    """A unit source: draws, distribution function and partial means, from which ideal codes and centroids follow."""

    def __init__(self, name: str) -> None:
        b = sqrt(0.5)
        grid = np.linspace(-12, 12, 1 << 16)
        normal = np.array([0.5 * (1 + erf(x / sqrt(2))) for x in grid])
        self.draw: Callable[..., np.ndarray]
        if name == "gauss":
            self.draw = lambda rng, shape: rng.standard_normal(shape)
            self.cdf = lambda x: np.interp(x, grid, normal)
            self.partial_mean = lambda x: -np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
        else:
            self.draw = lambda rng, shape: rng.laplace(0, b, shape)
            self.cdf = lambda x: 0.5 + np.sign(x) * 0.5 * -np.expm1(-np.abs(x) / b)
            self.partial_mean = lambda x: -0.5 * np.exp(-np.abs(x) / b) * (np.abs(x) + b)

    def uniform(self, rows: np.ndarray, scales: np.ndarray, step: float) -> tuple[np.ndarray, float]:
        """Rows there and back by one plain-rounded step with centroids, and ideal bits per token (16 for a gain)."""
        symbols, steps = np.rint(rows / step), step / scales
        low, high = (symbols - 0.5) * steps, (symbols + 0.5) * steps
        probability = np.maximum(self.cdf(high) - self.cdf(low), 1e-12)
        back = (self.partial_mean(high) - self.partial_mean(low)) / probability * scales
        return np.where(probability > 1e-9, back, symbols * step), -np.log2(probability).sum() / len(rows) + 16


def relative(back: np.ndarray, rows: np.ndarray) -> float:
    return float(np.sqrt(((back - rows) ** 2).sum() / (rows**2).sum()))


@pytest.mark.parametrize(
    ("name", "gain", "ratios_after_deflate"), [("gauss", 1.3, (9.2, 18.3, 35.6)), ("laplace", 1.6, (9.4, 18.4, 36.6))]
)
def test_the_pipeline_gives_the_known_figures_on_synthetic_sources(
    name: str, gain: float, ratios_after_deflate: tuple[float, ...]
) -> None:
    n_tokens, n_components = 32, 16384
    source = Source(name)
    scales = (np.arange(n_components) + 30.0) ** -0.8
    rows = (source.draw(np.random.default_rng(0), (n_tokens, n_components)) * scales).astype(np.float32)
    allocations = Allocations(error_table(rows, SIZES, GRAIN), 2 * n_components)
    for ratio, after_deflate in zip((8, 16, 32), ratios_after_deflate, strict=True):
        back, n_bytes = code(rows, allocations.within(16 * n_components / ratio))
        theirs = 8 * n_bytes / n_tokens
        assert 16 * n_components / theirs == pytest.approx(after_deflate, rel=0.05)
        low, high = 1e-4, 1.0
        for _ in range(10):  # to within a thousandth in log step
            step = sqrt(low * high)
            tried, ours = source.uniform(rows, scales, step)
            low, high = (step, high) if relative(tried, rows) < relative(back, rows) else (low, step)
        assert theirs / ours == pytest.approx(gain, rel=0.1)


# --- on the reference model ---


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(ReferenceModel(), n_windows=4, n_tokens=512)


def test_sinks_of_the_first_block_are_exact_and_those_of_no_other(calibration: Calibration) -> None:
    added = calibration.model.run(windows("heldout", 1, 128)[0]).added
    keys, values = added.keys.astype(np.float16), added.values.astype(np.float16)
    codec = PaperTables(calibration, 6).codec(16)
    first, later = codec(keys, values, 0), codec(keys, values, 256)
    assert np.array_equal(first.keys[:, :, :4], keys[:, :, :4])
    assert np.array_equal(first.values[:, :, :4], values[:, :, :4])
    assert not np.array_equal(later.keys[:, :, :4], keys[:, :, :4])
    assert first.bits == first.paper_bits + 16 * 4 * 2 * 768
    assert later.bits == later.paper_bits


@pytest.mark.parametrize("layers_per_group", [1, 3, 6])
def test_ratios_are_met_and_error_rises_with_them(layers_per_group: int, calibration: Calibration) -> None:
    added = calibration.model.run(windows("heldout", 1, 512)[0]).added
    keys, values = (rows[:, :, 256:].astype(np.float16) for rows in (added.keys, added.values))
    tables = PaperTables(calibration, layers_per_group)
    errors = []
    for ratio in (3, 8, 16):
        coded = tables.codec(ratio)(keys, values, 256)
        assert 16 * (keys.size + values.size) / coded.bits >= ratio
        errors.append(float(((coded.keys - keys).astype(np.float32) ** 2).mean()))
    assert errors == sorted(errors)
    assert errors[0] < 0.02 * float((keys.astype(np.float32) ** 2).mean())
