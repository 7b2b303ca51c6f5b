"""Bundles over the wire: installed whole or not at all, of models that are known, removed only with what needs them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import install, low_rank_chain, make_bundle, pieces
from mistakes import failing
from support import DaemonProcess, same_tensors, tiny_spec, wait_until

from kvcached.codec.bundle import MAX_BYTES, PROFILES, Bundle
from kvcached_client import Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec(weights="bundles", block_size=16)
ALL = tuple(PROFILES)


@pytest.fixture(scope="module")
def made() -> list[Bundle]:
    return [make_bundle(SPEC, seed, measured=ALL) for seed in range(2)]


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client whose model the shared daemon knows; no bundles are left behind."""
    with shared_daemon.client(SPEC) as client:
        client.match([])
        yield client
    for bundle in listed(shared_daemon):
        shared_daemon.call("RemoveBundle", pb.RemoveBundleRequest(bundle_id=bundle.bundle_id, with_blocks=True))


def listed(daemon: DaemonProcess) -> list[pb.BundleStatus]:
    return list(daemon.call("ListBundles", pb.ListBundlesRequest()).bundles)


def refused(daemon: DaemonProcess, content: bytes) -> str:
    """What InstallBundle says of bytes that it does not take."""
    return failing(daemon, "InstallBundle", pieces(content))


def files(daemon: DaemonProcess) -> list[str]:
    return sorted(path.name for path in (daemon.store / "bundles").glob("*"))


def test_a_bundle_is_installed_listed_and_said_to_be_current(
    client: Client, shared_daemon: DaemonProcess, made: list[Bundle]
) -> None:
    first, second = made
    unmeasured = install(shared_daemon, replace(second, measured={}))
    before = int(time.time() * 1e6)
    answer = install(shared_daemon, first)
    assert listed(shared_daemon) == [answer, unmeasured]
    assert (answer.bundle_id, answer.model_id, answer.model_name) == (first.bundle_id, client.model_id, "tiny")
    assert (answer.bytes, answer.layers_per_group, answer.n_blocks) == (len(first.pack()), 2, 0)
    assert (answer.current, unmeasured.current) == (True, False)
    assert before <= answer.installed <= int(time.time() * 1e6)
    assert [(p.name, p.target_compression) for p in answer.profiles] == list(PROFILES.items())
    assert {p.name: p.measured for p in answer.profiles} == dict(first.measured)
    assert not any(p.HasField("measured") for p in unmeasured.profiles)
    assert install(shared_daemon, first).installed > answer.installed


