"""Nothing that anybody sends kills the daemon, and nothing is its fault."""

from typing import Any

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from mistakes import MIB, SPEC, Change, fresh_chain, raw_stream, set_fields, set_tensor, set_tokens
from support import DaemonProcess, header_of, put_parts, wait_until

from kvcached.errors import KvcachedError
from kvcached_client import DaemonError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import SERVICE, Part

OUR_FAULT = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "UNIMPLEMENTED", "DATA_LOSS", KvcachedError.code}
numbers = st.integers(0, 2**32 - 1) | st.integers(0, 9)
shapes = st.lists(numbers | st.sampled_from([0, 1, 2, 4, 8]), max_size=5)
hashes = st.binary(max_size=40) | st.just(bytes(32))


@st.composite
def mutations(draw: st.DrawFn) -> Change:
    """One field of a header, changed to anything."""
    kinds: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(("model_id", "block_hash", "parent_hash"), hashes),
        **dict.fromkeys(("index", "n_tokens"), numbers),
        **dict.fromkeys(("first_position", "data_bytes"), st.integers(0, 2**64 - 1) | st.integers(0, 2000)),
        **dict.fromkeys(("lineage", "min_fidelity"), st.integers(-(2**31), 2**31 - 1) | st.integers(0, 5)),
        **dict.fromkeys(("namespace", "request_id"), st.text(max_size=300)),
        **dict.fromkeys(("boundary", "found"), st.booleans()),
    }
    name = draw(st.sampled_from([*kinds, "token_ids", "fidelity", "tensor", "more tensors"]))
    if name == "token_ids":
        return set_tokens(*draw(st.lists(numbers, max_size=6)))
    if name == "fidelity":
        kind, profile, ratio = draw(st.integers(0, 9)), draw(st.text(max_size=20)), draw(st.floats(width=32))
        fidelity = pb.Fidelity(kind=kind, profile=profile, am_ratio=ratio, bundle_id=draw(hashes))  # type: ignore[arg-type]
        return lambda header: header.fidelity.CopyFrom(fidelity)
    if name == "tensor":
        shape, dtype = draw(shapes), draw(st.sampled_from(["int8", "float16", "bool", "complex64", ""]))
        return set_tensor(draw(st.integers(0, 1)), shape=shape, dtype=dtype)
    if name == "more tensors":
        tensor = pb.Tensor(name=draw(st.text(max_size=9)), dtype="int8", shape=draw(shapes))
        return lambda header: header.tensors.append(tensor)
    return set_fields(**{name: draw(kinds[name])})


@given(changes=st.lists(mutations(), min_size=1, max_size=3), data=st.binary(max_size=600), honest=st.booleans())
@settings(max_examples=100)
def test_no_header_and_no_data_are_the_daemons_fault(
    shared_daemon: DaemonProcess, changes: list[Change], data: bytes, honest: bool
) -> None:
    with shared_daemon.client(SPEC) as client:
        client.match([])
        header = header_of(client, fresh_chain(client, 1)[0])
        for change in changes:
            change(header)
        parts: list[Part] = [header, bytes(header.data_bytes) if honest and header.data_bytes < MIB else data]
        try:
            codes = {result.code for result in put_parts(shared_daemon.target, parts)}
        except DaemonError as error:
            codes = {error.code}
        assert not codes & OUR_FAULT
        assert still_well(shared_daemon)


def still_well(daemon: DaemonProcess) -> bool:
    status = daemon.status()
    assert daemon.process is not None
    return status.pid == daemon.process.pid and wait_until(lambda: daemon.status().pool.put_bytes == 0)


messages = st.binary(max_size=80) | st.binary(max_size=80).map(lambda tail: b"\x12" + tail)


@given(name=st.sampled_from(["Put", "Get"]), junk=st.lists(messages, min_size=1, max_size=4))
@settings(max_examples=100)
def test_no_bytes_on_a_stream_are_the_daemons_fault(shared_daemon: DaemonProcess, name: str, junk: list[bytes]) -> None:
    code, _ = raw_stream(shared_daemon, name, junk)
    assert code not in OUR_FAULT
    assert still_well(shared_daemon)


UNARY = ["RegisterModel", "Match", "Delete", "Pin", "Unpin", "GetConfig", "Status", "SetConfig"]


@given(name=st.sampled_from(UNARY), junk=st.binary(max_size=80))
@settings(max_examples=100)
def test_no_bytes_of_a_request_are_the_daemons_fault(shared_daemon: DaemonProcess, name: str, junk: bytes) -> None:
    with grpc.insecure_channel(shared_daemon.target) as channel:
        code = channel.unary_unary(f"/{SERVICE}/{name}").future(junk, timeout=30).code()
    assert code.name not in OUR_FAULT
    assert still_well(shared_daemon)


def test_bytes_that_are_no_message_are_the_callers_fault_and_named(shared_daemon: DaemonProcess) -> None:
    code, details = raw_stream(shared_daemon, "Put", [b"\xff"])
    assert code == "INVALID_ARGUMENT"
    assert details.startswith("not a message of Put: Error parsing message")
