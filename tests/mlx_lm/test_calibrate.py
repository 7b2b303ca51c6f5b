"""From text to a bundle that says what it loses, with a real daemon and a small model."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from impostors import impostor
from mlx_models import build, prefill, save
from support import REFERENCE_MODEL, DaemonProcess

from kvcached_client import Connection, DaemonError, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.tensors import views
from kvcached_mlx import PromptStore, calibrate, capture, fresh_cache, loss, model_spec
from kvcached_mlx.calibrate import Plan, calibrate_engine
from kvcached_mlx.loss import Course
from kvcached_mlx.road import Engine, bundle_of

BLOCK = 64
PLAN = Plan(n_tokens=2400, profiles=("x8", "x16"), course=Course(prefix=3 * BLOCK, continued=64, recomputed=32))


class Letters:
    """A tokenizer for models that know 64 tokens."""

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return ([0] if add_special_tokens else []) + [ord(letter) % 64 for letter in text]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    model, config = build("llama")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    return Engine(model, Letters(), spec, lambda: fresh_cache(model))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words of a small language."""
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 300)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(words, 4000)))
    return path


def test_a_calibrated_model_is_coded_from_then_on_and_its_bundle_says_what_that_costs(
    engine: Engine, text: Path, daemon: DaemonProcess
) -> None:
    told: list[tuple[str, int, int]] = []
    bundle = calibrate_engine(
        engine, PLAN, target=daemon.target, paths=[text], progress=lambda *said: told.append(said)
    )
    assert bundle.current
    assert bundle.model_id == engine.spec.model_id
    assert {profile.name for profile in bundle.profiles} == {"x8", "x16"}
    for profile in bundle.profiles:
        measured = profile.measured
        assert 0 < measured.kl_low <= measured.kl <= measured.kl_high
        assert measured.perplexity_delta_low <= measured.perplexity_delta <= measured.perplexity_delta_high
        assert (measured.n_tokens, measured.n_documents) == (4 * 64, 1)
        assert measured.compression * measured.bits_per_value == pytest.approx(16)
    by_name = {profile.name: profile.measured for profile in bundle.profiles}
    assert by_name["x16"].kl > by_name["x8"].kl
    assert by_name["x16"].bits_per_value < by_name["x8"].bits_per_value
    assert daemon.status().store.n_blocks == 0
    for step in ("compute", "fit", "measure"):
        done = [(a, b) for what, a, b in told if what == step]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]
    store = PromptStore(engine.model, daemon.client(engine.spec))
    cache, tokens = fresh_cache(engine.model), [int(t) for t in np.random.default_rng(3).integers(0, 64, 5 * BLOCK)]
    prefill(engine.model, cache, tokens)
    store.offload(tokens, cache)
    assert store.flush(timeout=30)
    held = store.client.match(store.client.chain(tokens), floor=FidelityKind.CODED).blocks
    assert {(block.fidelity.profile, block.fidelity.bundle_id) for block in held} == {("x8", bundle.bundle_id)}
    store.close()


def stream_of(engine: Engine, plan: Plan, text: Path) -> list[pb.CalibrateRequest]:
    """What a daemon is told that wants none of it in the end."""
    told: list[pb.CalibrateRequest] = []

    def refuse(requests: Iterator[bytes], context: Any) -> bytes:
        told.extend(map(pb.CalibrateRequest.FromString, requests))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not today")
        return b""

    with impostor(Calibrate=refuse) as target, pytest.raises(DaemonError, match="not today"):
        calibrate_engine(engine, plan, target=target, paths=[text])
    return told


def pieces_of(told: list[pb.CalibrateRequest]) -> list[tuple[pb.CalibrateHeader, dict[str, np.ndarray]]]:
    pieces: list[tuple[pb.CalibrateHeader, bytearray]] = []
    for request in told[1:]:
        if request.WhichOneof("part") == "header":
            pieces.append((request.header, bytearray()))
        else:
            pieces[-1][1].extend(request.data)
    return [(header, views(header.tensors, np.frombuffer(data, np.uint8))) for header, data in pieces]