@pytest.mark.usefixtures("client")
def test_measurements_make_a_bundle_current(shared_daemon: DaemonProcess, made: list[Bundle]) -> None:
    first, second = made
    install(shared_daemon, first)
    install(shared_daemon, replace(second, measured={}))
    assert [b.current for b in listed(shared_daemon)] == [False, True]
    measured = {"x8": pb.Measured(kl=0.5, engine="mlx_lm 0.32.2", n_tokens=7)}
    request = pb.AttachMeasurementsRequest(bundle_id=second.bundle_id, profiles=measured)
    answer = shared_daemon.call("AttachMeasurements", request).bundle
    assert listed(shared_daemon)[0] == answer
    assert answer.current
    assert [p.measured for p in answer.profiles if p.HasField("measured")] == [measured["x8"]]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({"x64": pb.Measured()}, "INVALID_ARGUMENT: the bundle has profiles near-lossless, x8, x16, x32, got meas"),
        ({"x8": pb.Measured(kl=float("inf"))}, "INVALID_ARGUMENT: finite measurements of a profile at least"),
        ({}, "INVALID_ARGUMENT: finite measurements of a profile at least"),
        ({"x8": pb.Measured(engine="\x1b[2J")}, "INVALID_ARGUMENT: the engine that measured 'x8' must be printable"),
        ({"x8": pb.Measured(engine="e" * 129)}, "INVALID_ARGUMENT: the engine that measured 'x8' must be printable"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(
    shared_daemon: DaemonProcess, made: list[Bundle], profiles: dict[str, pb.Measured], message: str
) -> None:
    bundle = replace(made[0], measured={})
    install(shared_daemon, bundle)
    request = pb.AttachMeasurementsRequest(bundle_id=bundle.bundle_id, profiles=profiles)
    assert failing(shared_daemon, "AttachMeasurements", request).startswith(message)
    assert not listed(shared_daemon)[0].current


@pytest.mark.parametrize("name", ["AttachMeasurements", "RemoveBundle"])
def test_a_bundle_that_is_not_there_is_refused(shared_daemon: DaemonProcess, name: str) -> None:
    request_type = getattr(pb, f"{name}Request")
    expected = f"FAILED_PRECONDITION: unknown bundle {'07' * 32}"
    assert failing(shared_daemon, name, request_type(bundle_id=b"\7" * 32)).startswith(expected)
    assert failing(shared_daemon, name, request_type()).startswith("FAILED_PRECONDITION: unknown bundle (empty)")


# ---- bytes that are no bundle


@pytest.mark.usefixtures("client")
def test_bytes_that_are_no_bundle_are_refused_and_nothing_is_kept(
    shared_daemon: DaemonProcess, made: list[Bundle]
) -> None:
    content = made[0].pack()
    rng = np.random.default_rng(0)
    for cut in rng.integers(1, len(content), 20):
        assert refused(shared_daemon, content[:cut]).startswith("INVALID_ARGUMENT: not a ")
    for at in rng.integers(0, len(content), 50):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        assert refused(shared_daemon, bytes(damaged)).startswith(("INVALID_ARGUMENT", "UNIMPLEMENTED"))
    assert listed(shared_daemon) == []
    assert files(shared_daemon) == []


@pytest.mark.usefixtures("client")
def test_a_bundle_of_a_later_version_is_refused(shared_daemon: DaemonProcess, made: list[Bundle]) -> None:
    later = made[0].pack().replace(b"kvcached bundle 1", b"kvcached bundle 9")
    assert refused(shared_daemon, later).startswith(
        "UNIMPLEMENTED: expected format 'kvcached bundle 1' or 'kvcached bundle 2', got "
    )


@pytest.mark.parametrize(
    ("sizes", "total", "message"),
    [
        ([], 0, f"the first piece says total_bytes, 1 to {MAX_BYTES}, got 0"),
        ([10], 0, f"the first piece says total_bytes, 1 to {MAX_BYTES}, got 0"),
        ([10], MAX_BYTES + 1, f"1 to {MAX_BYTES}, got {MAX_BYTES + 1}"),
        ([10], 11, "a bundle of 11 bytes was declared, got 10"),
        ([10, 2, 1 << 20], 11, "a bundle of 11 bytes was declared, got 12"),
        ([12], 11, "a bundle of 11 bytes was declared, got 12"),
    ],
)
def test_a_stream_that_contradicts_itself_is_refused_and_its_room_given_back(
    shared_daemon: DaemonProcess, sizes: list[int], total: int, message: str
) -> None:
    requests = [pb.InstallBundleRequest(data=bytes(size)) for size in sizes]
    for request in requests[:1]:
        request.total_bytes = total
    error = failing(shared_daemon, "InstallBundle", iter(requests))
    assert error.startswith("INVALID_ARGUMENT: ")
    assert error.endswith(message)
    assert wait_until(lambda: shared_daemon.status().pool.put_bytes == 0)


def test_room_for_a_bundle_is_reserved_before_it_comes(daemon: DaemonProcess) -> None:
    go_on = threading.Event()

    def slow() -> Iterator[pb.InstallBundleRequest]:
        yield pb.InstallBundleRequest(total_bytes=MAX_BYTES, data=b"x")
        go_on.wait(60)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(failing, daemon, "InstallBundle", slow())
        assert wait_until(lambda: daemon.status().pool.put_bytes == MAX_BYTES)
        assert refused(daemon, b"x" * 100).startswith(f"RESOURCE_EXHAUSTED: {MAX_BYTES} of ")
        go_on.set()
        assert first.result(60).startswith(f"INVALID_ARGUMENT: a bundle of {MAX_BYTES} bytes was declared, got 1")
    assert daemon.status().pool.put_bytes == 0


# ---- other models


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, layers=SPEC.layers[:1]), "layers: bundle 1, model 2"),
        (replace(SPEC, kv_dtype="bfloat16"), "dtype: bundle bfloat16, model float16"),
        (
            replace(SPEC, layers=tuple(replace(layer, n_kv_heads=1) for layer in SPEC.layers)),
            "(KV heads, key dim, value dim): bundle {(1, 8, 8)}, model {(2, 8, 8)}",
        ),
        (
            replace(SPEC, layers=tuple(replace(layer, key_dim=16) for layer in SPEC.layers)),
            "(KV heads, key dim, value dim): bundle {(2, 16, 8)}, model {(2, 8, 8)}",
        ),
        (
            replace(SPEC, layers=tuple(replace(n, rope=replace(n.rope, theta=5e5)) for n in SPEC.layers)),
            "rotary positions: bundle RopeSpec(dims=8, theta=500000.0",
        ),
        (tiny_spec(weights="unheard of", block_size=16), "weights: bundle unheard of, model bundles"),
    ],
    ids=["layers", "dtype", "heads", "head_dim", "rope", "weights"],
)
def test_a_bundle_of_another_model_is_refused_and_both_sides_are_named(
    shared_daemon: DaemonProcess, spec: object, message: str
) -> None:
    error = refused(shared_daemon, make_bundle(spec).pack())  # type: ignore[arg-type]
    assert error.startswith("FAILED_PRECONDITION: the bundle is of another model: ")
    assert message in error
    assert listed(shared_daemon) == []


