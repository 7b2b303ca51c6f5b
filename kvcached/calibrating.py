"""The Calibrate call: pieces of text come in as tensors, their moments stay, and a bundle is fitted to them.

Nothing is kept whole, and nothing is on disk before the bundle is: a stream that ends early, or a daemon that is
killed, leaves nothing. One calibration at a time, for its moments are large. Pieces are received in the call's thread;
the fit, which takes minutes and cannot be interrupted, has one of its own: no call has to wait for it to end.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextlib import ExitStack

import numpy as np
import structlog

from kvcached import border
from kvcached.block import KVBlock, ModelSpec
from kvcached.cache import Cache
from kvcached.calibration import MAX_LAYERS_PER_GROUP, Calibration, Part
from kvcached.codec.bundle import Bundle, group_widths
from kvcached.codec.tables import SIDES
from kvcached.errors import InvalidRequestError, OverloadedError
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb

log = structlog.get_logger()
Requests = Iterator[pb.CalibrateRequest]
_PARTS: dict["pb.CalibrationPart", Part] = {pb.CALIBRATION_PART_FIT: "fit", pb.CALIBRATION_PART_TUNE: "tune"}
_FIT_SQUARES = 12
_THREAD = "calibration"
_WANTED_SECONDS = 0.5  # between two looks at whether the caller is still there


class Calibrating:
    """The Calibrate calls of one daemon. Thread-safe. calibration: what accumulates and fits, for tests."""

    def __init__(self, cache: Cache, calibration: Callable[..., Calibration] = Calibration) -> None:
        self._cache, self._calibration = cache, calibration
        self._free = threading.Lock()

    def fitted(self, requests: Requests, is_wanted: Callable[[], bool]) -> Bundle:
        """The bundle of a Calibrate stream, not installed yet.

        Raises:
            InvalidRequestError: the stream contradicts itself or the model, or there is too little text in it.
            PreconditionError, UnsupportedRopeError: a model that is unknown, or that cannot be calibrated.
            OverloadedError: another model is being calibrated.
            CancelledError: the caller has left during the fit.
        """
        start = _start(requests)
        spec = self._cache.model(start.model_id)
        profiles, budgets = border.calibration_profiles(start, spec), border.calibration_budgets(start)
        if not self._free.acquire(blocking=False):
            raise OverloadedError("a model is being calibrated, and only one is at a time: try later")
        with ExitStack() as holding:
            holding.callback(self._free.release)
            _check_memory(spec, start.layers_per_group)
            calibration = self._calibration(spec, start.layers_per_group or None, start.seed)
            self._receive(requests, spec, calibration)
            log.info("fitting", model=spec.name, profiles=list(profiles))
            begun, fit = time.monotonic(), _in_thread(lambda: calibration.fit(profiles, budgets), holding.pop_all())
        while not wait([fit], _WANTED_SECONDS).done and is_wanted():
            pass
        if not is_wanted():
            raise CancelledError
        bundle = fit.result()
        seconds = round(time.monotonic() - begun, 3)
        if bundle.compaction is None:
            log.info("blocks cannot be compacted", model=spec.name, reason=calibration.compaction_problem)
        log.info("calibrated", model=spec.name, bundle=bundle.bundle_id.hex(), fit_seconds=seconds)
        return bundle

    def _receive(self, requests: Requests, spec: ModelSpec, calibration: Calibration) -> None:
        has_metric = False
        for request in requests:
            if request.WhichOneof("part") != "header":
                raise InvalidRequestError(f"expected a header, got {_described(request)}")
            header = request.header
            border.check_piece(header, spec, self._cache.config.max_block_bytes)
            arrays = _arrays(header, requests)
            border.check_piece_values(arrays)
            if "output_metric" not in arrays:
                _add(calibration, header, arrays)
            elif has_metric:
                raise InvalidRequestError("output_metric was expected once, and came twice")
            else:
                has_metric = True
                calibration.set_output_metric(_symmetric(arrays["output_metric"]), arrays.get("head_weights"))


def _start(requests: Requests) -> pb.CalibrateStart:
    first = next(requests, None)
    if first is None or first.WhichOneof("part") != "start":
        raise InvalidRequestError(f"a calibration begins with its start, got {_described(first)}")
    return first.start


def _arrays(header: pb.CalibrateHeader, requests: Requests) -> dict[str, np.ndarray]:
    """The tensors of a piece, whose header was checked."""
    try:
        payload = protocol.read_payload(_data(requests), header.data_bytes)
        return tensors.views(header.tensors, payload)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None


def _data(requests: Requests) -> Iterator[bytes]:
    for request in requests:
        if request.WhichOneof("part") != "data":
            raise InvalidRequestError(f"expected data, got {_described(request)}")
        yield request.data


def _described(request: pb.CalibrateRequest | None) -> str:
    if request is None:
        return "the end of the stream"
    part = request.WhichOneof("part")
    return f"{len(request.data)} bytes of data" if part == "data" else f"a {part}" if part else "an empty message"


def _add(calibration: Calibration, header: pb.CalibrateHeader, arrays: Mapping[str, np.ndarray]) -> None:
    block = KVBlock.dense({side: arrays[side] for side in SIDES}, header.n_tokens, header.first_position)
    calibration.add(block, _PARTS[header.part], arrays.get("queries"), arrays.get("query_positions"))


def _symmetric(metric: np.ndarray) -> np.ndarray:
    """Without the asymmetry of rounding, which the fit would take for a mistake."""
    symmetric: np.ndarray = (metric.astype(np.float64) + metric.swapaxes(-1, -2)) / 2
    return symmetric.astype(np.float32)


def _check_memory(spec: ModelSpec, layers_per_group: int) -> None:
    """Raises InvalidRequestError if a calibration would take more than half of this machine's memory."""
    layers_per_group = layers_per_group or min(MAX_LAYERS_PER_GROUP, len(spec.dense_layers))
    n_bytes, limit = needed_bytes(spec, layers_per_group), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if n_bytes > limit:
        raise InvalidRequestError(
            f"to calibrate groups of {layers_per_group} layers takes {n_bytes} bytes, half of this machine's memory is "
            f"{limit}: choose fewer layers_per_group"
        )


def needed_bytes(spec: ModelSpec, layers_per_group: int) -> int:
    """What a calibration takes in memory, but for its sample of text: about, and rather more.

    Squares of a plane's features in float64: for each plane its moments, and new ones to add or a basis; in the fit of
    one plane, the largest, a dozen more (measured: 12 with 2,048 features).
    """
    squares = [8 * width * width for side in SIDES for width in group_widths(spec, layers_per_group, side)]
    return 2 * sum(squares) + _FIT_SQUARES * max(squares)


def _in_thread(fit: Callable[[], Bundle], holding: ExitStack) -> "Future[Bundle]":
    """Runs a fit, and lets go of what it holds when it is over."""
    future: Future[Bundle] = Future()

    def run() -> None:
        try:
            with holding:
                bundle = fit()
        except BaseException as error:  # noqa: BLE001 - the future carries it to whoever asked
            future.set_exception(error)
        else:
            future.set_result(bundle)

    threading.Thread(target=run, name=_THREAD, daemon=True).start()
    return future


def is_fitting() -> bool:
    """Whether a fit is under way in this process, even one that nobody wants any more."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
