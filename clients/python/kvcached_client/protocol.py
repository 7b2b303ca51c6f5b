"""The wire, for both ends: every method with its messages, and the chunks that carry tensors.

Bulk bytes stay out of protobuf objects, where each one is copied several times (measured: 1/6 of the speed): a data
chunk is written and read by hand, as the very bytes that protobuf would make of `Chunk(data=...)`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._proto import kvcached_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["KvCache"].full_name
CHUNK_BYTES = 1 << 20  # measured optimum 1-2 MiB; 64 KiB is 3x slower, 16 MiB 2.7x
MAX_MESSAGE_BYTES = 4 << 20  # one message: a chunk, or a list of hashes (a million tokens in blocks of 16: 2 MiB)
MAX_NAMESPACE_BYTES = 255
CLIENT_KEY = "kvcached-client"  # metadata of each call: any text, the same for all calls of one client
MAX_REQUEST_ID_CHARACTERS = 64
MIN_AM_RATIO, MAX_AM_RATIO = 1.0, 8.0
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

Part = pb.Header | memoryview | bytes
_DATA_TAG = (pb.Chunk.DATA_FIELD_NUMBER << 3 | 2).to_bytes(1, "little")  # field number, wire type "length-delimited"


def check_am_ratio(value: object) -> float:
    """A compaction ratio, tokens before over tokens after; text that is a number counts as one.

    Every door goes through here. Raises ValueError for anything but a number from 1 to 8, naming what came.
    """
    try:
        ratio = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        ratio = float("nan")
    if not MIN_AM_RATIO <= ratio <= MAX_AM_RATIO:
        raise ValueError(f"am_ratio must be a number from {MIN_AM_RATIO:g} to {MAX_AM_RATIO:g}, got {value!r}")
    return ratio


def write_chunk(part: Part) -> bytes:
    """The bytes of `Chunk(header=part)` or `Chunk(data=part)`; data is copied once, by join, without the GIL."""
    if isinstance(part, pb.Header):
        return pb.Chunk(header=part).SerializeToString()
    return b"".join((_DATA_TAG, _varint(len(part)), part))


def read_chunk(message: bytes) -> Part:
    """Inverse of `write_chunk`; data is a view. Raises google.protobuf.message.DecodeError for any other bytes."""
    if message[:1] == _DATA_TAG:
        size, start = _read_varint(message, 1)
        if start + size == len(message):
            return memoryview(message)[start:]
    chunk = pb.Chunk.FromString(message)  # a header, or data in an encoding that is valid but not ours
    return chunk.header if chunk.WhichOneof("part") == "header" else chunk.data


def read_payload(parts: Iterator[Part], n_bytes: int) -> np.ndarray:
    """Exactly `n_bytes` of data chunks, copied once. Raises ValueError if the stream has more, fewer or a header."""
    payload, end = np.empty(n_bytes, np.uint8), 0
    while end < n_bytes:
        part = next(parts, None)
        if part is None or isinstance(part, pb.Header) or end + len(part) > n_bytes:
            raise ValueError(f"a payload of {n_bytes} bytes was declared; after {end} came {describe_part(part)}")
        np.copyto(payload[end : end + len(part)], np.frombuffer(part, np.uint8))
        end += len(part)
    return payload


def describe_part(part: Part | None) -> str:
    if part is None:
        return "the end of the stream"
    return f"a header for {part.block_hash.hex()}" if isinstance(part, pb.Header) else f"{len(part)} bytes of data"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """Value, and where it ends; (-1, start) if there is no varint of at most 10 bytes."""
    value = 0
    for i, byte in enumerate(message[start : start + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, start + i + 1
    return -1, start


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the service: its shape, and how its messages become bytes and back."""

    name: str
    sends_stream: bool  # the client, requests
    answers_stream: bool  # the server, responses
    write_request: Callable[[Any], bytes]
    read_request: Callable[[bytes], Any]
    write_response: Callable[[Any], bytes]
    read_response: Callable[[bytes], Any]

    @property
    def path(self) -> str:
        return f"/{SERVICE}/{self.name}"


def _method(descriptor: Any) -> Method:
    def codec(message: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
        if message.name == pb.Chunk.DESCRIPTOR.name:
            return write_chunk, read_chunk
        cls = getattr(pb, message.name)
        return cls.SerializeToString, cls.FromString

    streams = (descriptor.client_streaming, descriptor.server_streaming)
    return Method(descriptor.name, *streams, *codec(descriptor.input_type), *codec(descriptor.output_type))


METHODS: dict[str, Method] = {m.name: _method(m) for m in pb.DESCRIPTOR.services_by_name["KvCache"].methods}