def test_a_bundle_is_refused_where_no_model_is_registered(daemon: DaemonProcess, made: list[Bundle]) -> None:
    expected = "FAILED_PRECONDITION: the bundle is of a model with weights bundles, and no model is registered"
    assert refused(daemon, made[0].pack()) == expected


# ---- removal


def test_a_bundle_in_use_is_removed_only_with_its_blocks(
    client: Client, shared_daemon: DaemonProcess, made: list[Bundle]
) -> None:
    first, second = made
    for bundle in (second, first):
        install(shared_daemon, bundle)
    blocks = low_rank_chain(client, range(64))
    assert all(result.fidelity.bundle_id == first.bundle_id for result in client.put(blocks))
    (other,) = low_rank_chain(client, range(100, 116))
    install(shared_daemon, second)
    assert [result.fidelity.bundle_id for result in client.put([other])] == [second.bundle_id]
    assert {b.bundle_id: b.n_blocks for b in listed(shared_daemon)} == {first.bundle_id: 4, second.bundle_id: 1}
    error = failing(shared_daemon, "RemoveBundle", pb.RemoveBundleRequest(bundle_id=first.bundle_id))
    assert error == f"FAILED_PRECONDITION: 4 blocks cannot be read without bundle {first.bundle_id.hex()}"
    assert len(client.match([b.block_hash for b in blocks], floor=FidelityKind.CODED).hashes) == 4
    request = pb.RemoveBundleRequest(bundle_id=first.bundle_id, with_blocks=True)
    assert shared_daemon.call("RemoveBundle", request).n_deleted == 4
    assert client.match([b.block_hash for b in blocks], floor=FidelityKind.CODED).hashes == ()
    assert [b.bundle_id for b in listed(shared_daemon)] == [second.bundle_id]
    assert files(shared_daemon) == [f"{second.bundle_id.hex()}.safetensors"]
    found = list(client.get([other.block_hash], floor=FidelityKind.CODED))
    assert found[0] is not None


