"""What blocks are stored as: by setting, by namespace, by put; and what they are when they come back."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, product

import numpy as np
import pytest
from bundles import install, low_rank_chain, make_bundle
from support import DaemonProcess, data_of, header_of, put_parts, same_tensors, tiny_spec

from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.config import FIDELITIES
from kvcached.encoding import COMPACTED
from kvcached.records import improves
from kvcached_client import Block, Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.spec import kind_to_proto

_serial = count()
EXACT, CODED = pb.FIDELITY_KIND_EXACT, pb.FIDELITY_KIND_CODED
ALL = tuple(PROFILES)


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client of a model of its own, known to the daemon."""
    spec = tiny_spec(weights=f"fidelity {next(_serial)}", block_size=16)
    with shared_daemon.client(spec) as client:
        client.match([])
        yield client
    shared_daemon.call("SetConfig", pb.SetConfigRequest(values={"fidelity": "auto", "namespace_fidelity": ""}))


@pytest.fixture
def bundle(client: Client, shared_daemon: DaemonProcess) -> Bundle:
    """The client's model was calibrated and measured."""
    bundle = make_bundle(client.spec, measured=ALL)
    install(shared_daemon, bundle)
    return bundle


def put(client: Client, block: Block, **fields: object) -> pb.PutResult:
    header = header_of(client, block)
    header.MergeFrom(pb.Header(**fields))  # type: ignore[arg-type]
    (result,) = put_parts(client._connection.target, [header, *data_of(block)])
    return result


def put_fresh(client: Client, **fields: object) -> pb.PutResult:
    seed = next(_serial)
    (block,) = low_rank_chain(client, [seed, *range(15)], seed)
    return put(client, block, **fields)


def stored_as(result: pb.PutResult) -> str:
    assert result.code == "OK", result
    return result.fidelity.profile if result.fidelity.kind == CODED else "exact"


def configure(client: Client, **settings: str) -> None:
    client._connection.call("SetConfig", pb.SetConfigRequest(values=settings), 10.0)


# ---- which fidelity


def test_the_settings_name_all_profiles() -> None:
    assert ("auto", "exact", *PROFILES, *COMPACTED) == FIDELITIES


def test_blocks_are_exact_until_their_model_has_a_bundle_that_says_what_it_loses(
    client: Client, shared_daemon: DaemonProcess
) -> None:
    def current() -> bytes:
        (model,) = [m for m in shared_daemon.status().models if m.model_id == client.model_id]
        return model.bundle_id

    assert stored_as(put_fresh(client)) == "exact"
    bundle = make_bundle(client.spec)
    assert not install(shared_daemon, bundle).current
    assert (stored_as(put_fresh(client)), current()) == ("exact", b"")
    request = pb.AttachMeasurementsRequest(bundle_id=bundle.bundle_id, profiles={"x16": pb.Measured(kl=0.1)})
    assert client._connection.call("AttachMeasurements", request, 10.0).bundle.current
    assert (stored_as(put_fresh(client)), current()) == ("exact", bundle.bundle_id)  # of x8 nobody knows the loss
    request = pb.AttachMeasurementsRequest(bundle_id=bundle.bundle_id, profiles={"x8": pb.Measured(kl=0.1)})
    client._connection.call("AttachMeasurements", request, 10.0)
    result = put_fresh(client)
    assert stored_as(result) == "x8"
    assert result.fidelity.bundle_id == bundle.bundle_id


@pytest.mark.parametrize("profile", ALL)
def test_a_block_comes_back_as_its_profile_left_it(client: Client, bundle: Bundle, profile: str) -> None:
    blocks = low_rank_chain(client, range(48))
    results = [put(client, block, store_as=profile) for block in blocks]
    assert [stored_as(result) for result in results] == [profile] * 3
    found = list(client.get([b.block_hash for b in blocks], floor=FidelityKind.CODED))
    for block, again in zip(blocks, found, strict=True):
        assert again is not None
        assert (again.fidelity.kind, again.fidelity.profile) == (FidelityKind.CODED, profile)
        assert again.fidelity.bundle_id == bundle.bundle_id
        for name, tensor in block.tensors.items():
            error = np.abs(again.tensors[name].astype(np.float32) - tensor.astype(np.float32))
            assert 0 < error.max() < 4 * {"near-lossless": 0.125, "x8": 0.5, "x16": 1, "x32": 2}[profile]
    assert list(client.get([blocks[0].block_hash])) == [None]  # the floor is EXACT unless a caller says otherwise


