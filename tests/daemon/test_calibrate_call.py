"""Calibrate over a real socket: text becomes a bundle, and whoever is cut off leaves nothing."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from bundles import low_rank_chain, low_rank_tensors
from support import DaemonProcess, tiny_spec, wait_until

from kvcached.codec.bundle import PROFILES
from kvcached_client import Connection, DaemonError, FidelityKind, LayerSpec, ModelSpec, RopeSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import METHODS
from kvcached_client.tensors import calibrate_requests

SPEC = tiny_spec(weights="calibrated", block_size=256, n_layers=4)
# Of 1,024 features in a group, whose bases take a moment to fit.
WIDE = replace(SPEC, layers=(LayerSpec(n_query_heads=4, n_kv_heads=4, key_dim=64, value_dim=64),) * 4)
N_FIT, N_TUNE = 10, 2  # blocks
Sample = tuple[pb.CalibrateHeader, dict[str, np.ndarray]]


def samples(spec: ModelSpec, n_fit: int = N_FIT, n_tune: int = N_TUNE) -> Iterator[Sample]:
    """Low-rank text, some of it with queries, and the metric of the output projections."""
    layer, rng = spec.dense_layers[0], np.random.default_rng(5)
    square = rng.standard_normal((len(spec.dense_layers), layer.n_kv_heads, layer.value_dim, layer.value_dim))
    yield pb.CalibrateHeader(), {"output_metric": (square @ square.swapaxes(-1, -2)).astype(np.float32)}
    n_tokens = spec.block_size
    for n in range(n_fit + n_tune):
        part = pb.CALIBRATION_PART_FIT if n < n_fit else pb.CALIBRATION_PART_TUNE
        tensors = low_rank_tensors(spec, 1000 + n)
        if n % 2 == 0:  # the last tokens' queries, which read the first ones
            shape = (len(spec.dense_layers), layer.n_query_heads, 8, layer.key_dim)
            tensors["queries"] = rng.standard_normal(shape).astype(np.float32)
            tensors["query_positions"] = np.arange(n_tokens - 8, n_tokens, dtype=np.int32)
        yield pb.CalibrateHeader(part=part, n_tokens=n_tokens), tensors


def requests_of(
    spec: ModelSpec, n_fit: int = N_FIT, n_tune: int = N_TUNE, profiles: Sequence[str] = ("x8",), **fields: int
) -> Iterator[pb.CalibrateRequest]:
    start = pb.CalibrateStart(model_id=spec.model_id, profiles=dict.fromkeys(profiles, 0.0), **fields)
    return calibrate_requests(start, samples(spec, n_fit, n_tune))


def calibrate(daemon: DaemonProcess, spec: ModelSpec, requests: Iterator[pb.CalibrateRequest]) -> pb.BundleStatus:
    """Raises DaemonError."""
    with Connection(daemon.target) as connection:
        connection.call("RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto()))
        return connection.calibrate(requests, timeout=120).bundle


def refusal(daemon: DaemonProcess, spec: ModelSpec, requests: Iterator[pb.CalibrateRequest]) -> str:
    with pytest.raises(DaemonError) as refused:
        calibrate(daemon, spec, requests)
    return str(refused.value)


def listed(daemon: DaemonProcess) -> list[pb.BundleStatus]:
    return list(daemon.call("ListBundles", pb.ListBundlesRequest()).bundles)


# ---- what comes of it


def test_text_becomes_a_bundle_that_is_current_once_it_is_measured(daemon: DaemonProcess) -> None:
    bundle = calibrate(daemon, SPEC, requests_of(SPEC, profiles=(), layers_per_group=2))
    assert (bundle.model_id, bundle.layers_per_group, bundle.n_blocks) == (SPEC.model_id, 2, 0)
    assert {p.name: p.target_compression for p in bundle.profiles} == PROFILES
    assert not bundle.current
    assert listed(daemon) == [bundle]
    measured = pb.AttachMeasurementsRequest(bundle_id=bundle.bundle_id, profiles={"x8": pb.Measured(kl=0.01)})
    assert daemon.call("AttachMeasurements", measured).bundle.current
    with daemon.client(SPEC) as client:
        blocks = low_rank_chain(client, range(5 * SPEC.block_size))
        results = client.put(blocks)
        assert [result.fidelity.profile for result in results] == ["x8"] * 5
        assert results[-1].fidelity.bundle_id == bundle.bundle_id
        found = list(client.get([block.block_hash for block in blocks], floor=FidelityKind.CODED))
    for block, again in zip(blocks, found, strict=True):
        assert again is not None
        for name, array in block.tensors.items():
            error = np.linalg.norm(again.tensors[name].astype(float) - array) / np.linalg.norm(array.astype(float))
            assert error < 0.7  # of a block of zeros: 1


def test_the_same_text_and_seed_give_the_same_bundle_in_another_process_too(daemon: DaemonProcess) -> None:
    first = calibrate(daemon, SPEC, requests_of(SPEC, seed=3))
    daemon.restart("--workers", "1")
    assert calibrate(daemon, SPEC, requests_of(SPEC, seed=3)).bundle_id == first.bundle_id
    assert len(listed(daemon)) == 1


def test_text_that_is_not_kept_takes_no_memory(daemon: DaemonProcess) -> None:
    """Four times the text of a calibration takes no more than the calibration does."""
    assert daemon.process
    process, spec = psutil.Process(daemon.process.pid), replace(WIDE, block_size=512)
    peaks = []
    for n_fit in (16, 64):
        peak = 0

        def watched(n_fit: int = n_fit) -> Iterator[pb.CalibrateRequest]:
            nonlocal peak
            for request in requests_of(spec, n_fit, 0, layers_per_group=1):
                peak = max(peak, process.memory_info().rss)
                yield request

        assert refusal(daemon, spec, watched()).startswith("INVALID_ARGUMENT")  # nothing to tune with
        peaks.append(peak)
    block_bytes = 2 * 4 * 4 * 512 * 64 * 2
    assert peaks[1] - peaks[0] < 12 * block_bytes  # of the 48 more that came


# ---- what is refused


@pytest.mark.parametrize(("n_fit", "n_tune"), [(0, 0), (0, 2), (4, 0)], ids=["none", "none to fit", "none to tune"])
def test_too_little_text_is_refused(shared_daemon: DaemonProcess, n_fit: int, n_tune: int) -> None:
    assert refusal(shared_daemon, SPEC, requests_of(SPEC, n_fit, n_tune)).startswith("INVALID_ARGUMENT: ")
    assert listed(shared_daemon) == []


def test_rotary_positions_that_cannot_be_undone_are_refused(shared_daemon: DaemonProcess) -> None:
    rope = RopeSpec(dims=8, theta=1e4, scaling_json='{"factor":2,"rope_type":"nobody knows"}')
    spec = replace(SPEC, layers=(replace(SPEC.layers[0], rope=rope),) * 2)
    assert refusal(shared_daemon, spec, requests_of(spec)).startswith("FAILED_PRECONDITION: ")
    assert listed(shared_daemon) == []


def test_bytes_that_are_no_request_are_refused(shared_daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(shared_daemon.target) as channel:
        call = channel.stream_unary(METHODS["Calibrate"].path)
        with pytest.raises(grpc.RpcError) as refused:
            call(iter([b"\xff\xff\xff"]), timeout=30)
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


# ---- whoever is cut off


def test_a_caller_who_says_nothing_is_hung_up_on_and_makes_room(daemon: DaemonProcess) -> None:
    daemon.restart("--idle-seconds", "1")
    end = threading.Event()

    def silent() -> Iterator[pb.CalibrateRequest]:
        for n, request in enumerate(requests_of(SPEC)):
            yield request
            if n == 10:
                end.wait(60)

    refusals: list[str] = []
    thread = threading.Thread(target=lambda: refusals.append(refusal(daemon, SPEC, silent())))
    thread.start()
    assert wait_until(lambda: "stream ended: nothing came" in daemon.log.read_text())
    end.set()
    thread.join()
    assert refusals[0].startswith("CANCELLED")
    assert listed(daemon) == []
    assert calibrate(daemon, SPEC, requests_of(SPEC)).bundle_id


def test_a_caller_who_leaves_in_the_middle_leaves_nothing(daemon: DaemonProcess) -> None:
    def leaving() -> Iterator[pb.CalibrateRequest]:
        for n, request in enumerate(requests_of(SPEC)):
            if n == 10:
                raise RuntimeError("the model broke")
            yield request

    with pytest.raises(RuntimeError, match="the model broke"):
        calibrate(daemon, SPEC, leaving())
    assert listed(daemon) == []
    assert wait_until(lambda: _is_free(daemon))


def _is_free(daemon: DaemonProcess) -> bool:
    try:
        return bool(calibrate(daemon, SPEC, requests_of(SPEC)).bundle_id)
    except DaemonError as error:
        if "only one is at a time" not in error.message:
            raise
        return False


class Underway:
    """A calibration of a model that takes a moment to fit, in a thread of its own, which is going to be cut off."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.n_sent, self.refusals = 0, list[str]()
        self._log = daemon.log
        self._thread = threading.Thread(target=lambda: self.refusals.append(refusal(daemon, WIDE, self._requests())))

    def _requests(self) -> Iterator[pb.CalibrateRequest]:
        for request in requests_of(WIDE, layers_per_group=4):
            yield request
            self.n_sent += 1

    @property
    def is_fitting(self) -> bool:
        return "fitting" in self._log.read_text()

    def __enter__(self) -> "Underway":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def while_text_comes(calibration: Underway) -> bool:
    return calibration.n_sent > 20