def test_what_stands_on_coded_blocks_leaves_with_them(
    client: Client, shared_daemon: DaemonProcess, made: list[Bundle]
) -> None:
    install(shared_daemon, made[0])
    blocks = low_rank_chain(client, range(200, 264))
    client.put(blocks[:2])
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"fidelity": "exact"}))
    client.put(blocks[2:])
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"fidelity": "auto"}))
    request = pb.RemoveBundleRequest(bundle_id=made[0].bundle_id, with_blocks=True)
    assert shared_daemon.call("RemoveBundle", request).n_deleted == 4
    assert list(shared_daemon.call("Check", pb.CheckRequest(frames=True)).problems) == []


@pytest.mark.usefixtures("client")
def test_an_unused_bundle_is_removed_at_once(shared_daemon: DaemonProcess, made: list[Bundle]) -> None:
    install(shared_daemon, made[0])
    assert shared_daemon.call("RemoveBundle", pb.RemoveBundleRequest(bundle_id=made[0].bundle_id)).n_deleted == 0
    assert (listed(shared_daemon), files(shared_daemon)) == ([], [])


@pytest.mark.usefixtures("client")
def test_puts_that_race_with_a_removal_leave_no_block_that_cannot_be_read(
    shared_daemon: DaemonProcess, made: list[Bundle]
) -> None:
    install(shared_daemon, made[0])
    stop, tokens = threading.Event(), iter(range(1000, 10**9))

    def work() -> int:
        n_stored = 0
        with shared_daemon.client(SPEC) as mine:
            while not stop.is_set():
                n_stored += sum(r.code == "OK" for r in mine.put(low_rank_chain(mine, [next(tokens), *range(47)])))
        return n_stored

    with ThreadPoolExecutor(3) as threads:
        workers = [threads.submit(work) for _ in range(3)]
        try:
            for _ in range(5):
                assert wait_until(lambda: listed(shared_daemon)[0].n_blocks > 0)
                request = pb.RemoveBundleRequest(bundle_id=made[0].bundle_id, with_blocks=True)
                assert shared_daemon.call("RemoveBundle", request).n_deleted > 0
                assert list(shared_daemon.call("Check", pb.CheckRequest(frames=True)).problems) == []
                install(shared_daemon, made[0])
        finally:
            stop.set()
        assert all(worker.result(60) for worker in workers)


# ---- what happens to blocks and files behind our back


def test_a_block_whose_bundle_is_gone_is_a_miss_and_is_left_alone(daemon: DaemonProcess, made: list[Bundle]) -> None:
    with daemon.client(SPEC) as client:
        client.match([])
        install(daemon, made[0])
        blocks = low_rank_chain(client, range(32))
        client.put(blocks)
        hashes = [b.block_hash for b in blocks]
        before = [b.tensors for b in client.get(hashes, floor=FidelityKind.CODED) if b]
    daemon.stop()
    (path,) = (daemon.store / "bundles").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    daemon.start()
    with daemon.client(SPEC) as client:
        assert list(client.get(hashes, floor=FidelityKind.CODED)) == [None, None]
        counters = daemon.status().counters
        assert counters['block_misses_total{reason="unsupported"}'] == 2
        assert counters["corrupt_blocks_total"] == 0
        assert [result.fidelity.kind for result in client.put(low_rank_chain(client, range(50, 66)))] == [
            pb.FIDELITY_KIND_EXACT
        ]
    assert files(daemon) == [path.with_suffix(".damaged").name]
    problems = list(daemon.call("Check", pb.CheckRequest(frames=True)).problems)
    assert len(problems) == 2
    assert all("of bundle" in problem for problem in problems)
    install(daemon, Bundle.unpack(content))
    with daemon.client(SPEC) as client:
        after = [b.tensors for b in client.get(hashes, floor=FidelityKind.CODED) if b]
    assert all(same_tensors(dict(a), dict(b)) for a, b in zip(before, after, strict=True))


