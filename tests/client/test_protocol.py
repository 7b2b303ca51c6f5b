"""The wire: chunks written by hand are the very bytes that protobuf makes, and every method has its codec."""

from collections.abc import Iterator

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import (
    METHODS,
    SERVICE,
    Part,
    check_am_ratio,
    describe_part,
    read_chunk,
    read_payload,
    write_chunk,
)

payloads = st.binary(max_size=300) | st.integers(120, 20_000).map(bytes)


@given(payloads)
def test_data_is_written_as_protobuf_writes_it(data: bytes) -> None:
    expected = pb.Chunk(data=data).SerializeToString()
    assert write_chunk(data) == expected
    assert write_chunk(memoryview(data)) == expected


@given(payloads)
def test_data_is_read_back_whoever_wrote_it(data: bytes) -> None:
    for message in (write_chunk(data), pb.Chunk(data=data).SerializeToString()):
        part = read_chunk(message)
        assert not isinstance(part, pb.Header)
        assert bytes(part) == data


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_data_in_an_unusual_but_valid_encoding_is_read_too(first: bytes, last: bytes) -> None:
    twice = write_chunk(first) + write_chunk(last)  # of a field that occurs twice, the last counts
    long_varint = b"\x12" + bytes([len(last) & 0x7F | 0x80, len(last) >> 7 | 0x80, 0]) + last
    for message in (twice, long_varint):
        part = read_chunk(message)
        assert not isinstance(part, pb.Header)
        assert bytes(part) == last == pb.Chunk.FromString(message).data


@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 2**32 - 1), max_size=9), st.text(max_size=9))
def test_headers_survive(block_hash: bytes, token_ids: list[int], namespace: str) -> None:
    header = pb.Header(block_hash=block_hash, token_ids=token_ids, namespace=namespace, found=True)
    message = write_chunk(header)
    assert message == pb.Chunk(header=header).SerializeToString()
    assert read_chunk(message) == header


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"\x12" + tail))
def test_random_bytes_are_read_as_protobuf_reads_them(message: bytes) -> None:
    try:
        expected = pb.Chunk.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_chunk(message)
        return
    part = read_chunk(message)
    if isinstance(part, pb.Header):
        assert part == expected.header
    else:
        assert bytes(part) == expected.data


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_a_payload_is_joined_from_its_chunks_and_no_further(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    parts: Iterator[Part] = iter([*chunks, b"next"])
    assert read_payload(parts, len(whole)).tobytes() == whole
    assert b"next" in list(parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "after 0 came the end of the stream"),
        ([b"abc"], "after 3 came the end of the stream"),
        ([b"abc", b"defgh"], "after 3 came 5 bytes of data"),
        ([b"ab", pb.Header(block_hash=b"\xab")], "after 2 came a header for ab"),
    ],
)
def test_a_payload_that_is_not_as_declared_raises_value_error(parts: list[Part], message: str) -> None:
    with pytest.raises(ValueError, match=f"a payload of 4 bytes was declared; {message}"):
        read_payload(iter(parts), 4)


def test_a_payload_of_no_bytes_takes_nothing_from_the_stream() -> None:
    parts: Iterator[Part] = iter([b"next"])
    assert read_payload(parts, 0).dtype == np.uint8
    assert list(parts) == [b"next"]


def test_parts_are_described_in_words() -> None:
    parts: list[Part | None] = [None, b"abc", pb.Header(block_hash=b"\x01\x02")]
    assert [describe_part(p) for p in parts] == ["the end of the stream", "3 bytes of data", "a header for 0102"]


def test_every_method_has_its_messages_and_only_put_and_get_stream() -> None:
    assert {m.name for m in METHODS.values() if m.answers_stream} == {"Put", "Get"}
    assert METHODS["Match"].path == f"/{SERVICE}/Match" == "/kvcached.v1.KvCache/Match"
    for service_method in pb.DESCRIPTOR.services_by_name["KvCache"].methods:
        method = METHODS[service_method.name]
        if service_method.input_type.name != "Chunk":
            request = getattr(pb, service_method.input_type.name)()
            assert method.read_request(method.write_request(request)) == request
        if service_method.output_type.name != "Chunk":
            response = getattr(pb, service_method.output_type.name)()
            assert method.read_response(method.write_response(response)) == response


@pytest.mark.parametrize("ratio", [1, 1.0, 4, 2.5, 8, "1", "4", " 2.5 ", "8e0"])
def test_a_ratio_from_1_to_8_is_taken_as_a_number_or_as_its_text(ratio: object) -> None:
    assert check_am_ratio(ratio) == float(ratio)


@pytest.mark.parametrize(
    "ratio", [0, -1, 0.5, 8.01, float("nan"), float("inf"), "four", "", "nan", True, None, 10**400]
)
def test_any_other_ratio_is_refused_with_what_is_allowed_and_what_came(ratio: object) -> None:
    with pytest.raises(ValueError, match="am_ratio must be a number from 1 to 8, got ") as refused:
        check_am_ratio(ratio)
    assert repr(ratio) in str(refused.value)