def test_the_daemon_is_told_all_text_that_is_not_for_the_test_with_queries_that_read_what_is_stored(
    engine: Engine, text: Path
) -> None:
    told = stream_of(engine, replace(PLAN, seed=3, layers_per_group=2), text)
    start = told[0].start
    assert (start.model_id, start.seed, start.layers_per_group) == (engine.spec.model_id, 3, 2)
    assert dict(start.profiles) == {"x8": 0, "x16": 0}  # each at its usual compression
    (_, first), *rest = pieces_of(told)
    assert first.keys() == {"output_metric", "head_weights"}
    assert first["head_weights"].mean() == pytest.approx(1)
    n_tokens = dict.fromkeys((pb.CALIBRATION_PART_FIT, pb.CALIBRATION_PART_TUNE), 0)
    for header, arrays in rest:
        n_tokens[header.part] += header.n_tokens
        assert header.first_position == 0
        assert arrays["keys"].shape == arrays["values"].shape == (4, 2, header.n_tokens, 16)
        if "queries" in arrays:
            positions = arrays["query_positions"]
            assert header.part == pb.CALIBRATION_PART_FIT
            assert arrays["queries"].shape == (4, 4, len(positions), 16)
            assert positions.min() >= 132  # of the tokens that come out of a store it reads at least one
            assert len(set(positions.tolist())) == len(positions)
            assert positions.max() < header.n_tokens
    assert sum("queries" in arrays for _, arrays in rest) > 5
    assert n_tokens == {pb.CALIBRATION_PART_FIT: 1920, pb.CALIBRATION_PART_TUNE: 480}


def test_the_same_seed_tells_the_daemon_the_same_and_another_one_other_text(engine: Engine, text: Path) -> None:
    def told(seed: int) -> list[pb.CalibrateRequest]:
        return stream_of(engine, replace(PLAN, seed=seed), text)[1:]

    assert told(1) == told(1) != told(2)


def test_a_model_that_does_not_show_how_its_cache_is_read_is_calibrated_without(
    engine: Engine, text: Path, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture, "output_metric", lambda *_: None)
    plan = replace(PLAN, profiles=("x8",))
    assert calibrate_engine(engine, plan, target=daemon.target, paths=[text]).current
    assert "does not show how its cache is read" in caplog.text


def test_what_fails_while_measuring_leaves_no_blocks_and_a_bundle_that_nobody_uses(
    engine: Engine, text: Path, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the model broke")

    monkeypatch.setattr(loss.Loss, "add", broken)
    with pytest.raises(RuntimeError, match="the model broke"):
        calibrate_engine(engine, PLAN, target=daemon.target, paths=[text])
    assert daemon.status().store.n_blocks == 0
    (model,) = daemon.status().models
    with Connection(daemon.target) as connection:
        assert [bool(b.profiles[0].HasField("measured")) for b in _bundles(connection)] == [False]
    assert model.spec.name == engine.spec.name


def _bundles(connection: Connection) -> list[pb.BundleStatus]:
    return list(connection.call("ListBundles", pb.ListBundlesRequest()).bundles)


def test_too_little_text_is_refused_before_anything_is_computed(
    engine: Engine, tmp_path: Path, daemon: DaemonProcess
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    broken = replace(engine, model=None)
    with pytest.raises(ValueError, match=r"\d+ tokens of text are needed.* got 12"):
        calibrate_engine(broken, PLAN, target=daemon.target, paths=[tmp_path / "short.txt"])
    assert not daemon.status().models


def test_a_model_that_has_nothing_to_code_is_refused(tmp_path: Path) -> None:
    model, config = build("mamba2")
    spec = model_spec(model, save(model, config, tmp_path), block_size=BLOCK)
    with pytest.raises(ValueError, match="no plain attention"):
        calibrate_engine(Engine(model, Letters(), spec, lambda: fresh_cache(model)), PLAN, target="unix:/nowhere")


def test_without_a_daemon_calibration_fails_by_name(engine: Engine, text: Path, run_dir: Path) -> None:
    with pytest.raises(DaemonError, match="UNAVAILABLE"):
        calibrate_engine(engine, PLAN, target=f"unix:{run_dir}/nobody.sock", paths=[text])


def test_a_profile_that_the_bundle_lacks_is_refused_by_name(
    engine: Engine, text: Path, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate_engine(engine, replace(PLAN, profiles=("x8",)), target=daemon.target, paths=[text])
    monkeypatch.setattr(calibrate, "load", lambda _: engine)
    monkeypatch.setattr(calibrate, "_course", lambda *_: PLAN.course)  # the usual one is for blocks of 256
    measured = calibrate.evaluate("model", target=daemon.target, texts=[text], profiles=["x8"])
    assert measured["x8"].kl > 0
    with pytest.raises(ValueError, match=r"has the profiles x8, not \['x32'\]"):
        calibrate.evaluate("model", target=daemon.target, texts=[text], profiles=["x32"])
    with Connection(daemon.target) as connection:
        bundle = bundle_of(connection, engine.spec.model_id)
    assert bundle is not None
    assert bundle.profiles[0].measured != measured["x8"]  # of other text: nothing is attached


def test_tools_find_the_adapter_and_it_loads_models_by_their_path() -> None:
    (found,) = entry_points(group="kvcached.engines", name="mlx-lm")
    module = found.load()
    assert callable(module.calibrate)
    assert callable(module.evaluate)
    engine = module.load(str(REFERENCE_MODEL))
    assert (engine.spec.block_size, engine.spec.name) == (256, "qwen3-5m")
    assert engine.tokenizer.encode("a")[0] == 0