def test_blocks_whose_bundle_was_lost_are_not_held_for_anybody_and_can_be_removed(
    daemon: DaemonProcess, made: list[Bundle]
) -> None:
    lost, other = made
    with daemon.client(SPEC) as client:
        client.match([])
        install(daemon, lost)
        blocks = low_rank_chain(client, range(64))
        client.put(blocks)
    daemon.stop()
    for path in (daemon.store / "bundles").iterdir():
        path.unlink()
    daemon.start()
    with daemon.client(SPEC) as client:
        hashes = [b.block_hash for b in blocks]
        assert client.match(hashes, floor=FidelityKind.CODED).hashes == ()
        assert [r.outcome for r in client.put(blocks[:1])] == [pb.OUTCOME_REPLACED]
        install(daemon, other)
        assert [r.outcome for r in client.put(blocks[:2])] == [pb.OUTCOME_ALREADY_HELD, pb.OUTCOME_REPLACED]
        assert client.match(hashes, floor=FidelityKind.CODED).hashes == tuple(hashes[:2])
        request = pb.RemoveBundleRequest(bundle_id=lost.bundle_id)
        assert failing(daemon, "RemoveBundle", request).startswith("FAILED_PRECONDITION: 2 blocks cannot be read")
        request.with_blocks = True
        assert daemon.call("RemoveBundle", request).n_deleted == 2
        assert failing(daemon, "RemoveBundle", request).startswith("FAILED_PRECONDITION: unknown bundle")
    assert list(daemon.call("Check", pb.CheckRequest(frames=True)).problems) == []


def test_two_clients_that_install_different_bundles_at_once_are_both_served(
    client: Client, shared_daemon: DaemonProcess, made: list[Bundle]
) -> None:
    start = threading.Barrier(2)

    def work(bundle: Bundle) -> pb.BundleStatus:
        start.wait(30)
        return install(shared_daemon, bundle)

    for _ in range(5):
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(work, made))
        found = listed(shared_daemon)
        assert {b.bundle_id for b in found} == {bundle.bundle_id for bundle in made}
        assert found[0].installed == max(answer.installed for answer in answers)
        assert [b.current for b in found] == [True, False]
        (result,) = client.put(low_rank_chain(client, [found[0].installed % 1000, *range(15)]))
        assert result.code == "OK"
        request = pb.RemoveBundleRequest(bundle_id=found[0].bundle_id, with_blocks=True)
        shared_daemon.call("RemoveBundle", request)


def test_sigkill_in_the_middle_of_an_install_leaves_the_old_state_and_no_debris(
    run_dir: Path, made: list[Bundle]
) -> None:
    """Killed as soon as the file of a bundle is seen to grow, until one was caught half written."""
    daemon = DaemonProcess(run_dir)
    daemon.start()
    large = tiny_spec(weights="large", block_size=16, n_layers=64)
    bundle = make_bundle(large, layers_per_group=64, profiles=["x8"])
    directory = daemon.store / "bundles"
    n_caught = 0
    for spec in (SPEC, large):
        with daemon.client(spec) as client:
            client.match([])
    install(daemon, made[0])
    for _ in range(20):
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(failing, daemon, "InstallBundle", pieces(bundle.pack()))
            while not list(directory.glob("*.unfinished")) and not answer.done():
                pass
            daemon.kill()
        n_caught += any(directory.glob("*.unfinished"))
        daemon.start()
        found = {b.bundle_id for b in listed(daemon)}
        assert made[0].bundle_id in found
        assert found <= {made[0].bundle_id, bundle.bundle_id}
        assert files(daemon) == sorted(f"{bundle_id.hex()}.safetensors" for bundle_id in found)
        if n_caught:
            break
    assert n_caught
    daemon.stop()
