"""The five faults that reviewers found in oMLX's PR #418, each with a test that would catch it here.

The pull request brought the same two papers into a server for Macs; shared/design/codec.md has the list.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from bundles import install, low_rank_chain, make_bundle, pieces
from codec.recipes import SMALL, content_of, sealed
from daemon.test_calibration import calibrated, compression, model, text
from loss import HeldOut
from mistakes import failing
from reference_model import ReferenceModel
from safetensors.numpy import load
from support import DaemonProcess, put_all, tiny_spec
from under_test import Coded, Course, Half, keep

from kvcached.block import KVBlock, ModelSpec
from kvcached.calibration import Calibration
from kvcached.codec import klt, planes, quantize
from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.errors import CorruptBundleError, InvalidRequestError, PreconditionError
from kvcached.pool import Pipeline, WorkerPool
from kvcached_client import Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec(weights="pr418", block_size=16)


# ---- 1. bit allocation never allocated: every component got the same 8 bits


def bits_of_components(bundle: Bundle, block: KVBlock) -> np.ndarray:
    """Empirical entropy of each kept component's symbols; of keys and values, all groups."""
    coder, split = bundle.coder("x8"), planes.split(block, bundle.spec, bundle.layers_per_group)
    bits = []
    for rows, plane in zip((*split.keys, *split.values), (*coder.keys, *coder.values), strict=True):
        symbols = quantize.quantize(klt.project(rows, plane.basis), plane.tables.steps, coder.dead_zone)
        for column in symbols.T:
            p = np.unique(column, return_counts=True)[1] / len(column)
            bits.append(float(-(p @ np.log2(p))))
    return np.array(bits)


def test_bits_follow_the_spectrum_and_meet_the_budget() -> None:
    bundle = calibrated().fit({"x8": 8})
    bits = bits_of_components(bundle, text(100))
    assert bits.max() > 4 * np.median(bits)
    assert len(np.unique(np.round(bits))) >= 3
    n_values = sum(len(basis.mean) for basis in (*bundle.keys, *bundle.values))
    assert 0.5 < bits.sum() / n_values < 16 / 8


def test_twice_the_text_does_not_buy_twice_the_bits() -> None:
    """The PR multiplied its budget by the number of tokens, which bought every component all it could get."""
    longer = calibrated()
    for seed in (102, 103):
        longer.add(text(seed), "tune")
    compressions = [compression(c.fit({"x8": 8}), "x8", text(104)) for c in (calibrated(), longer)]
    assert compressions == pytest.approx([8, 8], rel=0.1)


# ---- 2. the pipeline was built lazily, without a lock


def test_32_threads_that_ask_at_once_get_one_pipeline_and_one_coder_that_were_made_once() -> None:
    bundle, built, read = make_bundle(SPEC), [], []
    pool, start = WorkerPool(1, 1), threading.Barrier(32)

    def get(bundle_id: bytes) -> Bundle:
        read.append(bundle_id)
        time.sleep(0.05)  # so that the others come meanwhile
        return bundle

    def build(spec: ModelSpec) -> Pipeline:
        built.append(spec)
        time.sleep(0.05)
        return Pipeline(spec, get)

    def ask(_n: int) -> tuple[int, int]:
        start.wait(60)
        pipeline = pool.pipeline(SPEC, build)
        return id(pipeline), id(pipeline.coder(bundle.bundle_id, "x8"))

    with ThreadPoolExecutor(32) as threads:
        assert len(set(threads.map(ask, range(32)))) == 1
    pool.close()
    assert (len(built), len(read)) == (1, 1)


# ---- 3. the bundle was never checked against the model


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    with shared_daemon.client(SPEC) as client:
        client.match([])
        yield client


@pytest.mark.usefixtures("client")
def test_a_bundle_that_fits_no_model_is_not_installed(shared_daemon: DaemonProcess) -> None:
    for other in (tiny_spec(weights="pr418", block_size=16, n_layers=3), replace(SPEC, kv_dtype="bfloat16")):
        error = failing(shared_daemon, "InstallBundle", pieces(make_bundle(other).pack()))
        assert error.startswith("FAILED_PRECONDITION: the bundle is of another model: ")
        assert "bundle" in error.partition("model: ")[2]