def test_worse_profiles_take_fewer_bytes_on_disk(shared_daemon: DaemonProcess) -> None:
    spec = tiny_spec(weights=f"fidelity {next(_serial)}", block_size=256)
    with shared_daemon.client(spec) as client:
        client.match([])
        install(shared_daemon, make_bundle(spec, measured=ALL))
        tensors = low_rank_chain(client, range(256))[0].tensors
        sizes = []
        for name in ("exact", "near-lossless", "x32"):
            (block,) = low_rank_chain(client, [next(_serial), *range(255)])
            result = put(client, replace(block, tensors=tensors), store_as=name)
            assert stored_as(result) == name
            sizes.append(result.stored_bytes)
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.usefixtures("bundle")
def test_the_put_beats_the_namespace_and_that_the_setting(client: Client) -> None:
    assert stored_as(put_fresh(client)) == "x8"
    configure(client, fidelity="x32")
    assert stored_as(put_fresh(client)) == "x32"
    configure(client, namespace_fidelity="=x16, other=exact")
    assert stored_as(put_fresh(client)) == "x16"
    assert stored_as(put_fresh(client, store_as="near-lossless")) == "near-lossless"
    assert stored_as(put_fresh(client, store_as="exact")) == "exact"
    configure(client, namespace_fidelity="other=exact")
    assert stored_as(put_fresh(client)) == "x32"
    with Client(client.spec, namespace="other", target=client._connection.target) as other:
        assert stored_as(put_fresh(other)) == "exact"
    configure(client, fidelity="exact")
    assert stored_as(put_fresh(client)) == "exact"


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize(
    ("minimum", "expected"),
    [(EXACT, "exact"), (CODED, "x16"), (pb.FIDELITY_KIND_COMPACTED, "x16"), (0, "x16")],
    ids=["exact", "coded", "compacted", "unspecified"],
)
def test_a_put_can_say_the_least_that_it_accepts(client: Client, minimum: pb.FidelityKind, expected: str) -> None:
    assert stored_as(put_fresh(client, store_as="x16", min_fidelity=minimum)) == expected


def test_a_profile_that_the_bundle_lacks_is_stored_exactly(client: Client, shared_daemon: DaemonProcess) -> None:
    assert stored_as(put_fresh(client, store_as="x8")) == "exact"
    install(shared_daemon, make_bundle(client.spec, profiles=["x16"], measured=["x16"]))
    assert stored_as(put_fresh(client, store_as="x8")) == "exact"
    assert stored_as(put_fresh(client, store_as="x16")) == "x16"


def test_a_put_can_name_a_bundle_that_nobody_measured(
    client: Client, bundle: Bundle, shared_daemon: DaemonProcess
) -> None:
    other = make_bundle(client.spec, seed=1)
    install(shared_daemon, other)
    result = put_fresh(client, store_as="x8", store_as_bundle=other.bundle_id)
    assert (stored_as(result), result.fidelity.bundle_id) == ("x8", other.bundle_id)
    assert put_fresh(client, store_as="x8").fidelity.bundle_id == bundle.bundle_id


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"store_as": "x64"},
            "store_as is empty, exact or one of near-lossless, x8, x16, x32, compacted-x8, compacted-x16, got 'x64'",
        ),
        ({"store_as": "auto"}, "store_as is empty, exact or one of near-lossless, x8"),
        ({"store_as_bundle": bytes(32)}, "store_as_bundle goes with a profile in store_as, got ''"),
        ({"store_as": "exact", "store_as_bundle": bytes(32)}, "goes with a profile in store_as, got 'exact'"),
        ({"store_as": "x8", "store_as_bundle": bytes(31)}, "a bundle id has 32 bytes, got 31"),
        ({"min_fidelity": 9}, "not a fidelity: 9"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(client: Client, fields: dict[str, object], message: str) -> None:
    result = put_fresh(client, **fields)
    assert result.code == "INVALID_ARGUMENT"
    assert message in result.message


def test_a_bundle_that_is_unknown_or_of_another_model_is_refused(client: Client, shared_daemon: DaemonProcess) -> None:
    result = put_fresh(client, store_as="x8", store_as_bundle=bytes(32))
    assert (result.code, result.message) == ("FAILED_PRECONDITION", f"unknown bundle {'00' * 32}: install it first")
    other = tiny_spec(weights=f"fidelity {next(_serial)}", block_size=16)
    with shared_daemon.client(other) as others:
        others.match([])
    bundle = make_bundle(other)
    install(shared_daemon, bundle)
    result = put_fresh(client, store_as="x8", store_as_bundle=bundle.bundle_id)
    ours, theirs = client.spec.fingerprint.weights, other.fingerprint.weights
    assert result.code == "FAILED_PRECONDITION"
    assert result.message == f"the bundle is of another model: weights: bundle {theirs}, model {ours}"


# ---- what cannot be coded


def fallbacks(daemon: DaemonProcess, reason: str) -> float:
    return daemon.status().counters.get(f'exact_fallback_blocks_total{{reason="{reason}"}}', 0)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30])
