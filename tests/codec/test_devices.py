"""Products on a device of mlx's are NumPy's within a stated tolerance; which device is used is measured, not guessed.

Stated: each number of a product is within 1e-5 of the largest that its row and column could make, and a decoded block
within one unit in the last place of the KV dtype of what the CPU makes of the same frame, where numbers are not tiny.
Here mlx computes on the CPU; on a Mac the same tests run on its GPU too.
"""

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from codec.frames import BLOCK_ID, PLENTY
from codec.recipes import SMALL, Text
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import finfo

from kvcached import codec, devices
from kvcached.block import FidelityKind
from kvcached.codec.klt import ON_CPU, Product
from kvcached.devices import CPU, Device
from kvcached.pool import Pipeline

TOLERANCE = 1e-5
ON_MLX = [
    pytest.param(mx.cpu, id="mlx on the CPU"),
    pytest.param(
        mx.gpu,
        id="mlx on the GPU",
        marks=pytest.mark.skipif(not mx.is_available(mx.gpu), reason="there is no GPU that mlx can use"),
    ),
]
dims = st.integers(1, 40)


@pytest.fixture(params=ON_MLX)
def device(request: pytest.FixtureRequest) -> Device:
    return devices.on_mlx(request.param)


def matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def check_near(found: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    exact = left.astype(np.float64) @ right.astype(np.float64)
    bound = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= TOLERANCE * bound).all()


@settings(max_examples=50)
@given(n_rows=st.integers(0, 40), n_features=dims, n_components=dims, seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("of_mlx", ON_MLX)
def test_products_are_as_near_as_stated(
    of_mlx: object, n_rows: int, n_features: int, n_components: int, seed: int
) -> None:
    rng, product = np.random.default_rng(seed), devices.on_mlx(of_mlx).product()
    forward, inverse = matrix(rng, n_features, n_components), matrix(rng, n_components, n_features)
    rows, coefficients = matrix(rng, n_rows, n_features), matrix(rng, n_rows, n_components)
    for one in (product, ON_CPU):
        projected, reconstructed = one.project(rows, forward), one.reconstruct(coefficients, inverse)
        check_near(projected, rows, forward)
        check_near(reconstructed, coefficients, inverse)
        assert projected.T.flags.c_contiguous
        assert reconstructed.flags.c_contiguous
        assert reconstructed.flags.writeable


def test_what_is_not_finite_stays_so(device: Device) -> None:
    rows = np.zeros((3, 4), np.float32)
    rows[0, 1], rows[1, 2] = np.nan, np.inf
    found = device.product().project(rows, np.ones((4, 2), np.float32))
    assert np.isnan(found[0]).all()
    assert np.isposinf(found[1]).all()
    assert not found[2].any()


def test_threads_that_share_a_product_each_get_their_own_result(device: Device) -> None:
    rng, product = np.random.default_rng(1), device.product()
    forward, inverse = matrix(rng, 96, 40), matrix(rng, 40, 96)
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        own = matrix(np.random.default_rng(seed), 16, 96)
        start.wait()
        for _ in range(20):
            coefficients = product.project(own, forward)
            check_near(coefficients, own, forward)
            check_near(product.reconstruct(coefficients, inverse), coefficients, inverse)

    for _ in range(2):  # threads end, and others come
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))


def test_a_basis_is_held_as_long_as_its_product_and_no_longer(device: Device) -> None:
    product: Product | None = device.product()
    forward: np.ndarray | None = matrix(np.random.default_rng(2), 8, 8)
    alive = weakref.ref(forward)
    assert product is not None
    assert forward is not None
    product.project(np.ones((1, 8), np.float32), forward)
    forward = None
    gc.collect()
    assert alive() is not None
    product = None
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("first_position", [0, 64])
def test_frames_of_either_device_are_read_on_both(device: Device, first_position: int) -> None:
    block = Text(SMALL.spec, 24, first_position, seed=3).block()
    cpu = SMALL.bundle().coder("x8")
    other = replace(cpu, product=device.product())
    for encoder in (cpu, other):
        frame = codec.encode(BLOCK_ID, block, coder=encoder)
        ours, theirs = (codec.decode(BLOCK_ID, frame, PLENTY, decoder) for decoder in (cpu, other))
        for expected, found in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            unit = float(finfo(expected.dtype).eps)
            largest = np.abs(expected.astype(np.float64)).max()
            apart = np.abs(expected.astype(np.float64) - found.astype(np.float64))
            assert (apart <= unit * np.abs(expected.astype(np.float64)) + TOLERANCE * largest).all()


def test_a_pipeline_codes_on_its_device_with_a_product_for_each_coder() -> None:
    bundle, made = SMALL.bundle(), []

    def product() -> Product:
        made.append(devices.on_mlx(mx.cpu).product())
        return made[-1]

    pipeline = Pipeline(SMALL.spec, lambda _: bundle, Device("made", product))
    coders = [pipeline.coder(bundle.bundle_id, profile) for profile in ("x8", "x32", "x8")]
    assert [coder.product for coder in coders] == [made[0], made[1], made[0]]
    assert {coder.fidelity.kind for coder in coders} == {FidelityKind.CODED}


# ---- which one


class Counted:
    """A product that counts its calls, and takes as long as it is told."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.n_calls = wait, 0

    def project(self, rows: np.ndarray, forward: np.ndarray) -> np.ndarray:
        self.n_calls += 1
        self.wait()
        return np.zeros((forward.shape[1], len(rows)), np.float32).T

    def reconstruct(self, coefficients: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        return np.zeros((len(coefficients), inverse.shape[1]), np.float32)


def test_the_faster_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def takes(seconds: float) -> Callable[[], None]:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    slow, fast = Counted(takes(3.0)), Counted(takes(2.0))
    for order in ([("slow", slow), ("fast", fast)], [("fast", fast), ("slow", slow)]):
        chosen = devices.faster([Device(name, lambda product=product: product) for name, product in order])  # type: ignore[misc]
        assert chosen.name == "fast"
        assert chosen.product() is fast
        assert chosen.seconds == {"slow": 3.0, "fast": 2.0}
    assert slow.n_calls == fast.n_calls > 2


def test_without_a_gpu_the_cpu_is_taken_and_who_asked_for_one_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "_gpu", lambda **_: None)
    assert [devices.choose(setting) for setting in ("auto", "cpu")] == [CPU, CPU]
    assert "no GPU" not in capsys.readouterr().out
    assert devices.choose("gpu") is CPU
    assert "there is no GPU that mlx can use" in capsys.readouterr().out


def test_a_gpu_that_is_asked_for_is_not_measured_and_one_that_may_be_used_is(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Counted(lambda: None)
    gpu = Device("gpu", lambda: product)
    monkeypatch.setattr(devices, "_gpu", lambda **_: gpu)
    assert devices.choose("cpu") is CPU
    assert devices.choose("gpu") is gpu
    assert not product.n_calls
    assert devices.choose("auto").name == "gpu"
    assert product.n_calls


def test_where_mlx_is_not_installed_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda _name: None)
    assert [devices.choose(setting) for setting in ("auto", "gpu")] == [CPU, CPU]


def test_where_there_is_no_metal_a_gpu_is_looked_for_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices, "find_spec", looked.append)
    assert [devices.choose(setting) for setting in ("auto", "cpu")] == [CPU, CPU]
    assert not looked
    devices.choose("gpu")
    assert looked == ["mlx"]