def during_the_fit(calibration: Underway) -> bool:
    return calibration.is_fitting


@pytest.mark.parametrize("moment", [while_text_comes, during_the_fit])
def test_a_daemon_killed_in_the_middle_of_a_calibration_has_nothing_of_it(
    run_dir: Path, moment: Callable[[Underway], bool]
) -> None:
    daemon = DaemonProcess(run_dir)
    daemon.start()
    with daemon.client(SPEC) as client:
        blocks = low_rank_chain(client, range(2 * SPEC.block_size))
        assert [result.code for result in client.put(blocks)] == ["OK"] * 2
    with Underway(daemon) as calibration:
        assert wait_until(lambda: moment(calibration))
        daemon.kill()
    assert calibration.refusals[0].startswith("UNAVAILABLE")
    daemon.start()
    assert listed(daemon) == []
    assert list((daemon.store / "bundles").glob("*")) == []
    assert list(daemon.call("Check", pb.CheckRequest(frames=True)).problems) == []
    assert daemon.status().store.n_blocks == 2
    assert calibrate(daemon, SPEC, requests_of(SPEC)).bundle_id == listed(daemon)[0].bundle_id
    daemon.stop()


def test_a_daemon_that_is_stopped_does_not_wait_for_a_fit(daemon: DaemonProcess) -> None:
    daemon.restart("--drain-seconds", "0.1")
    with Underway(daemon) as calibration:
        assert wait_until(lambda: during_the_fit(calibration))
        assert daemon.stop() == 0
    assert calibration.refusals[0].startswith(("CANCELLED", "UNAVAILABLE"))
    assert "calibrated" not in daemon.log.read_text()
    daemon.start()
    assert listed(daemon) == []