def test_a_bundle_is_checked_against_a_model_of_the_same_shapes_too() -> None:
    """Shapes alone would not tell: the same model fine-tuned, or with another theta."""
    bundle = make_bundle(SPEC)
    for other in (
        replace(SPEC, fingerprint=replace(SPEC.fingerprint, weights="fine-tuned")),
        replace(SPEC, layers=tuple(replace(n, rope=replace(n.rope, theta=1e6)) for n in SPEC.layers)),
    ):
        with pytest.raises(PreconditionError, match=r"bundle .*, model "):
            bundle.check_fits(other)


# ---- 4. a ratio of 0 divided by zero


@pytest.mark.parametrize("target", [0, -0.0, -1, float("nan"), float("inf"), float("-inf"), 1e-300, 0.999])
def test_a_compression_that_makes_no_sense_is_refused(target: float) -> None:
    calibration = Calibration(model())
    for index in range(4):
        calibration.add(text(index), "fit")
    calibration.add(text(100), "tune")
    with pytest.raises(InvalidRequestError, match="x8 must reach a compression of 1 to 1e6, got"):
        calibration.fit({"x8": target})


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("target", [-1.0, 0.5, 1001.0, float("nan"), float("inf"), float("-inf")])
def test_the_wire_refuses_such_a_compression_and_says_what_is_allowed(
    shared_daemon: DaemonProcess, target: float
) -> None:
    """0 is a field that was left out, and means the usual one."""
    start = pb.CalibrateStart(model_id=SPEC.model_id, profiles={"x8": target})
    error = failing(shared_daemon, "Calibrate", iter([pb.CalibrateRequest(start=start)]))
    assert error.startswith("INVALID_ARGUMENT: x8 must reach a compression of 1 to 1000")


@pytest.mark.parametrize("target", [0, 0.0, -1.0, 0.5, 1e7, "8", None])
def test_a_bundle_with_a_target_that_makes_no_sense_is_no_bundle(target: object) -> None:
    file = SMALL.bundle().pack()
    content = content_of(file)
    del content["checksum"]
    content["profiles"]["x8"]["target_compression"] = target
    with pytest.raises(CorruptBundleError):
        Bundle.unpack(sealed(content, load(file)))


# ---- 5. nothing measured what was lost


def test_a_loss_that_nobody_measured_is_nobodys_default(client: Client, shared_daemon: DaemonProcess) -> None:
    install(shared_daemon, make_bundle(SPEC))
    (block,) = put_all(client, low_rank_chain(client, range(16)))
    (found,) = client.get([block.block_hash])
    assert found is not None
    assert found.fidelity.kind == FidelityKind.EXACT
    install(shared_daemon, make_bundle(SPEC, measured=list(PROFILES)))
    (block,) = put_all(client, low_rank_chain(client, range(100, 116)))
    (found,) = client.get([block.block_hash], floor=FidelityKind.CODED)
    assert found is not None
    assert found.fidelity.kind == FidelityKind.CODED


@pytest.mark.slow  # runs the reference model
def test_the_bench_sees_damage_that_cosine_similarity_does_not() -> None:
    cosines = []

    def damage(keys: Half, values: Half, first_position: int) -> Coded:
        rng = np.random.default_rng(first_position)
        damaged = []
        for rows in (keys.astype(np.float32), values.astype(np.float32)):
            noisy = rows + 0.1 * rows.std() * rng.standard_normal(rows.shape, np.float32)
            cosines.append(float((rows * noisy).sum() / np.linalg.norm(rows) / np.linalg.norm(noisy)))
            damaged.append(noisy.astype(np.float16))
        return Coded(damaged[0], damaged[1], 16.0 * keys.size, 16.0, 1)

    held_out = HeldOut(ReferenceModel(), 2, Course(n_prefix=256, block_size=64, n_recomputed=32, n_continued=128))
    kl = held_out.loss(damage).mean_kl()
    assert min(cosines) > 0.99
    assert kl.low > 1e-4
    assert held_out.loss(keep).mean_kl().value == 0