def test_a_block_with_numbers_that_cannot_be_coded_is_stored_exactly_and_counted(
    shared_daemon: DaemonProcess, number: float
) -> None:
    spec = tiny_spec(weights=f"fidelity {next(_serial)}", block_size=16, kv_dtype="float32")
    with shared_daemon.client(spec) as client:
        client.match([])
        install(shared_daemon, make_bundle(spec, measured=ALL))
        before = fallbacks(shared_daemon, "values")
        good, bad = low_rank_chain(client, [next(_serial), *range(31)])
        bad.tensors["values"][1, 1, 9, 3] = number
        assert [stored_as(put(client, block)) for block in (good, bad)] == ["x8", "exact"]
        assert fallbacks(shared_daemon, "values") == before + 1
        (found,) = client.get([bad.block_hash])
        assert found
        assert same_tensors(dict(found.tensors), dict(bad.tensors))


@pytest.mark.usefixtures("bundle")
def test_models_are_named_once_in_the_log_for_blocks_that_cannot_be_coded(
    client: Client, shared_daemon: DaemonProcess
) -> None:
    before = shared_daemon.log.read_text().count("block stored exactly")
    for _ in range(3):
        (block,) = low_rank_chain(client, [next(_serial), *range(15)])
        block.tensors["keys"][0, 0, 7, 0] = np.nan
        assert stored_as(put(client, block)) == "exact"
    assert shared_daemon.log.read_text().count("block stored exactly") == before + 1


def test_blocks_without_dense_layers_are_stored_exactly(shared_daemon: DaemonProcess) -> None:
    spec = tiny_spec(weights=f"fidelity {next(_serial)}", block_size=16, opaque=True)
    with shared_daemon.client(spec) as client:
        client.match([])
        (block,) = low_rank_chain(client, range(16))
        tensors = {"state.0": np.arange(10, dtype=np.float32)}
        assert stored_as(put(client, replace(block, tensors=tensors), store_as="x8")) == "exact"


@pytest.mark.usefixtures("bundle")
def test_opaque_tensors_beside_coded_ones_come_back_bit_for_bit(client: Client) -> None:
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    block = replace(block, tensors={**block.tensors, "state.3": np.array([np.nan, 1, -0.0], np.float32)}, boundary=True)
    assert stored_as(put(client, block, store_as="x32")) == "x32"
    (found,) = client.get([block.block_hash], floor=FidelityKind.CODED)
    assert found
    assert found.boundary
    assert found.tensors["state.3"].tobytes() == block.tensors["state.3"].tobytes()


# ---- better and worse


@pytest.mark.usefixtures("bundle")
def test_a_better_profile_replaces_a_worse_one_and_never_the_other_way(client: Client) -> None:
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    better_and_better = ["x32", "x16", "x8", "near-lossless", "exact"]
    outcomes = []
    for n, name in enumerate(better_and_better):
        outcomes.append(put(client, block, store_as=name).outcome)
        for worse in better_and_better[: n + 1]:
            result = put(client, block, store_as=worse)
            assert (result.outcome, stored_as(result)) == (pb.OUTCOME_ALREADY_HELD, name)
    assert outcomes == [pb.OUTCOME_STORED, *[pb.OUTCOME_REPLACED] * 4]


def test_the_same_profile_of_another_bundle_replaces_nothing(
    client: Client, bundle: Bundle, shared_daemon: DaemonProcess
) -> None:
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    assert put(client, block, store_as="x8").outcome == pb.OUTCOME_STORED
    install(shared_daemon, make_bundle(client.spec, seed=1, measured=ALL))
    result = put(client, block, store_as="x8")
    assert (result.outcome, result.fidelity.bundle_id) == (pb.OUTCOME_ALREADY_HELD, bundle.bundle_id)


