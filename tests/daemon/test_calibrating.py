"""The Calibrate call: what is received, what is refused, and that whoever leaves early leaves nothing."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import low_rank_tensors, make_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_spec, wait_until

from kvcached import calibrating
from kvcached.block import KVBlock, ModelSpec
from kvcached.cache import Cache
from kvcached.calibrating import Calibrating, needed_bytes
from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.config import Config
from kvcached.errors import InvalidRequestError, KvcachedError, OverloadedError, PreconditionError
from kvcached.metrics import Metrics
from kvcached.pool import WorkerPool
from kvcached.store import Store
from kvcached_client import LayerSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.tensors import calibrate_requests

SPEC = tiny_spec(weights="calibrated", block_size=16)
MIB = 1 << 20
Arrays = dict[str, np.ndarray]
Sample = tuple[pb.CalibrateHeader, Arrays]
Requests = list[pb.CalibrateRequest]


class NotedCalibration:
    """Notes what it is given. `fit` waits for `may_fit`, and answers with a bundle that has nothing to do with it."""

    may_fit = threading.Event()
    compaction_problem = "it does nothing"

    def __init__(self, spec: ModelSpec, layers_per_group: int | None, seed: int) -> None:
        self.spec, self.layers_per_group, self.seed = spec, layers_per_group or len(spec.dense_layers), seed
        self.added: list[tuple[KVBlock, str, np.ndarray | None, np.ndarray | None]] = []
        self.metric: np.ndarray | None = None
        self.profiles: Mapping[str, float] = {}

    def add(
        self, block: KVBlock, part: str, queries: np.ndarray | None = None, query_positions: np.ndarray | None = None
    ) -> None:
        self.added.append((block, part, queries, query_positions))

    def set_output_metric(self, metric: np.ndarray, head_weights: np.ndarray | None = None) -> None:
        self.metric, self.head_weights = metric, head_weights

    def fit(self, profiles: Mapping[str, float], budgets: str) -> Bundle:
        assert self.may_fit.wait(30)
        self.budgets = budgets
        if len(self.added) == 13:
            raise InvalidRequestError("thirteen pieces are too few")
        self.profiles = profiles
        return make_bundle(self.spec, profiles=list(profiles))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    store, pool = Store(tmp_path, quota_bytes=32 * MIB), WorkerPool(1, MIB)
    cache = Cache(store, pool, Metrics(), Config(max_block_bytes=MIB))
    cache.register(SPEC)
    yield cache
    pool.close()
    store.close()


class Calls:
    """Calibrate calls on a cache, in this process. `made` are the calibrations that they began."""

    def __init__(self, cache: Cache) -> None:
        self.made: list[NotedCalibration] = []
        self._calibrating = Calibrating(cache, self._begin)

    def _begin(self, *args: Any) -> Any:
        self.made.append(NotedCalibration(*args))
        return self.made[-1]

    def fitted(
        self, requests: Iterator[pb.CalibrateRequest] | Requests, is_wanted: Callable[[], bool] = lambda: True
    ) -> Bundle:
        return self._calibrating.fitted(iter(requests), is_wanted)


@pytest.fixture
def calls(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(NotedCalibration, "may_fit", threading.Event())
    NotedCalibration.may_fit.set()
    return Calls(cache)


# ---- what callers send


def start(**fields: Any) -> pb.CalibrateStart:
    return pb.CalibrateStart(**{"model_id": SPEC.model_id, **fields})


def text(seed: int = 0, n_tokens: int = 16, part: Any = pb.CALIBRATION_PART_FIT) -> Sample:
    tensors = low_rank_tensors(replace(SPEC, block_size=n_tokens), seed)
    return pb.CalibrateHeader(part=part, first_position=16 * seed, n_tokens=n_tokens), tensors


def with_queries(n_queries: int = 5) -> Sample:
    header, tensors = text()
    rng = np.random.default_rng(1)
    tensors["queries"] = rng.standard_normal((2, 4, n_queries, 8)).astype(np.float32)
    tensors["query_positions"] = np.arange(n_queries, dtype=np.int32)
    return header, tensors


def metric() -> Sample:
    square = np.random.default_rng(2).standard_normal((2, 2, 8, 8)).astype(np.float32)
    return pb.CalibrateHeader(), {"output_metric": square @ square.swapaxes(-1, -2)}


def with_weights(weights: np.ndarray | None = None) -> Sample:
    header, tensors = metric()
    return header, {**tensors, "head_weights": np.ones((2, 2), np.float32) if weights is None else weights}


def stream(*samples: Sample, **fields: Any) -> Requests:
    return list(calibrate_requests(start(**fields), samples))


# ---- what arrives


def test_weights_of_heads_and_what_budgets_go_by_arrive(calls: Calls) -> None:
    weights = np.array([[1, 2], [3, 4]], np.float32)
    calls.fitted(stream(with_weights(weights), text(), budgets="entropy"))
    calls.fitted(stream(metric(), text()))
    first, second = calls.made
    assert np.array_equal(first.head_weights, weights)
    assert (first.budgets, second.budgets, second.head_weights) == ("entropy", "curves", None)


def test_pieces_arrive_as_they_were_sent(calls: Calls) -> None:
    pieces = [text(3, n_tokens=7), text(4, n_tokens=256, part=pb.CALIBRATION_PART_TUNE), with_queries()]
    bundle = calls.fitted(stream(*pieces, metric(), layers_per_group=1, seed=9, profiles={"x16": 17.0, "x8": 0}))
    (calibration,) = calls.made
    assert (calibration.spec, calibration.layers_per_group, calibration.seed) == (SPEC, 1, 9)
    assert [part for _, part, _, _ in calibration.added] == ["fit", "tune", "fit"]
    for (header, sent), (block, _, queries, positions) in zip(pieces, calibration.added, strict=True):
        assert (block.first_position, block.n_source_tokens) == (header.first_position, header.n_tokens)
        came = {**block.to_tensors(), "queries": queries, "query_positions": positions}
        assert all(np.array_equal(came[name], array) for name, array in sent.items())
        assert {name for name, array in came.items() if array is not None} == set(sent)
    assert calibration.metric is not None
    assert np.allclose(calibration.metric, metric()[1]["output_metric"])
    assert np.array_equal(calibration.metric, calibration.metric.swapaxes(-1, -2))
    assert calibration.profiles == {"x8": PROFILES["x8"], "x16": 17.0}
    assert list(bundle.profiles) == ["x8", "x16"]  # the best first, however they were named


def test_without_a_wish_all_profiles_are_fitted_in_groups_of_the_daemons_choice(calls: Calls) -> None:
    calls.fitted(stream(text()))
    assert calls.made[0].profiles == PROFILES


# ---- what is refused


def changed(sample: Sample, name: str = "", array: Any = None, **fields: Any) -> Sample:
    """The sample with another header, or with another tensor, or without one."""
    header, tensors = sample
    header.MergeFrom(pb.CalibrateHeader(**fields))
    if array is None:
        tensors.pop(name, None)
    else:
        tensors[name] = np.asarray(array)
    return header, tensors


def poisoned(sample: Sample, name: str, value: float) -> Sample:
    sample[1][name][(0,) * sample[1][name].ndim] = value
    return sample


SAMPLES: dict[str, tuple[Sample, str]] = {
    "no part": (changed(text(part=0)), "to fit (1) or to tune (2), got part 0"),
    "unknown part": (changed(text(), part=9), "to fit (1) or to tune (2), got part 9"),
    "no tokens": (text(n_tokens=0), "1 to 16 blocks of 16 tokens, got 0 tokens"),
    "too many tokens": (text(n_tokens=257), "1 to 16 blocks of 16 tokens, got 257 tokens"),
    "tokens and shape": (changed(text(), n_tokens=15), "(2, 2, 15, 8)"),
    "late": (changed(text(), first_position=(1 << 31) - 16), "positions must be below 2**31"),
    "later": (changed(text(), first_position=1 << 63), "positions must be below 2**31"),
    "no values": (changed(text(), "values"), "tensors of this piece of calibration data should be"),
    "nothing": (changed(changed(text(), "values"), "keys"), "got {}"),
    "dtype": (changed(text(), "keys", np.zeros((2, 2, 16, 8), np.float32)), "got {'keys': ('float32', (2, 2, 16, 8))"),
    "shape": (changed(text(), "keys", np.zeros((2, 2, 16, 9), np.float16)), "('float16', (2, 2, 16, 9))"),
    "dims": (changed(text(), "keys", np.zeros((512, 8), np.float16)), "('float16', (512, 8))"),
    "opaque": (changed(text(), "state", np.zeros(3)), "('float64', (3,))"),
    "queries alone": (changed(with_queries(), "query_positions"), "'query_positions': ('int32', (1,))"),
    "positions alone": (changed(with_queries(), "queries"), "'queries': ('float32', (2, 4, 5, 8))"),
    "query heads": (changed(with_queries(), "queries", np.zeros((2, 2, 5, 8), np.float32)), "(2, 2, 5, 8)"),
    "query dtype": (changed(with_queries(), "queries", np.zeros((2, 4, 5, 8), np.float16)), "'float16', (2, 4, 5, 8)"),
    "positions dtype": (changed(with_queries(), "query_positions", np.zeros(5, np.int64)), "('int64', (5,))"),
    "positions shape": (changed(with_queries(), "query_positions", np.zeros((5, 1), np.int32)), "('int32', (5, 1))"),
    "too many queries": (
        changed(with_queries(), "query_positions", np.zeros((1 << 20) + 1, np.int32)),
        "queries times tokens of a piece are at most 16777216, got 1048577 and 16",
    ),
    "no queries": (with_queries(0), "(2, 4, 1, 8)"),
    "negative position": (poisoned(with_queries(), "query_positions", -1), "0 to 2**31 - 1, got -1"),
    "NaN in keys": (poisoned(text(), "keys", np.nan), "keys must be finite"),
    "infinity in values": (poisoned(text(), "values", -np.inf), "values must be finite"),
    "NaN in queries": (poisoned(with_queries(), "queries", np.nan), "queries must be finite"),
    "NaN in the metric": (poisoned(metric(), "output_metric", np.nan), "output_metric must be finite"),
    "metric shape": (changed(metric(), "output_metric", np.zeros((2, 4, 8, 8), np.float32)), "(2, 4, 8, 8)"),
    "metric and text": (changed(text(), "output_metric", metric()[1]["output_metric"]), "(2, 2, 8, 8)"),
    "lying metric": (
        changed(metric(), "output_metric", np.tri(8, dtype=np.float32) * np.ones((2, 2, 1, 1), np.float32)),
        "output_metric must be symmetric, got entries that differ by 1",
    ),
    "weights shape": (with_weights(np.ones((2, 3), np.float32)), "'head_weights': ('float32', (2, 2))"),
    "no weight": (with_weights(np.zeros((2, 2), np.float32)), "head_weights must be above 0, got 0.0"),
    "NaN in weights": (poisoned(with_weights(), "head_weights", np.nan), "head_weights must be finite"),
    "data_bytes": (changed(text(), data_bytes=5), "the tensors described take 2048 bytes, data_bytes says 5"),
}


@pytest.mark.parametrize(("sample", "message"), SAMPLES.values(), ids=SAMPLES.keys())
def test_a_piece_that_cannot_be_is_refused(calls: Calls, sample: Sample, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        calls.fitted(stream(text(), sample))
    assert message in str(refused.value)
    assert calls.fitted(stream(text())).spec == SPEC  # and nobody is kept out by it


STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"model_id": b"\1" * 32}, "unknown model 0101"),
    "unknown profile": ({"profiles": {"x8": 8, "x9": 9}}, "profiles are near-lossless, x8, x16, x32, got 'x9'"),
    "nameless profile": ({"profiles": {"": 9}}, "profiles are near-lossless, x8, x16, x32, got ''"),
    "no compression": ({"profiles": {"x8": 0.5}}, "x8 must reach a compression of 1 to 1000, or 0 for the usual one"),
    "too much": ({"profiles": {"x8": 1001}}, "got 1001"),
    "negative": ({"profiles": {"x8": -8}}, "got -8"),
    "NaN": ({"profiles": {"x8": float("nan")}}, "got nan"),
    "infinity": ({"profiles": {"x8": float("inf")}}, "got inf"),
    "budgets": ({"budgets": "greedy"}, "budgets are by curves, entropy, uniform, got 'greedy'"),
    "layers": ({"layers_per_group": 3}, "layers_per_group must be 1 to 2, or 0 for the daemon's choice, got 3"),
}


@pytest.mark.parametrize(("fields", "message"), STARTS.values(), ids=STARTS.keys())
def test_a_start_that_cannot_be_is_refused_at_once(calls: Calls, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcachedError) as refused:
        calls.fitted(stream(text(), **fields))
    assert message in str(refused.value)
    assert calls.made == []


def test_a_model_without_dense_layers_is_refused(cache: Cache, calls: Calls) -> None:
    opaque = tiny_spec(weights="opaque", opaque=True)
    cache.register(opaque)
    with pytest.raises(PreconditionError, match="'tiny' has no dense layers"):
        calls.fitted(stream(model_id=opaque.model_id))


def test_queries_of_a_model_whose_layers_disagree_on_them_are_refused(cache: Cache, calls: Calls) -> None:
    other = replace(SPEC, layers=(SPEC.layers[0], replace(SPEC.layers[0], n_query_heads=6)))
    cache.register(other)
    with pytest.raises(InvalidRequestError, match=r"\[4, 6\] query heads for 2 KV heads"):
        calls.fitted(stream(with_queries(), model_id=other.model_id))
    assert calls.fitted(stream(text(), model_id=other.model_id)).spec == other


def of_streams() -> Iterator[tuple[Requests, str]]:
    """Streams that are no calibration, and why."""
    whole = stream(text())
    opening, header, *halves = whole
    data, empty = pb.CalibrateRequest(data=b"".join(half.data for half in halves)), pb.CalibrateRequest()
    yield [], "a calibration begins with its start, got the end of the stream"
    yield [header, data], "a calibration begins with its start, got a header"
    yield [data], "a calibration begins with its start, got 2048 bytes of data"
    yield [empty], "a calibration begins with its start, got an empty message"
    yield [*whole, opening], "expected a header, got a start"
    yield [*whole, data], "expected a header, got 2048 bytes of data"
    yield [opening, header, header, data], "expected data, got a header"
    yield [opening, header], "a payload of 2048 bytes was declared; after 0 came the end of the stream"
    yield [opening, header, pb.CalibrateRequest(data=bytes(1000))], "after 1000 came the end of the stream"
    yield [opening, header, pb.CalibrateRequest(data=bytes(2049))], "after 0 came 2049 bytes of data"
    yield stream(text(), metric(), metric()), "output_metric was expected once, and came twice"


@pytest.mark.parametrize(("requests", "message"), list(of_streams()), ids=lambda v: v if type(v) is str else "")
def test_a_stream_that_cannot_be_is_refused(calls: Calls, requests: Requests, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        calls.fitted(requests)
    assert message in str(refused.value)
    assert calls.fitted(stream(text())).spec == SPEC


def test_a_piece_larger_than_any_block_is_refused_before_it_is_received(cache: Cache, calls: Calls) -> None:
    large = replace(SPEC, block_size=1024)
    cache.register(large)
    shape = (2, 2, 16384, 8)
    tensors = [pb.Tensor(name=name, dtype="float16", shape=shape) for name in ("keys", "values")]
    header = pb.CalibrateHeader(part=pb.CALIBRATION_PART_FIT, n_tokens=16384, tensors=tensors, data_bytes=2 * MIB)
    opening = pb.CalibrateRequest(start=start(model_id=large.model_id))
    with pytest.raises(InvalidRequestError, match=f"a block of {2 * MIB} bytes, at most max_block_bytes = {MIB}"):
        calls.fitted([opening, pb.CalibrateRequest(header=header)])


def test_a_model_whose_moments_would_fill_the_memory_is_refused(
    cache: Cache, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LayerSpec(n_query_heads=1024, n_kv_heads=1024, key_dim=1024, value_dim=1024)
    huge = replace(SPEC, layers=(layer, layer))
    assert needed_bytes(huge, 2) == (2 * 2 + 12) * 8 * (2 << 20) ** 2
    assert needed_bytes(huge, 1) == (2 * 4 + 12) * 8 * (1 << 20) ** 2
    cache.register(huge)
    with pytest.raises(InvalidRequestError, match=r"half of this machine's memory is .*: choose fewer"):
        calls.fitted(stream(model_id=huge.model_id))
    monkeypatch.setattr(calibrating, "needed_bytes", lambda *_: 0)
    assert calls.fitted(stream(text())).spec == SPEC  # the next one is not kept out


@st.composite
def any_piece(draw: st.DrawFn) -> Requests:
    """A piece with a few things changed to anything, and data that may or may not be its own."""
    header, tensors = draw(st.sampled_from([text, with_queries, metric]))()
    requests = list(calibrate_requests(start(), [(header, tensors)]))[1:]
    said = requests[0].header
    for name in draw(st.lists(st.sampled_from(["part", "first_position", "n_tokens", "data_bytes"]), max_size=2)):
        bits = 31 if name == "part" else 32 if name == "n_tokens" else 64
        setattr(said, name, draw(st.integers(0, 40) | st.integers(0, 2**bits - 1)))
    for tensor in draw(st.lists(st.sampled_from(list(said.tensors)), max_size=2)):
        tensor.name = draw(st.sampled_from([tensor.name, "keys", "queries", "query_positions", "output_metric", ""]))
        tensor.dtype = draw(st.sampled_from([tensor.dtype, "float32", "int32", "bool", "complex64"]))
        if draw(st.booleans()):
            tensor.shape[:] = draw(st.lists(st.integers(0, 9) | st.integers(0, 2**32 - 1), max_size=5))
    data = st.builds(lambda content: pb.CalibrateRequest(data=content), st.binary(max_size=99) | st.just(bytes(2048)))
    extra = draw(st.lists(data | st.just(pb.CalibrateRequest()) | st.just(requests[0]), max_size=2))
    return [*requests, *extra]


@given(pieces=st.lists(any_piece(), max_size=3))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_stream_is_the_daemons_fault(calls: Calls, pieces: list[Requests]) -> None:
    opening = pb.CalibrateRequest(start=start())
    with contextlib.suppress(InvalidRequestError):
        calls.fitted([opening, *(request for piece in pieces for request in piece)])
    assert not calls._calibrating._free.locked()


# ---- one at a time


def test_a_second_calibration_is_refused_until_the_first_one_is_over(calls: Calls) -> None:
    calls.made.clear()
    NotedCalibration.may_fit.clear()
    bundles: list[Bundle] = []
    first = threading.Thread(target=lambda: bundles.append(calls.fitted(stream(text()))))
    first.start()
    assert wait_until(lambda: bool(calls.made and calls.made[0].added))
    with pytest.raises(OverloadedError, match="only one is at a time: try later"):
        calls.fitted(stream(text()))
    NotedCalibration.may_fit.set()
    first.join()
    assert len(bundles) == 1
    assert calls.fitted(stream(text())).bundle_id == bundles[0].bundle_id


def test_whoever_leaves_during_the_fit_need_not_wait_for_it(calls: Calls) -> None:
    NotedCalibration.may_fit.clear()
    with pytest.raises(CancelledError):
        calls.fitted(stream(text()), lambda: False)
    with pytest.raises(OverloadedError):
        calls.fitted(stream(text()))  # the fit goes on
    NotedCalibration.may_fit.set()
    assert wait_until(lambda: not calls._calibrating._free.locked())
    assert calls.fitted(stream(text())).spec == SPEC


def test_a_fit_that_fails_says_why_and_makes_room_for_the_next(calls: Calls) -> None:
    with pytest.raises(InvalidRequestError, match="thirteen pieces are too few"):
        calls.fitted(stream(*[text(n) for n in range(13)]))
    assert calls.fitted(stream(text())).spec == SPEC


def test_a_caller_that_is_lost_makes_room_for_the_next(calls: Calls) -> None:
    def lost() -> Iterator[pb.CalibrateRequest]:
        yield from stream(text())
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        calls.fitted(lost())
    assert calls.fitted(stream(text())).spec == SPEC
