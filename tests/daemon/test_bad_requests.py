"""Requests that make no sense, and requests for more than there is room for."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from mistakes import (
    MIB,
    SPEC,
    failing,
    fresh_chain,
    is_held,
    raw_stream,
)
from support import DaemonProcess, data_of, header_of, put_parts, wait_until

from kvcached_client import Client, LayerKind, LayerSpec, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import Part

NAMING = [pb.MatchRequest, pb.DeleteRequest, pb.PinRequest, pb.UnpinRequest, pb.GetRequest]


def ask(daemon: DaemonProcess, request: Any) -> str:
    """The message of the failure of a request that names blocks, a Get included."""
    if isinstance(request, pb.GetRequest):
        code, details = raw_stream(daemon, "Get", [request.SerializeToString()])
        return f"{code}: {details}"
    return failing(daemon, type(request).__name__.removesuffix("Request"), request)


@pytest.mark.parametrize("request_type", NAMING, ids=lambda t: t.__name__)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_hashes": [b"\7" * 31]}, "INVALID_ARGUMENT: a block hash has 32 bytes, got 31"),
        ({"block_hashes": [b"\7" * 32, b""]}, "INVALID_ARGUMENT: a block hash has 32 bytes, got 0"),
        ({"namespace": "n" * 256}, "INVALID_ARGUMENT: a namespace has at most 255 bytes, got 'nnn"),
        (
            {"block_hashes": [b"\7" * 32] * 100_001},
            "INVALID_ARGUMENT: at most 100000 blocks in one request, got 100001",
        ),
    ],
    ids=["short hash", "empty hash", "long namespace", "too many"],
)
def test_a_request_that_names_no_blocks_is_refused(
    shared_daemon: DaemonProcess, client: Client, request_type: type, fields: dict[str, Any], message: str
) -> None:
    assert ask(shared_daemon, request_type(model_id=client.model_id, **fields)).startswith(message)


@pytest.mark.parametrize("request_type", NAMING, ids=lambda t: t.__name__)
@pytest.mark.parametrize("model_id", [b"", b"\1" * 31, b"\1" * 32, b"\1" * 1000], ids=["none", "31", "32", "1000"])
def test_a_request_of_an_unknown_model_is_refused(
    shared_daemon: DaemonProcess, request_type: type, model_id: bytes
) -> None:
    request = request_type(model_id=model_id, block_hashes=[b"\7" * 32])
    expected = f"FAILED_PRECONDITION: unknown model {model_id.hex() or '(empty)'}"
    assert ask(shared_daemon, request).startswith(expected[:1000])


@pytest.mark.parametrize("request_type", [pb.MatchRequest, pb.GetRequest], ids=lambda t: t.__name__)
def test_a_floor_that_is_no_fidelity_is_refused(
    shared_daemon: DaemonProcess, client: Client, request_type: type
) -> None:
    request = request_type(model_id=client.model_id, block_hashes=[b"\7" * 32], floor=9)
    assert ask(shared_daemon, request).startswith("INVALID_ARGUMENT: not a fidelity: 9")


LAYER = LayerSpec(n_query_heads=4, n_kv_heads=2, key_dim=8, value_dim=8)
BAD_SPECS: dict[str, tuple[ModelSpec, str]] = {
    "block size": (replace(SPEC, block_size=0), "block_size must be 1 to 65536, got 0"),
    "large block size": (replace(SPEC, block_size=65537), "block_size must be 1 to 65536, got 65537"),
    "no layers": (replace(SPEC, layers=()), "1 to 1024 layers, got 0"),
    "too many layers": (replace(SPEC, layers=(LAYER,) * 1025), "1 to 1024 layers, got 1025"),
    "no weights": (replace(SPEC, fingerprint=type(SPEC.fingerprint)()), "fingerprint.weights must not be empty"),
    "dtype": (replace(SPEC, kv_dtype="int4"), "kv_dtype of dense layers must be one of float16"),
    "dense window": (replace(SPEC, layers=(replace(LAYER, kind=LayerKind.SLIDING_WINDOW),)), "must be opaque"),
    "unequal shapes": (replace(SPEC, layers=(LAYER, replace(LAYER, key_dim=16))), "dense layers must agree on"),
    "no heads": (replace(SPEC, layers=(replace(LAYER, n_kv_heads=0),)), "n_kv_heads must be 1 to 1024"),
    "large dim": (replace(SPEC, layers=(replace(LAYER, key_dim=16385),)), "dims 1 to 16384"),
}


@pytest.mark.parametrize(("spec", "message"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_a_model_that_makes_no_sense_is_refused(shared_daemon: DaemonProcess, spec: ModelSpec, message: str) -> None:
    error = failing(shared_daemon, "RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto()))
    assert error.startswith("INVALID_ARGUMENT: not a model spec")
    assert message in error


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_model_whose_numbers_have_no_json_is_refused(shared_daemon: DaemonProcess, number: float) -> None:
    spec = replace(SPEC, layers=(replace(LAYER, softmax_scale=number),))
    error = failing(shared_daemon, "RegisterModel", pb.RegisterModelRequest(spec=spec.to_proto()))
    assert error.startswith("INVALID_ARGUMENT: not a model spec")


@pytest.mark.parametrize("kind", [0, 77])
def test_a_layer_of_no_known_kind_is_refused(shared_daemon: DaemonProcess, kind: int) -> None:
    message = SPEC.to_proto()
    message.layers[0].kind = kind  # type: ignore[assignment]
    error = failing(shared_daemon, "RegisterModel", pb.RegisterModelRequest(spec=message))
    assert error.startswith(f"INVALID_ARGUMENT: not a model spec: {kind} is not a valid LayerKind")


# ---- bounds


def test_a_quota_smaller_than_a_block_refuses_it_and_nothing_else(daemon: DaemonProcess) -> None:
    daemon.restart("--quota-bytes", "1MiB")
    with daemon.client(SPEC) as client:
        (small,), (large,) = fresh_chain(client, 1), fresh_chain(client, 1, ballast=2 * MIB)
        assert [r.code for r in client.put([small])] == ["OK"]
        (refusal,) = client.put([large])
        assert refusal.code == "RESOURCE_EXHAUSTED"
        assert "the quota is 1048576 bytes" in refusal.message
        assert is_held(client, small, large) == [True, False]
    assert daemon.status().counters['put_blocks_total{outcome="refused"}'] == 1


def test_a_block_above_max_block_bytes_is_refused_until_the_bound_is_raised(daemon: DaemonProcess) -> None:
    daemon.restart("--max-block-bytes", "1MiB")
    with daemon.client(SPEC) as client:
        (block,) = fresh_chain(client, 1, ballast=2 * MIB)
        (refusal,) = client.put([block])
        assert refusal.code == "INVALID_ARGUMENT"
        assert f"a block of {2 * MIB + 512} bytes, at most max_block_bytes = 1048576" in refusal.message
        daemon.call("SetConfig", pb.SetConfigRequest(values={"max_block_bytes": "3MiB"}))
        assert [r.code for r in client.put([block])] == ["OK"]


def test_a_full_queue_refuses_at_once_and_counts_it(daemon: DaemonProcess) -> None:
    daemon.restart("--queue-bytes", "1MiB")
    with daemon.client(SPEC) as client:
        client.match([])
        (slow,), (hasty,) = fresh_chain(client, 1, ballast=MIB), fresh_chain(client, 1)
        go_on = threading.Event()

        def parts() -> Iterator[Part]:
            yield header_of(client, slow)
            go_on.wait(timeout=60)
            yield from data_of(slow)

        answers: list[pb.PutResult] = []
        thread = threading.Thread(target=lambda: answers.extend(put_parts(daemon.target, parts())))
        thread.start()
        assert wait_until(lambda: daemon.status().pool.put_bytes == MIB + 512)
        (refusal,) = client.put([hasty])
        go_on.set()
        thread.join()
        assert refusal.code == "RESOURCE_EXHAUSTED"
        assert "1049088 of 1048576 bytes are under way, no room for 512: try later" in refusal.message
        assert daemon.status().counters['put_blocks_total{outcome="refused"}'] == 1
        assert [a.code for a in answers] == ["OK"]  # alone, a block larger than the queue is let in
        assert [r.code for r in client.put([hasty])] == ["OK"]