@pytest.mark.usefixtures("bundle")
def test_a_block_computed_on_a_lossy_prefix_neither_replaces_nor_answers_for_an_exact_one(client: Client) -> None:
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    hashes, lossy = [block.block_hash], {"lineage": CODED}
    assert put(client, block, store_as="exact", **lossy).outcome == pb.OUTCOME_STORED
    assert client.match(hashes).hashes == ()
    assert list(client.get(hashes)) == [None]
    (found,) = client.get(hashes, floor=FidelityKind.CODED)
    assert found
    assert (found.fidelity.kind, found.lineage) == (FidelityKind.EXACT, FidelityKind.CODED)
    assert put(client, block, store_as="exact").outcome == pb.OUTCOME_REPLACED
    assert put(client, block, store_as="exact", **lossy).outcome == pb.OUTCOME_ALREADY_HELD
    (found,) = client.get(hashes)
    assert found
    assert found.lineage == FidelityKind.EXACT


def entry(name: str, lineage: pb.FidelityKind = EXACT, boundary: bool = False) -> pb.Entry:
    """Named as in settings; a compacted one with its ratio: "compacted-x8@4"."""
    name, _, ratio = name.partition("@")
    kind = EXACT if name == "exact" else pb.FIDELITY_KIND_COMPACTED if ratio else CODED
    profile = "" if name == "exact" else COMPACTED.get(name, name)
    fidelity = pb.Fidelity(kind=kind, profile=profile, am_ratio=float(ratio or 0))
    return pb.Entry(fidelity=fidelity, lineage=lineage, boundary=boundary)


def test_what_improves_is_better_in_something_and_worse_in_nothing() -> None:
    order = ["compacted-x8@8", "compacted-x8@1.1", "x32", "x16", "x8", "near-lossless", "exact"]
    cases = list(product(range(len(order)), (CODED, EXACT), (False, True)))
    for new, held in product(cases, cases):
        ranks = [(a, kind_to_proto(FidelityKind(b)), c) for a, b, c in (new, held)]
        expected = all(a >= b for a, b in zip(*ranks, strict=True)) and ranks[0] != ranks[1]
        assert improves(entry(order[new[0]], *new[1:]), entry(order[held[0]], *held[1:])) == expected


@pytest.mark.parametrize(
    ("new", "held", "expected"),
    [
        ("compacted-x8@2", "compacted-x8@4", True),
        ("compacted-x8@4", "compacted-x16@4", True),
        ("compacted-x8@2", "compacted-x16@4", True),
        ("compacted-x8@4", "compacted-x8@4", False),
        ("compacted-x8@4.1", "compacted-x8@4.1", False),  # which no float32 is
        ("compacted-x8@4", "compacted-x16@2", False),  # better in one respect and worse in the other
        ("compacted-x16@2", "compacted-x8@4", False),
    ],
)
def test_of_compacted_blocks_that_of_the_better_profile_and_lower_ratio_improves(
    new: str, held: str, expected: bool
) -> None:
    assert improves(entry(new), entry(held)) == expected


@pytest.mark.usefixtures("bundle")
def test_hits_and_times_are_counted_under_the_fidelity_that_was_stored(
    client: Client, shared_daemon: DaemonProcess
) -> None:
    before = shared_daemon.status().counters.get('block_hits_total{fidelity="CODED"}', 0)
    (block,) = low_rank_chain(client, [next(_serial), *range(15)])
    put(client, block)
    assert [b is not None for b in client.get([block.block_hash], floor=FidelityKind.CODED)] == [True]
    assert shared_daemon.status().counters['block_hits_total{fidelity="CODED"}'] == before + 1
    (model,) = [m for m in shared_daemon.status().models if m.model_id == client.model_id]
    assert [(f.kind, f.n_blocks) for f in model.fidelities] == [(CODED, 1)]


def test_coded_blocks_are_read_after_a_restart_and_the_store_is_sound(daemon: DaemonProcess) -> None:
    spec = tiny_spec(weights="restart", block_size=16)
    with daemon.client(spec) as client:
        client.match([])
        install(daemon, make_bundle(spec, measured=ALL))
        blocks = low_rank_chain(client, range(64))
        assert [stored_as(result) for result in client.put(blocks)] == ["x8"] * 4
        before = [b.tensors for b in client.get([b.block_hash for b in blocks], floor=FidelityKind.CODED) if b]
    daemon.restart()
    with daemon.client(spec) as client:
        after = [b.tensors for b in client.get([b.block_hash for b in blocks], floor=FidelityKind.CODED) if b]
    assert len(after) == 4
    assert all(same_tensors(dict(a), dict(b)) for a, b in zip(before, after, strict=True))
    report = daemon.call("Check", pb.CheckRequest(frames=True))
    assert (list(report.problems), report.n_frames_decoded) == ([], 4)
