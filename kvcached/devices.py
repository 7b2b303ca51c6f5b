"""What multiplies matrices for the transform: NumPy on the CPU, or mlx on the GPU of a Mac; the faster one, measured.

A GPU is one resource for all workers: its products run one at a time, behind the device's lock. The codec knows
products only, and frames made on either device are read on both: see tests/codec/test_devices.py for how near they are.
"""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import structlog
from jaxtyping import Float32

from kvcached.codec.klt import ON_CPU, Coefficients, Plane, Product

log = structlog.get_logger()
Matrix = Float32[np.ndarray, "_n _m"]
_N_ROWS, _N_FEATURES, _N_COMPONENTS = 256, 4096, 1024  # of a plane that is like those of 7B models
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Device:
    """Makes a product for each coder. seconds: what each device that was measured took for one and the same plane."""

    name: str = "cpu"
    product: Callable[[], Product] = lambda: ON_CPU
    seconds: dict[str, float] = field(default_factory=dict)


CPU = Device()


class MlxProduct:
    """Products by mlx. Holds what bases were multiplied with, in the device's memory, for as long as it lives."""

    def __init__(self, mx: Any, device: Any, lock: threading.Lock) -> None:
        """lock: of the device."""
        self._mx, self._device, self._lock = mx, device, lock
        self._held: dict[int, tuple[Matrix, Any]] = {}  # the matrix too, so that its id is not given to another one

    def project(self, rows: Plane, forward: Matrix) -> Coefficients:
        by_component = self._multiplied(rows, forward, transposed=True)
        return by_component.T

    def reconstruct(self, coefficients: Coefficients, inverse: Matrix) -> Plane:
        return self._multiplied(coefficients, inverse, transposed=False)

    def _multiplied(self, left: Matrix, basis: Matrix, *, transposed: bool) -> Matrix:
        mx = self._mx
        with self._lock, mx.stream(self._device):
            if id(basis) not in self._held:
                self._held[id(basis)] = (basis, mx.array(basis))
            found = mx.array(left) @ self._held[id(basis)][1]
            # Into memory of our own: what mlx computed lies in its, and is read-only to NumPy.
            return np.array(mx.contiguous(found.T if transposed else found))


def choose(setting: str) -> Device:
    """The device of a setting: "cpu"; "gpu"; or "auto", the faster one of what is here."""
    if setting == "cpu":
        return CPU
    if (gpu := _gpu(is_asked_for=setting == "gpu")) is None:
        if setting == "gpu":
            log.warning("there is no GPU that mlx can use: the transform runs on the CPU")
        return CPU
    if setting == "gpu":
        return gpu
    return faster([CPU, gpu])


def faster(devices: Sequence[Device]) -> Device:
    """The device that multiplies a plane the quickest, the first of equals."""
    seconds = {device.name: _seconds(device.product()) for device in devices}
    log.info("devices measured", **{name: f"{1e3 * s:.2f} ms" for name, s in seconds.items()})
    best = min(devices, key=lambda device: seconds[device.name])
    return Device(best.name, best.product, seconds)


def on_mlx(device: Any) -> Device:
    """The device of one of mlx's."""
    import mlx.core as mx  # here, not above: a daemon does without its memory where there is no GPU

    lock = threading.Lock()
    return Device("gpu" if device == mx.gpu else "mlx-cpu", lambda: MlxProduct(mx, device, lock))


def _gpu(*, is_asked_for: bool) -> Device | None:
    """The GPU, if there is one. Looked for where there may be one: to import mlx takes as long as all else at start."""
    if not (is_asked_for or sys.platform == "darwin") or find_spec("mlx") is None:
        return None
    import mlx.core as mx

    return on_mlx(mx.gpu) if mx.is_available(mx.gpu) else None


def _seconds(product: Product) -> float:
    """Median of some rounds of both products, the first one, which uploads and compiles, not counted."""
    rng = np.random.default_rng(0)
    forward = rng.standard_normal((_N_FEATURES, _N_COMPONENTS), np.float32)
    inverse = np.ascontiguousarray(forward.T)
    rows, taken = rng.standard_normal((_N_ROWS, _N_FEATURES), np.float32), []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        product.reconstruct(product.project(rows, forward), inverse)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
